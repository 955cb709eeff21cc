"""Costs along a trajectory: the running cost with its reference variance, and the step cost."""

import torch
from torch import Tensor, nn

from dxmi.diffusion.trajectory import Gaussian
from dxmi.tensors import event_mean


def squared_step(x: Tensor, x_next: Tensor) -> Tensor:
    """mean_dims (x_{t+1} - x_t)^2 of states [B, *event]: [B]."""
    return event_mean((x_next - x).square())


def squared_noise(step: Gaussian, x_next: Tensor) -> Tensor:
    """mean_dims ((x_{t+1} - mean) / sigma)^2, the standardised noise of a step: [B].

    The public MNIST reproduction's running cost. It says nothing about the policy: its expectation is 1 whatever the
    mean and sigma, and a reparameterised step has no gradient through it.
    """
    return event_mean((x_next - step.mean).square()) / step.sigma.square()


def running_cost(squared: Tensor, reference_var: Tensor) -> Tensor:
    """cost_t = mean_dims (x_{t+1} - x_t)^2 / (2 s_t^2), from `squared_step` [B] and s_t^2 [1] or [B]: [B]."""
    return squared / (2.0 * reference_var)


def step_costs(kind: str, scale: float, num_steps: int) -> Tensor:
    """The time-dependent cost that the TD target adds at each step, [T].

    sigmoid: scale * (sg(T//2 - t) - sg(T//2 - t - 1)); linear: `scale` at every step; none: 0.
    """
    if kind == "sigmoid":
        t = torch.arange(num_steps, dtype=torch.float64)
        middle = num_steps // 2
        return (scale * (torch.sigmoid(middle - t) - torch.sigmoid(middle - t - 1.0))).float()
    return torch.full((num_steps,), scale if kind == "linear" else 0.0)


def adapt_(variance: Tensor, mean_squared: Tensor, decay: float) -> None:
    """s_t^2 <- decay s_t^2 + (1 - decay) mean (x_{t+1} - x_t)^2, in place; [T], or of several members [K, T]."""
    variance.lerp_(mean_squared, 1.0 - decay)


class ReferenceVariance(nn.Module):
    """s_t^2, the variance of the reference process in the running cost, [T]; adaptive (AVR) if `decay` < 1.

    Args:
        initial: its value before the first update, [T].
        decay: of `adapt_`; 1 keeps the initial value.
    """

    variance: Tensor

    def __init__(self, initial: Tensor, decay: float) -> None:
        super().__init__()
        self.decay = decay
        self.register_buffer("variance", initial.clone())

    @property
    def adaptive(self) -> bool:
        """Whether `update` changes anything."""
        return self.decay < 1.0

    def update(self, mean_squared: Tensor) -> None:
        """One AVR update from the mean of `squared_step` over a batch of trajectories, [T]."""
        adapt_(self.variance, mean_squared, self.decay)

    def forward(self) -> Tensor:
        """s_t^2, [T]."""
        return self.variance
