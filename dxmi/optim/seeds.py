"""One seed or several of one module as one program.

Algorithms are written once, on tensors with the seeds in front: [K, ...]. With one seed, a function is called as it is.
With several, the members' tensors become rows of tables, and a function is mapped over them by `torch.vmap`. Each
member has its own weights and data, and the arithmetic is done for all of them at once. A member stays a module of its
own, to be saved, restored and evaluated as before.
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
        size: how many, K.
    """

    size: int

    @abstractmethod
    def map(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """What `function` returns for every seed, with the seeds in front of every tensor.

        Args:
            function: reads the first member's module, in whose place every member's tensors are put.
            inputs: nested tuples and dicts of tensors [K, ...]; whatever is not a tensor is the same for all seeds.
        """

    @abstractmethod
    def table(self, tensor: Tensor) -> Tensor:
        """A parameter or saved buffer of the first member, of all seeds: [K, *shape], to be changed in place."""


class SingleSeed(Seeds):
    """One seed by itself."""

    size = 1

    def map(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """What `function` returns, with an axis of length 1 in front of every tensor."""
        return map_tensors(lambda x: x.unsqueeze(0), function(*map_tensors(lambda x: x[0], inputs)))

    def table(self, tensor: Tensor) -> Tensor:
        """A view of the tensor, [1, *shape]."""
        return tensor.unsqueeze(0)


SINGLE_SEED = SingleSeed()


class _Caller(nn.Module):
    """A module whose `forward` calls a function that reads it, as `functional_call` needs it."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, function: Callable[..., Any], *inputs: Any) -> Any:
        return function(*inputs)


class StackedSeeds(Seeds):
    """Several seeds, whose modules' parameters and saved buffers become rows of tables.

    Whatever changes a table in place changes them.

    Args:
        modules: of one class and shape; values that are not tensors, and buffers that are not saved, are equal in all.
        unmapped: submodules that no mapped function reads.

    Attributes:
        tables: parameters and saved buffers by name, each [K, *shape].
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
        """As `Seeds.map`, by one call of `torch.vmap`."""

        def member(tensors: dict[str, Tensor], leaves: list[Tensor]) -> Any:
            own = with_tensors(inputs, iter(leaves))
            return functional_call(self._template, tensors, (function, *own), tie_weights=False)

        return torch.vmap(member, randomness="different")(self._mapped, tensors_of(inputs))

    def table(self, tensor: Tensor) -> Tensor:
        """The table whose first row is this tensor of the first member."""
        return self.tables[self._name_of[id(tensor)]]
