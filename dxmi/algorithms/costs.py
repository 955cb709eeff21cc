"""Costs along a trajectory: the running cost with its reference variance, the control cost, and the step cost."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from dxmi.diffusion.trajectory import GaussianStep
from dxmi.tensors import event_mean


def step_costs(kind: str, scale: float, num_steps: int) -> Tensor:
    """Compute the time-dependent cost that is added to the TD target at each step, [T].

    sigmoid: scale * (sg(T//2 - t) - sg(T//2 - t - 1)); linear: `scale` at every step; none: 0.
    """
    if kind == "sigmoid":
        t = torch.arange(num_steps, dtype=torch.float64)
        middle = num_steps // 2
        return (scale * (torch.sigmoid(middle - t) - torch.sigmoid(middle - t - 1.0))).float()
    return torch.full((num_steps,), scale if kind == "linear" else 0.0)


def per_step_table(numbers: Sequence[float], num_steps: int) -> Tensor:
    """Convert one number for all steps, or T numbers, to a table [T]."""
    return torch.tensor(numbers, dtype=torch.float32).expand(num_steps).clone()


class RunningCost(nn.Module):
    """cost_t = mean_dims (x_{t+1} - x_t)^2 / (2 s_t^2), with a reference variance s_t^2 that adapts (AVR).

    With `kind=noise`, it is instead the running cost of the public MNIST reproduction: half the mean square of the
    standardized noise (x_{t+1} - mean) / sigma. This carries no information about the policy: its expectation is 1/2
    for every mean and sigma, and a reparameterized step has no gradient through it.

    Args:
        kind: Kind of the cost, transition or noise.
        initial: S_t^2 before the first update, [T]; unused with `kind=noise`.
        decay: Decay of the moving average that adapts s_t^2; 1 keeps the initial values.
    """

    reference_var: Tensor

    def __init__(self, kind: str, initial: Tensor, decay: float) -> None:
        super().__init__()
        self.standardized = kind == "noise"
        self.decay = 1.0 if self.standardized else decay
        self.register_buffer("reference_var", torch.ones_like(initial) if self.standardized else initial.clone())

    @property
    def is_adaptive(self) -> bool:
        """Whether the reference variance changes."""
        return self.decay < 1.0

    def displacement(self, x: Tensor, x_next: Tensor, step: GaussianStep) -> Tensor:
        """mean_dims (x_{t+1} - x_t)^2 of states [B, *event], or the mean square of the standardized noise: [B]."""
        if self.standardized:
            return event_mean((x_next - step.mean).square()) / step.sigma.square()
        return event_mean((x_next - x).square())

    def forward(self, displacement: Tensor, t: slice | Tensor) -> Tensor:
        """Compute cost_t from the displacement [B] of steps at `t`, one for the batch or one per sample: [B]."""
        return displacement / (2.0 * self.reference_var[t])


@torch.no_grad()
def adapt_(reference_var: Tensor, mean_displacement: Tensor, decay: float) -> None:
    """Set s_t^2 to decay s_t^2 + (1 - decay) mean (x_{t+1} - x_t)^2 in place; [T], or [K, T] for several seeds."""
    reference_var.lerp_(mean_displacement, 1.0 - decay)


class ControlCost(nn.Module):
    """m_t (cost_coef * cost_t - entropy_coef * log sigma_t): the cost of a step, added to the value of the next state.

    Args:
        mask: Weights m, one number for all steps or T numbers.
        cost_coef: Weight of the running cost, per dimension.
        entropy_coef: Tau, weight of the entropy, per dimension.
        num_steps: T.
    """

    mask: Tensor

    def __init__(self, mask: Sequence[float], cost_coef: float, entropy_coef: float, num_steps: int) -> None:
        super().__init__()
        self.register_buffer("mask", per_step_table(mask, num_steps), persistent=False)
        # Kept on the host, so that a step whose mask is 0 is skipped without synchronizing with the device.
        self.steps = frozenset(t for t in range(num_steps) if mask[t % len(mask)] != 0.0)
        self.cost_coef = cost_coef
        self.entropy_coef = entropy_coef

    def forward(self, cost: Tensor, log_sigma: Tensor, t: slice | Tensor) -> Tensor:
        """Compute the control cost [B] of steps at `t` with running costs [B] and log sigmas [B] or [1]."""
        return self.mask[t] * (self.cost_coef * cost - self.entropy_coef * log_sigma)
