"""Early stopping: who goes on at a rung and who at the median, against Optuna's pruners and the text of the rules."""

import copy
import random

import numpy as np
import optuna
import pytest
from optuna.pruners import MedianPruner, SuccessiveHalvingPruner
from optuna.trial import TrialState

from tune.config.sweep import StoppingConfig
from tune.search.pruners import should_prune

ASHA = StoppingConfig(rule="asha", first_step=1, factor=3)
TO_STEP = 30


def replayed(rule: StoppingConfig, scores: dict[int, dict[int, float]], seed: int):
    """Trials that are scored in turns, in a random order, until they are stopped or have no more scores.

    Yields (curves so far, finished, number, step, whether it was stopped).
    """
    rng = random.Random(seed)
    pending = {number: sorted(curve) for number, curve in scores.items()}
    curves: dict[int, dict[int, float]] = {}
    finished: list[int] = []
    while pending:
        number = rng.choice(sorted(pending)[:3])  # three at once
        step = pending[number].pop(0)
        curves.setdefault(number, {})[step] = scores[number][step]
        stop = should_prune(rule, curves, finished, number, step)
        yield curves, finished, number, step, stop
        if stop or not pending[number]:
            del pending[number]
            finished += [] if stop else [number]


def random_scores(seed: int, steps: list[int], trials: int = 15) -> dict[int, dict[int, float]]:
    """Curves with ties, of different length."""
    rng = np.random.default_rng(seed)
    return {n: {step: float(rng.integers(0, 12)) for step in steps} for n in range(trials)}


# ----------------------------------------------------------------------------
# ASHA


def by_the_text(rule: StoppingConfig, curves: dict[int, dict[int, float]], number: int, step: int) -> bool:
    """The rule as its text says it, with ranks: at each rung that this step is the trial's first score at or past of,
    it goes on if fewer than the best 1/factor (at least one) of the trials there are better than it.
    """
    rungs = [rule.first_step * rule.factor**k for k in range(20)]
    for rung in (rung for rung in rungs if rung <= step):
        first = {n: min((s for s in curve if s >= rung), default=None) for n, curve in curves.items()}
        there = [curves[n][s] for n, s in first.items() if s is not None]
        better = sum(score < curves[number][step] for score in there)
        if first[number] == step and better >= max(1, len(there) // rule.factor):
            return True
    return False


def optuna_says(study: optuna.Study, trials: list[optuna.Trial], number: int, step: int, score: float) -> bool:
    trials[number].report(score, step)
    return trials[number].should_prune()


@pytest.mark.parametrize("factor", [2, 3, 4])
@pytest.mark.parametrize("seed", range(4))
def test_asha_decides_as_optunas_pruner_when_every_rung_is_scored(factor, seed):
    rule = StoppingConfig(rule="asha", first_step=2, factor=factor)
    pruner = SuccessiveHalvingPruner(min_resource=2, reduction_factor=factor)
    study = optuna.create_study(pruner=pruner)
    trials = [study.ask() for _ in range(15)]
    decisions = []
    for curves, _, number, step, stop in replayed(rule, random_scores(seed, [*range(0, TO_STEP, 2)]), seed):
        assert stop == optuna_says(study, trials, number, step, curves[number][step])
        decisions.append(stop)
    assert {True, False} <= set(decisions)


@pytest.mark.parametrize("first_step", [1, 4, 7])
@pytest.mark.parametrize("seed", range(4))
def test_asha_decides_by_its_text_when_scores_miss_the_rungs(first_step, seed):
    rule = StoppingConfig(rule="asha", first_step=first_step, factor=3)
    rng = random.Random(seed)
    scores = {
        n: {step: curve[step] for step in sorted(rng.sample(sorted(curve), 6))}
        for n, curve in random_scores(seed, [*range(90)]).items()
    }
    decisions = []
    for curves, finished, number, step, stop in replayed(rule, scores, seed):
        assert stop == by_the_text(rule, curves, number, step)
        assert stop == should_prune(rule, copy.deepcopy(curves), [*finished], number, step)  # asked again
        decisions.append(stop)
    assert {True, False} <= set(decisions)


def test_the_first_trial_at_a_rung_is_never_stopped():
    rising = {step: float(step) for step in range(TO_STEP)}
    curves: dict[int, dict[int, float]] = {0: {}}
    for step, score in rising.items():
        curves[0][step] = score
        assert not should_prune(ASHA, curves, [], 0, step)


@pytest.mark.parametrize(
    ("factor", "scores", "goes_on"),
    [
        (3, [5.0, 4.0, 3.0, 2.0], [True, True, True, True]),  # each the best so far
        (3, [1.0, 2.0, 3.0, 4.0], [True, False, False, False]),  # one of 2, 3 and 4 goes on
        (3, [1.0, 3.0, 4.0, 5.0, 6.0, 2.0], [True, False, False, False, False, True]),  # of six, two
        (2, [1.0, 3.0, 4.0, 2.0], [True, False, False, True]),  # of four, two
        (2, [1.0, 1.0, 1.0], [True, True, True]),  # equals go on together
    ],
)
def test_the_best_1_over_factor_go_on(factor, scores, goes_on):
    rule = StoppingConfig(rule="asha", first_step=10, factor=factor)
    curves: dict[int, dict[int, float]] = {}
    for number, score in enumerate(scores):
        curves[number] = {10: score}
        assert should_prune(rule, curves, [], number, 10) is not goes_on[number]


def test_nothing_is_stopped_before_the_first_rung_or_between_rungs():
    rule = StoppingConfig(rule="asha", first_step=10, factor=3)
    steps = [0, 5, 9, 10, 11, 29, 30, 31]
    curves = {0: dict.fromkeys(steps, 0.0), 1: dict.fromkeys(steps, 1.0)}
    assert [step for step in steps if should_prune(rule, curves, [], 1, step)] == [10, 30]


def test_the_first_score_past_a_rung_stands_for_it():
    rule = StoppingConfig(rule="asha", first_step=10, factor=3)
    best, worse = {8: 9.0, 12: 1.0, 16: 9.0}, {8: 0.0, 15: 2.0, 20: 0.0}
    assert should_prune(rule, {0: best, 1: worse}, [], 1, 15)
    assert not should_prune(rule, {0: best, 1: worse}, [], 1, 20)  # the rung is past
    assert not should_prune(rule, {0: best, 1: {8: 9.0, 15: 1.0}}, [], 1, 15)


@pytest.mark.parametrize(("score", "stopped"), [(4.0, True), (2.0, True), (1.0, False)])
def test_several_rungs_that_are_passed_at_once_must_all_be_survived(score, stopped):
    # At rung 1 the others have 3 and 3, at rung 3 they have 1 and 5: a 2 would do at the first, but not at the second.
    others = {0: {1: 3.0, 3: 1.0}, 1: {1: 3.0, 3: 5.0}}
    assert should_prune(ASHA, {**others, 2: {0: 0.0, 4: score}}, [], 2, 4) is stopped


def test_a_decision_does_not_look_at_what_the_trial_does_later():
    for curves, finished, number, step, stop in replayed(ASHA, random_scores(5, [*range(TO_STEP)]), 5):
        later = {**curves, number: {**curves[number], step + 1: -100.0, step + 50: 100.0}}
        assert should_prune(ASHA, later, finished, number, step) == stop


def test_a_decision_changes_nothing():
    curves = random_scores(6, [*range(TO_STEP)])
    before, finished = copy.deepcopy(curves), [0, 1]
    for rule in ("asha", "median", "none"):
        for step in range(TO_STEP):
            should_prune(StoppingConfig(rule=rule, first_step=1), curves, finished, 3, step)
    assert (curves, finished) == (before, [0, 1])


def test_the_order_of_the_trials_does_not_matter():
    curves = random_scores(7, [*range(TO_STEP)])
    turned = dict(reversed(curves.items()))
    for number in curves:
        assert should_prune(ASHA, curves, [], number, 9) == should_prune(ASHA, turned, [], number, 9)


# ----------------------------------------------------------------------------
# The median


def test_the_median_rule_by_hand():
    rule = StoppingConfig(rule="median", first_step=10, min_trials=3)
    # Means up to step 20: 4, 3, 10; their median is 4. Up to step 10: 5, 2, 10; it is 5.
    curves = {0: {0: 6.0, 10: 4.0, 20: 2.0}, 1: {0: 2.0, 10: 2.0, 20: 5.0}, 2: {0: 10.0, 10: 10.0, 20: 10.0}}
    for score, step, stopped in ((5.1, 10, True), (5.0, 10, False), (4.1, 20, True), (4.0, 20, False)):
        assert should_prune(rule, {**curves, 3: {step: score}}, [0, 1, 2], 3, step) is stopped


def test_the_median_rule_looks_at_the_best_score_so_far_and_at_no_later_one():
    rule = StoppingConfig(rule="median", first_step=10, min_trials=1)
    finished = {0: {10: 5.0, 20: 5.0, 30: 0.0}}
    assert not should_prune(rule, {**finished, 1: {10: 4.0, 20: 9.0}}, [0], 1, 20)
    assert should_prune(rule, {**finished, 1: {10: 6.0, 20: 9.0, 30: 0.0}}, [0], 1, 20)


def test_the_median_rule_stops_nothing_early_or_with_few_finished_trials():
    rule = StoppingConfig(rule="median", first_step=10, min_trials=3)
    curves = {n: {0: 1.0, 9: 1.0, 10: 1.0} for n in range(4)} | {4: {0: 9.0, 9: 9.0, 10: 9.0}}
    assert not should_prune(rule, curves, [0, 1, 2, 3], 4, 9)
    assert should_prune(rule, curves, [0, 1, 2], 4, 10)
    assert not should_prune(rule, curves, [0, 1], 4, 10)
    assert not should_prune(rule, curves, [0, 1, 4], 4, 10)  # it is not compared with itself
    assert not should_prune(rule, {**curves, 2: {20: 1.0}}, [0, 1, 2], 4, 10)  # nothing to compare with so early


@pytest.mark.parametrize("seed", range(5))
def test_the_median_rule_decides_as_optunas_pruner_where_finished_curves_are_flat(seed):
    """A flat curve's mean so far (Golovin et al. 2017) is its score at the step, which is what Optuna takes."""
    rng = np.random.default_rng(seed)
    steps = [*range(0, 40, 10)]
    study = optuna.create_study(pruner=MedianPruner(n_startup_trials=3, n_warmup_steps=20))
    rule = StoppingConfig(rule="median", first_step=20, min_trials=3)
    curves: dict[int, dict[int, float]] = {}
    decisions = set()
    for number in range(7):
        trial, height = study.ask(), float(rng.integers(0, 9))
        curves[number] = dict.fromkeys(steps, height)
        for step in steps:
            trial.report(height, step)
        study.tell(trial, height)
        for _ in range(10):
            asked, curve = study.ask(), {}
            for step in steps:
                curve[step] = float(rng.integers(2, 12))
                asked.report(curve[step], step)
                stop = should_prune(rule, {**curves, 99: curve}, [*curves], 99, step)
                assert stop == asked.should_prune()
                decisions.add(stop)
            study.tell(asked, state=TrialState.FAIL)
    assert decisions == {True, False}


@pytest.mark.parametrize("seed", range(5))
def test_the_median_rule_against_numpy(seed):
    rng = np.random.default_rng(seed)
    rule = StoppingConfig(rule="median", first_step=3, min_trials=2)
    table = rng.normal(size=(8, 12))
    curves = {n: dict(enumerate(row.tolist())) for n, row in enumerate(table)}
    for number in range(4, 8):
        for step in range(12):
            median = np.median(table[:4, : step + 1].mean(axis=1))
            expected = step >= 3 and table[number, : step + 1].min() > median
            assert should_prune(rule, curves, [0, 1, 2, 3], number, step) == expected


# ----------------------------------------------------------------------------
# None


def test_without_a_rule_nothing_is_stopped():
    rule = StoppingConfig(rule="none", first_step=1, min_trials=1)
    curves = {0: {100: 0.0}, 1: {100: 1.0}, 2: {100: 1e9}}
    assert not any(should_prune(rule, curves, [0, 1], number, 100) for number in curves)
    assert should_prune(StoppingConfig(rule="median", first_step=1, min_trials=1), curves, [0, 1], 2, 100)
