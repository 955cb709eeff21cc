"""Distillation of a policy into fewer steps: what is regressed, from what it starts, and what is refused."""

import json
from pathlib import Path

import pytest
import torch

from dxmi.algorithms.distillation import Distillation, deterministic_sample
from dxmi.config import build, to_tree
from dxmi.data.batch import UNCONDITIONAL, Batch, Streams
from dxmi.errors import UserError
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.run import train
from dxmi.training.schema import read_config
from dxmi.training.student import student_config
from support import TINY, changed, missing, stating
from tune.cli.main import main
from tune.config.compose import compose_experiment


@pytest.fixture(scope="module")
def teacher(tmp_path_factory) -> Path:
    """A finished run of DxMI with five steps."""
    out = tmp_path_factory.mktemp("teacher") / "run"
    train(Experiment(compose_experiment(changed(TINY, "evaluate.full_reference=false")).experiment), out=out)
    return out


def student(teacher: Path, num_steps: int = 1, **more: object) -> Experiment:
    config = student_config(read_config(RunDirectory(teacher).read_config()).config, teacher, num_steps)
    tree = to_tree(config)
    tree["pretrain"] |= {"iterations": 30, "batch_size": 16, **more}
    return Experiment(build(ExperimentConfig, tree))


def test_the_deterministic_sample_is_the_rollout_without_noise(teacher):
    policy = student(teacher).teacher.eval_policy
    noise = torch.randn(4, *policy.event, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        policy.free_log_sigma.fill_(-50.0)
        policy.final_log_sigma.fill_(-50.0)
        expected = policy.rollout(torch.cat((noise[None], torch.zeros(policy.num_steps, *noise.shape)))).x[-1]
        torch.testing.assert_close(deterministic_sample(policy, noise, UNCONDITIONAL), expected)


@pytest.mark.parametrize("num_steps", [1, 2])
def test_the_loss_falls_and_is_the_error_of_the_students_chain(teacher, num_steps):
    experiment = student(teacher, num_steps)
    algorithm, state = experiment.build_pretraining()
    assert isinstance(algorithm, Distillation)
    noise = torch.randn(1, 16, *experiment.event, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        target = deterministic_sample(experiment.teacher.eval_policy, noise[0], UNCONDITIONAL)
        own = deterministic_sample(algorithm.student, noise[0], UNCONDITIONAL)

    class Fixed(Streams):
        def normal(self, name: str, shape: tuple[int, ...]) -> torch.Tensor:
            return noise

    losses = [
        float(algorithm.update(Batch.single(None, 16), i, Fixed([state.generators]))["distill/loss"]) for i in range(30)
    ]
    assert losses[0] == pytest.approx(float((own - target).square().mean()), rel=1e-4)
    assert losses[-1] < 0.7 * losses[0]


def test_the_student_starts_from_the_teachers_network_and_energy_and_leaves_the_teacher_alone(teacher):
    experiment = student(teacher)
    before = {name: value.clone() for name, value in experiment.teacher.state_dict().items()}
    algorithm, state = experiment.build_pretraining()
    for own, theirs in zip(
        algorithm.student.network.parameters(), experiment.teacher.eval_policy.network.parameters(), strict=True
    ):
        assert torch.equal(own, theirs)
    algorithm.update(state.stream.next(), 0, Streams([state.generators]))
    finetuned, _ = experiment.build_finetuning(experiment.build_denoiser())
    for own, theirs in zip(finetuned.energy.parameters(), experiment.teacher.energy.parameters(), strict=True):
        assert torch.equal(own, theirs)
    after = experiment.teacher.state_dict()
    assert all(torch.equal(before[name], after[name]) for name in before)


def test_students_of_other_teachers_or_steps_share_no_cached_result(teacher, tmp_path):
    signatures = {student(teacher).pretraining_signature, student(teacher, 2).pretraining_signature}
    other = tmp_path / "run"
    train(
        Experiment(compose_experiment(changed(TINY, "evaluate.full_reference=false", "seed=5")).experiment), out=other
    )
    signatures.add(student(other).pretraining_signature)
    assert len(signatures) == 3
    assert student(teacher).inputs().keys() == {"data", "teacher"}


def test_a_run_is_distilled_from_the_command_line_and_scored(teacher, tmp_path, capsys):
    out = tmp_path / "student"
    fast = ["pretrain.iterations=30", "train.iterations=10"]
    assert main(["distill", str(teacher), *fast, f"out={out}"]) == 0
    assert missing("1 step … before … 1 step … after", capsys.readouterr().out) == []
    summary = json.loads((out / "summary.json").read_text())
    assert summary["num_steps"] == 1
    assert set(summary["reference"]) == {"shortened", "data"}  # its network predicts no noise
    assert set(summary["inputs"]) == {"data", "teacher"}
    assert main(["distill", str(teacher), *fast, f"out={out}"]) == 0  # the same run
    assert "already finished" in capsys.readouterr().out


REFUSED = {
    "--steps is 5 … 5 steps … fewer": ["--steps", "5"],
    "network.denoiser … pretrain.teacher … hidden": ["network.denoiser.hidden=8"],
    "pretrain.teacher … weights": ["pretrain.weights=x.pth"],
}


@pytest.mark.parametrize("sentence", REFUSED)
def test_what_cannot_be_distilled_is_refused(teacher, sentence, tmp_path, capsys):
    assert main(["distill", str(teacher), *REFUSED[sentence], f"out={tmp_path / 'out'}"]) == 2
    assert missing(sentence, capsys.readouterr().err) == []


def test_an_energy_without_a_teacher_is_refused():
    with pytest.raises(UserError, match=stating("algorithm.teacher_energy is true … pretrain.teacher is null")):
        compose_experiment([*TINY, "algorithm.teacher_energy=true"])
