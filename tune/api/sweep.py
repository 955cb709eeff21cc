"""Python API of sweeps, which `dxmi sweep` also uses.

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
from dxmi.training.config import SCHEMA, ResourcesConfig
from dxmi.training.run import changed_inputs, train
from dxmi.training.schema import KEY
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
    """Result of a session of a sweep.

    Attributes:
        folder: folder of the study.
        records: its trials.
        ended: why the session ended.
        interrupted: whether the study can be resumed.
        undelivered: number of records that have not reached the tracking server.
        outdated: warnings about data or weights that changed after the trials ended, if no trial was left to run.
    """

    folder: StudyFolder
    records: list[TrialRecord]
    ended: str
    interrupted: bool
    undelivered: int
    outdated: Sequence[str] = ()

    @property
    def all_failed(self) -> bool:
        """Whether there are trials and all of them failed or diverged."""
        return bool(self.records) and all(record.state.is_failure for record in self.records)


class Sweep:
    """A study of many trials.

    Args:
        overrides: as on the command line: experiment=..., sweep=..., any setting, sweep.KEY=..., tracking.KEY=...
        name: name of the study; by default the names of the experiment and the sweep.
        studies: folder that holds the studies.

    Raises:
        UserError: an argument is invalid; nothing is written.
    """

    def __init__(self, *overrides: str, name: str | None = None, studies: str | Path = STUDIES) -> None:
        named = [*overrides, *([f"name={name}"] if name is not None else [])]
        self.plan = _plan(compose_sweep(named))
        require_no_stack(self.plan.experiment, "a sweep")
        self.folder = StudyFolder(Path(studies) / self.plan.name)

    @classmethod
    def of(cls, plan: Plan, studies: str | Path = STUDIES) -> Self:
        """Create the study of a plan."""
        sweep = cls.__new__(cls)
        sweep.plan, sweep.folder = plan, StudyFolder(Path(studies) / plan.name)
        return sweep

    @classmethod
    def resume(cls, name: str, *overrides: str, studies: str | Path = STUDIES) -> Self:
        """Open an existing study to resume it; `overrides` may change resources.*, sweep.budget.* and tracking.*.

        Raises:
            UserError: the study does not exist, or an override changes another setting.
        """
        require_name(name)
        begun = StudyFolder(Path(studies) / name).read_plan()
        begun.require_present()
        plan = _overridden(begun, overrides)
        if not isinstance(plan, AblationPlan):
            require_no_stack(plan.experiment, "a sweep")
        return cls.of(plan, studies)

    # ------------------------------------------------------------------------
    # Checks and estimates

    @cached_property
    def slots(self) -> Slots:
        """How trials share this machine, or the cluster in its state at first access.

        Raises:
            UserError: there are not enough devices for the trials.
        """
        return find_slots(self.plan.experiment.resources, self.plan.sweep.max_concurrent)

    def estimate(self) -> Estimate:
        """Estimate the time and disk usage of the whole sweep."""
        return estimate(self.plan, self.slots)

    def check(self) -> None:
        """Check in advance that the study can run. Writes nothing.

        Raises:
            UserError: the study's folder is not usable or holds another study, or the devices do not suffice.
        """
        storage_path = self.plan.experiment.resources.storage_path
        require_fit(self.folder.path, self.plan.tracking, storage_path)
        _ = self.slots
        self.folder.require_own()
        if self.folder.exists:
            self.folder.require_same(self.plan)
        _require_room(self.folder.path, 0)

    def check_room(self, cost: Estimate) -> None:
        """Check that the sweep fits on the disk and in its disk budget.

        Raises:
            UserError: it does not fit.
        """
        limit = self.plan.sweep.budget.disk_gb
        if cost.bytes > limit * 1e9:
            raise UserError(
                f"{cost.trials} trials need about {cost.bytes / 1e9:.1f} GB, but sweep.budget.disk_gb is {limit:g}: "
                "raise it, or run fewer trials."
            )
        _require_room(self.folder.path, cost.bytes)

    # ------------------------------------------------------------------------
    # Running

    def run(self, *, console: Console | None = None, trainer: Trainer = train) -> SweepResult:
        """Run the remaining trials of the study, then write its report.

        Args:
            console: where to show progress; standard output by default.
            trainer: trains one trial.

        Raises:
            UserError: as `check`, or another process runs the study.
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
        """Return warnings about data and public weights that changed after complete trials read them, each once."""
        found: dict[str, list[str]] = {}
        for record in study.records():
            summary = summary_of(record)
            if record.state is TrialState.COMPLETE and summary:
                tree = self.plan.tree_of(record.values)
                read = json.dumps([tree["data"], tree["pretrain"]["weights"]], sort_keys=True)
                if read not in found:
                    config = replace(study.config(record), resources=ResourcesConfig(device="cpu"))
                    found[read] = changed_inputs(record.run, summary, Experiment(config))
        return [
            f"{text} To train on the current ones, choose another name for the study."
            for each in found.values()
            for text in each
        ]

    def _sync(self) -> StudySync:
        return StudySync(self.folder, self.plan.experiment.resources.storage_path, complain)

    def _drive(
        self, controller: Controller, sync: StudySync, view: SweepView, tracker: Tracker, trainer: Trainer
    ) -> bool:
        """Run the session; returns whether it was cut off by a second signal or the grace period."""

        def look(controller: Controller) -> None:
            view(controller)
            if controller.changed():
                tracker.update(controller.study.records(), running=set(controller.running))
            sync.send_study()

        study = controller.study
        waits = trainer is train and unconfirmed(study, study.records())  # the best trials, to be scored on fresh noise
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
    # Results

    def study(self) -> Study:
        """Read the study in its current state.

        Raises:
            UserError: the study has not started.
        """
        return Study.read(self.folder)

    def results(self) -> pd.DataFrame:
        """Return one row per trial, best first."""
        study = self.study()
        return leaderboard(study.plan, study.records())

    def figures(self) -> dict[str, Figure]:
        """Return the figures of the report by name."""
        study = self.study()
        return study_figures(study, study.records())

    def report(self) -> Path:
        """Rewrite report.html and return its path."""
        study = self.study()
        return write_report(study, study.records())


def write_results(study: Study, records: Sequence[TrialRecord]) -> None:
    """Write leaderboard.csv, best.yaml (or ablation.csv and ablation.tex) and report.html of a study."""
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
            KEY: SCHEMA,
            "experiment": to_tree(composed.experiment),
            "sweep": composed.sweep,
            "tracking": composed.tracking,
        }
    )


_FREE = ("budget.", "max_failures=", "max_concurrent=")


def _overridden(plan: Plan, overrides: Sequence[str]) -> Plan:
    """Return the plan with other resources, budgets or tracking."""
    tree = plan.tree()
    kind = "ablation" if "ablation" in tree else "sweep"
    free = ("resources.", "tracking.", *(f"{kind}.{end}" for end in _FREE))
    other = [override for override in overrides if not override.startswith(free)]
    if other:
        raise UserError(
            f"--resume uses the study's own settings: leave out {' '.join(other)}. Only resources.*, "
            f"{kind}.budget.*, {kind}.max_failures, {kind}.max_concurrent and tracking.* may change."
        )
    groups = {kind: tree[kind], "tracking": tree["tracking"], "resources": tree["experiment"]["resources"]}
    changed = overridden(groups, overrides)
    experiment = {**tree["experiment"], "resources": changed.pop("resources")}
    return any_plan_from({**tree, **changed, "experiment": experiment})


_MIN_FREE_BYTES = 50_000_000


def _require_room(folder: Path, bytes_needed: int) -> None:
    """Check that the study's folder can be created and that its disk has enough free space.

    Raises:
        UserError: the folder cannot be created, or there is too little space.
    """
    parent = require_target(folder, "The study folder").resolve()
    while not parent.exists():
        parent = parent.parent
    if not parent.is_dir() or not os.access(parent, os.W_OK | os.X_OK):
        raise UserError(f"The study folder {folder} cannot be written: {parent} is not a writable folder.")
    free, needed = shutil.disk_usage(parent).free, max(bytes_needed, _MIN_FREE_BYTES)
    if free < needed:
        raise UserError(
            f"The disk of {parent} has {free / 1e9:.1f} GB free, but the study needs about {needed / 1e9:.1f} GB: "
            "free some space, or choose another folder with --studies."
        )
