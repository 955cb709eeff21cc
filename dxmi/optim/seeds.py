"""Training of one or several seeds of a module in one program.

Algorithms are written for tensors with a leading seed axis: [K, ...]. With one seed, a function is called directly.
With several, the members' tensors become rows of tables, and a function is mapped over the rows by `torch.vmap`. Each
member has its own weights and data; they are computed at the same time. A member remains a separate module, which is
saved, restored and evaluated as usual.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call

from dxmi.tensors import map_tensors, tensors_of, with_tensors


class Seeds(ABC):
    """The seeds that one program trains.

    Attributes:
        size: Number of seeds, K.
    """

    size: int

    @abstractmethod
    def map(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Call `function` for every seed; the tensors that it returns are stacked along a leading seed axis.

        Args:
            function: Function that may read the module of the first member; its tensors are replaced with those of
                each member in turn.
            inputs: Nested tuples and dicts of tensors [K, ...]; other values are passed to all seeds.
        """

    @abstractmethod
    def table(self, tensor: Tensor) -> Tensor:
        """A parameter or saved buffer of the first member, for all seeds: [K, *shape]; may be changed in place."""


class SingleSeed(Seeds):
    """A single seed."""

    size = 1

    def map(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Call `function` once; the tensors that it returns get a leading axis of length 1."""
        return map_tensors(lambda x: x.unsqueeze(0), function(*map_tensors(lambda x: x[0], inputs)))

    def table(self, tensor: Tensor) -> Tensor:
        """A view of the tensor with a leading axis, [1, *shape]."""
        return tensor.unsqueeze(0)


SINGLE_SEED = SingleSeed()


class _Caller(nn.Module):
    """Wraps a module so that `functional_call` can call any function that reads the module."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *inputs: Any) -> Any:
        return function(*inputs)


class StackedSeeds(Seeds):
    """Several seeds; the parameters and saved buffers of their modules become rows of tables.

    An in-place change of a table changes the modules.

    Args:
        modules: Modules of the same class and shapes, with equal values of buffers that are not saved and of all
            attributes that are not tensors.
        unmapped: Names of submodules that no mapped function reads.

    Attributes:
        tables: Parameters and saved buffers by name, each [K, *shape].
    """

    def __init__(self, modules: Sequence[nn.Module], unmapped: Sequence[str] = ()) -> None:
        self.size = len(modules)
        self.tables: dict[str, Tensor] = {}
        members = [module.state_dict(keep_vars=True) for module in modules]
        for name, first in members[0].items():
            table = torch.stack([member[name].detach() for member in members]).contiguous()
            for row, member in zip(table, members, strict=True):
                member[name].data = row
            self.tables[name] = table.requires_grad_(first.requires_grad)
        self._name_of = {id(tensor): name for name, tensor in members[0].items()}
        self._template = _Caller(modules[0])
        self._mapped = {
            f"module.{name}": table for name, table in self.tables.items() if name.partition(".")[0] not in unmapped
        }

    def map(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Call `function` for all seeds with `torch.vmap`."""

        def member(tensors: dict[str, Tensor], leaves: list[Tensor]) -> Any:
            own = with_tensors(inputs, iter(leaves))
            return functional_call(self._template, tensors, (function, *own), tie_weights=False)

        return torch.vmap(member, randomness="different")(self._mapped, tensors_of(inputs))

    def table(self, tensor: Tensor) -> Tensor:
        """The table whose first row is this tensor of the first member."""
        return self.tables[self._name_of[id(tensor)]]
