"""The pretrained models that ship with the package: found by their recipe, used unless unwanted, never altered."""

import json

import pytest
import torch

from dxmi.errors import UserError
from dxmi.persistence.cache import cached
from dxmi.training import shipped
from dxmi.training.build import Experiment
from dxmi.training.run import train
from dxmi.training.shipped import SHIPPED, find_shipped
from support import TINY, changed, missing, stating
from tune.cli.main import main
from tune.cli.parser import parse
from tune.config.compose import compose_experiment

QUICK = ["train.iterations=0", "evaluate.full_reference=false", "evaluate.num_samples=64", "evaluate.batch_size=64"]


def experiment(*overrides: str) -> Experiment:
    return Experiment(compose_experiment(["experiment=digits", *overrides]).experiment)


def test_every_shipped_model_is_that_of_an_experiment():
    assert {*SHIPPED} == {"digits"}
    for name in SHIPPED:
        own = Experiment(compose_experiment([f"experiment={name}"]).experiment)
        assert own.shipped is not None
        assert own.shipped.sha256 == SHIPPED[name]
        own.build_denoiser().load_state_dict(dict(own.shipped.tensors))


@pytest.mark.parametrize(
    "other",
    ["seed=1", "pretrain.iterations=59999", "pretrain.ema=0.99", "network.denoiser.hidden=16", "data.label=3"],
)
def test_another_pretraining_is_not_shipped(other):
    assert experiment(other).shipped is None
    assert experiment(other).pretraining_signature != experiment().pretraining_signature


def test_what_pretraining_does_not_depend_on_does_not_matter():
    assert experiment("algorithm.policy.lr=1e-4", "train.iterations=7", "schedule.num_steps=3").shipped is not None


def test_from_scratch_is_another_run_whose_parent_is_trained():
    args = parse(["train", "experiment=digits", "--from-scratch"])
    scratch = experiment(*args.overrides[1:])
    assert scratch.shipped is None
    assert scratch.config.signature != experiment().config.signature
    assert scratch.pretraining_recipe == experiment().pretraining_recipe
    for command in ("sweep", "ablate"):
        assert parse([command, "experiment=digits", "--from-scratch"]).overrides[-1] == "pretrain.shipped=false"


def test_a_run_with_the_shipped_model_says_so_and_needs_no_pretraining(tmp_path, capsys):
    out = tmp_path / "run"
    assert main(["train", "experiment=digits", *QUICK, f"out={out}"]) == 0
    assert missing("digits ships with the package … --from-scratch", capsys.readouterr().err) == []
    summary = json.loads((out / "summary.json").read_text())
    assert summary["inputs"]["parent"] == SHIPPED["digits"]
    assert summary["seconds"]["pretrain"] < 5.0
    assert summary["reference"]["ddim_5_trailing"] < 20.0  # of 64 samples; an untrained model has hundreds


def test_an_altered_file_is_refused(monkeypatch):
    monkeypatch.setattr(shipped, "SHIPPED", {"digits": "0" * 64})
    shipped._names_by_recipe.cache_clear()
    with pytest.raises(UserError, match=stating("digits … --from-scratch")):
        find_shipped({})
    shipped._names_by_recipe.cache_clear()


def test_the_shipped_weights_are_those_of_a_run_rounded_to_half_precision(tmp_path, monkeypatch, capsys):
    """The command that writes a file, on a small pretraining."""
    made = Experiment(compose_experiment(changed(TINY, *QUICK)).experiment)
    train(made, out=tmp_path / "run")
    (tmp_path / "parents").mkdir()
    monkeypatch.setattr(shipped, "__file__", str(tmp_path / "shipped.py"))
    monkeypatch.setattr(shipped, "files", lambda _: tmp_path)
    shipped.main("small", tmp_path / "run")
    monkeypatch.setattr(shipped, "SHIPPED", {"small": capsys.readouterr().out.strip()})
    shipped._names_by_recipe.cache_clear()
    found = find_shipped(made.pretraining_recipe)
    shipped._names_by_recipe.cache_clear()
    exact = cached(made.pretraining_path, dict)
    for key, value in exact.items():
        assert torch.equal(found.tensors[key], value.half().float())
