"""The decisions of a sweep: which trial is next, which one stops, when all is over. Nothing here knows Ray.

The Ray backend reports what happens; the controller records it in the study and decides what is done next. It can be
tested with a made-up clock and made-up trials.
"""

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from enum import StrEnum

from dxmi.formatting import score_text
from dxmi.metrics.keys import best_of
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
    """A trial that runs now.

    Attributes:
        record: what is known of it.
        spec: what it runs.
        since: when this session began with it, on the controller's clock.
        phase: what it does.
        step: how far in that phase.
        phase_total: steps of that phase.
        score: the newest.
        best: the best so far.
        stop_reason: why it was asked to stop, if it was.
        attempts: times it was started in this session.
        together: trials that were begun in the same program, this one included.
        program: the number of the first of them.
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
    """Something that happened, for people.

    Attributes:
        text: one line.
        number: of the trial, if it is about one.
        bad: whether it belongs on the error stream.
        minor: whether a live table shows it anyway.
    """

    text: str
    number: int | None = None
    bad: bool = False
    minor: bool = False


@dataclass
class Controller:
    """One session of a study.

    Args:
        study: driven by this process.
        slots: of the machine.
        clock: seconds that only grow.
        note: called with each event.

    Attributes:
        running: the trials that run now.
        ending: why no more trials are begun, if so.
        interrupted: whether the session ends before the study does.
        stack: how many seeds are trained in one program.
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
        # The journal knows of ended trials only, and progress.json may be older than a kill.
        seconds_ended = sum(r.outcome.seconds for r in ended) * self.slots.devices_of_a_trial
        self._device_seconds = max(float(progress["device_seconds"]), seconds_ended)
        self._bytes = sum(self.study.tidy(r.number) for r in ended)
        self._changed = True
        self._stopping = False

    # ------------------------------------------------------------------------
    # Launching

    def next(self) -> TrialRecord | None:
        """The trial to start now, or None if there is none or no room."""
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
        """Train that many seeds of an arm in one program from here on, and keep that in the study's plan."""
        self.stack = number
        self.study.record_stack(number)
        if number > 1:
            self.note(Note(f"{number} seeds of an arm are trained together, as one program"))

    def next_program(self) -> list[TrialRecord]:
        """The trials to start now in one program: one, and others that differ from it in their seeds alone."""
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
        """A trial that waits or is new, and belongs into the program of `first`."""
        for record in self._waiting:
            if self.plan.share_program(record.values, first.values, self.stack):
                self._waiting.remove(record)
                return record
        return self.study.add_to_program(first, self.stack)

    def _begin(self, record: TrialRecord, program: int) -> None:
        self.running[record.number] = RunningTrial(record, self.study.spec(record), self.clock(), program=program)

    @property
    def has_nothing_to_do(self) -> bool:
        """Whether the study had ended before."""
        return not self._waiting and self.study.is_done

    def changed(self) -> bool:
        """Whether there is something new to record since the last call."""
        changed, self._changed = self._changed, False
        return changed

    @property
    def is_over(self) -> bool:
        """Whether nothing runs and nothing more will be begun."""
        return bool(self.ending) and not self.running

    # ------------------------------------------------------------------------
    # What trials tell

    def started(self, number: int) -> None:
        """A trial's process took it up, perhaps again."""
        trial = self.running[number]
        trial.attempts += 1
        if trial.attempts == 1:
            self._say(trial, "started", minor=True)

    def receive(self, report: TrialReport) -> None:
        """A trial reported a score, or how it ended."""
        if isinstance(report, Scored):
            self._scored(report.number, report.step, report.metrics[self.plan.metric])
        else:
            self._ended(report)

    def _scored(self, number: int, step: int, score: float) -> None:
        trial = self.running[number]
        self.study.score(number, step, score)
        trial.score = score
        trial.best = score if trial.best is None else best_of((trial.best, score), self.plan.direction)
        self._say(trial, f"iteration {step}/{trial.spec.iterations}, {self._label} {score_text(score)}", minor=True)
        if self.study.should_prune(number, step):
            self._request_stop(trial, StopReason.PRUNE)

    @property
    def _label(self) -> str:
        return self.plan.metric.removeprefix("eval/")

    def heartbeat(self, number: int, phase: str, step: int, total: int) -> None:
        """A trial says how far it is; only the display needs it."""
        trial = self.running.get(number)
        if trial is None:
            return
        if trial.phase != phase:
            trial.phase, trial.phase_since, trial.phase_start = phase, self.clock(), step
        trial.step, trial.phase_total = step, total

    def noted(self, number: int, text: str) -> None:
        """A trial has something to say to a person."""
        self.note(Note(text, number, bad=True))

    def _ended(self, report: LastReport) -> None:
        """A trial returned: with its summary, or because it was told to, or with what was wrong."""
        trial = self.running[report.number]
        if isinstance(report, OutOfDisk):
            self.stop_all(StopReason.INTERRUPT, f"the disk is full ({report.reason}); free some space")
        outcome = self._outcome(trial, report)
        if outcome is not None:
            self._finish(trial, outcome)
        else:
            self._say(trial, "interrupted; the next resume goes on with it")
            self._leave(trial)

    def _outcome(self, trial: RunningTrial, report: LastReport) -> Outcome | None:
        """How it ended; None if it has not, and a resume is to go on with it."""
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
        """A trial's process raised or died; `again` if it is started once more."""
        trial, reason = self.running[number], last_line(error)
        if again and trial.stop_reason is None:
            self._say(trial, f"crashed ({reason}) and is started again", bad=True)
            return
        if trial.stop_reason is not None or self.interrupted:  # it was to stop anyway, and its checkpoints are whole
            self._ended(Stopped(number))
            return
        curve = self.study.curves().get(number, {})
        self._finish(trial, unfinished(self.plan, curve, TrialState.FAILED, reason, self._seconds(trial)))

    def _wall(self, trial: RunningTrial) -> float:
        return self.clock() - trial.since

    def _seconds(self, trial: RunningTrial) -> float:
        """What a trial has cost in this session: of a program, its part."""
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
        """A trial holds its devices no longer."""
        del self.running[trial.record.number]
        self._device_seconds += self._seconds(trial) * self.slots.devices_of_a_trial

    def _say(self, trial: RunningTrial, text: str, *, bad: bool = False, minor: bool = False) -> None:
        self._changed = True
        self.note(Note(text, trial.record.number, bad, minor))

    # ------------------------------------------------------------------------
    # Budgets and stops

    def tick(self) -> None:
        """Look at the clock and at the budgets."""
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
        """Which budget is used up, in words; empty if none is."""
        budget, failed = self.budget, sum(state.is_failure for state in self.states)
        device_hours = self.device_seconds / 3600.0
        if budget.wall_minutes is not None and self.wall_seconds > budget.wall_minutes * 60.0:
            return f"the budget of {budget.wall_minutes:g} minutes is used up"
        if budget.device_hours is not None and device_hours > budget.device_hours:
            return f"the budget of {budget.device_hours:g} device hours is used up"
        if self._bytes > budget.disk_gb * 1e9:
            return f"the study fills {self._bytes / 1e9:.1f} GB of a budget of {budget.disk_gb:g}"
        if budget.failed_trials is not None and failed >= budget.failed_trials:
            return f"{failed} trials have failed, which is the budget"
        return ""

    @property
    def wall_seconds(self) -> float:
        """Of the study, over all its sessions."""
        return self._earlier + self.clock() - self._began

    @property
    def device_seconds(self) -> float:
        """Seconds of trials times the devices that they hold, over all sessions."""
        running = sum(self._seconds(trial) for trial in self.running.values())
        return self._device_seconds + running * self.slots.devices_of_a_trial

    @property
    def session_seconds(self) -> float:
        """Of this session."""
        return self.clock() - self._began

    def stop_all(self, reason: StopReason, why: str) -> None:
        """Begin nothing more, and tell every trial to save and return."""
        self._stopping = True
        self.ending = why
        self.interrupted = self.interrupted or reason is StopReason.INTERRUPT
        self.note(Note(f"{why}: no more trials are begun" + (", those that run save and stop" if self.running else "")))
        for trial in self.running.values():
            self._request_stop(trial, reason)

    def _request_stop(self, trial: RunningTrial, reason: StopReason) -> None:
        if trial.stop_reason is None:
            trial.stop_reason = self._stop_requests[trial.record.number] = reason

    def take_stop_requests(self) -> dict[int, StopReason]:
        """What trials are to be asked to stop, and why, since the last call; the Ray backend passes it on."""
        requests, self._stop_requests = self._stop_requests, {}
        return requests

    def write_progress(self) -> None:
        """Record the study's wall time, and why the session ended if it has."""
        self._written = self.clock()
        was_over = _ALL_ENDED if self.has_nothing_to_do and not self.running else ""
        ended = self.ending if self.is_over else was_over
        self.study.folder.write_progress(self.wall_seconds, ended, self.device_seconds)
