"""A device that runs out of memory: an iteration is divided once, and otherwise the message says what to lower."""

from pathlib import Path
from typing import Any

import pytest
import torch

from dxmi.errors import UserError
from dxmi.optim.optimizer import Optimizer
from dxmi.persistence import checkpoint
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.progress import Progress
from dxmi.training.run import SeedRun, train, train_stacked
from support import TINY, stating
from tune.config.compose import compose_experiment


def config(*overrides: str) -> ExperimentConfig:
    return compose_experiment([*TINY, *overrides]).experiment


def limited(monkeypatch: pytest.MonkeyPatch, pieces: int, after: int = 0) -> None:
    """Let gradients of a batch in fewer than `pieces` micro-batches fail, except in the first `after` calls."""
    gradients, calls = Optimizer.gradients, [0]

    def checked(self: Optimizer, loss: Any, *inputs: Any, num: int, static: Any = None) -> Any:
        calls[0] += 1
        if self.accumulate < pieces and calls[0] > after:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 20.00 MiB.")
        return gradients(self, loss, *inputs, num=num, static=static)

    monkeypatch.setattr(Optimizer, "gradients", checked)


def notes_of(run: Any, out: Path) -> list[str]:
    notes: list[str] = []

    def report(progress: Progress) -> None:
        if progress.note:
            notes.append(progress.note)

    run(Experiment(config()), out=out, report=report)
    return notes


@pytest.mark.parametrize("after", [0, 30, 150])
def test_an_iteration_that_does_not_fit_is_divided(tmp_path, monkeypatch, after):
    """In the first call, and in the middle of pretraining and of fine-tuning, which has checkpoints to return to."""
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))
    limited(monkeypatch, pieces=2, after=after)
    notes = notes_of(train, tmp_path / "run")
    assert len([note for note in notes if "resources.accumulate=2" in note]) == 1
    assert "accumulate: 2" in (tmp_path / "run" / "config.yaml").read_text()
    assert max(checkpoint.steps_in(tmp_path / "run" / "checkpoints")) == 40


def test_the_divided_run_is_the_run_up_to_rounding(tmp_path, monkeypatch):
    whole = train(Experiment(config()), out=tmp_path / "whole")
    limited(monkeypatch, pieces=2)
    divided = train(Experiment(config()), out=tmp_path / "divided")
    assert whole is not None
    assert divided is not None
    for name, value in whole.scores["last"].items():
        if name != "eval/kid_digits":  # relative to its size, rounding counts most
            assert divided.scores["last"][name] == pytest.approx(value, rel=0.05, abs=0.05)


def test_what_does_not_fit_in_two_pieces_is_said(tmp_path, monkeypatch):
    limited(monkeypatch, pieces=3)
    facts = "memory in an iteration … more than 2 pieces … train.batch_size (16) or pretrain.batch_size (128)"
    with pytest.raises(UserError, match=stating(facts)):
        train(Experiment(config()), out=tmp_path / "run")


def test_stacked_seeds_are_not_divided(tmp_path, monkeypatch):
    limited(monkeypatch, pieces=2)
    members = [SeedRun(Experiment(config(f"seed={seed}")), tmp_path / str(seed)) for seed in (0, 1)]
    with pytest.raises(UserError, match=stating("train fewer seeds together: set resources.stack_seeds to 1")):
        train_stacked(members)


def test_an_evaluation_that_does_not_fit_names_its_batch_size(tmp_path, monkeypatch):
    def fails(*_: Any, **__: Any) -> None:
        raise torch.OutOfMemoryError("CUDA out of memory.")

    monkeypatch.setattr("dxmi.training.run.Run._evaluate", fails)
    with pytest.raises(UserError, match=stating("in an evaluation: lower evaluate.batch_size (64)")):
        train(Experiment(config()), out=tmp_path / "run")
