"""The decisions of a sweep: which trial to start, which to stop, and when the session ends.

The controller does not depend on Ray: the Ray backend reports events, and the controller records them in the study and
decides what to do next. It can be tested with a fake clock and fake trials.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from dxmi.formatting import score_text
from dxmi.metrics.keys import best_score
from tune.execution.slots import Slots
from tune.execution.trial_messages import (
    Diverged,
    Finished,
    LastReport,
    OutOfDisk,
    Refused,
    Scored,
    Stopped,
    TrialReport,
)
from tune.messages import last_line
from tune.studies.records import Outcome, TrialRecord, TrialSpec, TrialState, completed, pruned, unfinished
from tune.studies.study import Study

_ALL_ENDED = "every planned trial has ended"
_PROGRESS_EVERY = 15.0
"""Seconds between two writes of the study's wall time."""


class StopReason(StrEnum):
    """Why a trial is asked to stop."""

    PRUNE = "fell behind"
    TRIAL_TIME = "trial time used up"
    BUDGET = "budget used up"
    INTERRUPT = "interrupted"


@dataclass
class RunningTrial:
    """A trial that is currently running.

    Attributes:
        record: its record in the study.
        spec: what it runs.
        since: when it was started in this session, on the controller's clock.
        phase: its current phase.
        step: the current step of that phase.
        phase_total: number of steps of that phase.
        score: the latest score.
        best: the best score so far.
        stop_reason: why it was asked to stop, if it was.
        attempts: number of times it was started in this session.
        together: number of trials started in the same program, including this one.
        program: number of the first of those trials.
    """

    record: TrialRecord
    spec: TrialSpec
    since: float
    phase: str = "starting"
    step: int = 0
    phase_total: int = 0
    phase_since: float = 0.0
    phase_start: int = 0
    score: float | None = None
    best: float | None = None
    stop_reason: StopReason | None = None
    attempts: int = 0
    together: int = 1
    program: int = -1


@dataclass(frozen=True)
class Note:
    """A message to the user about an event.

    Attributes:
        text: one line.
        number: number of the trial concerned, if any.
        bad: whether to print it to the error stream.
        minor: whether to omit it where a live table shows the same information.
    """

    text: str
    number: int | None = None
    bad: bool = False
    minor: bool = False


@dataclass
class Controller:
    """One session of a study.

    Args:
        study: the study, driven by this process.
        slots: how trials share the machine.
        clock: monotonic clock in seconds.
        note: called with a message about each event.

    Attributes:
        running: the trials that are running.
        ending: why no more trials are started; empty while trials are started.
        interrupted: whether the session ends before the study does.
        stack: number of seeds trained in one program.
    """

    study: Study
    slots: Slots
    clock: Callable[[], float] = time.monotonic
    note: Callable[[Note], None] = lambda _: None
    running: dict[int, RunningTrial] = field(default_factory=dict)
    ending: str = ""
    interrupted: bool = False
    stack: int = 1

    def __post_init__(self) -> None:
        self.plan = self.study.plan
        self.budget = self.plan.sweep.budget
        self._began = self.clock()
        progress = self.study.folder.read_progress()
        self._earlier = float(progress["seconds"])
        self._written = self._began
        self._waiting = self.study.reconcile()
        self._stop_requests: dict[int, StopReason] = {}
        ended = [r for r in self.study.records() if r.state is not TrialState.RUNNING]
        self.states = [r.state for r in ended]
        self.ended_before = len(ended)
        # The journal covers only ended trials, and progress.json may be outdated if the process was killed.
        seconds_ended = sum(r.outcome.seconds for r in ended) * self.slots.devices_of_a_trial
        self._device_seconds = max(float(progress["device_seconds"]), seconds_ended)
        self._bytes = sum(self.study.tidy(r.number) for r in ended)
        self._changed = True
        self._stopping = False

    # ------------------------------------------------------------------------
    # Launching

    def next(self) -> TrialRecord | None:
        """Return the next trial to start, or None if there is none or all slots are in use."""
        if self.ending or len({trial.program for trial in self.running.values()}) >= self.slots.concurrent:
            return None
        record = self._waiting.pop(0) if self._waiting else self.study.add()
        if record is None:
            if self.study.is_done:
                self.ending = _ALL_ENDED
            return None
        self._begin(record, record.number)
        return record

    def stack_seeds(self, number: int) -> None:
        """From now on, train this many seeds of an arm in one program; recorded in the study's plan."""
        self.stack = number
        self.study.record_stack(number)
        if number > 1:
            self.note(Note(f"{number} seeds of each arm are trained together in one program"))

    def next_program(self) -> list[TrialRecord]:
        """Return the next trials to start in one program, which differ only in their seeds."""
        first = self.next()
        if first is None:
            return []
        together = [first]
        while len(together) < self.stack and (record := self._next_for_program(first)) is not None:
            self._begin(record, first.number)
            together.append(record)
        for record in together:
            self.running[record.number].together = len(together)
        return together

    def _next_for_program(self, first: TrialRecord) -> TrialRecord | None:
        """Return a waiting or new trial that can share the program of `first`, or None."""
        for record in self._waiting:
            if self.plan.share_program(record.values, first.values, self.stack):
                self._waiting.remove(record)
                return record
        return self.study.add_to_program(first, self.stack)

    def _begin(self, record: TrialRecord, program: int) -> None:
        self.running[record.number] = RunningTrial(record, self.study.spec(record), self.clock(), program=program)

    @property
    def has_nothing_to_do(self) -> bool:
        """Whether every trial of the study had ended before this session."""
        return not self._waiting and self.study.is_done

    def changed(self) -> bool:
        """Whether anything worth recording has changed since the last call."""
        changed, self._changed = self._changed, False
        return changed

    @property
    def is_over(self) -> bool:
        """Whether no trial is running and no more will be started."""
        return bool(self.ending) and not self.running

    # ------------------------------------------------------------------------
    # Events

    def started(self, number: int) -> None:
        """Handle the start or restart of a trial's process."""
        trial = self.running[number]
        trial.attempts += 1
        if trial.attempts == 1:
            self._say(trial, "started", minor=True)

    def receive(self, report: TrialReport) -> None:
        """Handle a trial's report of a score or of its end."""
        if isinstance(report, Scored):
            self._scored(report.number, report.step, report.metrics[self.plan.metric])
        else:
            self._ended(report)

    def _scored(self, number: int, step: int, score: float) -> None:
        trial = self.running[number]
        self.study.score(number, step, score)
        trial.score = score
        trial.best = score if trial.best is None else best_score((trial.best, score), self.plan.direction)
        self._say(trial, f"iteration {step}/{trial.spec.iterations}, {self._label} {score_text(score)}", minor=True)
        if self.study.should_prune(number, step):
            self._request_stop(trial, StopReason.PRUNE)

    @property
    def _label(self) -> str:
        return self.plan.metric.removeprefix("eval/")

    def heartbeat(self, number: int, phase: str, step: int, total: int) -> None:
        """Record a trial's progress, which is used only for display."""
        trial = self.running.get(number)
        if trial is None:
            return
        if trial.phase != phase:
            trial.phase, trial.phase_since, trial.phase_start = phase, self.clock(), step
        trial.step, trial.phase_total = step, total

    def noted(self, number: int, text: str) -> None:
        """Pass a message from a trial on to the user."""
        self.note(Note(text, number, bad=True))

    def _ended(self, report: LastReport) -> None:
        """Handle the end of a trial: finished, stopped on request, or failed."""
        trial = self.running[report.number]
        if isinstance(report, OutOfDisk):
            self.stop_all(StopReason.INTERRUPT, f"the disk is full ({report.reason}); free some space")
        outcome = self._outcome(trial, report)
        if outcome is not None:
            self._finish(trial, outcome)
        else:
            self._say(trial, "interrupted; it continues when the study is resumed")
            self._leave(trial)

    def _outcome(self, trial: RunningTrial, report: LastReport) -> Outcome | None:
        """Return a trial's outcome, or None if it was interrupted and is to continue after a resume."""
        seconds, curve = self._seconds(trial), self.study.curves().get(trial.record.number, {})
        if isinstance(report, Finished):
            return completed(self.plan, report.summary, seconds)
        if isinstance(report, Diverged | Refused):
            state = TrialState.DIVERGED if isinstance(report, Diverged) else TrialState.FAILED
            return unfinished(self.plan, curve, state, report.reason, seconds)
        if trial.stop_reason is StopReason.PRUNE:
            return pruned(self.plan, curve, max(curve), seconds)
        if trial.stop_reason in (StopReason.TRIAL_TIME, StopReason.BUDGET):
            return unfinished(self.plan, curve, TrialState.STOPPED, trial.stop_reason.value, seconds)
        return None

    def crashed(self, number: int, error: str, *, again: bool) -> None:
        """Handle an exception or the death of a trial's process; `again` if it will be restarted."""
        trial, reason = self.running[number], last_line(error)
        if again and trial.stop_reason is None:
            self._say(trial, f"crashed ({reason}); the trial is started again", bad=True)
            return
        if trial.stop_reason is not None or self.interrupted:  # it was about to stop; its checkpoints are complete
            self._ended(Stopped(number))
            return
        curve = self.study.curves().get(number, {})
        self._finish(trial, unfinished(self.plan, curve, TrialState.FAILED, reason, self._seconds(trial)))

    def _wall(self, trial: RunningTrial) -> float:
        return self.clock() - trial.since

    def _seconds(self, trial: RunningTrial) -> float:
        """Return a trial's cost in this session: its wall time, divided by the number of trials in its program."""
        return self._wall(trial) / trial.together

    def _finish(self, trial: RunningTrial, outcome: Outcome) -> None:
        self.study.finish(trial.record.number, outcome)
        self._leave(trial)
        self.states.append(outcome.state)
        self._bytes += self.study.tidy(trial.record.number)
        score = (
            f", {self._label} {score_text(outcome.score)} at iteration {outcome.step}"
            if outcome.score is not None
            else ""
        )
        reason = f": {outcome.reason}" if outcome.reason else ""
        text = f"{outcome.state.value}{reason}{score} ({outcome.seconds:.0f} s)"
        self._say(trial, text, bad=outcome.state.is_failure)

    def _leave(self, trial: RunningTrial) -> None:
        """Remove a trial that no longer holds its devices."""
        del self.running[trial.record.number]
        self._device_seconds += self._seconds(trial) * self.slots.devices_of_a_trial

    def _say(self, trial: RunningTrial, text: str, *, bad: bool = False, minor: bool = False) -> None:
        self._changed = True
        self.note(Note(text, trial.record.number, bad, minor))

    # ------------------------------------------------------------------------
    # Budgets and stops

    def tick(self) -> None:
        """Check time limits and budgets; called several times a second."""
        if self.clock() - self._written > _PROGRESS_EVERY:
            self.write_progress()
        for trial in self.running.values():
            limit = self.budget.trial_minutes
            if limit is not None and self._wall(trial) > limit * 60.0:
                self._request_stop(trial, StopReason.TRIAL_TIME)
        used_up = self._used_up()
        if used_up and not self._stopping:
            self.stop_all(StopReason.BUDGET, used_up)

    def _used_up(self) -> str:
        """Describe the budget that is used up, or return an empty string."""
        budget, failed = self.budget, sum(state.is_failure for state in self.states)
        device_hours = self.device_seconds / 3600.0
        if budget.wall_minutes is not None and self.wall_seconds > budget.wall_minutes * 60.0:
            return f"the budget of {budget.wall_minutes:g} minutes is used up"
        if budget.device_hours is not None and device_hours > budget.device_hours:
            return f"the budget of {budget.device_hours:g} device hours is used up"
        if self._bytes > budget.disk_gb * 1e9:
            return f"the study uses {self._bytes / 1e9:.1f} GB, more than its budget of {budget.disk_gb:g} GB"
        if budget.failed_trials is not None and failed >= budget.failed_trials:
            return f"{failed} trials have failed, as many as the budget allows"
        return ""

    @property
    def wall_seconds(self) -> float:
        """Wall time of the study over all its sessions."""
        return self._earlier + self.clock() - self._began

    @property
    def device_seconds(self) -> float:
        """Device time of all trials (seconds times devices held) over all sessions."""
        running = sum(self._seconds(trial) for trial in self.running.values())
        return self._device_seconds + running * self.slots.devices_of_a_trial

    @property
    def session_seconds(self) -> float:
        """Wall time of this session."""
        return self.clock() - self._began

    def stop_all(self, reason: StopReason, why: str) -> None:
        """Start no more trials, and ask every running trial to save and return."""
        self._stopping = True
        self.ending = why
        self.interrupted = self.interrupted or reason is StopReason.INTERRUPT
        saving = "; running trials save and stop" if self.running else ""
        self.note(Note(f"{why}: no more trials are started{saving}"))
        for trial in self.running.values():
            self._request_stop(trial, reason)

    def _request_stop(self, trial: RunningTrial, reason: StopReason) -> None:
        if trial.stop_reason is None:
            trial.stop_reason = self._stop_requests[trial.record.number] = reason

    def take_stop_requests(self) -> dict[int, StopReason]:
        """Return the stop requests since the last call, as reasons by trial number, for the backend to deliver."""
        requests, self._stop_requests = self._stop_requests, {}
        return requests

    def write_progress(self) -> None:
        """Record the study's wall time and, if the session has ended, the reason."""
        self._written = self.clock()
        was_over = _ALL_ENDED if self.has_nothing_to_do and not self.running else ""
        ended = self.ending if self.is_over else was_over
        self.study.folder.write_progress(self.wall_seconds, ended, self.device_seconds)
