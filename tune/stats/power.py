"""Number of seeds for a study: the minimum at which a difference can be shown, and the number suggested by a pilot.

Power refers to the tests in `tune.stats.multiple_testing`, with normal differences of one arm while no other arm
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
"""Power for which `seeds_needed` computes the number of seeds."""
_SURE = 0.9
"""One-sided confidence of each end of the range of `seeds_needed`."""
_FINEST = 0.005
"""Smallest error rate for which 4,999 permutations are enough."""
_MOST_SEEDS = 1_000
"""Largest number of seeds that is considered; beyond, the result is infinity."""
_DRAWS = 4_000
_MOST_SUBSETS = 10
"""Largest number of seeds for which the power of the sign-flip test is computed; beyond, the t test's is used."""


class Correction(StrEnum):
    """Correction of p-values for several arms."""

    NONE = "sign flip"
    """No correction, for a single arm."""
    CLOSED = "closed"
    """Closed testing by permutation within seeds over all sets of arms."""
    HOLM = "Holm"
    """Holm's correction of the arms' sign-flip tests."""


def correction_of(arms: int, error_rate: float) -> Correction:
    """Choose closed testing for 2 to 12 arms, and Holm's procedure for more arms or error rates below .005.

    Raises:
        UserError: `arms` is less than 1.
    """
    if arms < 1:
        raise UserError(f"arms is {arms}: a study compares at least one arm with its baseline.")
    if arms == 1:
        return Correction.NONE
    return Correction.CLOSED if arms <= MOST_CLOSED and error_rate >= _FINEST else Correction.HOLM


@dataclass(frozen=True)
class SeedRange:
    """Range of the number of seeds that would show a difference; `str` gives text like `9 to 30 seeds`.

    Attributes:
        low: Number for the largest true difference that is consistent with the pilot.
        high: Number for the smallest one; infinity if a difference of 0 is consistent with the pilot.
    """

    low: float
    high: float

    def __str__(self) -> str:
        return f"{self.numbers} seeds"

    @property
    def numbers(self) -> str:
        """The range as text: `9 to 30`, `6`, `at least 9` or `no number of`."""
        if math.isinf(self.low):
            return "no number of"
        if math.isinf(self.high):
            return f"at least {self.low:.0f}"
        return f"{self.low:.0f} to {self.high:.0f}" if self.low < self.high else f"{self.low:.0f}"


def seeds_to_test(arms: int, error_rate: float) -> int:
    """The smallest number of seeds at which the tests can find an arm different from the baseline.

    The smallest p of the sign-flip test with n seeds is 2 / 2^n. Closed testing compares it with the error rate, since
    sets of several arms have far more permutations: 6 seeds for up to 12 arms. Holm's first step compares it with
    error_rate / arms.
    """
    share = arms if correction_of(arms, error_rate) is Correction.HOLM else 1
    return math.ceil(
        1.0 + math.log2(share / error_rate) - 1e-9
    )  # the tolerance keeps rounding from adding one in case of equality


def seeds_needed(differences: ArrayLike, arms: int, error_rate: float) -> SeedRange:
    """Number of seeds that would show a difference like the observed one with a power of 80 %.

    A few seeds determine the standardized difference (mean over standard deviation) only roughly. Its exact confidence
    interval for normal differences (from the noncentral t distribution) is taken with 10 % in each tail; the range goes
    from the number of seeds for its upper end to that for its lower end.

    By simulation (tests/test_power.py), a new study with the upper number of seeds finds true differences of at least
    0.8 standard deviations in 86 to 100 % of cases after pilots of 3 to 9 seeds, and one with the lower number finds
    differences below 2 standard deviations in 40 to 70 % of cases. For a true difference of 0.5, most pilots of 3 seeds
    have an infinite upper number; those with a finite one overestimate the difference, and the power is 66 %.

    Args:
        differences: Differences from the baseline [seeds].
        arms: Number of arms that are compared with the baseline.
        error_rate: Family-wise rate of false verdicts.

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

    Solving for the effect, the ends of its confidence interval are quantiles over the draws.
    """
    generator = np.random.default_rng(seeds)
    normal = generator.standard_normal(5 * _DRAWS)
    return normal, np.sqrt(generator.chisquare(seeds - 1, 5 * _DRAWS) / (seeds - 1))


def _seeds_for(effect: float, arms: int, error_rate: float) -> float:
    """The smallest number of seeds that shows a standardized difference; infinity beyond 1,000."""
    if effect <= smallest_effect(_MOST_SEEDS, arms, error_rate):
        return math.inf
    low, high = seeds_to_test(arms, error_rate), _MOST_SEEDS
    while low < high:
        middle = (low + high) // 2
        low, high = (low, middle) if smallest_effect(middle, arms, error_rate) <= effect else (middle + 1, high)
    return float(high)


@lru_cache(maxsize=4096)
def smallest_effect(seeds: int, arms: int, error_rate: float) -> float:
    """The standardized difference of one arm that is detected with a power of 80 % while no other arm differs.

    It is a quantile, over 4,000 draws of normal noise, of the smallest difference at which every set that contains the
    arm is rejected. Sets of s > 1 arms are approximated by Student's t with Bonferroni's correction for s comparisons
    and the degrees of freedom of their pooled residual.
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
    """For each draw, the smallest difference that is significant by Student's t, over the residual of `size` arms."""
    bar = t_bar(seeds, size, error_rate)
    return np.asarray(bar * np.sqrt(squares / (size * (seeds - 1)) / seeds) - means)


def _sign_flip_threshold(noise: Array, error_rate: float) -> Array:
    """For each draw of noise [draws, seeds], the smallest difference at which the sign-flip test is significant.

    Flipping the signs of a subset with a negative mean makes the sum larger. If K of the 2^(n-1) sign vectors, the
    observed one included, may reach the observed sum, then fewer than K subsets may have a negative mean.
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
    """The threshold for a mean difference, in standard errors, that makes every test of an arm significant."""
    if correction_of(arms, error_rate) is Correction.HOLM:
        return t_bar(seeds, 1, error_rate / arms)
    return max(t_bar(seeds, size, error_rate) for size in range(1, arms + 1))
