"""One DxMI iteration taken apart: each step against the formula by hand, and no setting without effect."""

import math
from collections.abc import Callable, Iterator
from dataclasses import fields, is_dataclass, replace
from itertools import pairwise
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dxmi.algorithms.configs import DDPMConfig, DxMIConfig
from dxmi.algorithms.costs import RunningCost, adapt_, step_costs
from dxmi.algorithms.dxmi import DxMI
from dxmi.algorithms.losses import energy_loss
from dxmi.algorithms.states import StoredStates, draw_states
from dxmi.critics.energy import Energy
from dxmi.critics.value import SeparateValue, SharedValue
from dxmi.data.batch import Batch, Streams
from dxmi.diffusion.schedules.configs import VarScheduleConfig
from dxmi.diffusion.trajectory import GaussianStep, Trajectory
from dxmi.errors import UserError
from dxmi.networks.base import Critic, TimedCritic
from dxmi.networks.configs import MlpConfig
from dxmi.optim.config import DECAYS, KINDS, OptimizerConfig, PolicyOptimizerConfig, lr_factor
from dxmi.optim.moving_average import MovingAverage
from dxmi.optim.optimizer import Optimizer
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig, NetworksConfig
from support import descend, stating, step, update, without_seeds

T, B, EVENT = 4, 6, (3,)
PRESETS, VALUES = ("as_released", "objective"), ("shared", "separate")


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def streams_of(generator: torch.Generator | None = None) -> Streams:
    """Streams of one seed, of which only the noise is drawn from."""
    return Streams([{"noise": generator or torch.Generator()}])


def with_seed(trajectory: Trajectory) -> Trajectory:
    """With the axis of seeds in front."""
    return Trajectory(*(tensor.unsqueeze(0) for tensor in trajectory))


def ending_in(sample: Tensor) -> Trajectory:
    """A trajectory of which only the last state is used."""
    return Trajectory(sample[None, None], torch.empty(0), torch.empty(0))


def update_energy(dxmi: DxMI, data: Tensor, sample: Tensor) -> dict[str, Tensor]:
    """The metrics of one energy update, as scalars."""
    return without_seeds(dxmi.update_energy(Batch.single(data, len(data)), ending_in(sample), streams_of()))


def displacements(dxmi: DxMI, trajectory: Trajectory) -> Tensor | None:
    """Those of every stored step, [1, T, B]."""
    return dxmi.displacements(with_seed(trajectory))


def update_value(
    dxmi: DxMI,
    trajectory: Trajectory,
    t: int,
    displacement: Tensor | None,
    generator: torch.Generator | None = None,
) -> Tensor:
    """The mean squared error of one value update, []."""
    batch = Batch.single(None, trajectory.batch_size)
    return dxmi.update_value(t, batch, with_seed(trajectory), displacement, streams_of(generator))[0]


def update_policy(dxmi: DxMI, trajectory: Trajectory, drawn: Tensor, generator: torch.Generator) -> dict[str, Tensor]:
    """The metrics of one policy update, as scalars."""
    batch = Batch.single(None, trajectory.batch_size)
    states = StoredStates.gather(with_seed(trajectory), batch.condition, drawn[None], batch.share)
    return without_seeds(dxmi.update_policy(states, streams_of(generator)))


def updates(dxmi: DxMI, num: int = 3, batch_size: int = B, first: int = 0) -> dict[str, Tensor]:
    """The metrics of the last of `num` updates, on data and noise that are always the same."""
    noise, states = torch.Generator().manual_seed(7), torch.Generator().manual_seed(8)
    for i in range(first, first + num):
        data = 0.3 * normal(batch_size, *dxmi.policy.event, seed=100 + i) + 0.5
        metrics = update(dxmi, data, i, noise, states)
    return metrics


def parameters(module: nn.Module) -> dict[str, Tensor]:
    return {name: p.detach().clone() for name, p in module.named_parameters()}


def changed(before: dict[str, Tensor], module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if not torch.equal(before[name], p)}


def same(a: nn.Module, b: nn.Module) -> bool:
    """Whether two modules of one shape hold bitwise the same numbers."""
    pairs = zip(a.state_dict().values(), b.state_dict().values(), strict=True)
    return all(torch.equal(x, y) for x, y in pairs)


# ----------------------------------------------------------------------------
# Each loss moves its own parameters and no others.


def with_gradient(module: nn.Module) -> set[str]:
    return {name for name, p in module.named_parameters() if p.grad is not None}


@pytest.mark.parametrize("kind", VALUES)
def test_energy_update_moves_the_energy_alone(make_dxmi, kind):
    dxmi = make_dxmi(DxMIConfig(value=kind, target_ema=0.9))
    before, data = parameters(dxmi), normal(B, *EVENT)
    update_energy(dxmi, data, normal(B, *EVENT, seed=1))
    expected = {f"value.energy.{name}" for name, _ in dxmi.value.energy.named_parameters()}
    # The last bias shifts both energies alike: only the squared-energy term moves it, which is on by default.
    assert changed(before, dxmi) == expected
    assert with_gradient(dxmi) == expected


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("t", [0, T - 1])
def test_value_update_moves_a_separate_value_alone(make_dxmi, preset, t):
    dxmi = make_dxmi(DxMIConfig(value="separate", preset=preset, target_ema=0.9))
    trajectory = dxmi.policy.rollout(normal(T + 1, B, *EVENT))
    before = parameters(dxmi)
    update_value(dxmi, trajectory, t, displacements(dxmi, trajectory))
    expected = {f"value.network.{name}" for name, _ in dxmi.value.network.named_parameters()}
    assert changed(before, dxmi) == expected
    assert with_gradient(dxmi) == expected


@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("t", [0, T - 1])
def test_value_update_moves_a_shared_value_alone(make_dxmi, preset, t):
    dxmi = make_dxmi(DxMIConfig(value="shared", preset=preset, target_ema=0.9))
    trajectory = dxmi.policy.rollout(normal(T + 1, B, *EVENT))
    before = parameters(dxmi)
    update_value(dxmi, trajectory, t, displacements(dxmi, trajectory))
    moved = changed(before, dxmi)
    assert moved
    assert moved <= {f"value.{name}" for name, _ in dxmi.value.named_parameters()}
    assert with_gradient(dxmi) == moved


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("mask", [0.0, 1.0])
def test_policy_update_moves_the_policy_alone(make_dxmi, kind, mask):
    dxmi = make_dxmi(DxMIConfig(value=kind, target_ema=0.9, policy_mask=(mask,)))
    trajectory = dxmi.policy.rollout(normal(T + 1, B, *EVENT))
    before = parameters(dxmi)
    update_policy(dxmi, trajectory, torch.arange(0, T * B, T), torch.Generator().manual_seed(0))
    expected = {f"policy.{name}" for name, _ in dxmi.policy.named_parameters()}
    assert changed(before, dxmi) == expected
    assert with_gradient(dxmi) == expected


# ----------------------------------------------------------------------------
# 2. The reference variance.


def test_adaptive_reference_variance_is_the_formula(make_dxmi):
    """s_t^2 <- 0.9 eta_t + 0.1 mean (x_{t+1} - x_t)^2, over batch and dimensions, from the rollout of the iteration."""
    dxmi = make_dxmi(DxMIConfig(reference_var_ema=0.9))
    eta = dxmi.running_cost.reference_var.clone()
    x = dxmi.policy.rollout(dxmi.policy.noise(B, torch.Generator().manual_seed(7))).x.double().numpy()
    updates(dxmi, 1)
    by_hand = [0.9 * float(eta[t]) + 0.1 * np.mean((x[t + 1] - x[t]) ** 2) for t in range(T)]
    np.testing.assert_allclose(dxmi.running_cost.reference_var.numpy(), by_hand, rtol=1e-6)


def test_reference_variance_with_decay_one_is_fixed(make_dxmi):
    dxmi = make_dxmi(DxMIConfig(reference_var_ema=1.0))
    eta = dxmi.running_cost.reference_var.clone()
    updates(dxmi)
    assert torch.equal(dxmi.running_cost.reference_var, eta)


def test_reference_variance_starts_at_eta_a_constant_or_a_table(make_dxmi):
    v = 0.95 / (0.01 * T)
    eta = [1e-4 * (1.0 + i * v) ** 2 for i in reversed(range(T))]  # policy step t: eta_{T-t}
    tables = {None: eta, (0.3,): [0.3] * T, (0.1, 0.2, 0.3, 0.4): [0.1, 0.2, 0.3, 0.4]}
    for given, expected in tables.items():
        dxmi = make_dxmi(DxMIConfig(reference_var=given))
        assert dxmi.running_cost.reference_var.tolist() == pytest.approx(expected, rel=1e-6)


def test_running_cost_is_a_mean_over_dimensions():
    x, x_next = normal(B, 2, 3), normal(B, 2, 3, seed=1)
    variance = torch.rand(B, generator=torch.Generator().manual_seed(2)) + 0.1
    samples = zip(x.numpy(), x_next.numpy(), variance.numpy(), strict=True)
    by_hand = [np.mean((b - a) ** 2) / (2 * s) for a, b, s in samples]
    cost = RunningCost("transition", variance, 0.9)
    displacement = cost.displacement(x, x_next, GaussianStep(x, variance))
    np.testing.assert_allclose(cost(displacement, torch.arange(B)).numpy(), by_hand, rtol=1e-6)


def test_noise_cost_is_half_the_mean_square_of_the_standardised_noise(make_dxmi):
    """running_cost=noise: z^2 / 2 averaged over dimensions, with s_t^2 = 1 for ever, in the value's target as well."""
    dxmi = make_dxmi(DxMIConfig(running_cost="noise", preset="objective", cost_coef=0.2, entropy_coef=0.0))
    noise = normal(T + 1, B, *EVENT)
    trajectory = dxmi.policy.rollout(noise)
    squared = displacements(dxmi, trajectory)
    # Not the last step: its sigma of 0.001 is lost in the rounding of x.
    np.testing.assert_allclose(squared[0, :3].numpy(), noise[1:4].square().mean(2).numpy(), rtol=1e-4)
    with torch.no_grad():
        value = dxmi.value(trajectory.x[1], 1).double()
        target = dxmi.value(trajectory.x[2], 2).double() + 0.2 * 0.5 * noise[2].double().square().mean(1)
    error = update_value(dxmi, trajectory, 1, squared)
    assert float(error) == pytest.approx(float((value - target).square().mean()), rel=1e-4)
    updates(dxmi)
    assert dxmi.running_cost.reference_var.tolist() == [1.0] * T


def test_noise_cost_has_no_gradient_through_a_reparameterised_step(make_policy):
    policy = make_policy(T, EVENT)
    x = normal(B, *EVENT)
    step, cost = policy.transition(x, 1), RunningCost("noise", torch.ones(T), 1.0)
    loss = cost.displacement(x, step.sample(normal(B, *EVENT, seed=1)), step).mean()
    grads = torch.autograd.grad(loss, list(policy.parameters()))
    assert max(float(g.abs().max()) for g in grads) < 1e-6  # each of the two paths carries about 1


def test_noise_cost_refuses_a_reference_variance_that_it_would_not_use():
    with pytest.raises(ValueError, match=stating("reference_var … no effect")):
        DxMIConfig(running_cost="noise", reference_var=(0.3,))


def test_reference_variance_moves_towards_the_mean_of_a_batch():
    reference_var = torch.tensor([1.0, 2.0])
    adapt_(reference_var, torch.tensor([3.0, 0.0]), 0.75)
    assert reference_var.tolist() == [0.75 * 1.0 + 0.25 * 3.0, 0.75 * 2.0]


# ----------------------------------------------------------------------------
# 3. The energy.


def test_energy_loss_is_the_formula():
    data, sample = normal(B), normal(B, seed=1)
    by_hand = data.numpy() - sample.numpy() + 0.7 * (data.numpy() ** 2 + sample.numpy() ** 2)
    np.testing.assert_allclose(energy_loss(data, sample, 0.7).numpy(), by_hand, rtol=1e-6)
    np.testing.assert_array_equal(energy_loss(data, sample, 0.0).numpy(), data.numpy() - sample.numpy())


@pytest.mark.parametrize("kind", VALUES)
def test_energy_metrics_are_the_means_on_data_and_on_samples(make_dxmi, kind):
    dxmi = make_dxmi(DxMIConfig(value=kind, energy_l2=0.7))
    data, sample = normal(B, *EVENT), normal(B, *EVENT, seed=1)
    with torch.no_grad():
        of_data, of_sample = (dxmi.value.energy(x).double() for x in (data, sample))
    metrics = update_energy(dxmi, data, sample)
    loss = of_data.mean() - of_sample.mean() + 0.7 * (of_data.square().mean() + of_sample.square().mean())
    expected = {"energy/data_mean": of_data.mean(), "energy/sample_mean": of_sample.mean(), "energy/loss": loss}
    assert set(metrics) == set(expected)
    for key, value in expected.items():
        assert float(metrics[key]) == pytest.approx(float(value), rel=1e-5)


def test_the_gradient_penalty_is_the_squared_gradient_at_data_and_samples(make_dxmi):
    dxmi = make_dxmi(DxMIConfig(value="separate", energy_l2=0.0, energy_gradient_penalty=0.3))
    data, sample = normal(B, *EVENT).requires_grad_(), normal(B, *EVENT, seed=1).requires_grad_()
    of_data, of_sample = dxmi.energy(data), dxmi.energy(sample)
    gradients = torch.autograd.grad(of_data.sum() + of_sample.sum(), (data, sample))
    penalty = sum(float(gradient.double().square().sum(1).mean()) for gradient in gradients)
    metrics = update_energy(dxmi, data.detach(), sample.detach())
    assert float(metrics["energy/penalty"]) == pytest.approx(penalty, rel=1e-5)
    contrast = float((of_data.mean() - of_sample.mean()).detach())
    assert float(metrics["energy/loss"]) == pytest.approx(contrast + 0.3 * penalty, rel=1e-5)


def test_a_strong_gradient_penalty_flattens_the_energy(make_dxmi):
    def slope(penalty: float) -> float:
        settings = DxMIConfig(value="separate", energy_gradient_penalty=penalty, energy=OptimizerConfig(lr=0.01))
        dxmi, x = make_dxmi(settings), normal(B, *EVENT, seed=2).requires_grad_()
        updates(dxmi, 30)
        return float(torch.autograd.grad(dxmi.energy(x).sum(), x)[0].norm())

    assert slope(100.0) < 0.2 * slope(0.0)


def test_the_noise_of_the_energy_is_added_to_data_and_samples_and_to_each_its_own(make_dxmi, monkeypatch):
    dxmi, seen = make_dxmi(DxMIConfig(value="separate", energy_noise=0.5)), []
    network, forward = dxmi.energy.network, dxmi.energy.network.forward
    monkeypatch.setattr(network, "forward", lambda x: seen.append(x) or forward(x))
    data, sample = torch.zeros(2000, *EVENT), torch.full((2000, *EVENT), 4.0)
    update_energy(dxmi, data, sample)
    noise = seen[0].detach() - torch.cat((data, sample))
    assert float(noise.std()) == pytest.approx(0.5, rel=0.03)
    assert float(noise.mean()) == pytest.approx(0.0, abs=0.02)
    assert abs(float((noise[:2000] * noise[2000:]).mean())) < 0.02


@pytest.mark.parametrize("kind", KINDS)
def test_without_l2_a_separate_energy_keeps_its_offset(make_dxmi, kind):
    """A constant cancels in the loss; any optimizer that scales gradients would move it by their rounding noise."""
    settings = OptimizerConfig(kind=kind, lr=0.01)
    dxmi = make_dxmi(DxMIConfig(value="separate", energy_l2=0.0, energy=settings))
    before = parameters(dxmi.value.energy)
    updates(dxmi, batch_size=7)
    assert before.keys() - changed(before, dxmi.value.energy) == {"network.body.layers.2.bias"}


@pytest.mark.parametrize(("kind", "energy_l2"), [("shared", 0.0), ("separate", 0.01), ("shared", 1.0)])
def test_an_offset_on_which_a_loss_depends_is_learned(make_dxmi, kind, energy_l2):
    """The regulariser depends on it, and so does the value's loss, which trains a shared energy."""
    dxmi = make_dxmi(DxMIConfig(value=kind, energy_l2=energy_l2, step_cost="linear"))
    before = parameters(dxmi.value.energy)
    updates(dxmi)
    assert changed(before, dxmi.value.energy) == before.keys()


def test_energy_falls_on_data_and_rises_on_samples(make_dxmi):
    dxmi = make_dxmi(DxMIConfig(value="separate", energy_l2=0.0, energy=OptimizerConfig(lr=1e-3)))
    data, sample = normal(B, *EVENT) + 2.0, normal(B, *EVENT, seed=1)
    first = update_energy(dxmi, data, sample)
    for _ in range(20):
        last = update_energy(dxmi, data, sample)
    assert (
        last["energy/data_mean"] - last["energy/sample_mean"] < first["energy/data_mean"] - first["energy/sample_mean"]
    )


# ----------------------------------------------------------------------------
# 4. The value.


@pytest.mark.parametrize("kind", VALUES)
@pytest.mark.parametrize("t", range(T))
def test_value_update_regresses_on_the_target_by_hand(make_dxmi, kind, t):
    """V(x_{t+1}, t+1) + step_cost + m_v (cost_coef cost - entropy_coef log sigma), in float64."""
    config = DxMIConfig(
        value=kind, value_mask=(0.0, 1.0, 0.5, 2.0), step_cost="sigmoid", step_cost_scale=3.0, cost_coef=0.2
    )
    dxmi = make_dxmi(config)
    trajectory = dxmi.policy.rollout(normal(T + 1, B, *EVENT))
    x, x_next = trajectory.x[t], trajectory.x[t + 1]
    with torch.no_grad():
        value, value_next = dxmi.value(x, t).double(), dxmi.value(x_next, t + 1).double()
    cost = (x_next - x).double().square().mean(1) / (2.0 * dxmi.running_cost.reference_var[t].double())
    control = 0.2 * cost - 0.1 * math.log(float(trajectory.sigma[t, 0]))
    step_cost = 3.0 * (1 / (1 + math.exp(-(2 - t))) - 1 / (1 + math.exp(-(1 - t))))
    target = value_next + step_cost + (0.0, 1.0, 0.5, 2.0)[t] * control
    error = update_value(dxmi, trajectory, t, displacements(dxmi, trajectory))
    assert float(error) == pytest.approx(float((value - target).square().mean()), rel=1e-5)


def test_the_energy_steps_of_an_iteration_are_as_many_as_asked_for(make_dxmi, monkeypatch):
    dxmi, pairs = make_dxmi(DxMIConfig(energy_updates=3)), []
    original = dxmi.update_energy

    def spy(batch: Batch, trajectory: Trajectory, streams: Streams) -> dict[str, Tensor]:
        pairs.append((batch.x, trajectory.x[:, -1]))
        return original(batch, trajectory, streams)

    monkeypatch.setattr(dxmi, "update_energy", spy)
    updates(dxmi, 1)
    assert len(pairs) == 3
    assert all(torch.equal(a, b) for pair in pairs for a, b in zip(pair, pairs[0], strict=True))


def test_value_learns_from_the_last_step_backwards(make_dxmi, monkeypatch):
    dxmi, order = make_dxmi(DxMIConfig(value_updates=2)), []
    original = dxmi.update_value

    def spy(t: int, *others: Any) -> Tensor:
        order.append(t)
        return original(t, *others)

    monkeypatch.setattr(dxmi, "update_value", spy)
    updates(dxmi, 1)
    assert order == [3, 2, 1, 0, 3, 2, 1, 0]


def test_td_error_is_the_root_of_the_mean_square_over_all_steps(make_dxmi, monkeypatch):
    dxmi = make_dxmi(DxMIConfig())
    monkeypatch.setattr(dxmi, "update_value", lambda t, *others: torch.tensor([float(t)]))
    assert float(updates(dxmi, 1)["value/td_error"]) == pytest.approx(math.sqrt((0 + 1 + 2 + 3) / 4))


def test_resampled_next_states_come_from_the_policy_and_not_from_the_rollout(make_dxmi):
    dxmi = make_dxmi(DxMIConfig(value_mask=(1.0,), resample_next=True))
    trajectory = dxmi.policy.rollout(normal(T + 1, B, *EVENT))
    x = trajectory.x[1]
    noise = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    with torch.no_grad():
        mean, sigma = dxmi.policy.transition(x, 1)
        x_next = (mean + sigma[:, None] * noise).double()
        value, value_next = dxmi.value(x, 1).double(), dxmi.value(x_next.float(), 2).double()
    cost = (x_next - x).square().mean(1) / (2.0 * dxmi.running_cost.reference_var[1].double())
    target = value_next + 0.01 * cost - 0.1 * sigma.log().double()
    error = update_value(dxmi, trajectory, 1, displacements(dxmi, trajectory), torch.Generator().manual_seed(3))
    assert float(error) == pytest.approx(float((value - target).square().mean()), rel=1e-5)


@pytest.mark.parametrize(
    ("masked", "preset"),
    [
        ({"value_mask": (0.0,)}, "as_released"),
        ({"value_mask": (0.0,) * T}, "as_released"),
        ({"value_mask": (1.0,)}, "objective"),
        ({"value_mask": (1.0,) * T}, "objective"),
    ],
)
@pytest.mark.parametrize("kind", VALUES)
def test_presets_are_masks_bitwise(make_dxmi, masked, preset, kind):
    other = next(name for name in PRESETS if name != preset)  # a mask that is given wins over the preset's
    by_mask, by_name = (
        make_dxmi(DxMIConfig(preset=other, value=kind, **masked)),
        make_dxmi(DxMIConfig(preset=preset, value=kind)),
    )
    updates(by_mask)
    updates(by_name)
    assert same(by_mask, by_name)


def test_step_cost_tables():
    """sigmoid: a [sg(T//2 - t) - sg(T//2 - t - 1)]; for T = 5 the arguments run from 2 to -3."""
    sg = [1.0 / (1.0 + math.exp(-z)) for z in (2.0, 1.0, 0.0, -1.0, -2.0, -3.0)]
    by_hand = [0.5 * (a - b) for a, b in pairwise(sg)]
    assert step_costs("sigmoid", 0.5, 5).tolist() == pytest.approx(by_hand, rel=1e-6)
    assert step_costs("linear", 0.5, 5).tolist() == [0.5] * 5
    assert step_costs("none", 0.5, 5).tolist() == [0.0] * 5
    assert step_costs("sigmoid", 1.0, 1).tolist() == pytest.approx([0.5 - 1 / (1 + math.e)], rel=1e-6)


class Bowl(Critic):
    """sum_i c_i x_i^2 / 2, of which the gradient is c x."""

    def __init__(self) -> None:
        super().__init__()
        self.c = nn.Parameter(torch.tensor([1.0, 2.0, 3.0]))

    def forward(self, x: Tensor) -> Tensor:
        return 0.5 * (self.c * x.square()).sum(1)


class TimedBowl(TimedCritic):
    """(t + 2) sum_i x_i^2 / 2."""

    def embed(self, steps: Tensor) -> Tensor:
        return (steps + 2.0)[:, None]

    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        return 0.5 * embedding[:, 0] * x.square().sum(1)


@torch.no_grad()
def test_value_gradient_of_a_quadratic_even_without_gradients_enabled():
    x, shared = normal(B, 3), SharedValue(Energy(Bowl()))
    separate = SeparateValue(Energy(Bowl()), TimedBowl(), T)
    c = torch.tensor([1.0, 2.0, 3.0])
    for value, t, expected in ((shared, 0, c * x), (shared, T, c * x), (separate, 1, 3.0 * x), (separate, T, c * x)):
        torch.testing.assert_close(value.gradient(x, t), expected, rtol=1e-6, atol=0)
        assert all(p.grad is None for p in value.parameters())
    assert not x.requires_grad


@pytest.mark.parametrize("num_final", [0, 2, B])
@pytest.mark.parametrize("kind", VALUES)
def test_value_at_steps_equals_each_sample_alone(make_dxmi, kind, num_final):
    value = make_dxmi(DxMIConfig(value=kind)).value
    t = torch.tensor(([0, 0, 1, 2, 3, 3][: B - num_final]) + [T] * num_final)
    x = normal(B, *EVENT)
    alone = torch.cat([value(x[i : i + 1], int(t[i])) for i in range(B)])
    found = value.forward_timesteps(x, t, num_nonterminal=B - num_final, num_terminal=num_final)
    torch.testing.assert_close(found, alone, rtol=1e-6, atol=1e-6)


def test_separate_value_is_the_energy_at_the_end_and_depends_on_the_step_before(make_dxmi):
    value, x = make_dxmi(DxMIConfig(value="separate")).value, normal(B, *EVENT)
    assert torch.equal(value(x, T), value.energy(x))
    assert not torch.isclose(value(x, 0), value(x, 1)).any()
    assert not torch.isclose(value(x, T - 1), value.energy(x)).any()


# ----------------------------------------------------------------------------
# 5. The policy.


@pytest.mark.parametrize("kind", VALUES)
def test_policy_update_minimises_the_loss_by_hand(make_dxmi, kind):
    """V(x_{t+1}, t+1) + m_p (cost_coef cost - entropy_coef log sigma) of a fresh step from each drawn state."""
    masks = (1.0, 0.5, 0.0, 2.0)
    dxmi = make_dxmi(DxMIConfig(value=kind, policy_mask=masks, cost_coef=0.2, entropy_coef=0.3))
    trajectory = dxmi.policy.rollout(normal(T + 1, B, *EVENT))
    drawn = torch.tensor([0, 4, 7, 13, 18, 23])  # steps 0, 0, 1, 2, 3, 3
    noise = torch.randn((B, *EVENT), generator=torch.Generator().manual_seed(3))
    losses, costs = [], []
    with torch.no_grad():
        for i, index in enumerate(drawn.tolist()):
            t, sample = divmod(index, B)
            x = trajectory.x[t, sample : sample + 1]
            mean, sigma = dxmi.policy.transition(x, t)
            x_next = mean + sigma[:, None] * noise[i : i + 1]
            costs.append(float((x_next - x).double().square().mean() / (2.0 * dxmi.running_cost.reference_var[t])))
            control = 0.2 * costs[-1] - 0.3 * math.log(float(sigma))
            losses.append(float(dxmi.value(x_next, t + 1)) + masks[t] * control)
    metrics = update_policy(dxmi, trajectory, drawn, torch.Generator().manual_seed(3))
    assert float(metrics["policy/loss"]) == pytest.approx(np.mean(losses), rel=1e-5)
    assert float(metrics["policy/cost"]) == pytest.approx(np.mean(costs), rel=1e-5)


@pytest.mark.parametrize("horizon", [2, 3, None])
@pytest.mark.parametrize("kind", VALUES)
def test_a_longer_horizon_minimises_the_loss_by_hand(make_dxmi, kind, horizon):
    """V(x_{t+h}, t+h) and the sum of the control costs of h new steps, or of those that are left; and its gradient."""
    masks = (1.0, 0.5, 0.0, 2.0)
    settings = DxMIConfig(value=kind, policy_mask=masks, cost_coef=0.2, entropy_coef=0.3, policy_horizon=horizon)
    dxmi = make_dxmi(settings)
    trajectory = dxmi.policy.rollout(normal(T + 1, B, *EVENT))
    drawn = torch.tensor([0, 4, 7, 13, 18, 23])  # steps 0, 0, 1, 2, 3, 3
    generator = torch.Generator().manual_seed(3)
    noise = [torch.randn((B, *EVENT), generator=generator) for _ in range(horizon or T)]
    losses, costs = [], []
    for i, index in enumerate(drawn.tolist()):
        t, sample = divmod(index, B)
        x, end = trajectory.x[t, sample : sample + 1], min(t + (horizon or T), T)
        loss, cost = torch.zeros(()), 0.0
        for k, now in enumerate(range(t, end)):
            mean, sigma = dxmi.policy.transition(x, now)
            x_next = mean + sigma[:, None] * noise[k][i : i + 1]
            running = (x_next - x).square().mean() / (2.0 * dxmi.running_cost.reference_var[now])
            loss = loss + masks[now] * (0.2 * running - 0.3 * sigma.log().sum())
            x, cost = x_next, cost + running.item()
        losses.append(loss + dxmi.value(x, end).sum())
        costs.append(cost)
    total = torch.stack(losses).mean()
    grads = torch.autograd.grad(total, dxmi.optimizers["policy"].parameters)
    metrics = update_policy(dxmi, trajectory, drawn, torch.Generator().manual_seed(3))
    assert float(metrics["policy/loss"]) == pytest.approx(total.item(), rel=1e-5)
    assert float(metrics["policy/cost"]) == pytest.approx(np.mean(costs), rel=1e-5)
    norm = torch.stack([grad.norm() for grad in grads]).norm()
    assert float(metrics["policy/grad_norm"]) == pytest.approx(norm.item(), rel=1e-4)


def test_the_energy_alone_trains_the_policy_through_all_steps(make_dxmi):
    """With all steps and no updates of the value, its network before T is neither trained nor of any effect."""
    settings = DxMIConfig(value="separate", policy_horizon=None, value_updates=0)
    dxmi, other = make_dxmi(settings), make_dxmi(settings)
    with torch.no_grad():
        for parameter in other.value.network.parameters():
            parameter.add_(0.5)
    before = parameters(dxmi.value.network)
    assert "value/td_error" not in updates(dxmi)
    updates(other)
    assert not changed(before, dxmi.value.network)
    assert same(dxmi.policy, other.policy)


def test_the_policy_waits_for_the_energy(make_dxmi):
    dxmi = make_dxmi(DxMIConfig(policy_start=2))
    before, energy = parameters(dxmi.policy), parameters(dxmi.value)
    assert "policy/loss" not in updates(dxmi, 2)
    assert not changed(before, dxmi.policy)
    assert changed(energy, dxmi.value)
    assert "policy/loss" in updates(dxmi, 1, first=2)
    assert changed(before, dxmi.policy)


def test_policy_entropy_is_the_mean_log_sigma(make_dxmi):
    dxmi = make_dxmi(DxMIConfig())
    metrics = updates(dxmi)
    expected = (dxmi.policy.free_log_sigma.double().sum().item() + math.log(0.001)) / T
    assert float(metrics["policy/entropy"]) == pytest.approx(expected, rel=1e-6)


def drawn_states(generator: torch.Generator, *, every: bool) -> list[Tensor]:
    """Minibatches [B] of one seed."""
    streams = Streams([{"states": generator}])
    return [drawn[0] for drawn in draw_states(streams, "states", T, B, every=every)]


def test_all_states_are_drawn_exactly_once():
    draws = drawn_states(torch.Generator().manual_seed(0), every=True)
    assert [len(drawn) for drawn in draws] == [B] * T
    assert torch.cat(draws).sort().values.tolist() == list(range(T * B))
    assert not torch.equal(torch.cat(draws), torch.arange(T * B))


def test_one_draw_is_a_batch_of_distinct_states_from_all_steps():
    generator = torch.Generator().manual_seed(0)
    draws = [drawn_states(generator, every=False)[0] for _ in range(50)]
    assert all(len(set(drawn.tolist())) == B for drawn in draws)
    assert all(torch.equal(drawn, drawn.sort().values) for drawn in draws)
    assert set(torch.cat(draws).tolist()) == set(range(T * B))


@pytest.mark.parametrize(("changes", "expected"), [({}, 1), ({"policy_updates": 3}, 3), ({"all_states": True}, T)])
def test_number_of_policy_updates(make_dxmi, monkeypatch, changes, expected):
    dxmi, calls = make_dxmi(DxMIConfig(**changes)), []
    original = dxmi.update_policy

    def spy(*args: Any) -> dict[str, Tensor]:
        calls.append(args)
        return original(*args)

    monkeypatch.setattr(dxmi, "update_policy", spy)
    updates(dxmi, 1)
    assert len(calls) == expected


# ----------------------------------------------------------------------------
# Averages.


@pytest.mark.parametrize(("iteration", "decay"), [(0, 0.1), (8, 0.5), (9, 10 / 19), (50, 0.8)])
@pytest.mark.parametrize("kind", VALUES)
def test_target_and_policy_averages_by_hand(make_dxmi, kind, iteration, decay):
    """The target's decay is 0.8 throughout; that of the policy's average is min(0.8, (1 + i) / (10 + i))."""
    dxmi = make_dxmi(DxMIConfig(value=kind, target_ema=0.8, policy_ema=0.8))
    old_value, old_policy = parameters(dxmi.target), parameters(dxmi.ema_policy)
    updates(dxmi, 1, first=iteration)
    averages = ((0.8, old_value, dxmi.target, dxmi.value), (decay, old_policy, dxmi.ema_policy, dxmi.policy))
    for weight, old, average, source in averages:
        for (name, held), new in zip(average.named_parameters(), source.parameters(), strict=True):
            torch.testing.assert_close(held, weight * old[name] + (1.0 - weight) * new, rtol=1e-5, atol=1e-7)
    assert changed(old_value, dxmi.target)


def test_td_target_uses_the_target_network(make_dxmi):
    dxmi = make_dxmi(DxMIConfig(target_ema=0.8))
    trajectory = dxmi.policy.rollout(normal(T + 1, B, *EVENT))
    with torch.no_grad():
        for p in dxmi.target.parameters():
            p.zero_()
        value = dxmi.value(trajectory.x[0], 0).double()
    error = update_value(dxmi, trajectory, 0, None)
    assert float(error) == pytest.approx(float(value.square().mean()), rel=1e-5)


def test_the_average_is_what_is_evaluated_and_without_one_the_policy(make_dxmi):
    with_average, without = make_dxmi(DxMIConfig(policy_ema=0.9)), make_dxmi(DxMIConfig(policy_ema=None))
    assert with_average.eval_policy is with_average.ema_policy
    assert without.eval_policy is without.policy


def test_a_target_lags_by_its_own_decay_from_the_first_update_on():
    """After n updates towards a constant, decay^n of the start is left."""
    source, target = nn.Linear(1, 1), nn.Linear(1, 1)
    average = MovingAverage.between(source, target, 0.995, warm_up=False)
    with torch.no_grad():
        for start, end in zip(target.parameters(), source.parameters(), strict=True):
            start.fill_(1.0)
            end.fill_(0.0)
    for i in range(100):
        average.schedule(i)
        average.update()
    for held in target.parameters():
        assert held.item() == pytest.approx(0.995**100, rel=1e-4)


def test_moving_average_starts_as_its_source():
    source, target = nn.Linear(2, 2), nn.Linear(2, 2)
    MovingAverage.between(source, target, 0.9)
    assert same(source, target)
    assert not any(p.requires_grad for p in target.parameters())


# ----------------------------------------------------------------------------
# Optimizers.


def test_gradients_are_clipped_over_network_and_log_sigma_together(make_dxmi):
    config = DxMIConfig(entropy_coef=5.0, policy=PolicyOptimizerConfig(max_grad_norm=0.1))
    dxmi, free = make_dxmi(config), make_dxmi(replace(config, policy=PolicyOptimizerConfig(max_grad_norm=None)))
    drawn = torch.arange(0, T * B, T)
    for algorithm in (dxmi, free):
        trajectory = algorithm.policy.rollout(normal(T + 1, B, *EVENT))
        metrics = update_policy(algorithm, trajectory, drawn, torch.Generator().manual_seed(0))
        if algorithm is dxmi:
            norm = float(metrics["policy/grad_norm"])
    clipped, raw = ([p.grad.double() for p in algorithm.policy.parameters()] for algorithm in (dxmi, free))
    assert norm == pytest.approx(math.sqrt(sum(float(g.square().sum()) for g in raw)), rel=1e-5)
    assert norm > 1.0
    for ours, free_grad in zip(clipped, raw, strict=True):
        torch.testing.assert_close(ours, free_grad * 0.1 / norm, rtol=1e-4, atol=1e-9)
    assert all(float(g.abs().max()) > 0.0 for g in clipped)
    assert "policy/grad_norm" not in metrics


def test_gradients_below_the_limit_are_left_alone():
    parameter = nn.Parameter(torch.tensor([3.0, 4.0]))
    optimizer = Optimizer(OptimizerConfig(max_grad_norm=10.0), [([parameter], 0.1)], 1)
    assert float(descend(optimizer, lambda: 0.5 * parameter.square().sum()).grad_norm) == pytest.approx(5.0)
    assert parameter.grad.tolist() == [3.0, 4.0]


TORCH = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("weight_decay", [0.0, 0.1])
def test_optimizers_are_torchs_run_by_hand(kind, weight_decay):
    """Ten steps on a quartic, two groups: plain torch.optim with zero_grad, backward and step."""

    def start() -> list[nn.Parameter]:
        return [nn.Parameter(normal(5, seed=i)) for i in range(2)]

    def loss(parameters: list[nn.Parameter]) -> Tensor:
        return sum(((p - 0.3) ** 4).sum() for p in parameters)

    ours, theirs = start(), start()
    config = OptimizerConfig(kind=kind, beta1=0.8, beta2=0.95, weight_decay=weight_decay)
    optimizer = Optimizer(config, [(ours[:1], 0.05), (ours[1:], 0.01)], 100)
    groups = [{"params": theirs[:1], "lr": 0.05}, {"params": theirs[1:], "lr": 0.01}]
    reference = TORCH[kind](groups, betas=(0.8, 0.95), weight_decay=weight_decay, foreach=False)
    for i in range(10):
        optimizer.schedule(i)
        descend(optimizer, lambda: loss(ours))
        reference.zero_grad()
        loss(theirs).backward()
        reference.step()
    for a, b, first in zip(ours, theirs, start(), strict=True):
        torch.testing.assert_close(a, b, rtol=1e-6, atol=1e-7)
        assert not torch.isclose(a, first, atol=1e-4).any()


def test_adam_is_its_formula():
    """m and v with bias correction (arXiv 1412.6980, algorithm 1), in float64."""
    parameter = nn.Parameter(torch.tensor([1.0, -2.0, 0.5]))
    optimizer = Optimizer(OptimizerConfig(beta1=0.8, beta2=0.95), [([parameter], 0.05)], 1)
    x, m, v = np.array([1.0, -2.0, 0.5]), np.zeros(3), np.zeros(3)
    for i in range(1, 6):
        descend(optimizer, (parameter**4).sum)
        g = 4.0 * x**3
        m, v = 0.8 * m + 0.2 * g, 0.95 * v + 0.05 * g**2
        x = x - 0.05 * (m / (1 - 0.8**i)) / (np.sqrt(v / (1 - 0.95**i)) + 1e-8)
    np.testing.assert_allclose(parameter.detach().numpy(), x, rtol=1e-6)


def test_warm_up_rises_linearly_to_one_and_decay_falls_from_there():
    def factors(decay: str) -> list[float]:
        return [lr_factor(OptimizerConfig(warmup=4, decay=decay), i, 12) for i in range(13)]

    rise = [0.25, 0.5, 0.75, 1.0]
    assert factors("constant") == rise + [1.0] * 9
    assert factors("linear") == pytest.approx(rise + [1 - i / 8 for i in range(9)])
    assert factors("cosine") == pytest.approx(rise + [math.cos(math.pi * i / 16) ** 2 for i in range(9)], abs=1e-15)
    for decay in DECAYS:  # a run that is shorter than its warm-up never decays, and nothing divides by zero
        assert lr_factor(OptimizerConfig(warmup=4, decay=decay), 4, 4) == 1.0
        assert lr_factor(OptimizerConfig(decay=decay), 0, 12) == 1.0
        assert lr_factor(OptimizerConfig(decay=decay), 99, 12) == (1.0 if decay == "constant" else 0.0)


def test_update_sets_every_optimizers_rates(make_dxmi):
    rates = {"policy": PolicyOptimizerConfig(lr=0.01, sigma_lr=0.1, warmup=4)}
    rates |= {"critic": OptimizerConfig(lr=0.02, decay="linear"), "energy": OptimizerConfig(lr=0.03, warmup=2)}
    dxmi = make_dxmi(DxMIConfig(value="separate", **rates), total=10)
    updates(dxmi, 1, first=1)
    assert [g["lr"] for g in dxmi.optimizers["policy"].torch.param_groups] == pytest.approx([0.005, 0.05])
    assert [g["lr"] for g in dxmi.optimizers["value"].torch.param_groups] == pytest.approx([0.018])
    assert [g["lr"] for g in dxmi.optimizers["energy"].torch.param_groups] == pytest.approx([0.03])


@pytest.mark.parametrize("rate", ["lr", "sigma_lr"])
def test_network_and_log_sigma_have_a_learning_rate_each(make_dxmi, rate):
    dxmi = make_dxmi(DxMIConfig(policy=PolicyOptimizerConfig(**{"lr": 0.01, "sigma_lr": 0.01} | {rate: 0.0})))
    before = parameters(dxmi.policy)
    updates(dxmi)
    moved = changed(before, dxmi.policy)
    assert ("free_log_sigma" in moved) == (rate == "lr")
    assert any(name.startswith("network.") for name in moved) == (rate == "sigma_lr")


# ----------------------------------------------------------------------------
# Corners.


@pytest.mark.parametrize("num_steps", [1, 2, T])
@pytest.mark.parametrize("batch_size", [1, B])
@pytest.mark.parametrize("preset", PRESETS)
@pytest.mark.parametrize("kind", VALUES)
def test_one_sample_and_one_step_update_with_finite_metrics(make_dxmi, num_steps, batch_size, preset, kind):
    config = DxMIConfig(preset=preset, value=kind, all_states=True, target_ema=0.9, step_cost="sigmoid")
    dxmi = make_dxmi(config, num_steps)
    metrics = updates(dxmi, 2, batch_size)
    assert set(metrics) == {
        *("energy/data_mean", "energy/sample_mean", "energy/loss", "value/td_error"),
        *("policy/loss", "policy/grad_norm", "policy/entropy", "policy/cost"),
    }
    assert all(metric.shape == () and metric.isfinite() for metric in metrics.values())
    assert all(tensor.isfinite().all() for tensor in dxmi.state_dict().values())


def test_equal_settings_give_equal_numbers_bitwise(make_dxmi):
    first, second = make_dxmi(DxMIConfig()), make_dxmi(DxMIConfig())
    updates(first)
    updates(second)
    assert same(first, second)


def test_an_update_leaves_the_global_random_state_alone(make_dxmi):
    dxmi, before = make_dxmi(DxMIConfig(resample_next=True)), torch.get_rng_state()
    updates(dxmi, 1)
    assert torch.equal(torch.get_rng_state(), before)


REFUSED: list[dict[str, Any]] = [
    {"preset": "official"},
    {"running_cost": "none"},
    {"step_cost": "cubic"},
    {"value": "both"},
    {"entropy_coef": -0.1},
    {"cost_coef": float("inf")},
    {"energy_l2": float("nan")},
    {"energy_updates": 0},
    {"value_updates": 0},
    {"policy_updates": 0},
    {"policy_horizon": 0},
    {"policy_horizon": None, "value_updates": -1},
    {"policy_start": -1},
    {"policy_horizon": None, "value_updates": 0, "value": "separate", "guidance": 0.1},
    {"reference_var_ema": 1.1},
    {"target_ema": 1.0},
    {"policy_ema": -0.1},
    {"reference_var": (0.0,)},
    {"value_mask": (-1.0,)},
    {"policy_mask": (float("nan"),)},
]


@pytest.mark.parametrize("setting", REFUSED, ids=str)
def test_a_bad_setting_is_refused(setting):
    with pytest.raises(ValueError, match="it must be"):
        DxMIConfig(**setting)


@pytest.mark.parametrize("name", ["kappa", "final_sigma"])
def test_fine_tuning_without_noise_is_refused_by_name(name):
    """log sigma would be minus infinity: the first policy update would leave NaN in every weight."""
    small = MlpConfig(hidden=8, layers=2, embedding=4)

    def build() -> None:
        networks = NetworksConfig(denoiser=small, energy=small)
        experiment = Experiment(ExperimentConfig(network=networks, schedule=VarScheduleConfig(**{name: 0.0})))
        experiment.build_finetuning(experiment.build_denoiser())

    with pytest.raises((ValueError, UserError), match=name):
        build()


@pytest.mark.parametrize("name", ["reference_var", "value_mask", "policy_mask"])
def test_a_table_of_the_wrong_length_is_refused_by_name(name):
    with pytest.raises(ValueError, match=f"^{name} has 3 entries"):
        DxMIConfig(**{name: (1.0, 1.0, 1.0)}).check(T)


def test_a_horizon_beyond_the_last_step_is_refused():
    with pytest.raises(ValueError, match=r"^policy_horizon is 5: it must be at most the 4 steps of schedule.num_steps"):
        DxMIConfig(policy_horizon=T + 1).check(T)
    DxMIConfig(policy_horizon=T).check(T)


# ----------------------------------------------------------------------------
# No dead field. Each entry: a context in which the field should matter, and the value to change it to.


def leaves(cls: type, prefix: str = "") -> Iterator[str]:
    """Dotted names of all settings of a config class, those of nested configs included."""
    default = cls()
    for f in fields(cls):
        value = getattr(default, f.name)
        yield from leaves(type(value), f"{prefix}{f.name}.") if is_dataclass(value) else (f"{prefix}{f.name}",)


def with_settings(config: Any, settings: dict[str, Any]) -> Any:
    """`config` with dotted names replaced."""
    for name, value in settings.items():
        head, _, rest = name.partition(".")
        config = replace(config, **{head: with_settings(getattr(config, head), {rest: value}) if rest else value})
    return config


Perturbations = dict[str, tuple[dict[str, Any], Any]]


def of_optimizer(name: str, context: dict[str, Any]) -> Perturbations:
    """Perturbations of an optimizer's settings, under the config field `name`."""
    changes = {
        "kind": "radam",
        "lr": 2e-3,
        "beta1": 0.5,
        "beta2": 0.9,
        "weight_decay": 0.1,
        "max_grad_norm": 1e-3,
        "warmup": 5,
        "decay": "linear",
    }
    return {f"{name}.{key}": (context, value) for key, value in changes.items()}


DXMI: Perturbations = {
    "preset": ({}, "objective"),
    "entropy_coef": ({}, 0.2),
    "cost_coef": ({}, 0.02),
    "energy_l2": ({}, 0.5),
    "energy_noise": ({}, 0.5),
    "energy_gradient_penalty": ({}, 0.5),
    "running_cost": ({}, "noise"),
    "step_cost": ({}, "sigmoid"),
    "step_cost_scale": ({"step_cost": "linear"}, 2.0),
    "reference_var": ({}, (0.5,)),
    "reference_var_ema": ({}, 0.5),
    "value_mask": ({}, (1.0, 0.0, 0.0, 0.0)),
    "policy_mask": ({}, (1.0, 1.0, 1.0, 0.0)),
    "value": ({}, "separate"),
    "energy_updates": ({}, 2),
    "value_updates": ({}, 2),
    "policy_updates": ({}, 2),
    "policy_start": ({}, 1),
    "policy_horizon": ({}, 2),
    "all_states": ({}, True),
    "resample_next": ({}, True),
    "target_ema": ({}, 0.05),
    "policy_ema": ({}, 0.05),
    **of_optimizer("policy", {}),
    "policy.sigma_lr": ({}, 1e-3),
    **of_optimizer("critic", {}),
    **of_optimizer("energy", {"value": "separate"}),
}

DDPM: Perturbations = {
    "iterations": ({"optimizer.decay": "linear"}, 20),
    "batch_size": ({}, 9),
    "ema": ({}, 0.05),
    **of_optimizer("optimizer", {}),
}


@pytest.mark.parametrize(("config", "perturbations"), [(DxMIConfig, DXMI), (DDPMConfig, DDPM)])
def test_every_setting_has_a_perturbation(config, perturbations):
    """A new field fails here until the tests below try it."""
    # weights: in test_conditional; seed: in test_stacking; teacher and teacher_energy: in test_distillation;
    # guidance: in test_guided_run
    elsewhere = {"kind", "weights", "teacher", "teacher_energy", "guidance", "shipped", "seed"}
    assert set(leaves(config)) - elsewhere == set(perturbations)


def evaluated_and_value(dxmi: DxMI) -> list[Tensor]:
    """What a run is judged by: the evaluated policy, the policy itself, and the value."""
    return [p for module in (dxmi.eval_policy, dxmi.policy, dxmi.value) for p in parameters(module).values()]


def differ(a: list[Tensor], b: list[Tensor]) -> bool:
    shapes = [x.shape for x in a] == [y.shape for y in b]
    return not (shapes and all(torch.equal(x, y) for x, y in zip(a, b, strict=True)))


@pytest.mark.parametrize("name", DXMI)
def test_no_field_of_dxmi_is_dead(make_dxmi, name):
    """Three updates end elsewhere if this one setting is another. Equal settings end at the same place bitwise."""
    context, value = DXMI[name]
    base = with_settings(DxMIConfig(), context)
    ends: list[list[Tensor]] = []
    for config in (base, with_settings(base, {name: value})):
        dxmi = make_dxmi(config, total=10)
        updates(dxmi)
        # A separate value has more parameters than a shared one: what differs must be the policy that learned from it.
        ends.append([*parameters(dxmi.policy).values()] if name == "value" else evaluated_and_value(dxmi))
    assert differ(*ends)


@pytest.fixture
def pretrain() -> Callable[[DDPMConfig], list[Tensor]]:
    """Three updates of pretraining on digits, as `dxmi.training.run` composes them: the average and the network."""

    def run(config: DDPMConfig) -> list[Tensor]:
        small = NetworksConfig(denoiser=MlpConfig(hidden=8, layers=2, embedding=4))
        ddpm, state = Experiment(ExperimentConfig(network=small, pretrain=config)).build_pretraining()
        for i in range(3):
            step(ddpm, state, i)
        return [*parameters(ddpm.average).values(), *parameters(ddpm.network).values()]

    return run


@pytest.mark.parametrize("name", DDPM)
def test_no_field_of_pretraining_is_dead(pretrain, name):
    context, value = DDPM[name]
    base = with_settings(DDPMConfig(iterations=10, batch_size=8), context)
    assert differ(pretrain(base), pretrain(with_settings(base, {name: value})))


def test_equal_settings_pretrain_equally(pretrain):
    config = DDPMConfig(iterations=10, batch_size=8)
    assert not differ(pretrain(config), pretrain(config))
