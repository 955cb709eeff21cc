"""Every arm against the baseline: a difference, p-values with one error rate, and a verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike

from tune.stats.intervals import (
    DEFAULT,
    Bootstrap,
    Direction,
    Interval,
    check_direction,
    mean_interval,
    probability_of_improvement,
    seeds_text,
    unknown_interval,
)
from tune.stats.multiple_testing import Array, closed_p, holm, rounding, sign_flip_p, smallest_sign_flip_p
from tune.stats.power import Correction, SeedRange, correction_of, seeds_needed, seeds_to_test
from tune.stats.tests import Pairs, p_text, paired, scores_of


class Verdict(StrEnum):
    """What the study says about an arm.

    `too few seeds` is about the study: whatever the scores had been, this many seeds could not have shown a difference.
    `no difference shown` is about the arm: they could have, and did not. How large a difference they leave possible is
    in the interval. `failed` and `unfinished` are about runs without a score: see `tune.studies.arm_results`.
    """

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference shown"
    TOO_FEW_SEEDS = "too few seeds"
    FAILED = "failed"
    """Runs of the arm or of the baseline ended without a score. They are not missing at random, so no test is taken."""
    UNFINISHED = "unfinished"
    """Runs of the arm or of the baseline have not ended, so no test is taken yet."""


@dataclass(frozen=True)
class Comparison:
    """An arm against the baseline; `str` gives a line for a table.

    Attributes:
        arm: its name.
        seeds: that have a score of both.
        left_out: seeds that lack one.
        difference: mean of arm minus baseline, seed by seed.
        improvement: the chance that a run of the arm beats a run of the baseline.
        p: of the sign-flip test on this arm alone.
        p_adjusted: for all arms together; the verdict goes by it.
        correction: how it was adjusted.
        seeds_needed: how many would show a difference like this one.
        verdict: what it comes to.
        reason: why, in a sentence or two.
        gaps: which runs are missing, in words, if the verdict is about them; p, p_adjusted, improvement and
            seeds_needed are NaN then.
    """

    arm: str
    seeds: int
    left_out: int
    difference: Interval
    improvement: Interval
    p: float
    p_adjusted: float
    correction: Correction
    seeds_needed: SeedRange
    verdict: Verdict
    reason: str
    gaps: str = ""

    @property
    def verdict_text(self) -> str:
        """The verdict for a table."""
        return self.gaps or str(self.verdict)

    def __str__(self) -> str:
        if self.gaps:
            return f"{self.gaps}: {self.difference}, {self._counted}"
        if self.verdict is Verdict.TOO_FEW_SEEDS:
            return f"{self.verdict}: {self.difference}, {self._counted}; {self.enough}"
        return f"{self.verdict}: {self.difference}, {p_text(self.p_adjusted)} ({self.correction}, {self._counted})"

    @property
    def _counted(self) -> str:
        return seeds_text(self.seeds) + (f", {self.left_out} left out" if self.left_out else "")

    @property
    def enough(self) -> str:
        """How many seeds would do, in words."""
        if math.isinf(self.seeds_needed.low):
            return "no number of seeds would show a difference of 0"
        end = "would do" if math.isfinite(self.seeds_needed.high) else "needed"
        return f"{self.seeds_needed.numbers} {end}"


def compare(
    scores: Mapping[str, ArrayLike],
    baseline: str,
    *,
    direction: Direction = "minimize",
    bootstrap: Bootstrap = DEFAULT,
    is_final: bool = True,
) -> tuple[Comparison, ...]:
    """Every arm against the baseline: permutation tests within seeds, with one error rate, and a verdict each.

    Up to 12 arms are compared by closed testing (`tune.stats.multiple_testing.closed_p`), more by sign flips with
    Holm's correction. A verdict says that an arm's scores are distributed differently from the baseline's; `better` and
    `worse` go by the sign of the mean difference. Equal means do not protect from a verdict if the paired differences
    are skewed: see `sign_flip_p`.

    An arm with fewer than two pairs stays in the table, as `too few seeds` with p = 1. An arm that lacks some seeds is
    tested at those that it has; in the joint tests only the scores that a seed has are permuted.

    Args:
        scores: of each arm and of the baseline [seeds], the same seeds in the same order; NaN where a run failed.
        baseline: its name among them.
        direction: `minimize` if lower is better.
        bootstrap: level, resamples and seed; all arms together have its rate of false verdicts.
        is_final: whether no score is still to come. Until then Holm's correction counts every arm, also one without
            scores, where closed testing would leave that one out of the family.

    Returns:
        One an arm, in the order given.

    Raises:
        UserError: no such baseline, no arm, unequal numbers of seeds, an infinite score, or a baseline without scores.
    """
    pairs = paired(scores, baseline)
    p_values = [sign_flip_p(p.differences, bootstrap.seed) if len(p.scores) > 1 else 1.0 for p in pairs]
    adjusted: Array | None = None
    if is_final and correction_of(len(pairs), bootstrap.error_rate) is Correction.CLOSED:
        table = [scores_of(pair.arm, scores[pair.arm]) for pair in pairs]
        adjusted = closed_p(scores_of(baseline, scores[baseline]), table, p_values, bootstrap.seed)
    return judge(pairs, p_values, adjusted, direction=direction, bootstrap=bootstrap)


def judge(
    pairs: Sequence[Pairs],
    p_values: Sequence[float],
    adjusted: ArrayLike | None = None,
    *,
    direction: Direction = "minimize",
    bootstrap: Bootstrap = DEFAULT,
) -> tuple[Comparison, ...]:
    """Verdicts by given p-values, one an arm; those of fewer than two pairs must be 1.

    Args:
        pairs: one an arm.
        p_values: one an arm, not yet adjusted for the number of arms.
        adjusted: the same, adjusted by closed testing; by default Holm's procedure adjusts them.
        direction: `minimize` if lower is better.
        bootstrap: level, resamples and seed.
    """
    check_direction(direction)
    rules = _Rules(len(pairs), direction, bootstrap)
    final = holm(p_values) if adjusted is None else np.asarray(adjusted, dtype=np.float64)
    comparisons = []
    for index, pair in enumerate(pairs):
        verdict = _verdict(pair, index, p_values, float(final[index]), rules)
        needed = _needed(pair, rules)
        comparisons.append(
            Comparison(
                arm=pair.arm,
                seeds=len(pair.scores),
                left_out=pair.left_out,
                difference=_difference(pair, rules),
                improvement=_improvement(pair, rules),
                p=float(p_values[index]),
                p_adjusted=float(final[index]),
                correction=rules.correction,
                seeds_needed=needed,
                verdict=verdict,
                reason=" ".join(_reasons(pair, verdict, needed, rules)),
            )
        )
    return tuple(comparisons)


@dataclass(frozen=True)
class _Rules:
    """What every arm of a study is judged by: see `judge`."""

    arms: int
    direction: Direction
    bootstrap: Bootstrap

    @property
    def error_rate(self) -> float:
        return self.bootstrap.error_rate

    @property
    def correction(self) -> Correction:
        return correction_of(self.arms, self.error_rate)

    @property
    def fewest(self) -> int:
        """Seeds with which the tests can show anything."""
        return seeds_to_test(self.arms, self.error_rate)

    def gains(self, pair: Pairs) -> Array:
        """Differences with their sign turned so that more is better [seeds]."""
        return -pair.differences if self.direction == "minimize" else pair.differences


def _verdict(pair: Pairs, index: int, p_values: Sequence[float], adjusted: float, rules: _Rules) -> Verdict:
    if adjusted <= rules.error_rate:
        return Verdict.BETTER if rules.gains(pair).mean() > 0.0 else Verdict.WORSE
    if len(pair.scores) < 2:
        return Verdict.TOO_FEW_SEEDS
    is_same = not pair.differences.any()
    return Verdict.NO_DIFFERENCE if is_same or _could_show(pair, index, p_values, rules) else Verdict.TOO_FEW_SEEDS


def _could_show(pair: Pairs, index: int, p_values: Sequence[float], rules: _Rules) -> bool:
    """Whether differences of these sizes, all with the same sign, would be significant.

    Closed testing compares the arm's own p with the error rate; Holm's procedure judges it among the others' p.
    """
    smallest = min(p_values[index], smallest_sign_flip_p(pair.differences))
    if rules.correction is not Correction.HOLM:
        return smallest <= rules.error_rate
    at_best = [*p_values]
    at_best[index] = smallest
    return bool(holm(at_best)[index] <= rules.error_rate)


def _needed(pair: Pairs, rules: _Rules) -> SeedRange:
    """How many seeds would do; one pair or none says nothing of the spread, so at least what the tests need."""
    if len(pair.scores) < 2:
        return SeedRange(float(rules.fewest), math.inf)
    return seeds_needed(pair.differences, rules.arms, rules.error_rate)


def _difference(pair: Pairs, rules: _Rules) -> Interval:
    if len(pair.scores) < 2:
        return unknown_interval(pair.differences, -math.inf, math.inf, rules.bootstrap)
    return mean_interval(pair.differences, rules.bootstrap)


def _improvement(pair: Pairs, rules: _Rules) -> Interval:
    if len(pair.scores) < 2:
        return unknown_interval((np.sign(rules.gains(pair)) + 1.0) / 2.0, 0.0, 1.0, rules.bootstrap)
    return probability_of_improvement(pair.scores, pair.baseline, direction=rules.direction, bootstrap=rules.bootstrap)


def _reasons(pair: Pairs, verdict: Verdict, needed: SeedRange, rules: _Rules) -> list[str]:
    """Sentences: what speaks for the verdict."""
    seeds = len(pair.scores)
    if verdict in (Verdict.BETTER, Verdict.WORSE):
        return [f"It beats the baseline at {(rules.gains(pair) > 0.0).sum()} of {seeds_text(seeds)}."]
    if seeds < 2:
        return [f"{seeds_text(seeds)} with both scores: a comparison takes at least two."]
    if not pair.differences.any():
        return ["Every score equals the baseline's at the same seed."]
    if verdict is Verdict.NO_DIFFERENCE:
        return [f"{seeds_text(seeds)} could have shown a difference.", *_would_show(needed)]
    return [_too_few(pair, rules), *_would_show(needed)]


def _too_few(pair: Pairs, rules: _Rules) -> str:
    """Why no difference could be shown: the number of seeds, or scores that equal the baseline's."""
    seeds, ties = len(pair.scores), int((np.abs(pair.differences) <= rounding(pair.differences)).sum())
    takes = f"{rules.arms} arms take" if rules.arms > 1 else "one arm takes"
    equal = f", at {ties} of which the scores are equal," if ties else ""
    return f"With {seeds_text(seeds)}{equal} the test cannot show any difference: {takes} {rules.fewest}" + (
        " that differ." if ties else "."
    )


def _would_show(needed: SeedRange) -> list[str]:
    """How many seeds a difference like the one seen takes."""
    if math.isinf(needed.low):
        return ["No number of seeds would show a difference of 0."]
    return [f"One like this takes {needed}."]
