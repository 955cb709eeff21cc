"""What one update is given: samples, the conditions under which they are drawn, and named random streams.

Tensors of an update have the seeds that are trained together in front: [K, B, ...], where K is 1 for a run by itself.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from dxmi.distributed import Share


class Condition(NamedTuple):
    """What samples are conditioned on; every field is None where there is nothing of its kind.

    Attributes:
        labels: classes, int64, [B].
        embeddings: sequences that a network attends to, [B, L, D].
        prompts: number of each prompt in the data set's list, int64, [B].
    """

    labels: Tensor | None = None
    embeddings: Tensor | None = None
    prompts: Tensor | None = None

    def rows(self, rows: slice | Tensor) -> "Condition":
        """The conditions of some of the samples."""
        return Condition(*(None if tensor is None else tensor[rows] for tensor in self))


UNCONDITIONAL = Condition()


class Batch(NamedTuple):
    """One process's part of a batch.

    Attributes:
        x: real samples in [-1, 1], this process's rows of the batch, [K, b, *event]; None for algorithms without data.
        condition: of the real samples and of those generated next to them, [K, b, ...].
        share: which rows of the whole batch these are.
    """

    x: Tensor | None
    condition: Condition
    share: Share

    @classmethod
    def single(cls, x: Tensor | None, num: int, condition: Condition = UNCONDITIONAL) -> "Batch":
        """A batch of one seed and one process.

        Args:
            x: real samples, [B, *event].
            num: B.
            condition: of each sample, [B, ...].
        """
        whole = Condition(*(None if own is None else own.unsqueeze(0) for own in condition))
        return cls(None if x is None else x.unsqueeze(0), whole, Share(0, num, num))

    @classmethod
    def stacked(cls, batches: "Sequence[Batch]") -> "Batch":
        """The batches of several seeds as one, with all seeds in front."""
        first = batches[0]
        if len(batches) == 1:
            return first
        x = None if first.x is None else torch.cat([batch.x for batch in batches if batch.x is not None])
        columns = zip(*(batch.condition for batch in batches), strict=True)
        condition = Condition(*(None if column[0] is None else torch.cat(column) for column in columns))
        return cls(x, condition, first.share)


class Streams:
    """Named random streams of one or several seeds; what is drawn has the seeds in front, [K, ...].

    Every process draws for the whole batch and then takes its rows, so that results do not depend on how many processes
    there are.

    Args:
        generators: those of each seed, by name.
    """

    def __init__(self, generators: Sequence[Mapping[str, torch.Generator]]) -> None:
        self._generators = generators

    def draw(self, name: str, sample: Callable[[torch.Generator], Tensor]) -> Tensor:
        """What `sample` gives for the generator of that name of every seed: [K, ...]."""
        drawn = [sample(own[name]) for own in self._generators]
        return drawn[0].unsqueeze(0) if len(drawn) == 1 else torch.stack(drawn)

    def normal(self, name: str, shape: tuple[int, ...]) -> Tensor:
        """Standard normal numbers on the stream's device, [K, *shape]."""
        return self.draw(name, lambda own: torch.randn(shape, generator=own, device=own.device))
