"""Early stopping: pure functions of the trials' curves, so that decisions can be repeated after a crash.

A curve holds one trial's scores by iteration. Lower is better here, so scores to be maximized are passed with their
sign changed. A decision about a trial at a step does not depend on the trial's later scores.
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
        rule: Stopping rule of the sweep.
        curves: Curves of all trials by number, including `number`.
        finished: Numbers of the trials that ran to their end.
        number: Number of the trial.
        step: Iteration at which the trial was scored.
    """
    if rule.rule == "asha":
        return _asha(rule, curves, number, step)
    if rule.rule == "median":
        return _median(rule, [curves[n] for n in finished if n != number], curves[number], step)
    return False


def _asha(rule: StoppingConfig, curves: Mapping[int, Curve], number: int, step: int) -> bool:
    """Asynchronous successive halving (arXiv 1810.05934), stopping variant.

    A trial that is scored at a rung continues if it is among the best 1/factor of the trials scored there so far; the
    first one always continues.
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
    """The median rule (Golovin et al. 2017).

    Stop if the best score so far is worse than the median of the finished trials' mean scores up to this step.
    """
    means = [
        statistics.fmean(scores) for scores in ([v for s, v in c.items() if s <= step] for c in finished) if scores
    ]
    if step < rule.first_step or len(means) < rule.min_trials:
        return False
    return min(value for s, value in curve.items() if s <= step) > statistics.median(means)
