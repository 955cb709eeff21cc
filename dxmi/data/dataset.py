"""What every data set is to a run: stored samples, and the order in which they are read."""

import hashlib
import json
from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from dxmi.data.batch import UNCONDITIONAL, Batch, Condition
from dxmi.distributed import SINGLE_PROCESS, ProcessGroup
from dxmi.tensors import decode

RESIDENT_BYTES = 2 * 2**30
"""Samples that take no more than this lie on the device; of others, only batches go there."""

_HALF = 0.5


class Split(NamedTuple):
    """One part of a data set.

    Attributes:
        x: samples as they are stored, [N, *event].
        condition: of each sample.
        targets: what a test compares scores with, labels [N] or masks [N, H, W]; None if there is nothing of the kind.
    """

    x: Tensor
    condition: Condition = UNCONDITIONAL
    targets: Tensor | None = None


class Dataset(ABC):
    """Real samples, in memory or in a memory map.

    Attributes:
        name: the kind of its config.
        signature: hash of the samples, of their classes and of the classes' names in order, 12 hex digits.
    """

    name: str
    signature: str
    num_classes: int = 0
    """Classes that samples may be of; 0 if they have none."""
    notes: tuple[str, ...] = ()
    """What was left out or changed when the samples were read, one sentence for each reason."""

    @property
    @abstractmethod
    def stored(self) -> Tensor:
        """The samples as they are kept, uint8 pixels or float32 coordinates: [N, *event]."""

    @property
    def classes(self) -> Tensor | None:
        """The class of each sample, int64 on the host [N]; None if there are no classes."""
        return None

    def split(self, name: Literal["train", "test"]) -> Split | None:
        """The training samples, or those that training never sees; None if the data set has no such part."""
        if name == "train":
            return Split(self.stored, Condition(self.classes), self.classes)
        return self.test_split()

    def test_split(self) -> Split | None:
        """Samples that training never sees, if the data set has any."""
        return None

    @property
    def class_counts(self) -> Tensor | None:
        """Samples of each class, int64 [num_classes]; None if there are no classes."""
        return None if self.classes is None else torch.bincount(self.classes, minlength=self.num_classes)

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of one sample: (C, H, W) of an image, (D,) of a point."""
        return tuple(self.stored.shape[1:])

    def __len__(self) -> int:
        return len(self.stored)


def shape_hash(shape: tuple[int, ...]) -> "hashlib._Hash":
    """The beginning of a signature; the bytes of the samples follow."""
    return hashlib.sha256(str(tuple(shape)).encode())


def content_signature(stored: Tensor) -> str:
    """12 hex digits of the hash of stored samples and their shape."""
    digest = shape_hash(tuple(stored.shape))
    digest.update(stored.numpy().tobytes())
    return digest.hexdigest()[:12]


def labeled_signature(signature: str, labels: Tensor, names: Sequence[str]) -> str:
    """12 hex digits of the hash of samples, given their own signature, with their classes.

    Args:
        signature: of the samples alone.
        labels: class of each, int64 [N].
        names: of the classes, in order.
    """
    digest = hashlib.sha256(json.dumps([signature, list(names)]).encode())
    digest.update(labels.numpy().tobytes())
    return digest.hexdigest()[:12]


class BatchStream:
    """Shuffled epochs without end; every batch is full. Its whole state is three tensors.

    Many samples stay where they are, and only batches go to the device, the next one fetched by a second thread
    meanwhile. A worker reads its own rows only.

    Args:
        stored: samples as a data set keeps them, [N, *event].
        batch_size: B; may be larger than N.
        generator: shuffles, on the host.
        labels: the class of each sample, [N], if they are wanted.
        flip: mirror each image, left to right, with probability 1/2.
        device: where the batches are wanted; by default where `stored` is.
        workers: share each batch.
        reads_samples: read the samples; otherwise batches hold conditions only, as often as in the data.
    """

    def __init__(
        self,
        stored: Tensor,
        batch_size: int,
        generator: torch.Generator,
        labels: Tensor | None = None,
        *,
        flip: bool = False,
        device: torch.device | None = None,
        workers: ProcessGroup = SINGLE_PROCESS,
        reads_samples: bool = True,
    ) -> None:
        self.reads_samples = reads_samples
        self.flip = flip
        self.device = device or stored.device
        self.resident = stored.nbytes <= RESIDENT_BYTES
        self.stored = stored.to(self.device) if self.resident else stored
        self._labels = labels
        self.batch_size = batch_size
        self.generator = generator
        self.share = workers.share(batch_size)
        self.order = torch.empty(0, dtype=torch.int64)
        self._ahead = _Ahead(self._gathered)

    def next(self) -> Batch:
        """This worker's part of the next batch, pixels as floats in [-1, 1], with one seed in front: [1, b, *event]."""
        while len(self.order) < self.batch_size:
            epoch = torch.randperm(len(self.stored), generator=self.generator)
            self.order = torch.cat((self.order, epoch))
        drawn, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        own = self.share.of(drawn)
        return Batch(self._samples(own).unsqueeze(0) if self.reads_samples else None, self._condition(own), self.share)

    def _condition(self, drawn: Tensor) -> Condition:
        if self._labels is None:
            return UNCONDITIONAL
        labels = self._labels[drawn.to(self._labels.device)].to(self.device, non_blocking=True)
        return Condition(labels.unsqueeze(0))

    def _samples(self, drawn: Tensor) -> Tensor:
        """Rows of `stored` as floats, on the device, some of them mirrored."""
        samples = decode(self._rows(drawn))
        if not self.flip:
            return samples
        chosen = self.share.of(torch.rand(self.batch_size, generator=self.generator) < _HALF)
        return torch.where(chosen.to(self.device, non_blocking=True)[:, None, None, None], samples.flip(-1), samples)

    def _rows(self, drawn: Tensor) -> Tensor:
        """Rows of `stored`, on the device."""
        if self.resident:
            return self.stored[drawn.to(self.device, non_blocking=True)]
        rows = self._ahead.take(drawn)
        if len(self.order) >= self.batch_size:  # else the epoch that comes next is not drawn yet
            self._ahead.begin(self.share.of(self.order[: self.batch_size]))
        return rows.to(self.device, non_blocking=True)

    def _gathered(self, drawn: Tensor) -> Tensor:
        """Rows of `stored`, on the host, where a GPU can fetch them by itself."""
        rows = self.stored[drawn]
        return rows.pin_memory() if self.device.type == "cuda" else rows

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to go on from here."""
        return {"order": self.order.clone(), "generator": self.generator.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from where `state` was taken."""
        self.order = state["order"].clone()
        self.generator.set_state(state["generator"])


class _Ahead:
    """Rows fetched before they are asked for. A guess that proves wrong costs time alone.

    Args:
        fetch: reads rows.
    """

    def __init__(self, fetch: Callable[[Tensor], Tensor]) -> None:
        self._fetch = fetch
        self._pool = ThreadPoolExecutor(1, "batches")
        self._guess: tuple[Tensor, Future[Tensor]] | None = None

    def begin(self, drawn: Tensor) -> None:
        """Fetch these rows, which will probably be asked for next."""
        self._guess = drawn, self._pool.submit(self._fetch, drawn)

    def take(self, drawn: Tensor) -> Tensor:
        """These rows, fetched already or now."""
        guess, self._guess = self._guess, None
        if guess is not None and torch.equal(guess[0], drawn):
            return guess[1].result()
        return self._fetch(drawn)
