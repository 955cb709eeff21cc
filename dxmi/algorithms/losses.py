"""The equations of DxMI (arXiv 2407.00626), one a function, unreduced [B]: no optimiser, no device, no logging.

`entropy_coef` and `cost_coef` act on per-dimension means, as published (DESIGN, section 2).
"""

from torch import Tensor

from dxmi.tensors import event_mean


def denoising_loss(predicted: Tensor, noise: Tensor) -> Tensor:
    """mean_dims (eps_theta - eps)^2, DDPM's simple loss (arXiv 2006.11239, equation 14): [B]."""
    return event_mean((predicted - noise).square())


def energy_loss(energy_data: Tensor, energy_sample: Tensor, energy_l2: float) -> Tensor:
    """E(x_data) - E(x_T) + energy_l2 (E(x_data)^2 + E(x_T)^2): [B]."""
    contrast = energy_data - energy_sample
    if energy_l2 == 0.0:
        return contrast
    return contrast + energy_l2 * (energy_data.square() + energy_sample.square())


def control_cost(cost: Tensor, log_sigma: Tensor, cost_coef: float, entropy_coef: float) -> Tensor:
    """cost_coef * cost_t - entropy_coef * log sigma_t: what a step costs beyond what it leads to, [B]."""
    return cost_coef * cost - entropy_coef * log_sigma


def td_target(value_next: Tensor, step_cost: Tensor, control: Tensor | None) -> Tensor:
    """sg[V(x_{t+1}, t+1) + step_cost_t + m_v (control cost)]; `control` None where the mask is 0: [B]."""
    target = value_next + step_cost
    return (target if control is None else target + control).detach()


def value_loss(value: Tensor, target: Tensor) -> Tensor:
    """(V(x_t, t) - target)^2: [B]."""
    return (value - target).square()


def policy_loss(value_next: Tensor, control: Tensor | None) -> Tensor:
    """V(x_{t+1}, t+1) + m_p (control cost); `control` None where the mask is 0: [B]."""
    return value_next if control is None else value_next + control
