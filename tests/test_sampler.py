"""The policy: one transition, the same from every side, against NumPy, torch.distributions and Gaussian data."""

import math

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dxmi.algorithms.configs import DxMIConfig
from dxmi.data.batch import Condition
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules.build import shorten
from dxmi.diffusion.schedules.configs import VarScheduleConfig
from dxmi.diffusion.schedules.ddpm import ancestral_schedule, forward_levels
from dxmi.networks.base import Denoiser
from support import update

EVENT = (2, 3)
SHAPES = [(4, 5), (4, 1), (1, 5), (1, 1)]  # (T, B)


class ToyDenoiser(Denoiser):
    """eps(x, k) = sin(1.7 x + k / 300), elementwise: easy to write a second time."""

    def embed(self, steps: Tensor) -> Tensor:
        return steps[:, None] / 300.0

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return (1.7 * x.flatten(1) + embedding).sin().view_as(x)


class GaussianDenoiser(Denoiser):
    """The exact E[eps | x_k] of data N(mu, v): sqrt(1 - abar) (x - sqrt(abar) mu) / (abar v + 1 - abar)."""

    def __init__(self, mu: float, v: float) -> None:
        super().__init__()
        self.mu, self.v = mu, v
        self.levels = torch.from_numpy(forward_levels()).float()

    def embed(self, steps: Tensor) -> Tensor:
        return self.levels[steps.long()][:, None]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return (1.0 - embedding).sqrt() * (x - embedding.sqrt() * self.mu) / (embedding * self.v + 1.0 - embedding)


def numpy_transition(x: np.ndarray, t: int, num_steps: int) -> tuple[np.ndarray, float]:
    """Mean and sigma of a step of ToyDenoiser's policy in float64, from the levels alone (dxmi/README.md)."""
    schedule = shorten(VarScheduleConfig(num_steps=num_steps))
    g, g_next = schedule.level[t], schedule.level[t + 1]
    sigma = math.sqrt((1 - g_next) / (1 - g) * (1 - g / g_next))
    c = math.sqrt(1 - g_next - sigma**2) - math.sqrt(1 - g) * math.sqrt(g_next / g)
    noise = np.sin(1.7 * x + schedule.timestep[t] / 300.0)
    return math.sqrt(g_next / g) * x + c * noise, 0.001 if t == num_steps - 1 else sigma


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------
# One transition.


@pytest.mark.parametrize(("num_steps", "batch_size"), SHAPES)
def test_transition_equals_a_second_implementation(num_steps, batch_size):
    policy = Policy(ToyDenoiser(), shorten(VarScheduleConfig(num_steps=num_steps)), EVENT)
    x = normal(batch_size, *EVENT)
    for t in range(num_steps):
        step = policy.transition(x, t)
        mean, sigma = numpy_transition(x.double().numpy(), t, num_steps)
        # One step divides by sqrt(abar_1000) = 0.006: means are as large as 500, float32 keeps 7 digits of that.
        np.testing.assert_allclose(step.mean.numpy(), mean, rtol=1e-5, atol=1e-6 * max(1.0, np.abs(mean).max()))
        np.testing.assert_allclose(step.sigma.detach().numpy(), [sigma] * batch_size, rtol=1e-6)


@pytest.mark.parametrize(("num_steps", "batch_size"), SHAPES)
def test_a_step_as_number_and_as_tensor_agree(make_policy, num_steps, batch_size):
    policy, x = make_policy(num_steps, EVENT), normal(batch_size, *EVENT)
    for t in range(num_steps):
        number, tensor = policy.transition(x, t), policy.transition(x, torch.full((batch_size,), t))
        torch.testing.assert_close(number, tensor, rtol=1e-6, atol=1e-6)


def test_samples_at_different_steps_do_not_mix(make_policy):
    policy, x, t = make_policy(4, EVENT), normal(6, *EVENT), torch.tensor([3, 0, 1, 1, 2, 0])
    together = policy.transition(x, t)
    for i, step in enumerate(t.tolist()):
        alone = policy.transition(x[i : i + 1], step)
        torch.testing.assert_close(together.mean[i : i + 1], alone.mean, rtol=1e-6, atol=1e-6)
        assert together.sigma[i] == alone.sigma[0]


def test_step_is_mean_plus_sigma_times_noise(make_policy):
    policy, x, noise = make_policy(4, EVENT), normal(5, *EVENT), normal(5, *EVENT, seed=1)
    mean, sigma = policy.transition(x, 1)
    torch.testing.assert_close(policy.step(x, 1, noise), mean + sigma[:, None, None] * noise, rtol=1e-6, atol=1e-7)


def test_step_is_reparameterised(make_policy):
    """d x_{t+1} / d log sigma_t = sigma_t z, and the mean passes its gradient to the network."""
    policy, noise = make_policy(4, EVENT), normal(5, *EVENT, seed=1)
    policy.step(normal(5, *EVENT), 1, noise).sum().backward()
    sigma = policy.log_sigma[1].exp()
    torch.testing.assert_close(policy.free_log_sigma.grad, torch.stack([0 * sigma, sigma * noise.sum(), 0 * sigma]))
    assert all(p.grad is not None and p.grad.any() for p in policy.network.parameters())


# ----------------------------------------------------------------------------
# Densities.


@pytest.mark.parametrize(("num_steps", "batch_size"), SHAPES)
def test_log_prob_is_the_density_of_the_whole_event_in_nats(make_policy, num_steps, batch_size):
    policy = make_policy(num_steps, EVENT)
    x, x_next = normal(batch_size, *EVENT), normal(batch_size, *EVENT, seed=1)
    for t in range(num_steps):
        mean, sigma = policy.transition(x, t)
        scale = sigma.double()[:, None, None].expand_as(mean)
        expected = torch.distributions.Independent(torch.distributions.Normal(mean.double(), scale), 2)
        log_prob = policy.log_prob(x_next, x, t)
        assert log_prob.shape == (batch_size,)
        torch.testing.assert_close(log_prob.double(), expected.log_prob(x_next.double()), rtol=3e-6, atol=1e-5)


@pytest.mark.parametrize(("num_steps", "batch_size"), SHAPES)
def test_trajectory_log_prob_is_the_same_density(make_policy, num_steps, batch_size):
    policy = make_policy(num_steps, EVENT)
    trajectory = policy.rollout(normal(num_steps + 1, batch_size, *EVENT))
    scale = trajectory.sigma.double()[..., None, None].expand_as(trajectory.mean)
    normals = torch.distributions.Normal(trajectory.mean.double(), scale)
    expected = torch.distributions.Independent(normals, 2).log_prob(trajectory.x[1:].double())
    torch.testing.assert_close(trajectory.log_prob.double(), expected, rtol=3e-6, atol=1e-5)


def test_stored_log_prob_is_the_policys_and_follows_log_sigma(make_policy):
    """There is one sigma: a shift of the learned one moves rollouts and densities alike, by 0.5 a dimension."""
    policy, noise = make_policy(4, EVENT), normal(5, 7, *EVENT)

    def stored_and_recomputed() -> tuple[Tensor, Tensor]:
        trajectory = policy.rollout(noise)
        x = trajectory.x
        again = torch.stack([policy.log_prob(x[t + 1], x[t], t) for t in range(4)])
        return trajectory.log_prob, again.detach()

    before, before_again = stored_and_recomputed()
    with torch.no_grad():
        policy.free_log_sigma += 0.5
    after, after_again = stored_and_recomputed()
    torch.testing.assert_close(before, before_again, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(after, after_again, rtol=1e-6, atol=1e-6)
    # The last sigma is fixed; and where it is 0.001, rounding of x to 1e-7 moves the density by 1e-3.
    torch.testing.assert_close(after[:3], before[:3] - 0.5 * math.prod(EVENT), rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(after[3], before[3], rtol=0, atol=5e-3)


def test_density_of_a_stored_trajectory_is_not_rewritten_by_a_later_policy(make_policy):
    """An importance ratio compares the policy that acted with the present one."""
    policy = make_policy(4, EVENT)
    trajectory, again = (policy.rollout(normal(5, 7, *EVENT)) for _ in range(2))
    before = trajectory.log_prob.clone()
    with torch.no_grad():
        policy.free_log_sigma += 0.5
    assert torch.equal(again.log_prob, before)
    assert not torch.isclose(policy.log_prob(trajectory.x[1], trajectory.x[0], 0), before[0]).any()


# ----------------------------------------------------------------------------
# Rollouts.


@pytest.mark.parametrize(("num_steps", "batch_size"), SHAPES)
def test_rollout_equals_repeated_steps_bitwise(make_policy, num_steps, batch_size):
    policy, noise = make_policy(num_steps, EVENT), normal(num_steps + 1, batch_size, *EVENT)
    trajectory = policy.rollout(noise)
    assert torch.equal(trajectory.x[0], noise[0])
    assert torch.equal(trajectory.sample, trajectory.x[num_steps])
    assert trajectory.states.shape == (num_steps * batch_size, *EVENT)
    for t in range(num_steps):
        step = policy.transition(trajectory.x[t], t)
        assert torch.equal(trajectory.x[t + 1], policy.step(trajectory.x[t], t, noise[t + 1]))
        assert torch.equal(trajectory.mean[t], step.mean)
        assert torch.equal(trajectory.sigma[t], step.sigma)
        assert torch.equal(trajectory.states[t * batch_size : (t + 1) * batch_size], trajectory.x[t])


def test_rollout_has_no_gradient(make_policy):
    trajectory = make_policy(4, EVENT).rollout(normal(5, 2, *EVENT))
    assert not any(tensor.requires_grad for tensor in (trajectory.x, trajectory.mean, trajectory.sigma))


@pytest.mark.parametrize(("num_steps", "batch_size"), SHAPES)
def test_walk_and_sample_equal_repeated_steps_bitwise(make_policy, num_steps, batch_size):
    policy = make_policy(num_steps, EVENT)
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((batch_size, *EVENT), generator=generator)
    expected = [x]
    for t in range(num_steps):
        x = policy.step(x, t, torch.randn((batch_size, *EVENT), generator=generator)).detach()
        expected.append(x)
    walked = list(policy.sample_states(batch_size, torch.Generator().manual_seed(3)))
    assert len(walked) == num_steps + 1
    assert all(torch.equal(a, b) for a, b in zip(walked, expected, strict=True))
    assert torch.equal(policy.sample(batch_size, torch.Generator().manual_seed(3)), expected[-1])


def test_noise_is_standard_normal_one_a_state_and_from_its_generator(make_policy):
    policy = make_policy(4, EVENT)
    noise = policy.noise(1000, torch.Generator().manual_seed(0))
    assert noise.shape == (5, 1000, *EVENT)
    assert torch.equal(noise, policy.noise(1000, torch.Generator().manual_seed(0)))
    n = noise.numel()  # 30,000: mean within 4 / sqrt(n), variance within 4 sqrt(2 / n)
    assert abs(float(noise.mean())) < 4.0 / math.sqrt(n)
    assert abs(float(noise.var()) - 1.0) < 4.0 * math.sqrt(2.0 / n)


# ----------------------------------------------------------------------------
# Guidance.


def test_guidance_descends_the_value_by_strength_times_sigma_times_gradient(make_policy):
    """For V(x, t) = (t + 1) |x|^2 / 2 a guided step is x - s sigma_t (t + 2) x at x = the unguided x_{t+1}."""
    policy, strength, seen = make_policy(4, EVENT), 0.1, []

    def guide(x: Tensor, t: int, condition: Condition) -> Tensor:
        seen.append(t)
        return (t + 1.0) * x

    walk = list(policy.sample_states(5, torch.Generator().manual_seed(3), guide, strength))
    generator = torch.Generator().manual_seed(3)
    x = torch.randn((5, *EVENT), generator=generator)
    for t in range(4):
        x = policy.step(x, t, torch.randn((5, *EVENT), generator=generator)).detach()
        sigma = float(policy.log_sigma[t].detach().exp())
        x = x * (1.0 - strength * sigma * (t + 2.0))
        torch.testing.assert_close(walk[t + 1], x, rtol=1e-5, atol=1e-6)
    assert seen == [1, 2, 3, 4]


def test_guidance_lowers_the_value_of_the_samples(make_policy):
    policy = make_policy(4, EVENT, final_sigma=0.5)
    free, guided = (
        policy.sample(50, torch.Generator().manual_seed(3), lambda x, t, labels: x, strength).square().mean()
        for strength in (0.0, 0.5)
    )
    assert guided < free


def test_guidance_of_strength_zero_changes_nothing(make_policy):
    policy = make_policy(4, EVENT)
    plain = policy.sample(5, torch.Generator().manual_seed(3))
    assert torch.equal(plain, policy.sample(5, torch.Generator().manual_seed(3), lambda x, t, labels: x, 0.0))


# ----------------------------------------------------------------------------
# What is learned.


def test_every_sigma_but_the_last_is_learned(make_policy, make_dxmi):
    assert make_policy(4).free_log_sigma.shape == (3,)
    dxmi = make_dxmi(DxMIConfig())
    before = dxmi.policy.log_sigma.detach().clone()
    for i in range(3):
        update(dxmi, normal(8, 3), i, torch.Generator().manual_seed(i), torch.Generator().manual_seed(i))
    after = dxmi.policy.log_sigma.detach()
    assert (after != before).tolist() == [True, True, True, False]
    assert float(after[-1]) == pytest.approx(math.log(0.001), rel=1e-7)


def test_the_network_and_the_sigmas_are_all_that_the_policy_learns(make_policy):
    policy = make_policy(4)
    learned = {name for name, _ in policy.named_parameters() if not name.startswith("network.")}
    assert learned == {"free_log_sigma"}
    assert isinstance(policy.free_log_sigma, nn.Parameter)
    assert set(policy.state_dict()) == {name for name, _ in policy.named_parameters()}


# ----------------------------------------------------------------------------
# Gaussian data: the sampler as a whole.


def test_ancestral_sampler_with_the_exact_noise_reproduces_gaussian_data():
    """With the exact epsilon each step is affine, so mean and variance of the sample follow from a recursion of
    numbers; the recursion must end at the data's, the samples at it. The posterior's variance is that of a known x
    (arXiv 2006.11239, section 3.2), which is a little too small: 2% of the variance of data as narrow as this.
    """
    mu, v, n = 0.7, 0.25, 20_000
    s = ancestral_schedule()
    mean, variance = 0.0, 1.0
    for t in range(s.num_steps):
        g = s.level[t]
        slope = math.sqrt(1.0 - g) / (g * v + 1.0 - g)
        factor = s.signal_scale[t] + s.output_scale[t] * slope
        mean = factor * mean - s.output_scale[t] * slope * math.sqrt(g) * mu
        variance = factor**2 * variance + s.sigma[t] ** 2
    assert mean == pytest.approx(mu, rel=1e-4)
    assert 0.98 * v < variance < v

    policy = Policy(GaussianDenoiser(mu, v), s, (1,))
    x = policy.sample(n, torch.Generator().manual_seed(0)).double()
    assert float(x.mean()) == pytest.approx(mean, abs=4.0 * math.sqrt(v / n))
    assert float(x.var()) == pytest.approx(variance, abs=4.0 * v * math.sqrt(2.0 / n))
