"""The decisions of a sweep, with a made-up clock and made-up trials: no Ray, no training, no waiting."""

import math
from dataclasses import asdict
from pathlib import Path

import numpy as np
import optuna
import pytest
import torch
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from dxmi.config import build
from dxmi.persistence import checkpoint
from dxmi.training.config import ExperimentConfig
from dxmi.training.summary import Summary
from support import missing, stating
from tune.config.sweep import BudgetConfig, SamplerConfig, StoppingConfig, SweepConfig
from tune.execution.controller import Controller, Note, StopReason
from tune.execution.ray_tune import trial_tree
from tune.execution.slots import Slots
from tune.execution.trial import REPORT, TASKS, BadReportError, checked, run_trials
from tune.execution.trial_messages import (
    Diverged,
    Finished,
    OutOfDisk,
    Refused,
    Scored,
    Stopped,
    TrialTask,
    from_json,
    tasks_from_json,
    tasks_to_json,
    to_json,
)
from tune.messages import last_line
from tune.plans.sweep import Plan
from tune.studies.folder import StudyFolder
from tune.studies.records import Outcome, TrialRecord, TrialState
from tune.studies.study import Study

METRIC = "eval/fid_digits"
SPACE = {"algorithm.policy.lr": {"log_uniform": [1e-6, 1e-4]}}
ASHA = StoppingConfig(rule="asha", first_step=100, factor=3)
MINUTE, HOUR = 60.0, 3600.0


class Clock:
    """Seconds that pass when a test says so."""

    def __init__(self) -> None:
        self.now = 1000.0

    def __call__(self) -> float:
        return self.now

    def wait(self, seconds: float) -> None:
        self.now += seconds


class Session(Controller):
    """A controller that keeps its notes."""

    def __init__(self, root: Path, clock: Clock, *, concurrent: int = 2, threads: int = 1, **sweep) -> None:
        sweep.setdefault("sampler", SamplerConfig(kind="random"))
        experiment = build(ExperimentConfig, {"train": {"iterations": 300}, "evaluate": {"every": 100}})
        plan = Plan("study", experiment, SweepConfig(**sweep), SPACE)
        folder = StudyFolder(root / "study")
        with folder.lock():
            study = Study.drive(folder, plan)
        self.notes: list[Note] = []
        slots = Slots(cpus=8, gpus=0, threads=threads, gpu_share=0.0, concurrent=concurrent)
        super().__init__(study, slots, clock, self.notes.append)

    def begin(self, number_of_trials: int = 1) -> list[TrialRecord]:
        """Start trials as a driver does."""
        records = [self.next() for _ in range(number_of_trials)]
        for record in records:
            self.started(record.number)
        return records

    def score(self, number: int, step: int, score: float) -> None:
        self.receive(Scored(number, step, {METRIC: score, "eval/num_samples": 64.0}))

    def complete(self, number: int, score: float = 5.0) -> None:
        self.receive(Finished(number, summary(score)))

    def stopped(self, number: int) -> None:
        """It did as it was told: saved and returned."""
        self.receive(Stopped(number))

    def state(self, number: int) -> TrialState:
        """As the journal has it."""
        return Study.read(self.study.folder).record(number).state

    def outcome(self, number: int) -> Outcome:
        return Study.read(self.study.folder).record(number).outcome

    def texts(self, number: int) -> list[str]:
        return [note.text for note in self.notes if note.number == number]


def summary(score: float) -> dict:
    """What a finished run leaves."""
    best = {"value": score, "step": 300, "checkpoint": "checkpoints/step_00000300", "selection_value": score}
    return asdict(
        Summary(
            name="digits", signature="0" * 12, seed=0, metric=METRIC, num_samples=64, reference={}, best=best,
            last=best, scores={"best": {METRIC: score}}, seconds_per_1000_images={}, iterations=300, num_steps=5,
            seconds={"finetune": 30.0}, device="cpu", threads=1, git_revision=None, versions={},
        )
    )  # fmt: skip


@pytest.fixture
def clock():
    return Clock()


# ----------------------------------------------------------------------------
# Launching


@pytest.mark.parametrize("concurrent", [1, 2, 3])
def test_no_more_trials_run_at_once_than_there_is_room_for(tmp_path, clock, concurrent):
    session = Session(tmp_path, clock, concurrent=concurrent, budget=BudgetConfig(trials=5))
    assert [record.number for record in session.begin(concurrent)] == [*range(concurrent)]
    assert session.next() is None
    assert not session.ending
    session.complete(0)
    assert session.next().number == concurrent
    assert session.next() is None
    assert len(session.running) == concurrent


def test_a_study_is_over_when_every_planned_trial_has_ended(tmp_path, clock):
    session = Session(tmp_path, clock, budget=BudgetConfig(trials=3))
    session.begin(2)
    session.complete(0)
    session.begin(1)
    session.complete(1)
    assert session.next() is None
    assert not session.is_over  # the last still runs
    session.complete(2)
    assert session.is_over
    assert not session.interrupted
    assert session.states == [TrialState.COMPLETE] * 3
    assert Session(tmp_path, clock, budget=BudgetConfig(trials=3)).has_nothing_to_do
    assert not Session(tmp_path, clock, budget=BudgetConfig(trials=4)).has_nothing_to_do


def test_unfinished_trials_come_first_and_the_oldest_of_them_before_the_others(tmp_path, clock):
    first = Session(tmp_path, clock, concurrent=4, budget=BudgetConfig(trials=6))
    begun = first.begin(4)
    first.complete(1)
    first.stop_all(StopReason.INTERRUPT, "stopped by SIGINT")
    second = Session(tmp_path, clock, concurrent=6, budget=BudgetConfig(trials=6))
    again = second.begin(5)
    assert [record.number for record in again] == [0, 2, 3, 4, 5]
    assert [record.values for record in again[:3]] == [begun[n].values for n in (0, 2, 3)]
    assert second.next() is None


def test_a_trial_with_a_config_that_is_refused_is_begun_all_the_same_and_says_so_itself(tmp_path, clock):
    experiment = build(ExperimentConfig, {"train": {"iterations": 300}})
    space = {"schedule.num_steps": {"choice": [3, 5]}, "algorithm.policy_mask": {"choice": [[1, 1, 1, 0, 0], [1]]}}
    folder = StudyFolder(tmp_path / "study")
    with folder.lock():
        study = Study.drive(folder, Plan("study", experiment, SweepConfig(sampler=SamplerConfig(kind="grid")), space))
    controller = Controller(study, Slots(cpus=2, gpus=0, threads=1, gpu_share=0.0, concurrent=2), clock)
    assert controller.next().number == 0
    controller.receive(Refused(0, "algorithm.policy_mask has 5 entries."))
    assert study.record(0).outcome == Outcome(TrialState.FAILED, "algorithm.policy_mask has 5 entries.")


# ----------------------------------------------------------------------------
# Scores and early stopping


def test_a_trial_that_falls_behind_is_told_so_once_and_before_it_goes_on(tmp_path, clock):
    session = Session(tmp_path, clock, stopping=ASHA)
    session.begin(2)
    for number, score in ((0, 5.0), (1, 8.0)):
        session.score(number, 0, 9.0)
        assert session.take_stop_requests() == {}
        session.score(number, 100, score)
    assert session.running[1].stop_reason is StopReason.PRUNE
    assert session.take_stop_requests() == {1: StopReason.PRUNE}
    assert session.take_stop_requests() == {}
    session.score(1, 200, 9.0)  # it had not heard yet
    session.tick()
    assert session.take_stop_requests() == {}
    session.stopped(1)
    assert session.outcome(1) == Outcome(TrialState.PRUNED, session.outcome(1).reason, 8.0, 100)
    assert missing("behind … 200", session.outcome(1).reason) == []
    assert session.state(0) is TrialState.RUNNING


def test_scores_are_in_the_journal_before_the_trial_goes_on(tmp_path, clock):
    session = Session(tmp_path, clock)
    session.begin(2)
    for step, score in ((0, 9.0), (100, 4.0), (200, 6.0)):
        session.score(1, step, score)
        assert Study.read(session.study.folder).curves()[1][step] == score
    assert (session.running[1].score, session.running[1].best) == (6.0, 4.0)
    assert session.texts(1)[-1] == "iteration 200/300, fid_digits 6.00"


@pytest.mark.parametrize("reason", list(StopReason))
def test_a_trial_that_finished_is_complete_whatever_it_was_told(tmp_path, clock, reason):
    session = Session(tmp_path, clock)
    session.begin()
    session.score(0, 0, 9.0)
    session.stop_all(reason, "why")
    clock.wait(7.0)
    session.complete(0, 4.5)
    assert session.outcome(0) == Outcome(TrialState.COMPLETE, "", 4.5, 300, (4.5,), 7.0)


def test_an_end_is_said_with_state_reason_score_and_seconds(tmp_path, clock):
    session = Session(tmp_path, clock)
    session.begin(2)
    clock.wait(12.0)
    session.complete(0, 4.5)
    session.receive(Diverged(1, "value is nan"))
    started, complete = session.texts(0)
    assert missing("started", started) == []
    assert missing("complete … fid_digits … 4.50 … 300 … 12 s", complete) == []
    assert missing("diverged … value is nan … 12 s", session.texts(1)[-1]) == []
    assert [note.bad for note in session.notes if note.number == 1] == [False, True]


def test_each_thing_that_happens_is_to_be_recorded_once(tmp_path, clock):
    session = Session(tmp_path, clock)
    assert session.changed()
    assert not session.changed()
    session.begin()
    assert session.changed()
    session.score(0, 0, 9.0)
    assert session.changed()
    session.heartbeat(0, "fine-tune", 3, 300)
    session.tick()
    assert not session.changed()
    session.complete(0)
    assert session.changed()


def test_a_heartbeat_says_how_far_a_trial_is_and_one_of_an_ended_trial_nothing(tmp_path, clock):
    session = Session(tmp_path, clock)
    session.begin()
    session.heartbeat(0, "pretrain", 10, 60)
    clock.wait(5.0)
    session.heartbeat(0, "fine-tune", 20, 300)
    clock.wait(5.0)
    session.heartbeat(0, "fine-tune", 40, 300)
    live = session.running[0]
    assert (live.phase, live.step, live.phase_total) == ("fine-tune", 40, 300)
    assert (live.phase_since, live.phase_start) == (clock() - 5.0, 20)
    session.complete(0)
    session.heartbeat(0, "fine-tune", 50, 300)
    session.heartbeat(99, "fine-tune", 50, 300)
    assert session.running == {}


# ----------------------------------------------------------------------------
# Budgets


def test_a_trials_time_stops_that_trial_alone(tmp_path, clock):
    session = Session(tmp_path, clock, concurrent=2, budget=BudgetConfig(trials=5, trial_minutes=10.0))
    session.begin(1)
    clock.wait(6 * MINUTE)
    session.begin(1)
    clock.wait(4 * MINUTE)
    session.tick()
    assert session.take_stop_requests() == {}  # ten minutes are allowed
    clock.wait(1.0)
    session.tick()
    assert session.take_stop_requests() == {0: StopReason.TRIAL_TIME}
    assert not session.ending
    session.score(0, 100, 7.0)
    session.stopped(0)
    reason = session.outcome(0).reason
    assert missing("trial time", reason) == []
    assert session.outcome(0) == Outcome(TrialState.STOPPED, reason, 7.0, 100, (), 10 * MINUTE + 1.0)
    assert session.begin()[0].number == 2
    session.tick()
    assert session.take_stop_requests() == {}


def test_a_trials_time_begins_anew_in_each_session(tmp_path, clock):
    budget = BudgetConfig(trial_minutes=10.0)
    first = Session(tmp_path, clock, budget=budget)
    first.begin()
    clock.wait(9 * MINUTE)
    second = Session(tmp_path, clock, budget=budget)
    second.begin()
    clock.wait(9 * MINUTE)
    second.tick()
    assert second.take_stop_requests() == {}


def stopped_by_budget(session: Session, words: str) -> None:
    """Assert that a budget ends the session: the running trials save and are STOPPED, no others are begun."""
    running = sorted(session.running)
    session.tick()
    assert missing(words, session.ending) == []
    assert session.next() is None
    assert session.take_stop_requests() == dict.fromkeys(running, StopReason.BUDGET)
    assert session.is_over is not bool(running)
    for number in running:
        session.stopped(number)
        assert session.outcome(number).state is TrialState.STOPPED
        assert missing("budget", session.outcome(number).reason) == []
    assert session.is_over
    assert not session.interrupted
    assert session.next() is None
    said = [note.text for note in session.notes if note.number is None]
    assert len(said) == 1
    assert missing(f"{words} … no more trials", said[0]) == []


def test_wall_time_is_counted_over_all_sessions(tmp_path, clock):
    budget = BudgetConfig(wall_minutes=10.0)
    first = Session(tmp_path, clock, budget=budget)
    first.begin(2)
    clock.wait(6 * MINUTE)
    first.tick()  # writes progress.json, since the last time was long ago
    clock.wait(HOUR)  # killed, and resumed after lunch
    second = Session(tmp_path, clock, budget=budget)
    assert second.wall_seconds == 6 * MINUTE
    second.begin(2)
    clock.wait(4 * MINUTE)
    second.tick()
    assert not second.ending
    clock.wait(1.0)
    stopped_by_budget(second, "budget … 10 minutes")
    assert second.session_seconds == 4 * MINUTE + 1.0


def test_a_session_that_begins_with_its_wall_time_used_up_begins_no_trial(tmp_path, clock):
    first = Session(tmp_path, clock)
    first.begin()
    clock.wait(HOUR)
    first.write_progress()
    second = Session(tmp_path, clock, budget=BudgetConfig(wall_minutes=30.0))
    second.tick()
    assert second.next() is None
    assert second.is_over
    assert second.state(0) is TrialState.RUNNING  # with a larger budget it goes on


@pytest.mark.parametrize("name", ["wall_minutes", "device_hours"])
def test_a_budget_of_time_also_stops_the_last_trials(tmp_path, clock, name):
    """When the last planned trials run, none is left to begin, and the budget still counts."""
    session = Session(tmp_path, clock, concurrent=3, budget=BudgetConfig(trials=3, **{name: 1.0}))
    session.begin(3)
    session.complete(0)
    assert session.next() is None
    clock.wait(2 * HOUR)
    session.tick()
    assert session.take_stop_requests() == {1: StopReason.BUDGET, 2: StopReason.BUDGET}


@pytest.mark.parametrize(("threads", "minutes"), [(1, 60), (3, 20)])
def test_device_hours_are_those_of_ended_and_of_running_trials_times_what_each_holds(tmp_path, clock, threads, minutes):
    session = Session(tmp_path, clock, threads=threads, budget=BudgetConfig(device_hours=2.0))
    session.begin(1)
    clock.wait(minutes * MINUTE)  # an hour
    session.complete(0)
    session.begin(2)
    clock.wait(minutes * MINUTE / 2)  # and two halves
    session.tick()
    assert not session.ending
    clock.wait(1.0)
    stopped_by_budget(session, "budget … 2 device hours")


@pytest.mark.parametrize(("share", "hours"), [(1.0, 1.0), (0.25, 4.0), (2.0, 0.5)])
def test_beside_a_gpu_its_share_is_what_counts(tmp_path, clock, share, hours):
    session = Session(tmp_path, clock, budget=BudgetConfig(device_hours=1.0))
    session.slots = Slots(cpus=8, gpus=2, threads=4, gpu_share=share, concurrent=1)
    session.begin(1)
    clock.wait(hours * HOUR)
    session.tick()
    assert not session.ending
    clock.wait(1.0)
    session.tick()
    assert "device hours" in session.ending


def test_device_hours_of_ended_trials_are_remembered_by_the_next_session(tmp_path, clock):
    first = Session(tmp_path, clock)
    first.begin()
    clock.wait(HOUR)
    first.complete(0)
    second = Session(tmp_path, clock, budget=BudgetConfig(device_hours=0.9))
    stopped_by_budget(second, "device hours")


def test_device_hours_of_a_trial_that_was_interrupted_are_remembered_by_the_next_session(tmp_path, clock):
    first = Session(tmp_path, clock)
    first.begin(1)
    clock.wait(HOUR)
    first.stop_all(StopReason.INTERRUPT, "stopped by SIGINT")
    first.stopped(0)
    first.write_progress()
    second = Session(tmp_path, clock, budget=BudgetConfig(device_hours=0.9))
    second.begin(1)
    stopped_by_budget(second, "device hours")


@pytest.mark.parametrize("report", [Refused, Diverged])
def test_failed_and_diverged_trials_use_up_their_budget(tmp_path, clock, report):
    budget = BudgetConfig(failed_trials=2)
    first = Session(tmp_path, clock, concurrent=3, budget=budget)
    first.begin(3)
    first.receive(report(0, "x"))
    first.complete(1)
    first.tick()
    assert not first.ending
    second = Session(tmp_path, clock, concurrent=3, budget=budget)
    second.begin(2)
    second.receive(report(3, "x"))
    stopped_by_budget(second, "budget … 2 trials … failed")


def fill(record: TrialRecord, size: int) -> None:
    """A run folder of that size; the file is sparse."""
    record.run.create()
    with (record.run.path / "large").open("wb") as file:
        file.truncate(size)


def test_what_ended_trials_leave_on_the_disk_uses_up_its_budget(tmp_path, clock):
    budget = BudgetConfig(disk_gb=1.0)
    first = Session(tmp_path, clock, budget=budget)
    records = first.begin(2)
    fill(records[0], 600_000_000)
    first.complete(0)
    first.tick()
    assert not first.ending
    second = Session(tmp_path, clock, budget=budget)
    assert [record.number for record in second.begin(2)] == [1, 2]
    fill(records[1], 500_000_000)
    second.complete(1)
    stopped_by_budget(second, "budget … 1.1 GB … 1")


def test_an_ended_trial_keeps_its_best_and_its_last_checkpoint(tmp_path, clock):
    session = Session(tmp_path, clock)
    (record,) = session.begin()
    record.run.create()
    for step in (0, 100, 200, 300):
        meta = {"best": {"step": min(step, 100), "value": 1.0}, "score": 1.0}
        checkpoint.save(record.run.checkpoints, step, {"algorithm": {"w": torch.zeros(1)}}, meta)
    session.complete(0)
    assert checkpoint.steps_in(record.run.checkpoints) == [100, 300]


def test_a_budget_is_said_to_be_used_up_once(tmp_path, clock):
    session = Session(tmp_path, clock, budget=BudgetConfig(wall_minutes=1.0))
    session.begin(2)
    clock.wait(HOUR)
    for _ in range(3):
        session.tick()
    assert len([note for note in session.notes if note.number is None]) == 1
    assert set(session.take_stop_requests()) == {0, 1}
    assert session.take_stop_requests() == {}


def test_progress_is_written_now_and_then_and_at_the_end_with_its_reason(tmp_path, clock):
    session = Session(tmp_path, clock, budget=BudgetConfig(trials=1))
    session.begin()
    clock.wait(10.0)
    session.tick()
    assert not session.study.folder.progress.exists()
    clock.wait(10.0)
    session.tick()
    assert session.study.folder.read_progress() == {"seconds": 20.0, "device_seconds": 20.0, "ended": ""}
    session.complete(0)
    assert session.next() is None
    session.write_progress()
    progress = session.study.folder.read_progress()
    assert progress == {"seconds": 20.0, "device_seconds": 20.0, "ended": progress["ended"]}
    assert missing("every planned trial", progress["ended"]) == []


# ----------------------------------------------------------------------------
# Interruptions


def test_an_interrupt_leaves_its_trials_running_in_the_journal_for_the_next_session(tmp_path, clock):
    session = Session(tmp_path, clock, concurrent=3, budget=BudgetConfig(trials=4))
    session.begin(3)
    session.complete(0)
    session.score(1, 0, 9.0)
    session.stop_all(StopReason.INTERRUPT, "stopped by SIGINT")
    assert session.take_stop_requests() == {1: StopReason.INTERRUPT, 2: StopReason.INTERRUPT}
    assert session.next() is None
    assert not session.is_over
    for number in (1, 2):
        session.stopped(number)
    assert session.is_over
    assert session.interrupted
    assert missing("interrupted … resumed", session.texts(1)[-1]) == []
    assert [session.state(number) for number in range(3)] == [TrialState.COMPLETE, *[TrialState.RUNNING] * 2]
    path = str(session.study.folder.journal)
    seen = optuna.load_study(study_name="study", storage=JournalStorage(JournalFileBackend(path)))
    assert [trial.state.name for trial in seen.trials] == ["COMPLETE", "RUNNING", "RUNNING"]
    again = Session(tmp_path, clock, concurrent=4, budget=BudgetConfig(trials=4))
    assert [record.number for record in again.begin(3)] == [1, 2, 3]


def test_the_first_order_counts(tmp_path, clock):
    """A trial that fell behind is pruned even if the session is interrupted before it has saved."""
    session = Session(tmp_path, clock, stopping=ASHA)
    session.begin(2)
    session.score(0, 100, 5.0)
    session.score(1, 100, 8.0)
    session.stop_all(StopReason.INTERRUPT, "stopped by SIGTERM")
    assert session.take_stop_requests() == {0: StopReason.INTERRUPT, 1: StopReason.PRUNE}
    session.stopped(0)
    session.stopped(1)
    assert (session.state(0), session.state(1)) == (TrialState.RUNNING, TrialState.PRUNED)


def test_an_interrupt_of_an_idle_session_ends_it(tmp_path, clock):
    session = Session(tmp_path, clock)
    session.stop_all(StopReason.INTERRUPT, "stopped by SIGINT")
    assert session.is_over
    assert session.take_stop_requests() == {}
    (note,) = session.notes
    assert missing("stopped by SIGINT … no more trials", note.text) == []
    assert note == Note(note.text)


def test_a_full_disk_interrupts_the_sweep_and_the_trial_goes_on_another_day(tmp_path, clock):
    session = Session(tmp_path, clock, concurrent=2)
    session.begin(2)
    session.score(0, 0, 9.0)
    session.receive(OutOfDisk(0, "No space left on device: /x"))
    assert session.interrupted
    assert missing("disk is full … No space left on device: /x … free", session.ending) == []
    assert session.state(0) is TrialState.RUNNING
    assert session.take_stop_requests()[1] is StopReason.INTERRUPT
    session.stopped(1)
    assert session.is_over
    assert [record.number for record in Session(tmp_path, clock).begin(2)] == [0, 1]


# ----------------------------------------------------------------------------
# Trials that go wrong

TRACEBACK = "Traceback (most recent call last):\n  File x, line 1, in f\n    g()\nKeyError: 'lr'\n\n"


def test_a_crashed_trial_that_is_started_again_goes_on(tmp_path, clock):
    session = Session(tmp_path, clock)
    session.begin()
    session.score(0, 0, 9.0)
    session.crashed(0, TRACEBACK, again=True)
    assert session.state(0) is TrialState.RUNNING
    assert list(session.running) == [0]
    assert missing("KeyError: 'lr' … again", session.texts(0)[-1]) == []
    assert session.notes[-1].bad
    session.started(0)
    assert session.running[0].attempts == 2
    assert session.texts(0).count(session.texts(0)[0]) == 1
    session.complete(0)
    assert session.state(0) is TrialState.COMPLETE


def test_a_trial_that_crashed_for_the_last_time_has_failed_with_the_last_line(tmp_path, clock):
    session = Session(tmp_path, clock)
    session.begin(2)
    session.score(0, 100, 9.0)
    clock.wait(3.0)
    session.crashed(0, TRACEBACK, again=False)
    assert session.outcome(0) == Outcome(TrialState.FAILED, "KeyError: 'lr'", 9.0, 100, (), 3.0)
    assert list(session.running) == [1]
    assert not session.ending
    assert session.begin()[0].number == 2


@pytest.mark.parametrize("again", [True, False])
@pytest.mark.parametrize(
    ("reason", "state"),
    [
        (StopReason.PRUNE, TrialState.PRUNED),
        (StopReason.TRIAL_TIME, TrialState.STOPPED),
        (StopReason.BUDGET, TrialState.STOPPED),
        (StopReason.INTERRUPT, TrialState.RUNNING),
    ],
)
def test_a_crash_of_a_trial_that_was_told_to_stop_counts_as_a_stop(tmp_path, clock, reason, state, again):
    session = Session(tmp_path, clock)
    session.begin(1)
    session.score(0, 100, 9.0)
    session.stop_all(reason, "why")
    session.crashed(0, TRACEBACK, again=again)
    assert session.state(0) is state
    assert session.running == {}
    assert session.is_over


@pytest.mark.parametrize("error", ["", "\n \n"])
def test_a_death_without_a_word_has_a_reason_too(tmp_path, clock, error):
    session = Session(tmp_path, clock)
    session.begin()
    session.crashed(0, error, again=False)
    assert missing("exited", session.outcome(0).reason) == []


def test_the_reason_of_a_crash_is_no_longer_than_a_line_or_two():
    assert last_line("ValueError: " + 10_000 * "x").startswith("ValueError: xxx")
    assert len(last_line("ValueError: " + 10_000 * "x")) < 400
    assert "\n" not in last_line("a\nb\n\n")


def test_a_trial_that_diverged_has_diverged_with_its_best_score(tmp_path, clock):
    session = Session(tmp_path, clock)
    session.begin(2)
    session.score(0, 0, 9.0)
    session.score(0, 100, 7.0)
    session.score(0, 200, 8.0)
    clock.wait(5.0)
    session.receive(Diverged(0, "value is nan at iteration 250"))
    assert session.outcome(0) == Outcome(TrialState.DIVERGED, "value is nan at iteration 250", 7.0, 100, (), 5.0)
    assert list(session.running) == [1]
    assert not session.ending


def test_what_a_trial_has_to_say_is_passed_on(tmp_path, clock):
    session = Session(tmp_path, clock)
    session.begin()
    session.noted(0, "a checkpoint is damaged")
    assert session.notes[-1] == Note("a checkpoint is damaged", 0, bad=True)


# ----------------------------------------------------------------------------
# Reports


@pytest.mark.parametrize(
    ("value", "words"),
    [
        (math.nan, "nan"),
        (math.inf, "inf"),
        (-math.inf, "-inf"),
        (np.float64("nan"), "nan"),
        (None, "NoneType"),
        ("5.0", "str"),
        (True, "bool"),
        ([5.0], "list"),
        (torch.tensor(5.0), "Tensor"),
        (torch.tensor(5), "Tensor"),
        (5j, "complex"),
    ],
)
@pytest.mark.parametrize("key", [METRIC, "eval/other"])
def test_a_report_that_is_no_finite_number_is_refused_with_its_step_and_metric(key, value, words):
    with pytest.raises(BadReportError) as refused:
        checked({METRIC: 5.0, key: value}, 150, METRIC)
    assert missing(f"{key} … {words} … 150", str(refused.value)) == []
    assert (refused.value.step, refused.value.metric) == (150, key)


def test_a_report_without_the_score_is_refused():
    with pytest.raises(BadReportError, match=stating("eval/fid_digits … missing … 7")):
        checked({"eval/other": 1.0}, 7, METRIC)


def test_a_report_with_a_number_too_large_for_a_float_is_refused():
    with pytest.raises(BadReportError):
        checked({METRIC: 10**400}, 7, METRIC)


@pytest.mark.parametrize("value", [5, 5.0, np.float64(5.0), np.float32(5.0), np.int64(5)])
def test_python_and_numpy_numbers_become_plain_floats(value):
    (number,) = checked({METRIC: value}, 0, METRIC).values()
    assert type(number) is float
    assert number == 5.0


@pytest.mark.parametrize(
    "report",
    [
        Scored(3, 150, {METRIC: 5.25, "eval/num_samples": 64.0}),
        Finished(0, {"best": {"value": 1.5, "step": 300}, "git_revision": None}),
        Stopped(7),
        Diverged(1, "value is nan"),
        Refused(2, "data.root is ü: there is no such folder."),
        OutOfDisk(4, "No space left on device: /x"),
    ],
)
def test_a_report_crosses_to_the_other_process_as_it_is(report):
    assert from_json(to_json(report)) == report


def test_tasks_cross_to_the_other_process_as_they_are():
    tasks = [
        TrialTask(0, {"seed": 0}, "/out", None, METRIC),
        TrialTask(1, {"seed": 1}, "/o", "s3://b/o", METRIC, "/out"),
    ]
    assert tasks_from_json(tasks_to_json(tasks)) == tasks


# ----------------------------------------------------------------------------
# Configs


@pytest.fixture
def built(monkeypatch):
    """Every config of a run that has been built, in order."""
    found, check = [], ExperimentConfig.__post_init__

    def counted(config):
        found.append(config)
        check(config)

    monkeypatch.setattr(ExperimentConfig, "__post_init__", counted)
    return found


def test_the_config_of_a_trial_is_built_once_by_the_process_that_decides(tmp_path, clock, built):
    session = Session(tmp_path, clock, stopping=ASHA, budget=BudgetConfig(trials=4))
    plan = len(built)
    session.begin(2)
    for step in range(0, 300, 20):
        session.score(0, step, 5.0)
        session.score(1, step, 4.0)
    session.complete(0)
    session.complete(1)
    for number in (2, 3):
        session.begin()
        trial_tree(session.study, session.study.record(number), session.slots)
        session.score(number, 100, 3.0)
    assert len(built) - plan == 4
    again = Session(tmp_path, clock, stopping=ASHA, budget=BudgetConfig(trials=4))
    plan = len(built)
    for record in again.begin(2):
        again.score(record.number, 200, 3.0)
        trial_tree(again.study, record, again.slots)
    assert len(built) - plan == 2


def test_the_config_of_a_trial_is_built_once_by_the_process_that_trains(tmp_path, clock, built, monkeypatch):
    session = Session(tmp_path, clock)
    (record,) = session.begin()
    tree = trial_tree(session.study, record, session.slots)
    task = TrialTask(0, tree, str(tmp_path / "run"), None, METRIC)
    sent, before = [], len(built)
    monkeypatch.setattr("ray.tune.report", lambda metrics: sent.append(from_json(metrics[REPORT])))
    run_trials({TASKS: tasks_to_json([task])}, channel=None, trainer=lambda experiment, **_: None)
    assert sent == [Stopped(0)]
    assert len(built) - before == 1
