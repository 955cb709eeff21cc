"""Modules of one shape as one: each tensor a table with a row for each module, which is that module's own tensor.

A stack trains several seeds in one program. Each member stays a module of its own, to be saved, restored and evaluated
as ever; only the arithmetic of training is done for all of them at once, under `torch.vmap`.
"""

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dxmi.optim.optimizer import MovingAverage, Optimizer


class _Parts(nn.Module):
    """A module whose `forward` calls any of its methods, as `functional_call` needs it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, method: str, *args: Tensor | None, **static: Any) -> Any:
        return getattr(self.module, method)(*args, **static)


class Stack:
    """K modules as one.

    From here on their parameters and saved buffers are rows of this stack's tables: what changes a table in place
    changes them.

    Args:
        modules: of one class and shape; what is no tensor, and buffers that are not saved, are the same in all of them.

    Attributes:
        tables: parameters and saved buffers by name, each [K, *shape].
    """

    def __init__(self, modules: Sequence[nn.Module]) -> None:
        self.tables: dict[str, Tensor] = {}
        self._modules = modules
        members = [module.state_dict(keep_vars=True) for module in modules]
        for name, first in members[0].items():
            table = torch.stack([member[name].detach() for member in members]).contiguous()
            for row, member in zip(table, members, strict=True):
                member[name].data = row
            self.tables[name] = table.requires_grad_(first.requires_grad)
        self._name_of = {id(tensor): name for name, tensor in members[0].items()}
        self._template = _Parts(modules[0])

    def __len__(self) -> int:
        return len(self._modules)

    def table(self, tensor: Tensor) -> Tensor:
        """The table whose first row is this tensor of the first module."""
        return self.tables[self._name_of[id(tensor)]]

    def of(self, *parts: str) -> dict[str, Tensor]:
        """The tables of some submodules, and single ones, as `call` takes them."""
        return {
            f"module.{name}": table
            for name, table in self.tables.items()
            if any(name == part or name.startswith(f"{part}.") for part in parts)
        }

    def call(self, tables: Mapping[str, Tensor], method: str, *args: Tensor | None, **static: Any) -> Any:
        """What a method gives for every member, stacked.

        Args:
            tables: all that the method reads of the module, from `of`.
            method: its name.
            args: stacked along a first axis, or None for all members.
            static: the same for all members.
        """

        def member(tensors: dict[str, Tensor], *own: Tensor | None) -> Any:
            return functional_call(self._template, tensors, (method, *own), static, tie_weights=False)

        axes = (0, *(None if arg is None else 0 for arg in args))
        return torch.vmap(member, in_dims=axes, randomness="different")(dict(tables), *args)

    def average(self, members: Sequence[MovingAverage]) -> MovingAverage:
        """The members' moving averages as one."""
        first = members[0]
        sources, targets = ([self.table(tensor) for tensor in side] for side in (first.sources, first.targets))
        return MovingAverage(sources, targets, first.decay, warm_up=first.warm_up)


class StackedOptimizer(Optimizer):
    """The optimisers of a stack's members as one: every member has its own state and is clipped by its own norm.

    Losses, and what is logged, are [K].

    Args:
        stack: of the modules that they train.
        members: one optimiser for each module, all at the same step.
    """

    def __init__(self, stack: Stack, members: Sequence[Optimizer]) -> None:
        first = members[0]
        groups = [
            ([stack.table(parameter) for parameter in group["params"]], rate)
            for group, rate in zip(first.torch.param_groups, first.rates, strict=True)
        ]
        super().__init__(first.config, groups, first.total)  # type: ignore[arg-type]
        self._members = members
        self._linked = False
        if first.torch.state:
            self._take_over()

    def _take_over(self) -> None:
        """Begin with what the members have."""
        for table, *rows in zip(self.parameters, *(member.parameters for member in self._members), strict=True):
            states = [member.torch.state[row] for member, row in zip(self._members, rows, strict=True)]
            self.torch.state[table] = {key: _joined([state[key] for state in states]) for key in states[0]}
        self._link()

    def _link(self) -> None:
        """Let the members' states be rows of this one's."""
        for k, member in enumerate(self._members):
            for table, row in zip(self.parameters, member.parameters, strict=True):
                state = self.torch.state[table]
                member.torch.state[row] = {key: value if value.dim() == 0 else value[k] for key, value in state.items()}
        self._linked = True

    def descend(self, parts: Iterable[Any]) -> Any:
        """As `Optimizer.descend`, for every member."""
        descent = super().descend(parts)
        if not self._linked:  # the state comes into being with the first step
            self._link()
        return descent

    def _gradients(self, loss: Tensor) -> tuple[Tensor, ...]:
        """Of each member's loss, as no other's depends on its parameters."""
        return torch.autograd.grad(loss.sum(), self.parameters)

    def _clip(self, max_norm: float) -> Tensor:
        """As torch's `clip_grad_norm_`, with a norm for each member: [K]."""
        grads = [parameter.grad.flatten(1) for parameter in self.parameters if parameter.grad is not None]
        norms: Tensor = torch.stack([grad.norm(dim=1) for grad in grads]).norm(dim=0)
        scale = (max_norm / (norms + 1e-6)).clamp(max=1.0)
        for grad in grads:
            grad.mul_(scale[:, None])
        return norms


def _joined(rows: list[Tensor]) -> Tensor:
    """Rows as a table; a count of steps is the same in all of them."""
    return rows[0].clone() if rows[0].dim() == 0 else torch.stack(rows)
