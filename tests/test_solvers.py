"""Deterministic references on models whose flow is known in closed form: DPM-Solver++(2M), Heun, and their spacing."""

import itertools
import math

import pytest
import torch
from torch import Tensor

from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules.base import StepSchedule
from dxmi.diffusion.schedules.build import shorten
from dxmi.diffusion.schedules.configs import NUM_DIFFUSION_STEPS
from dxmi.diffusion.schedules.ddpm import ddim_schedule, forward_levels
from dxmi.diffusion.schedules.edm import SIGMA_DATA, karras_schedule
from dxmi.diffusion.schedules.registry import SCHEDULES
from dxmi.diffusion.solvers import ClippedDpmSolver, DpmSolver, HeunSolver
from dxmi.networks.base import Denoiser

STD = 0.5
EDM_STD = 1.0
KARRAS = SCHEDULES.config("karras")


class OfGaussian(Denoiser):
    """The exact noise predictor of data N(0, std^2): eps(x, k) = s_k x / (a_k^2 std^2 + s_k^2)."""

    def __init__(self, std: float = STD) -> None:
        super().__init__()
        self.std = std

    def embed(self, steps: Tensor) -> Tensor:
        level = torch.from_numpy(forward_levels())[steps.long()]
        return ((1.0 - level).sqrt() / (level * self.std**2 + 1.0 - level))[:, None]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return embedding * x


class EdmOfGaussian(Denoiser):
    """EDM's network for data N(0, EDM_STD^2), where D(x; s) = EDM_STD^2 x / (EDM_STD^2 + s^2), told 250 log s."""

    def embed(self, steps: Tensor) -> Tensor:
        s = (steps.double() / 250.0).exp()
        root = (s**2 + SIGMA_DATA**2).sqrt()
        of_data = EDM_STD**2 / (EDM_STD**2 + s**2) - SIGMA_DATA**2 / root**2
        return (of_data * root / (s * SIGMA_DATA / root))[:, None]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return embedding * x


def error(kind: type[Policy], schedule: StepSchedule) -> float:
    """Relative error of the data that a sampler reaches from noise; the flow keeps x / sqrt(variance)."""
    is_edm = schedule.input_scale is not None
    policy = kind(EdmOfGaussian() if is_edm else OfGaussian(), schedule, (1,))
    start, *_, end = policy.sample_states(4, torch.Generator().manual_seed(0))
    signal, noise = (float(scale[0]) for scale in schedule.signal_and_noise)
    std = EDM_STD if is_edm else STD
    target = start.double() * std / math.sqrt((signal * std) ** 2 + noise**2)
    return float(((end.double() - target) / target).abs().max())


def leading(num_steps: int) -> StepSchedule:
    """DDIM on the steps 0..999, evenly: the last one starts at k = 0."""
    return shorten(SCHEDULES.config("step", num_steps=num_steps, shape="linear", kappa=0.0, final_sigma=0.0))


def edm_grid(num_steps: int) -> StepSchedule:
    """Euler's method on EDM's own grid: the last step starts at sigma_min."""
    return shorten(SCHEDULES.config("karras", num_steps=num_steps, kappa=0.0, final_sigma=0.0))


def on_edm(num_steps: int) -> StepSchedule:
    """Euler's method, trailing."""
    return karras_schedule(KARRAS, num_steps, kappa=0.0)


def by_hand(num_steps: int, start: float = 1.0, std: float = STD, bound: float = math.inf) -> Tensor:
    """Where the solver takes x_0 = start, in float64 and in the paper's letters, with predictions in +-bound."""
    a = torch.from_numpy(ddim_schedule(num_steps).level).sqrt()
    s = (1.0 - a**2).clamp_min(0.0).sqrt()
    ratio, x, data = (a / s).log(), torch.tensor([start], dtype=torch.float64), []
    for t in range(num_steps):
        data.append(((x - s[t] * s[t] * x / (a[t] ** 2 * std**2 + s[t] ** 2)) / a[t]).clamp(-bound, bound))
        used = data[t]
        if 0 < t < num_steps - 1:
            r = (ratio[t] - ratio[t - 1]) / (ratio[t + 1] - ratio[t])
            used = (1.0 + 1.0 / (2.0 * r)) * data[t] - 1.0 / (2.0 * r) * data[t - 1]
        x = s[t + 1] / s[t] * x - a[t + 1] * (torch.exp(ratio[t] - ratio[t + 1]) - 1.0) * used
    return x


@pytest.mark.parametrize("num_steps", [1, 2, 3, 4, 10])
def test_its_steps_are_the_papers(num_steps):
    """In float32 the first prediction of the data is a difference divided by a_0: its rounding grows by 1 / a_0."""
    schedule = ddim_schedule(num_steps)
    start, *_, end = DpmSolver(OfGaussian(), schedule, (1,)).sample_states(3, torch.Generator().manual_seed(0))
    bound = 2.0 * torch.finfo(torch.float32).eps / math.sqrt(schedule.level[0])
    torch.testing.assert_close(end / start, by_hand(num_steps).float().expand(3, 1), rtol=1e-5, atol=bound)


@pytest.mark.parametrize("num_steps", [2, 3, 5, 10])
def test_with_clipping_no_prediction_of_the_data_leaves_the_range_of_pixels(num_steps):
    """Without clipping, many samples of data whose deviation is 2 leave it."""
    clipped = ClippedDpmSolver(OfGaussian(2.0), ddim_schedule(num_steps), (1,))
    start, *_, end = clipped.sample_states(200, torch.Generator().manual_seed(0))
    expected = torch.cat([by_hand(num_steps, float(x), std=2.0, bound=1.0) for x in start])
    torch.testing.assert_close(end, expected.float()[:, None], rtol=1e-5, atol=1e-4)
    plain = DpmSolver(OfGaussian(2.0), ddim_schedule(num_steps), (1,)).sample(200, torch.Generator().manual_seed(0))
    assert (plain.abs() > 1.0).float().mean() > 0.1
    assert end.abs().max() <= 1.0 + 1e-6
    assert torch.equal(end.sign(), plain.sign())


def test_its_grid_ends_one_even_step_from_the_data():
    schedule = ddim_schedule(20)
    assert schedule.timestep[[0, -1]].tolist() == [NUM_DIFFUSION_STEPS - 1, 49.0]
    assert schedule.sigma.max() == 0.0
    assert ddim_schedule(1).timestep.tolist() == [NUM_DIFFUSION_STEPS - 1]


@pytest.mark.parametrize("num_steps", [2, 3, 4, 5, 8, 10])
def test_trailing_steps_are_closer_to_the_flow_than_those_that_end_at_clean_data(num_steps):
    assert error(Policy, ddim_schedule(num_steps)) < 0.98 * error(Policy, leading(num_steps))
    assert error(Policy, on_edm(num_steps)) < 0.98 * error(Policy, edm_grid(num_steps))


def test_it_is_of_second_order_where_the_same_steps_without_it_are_of_first():
    """From 10 steps to 20 the error falls to a quarter or less, DDIM's to about a half."""
    assert error(DpmSolver, ddim_schedule(20)) < 0.25 * error(DpmSolver, ddim_schedule(10))
    assert 0.4 < error(Policy, ddim_schedule(20)) / error(Policy, ddim_schedule(10)) < 0.6
    for num_steps in (5, 10, 20, 50):
        assert error(DpmSolver, ddim_schedule(num_steps)) < error(Policy, ddim_schedule(num_steps))
        assert error(DpmSolver, on_edm(num_steps)) < error(Policy, on_edm(num_steps))


def test_heun_is_of_second_order_where_euler_is_of_first():
    assert error(HeunSolver, on_edm(40)) < 0.27 * error(HeunSolver, on_edm(20))
    assert 0.4 < error(Policy, on_edm(40)) / error(Policy, on_edm(20)) < 0.6
    assert error(HeunSolver, on_edm(20)) < 0.6 * error(Policy, on_edm(39))  # with as many evaluations


def test_heuns_step_is_the_papers():
    """Algorithm 1 of arXiv 2206.00364 without churn, in float64."""
    levels, x = on_edm(5).level, 80.0
    slope = lambda x, s: (x - EDM_STD**2 * x / (EDM_STD**2 + s**2)) / s  # noqa: E731
    for s, s_next in itertools.pairwise(levels):
        d = slope(x, s)
        euler = x + (s_next - s) * d
        x = euler if s_next == 0.0 else x + (s_next - s) * 0.5 * (d + slope(euler, s_next))
    start, *_, end = HeunSolver(EdmOfGaussian(), on_edm(5), (1,)).sample_states(3, torch.Generator().manual_seed(0))
    torch.testing.assert_close(end / start, torch.full((3, 1), x / 80.0), rtol=1e-4, atol=1e-6)


@pytest.mark.parametrize("num_steps", [1, 5])
def test_samples_depend_on_the_starting_noise_alone(num_steps):
    policy = DpmSolver(OfGaussian(), ddim_schedule(num_steps), (1, 2, 2))
    one, two = (policy.sample(3, torch.Generator().manual_seed(5)) for _ in range(2))
    assert torch.equal(one, two)
    assert one.shape == (3, 1, 2, 2)
    assert len(list(policy.sample_states(3, torch.Generator()))) == num_steps + 1
