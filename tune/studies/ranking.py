"""Ranking of trials: the leaderboard order and the Pareto front."""

from collections.abc import Sequence

from tune.plans.sweep import Plan
from tune.studies.records import TrialRecord, TrialState


def ranked(plan: Plan, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Leaderboard order: complete trials by the first objective, then others by score, then trials without a score."""
    sign = plan.objectives[0].sign

    def key(record: TrialRecord) -> tuple[int, float, int]:
        outcome = record.outcome
        if outcome.state is TrialState.COMPLETE:
            return 0, sign * outcome.objectives[0], record.number
        return (1, outcome.score, record.number) if outcome.score is not None else (2, 0.0, record.number)

    return sorted(records, key=key)


def pareto_front(plan: Plan, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The Pareto-optimal complete trials, sorted by the first objective."""
    signs = [objective.sign for objective in plan.objectives]
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
