"""A trial, or several seeds of one arm, in a Ray worker: compose, build, train, report.

It decides nothing: a stop is asked for from outside.

A trial reports its scores and how it ended to the controller; how far it is goes to the control channel, which answers
whether it should stop. Ray Tune goes on with a report only when the driver has dealt with it, so the answer that a
trial gets after a score already knows that score.
"""

import errno
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict
from numbers import Real
from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree
from typing import Any, Protocol

from dxmi.config import build
from dxmi.errors import DivergedError, UserError, WorkersLostError
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.progress import Progress, Reporter
from dxmi.training.run import Saved, SeedRun, train, train_stacked
from dxmi.training.summary import Summary
from tune.execution.trial_messages import (
    Diverged,
    Finished,
    LastReport,
    OutOfDisk,
    Refused,
    Scored,
    Stopped,
    TrialReport,
    TrialTask,
    tasks_from_json,
    to_json,
)
from tune.integrations.object_store import Remote, kept, node_folder

STEP, REPORT = "step", "report"
"""What Tune is told: the one number that it needs, and the text of `to_json`."""
TASKS = "tasks"
"""The key of what `run_trials` gets."""
_HEARTBEAT_EVERY = 0.5
_SHOWN = 20
"""Characters of a bad value that are repeated."""
_EVALUATION = "eval/"


class Trainer(Protocol):
    """What runs a trial; `dxmi.training.run.train`, or a stand-in in a test."""

    def __call__(
        self, experiment: Experiment, *, out: Path, report: Reporter | None = None, saved: Saved | None = None
    ) -> Summary | None:
        """Train, tell `report` and `saved` about it, and return the summary, or None if it was asked to stop."""


class BadReportError(Exception):
    """A reported metric is no finite number.

    Attributes:
        step: the iteration it was reported for.
        metric: its key.
    """

    def __init__(self, step: int, metric: str, what: str) -> None:
        super().__init__(f"{metric} is {what} at iteration {step}")
        self.step = step
        self.metric = metric


def checked(metrics: Mapping[str, Any], step: int, required: str) -> dict[str, float]:
    """The metrics as plain floats.

    Raises:
        BadReportError: one of them is not a finite Python or NumPy number, or the required one is missing.
    """
    if required not in metrics:
        raise BadReportError(step, required, "missing")
    for key, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise BadReportError(step, key, f"no number but {type(value).__name__}")
        if not math.isfinite(_float(value)):
            raise BadReportError(step, key, str(value)[:_SHOWN])
    return {key: _float(value) for key, value in metrics.items()}


def _float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # a whole number may be larger than any float
        return math.inf


class _Reporter:
    """Reports a trial's progress to the controller's process; called by `train`."""

    def __init__(self, number: int, metric: str, channel: Any, send: Callable[[TrialReport], None]) -> None:
        import ray  # noqa: PLC0415  (this module is read by tests without Ray, too)

        self._ray = ray
        self._number, self._metric, self._channel, self._send = number, metric, channel, send
        self._pending: Any = None
        self._sent = 0.0
        self.stop = False

    def __call__(self, event: Progress) -> bool:
        if event.of_data and self._number > 0:  # all trials share the data: the first one has said it
            return self.stop
        if event.note:
            self._channel.note.remote(self._number, event.note)
        elif any(key.startswith(_EVALUATION) for key in event.metrics):
            metrics = checked(event.metrics, event.step, self._metric)
            self._send(Scored(self._number, event.step, metrics))
            self.stop = self._ray.get(self._heartbeat(event)) or self.stop
        else:
            self._heartbeat_sometimes(event)
        return self.stop

    def end(self, report: LastReport) -> None:
        """Say how the trial ended."""
        self._send(report)

    def _heartbeat(self, event: Progress) -> Any:
        self._sent = time.monotonic()
        return self._channel.heartbeat.remote(self._number, event.phase.value, event.step, event.total)

    def _heartbeat_sometimes(self, event: Progress) -> None:
        """Ask without waiting: the answer is read at a later call."""
        if self._pending is not None and self._ray.wait([self._pending], timeout=0)[0]:
            self.stop = self._ray.get(self._pending) or self.stop
            self._pending = None
        if self._pending is None and time.monotonic() - self._sent > _HEARTBEAT_EVERY:
            self._pending = self._heartbeat(event)


def run_trials(config: Mapping[str, Any], *, channel: Any, trainer: Trainer = train) -> None:
    """The function that Ray Tune runs: one trial, or several of one arm that are trained as one program.

    Args:
        config: under `TASKS`, the text of `tasks_to_json`.
        channel: an actor of `tune.execution.control_channel.ControlChannel`.
        trainer: trains a trial that is alone in its process.
    """
    from ray import tune as ray_tune  # noqa: PLC0415

    def send(report: TrialReport) -> None:
        ray_tune.report({STEP: report.step if isinstance(report, Scored) else 0, REPORT: to_json(report)})

    tasks = tasks_from_json(config[TASKS])
    for task in tasks:
        if task.same_as is not None:
            _copy_run(task.same_as, Path(task.out), task.address)
    reporters = [_Reporter(task.number, task.metric, channel, send) for task in tasks]
    if len(tasks) > 1:
        _run_stacked(tasks, reporters)
    else:
        reporters[0].end(_result(tasks[0], lambda: _summary(tasks[0], trainer, reporters[0])))


def _run_stacked(tasks: Sequence[TrialTask], reporters: Sequence[_Reporter]) -> None:
    """Train all as one program, and report each when it ends; what a second try could mend is raised at last."""
    crashes: list[Exception] = []

    def ended(number: int, outcome: Summary | Exception | None) -> None:
        try:
            reporters[number].end(_result(tasks[number], lambda: _raised_or(outcome)))
        except Exception as error:  # noqa: BLE001  (Tune hears of it, after the others' ends)
            crashes.append(error)

    with ExitStack() as held:
        members = [_member(task, reporter, held) for task, reporter in zip(tasks, reporters, strict=True)]
        train_stacked(members, ended)
    if crashes:
        raise crashes[0]


def _member(task: TrialTask, reporter: _Reporter, held: ExitStack) -> SeedRun:
    here, keep = held.enter_context(kept(task.address, Path(task.out)))
    return SeedRun(Experiment(build(ExperimentConfig, task.tree)), here, reporter, _kept_by(keep))


def _kept_by(keep: Callable[[], None]) -> Saved:
    return lambda _: keep()


def _raised_or(outcome: Summary | Exception | None) -> Summary | None:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _result(task: TrialTask, train_it: Callable[[], Summary | None]) -> LastReport:
    """How the training ended. Only what a second try could mend is raised."""
    try:
        summary = train_it()
    except (DivergedError, BadReportError) as error:
        return Diverged(task.number, str(error))
    except UserError as error:
        return Refused(task.number, str(error))
    except WorkersLostError as error:
        raise RuntimeError(f"{error.details}\n{error}") from None  # what is kept is the text of it
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutOfDisk(task.number, f"{error.strerror}: {error.filename or task.out}")
        raise
    return Stopped(task.number) if summary is None else Finished(task.number, asdict(summary))


def _summary(task: TrialTask, trainer: Trainer, reporter: _Reporter) -> Summary | None:
    """What came out of one trial that is alone in its process."""
    out, address = Path(task.out), task.address
    config = build(ExperimentConfig, task.tree)
    if config.resources.num_workers > 1:
        from tune.execution.ray_train import train_on_workers  # noqa: PLC0415  (Ray Train takes seconds)

        return train_on_workers(config, out=out, report=reporter, address=address)
    with kept(address, out) as (here, keep):
        return trainer(Experiment(config), out=here, report=reporter, saved=_kept_by(keep))


def _copy_run(source: str, out: Path, address: str | None) -> None:
    """A finished run once more; its files never change, so they are linked where they lie on one disk."""
    if address is not None:
        here = node_folder(address)
        Remote(source).pull(here)
        Remote(address).push(here)
    elif not (out / "summary.json").exists():
        rmtree(out, ignore_errors=True)
        copytree(source, out, copy_function=os.link, ignore=ignore_patterns(".lock"))
