"""The experiments that are shipped: the published ones as dxmi/README.md lists them, and every one from end to end."""

from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dxmi.data.configs import PublishedImagesConfig
from dxmi.errors import UserError
from dxmi.evaluation import scorers
from dxmi.metrics.inception import Features
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.run import train
from dxmi.training.summary import Summary
from support import LARGE, NARROW, NETWORK_OF, idx_bytes, stating
from tune.config.compose import compose_experiment

PUBLISHED = list(NETWORK_OF)


def config_of(name: str, *overrides: str) -> ExperimentConfig:
    return compose_experiment([f"experiment={name}", *overrides]).experiment


class Projections:
    """Stands in for InceptionV3."""

    def __call__(self, pixels: Tensor, on_piece: object = None) -> Features:
        means = torch.nn.functional.adaptive_avg_pool2d(pixels.float() / 255.0, 2).flatten(1)
        return Features(means[:, :4], means[:, :3])

    def num_pieces(self, num: int) -> int:
        return int(num > 0)


@pytest.fixture
def files(tmp_path, monkeypatch) -> Path:
    """A few random images in the layout of each data set, and a network for their scores."""
    monkeypatch.setenv("DXMI_DATA", str(tmp_path))
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))
    rng = np.random.default_rng(0)
    for folder in ("MNIST/raw", "FashionMNIST/raw"):
        (tmp_path / folder).mkdir(parents=True)
        for part in ("train", "t10k"):
            images, labels = rng.integers(0, 256, (40, 28, 28), np.uint8), rng.integers(0, 10, 40).astype(np.uint8)
            (tmp_path / folder / f"{part}-images-idx3-ubyte").write_bytes(idx_bytes(images))
            (tmp_path / folder / f"{part}-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    (tmp_path / "cifar-10-batches-bin").mkdir()
    for name in (*(f"data_batch_{n}" for n in range(1, 6)), "test_batch"):
        rows = rng.integers(0, 256, (8, 3073), np.uint8)
        rows[:, 0] %= 10
        (tmp_path / "cifar-10-batches-bin" / f"{name}.bin").write_bytes(rows.tobytes())
    for name in [*(f"imagenet/train/n{k:08d}/{k}" for k in range(20)), *(f"lsun/bedroom/{k}" for k in range(20))]:
        path = tmp_path / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 256, (64, 64, 3), np.uint8)).save(path)
    (tmp_path / "inception.pth").write_bytes(b"weights")
    monkeypatch.setenv("DXMI_INCEPTION", str(tmp_path / "inception.pth"))
    monkeypatch.setattr(scorers, "load_inception", lambda path, device: Projections())
    monkeypatch.setattr(scorers, "NUM_FEATURES", 4)
    return tmp_path


def smoke(name: str, out: Path, *overrides: str) -> Summary:
    from_files = isinstance(config_of(name).data, PublishedImagesConfig)
    small = ["data.accept_unknown_files=true"] if from_files else []  # they are not the authors'
    config = config_of(name, "debug=smoke", "resources.device=cpu", "resources.threads=1", *small, *overrides)
    summary = train(Experiment(config), out=out)
    assert summary is not None
    return summary


# ----------------------------------------------------------------------------
# From end to end.


@pytest.mark.parametrize("name", ["mnist", "cifar10_small"])
def test_an_experiment_runs_from_end_to_end_in_seconds(name, files, tmp_path):
    # bfloat16 is emulated on most CPUs, and slow: the small one of the two has it. test_configs.py steps each in
    # its own precision.
    narrow = {
        "mnist": ["train.precision=bfloat16"],
        "cifar10_small": [*NARROW[LARGE["cifar10_small"]], "train.precision=float32"],
    }
    summary = smoke(name, tmp_path / "run", *narrow[name])
    assert summary.iterations == 2
    few = {"ddim_2_trailing", "ddpm_2_trailing_large", "dpm_solver_3_trailing", "ddpm_3_trailing"}
    assert few | {"shortened"} <= summary.reference.keys()
    assert not any("_50_" in key for key in summary.reference)
    assert (tmp_path / "run" / "samples" / "steps.png").exists()
    assert summary.metric == ("eval/fid_mnist" if name == "mnist" else "eval/fid_4")


@pytest.mark.slow
@pytest.mark.parametrize("name", ["fashion_mnist", *PUBLISHED])
def test_every_other_image_experiment_does_with_narrow_networks(name, files, tmp_path):
    small = ["data.size=64"] if name == "lsun_t4" else []
    assert smoke(name, tmp_path / "run", *NARROW.get(NETWORK_OF.get(name, ""), []), *small).iterations == 2


# ----------------------------------------------------------------------------
# Published settings.


def rates(config: ExperimentConfig) -> tuple[float, float, float]:
    algorithm = config.algorithm
    return algorithm.policy.lr, algorithm.policy.sigma_lr, algorithm.critic.lr


@pytest.mark.parametrize("name", PUBLISHED)
def test_what_all_published_experiments_share(name):
    config = config_of(name)
    algorithm = config.algorithm
    assert (algorithm.entropy_coef, algorithm.cost_coef, algorithm.energy_l2) == (0.1, 0.01, 1.0)
    assert (algorithm.preset, algorithm.value, algorithm.step_cost, algorithm.step_cost_scale) == (
        *("as_released", "shared", "sigmoid", 1.0),
    )
    assert (algorithm.reference_var, algorithm.reference_var_ema, algorithm.policy.max_grad_norm) == (None, 0.99, 0.1)
    assert (algorithm.target_ema, algorithm.policy_ema) == (None, None)
    assert config.pretrain.iterations == 0
    assert config.data.flip


@pytest.mark.parametrize(("name", "steps", "epochs"), [("cifar10_t10", 10, 200), ("cifar10_t4", 4, 100)])
def test_cifar10_is_as_published(name, steps, epochs):
    config = config_of(name)
    assert rates(config) == (1e-7, 1e-5, 1e-5)
    assert (config.schedule.num_steps, config.train.batch_size) == (steps, 128)
    assert config.train.iterations == epochs * (50_000 // 128)
    assert config.network.energy.kind == "igebm"
    assert (config.network.energy.channels, config.network.energy.spectral_norm) == (128, False)
    assert config.evaluate.num_samples == 10_000
    assert config.network.denoiser.kind == ("unet" if steps == 10 else "ncsnpp_gan")


@pytest.mark.parametrize("name", ["imagenet64_t10", "imagenet64_t4", "lsun_t4"])
def test_edm_experiments_are_as_published(name):
    config = config_of(name)
    assert rates(config) == (1e-8, 1e-6, 1e-5)
    assert (config.algorithm.policy.kind, config.algorithm.critic.kind) == ("radam", "adam")
    assert config.algorithm.critic.max_grad_norm == 0.1
    assert config.network.denoiser.kind == "edm_unet"
    few = config.schedule.num_steps == 4
    assert (config.schedule.rho, config.schedule.noisy_end) == ((4.0, True) if few else (7.0, False))
    assert (config.schedule.sigma_min, config.schedule.sigma_max) == (0.002, 80.0)
    assert config.algorithm.policy_mask == ((1.0,) if few else (1.0,) * 7 + (0.0,) * 3)


def test_labels_go_to_every_network_of_imagenet():
    networks = config_of("imagenet64_t10").network
    assert {networks.denoiser.classes, networks.energy.classes, networks.value.classes} == {1000}


@pytest.mark.parametrize("name", PUBLISHED)
def test_a_published_experiment_says_what_it_needs_when_that_is_missing(name, files):
    config = config_of(name)
    with pytest.raises(UserError, match=stating("pretrain.weights is weights/ … Fetch")):
        _ = Experiment(config).public_weights
    assert config.pretrain.weights is not None


@pytest.mark.parametrize("name", ["digits_reward", "digits_ink"])
def test_experiments_with_a_reward_run_in_seconds_too(name, tmp_path):
    """Although the settings of debug=smoke are those of DxMI."""
    assert smoke(name, tmp_path / "run").iterations == 2
