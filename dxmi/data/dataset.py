"""What every data set is to a run: stored samples, and the order in which they are read."""

import hashlib
from abc import ABC, abstractmethod

import torch
from torch import Tensor

from dxmi.tensors import decode


class Dataset(ABC):
    """Real samples in memory.

    Attributes:
        name: as in `DataConfig`.
        signature: hash of the samples, 12 hex digits.
    """

    name: str
    signature: str

    @property
    @abstractmethod
    def stored(self) -> Tensor:
        """The samples as they are kept, uint8 pixels or float32 coordinates: [N, *event]."""

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) of an image, (D,) of a point."""
        return tuple(self.stored.shape[1:])

    def __len__(self) -> int:
        return len(self.stored)


def content_signature(stored: Tensor) -> str:
    """12 hex digits of the hash of stored samples and their shape."""
    return hashlib.sha256(str(tuple(stored.shape)).encode() + stored.numpy().tobytes()).hexdigest()[:12]


class BatchStream:
    """Shuffled epochs without end; every batch is full. Its whole state is three tensors.

    Args:
        stored: samples as a data set keeps them, [N, *event], on the device where the batches are wanted.
        batch_size: B; may be larger than N.
        generator: shuffles, on the host.
        labels: the class of each sample, [N], on that device, if they are wanted.

    Attributes:
        labels: those of the batch that `next` has just given, [B], if they are wanted.
    """

    def __init__(
        self, stored: Tensor, batch_size: int, generator: torch.Generator, labels: Tensor | None = None
    ) -> None:
        self.stored = stored
        self.batch_size = batch_size
        self.generator = generator
        self.order = torch.empty(0, dtype=torch.int64)
        self.labels: Tensor | None = None
        self._all_labels = labels

    def next(self) -> Tensor:
        """The next batch as floats, pixels in [-1, 1]: [B, *event]."""
        while len(self.order) < self.batch_size:
            epoch = torch.randperm(len(self.stored), generator=self.generator)
            self.order = torch.cat((self.order, epoch))
        drawn, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        rows = drawn.to(self.stored.device, non_blocking=True)
        if self._all_labels is not None:
            self.labels = self._all_labels[rows]
        return decode(self.stored[rows])

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to go on from here."""
        return {"order": self.order.clone(), "generator": self.generator.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from where `state` was taken."""
        self.order = state["order"].clone()
        self.generator.set_state(state["generator"])
