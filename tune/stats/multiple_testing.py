"""Paired permutation tests of several arms against one baseline, with a family-wise error rate.

A single arm is tested by the sign-flip test of its differences from the baseline. Several arms are tested by closed
testing (Marcus, Peritz and Gabriel 1976): an arm differs if every set of arms that contains it is rejected, each set by
its own test at the full error rate. The test of a set permutes *all* labels, the baseline's and the arms', within each
seed, and compares the largest standardized difference between an arm and the baseline. A quarter of the set's error
rate is reserved for the sign-flip tests of its arms: since the residual is pooled over the set, the effect of an arm
that follows the baseline closely could otherwise be masked by the noise of other arms.

The null hypothesis is exchangeability: at each seed, the scores of the baseline and the set's arms could be swapped
without changing their joint distribution. The error rate therefore holds for any distribution of the scores, provided
that an arm without effect behaves like another run of the baseline. It is not a test of equal means: an arm whose
scores differ from the baseline's in spread or skewness may be found different although the means agree.
"""

import itertools
import math
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike, NDArray

from dxmi.errors import UserError

Array = NDArray[np.float64]

MOST_EXACT = 20
"""Largest number of seeds for which all 2^n sign vectors are enumerated."""
MOST_CLOSED = 12
"""Largest number of arms for closed testing, which tests all 2^k sets of arms; beyond, Holm's procedure is used."""
SIGN_FLIPS = 0.25
"""Share of a set's error rate that is used by the sign-flip tests of its arms (Bonferroni); permutations use the rest.
"""
PERMUTATIONS = 4_999
"""Number of random permutations, in addition to the observed one, where there are too many to enumerate."""
_MOST_LISTED = 25_000
_RANDOM_SIGNS = 50_000
_ROUNDING = 1e-12
"""Relative to the largest term: values that differ by less count as equal."""
_TIE = 1e-9
"""Relative difference up to which two statistics count as equal."""
_CHUNK = 500_000
"""Numbers per chunk of permutations, chosen to fit into a processor's cache."""


# ----------------------------------------------------------------------------
# One arm


def sign_flip_p(differences: ArrayLike, seed: int = 0) -> float:
    """The two-sided p-value of the paired sign-flip permutation test.

    If arm and baseline are exchangeable at each seed, every sign vector s in {-1, 1}^n is as likely as the observed
    one, and p is the fraction of them with |sum s_i d_i| >= |sum d_i|. Up to 20 seeds all are enumerated, so that p is
    exact and at least 2 / 2^n; beyond, 50,000 are drawn and p = (1 + number) / (1 + 50,000).

    The null hypothesis is that differences are symmetric about 0, not that their mean is 0: skewed differences with
    mean 0 are rejected too often (see tests/test_statistics.py).

    Args:
        differences: Paired differences [seeds].
        seed: Seed of the random sign vectors.

    Raises:
        UserError: fewer than two differences, or one that is not finite.
    """
    values = finite_vector(differences, "differences")
    sums = sign_flip_sums(values) if len(values) <= MOST_EXACT else _random_sums(values, seed)
    extreme = np.abs(sums) >= abs(values.sum()) - rounding(values)
    if len(values) <= MOST_EXACT:
        return float(extreme.mean())
    return float((1 + extreme.sum()) / (1 + _RANDOM_SIGNS))


def sign_flip_sums(differences: Array) -> Array:
    """Sums of the differences under all sign vectors whose first sign is +1; the other half are their negatives.

    Returns:
        Array [2^(seeds - 1)] in binary order of the signs; the first entry is the observed sum.
    """
    sums = differences[:1]
    for difference in differences[1:]:
        sums = np.stack([sums + difference, sums - difference], axis=-1).ravel()
    return sums


def smallest_sign_flip_p(differences: Array) -> float:
    """The smallest p-value that the sign-flip test can give for differences of these magnitudes.

    It is 2 / 2^n for n nonzero differences, since flipping the sign of 0 changes nothing.
    """
    counted = int((np.abs(differences) > rounding(differences)).sum())
    return min(1.0, 2.0 ** (1 - counted))


def _random_sums(differences: Array, seed: int) -> Array:
    signs = np.random.default_rng(seed).integers(0, 2, size=(_RANDOM_SIGNS, len(differences)), dtype=np.int8)
    sums: Array = (2.0 * signs - 1.0) @ differences
    return sums


def rounding(differences: Array) -> float:
    """Bound on the rounding error of a sum of the differences, used to treat sums that differ by less as equal."""
    return _ROUNDING * float(np.abs(differences).sum())


def holm(p_values: ArrayLike) -> Array:
    """Holm's adjusted p-values (1979): with p_(1) <= ... <= p_(k), the largest (k - j + 1) p_(j) so far, at most 1.

    Args:
        p_values: Unadjusted p-values [arms].

    Returns:
        Adjusted p-values [arms], in the order given. Arms with at most 5 % are significant at a family-wise error rate
        of 5 %.

    Raises:
        UserError: a p-value is not a number in [0, 1].
    """
    values = np.asarray(p_values, dtype=np.float64)
    if values.ndim != 1 or not ((values >= 0.0) & (values <= 1.0)).all():
        raise UserError(f"p-values are {values.tolist()}: each must be a number in [0, 1].")
    order = np.argsort(values, kind="stable")
    steps = values[order] * np.arange(len(values), 0, -1)
    adjusted = np.empty_like(values)
    adjusted[order] = np.minimum(np.maximum.accumulate(steps), 1.0)
    return adjusted


def finite_vector(values: ArrayLike, name: str) -> Array:
    """Convert values to an array [seeds] of at least two finite numbers.

    Raises:
        UserError: the values are not one-dimensional, fewer than two, or not all finite.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise UserError(f"{name.capitalize()} have shape {list(array.shape)}: give one number per seed.")
    if len(array) < 2:
        raise UserError(f"{len(array)} {name}: one seed shows no spread, so give at least two.")
    check_finite(array, name)
    return array


def check_finite(values: Array, name: str) -> None:
    """Check that all values are finite.

    Raises:
        UserError: a value is NaN or infinite.
    """
    if not np.isfinite(values).all():
        raise UserError(f"The {name} {values.tolist()} are not all finite: leave out the seeds that failed.")


# ----------------------------------------------------------------------------
# Several arms


@dataclass(frozen=True)
class InterimAnalysis:
    """One test of a sequential study: its number of seeds and its share of the error rate."""

    seeds: int
    share: float


def closed_p(baseline: ArrayLike, arms: ArrayLike, singles: ArrayLike, seed: int = 0) -> Array:
    """Adjusted p-values by closed testing over all sets of arms.

    The adjusted p of an arm is the largest p of all sets that contain it. The p of a single arm is given. A set of
    s > 1 arms has p = min(p_permuted / 0.75, s p_single / 0.25) with the smallest p_single of its arms. For p_permuted,
    labels are permuted within seeds; the statistic is the largest |difference from the baseline| over its standard
    error, both by least squares in the two-way layout (arms and seeds) of the set's permuted scores. Without missing
    scores these are mean differences over a pooled residual. All permutations are enumerated if there are at most
    25,000; otherwise 4,999 are drawn, and p_permuted = (1 + number) / (1 + 4,999).

    Missing scores (NaN) keep their position: only the scores that exist at a seed are permuted. An arm without any pair
    contributes nothing and is left out of the sets.

    Args:
        baseline: Scores of the baseline [seeds].
        arms: Scores [arms, seeds] of at most 12 arms.
        singles: Unadjusted p-values of the single arms [arms].
        seed: Seed of the permutations.

    Returns:
        Adjusted p-values [arms]. At a family-wise error rate of 5 %, arms with an adjusted p of at most .05 differ from
        the baseline.
    """
    scores = np.vstack([np.asarray(baseline, dtype=np.float64), np.asarray(arms, dtype=np.float64)])
    whole = (InterimAnalysis(scores.shape[1], 1.0),)
    return sequential_closed_p(scores, np.full(len(scores) - 1, scores.shape[1]), singles, whole, seed)


def sequential_closed_p(
    scores: Array, counts: ArrayLike, singles: ArrayLike, analyses: Sequence[InterimAnalysis], seed: int = 0
) -> Array:
    """Like `closed_p`, corrected for the interim analyses of a study whose arms may stop at different numbers of seeds.

    A set is tested at every analysis that all of its arms have reached, with the seeds up to that analysis. With p_j
    the p of analysis j and w_j its share, the statistic is m = min p_j / w_j, and the p of the set is P(m* <= m) over
    the same permutations plus m times the shares of the remaining analyses: see `tune.stats.sequential.sequential_p`.

    Args:
        scores: Scores [1 + arms, seeds], the baseline in the first row; NaN where a score is missing.
        counts: Number of seeds that each arm has been run with [arms].
        singles: p-values of the single arms, corrected for the interim analyses [arms].
        analyses: Interim analyses in ascending order of seeds.
        seed: Seed of the permutations.
    """
    table = np.ascontiguousarray(scores, dtype=np.float64)
    if len(table) - 1 > MOST_CLOSED:
        raise UserError(f"{len(table) - 1} arms: closed testing takes at most {MOST_CLOSED}.")
    given, alone = np.asarray(counts, dtype=np.int64), np.asarray(singles, dtype=np.float64)
    problem = _Problem(
        table.tobytes(), table.shape[1], tuple(given.tolist()), tuple(alone.tolist()), tuple(analyses), seed
    )
    return np.array(_closed(problem))


@dataclass(frozen=True)
class _Problem:
    """Hashable form of the arguments of `sequential_closed_p`, used as a cache key."""

    content: bytes
    seeds: int
    counts: tuple[int, ...]
    singles: tuple[float, ...]
    analyses: tuple[InterimAnalysis, ...]
    seed: int

    @property
    def scores(self) -> Array:
        return np.frombuffer(self.content, dtype=np.float64).reshape(-1, self.seeds)

    def usable(self) -> list[int]:
        """Indices of the arms with at least one pair, sorted by their scores at the first analysis.

        This order makes the p-value of a set independent of the arms' names and of later seeds.
        """
        scores = self.scores
        paired = ~np.isnan(scores[1:] + scores[0])
        first = np.nan_to_num(scores[1:, : self.analyses[0].seeds], nan=math.inf)
        arms = [arm for arm, count in enumerate(self.counts) if paired[arm, :count].any()]
        return sorted(arms, key=lambda arm: first[arm].tolist())


@lru_cache(maxsize=64)
def _closed(problem: _Problem) -> tuple[float, ...]:
    """Cached implementation of `sequential_closed_p`, so that redrawing a table does not recompute it."""
    adjusted, usable = np.array(problem.singles), problem.usable()
    for size in range(2, len(usable) + 1):
        sets = np.array(list(itertools.combinations(usable, size)))  # [sets, size]
        singles = size * np.array(problem.singles)[sets].min(axis=1) / SIGN_FLIPS
        p_values = np.minimum(1.0, np.minimum(_p_of_sets(problem, sets) / (1.0 - SIGN_FLIPS), singles))
        np.maximum.at(adjusted, sets.ravel(), np.repeat(p_values, size))
    return tuple(adjusted.tolist())


def _p_of_sets(problem: _Problem, sets: NDArray[np.int64]) -> Array:
    """Permutation p-values [sets] of sets of the same size, computed jointly for sets with the same missing scores."""
    p_values = np.ones(len(sets))
    scores = problem.scores
    groups: dict[tuple[bytes, int], list[int]] = {}
    for index, members in enumerate(sets):
        reached = min(problem.counts[arm] for arm in members)
        pattern = ~np.isnan(scores[np.r_[0, members + 1], :reached])
        groups.setdefault((pattern.tobytes(), reached), []).append(index)
    for (_, reached), indices in groups.items():
        taken = [analysis for analysis in problem.analyses if analysis.seeds <= reached]
        if taken:
            rows = np.hstack([np.zeros((len(indices), 1), dtype=np.int64), sets[indices] + 1])
            tables = scores[rows][:, :, : taken[-1].seeds]  # [sets, 1 + size, seeds]
            to_come = sum(analysis.share for analysis in problem.analyses if analysis.seeds > reached)
            p_values[indices] = _p_of_tables(tables, taken, to_come, problem.seed)
    return p_values


def _p_of_tables(tables: Array, analyses: Sequence[InterimAnalysis], to_come: float, seed: int) -> Array:
    """p-values [sets] of tables [sets, treatments, seeds] with the same missing scores, the baseline's row first."""
    present = ~np.isnan(tables[0]).T  # [seeds, treatments]
    present &= present[:, :1]  # a seed without the baseline's score contributes no comparison
    scores = _centered(tables.transpose(0, 2, 1), present)
    statistics = _statistics(scores, present, analyses, seed)  # [analyses, permutations, sets], the observed one first
    if len(analyses) == 1 and not to_come:
        return np.asarray((statistics[0] >= statistics[0, 0] * (1.0 - _TIE)).mean(axis=0), dtype=np.float64)
    smallest = np.full(statistics.shape[1:], math.inf)
    for analysis, values in zip(analyses, statistics, strict=True):
        smallest = np.minimum(smallest, _ranked_p(values) / analysis.share)
    seen = smallest[0]
    corrected = (smallest <= seen * (1.0 + _TIE)).mean(axis=0) + seen * to_come
    return np.asarray(np.minimum(1.0, corrected), dtype=np.float64)


def _centered(scores: Array, present: NDArray[np.bool_]) -> Array:
    """Center scores [sets, seeds, treatments] within seeds and scale each set to a maximum of 1; 0 where missing."""
    filled = np.where(present, scores, 0.0)
    means = filled.sum(axis=2, keepdims=True) / np.maximum(present.sum(axis=1), 1)[:, None]
    centered = np.where(present, filled - means, 0.0)
    largest = np.abs(centered).max(axis=(1, 2), keepdims=True)
    return np.asarray(centered / np.where(largest > _ROUNDING * np.abs(filled).max(), largest, math.inf))


def _ranked_p(values: Array) -> Array:
    """p-value of each permutation, per column: the fraction of permutations with a statistic at least as large."""
    p_values = np.empty_like(values)
    for column in range(values.shape[1]):
        own = values[:, column]
        p_values[:, column] = 1.0 - np.searchsorted(np.sort(own), own * (1.0 - _TIE), side="left") / len(own)
    return p_values


def _statistics(scores: Array, present: NDArray[np.bool_], analyses: Sequence[InterimAnalysis], seed: int) -> Array:
    """The largest squared standardized difference of each set, at each analysis and permutation.

    Args:
        scores: Scores [sets, seeds, treatments], centered within seeds, 0 where missing.
        present: Mask of the existing scores [seeds, treatments].
        analyses: Analyses at which to test.
        seed: Seed of the permutations.

    Returns:
        Array [analyses, permutations, sets]. If the residual is 0, a small lower bound replaces it.
    """
    layouts = [_layout(present[: analysis.seeds]) for analysis in analyses]
    bounds = [0, *(analysis.seeds for analysis in analyses)]
    squares = np.array(
        [(scores[:, : analysis.seeds] ** 2).sum(axis=(1, 2)) for analysis in analyses]
    )  # [analyses, sets]
    pieces = []
    for permutations in _permutations(present, len(scores), seed):
        totals = np.zeros((len(permutations), scores.shape[2], len(scores)))
        at_analyses = []
        for index, (start, stop) in enumerate(itertools.pairwise(bounds)):
            totals = totals + _totals(permutations[:, start:stop], scores[:, start:stop])
            at_analyses.append(layouts[index].statistic(totals, squares[index]))
        pieces.append(np.stack(at_analyses))
    return np.concatenate(pieces, axis=1)


def _totals(permutations: NDArray[np.intp], scores: Array) -> Array:
    """Total of each treatment under each permutation: [permutations, treatments, sets].

    Computed as the product of a 0-1 matrix with the scores, for all sets at once.
    """
    number, seeds, treatments = permutations.shape
    chosen = np.eye(treatments)[permutations.transpose(0, 2, 1)]  # [permutations, treatments, seeds, from treatment]
    flat = chosen.reshape(number * treatments, seeds * treatments)
    return np.asarray((flat @ scores.reshape(len(scores), -1).T).reshape(number, treatments, -1))


@dataclass(frozen=True)
class _Layout:
    """Intrablock analysis of a two-way layout with possibly missing scores.

    Attributes:
        seeds: Number of seeds if no score is missing, else 0.
        inverse: Pseudoinverse of the treatments' information matrix [treatments, treatments].
        variances: Variance of each arm's difference from the baseline, in units of the variance of a score [arms].
    """

    seeds: int
    inverse: Array
    variances: Array

    def statistic(self, totals: Array, squares: Array) -> Array:
        """The largest squared difference, divided by its variance and the residual [permutations, sets].

        Args:
            totals: Totals of the treatments, from scores centered within seeds [permutations, treatments, sets].
            squares: Sum of squares of the centered scores [sets], which is invariant under permutations.
        """
        if self.seeds:  # on totals, which sum to 0, the pseudoinverse is division by the number of seeds
            explained = np.einsum("pjs,pjs->ps", totals, totals) / self.seeds
            gaps = np.maximum(totals[:, 1:].max(axis=1) - totals[:, 0], totals[:, 0] - totals[:, 1:].min(axis=1))
            largest = gaps**2 / (2.0 * self.seeds)
        else:
            effects = np.matmul(self.inverse, totals)
            explained = np.einsum("pjs,pjs->ps", effects, totals)
            largest = ((effects[:, 1:] - effects[:, :1]) ** 2 / self.variances[:, None]).max(axis=1)
        floor = np.maximum(_TIE * squares, np.finfo(np.float64).tiny)
        return np.asarray(largest / np.maximum(squares - explained, floor))


def _layout(present: NDArray[np.bool_]) -> _Layout:
    counts = np.maximum(present.sum(axis=1, keepdims=True), 1)
    weights = present.astype(np.float64)
    inverse = np.linalg.pinv(np.diag(weights.sum(axis=0)) - weights.T @ (weights / counts), hermitian=True)
    variances = inverse[0, 0] + np.diag(inverse)[1:] - 2.0 * inverse[0, 1:]
    unseen = ~present[:, 1:].any(axis=0)
    complete = len(present) if present.all() else 0
    return _Layout(complete, inverse, np.where(unseen, math.inf, variances))


# ----------------------------------------------------------------------------
# Permutations within seeds


def _permutations(present: NDArray[np.bool_], sets: int, seed: int) -> Iterator[NDArray[np.intp]]:
    """Yield chunks [permutations, seeds, treatments] of permutations of each seed's scores, the identity first.

    All permutations are enumerated where that is feasible. The statistic is symmetric in the arms, so at one of the
    seeds it is enough to choose which score is assigned to the baseline.
    """
    seeds, treatments = present.shape
    number = treatments * math.factorial(treatments) ** (seeds - 1)
    size = max(1, _CHUNK // (treatments * max(sets, seeds * treatments)))
    if present.all() and number <= _MOST_LISTED:
        every = _listed(seeds, treatments)
        yield from (every[start : start + size] for start in range(0, len(every), size))
        return
    generator = np.random.default_rng([seed, seeds, treatments])
    order = np.argsort(np.where(present, 0.0, 2.0) + np.zeros((1, seeds, treatments)), axis=2, kind="stable")
    places = np.broadcast_to(np.argsort(order, axis=2), (1, seeds, treatments))
    yield np.broadcast_to(np.arange(treatments), (1, seeds, treatments))
    for start in range(0, PERMUTATIONS, size):
        keys = generator.random((min(size, PERMUTATIONS - start), seeds, treatments))
        shuffled = np.argsort(np.where(present, keys, 2.0), axis=2, kind="stable")
        yield np.take_along_axis(shuffled, np.broadcast_to(places, shuffled.shape), axis=2)


@lru_cache(maxsize=8)
def _listed(seeds: int, treatments: int) -> NDArray[np.intp]:
    """All permutations within seeds, except that at the first seed only swaps with the baseline are enumerated."""
    every = np.array(list(itertools.permutations(range(treatments))))
    first = np.tile(np.arange(treatments), (treatments, 1))
    first[np.arange(treatments), 0], first[np.arange(treatments), np.arange(treatments)] = np.arange(treatments), 0
    rest = np.array(list(itertools.product(range(len(every)), repeat=seeds - 1)), dtype=np.intp)
    listed = np.empty((treatments, len(rest), seeds, treatments), dtype=np.intp)
    listed[:, :, 0] = first[:, None]
    listed[:, :, 1:] = every[rest]
    return listed.reshape(-1, seeds, treatments)
