"""diffusers' UNet2DModel: our U-Nets written for it compute the same there, and it computes the same here."""

import json
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dxmi.compat import declare_torchvision_operators
from dxmi.errors import UserError
from dxmi.networks.configs import DiffusersConfig, EdmUnetConfig, MlpConfig, NetworkConfig, UnetConfig
from dxmi.networks.pretrained.diffusers_folder import config_of_folder, write_folder
from dxmi.networks.pretrained.layouts import load_public, to_public
from dxmi.networks.pretrained.public_files import read_public
from dxmi.networks.registry import build_denoiser
from dxmi.training.build import Experiment
from dxmi.training.export import export_diffusers
from dxmi.training.loading import LoadedRun
from support import stating
from tune.config.compose import compose_experiment

declare_torchvision_operators()
diffusers = pytest.importorskip("diffusers", reason="the optional package diffusers is not installed")

EVENT = (3, 8, 8)
SHAPE = {"channels": 16, "multipliers": (1, 2, 2), "blocks": 1, "attention": (4,), "groups": 8}
TINY = DiffusersConfig(
    block_out_channels=(16, 32),
    down_block_types=("DownBlock2D", "AttnDownBlock2D"),
    up_block_types=("AttnUpBlock2D", "UpBlock2D"),
    layers_per_block=1,
    norm_num_groups=8,
)
STEPS, LABELS = torch.tensor([3.0, 17.5]), torch.tensor([4, 0])


def x() -> Tensor:
    return torch.randn(2, *EVENT, generator=torch.Generator().manual_seed(1))


def make(config: NetworkConfig, seed: int = 0):
    """A denoiser whose zero layers are not zero."""
    generator = torch.Generator().manual_seed(seed)
    network = build_denoiser(config, EVENT, generator)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.1, generator=generator)
    return network


@torch.no_grad()
def ours(network, labels: Tensor | None = None) -> Tensor:
    embedding = network.embed(STEPS)
    return network(x(), embedding if labels is None else embedding + network.embed_labels(labels))


@torch.no_grad()
def theirs(folder: Path, labels: Tensor | None = None, step_scale: float = 1.0) -> Tensor:
    """What diffusers computes from a folder."""
    model = diffusers.UNet2DModel.from_pretrained(folder, use_safetensors=True).eval()
    return model(x(), STEPS * step_scale, class_labels=labels).sample


@pytest.mark.parametrize(
    "config",
    [
        UnetConfig(**SHAPE),
        UnetConfig(**{**SHAPE, "attention": None, "blocks": 2}, head_channels=8),
        EdmUnetConfig(**SHAPE, head_channels=8),
        EdmUnetConfig(**{**SHAPE, "attention": (8, 4, 2)}, head_channels=8, step_scale=0.5),
        EdmUnetConfig(**SHAPE, head_channels=8, scale_shift=False),
        EdmUnetConfig(**SHAPE, head_channels=8, scale_shift=False, resample_in_blocks=False),
    ],
    ids=str,
)
def test_a_unet_computes_the_same_in_diffusers(config, tmp_path):
    network = make(config)
    write_folder(network, EVENT, tmp_path)
    scale = getattr(config, "step_scale", 1.0)
    torch.testing.assert_close(ours(network), theirs(tmp_path, step_scale=scale), rtol=1e-4, atol=1e-5)
    again = make(config, seed=1)
    assert load_public(again, read_public(tmp_path).tensors) == "diffusers"
    assert torch.equal(ours(again), ours(network))


def test_a_conditional_unet_computes_the_same_in_diffusers(tmp_path):
    network = make(EdmUnetConfig(**SHAPE, head_channels=8, classes=5))
    write_folder(network, EVENT, tmp_path)
    torch.testing.assert_close(ours(network, LABELS), theirs(tmp_path, LABELS), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("config", [TINY, DiffusersConfig(**{**vars(TINY), "classes": 5})], ids=["", "classes"])
def test_a_model_of_diffusers_computes_here_what_it_does_there(config, tmp_path):
    network, labels = make(config), LABELS if config.classes else None
    write_folder(network, EVENT, tmp_path)
    assert torch.equal(ours(network, labels), theirs(tmp_path, labels))
    assert config_of_folder(tmp_path) == config
    again = make(config, seed=1)
    assert load_public(again, read_public(tmp_path).tensors) == "diffusers"
    assert torch.equal(ours(again, labels), ours(network, labels))


def test_a_folder_that_diffusers_wrote_is_read(tmp_path):
    model = diffusers.UNet2DModel(
        sample_size=8,
        block_out_channels=(16, 32),
        down_block_types=("DownBlock2D", "AttnDownBlock2D"),
        up_block_types=("AttnUpBlock2D", "UpBlock2D"),
        norm_num_groups=8,
    ).eval()
    model.save_pretrained(tmp_path)
    network = make(config_of_folder(tmp_path))
    load_public(network, read_public(tmp_path).tensors)
    with torch.no_grad():
        assert torch.equal(ours(network), model(x(), STEPS).sample)


def test_initial_weights_come_from_the_generator_alone():
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, other = (build_denoiser(TINY, EVENT, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        assert bool((a == 0.0).all() or (a == 1.0).all()) == torch.equal(a, c)


def test_a_model_that_is_no_denoiser_is_refused(tmp_path):
    with pytest.raises(UserError, match=stating("not hold … diffusers model")):
        config_of_folder(tmp_path)
    for change, sentence in (
        ({"_class_name": "UNet2DConditionModel"}, "holds a UNet2DConditionModel"),
        ({"time_embedding_type": "fourier"}, "time_embedding_type='fourier': a denoiser needs 'positional'"),
        ({"block_out_channels": [16]}, "as many entries each"),
    ):
        (tmp_path / "config.json").write_text(json.dumps({"_class_name": "UNet2DModel", **change}))
        with pytest.raises(UserError, match=sentence):
            config_of_folder(tmp_path)
    with pytest.raises(UserError, match=stating("diffusers … UNet2DModel … not exist")):
        make(DiffusersConfig(**{**vars(TINY), "down_block_types": ("NoBlock2D", "DownBlock2D")}))


def test_a_network_that_diffusers_has_not_is_refused(tmp_path):
    with pytest.raises(UserError, match=stating("not a U-Net")):
        write_folder(make(MlpConfig(hidden=8)), EVENT, tmp_path)


def test_a_checkpoint_of_another_model_is_refused():
    with pytest.raises(UserError, match=stating("config … another network")):
        load_public(make(TINY), to_public(make(UnetConfig(**SHAPE)), "diffusers"))


# ----------------------------------------------------------------------------
# Exports of runs.


def trained_run(*settings: str) -> LoadedRun:
    """A run of which nothing was trained, with weights that are not zero."""
    config = compose_experiment(["experiment=digits", *settings]).experiment
    experiment = Experiment(config, event=(1, 8, 8))
    dxmi = experiment.build_algorithm(experiment.build_denoiser())
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in dxmi.eval_policy.network.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.1, generator=generator)
        dxmi.eval_policy.free_log_sigma.add_(0.1)
    return LoadedRun(experiment, dxmi, 7, [])


NARROW = ["network.denoiser.channels=16", "network.energy.channels=4", "network.value.channels=4"]


@pytest.mark.parametrize(
    "settings",
    [
        ["network=unet_small", *NARROW],
        ["network=edm_unet_small", *NARROW[:1], "network.denoiser.head_channels=8", "schedule=karras"],
        ["network=edm_unet_small", *NARROW[:1], "network.denoiser.head_channels=8", "network.denoiser.step_scale=0.5"],
        ["network=diffusers", "network.denoiser.block_out_channels=[8,16,16]", *NARROW[1:]],
    ],
    ids=str,
)
def test_an_exported_policy_draws_the_same_samples_in_diffusers(settings, tmp_path):
    """By the rule that sampler.json states, from the same noise."""
    run = trained_run(*settings)
    export_diffusers(run, tmp_path / "out")
    model = diffusers.UNet2DModel.from_pretrained(tmp_path / "out", use_safetensors=True).eval()
    steps = json.loads((tmp_path / "out" / "sampler.json").read_text())
    policy = run.algorithm.eval_policy
    noise = policy.noise(3, torch.Generator().manual_seed(1))
    with torch.no_grad():
        sample = steps["start_sigma"] * noise[0]
        for t in range(steps["num_steps"]):
            output = model(steps["input_scale"][t] * sample, torch.tensor(steps["timestep"][t])).sample
            sample = steps["signal_scale"][t] * sample + steps["output_scale"][t] * output
            sample = sample + steps["sigma"][t] * noise[t + 1]
    torch.testing.assert_close(sample, policy.rollout(noise).sample, rtol=1e-4, atol=1e-4)


def test_an_export_overwrites_nothing(tmp_path):
    (tmp_path / "there").touch()
    with pytest.raises(UserError, match=stating("not empty")):
        export_diffusers(trained_run("network=unet_small", *NARROW), tmp_path)
