"""A study: its folder, its plan, and what became of its trials.

    studies/NAME/
        study.yaml        the plan: experiment, sweep with its space, tracking; written once
        optuna.journal    every trial: values, state, scores by iteration; opens in optuna-dashboard
        trials/0007/      the run folder of trial 7, as `dxmi train` writes it; error.txt if it crashed
        progress.json     wall seconds so far, and why the last session ended
        confirmation.json the best trial's scores on fresh noise, see tune.studies.confirmation
        leaderboard.csv, best.yaml, report.html

The journal and the run folders are the truth: everything else is made from them. One driver writes at a time. Nothing
in here is pickled, so that opening a study runs no code.
"""

import difflib
import json
import os
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from enum import StrEnum
from pathlib import Path
from typing import Any, Self

import optuna
import yaml
from filelock import FileLock, Timeout
from optuna.samplers import RandomSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from optuna.trial import FrozenTrial
from optuna.trial import TrialState as OptunaState

from dxmi.config import differences, signature
from dxmi.errors import UserError
from dxmi.persistence.checkpoint import newest, prune
from dxmi.persistence.files import write_atomic, write_json
from dxmi.persistence.run_directory import RunDirectory, read_yaml
from dxmi.training.config import ExperimentConfig
from tune.compat import set_intermediate_value, set_user_attribute
from tune.plans.ablation import AblationPlan, any_plan_from
from tune.plans.sweep import FORMAT, Plan
from tune.search.pruners import falls_behind
from tune.search.samplers import Proposal, template
from tune.search.space import Value

optuna.logging.set_verbosity(optuna.logging.WARNING)  # it announces every trial; so do we

_NO_SAMPLER = RandomSampler(0)
"""Optuna's study is never asked: see `tune.search.samplers`."""
_RECORDED = "dxmi"
"""The user attribute of an Optuna trial that holds what Optuna has no place for."""


class TrialState(StrEnum):
    """What became of a trial."""

    RUNNING = "running"
    """Begun, and not ended: it runs, or the next resume goes on with it."""
    COMPLETE = "complete"
    PRUNED = "pruned"
    """Stopped early because it fell behind."""
    STOPPED = "stopped"
    """Stopped because a budget was used up."""
    DIVERGED = "diverged"
    """A reported number was not one."""
    FAILED = "failed"
    """It crashed, or its config was refused."""

    @property
    def is_failure(self) -> bool:
        """Whether the trial has no result because something went wrong."""
        return self in (TrialState.DIVERGED, TrialState.FAILED)


_TO_OPTUNA = {
    TrialState.COMPLETE: OptunaState.COMPLETE,
    TrialState.PRUNED: OptunaState.PRUNED,
    TrialState.STOPPED: OptunaState.PRUNED,
    TrialState.DIVERGED: OptunaState.FAIL,
    TrialState.FAILED: OptunaState.FAIL,
}


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: any but RUNNING.
        reason: a sentence, where it is not complete.
        score: of the best checkpoint: on fresh noise if complete, else on the noise that chose it.
        step: iteration of that checkpoint.
        objectives: one value an objective, if complete.
        seconds: wall time of the trial in the session that ended it.
    """

    state: TrialState
    reason: str = ""
    score: float | None = None
    step: int | None = None
    objectives: tuple[float, ...] = ()
    seconds: float = 0.0


@dataclass(frozen=True)
class TrialRecord:
    """A trial as it is known now.

    Attributes:
        number: from 0, in the order of proposal.
        values: what varies, by path.
        signature: of its whole config.
        seed: of its run.
        run: its run folder.
        outcome: how it ended, or RUNNING.
        same_as: an earlier complete trial with the same config, whose result this one shares.
    """

    number: int
    values: Mapping[str, Value]
    signature: str
    seed: int
    run: RunDirectory
    outcome: Outcome
    same_as: int | None = None

    @property
    def state(self) -> TrialState:
        """What became of it."""
        return self.outcome.state

    def curve(self, metric: str) -> dict[int, float]:
        """Scores by iteration, on the noise that chooses the best checkpoint."""
        rows = self.run.rows()
        return {int(row["step"]): float(row[metric]) for row in rows if metric in row}


# ----------------------------------------------------------------------------
# The folder


class StudyFolder:
    """Where a study lives.

    Args:
        path: studies/NAME.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.plan = path / "study.yaml"
        self.journal = path / "optuna.journal"
        self.trials = path / "trials"
        self.progress = path / "progress.json"
        self.leaderboard = path / "leaderboard.csv"
        self.best = path / "best.yaml"
        self.report = path / "report.html"
        self.scratch = path / ".ray"

    @property
    def exists(self) -> bool:
        """Whether a study was begun here."""
        return self.plan.exists()

    @property
    def changed(self) -> float:
        """When a trial last began, scored or ended, in seconds since 1970."""
        path = self.journal if self.journal.exists() else self.plan
        return path.stat().st_mtime

    def run(self, number: int) -> RunDirectory:
        """The run folder of a trial."""
        return RunDirectory(self.trials / f"{number:04d}")

    def error(self, number: int) -> Path:
        """Where a crashed trial's traceback is."""
        return self.run(number).path / "error.txt"

    def write_error(self, number: int, error: str) -> None:
        """Keep a crashed trial's traceback."""
        path = self.error(number)
        path.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(path, error + "\n")

    def lock(self) -> FileLock:
        """The exclusive right to drive this study, held until it is released or the process ends.

        Raises:
            UserError: another process has it, or the folder cannot be written.
        """
        self.require_own()
        try:
            self.trials.mkdir(parents=True, exist_ok=True)
            lock = FileLock(self.path / ".lock")
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"Another process is driving the study {self.path.name}: wait for it, or choose another name."
            ) from error
        except OSError as error:
            raise UserError(f"The study folder {self.path} cannot be written: {error.strerror}.") from error
        return lock

    def require_own(self) -> None:
        """Refuse a folder that somebody else owns.

        Raises:
            UserError: it is somebody else's.
        """
        with suppress(FileNotFoundError, NotADirectoryError):
            if self.path.stat().st_uid != os.getuid():
                raise UserError(f"The study folder {self.path} belongs to another user: choose another name.")

    def read_plan(self) -> Plan:
        """The plan as it was written when the study began.

        Raises:
            UserError: there is none, it is damaged, or the folder has been renamed.
        """
        self.require_own()
        tree = read_yaml(self.plan, _no_study(self.path))
        if tree.get("format") != FORMAT:
            raise UserError(f"{self.plan} has format {tree.get('format')!r}: this version of dxmi reads {FORMAT}.")
        plan = any_plan_from(tree)
        if plan.name != self.path.resolve().name:
            raise UserError(f"The study in {self.path} is called {plan.name}: name its folder so.")
        if plan.signature != tree.get("signature"):
            raise UserError(f"{self.plan} has been edited, or was written by another version of dxmi: restore it.")
        return plan

    def read_progress(self) -> dict[str, Any]:
        """Seconds so far, and why the last session ended; nothing of a study that has not begun or a damaged file."""
        try:
            tree = json.loads(self.progress.read_text())
        except (FileNotFoundError, ValueError):
            tree = None
        nothing: dict[str, Any] = {"seconds": 0.0, "device_seconds": 0.0, "ended": ""}
        if not isinstance(tree, dict):
            return nothing
        return {
            key: tree[key] if isinstance(tree.get(key), type(default)) else default for key, default in nothing.items()
        }

    def write_progress(self, seconds: float, ended: str, device_seconds: float = 0.0) -> None:
        """Record wall seconds, why the session ended if it has, and seconds of trials times the devices they held."""
        tree = {"seconds": float(seconds), "device_seconds": float(device_seconds), "ended": ended}
        write_json(self.progress, tree)

    def begin(self, plan: Plan) -> Plan:
        """Write the plan; if there is one, check that it is the same but for its budget and resources.

        Returns:
            The plan, with what the study has recorded of its own choices.

        Raises:
            UserError: the folder holds another study.
        """
        if self.exists:
            self.require_same(plan)
            recorded = self.read_plan()
            if isinstance(plan, AblationPlan) and isinstance(recorded, AblationPlan):
                plan = replace(plan, stacked=recorded.stacked)
        self.write_plan(plan)
        return plan

    def write_plan(self, plan: Plan) -> None:
        """Write study.yaml."""
        write_atomic(self.plan, yaml.safe_dump(plan.tree(), sort_keys=False, allow_unicode=True))

    def require_same(self, plan: Plan) -> None:
        """Refuse a plan that is not the one that the study was begun with.

        Raises:
            UserError: it is another, and how it differs.
        """
        changed = differences(self.read_plan().identity, plan.identity)
        if changed:
            raise UserError(
                f"The study {plan.name} was begun with other settings ({'; '.join(changed[:5])}). "
                "Choose another name, or delete its folder."
            )


def _no_study(path: Path) -> str:
    """The sentence about a folder without a study, with the names beside it that are nearest."""
    near = difflib.get_close_matches(path.name, [folder.path.name for folder in studies_in(path.parent)])
    hint = f"Did you mean {' or '.join(near)}?" if near else "`dxmi studies` lists those there are."
    return f"There is no study in {path}. {hint}"


# ----------------------------------------------------------------------------
# The study


class Study:
    """The trials of a study, on disk whenever a method returns.

    Make it by `Study.drive` to change it, by `Study.read` to look at it.
    """

    def __init__(self, folder: StudyFolder, plan: Plan, optuna_study: optuna.Study) -> None:
        self.folder = folder
        self.plan = plan
        self._optuna = optuna_study
        self._curves: dict[int, dict[int, float]] = {}
        self._ended: dict[int, TrialRecord] = {}
        self._complete_by_signature: dict[str, int] = {}

    @classmethod
    def drive(cls, folder: StudyFolder, plan: Plan) -> Self:
        """The study for whoever holds the folder's lock: begun, or gone on with.

        Raises:
            UserError: the folder holds another study.
        """
        plan = folder.begin(plan)
        _mend(folder.journal)
        directions: list[Any] = [objective.direction for objective in plan.sweep.objectives]
        with _readable(folder.journal):
            study = optuna.create_study(
                study_name=plan.name,
                storage=_storage(folder.journal),
                directions=directions,
                sampler=_NO_SAMPLER,
                load_if_exists=True,
            )
            return cls(folder, plan, study)._with_whole_records()

    @classmethod
    def read(cls, folder: StudyFolder) -> Self:
        """The study as it is now, perhaps while another process drives it.

        Raises:
            UserError: there is none, or its driver was killed before the first trial.
        """
        plan = folder.read_plan()
        missing = UserError(f"The study {plan.name} has no trials yet. Go on with: {plan.resume_line(folder.path)}")
        if not folder.journal.exists():
            raise missing
        with _readable(folder.journal):
            storage = _storage(folder.journal)
            if plan.name not in optuna.get_all_study_names(storage):
                raise missing
            study = optuna.load_study(study_name=plan.name, storage=storage, sampler=_NO_SAMPLER)
            return cls(folder, plan, study)._with_whole_records()

    def _with_whole_records(self) -> Self:
        """This study, once every record of its journal has been read: a lost line shows only here."""
        self.records()
        return self

    # ------------------------------------------------------------------------
    # Reading

    def records(self) -> list[TrialRecord]:
        """Every trial, in the order of its number."""
        return [self._record(trial) for trial in self._trials()]

    def record(self, number: int) -> TrialRecord:
        """One trial."""
        return self._record(self._trials()[number])

    @property
    def optuna(self) -> optuna.Study:
        """Optuna's view, for its plots and importances."""
        return self._optuna

    def _trials(self) -> list[FrozenTrial]:
        return self._optuna.get_trials(deepcopy=False)

    def _record(self, trial: FrozenTrial) -> TrialRecord:
        """A trial's record; an ended trial's is made once, since it never changes again."""
        if trial.number in self._ended:
            return self._ended[trial.number]
        record = self._made_record(trial)
        if record.state is not TrialState.RUNNING:
            self._ended[trial.number] = record
        if record.state is TrialState.COMPLETE:
            self._complete_by_signature.setdefault(record.signature, record.number)
        return record

    def _made_record(self, trial: FrozenTrial) -> TrialRecord:
        about: dict[str, Any] = {**trial.user_attrs[_RECORDED]}
        return TrialRecord(
            number=trial.number,
            values={axis.path: axis.value(trial.params[axis.path]) for axis in self.plan.axes},
            signature=about["signature"],
            seed=about["seed"],
            run=self.folder.run(trial.number),
            outcome=_outcome(trial, about.get("outcome")),
            same_as=about["same_as"],
        )

    def config(self, record: TrialRecord) -> ExperimentConfig:
        """What a trial runs."""
        return self.plan.config_of(record.values)

    def curves(self) -> dict[int, dict[int, float]]:
        """Every trial's scores by iteration."""
        for trial in self._trials():
            if trial.number not in self._curves:
                self._curves[trial.number] = dict(trial.intermediate_values)
        return self._curves

    # ------------------------------------------------------------------------
    # Changing

    def add(self) -> TrialRecord | None:
        """Propose one more trial and record it as running; None if there is none, or none until another has ended."""
        history = self._trials()
        return self._add(history, self.plan.propose(history))

    def add_beside(self, record: TrialRecord, number: int) -> TrialRecord | None:
        """One more trial for this one's program of `number` seeds, recorded as running; None if there is none."""
        history = self._trials()
        return self._add(history, self.plan.propose_beside(history, record.values, number))

    def record_stack(self, number: int) -> None:
        """Keep in the plan how many seeds of an arm each program trains."""
        if isinstance(self.plan, AblationPlan) and self.plan.stacked != number:
            self.plan = replace(self.plan, stacked=number)
            self.folder.write_plan(self.plan)

    def _add(self, history: Sequence[FrozenTrial], proposal: Proposal | None) -> TrialRecord | None:
        if proposal is None:
            return None
        about = self._about(proposal.values)
        self._optuna.add_trial(template(self.plan.axes, proposal, {_RECORDED: about}))
        return self.record(len(history))

    @property
    def is_done(self) -> bool:
        """Whether no further trial will be begun."""
        return self.plan.is_done(self._trials())

    def _about(self, values: Mapping[str, Value]) -> dict[str, Any]:
        try:
            config = self.plan.config_of(values)
            about = {"signature": config.signature, "seed": config.seed}
        except UserError:  # the values are only refused together: the trial will say so
            about = {"signature": signature([self.plan.signature, dict(values)]), "seed": self.plan.experiment.seed}
        self.records()  # sees who has completed since
        return {**about, "same_as": self._complete_by_signature.get(str(about["signature"]))}

    def score(self, number: int, step: int, score: float) -> None:
        """Record a score on a trial's curve."""
        self.curves().setdefault(number, {})[step] = score
        set_intermediate_value(self._optuna, self._trials()[number], step, score)

    def falls_behind(self, number: int, step: int) -> bool:
        """Whether a trial that has just been scored should stop early; at its last iteration none does."""
        if step >= self.config(self.record(number)).train.iterations:
            return False
        finished = [record.number for record in self._complete()]
        return falls_behind(self.plan.sweep.stopping, self.curves(), finished, number, step)

    def _complete(self) -> list[FrozenTrial]:
        return self._optuna.get_trials(deepcopy=False, states=(OptunaState.COMPLETE,))

    def finish(self, number: int, outcome: Outcome) -> None:
        """Record how a trial ended, once and for all."""
        trial = self._trials()[number]
        if trial.state.is_finished():
            return
        about = {**trial.user_attrs[_RECORDED], "outcome": asdict(outcome)}
        set_user_attribute(self._optuna, trial, _RECORDED, about)
        values = list(outcome.objectives) if outcome.state is TrialState.COMPLETE else None
        self._optuna.tell(number, values, state=_TO_OPTUNA[outcome.state])

    def tidy(self, number: int) -> int:
        """Of an ended trial keep the best and the last checkpoint; returns the bytes of its run folder."""
        run = self.folder.run(number)
        saved, _ = newest(run.checkpoints)
        if saved is not None:
            best = saved.meta["best"]
            prune(run.checkpoints, {saved.step, *([best["step"]] if best else [])})
        return sum(file.stat().st_size for file in run.path.rglob("*") if file.is_file())

    # ------------------------------------------------------------------------
    # After a crash

    def reconcile(self) -> list[TrialRecord]:
        """Bring the journal up to date with the run folders; returns the trials that are to go on, oldest first.

        A trial may have ended, or may have been about to be pruned, when its driver was killed.
        """
        unfinished = []
        for record in self.records():
            if record.state is not TrialState.RUNNING:
                continue
            for step, score in record.curve(self.plan.metric).items():
                self.score(record.number, step, score)
            outcome = self._missed_outcome(record)
            if outcome is None:
                unfinished.append(record)
            else:
                self.finish(record.number, outcome)
        return unfinished

    def _missed_outcome(self, record: TrialRecord) -> Outcome | None:
        summary = record.run.read_summary()
        if summary is not None:
            return completed(self.plan, summary)
        saved, _ = newest(record.run.checkpoints)
        curve = self.curves()[record.number]
        if saved is not None and saved.step in curve and self.falls_behind(record.number, saved.step):
            return fallen_behind(curve, saved.step)
        return None


def completed(plan: Plan, summary: Mapping[str, Any], seconds: float | None = None) -> Outcome:
    """The outcome of a run that has a summary."""
    values = {
        **summary["scores"]["best"],
        "score": summary["best"]["value"],
        "num_steps": summary["num_steps"],
        "seconds": summary["seconds"]["finetune"],
    }
    return Outcome(
        TrialState.COMPLETE,
        score=float(summary["best"]["value"]),
        step=int(summary["best"]["step"]),
        objectives=tuple(float(values[objective.metric]) for objective in plan.sweep.objectives),
        seconds=sum(summary["seconds"].values()) if seconds is None else seconds,
    )


def fallen_behind(curve: Mapping[int, float], step: int, seconds: float = 0.0) -> Outcome:
    """The outcome of a trial that was stopped early at `step`."""
    best = min((s for s in curve if s <= step), key=lambda s: curve[s])
    return Outcome(TrialState.PRUNED, f"fell behind at iteration {step}", curve[best], best, seconds=seconds)


def unfinished(curve: Mapping[int, float], state: TrialState, reason: str, seconds: float) -> Outcome:
    """The outcome of a trial that ended with whatever scores it had."""
    best = min(curve, key=lambda s: curve[s], default=None)
    score = None if best is None else curve[best]
    return Outcome(state, reason, score, best, seconds=seconds)


def _outcome(trial: FrozenTrial, recorded: Mapping[str, Any] | None) -> Outcome:
    if recorded is None or not trial.state.is_finished():
        return Outcome(TrialState.RUNNING)
    outcome = Outcome(**recorded)
    return replace(outcome, state=TrialState(outcome.state), objectives=tuple(outcome.objectives))


def _storage(journal: Path) -> JournalStorage:
    return JournalStorage(JournalFileBackend(str(journal), lock_obj=JournalFileOpenLock(str(journal))))


@contextmanager
def _readable(journal: Path) -> Iterator[None]:
    """Say so if the journal is none; Optuna would raise whatever its content makes Python raise.

    Raises:
        UserError: it cannot be read.
    """
    try:
        yield
    except (ValueError, TypeError, LookupError, AttributeError, AssertionError) as error:
        raise UserError(
            f"{journal} is damaged ({type(error).__name__}): restore it from a copy, or move the study's folder away "
            "and run the sweep again; its pretraining is cached."
        ) from error


def _mend(journal: Path) -> None:
    """Drop what a killed writer left: its lock, for which Optuna would wait 30 s, and half a last line, after which it
    would refuse all that is written.
    """
    journal.with_name(journal.name + ".lock").unlink(missing_ok=True)
    with suppress(FileNotFoundError), journal.open("rb+") as file:
        content = file.read()
        whole = content.rfind(b"\n") + 1
        if whole < len(content):
            file.truncate(whole)


# ----------------------------------------------------------------------------
# Ranking


def ranked(plan: Plan, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The leaderboard: complete trials by the first objective, then the others by score, then those without one."""
    sign = plan.sweep.objectives[0].sign

    def key(record: TrialRecord) -> tuple[int, float, int]:
        outcome = record.outcome
        if outcome.state is TrialState.COMPLETE:
            return 0, sign * outcome.objectives[0], record.number
        return (1, outcome.score, record.number) if outcome.score is not None else (2, 0.0, record.number)

    return sorted(records, key=key)


def pareto_front(plan: Plan, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The complete trials that no other beats in one objective without losing in another, by the first objective."""
    signs = [objective.sign for objective in plan.sweep.objectives]
    points = {
        record.number: tuple(sign * value for sign, value in zip(signs, record.outcome.objectives, strict=True))
        for record in records
        if record.state is TrialState.COMPLETE
    }

    def is_beaten(point: tuple[float, ...]) -> bool:
        others = (other for other in points.values() if other != point)
        return any(all(o <= p for o, p in zip(other, point, strict=True)) for other in others)

    front = [record for record in records if record.number in points and not is_beaten(points[record.number])]
    return sorted(front, key=lambda record: points[record.number])


def studies_in(root: Path) -> list[StudyFolder]:
    """The studies in a folder, by name."""
    found = (StudyFolder(path) for path in sorted(root.iterdir())) if root.is_dir() else iter(())
    return [folder for folder in found if folder.exists]


def timestamp() -> str:
    """The present time for people, in UTC."""
    return time.strftime("%Y-%m-%d %H:%M:%S UTC", time.gmtime())
