"""Work beside other work: what one thread makes, a second one uses, on a stream of its own where there is a GPU."""

from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from types import TracebackType
from typing import Generic, TypeVar

import torch
from torch import Tensor

Out = TypeVar("Out")

DEPTH = 2
"""Items that may wait for the second thread; more would only take memory."""


class Beside(Generic[Out]):
    """Applies a function to tensors, in order, while the thread that makes them goes on.

    On a CPU both would share the same cores, so that nothing would be gained: there the function is called at once.

    Args:
        work: the function; it has to leave its result where any stream may read it, on the host say.
        device: of the tensors.
        threaded: whether there is a second thread; by default on a GPU alone.
    """

    def __init__(self, work: Callable[[Tensor], Out], device: torch.device, *, threaded: bool | None = None) -> None:
        self._work = work
        self._device = device
        on_gpu = device.type == "cuda"
        self._pool = ThreadPoolExecutor(1, "beside") if (on_gpu if threaded is None else threaded) else None
        self._stream = torch.cuda.Stream(device) if on_gpu and self._pool else None  # type: ignore[no-untyped-call]
        self._futures: list[Future[Out]] = []

    def __enter__(self) -> "Beside[Out]":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        if self._pool is not None:
            self._pool.shutdown(wait=True, cancel_futures=error is not None)

    def put(self, item: Tensor) -> None:
        """Have the function applied to `item`, which the caller leaves alone from here on.

        Waits while `DEPTH` items are waiting; raises what the function raised on an earlier one.
        """
        if self._pool is None:
            done: Future[Out] = Future()
            done.set_result(self._work(item))
            self._futures.append(done)
            return
        if len(self._futures) > DEPTH:
            self._futures[-DEPTH - 1].result()
        made = None if self._stream is None else torch.cuda.current_stream(self._device).record_event()
        self._futures.append(self._pool.submit(self._apply, item, made))

    def results(self) -> list[Out]:
        """What the function gave, in order, once all of it is there."""
        return [future.result() for future in self._futures]

    def _apply(self, item: Tensor, made: torch.cuda.Event | None) -> Out:
        if self._stream is None or made is None:
            return self._work(item)
        with torch.cuda.device(self._stream.device), torch.cuda.stream(self._stream):
            self._stream.wait_event(made)
            item.record_stream(self._stream)  # its memory is not given away before this stream is through with it
            return self._work(item)
