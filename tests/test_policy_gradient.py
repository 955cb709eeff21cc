"""Policy gradients against closed forms: a linear-Gaussian chain with a quadratic reward, where everything is known.

x_{t+1} = a_t x_t + sigma_t z and x_0 ~ N(0, 1), so that x_T ~ N(0, v_T) with v_{t+1} = a_t^2 v_t + sigma_t^2. With the
reward r = -x_T^2 / (2 s^2) the objective is J = E r = -v_T / (2 s^2), whose gradient automatic differentiation gives.

Letters: N draws, T steps, P = 2T - 1 parameters (T slopes, and T - 1 log sigmas, since the last one is fixed).
"""

import math

import pytest
import torch
from torch import Tensor, nn

from dxmi.algorithms.base import Parts
from dxmi.algorithms.configs import BASELINES, ReinforceConfig, SftPgConfig
from dxmi.algorithms.policy_gradient import PolicyGradient
from dxmi.algorithms.reinforce import Reinforce
from dxmi.algorithms.sft_pg import SftPg
from dxmi.critics.value import SeparateValue
from dxmi.data.batch import UNCONDITIONAL, Batch, Streams
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules.base import StepSchedule
from dxmi.diffusion.trajectory import Trajectory
from dxmi.networks.base import Critic, Denoiser, TimedCritic
from dxmi.optim.config import OptimizerConfig, PolicyOptimizerConfig
from dxmi.rewards.configs import QuadraticRewardConfig
from dxmi.rewards.quadratic import QuadraticReward

T, N = 3, 20_000
SLOPE, SIGMA, SCALE = (0.9, 1.1, 0.8), (0.6, 0.5, 0.4), 0.7
EXACT = {"policy": PolicyOptimizerConfig(lr=0.0, sigma_lr=0.0, max_grad_norm=None), "policy_ema": None}
"""Nothing moves: the gradients that a step leaves behind are those of the parameters above."""


class Slopes(Denoiser):
    """eps(x, t) = change_t x, with which a step's mean is (signal_scale_t + output_scale_t change_t) x."""

    def __init__(self) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(T))

    def embed(self, steps: Tensor) -> Tensor:
        return self.change[:, None]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return embedding * x


class Quadratic(Critic):
    """f(x) = half_curvature x^2."""

    def __init__(self) -> None:
        super().__init__()
        self.half_curvature = nn.Parameter(torch.tensor(1.0 / (2.0 * SCALE**2)))

    def forward(self, x: Tensor) -> Tensor:
        return self.half_curvature * x[:, 0] ** 2


class Expected(TimedCritic):
    """The exact expected f(x_T) from x_t, or its negative, the expected reward: A_t x^2 + B_t."""

    def __init__(self, sign: float) -> None:
        super().__init__()
        a, b = [1.0 / (2.0 * SCALE**2)], [0.0]
        for slope, sigma in zip(reversed(SLOPE), reversed(SIGMA), strict=True):
            a.append(a[-1] * slope**2)
            b.append(b[-1] + a[-2] * sigma**2)
        self.table = nn.Parameter(sign * torch.tensor([a[:0:-1], b[:0:-1]]).T)

    def embed(self, steps: Tensor) -> Tensor:
        return self.table[steps]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return embedding[:, 0] * x[:, 0] ** 2 + embedding[:, 1]


def schedule() -> StepSchedule:
    ones = torch.ones(T).double().numpy()
    sigma = torch.tensor(SIGMA).double().numpy()
    return StepSchedule(
        torch.ones(T + 1).double().numpy(), 0.0 * ones, torch.tensor(SLOPE).double().numpy(), ones, sigma, ones
    )


def parts() -> Parts:
    return Parts(
        policy=Policy(Slopes(), schedule(), (1,)),
        schedule=schedule(),
        iterations=10,
        critic=Quadratic,
        timed_critic=lambda: Expected(-1.0),
        reward=lambda: QuadraticReward(QuadraticRewardConfig(scale=SCALE)),
    )


def closed_form() -> tuple[float, Tensor]:
    """J, and its gradient with respect to the slopes and the free log sigmas: [P]."""
    slope = torch.tensor(SLOPE, dtype=torch.float64, requires_grad=True)
    free = torch.tensor(SIGMA[:-1], dtype=torch.float64).log().requires_grad_()
    variance: Tensor = torch.ones((), dtype=torch.float64)
    for t in range(T):
        sigma = free[t].exp() if t < T - 1 else SIGMA[t]
        variance = slope[t] ** 2 * variance + sigma**2
    objective = -variance / (2.0 * SCALE**2)
    return objective.item(), torch.cat(torch.autograd.grad(objective, (slope, free)))


def scores(trajectory: Trajectory, num_actions: int) -> Tensor:
    """sum_t grad log pi of every trajectory, by hand: [N, P]."""
    x = trajectory.x[..., 0].double()
    slope, sigma = torch.tensor(SLOPE).double()[:, None], torch.tensor(SIGMA).double()[:, None]
    residual = x[1:] - slope * x[:-1]
    counted = (torch.arange(T) < num_actions).double()[:, None]
    of_slope = counted * residual * x[:-1] / sigma**2
    of_log_sigma = (counted * (residual**2 / sigma**2 - 1.0))[:-1]
    return torch.cat((of_slope, of_log_sigma)).T


def left_behind(algorithm: PolicyGradient) -> Tensor:
    """The gradient of the policy's last step: [P]."""
    grads = [parameter.grad for parameter in algorithm.optimizers["policy"].parameters]
    return torch.cat([grad.flatten() for grad in grads if grad is not None]).double()


def run(algorithm: PolicyGradient, x: Tensor | None = None) -> tuple[dict[str, float], Trajectory]:
    """One update with N trajectories, and those trajectories once more."""
    generators = {name: torch.Generator().manual_seed(seed) for seed, name in enumerate(algorithm.streams)}
    trajectory = algorithm.policy.rollout(algorithm.policy.noise(N, torch.Generator().manual_seed(0)))
    metrics = algorithm.update(Batch.single(x, N), 0, Streams([generators]))
    return {name: float(value) for name, value in metrics.items()}, trajectory


def require_unbiased(gradient: Tensor, draws: Tensor, expected: Tensor) -> None:
    """The mean of N draws is within 3 standard errors of the expectation, in every parameter."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert torch.all((gradient - expected).abs() < 3.0 * error), (gradient, expected, error)


@pytest.mark.parametrize("baseline", BASELINES)
def test_reinforce_has_the_gradient_of_the_closed_form(baseline):
    """Minimizing -J: with each baseline the gradient is what the draws say, and unbiased."""
    algorithm = Reinforce(
        ReinforceConfig(baseline=baseline, last_step=True, critic=OptimizerConfig(lr=0.0), **EXACT), parts()
    )
    metrics, trajectory = run(algorithm)
    reward = -(trajectory.x[-1, :, 0].double() ** 2) / (2.0 * SCALE**2)
    objective, expected = closed_form()
    if baseline == "learned":  # the exact V(x_t, t): see the test below for its own effect on each step
        require_unbiased(-left_behind(algorithm), scores(trajectory, T) * reward[:, None], expected)
    else:
        offset = {"none": 0.0, "mean": reward.mean(), "leave_one_out": (reward.sum() - reward) / (N - 1)}[baseline]
        draws = scores(trajectory, T) * (reward - offset)[:, None]
        torch.testing.assert_close(-left_behind(algorithm), draws.mean(0), rtol=1e-3, atol=1e-4)
        require_unbiased(-left_behind(algorithm), draws, expected)
    assert metrics["reward/mean"] == pytest.approx(float(reward.mean()), rel=1e-5)
    assert metrics["reward/mean"] == pytest.approx(objective, abs=3.0 * float(reward.std()) / math.sqrt(N))
    assert metrics["reward/std"] == pytest.approx(float(reward.std(correction=0)), rel=1e-4)


def test_a_learned_baseline_makes_the_gradient_less_noisy():
    """With the exact value as baseline the error of 20,000 draws is smaller in every parameter than with none."""
    _, expected = closed_form()
    errors = {}
    for baseline in ("none", "learned"):
        squares = torch.zeros(2 * T - 1, dtype=torch.float64)
        for seed in range(12):
            algorithm = Reinforce(ReinforceConfig(baseline=baseline, last_step=True, **EXACT), parts())
            streams = Streams([{"noise": torch.Generator().manual_seed(seed)}])
            algorithm.update(Batch.single(None, 1000), 0, streams)
            squares += (-left_behind(algorithm) - expected) ** 2
        errors[baseline] = squares
    assert torch.all(errors["learned"] < errors["none"])


def test_the_last_step_counts_only_if_it_is_asked_for():
    algorithm = Reinforce(ReinforceConfig(baseline="none", last_step=False, **EXACT), parts())
    _, trajectory = run(algorithm)
    reward = -(trajectory.x[-1, :, 0].double() ** 2) / (2.0 * SCALE**2)
    draws = scores(trajectory, T - 1) * reward[:, None]
    gradient, (_, expected) = -left_behind(algorithm), closed_form()
    assert gradient[T - 1] == 0.0  # the last slope has no part in the log-probability
    kept = [p for p in range(2 * T - 1) if p != T - 1]
    require_unbiased(gradient[kept], draws[:, kept], expected[kept])


def test_the_entropy_bonus_has_the_gradient_of_its_closed_form():
    """entropy_coef * mean_t log sigma_t adds entropy_coef / T' to the gradient of each free log sigma, exactly."""
    gradients = []
    for entropy_coef in (0.0, 0.6):
        config = ReinforceConfig(baseline="none", last_step=True, entropy_coef=entropy_coef, **EXACT)
        algorithm = Reinforce(config, parts())
        run(algorithm)
        gradients.append(-left_behind(algorithm))
    difference = gradients[1] - gradients[0]
    expected = torch.tensor([0.0] * T + [0.6 / T] * (T - 1), dtype=torch.float64)
    torch.testing.assert_close(difference, expected, rtol=0.0, atol=2e-4)


def test_the_baseline_learns_the_expected_reward():
    """The regression of step 4 has the closed form as its least: it stays there, and is drawn there from elsewhere."""
    config = ReinforceConfig(last_step=True, critic=OptimizerConfig(lr=0.05), **EXACT)
    algorithm = Reinforce(config, parts())
    assert algorithm.baseline is not None
    exact = algorithm.baseline.table.detach().clone()
    with torch.no_grad():
        algorithm.baseline.table.mul_(0.5)
    streams = Streams([{"noise": torch.Generator().manual_seed(1)}])
    for iteration in range(300):
        algorithm.update(Batch.single(None, 500), iteration, streams)
    torch.testing.assert_close(algorithm.baseline.table.detach(), exact, rtol=0.1, atol=0.1)


# ----------------------------------------------------------------------------
# SFT-PG.


def sft_pg(**settings: object) -> SftPg:
    own = parts()
    made = Parts(
        policy=own.policy,
        schedule=own.schedule,
        iterations=10,
        critic=Quadratic,
        timed_critic=lambda: Expected(1.0),
    )
    config = SftPgConfig(
        last_step=True,
        policy_updates=1,
        critic=OptimizerConfig(lr=0.0),
        energy=OptimizerConfig(lr=0.0),
        **EXACT,
        **settings,
    )
    return SftPg(config, made)


def test_sft_pg_has_the_gradient_of_the_closed_form():
    """E f(x_T) = -J: B of the T x B actions, drawn evenly, have its gradient."""
    algorithm = sft_pg()
    _, trajectory = run(algorithm, torch.randn(N, 1, generator=torch.Generator().manual_seed(9)))
    _, expected = closed_form()
    f = trajectory.x[-1, :, 0].double() ** 2 / (2.0 * SCALE**2)
    draws = scores(trajectory, T) * f[:, None]  # without the value: an upper bound on the spread of what is compared
    require_unbiased(left_behind(algorithm), math.sqrt(T) * draws, -expected)


def test_the_critic_step_is_the_penalised_wasserstein_loss():
    """f(x) = c x^2: its loss is c (mean x_data^2 - mean x_T^2) + 10 mean (|2 c x| - 1)^2 between, by hand."""
    algorithm = sft_pg()
    x = torch.randn(N, 1, generator=torch.Generator().manual_seed(9))
    metrics, trajectory = run(algorithm, x)
    noise = torch.Generator().manual_seed(0)
    torch.randn((T + 1, N, 1), generator=noise)
    between = torch.rand(N, generator=noise).double()
    data, sample, c = x[:, 0].double(), trajectory.x[-1, :, 0].double(), 1.0 / (2.0 * SCALE**2)
    penalty = ((2.0 * c * (data + between * (sample - data))).abs() - 1.0) ** 2
    contrast = c * (data**2).mean() - c * (sample**2).mean()
    assert metrics["energy/data_mean"] == pytest.approx(float(c * (data**2).mean()), rel=1e-4)
    assert metrics["energy/penalty"] == pytest.approx(float(penalty.mean()), rel=1e-4)
    assert metrics["energy/loss"] == pytest.approx(float(contrast + 10.0 * penalty.mean()), rel=1e-4)
    (gradient,) = [p.grad for p in algorithm.optimizers["energy"].parameters]
    along = (data + between * (sample - data)).abs()
    expected = (data**2).mean() - (sample**2).mean() + 10.0 * (2.0 * (2.0 * c * along - 1.0) * 2.0 * along).mean()
    assert float(gradient) == pytest.approx(float(expected), rel=1e-3)


def test_the_value_of_sft_pg_is_a_value_with_the_critic_at_the_end():
    algorithm = sft_pg()
    assert isinstance(algorithm.value, SeparateValue)
    x = torch.randn(5, 1)
    torch.testing.assert_close(algorithm.value(x, T), algorithm.energy(x))
    torch.testing.assert_close(
        algorithm.value(x, 0, UNCONDITIONAL), Expected(1.0)(x, Expected(1.0).table[0].expand(5, 2))
    )
