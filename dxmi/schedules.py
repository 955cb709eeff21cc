"""Noise schedules: the 1000-step forward process, and its shortening to T policy steps (FastDPM, arXiv 2106.00132).

Everything here is computed once, in float64: in float32 the continuous diffusion step is wrong.

Letters: K = 1000 diffusion steps, k a (possibly fractional) diffusion step, T policy steps, t = 0 is noise.
gbar_s is the signal level after s of the T noising steps, so gbar_0 = 1 and gbar_T is the noisiest.
"""

import math
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray
from scipy.optimize import bisect
from scipy.special import gammaln

Array = NDArray[np.float64]

NUM_DIFFUSION_STEPS = 1000
BETA_FIRST, BETA_LAST = 1e-4, 0.02
_ROOT_TOLERANCE = 1e-12

METHODS = ("var", "step")
SHAPES = ("linear", "quadratic")


# ----------------------------------------------------------------------------
# Forward process (DDPM, arXiv 2006.11239): beta linear in k, x_k = sqrt(abar_k) x + sqrt(1 - abar_k) eps.


def forward_betas() -> Array:
    """beta_k of the forward process, [K]."""
    return np.linspace(BETA_FIRST, BETA_LAST, NUM_DIFFUSION_STEPS, dtype=np.float64)


def forward_levels() -> Array:
    """abar_k = prod_{j<=k} (1 - beta_j), [K]."""
    return np.cumprod(1.0 - forward_betas(), dtype=np.float64)


def continuous_level(step: float) -> float:
    """Abar at a fractional diffusion step in [0, K - 1] (FastDPM, section 3.2); equals `forward_levels` at integers."""
    delta = (BETA_LAST - BETA_FIRST) / (NUM_DIFFUSION_STEPS - 1)
    c = (1.0 - BETA_FIRST) / delta
    return float(np.exp((step + 1.0) * math.log(delta) + gammaln(c + 1.0) - gammaln(c - step)))


def continuous_step(level: float) -> float:
    """The fractional diffusion step k at which `continuous_level(k)` is `level`; clipped to [0, K - 1]."""
    last = NUM_DIFFUSION_STEPS - 1.0
    if level >= continuous_level(0.0):
        return 0.0
    if level <= continuous_level(last):
        return last
    log_level = math.log(level)
    return float(bisect(lambda k: math.log(continuous_level(k)) - log_level, 0.0, last, xtol=_ROOT_TOLERANCE))


# ----------------------------------------------------------------------------
# Shortening.


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the 1000-step model is cut to a few steps."""

    num_steps: int = 5
    """T, the number of policy steps."""
    method: str = "var"
    """var: T new noise levels; step: a subset of the 1000 steps."""
    shape: str = "quadratic"
    """linear or quadratic spacing of the noise levels (var) or of the chosen steps (step)."""
    kappa: float = 1.0
    """Stochasticity of the initial sigmas: 1 is the DDPM posterior, 0 is DDIM."""
    final_sigma: float = 1e-3
    """Standard deviation of the last step, which is never learned."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= NUM_DIFFUSION_STEPS:
            raise ValueError(f"num_steps is {self.num_steps}: it must be in 1..{NUM_DIFFUSION_STEPS}")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}: it must be one of {', '.join(METHODS)}")
        if self.shape not in SHAPES:
            raise ValueError(f"shape is {self.shape!r}: it must be one of {', '.join(SHAPES)}")
        if not 0.0 <= self.kappa <= 1.0:
            raise ValueError(f"kappa is {self.kappa}: it must be in [0, 1]")
        if not 0.0 <= self.final_sigma < 1.0:
            raise ValueError(f"final_sigma is {self.final_sigma}: it must be in [0, 1)")


@dataclass(frozen=True)
class StepSchedule:
    """The tables of a T-step sampler, in generation order (index t = 0 acts on noise); float64.

    x_{t+1} = signal_scale_t x_t + noise_scale_t eps(x_t, diffusion_step_t) + sigma_t z

    Attributes:
        level: signal level before each step and after the last, [T+1]; level[T] = 1.
        diffusion_step: what the network is told, in 0..999, may be fractional, [T].
        signal_scale: [T].
        noise_scale: [T].
        sigma: initial standard deviation of each step, [T]; the last is `final_sigma`.
        eta: variance that the matching forward step adds, the first reference variance of the running cost, [T].
    """

    level: Array
    diffusion_step: Array
    signal_scale: Array
    noise_scale: Array
    sigma: Array
    eta: Array

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sigma)


def shorten(config: ScheduleConfig) -> StepSchedule:
    """The T-step schedule that `config` describes.

    Raises:
        ValueError: the subset of steps that was asked for has repeated members.
    """
    if config.method == "step":
        steps = chosen_steps(config.num_steps, config.shape)
        levels, diffusion_steps = forward_levels()[steps], steps.astype(np.float64)
    else:
        levels = np.cumprod(1.0 - variances(config.num_steps, config.shape), dtype=np.float64)
        diffusion_steps = np.array([continuous_step(level) for level in levels])
    return _tables(levels, diffusion_steps, config.kappa, config.final_sigma)


def _tables(levels: Array, diffusion_steps: Array, kappa: float, final_sigma: float) -> StepSchedule:
    """Generation-order tables from gbar_1..gbar_T and their diffusion steps (FastDPM, equations 9 and 12)."""
    level = np.append(levels[::-1], 1.0)
    g, g_next = level[:-1], level[1:]
    sigma = kappa * np.sqrt((1.0 - g_next) / (1.0 - g) * (1.0 - g / g_next))
    signal_scale = np.sqrt(g_next / g)
    noise_scale = np.sqrt(1.0 - g_next - sigma**2) - np.sqrt(1.0 - g) * signal_scale
    sigma[-1] = final_sigma
    return StepSchedule(level, diffusion_steps[::-1].copy(), signal_scale, noise_scale, sigma, 1.0 - g / g_next)


def variances(num_steps: int, shape: str) -> Array:
    """VAR: noise variances eta_1..eta_T whose product of (1 - eta) is the forward process's last level, [T].

    Linear: eta from beta_0 to v. Quadratic: eta_i = beta_0 (1 + i v)^2, with v capped at 0.95 / (sqrt(beta_0) T) so
    that no eta passes 1; for small T the cap binds and gbar_T stays above the target (.343, .220, .0208 at T = 4, 5,
    10). With T = 1 both shapes are the one level that reaches the target.
    """
    target = float(forward_levels()[-1])
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
    return eta_of(float(bisect(surplus, 0.0, cap, xtol=_ROOT_TOLERANCE)))


def chosen_steps(num_steps: int, shape: str) -> NDArray[np.int64]:
    """STEP: which of the K diffusion steps are kept, least noisy first, [T].

    Linear: evenly over 0..999. Quadratic: squares, evenly over 0..sqrt(800). With T = 1 it is the noisiest of these.

    Raises:
        ValueError: the squares leave fewer than T distinct steps.
    """
    if shape == "linear":
        last = NUM_DIFFUSION_STEPS - 1
        return np.array([i * last // (num_steps - 1) for i in range(num_steps)] if num_steps > 1 else [last])
    root = math.sqrt(0.8 * NUM_DIFFUSION_STEPS)
    fractions = np.linspace(0.0, root, num_steps) if num_steps > 1 else np.array([root])
    steps = np.floor(fractions**2 + 1e-9).astype(np.int64)
    if len(np.unique(steps)) < num_steps:
        raise ValueError(
            f"num_steps is {num_steps}: shape=quadratic has fewer distinct steps; use shape=linear or fewer num_steps"
        )
    return steps


# ----------------------------------------------------------------------------
# Reference samplers: the same step, other tables.


def ancestral_schedule() -> StepSchedule:
    """The 1000-step DDPM ancestral sampler: STEP with every step, kappa 1, no noise in the last step."""
    return shorten(
        ScheduleConfig(num_steps=NUM_DIFFUSION_STEPS, method="step", shape="linear", kappa=1.0, final_sigma=0.0)
    )


def ddim_schedule(num_steps: int) -> StepSchedule:
    """DDIM (arXiv 2010.02502) with `num_steps` evenly spaced steps: deterministic given its starting noise."""
    return shorten(ScheduleConfig(num_steps=num_steps, method="step", shape="linear", kappa=0.0, final_sigma=0.0))


def solver_schedule(num_steps: int) -> StepSchedule:
    """DDIM's tables on the steps of DPM-Solver++: evenly spaced, the last one from k = 999 / T straight to the data.

    DDIM's own steps end with k = 0, at a thirtieth of the noise of the one before with 20 steps: too far for a second
    difference.
    """
    last = NUM_DIFFUSION_STEPS - 1
    steps = np.rint(np.linspace(0.0, last, num_steps + 1)[1:]).astype(np.int64)
    return _tables(forward_levels()[steps], steps.astype(np.float64), kappa=0.0, final_sigma=0.0)
