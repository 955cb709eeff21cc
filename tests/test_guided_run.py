"""Value guidance as a setting of a run: its evaluations use it, its training does not."""

import pytest
import torch

from dxmi.errors import UserError
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.build import Experiment
from dxmi.training.loading import load_run
from dxmi.training.run import train
from dxmi.training.schema import read_config
from support import TINY, changed, stating
from tune.config.compose import compose_experiment

METRIC = "eval/fid_digits"


@pytest.fixture(scope="module")
def runs(tmp_path_factory) -> dict[float, RunDirectory]:
    """Finished runs by their guidance."""
    found = {}
    for guidance in (0.0, 5.0):
        out = tmp_path_factory.mktemp("guided") / "run"
        settings = changed(TINY, "evaluate.full_reference=false", f"algorithm.guidance={guidance}")
        train(Experiment(compose_experiment(settings).experiment), out=out)
        found[guidance] = RunDirectory(out)
    return found


def test_training_is_the_same_and_scores_are_not(runs):
    plain, guided = (runs[guidance].rows() for guidance in (0.0, 5.0))
    for key in ("policy/loss", "energy/loss", "value/td_error"):
        assert [row[key] for row in plain if key in row] == [row[key] for row in guided if key in row]
    assert [row[METRIC] for row in plain if METRIC in row] != [row[METRIC] for row in guided if METRIC in row]


def test_a_run_is_scored_again_with_its_own_guidance_or_another(runs):
    def last(guidance: float, given: float | None) -> float:
        run = runs[guidance]
        return load_run(run, read_config(run.read_config()), "last").scores(None, None, given).values[METRIC]

    assert last(5.0, None) == pytest.approx(runs[5.0].read_summary()["last"]["value"])
    assert last(5.0, 0.0) == pytest.approx(runs[0.0].read_summary()["last"]["value"])


@pytest.mark.parametrize(
    "settings",
    [
        ["algorithm=reinforce", "reward=quadratic"],
        ["algorithm.value=separate", "algorithm.policy_horizon=null", "algorithm.value_updates=0"],
    ],
    ids=["no value", "an untrained value"],
)
def test_a_run_without_a_trained_value_is_not_guided(tmp_path, settings):
    given = changed(TINY, "evaluate.full_reference=false", *settings)
    train(Experiment(compose_experiment(given).experiment), out=tmp_path / "run")
    run = RunDirectory(tmp_path / "run")
    loaded = load_run(run, read_config(run.read_config()), "last")
    assert torch.equal(loaded.states(4, 0, None), loaded.states(4, 0, 0.0))
    with pytest.raises(UserError, match=stating("guidance is 0.1 … no value … leave out")):
        loaded.states(4, 0, 0.1)
