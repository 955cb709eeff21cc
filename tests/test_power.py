"""How many seeds: closed forms, the noncentral t, and what following the advice comes to."""

import math

import numpy as np
import pytest
from scipy import stats

from dxmi.errors import UserError
from support import stating
from tune.stats.multiple_testing import sign_flip_p
from tune.stats.power import (
    Correction,
    SeedRange,
    correction_of,
    hardest_bar,
    seeds_needed,
    seeds_to_test,
    smallest_effect,
)


@pytest.mark.parametrize(("arms", "seeds"), [(1, 6), (2, 6), (9, 6), (12, 6), (13, 10), (30, 11)])
def test_the_fewest_seeds_are_those_with_which_the_hardest_step_can_be_passed(arms, seeds):
    """Closed testing asks the arm's own sign flips for .05, Holm for .05 / arms."""
    factor = arms if arms > 12 else 1
    assert seeds_to_test(arms, 0.05) == seeds
    assert factor * sign_flip_p(np.ones(seeds)) <= 0.05 < factor * sign_flip_p(np.ones(seeds - 1))


def test_the_fewest_seeds_are_exact_where_the_smallest_p_is_the_level():
    assert seeds_to_test(1, 2.0 / 2.0**5) == 5
    assert seeds_to_test(16, 16.0 * 2.0 / 2.0**9) == 9


def test_the_correction_follows_from_the_number_of_arms_and_the_error_rate():
    assert correction_of(1, 0.05) is Correction.NONE
    assert correction_of(2, 0.05) is correction_of(12, 0.005) is Correction.CLOSED
    assert correction_of(13, 0.05) is correction_of(2, 0.001) is Correction.HOLM
    with pytest.raises(UserError, match="arms is 0"):
        correction_of(0, 0.05)


@pytest.mark.parametrize("seeds", [6, 7])
def test_the_smallest_effect_of_few_seeds_is_in_closed_form(seeds):
    """With 6 seeds all signs must agree; with 7 at level 2 / 2^7 too: Phi(effect)^n = 0.8."""
    expected = stats.norm.ppf(0.8 ** (1.0 / seeds))
    assert smallest_effect(seeds, 1, 2.0 / 2.0**seeds) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize("seeds", [11, 20, 100])
def test_the_smallest_effect_of_many_seeds_is_the_noncentral_ts(seeds):
    effect, bar = smallest_effect(seeds, 1, 0.05), stats.t.isf(0.025, seeds - 1)
    assert stats.nct.sf(bar, seeds - 1, effect * math.sqrt(seeds)) == pytest.approx(0.8, abs=0.03)


def test_more_seeds_show_less_and_more_arms_take_more():
    effects = [smallest_effect(seeds, 3, 0.05) for seeds in (5, 6, 7, 8, 10, 12, 20, 40)]
    assert effects[0] == math.inf
    assert effects == sorted(effects, reverse=True)
    by_arms = [smallest_effect(12, arms, 0.05) for arms in (1, 3, 9, 12, 13)]
    assert by_arms == sorted(by_arms)
    assert hardest_bar(12, 9, 0.05) == pytest.approx(stats.t.isf(0.75 * 0.025 / 9, 99), rel=1e-12)
    assert hardest_bar(12, 13, 0.05) == pytest.approx(stats.t.isf(0.025 / 13, 11), rel=1e-12)


@pytest.mark.parametrize("seeds", [3, 6, 12])
def test_the_range_is_what_the_noncentral_ts_interval_of_the_effect_allows(seeds):
    """At the ends of the range, seeds enough for an effect within 2 % of SciPy's 80 % interval."""
    differences = np.arange(seeds) / seeds + 1.0
    found = seeds_needed(differences, 1, 0.05)
    t = math.sqrt(seeds) * differences.mean() / differences.std(ddof=1)
    for end, share in ((found.low, 0.1), (found.high, 0.9)):
        low, high = 0.0, 100.0
        for _ in range(60):
            middle = (low + high) / 2.0
            low, high = (middle, high) if stats.nct.cdf(t, seeds - 1, middle) > share else (low, middle)
        effect = low / math.sqrt(seeds)
        assert smallest_effect(int(end), 1, 0.05) <= 1.03 * effect
        assert end == 6 or smallest_effect(int(end) - 1, 1, 0.05) >= 0.97 * effect


def test_a_range_in_words():
    assert str(SeedRange(9, 30)) == "9 to 30 seeds"
    assert str(SeedRange(6, 6)) == "6 seeds"
    assert str(SeedRange(9, math.inf)) == "at least 9 seeds"
    assert str(SeedRange(math.inf, math.inf)) == "no number of seeds"
    assert SeedRange(9, 30).numbers == "9 to 30"


def test_ranges_of_differences_without_spread_or_without_a_difference():
    assert seeds_needed([1.0, 1.0, 1.0], 3, 0.05) == SeedRange(6, 6)
    assert seeds_needed([0.0, 0.0, 0.0], 3, 0.05) == SeedRange(math.inf, math.inf)
    assert seeds_needed([1.0, -1.0, 0.0], 1, 0.05).high == math.inf
    with pytest.raises(UserError, match=stating("at least two")):
        seeds_needed([1.0], 1, 0.05)


def followed(effect: float, pilot: int, end: str, studies: int) -> tuple[float, float]:
    """Pilots of one arm, and new studies with as many seeds as an end of the range says.

    Returns:
        The share of pilots with a finite number, and the share of these whose study finds the difference.
    """
    rng = np.random.default_rng(pilot)
    found = []
    for _ in range(studies):
        seeds = getattr(seeds_needed(rng.normal(effect, 1.0, pilot), 1, 0.05), end)
        if math.isfinite(seeds):
            draws = rng.normal(effect, 1.0, int(seeds))
            found.append(sign_flip_p(draws) <= 0.05 if seeds <= 12 else stats.ttest_1samp(draws, 0.0).pvalue <= 0.05)
    return len(found) / studies, float(np.mean(found))


def test_the_upper_end_of_the_range_is_enough():
    _, success = followed(1.5, 6, "high", studies=100)
    assert success >= 0.8


@pytest.mark.slow
@pytest.mark.parametrize("effect", [0.8, 1.0, 1.5, 2.0, 3.0])
@pytest.mark.parametrize("pilot", [3, 5, 6])
def test_following_the_upper_end_succeeds_in_at_least_80_percent(effect, pilot):
    _, success = followed(effect, pilot, "high", studies=1_000)
    assert success >= 0.8
