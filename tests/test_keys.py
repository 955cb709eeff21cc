"""The keys of scores: each has one direction, and one of a run's scores is primary."""

import pytest

from dxmi.evaluation.scored_references import Role, ScoredReference, best_reference, full_reference
from dxmi.metrics.keys import (
    MAXIMIZE,
    MINIMIZE,
    REWARD_KEY,
    ScoreKey,
    best_score,
    classifier_keys,
    inception_keys,
    inception_score_key,
    is_better,
    planar_keys,
    primary_key,
    with_primary,
)

LISTS = {"classifier": classifier_keys("digits"), "inception": inception_keys(5_000), "planar": planar_keys()}


@pytest.mark.parametrize("keys", LISTS.values(), ids=LISTS)
def test_one_score_is_primary_and_it_is_a_distance(keys):
    (primary,) = (key for key in keys if key.primary)
    assert primary_key(keys) == primary
    assert primary.direction == MINIMIZE
    assert len({key.name for key in keys}) == len(keys)


def test_what_is_to_grow_is_maximized_and_distances_are_minimized():
    keys = [*(key for keys in LISTS.values() for key in keys), inception_score_key(5_000), REWARD_KEY]
    grow = {key.name for key in keys if key.direction == MAXIMIZE}
    assert grow == {
        *("eval/precision_digits", "eval/recall_digits", "eval/precision_5k", "eval/recall_5k"),
        *("eval/energy_auc", "eval/inception_score_5k", "eval/reward"),
    }
    assert {key.direction for key in keys} == {MINIMIZE, MAXIMIZE}


def test_better_is_strictly_on_the_side_of_the_direction():
    assert is_better(1.0, 2.0, MINIMIZE)
    assert is_better(2.0, 1.0, MAXIMIZE)
    assert not is_better(2.0, 1.0, MINIMIZE)
    assert not is_better(1.0, 2.0, MAXIMIZE)
    assert not any(is_better(1.0, 1.0, direction) for direction in (MINIMIZE, MAXIMIZE))
    assert (best_score([2.0, 1.0, 3.0], MINIMIZE), best_score([2.0, 1.0, 3.0], MAXIMIZE)) == (1.0, 3.0)


def test_another_primary_may_be_chosen():
    keys = with_primary(planar_keys(), "eval/energy_auc")
    assert primary_key(keys) == ScoreKey("eval/energy_auc", MAXIMIZE, primary=True)
    assert sum(key.primary for key in keys) == 1
    with pytest.raises(ValueError, match=r"^primary is 'eval/fid'.*eval/sliced_wasserstein"):
        with_primary(planar_keys(), "eval/fid")


def test_the_best_reference_is_by_the_direction_of_the_score():
    def scored(key: str, role: Role, evaluations: int, score: float) -> ScoredReference:
        return ScoredReference(key, key, key, role, evaluations, score)

    found = [
        scored("full", Role.FULL, 1000, 5.0),
        scored("full 250", Role.FULL, 250, 3.0),
        scored("few", Role.FEW, 10, 2.0),
        scored("other few", Role.FEW, 10, 4.0),
    ]
    for direction, full, few in ((MINIMIZE, "full 250", "few"), (MAXIMIZE, "full", "other few")):
        assert full_reference(found, direction).key == full
        assert best_reference(found, 10, direction).key == few
    assert best_reference(found, 1) is None
