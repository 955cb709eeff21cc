"""Python API of ablations, which `dxmi ablate` also uses.

from tune import Ablation
ablation = Ablation("experiment=digits", "ablation=dxmi_terms", name="terms-1")
ablation.run()
ablation.comparisons()    # a pandas DataFrame, one row per arm
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pandas as pd
from rich.console import Console

from dxmi.config import build, to_tree
from dxmi.errors import UserError
from dxmi.training.config import SCHEMA
from dxmi.training.run import train
from dxmi.training.schema import KEY
from tune.api.sweep import STUDIES, Sweep, SweepResult
from tune.config.ablation import parse_ablation
from tune.config.compose import compose_ablation
from tune.config.sweep import TrackingConfig
from tune.execution.trial import Trainer
from tune.plans.ablation import AblationPlan, ablation_plan
from tune.plans.arms import Arm, arms
from tune.plans.sweep import Plan, plan_from
from tune.studies.arm_results import TUNING, Results, arms_frame, results_of
from tune.studies.folder import StudyFolder
from tune.studies.leaderboard import best_of


class TuningInterruptedError(Exception):
    """The session ended while arms were being tuned; running it again continues."""


class Ablation(Sweep):
    """A study that compares arms with a baseline over paired seeds.

    Args:
        overrides: as on the command line: experiment=..., ablation=..., any setting of the baseline, ablation.KEY=...
        name: name of the study; by default the names of the experiment and the ablation.
        studies: folder that holds the studies.

    Raises:
        UserError: an argument is invalid; nothing is written.
    """

    plan: AblationPlan

    def __init__(self, *overrides: str, name: str | None = None, studies: str | Path = STUDIES) -> None:
        composed = compose_ablation([*overrides, *([f"name={name}"] if name is not None else [])])
        ablation = parse_ablation(composed.ablation)
        found = arms(ablation, composed.experiment)
        chosen = composed.name if composed.name is not None else f"{composed.experiment.name}-{composed.source}"
        tracking = build(TrackingConfig, composed.tracking, "tracking")
        self.plan = ablation_plan(chosen, composed.experiment, ablation, found, tracking=tracking)
        self.folder = StudyFolder(Path(studies) / self.plan.name)

    @classmethod
    def of(cls, plan: Plan, studies: str | Path = STUDIES) -> Self:
        """Create the ablation of a plan.

        Raises:
            UserError: the plan is that of a sweep.
        """
        if not isinstance(plan, AblationPlan):
            path = Path(studies) / plan.name
            raise UserError(f"{path} is a sweep. To resume it: {plan.resume_line(path)}")
        return super().of(plan, studies)

    def run(self, *, console: Console | None = None, trainer: Trainer = train) -> SweepResult:
        """Tune each arm if `tuning` is set, run the remaining trials, and write the report.

        Raises:
            UserError: as `check`, or another process runs the study, or an arm cannot be tuned.
        """
        self.check()
        if self.plan.ablation.tuning is not None:
            self.plan = replace(self.plan, tuned=self._tuned(console, trainer))
        return super().run(console=console, trainer=trainer)

    def _tuned(self, console: Console | None, trainer: Trainer) -> dict[str, dict[str, Any]]:
        """Return the best values of the tuned settings by arm."""
        begun = self.folder.read_plan() if self.folder.exists else None
        if isinstance(begun, AblationPlan):
            return {name: dict(values) for name, values in begun.tuned.items()}
        return {arm.name: self._tuned_arm(arm, console, trainer) for arm in self.plan.arms}

    def _tuned_arm(self, arm: Arm, console: Console | None, trainer: Trainer) -> dict[str, Any]:
        sweep = Sweep.of(self._tuning_plan(arm), studies=self.folder.path / TUNING)
        result = sweep.run(console=console, trainer=trainer)
        best = best_of(sweep.plan, result.records)
        if result.interrupted:
            raise TuningInterruptedError(f"{result.ended or 'interrupted'} while the arm {arm.name} was being tuned")
        if best is None:
            raise UserError(f"The arm {arm.name} cannot be tuned: no trial of {sweep.folder.path} is complete.")
        return {axis.path: axis.settings(best.values[axis.path]) for axis in sweep.plan.axes}

    def _tuning_plan(self, arm: Arm) -> Plan:
        """Return the plan of a sweep within an arm, on the seed reserved for tuning."""
        tuning, experiment = self.plan.ablation.tuning, arm.config(self.plan.experiment)
        assert tuning is not None
        return plan_from(
            {
                "name": f"{self.plan.name}-{arm.name}",
                KEY: SCHEMA,
                "experiment": to_tree(replace(experiment, seed=tuning.seed)),
                "sweep": {
                    "space": tuning.space,
                    "objectives": [to_tree(self.plan.ablation.objective)],
                    "sampler": to_tree(tuning.sampler),
                    "stopping": to_tree(tuning.stopping),
                    "budget": {"trials": tuning.trials},
                    "max_concurrent": self.plan.sweep.max_concurrent,
                },
                "tracking": to_tree(self.plan.tracking),
            }
        )

    def outcome(self) -> Results:
        """Return the results so far.

        Raises:
            UserError: the study has not started.
        """
        study = self.study()
        return results_of(self.plan, self.folder, study.records())

    def comparisons(self) -> pd.DataFrame:
        """Return one row per arm, with the baseline first."""
        return arms_frame(self.outcome())
