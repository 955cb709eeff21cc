"""Runs a trial, all seeds of a trial, or several seeds of one arm, in a Ray worker: build, train, report.

A trial makes no decisions: the controller requests its stop.

Scores and the outcome are reported to the controller through Ray Tune; progress is sent to the control channel, which
returns whether to stop. Since Ray Tune resumes a trial only after the driver has processed its report, the response
after a score already takes that score into account.
"""

import errno
import math
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, replace
from functools import partial
from numbers import Real
from pathlib import Path
from shutil import copytree, ignore_patterns, rmtree
from typing import Any, Protocol

from dxmi.config import build
from dxmi.errors import DivergedError, UserError, WorkersLostError
from dxmi.persistence.run_directory import RunDirectory
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
from tune.studies.seed_means import mean_rows, mean_summary, seed_runs

STEP, REPORT = "step", "report"
"""Keys of a report to Tune: the number that Tune requires, and the text of `to_json`."""
TASKS = "tasks"
"""Key of the tasks in the config of `run_trials`."""
_HEARTBEAT_EVERY = 0.5
_SHOWN = 20
"""Maximum number of characters of an invalid value in an error message."""
_EVALUATION = "eval/"


class Trainer(Protocol):
    """A function that runs a trial: `dxmi.training.run.train`, or a substitute in a test."""

    def __call__(
        self, experiment: Experiment, *, out: Path, report: Reporter | None = None, saved: Saved | None = None
    ) -> Summary | None:
        """Train, call `report` and `saved`, and return the summary, or None if a stop was requested."""


class BadReportError(Exception):
    """A reported metric is not a finite number.

    Attributes:
        step: the iteration it was reported for.
        metric: its key.
    """

    def __init__(self, step: int, metric: str, what: str) -> None:
        super().__init__(f"{metric} is {what} at iteration {step}")
        self.step = step
        self.metric = metric


def checked(metrics: Mapping[str, Any], step: int, required: str) -> dict[str, float]:
    """Return the metrics as plain floats.

    Raises:
        BadReportError: one of them is not a finite Python or NumPy number, or the required one is missing.
    """
    if required not in metrics:
        raise BadReportError(step, required, "missing")
    for key, value in metrics.items():
        if isinstance(value, bool) or not isinstance(value, Real):
            raise BadReportError(step, key, f"of type {type(value).__name__}, not a number,")
        if not math.isfinite(_float(value)):
            raise BadReportError(step, key, str(value)[:_SHOWN])
    return {key: _float(value) for key, value in metrics.items()}


def _float(value: Real) -> float:
    try:
        return float(value)
    except OverflowError:  # an integer beyond the range of float
        return math.inf


class _Reporter:
    """Callback of `train` that reports a trial's progress to the controller's process."""

    def __init__(self, number: int, metric: str, channel: Any, send: Callable[[TrialReport], None]) -> None:
        import ray  # noqa: PLC0415  (tests import this module without Ray)

        self._ray = ray
        self._number, self._metric, self._channel, self._send = number, metric, channel, send
        self._pending: Any = None
        self._sent = 0.0
        self.stop = False

    def __call__(self, event: Progress) -> bool:
        if event.of_data and self._number > 0:  # all trials share the data, and trial 0 reports on them
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
        """Report how the trial ended."""
        self._send(report)

    def _heartbeat(self, event: Progress) -> Any:
        self._sent = time.monotonic()
        return self._channel.heartbeat.remote(self._number, event.phase.value, event.step, event.total)

    def _heartbeat_sometimes(self, event: Progress) -> None:
        """Send a heartbeat without waiting; its response is read in a later call."""
        if self._pending is not None and self._ray.wait([self._pending], timeout=0)[0]:
            self.stop = self._ray.get(self._pending) or self.stop
            self._pending = None
        if self._pending is None and time.monotonic() - self._sent > _HEARTBEAT_EVERY:
            self._pending = self._heartbeat(event)


class _SeedReporters:
    """Combines the reports of a trial's seeds: a score is reported when all seeds have it, as their mean.

    Args:
        reporter: reports for the trial.
        metric: the score that every evaluation must report.
        runs: run folders of the seeds, with the scores of earlier sessions.
        seeds: the seeds.
    """

    def __init__(self, reporter: _Reporter, metric: str, runs: Sequence[RunDirectory], seeds: Sequence[int]) -> None:
        self._reporter, self._metric, self._seeds = reporter, metric, seeds
        self._rows = [[row for row in run.rows() if metric in row] for run in runs]
        self._stopped = False

    def of(self, k: int) -> Reporter:
        """The reporter of the seed with index `k`."""
        return partial(self._report, k)

    def stop(self) -> None:
        """Ask all seeds to stop, since one of them has failed."""
        self._stopped = True

    def _report(self, k: int, event: Progress) -> bool:
        if event.note:
            if k == 0 or not event.of_data:
                self._reporter(replace(event, note=event.note if k == 0 else f"seed {self._seeds[k]}: {event.note}"))
        elif any(key.startswith(_EVALUATION) for key in event.metrics):
            self._evaluated(k, event)
        else:  # of every seed, since the reporter hears of a requested stop only when it is called
            self._reporter(event)
        return self._stopped or self._reporter.stop

    def _evaluated(self, k: int, event: Progress) -> None:
        metrics = checked(event.metrics, event.step, self._metric)
        others = [row for row in self._rows[k] if row["step"] != event.step]
        self._rows[k] = [*others, {"step": event.step, **metrics}]
        found = [[row for row in rows if row["step"] == event.step] for rows in self._rows]
        for row in mean_rows(found):  # one row if all seeds have reached this iteration, otherwise none
            means = {key: float(value) for key, value in row.items() if key != "step"}
            self._reporter(replace(event, metrics=means))


def run_trials(config: Mapping[str, Any], *, channel: Any, trainer: Trainer = train) -> None:
    """Trainable function of Ray Tune: runs one trial, or several trials of one arm in one program.

    Args:
        config: holds the text of `tasks_to_json` under `TASKS`.
        channel: an actor of `tune.execution.control_channel.ControlChannel`.
        trainer: trains a single trial; not used for several in one program.
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
        train_it = _mean_of_seeds if len(tasks[0].seeds) > 1 else _summary
        reporters[0].end(_result(tasks[0], lambda: train_it(tasks[0], trainer, reporters[0])))


def _run_stacked(tasks: Sequence[TrialTask], reporters: Sequence[_Reporter]) -> None:
    """Train all trials in one program and report each as it ends; retryable errors are raised at the end."""
    crashes: list[Exception] = []

    def ended(number: int, outcome: Summary | Exception | None) -> None:
        try:
            reporters[number].end(_result(tasks[number], lambda: _tree_or_raised(outcome)))
        except Exception as error:  # noqa: BLE001  (raised to Tune below, after all trials have ended)
            crashes.append(error)

    with ExitStack() as held:
        members = [_member(task, reporter, held) for task, reporter in zip(tasks, reporters, strict=True)]
        train_stacked(members, ended)
    if crashes:
        raise crashes[0]


def _mean_of_seeds(task: TrialTask, trainer: Trainer, reporter: _Reporter) -> Mapping[str, Any] | None:
    """Train all seeds of a trial in one program and return their mean summary, or None if they were stopped.

    If a seed fails, the others are stopped, and its error is raised.
    """
    with kept(task.address, Path(task.out)) as (here, keep):
        config, runs = build(ExperimentConfig, task.tree), seed_runs(here, task.seeds)
        reporters = _SeedReporters(reporter, task.metric, runs, task.seeds)

        def ended(_: int, outcome: Summary | Exception | None) -> None:
            if isinstance(outcome, Exception):
                reporters.stop()

        members = [
            SeedRun(Experiment(replace(config, seed=seed)), run.path, reporters.of(k), _kept_by(keep))
            for k, (seed, run) in enumerate(zip(task.seeds, runs, strict=True))
        ]
        if trainer is train:
            results = train_stacked(members, ended)
        else:
            results = [trainer(own.experiment, out=own.out, report=own.report, saved=own.saved) for own in members]
        summaries = [asdict(summary) for result in results if (summary := _raised_or(result)) is not None]
    return mean_summary(summaries) if len(summaries) == len(members) else None


def _member(task: TrialTask, reporter: _Reporter, held: ExitStack) -> SeedRun:
    here, keep = held.enter_context(kept(task.address, Path(task.out)))
    return SeedRun(Experiment(build(ExperimentConfig, task.tree)), here, reporter, _kept_by(keep))


def _kept_by(keep: Callable[[], None]) -> Saved:
    return lambda _: keep()


def _raised_or(outcome: Summary | Exception | None) -> Summary | None:
    if isinstance(outcome, Exception):
        raise outcome
    return outcome


def _tree_or_raised(outcome: Summary | Exception | None) -> Mapping[str, Any] | None:
    summary = _raised_or(outcome)
    return None if summary is None else asdict(summary)


def _result(task: TrialTask, train_it: Callable[[], Mapping[str, Any] | None]) -> LastReport:
    """Return how the training ended; only errors that a retry could resolve are raised."""
    try:
        summary = train_it()
    except (DivergedError, BadReportError) as error:
        return Diverged(task.number, str(error))
    except UserError as error:
        return Refused(task.number, str(error))
    except WorkersLostError as error:
        raise RuntimeError(f"{error.details}\n{error}") from None  # only the text is recorded
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            return OutOfDisk(task.number, f"{error.strerror}: {error.filename or task.out}")
        raise
    return Stopped(task.number) if summary is None else Finished(task.number, summary)


def _summary(task: TrialTask, trainer: Trainer, reporter: _Reporter) -> Mapping[str, Any] | None:
    """Train a single trial and return its summary, or None if it was stopped."""
    out, address = Path(task.out), task.address
    config = build(ExperimentConfig, task.tree)
    if config.resources.num_workers > 1:
        from tune.execution.ray_train import train_on_workers  # noqa: PLC0415  (Ray Train takes seconds to import)

        return _tree_or_raised(train_on_workers(config, out=out, report=reporter, address=address))
    with kept(address, out) as (here, keep):
        return _tree_or_raised(trainer(Experiment(config), out=here, report=reporter, saved=_kept_by(keep)))


def _copy_run(source: str, out: Path, address: str | None) -> None:
    """Copy a finished run; on a local disk its files, which never change, are hard-linked."""
    if address is not None:
        here = node_folder(address)
        Remote(source).pull(here)
        Remote(address).push(here)
    elif not (out / "summary.json").exists():
        rmtree(out, ignore_errors=True)
        copytree(source, out, copy_function=os.link, ignore=ignore_patterns(".lock"))
