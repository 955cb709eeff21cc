"""The inputs of an update: samples, the conditions under which they are drawn, and named random streams.

The tensors of an update have a leading axis of the seeds that are trained together: [K, B, ...]; K is 1 for a single
seed.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dxmi.distributed import Share


class Condition(NamedTuple):
    """The conditions of samples; a field is None if there are no conditions of this kind.

    Attributes:
        labels: Class of each sample, int64, [B].
        embeddings: Sequences that a network attends to, [B, L, D].
        prompts: Index of each sample's prompt in the data set's list, int64, [B].
    """

    labels: Tensor | None = None
    embeddings: Tensor | None = None
    prompts: Tensor | None = None

    def rows(self, rows: slice | Tensor) -> "Condition":
        """Select the conditions of some of the samples."""
        return Condition(*(None if tensor is None else tensor[rows] for tensor in self))


UNCONDITIONAL = Condition()


class Batch(NamedTuple):
    """One process's part of a batch.

    Attributes:
        x: Real samples, images in [-1, 1] or points, [K, b, *event]; None for algorithms that do not read data.
        condition: Condition of each real sample and of the sample generated along with it, [K, b, ...].
        share: The rows of the whole batch that this part consists of.
    """

    x: Tensor | None
    condition: Condition
    share: Share

    @classmethod
    def single(cls, x: Tensor | None, num: int, condition: Condition = UNCONDITIONAL) -> "Batch":
        """Create a batch of one seed and one process.

        Args:
            x: Real samples, [B, *event].
            num: Number of samples, B.
            condition: Condition of each sample, [B, ...].
        """
        whole = Condition(*(None if own is None else own.unsqueeze(0) for own in condition))
        return cls(None if x is None else x.unsqueeze(0), whole, Share(0, num, num))

    @classmethod
    def stacked(cls, batches: "Sequence[Batch]") -> "Batch":
        """Concatenate the batches of several seeds along the seed axis."""
        first = batches[0]
        if len(batches) == 1:
            return first
        x = None if first.x is None else torch.cat([batch.x for batch in batches if batch.x is not None])
        columns = zip(*(batch.condition for batch in batches), strict=True)
        condition = Condition(*(None if column[0] is None else torch.cat(column) for column in columns))
        return cls(x, condition, first.share)


class Streams:
    """Named random streams of one or several seeds; drawn tensors have a leading seed axis, [K, ...].

    Every process draws for the whole batch and then takes its rows, so that results do not depend on the number of
    processes.

    Args:
        generators: Generators by name, one mapping per seed.
    """

    fixed: ClassVar[bool] = False
    """Whether drawn tensors are on the device and are overwritten in place between iterations, so that the operations
    of an iteration must not depend on their values."""

    def __init__(self, generators: Sequence[Mapping[str, torch.Generator]]) -> None:
        self._generators = generators

    def draw(self, name: str, sample: Callable[[torch.Generator], Tensor]) -> Tensor:
        """Call `sample` with the generator `name` of every seed, and stack the results: [K, ...]."""
        drawn = [sample(own[name]) for own in self._generators]
        return drawn[0].unsqueeze(0) if len(drawn) == 1 else torch.stack(drawn)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Draw standard normal numbers on the device of the stream, [K, *shape]."""
        return self.draw(name, lambda own: torch.randn(shape, generator=own, device=own.device))
