"""The processes that share the work of one run; most often there is one.

Each worker takes its rows of every global batch, and a mean over the batch is the sum of every worker's part of it.
Noise is drawn for the whole batch by each worker and cut to its rows: each then has noise that no other has, and a run
has the same noise however many workers there are. Their number changes results by rounding alone, a checkpoint is the
same file, and a run that began with two workers may go on with four.
"""

import json
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from dxmi.errors import DivergedError, UserError
from dxmi.tensors import pack, unpack

_SHORTEST_STEP = 1e-6
"""Seconds."""


@dataclass(frozen=True)
class Share:
    """One worker's part of a global batch.

    Attributes:
        start: its first row.
        count: how many rows are its own.
        num: rows of the global batch.
    """

    start: int
    count: int
    num: int

    def of(self, x: Tensor, dim: int = 0) -> Tensor:
        """Its rows of a tensor that holds the global batch along `dim`."""
        return x if self.count == self.num else x.narrow(dim, self.start, self.count)

    def mean(self, values: Tensor) -> Tensor:
        """What its rows contribute to the mean over the global batch, along the last axis of `values`."""
        return mean_over(values, self.num)


def mean_over(values: Tensor, num: int) -> Tensor:
    """The part that some rows have in the mean over `num` rows, along the last axis of `values`.

    The parts of all rows, of this process and of others, add up to the mean.
    """
    return values.mean(-1) if values.shape[-1] == num else values.sum(-1) / num


class Workers(ABC):
    """The group, as one of its members sees it.

    Attributes:
        rank: of this worker, from 0.
        size: how many there are.
    """

    rank: int
    size: int

    @property
    def is_first(self) -> bool:
        """Whether this is the worker that reads and writes files and speaks for the group."""
        return self.rank == 0

    def share(self, num: int) -> Share:
        """This worker's part of a global batch of `num`; parts differ by one row at most."""
        start, end = self.rank * num // self.size, (self.rank + 1) * num // self.size
        return Share(start, end - start, num)

    @abstractmethod
    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Each tensor summed over the workers, the same bits on all of them; float32 on one device."""

    @abstractmethod
    def gather(self, block: Tensor) -> list[Tensor]:
        """Every worker's block, in the order of ranks; all have one shape."""

    @abstractmethod
    def _agree(self, content: bytes) -> bytes:
        """The first worker's bytes."""

    def agree(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The first worker's tensors, on the host; a single worker's as they are."""
        if self.size == 1:
            return dict(tensors)
        return unpack(self._agree(pack(tensors) if self.is_first else b""))

    def on_first(self, action: Callable[[], Any]) -> Any:
        """What `action` gives on the first worker, which alone calls it: plain values that JSON can hold.

        Raises:
            UserError: `action` did; it is raised on every worker.
            DivergedError: likewise.
        """
        if self.size == 1:
            return action()
        message = self._said_by(action) if self.is_first else {}
        message = json.loads(self._agree(json.dumps(message).encode()))
        if "error" in message:
            raise UserError(message["error"])
        if "diverged" in message:
            raise DivergedError(**message["diverged"])
        return message["value"]

    @staticmethod
    def _said_by(action: Callable[[], Any]) -> dict[str, Any]:
        try:
            return {"value": action()}
        except UserError as error:
            return {"error": str(error)}
        except DivergedError as error:
            return {"diverged": error.tree()}


class Alone(Workers):
    """The only one."""

    rank, size = 0, 1

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """The tensors themselves."""
        return list(tensors)

    def gather(self, block: Tensor) -> list[Tensor]:
        """The block alone."""
        return [block]

    def _agree(self, content: bytes) -> bytes:
        return content


ALONE = Alone()


class Group(Workers):
    """The workers of torch.distributed's default process group, which the caller has set up.

    Gradients go through that group, NCCL's on GPUs; everything else, through one of gloo's beside it.

    Args:
        timeout: seconds after which a worker that does not answer counts as hung.
    """

    def __init__(self, timeout: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._host = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """One all-reduce of all of them together."""
        bucket = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(bucket)
        parts = torch.split(bucket, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def gather(self, block: Tensor) -> list[Tensor]:
        """Through the host."""
        mine = block.cpu().contiguous()
        blocks = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(blocks, mine, group=self._host)
        return [one.to(block.device) for one in blocks]

    def _agree(self, content: bytes) -> bytes:
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0, group=self._host)
        size = int(length)
        data = (
            torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if self.is_first
            else torch.empty(size, dtype=torch.uint8)
        )
        if size:
            dist.broadcast(data, 0, group=self._host)
        return data.numpy().tobytes()


class Pace:
    """When workers that take the same steps look up from them: about every so many seconds, by the first one's clock.

    Args:
        workers: call `due` after each step, all of them equally often.
        seconds: between two looks, once it is known how long a step takes.
    """

    def __init__(self, workers: Workers, seconds: float) -> None:
        self._workers, self._seconds = workers, seconds
        self._stride = self._left = 1
        self._since = time.monotonic()

    def due(self) -> bool:
        """Whether to look up after this step; for all workers it is the same one."""
        if self._workers.size == 1:
            return self._due_alone()
        self._left -= 1
        if self._left > 0:
            return False
        self._left = self._stride = self._workers.on_first(self._next_stride)
        return True

    def _due_alone(self) -> bool:
        """By the clock: to one that need not agree with others, steps of very different lengths are no matter."""
        now = time.monotonic()
        if now - self._since < self._seconds:
            return False
        self._since = now
        return True

    def _next_stride(self) -> int:
        """Steps until the next look: as many as fit, but at most twice those since the last one."""
        now = time.monotonic()
        seconds_a_step = max((now - self._since) / self._stride, _SHORTEST_STEP)
        self._since = now
        return max(1, min(2 * self._stride, int(self._seconds / seconds_a_step)))
