"""An ablation from its overrides to its report; what `dxmi ablate` does, for a notebook too.

from tune import Ablation
ablation = Ablation("experiment=digits", "ablation=dxmi_terms", name="terms-1")
ablation.run()
ablation.comparisons()    # a pandas DataFrame, one row an arm
"""

from dataclasses import replace
from pathlib import Path
from typing import Any, Self

import pandas as pd
from rich.console import Console

from dxmi.config import build, to_tree
from dxmi.errors import UserError
from dxmi.training.run import train
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
    """The session was ended before the comparison began; the same command goes on."""


class Ablation(Sweep):
    """A study that compares arms with a baseline, seed by seed.

    Args:
        overrides: as on the command line: experiment=..., ablation=..., any setting of the baseline, ablation.KEY=...
        name: of the study; by default those of the experiment and the ablation.
        studies: the folder that holds studies.

    Raises:
        UserError: something is wrong with them; nothing has been written.
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
        """The ablation of a plan.

        Raises:
            UserError: it is a sweep's.
        """
        if not isinstance(plan, AblationPlan):
            path = Path(studies) / plan.name
            raise UserError(f"{path} is a sweep. To go on with it: {plan.resume_line(path)}")
        return super().of(plan, studies)

    def run(self, *, console: Console | None = None, trainer: Trainer = train) -> SweepResult:
        """Tune each arm if the file says so, run what is left of the study, and write its report.

        Raises:
            UserError: as `check`, another process drives the study, or an arm cannot be tuned.
        """
        self.check()
        if self.plan.ablation.tuning is not None:
            self.plan = replace(self.plan, tuned=self._tuned(console, trainer))
        return super().run(console=console, trainer=trainer)

    def _tuned(self, console: Console | None, trainer: Trainer) -> dict[str, dict[str, Any]]:
        """Each arm's best values of the settings that are tuned."""
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
        return dict(best.values)

    def _tuning_plan(self, arm: Arm) -> Plan:
        """A sweep inside an arm, on a seed of its own."""
        tuning, experiment = self.plan.ablation.tuning, arm.config(self.plan.experiment)
        assert tuning is not None
        return plan_from(
            {
                "name": f"{self.plan.name}-{arm.name}",
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
        """What it came to so far.

        Raises:
            UserError: it has not begun.
        """
        study = self.study()
        return results_of(self.plan, self.folder, study.records())

    def comparisons(self) -> pd.DataFrame:
        """One row an arm, the baseline first."""
        return arms_frame(self.outcome())
