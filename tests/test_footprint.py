"""The estimated memory of an iteration is that of the real one, for every algorithm, and is shown by dry runs."""

from typing import Any

import pytest
import torch

from dxmi.algorithms.registry import ALGORITHMS
from dxmi.config import build
from dxmi.data.batch import Batch
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.footprint import Meter, footprint
from dxmi.training.recording import FixedStreams
from support import NARROW, TINY, missing
from tune.cli.main import main
from tune.cli.memory import memory_text
from tune.config.compose import compose_experiment

NETWORK = {"kind": "mlp", "hidden": 64, "layers": 3, "embedding": 16}


def config(kind: str = "dxmi", **changes: Any) -> ExperimentConfig:
    network = {**NETWORK, "classes": 10}
    tree: dict[str, Any] = {
        "network": {"denoiser": network, "energy": network, "value": network},
        "schedule": {"num_steps": 4},
        "algorithm": {"kind": kind},
        "pretrain": {"shipped": False},
        "train": {"batch_size": 256},
        **changes,
    }
    if ALGORITHMS.config_class(kind).needs_reward:
        tree["reward"] = {"kind": "ink"}
    return build(ExperimentConfig, tree)


def real_peak(made: ExperimentConfig) -> int:
    """The peak of an iteration that is computed, measured in the same way."""
    experiment = Experiment(made)
    _, state = experiment.build_finetuning(experiment.build_denoiser())
    batch = Batch.stacked([state.stream.next()])
    with Meter() as meter:
        algorithm = experiment.build_algorithm(experiment.build_denoiser())
        meter.peak = meter.live
        algorithm.update(batch, 10**9, FixedStreams([state.generators], torch.device("cpu")))
        return meter.peak


@pytest.mark.parametrize("kind", ALGORITHMS.kinds())
def test_the_estimate_is_the_memory_of_a_real_iteration(kind):
    """For SAC up to the numbers of states before T and at T, which are drawn."""
    found = footprint(config(kind)).finetuning
    assert found is not None
    assert found == pytest.approx(real_peak(config(kind)), rel=0.05 if kind == "sac" else 0.01)


def test_a_pretraining_step_has_the_memory_of_its_parts():
    """One linear network without activations to speak of: weights, average, gradients and two moments of each."""
    wide = {"kind": "mlp", "hidden": 2048, "layers": 3, "embedding": 16}
    made = build(ExperimentConfig, {"network": {"denoiser": wide}, "pretrain": {"shipped": False, "batch_size": 1}})
    parameters = sum(p.numel() for p in Experiment(made).build_denoiser().parameters())
    found = footprint(made).pretraining
    assert found is not None
    assert found == pytest.approx(5 * 4 * parameters, rel=0.05)


def test_micro_batches_and_workers_divide_the_activations():
    small = {"kind": "mlp", "hidden": 64, "layers": 6, "embedding": 16}
    network = {"denoiser": small, "energy": small, "value": small}

    def bytes_of(**resources: int) -> int:
        made = config(network=network, train={"batch_size": 4096}, resources=resources)
        found = footprint(made).finetuning
        assert found is not None
        return found

    whole = bytes_of()
    assert bytes_of(accumulate=4) < 0.75 * whole
    assert bytes_of(num_workers=4) == pytest.approx(whole / 4, rel=0.2)


@pytest.mark.parametrize("network", ["mlp_small", "unet_patches", "ddgan_small", "edm_unet"])
def test_every_kind_of_network_can_be_estimated(network):
    """GANs take latents and initialize a part of a bias."""
    made = compose_experiment([f"network={network}", *NARROW.get(network, [])]).experiment
    found = footprint(made)
    assert found.finetuning is not None
    assert found.finetuning > 0


@pytest.mark.slow
@pytest.mark.parametrize("name", ["lsun_t4", "imagenet64_t10"])
def test_the_published_experiments_fit_into_80_gb(name):
    found = footprint(compose_experiment([f"experiment={name}"]).experiment).finetuning
    assert found is not None
    assert 10e9 < found < 72e9


def test_dry_runs_state_the_memory(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main(["train", *TINY, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert missing("digits, seed 0 … 40 iterations of dxmi … MB in fine-tuning … Nothing", said) == []
    assert main(["train", "experiment=cifar10_t10", "--dry-run"]) == 0
    assert missing("CIFAR-10 is missing … GB in fine-tuning", capsys.readouterr().out) == []
    assert list(tmp_path.iterdir()) == []


def test_too_much_memory_comes_with_advice(monkeypatch):
    class Properties:
        total_memory = 1_000_000

    monkeypatch.setattr("torch.cuda.is_available", lambda: True)
    monkeypatch.setattr("torch.cuda.get_device_properties", lambda _: Properties)
    assert missing("more than the 1 MB … resources.accumulate", memory_text(config())) == []
    assert missing("more than the 0 MB", memory_text(config(resources={"gpus": 0.25}))) == []


@pytest.mark.parametrize("kind", ["digits", "gaussians8", "two_spirals", "checkerboard", "moons"])
def test_the_shape_that_a_config_states_is_that_of_its_data(kind):
    made = build(ExperimentConfig, {"data": {"kind": kind}})
    assert made.data.event == Experiment(made).data.event
