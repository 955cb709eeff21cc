"""Sequential studies, which add seeds only to undecided arms: interim analyses, corrected p-values, stopping rules.

Repeated testing that stops at the first significant p would raise the rate of false verdicts. Here a plan, made before
the first run, fixes at which numbers of seeds the tests are made and which share of the error rate each may use, and
p-values are corrected for all of them: `sequential_p` for single arms, `sequential_closed_p` for sets of arms. All
decisions are functions of the scores so far, so that they can be repeated after a crash.

A set of arms can only be tested at the seeds that all of its arms have. Undecided arms therefore get new seeds together
until the study stops. Decided arms get no more seeds: every set that contains one is already rejected with the seeds
that it had then. Undecided arms are not selected by their scores so far, since p-values do not account for such a
selection. Beyond 12 arms, where Holm's correction does not use sets, futile arms stop one by one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from dxmi.errors import UserError
from dxmi.metrics.keys import Direction
from tune.stats.comparison import Comparison, Verdict, judge
from tune.stats.intervals import DEFAULT, Bootstrap
from tune.stats.multiple_testing import (
    MOST_EXACT,
    Array,
    InterimAnalysis,
    holm,
    rounding,
    sequential_closed_p,
    sign_flip_sums,
)
from tune.stats.power import Correction, correction_of, hardest_bar, seeds_to_test
from tune.stats.tests import Pairs, pair_up, scores_of

_WEIGHTS = (0.25, 0.25, 0.5)
"""Shares of the error rate: at the first test, half way between it and the cap, and at the cap."""


@dataclass(frozen=True)
class SeedPlan:
    """How many seeds the arms of a study may get.

    Attributes:
        arms: Number of arms that are compared with the baseline.
        start: Number of seeds that every arm starts with.
        cap: Largest number of seeds of an arm; at most 20, since the test enumerates all sign vectors.
        step: Number of seeds that are added at a time.
        error_rate: Rate of false verdicts over all arms and analyses.
        futility: Threshold on the predicted probability of a verdict by the cap; the study stops when it is below the
            threshold for every arm.
    """

    arms: int
    start: int = 3
    cap: int = 12
    step: int = 1
    error_rate: float = DEFAULT.error_rate
    futility: float = 0.1

    def __post_init__(self) -> None:
        if not 0.0 < self.error_rate < 1.0:
            raise UserError(f"error_rate is {self.error_rate}: it must lie between 0 and 1, like 0.05.")
        if not 0.0 <= self.futility < 1.0:
            raise UserError(f"futility is {self.futility}: it must be a probability, at least 0 and below 1.")
        if self.start < 2 or self.step < 1:
            raise UserError(
                f"start is {self.start} and step is {self.step}: start must be at least 2, and step at least 1."
            )
        fewest = max(self.start, seeds_to_test(self.arms, self.error_rate))
        if not fewest <= self.cap <= MOST_EXACT:
            raise UserError(
                f"The cap is {self.cap} seeds: with {self.arms} arms and {self.start} seeds to start with, it must be "
                f"in {fewest}..{MOST_EXACT}; with fewer seeds no verdict is possible."
            )

    @property
    def interim_analyses(self) -> tuple[int, ...]:
        """Numbers of seeds at which arms may stop, in ascending order."""
        return (*range(self.start, self.cap, self.step), self.cap)

    @property
    def tests(self) -> tuple[tuple[int, float], ...]:
        """(Number of seeds, share of the error rate) of each interim analysis with a test; the shares sum to 1.

        A quarter is used at the first analysis at which it can suffice for a verdict, in the hardest step; a quarter
        half way between that and the cap; the rest at the cap, so that little power is lost compared with a single test
        at the cap.
        """
        first = self._first_test
        half_way = (first + self.cap) / 2.0
        shares = dict.fromkeys(self.interim_analyses, 0.0)
        for seeds, share in zip((first, half_way, self.cap), _WEIGHTS, strict=True):
            shares[next((number for number in self.interim_analyses if number >= seeds), self.cap)] += share
        return tuple((number, share) for number, share in shares.items() if share > 0.0)

    @property
    def correction(self) -> Correction:
        """Correction for the number of arms."""
        return correction_of(self.arms, self.error_rate)

    @property
    def _first_test(self) -> int:
        """The smallest number of seeds at which a test can be significant with the first test's share."""
        compared = self.arms if self.correction is Correction.HOLM else 1
        return seeds_to_test(1, _WEIGHTS[0] * self.error_rate / compared)


def sequential_p(differences: ArrayLike, tests: Sequence[tuple[int, float]]) -> float:
    """The p-value of the sign-flip test, corrected for the tests made so far and for the remaining ones.

    With p_j the exact p of test j on its first n_j differences and w_j its share, let m = min p_j / w_j over the tests
    made so far. The corrected p is P(min p_j / w_j <= m), exact over all sign vectors, plus m times the shares of the
    remaining tests. The first summand is the permutation test of the statistic m; the second bounds what the remaining
    tests can add (Bonferroni). Therefore another test never raises the corrected p, a verdict is never revoked, and
    after the last test the corrected p is exact: stopping at any analysis keeps the error rate.

    Args:
        differences: Paired differences in the order in which the seeds were run.
        tests: (Number of differences, share) of every test of the plan, in order; tests with more differences than are
            given count as remaining.

    Raises:
        UserError: more than 20 differences, or one that is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or len(values) > MOST_EXACT or not np.isfinite(values).all():
        raise UserError(f"Differences {values.tolist()}: give at most {MOST_EXACT} finite numbers.")
    smallest = np.array([math.inf])  # of p_j / w_j, for each sign vector; the first is the observed one
    seeds, to_come = 1, 0.0
    for count, share in tests:
        if count > len(values):
            to_come += share
        elif count > 0:
            smallest = np.repeat(smallest, 2 ** (count - seeds))
            smallest = np.minimum(smallest, _flipped_p(values[:count]) / share)
            seeds = count
    seen = float(smallest[0])
    if math.isinf(seen):
        return 1.0
    return min(1.0, float((smallest <= seen * (1.0 + 1e-9)).mean()) + seen * to_come)


def _flipped_p(differences: Array) -> Array:
    """p-value under each sign vector whose first sign is +1 [2^(seeds - 1)], in the order of `sign_flip_sums`."""
    sizes = np.abs(sign_flip_sums(differences))
    ranks = np.searchsorted(np.sort(sizes), sizes - rounding(differences), side="left")
    return 1.0 - ranks / len(sizes)


# ----------------------------------------------------------------------------
# Decisions


def next_seeds(scores: Mapping[str, ArrayLike], baseline: str, plan: SeedPlan) -> dict[str, int]:
    """The arms that need more runs, with the total number of seeds for each; empty when the study can stop.

    Undecided arms continue until the probability of a verdict by the cap, as predicted by `_chance`, is below
    `plan.futility` for each of them. The baseline needs as many seeds as the arm with the most seeds.

    Args:
        scores: Scores [seeds so far] of each arm and the baseline by name, NaN where a run failed. All have the seeds
            in the same order, and an arm may have fewer than the baseline.
        baseline: Name of the baseline in `scores`.
        plan: Plan of the study.

    Raises:
        UserError: no such baseline, a different number of arms than planned, an arm with more seeds than the baseline
            or the cap, or an infinite score.
    """
    arms = _arms(scores, baseline, plan)
    going_on = _going_on(arms, _adjusted(arms, scores, baseline, plan), plan)
    return {arm.pairs.arm: next(seeds for seeds in plan.interim_analyses if seeds > arm.seeds) for arm in going_on}


def review(
    scores: Mapping[str, ArrayLike],
    baseline: str,
    plan: SeedPlan,
    *,
    direction: Direction = "minimize",
    resamples: int = DEFAULT.resamples,
    seed: int = 0,
) -> tuple[Comparison, ...]:
    """Compare every arm with the baseline like `compare`, with p-values corrected for the plan's interim analyses.

    The verdict on an arm that may still get seeds is `too few seeds`; after a stop for futility it is `no difference
    shown`, since the study could have shown a difference by its cap.

    Args:
        scores: As for `next_seeds`.
        baseline: Name of the baseline in `scores`.
        plan: Plan of the study.
        direction: `minimize` if lower is better.
        resamples: Number of bootstrap resamples.
        seed: Seed of every random draw.

    Raises:
        UserError: as `next_seeds`.
    """
    arms = _arms(scores, baseline, plan)
    p_values = [arm.p for arm in arms]
    pairs = [arm.pairs for arm in arms]
    bootstrap = Bootstrap(1.0 - plan.error_rate, resamples, seed)
    adjusted = _adjusted(arms, scores, baseline, plan)
    going_on = {arm.pairs.arm for arm in _going_on(arms, adjusted, plan)}
    judged = judge(pairs, p_values, adjusted, direction=direction, bootstrap=bootstrap)
    return tuple(
        _with_plan(comparison, arm, plan, is_open=comparison.arm in going_on)
        for comparison, arm in zip(judged, arms, strict=True)
    )


@dataclass(frozen=True)
class _Arm:
    """Current state of an arm.

    Attributes:
        pairs: Its scores and the baseline's so far.
        seeds: Number of seeds that were run, including failed runs.
        p: p-value corrected for the interim analyses, not for the number of arms.
    """

    pairs: Pairs
    seeds: int
    p: float


def _arms(scores: Mapping[str, ArrayLike], baseline: str, plan: SeedPlan) -> list[_Arm]:
    if baseline not in scores or len(scores) - 1 != plan.arms:
        raise UserError(
            f"The plan is for {plan.arms} arms and the baseline {baseline!r}, but there are scores of "
            f"{', '.join(map(repr, scores)) or 'nothing'}: make a plan for these arms before the first run."
        )
    theirs = scores_of(baseline, scores[baseline])
    return [_arm(name, scores_of(name, own), theirs, plan) for name, own in scores.items() if name != baseline]


def _arm(name: str, ours: Array, theirs: Array, plan: SeedPlan) -> _Arm:
    seeds = len(ours)
    if seeds > min(len(theirs), plan.cap):
        raise UserError(
            f"Arm {name!r} has {seeds} seeds, the baseline {len(theirs)}, and the cap is {plan.cap}: "
            "an arm must not have more than either."
        )
    pairs = pair_up(name, ours, theirs[:seeds])
    common = np.cumsum(~np.isnan(ours) & ~np.isnan(theirs[:seeds]))
    tests = [
        (int(common[number - 1]) if number <= seeds else len(pairs.scores) + number - seeds, share)
        for number, share in plan.tests
    ]
    return _Arm(pairs, seeds, sequential_p(pairs.differences, tests))


def _adjusted(arms: Sequence[_Arm], scores: Mapping[str, ArrayLike], baseline: str, plan: SeedPlan) -> Array:
    """The arms' p-values, corrected for the interim analyses and for the number of arms."""
    p_values = [arm.p for arm in arms]
    if plan.correction is not Correction.CLOSED:
        return holm(p_values)
    table = np.full((1 + len(arms), plan.cap), math.nan)
    for row, name in enumerate([baseline, *(arm.pairs.arm for arm in arms)]):
        own = scores_of(name, scores[name])[: plan.cap]
        table[row, : len(own)] = own
    analyses = [InterimAnalysis(seeds, share) for seeds, share in plan.tests]
    return sequential_closed_p(table, [arm.seeds for arm in arms], p_values, analyses)


def _going_on(arms: Sequence[_Arm], adjusted: Array, plan: SeedPlan) -> list[_Arm]:
    """The arms that get more seeds."""
    undecided = [arm for arm, p in zip(arms, adjusted.tolist(), strict=True) if p > plan.error_rate]
    open_arms = [arm for arm in undecided if arm.seeds < plan.cap and (arm.seeds < plan.start or len(arm.pairs.scores))]
    promising = [arm for arm in open_arms if arm.seeds < plan.start or _chance(arm, plan) >= plan.futility]
    return promising if plan.correction is Correction.HOLM or not promising else open_arms


def _chance(arm: _Arm, plan: SeedPlan) -> float:
    """Predictive power: the probability that a t test at the cap, in the hardest step, finds a difference.

    With n of N seeds, mean d and spread s, the mean at the cap is d + s sqrt(1/n - 1/N) T, where T has Student's t
    distribution with n - 1 degrees of freedom (Spiegelhalter, Freedman and Blackburn 1986, with a flat prior). It must
    exceed s t / sqrt(N) with t from `hardest_bar`. The result is 1 for a single pair, which carries no information
    about the spread, and 0 for an arm without pairs, all of whose runs failed.
    """
    differences = arm.pairs.differences
    n = len(differences)
    if n < 2:
        return float(n)
    total = n + plan.cap - arm.seeds
    mean, spread = abs(float(differences.mean())), float(differences.std(ddof=1))
    if spread <= rounding(differences):
        return float(mean > rounding(differences))
    bar = hardest_bar(total, plan.arms, plan.error_rate) * spread / math.sqrt(total)
    error = spread * math.sqrt(1.0 / n - 1.0 / total)
    from scipy.stats import t as student  # noqa: PLC0415  (it takes a second)

    return float(student.sf((bar - mean) / error, n - 1) + student.cdf((-bar - mean) / error, n - 1))


def _with_plan(comparison: Comparison, arm: _Arm, plan: SeedPlan, *, is_open: bool) -> Comparison:
    """Set verdict and reason of an undecided arm: whether it continues, or why it stopped before the cap."""
    where = f"{arm.seeds} of at most {plan.cap} seeds"
    if is_open:
        reason = f"Undecided after {where}."
        return replace(comparison, verdict=Verdict.TOO_FEW_SEEDS, reason=reason)
    if comparison.p_adjusted <= plan.error_rate or arm.seeds == plan.cap or comparison.seeds < 2:
        return comparison
    reason = (
        f"Stopped after {where}: the chance that {plan.cap} seeds would show a difference was {_chance(arm, plan):.0%}."
    )
    return replace(comparison, verdict=Verdict.NO_DIFFERENCE, reason=reason)
