"""Early stopping: pure functions of the trials' curves, so that a decision can be taken again after a crash.

A curve holds one trial's score by iteration; lower is better here, so that scores to be maximized come with their sign
changed. A decision about a trial at a step looks at nothing
that the trial does afterwards.
"""

import statistics
from collections.abc import Iterable, Mapping

from tune.config.sweep import StoppingConfig

Curve = Mapping[int, float]


def should_prune(
    rule: StoppingConfig, curves: Mapping[int, Curve], finished: Iterable[int], number: int, step: int
) -> bool:
    """Whether trial `number` should stop at `step`, at which it has just been scored.

    Args:
        rule: the sweep's.
        curves: every trial's, by number, `number`'s included.
        finished: trials that ran to their end.
        number: the trial in question.
        step: its iteration.
    """
    if rule.rule == "asha":
        return _asha(rule, curves, number, step)
    if rule.rule == "median":
        return _median(rule, [curves[n] for n in finished if n != number], curves[number], step)
    return False


def _asha(rule: StoppingConfig, curves: Mapping[int, Curve], number: int, step: int) -> bool:
    """Asynchronous successive halving (arXiv 1810.05934), its stopping variant: a trial that is scored at a rung goes
    on if it is among the best 1/factor of those that have been scored there so far; the first one always is.
    """
    before = max((s for s in curves[number] if s < step), default=-1)
    rung = rule.first_step
    while rung <= step:
        if before < rung:  # the first score at or past this rung
            scores = sorted(s for s in (_score_at(curve, rung) for curve in curves.values()) if s is not None)
            keep = max(1, len(scores) // rule.factor)
            if curves[number][step] > scores[keep - 1]:
                return True
        rung *= rule.factor
    return False


def _score_at(curve: Curve, rung: int) -> float | None:
    """The first score at or past a rung."""
    reached = [step for step in curve if step >= rung]
    return curve[min(reached)] if reached else None


def _median(rule: StoppingConfig, finished: list[Curve], curve: Curve, step: int) -> bool:
    """The median rule (Golovin et al. 2017): stop if the best score so far is worse than the median, over finished
    trials, of their means up to this step.
    """
    means = [
        statistics.fmean(scores) for scores in ([v for s, v in c.items() if s <= step] for c in finished) if scores
    ]
    if step < rule.first_step or len(means) < rule.min_trials:
        return False
    return min(value for s, value in curve.items() if s <= step) > statistics.median(means)
