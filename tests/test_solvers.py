"""Deterministic references: DPM-Solver++(2M) on a model whose flow is known in closed form."""

import math

import pytest
import torch
from torch import Tensor

from dxmi.networks import Denoiser
from dxmi.sampler import Policy
from dxmi.schedules import NUM_DIFFUSION_STEPS, ScheduleConfig, forward_levels, solver_schedule
from dxmi.solvers import DpmSolver, further_references

STD = 0.5


class OfGaussian(Denoiser):
    """The exact noise predictor of data N(0, STD^2): eps(x, k) = s_k x / (a_k^2 STD^2 + s_k^2)."""

    def embed(self, steps: Tensor) -> Tensor:
        level = torch.from_numpy(forward_levels())[steps.long()]
        return ((1.0 - level).sqrt() / (level * STD**2 + 1.0 - level))[:, None]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return embedding * x


def exact(level: float, x: Tensor) -> Tensor:
    """The flow keeps x / sqrt(variance): from the noisiest level to the data."""
    return x * STD / math.sqrt(level * STD**2 + 1.0 - level)


def error(kind: type[Policy], num_steps: int) -> float:
    """Relative error of the data that a sampler reaches from noise."""
    schedule = solver_schedule(num_steps)
    policy = kind(OfGaussian(), schedule, (1,))
    start, *_, end = policy.walk(4, torch.Generator().manual_seed(0))
    target = exact(float(schedule.level[0]), start.double())
    return float(((end.double() - target) / target).abs().max())


def by_hand(num_steps: int) -> Tensor:
    """Where the solver takes x_0 = 1, in float64 and in the paper's letters."""
    a = torch.from_numpy(solver_schedule(num_steps).level).sqrt()
    s = (1.0 - a**2).clamp_min(0.0).sqrt()
    ratio, x, data = (a / s).log(), torch.ones(1, dtype=torch.float64), []
    for t in range(num_steps):
        data.append((x - s[t] * s[t] * x / (a[t] ** 2 * STD**2 + s[t] ** 2)) / a[t])
        used = data[t]
        if 0 < t < num_steps - 1:
            r = (ratio[t] - ratio[t - 1]) / (ratio[t + 1] - ratio[t])
            used = (1.0 + 1.0 / (2.0 * r)) * data[t] - 1.0 / (2.0 * r) * data[t - 1]
        x = s[t + 1] / s[t] * x - a[t + 1] * (torch.exp(ratio[t] - ratio[t + 1]) - 1.0) * used
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10])
def test_its_steps_are_the_papers(num_steps):
    """In float32 the first prediction of the data is a difference divided by a_0: its rounding grows by 1 / a_0."""
    schedule = solver_schedule(num_steps)
    start, *_, end = DpmSolver(OfGaussian(), schedule, (1,)).walk(3, torch.Generator().manual_seed(0))
    bound = 2.0 * torch.finfo(torch.float32).eps / math.sqrt(schedule.level[0])
    torch.testing.assert_close(end / start, by_hand(num_steps).float().expand(3, 1), rtol=1e-5, atol=bound)


def test_its_grid_ends_one_even_step_from_the_data():
    schedule = solver_schedule(20)
    assert schedule.diffusion_step[[0, -1]].tolist() == [NUM_DIFFUSION_STEPS - 1, 50.0]
    assert schedule.sigma.max() == 0.0
    assert solver_schedule(1).diffusion_step.tolist() == [NUM_DIFFUSION_STEPS - 1]


def test_it_is_of_second_order_where_the_same_steps_without_it_are_of_first():
    """From 10 steps to 20 the error falls to a quarter or less, DDIM's to about a half."""
    assert error(DpmSolver, 20) < 0.25 * error(DpmSolver, 10)
    assert 0.4 < error(Policy, 20) / error(Policy, 10) < 0.6
    for num_steps in (5, 10, 20, 50):
        assert error(DpmSolver, num_steps) < error(Policy, num_steps)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_samples_depend_on_the_starting_noise_alone(num_steps):
    policy = DpmSolver(OfGaussian(), solver_schedule(num_steps), (1, 2, 2))
    one, two = (policy.sample(3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (3, 1, 2, 2)
    assert len(list(policy.walk(3, torch.Generator()))) == num_steps + 1


def test_further_references_are_of_the_models_kind():
    assert list(further_references(ScheduleConfig(), (5, 10))) == ["ddim_5", "ddim_10", "dpm_solver_5", "dpm_solver_10"]
    karras = further_references(ScheduleConfig(method="karras"), (5, 10))
    assert {name: (kind, schedule.num_steps) for name, (kind, schedule) in karras.items()} == {
        "euler_5": (Policy, 5),
        "euler_10": (Policy, 10),
    }
    assert all(schedule.sigma.max() == 0.0 for _, schedule in karras.values())
    assert further_references(ScheduleConfig(method="ddgan", num_steps=4), (5,)) == {}
