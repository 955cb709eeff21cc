"""The linear-quadratic problem with an exact answer (dxmi/README.md, 'Exact oracle'): each loss, then all of DxMI.

E(x) = x^2 / (2v) makes the optimal step N(a_t x, tau / k_t) and the value V_t(x) = A_t x^2 / 2 + B_t. The oracle's
entropy is in nats, log sigma + log(2 pi e) / 2; the code's is log sigma. Each step to go therefore adds
tau log(2 pi e) / 2 to the code's B_t, and `Oracle` takes the one or the other.
"""

import math
from dataclasses import dataclass, field

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dxmi.algorithms.configs import DxMIConfig
from dxmi.algorithms.costs import ControlCost, RunningCost
from dxmi.algorithms.dxmi import DxMI
from dxmi.algorithms.losses import policy_loss, td_target, value_loss
from dxmi.critics.energy import Energy
from dxmi.critics.value import SeparateValue
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules.base import StepSchedule
from dxmi.diffusion.schedules.build import shorten
from dxmi.diffusion.schedules.configs import VarScheduleConfig
from dxmi.diffusion.trajectory import GaussianStep
from dxmi.networks.base import Critic, Denoiser, TimedCritic
from dxmi.optim.config import OptimizerConfig, PolicyOptimizerConfig
from support import make_parts, update

V, W, S2, TAU, T = 0.5, 1.0, 0.3, 0.2, 4
ENTROPY_CONSTANT = 0.5 * math.log(2.0 * math.pi * math.e)
NODES, WEIGHTS = (torch.from_numpy(a) for a in np.polynomial.hermite_e.hermegauss(20))
WEIGHTS = WEIGHTS / WEIGHTS.sum()


@dataclass
class Oracle:
    """a_t, sigma_t [T] and A_t, B_t [T+1], by recursion from t = T.

    `nats` chooses the entropy's unit of zero. `final_sigma` fixes the last step's, which then is not optimal: V_{T-1}
    is the expectation under that sigma, k sigma^2 / 2 instead of tau / 2. Without `control_in_value` (m_v = 0) the
    policy is as short-sighted as before, and V_t is the mean of V_{t+1} alone.
    """

    nats: bool
    final_sigma: float | None = None
    control_in_value: bool = True
    a: list[float] = field(default_factory=lambda: [0.0] * T)
    sigma: list[float] = field(default_factory=lambda: [0.0] * T)
    A: list[float] = field(default_factory=lambda: [0.0] * (T + 1))
    B: list[float] = field(default_factory=lambda: [0.0] * (T + 1))

    def __post_init__(self) -> None:
        self.A[T] = 1.0 / V
        for t in reversed(range(T)):
            k = W / S2 + self.A[t + 1]
            self.a[t] = (W / S2) / k
            fixed = self.final_sigma is not None and t == T - 1
            self.sigma[t] = self.final_sigma if fixed else math.sqrt(TAU / k)
            self.A[t] = self.A[t + 1] * self.a[t] ** 2
            self.B[t] = self.B[t + 1] + 0.5 * self.A[t + 1] * self.sigma[t] ** 2
            if self.control_in_value:
                entropy = math.log(self.sigma[t]) + (ENTROPY_CONSTANT if self.nats else 0.0)
                self.A[t] += (W / S2) * (1.0 - self.a[t]) ** 2
                self.B[t] += 0.5 * (W / S2) * self.sigma[t] ** 2 - TAU * entropy

    def value(self, x: Tensor | float, t: int) -> Tensor | float:
        return 0.5 * self.A[t] * x**2 + self.B[t]


NATS, CODE = Oracle(nats=True), Oracle(nats=False)


def test_the_oracle_gives_designs_number():
    assert f"{NATS.value(1.3, 0):.5f}" == "1.00965"


def test_the_constants_are_designs_and_the_units_of_entropy_differ_by_a_constant():
    """B_t = B_{t+1} + tau/2 - (tau/2) log(2 pi e tau / k)."""
    for t in range(T):
        k = W / S2 + NATS.A[t + 1]
        step = TAU / 2 - TAU / 2 * math.log(2 * math.pi * math.e * TAU / k)
        assert NATS.B[t] == pytest.approx(NATS.B[t + 1] + step, rel=1e-14)
        assert CODE.B[t] - NATS.B[t] == pytest.approx((T - t) * TAU * ENTROPY_CONSTANT, rel=1e-13)


# ----------------------------------------------------------------------------
# Each loss, in float64 and with Gauss-Hermite quadrature instead of samples: exact for polynomials.


def control(x: Tensor, x_next: Tensor, log_sigma: Tensor) -> Tensor:
    """The control cost of steps [B, 1], as the algorithm composes it."""
    first, running = slice(0, 1), RunningCost("transition", torch.tensor([S2], dtype=torch.float64), 1.0)
    cost = running(running.displacement(x, x_next, GaussianStep(x, log_sigma.exp())), first)
    return ControlCost((1.0,), W, TAU, num_steps=1)(cost, log_sigma, first)


def fan(x: float, a: Tensor | float, log_sigma: Tensor) -> tuple[Tensor, Tensor]:
    """x repeated, and a x + sigma z at every node: [Q, 1] each."""
    here = torch.full((len(NODES), 1), x, dtype=torch.float64)
    return here, a * here + log_sigma.exp() * NODES[:, None]


@pytest.mark.parametrize("x", [-2.0, 0.0, 1.3])
@pytest.mark.parametrize("t", range(T))
def test_td_target_averages_to_the_exact_value(t, x):
    log_sigma = torch.tensor(CODE.sigma[t], dtype=torch.float64).log()
    here, x_next = fan(x, CODE.a[t], log_sigma)
    zero = torch.zeros((), dtype=torch.float64)
    target = td_target(CODE.value(x_next[:, 0], t + 1), zero, control(here, x_next, log_sigma))
    assert float(WEIGHTS @ target) == pytest.approx(CODE.value(x, t), abs=1e-12)
    with_step_cost = td_target(CODE.value(x_next[:, 0], t + 1), zero + 0.7, control(here, x_next, log_sigma))
    assert float(WEIGHTS @ with_step_cost) == pytest.approx(CODE.value(x, t) + 0.7, abs=1e-12)


def test_td_target_passes_no_gradient():
    next_value, step_cost = torch.ones(2, requires_grad=True), torch.ones(2, requires_grad=True)
    control_costs = torch.ones(2, requires_grad=True)
    assert not td_target(next_value, step_cost, control_costs).requires_grad
    assert not td_target(next_value, step_cost, None).requires_grad


@pytest.mark.parametrize("t", range(T))
def test_value_loss_is_least_at_the_exact_value(t):
    """Over several x at once: gradient zero in A_t and B_t at the oracle, and larger on either side."""

    def loss(quadratic: Tensor, constant: Tensor) -> Tensor:
        log_sigma = torch.tensor(CODE.sigma[t], dtype=torch.float64).log()
        total = torch.zeros((), dtype=torch.float64)
        for x in (-2.0, 0.3, 1.3):
            here, x_next = fan(x, CODE.a[t], log_sigma)
            target = td_target(CODE.value(x_next[:, 0], t + 1), 0.0 * constant, control(here, x_next, log_sigma))
            total = total + WEIGHTS @ value_loss(0.5 * quadratic * here[:, 0] ** 2 + constant, target)
        return total

    exact = [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in (CODE.A[t], CODE.B[t])]
    least = loss(*exact)
    assert [float(g) for g in torch.autograd.grad(least, exact)] == pytest.approx([0.0, 0.0], abs=1e-12)
    for dA, dB in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.1), (0.0, -0.1)):
        assert loss(exact[0] + dA, exact[1] + dB).item() > least.item() + 1e-3


@pytest.mark.parametrize("x", [-2.0, 0.4, 1.3])
@pytest.mark.parametrize("t", range(T))
def test_policy_loss_is_least_at_the_optimal_step(t, x):
    """Gradient zero in the slope of the mean and in log sigma at the oracle, larger elsewhere, and equal to V_t(x)."""

    def loss(a: Tensor, log_sigma: Tensor) -> Tensor:
        here, x_next = fan(x, a, log_sigma)
        return WEIGHTS @ policy_loss(CODE.value(x_next[:, 0], t + 1), control(here, x_next, log_sigma))

    optimum = [torch.tensor(n, dtype=torch.float64, requires_grad=True) for n in (CODE.a[t], math.log(CODE.sigma[t]))]
    least = loss(*optimum)
    assert [float(g) for g in torch.autograd.grad(least, optimum)] == pytest.approx([0.0, 0.0], abs=1e-12)
    assert least.item() == pytest.approx(CODE.value(x, t), abs=1e-12)
    for da, ds in ((0.1, 0.0), (-0.1, 0.0), (0.0, 0.1), (0.0, -0.1), (0.3, 0.3), (-0.3, -0.3)):
        assert loss(optimum[0] + da, optimum[1] + ds).item() > least.item() + 1e-4


def test_policy_loss_without_control_is_the_next_value_alone():
    value = torch.tensor([1.0, 2.0])
    assert torch.equal(policy_loss(value, None), value)


# ----------------------------------------------------------------------------
# The whole algorithm: DxMI on networks that can hold the answer must find it.


class Slopes(Denoiser):
    """eps(x, k_t) = change_t x / output_scale_t, so that the mean of step t is (signal_scale_t + change_t) x."""

    def __init__(self, schedule: StepSchedule) -> None:
        super().__init__()
        self.change = nn.Parameter(torch.zeros(T))
        self.output_scale = torch.from_numpy(schedule.output_scale).float()

    def embed(self, steps: Tensor) -> Tensor:
        assert len(steps) == T  # a policy embeds all of its steps at once
        return (self.change / self.output_scale)[:, None]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return embedding * x


class Quadratics(TimedCritic):
    """V(x, t) = A_t x^2 / 2 + B_t."""

    def __init__(self) -> None:
        super().__init__()
        self.coefficients = nn.Parameter(torch.zeros(T, 2))

    def embed(self, steps: Tensor) -> Tensor:
        return self.coefficients[steps]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return 0.5 * embedding[:, 0] * x[:, 0] ** 2 + embedding[:, 1]


class FixedEnergy(Critic):
    """x^2 / (2v); its parameter has no effect and, with a learning rate of 0, no motion."""

    def __init__(self) -> None:
        super().__init__()
        self.idle = nn.Parameter(torch.zeros(1))

    def forward(self, x: Tensor) -> Tensor:
        return x[:, 0] ** 2 / (2.0 * V) + 0.0 * self.idle


FINAL_SIGMA = 0.3
ITERATIONS, BATCH = 1200, 1024


def solve(preset: str) -> DxMI:
    """DxMI after training on the oracle's problem; the rates fall to 0, so that the sampling noise averages out."""
    config = DxMIConfig(
        preset=preset,
        value="separate",
        entropy_coef=TAU,
        cost_coef=W,
        energy_l2=0.0,
        reference_var=(S2,),
        reference_var_ema=1.0,
        policy_ema=None,
        policy=PolicyOptimizerConfig(lr=0.02, sigma_lr=0.02, max_grad_norm=None, decay="linear"),
        critic=OptimizerConfig(lr=0.05, decay="linear"),
        energy=OptimizerConfig(lr=0.0),
    )
    schedule = shorten(VarScheduleConfig(num_steps=T, final_sigma=FINAL_SIGMA))
    value = SeparateValue(Energy(FixedEnergy()), Quadratics(), T)
    policy = Policy(Slopes(schedule), schedule, (1,))
    dxmi = DxMI(config, make_parts(policy, schedule, ITERATIONS), value)
    noise, states = torch.Generator().manual_seed(0), torch.Generator().manual_seed(1)
    for iteration in range(ITERATIONS):
        update(dxmi, torch.zeros(BATCH, 1), iteration, noise, states)
    return dxmi


@pytest.mark.parametrize("preset", ["objective", "as_released"])
def test_dxmi_converges_to_the_oracle(preset):
    """Slopes, learned sigmas, A_t and B_t, from training alone; the last sigma stays the schedule's."""
    dxmi = solve(preset)
    oracle = Oracle(nats=False, final_sigma=FINAL_SIGMA, control_in_value=preset == "objective")
    with torch.no_grad():
        slopes = dxmi.policy.signal_scale + dxmi.policy.network.change
        sigmas = dxmi.policy.log_sigma.exp()
        quadratic, constant = dxmi.value.network.coefficients.T
    assert slopes.tolist() == pytest.approx(oracle.a, abs=0.005)
    assert sigmas[:-1].tolist() == pytest.approx(oracle.sigma[:-1], rel=0.01)
    assert sigmas[-1].item() == pytest.approx(FINAL_SIGMA, rel=1e-6)
    assert quadratic.tolist() == pytest.approx(oracle.A[:-1], abs=0.015)
    assert constant.tolist() == pytest.approx(oracle.B[:-1], abs=0.006)
