"""Records of trials: specification, state and outcome."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from dxmi.errors import UserError
from dxmi.evaluation.scored_references import best_of_parent, scored_references
from dxmi.metrics.keys import MINIMIZE, sign_of
from dxmi.persistence.run_directory import Row, RunDirectory
from dxmi.training.config import ExperimentConfig
from tune.plans.sweep import Plan
from tune.search.space import Value
from tune.studies.seed_means import BY_SEED, mean_rows, mean_summary


class TrialState(StrEnum):
    """State of a trial."""

    RUNNING = "running"
    """Started and not ended: it runs now, or continues when the study is resumed."""
    COMPLETE = "complete"
    PRUNED = "pruned"
    """Stopped early by the pruner."""
    STOPPED = "stopped"
    """Stopped because a budget was exhausted."""
    DIVERGED = "diverged"
    """Stopped because a metric was NaN or infinite."""
    FAILED = "failed"
    """Crashed, or its config was rejected."""

    @property
    def is_failure(self) -> bool:
        """Whether the trial has no result because something went wrong."""
        return self in (TrialState.DIVERGED, TrialState.FAILED)


@dataclass(frozen=True)
class Outcome:
    """How a trial ended.

    Attributes:
        state: Any state except RUNNING.
        reason: Why the trial is not complete; empty if it is.
        score: Score of the best checkpoint: on fresh noise if complete, otherwise on the noise that selected it.
        step: Iteration of that checkpoint.
        objectives: One value per objective, if complete.
        seconds: Wall time of the trial in the session in which it ended.
        by_seed: First objective of each seed, if complete and with several seeds.
    """

    state: TrialState
    reason: str = ""
    score: float | None = None
    step: int | None = None
    objectives: tuple[float, ...] = ()
    seconds: float = 0.0
    by_seed: tuple[float, ...] = ()


@dataclass(frozen=True)
class TrialSpec:
    """A trial as it was proposed; built once per session, when it is proposed or when its study is resumed.

    Attributes:
        number: Index from 0, in the order of proposal.
        values: Values of the varying settings by path.
        config: Config of the run; None if the combination of values is invalid.
        refusal: Why the combination is invalid; empty if it is valid.
    """

    number: int
    values: Mapping[str, Value]
    config: ExperimentConfig | None
    refusal: str = ""

    @classmethod
    def of(cls, plan: Plan, number: int, values: Mapping[str, Value]) -> Self:
        """Build the trial of a plan with the given values."""
        try:
            return cls(number, values, plan.config_of(values))
        except UserError as error:  # the trial's own process reports it as well
            return cls(number, values, None, str(error))

    @property
    def iterations(self) -> int:
        """Number of fine-tuning iterations; 0 if the config is invalid."""
        return 0 if self.config is None else self.config.train.iterations


@dataclass(frozen=True)
class TrialRecord:
    """Current record of a trial.

    Attributes:
        number: Index from 0, in the order of proposal.
        values: Values of the varying settings by path.
        signature: Signature of the full config.
        seed: Seed of the run, the first one if there are several.
        run: Run folder.
        outcome: How the trial ended, or an outcome in the state RUNNING.
        same_as: Number of an earlier complete trial with the same config, whose result is reused; None if there is
            none.
        further_runs: Run folders of the further seeds.
    """

    number: int
    values: Mapping[str, Value]
    signature: str
    seed: int
    run: RunDirectory
    outcome: Outcome
    same_as: int | None = None
    further_runs: tuple[RunDirectory, ...] = ()

    @property
    def runs(self) -> tuple[RunDirectory, ...]:
        """Run folders of all seeds."""
        return (self.run, *self.further_runs)

    @property
    def state(self) -> TrialState:
        """State of the trial."""
        return self.outcome.state

    def curve(self, metric: str) -> dict[int, float]:
        """Scores by iteration, on the noise that selects the best checkpoint; means over the seeds."""
        return {int(row["step"]): float(row[metric]) for row in self.rows() if metric in row}

    def rows(self) -> list[Row]:
        """Logged metrics and scores, means over the seeds.

        Raises:
            UserError: a file is damaged.
        """
        return mean_rows([run.rows() for run in self.runs])

    def summary(self) -> Mapping[str, Any] | None:
        """The summary of the run, or the mean summary of its seeds; None before all of them have ended.

        Raises:
            UserError: a file is damaged.
        """
        found = [summary for run in self.runs if (summary := run.read_summary()) is not None]
        return mean_summary(found) if len(found) == len(self.runs) else None


def completed(plan: Plan, summary: Mapping[str, Any], seconds: float | None = None) -> Outcome:
    """The outcome of a trial that has a summary."""
    values, metric = _values(summary), plan.objectives[0].metric
    return Outcome(
        TrialState.COMPLETE,
        score=float(summary["best"]["value"]),
        step=int(summary["best"]["step"]),
        objectives=tuple(values[objective.metric] for objective in plan.objectives),
        seconds=sum(summary["seconds"].values()) if seconds is None else seconds,
        by_seed=tuple(_values(own)[metric] for own in summary.get(BY_SEED, ())),
    )


def _values(summary: Mapping[str, Any]) -> dict[str, float]:
    """The values by which trials can be compared, see `tune.config.sweep.ObjectiveConfig`."""
    values = {
        **summary["scores"]["best"],
        "score": summary["best"]["value"],
        "pretrained": _score_of_parent(summary),
        "num_steps": summary["num_steps"],
        "seconds": summary["seconds"]["finetune"],
    }
    last = {"last": summary["last"]["value"]} if "last" in summary else {}
    return {metric: float(value) for metric, value in (values | last).items()}


def _score_of_parent(summary: Mapping[str, Any]) -> float:
    """The score of the best training-free sampler; that of the shortened model if there is no other."""
    scored = scored_references(summary)
    best = best_of_parent(scored, str(summary.get("direction", MINIMIZE)))
    return float(summary["best"]["value"]) if best is None else best.score


def pruned(plan: Plan, curve: Mapping[int, float], step: int, seconds: float = 0.0) -> Outcome:
    """The outcome of a trial that was stopped early at `step`."""
    sign = sign_of(plan.direction)
    best = min((s for s in curve if s <= step), key=lambda s: sign * curve[s])
    return Outcome(TrialState.PRUNED, f"fell behind at iteration {step}", curve[best], best, seconds=seconds)


def unfinished(plan: Plan, curve: Mapping[int, float], state: TrialState, reason: str, seconds: float) -> Outcome:
    """The outcome of a trial that ended early, with the best of the scores that it had."""
    sign = sign_of(plan.direction)
    best = min(curve, key=lambda s: sign * curve[s], default=None)
    score = None if best is None else curve[best]
    return Outcome(state, reason, score, best, seconds=seconds)
