"""DDPM (Ho et al., arXiv 2006.11239) and the two ways to shorten its 1000 steps (FastDPM, arXiv 2106.00132).

The forward process is x_k = sqrt(abar_k) x + sqrt(1 - abar_k) eps, with beta linear in k.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import replace

import numpy as np
from scipy.special import gammaln

from dxmi.diffusion.schedules.base import Array, ForwardProcess, Schedule, StepSchedule, noised
from dxmi.diffusion.schedules.configs import (
    BETA_FIRST,
    BETA_LAST,
    NUM_DIFFUSION_STEPS,
    StepScheduleConfig,
    VarScheduleConfig,
    timestep_subset,
)

_ROOT_TOLERANCE, _ROOT_PRECISION = 1e-12, 4.0 * sys.float_info.epsilon


def forward_betas() -> Array:
    """beta_k of the forward process, [K]."""
    return np.linspace(BETA_FIRST, BETA_LAST, NUM_DIFFUSION_STEPS, dtype=np.float64)


def forward_levels() -> Array:
    """abar_k = prod_{j<=k} (1 - beta_j), [K]."""
    return np.cumprod(1.0 - forward_betas(), dtype=np.float64)


def continuous_level(step: float) -> float:
    """The value of abar at a fractional diffusion step in [0, K - 1] (FastDPM, section 3.2).

    At integers it equals `forward_levels`.
    """
    delta = (BETA_LAST - BETA_FIRST) / (NUM_DIFFUSION_STEPS - 1)
    c = (1.0 - BETA_FIRST) / delta
    return float(np.exp((step + 1.0) * math.log(delta) + gammaln(c + 1.0) - gammaln(c - step)))


def bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """Find a root of a function with different signs at `low` and `high`; bitwise equal to `scipy.optimize.bisect`.

    It is reimplemented because every command computes a schedule, and importing scipy.optimize takes most of a second.
    """
    at_low, width = function(low), high - low
    if at_low == 0.0:
        return low
    while True:
        width *= 0.5
        middle = low + width
        value = function(middle)
        if value * at_low > 0.0:
            low = middle
        if value == 0.0 or abs(width) < _ROOT_TOLERANCE + _ROOT_PRECISION * abs(middle):
            return middle


def continuous_step(level: float) -> float:
    """The fractional diffusion step k at which `continuous_level(k)` equals `level`, clipped to [0, K - 1]."""
    last = NUM_DIFFUSION_STEPS - 1.0
    if level >= continuous_level(0.0):
        return 0.0
    if level <= continuous_level(last):
        return last
    log_level = math.log(level)
    return bisect(lambda k: math.log(continuous_level(k)) - log_level, 0.0, last)


class VarSteps(Schedule):
    """VAR: T new noise levels."""

    def __init__(self, config: VarScheduleConfig) -> None:
        self.config = config

    def steps(self) -> StepSchedule:
        """The tables of the T levels."""
        config = self.config
        levels = np.cumprod(1.0 - variances(config.num_steps, config.shape, config.last_level), dtype=np.float64)
        timesteps = np.array([continuous_step(level) for level in levels])
        return _tables(levels, timesteps, config.kappa, config.final_sigma)

    def forward_process(self) -> ForwardProcess:
        """The forward process of DDPM."""
        return ddpm_forward_process()


class SubsetSteps(Schedule):
    """STEP: a subset of the 1000 steps."""

    def __init__(self, config: StepScheduleConfig) -> None:
        self.config = config

    def steps(self) -> StepSchedule:
        """The tables of the T steps."""
        config = self.config
        steps = np.array(timestep_subset(config.num_steps, config.shape))
        return _tables(forward_levels()[steps], steps.astype(np.float64), config.kappa, config.final_sigma)

    def forward_process(self) -> ForwardProcess:
        """The forward process of DDPM."""
        return ddpm_forward_process()


def _tables(levels: Array, timesteps: Array, kappa: float, final_sigma: float) -> StepSchedule:
    """The tables, in generation order, of levels gbar_1..gbar_T and their timesteps (FastDPM, equations 9 and 12)."""
    level = np.append(levels[::-1], 1.0)
    g, g_next = level[:-1], level[1:]
    sigma = kappa * np.sqrt((1.0 - g_next) / (1.0 - g) * (1.0 - g / g_next))
    signal_scale = np.sqrt(g_next / g)
    output_scale = np.sqrt(1.0 - g_next - sigma**2) - np.sqrt(1.0 - g) * signal_scale
    sigma[-1] = final_sigma
    return StepSchedule(level, timesteps[::-1].copy(), signal_scale, output_scale, sigma, 1.0 - g / g_next)


def variances(num_steps: int, shape: str, last_level: float | None = None) -> Array:
    """VAR: noise variances eta_1..eta_T for which prod (1 - eta) is `last_level`, [T].

    By default, that is the last level of the forward process.

    Linear: eta from beta_0 to v. Quadratic: eta_i = beta_0 (1 + i v)^2, with v capped at 0.95 / (sqrt(beta_0) T) so
    that no eta exceeds 1. For small T the cap is reached, and gbar_T stays above the target (.343, .220 and .0208 for
    T = 4, 5 and 10). With T = 1 both shapes have the single level that equals the target.
    """
    target = float(forward_levels()[-1]) if last_level is None else last_level
    if num_steps == 1:
        return np.array([1.0 - target])
    index = np.arange(num_steps, dtype=np.float64)

    def linear(v: float) -> Array:
        return np.linspace(BETA_FIRST, v, num_steps, dtype=np.float64)

    def quadratic(v: float) -> Array:
        eta: Array = BETA_FIRST * (1.0 + index * v) ** 2
        return eta

    eta_of, cap = (linear, 1.0) if shape == "linear" else (quadratic, 0.95 / (math.sqrt(BETA_FIRST) * num_steps))

    def surplus(v: float) -> float:
        return float(np.prod(1.0 - eta_of(v))) - target

    if surplus(cap) > 0.0:
        return eta_of(cap)
    return eta_of(bisect(surplus, 0.0, cap))


def ddpm_forward_process() -> ForwardProcess:
    """The forward process of DDPM: the K levels, with the noise as the target."""
    return noised(forward_levels())


def ddim_schedule(num_steps: int, shape: str = "trailing") -> StepSchedule:
    """DDIM (arXiv 2010.02502), which is deterministic given the starting noise; `shape` is the spacing of the steps."""
    return _respaced(num_steps, kappa=0.0, shape=shape)


def ancestral_schedule(num_steps: int = NUM_DIFFUSION_STEPS, variance: str = "small") -> StepSchedule:
    """DDPM's ancestral sampler on trailing steps; with 1000 steps it is the sampler of the paper.

    Args:
        num_steps: number of steps.
        variance: variance of each step except the last, which adds no noise. small: that of the posterior, beta-tilde
            (`fixedsmall` in the official code). large: that of the forward step between the same two levels, which is
            beta_k with 1000 steps (`fixedlarge`). The mean is that of the posterior in both cases.
    """
    small = _respaced(num_steps, kappa=1.0)
    if variance == "small":
        return small
    return replace(small, sigma=np.append(np.sqrt(small.eta[:-1]), 0.0))


def _respaced(num_steps: int, kappa: float, shape: str = "trailing") -> StepSchedule:
    """The tables of a subset of the steps, without noise in the last step."""
    config = StepScheduleConfig(num_steps=num_steps, shape=shape, kappa=kappa, final_sigma=0.0)
    return SubsetSteps(config).steps()
