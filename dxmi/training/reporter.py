"""The reporter of a run with several processes, its stopwatch, and the averages of its logged metrics."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dxmi.distributed import Pace, ProcessGroup
from dxmi.tensors import require_finite_metrics
from dxmi.training.progress import Phase, Progress, Reporter, StopRequestedError

LISTEN_EVERY = 0.5
"""Seconds between checks for a requested stop while samples are drawn."""


class RunReporter:
    """Calls a run's reporter on rank 0, and passes a requested stop to all of its processes.

    Args:
        report: the reporter, called on rank 0 only.
        workers: process group of the run; all processes must call each method at the same time.

    Attributes:
        stop_requested: whether the reporter has requested a stop.
    """

    def __init__(self, report: Reporter | None, workers: ProcessGroup) -> None:
        self._report = report or (lambda _: None)
        self._workers = workers
        self._pace = Pace(workers, LISTEN_EVERY)
        self._last = Progress(Phase.PRETRAIN, 0, 0)
        self.stop_requested = False

    def tell(self, phase: Phase, step: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Report progress, and set `stop_requested` if the reporter requests a stop."""
        progress = Progress(phase, step, total, metrics or {})
        self._last = Progress(phase, step, total)
        if self._workers.on_rank_zero(lambda: bool(self._report(progress))):
            self.stop_requested = True

    def tell_or_stop(self, phase: Phase, step: int, total: int) -> None:
        """Report progress at a point where the run can stop without saving a checkpoint.

        Raises:
            StopRequestedError: a stop was requested.
        """
        self.tell(phase, step, total)
        self.raise_if_stopped()

    def raise_if_stopped(self) -> None:
        """Raise a StopRequestedError if a stop was requested."""
        if self.stop_requested:
            raise StopRequestedError

    def began(self, phase: Phase, total: int, *, is_compiled: bool, seconds: float) -> None:
        """Say how long the first iteration of a phase took if networks were compiled in it."""
        if is_compiled:
            sentence = f"the first iteration of {phase} took {seconds:.0f} s, including the compilation of networks."
            self.note([sentence], phase, total)

    def note(self, sentences: Sequence[str], phase: Phase, total: int, *, of_data: bool = False) -> None:
        """Report messages for the user."""
        for sentence in sentences if self._workers.is_rank_zero else ():
            self._report(Progress(phase, 0, total, note=sentence, of_data=of_data))

    def listen(self) -> None:
        """Check for a requested stop, at most every `LISTEN_EVERY` seconds.

        It is called after each sampling step, because a whole batch may take minutes on a slow device.
        """
        if self._pace.due():
            self.ask_again()

    def ask_again(self) -> None:
        """Report the latest progress again, to check for a requested stop."""
        self.tell_or_stop(self._last.phase, self._last.step, self._last.total)


class Stopwatch:
    """Measures the wall time of each phase, over all sessions of a run.

    Attributes:
        seconds: wall seconds by phase.
    """

    def __init__(self) -> None:
        self.seconds = {phase.value: 0.0 for phase in Phase}
        self._phase: Phase | None = None
        self._since = time.perf_counter()

    def enter(self, phase: Phase | None) -> None:
        """Measure the time of this phase from now on; None to stop the watch."""
        self.lap()
        self._phase = phase

    def lap(self) -> None:
        """Add the time since the last call to the current phase."""
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[self._phase] += now - self._since
        self._since = now

    def add(self, earlier: Mapping[str, float]) -> None:
        """Add the seconds of an earlier session."""
        for phase, seconds in earlier.items():
            self.seconds[phase] += seconds


class MetricWindow:
    """The metrics since the last logged row, kept on the device until their mean is logged."""

    def __init__(self) -> None:
        self.metrics: list[Mapping[str, Tensor]] = []

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Add the metrics of one iteration."""
        self.metrics.append(metrics)

    def mean(self, step: int) -> dict[str, float]:
        """Return the means of the metrics since the last call.

        Raises:
            DivergedError: a mean is not finite.
        """
        keys = list(self.metrics[0])
        means = torch.stack([torch.stack([m[key] for m in self.metrics]).mean() for key in keys]).tolist()
        self.metrics.clear()
        return require_finite_metrics(dict(zip(keys, means, strict=True)), step)
