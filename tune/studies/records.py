"""A trial as a study records it: its state, its outcome, and how outcomes are made."""

from collections.abc import Mapping
from dataclasses import dataclass
from enum import StrEnum
from typing import Any, Self

from dxmi.errors import UserError
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.config import ExperimentConfig
from tune.config.sweep import sign_of
from tune.plans.sweep import Plan
from tune.search.space import Value


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
class TrialSpec:
    """A trial as it was proposed. It is made once: where it is proposed, or when its study is resumed.

    Attributes:
        number: from 0, in the order of proposal.
        values: what varies, by path.
        config: what it runs; None if the values are refused together.
        refusal: why they are; empty if they are not.
    """

    number: int
    values: Mapping[str, Value]
    config: ExperimentConfig | None
    refusal: str = ""

    @classmethod
    def of(cls, plan: Plan, number: int, values: Mapping[str, Value]) -> Self:
        """The trial of a plan with these values."""
        try:
            return cls(number, values, plan.config_of(values))
        except UserError as error:  # the trial's own process will say so, too
            return cls(number, values, None, str(error))

    @property
    def iterations(self) -> int:
        """Of its fine-tuning; 0 if it is refused."""
        return 0 if self.config is None else self.config.train.iterations


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
        objectives=tuple(float(values[objective.metric]) for objective in plan.objectives),
        seconds=sum(summary["seconds"].values()) if seconds is None else seconds,
    )


def pruned(plan: Plan, curve: Mapping[int, float], step: int, seconds: float = 0.0) -> Outcome:
    """The outcome of a trial that was stopped early at `step`."""
    sign = sign_of(plan.direction)
    best = min((s for s in curve if s <= step), key=lambda s: sign * curve[s])
    return Outcome(TrialState.PRUNED, f"fell behind at iteration {step}", curve[best], best, seconds=seconds)


def unfinished(plan: Plan, curve: Mapping[int, float], state: TrialState, reason: str, seconds: float) -> Outcome:
    """The outcome of a trial that ended with whatever scores it had."""
    sign = sign_of(plan.direction)
    best = min(curve, key=lambda s: sign * curve[s], default=None)
    score = None if best is None else curve[best]
    return Outcome(state, reason, score, best, seconds=seconds)
