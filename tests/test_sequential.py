"""Adaptive seeds: the corrected p against enumeration, who goes on and who stops, and by simulation what it costs."""

import itertools
import math
import re

import numpy as np
import pytest
from scipy import stats

from dxmi.errors import UserError
from support import stating
from tune.stats import multiple_testing
from tune.stats.comparison import Verdict
from tune.stats.multiple_testing import closed_p, sign_flip_p
from tune.stats.sequential import SeedPlan, next_seeds, review, sequential_p

NAN = math.nan
PLAN = SeedPlan(arms=1, cap=12)
BASELINE = 3.0 + 0.1 * np.random.default_rng(0).normal(size=12)
STEADY = -0.5 + 0.02 * np.random.default_rng(1).normal(size=12)
"""Differences of an arm that is better at every seed."""
NOISE = np.array([0.3, -0.3, 0.2, -0.2, 0.1, -0.1, 0.3, -0.3, 0.2, -0.2, 0.1, -0.1])
"""Differences of an arm that is no better."""


def study(*differences: np.ndarray, seeds: int) -> dict[str, np.ndarray]:
    """Arms a, b, ... and their baseline after as many seeds."""
    return {"base": BASELINE[:seeds]} | {
        name: BASELINE[:seeds] + own[:seeds] for name, own in zip("abcdefgh", differences, strict=False)
    }


# ----------------------------------------------------------------------------
# Plans


@pytest.mark.parametrize("arms", [1, 3, 8, 13])
@pytest.mark.parametrize("cap", [10, 12, 20])
@pytest.mark.parametrize("step", [1, 2, 5])
def test_a_plan_spends_all_of_its_error_rate_at_looks_that_can_decide(arms, cap, step):
    plan = SeedPlan(arms, cap=cap, step=step)
    assert plan.interim_analyses[0] == 3
    assert plan.interim_analyses[-1] == cap
    assert all(b - a == step for a, b in itertools.pairwise(plan.interim_analyses[:-1]))
    assert sum(share for _, share in plan.tests) == pytest.approx(1.0, abs=1e-15)
    assert {analysis for analysis, _ in plan.tests} <= set(plan.interim_analyses)
    for analysis, share in plan.tests:
        assert 2.0 / 2.0**analysis <= 0.05 * share / (arms if arms > 12 else 1)  # where Holm's procedure is used
    assert plan.tests[-1][0] == cap
    assert plan.tests[-1][1] >= 0.5


def test_the_tests_of_a_plan_for_3_arms():
    """The smallest p of 8 seeds is 0.0078, a quarter of 0.05 is 0.0125; 10 is half way from 8 to 12."""
    assert SeedPlan(3, cap=12).tests == ((8, 0.25), (10, 0.25), (12, 0.5))
    assert SeedPlan(3, cap=6).tests == ((6, 1.0),)


def test_the_first_test_of_more_than_12_arms_is_holms():
    """A quarter of 0.05 / 13 is 0.00096, and 2 / 2^12 is 0.00049."""
    assert SeedPlan(13, cap=20).tests[0] == (12, 0.25)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"arms": 0}, "arms is 0"),
        ({"arms": 3, "cap": 5}, "cap is 5 … 6 … 20"),
        ({"arms": 13, "cap": 9}, "cap is 9 … 10 … 20"),
        ({"arms": 1, "cap": 21}, "cap is 21 … 6 … 20"),
        ({"arms": 1, "start": 13}, "13"),
        ({"arms": 1, "start": 1}, "start is 1 … 2"),
        ({"arms": 1, "step": 0}, "step is 0 … 1"),
        ({"arms": 1, "error_rate": 0.0}, "error_rate is 0.0"),
        ({"arms": 1, "futility": 1.0}, "futility is 1.0"),
    ],
)
def test_a_plan_that_cannot_be_is_refused(settings, sentence):
    with pytest.raises(UserError, match=stating(sentence)):
        SeedPlan(**settings)


# ----------------------------------------------------------------------------
# The corrected p


def by_enumeration(differences: np.ndarray, tests: list[tuple[int, float]]) -> float:
    """The definition: m of the data, then of every sign vector, one at a time, plus what is to come."""
    taken = [(count, share) for count, share in tests if count <= len(differences)]
    length = taken[-1][0]

    def smallest(values: np.ndarray) -> float:
        return min(sign_flip_p(values[:count]) / share for count, share in taken)

    m = smallest(differences)
    signs = itertools.product([1.0, -1.0], repeat=length)
    as_small = np.mean([smallest(differences[:length] * s) <= m + 1e-12 for s in signs])
    return min(1.0, as_small + m * sum(share for count, share in tests if count > len(differences)))


@pytest.mark.parametrize("seeds", [4, 5, 6, 8])
def test_the_corrected_p_is_its_definition(seeds):
    tests = [(4, 0.2), (6, 0.3), (8, 0.5)]
    for seed in range(3):
        differences = np.round(0.8 + np.random.default_rng(seed).normal(size=seeds), 1)  # with ties
        assert sequential_p(differences, tests) == pytest.approx(by_enumeration(differences, tests), rel=1e-12)


def test_one_test_needs_no_correction():
    differences = 0.5 + np.random.default_rng(0).normal(size=10)
    assert sequential_p(differences, [(10, 1.0)]) == pytest.approx(sign_flip_p(differences), rel=1e-12)


def test_before_the_first_test_p_is_1():
    assert sequential_p([1.0, 1.0, 1.0], [(4, 0.5), (8, 0.5)]) == 1.0
    assert sequential_p([], [(4, 0.5), (8, 0.5)]) == 1.0


def test_the_first_test_pays_its_share_in_full():
    """All 8 signs agree: 2 / 2^8, plus 4 times that for the half that is still to come."""
    p = 2.0 / 2.0**8
    assert sequential_p(np.ones(8), [(8, 0.25), (12, 0.75)]) == pytest.approx(p + 0.75 * p / 0.25, rel=1e-12)


def test_another_seed_never_raises_the_corrected_p():
    tests = SeedPlan(1, cap=12).tests
    for seed in range(40):
        differences = 0.8 + np.random.default_rng(seed).normal(size=12)
        p_values = [sequential_p(differences[:seeds], tests) for seeds in range(3, 13)]
        assert all(later <= earlier + 1e-12 for earlier, later in itertools.pairwise(p_values))


def test_differences_that_cannot_be_enumerated_are_refused():
    for differences in (np.ones(21), [1.0, NAN]):
        with pytest.raises(UserError, match=stating("20 … finite")):
            sequential_p(differences, [(3, 1.0)])


# ----------------------------------------------------------------------------
# Decisions


def test_every_arm_starts_with_the_same_seeds():
    assert next_seeds({"base": [], "a": []}, "base", PLAN) == {"a": 3}
    assert next_seeds(study(NOISE, seeds=2), "base", PLAN) == {"a": 3}


def test_an_open_arm_goes_on_to_the_next_look():
    assert next_seeds(study(NOISE, seeds=3), "base", PLAN) == {"a": 4}
    assert next_seeds(study(NOISE, seeds=3), "base", SeedPlan(1, step=4)) == {"a": 7}
    (comparison,) = review(study(NOISE, seeds=3), "base", PLAN)
    assert (comparison.verdict, comparison.reason) == (Verdict.TOO_FEW_SEEDS, "Undecided after 3 of at most 12 seeds.")


def test_a_steady_arm_stops_at_the_first_test_and_a_noisy_one_long_before_the_cap():
    """One arm: the first test is at 8 seeds. Differences around 0 leave no hope once there are a few."""
    first = PLAN.tests[0][0]
    assert first == 8
    assert next_seeds(study(STEADY, seeds=7), "base", PLAN) == {"a": 8}
    assert next_seeds(study(STEADY, seeds=8), "base", PLAN) == {}
    assert next_seeds(study(NOISE, seeds=6), "base", PLAN) == {}
    (steady,), (noisy,) = (review(study(d, seeds=s), "base", PLAN) for d, s in ((STEADY, 8), (NOISE, 6)))
    assert steady.verdict is Verdict.BETTER
    assert steady.p == pytest.approx(4.0 * 2.0 / 2.0**8, rel=1e-12)  # its share is a quarter
    assert noisy.verdict is Verdict.NO_DIFFERENCE
    assert re.fullmatch(r"Stopped after 6 of at most 12 seeds: the chance .* 12 seeds would .* was \d%\.", noisy.reason)


def test_an_arm_that_does_exactly_what_the_baseline_does_stops_at_the_start():
    assert next_seeds(study(0.0 * NOISE, seeds=3), "base", PLAN) == {}
    (comparison,) = review(study(0.0 * NOISE, seeds=3), "base", PLAN)
    assert comparison.verdict is Verdict.NO_DIFFERENCE


def test_the_chance_of_a_verdict_is_that_of_studies_simulated_to_the_cap():
    """With mean d and spread s of n seeds, the true mean and variance have their posterior for a flat prior; the rest
    of the seeds is drawn from it, and the t test taken with the spread seen so far, as the formula has it.
    """
    n, cap, draws = 5, 12, 400_000
    differences = np.array([0.9, -0.2, 0.5, 0.4, -0.1])
    rng = np.random.default_rng(0)
    mean, spread = differences.mean(), differences.std(ddof=1)
    sigma = spread * np.sqrt((n - 1) / rng.chisquare(n - 1, draws))
    center = rng.normal(mean, sigma / math.sqrt(n))
    rest = rng.normal(center, sigma / math.sqrt(cap - n))
    final = (n * mean + (cap - n) * rest) / cap
    expected = np.mean(np.abs(final) > stats.t.isf(0.025, cap - 1) * spread / math.sqrt(cap))
    scores = {"base": np.zeros(n), "a": differences}
    assert next_seeds(scores, "base", SeedPlan(1, cap=cap, futility=expected - 0.005)) == {"a": 6}
    assert next_seeds(scores, "base", SeedPlan(1, cap=cap, futility=expected + 0.005)) == {}


def test_at_the_cap_no_arm_goes_on_and_the_verdict_is_the_studys():
    plan = SeedPlan(1, cap=12, futility=0.0)
    assert next_seeds(study(NOISE, seeds=11), "base", plan) == {"a": 12}
    assert next_seeds(study(NOISE, seeds=12), "base", plan) == {}
    (comparison,) = review(study(NOISE, seeds=12), "base", plan)
    assert comparison.verdict is Verdict.NO_DIFFERENCE
    assert comparison.reason.startswith("12 seeds could have shown a difference, but did not.")


def test_arms_stop_one_by_one_and_keep_their_verdicts():
    """The first test is at 8. A verdict that is reached stays while the other arm goes on."""
    plan = SeedPlan(2, cap=12, futility=0.0)
    at_8 = study(STEADY, NOISE, seeds=8)
    assert next_seeds(at_8, "base", plan) == {"b": 9}
    later = study(STEADY, NOISE, seeds=12) | {"a": at_8["a"]}
    assert next_seeds(later, "base", plan) == {}
    early, late = (review(scores, "base", plan) for scores in (at_8, later))
    assert [c.verdict for c in late] == ["better", "no difference shown"]
    assert [c.seeds for c in late] == [8, 12]
    assert late[0].p_adjusted == early[0].p_adjusted


def test_open_arms_get_their_seeds_together_until_none_has_any_hope():
    """The noisy arm alone would stop at 6: the other's sets with it need its scores. Beyond 12 arms there are none."""
    hopeful = np.array([-0.5, -0.2, -0.6, -0.1, 0.1, -0.4, -0.3, 0.05, -0.5, -0.1, -0.2, -0.4])
    assert next_seeds(study(NOISE, seeds=6), "base", SeedPlan(1)) == {}
    assert next_seeds(study(NOISE, hopeful, seeds=6), "base", SeedPlan(2)) == {"a": 7, "b": 7}
    assert next_seeds(study(NOISE, NOISE[::-1], seeds=6), "base", SeedPlan(2)) == {}
    found = review(study(NOISE, hopeful, seeds=6), "base", SeedPlan(2))
    assert [c.reason for c in found] == ["Undecided after 6 of at most 12 seeds."] * 2
    many = {"base": BASELINE[:6], "hopeful": BASELINE[:6] + 3.0 * hopeful[:6] - 1.0}
    many |= {f"arm{k}": BASELINE[:6] + NOISE[:6] for k in range(12)}
    assert next_seeds(many, "base", SeedPlan(13, cap=20)) == {"hopeful": 7}


def test_failed_runs_leave_fewer_pairs_and_no_verdict_comes_from_too_few():
    """At 8 seeds with one failed, the smallest p of 7 is 0.0156: corrected 0.0625."""
    scores = study(STEADY, seeds=8)
    scores["a"][2] = NAN
    assert next_seeds(scores, "base", PLAN) == {"a": 9}
    (comparison,) = review(scores, "base", PLAN)
    assert (comparison.seeds, comparison.left_out) == (7, 1)
    assert comparison.p == pytest.approx(4.0 * 2.0 / 2.0**7, rel=1e-12)
    more = study(STEADY, seeds=10)
    more["a"][2] = NAN
    assert next_seeds(more, "base", PLAN) == {}  # the second test, at 10, has 9 pairs


def test_an_arm_that_failed_wherever_it_ran_gets_no_more_seeds():
    scores = study(NOISE, seeds=3) | {"a": [NAN] * 3}
    assert next_seeds(scores, "base", PLAN) == {}
    (comparison,) = review(scores, "base", PLAN)
    assert comparison.verdict is Verdict.TOO_FEW_SEEDS
    assert comparison.reason.startswith("0 seeds with both scores")
    once = study(NOISE, seeds=3) | {"a": [NAN, 3.0, NAN]}
    assert next_seeds(once, "base", PLAN) == {"a": 4}


@pytest.mark.parametrize(
    ("scores", "sentence"),
    [
        ({"a": [1.0], "b": [1.0]}, "1 arms … 'base' … 'a', 'b'"),
        ({"base": [1.0], "a": [1.0], "b": [1.0]}, "plan … arms"),
        ({}, "scores … nothing"),
        ({"base": [1.0], "a": [1.0, 2.0]}, "'a' … 2 seeds … baseline … 1"),
        ({"base": [1.0] * 13, "a": [1.0] * 13}, "13 … cap is 12"),
        ({"base": [1.0] * 3, "a": [1.0, math.inf, 2.0]}, "one finite number"),
    ],
)
def test_scores_that_do_not_fit_the_plan_are_refused(scores, sentence):
    with pytest.raises(UserError, match=stating(sentence)):
        next_seeds(scores, "base", PLAN)
    with pytest.raises(UserError, match=stating(sentence)):
        review(scores, "base", PLAN)


# ----------------------------------------------------------------------------
# What it costs and what it saves, by simulation


def run_adaptively(table: np.ndarray, plan: SeedPlan) -> tuple[np.ndarray, np.ndarray]:
    """Run a study as a driver would: [1 + arms, cap] scores, of which each arm sees what it asks for.

    Returns:
        Which arms have a verdict, and how many seeds each run of the table needed, the baseline's first.
    """
    names = ["base", *"abcdefgh"[: plan.arms]]
    seeds = dict.fromkeys(names, plan.start)
    while wanted := next_seeds({n: row[: seeds[n]] for n, row in zip(names, table, strict=True)}, "base", plan):
        seeds |= wanted
        seeds["base"] = max(seeds.values())
    scores = {n: row[: seeds[n]] for n, row in zip(names, table, strict=True)}
    decided = [c.verdict in (Verdict.BETTER, Verdict.WORSE) for c in review(scores, "base", plan, resamples=100)]
    return np.array(decided), np.array([seeds[n] for n in names])


def simulated(effects: list[float], plan: SeedPlan, studies: int, seed: int = 0) -> dict[str, object]:
    """Studies with differences of `effects` standard deviations: how the adaptive and the full study do.

    Returns:
        false (studies with a verdict on an arm of effect 0) and found (share of the others with a verdict), adaptive
        and with all seeds; agree (share of arms on which both say the same); saved (share of the runs).
    """
    rng = np.random.default_rng(seed)
    shift = np.array([0.0, *effects])[:, None] * math.sqrt(2.0)
    is_null, totals = np.array(effects) == 0.0, []
    for _ in range(studies):
        table = shift + rng.normal(size=(plan.arms + 1, plan.cap)) + rng.normal(size=(1, plan.cap))
        decided, runs = run_adaptively(table, plan)
        singles = [sign_flip_p(row - table[0]) for row in table[1:]]
        full = closed_p(table[0], table[1:], singles) <= plan.error_rate
        pair = [(d[is_null].any(), d[~is_null].mean() if not is_null.all() else NAN) for d in (decided, full)]
        totals.append([*pair[0], *pair[1], (decided == full).mean(), 1.0 - runs.sum() / table.size])
    names = ("false", "found", "false of all", "found of all", "agree", "saved")
    return dict(zip(names, np.mean(totals, axis=0).tolist(), strict=True))


@pytest.fixture
def few_permutations(monkeypatch):
    """p-values stay valid with any number of drawn permutations."""
    monkeypatch.setattr(multiple_testing, "PERMUTATIONS", 399)
    multiple_testing._closed.cache_clear()


def test_adaptive_studies_say_the_same_for_fewer_runs(few_permutations):
    """20 studies of no, a large and a very large difference."""
    found = simulated([0.0, 1.2, 2.5], SeedPlan(3, cap=12), studies=20)
    assert found["agree"] >= 0.9
    assert found["saved"] >= 0.15


@pytest.mark.slow
@pytest.mark.parametrize(
    ("effects", "cap"), [([0.0], 10), ([0.0] * 3, 12), ([0.0] * 5, 12), ([0.0, 0.0, 3.0], 12), ([0.0] * 3, 16)]
)
def test_false_verdicts_stay_at_or_under_5_percent_over_all_looks_and_arms(few_permutations, effects, cap):
    """Nobody stops as futility, and so nothing is decided before the first test: the studies start there."""
    first = SeedPlan(len(effects), cap=cap).tests[0][0]
    plan = SeedPlan(len(effects), start=first, cap=cap, futility=0.0)
    assert plan.tests == SeedPlan(len(effects), cap=cap).tests
    assert simulated(effects, plan, studies=2_000, seed=cap)["false"] <= 0.05


@pytest.mark.slow
@pytest.mark.parametrize(
    ("effects", "saved"), [([0.0, 0.0, 0.0], 0.28), ([0.0, 1.0, 2.0], 0.15), ([2.0, 2.0, 2.0], 0.25)]
)
def test_adaptive_studies_agree_with_full_ones(few_permutations, effects, saved):
    """With an arm in doubt the one that does nothing keeps pace, which costs some of what was saved."""
    found = simulated(effects, SeedPlan(3, cap=12), studies=500)
    assert found["agree"] >= 0.95
    assert found["saved"] >= saved
    assert found["false"] <= 0.05
