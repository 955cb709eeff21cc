"""Adding seeds only where the verdict is still open: interim analyses, what each may decide, and which arms continue.

Testing often and stopping at the first significant p would raise the rate of false verdicts. Here a plan, made before
the first run, says at which numbers of seeds the tests are taken and how much of the error rate each may use, and
p-values are corrected for all of them: `sequential_p` for single arms, `sequential_closed_p` for sets of arms.
Everything is a function of the scores so far, so that a decision can be taken again after a crash.

A set of arms can only be tested with as many seeds as all of its arms have. So arms that have no verdict yet get their
seeds together until the study stops, and those with a verdict drop out: every set with one of them is rejected already,
with the seeds that it had then. Which of the open arms looks best so far decides nothing, which would be a selection
that no p-value allows for. Beyond 12 arms, where Holm's correction needs no sets, futile arms stop one by one.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import ArrayLike

from dxmi.errors import UserError
from tune.stats.comparison import Comparison, Verdict, judge
from tune.stats.intervals import DEFAULT, Bootstrap, Direction
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
"""Of the error rate: at the first test, half way from there, and at the cap."""


@dataclass(frozen=True)
class SeedPlan:
    """How many seeds the arms of a study may get.

    Attributes:
        arms: that are compared with the baseline.
        start: seeds of every arm to begin with.
        cap: seeds of an arm at most; 20, since the test lists all sign vectors.
        step: seeds that are added at once.
        error_rate: of false verdicts, of all arms and analyses together.
        futility: the study stops if no arm's chance of a verdict by the cap is at least this.
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
            raise UserError(f"futility is {self.futility}: it must be a chance, at least 0 and below 1.")
        if self.start < 2 or self.step < 1:
            raise UserError(
                f"A plan starts with at least 2 seeds and adds at least 1, not {self.start} and {self.step}."
            )
        fewest = max(self.start, seeds_to_test(self.arms, self.error_rate))
        if not fewest <= self.cap <= MOST_EXACT:
            raise UserError(
                f"The cap is {self.cap} seeds: with {self.arms} arms and {self.start} seeds to start with, it must be "
                f"from {fewest}, below which no verdict is possible, to {MOST_EXACT}."
            )

    @property
    def interim_analyses(self) -> tuple[int, ...]:
        """Numbers of seeds at which arms may stop, in rising order."""
        return (*range(self.start, self.cap, self.step), self.cap)

    @property
    def tests(self) -> tuple[tuple[int, float], ...]:
        """(number of seeds, share of the error rate) of each interim analysis that tests; the shares sum to 1.

        A quarter is for the first analysis that can decide with it, in the hardest step; a quarter for one half way
        from there to the cap; the rest for the cap, so that hardly a verdict is lost that the cap would have found.
        """
        first = self._first_test
        half_way = (first + self.cap) / 2.0
        shares = dict.fromkeys(self.interim_analyses, 0.0)
        for seeds, share in zip((first, half_way, self.cap), _WEIGHTS, strict=True):
            shares[next((number for number in self.interim_analyses if number >= seeds), self.cap)] += share
        return tuple((number, share) for number, share in shares.items() if share > 0.0)

    @property
    def correction(self) -> Correction:
        """How p-values allow for the number of arms."""
        return correction_of(self.arms, self.error_rate)

    @property
    def _first_test(self) -> int:
        """The fewest seeds with which the first test's share can show anything."""
        compared = self.arms if self.correction is Correction.HOLM else 1
        return seeds_to_test(1, _WEIGHTS[0] * self.error_rate / compared)


def sequential_p(differences: ArrayLike, tests: Sequence[tuple[int, float]]) -> float:
    """The p-value of the sign-flip test, corrected for the tests taken so far and for those to come.

    With p_j the exact p of test j on its first n_j differences and w_j its share, let m = min p_j / w_j over the tests
    taken. Corrected is P(min p_j / w_j <= m), exactly, over all sign vectors, plus m times the shares of the tests to
    come. The first summand is the permutation test of the statistic m; the second is what the tests to come can at
    most add to it (Bonferroni). So another test never raises the corrected p, a verdict once reached stays, and after
    the last test the corrected p is an exact one: stopping at any analysis keeps the error rate.

    Args:
        differences: in the order in which the seeds were run.
        tests: (number of differences, share) of every test of the plan, in order; those with more differences than
            there are have yet to come.

    Raises:
        UserError: more than 20 differences, or one that is not finite.
    """
    values = np.asarray(differences, dtype=np.float64)
    if values.ndim != 1 or len(values) > MOST_EXACT or not np.isfinite(values).all():
        raise UserError(f"Differences {values.tolist()}: give at most {MOST_EXACT} finite numbers.")
    smallest = np.array([math.inf])  # of p_j / w_j, under each sign vector; the first is the one seen
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
    """The test's p under each sign vector with the first sign up [2^(seeds - 1)], in the order of `sign_flip_sums`."""
    sizes = np.abs(sign_flip_sums(differences))
    ranks = np.searchsorted(np.sort(sizes), sizes - rounding(differences), side="left")
    return 1.0 - ranks / len(sizes)


# ----------------------------------------------------------------------------
# Decisions


def next_seeds(scores: Mapping[str, ArrayLike], baseline: str, plan: SeedPlan) -> dict[str, int]:
    """The arms that need more runs, and how many seeds each should have then; empty when all is said.

    An arm without a verdict continues until continuing is futile: until the chance of a verdict by the cap, as
    `_chance` predicts it, is below `plan.futility` for each of them. The baseline needs as many seeds as the arm with
    the most.

    Args:
        scores: of each arm and of the baseline [its seeds so far], NaN where a run failed; seeds come in the same
            order for all, and an arm may have fewer than the baseline.
        baseline: its name among them.
        plan: of the study.

    Raises:
        UserError: no such baseline, another number of arms than planned, more seeds of an arm than of the baseline or
            than the cap, or an infinite score.
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
    """Every arm against the baseline as `compare` has it, with p-values corrected for the plan's interim analyses.

    An arm that may still get seeds is `too few seeds`; one whose study stopped for futility is `no difference shown`:
    the study, with its cap, could have shown one.

    Args:
        scores: as for `next_seeds`.
        baseline: its name among them.
        plan: of the study.
        direction: `minimize` if lower is better.
        resamples: of the bootstrap.
        seed: of everything random.

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
    """Where an arm stands.

    Attributes:
        pairs: its scores and the baseline's so far.
        seeds: that were run, failed ones included.
        p: corrected for analyses, not for the number of arms.
    """

    pairs: Pairs
    seeds: int
    p: float


def _arms(scores: Mapping[str, ArrayLike], baseline: str, plan: SeedPlan) -> list[_Arm]:
    if baseline not in scores or len(scores) - 1 != plan.arms:
        raise UserError(
            f"The plan is for {plan.arms} arms and the baseline {baseline!r}, the scores are of "
            f"{', '.join(map(repr, scores)) or 'nothing'}: make a plan for these arms before the first run."
        )
    theirs = scores_of(baseline, scores[baseline])
    return [_arm(name, scores_of(name, own), theirs, plan) for name, own in scores.items() if name != baseline]


def _arm(name: str, ours: Array, theirs: Array, plan: SeedPlan) -> _Arm:
    seeds = len(ours)
    if seeds > min(len(theirs), plan.cap):
        raise UserError(
            f"Arm {name!r} has {seeds} seeds, the baseline {len(theirs)}, and the cap is {plan.cap}: "
            "an arm has no more than either."
        )
    pairs = pair_up(name, ours, theirs[:seeds])
    common = np.cumsum(~np.isnan(ours) & ~np.isnan(theirs[:seeds]))
    tests = [
        (int(common[number - 1]) if number <= seeds else len(pairs.scores) + number - seeds, share)
        for number, share in plan.tests
    ]
    return _Arm(pairs, seeds, sequential_p(pairs.differences, tests))


def _adjusted(arms: Sequence[_Arm], scores: Mapping[str, ArrayLike], baseline: str, plan: SeedPlan) -> Array:
    """The arms' p-values, corrected for analyses and for the number of arms."""
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
    """The chance that a t test at the cap, in the hardest step, will find a difference (predictive power).

    With n of N seeds, mean d and spread s, the mean at the cap is d + s sqrt(1/n - 1/N) T, T of Student's t with n - 1
    degrees of freedom (Spiegelhalter, Freedman and Blackburn 1986, with a flat prior), and has to pass
    s t / sqrt(N) with t from `hardest_bar`. One pair says nothing, so 1; an arm without any has failed wherever it
    ran, so 0.
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
    """Say of an arm without a verdict whether it goes on, or why it stopped before the cap."""
    where = f"{arm.seeds} of at most {plan.cap} seeds"
    if is_open:
        reason = f"Still open after {where}."
        return replace(comparison, verdict=Verdict.TOO_FEW_SEEDS, reason=reason)
    if comparison.p_adjusted <= plan.error_rate or arm.seeds == plan.cap or comparison.seeds < 2:
        return comparison
    reason = f"Stopped after {where}: the chance that {plan.cap} would show a difference was {_chance(arm, plan):.0%}."
    return replace(comparison, verdict=Verdict.NO_DIFFERENCE, reason=reason)
