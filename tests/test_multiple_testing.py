"""Permutation tests of several arms: against SciPy, enumeration by definition, and how often they are wrong."""

import itertools
import math

import numpy as np
import pytest
from scipy import stats

from dxmi.errors import UserError
from tune.stats import multiple_testing
from tune.stats.multiple_testing import (
    InterimAnalysis,
    closed_p,
    holm,
    sequential_closed_p,
    sign_flip_p,
    smallest_sign_flip_p,
)
from tune.stats.power import smallest_effect

NAN = math.nan


def normal(*shape: int, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(size=shape)


# ----------------------------------------------------------------------------
# One arm, and Holm


@pytest.mark.parametrize("seeds", [2, 3, 6, 10])
@pytest.mark.parametrize("tied", [False, True])
def test_the_sign_flip_test_is_scipys_exact_permutation_test(seeds, tied):
    for seed in range(5):
        differences = 0.5 + normal(seeds, seed=seed)
        differences = np.round(differences) if tied else differences
        expected = stats.permutation_test(
            (differences,), np.mean, permutation_type="samples", vectorized=True, n_resamples=np.inf
        ).pvalue
        assert sign_flip_p(differences) == expected


@pytest.mark.parametrize("seeds", [2, 3, 5, 6, 16, 20])
def test_differences_of_one_sign_have_the_smallest_p_that_there_is(seeds):
    assert sign_flip_p(0.1 + 0.01 * np.arange(seeds)) == 2.0 / 2.0**seeds


def test_sums_that_differ_by_rounding_alone_are_equal():
    """0.1 + 0.2 - 0.3 is 6e-17: its sign vector and its negative are no more extreme than the others that sum to 0."""
    assert sign_flip_p([0.1, 0.2, -0.3]) == 1.0
    assert sign_flip_p([0.0, 0.0, 0.0]) == 1.0


@pytest.mark.parametrize(("ups", "seeds"), [(12, 16), (15, 20), (18, 24), (20, 30)])
def test_differences_of_one_size_have_the_sign_tests_p(ups, seeds):
    """Exact up to 20 seeds; beyond, 50,000 random sign vectors, whose p is within 4 standard errors."""
    expected = stats.binomtest(ups, seeds).pvalue
    p = sign_flip_p([1.0] * ups + [-1.0] * (seeds - ups))
    error = 0.0 if seeds <= 20 else 4.0 * math.sqrt(expected / 50_000)
    assert p == pytest.approx(expected, rel=1e-12, abs=error)


def test_random_signs_never_give_a_p_of_0_and_follow_the_seed():
    assert sign_flip_p(np.ones(40)) == 1.0 / 50_001.0
    differences = 0.3 + normal(25)
    assert sign_flip_p(differences, seed=1) == sign_flip_p(differences, seed=1) != sign_flip_p(differences, seed=2)


def by_closed_testing(p_values: list[float]) -> list[float]:
    """Holm's procedure is closed testing with Bonferroni: the largest, over sets with i, of size times smallest p."""
    arms = range(len(p_values))
    sets = [s for size in range(1, len(p_values) + 1) for s in itertools.combinations(arms, size)]
    return [max(min(1.0, len(s) * min(p_values[j] for j in s)) for s in sets if i in s) for i in arms]


def test_holm_is_closed_testing_with_bonferroni():
    rng = np.random.default_rng(0)
    for arms in (1, 2, 3, 6):
        p_values = np.round(rng.uniform(size=arms) ** 3, 2).tolist()  # with ties
        assert holm(p_values).tolist() == pytest.approx(by_closed_testing(p_values), rel=1e-12)


def test_holm_by_hand():
    """0.005 x 4, 0.01 x 3, then 0.03 x 2, which 0.04 x 1 must not undercut."""
    assert holm([0.01, 0.04, 0.03, 0.005]).tolist() == pytest.approx([0.03, 0.06, 0.06, 0.02], rel=1e-12)
    assert holm([0.9, 0.8]).tolist() == [1.0, 1.0]


def test_differences_of_0_have_no_sign():
    assert smallest_sign_flip_p(np.array([0.3, -0.2, 0.0, 0.1])) == sign_flip_p([0.3, 0.2, 0.0, 0.1]) == 2.0 / 2.0**3
    assert smallest_sign_flip_p(np.zeros(5)) == sign_flip_p(np.zeros(5)) == 1.0


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: sign_flip_p([1.0]), "1 differences: one seed shows no spread"),
        (lambda: sign_flip_p([[1.0, 2.0]]), r"Differences have shape \[1, 2\]"),
        (lambda: sign_flip_p([1.0, math.inf]), "not all finite"),
        (lambda: holm([0.5, NAN]), "each must be a number in"),
        (lambda: closed_p(np.zeros(3), np.zeros((13, 3)), np.ones(13)), "13 arms"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()


# ----------------------------------------------------------------------------
# Closed testing


def largest_ratio(table: np.ndarray) -> float:
    """The statistic by ordinary least squares on dummy variables: [treatments, seeds], NaN where missing."""
    rows = [(t, s) for t in range(len(table)) for s in range(table.shape[1]) if not np.isnan(table[t, s])]
    design = np.zeros((len(rows), sum(table.shape)))
    for row, (treatment, seed) in enumerate(rows):
        design[row, treatment] = design[row, len(table) + seed] = 1.0
    y = np.array([table[place] for place in rows])
    inverse = np.linalg.pinv(design)
    fit = inverse @ y
    residual = ((y - design @ fit) ** 2).sum()
    errors = inverse @ inverse.T
    return max(
        (fit[t] - fit[0]) ** 2 / (errors[t, t] + errors[0, 0] - 2.0 * errors[0, t]) / residual
        for t in range(1, len(table))
        if not np.isnan(table[t]).all()
    )


def every_permutation(table: np.ndarray) -> list[np.ndarray]:
    """The table under all permutations of what each seed has."""
    columns = []
    for seed in range(table.shape[1]):
        present = np.flatnonzero(~np.isnan(table[:, seed]))
        options = []
        for order in itertools.permutations(present):
            column = np.full(len(table), NAN)
            column[present] = table[list(order), seed]
            options.append(column)
        columns.append(options)
    return [np.stack(chosen, axis=1) for chosen in itertools.product(*columns)]


def by_definition(scores: np.ndarray, singles: list[float]) -> list[float]:
    """The adjusted p of each arm: the largest over the sets that contain it, each by full enumeration."""
    arms = range(len(singles))
    adjusted = list(singles)
    for size in range(2, len(singles) + 1):
        for members in itertools.combinations(arms, size):
            p = permuted_by_definition(scores[[0, *(arm + 1 for arm in members)]])
            for arm in members:
                adjusted[arm] = max(adjusted[arm], min(1.0, p / 0.75, size * min(singles[m] for m in members) / 0.25))
    return adjusted


def singles_of(scores: np.ndarray) -> list[float]:
    """Sign-flip p-values of the arms, 1 for fewer than two pairs."""
    differences = [row[~np.isnan(row)] for row in scores[1:] - scores[0]]
    return [sign_flip_p(row) if len(row) > 1 else 1.0 for row in differences]


def p_of_set(
    scores: np.ndarray, analyses: list[InterimAnalysis] | None = None, counts: list[int] | None = None, seed: int = 0
) -> float:
    """By permutation, of all arms together."""
    arms, seeds = len(scores) - 1, scores.shape[1]
    problem = multiple_testing._Problem(
        scores.tobytes(),
        seeds,
        tuple(counts or [seeds] * arms),
        (1.0,) * arms,
        tuple(analyses or [InterimAnalysis(seeds, 1.0)]),
        seed,
    )
    return float(multiple_testing._p_of_sets(problem, np.arange(arms)[None])[0])


def permuted_by_definition(scores: np.ndarray) -> float:
    seen = largest_ratio(scores) * (1.0 - 1e-9)
    return float(np.mean([largest_ratio(other) >= seen for other in every_permutation(scores)]))


def adjusted(scores: np.ndarray) -> np.ndarray:
    return closed_p(scores[0], scores[1:], singles_of(scores))


@pytest.mark.parametrize("tied", [False, True])
@pytest.mark.parametrize("shape", [(3, 4), (4, 2), (4, 3)])
def test_the_adjusted_p_is_its_definition(shape, tied):
    """Few enough permutations are listed, at the first seed only which score becomes the baseline's."""
    scores = normal(*shape, seed=3) + np.linspace(0.0, 3.0, shape[0])[:, None]
    scores = np.round(scores) if tied else scores
    if shape == (4, 3):  # 13,824 permutations of each of two arrays take seconds by definition
        scores = scores[:, :2]
    assert adjusted(scores).tolist() == pytest.approx(by_definition(scores, singles_of(scores)), rel=1e-9)


def test_without_missing_scores_the_statistic_is_dunnetts():
    """Differences of means over the residual mean square of the two-way layout, by the textbook's formula."""
    scores = normal(4, 6) + np.array([[0.0], [1.0], [0.0], [2.0]])
    residuals = scores - scores.mean(axis=1, keepdims=True) - scores.mean(axis=0) + scores.mean()
    gaps = scores[1:].mean(axis=1) - scores[0].mean()
    expected = (gaps**2).max() * 6 / 2.0 / (residuals**2).sum()
    assert largest_ratio(scores) == pytest.approx(expected, rel=1e-9)


def test_missing_scores_keep_their_place():
    """Drawn permutations of an incomplete table against all of them: p agrees to 4 standard errors."""
    scores = normal(3, 4, seed=5) + np.array([[0.0], [1.5], [0.5]])
    scores[2, 1] = scores[1, 3] = NAN
    expected = permuted_by_definition(scores)
    assert 0.0 < expected < 1.0
    assert p_of_set(scores) == pytest.approx(expected, abs=4.0 * 0.5 / math.sqrt(4_999))


def test_an_arm_with_hardly_a_score_does_no_harm_to_the_others():
    rest = np.array([[0.0], [4.0], [-4.0], [0.1]]) + 0.5 * normal(4, 8)
    for scores_of_failed in ([NAN] * 8, [1.0] + [NAN] * 7, [1.0, 2.0] + [NAN] * 6):
        found = adjusted(np.vstack([rest, [scores_of_failed]]))
        assert found[:2].tolist() == [2.0 / 2.0**8] * 2
        assert found[3] >= 0.5
    without = np.array(rest)
    without[0, 2] = NAN  # a seed without a baseline compares nothing
    assert adjusted(without).tolist() == pytest.approx(adjusted(np.delete(rest, 2, axis=1)).tolist(), abs=0.03)


def test_the_p_values_depend_neither_on_the_order_of_the_arms_nor_on_units():
    scores = normal(6, 7) + np.array([[0.0], [2.0], [0.0], [1.0], [0.5], [-2.0]])
    order = np.array([3, 0, 4, 1, 2])
    found = adjusted(scores)
    assert adjusted(scores[np.r_[0, order + 1]]).tolist() == found[order].tolist()
    assert adjusted(7.0 - 3.0 * scores + normal(1, 7, seed=9)).tolist() == pytest.approx(found.tolist(), abs=0.02)
    assert adjusted(1e-200 * scores).tolist() == pytest.approx(found.tolist(), abs=1e-12)


def test_arms_that_equal_the_baseline_have_p_1_and_an_arm_without_noise_the_smallest():
    base = normal(6)
    assert adjusted(np.stack([base] * 3)).tolist() == [1.0, 1.0]
    assert adjusted(np.stack([base, base + 1.0, base])).tolist() == [2.0 / 2.0**6, 1.0]


def test_drawn_permutations_give_the_p_of_all_of_them(monkeypatch):
    """Three treatments and six seeds have 23,328 that are listed; 4,999 draws agree to 4 standard errors."""
    scores = normal(3, 6, seed=11) + np.array([[0.0], [0.9], [0.0]])
    exact = p_of_set(scores)
    monkeypatch.setattr(multiple_testing, "_MOST_LISTED", 0)
    drawn = p_of_set(scores, seed=1)
    assert drawn != exact
    assert drawn == pytest.approx(exact, abs=4.0 * math.sqrt(exact / 4_999))


# ----------------------------------------------------------------------------
# Looks


def test_one_look_is_no_correction_and_later_looks_cost_their_share():
    scores = normal(3, 6, seed=2) + np.array([[0.0], [2.0], [0.0]])
    plain = adjusted(scores)
    singles, counts = singles_of(scores), [6, 6]
    once = sequential_closed_p(scores, counts, singles, [InterimAnalysis(6, 1.0)])
    assert once.tolist() == plain.tolist()
    padded = np.hstack([scores, np.full((3, 2), NAN)])
    analyses = [InterimAnalysis(6, 0.25), InterimAnalysis(8, 0.75)]
    assert p_of_set(padded, analyses, counts) == pytest.approx(min(1.0, 4.0 * p_of_set(scores)), rel=1e-12)
    assert p_of_set(padded, analyses, [5, 5]) == 1.0


def test_the_corrected_p_of_a_set_is_its_definition():
    """Looks at 2 and 3 seeds: the smallest p over share of each of all 216 permutations, one at a time."""
    scores = normal(3, 3, seed=4) + np.array([[0.0], [1.0], [3.0]])
    analyses = [InterimAnalysis(2, 0.5), InterimAnalysis(3, 0.5)]
    tables = every_permutation(scores)
    ratios = np.array([[largest_ratio(table[:, : analysis.seeds]) for table in tables] for analysis in analyses])
    p = (ratios[:, None, :] >= ratios[:, :, None] * (1.0 - 1e-9)).mean(axis=2)  # [analyses, permutations]
    smallest = (p / 0.5).min(axis=0)
    seen = smallest[[np.array_equal(table, scores) for table in tables]][0]
    expected = (smallest <= seen * (1.0 + 1e-9)).mean()
    assert p_of_set(scores, analyses) == pytest.approx(expected, rel=1e-9)


def test_a_set_is_tested_with_the_seeds_that_all_its_arms_have():
    """An arm that stopped keeps every set that it is in as it was, whatever the others do later."""
    analyses = [InterimAnalysis(6, 0.5), InterimAnalysis(8, 0.5)]
    scores = normal(4, 8, seed=6) + np.array([[0.0], [4.0], [0.0], [1.0]])
    early = scores.copy()
    early[:, 6:] = NAN
    singles = [0.01, 0.5, 0.5]
    at_first = sequential_closed_p(early, [6, 6, 6], singles, analyses)
    early[[0, 2, 3], 6:] = scores[[0, 2, 3], 6:]
    later = sequential_closed_p(early, [6, 8, 8], singles, analyses)
    assert later[0] == at_first[0] < 0.05


# ----------------------------------------------------------------------------
# How often it is wrong, by simulation

STUDIES = 1_000
NOISES = {
    "normal": lambda rng, shape: rng.normal(size=shape),
    "lognormal": lambda rng, shape: (np.exp(rng.normal(size=shape)) - math.exp(0.5)) / 2.16,
    "t3": lambda rng, shape: rng.standard_t(3, size=shape) / math.sqrt(3.0),
}
"""With mean 0 and standard deviation 1."""


def sign_flips(differences: np.ndarray) -> np.ndarray:
    """Exact p-values of [studies, arms, seeds]."""
    signs = np.array([(1, *rest) for rest in itertools.product((1, -1), repeat=differences.shape[2] - 1)])
    sums = np.abs(differences @ signs.T)
    return (sums >= sums[..., :1] * (1.0 - 1e-9)).mean(axis=2)


def all_adjusted(scores: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """p-values of many studies [studies, 1 + arms, seeds] at once, by closed testing and by Holm [studies, arms]."""
    studies, treatments, seeds = scores.shape
    singles = sign_flips(scores[:, 1:] - scores[:, :1])
    closed = singles.copy()
    for size in range(2, treatments):
        sets = list(itertools.combinations(range(1, treatments), size))
        tables = scores[:, [(0, *members) for members in sets]].reshape(-1, size + 1, seeds)
        p = multiple_testing._p_of_tables(tables, [InterimAnalysis(seeds, 1.0)], 0.0, 0).reshape(studies, -1)
        for column, members in enumerate(sets):
            rows = np.array(members) - 1
            both = np.minimum(p[:, column] / 0.75, size * singles[:, rows].min(axis=1) / 0.25)
            closed[:, rows] = np.maximum(closed[:, rows], np.minimum(1.0, both)[:, None])
    return closed, np.array([holm(row) for row in singles])


def simulated(
    effects: list[float],
    noise: str = "normal",
    seeds: int = 6,
    studies: int = STUDIES,
    spread: float | list[float] = 1.0,
) -> dict[str, float]:
    """Studies with arms that differ by `effects`: the share with a false verdict, and of real effects found."""
    rng = np.random.default_rng(7)
    shape = (studies, 1 + len(effects), seeds)
    scores = NOISES[noise](rng, shape) * np.broadcast_to(spread, shape[1])[:, None]
    scores += np.array([0.0, *effects])[:, None] + rng.normal(size=(studies, 1, seeds))
    is_null = np.array(effects) == 0.0
    closed, by_holm = (p <= 0.05 for p in all_adjusted(scores))
    return {
        "false": float(closed[:, is_null].any(axis=1).mean()),
        "found": float(closed[:, ~is_null].mean()) if not is_null.all() else NAN,
        "holm false": float(by_holm[:, is_null].any(axis=1).mean()),
        "holm found": float(by_holm[:, ~is_null].mean()) if not is_null.all() else NAN,
    }


@pytest.fixture
def few_permutations(monkeypatch):
    """p-values stay valid with any number of drawn permutations."""
    monkeypatch.setattr(multiple_testing, "PERMUTATIONS", 199)
    monkeypatch.setattr(multiple_testing, "_MOST_LISTED", 0)


def test_six_seeds_find_what_holm_cannot(few_permutations):
    """The quick version: 150 studies of three arms with effects 2, 4 and 0."""
    found = simulated([2.0, 4.0, 0.0], studies=150)
    assert found["found"] >= 0.7
    assert found["holm found"] == found["holm false"] == 0.0
    assert found["false"] <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize("noise", NOISES)
@pytest.mark.parametrize("effects", [[0.0] * 3, [5.0, 0.0, 0.0], [2.0, 4.0, 0.0], [3.0, 3.0, 0.0, 0.0, 0.0]])
@pytest.mark.parametrize("seeds", [6, 9])
def test_false_verdicts_stay_at_5_percent_under_complete_and_partial_nulls(few_permutations, noise, effects, seeds):
    found = simulated(effects, noise, seeds)
    assert found["false"] <= 0.05
    if any(effects):
        assert found["found"] >= (0.65 if seeds == 6 else 0.9)
        assert found["found"] >= found["holm found"]


@pytest.mark.slow
@pytest.mark.parametrize(
    ("effects", "least"), [([2.0, 2.0, 2.0], 0.5), ([4.0, 4.0, 4.0], 0.95), ([5.0, 0.0, 0.0], 0.95)]
)
def test_power_with_six_seeds(few_permutations, effects, least):
    found = simulated(effects)
    assert found["found"] >= least
    assert found["holm found"] == 0.0


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [6, 8, 10])
@pytest.mark.parametrize("arms", [2, 4])
def test_the_power_is_what_numbers_of_seeds_are_computed_from(monkeypatch, seeds, arms):
    """A difference that `smallest_effect` says is found in 80 % of cases, among arms that do not differ.

    Few permutations would cost power: 199 lose 5 to 10 points.
    """
    monkeypatch.setattr(multiple_testing, "PERMUTATIONS", 1_499)
    monkeypatch.setattr(multiple_testing, "_MOST_LISTED", 0)
    effect = math.sqrt(2.0) * smallest_effect(seeds, arms, 0.05)  # in standard deviations of a score
    found = simulated([effect, *[0.0] * (arms - 1)], seeds=seeds, studies=500)["found"]
    assert found == pytest.approx(0.8, abs=0.05)


@pytest.mark.slow
@pytest.mark.parametrize("spread", [[5.0, 1.0, 1.0, 1.0], [1.0, 5.0, 1.0, 1.0], [1.0, 1.0, 3.0, 5.0]])
@pytest.mark.parametrize("seeds", [6, 10])
def test_spreads_that_differ_fivefold_break_exchangeability_a_little(few_permutations, spread, seeds):
    """Equal means but unequal spreads are not a null hypothesis of a permutation test: 7 % instead of 5 % were seen."""
    assert simulated([0.0] * 3, seeds=seeds, spread=spread)["false"] <= 0.10


@pytest.mark.slow
def test_an_arm_that_follows_the_baseline_is_found_among_noisy_ones(few_permutations):
    """Differences of 0.06 with standard deviation 0.02 beside arms with 1: lost in the pooled residual alone."""
    rng = np.random.default_rng(1)
    scores = rng.normal(size=(300, 4, 10))
    scores[:, 1] = scores[:, 0] + 0.06 + 0.02 * rng.normal(size=(300, 10))
    found = all_adjusted(scores)[0] <= 0.05
    assert found[:, 0].mean() >= 0.95
    assert found[:, 1:].any(axis=1).mean() <= 0.05


@pytest.mark.slow
def test_skewed_differences_of_mean_0_are_called_different_too_often():
    """The limit of sign flips: exponential differences of mean 0. That is why texts speak of exchangeability."""
    skewed = np.random.default_rng(0).exponential(size=(STUDIES, 1, 10)) - 1.0
    assert 0.08 <= (sign_flips(skewed) <= 0.05).mean() <= 0.36
