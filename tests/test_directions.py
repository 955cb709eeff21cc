"""Scores that are maximized: the best checkpoint, ranking, early stopping, Optuna's direction, tables and sentences."""

from dataclasses import replace
from typing import Any

import pytest

from dxmi.config import build, to_tree
from dxmi.errors import UserError
from dxmi.evaluation.scored_references import Role, ScoredReference, best_reference
from dxmi.metrics.keys import MAXIMIZE, MINIMIZE, ScoreKey, best_score, is_better, primary_key, with_primary
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.run import train
from support import TINY, stating
from tune.config.compose import compose_experiment
from tune.config.sweep import ObjectiveConfig, SweepConfig, TrackingConfig
from tune.plans.sweep import Plan
from tune.studies.folder import StudyFolder
from tune.studies.outdone import outdone
from tune.studies.ranking import ranked
from tune.studies.records import Outcome, TrialState, pruned, unfinished
from tune.studies.study import Study

REWARDED = {"algorithm": {"kind": "reinforce"}, "reward": {"kind": "classifier", "label": 3}}
SPACE = {"algorithm": {"policy": {"lr": {"log_uniform": [1e-6, 1e-3]}}}}
CURVE = {0: -3.0, 1: -1.0, 2: -2.0}


def rewarded(**changes: Any) -> ExperimentConfig:
    tree = to_tree(compose_experiment(TINY).experiment) | REWARDED | changes
    return build(ExperimentConfig, tree)


def plan(experiment: ExperimentConfig, **sweep: Any) -> Plan:
    return Plan("rewards", experiment, build(SweepConfig, sweep), SPACE, TrackingConfig())


def test_a_reward_is_the_primary_score_and_maximized():
    keys = rewarded().score_keys()
    assert primary_key(keys) == ScoreKey("eval/reward", MAXIMIZE, primary=True)
    assert primary_key(compose_experiment(TINY).experiment.score_keys()).direction == MINIMIZE


def test_the_primary_score_can_be_chosen():
    tree = to_tree(rewarded())
    tree["evaluate"]["primary"] = "eval/fid_digits"
    assert primary_key(build(ExperimentConfig, tree).score_keys()) == ScoreKey("eval/fid_digits", primary=True)
    tree["evaluate"]["primary"] = "eval/fdi"
    with pytest.raises(UserError, match=stating("evaluate.primary is 'eval/fdi' … eval/reward")):
        build(ExperimentConfig, tree)
    with pytest.raises(ValueError, match="primary is 'b'"):
        with_primary([ScoreKey("a")], "b")


def test_a_score_that_no_training_free_sampler_has_can_decide(tmp_path):
    """The area under the energy's ROC curve: the samplers learn no energy, and only the data has a floor of it."""
    small = ["pretrain.iterations=5", "train.iterations=4", "train.batch_size=16", "evaluate.every=2"]
    scored = ["evaluate.num_samples=32", "evaluate.batch_size=32", "evaluate.full_reference=false"]
    made = compose_experiment(["experiment=gaussians8", "evaluate.primary=eval/energy_auc", *small, *scored])
    summary = train(Experiment(made.experiment), out=tmp_path / "run")
    assert summary is not None
    assert (summary.metric, summary.direction) == ("eval/energy_auc", MAXIMIZE)
    assert list(summary.reference) == ["data"]


def test_no_reward_is_an_option():
    assert compose_experiment([*TINY, "reward=null"]).experiment.reward is None


def test_an_algorithm_that_needs_a_reward_is_refused_without_one():
    with pytest.raises(UserError, match=stating("reward is null … algorithm.kind is reinforce … classifier")):
        rewarded(reward=None)


def test_the_best_checkpoint_has_the_highest_reward(tmp_path):
    seen: dict[int, float] = {}

    def report(progress: Any) -> None:
        if "eval/reward" in progress.metrics:
            assert next(iter(progress.metrics)) == "eval/reward"  # the one that the command line shows
            seen[progress.step] = progress.metrics["eval/reward"]

    summary = train(Experiment(rewarded()), out=tmp_path / "run", report=report)
    assert summary is not None
    assert (summary.metric, summary.direction) == ("eval/reward", MAXIMIZE)
    assert summary.best["step"] == max(seen, key=lambda step: seen[step])
    assert summary.best["selection_value"] == max(seen.values())
    assert summary.directions["eval/fid_digits"] == MINIMIZE


def test_a_reward_that_does_not_fit_the_data_is_refused_before_anything_is_trained(tmp_path):
    made = compose_experiment(["experiment=gaussians8", "algorithm=reinforce", "reward=classifier", "reward.label=3"])
    with pytest.raises(UserError, match=stating("reward.classifier is digits … (1, 8, 8) … (2,) … another reward")):
        train(Experiment(made.experiment), out=tmp_path / "run")
    assert not (tmp_path / "run").exists()


def test_objectives_take_the_direction_of_their_metric():
    made = plan(rewarded(), objectives=[{"metric": "score"}])
    assert [objective.direction for objective in made.objectives] == [MAXIMIZE]
    two = plan(
        rewarded(),
        sampler={"kind": "nsga2"},
        objectives=[{"metric": "eval/fid_digits"}, {"metric": "eval/recall_digits"}],
    )
    assert [objective.direction for objective in two.objectives] == [MINIMIZE, MAXIMIZE]
    own = plan(rewarded(), objectives=[{"metric": "eval/reward", "direction": "minimize"}])
    assert [objective.direction for objective in own.objectives] == [MINIMIZE]


def test_optuna_and_the_ranking_maximize(tmp_path):
    made = plan(rewarded(), sampler={"kind": "random"}, budget={"trials": 3})
    folder = StudyFolder(tmp_path / "study")
    folder.path.mkdir()
    study = Study.drive(folder, made)
    for score in (-2.0, -0.5, -1.0):
        record = study.add()
        assert record is not None
        study.finish(record.number, Outcome(TrialState.COMPLETE, score=score, step=1, objectives=(score,)))
    assert [record.number for record in ranked(study.plan, study.records())] == [1, 2, 0]
    assert [direction.name for direction in study.optuna.directions] == ["MAXIMIZE"]
    assert study.optuna.best_trial.number == 1


def test_early_stopping_keeps_the_highest():
    made = plan(rewarded(), stopping={"rule": "asha", "first_step": 1})
    assert pruned(made, CURVE, 2) == Outcome(TrialState.PRUNED, pruned(made, CURVE, 2).reason, -1.0, 1, seconds=0.0)
    assert unfinished(made, CURVE, TrialState.STOPPED, "asked", 0.0).score == -1.0
    fid = replace(made, experiment=compose_experiment(TINY).experiment)
    assert unfinished(fid, CURVE, TrialState.STOPPED, "asked", 0.0).score == -3.0
    with pytest.raises(UserError, match=stating("sweep.stopping.rule is 'asha' … maximized")):
        plan(rewarded(), stopping={"rule": "asha"}, objectives=[{"metric": "score", "direction": "minimize"}])


def test_a_free_sampler_is_better_only_in_the_score_s_own_direction():
    free = [
        ScoredReference("ddim_5", "DDIM", "DDIM", Role.FEW, 5, -1.0),
        ScoredReference("b", "B", "B", Role.FEW, 5, -4.0),
    ]
    assert best_reference(free, 5, MAXIMIZE) == free[0]
    assert best_reference(free, 5, MINIMIZE) == free[1]
    assert outdone("this run", -0.5, free, 5, MAXIMIZE) is None
    assert outdone("this run", -2.0, free, 5, MAXIMIZE) is not None


def test_better_and_best():
    assert is_better(2.0, 1.0, MAXIMIZE)
    assert not is_better(2.0, 1.0, MINIMIZE)
    assert not is_better(1.0, 1.0, MAXIMIZE)
    assert (best_score([1.0, 2.0], MAXIMIZE), best_score([1.0, 2.0], MINIMIZE)) == (2.0, 1.0)
    assert ObjectiveConfig(direction="maximize").sign == -1.0
