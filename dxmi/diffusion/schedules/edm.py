"""EDM (Karras et al., arXiv 2206.00364): x = data + sigma eps, and a denoiser D with a network F

D(x) = c_skip x + c_out F(c_in x, 250 log sigma),
c_skip = d^2 / (sigma^2 + d^2),  c_out = sigma d / sqrt(sigma^2 + d^2),  c_in = 1 / sqrt(sigma^2 + d^2),  d = 0.5.
"""

import numpy as np
from scipy.special import ndtri

from dxmi.diffusion.schedules.base import Array, ForwardProcess, Schedule, StepSchedule
from dxmi.diffusion.schedules.configs import NUM_DIFFUSION_STEPS, KarrasScheduleConfig

SIGMA_DATA = 0.5
"""Standard deviation of the data that EDM assumes."""
_LOG_SIGMA_MEAN, _LOG_SIGMA_STD = -1.2, 1.2


def karras_levels(num: int, config: KarrasScheduleConfig) -> Array:
    """Noise levels from sigma_max down to sigma_min, evenly spaced in sigma^(1 / rho) (equation 5), [num]."""
    ramp = np.linspace(config.sigma_max ** (1.0 / config.rho), config.sigma_min ** (1.0 / config.rho), num)
    levels: Array = ramp**config.rho if num > 1 else np.array([config.sigma_max])
    return levels


class KarrasSteps(Schedule):
    """T of EDM's noise levels."""

    def __init__(self, config: KarrasScheduleConfig) -> None:
        self.config = config

    def steps(self) -> StepSchedule:
        """The tables of these levels."""
        config = self.config
        end = np.zeros(0) if config.noisy_end else np.zeros(1)
        level = np.append(karras_levels(config.num_steps + config.noisy_end, config), end)
        return _tables(level, config.kappa, config.final_sigma)

    def forward_process(self) -> ForwardProcess:
        """The forward process of EDM."""
        return edm_forward_process()


def _tables(level: Array, kappa: float, final_sigma: float) -> StepSchedule:
    """The tables, in generation order, of noise levels [T+1].

    Each step is an Euler step to sigma_down = sqrt(s'^2 - sigma_up^2), where sigma_up = kappa s' sqrt(1 - s'^2 / s^2)
    is the standard deviation of the policy's noise. The slope (x - D(x)) / s is linear in x and F(c_in x): the
    coefficient of x is part of signal_scale, and that of F is part of output_scale.
    """
    s, s_next = level[:-1], level[1:]
    sigma = kappa * s_next * np.sqrt(1.0 - s_next**2 / s**2)
    way = np.sqrt(s_next**2 - sigma**2) - s
    total = s**2 + SIGMA_DATA**2
    sigma[-1] = final_sigma
    return StepSchedule(
        level,
        timestep=250.0 * np.log(s),
        signal_scale=1.0 + way * s / total,
        output_scale=-way * SIGMA_DATA / np.sqrt(total),
        sigma=sigma,
        eta=s**2 - s_next**2,
        input_scale=1.0 / np.sqrt(total),
        start_sigma=float(s[0]),
    )


def edm_forward_process() -> ForwardProcess:
    """The forward process of EDM, in which log sigma is normal with mean -1.2 and standard deviation 1.2.

    The rows are K quantiles of that distribution. F regresses (data - c_skip x) / c_out; the squared error is EDM's
    loss with its weights (equation 8).
    """
    quantile = ndtri((np.arange(NUM_DIFFUSION_STEPS) + 0.5) / NUM_DIFFUSION_STEPS)
    sigma = np.exp(_LOG_SIGMA_MEAN + _LOG_SIGMA_STD * quantile)
    root = np.sqrt(sigma**2 + SIGMA_DATA**2)
    return ForwardProcess(
        250.0 * np.log(sigma), 1.0 / root, sigma / root, sigma / (SIGMA_DATA * root), -SIGMA_DATA / root
    )


def karras_schedule(config: KarrasScheduleConfig, num_steps: int, kappa: float) -> StepSchedule:
    """Euler's method (kappa 0) or ancestral steps (kappa 1) on EDM's levels, ending at level 0 without noise.

    The levels are all except the last of `num_steps` + 1 levels, so that no step is spent on `sigma_min`.
    """
    level = np.append(karras_levels(num_steps + 1, config)[:-1], 0.0)
    return _tables(level, kappa, final_sigma=0.0)
