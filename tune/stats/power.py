"""How many seeds a study takes: the fewest that can show anything, and how many a pilot suggests.

Power is that of the tests in `tune.stats.multiple_testing`, for normal differences of one arm while no other arm
differs, which is the hardest case.
"""

import math
from dataclasses import dataclass
from enum import StrEnum
from functools import lru_cache

import numpy as np
from numpy.typing import ArrayLike

from dxmi.errors import UserError
from tune.stats.multiple_testing import MOST_CLOSED, SIGN_FLIPS, Array, finite_vector, rounding

POWER = 0.8
"""Chance of a verdict that `seeds_needed` asks for."""
_SURE = 0.9
"""Chance with which either end of the range of `seeds_needed` is right."""
_FINEST = 0.005
"""Error rate below which 4,999 permutations are too few to decide."""
_MOST_SEEDS = 1_000
"""More than these are as good as no number."""
_DRAWS = 4_000
_MOST_SUBSETS = 10
"""Seeds up to which the sign-flip test's own power is computed; beyond, it is the t test's."""


class Correction(StrEnum):
    """How p-values allow for several arms."""

    NONE = "sign flip"
    """One arm needs no correction."""
    CLOSED = "closed"
    """Permutation within seeds, closed over all sets of arms."""
    HOLM = "Holm"
    """Holm's correction of the arms' sign-flip tests."""


def correction_of(arms: int, error_rate: float) -> Correction:
    """Closed testing for 2 to 12 arms; Holm's procedure for more arms, or error rates below .005.

    Raises:
        UserError: there is no arm.
    """
    if arms < 1:
        raise UserError(f"arms is {arms}: a study compares at least one arm with its baseline.")
    if arms == 1:
        return Correction.NONE
    return Correction.CLOSED if arms <= MOST_CLOSED and error_rate >= _FINEST else Correction.HOLM


@dataclass(frozen=True)
class SeedRange:
    """From how many seeds to how many would show a difference; `str` says it, as in `9 to 30 seeds`.

    Attributes:
        low: if the true difference is as large as the pilot allows.
        high: if it is as small as the pilot allows; infinity if that may be no difference.
    """

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.numbers} seeds"

    @property
    def numbers(self) -> str:
        """`9 to 30`, `6`, `at least 9` or `no number of`."""
        if math.isinf(self.low):
            return "no number of"
        if math.isinf(self.high):
            return f"at least {self.low:.0f}"
        return f"{self.low:.0f} to {self.high:.0f}" if self.low < self.high else f"{self.low:.0f}"


def seeds_to_test(arms: int, error_rate: float) -> int:
    """The fewest seeds with which the tests can find an arm different from the baseline.

    The smallest p of the sign-flip test with n seeds is 2 / 2^n. Closed testing compares that with the error rate,
    since its sets of several arms have far more permutations: 6 seeds for up to 12 arms. Holm's first step compares it
    with error_rate / arms.
    """
    share = arms if correction_of(arms, error_rate) is Correction.HOLM else 1
    return math.ceil(1.0 + math.log2(share / error_rate) - 1e-9)  # rounding must not add one where the two are equal


def seeds_needed(differences: ArrayLike, arms: int, error_rate: float) -> SeedRange:
    """How many seeds would show a difference like the one seen, 4 times out of 5.

    A few seeds determine the standardized difference (mean over standard deviation) only roughly. Its exact confidence
    interval for normal differences (from the noncentral t distribution) is taken with 10 % on either side, and the
    range is from the seeds that its upper end needs to those that its lower end needs, each for a power of 80 %.

    By simulation (tests/test_power.py), a new study with the upper number of seeds finds true differences of 0.8
    standard deviations or more in 86 to 100 % of cases after pilots of 3 to 9 seeds, one with the lower number in 40 to
    70 % of cases below 2 standard deviations. Pilots of 3 seeds that happen to have an upper end for a true difference
    of 0.5 exaggerate it: 66 %. Most of those have none.

    Args:
        differences: to the baseline [seeds].
        arms: how many are compared with the baseline.
        error_rate: of false verdicts, of all arms together.

    Raises:
        UserError: fewer than two differences, or one that is not finite.
    """
    values = finite_vector(differences, "differences")
    mean, spread, seeds = abs(float(values.mean())), float(values.std(ddof=1)), len(values)
    if spread <= rounding(values):
        enough = float(seeds_to_test(arms, error_rate)) if mean > rounding(values) else math.inf
        return SeedRange(enough, enough)
    normal, chi = _pivots(seeds)
    effects = (mean / spread) * chi - normal / math.sqrt(seeds)
    low, high = np.quantile(effects, [1.0 - _SURE, _SURE]).tolist()
    return SeedRange(_seeds_for(high, arms, error_rate), _seeds_for(low, arms, error_rate))


@lru_cache(maxsize=32)
def _pivots(seeds: int) -> tuple[Array, Array]:
    """Draws of Z and sqrt(V / (n - 1)), where sqrt(n) mean / s = (Z + sqrt(n) effect) / sqrt(V / (n - 1)).

    Solved for the effect, quantiles over the draws are the ends of its confidence interval.
    """
    generator = np.random.default_rng(seeds)
    normal = generator.standard_normal(5 * _DRAWS)
    return normal, np.sqrt(generator.chisquare(seeds - 1, 5 * _DRAWS) / (seeds - 1))


def _seeds_for(effect: float, arms: int, error_rate: float) -> float:
    """The fewest seeds that show a standardized difference; infinity beyond 1,000."""
    if effect <= smallest_effect(_MOST_SEEDS, arms, error_rate):
        return math.inf
    low, high = seeds_to_test(arms, error_rate), _MOST_SEEDS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if smallest_effect(middle, arms, error_rate) <= effect else (middle + 1, high)
    return float(high)


@lru_cache(maxsize=4096)
def smallest_effect(seeds: int, arms: int, error_rate: float) -> float:
    """The standardized difference of one arm that is found 4 times out of 5, while no other arm differs.

    For each of 4,000 draws of normal noise it is the difference from which on every set with the arm is rejected. Sets
    of s > 1 arms are taken to have Student's t for s comparisons by Bonferroni, with the degrees of freedom of their
    pooled residual.
    """
    if seeds < seeds_to_test(arms, error_rate):
        return math.inf
    generator = np.random.default_rng([seeds, arms])
    noise = generator.standard_normal((_DRAWS, min(seeds, _MOST_SUBSETS + 1)))
    if seeds <= _MOST_SUBSETS:
        means, squares = noise.mean(axis=1), noise.var(axis=1) * seeds
    else:
        means, squares = noise[:, 0] / math.sqrt(seeds), generator.chisquare(seeds - 1, _DRAWS)
    is_holm = correction_of(arms, error_rate) is Correction.HOLM
    single = error_rate / arms if is_holm else error_rate
    if seeds <= _MOST_SUBSETS:
        found = _sign_flip_threshold(noise, single)
    else:
        found = _t_threshold(means, squares, seeds, 1, single)
    for size in range(2, 1 if is_holm else arms + 1):
        squares = squares + generator.chisquare(seeds - 1, _DRAWS)
        found = np.maximum(found, _t_threshold(means, squares, seeds, size, error_rate))
    return float(np.quantile(found, POWER))


def _t_threshold(means: Array, squares: Array, seeds: int, size: int, error_rate: float) -> Array:
    """The difference from which on |mean| passes Student's t over the residual of `size` arms, for each draw."""
    bar = t_bar(seeds, size, error_rate)
    return np.asarray(bar * np.sqrt(squares / (size * (seeds - 1)) / seeds) - means)


def _sign_flip_threshold(noise: Array, error_rate: float) -> Array:
    """The difference from which on the sign-flip test is significant, for each draw [draws, seeds].

    Flipping the signs of a subset makes the sum no smaller where the subset's mean is negative. So with K sign vectors
    of 2^(n-1) allowed, the one observed among them, fewer than K subsets may have a mean below 0.
    """
    seeds = noise.shape[1]
    allowed = math.floor(error_rate * 2.0 ** (seeds - 1) + 1e-9)
    subsets = (np.arange(1, 2**seeds)[:, None] >> np.arange(seeds)) & 1
    means = noise @ (subsets / subsets.sum(axis=1, keepdims=True)).T  # [draws, subsets]
    return np.asarray(-np.partition(means, allowed - 1, axis=1)[:, allowed - 1])


def t_bar(seeds: int, size: int, error_rate: float) -> float:
    """Student's two-sided quantile for the largest of `size` differences, pooled over their residual."""
    share = 1.0 if size == 1 else 1.0 - SIGN_FLIPS
    from scipy.stats import t as student  # noqa: PLC0415  (it takes a second)

    return float(student.isf(share * error_rate / size / 2.0, size * (seeds - 1)))


def hardest_bar(seeds: int, arms: int, error_rate: float) -> float:
    """What a mean difference must exceed, in its standard errors, for every test that decides about an arm."""
    if correction_of(arms, error_rate) is Correction.HOLM:
        return t_bar(seeds, 1, error_rate / arms)
    return max(t_bar(seeds, size, error_rate) for size in range(1, arms + 1))
