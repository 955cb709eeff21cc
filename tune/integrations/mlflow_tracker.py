"""Record of a study in MLflow: a parent run for the study and a child run per trial, written by a background thread.

The study folder is the source of truth and holds everything, so nothing is queued: whatever MLflow lacks is read from
the folder. What MLflow has is cached, and queried after a restart or an error. Therefore nothing is lost or written
twice, even if a process was killed or the server was unreachable in between.

    tags of a run   study, signature, git_revision; for a trial also arm, seed, trial_id, state, reason, artifacts
    parameters      every setting of the trial's config by its path, except for resources
    metrics         the rows of metrics.jsonl; best/... and last/... from its summary; for a study fresh/..., the best
                    trial's scores on noise that was not used to select it
    artifacts       config.yaml, samples/, curves.png, summary.json, error.txt, checkpoints/
"""

import json
import math
import os
import re
import threading
import time
from collections import Counter
from collections.abc import Callable, Collection, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from dxmi.config import to_tree
from dxmi.errors import UserError
from dxmi.persistence.checkpoint import path_of, steps_in
from dxmi.persistence.provenance import git_revision
from dxmi.persistence.run_directory import Row
from tune.integrations.mlflow_store import (
    MlflowWriter,
    Point,
    TrackedRun,
    missing,
    open_store,
    open_writer,
    store_address,
)
from tune.messages import complain
from tune.plans.ablation import ARM, AblationPlan
from tune.plans.arms import Arm
from tune.plans.sweep import Plan
from tune.search.space import flat
from tune.studies.arm_results import results_of, verdict_text
from tune.studies.confirmation import chosen, confirmations
from tune.studies.folder import StudyFolder
from tune.studies.records import TrialRecord, TrialState

__all__ = ["Tracker", "open_store"]

T = TypeVar("T")

_STATUS = {
    TrialState.RUNNING: "RUNNING",
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.STOPPED: "KILLED",
    TrialState.DIVERGED: "FAILED",
    TrialState.FAILED: "FAILED",
}
_INTERRUPTED = "interrupted"
_DELIVERED = {"artifacts": "complete"}
"""Tag that is set last on the run of an ended trial, when it is complete."""
_PAUSE = 1.0
"""Seconds between two passes, in which many trials may start and end."""
_FIRST_DELAY, _LONGEST_DELAY = 0.5, 8.0
"""Seconds before a retry, doubled after each failure."""
_MAX_FAILURES = 3
"""Number of failed trials in a pass after which the remaining ones are not tried: the server seems unreachable."""
_HANG_SECONDS = 300.0
"""Seconds that recording a trial, including its files, may take at the end of a study."""
_AT_ONCE_SECONDS = 5.0
"""The same if the user has interrupted the study."""
_SHOWN = 300
"""Largest number of characters of an error that are shown to the user."""


@dataclass(frozen=True)
class _News:
    """Snapshot of a study.

    Attributes:
        records: Records of all trials.
        running: Numbers of the trials that are running.
    """

    records: Sequence[TrialRecord] = ()
    running: frozenset[int] = frozenset()


# ----------------------------------------------------------------------------
# Contents of a run


def _text(value: Any) -> str:
    return value if isinstance(value, str) else json.dumps(value)


def _params(plan: Plan, record: TrialRecord) -> dict[str, str]:
    try:
        settings = flat(to_tree(plan.config_of(record.values)))
    except UserError:  # the combination of values is invalid, and the trial failed
        settings = flat(to_tree(plan.experiment)) | dict(record.values)
    return {path: _text(value) for path, value in settings.items() if not path.startswith("resources.")}


def _numbers(row: Mapping[str, Any], prefix: str = "") -> dict[str, float]:
    """The finite numbers of a row by key; if `prefix` is given, it replaces eval/."""
    return {
        prefix + key.removeprefix("eval/") if prefix else key: float(value)
        for key, value in row.items()
        if key != "step" and isinstance(value, (int, float)) and math.isfinite(value)
    }


def _results(record: TrialRecord) -> list[tuple[int, dict[str, float]]]:
    """The results of an ended trial as pairs (step, metrics)."""
    outcome = record.outcome
    summary = record.summary() if outcome.state is TrialState.COMPLETE else None
    if summary is not None:
        names = [name for name in ("best", "last") if name in summary and name in summary["scores"]]
        return [(int(summary[name]["step"]), _numbers(summary["scores"][name], f"{name}/")) for name in names]
    return [] if outcome.score is None else [(outcome.step or 0, _numbers({"score": outcome.score}, "best/"))]


def _files(folder: StudyFolder, record: TrialRecord) -> Iterator[tuple[Path, str]]:
    """The files of a trial as pairs (file, folder among the artifacts); those that still change only after it ended."""
    run = record.run
    yield run.config, ""
    pictures = (run.samples.glob(pattern) for pattern in ("reference_*.png", "step*.png"))
    yield from ((path, "samples") for found in pictures for path in sorted(found))
    if record.state is TrialState.RUNNING:
        return
    yield from ((path, "") for path in (run.curves, run.divergence, run.summary, folder.error(record.number)))
    saved = steps_in(run.checkpoints)
    for step in (step for step in saved if step in (record.outcome.step, saved[-1])):
        checkpoint = path_of(run.checkpoints, step)
        yield from ((path, f"checkpoints/{checkpoint.name}") for path in sorted(checkpoint.glob("*")))


def _now() -> int:
    return time.time_ns() // 1_000_000


def _written(path: Path) -> int | None:
    """Modification time of a file in milliseconds since the epoch; None if it does not exist."""
    try:
        return path.stat().st_mtime_ns // 1_000_000
    except OSError:
        return None


def _span(record: TrialRecord) -> tuple[int, int]:
    """Times of a trial's start and of its last write, in milliseconds since the epoch."""
    run = record.run
    files = [run.config, run.metrics, run.summary, run.curves, *run.samples.glob("step*.png")]
    times = [written for written in map(_written, files) if written is not None]
    if not times or record.same_as is not None:  # a copy's files are as old as the first trial's
        return _now(), _now()
    return min(times), max(times)


def _num_ended(records: Iterable[TrialRecord]) -> int:
    """Number of ended trials, used as the step of a study's metrics, since each new value needs a newer step."""
    return sum(record.state is not TrialState.RUNNING for record in records)


class _Tally:
    """Running statistics of the ended trials, each counted once.

    Args:
        plan: Plan of the study.
    """

    def __init__(self, plan: Plan) -> None:
        self._plan = plan
        self._counted: set[int] = set()
        self._states: Counter[TrialState] = Counter()
        self._best: dict[str, float] = {}
        self._references: dict[str, float] = {}

    def count(self, record: TrialRecord) -> None:
        """Add a trial, if it has ended and is not counted yet."""
        if record.state is TrialState.RUNNING or record.number in self._counted:
            return
        self._counted.add(record.number)
        self._states[record.state] += 1
        if record.state is not TrialState.COMPLETE:
            return
        for objective, value in zip(self._plan.objectives, record.outcome.objectives, strict=True):
            key, better = objective.metric.removeprefix("eval/"), min if objective.sign > 0 else max
            self._best[key] = better(value, self._best.get(key, value))
        if not self._references:
            with suppress(UserError):
                self._references = (record.summary() or {}).get("reference", {})

    def points(self, trials: int) -> list[Point]:
        """The study's metrics; their step is the number of ended trials."""
        ended, now = self._states.total(), _now()
        if not ended:
            return []
        counts = {state.value: self._states[state] for state in TrialState} | {"running": trials - ended}
        metrics = {**_numbers(self._best, "best/"), **_numbers(counts, "trials/")}
        references = _numbers(self._references, "reference/")
        return [
            *(Point(key, value, ended, now) for key, value in metrics.items()),
            *(Point(key, value, 0, now) for key, value in references.items()),
        ]


# ----------------------------------------------------------------------------
# Recording


class _StudyUploader:
    """Updates MLflow from a study in passes.

    Args:
        folder: Folder of the study.
        plan: Plan of the study.
        complain: Called with a message if a file cannot be read.

    Attributes:
        progress: Time at which a trial was last recorded, on the monotonic clock.
        given_up: Event that ends a pass after the current trial.
    """

    def __init__(self, folder: StudyFolder, plan: Plan, complain: Callable[[str], None]) -> None:
        self.progress = time.monotonic()
        self.given_up = threading.Event()
        self._folder = folder
        self._plan = plan
        self._complain = complain
        self._writer: MlflowWriter | None = None
        self._parent: TrackedRun | None = None
        self._arms: dict[str, TrackedRun] = {}
        """Run of each arm, in an ablation."""
        self._damaged: set[int] = set()
        self._times: dict[int, dict[int, int]] = {}
        """Time at which each step of a trial was first seen, so that a point that is sent again has the same time."""
        self._forget_trials()

    def _forget_trials(self) -> None:
        self._tally = _Tally(self._plan)
        self._closed: set[int] = set()
        """Ended trials whose runs are complete."""
        self._first = 0
        """Index of the first trial that may not be closed."""
        self._found: dict[str, TrackedRun] = {}
        """Runs of an earlier session by trial_id, until they are used."""
        self._runs: dict[int, TrackedRun] = {}
        self._doubtful: set[int] = set()
        """Trials whose state in MLflow is unknown after an error."""
        self._sent: dict[int, object] = {}
        """Fingerprint of each trial at the time when all its rows had been sent."""

    def update(self, news: _News, ended: str | None) -> list[Exception]:
        """Send what is new.

        Args:
            news: Current snapshot of the study.
            ended: None while the study runs; otherwise see `Tracker.finish`.

        Returns:
            Errors that concern single trials.

        Raises:
            Exception: the server is unreachable, or another error that concerns all trials.
        """
        try:
            if self._writer is None:
                self._writer = _open_writer(self._folder, self._plan)
            if self._parent is None:
                self._parent = self._begin_study(self._writer)
            return self._send(self._writer, self._parent, news, ended)
        except Exception:
            self._writer = self._parent = None  # found again in the next pass, since their state is unknown now
            raise

    def _send(self, writer: MlflowWriter, parent: TrackedRun, news: _News, ended: str | None) -> list[Exception]:
        records = self._open(news)
        for record in records:
            self._tally.count(record)
        failed = self._each(records, lambda record: self._record(writer, parent, record, news, ended is not None))
        self._doubtful |= {record.number for record, _ in failed}
        if len(failed) == _MAX_FAILURES:
            raise failed[-1][1]
        writer.log(parent, self._tally.points(len(news.records)))
        if ended is not None:
            self._end_arms(writer, news.records, "KILLED" if ended else "FINISHED")
            writer.log(parent, self._fresh_points(news.records))
            writer.end(parent, "KILLED" if ended else "FINISHED", {"ended": ended}, _now())
        # Files come last, since they may be large and a server may reject them; sending one twice does no harm.
        unsent = self._each([parent], lambda run: self._upload_study(writer, run, ended is not None))
        refused = self._each(records, lambda record: self._upload(writer, record))
        while self._first < len(news.records) and news.records[self._first].number in self._closed:
            self._first += 1
        return [error for _, error in (*failed, *unsent, *refused)]

    def _fresh_points(self, records: Sequence[TrialRecord]) -> list[Point]:
        """Scores on fresh noise of the best trial, and of each trial on a Pareto front."""
        picked, ended, now = chosen(self._plan, records), _num_ended(records), _now()
        known = confirmations(self._folder, records)
        points = []
        for place, record in enumerate(picked):
            names = ([] if place else ["fresh/"]) + ([f"fresh/trial_{record.number:04d}/"] if len(picked) > 1 else [])
            scores = known[record.number].scores if record.number in known else {}
            points += [Point(key, value, ended, now) for name in names for key, value in _numbers(scores, name).items()]
        return points

    def _open(self, news: _News) -> list[TrialRecord]:
        return [record for record in news.records[self._first :] if record.number not in self._closed]

    def _each(self, items: Iterable[T], action: Callable[[T], None]) -> list[tuple[T, Exception]]:
        """Apply `action` to every item, continuing after errors, and return the failed items with their errors."""
        failed: list[tuple[T, Exception]] = []
        for item in items:
            if self.given_up.is_set() or len(failed) == _MAX_FAILURES:
                break
            try:
                action(item)
            except Exception as error:  # noqa: BLE001  (MLflow raises anything; it is reported and tried again)
                failed.append((item, error))
            else:
                self.progress = time.monotonic()
        return failed

    def left(self, news: _News) -> int:
        """Number of rows, and of trials without rows, that are not recorded in MLflow."""
        return sum(map(self._left, self._open(news)))

    def _left(self, record: TrialRecord) -> int:
        run = self._runs.get(record.number)
        if run is None:
            return max(1, len(self._rows(record)))
        steps = {point.step for point in missing(run, self._points(record))}
        is_recorded = record.state is TrialState.RUNNING and run.tags.get("state") == _INTERRUPTED
        return len(steps) or int(not is_recorded)

    # ------------------------------------------------------------------------
    # The study

    def _begin_study(self, writer: MlflowWriter) -> TrackedRun:
        """Find or create the parent run, mark it as running, and find the runs of its trials in one search."""
        plan = self._plan
        identity = {"study": plan.name, "signature": plan.signature}
        runs, children = writer.find(identity), []
        if runs:
            run = runs[0]
            children = writer.find({"mlflow.parentRunId": run.id})
        else:
            tags = {"mlflow.runName": plan.name, **identity, "git_revision": git_revision() or "unknown"}
            run = writer.create(tags, _written(self._folder.plan) or _now())
        self._forget_trials()
        if isinstance(plan, AblationPlan):
            self._arms = {arm.name: self._begin_arm(writer, run, arm, children) for arm in plan.arms}
            children = [child for arm in self._arms.values() for child in writer.find({"mlflow.parentRunId": arm.id})]
        self._found = {child.tags.get("trial_id", ""): child for child in children}
        kind = "ablation" if isinstance(plan, AblationPlan) else "sweep"
        writer.describe(run, {path: _text(value) for path, value in flat({kind: plan.settings[kind]}).items()})
        writer.begin(run, {"planned_trials": str(plan.num_trials), "ended": ""})
        return run

    def _begin_arm(
        self, writer: MlflowWriter, parent: TrackedRun, arm: Arm, children: Sequence[TrackedRun]
    ) -> TrackedRun:
        """Find or create an arm's run, the child of the study's run and the parent of the runs of its seeds."""
        run = next((child for child in children if child.tags.get("arm") == arm.name), None)
        if run is None:
            plan = self._plan
            tags = {
                "mlflow.parentRunId": parent.id,
                "mlflow.runName": f"{plan.name}/{arm.name}",
                "study": plan.name,
                "arm": arm.name,
            }
            run = writer.create(tags, _written(self._folder.plan) or _now())
        writer.describe(run, {path: _text(value) for path, value in arm.changes.items()})
        writer.begin(run, {})
        return run

    def _end_arms(self, writer: MlflowWriter, records: Sequence[TrialRecord], status: str) -> None:
        """Log the results of each arm, the mean of its scores and the comparison with the baseline, and end its run."""
        if not isinstance(self._plan, AblationPlan):
            return
        results = results_of(self._plan, self._folder, records)
        compared = {comparison.arm: comparison for comparison in results.comparisons}
        for name, run in self._arms.items():
            summary, comparison = results.summaries[name], compared.get(name)
            numbers = {"arm/mean": summary.mean.estimate, "arm/seeds": float(summary.seeds)}
            runs = results.runs[name]
            numbers |= {"arm/missing": float(runs.missing), "arm/lost": float(runs.lost)}
            numbers |= {
                f"arm/{key.removeprefix('eval/')}": own[name].mean.estimate for key, own in results.others.items()
            }
            if comparison is not None:
                numbers |= {"arm/difference": comparison.difference.estimate, "arm/p_adjusted": comparison.p_adjusted}
            finite = _numbers(numbers)
            ended = _num_ended(records)  # p-values are corrected for all arms, so they change when any run ends
            writer.log(run, [Point(key, value, ended, _now()) for key, value in finite.items()])
            tags = {"verdict": verdict_text(results, name, comparison), "missing": str(runs)}
            writer.end(run, status, tags, _now())

    def _upload_study(self, writer: MlflowWriter, run: TrackedRun, ending: bool) -> None:
        folder = self._folder
        tables = (folder.path / "ablation.csv", folder.path / "ablation.tex")
        results = (folder.leaderboard, folder.best, folder.report, *tables) if ending else ()
        writer.upload(run, [(path, "") for path in (folder.plan, *results)], again=ending)

    # ------------------------------------------------------------------------
    # A trial

    def _record(self, writer: MlflowWriter, parent: TrackedRun, record: TrialRecord, news: _News, ending: bool) -> None:
        """Record everything of a trial except its files."""
        is_unfinished = record.state is TrialState.RUNNING
        runs_now = is_unfinished and record.number in news.running and not ending
        parent = self._arms.get(str(record.values.get(ARM)), parent)
        run = self._run(writer, parent, record)
        if run is not None and _is_closed(run, record):
            self._close(record.number)
            return
        if run is None:
            if is_unfinished and not runs_now and not ending:
                return  # it has not started
            run = writer.create(self._tags(parent, record), _span(record)[0])
        self._runs[record.number] = run
        if not run.is_described:
            writer.describe(run, _params(self._plan, record))
        if runs_now:
            writer.begin(run, {"state": record.state.value})
        self._send_rows(writer, run, record)
        if not is_unfinished:
            reason = {"reason": record.outcome.reason} if record.outcome.reason else {}
            writer.end(run, _STATUS[record.state], {"state": record.state.value, **reason}, _span(record)[1])
        elif not runs_now:
            writer.end(run, "KILLED", {"state": _INTERRUPTED}, _now())

    def _upload(self, writer: MlflowWriter, record: TrialRecord) -> None:
        run = self._runs.get(record.number)
        if run is None or record.number in self._doubtful:
            return
        writer.upload(run, _files(self._folder, record))
        if record.state is not TrialState.RUNNING:
            writer.mark(run, _DELIVERED)
            self._close(record.number)

    def _close(self, number: int) -> None:
        self._closed.add(number)
        for memory in (self._runs, self._times, self._sent):
            memory.pop(number, None)

    def _run(self, writer: MlflowWriter, parent: TrackedRun, record: TrialRecord) -> TrackedRun | None:
        """A trial's run, or None if it does not exist."""
        number, trial = record.number, self._trial_id(record)
        if number in self._doubtful:
            runs = writer.find({"mlflow.parentRunId": parent.id, "trial_id": trial})
            for memory in (self._runs, self._sent):
                memory.pop(number, None)
            self._doubtful.discard(number)
            return runs[0] if runs else None
        return self._runs.get(number) or self._found.pop(trial, None)

    def _trial_id(self, record: TrialRecord) -> str:
        return f"{self._plan.name}/{record.number:04d}"

    def _run_name(self, record: TrialRecord) -> str:
        """Name of a trial's run, which labels its curves: with arm and seed in an ablation."""
        if isinstance(self._plan, AblationPlan):
            return f"{self._plan.name}/{record.values[ARM]}/seed {record.seed}"
        return self._trial_id(record)

    def _tags(self, parent: TrackedRun, record: TrialRecord) -> dict[str, str]:
        return {
            "mlflow.parentRunId": parent.id,
            "mlflow.runName": self._run_name(record),
            "trial_id": self._trial_id(record),
            "study": self._plan.name,
            "signature": record.signature,
            "git_revision": git_revision() or "unknown",
            "arm": str(record.values.get(ARM, "sweep")),
            "seed": " ".join(map(str, self._plan.trial_seeds)) if record.further_runs else str(record.seed),
            "state": record.state.value,
        }

    def _send_rows(self, writer: MlflowWriter, run: TrackedRun, record: TrialRecord) -> None:
        look = _look(record)
        if self._sent.get(record.number) != look:
            writer.log(run, self._points(record))
            self._sent[record.number] = look

    def _points(self, record: TrialRecord) -> Iterator[Point]:
        times = self._times.setdefault(record.number, {})
        seen = _written(record.run.metrics) or _now()
        rows = [(int(row["step"]), _numbers(row)) for row in self._rows(record)]
        if record.state is not TrialState.RUNNING:
            rows += self._readable(record, lambda: _results(record))
        for step, metrics in rows:
            for key, value in metrics.items():
                yield Point(key, value, step, times.setdefault(step, seen))

    def _rows(self, record: TrialRecord) -> list[Row]:
        return self._readable(record, record.rows)

    def _readable(self, record: TrialRecord, read: Callable[[], list[T]]) -> list[T]:
        """The result of `read`; if the file is damaged, an empty list and a message, so that the rest is recorded."""
        try:
            return read()
        except UserError as error:
            if record.number not in self._damaged:
                self._damaged.add(record.number)
                self._complain(f"Trial {record.number} is recorded in MLflow without one of its files: {error}")
            return []


def _look(record: TrialRecord) -> object:
    """A value that changes whenever there is something new to record about a trial."""
    try:
        stats = [run.metrics.stat() for run in record.runs]
    except OSError:
        return record.state
    return record.state, *((stat.st_ino, stat.st_size, stat.st_mtime_ns) for stat in stats)


def _is_closed(run: TrackedRun, record: TrialRecord) -> bool:
    wanted = {"state": record.state.value, **_DELIVERED}
    has_ended = record.state is not TrialState.RUNNING and run.status == _STATUS[record.state]
    return has_ended and wanted.items() <= run.tags.items()


def _open_writer(folder: StudyFolder, plan: Plan) -> MlflowWriter:
    return open_writer(folder.path.parent, plan.tracking.uri, plan.tracking.experiment)


# ----------------------------------------------------------------------------
# The thread


class Tracker:
    """Records a study in MLflow from a background thread of the driver, which waits for it only at the end.

    With tracking.uri=none it does nothing.

    Args:
        folder: Folder of the study.
        plan: Plan of the study.
        complain: Called from the thread with a message when something goes wrong.
    """

    def __init__(self, folder: StudyFolder, plan: Plan, complain: Callable[[str], None] = complain) -> None:
        self._folder = folder
        self._plan = plan
        self._complain = complain
        self._uploader = _StudyUploader(folder, plan, self._say)
        self._news = _News()
        self._ended = ""
        self._deadline = math.inf
        self._left = 0
        self._said: set[str] = set()
        self._something_new = threading.Event()
        self._ending = threading.Event()
        self._thread: threading.Thread | None = None

    @property
    def address(self) -> str:
        """Address for the user to open: the URI of an SQLite file or of a server; empty if nothing is recorded."""
        uri = self._plan.tracking.uri
        if uri == "none":
            return ""
        return store_address(self._folder.path.parent) if uri == "local" else uri

    def start(self) -> None:
        """Start the thread and return immediately."""
        if self._plan.tracking.uri != "none":
            self._thread = threading.Thread(target=self._work, name="mlflow", daemon=True)
            self._thread.start()

    def update(self, records: Sequence[TrialRecord], *, running: Collection[int]) -> None:
        """Hand over the current state of the study and return immediately. A newer state replaces an older one.

        Args:
            records: Records of all trials, in the order of their numbers.
            running: Numbers of the trials that are running; others in the running state wait to be resumed.
        """
        self._news = _News(tuple(records), frozenset(running))
        self._something_new.set()

    def finish(self, ended: str, *, patient: bool = True) -> int:
        """Deliver what is left, close all runs and end the thread.

        Args:
            ended: Empty if the study ran all its trials or exhausted its budget, otherwise why it was interrupted.
            patient: Whether to wait for an unreachable server, for tracking.patience_seconds.

        Returns:
            Number of rows and trials that could not be delivered; the next session of the study delivers them.
        """
        if self._thread is None:
            return 0
        self._uploader.progress = time.monotonic()
        self._deadline = time.monotonic() + (self._plan.tracking.patience_seconds if patient else 0.0)
        self._ended = ended
        self._ending.set()
        self._something_new.set()
        hang = _HANG_SECONDS if patient else _AT_ONCE_SECONDS
        while self._thread.is_alive() and time.monotonic() < max(self._deadline, self._uploader.progress + hang):
            self._thread.join(0.1)
        self._uploader.given_up.set()
        return max(1, self._uploader.left(self._news)) if self._thread.is_alive() else self._left

    def _work(self) -> None:
        delay = _FIRST_DELAY
        while not self._uploader.given_up.is_set():
            is_last = self._ending.is_set()
            self._something_new.clear()
            if self._attempt(self._ended if is_last else None):
                if is_last:
                    return
                delay = _FIRST_DELAY
                self._ending.wait(_PAUSE)
                self._something_new.wait()
                continue
            if is_last and time.monotonic() > self._deadline:
                self._left = max(1, self._uploader.left(self._news))
                return
            (self._uploader.given_up if is_last else self._ending).wait(delay)
            delay = min(2 * delay, _LONGEST_DELAY)

    def _attempt(self, ended: str | None) -> bool:
        """Run one pass and return whether everything has been delivered."""
        try:
            errors = self._uploader.update(self._news, ended)
        except Exception as error:  # noqa: BLE001  (an error here must not end the sweep: it is reported, and retried)
            errors = [error]
        if errors:
            self._say(
                f"MLflow ({self.address}) does not accept all records of the study {self._plan.name}: "
                f"{reason_of(errors[0])}. The study continues, and the records are sent again until they are accepted."
            )
        else:
            self._said.clear()
        return not errors

    def _say(self, sentence: str) -> None:
        """Report a message once until everything has been delivered again."""
        if sentence not in self._said:
            self._said.add(sentence)
            with suppress(OSError):  # the reader of the error stream has exited
                self._complain(sentence)


def reason_of(error: BaseException) -> str:
    """The innermost cause of an error in one line, with secrets removed."""
    while not isinstance(error, UserError) and (inner := error.__cause__ or error.__context__) is not None:
        error = inner
    text = getattr(error, "strerror", None) or str(error) or type(error).__name__
    for name in ("MLFLOW_TRACKING_PASSWORD", "MLFLOW_TRACKING_TOKEN", "MLFLOW_TRACKING_USERNAME"):
        secret = os.environ.get(name)
        text = text.replace(secret, "***") if secret else text
    text = re.sub(r"//[^/@\s]*@", "//***@", " ".join(text.split())).rstrip(".")
    return text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
