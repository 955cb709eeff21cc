"""EDM's models and diffusion GANs: their tables against the papers' formulas, and sampling that is known exactly."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor

from dxmi.algorithms.configs import DDPMConfig
from dxmi.algorithms.ddpm import DDPM
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules.build import forward_process, shorten
from dxmi.diffusion.schedules.configs import NUM_DIFFUSION_STEPS
from dxmi.diffusion.schedules.ddgan import gan_levels
from dxmi.diffusion.schedules.edm import karras_levels
from dxmi.diffusion.schedules.registry import SCHEDULES
from dxmi.networks.base import Denoiser
from support import update

KARRAS = SCHEDULES.config("karras", num_steps=10)
GAN = SCHEDULES.config("ddgan", num_steps=4)


def skip_out_in(sigma: float) -> tuple[float, float, float]:
    """Table 1 of EDM: c_skip, c_out and c_in at sigma_data = 1/2."""
    root = math.sqrt(sigma**2 + 0.25)
    return 0.25 / (sigma**2 + 0.25), sigma * 0.5 / root, 1.0 / root


class EdmGaussian(Denoiser):
    """The exact F for data N(mu, v): the posterior mean of data given x = data + sigma eps is linear in x."""

    def __init__(self, mu: float, v: float) -> None:
        super().__init__()
        self.mu, self.v = mu, v

    def embed(self, steps: Tensor) -> Tensor:
        return steps[:, None]

    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None = None) -> Tensor:
        sigma = (embedding / 250.0).exp().view(-1, *[1] * (x.dim() - 1))
        root = (sigma**2 + 0.25).sqrt()
        real = x * root
        denoised = (self.v * real + sigma**2 * self.mu) / (self.v + sigma**2)
        return (denoised - 0.25 / root**2 * real) / (sigma * 0.5 / root)


class GanGaussian(Denoiser):
    """The posterior mean of data N(mu, v) given x_t, as a generator that ignores its latent."""

    def __init__(self, mu: float, v: float, levels: np.ndarray) -> None:
        super().__init__()
        self.mu, self.v, self.levels = mu, v, torch.from_numpy(levels).float()

    def embed(self, steps: Tensor) -> Tensor:
        return steps[:, None]

    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None = None) -> Tensor:
        g = self.levels[embedding[:, 0].long()].view(-1, *[1] * (x.dim() - 1))
        return self.mu + g.sqrt() * self.v / (g * self.v + 1.0 - g) * (x - g.sqrt() * self.mu)


# ----------------------------------------------------------------------------
# EDM.


def test_the_levels_are_edms():
    """Equation 5; 18 steps from 80 to 0.002 with rho = 7 begin 80, 57.6, 40.8 and end 0.0059, 0.002."""
    levels = karras_levels(18, KARRAS)
    by_hand = [(80 ** (1 / 7) + i / 17 * (0.002 ** (1 / 7) - 80 ** (1 / 7))) ** 7 for i in range(18)]
    np.testing.assert_allclose(levels, by_hand, rtol=1e-12)
    assert levels[[0, 1, 2, -2, -1]].round(4).tolist() == [80.0, 57.586, 40.7856, 0.0075, 0.002]


@pytest.mark.parametrize(("rho", "noisy_end"), [(7.0, False), (4.0, True)])
def test_the_grid_ends_at_zero_or_at_the_lowest_level(rho, noisy_end):
    schedule = shorten(SCHEDULES.config("karras", num_steps=4, rho=rho, noisy_end=noisy_end))
    assert len(schedule.level) == 5
    assert schedule.level[0] == schedule.start_sigma == pytest.approx(80.0, rel=1e-12)
    assert schedule.level[-1] == (pytest.approx(0.002, rel=1e-9) if noisy_end else 0.0)
    assert schedule.level[-2] > 0.002 if noisy_end else schedule.level[-2] == pytest.approx(0.002, rel=1e-9)


@pytest.mark.parametrize("kappa", [0.0, 0.6, 1.0])
@pytest.mark.parametrize("noisy_end", [False, True])
def test_a_step_goes_along_its_direction_down_to_sigma_down(kappa, noisy_end):
    """x + (x - D(x)) / s (sigma_down - s) with sigma_up^2 = kappa^2 s'^2 (s^2 - s'^2) / s^2, for any F."""
    schedule = shorten(SCHEDULES.config("karras", num_steps=6, kappa=kappa, noisy_end=noisy_end))
    rng = np.random.default_rng(0)
    for t in range(6):
        s, s_next = schedule.level[t : t + 2]
        c_skip, c_out, c_in = skip_out_in(s)
        x, f = rng.normal(size=2) * [s, 1.0]
        up = kappa * math.sqrt(s_next**2 * (s**2 - s_next**2) / s**2)
        down = math.sqrt(s_next**2 - up**2)
        expected = x + (x - (c_skip * x + c_out * f)) / s * (down - s)
        assert schedule.signal_scale[t] * x + schedule.output_scale[t] * f == pytest.approx(
            expected, rel=1e-9, abs=1e-9
        )
        assert schedule.sigma[t] == (pytest.approx(up, rel=1e-12) if t < 5 else 0.001)
        assert schedule.input_scale[t] == pytest.approx(c_in, rel=1e-12)
        assert schedule.timestep[t] == pytest.approx(1000.0 * math.log(s) / 4.0, rel=1e-12)
        assert schedule.eta[t] == pytest.approx(s**2 - s_next**2, rel=1e-12)


def test_what_pretraining_regresses_denoises_to_the_data():
    """c_skip x + c_out F = data for the target F of each of the K noise levels, whose log has EDM's distribution."""
    table = forward_process(KARRAS)
    assert len(table.timestep) == NUM_DIFFUSION_STEPS
    data, noise = 0.7, -1.3
    sigma = np.exp(table.timestep / 250.0)
    x = data + sigma * noise
    np.testing.assert_allclose(
        table.signal_scale * data + table.noise_scale * noise, x / np.sqrt(sigma**2 + 0.25), rtol=1e-9
    )
    target = table.data_target * data + table.noise_target * noise
    c_skip, c_out = 0.25 / (sigma**2 + 0.25), sigma * 0.5 / np.sqrt(sigma**2 + 0.25)
    np.testing.assert_allclose(c_skip * x + c_out * target, data, rtol=1e-9)
    log_sigma = np.log(sigma)
    assert log_sigma.mean() == pytest.approx(-1.2, abs=1e-9)
    assert log_sigma.std() == pytest.approx(1.2, rel=5e-3)  # of the normal's tails beyond the last quantiles 0.3 %
    assert np.quantile(log_sigma, 0.975) == pytest.approx(-1.2 + 1.2 * 1.959964, abs=0.01)


def test_the_exact_network_is_where_pretraining_ends():
    """Its loss is that of the posterior: E Var(data | x) / c_out^2, which no other function of x goes below."""
    v = 0.16
    ddpm = DDPM(DDPMConfig(), EdmGaussianWithWeight(0.2, v), forward_process=forward_process(KARRAS))
    data = 0.2 + math.sqrt(v) * torch.randn(20_000, 1, generator=torch.Generator().manual_seed(0))
    loss = float(update(ddpm, data, 0, torch.Generator().manual_seed(1))["pretrain/loss"])
    sigma = np.exp(forward_process(KARRAS).timestep / 250.0)
    c_out = sigma * 0.5 / np.sqrt(sigma**2 + 0.25)
    expected = float((v * sigma**2 / (v + sigma**2) / c_out**2).mean())
    assert loss == pytest.approx(expected, abs=4.0 * math.sqrt(2.0) * expected / math.sqrt(20_000))


class EdmGaussianWithWeight(EdmGaussian):
    """With a parameter, as an optimizer needs it, that changes nothing."""

    def __init__(self, mu: float, v: float) -> None:
        super().__init__(mu, v)
        self.nothing = torch.nn.Parameter(torch.zeros(()))

    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None = None) -> Tensor:
        return super().forward(x, embedding) + 0.0 * self.nothing


def moments(schedule, slope, intercept) -> tuple[float, float]:
    """Mean and variance of the sample if the network's output is slope_t * (what it sees) + intercept_t."""
    mean, variance = 0.0, schedule.start_sigma**2
    for t in range(schedule.num_steps):
        scale = 1.0 if schedule.input_scale is None else schedule.input_scale[t]
        factor = schedule.signal_scale[t] + schedule.output_scale[t] * slope(t) * scale
        mean = factor * mean + schedule.output_scale[t] * intercept(t)
        variance = factor**2 * variance + schedule.sigma[t] ** 2
    return mean, variance


def test_the_ancestral_sampler_with_the_exact_network_reproduces_gaussian_data():
    """The policy's samples follow the recursion of their moments. With n steps those end at the data's but for an error
    of first order in 1 / n, which two n's extrapolate away.
    """
    mu, v, n = 0.7, 0.25, 4_000
    exact = EdmGaussian(mu, v)

    def line(schedule):
        def at(t: int, u: float) -> float:
            return float(exact(torch.tensor([[u]]).double(), torch.tensor([[schedule.timestep[t]]])))

        return (lambda t: at(t, 1.0) - at(t, 0.0)), (lambda t: at(t, 0.0))

    some, twice = (shorten(SCHEDULES.config("karras", num_steps=n, final_sigma=0.0)) for n in (400, 800))
    (mean, variance), (mean_twice, variance_twice) = (moments(s, *line(s)) for s in (some, twice))
    assert 2.0 * mean_twice - mean == pytest.approx(mu, rel=1e-4)
    assert 2.0 * variance_twice - variance == pytest.approx(v, rel=1e-3)

    few = shorten(KARRAS)
    mean, variance = moments(few, *line(few))
    policy = Policy(exact, few, (1,))
    x = policy.sample(n, torch.Generator().manual_seed(0)).double()
    assert float(x.mean()) == pytest.approx(mean, abs=4.0 * math.sqrt(variance / n))
    assert float(x.var()) == pytest.approx(variance, abs=4.0 * variance * math.sqrt(2.0 / n))


def test_a_rollout_starts_at_the_highest_level():
    policy = Policy(EdmGaussian(0.0, 0.25), shorten(KARRAS), (2,))
    noise = policy.noise(3, torch.Generator().manual_seed(0))
    assert torch.equal(policy.rollout(noise).x[0], 80.0 * noise[0])
    first = next(policy.sample_states(3, torch.Generator().manual_seed(0)))
    assert torch.equal(first, 80.0 * torch.randn(3, 2, generator=torch.Generator().manual_seed(0)))


# ----------------------------------------------------------------------------
# Denoising-diffusion GANs.


def test_the_steps_of_a_gan_are_the_posteriors_of_the_official_code():
    """beta_i = 1 - abar(i) / abar(i-1) of the VP SDE at times from 0.001 to 1, and DDPM's posterior from them."""
    times = [0.001 + i / 4 * 0.999 for i in range(5)]
    level = [math.exp(-0.5 * t * t * (20.0 - 0.1) - t * 0.1) for t in times]
    beta = [1.0 - level[i + 1] / level[i] for i in range(4)]
    cumulative = np.cumprod([1.0 - b for b in beta])
    np.testing.assert_allclose(gan_levels(4), cumulative, rtol=1e-12)
    schedule = shorten(GAN)
    for t, i in enumerate((3, 2, 1, 0)):
        before = cumulative[i - 1] if i else 1.0
        of_image = beta[i] * math.sqrt(before) / (1.0 - cumulative[i])
        of_state = (1.0 - before) * math.sqrt(1.0 - beta[i]) / (1.0 - cumulative[i])
        deviation = math.sqrt(beta[i] * (1.0 - before) / (1.0 - cumulative[i]))
        assert schedule.output_scale[t] == pytest.approx(of_image, rel=1e-9)
        assert schedule.signal_scale[t] == pytest.approx(of_state, rel=1e-9, abs=1e-9)
        assert schedule.sigma[t] == pytest.approx(deviation if i else 0.001, rel=1e-9)
        assert schedule.timestep[t] == i
        assert schedule.eta[t] == pytest.approx(beta[i], rel=1e-9)


def test_the_last_step_of_a_gan_is_its_image():
    schedule = shorten(GAN)
    assert (schedule.signal_scale[-1], schedule.output_scale[-1]) == (0.0, 1.0)


def test_a_gan_with_the_posterior_mean_keeps_the_mean_of_the_data():
    """Without a latent it makes the data's mean, and too little variance: what the latent is for."""
    mu, v, n = 0.7, 0.25, 4_000
    schedule = shorten(GAN)
    g = schedule.level[:-1]
    slope = np.sqrt(g) * v / (g * v + 1.0 - g)
    mean, variance = moments(schedule, lambda t: slope[t], lambda t: mu - slope[t] * math.sqrt(g[t]) * mu)
    assert mean == pytest.approx(mu, rel=1e-3)
    assert variance < v
    x = Policy(GanGaussian(mu, v, gan_levels(4)), schedule, (1,)).sample(n, torch.Generator().manual_seed(0)).double()
    assert float(x.mean()) == pytest.approx(mean, abs=4.0 * math.sqrt(variance / n))
    assert float(x.var()) == pytest.approx(variance, abs=4.0 * variance * math.sqrt(2.0 / n))


def test_pretraining_a_gan_regresses_the_image_at_its_own_steps():
    table = forward_process(GAN)
    np.testing.assert_allclose(table.signal_scale**2, gan_levels(4), rtol=1e-12)
    np.testing.assert_allclose(table.signal_scale**2 + table.noise_scale**2, 1.0, rtol=1e-12)
    assert (table.timestep.tolist(), table.data_target.tolist()) == ([0, 1, 2, 3], [1.0] * 4)
    assert not table.noise_target.any()


# ----------------------------------------------------------------------------
# Families.


def test_models_of_a_family_are_pretrained_alike():
    families = [SCHEDULES.config(method).family for method in ("var", "step", "karras", "ddgan")]
    assert families == ["ddpm", "ddpm", "edm", "ddgan-5"]
    assert forward_process(SCHEDULES.config("var")).regresses_noise
    assert not forward_process(KARRAS).regresses_noise
