"""Exponential moving averages of weights: the policy that is evaluated, and Polyak-averaged targets."""

from collections.abc import Sequence
from typing import Self

import torch
from torch import Tensor, nn

from dxmi.optim.seeds import StackedSeeds


class MovingAverage:
    """An exponential moving average of a module's parameters, kept in a second module of the same shape.

    Args:
        sources: Tensors that are averaged.
        targets: Tensors that hold the averages.
        decay: Decay of the average.
        warm_up: Whether the decay of iteration i (from 0) is min(decay, (1 + i) / (10 + i)), so that an average that is
            evaluated early is not dominated by its initial value. Not used for target networks, whose lag is intended.
    """

    def __init__(self, sources: list[Tensor], targets: list[Tensor], decay: float, *, warm_up: bool = True) -> None:
        self.decay = decay
        self.warm_up = warm_up
        self.sources = sources
        self.targets = targets
        # A tensor, so that an update recorded as a CUDA graph uses its current value.
        self._weight = torch.zeros((), device=targets[0].device if targets else None)

    @classmethod
    def between(cls, source: nn.Module, target: nn.Module, decay: float, *, warm_up: bool = True) -> Self:
        """Create an average of the parameters of `source`, kept in `target`, that starts from their current values."""
        target.load_state_dict(source.state_dict())
        target.requires_grad_(False)
        return cls(list(source.parameters()), list(target.parameters()), decay, warm_up=warm_up)

    @classmethod
    def stacked(cls, seeds: StackedSeeds, members: Sequence[Self]) -> Self:
        """Combine the averages of several seeds into one."""
        first = members[0]
        sources, targets = ([seeds.table(tensor) for tensor in side] for side in (first.sources, first.targets))
        return cls(sources, targets, first.decay, warm_up=first.warm_up)

    def schedule(self, iteration: int) -> None:
        """Set the decay of `iteration`."""
        decay = min(self.decay, (1.0 + iteration) / (10.0 + iteration)) if self.warm_up else self.decay
        self._weight.fill_(1.0 - decay)

    @torch.no_grad()
    def update(self) -> None:
        """Move the averages towards the sources."""
        torch._foreach_lerp_(self.targets, self.sources, [self._weight] * len(self.targets))
