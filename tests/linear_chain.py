"""A linear-Gaussian chain with a quadratic reward, for which everything about the reward's maximization is known.

x_{t+1} = a_t x_t + b_t + s_t z with x_0 ~ N(0, 1), and r = -(x_T - c)^2 / (2 v). All formulas are in float64.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import torch
from torch import Tensor, nn

from dxmi.algorithms.base import Parts, PolicyAlgorithm
from dxmi.data.batch import Batch, Streams
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules.base import StepSchedule
from dxmi.networks.base import Critic, Denoiser, TimedCritic
from dxmi.optim.config import PolicyOptimizerConfig
from dxmi.rewards.configs import QuadraticRewardConfig
from dxmi.rewards.quadratic import QuadraticReward

FROZEN = {"policy": PolicyOptimizerConfig(lr=0.0, sigma_lr=0.0, max_grad_norm=None), "policy_ema": None}
"""Nothing moves: the gradients that an optimizer step leaves behind are those of the initial parameters."""


class LinearDenoiser(Denoiser):
    """eps(x, t) = change_t x + shift_t, with which a step's mean is (a_t + change_t) x + shift_t."""

    def __init__(self, num_steps: int) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(num_steps))
        self.shift = nn.Parameter(torch.zeros(num_steps))

    def embed(self, steps: Tensor) -> Tensor:
        return torch.stack((self.change, self.shift), dim=1)

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return embedding[:, :1] * x + embedding[:, 1:]


class QuadraticValue(TimedCritic):
    """V(x, t) = table[t, 0] x^2 + table[t, 1] x + table[t, 2]."""

    def __init__(self, table: Tensor) -> None:
        super().__init__()
        self.table = nn.Parameter(table.float().clone())

    def embed(self, steps: Tensor) -> Tensor:
        return self.table[steps]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return embedding[:, 0] * x[:, 0].square() + embedding[:, 1] * x[:, 0] + embedding[:, 2]


class QuadraticCritic(Critic):
    """f(x) = coefficients[0] x^2 + coefficients[1] x + coefficients[2]."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(3))

    def forward(self, x: Tensor) -> Tensor:
        first, second, third = self.coefficients
        return first * x[:, 0].square() + second * x[:, 0] + third


@dataclass(frozen=True)
class Chain:
    """The chain and its closed forms; the defaults are the example of the KL-regularized optimum.

    Attributes:
        a, b, s: Slope, offset and standard deviation of each step.
        c, v: Maximum and scale of the reward.
    """

    a: tuple[float, ...] = (0.9, 0.8, 1.1, 0.7)
    b: tuple[float, ...] = (0.1, -0.2, 0.3, 0.05)
    s: tuple[float, ...] = (0.6, 0.5, 0.4, 0.3)
    c: float = 1.2
    v: float = 0.5
    num_steps: int = field(default=0, init=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "num_steps", len(self.a))

    def parts(self, iterations: int = 10) -> Parts:
        """The parts of an algorithm; the learned baseline starts as the exact expected reward."""
        return Parts(
            policy=self.policy(),
            schedule=self._schedule(),
            iterations=iterations,
            critic=QuadraticCritic,
            timed_critic=lambda: QuadraticValue(self.values()),
            reward=lambda: QuadraticReward(QuadraticRewardConfig(target=(self.c,), scale=math.sqrt(self.v))),
        )

    def policy(self) -> Policy:
        """The chain as a policy."""
        policy = Policy(LinearDenoiser(self.num_steps), self._schedule(), (1,))
        with torch.no_grad():
            policy.network.shift.copy_(torch.tensor(self.b))  # type: ignore[union-attr]
        return policy

    def _schedule(self) -> StepSchedule:
        ones = np.ones(self.num_steps)
        return StepSchedule(np.ones(self.num_steps + 1), 0.0 * ones, np.array(self.a), ones, np.array(self.s), ones)

    def objective(self, a: Tensor, b: Tensor, log_s: Tensor) -> Tensor:
        """J = E r, from the moments of x_T."""
        mean, variance = a.new_zeros(()), a.new_ones(())
        for slope, offset, log_sigma in zip(a, b, log_s, strict=True):
            mean, variance = slope * mean + offset, slope**2 * variance + (2.0 * log_sigma).exp()
        return -((mean - self.c) ** 2 + variance) / (2.0 * self.v)

    def tensors(self) -> tuple[Tensor, Tensor, Tensor]:
        """a, b and log s, float64, with gradients."""
        a, b, s = (torch.tensor(own, dtype=torch.float64) for own in (self.a, self.b, self.s))
        return a.requires_grad_(), b.requires_grad_(), s.log().requires_grad_()

    def gradient(self) -> Tensor:
        """The gradient of J with respect to all slopes, all offsets, and the free log sigmas: [3T - 1]."""
        tensors = self.tensors()
        return torch.cat(torch.autograd.grad(self.objective(*tensors), tensors))[:-1]

    def moments(self, a: Tensor, b: Tensor, s: Tensor, mean: float = 0.0, variance: float = 1.0) -> tuple[float, float]:
        """Mean and variance of x_T, from those of x_0."""
        for slope, offset, sigma in zip(a.tolist(), b.tolist(), s.tolist(), strict=True):
            mean, variance = slope * mean + offset, slope**2 * variance + sigma**2
        return mean, variance

    def values(self) -> Tensor:
        """Coefficients of x^2, x and 1 in the expected reward from x_t, at t = 0 .. T - 1: [T, 3]."""
        square, linear, constant = -0.5 / self.v, self.c / self.v, -(self.c**2) / (2.0 * self.v)
        rows = []
        for a, b, s in zip(reversed(self.a), reversed(self.b), reversed(self.s), strict=True):
            constant += square * (b**2 + s**2) + linear * b
            linear = 2.0 * square * a * b + linear * a
            square *= a**2
            rows.append((square, linear, constant))
        return torch.tensor(rows[::-1], dtype=torch.float64)

    def optimum(self, beta: float) -> tuple[Tensor, Tensor, Tensor]:
        """a*, b* and s* of the chain that maximizes E r - beta KL(chain || this chain), by backward recursion."""
        h, g = 1.0 / self.v, self.c / self.v
        found = []
        for a, b, s in zip(reversed(self.a), reversed(self.b), reversed(self.s), strict=True):
            variance = 1.0 / (1.0 / s**2 + h / beta)
            offset = variance * (b / s**2 + g / beta)
            found.append((a * variance / s**2, offset, math.sqrt(variance)))
            g = beta * (a / s**2 * offset - a * b / s**2)
            h *= a**2 * variance / s**2
        a, b, s = torch.tensor(found[::-1], dtype=torch.float64).T
        return a, b, s

    def scores(self, x: Tensor) -> Tensor:
        """sum_t grad log pi of every trajectory x [T+1, N], in the order of `gradient`: [N, 3T - 1]."""
        x = x.double()
        a, b, s = (torch.tensor(own).double()[:, None] for own in (self.a, self.b, self.s))
        residual = x[1:] - a * x[:-1] - b
        of_log_s = (residual**2 / s**2 - 1.0)[:-1]
        return torch.cat((residual * x[:-1] / s**2, residual / s**2, of_log_s)).T


def left_behind(algorithm: PolicyAlgorithm) -> Tensor:
    """The gradient of the policy's last optimizer step, in the order of `Chain.gradient`: [3T - 1]."""
    grads = [parameter.grad for parameter in algorithm.optimizers["policy"].parameters]
    return torch.cat([grad.flatten() for grad in grads if grad is not None]).double()


def update(algorithm: PolicyAlgorithm, num: int, seed: int = 0, iteration: int = 0) -> dict[str, float]:
    """One update with `num` trajectories; returns its metrics."""
    streams = {name: torch.Generator().manual_seed(seed + k) for k, name in enumerate(algorithm.streams)}
    metrics = algorithm.update(Batch.single(None, num), iteration, Streams([streams]))
    return {name: float(value) for name, value in metrics.items()}


def trajectories(algorithm: PolicyAlgorithm, num: int, seed: int = 0) -> Tensor:
    """The states of the trajectories that `update` rolls out, before it changes the policy: [T+1, N]."""
    noise = algorithm.policy.noise(num, torch.Generator().manual_seed(seed))
    return algorithm.policy.rollout(noise).x[..., 0]
