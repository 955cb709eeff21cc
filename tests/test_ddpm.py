"""DDPM pretraining: its update by hand, and what it converges to where the answer has a closed form."""

import copy
import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dxmi.algorithms.configs import DDPMConfig
from dxmi.algorithms.ddpm import DDPM
from dxmi.networks.base import Denoiser
from dxmi.networks.configs import MlpConfig
from dxmi.networks.registry import build_denoiser
from dxmi.optim.config import OptimizerConfig
from support import update

BETAS = np.linspace(1e-4, 0.02, 1000)
LEVELS = np.cumprod(1.0 - BETAS)
SMALL = MlpConfig(hidden=16, layers=3, embedding=8)


def network(config: MlpConfig = SMALL, event: tuple[int, ...] = (2, 3)) -> Denoiser:
    return build_denoiser(config, event, torch.Generator().manual_seed(0))


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


@pytest.mark.parametrize("batch_size", [1, 7])
def test_loss_is_the_noise_regression_by_hand(batch_size):
    """mean |eps - eps_theta(sqrt(abar_k) x + sqrt(1 - abar_k) eps, k)|^2, with k and eps drawn in this order."""
    ddpm, data = DDPM(DDPMConfig(), network()), normal(batch_size, 2, 3)
    generator = torch.Generator().manual_seed(5)
    k = torch.randint(1000, (batch_size,), generator=generator)
    noise = torch.randn(batch_size, 2, 3, generator=generator)
    level = LEVELS[k.numpy()][:, None, None]
    noised = np.sqrt(level) * data.numpy() + np.sqrt(1.0 - level) * noise.numpy()
    with torch.no_grad():
        before = copy.deepcopy(ddpm.network)
        predicted = before(torch.from_numpy(noised).float(), before.embed(k))
    metrics = update(ddpm, data, 0, torch.Generator().manual_seed(5))
    by_hand = np.mean((predicted.double().numpy() - noise.double().numpy()) ** 2)
    assert float(metrics["pretrain/loss"]) == pytest.approx(by_hand, rel=1e-5)
    assert set(metrics) == {"pretrain/loss"}


def test_every_diffusion_step_is_trained_with_its_own_level():
    """A network that undoes the noising at the k it is told has no loss, whatever k is drawn."""

    class Undo(Denoiser):
        def __init__(self, data: Tensor) -> None:
            super().__init__()
            self.data, self.seen = data, []
            self.idle = torch.nn.Parameter(torch.zeros(()))

        def embed(self, steps: Tensor) -> Tensor:
            self.seen += steps.tolist()
            return torch.from_numpy(LEVELS)[steps.long()][:, None]

        def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None = None) -> Tensor:
            noise = (x.double() - embedding.sqrt() * self.data) / (1.0 - embedding).sqrt()
            return (noise + self.idle).float()

    data = normal(20_000, 1)
    undo = Undo(data)
    metrics = update(DDPM(DDPMConfig(), undo), data, 0, torch.Generator().manual_seed(5))
    # At k = 0 the noise is 0.01 of x: float32's 6e-8 becomes 6e-6, squared 4e-11.
    assert float(metrics["pretrain/loss"]) < 1e-9
    # 20,000 draws of 1000 steps miss a given one with probability e^-20.
    assert set(undo.seen) == set(range(1000))


@pytest.mark.parametrize(("iteration", "decay"), [(0, 0.1), (8, 0.5), (90, 0.9)])
def test_the_average_of_the_weights_by_hand(iteration, decay):
    """Decay min(0.9, (1 + i) / (10 + i)); at i = 90 that is min(0.9, 0.91)."""
    ddpm = DDPM(DDPMConfig(ema=0.9), network())
    old = [p.clone() for p in ddpm.average.parameters()]
    assert all(torch.equal(a, b) for a, b in zip(old, ddpm.network.parameters(), strict=True))
    update(ddpm, normal(7, 2, 3), iteration, torch.Generator().manual_seed(5))
    for held, before, new in zip(ddpm.average.parameters(), old, ddpm.network.parameters(), strict=True):
        torch.testing.assert_close(held, decay * before + (1.0 - decay) * new, rtol=1e-5, atol=1e-7)
        assert not torch.equal(held, before)


def test_gradient_norm_is_reported_where_it_is_clipped():
    ddpm = DDPM(DDPMConfig(optimizer=OptimizerConfig(max_grad_norm=0.01)), network())
    metrics = update(ddpm, normal(7, 2, 3), 0, torch.Generator().manual_seed(5))
    assert float(metrics["pretrain/grad_norm"]) > 0.01
    norm = math.sqrt(sum(float(p.grad.double().square().sum()) for p in ddpm.network.parameters()))
    assert norm == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("setting", [{"iterations": -1}, {"batch_size": 0}, {"ema": 1.0}, {"ema": -0.1}], ids=str)
def test_a_bad_setting_is_refused_by_name(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name} is "):
        DDPMConfig(**setting)


# ----------------------------------------------------------------------------
# Gaussian data N(mu_d, v_d) in each dimension: the best prediction and its loss are known at every step.

MU, VAR = np.array([0.7, -0.4]), np.array([0.25, 0.05])


def closed_form(level: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Slope and variance of the best predictor of eps from x_k, [K, D] each.

    x_k = sqrt(abar) x + sqrt(1 - abar) eps has variance s = abar v + 1 - abar and covariance sqrt(1 - abar) with eps:
    E[eps | x_k] = sqrt(1 - abar) (x_k - sqrt(abar) mu) / s, and the loss that remains is abar v / s.
    """
    total = level[:, None] * VAR + 1.0 - level[:, None]
    return np.sqrt(1.0 - level[:, None]) / total, level[:, None] * VAR / total


def test_pretraining_approaches_the_optimal_noise_prediction():
    """The averaged network's loss is within 3% of the least possible one, averaged over all steps."""
    config = DDPMConfig(iterations=1500, batch_size=512, ema=0.99, optimizer=OptimizerConfig(lr=3e-3, decay="cosine"))
    ddpm = DDPM(config, network(MlpConfig(hidden=64, layers=3, embedding=16), (2,)))
    noise, draws = torch.Generator().manual_seed(2), torch.Generator().manual_seed(3)
    mean, std = torch.from_numpy(MU).float(), torch.from_numpy(np.sqrt(VAR)).float()
    for i in range(config.iterations):
        update(ddpm, mean + std * torch.randn(config.batch_size, 2, generator=draws), i, noise)

    # The loss is the least one plus the mean squared distance to the best predictor.
    k, n = np.arange(5, 1000, 10), 400
    slope, least = closed_form(LEVELS[k])
    z = np.random.default_rng(0).standard_normal((len(k), n, 2))
    level = LEVELS[k][:, None]
    centered = np.sqrt(level * VAR + 1.0 - level)[:, None] * z
    x = centered + (np.sqrt(level) * MU)[:, None]
    with torch.no_grad():
        embedding = ddpm.average.embed(torch.from_numpy(k)).repeat_interleave(n, 0)
        predicted = ddpm.average(torch.from_numpy(x).float().flatten(0, 1), embedding).double().numpy()
    excess = np.mean((predicted.reshape(x.shape) - slope[:, None] * centered) ** 2)
    assert excess < 0.03 * least.mean()
