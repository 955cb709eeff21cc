"""Iterations recorded as CUDA graphs: one launch from the host instead of thousands.

A recording reads its inputs from the same memory at every replay: the batch and all random numbers are written there
before it. What depends on the iteration is also read from memory: weights, moments, learning rates and decays.
"""

from collections.abc import Callable, Hashable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import ClassVar

import torch
from torch import Tensor

from dxmi.algorithms.base import Algorithm, Metrics
from dxmi.data.batch import Batch, Streams
from dxmi.diffusion.cuda_graphs import WARM_UP, on_side_stream, record
from dxmi.tensors import map_tensors, tensors_of

Precision = Callable[[], AbstractContextManager[object]]


class FixedStreams(Streams):
    """Random streams whose draws are repeated before each iteration and written to the same memory.

    The first iteration determines which draws there are. Afterwards, `draw_again` makes these draws in the same order,
    so that the numbers are those that the generators would have given to an iteration that is not recorded.

    Args:
        generators: Generators by name, one mapping per seed.
        device: Device of the drawn tensors.
    """

    fixed: ClassVar[bool] = True

    def __init__(self, generators: Sequence[Mapping[str, torch.Generator]], device: torch.device) -> None:
        super().__init__(generators)
        self._device = device
        self._samples: list[tuple[str, Callable[[torch.Generator], Tensor]]] = []
        self._drawn: list[Tensor] = []
        self._is_complete = False
        self._next = 0

    def draw(self, name: str, sample: Callable[[torch.Generator], Tensor]) -> Tensor:
        """Return the next of the drawn tensors, on the device: [K, ...]; draw it in the first iteration."""
        if not self._is_complete:
            self._samples.append((name, sample))
            self._drawn.append(super().draw(name, sample).to(self._device, copy=True))
        self._next += 1
        return self._drawn[self._next - 1]

    def draw_again(self) -> None:
        """Make the draws of the next iteration, which then returns them in order; before the first, there are none."""
        self._is_complete = bool(self._samples)
        self._next = 0
        for (name, sample), drawn in zip(self._samples, self._drawn, strict=True):
            drawn.copy_(super().draw(name, sample), non_blocking=True)


class RecordedUpdate:
    """`Algorithm.update` of an algorithm that can be recorded, with its random streams.

    The first iterations are executed by the host, since kernels must not be used for the first time in a recording.
    They are computed as those that are replayed, so that it makes no difference at which iteration a run is resumed.
    On a CPU, where nothing can be recorded, all iterations are executed by the host.

    Args:
        algorithm: Algorithm whose iterations are recorded.
        generators: Generators of its random streams by name, one mapping per seed.
        precision: Creates the autocast context of an update.
    """

    def __init__(
        self, algorithm: Algorithm, generators: Sequence[Mapping[str, torch.Generator]], precision: Precision
    ) -> None:
        self._algorithm = algorithm
        self._generators = generators
        self._precision = precision
        self._recordings: dict[Hashable, _Recording] = {}

    def __call__(self, batch: Batch, iteration: int) -> Metrics:
        """Perform one iteration, with the result of `Algorithm.update`."""
        algorithm, precision = self._algorithm, self._precision
        algorithm.schedule(iteration)
        key = (algorithm.variant(iteration), batch.share)
        if key not in self._recordings:

            def iterate(inputs: Batch, streams: Streams) -> Metrics:
                with precision():
                    return algorithm.iterate(inputs, iteration, streams)

            self._recordings[key] = _Recording(iterate, batch, self._generators)
        return self._recordings[key](batch)


def update_of(
    algorithm: Algorithm,
    generators: Sequence[Mapping[str, torch.Generator]],
    precision: Precision,
    *,
    recorded: bool,
) -> Callable[[Batch, int], Metrics]:
    """Return a function that performs the iteration of a number on a batch, recorded or not."""
    if recorded:
        return RecordedUpdate(algorithm, generators, precision)
    streams = Streams(generators)

    def update(batch: Batch, iteration: int) -> Metrics:
        with precision():
            return algorithm.update(batch, iteration, streams)

    return update


class _Recording:
    """One variant of the iterations: a function of a batch and of random streams.

    Args:
        iterate: Performs an iteration.
        batch: A batch like those of the later calls.
        generators: Generators of the random streams by name, one mapping per seed.
    """

    def __init__(
        self,
        iterate: Callable[[Batch, Streams], Metrics],
        batch: Batch,
        generators: Sequence[Mapping[str, torch.Generator]],
    ) -> None:
        self._iterate = iterate
        self._inputs = map_tensors(torch.clone, batch)
        self._device = _device_of(batch, generators)
        self._streams = FixedStreams(generators, self._device)
        self._graph: torch.cuda.CUDAGraph | None = None
        self._metrics: Metrics = {}
        self._calls = 0

    def __call__(self, batch: Batch) -> Metrics:
        """Perform an iteration with this batch and new random numbers; the metrics are valid for good."""
        for kept, new in zip(tensors_of(self._inputs), tensors_of(batch), strict=True):
            kept.copy_(new)
        self._streams.draw_again()
        self._calls += 1
        if self._device.type != "cuda":
            return self._run()
        if self._calls <= WARM_UP:
            return on_side_stream(self._run, self._device)
        if self._graph is None:
            self._graph, self._metrics = record(self._run)
        self._graph.replay()
        return {name: value.clone() for name, value in self._metrics.items()}

    def _run(self) -> Metrics:
        return self._iterate(self._inputs, self._streams)


def _device_of(batch: Batch, generators: Sequence[Mapping[str, torch.Generator]]) -> torch.device:
    """The device of an iteration: that of its samples or, without any, of its random streams."""
    if batch.x is not None:
        return batch.x.device
    devices = {own.device for own in generators[0].values()}
    return next((device for device in devices if device.type != "cpu"), torch.device("cpu"))
