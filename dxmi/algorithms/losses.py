"""The losses of the algorithms and of pretraining as pure functions that return unreduced values [B].

The losses of DxMI are from arXiv 2407.00626: Algorithm 1 there is the update of energy and sampler, Algorithm 2 the
dynamic programming (DxDP) that replaces backpropagation through the trajectory. Coefficients multiply per-dimension
means, as published. `dxmi/README.md` states all losses in the notation used here.
"""

import torch
from torch import Tensor

from dxmi.tensors import event_mean, event_sum


def denoising_loss(predicted: Tensor, noise: Tensor) -> Tensor:
    """mean_dims (eps_theta - eps)^2, the simplified loss of DDPM (arXiv 2006.11239, equation 14): [B]."""
    return event_mean((predicted - noise).square())


def energy_loss(energy_data: Tensor, energy_sample: Tensor, energy_l2: float) -> Tensor:
    """E(x_data) - E(x_T) + energy_l2 (E(x_data)^2 + E(x_T)^2), the energy update of Algorithm 1: [B]."""
    contrast = energy_data - energy_sample
    if energy_l2 == 0.0:
        return contrast
    return contrast + energy_l2 * (energy_data.square() + energy_sample.square())


def squared_gradient(gradient: Tensor) -> Tensor:
    """|grad E(x)|^2 of gradients [B, *event], a zero-centered gradient penalty (arXiv 1801.04406, R1 and R2): [B]."""
    return event_sum(gradient.square())


def td_target(value_next: Tensor, step_cost: Tensor, control: Tensor | None) -> Tensor:
    """sg[V(x_{t+1}, t+1) + step_cost_t + control cost], the target of the value update of Algorithm 2: [B].

    `control`, the control cost, is None at steps whose mask is 0.
    """
    target = value_next + step_cost
    return (target if control is None else target + control).detach()


def value_loss(value: Tensor, target: Tensor) -> Tensor:
    """(V(x_t, t) - target)^2, the value update of Algorithm 2: [B]."""
    return (value - target).square()


def policy_loss(value_next: Tensor, control: Tensor | None) -> Tensor:
    """V(x_{t+1}, t+1) + control cost, the sampler update of Algorithm 2: [B]; `control` is None if all masks are 0."""
    return value_next if control is None else value_next + control


def score_function_loss(log_prob: Tensor, advantage: Tensor) -> Tensor:
    """sg[A] log pi(x_{t+1} | x_t), whose gradient is the score-function estimate of the gradient of E[A]: [B].

    See Williams (1992). The advantage A is a cost here: it is negative if the action was better than expected.
    """
    return advantage.detach() * log_prob


def clipped_surrogate(ratio: Tensor, advantage: Tensor, clip: float, dual_clip: float | None) -> Tensor:
    """-min(A rho, A clip(rho, 1 - clip, 1 + clip)), the surrogate loss of PPO (arXiv 1707.06347, equation 7): [B].

    If the advantage A is negative, the loss is unbounded for large ratios rho; with `dual_clip`, such a ratio is
    limited to it (arXiv 1912.09729, equation 5). A is a reward here: it is positive if the action was better than
    expected.
    """
    loss = torch.maximum(-advantage * ratio, -advantage * ratio.clamp(1.0 - clip, 1.0 + clip))
    if dual_clip is None:
        return loss
    return torch.where(advantage < 0.0, torch.minimum(loss, -advantage * dual_clip), loss)


def gradient_penalty(gradient: Tensor) -> Tensor:
    """(|grad f(x)| - 1)^2 of gradients [B, *event], which keeps a critic f 1-Lipschitz (arXiv 1704.00028): [B]."""
    norm = (event_sum(gradient.square()) + 1e-12).sqrt()
    return (norm - 1.0).square()
