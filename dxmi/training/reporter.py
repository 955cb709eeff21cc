"""A run's reporter as all of its processes hear it, and how the run's time and its metrics are counted."""

import time
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor

from dxmi.distributed import Pace, ProcessGroup
from dxmi.tensors import require_finite_metrics
from dxmi.training.progress import Phase, Progress, Reporter, StopRequestedError

LISTEN_EVERY = 0.5
"""Seconds after which the reporter is asked again whether to stop, while samples are drawn."""


class RunReporter:
    """A run's reporter, heard by all of its processes.

    Args:
        report: called on the first process.
        workers: the run's processes, which call every method together.
    """

    def __init__(self, report: Reporter | None, workers: ProcessGroup) -> None:
        self._report = report or (lambda _: None)
        self._workers = workers
        self._pace = Pace(workers, LISTEN_EVERY)
        self._last = Progress(Phase.PRETRAIN, 0, 0)
        self.stop_requested = False

    def tell(self, phase: Phase, step: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Report, and remember whether a stop was asked for."""
        progress = Progress(phase, step, total, metrics or {})
        self._last = Progress(phase, step, total)
        if self._workers.on_rank_zero(lambda: bool(self._report(progress))):
            self.stop_requested = True

    def tell_or_stop(self, phase: Phase, step: int, total: int) -> None:
        """Report where stopping loses nothing that a checkpoint could hold.

        Raises:
            StopRequestedError: a stop was asked for.
        """
        self.tell(phase, step, total)
        self.raise_if_stopped()

    def raise_if_stopped(self) -> None:
        """Raise a StopRequestedError if a stop was asked for."""
        if self.stop_requested:
            raise StopRequestedError

    def note(self, sentences: Sequence[str], phase: Phase, total: int, *, of_data: bool = False) -> None:
        """Pass sentences on to the user."""
        for sentence in sentences if self._workers.is_rank_zero else ():
            self._report(Progress(phase, 0, total, note=sentence, of_data=of_data))

    def listen(self) -> None:
        """Called after each step of sampling, so that nobody waits minutes for a batch on a slow device to end."""
        if self._pace.due():
            self.ask_again()

    def ask_again(self) -> None:
        """Nothing has changed; a stop may have been asked for."""
        self.tell_or_stop(self._last.phase, self._last.step, self._last.total)


class Stopwatch:
    """Wall seconds by phase, over all sessions of a run.

    Attributes:
        seconds: by phase.
    """

    def __init__(self) -> None:
        self.seconds = {phase.value: 0.0 for phase in Phase}
        self._phase: Phase | None = None
        self._since = time.perf_counter()

    def enter(self, phase: Phase | None) -> None:
        """Count for this phase from now on, or for none."""
        self.lap()
        self._phase = phase

    def lap(self) -> None:
        """Add what has passed to the present phase."""
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[self._phase] += now - self._since
        self._since = now

    def add(self, earlier: Mapping[str, float]) -> None:
        """Count an earlier session's seconds too."""
        for phase, seconds in earlier.items():
            self.seconds[phase] += seconds


class MetricWindow:
    """Metrics since the last row, still on the device; their mean is taken when a row is due."""

    def __init__(self) -> None:
        self.metrics: list[Mapping[str, Tensor]] = []

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        """Keep the metrics of one iteration."""
        self.metrics.append(metrics)

    def mean(self, step: int) -> dict[str, float]:
        """The means since the last call.

        Raises:
            DivergedError: one of them is not finite.
        """
        keys = list(self.metrics[0])
        means = torch.stack([torch.stack([m[key] for m in self.metrics]).mean() for key in keys]).tolist()
        self.metrics.clear()
        return require_finite_metrics(dict(zip(keys, means, strict=True)), step)
