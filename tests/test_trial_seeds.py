"""Sweeps whose trials have several seeds: means, spreads, early stopping by the mean, interruption and failure."""

import shutil
from dataclasses import replace
from pathlib import Path

import pytest

from dxmi.config import build, to_tree
from dxmi.errors import DivergedError, UserError
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training import run as module
from dxmi.training.config import ExperimentConfig
from dxmi.training.progress import Progress
from dxmi.training.run import train
from support import TINY, changed, missing, stating
from tune import Sweep
from tune.cli.main import main
from tune.config.compose import compose_experiment
from tune.config.sweep import SweepConfig
from tune.execution.confirmation import fresh_scores
from tune.execution.trial import _mean_of_seeds, _SeedReporters
from tune.execution.trial_messages import TrialTask
from tune.plans.sweep import Plan
from tune.studies.leaderboard import leaderboard
from tune.studies.records import TrialState, completed
from tune.studies.seed_means import mean_rows, mean_summary, seed_runs
from tune.studies.study import Study

METRIC = "eval/fid_digits"
SEEDS = (3, 4)


class Told:
    """The reporter of a trial, which keeps what it was told and asks to stop after a number of scores."""

    def __init__(self, stop_after: int | None = None) -> None:
        self.events: list[Progress] = []
        self._stop_after = stop_after

    @property
    def scores(self) -> dict[int, float]:
        return {event.step: event.metrics[METRIC] for event in self.events if METRIC in event.metrics}

    @property
    def stop(self) -> bool:
        return self._stop_after is not None and len(self.scores) >= self._stop_after

    def __call__(self, event: Progress) -> bool:
        self.events.append(event)
        return self.stop


def task(out: Path, *overrides: str) -> TrialTask:
    config = compose_experiment([*TINY, f"seed={SEEDS[0]}", *overrides]).experiment
    return TrialTask(0, to_tree(config), str(out), None, METRIC, seeds=SEEDS)


# ----------------------------------------------------------------------------
# Means.


def test_rows_are_averaged_at_the_steps_and_keys_that_all_seeds_have():
    one = [{"step": 0, "a": 1.0}, {"step": 10, "a": 2.0, "b": 7.0}, {"step": 10, METRIC: 3.0}, {"step": 20, "a": 9.0}]
    other = [{"step": 10, METRIC: 5.0, "a": 4.0}, {"step": 0, "c": 1.0}]
    assert mean_rows([one, other]) == [{"step": 10, "a": 3.0, METRIC: 4.0}]
    assert mean_rows([one]) == one


def summary(score: float, last: float, reference: float) -> dict:
    return {
        "num_steps": 5,
        "reference": {"ddim_50_trailing": reference, "shortened": 30.0},
        "samplers": {"ddim_50_trailing": {"label": "50 steps", "sampler": "DDIM", "evaluations": 50, "role": "full"}},
        "scores": {"best": {METRIC: score, "eval/copies": score / 10}, "last": {METRIC: last}},
        "best": {"value": score, "step": int(score) * 100, "selection_value": score},
        "last": {"value": last, "step": 900},
        "seconds": {"finetune": 10.0, "report": 1.0},
        "direction": "minimize",
    }


def test_a_summary_has_the_mean_scores_and_the_time_of_all_seeds():
    mean = mean_summary([summary(2.0, 4.0, 6.0), summary(3.0, 8.0, 8.0)])
    assert mean["best"]["value"] == 2.5
    assert mean["best"]["step"] == 200
    assert mean["scores"]["best"] == {METRIC: 2.5, "eval/copies": 0.25}
    assert mean["reference"]["ddim_50_trailing"] == 7.0
    assert mean["seconds"] == {"finetune": 20.0, "report": 2.0}


def plan(**sweep) -> Plan:
    experiment = build(ExperimentConfig, {"seed": SEEDS[0]})
    space = {"algorithm.policy.lr": {"log_uniform": [1e-6, 1e-4]}}
    return Plan("study", experiment, build(SweepConfig, {"seeds": 2, **sweep}), space)


@pytest.mark.parametrize(
    ("metric", "mean", "by_seed"),
    [("score", 2.5, (2.0, 3.0)), ("last", 6.0, (4.0, 8.0)), ("pretrained", 7.0, (6.0, 8.0))],
)
def test_a_trial_is_ranked_by_the_mean_of_its_objective_and_keeps_that_of_each_seed(metric, mean, by_seed):
    outcome = completed(
        plan(objectives=[{"metric": metric}]), mean_summary([summary(2.0, 4.0, 6.0), summary(3.0, 8.0, 8.0)])
    )
    assert outcome.objectives == (mean,)
    assert outcome.by_seed == by_seed


def test_the_pretrained_model_is_as_good_as_its_best_sampler_and_not_as_the_policy_before():
    told = summary(2.0, 4.0, 6.0)
    told["reference"] = {"ddim_50_trailing": 6.0, "ddim_5": 5.5, "shortened": 1.0}
    assert completed(plan(objectives=[{"metric": "pretrained"}]), told).objectives == (5.5,)


# ----------------------------------------------------------------------------
# Training.


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """The mean summary and the scores told of a trial of two seeds, and its folder."""
    out, told = tmp_path_factory.mktemp("trial") / "0000", Told()
    return _mean_of_seeds(task(out), train, told), told, out


def test_the_seeds_are_runs_of_their_own_and_the_trial_tells_of_their_means(finished):
    mean, told, out = finished
    runs = seed_runs(out, SEEDS)
    assert [run.read_config()["seed"] for run in runs] == list(SEEDS)
    summaries = [run.read_summary() for run in runs]
    assert mean["best"]["value"] == pytest.approx(sum(own["best"]["value"] for own in summaries) / 2)
    assert summaries[0]["best"]["value"] != summaries[1]["best"]["value"]
    assert list(told.scores) == [0, 10, 20, 30, 40]
    for step, score in told.scores.items():
        own = [next(row[METRIC] for row in run.rows() if row["step"] == step and METRIC in row) for run in runs]
        assert score == pytest.approx(sum(own) / 2)


@pytest.mark.parametrize("after", [1, 3])
def test_an_interrupted_trial_continues_every_seed_and_ends_as_it_would_have(finished, tmp_path, after):
    out = tmp_path / "0000"
    assert _mean_of_seeds(task(out), train, Told(stop_after=after)) is None
    told = Told()
    mean = _mean_of_seeds(task(out), train, told)
    expected, before, _ = finished
    assert mean["scores"] == expected["scores"]
    assert told.scores.items() <= before.scores.items()
    assert 40 in told.scores


def test_a_score_is_told_when_the_last_seed_has_it_also_if_another_session_had_the_others(tmp_path):
    runs = seed_runs(tmp_path / "0000", SEEDS)
    runs[0].create()
    runs[0].append([{"step": 10, METRIC: 2.0}])
    told = Told()
    reporters = _SeedReporters(told, METRIC, runs, SEEDS)
    event = Progress("finetune", 10, 40, {METRIC: 4.0})
    assert not reporters.of(1)(replace(event, step=0))
    assert told.scores == {}
    reporters.of(1)(event)
    assert told.scores == {10: 3.0}
    reporters.of(1)(Progress("finetune", 10, 40, note="something"))
    assert told.events[-1].note == "seed 4: something"


def test_if_one_seed_fails_the_others_stop_and_the_trial_fails(tmp_path, monkeypatch):
    original = module.Run._evaluate

    def fails(self, step: int) -> float:
        if step == 20 and self.config.seed == SEEDS[1]:
            raise DivergedError(20, METRIC, float("nan"))
        return original(self, step)

    monkeypatch.setattr(module.Run, "_evaluate", fails)
    out = tmp_path / "0000"
    with pytest.raises(DivergedError):
        _mean_of_seeds(task(out), train, Told())
    other = RunDirectory(out)
    assert other.read_summary() is None
    assert max(row["step"] for row in other.rows()) < 40


def test_the_best_checkpoint_of_each_seed_is_confirmed(finished):
    _, _, out = finished
    runs = seed_runs(out, SEEDS)
    steps = [run.read_summary()["best"]["step"] for run in runs]
    checkpoints = [(str(run.path), step) for run, step in zip(runs, steps, strict=True)]
    each = [fresh_scores([one], 1)["scores"][METRIC] for one in checkpoints]
    assert fresh_scores(checkpoints, 1)["scores"][METRIC] == pytest.approx(sum(each) / 2)
    assert each[0] != each[1]
    assert missing("iteration 7 … missing", fresh_scores([checkpoints[0], (str(runs[1].path), 7)], 1)["problem"]) == []


# ----------------------------------------------------------------------------
# Studies.


def test_a_study_knows_every_seed_of_its_trials_after_a_crash(finished, tmp_path):
    """The journal ends before the trial's end, and the run folders are those of a finished trial."""
    sweep = Sweep(*TINY, "sweep=demo", "sweep.seeds=2", f"seed={SEEDS[0]}", name="s", studies=tmp_path)
    with sweep.folder.lock():
        study = Study.drive(sweep.folder, sweep.plan)
    record = study.add()
    assert [run.path.name for run in record.further_runs] == [str(SEEDS[1])]
    shutil.copytree(finished[2], record.run.path)
    assert study.reconcile() == []
    record = study.record(0)
    assert record.state is TrialState.COMPLETE
    assert record.outcome.score == pytest.approx(finished[0]["best"]["value"])
    assert record.curve(METRIC) == pytest.approx(finished[1].scores)
    row = leaderboard(study.plan, [record]).to_dict("records")[0]
    assert row["sd"] == pytest.approx(abs(row["seed_3"] - row["seed_4"]) / 2**0.5)
    assert study.tidy(0) > 0


@pytest.mark.parametrize(
    ("overrides", "sentence"),
    [
        (["sweep.seeds=0"], "sweep.seeds is 0 … 1..64"),
        (["sweep.seeds=2", "+sweep.space.seed.choice=[0,1]"], "sweep.seeds is 2 … sweep.space varies seed"),
        (["sweep.seeds=2", "resources.num_workers=2"], "sweep.seeds is 2 … resources.num_workers"),
    ],
)
def test_seeds_that_cannot_be_are_refused(overrides, sentence, tmp_path):
    with pytest.raises(UserError, match=stating(sentence)):
        Sweep(*TINY, "sweep=demo", *overrides, name="s", studies=tmp_path)


@pytest.mark.slow
def test_a_sweep_over_parents_and_seeds_from_the_command_line(tmp_path, capsys):
    few = ["sweep.budget.trials=2", "sweep.seeds=2", "+sweep.space.pretrain.iterations.choice=[40,80]"]
    words = [*changed(TINY, "train.iterations=0"), "sweep=parent", *few, "name=p", "--studies", str(tmp_path)]
    assert main(["sweep", *words]) == 0
    printed = capsys.readouterr().out
    assert missing("2 trials of 2 seeds each … pretrained … sd … pretrained model", printed) == []
    assert "fresh" not in printed
