"""Comparison of every arm with the baseline: difference, p-values with a family-wise error rate, and verdict."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from enum import StrEnum

import numpy as np
from numpy.typing import ArrayLike

from dxmi.metrics.keys import Direction, sign_of
from tune.stats.intervals import (
    DEFAULT,
    Bootstrap,
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
    """The study's conclusion about an arm.

    `too few seeds`: with this many seeds, no scores could have shown a difference. `no difference shown`: the seeds
    would have sufficed, but the test is not significant; the interval tells how large a difference is still possible.
    `failed` and `unfinished` concern runs without a score, see `tune.studies.arm_results`.
    """

    BETTER = "better"
    WORSE = "worse"
    NO_DIFFERENCE = "no difference shown"
    TOO_FEW_SEEDS = "too few seeds"
    FAILED = "failed"
    """Runs of the arm or the baseline ended without a score. They are not missing at random, so nothing is tested."""
    UNFINISHED = "unfinished"
    """Runs of the arm or the baseline have not ended yet, so nothing is tested yet."""


@dataclass(frozen=True)
class Comparison:
    """Comparison of an arm with the baseline; `str` gives a table cell.

    Attributes:
        arm: Name of the arm.
        seeds: Number of seeds with a score of both the arm and the baseline.
        left_out: Number of seeds that lack one of the two scores.
        difference: Mean of the paired differences, arm minus baseline.
        improvement: Probability that a run of the arm beats a run of the baseline.
        p: p-value of the sign-flip test of this arm, without correction.
        p_adjusted: p-value corrected for all arms; it decides the verdict.
        correction: Method of the correction.
        seeds_needed: Number of seeds that would show a difference of this size.
        verdict: Conclusion about the arm.
        reason: Explanation of the verdict in one or two sentences.
        gaps: Description of the missing runs if the verdict is about them, else empty. If set, p, p_adjusted,
            improvement and seeds_needed are NaN.
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
        """Verdict, or description of the missing runs, for a table."""
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
        """Text that says how many seeds would suffice."""
        if math.isinf(self.seeds_needed.low):
            return "no number of seeds would show a difference of 0"
        end = "would suffice" if math.isfinite(self.seeds_needed.high) else "needed"
        return f"{self.seeds_needed.numbers} {end}"


def compare(
    scores: Mapping[str, ArrayLike],
    baseline: str,
    *,
    direction: Direction = "minimize",
    bootstrap: Bootstrap = DEFAULT,
    is_final: bool = True,
) -> tuple[Comparison, ...]:
    """Compare every arm with the baseline by permutation tests within seeds, with a family-wise error rate.

    Up to 12 arms are compared by closed testing (`tune.stats.multiple_testing.closed_p`), more by sign-flip tests with
    Holm's correction. A verdict states that an arm's scores are distributed differently from the baseline's; `better`
    and `worse` follow from the sign of the mean difference. With skewed paired differences, a verdict is possible even
    if the means are equal: see `sign_flip_p`.

    An arm with fewer than two pairs is kept in the table as `too few seeds` with p = 1. An arm that lacks some seeds is
    tested at the seeds that it has; the joint tests permute only the scores that exist at a seed.

    Args:
        scores: Scores [seeds] of each arm and the baseline by name, for the same seeds in the same order; NaN where a
            run failed.
        baseline: Name of the baseline in `scores`.
        direction: `minimize` if lower is better.
        bootstrap: Level, resamples and seed; its error rate of false verdicts holds for all arms jointly.
        is_final: Whether all scores are in. Otherwise Holm's correction is used: it also counts arms that have no
            score yet, which closed testing would leave out of the family.

    Returns:
        One comparison per arm, in the order given.

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
    """Make the comparisons and verdicts from given p-values.

    Args:
        pairs: Paired scores, one entry per arm.
        p_values: One per arm, not adjusted for the number of arms; must be 1 for an arm with fewer than two pairs.
        adjusted: p-values adjusted by closed testing; None applies Holm's procedure to `p_values`.
        direction: `minimize` if lower is better.
        bootstrap: Level, resamples and seed.
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
    """Settings shared by the verdicts on all arms of a study: see `judge`."""

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
        """Smallest number of seeds at which a test can be significant."""
        return seeds_to_test(self.arms, self.error_rate)

    def gains(self, pair: Pairs) -> Array:
        """Differences [seeds], with the sign changed where needed so that larger is better."""
        return -sign_of(self.direction) * pair.differences


def _verdict(pair: Pairs, index: int, p_values: Sequence[float], adjusted: float, rules: _Rules) -> Verdict:
    if adjusted <= rules.error_rate:
        return Verdict.BETTER if rules.gains(pair).mean() > 0.0 else Verdict.WORSE
    if len(pair.scores) < 2:
        return Verdict.TOO_FEW_SEEDS
    is_same = not pair.differences.any()
    return Verdict.NO_DIFFERENCE if is_same or _could_show(pair, index, p_values, rules) else Verdict.TOO_FEW_SEEDS


def _could_show(pair: Pairs, index: int, p_values: Sequence[float], rules: _Rules) -> bool:
    """Whether differences of these magnitudes would be significant if all had the same sign.

    Closed testing compares the arm's own p with the error rate; Holm's procedure ranks it among the other arms' p.
    """
    smallest = min(p_values[index], smallest_sign_flip_p(pair.differences))
    if rules.correction is not Correction.HOLM:
        return smallest <= rules.error_rate
    at_best = [*p_values]
    at_best[index] = smallest
    return bool(holm(at_best)[index] <= rules.error_rate)


def _needed(pair: Pairs, rules: _Rules) -> SeedRange:
    """Number of seeds that would suffice; with fewer than two pairs the spread is unknown, so only a lower bound."""
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
    """Sentences that explain the verdict."""
    seeds = len(pair.scores)
    if verdict in (Verdict.BETTER, Verdict.WORSE):
        return [f"It beats the baseline at {(rules.gains(pair) > 0.0).sum()} of {seeds_text(seeds)}."]
    if seeds < 2:
        return [f"{seeds_text(seeds)} with both scores: a comparison needs at least two."]
    if not pair.differences.any():
        return ["Every score equals the baseline's at the same seed."]
    if verdict is Verdict.NO_DIFFERENCE:
        return [f"{seeds_text(seeds)} could have shown a difference, but did not.", *_would_show(needed)]
    return [_too_few(pair, rules), *_would_show(needed)]


def _too_few(pair: Pairs, rules: _Rules) -> str:
    """Why no difference could be shown: too few seeds, or too many scores equal to the baseline's."""
    seeds, ties = len(pair.scores), int((np.abs(pair.differences) <= rounding(pair.differences)).sum())
    takes = f"{rules.arms} arms require" if rules.arms > 1 else "one arm requires"
    equal = f", at {ties} of which both scores are equal," if ties else ""
    return f"With {seeds_text(seeds)}{equal} the test cannot show any difference: {takes} {rules.fewest}" + (
        " seeds with different scores." if ties else " seeds."
    )


def _would_show(needed: SeedRange) -> list[str]:
    """How many seeds a difference of the observed size needs."""
    if math.isinf(needed.low):
        return ["No number of seeds would show a difference of 0."]
    return [f"A difference of this size requires {needed}."]
