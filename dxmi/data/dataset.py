"""The interface of the data sets, and the stream of shuffled batches."""

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
"""Largest size of a data set that is kept on the device; of a larger one, only batches are copied there."""

_HALF = 0.5


class Split(NamedTuple):
    """One part of a data set.

    Attributes:
        x: Samples as stored, [N, *event].
        condition: Condition of each sample.
        targets: Ground truth with which test metrics compare, labels [N] or masks [N, H, W]; None if there is none.
    """

    x: Tensor
    condition: Condition = UNCONDITIONAL
    targets: Tensor | None = None


class Dataset(ABC):
    """Real samples, in memory or in a memory map.

    Attributes:
        name: Kind of the data set's config.
        signature: Hash of the samples and, if there are any, of their labels and the class names, 12 hex digits.
    """

    name: str
    signature: str
    num_classes: int = 0
    """Number of classes; 0 if there are no classes."""
    notes: tuple[str, ...] = ()
    """Notes on samples that were left out or changed when they were read, one sentence per reason."""

    @property
    @abstractmethod
    def stored(self) -> Tensor:
        """The samples as stored, uint8 pixels or float32 coordinates: [N, *event]."""

    @property
    def classes(self) -> Tensor | None:
        """The class of each sample, int64 on the host [N]; None if there are no classes."""
        return None

    def split(self, name: Literal["train", "test"]) -> Split | None:
        """Return the samples for training or those held out for tests; None if the data set does not have this part."""
        if name == "train":
            return Split(self.stored, Condition(self.classes), self.classes)
        return self.test_split()

    def test_split(self) -> Split | None:
        """Return the samples held out for tests; None if there are none."""
        return None

    @property
    def class_counts(self) -> Tensor | None:
        """The number of samples of each class, int64 [num_classes]; None if there are no classes."""
        return None if self.classes is None else torch.bincount(self.classes, minlength=self.num_classes)

    @property
    def event(self) -> tuple[int, ...]:
        """The shape of one sample: (C, H, W) of an image, (D,) of a point."""
        return tuple(self.stored.shape[1:])

    def __len__(self) -> int:
        return len(self.stored)


def shape_hash(shape: tuple[int, ...]) -> "hashlib._Hash":
    """Start the hash of a signature, which must be updated with the bytes of the samples."""
    return hashlib.sha256(str(tuple(shape)).encode())


def content_signature(stored: Tensor) -> str:
    """Hash stored samples and their shape to 12 hex digits."""
    digest = shape_hash(tuple(stored.shape))
    digest.update(stored.numpy().tobytes())
    return digest.hexdigest()[:12]


def labeled_signature(signature: str, labels: Tensor, names: Sequence[str]) -> str:
    """Hash samples together with their classes to 12 hex digits.

    Args:
        signature: Signature of the samples without their classes.
        labels: Class of each sample, int64 [N].
        names: Names of the classes, in order.
    """
    digest = hashlib.sha256(json.dumps([signature, list(names)]).encode())
    digest.update(labels.numpy().tobytes())
    return digest.hexdigest()[:12]


class BatchStream:
    """An endless stream of shuffled epochs, in which every batch is full. Its complete state is two tensors.

    Data sets larger than `RESIDENT_BYTES` are not copied to the device as a whole; a second thread then reads the next
    batch in advance. A worker reads only its own rows.

    Args:
        stored: Samples as stored by a data set, [N, *event].
        batch_size: B; may be larger than N.
        generator: Generator for the shuffling and mirroring, on the host.
        labels: Class of each sample, [N]; None for unconditional batches.
        flip: Whether to mirror each image left to right with probability 1/2.
        device: Device of the batches; by default that of `stored`.
        workers: Processes that share each batch.
        reads_samples: Whether batches contain samples; otherwise they contain only conditions, with the frequencies of
            the data.
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
        """Return this worker's part of the next batch, pixels as floats in [-1, 1], with seed axis: [1, b, *event]."""
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
        """Read rows of `stored` as floats on the device, and mirror some of them if `flip` is set."""
        samples = decode(self._rows(drawn))
        if not self.flip:
            return samples
        chosen = self.share.of(torch.rand(self.batch_size, generator=self.generator) < _HALF)
        return torch.where(chosen.to(self.device, non_blocking=True)[:, None, None, None], samples.flip(-1), samples)

    def _rows(self, drawn: Tensor) -> Tensor:
        """Read rows of `stored` to the device, and start to read those of the next batch."""
        if self.resident:
            return self.stored[drawn.to(self.device, non_blocking=True)]
        rows = self._ahead.take(drawn)
        if len(self.order) >= self.batch_size:  # otherwise, the next epoch has not been shuffled yet
            self._ahead.begin(self.share.of(self.order[: self.batch_size]))
        return rows.to(self.device, non_blocking=True)

    def _gathered(self, drawn: Tensor) -> Tensor:
        """Read rows of `stored` to the host, into pinned memory if the device is a GPU."""
        rows = self.stored[drawn]
        return rows.pin_memory() if self.device.type == "cuda" else rows

    def state(self) -> dict[str, Tensor]:
        """Return the state, from which `load_state` resumes."""
        return {"order": self.order.clone(), "generator": self.generator.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Resume from a state returned by `state`."""
        self.order = state["order"].clone()
        self.generator.set_state(state["generator"])


class _Ahead:
    """Reads rows in advance. A wrong guess costs only time.

    Args:
        fetch: Function that reads rows.
    """

    def __init__(self, fetch: Callable[[Tensor], Tensor]) -> None:
        self._fetch = fetch
        self._pool = ThreadPoolExecutor(1, "batches")
        self._guess: tuple[Tensor, Future[Tensor]] | None = None

    def begin(self, drawn: Tensor) -> None:
        """Start to read these rows, which are expected to be requested next."""
        self._guess = drawn, self._pool.submit(self._fetch, drawn)

    def take(self, drawn: Tensor) -> Tensor:
        """Return these rows; they are read now if they were not read in advance."""
        guess, self._guess = self._guess, None
        if guess is not None and torch.equal(guess[0], drawn):
            return guess[1].result()
        return self._fetch(drawn)
