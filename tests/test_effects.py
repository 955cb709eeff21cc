"""Effects of factorial designs, against hand calculation, Yates's algorithm, cell means and the normal equations."""

import itertools
import math

import numpy as np
import pytest

from dxmi.errors import UserError
from support import stating
from tune.stats.effects import level_effects, two_level_effects
from tune.stats.intervals import Bootstrap, mean_interval
from tune.stats.multiple_testing import holm, sign_flip_p

FAST = Bootstrap(resamples=400)
SQUARE = [[-1, -1], [1, -1], [-1, 1], [1, 1]]
CUBE = [row[::-1] for row in itertools.product([-1, 1], repeat=3)]  # the first factor fastest
WORDS = [("A",), ("B",), ("A", "B"), ("C",), ("A", "C"), ("B", "C"), ("A", "B", "C")]


def scores_of(runs: int, seeds: int = 4, seed: int = 0) -> np.ndarray:
    return np.random.default_rng(seed).normal(10.0, 2.0, (runs, seeds))


def sizes(effects) -> list[float]:
    return [effect.size.estimate for effect in effects]


# ----------------------------------------------------------------------------
# Two levels


def test_effects_by_hand():
    """Cells 10, 14, 20, 32: A does 4 when B is low and 12 when it is high; B does 10 and 18."""
    scores = np.array([[10.0], [14.0], [20.0], [32.0]]) + np.array([0.0, 5.0, -3.0])  # seeds shift all runs alike
    effects = two_level_effects(SQUARE, "AB", [("A",), ("B",), ("A", "B")], scores)
    assert sizes(effects) == pytest.approx([8.0, 14.0, 4.0], rel=1e-12)
    assert [e.size.high - e.size.low for e in effects] == pytest.approx([0.0, 0.0, 0.0], abs=1e-12)
    assert [(e.term, e.levels, e.seeds, e.left_out) for e in effects][2] == (("A", "B"), (), 3, 0)


def yates(cells: np.ndarray) -> list[float]:
    """Yates's algorithm (1937): sums and differences of neighbors, once a factor; then the mean is dropped."""
    column = list(cells)
    for _ in range(int(math.log2(len(cells)))):
        pairs = list(zip(column[::2], column[1::2], strict=True))
        column = [low + high for low, high in pairs] + [high - low for low, high in pairs]
    return [value / (len(cells) / 2) for value in column[1:]]


def test_a_full_design_gives_what_yatess_algorithm_gives():
    scores = scores_of(8)
    effects = two_level_effects(CUBE, "ABC", WORDS, scores)
    assert sizes(effects) == pytest.approx(yates(scores.mean(axis=1)), rel=1e-10)


def test_an_effect_is_judged_by_its_values_at_the_seeds():
    scores = scores_of(8, seeds=9)
    effects = two_level_effects(CUBE, "ABC", WORDS, scores)
    at_seeds = np.transpose([yates(column) for column in scores.T])
    p_values = [sign_flip_p(values) for values in at_seeds]
    assert [e.p for e in effects] == p_values
    assert [e.p_holm for e in effects] == pytest.approx(holm(p_values).tolist(), rel=1e-12)
    for effect, values in zip(effects, at_seeds, strict=True):
        expected = mean_interval(values)
        assert (effect.size.low, effect.size.high) == pytest.approx((expected.low, expected.high), rel=1e-9)


def test_a_fraction_gives_an_effect_plus_its_alias():
    """2^(3-1) with C = AB: what is called C is the sum of C and AB of the full design without noise."""
    full = np.array([3.0 + 1.0 * a - 2.0 * b + 0.5 * c + 0.25 * a * b for a, b, c in CUBE])
    half = [(row, score) for row, score in zip(CUBE, full, strict=True) if row[2] == row[0] * row[1]]
    design, scores = [row for row, _ in half], np.array([[score, score + 1.0] for _, score in half])
    effects = two_level_effects(design, "ABC", [("A",), ("B",), ("C",)], scores)
    assert sizes(effects) == pytest.approx([2.0, -4.0, 1.0 + 0.5], rel=1e-12)
    with pytest.raises(UserError, match=stating("A x B … the mean, A, C")):
        two_level_effects(design, "ABC", [("A",), ("C",), ("A", "B")], scores)


def test_an_unbalanced_design_gives_the_least_squares_of_the_normal_equations():
    design, scores = np.array(CUBE[:-2], dtype=float), scores_of(6)
    matrix = np.column_stack([np.ones(6), design])
    expected = 2.0 * np.linalg.solve(matrix.T @ matrix, matrix.T @ scores.mean(axis=1))[1:]
    assert sizes(two_level_effects(design, "ABC", WORDS[:1] + WORDS[1:2] + WORDS[3:4], scores)) == pytest.approx(
        expected
    )


def test_no_effect_is_exactly_none_and_rounding_no_evidence():
    """0.1, 0.2 and 0.7 have sums that rounding makes unequal, the same way at every seed."""
    scores = np.tile(np.array([0.1, 0.2, 0.7] * 4)[:10], (4, 1))
    for effect in two_level_effects(SQUARE, "AB", [("A",), ("A", "B")], scores):
        assert (effect.size.estimate, effect.size.low, effect.size.high, effect.p) == (0.0, 0.0, 0.0, 1.0)


def test_a_seed_that_lacks_a_run_is_left_out_of_all_effects():
    scores = scores_of(4, seeds=7)
    holes = np.column_stack([scores, scores[:, 0]])
    holes[2, 7] = math.nan
    expected = two_level_effects(SQUARE, "AB", [("A",), ("B",)], scores, FAST)
    found = two_level_effects(SQUARE, "AB", [("A",), ("B",)], holes, FAST)
    assert [(e.seeds, e.left_out) for e in found] == [(7, 1), (7, 1)]
    assert [e.size for e in found] == [e.size for e in expected]


@pytest.mark.slow
@pytest.mark.parametrize("seeds", [3, 6])
def test_the_interval_of_an_interaction_covers_93_to_97_percent(seeds):
    """2,000 studies with an interaction of 1, effects of A and B, and seeds that differ."""
    rng = np.random.default_rng(seeds)
    truth = np.array([[2.0 * a - 3.0 * b + 0.5 * a * b] for a, b in SQUARE])
    covered = 0
    for _ in range(2_000):
        scores = truth + rng.normal(0.0, 4.0, (1, seeds)) + rng.normal(size=(4, seeds))
        size = two_level_effects(SQUARE, "AB", [("A",), ("B",), ("A", "B")], scores, FAST)[2].size
        covered += size.low <= 1.0 <= size.high
    assert 0.93 <= covered / 2_000 <= 0.97


def test_an_effect_reads_as_a_line():
    scores = np.array([[10.0], [14.0], [20.0], [32.0]]) + np.zeros(7)
    effects = two_level_effects(SQUARE, ["tau", "lr"], [("tau",), ("tau", "lr")], scores)
    assert [str(e) for e in effects] == [
        "tau: 8 [8, 8], p = .031 (Holm, 7 seeds)",
        "tau x lr: 4 [4, 4], p = .031 (Holm, 7 seeds)",
    ]
    levels = level_effects({"tau": [0, 0.1, 0, 0.1], "lr": ["a", "a", "b", "b"]}, [("tau", "lr")], scores)
    assert str(levels[0]) == "tau 0.1 x lr b: 4 [4, 4], p = .016 (Holm, 7 seeds)"


# ----------------------------------------------------------------------------
# Any number of levels

THREE, TWO = ["none", "some", "much"], [False, True]
GRID = list(itertools.product(THREE, TWO))
LEVELS = {"dose": [dose for dose, _ in GRID], "on": [on for _, on in GRID]}


def test_main_effects_are_differences_of_marginal_means():
    scores = scores_of(6)
    cells = scores.mean(axis=1).reshape(3, 2)
    effects = level_effects(LEVELS, [("dose",), ("on",), ("dose", "on")], scores)
    doses, ons = cells.mean(axis=1), cells.mean(axis=0)
    expected = [doses[1] - doses[0], doses[2] - doses[0], ons[1] - ons[0]]
    assert sizes(effects)[:3] == pytest.approx(expected, rel=1e-10)
    assert [e.levels for e in effects] == [("some",), ("much",), ("True",), ("some", "True"), ("much", "True")]


def test_interactions_are_halved_differences_of_differences():
    scores = scores_of(6)
    cells = scores.mean(axis=1).reshape(3, 2)
    effects = level_effects(LEVELS, [("dose",), ("on",), ("dose", "on")], scores)
    expected = [((cells[i, 1] - cells[0, 1]) - (cells[i, 0] - cells[0, 0])) / 2.0 for i in (1, 2)]
    assert sizes(effects)[3:] == pytest.approx(expected, rel=1e-10)


def test_an_additive_model_adjusts_for_a_cell_that_was_not_run():
    """Scores without interaction and noise: the marginal means of five of six cells would mislead."""
    doses, ons = {"none": 0.0, "some": 2.0, "much": 5.0}, {False: 0.0, True: -3.0}
    scores = np.array([[doses[dose] + ons[on] + seed for seed in range(3)] for dose, on in GRID[:-1]])
    levels = {name: values[:-1] for name, values in LEVELS.items()}
    effects = level_effects(levels, [("dose",), ("on",)], scores)
    assert sizes(effects) == pytest.approx([2.0, 5.0, -3.0], rel=1e-10)


def test_two_levels_are_the_special_case():
    scores = scores_of(8)
    levels = {name: [row[i] for row in CUBE] for i, name in enumerate("ABC")}
    signs, words = two_level_effects(CUBE, "ABC", WORDS, scores), level_effects(levels, WORDS, scores)
    assert sizes(words) == pytest.approx(sizes(signs), rel=1e-10)


# ----------------------------------------------------------------------------
# Bad input


@pytest.mark.parametrize(
    ("call", "sentence"),
    [
        (lambda: two_level_effects([[0, 1]], "AB", [("A",)], [[1.0, 2.0]]), "2] of -1 and \\+1"),
        (lambda: two_level_effects(SQUARE, "ABC", [("A",)], scores_of(4)), "3] of -1 and \\+1"),
        (lambda: two_level_effects(SQUARE, "AB", [("A",)], scores_of(3)), r"shape \[3, 4\], but factor 'A' has 4 runs"),
        (lambda: two_level_effects(SQUARE, "AB", [("D",)], scores_of(4)), "Term .* out of A, B"),
        (lambda: two_level_effects(SQUARE, "AB", ["A"], scores_of(4)), "Term 'A' must name"),
        (lambda: two_level_effects(SQUARE, "AB", [("A", "A")], scores_of(4)), "different factors"),
        (lambda: two_level_effects(SQUARE, "AB", [()], scores_of(4)), "different factors"),
        (lambda: two_level_effects(SQUARE, "AB", [], scores_of(4)), "at least one term"),
        (lambda: two_level_effects(SQUARE, "AB", [("A", "B"), ("B", "A")], scores_of(4)), "each once"),
        (lambda: two_level_effects(SQUARE, "AB", [("A",)], scores_of(4, seeds=1)), "1 seeds have a score for every"),
        (lambda: two_level_effects(SQUARE, "AB", [("A",)], scores_of(4) * math.inf), "infinite"),
        (lambda: two_level_effects([[1], [1]], "A", [("A",)], scores_of(2)), "cannot distinguish A from the mean"),
        (lambda: level_effects({"A": [1, 1]}, [("A",)], scores_of(2)), "'A' has one level"),
    ],
)
def test_bad_input_is_refused_with_a_sentence(call, sentence):
    with pytest.raises(UserError, match=sentence):
        call()
