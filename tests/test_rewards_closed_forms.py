"""Algorithms that maximize a reward against the closed forms of a linear-Gaussian chain, see `linear_chain`."""

import math
from collections import deque
from dataclasses import replace
from typing import Any

import pytest
import torch
from linear_chain import FROZEN, Chain, QuadraticValue, left_behind, trajectories, update
from torch import Tensor

from dxmi.algorithms.advantages import Advantages, group_moments
from dxmi.algorithms.base import PolicyAlgorithm
from dxmi.algorithms.configs import (
    BASELINES,
    DpokConfig,
    DraftConfig,
    GrpoConfig,
    PpoConfig,
    ReinforceConfig,
    SacConfig,
    TrpoConfig,
    TrpoPenaltyConfig,
)
from dxmi.algorithms.dpok import Dpok
from dxmi.algorithms.draft import Draft
from dxmi.algorithms.grpo import Grpo
from dxmi.algorithms.losses import clipped_surrogate
from dxmi.algorithms.policy_gradient import Actions
from dxmi.algorithms.ppo import Experience, Ppo
from dxmi.algorithms.reinforce import Reinforce
from dxmi.algorithms.sac import Sac
from dxmi.algorithms.trpo import Trpo, conjugate_gradients
from dxmi.algorithms.trpo_penalty import TrpoPenalty
from dxmi.data.batch import UNCONDITIONAL, Batch, Streams
from dxmi.diffusion.trajectory import GaussianStep, Trajectory
from dxmi.errors import DivergedError, UserError
from dxmi.optim.config import OptimizerConfig, PolicyOptimizerConfig
from dxmi.optim.seeds import SINGLE_SEED

CHAIN = Chain()
N = 20_000


def reinforce(**settings: Any) -> Reinforce:
    return Reinforce(ReinforceConfig(**{"last_step": True, **FROZEN, **settings}), CHAIN.parts())


def ppo(kind: type[Ppo] = Ppo, **settings: Any) -> Ppo:
    config = GrpoConfig if kind is Grpo else PpoConfig
    return kind(config(**{"last_step": True, **FROZEN, "epochs": 1, "minibatches": 1, **settings}), CHAIN.parts())


def rewards(x: Tensor) -> Tensor:
    return -((x[-1].double() - CHAIN.c) ** 2) / (2.0 * CHAIN.v)


def values_of(x: Tensor, t: int) -> Tensor:
    """The exact expected reward from states x at step t."""
    square, linear, constant = CHAIN.values()[t]
    return square * x**2 + linear * x + constant


def require_unbiased(gradient: Tensor, draws: Tensor, expected: Tensor) -> None:
    """The mean of N draws is within 3 standard errors of the expectation, in every parameter."""
    error = draws.std(0) / math.sqrt(len(draws))
    assert torch.all((gradient - expected).abs() < 3.0 * error), (gradient, expected, error)


# ----------------------------------------------------------------------------
# The chain's own formulas.


def test_the_gradient_of_the_objective_is_that_of_the_formulas():
    """With A_t, the product of later slopes, and the moments m_t and P_t of x_t:

    dJ/da_t = -(m_T - c) A_t m_t / v - A_t^2 a_t P_t / v, dJ/db_t = -(m_T - c) A_t / v, dJ/dlog s_t = -A_t^2 s_t^2 / v.
    """
    means, variances = [0.0], [1.0]
    for a, b, s in zip(CHAIN.a, CHAIN.b, CHAIN.s, strict=True):
        means.append(a * means[-1] + b)
        variances.append(a**2 * variances[-1] + s**2)
    after = [math.prod(CHAIN.a[t + 1 :]) for t in range(CHAIN.num_steps)]
    pull = -(means[-1] - CHAIN.c) / CHAIN.v
    of_a = [pull * k * m - k**2 * a * p / CHAIN.v for k, m, a, p in zip(after, means, CHAIN.a, variances, strict=False)]
    of_s = [-(k**2) * s**2 / CHAIN.v for k, s in zip(after, CHAIN.s, strict=True)]
    expected = torch.tensor([*of_a, *(pull * k for k in after), *of_s[:-1]], dtype=torch.float64)
    torch.testing.assert_close(CHAIN.gradient(), expected)


def test_the_optimum_is_that_of_the_worked_example():
    a, b, s = CHAIN.optimum(0.3)
    torch.testing.assert_close(a, torch.tensor([0.69619, 0.54588, 0.82915, 0.4375]).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(b, torch.tensor([0.47953, 0.25132, 0.63065, 0.48125]).double(), rtol=0, atol=1e-5)
    torch.testing.assert_close(s, torch.tensor([0.52771, 0.41302, 0.34728, 0.23717]).double(), rtol=0, atol=1e-5)


# ----------------------------------------------------------------------------
# Gradients and baselines.


@pytest.mark.parametrize("baseline", BASELINES)
def test_the_gradient_is_unbiased_with_every_baseline(baseline):
    algorithm = reinforce(baseline=baseline)
    x = trajectories(algorithm, N)
    update(algorithm, N)
    require_unbiased(-left_behind(algorithm), CHAIN.scores(x) * rewards(x)[:, None], CHAIN.gradient())


def test_steps_before_the_first_action_have_no_gradient():
    """Each step of the chain has its own slope, offset and sigma; those of later steps have the gradient of before."""
    algorithm = reinforce(baseline="leave_one_out", first_step=2)
    x = trajectories(algorithm, N)
    update(algorithm, N)
    gradient, late = -left_behind(algorithm), torch.tensor([2, 3, 6, 7, 10])
    draws = CHAIN.scores(x) * rewards(x)[:, None]
    require_unbiased(gradient[late], draws[:, late], CHAIN.gradient()[late])
    early = torch.ones(len(gradient), dtype=torch.bool)
    early[late] = False
    assert torch.all(gradient[early] == 0.0)


@pytest.mark.parametrize("num", [2, 8])
def test_the_mean_of_the_group_shrinks_the_gradient_by_exactly_one_part_in_k(num):
    """r_i - mean = (K - 1) / K (r_i - mean of the others), in every batch."""
    with_mean, with_others = reinforce(baseline="mean"), reinforce(baseline="leave_one_out")
    update(with_mean, num)
    update(with_others, num)
    torch.testing.assert_close(left_behind(with_mean), (num - 1) / num * left_behind(with_others), rtol=1e-5, atol=1e-6)


def test_the_variance_of_the_gradient_falls_in_the_stated_order():
    """Of dJ/db_0 for one trajectory: no baseline 28.1, leave one out of 8 17.8, the mean 16.1, the exact value 12.0.

    The advantage of the single step, V(x_1, 1) - V(x_0, 0), has 5.2.
    """
    x = trajectories(reinforce(), 400_000, seed=5)
    score, reward = CHAIN.scores(x)[:, CHAIN.num_steps], rewards(x)
    value, after = (values_of(x[t].double(), t) for t in (0, 1))
    others = (reward.view(-1, 8).sum(1, keepdim=True) - reward.view(-1, 8)).flatten() / 7.0
    offsets = {"none": torch.zeros(()), "leave_one_out": others, "mean": reward.mean(), "learned": value}
    variance = {name: float((score * (reward - offset)).var()) for name, offset in offsets.items()}
    variance["step"] = float((score * (after - value)).var())
    stated = {"none": 28.1, "leave_one_out": 17.8, "mean": 16.1, "learned": 12.0, "step": 5.2}
    assert variance == pytest.approx(stated, rel=0.03)


def test_groups_are_compared_with_each_other_only():
    """Two conditions whose rewards differ by a constant: within groups, the constant does not matter."""
    reward = torch.tensor([[1.0, 2.0, 3.0, 101.0, 104.0]])
    group = torch.tensor([[0, 0, 0, 1, 1]])
    config = ReinforceConfig(baseline="leave_one_out", groups="condition", spread="group")
    baseline, spread = Advantages(config, 2).statistics(reward, group, group_moments(reward, group, 2), SINGLE_SEED)
    torch.testing.assert_close(baseline, torch.tensor([[2.5, 2.0, 1.5, 104.0, 101.0]]))
    torch.testing.assert_close(spread, torch.tensor([[math.sqrt(2 / 3)] * 3 + [1.5] * 2]), rtol=1e-5, atol=1e-5)


def test_recorded_statistics_are_those_of_the_public_code():
    """A second implementation, as in `PerPromptStatTracker`: deques, and the batch's statistics below min_count."""
    config = ReinforceConfig(baseline="mean", groups="condition", spread="group", buffer=6, min_count=4)
    advantages, draws = Advantages(config, 3), torch.Generator().manual_seed(2)
    deques: list[deque[float]] = [deque(maxlen=6) for _ in range(3)]
    for num in (5, 5, 17, 3):
        reward = torch.randn(1, num, generator=draws)
        group = torch.randint(3, (1, num), generator=draws)
        baseline, spread = advantages.statistics(reward, group, group_moments(reward, group, 3), SINGLE_SEED)
        for value, own in zip(reward[0].tolist(), group[0].tolist(), strict=True):
            deques[own].append(value)
        for k, own in enumerate(group[0].tolist()):
            known = torch.tensor(deques[own]) if len(deques[own]) >= 4 else reward[0]
            assert float(baseline[0, k]) == pytest.approx(float(known.mean()), abs=1e-6)
            assert float(spread[0, k]) == pytest.approx(float(known.std(correction=0)), abs=2e-6)


def learned_chain(algorithm: PolicyAlgorithm) -> tuple[Tensor, Tensor, Tensor]:
    """a, b and the free s of a trained policy."""
    network = algorithm.policy.network
    slopes = torch.tensor(CHAIN.a).double() + network.change.detach().double()
    return slopes, network.shift.detach().double(), algorithm.policy.free_log_sigma.detach().double().exp()


def test_equal_rewards_have_no_spread_in_any_precision():
    reward, group = torch.full((1, 8), -0.0123), torch.zeros(1, 8, dtype=torch.int64)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert float(group_moments(reward, group, 1).constant_share()) == 1.0
        _, mean, deviation = group_moments(reward + 100.0, group, 1)
    assert float(deviation.max()) < 1e-4
    torch.testing.assert_close(mean, reward + 100.0)


# ----------------------------------------------------------------------------
# The KL divergence from the pretrained policy.


def test_the_divergence_of_two_steps_is_that_of_torch():
    draws = torch.Generator().manual_seed(0)
    means = torch.randn(2, 7, 3, 4, generator=draws, dtype=torch.float64)
    sigmas = torch.rand(2, 7, generator=draws, dtype=torch.float64) + 0.1
    one, other = (GaussianStep(mean, sigma) for mean, sigma in zip(means, sigmas, strict=True))
    normals = [torch.distributions.Normal(step.mean, step.sigma[:, None, None]) for step in (one, other)]
    expected = torch.distributions.kl_divergence(*normals).sum((1, 2))
    torch.testing.assert_close(one.kl(other), expected)


@pytest.mark.parametrize("make", [reinforce, pytest.param(ppo, marks=pytest.mark.slow)])
def test_training_reaches_the_optimum_of_the_regularized_objective(make):
    """a*, b* and s* to 1e-3, where the last sigma is fixed."""
    beta, iterations = 0.3, 1500
    policy = PolicyOptimizerConfig(lr=0.005, sigma_lr=0.005, max_grad_norm=None, decay="cosine")
    algorithm = make(kl_coef=beta, baseline="leave_one_out", policy=policy)
    algorithm.optimizers["policy"].total = iterations
    streams = Streams([{name: torch.Generator().manual_seed(k) for k, name in enumerate(algorithm.streams)}])
    for iteration in range(iterations):
        algorithm.update(Batch.single(None, 8192), iteration, streams)
    for found, exact in zip(learned_chain(algorithm), CHAIN.optimum(beta), strict=True):
        torch.testing.assert_close(found, exact[: len(found)], rtol=0.0, atol=1e-3)


def test_the_divergence_is_weighed_against_the_reward_with_its_gradient():
    """The gradient of E r - beta sum_t KL_t at another policy than the reference, from moments of the chain."""
    beta = 0.7
    algorithm = reinforce(kl_coef=beta, baseline="mean")
    moved = Chain(b=(0.4, 0.1, 0.1, 0.2))
    with torch.no_grad():
        algorithm.policy.network.shift.copy_(torch.tensor(moved.b))
    a, b, log_s = moved.tensors()
    mean, variance, divergence = a.new_zeros(()), a.new_ones(()), a.new_zeros(())
    for t, (slope, offset, sigma) in enumerate(zip(CHAIN.a, CHAIN.b, CHAIN.s, strict=True)):
        rises, shifts = a[t] - slope, b[t] - offset
        square = rises**2 * (variance + mean**2) + 2.0 * rises * shifts * mean + shifts**2
        ratio = log_s[t] - math.log(sigma)
        divergence = divergence + 0.5 * (square / sigma**2 + (2.0 * ratio).exp() - 1.0 - 2.0 * ratio)
        mean, variance = a[t] * mean + b[t], a[t] ** 2 * variance + (2.0 * log_s[t]).exp()
    objective = moved.objective(a, b, log_s) - beta * divergence
    expected = torch.cat(torch.autograd.grad(objective, (a, b, log_s)))[:-1]
    found = []
    for seed in range(12):
        metrics = update(algorithm, N, seed=10 * seed)
        found.append(-left_behind(algorithm))
    draws = torch.stack(found)
    require_unbiased(draws.mean(0), draws, expected)
    assert metrics["policy/kl_reference"] == pytest.approx(divergence.item(), rel=0.03)


def test_the_regularized_optimum_is_not_the_tilted_reference():
    """x_0 keeps its law, so x_T is not distributed as p_ref exp(r / beta); it is if x_0 is tilted as well."""
    beta = 0.3
    a, b, s = CHAIN.optimum(beta)
    reference = CHAIN.moments(*(torch.tensor(own, dtype=torch.float64) for own in (CHAIN.a, CHAIN.b, CHAIN.s)))
    precision = 1.0 / reference[1] + 1.0 / (beta * CHAIN.v)
    tilted = (reference[0] / reference[1] + CHAIN.c / (beta * CHAIN.v)) / precision, 1.0 / precision
    assert tilted == pytest.approx((1.02993, 0.12529), abs=1e-5)
    assert CHAIN.moments(a, b, s) == pytest.approx((0.94328, 0.13171), abs=1e-5)
    h, g = 1.0 / CHAIN.v, CHAIN.c / CHAIN.v
    for slope, offset, sigma in zip(reversed(CHAIN.a), reversed(CHAIN.b), reversed(CHAIN.s), strict=True):
        variance = 1.0 / (1.0 / sigma**2 + h / beta)
        pulled = variance * (offset / sigma**2 + g / beta)
        g = beta * (slope / sigma**2 * pulled - slope * offset / sigma**2)
        h *= slope**2 * variance / sigma**2
    start = g / beta / (1.0 + h / beta), 1.0 / (1.0 + h / beta)
    assert CHAIN.moments(a, b, s, *start) == pytest.approx(tilted, abs=1e-9)


# ----------------------------------------------------------------------------
# PPO.


@pytest.mark.parametrize("first_step", [0, 2])
def test_the_ratio_is_exactly_one_before_the_first_step(first_step):
    metrics = update(ppo(minibatches=3, first_step=first_step), 64)
    assert metrics["policy/ratio"] == 1.0
    assert metrics["policy/ratio_std"] == 0.0
    assert metrics["policy/kl"] == 0.0


@pytest.mark.parametrize("first_step", [0, 2])
def test_the_first_gradient_of_ppo_is_that_of_reinforce(first_step):
    one, other = ppo(first_step=first_step), reinforce(baseline="leave_one_out", first_step=first_step)
    update(one, 500)
    update(other, 500)
    assert torch.equal(left_behind(one), left_behind(other))


def test_the_ratio_follows_its_law():
    """With equal sigmas, the log ratio is N(-kappa, 2 kappa) under the old policy, kappa = KL(old || new) of a step."""
    num, clip, shift = 200_000, 0.1, 0.2
    settings = {"last_step": True, "epochs": 1, "minibatches": 1, "clip": clip, "baseline": "none", **FROZEN}
    algorithm = Ppo(PpoConfig(**settings), Chain(a=(0.0,), b=(0.0,), s=(0.7,)).parts())
    replay = algorithm._replay

    def moved(*inputs: Any) -> GaussianStep:
        old = replay(*inputs)
        with torch.no_grad():
            algorithm.policy.network.shift.add_(shift)
        return old

    algorithm._replay = moved  # type: ignore[method-assign]
    metrics = update(algorithm, num)
    kappa = shift**2 / (2.0 * 0.7**2)
    assert metrics["policy/kl"] == pytest.approx(kappa, rel=1e-5)
    assert metrics["policy/ratio"] == pytest.approx(1.0, abs=3.0 * math.sqrt(math.exp(2.0 * kappa) - 1.0) / num**0.5)
    assert metrics["policy/ratio_std"] == pytest.approx(math.sqrt(math.exp(2.0 * kappa) - 1.0), rel=0.02)
    normal = torch.distributions.Normal(-kappa, math.sqrt(2.0 * kappa))
    below = float(normal.cdf(torch.tensor(1.0 - clip).log()))  # all rewards are negative, and there is no baseline
    assert metrics["policy/clipped_low"] == pytest.approx(below, abs=3.0 * math.sqrt(below / num))
    assert metrics["policy/clipped_high"] == 0.0


def test_the_surrogate_is_bounded_only_with_the_dual_clip():
    ratio = torch.tensor([0.5, 1.0, 1.3, 9.0] * 2)
    advantage = torch.tensor([1.0] * 4 + [-1.0] * 4)
    single = clipped_surrogate(ratio, advantage, 0.2, None)
    torch.testing.assert_close(single, torch.tensor([-0.5, -1.0, -1.2, -1.2, 0.8, 1.0, 1.3, 9.0]))
    dual = clipped_surrogate(ratio, advantage, 0.2, 2.0)
    torch.testing.assert_close(dual, torch.tensor([-0.5, -1.0, -1.2, -1.2, 0.8, 1.0, 1.3, 2.0]))


def test_the_loss_as_released_is_that_of_the_published_formula():
    """A second implementation of one step, in float64: ratio of mean log-probabilities, clipped on both sides."""
    draws = torch.Generator().manual_seed(3)
    x_next, mean, old_mean = torch.randn(3, 50, 1, 4, 4, generator=draws)
    mean, old_mean = 0.02 * mean + x_next, 0.02 * old_mean + x_next
    sigma, advantage = torch.rand(50, generator=draws) + 0.1, 3.0 * torch.randn(50, generator=draws)
    new, old = GaussianStep(mean, sigma), GaussianStep(old_mean, sigma)
    ratio = ((new.log_prob(x_next) - old.log_prob(x_next)) / 16.0).exp()
    found = clipped_surrogate(ratio, advantage.clamp(-5.0, 5.0), 1e-4, None)

    def published(mean: Tensor) -> Tensor:
        variance = sigma.double()[:, None, None, None] ** 2
        terms = -((x_next.double() - mean.double()) ** 2) / (2.0 * variance)
        return (terms - variance.sqrt().log() - math.log(math.sqrt(2.0 * math.pi))).mean((1, 2, 3))

    true_ratio = (published(mean) - published(old_mean)).exp()
    clipped = advantage.double().clamp(-5.0, 5.0)
    unclipped_loss, clipped_loss = -clipped * true_ratio, -clipped * true_ratio.clamp(1.0 - 1e-4, 1.0 + 1e-4)
    torch.testing.assert_close(found.double(), torch.maximum(unclipped_loss, clipped_loss), rtol=0.0, atol=1e-6)
    assert 0.2 < float(((true_ratio - 1.0).abs() > 1e-4).double().mean()) < 1.0


def test_the_steps_of_an_iteration_end_once_the_divergence_exceeds_its_target():
    policy = PolicyOptimizerConfig(lr=0.05, sigma_lr=0.0, max_grad_norm=None)
    whole, stopped = (ppo(epochs=3, minibatches=4, policy=policy, target_kl=target) for target in (None, 0.01))
    all_steps, some_steps = update(whole, 200), update(stopped, 200)
    assert all_steps["policy/steps"] == 12.0
    assert 1.0 <= some_steps["policy/steps"] < 12.0
    assert some_steps["policy/kl"] > 0.01
    first = ppo(epochs=3, minibatches=4, policy=policy, target_kl=1e-12)
    moved = ppo(epochs=1, minibatches=4, policy=policy, target_kl=1e-12)
    assert update(first, 200)["policy/steps"] == 1.0
    assert update(moved, 200)["policy/steps"] == 1.0
    assert first.optimizers["policy"].state()["0.step"] == 12.0  # steps that are not taken are counted


def test_stacked_seeds_stop_separately():
    policy = PolicyOptimizerConfig(lr=0.01, sigma_lr=0.01, max_grad_norm=None)
    targets = {"epochs": 4, "minibatches": 4, "policy": policy, "target_kl": 0.02}
    members, alone = ([ppo(**targets) for _ in range(2)] for _ in range(2))
    seeds = (0, 7)

    def streams(seed: int) -> dict[str, torch.Generator]:
        return {name: torch.Generator().manual_seed(seed + k) for k, name in enumerate(Ppo.streams)}

    both = Streams([streams(seed) for seed in seeds])
    stack, batch = Ppo.stacked(members), Batch.stacked([Batch.single(None, 200)] * 2)
    own = [Streams([streams(seed)]) for seed in seeds]
    for iteration in range(3):
        together = stack.update(batch, iteration, both)
        single = [one.update(Batch.single(None, 200), iteration, mine) for one, mine in zip(alone, own, strict=True)]
    for k, one in enumerate(alone):
        torch.testing.assert_close(together["policy/steps"][k], single[k]["policy/steps"][0])
        for name, value in one.state_dict().items():
            torch.testing.assert_close(members[k].state_dict()[name], value, rtol=1e-4, atol=1e-5)
    assert float(together["policy/steps"][0]) != float(together["policy/steps"][1])


@pytest.mark.parametrize("make", [reinforce, ppo])
def test_a_reward_that_is_not_finite_stops_the_iteration_before_anything_changes(make):
    algorithm = make()
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    algorithm.reward = lambda x, condition: torch.full((len(x),), math.nan)
    with pytest.raises(DivergedError, match="reward"):
        update(algorithm, 8)
    assert all(torch.equal(value, before[name]) for name, value in algorithm.state_dict().items())


# ----------------------------------------------------------------------------
# TRPO.


def trpo(**settings: Any) -> Trpo:
    return Trpo(TrpoConfig(**{"last_step": True, "policy_ema": None, **settings}), CHAIN.parts())


def fisher_matrix(x: Tensor) -> Tensor:
    """The Fisher matrix of a trajectory at given states [T+1, N]: blocks [[E x^2, E x], [E x, 1]] / s^2, and 2."""
    num_steps = CHAIN.num_steps
    exact = torch.zeros(3 * num_steps - 1, 3 * num_steps - 1, dtype=torch.float64)
    for t, s in enumerate(CHAIN.s):
        first, second = float(x[t].double().mean()), float(x[t].double().square().mean())
        pair = [t, num_steps + t]
        exact[torch.tensor(pair)[:, None], torch.tensor(pair)] = (
            torch.tensor([[second, first], [first, 1.0]]).double() / s**2
        )
    for t in range(num_steps - 1):
        exact[2 * num_steps + t, 2 * num_steps + t] = 2.0
    return exact


@pytest.mark.parametrize("uses_groups", [False, True])
def test_fisher_products_are_those_of_the_closed_form(uses_groups):
    """In forward mode, and as the gradient of a vector-Jacobian product."""
    algorithm = trpo()
    algorithm._uses_groups = uses_groups
    x = trajectories(algorithm, 500)
    noise = algorithm.policy.noise(500, torch.Generator().manual_seed(0))
    trajectory = Trajectory(*(part.unsqueeze(0) for part in algorithm.policy.rollout(noise)))
    actions = algorithm.actions(trajectory, UNCONDITIONAL)
    exact = fisher_matrix(x)
    for row in torch.eye(len(exact)):
        found = algorithm.fisher_product(row[None], actions, algorithm.num_actions * 500)[0].double()
        torch.testing.assert_close(found, exact @ row.double(), rtol=1e-4, atol=1e-4)


def test_conjugate_gradients_solve_what_a_direct_solver_solves():
    draws = torch.Generator().manual_seed(0)
    root, target = torch.randn(2, 12, 12, generator=draws).double(), torch.randn(2, 12, generator=draws).double()
    matrix = root @ root.mT + torch.eye(12).double()
    x, curvature, residual = conjugate_gradients(lambda v: (matrix @ v[..., None])[..., 0], target, 60, 0.0)
    torch.testing.assert_close(x, torch.linalg.solve(matrix, target))
    torch.testing.assert_close(curvature, (x * target).sum(1))
    assert float(residual.max()) < 1e-10
    damped, curvature, _ = conjugate_gradients(lambda v: (matrix @ v[..., None])[..., 0], target, 60, 0.3)
    shift = 0.3 * torch.einsum("ki,kij,kj->k", target, matrix, target) / target.square().sum(1)
    shifted = matrix + shift[:, None, None] * torch.eye(12)
    torch.testing.assert_close(damped, torch.linalg.solve(shifted, target))
    torch.testing.assert_close(curvature, torch.einsum("ki,kij,kj->k", damped, matrix, damped))


@pytest.mark.parametrize("max_kl", [1e-4, 0.02])
def test_the_divergence_of_a_step_is_its_bound(max_kl):
    """KL(old || new) of the chain's moments is max_kl to 1 %, and the direction is F^-1 of the gradient."""
    algorithm = trpo(max_kl=max_kl, damping=0.0, cg_iterations=30)
    x = trajectories(algorithm, N)
    metrics = update(algorithm, N)
    assert metrics["policy/kl"] == pytest.approx(max_kl, rel=0.01)
    assert metrics["policy/backtracks"] == 0.0
    a, b, s = learned_chain(algorithm)
    change = torch.cat((a - torch.tensor(CHAIN.a).double(), b - torch.tensor(CHAIN.b).double()))
    rises = torch.cat((change, s.log() - torch.tensor(CHAIN.s[:-1]).double().log()))
    exact = fisher_matrix(x)
    assert float(rises @ exact @ rises) / 2.0 == pytest.approx(max_kl, rel=0.01 + 2.0 * math.sqrt(max_kl))
    offset = (rewards(x).sum() - rewards(x)) / (N - 1)
    gradient = (CHAIN.scores(x) * (rewards(x) - offset)[:, None]).mean(0)
    direction = torch.linalg.solve(exact, gradient)
    cosine = torch.nn.functional.cosine_similarity(rises, direction, dim=0)
    assert float(cosine) > 0.9999


def test_without_moving_sigmas_the_divergence_is_exactly_quadratic():
    """In (a, b) the divergence has no higher terms: the first, uncorrected step has max_kl to rounding."""
    algorithm = trpo(max_kl=0.3, damping=0.0, cg_iterations=30, train_sigmas=False)
    lengths = []
    move = algorithm._move

    def recorded(start: Any, change: Tensor) -> None:
        lengths.append(float(change.norm()))
        move(start, change)

    algorithm._move = recorded  # type: ignore[method-assign]
    metrics = update(algorithm, 2000)
    assert metrics["policy/kl"] == pytest.approx(0.3, rel=1e-4)
    assert lengths == pytest.approx([lengths[0]] * len(lengths), rel=1e-4)


def test_a_step_that_makes_the_surrogate_worse_is_given_up():
    algorithm = trpo(max_kl=0.1, backtracks=2)
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    algorithm.reward = lambda x, condition: torch.zeros(len(x))
    metrics = update(algorithm, 100)
    assert metrics["policy/kl"] == 0.0
    assert metrics["reward/zero_std_ratio"] == 1.0
    assert all(torch.equal(value, before[name]) for name, value in algorithm.state_dict().items())


def test_trpo_maximizes_the_reward_of_the_chain():
    algorithm = trpo(max_kl=0.05)
    first = update(algorithm, 2000)["reward/mean"]
    for iteration in range(1, 40):
        last = update(algorithm, 2000, seed=iteration, iteration=iteration)["reward/mean"]
    assert last > 0.35 * first  # rewards are negative


def test_the_penalty_follows_schulmans_rule():
    policy = PolicyOptimizerConfig(lr=0.02, sigma_lr=0.0, max_grad_norm=None)
    config = {"last_step": True, "policy_ema": None, "max_kl": 0.02, "penalty": 0.5, "policy": policy}
    algorithm = TrpoPenalty(TrpoPenaltyConfig(**config), CHAIN.parts())
    expected = 0.5
    for iteration in range(12):
        metrics = update(algorithm, 1000, seed=iteration, iteration=iteration)
        assert metrics["policy/penalty"] == pytest.approx(expected)
        kl = metrics["policy/kl"]
        expected *= 2.0 if kl > 0.03 else 0.5 if kl < 0.02 / 1.5 else 1.0
    assert float(algorithm.penalty) == pytest.approx(expected)
    assert expected != 0.5


# ----------------------------------------------------------------------------
# SAC.


def sac(iterations: int, **settings: Any) -> Sac:
    parts = replace(CHAIN.parts(iterations), timed_critic=lambda: QuadraticValue(torch.zeros(CHAIN.num_steps, 3)))
    critics = {name: OptimizerConfig(lr=0.2, decay="cosine") for name in ("critic", "energy")}
    config = {"policy_ema": None, "last_step": True, "target_ema": 0.8, "reward_updates": 1, "value_updates": 1}
    return Sac(SacConfig(**{**config, **critics, **settings}), parts)


def train(algorithm: PolicyAlgorithm, iterations: int, num: int) -> dict[str, float]:
    streams = Streams([{name: torch.Generator().manual_seed(k) for k, name in enumerate(algorithm.streams)}])
    for iteration in range(iterations):
        metrics = algorithm.update(Batch.single(None, num), iteration, streams)
    return {name: float(value) for name, value in metrics.items()}


def test_the_values_of_sac_are_those_of_the_oracle():
    """With a fixed policy, temperature and divergence 0, V(x, t) is minus the expected reward, in both networks."""
    algorithm = sac(500, temperature=0.0, policy=PolicyOptimizerConfig(lr=0.0, sigma_lr=0.0, max_grad_norm=None))
    train(algorithm, 500, 2048)
    for twin in (algorithm.value.first, algorithm.value.second):
        energy = torch.tensor([0.5, -CHAIN.c, 0.5 * CHAIN.c**2]) / CHAIN.v
        torch.testing.assert_close(twin.energy.network.coefficients.detach(), energy, rtol=0.0, atol=0.02)
        torch.testing.assert_close(twin.network.table.detach().double(), -CHAIN.values(), rtol=0.0, atol=0.05)


def test_sac_reaches_the_optimum_of_the_regularized_objective():
    """The same a*, b* and s* as with the score function, through learned values of a learned reward."""
    beta, iterations = 0.3, 1000
    policy = PolicyOptimizerConfig(lr=0.01, sigma_lr=0.01, max_grad_norm=None, decay="cosine")
    algorithm = sac(iterations, temperature=0.0, kl_coef=beta, policy=policy)
    metrics = train(algorithm, iterations, 2048)
    for found, exact in zip(learned_chain(algorithm), CHAIN.optimum(beta), strict=True):
        torch.testing.assert_close(found, exact[: len(found)], rtol=0.0, atol=2e-3)
    assert metrics["reward/error"] < 1e-2


@pytest.mark.parametrize("target", [-0.2, pytest.param(0.1, marks=pytest.mark.slow)])
def test_the_temperature_of_sac_is_that_of_the_closed_form(target):
    """With fixed means, the best sigmas are s_t^2 = temperature v / A_t^2, whose entropy determines the temperature."""
    iterations = 1500
    policy = PolicyOptimizerConfig(lr=0.0, sigma_lr=0.02, max_grad_norm=None, decay="cosine")
    settings = {"temperature": 0.3, "target_entropy": target, "temperature_lr": 0.05, "policy": policy}
    algorithm = sac(iterations, **settings)
    metrics = train(algorithm, iterations, 1024)
    num_free = CHAIN.num_steps - 1
    after = [math.prod(CHAIN.a[t + 1 :]) for t in range(num_free)]
    mean = sum(math.log(s * a) for s, a in zip(CHAIN.s, after, strict=False)) / num_free
    exact = math.exp(2.0 * (target * CHAIN.num_steps / num_free + mean)) / CHAIN.v
    assert metrics["policy/relative_entropy"] == pytest.approx(target, abs=5e-3)
    assert metrics["policy/temperature"] == pytest.approx(exact, rel=0.05)
    expected = torch.tensor([math.sqrt(exact * CHAIN.v) / a for a in after], dtype=torch.float64)
    torch.testing.assert_close(learned_chain(algorithm)[2], expected, rtol=0.03, atol=0.0)


# ----------------------------------------------------------------------------
# DRaFT and DPOK.


def draft(**settings: Any) -> Draft:
    return Draft(DraftConfig(**{**FROZEN, **settings}), CHAIN.parts())


def test_draft_through_all_steps_has_the_gradient_of_the_closed_form():
    found = []
    for seed in range(16):
        algorithm = draft(steps=None)
        update(algorithm, 5000, seed=seed)
        found.append(-left_behind(algorithm))
    require_unbiased(torch.stack(found).mean(0), torch.stack(found), CHAIN.gradient())


def test_draft_through_the_last_step_only_trains_what_this_step_reads():
    algorithm = draft(steps=1)
    metrics = update(algorithm, 100_000)
    gradient, exact = -left_behind(algorithm), CHAIN.gradient()
    last = torch.tensor([CHAIN.num_steps - 1, 2 * CHAIN.num_steps - 1])
    torch.testing.assert_close(gradient[last], exact[last], rtol=0.03, atol=0.0)
    others = torch.ones(len(exact), dtype=torch.bool).index_fill(0, last, False)
    assert torch.all(gradient[others] == 0.0)
    objective = CHAIN.objective(*CHAIN.tensors()).item()
    assert metrics["reward/mean"] == pytest.approx(objective, abs=3.0 * metrics["reward/std"] / math.sqrt(100_000))


def test_draft_reaches_the_optimum_of_the_regularized_objective():
    beta, iterations = 0.3, 600
    policy = PolicyOptimizerConfig(lr=0.02, sigma_lr=0.02, max_grad_norm=None, decay="cosine")
    algorithm = draft(steps=None, kl_coef=beta, last_step=True, policy=policy)
    algorithm.optimizers["policy"].total = iterations
    train(algorithm, iterations, 4096)
    for found, exact in zip(learned_chain(algorithm), CHAIN.optimum(beta), strict=True):
        torch.testing.assert_close(found, exact[: len(found)], rtol=0.0, atol=1e-3)


def test_draft_refuses_a_reward_without_gradients():
    parts = replace(CHAIN.parts(), reward=lambda: lambda x, condition: x.sum(1))
    with pytest.raises(UserError, match="not differentiable"):
        Draft(DraftConfig(**FROZEN), parts)


def dpok(**settings: Any) -> Dpok:
    config = {"last_step": True, "epochs": 1, "minibatches": 1, **FROZEN, **settings}
    return Dpok(DpokConfig(**config), CHAIN.parts())


def test_the_first_gradient_of_dpok_is_that_of_reinforce_with_its_own_divergence():
    """At the reference the divergence has no gradient; with the exact value as baseline both are the same."""
    one, other = dpok(kl_coef=0.5), reinforce(baseline="learned")
    update(one, 500)
    update(other, 500)
    torch.testing.assert_close(left_behind(one), left_behind(other), rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("sign", [-1.0, 1.0])
def test_an_action_outside_of_dpoks_interval_has_no_gradient(sign):
    algorithm = dpok(clip=0.1, kl_coef=0.0)
    x = torch.randn(6, 1)
    steps, condition = torch.zeros(6, dtype=torch.int64), UNCONDITIONAL
    with torch.no_grad():
        new = algorithm.policy(x, steps, condition)
    actions = Actions(x, new.mean + 0.3, steps, condition)
    far = GaussianStep(new.mean - 1.0, new.sigma)  # the action was unlikely under this old policy
    losses = algorithm.losses(actions, Experience(far, None, torch.full((6,), sign)))
    gradient = torch.autograd.grad(losses["loss"].sum(), algorithm.policy.network.shift)[0]
    assert torch.all(losses["clipped"] == 1.0)
    assert torch.all(gradient == 0.0)
