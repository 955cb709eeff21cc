"""A sweep from its overrides to its report; what the command line does, for a notebook too.

from tune import Sweep
sweep = Sweep("experiment=digits", "sweep=learning_rates", name="lr-1")
sweep.run()
sweep.results()    # a pandas DataFrame
sweep.figures()    # matplotlib figures by name
"""

import json
import os
import shutil
from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Self

import pandas as pd
from matplotlib.figure import Figure
from rich.console import Console

from dxmi.config import to_tree
from dxmi.errors import UserError
from dxmi.persistence.files import require_target
from dxmi.training.build import Experiment
from dxmi.training.config import ResourcesConfig
from dxmi.training.run import changed_inputs, train
from tune.config.compose import ComposedSweep, compose_sweep, overridden, require_no_stack
from tune.execution.controller import Controller
from tune.execution.estimate import Estimate, estimate
from tune.execution.preflight import require_fit
from tune.execution.ray_tune import StoppedAtOnceError, drive
from tune.execution.resources import find_slots
from tune.execution.slots import Slots
from tune.execution.trial import Trainer
from tune.integrations.mlflow_tracker import Tracker
from tune.integrations.study_sync import StudySync
from tune.messages import complain
from tune.plans.ablation import AblationPlan, any_plan_from
from tune.plans.sweep import Plan, plan_from, require_name
from tune.reporting.figures import study_figures
from tune.reporting.html import write_report
from tune.reporting.live import SweepView
from tune.reporting.terminal import Terminal
from tune.studies.arm_results import results_of, write_tables
from tune.studies.confirmation import unconfirmed
from tune.studies.folder import StudyFolder
from tune.studies.leaderboard import leaderboard, summary_of, write_best, write_leaderboard
from tune.studies.records import TrialRecord, TrialState
from tune.studies.study import Study

STUDIES = Path("studies")


@dataclass(frozen=True)
class SweepResult:
    """How a session of a sweep ended.

    Attributes:
        folder: of the study.
        records: its trials.
        ended: why the session ended.
        interrupted: whether the study is to be resumed.
        undelivered: records that the tracking server has not got yet.
        outdated: sentences about data or weights that changed since the trials ended, where none was left to run.
    """

    folder: StudyFolder
    records: list[TrialRecord]
    ended: str
    interrupted: bool
    undelivered: int
    outdated: Sequence[str] = ()

    @property
    def all_failed(self) -> bool:
        """Whether there are trials, and every one failed or diverged."""
        return bool(self.records) and all(record.state.is_failure for record in self.records)


class Sweep:
    """A study of many trials.

    Args:
        overrides: as on the command line: experiment=..., sweep=..., any setting, sweep.KEY=..., tracking.KEY=...
        name: of the study; by default those of the experiment and the sweep.
        studies: the folder that holds studies.

    Raises:
        UserError: something is wrong with them; nothing has been written.
    """

    def __init__(self, *overrides: str, name: str | None = None, studies: str | Path = STUDIES) -> None:
        named = [*overrides, *([f"name={name}"] if name is not None else [])]
        self.plan = _plan(compose_sweep(named))
        require_no_stack(self.plan.experiment, "a sweep")
        self.folder = StudyFolder(Path(studies) / self.plan.name)

    @classmethod
    def of(cls, plan: Plan, studies: str | Path = STUDIES) -> Self:
        """The study of a plan."""
        sweep = cls.__new__(cls)
        sweep.plan, sweep.folder = plan, StudyFolder(Path(studies) / plan.name)
        return sweep

    @classmethod
    def resume(cls, name: str, *overrides: str, studies: str | Path = STUDIES) -> Self:
        """The study of that name, to go on with; resources.*, sweep.budget.* and tracking.* may be changed.

        Raises:
            UserError: there is no such study, or something else is to be changed.
        """
        require_name(name)
        plan = _overridden(StudyFolder(Path(studies) / name).read_plan(), overrides)
        if not isinstance(plan, AblationPlan):
            require_no_stack(plan.experiment, "a sweep")
        return cls.of(plan, studies)

    # ------------------------------------------------------------------------
    # Before

    @cached_property
    def slots(self) -> Slots:
        """How this machine, or the cluster as it is when first asked, is shared.

        Raises:
            UserError: it has not what the trials need.
        """
        return find_slots(self.plan.experiment.resources, self.plan.sweep.max_concurrent)

    def estimate(self) -> Estimate:
        """Time and disk of the whole sweep."""
        return estimate(self.plan.experiment, self.slots, self.plan.num_trials)

    def check(self) -> None:
        """Refuse now what would fail later. Writes nothing.

        Raises:
            UserError: the folder cannot hold the study, or holds another one.
        """
        storage_path = self.plan.experiment.resources.storage_path
        require_fit(self.folder.path, self.plan.tracking, storage_path)
        _ = self.slots
        self.folder.require_own()
        if self.folder.exists:
            self.folder.require_same(self.plan)
        _require_room(self.folder.path, 0)

    def check_room(self, cost: Estimate) -> None:
        """Refuse a sweep that would fill the disk, or its own budget of it.

        Raises:
            UserError: it would.
        """
        limit = self.plan.sweep.budget.disk_gb
        if cost.bytes > limit * 1e9:
            raise UserError(
                f"{cost.trials} trials need about {cost.bytes / 1e9:.1f} GB, and sweep.budget.disk_gb is {limit:g}: "
                "raise it, or run fewer trials."
            )
        _require_room(self.folder.path, cost.bytes)

    # ------------------------------------------------------------------------
    # The sweep

    def run(self, *, console: Console | None = None, trainer: Trainer = train) -> SweepResult:
        """Run what is left of the study, then write its report.

        Args:
            console: where progress is shown; standard output by default.
            trainer: trains a trial.

        Raises:
            UserError: as `check`, or another process drives the study.
        """
        self.check()
        console = console or Terminal()
        with self.folder.lock():
            sync = self._sync()
            sync.begin()
            study = Study.drive(self.folder, self.plan)
            view = SweepView(console)
            controller = Controller(study, self.slots, note=view.note)
            tracker = Tracker(self.folder, self.plan, complain)
            tracker.start()
            outdated = self._outdated(study) if controller.has_nothing_to_do else ()
            at_once = self._drive(controller, sync, view, tracker, trainer)
            result = self._close(controller, tracker, at_once)
            sync.finish()
            return replace(result, outdated=outdated)

    def _outdated(self, study: Study) -> list[str]:
        """Sentences about data and public weights that are no longer those that complete trials read, each once."""
        found: dict[str, list[str]] = {}
        for record in study.records():
            summary = summary_of(record)
            if record.state is TrialState.COMPLETE and summary:
                tree = self.plan.tree_of(record.values)
                read = json.dumps([tree["data"], tree["pretrain"]["weights"]], sort_keys=True)
                if read not in found:
                    config = replace(study.config(record), resources=ResourcesConfig(device="cpu"))
                    found[read] = changed_inputs(record.run, summary, Experiment(config))
        return [f"{text} Choose another name to train on the present ones." for each in found.values() for text in each]

    def _sync(self) -> StudySync:
        return StudySync(self.folder, self.plan.experiment.resources.storage_path, complain)

    def _drive(
        self, controller: Controller, sync: StudySync, view: SweepView, tracker: Tracker, trainer: Trainer
    ) -> bool:
        """Returns whether the session was cut off instead of ending."""

        def look(controller: Controller) -> None:
            view(controller)
            if controller.changed():
                tracker.update(controller.study.records(), running=set(controller.running))
            sync.send_study()

        study = controller.study
        waits = trainer is train and unconfirmed(study, study.records())  # a best trial, to be scored on fresh noise
        if controller.has_nothing_to_do and not waits:
            return False
        try:
            with view:
                drive(controller, sync=sync, look=look, trainer=trainer)
        except StoppedAtOnceError:
            controller.interrupted = True
            return True
        return False

    def _close(self, controller: Controller, tracker: Tracker, at_once: bool) -> SweepResult:
        study = controller.study
        records = study.records()
        controller.running.clear()
        controller.write_progress()
        write_results(study, records)
        tracker.update(records, running=())
        interrupted = controller.ending or "interrupted"
        undelivered = tracker.finish(interrupted if controller.interrupted else "", patient=not at_once)
        return SweepResult(self.folder, records, controller.ending, controller.interrupted, undelivered)

    # ------------------------------------------------------------------------
    # After

    def study(self) -> Study:
        """The study as it is now.

        Raises:
            UserError: it has not begun.
        """
        return Study.read(self.folder)

    def results(self) -> pd.DataFrame:
        """One row a trial, best first."""
        study = self.study()
        return leaderboard(study.plan, study.records())

    def figures(self) -> dict[str, Figure]:
        """The report's figures by name."""
        study = self.study()
        return study_figures(study, study.records())

    def report(self) -> Path:
        """Write report.html anew."""
        study = self.study()
        return write_report(study, study.records())


def write_results(study: Study, records: Sequence[TrialRecord]) -> None:
    """The study's tables and its report: leaderboard.csv, best.yaml or ablation.csv and ablation.tex, report.html."""
    write_leaderboard(study, records)
    if isinstance(study.plan, AblationPlan):
        write_tables(results_of(study.plan, study.folder, records))
    else:
        write_best(study, records)
    write_report(study, records)


def _plan(composed: ComposedSweep) -> Plan:
    name = composed.name if composed.name is not None else f"{composed.experiment.name}-{composed.source}"
    return plan_from(
        {
            "name": name,
            "experiment": to_tree(composed.experiment),
            "sweep": composed.sweep,
            "tracking": composed.tracking,
        }
    )


_FREE = ("budget.", "max_failures=", "max_concurrent=")


def _overridden(plan: Plan, overrides: Sequence[str]) -> Plan:
    """The plan with other resources, budget or tracking."""
    tree = plan.tree()
    kind = "ablation" if "ablation" in tree else "sweep"
    free = ("resources.", "tracking.", *(f"{kind}.{end}" for end in _FREE))
    other = [override for override in overrides if not override.startswith(free)]
    if other:
        raise UserError(
            f"--resume goes on with the study's own settings: leave out {' '.join(other)}. Only resources.*, "
            f"{kind}.budget.*, {kind}.max_failures, {kind}.max_concurrent and tracking.* may change."
        )
    groups = {kind: tree[kind], "tracking": tree["tracking"], "resources": tree["experiment"]["resources"]}
    changed = overridden(groups, overrides)
    experiment = {**tree["experiment"], "resources": changed.pop("resources")}
    return any_plan_from({**tree, **changed, "experiment": experiment})


_MIN_FREE_BYTES = 50_000_000


def _require_room(folder: Path, bytes_needed: int) -> None:
    """Check that the study's folder can be made and filled.

    Raises:
        UserError: it cannot.
    """
    parent = require_target(folder, "The study folder").resolve()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"The study folder {folder} cannot be written: {parent} is not a folder that you may write to.")
    free, needed = shutil.disk_usage(parent).free, max(bytes_needed, _MIN_FREE_BYTES)
    if free < needed:
        raise UserError(
            f"The disk of {parent} has {free / 1e9:.1f} GB free, and the study needs about {needed / 1e9:.1f} GB: "
            "free some space, or choose another folder by --studies."
        )
