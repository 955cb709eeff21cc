"""The processes that share the work of a run, which is usually a single one.

Each worker processes its rows of every global batch, and a mean over the batch is the sum of the workers' partial
means. Each worker draws the noise of the whole batch and takes its rows, so that the noise of a run does not depend on
the number of workers. Results differ only by rounding, checkpoints have the same format, and a run that was started
with two workers may be resumed with four.
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
"""Lower limit in seconds of the measured duration of a step."""


@dataclass(frozen=True)
class Share:
    """The rows of a global batch that belong to one worker.

    Attributes:
        start: First row of the worker.
        count: Number of rows of the worker.
        num: Number of rows of the global batch.
    """

    start: int
    count: int
    num: int

    def of(self, x: Tensor, dim: int = 0) -> Tensor:
        """The worker's rows of a tensor that holds the global batch along `dim`."""
        return x if self.count == self.num else x.narrow(dim, self.start, self.count)

    def mean(self, values: Tensor) -> Tensor:
        """The contribution of the worker's rows to the mean over the global batch, along the last axis of `values`."""
        return mean_over(values, self.num)


def mean_over(values: Tensor, num: int) -> Tensor:
    """The contribution of some rows to the mean over `num` rows, along the last axis of `values`.

    The contributions of all rows, in this process and in others, add up to the mean.
    """
    return values.mean(-1) if values.shape[-1] == num else values.sum(-1) / num


class ProcessGroup(ABC):
    """A group of processes, as seen by one of them.

    Attributes:
        rank: Rank of this worker, starting from 0.
        size: Number of workers.
    """

    rank: int
    size: int

    @property
    def is_rank_zero(self) -> bool:
        """Whether this is the worker that reads and writes files and reports for the group."""
        return self.rank == 0

    def share(self, num: int) -> Share:
        """Return this worker's part of a global batch of `num` rows; the sizes of the parts differ by at most one."""
        start, end = self.rank * num // self.size, (self.rank + 1) * num // self.size
        return Share(start, end - start, num)

    @abstractmethod
    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum each tensor over the workers; the tensors are float32 on one device, and the sums are bitwise equal."""

    @abstractmethod
    def gather(self, block: Tensor) -> list[Tensor]:
        """Return the blocks of all workers in the order of ranks; all must have the same shape."""

    @abstractmethod
    def _broadcast_bytes(self, content: bytes) -> bytes:
        """Broadcast rank 0's bytes."""

    def broadcast(self, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Return rank 0's tensors on the host of every worker; a single worker returns its own tensors unchanged."""
        if self.size == 1:
            return dict(tensors)
        return unpack(self._broadcast_bytes(pack(tensors) if self.is_rank_zero else b""))

    def on_rank_zero(self, action: Callable[[], Any]) -> Any:
        """Call `action` on rank 0 only, and return its result on all workers.

        Args:
            action: Function that returns a value that JSON can represent.

        Raises:
            UserError: raised by `action`; it is raised on every worker.
            DivergedError: raised by `action`; it is raised on every worker.
        """
        if self.size == 1:
            return action()
        message = self._said_by(action) if self.is_rank_zero else {}
        message = json.loads(self._broadcast_bytes(json.dumps(message).encode()))
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


class SingleProcess(ProcessGroup):
    """The group of a run with a single process."""

    rank, size = 0, 1

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Return the tensors themselves."""
        return list(tensors)

    def gather(self, block: Tensor) -> list[Tensor]:
        """Return a list of the block."""
        return [block]

    def _broadcast_bytes(self, content: bytes) -> bytes:
        return content


SINGLE_PROCESS = SingleProcess()


class TorchProcessGroup(ProcessGroup):
    """The workers of torch.distributed's default process group, which the caller has initialized.

    Gradients are reduced in that group (NCCL on GPUs); everything else uses an additional Gloo group.

    Args:
        timeout: Seconds after which a worker that does not respond is considered to hang.
    """

    def __init__(self, timeout: float) -> None:
        self.rank, self.size = dist.get_rank(), dist.get_world_size()
        self._host = dist.new_group(backend="gloo", timeout=timedelta(seconds=timeout))

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        """Sum all tensors in a single all-reduce."""
        bucket = torch.cat([tensor.reshape(-1) for tensor in tensors])
        dist.all_reduce(bucket)
        parts = torch.split(bucket, [tensor.numel() for tensor in tensors])
        return [part.view(tensor.shape) for part, tensor in zip(parts, tensors, strict=True)]

    def gather(self, block: Tensor) -> list[Tensor]:
        """Gather the blocks through the host."""
        mine = block.cpu().contiguous()
        blocks = [torch.empty_like(mine) for _ in range(self.size)]
        dist.all_gather(blocks, mine, group=self._host)
        return [one.to(block.device) for one in blocks]

    def _broadcast_bytes(self, content: bytes) -> bytes:
        length = torch.tensor([len(content)])
        dist.broadcast(length, 0, group=self._host)
        size = int(length)
        data = (
            torch.frombuffer(bytearray(content), dtype=torch.uint8)
            if self.is_rank_zero
            else torch.empty(size, dtype=torch.uint8)
        )
        if size:
            dist.broadcast(data, 0, group=self._host)
        return data.numpy().tobytes()


class Pace:
    """Schedules a periodic action at the same steps on all workers, about every `seconds` of rank 0's clock.

    Args:
        workers: Process group; all workers must call `due` after each step.
        seconds: Target interval, which is met once the duration of a step is known.
    """

    def __init__(self, workers: ProcessGroup, seconds: float) -> None:
        self._workers, self._seconds = workers, seconds
        self._stride = self._left = 1
        self._since = time.monotonic()

    def due(self) -> bool:
        """Whether the action is due after this step; the same on all workers."""
        if self._workers.size == 1:
            return self._due_alone()
        self._left -= 1
        if self._left > 0:
            return False
        self._left = self._stride = self._workers.on_rank_zero(self._next_stride)
        return True

    def _due_alone(self) -> bool:
        """Whether the interval has passed; a single process can check its clock after every step."""
        now = time.monotonic()
        if now - self._since < self._seconds:
            return False
        self._since = now
        return True

    def _next_stride(self) -> int:
        """Compute the steps until the next action: as many as fit the interval, at most twice the previous number."""
        now = time.monotonic()
        seconds_a_step = max((now - self._since) / self._stride, _SHORTEST_STEP)
        self._since = now
        return max(1, min(2 * self._stride, int(self._seconds / seconds_a_step)))
