"""Paired permutation tests of several arms against one baseline, with one error rate for all arms together.

The test of a single arm is the sign-flip test of its differences to the baseline. Several arms are tested by closed
testing (Marcus, Peritz and Gabriel 1976): an arm differs if every set of arms that contains it is rejected, each set by
its own test at the full error rate. The test of a set permutes *all* labels, the baseline's and the arms', within each
seed, and compares the largest standardized difference between an arm and the baseline. A quarter of the set's error
rate is left to the sign flips of its arms: the residual is pooled over the set, and an arm that follows the baseline
closely would be lost in the noise of others.

What is tested is exchangeability: under the hypothesis of a set, the scores that the baseline and the set's arms have
at a seed could be swapped without changing their distribution. So the error rate holds, for any distribution of the
scores, if an arm that does nothing behaves like another run of the baseline. It is not a test of equal means: an arm
whose scores are spread or skewed differently from the baseline's may be found different although the means agree.
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
"""Seeds up to which all of the 2^n sign vectors are listed."""
MOST_CLOSED = 12
"""Arms up to which all of the 2^k sets of arms are tested; more are left to Holm's procedure."""
SIGN_FLIPS = 0.25
"""Share of a set's error rate that its arms' sign flips have, by Bonferroni; the permutations have the rest."""
PERMUTATIONS = 4_999
"""Drawn at random for a set of at least two arms, beside the one observed, where there are too many to list."""
_MOST_LISTED = 25_000
_RANDOM_SIGNS = 50_000
_ROUNDING = 1e-12
"""Relative to the largest term: what differs by less is equal."""
_TIE = 1e-9
"""Relative difference up to which two statistics are equal."""
_CHUNK = 500_000
"""Numbers in one piece of the work: few enough for a processor's cache."""


# ----------------------------------------------------------------------------
# One arm


def sign_flip_p(differences: ArrayLike, seed: int = 0) -> float:
    """The p-value of the paired sign-flip permutation test, two-sided.

    If arm and baseline are exchangeable at each seed, every sign vector s in {-1, 1}^n is as likely as the one seen:
    p is the share of them with |sum s_i d_i| >= |sum d_i|. All are listed up to 20 seeds, so p is exact and never
    below 2 / 2^n; beyond, 50,000 are drawn and p = (1 + number) / (1 + 50,000).

    The hypothesis is that differences are symmetric about 0, not that their mean is 0: skewed differences of mean 0
    are rejected too often (see tests/test_statistics.py).

    Args:
        differences: [seeds].
        seed: of the signs that are drawn.

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
    """The sums under all sign vectors with the first sign up, which are half of them: the others' are their negatives.

    Returns:
        [2^(seeds - 1)], in binary order of the signs; the first is the plain sum.
    """
    sums = differences[:1]
    for difference in differences[1:]:
        sums = np.stack([sums + difference, sums - difference], axis=-1).ravel()
    return sums


def smallest_sign_flip_p(differences: Array) -> float:
    """The smallest p that the sign-flip test has for differences of these sizes, whatever their signs.

    A difference of 0 has no sign, so only the others count: 2 / 2^n for n of them.
    """
    counted = int((np.abs(differences) > rounding(differences)).sum())
    return min(1.0, 2.0 ** (1 - counted))


def _random_sums(differences: Array, seed: int) -> Array:
    signs = np.random.default_rng(seed).integers(0, 2, size=(_RANDOM_SIGNS, len(differences)), dtype=np.int8)
    sums: Array = (2.0 * signs - 1.0) @ differences
    return sums


def rounding(differences: Array) -> float:
    """How far two sums of the same terms may differ by rounding: equal sums have to count as equal."""
    return _ROUNDING * float(np.abs(differences).sum())


def holm(p_values: ArrayLike) -> Array:
    """Holm's adjusted p-values (1979): with p_(1) <= ... <= p_(k), the largest (k - j + 1) p_(j) so far, at most 1.

    Args:
        p_values: [arms].

    Returns:
        [arms], in the order given. An arm at or under 5 % is significant, with 5 % for all arms together.

    Raises:
        UserError: a p-value is no number in [0, 1].
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
    """Values as an array [seeds], at least two, all finite.

    Raises:
        UserError: they are not.
    """
    array = np.asarray(values, dtype=np.float64)
    if array.ndim != 1:
        raise UserError(f"{name.capitalize()} have shape {list(array.shape)}: give one number a seed.")
    if len(array) < 2:
        raise UserError(f"{len(array)} {name}: one seed shows no spread, so give at least two.")
    check_finite(array, name)
    return array


def check_finite(values: Array, name: str) -> None:
    """Raise a UserError unless all values are finite."""
    if not np.isfinite(values).all():
        raise UserError(f"The {name} {values.tolist()} are not all finite: leave out the seeds that failed.")


# ----------------------------------------------------------------------------
# Several arms


@dataclass(frozen=True)
class InterimAnalysis:
    """One test of a sequential study: at how many seeds, and which share of the error rate it may use."""

    seeds: int
    share: float


def closed_p(baseline: ArrayLike, arms: ArrayLike, singles: ArrayLike, seed: int = 0) -> Array:
    """Adjusted p-values by closed testing over all sets of arms.

    The adjusted p of an arm is the largest p of all sets that contain it. The p of {arm} alone is given. A set of s > 1
    arms has p = min(p_permuted / 0.75, s p_single / 0.25) with the smallest p_single of its arms. For p_permuted,
    labels are permuted within seeds; the statistic is the largest |difference to the baseline| over its standard error,
    both by least squares from the two-way layout (arms and seeds) of the permuted scores of the set, so that the
    residual is that of the set. Without missing scores these are mean differences over a pooled residual. All
    permutations are listed if there are at most 25,000; otherwise 4,999 are drawn, and
    p_permuted = (1 + number) / (1 + 4,999).

    Missing scores (NaN) keep their place: only the scores that a seed has are permuted. An arm without any pair adds
    nothing to a set and is left out of the others' sets.

    Args:
        baseline: scores [seeds].
        arms: scores [arms, seeds], at most 12 arms.
        singles: the p-value of each arm alone [arms].
        seed: of the permutations.

    Returns:
        [arms]. An arm at or under 5 % is significant, with 5 % for all arms together.
    """
    scores = np.vstack([np.asarray(baseline, dtype=np.float64), np.asarray(arms, dtype=np.float64)])
    whole = (InterimAnalysis(scores.shape[1], 1.0),)
    return sequential_closed_p(scores, np.full(len(scores) - 1, scores.shape[1]), singles, whole, seed)


def sequential_closed_p(
    scores: Array, counts: ArrayLike, singles: ArrayLike, analyses: Sequence[InterimAnalysis], seed: int = 0
) -> Array:
    """As `closed_p`, corrected for the analyses of a study whose arms may stop at different numbers of seeds.

    A set is tested at the analyses that all of its arms have reached, with the seeds up to there. With p_j the p of
    analysis j and w_j its share, the statistic is m = min p_j / w_j, and the p of the set is P(m* <= m) over the same
    permutations plus m times the shares of the analyses to come: see `tune.stats.sequential.sequential_p`.

    Args:
        scores: [1 + arms, seeds], the baseline's first; NaN where there is none.
        counts: the seeds that each arm has been given [arms].
        singles: the p-value of each arm alone, corrected for analyses [arms].
        analyses: in rising order.
        seed: of the permutations.
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
    """The arguments of `sequential_closed_p` by content."""

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
        """The arms with at least one pair, in the order of what they have scored at the first analysis.

        So neither the arms' names nor later seeds change the p-value of a set.
        """
        scores = self.scores
        paired = ~np.isnan(scores[1:] + scores[0])
        first = np.nan_to_num(scores[1:, : self.analyses[0].seeds], nan=math.inf)
        arms = [arm for arm, count in enumerate(self.counts) if paired[arm, :count].any()]
        return sorted(arms, key=lambda arm: first[arm].tolist())


@lru_cache(maxsize=64)
def _closed(problem: _Problem) -> tuple[float, ...]:
    """`sequential_closed_p`, remembered, so that redrawing a table computes nothing again."""
    adjusted, usable = np.array(problem.singles), problem.usable()
    for size in range(2, len(usable) + 1):
        sets = np.array(list(itertools.combinations(usable, size)))  # [sets, size]
        singles = size * np.array(problem.singles)[sets].min(axis=1) / SIGN_FLIPS
        p_values = np.minimum(1.0, np.minimum(_p_of_sets(problem, sets) / (1.0 - SIGN_FLIPS), singles))
        np.maximum.at(adjusted, sets.ravel(), np.repeat(p_values, size))
    return tuple(adjusted.tolist())


def _p_of_sets(problem: _Problem, sets: NDArray[np.int64]) -> Array:
    """The permutation p-values of sets of one size [sets], those with the same pattern of scores together."""
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
    """The p-values of [sets, treatments, seeds] that lack the same scores, the baseline's row first [sets]."""
    present = ~np.isnan(tables[0]).T  # [seeds, treatments]
    present &= present[:, :1]  # without the baseline's score a seed compares nothing with it
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
    """Scores [sets, seeds, treatments] minus their seed's mean, 0 where there is none, the largest of a set 1."""
    filled = np.where(present, scores, 0.0)
    means = filled.sum(axis=2, keepdims=True) / np.maximum(present.sum(axis=1), 1)[:, None]
    centered = np.where(present, filled - means, 0.0)
    largest = np.abs(centered).max(axis=(1, 2), keepdims=True)
    return np.asarray(centered / np.where(largest > _ROUNDING * np.abs(filled).max(), largest, math.inf))


def _ranked_p(values: Array) -> Array:
    """The p of every permutation among all of them, column by column: the share with a statistic at least as large."""
    p_values = np.empty_like(values)
    for column in range(values.shape[1]):
        own = values[:, column]
        p_values[:, column] = 1.0 - np.searchsorted(np.sort(own), own * (1.0 - _TIE), side="left") / len(own)
    return p_values


def _statistics(scores: Array, present: NDArray[np.bool_], analyses: Sequence[InterimAnalysis], seed: int) -> Array:
    """The largest squared standardized difference, at each analysis and permutation, of each set.

    Args:
        scores: [sets, seeds, treatments], centered within seeds, 0 where missing.
        present: where there is a score [seeds, treatments].
        analyses: those to test at.
        seed: of the permutations.

    Returns:
        [analyses, permutations, sets]; without a residual, the sum of squares that the difference explains counts.
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
    """Each treatment's total under each permutation: [permutations, treatments, sets].

    As a product of a matrix of 0 and 1 with the scores, which serves all sets at once.
    """
    number, seeds, treatments = permutations.shape
    chosen = np.eye(treatments)[permutations.transpose(0, 2, 1)]  # [permutations, treatments, seeds, from treatment]
    flat = chosen.reshape(number * treatments, seeds * treatments)
    return np.asarray((flat @ scores.reshape(len(scores), -1).T).reshape(number, treatments, -1))


@dataclass(frozen=True)
class _Layout:
    """The intrablock analysis of a two-way layout in which scores may be missing.

    Attributes:
        seeds: with every score, or 0 if any lacks one.
        inverse: the pseudoinverse of the treatments' information matrix [treatments, treatments].
        variances: of each arm's difference to the baseline, in those of a score [arms].
    """

    seeds: int
    inverse: Array
    variances: Array

    def statistic(self, totals: Array, squares: Array) -> Array:
        """The largest squared difference over its variance and the residual [permutations, sets].

        Args:
            totals: of each treatment, of scores centered within seeds [permutations, treatments, sets].
            squares: their sum of squares [sets], which no permutation changes.
        """
        if self.seeds:  # the inverse is 1 / seeds on totals, which sum to 0
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
    """Permutations [some, seeds, treatments] of the scores that each seed has, the identity first, in pieces.

    Every one is listed where that is feasible. Arms are alike to the statistic, so at one seed it matters only which
    score becomes the baseline's.
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
    """All permutations within seeds, but at the first seed only which treatment changes places with the baseline."""
    every = np.array(list(itertools.permutations(range(treatments))))
    first = np.tile(np.arange(treatments), (treatments, 1))
    first[np.arange(treatments), 0], first[np.arange(treatments), np.arange(treatments)] = np.arange(treatments), 0
    rest = np.array(list(itertools.product(range(len(every)), repeat=seeds - 1)), dtype=np.intp)
    listed = np.empty((treatments, len(rest), seeds, treatments), dtype=np.intp)
    listed[:, :, 0] = first[:, None]
    listed[:, :, 1:] = every[rest]
    return listed.reshape(-1, seeds, treatments)
