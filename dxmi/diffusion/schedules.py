"""Noise schedules: how pretraining noises data, and the tables of the T policy steps that the model is cut to.

Three families of models, told apart by `ScheduleConfig.method`:

    var, step   DDPM's 1000 steps (arXiv 2006.11239), cut by FastDPM (2106.00132); the network predicts the noise
    karras      EDM's noise levels (2206.00364) with ancestral steps; the network is preconditioned as theirs
    ddgan       the T steps of a denoising-diffusion GAN (2112.07804); the network predicts the image

Whatever it predicts, the mean of a policy step is linear in the state and in the network's output, so that one table of
coefficients serves all three. Everything here is computed once, in float64: in float32 the continuous diffusion step is
wrong.

Letters: K = 1000 diffusion steps, k a (possibly fractional) diffusion step, T policy steps, t = 0 is noise.
gbar_s is the signal level after s of the T noising steps, so gbar_0 = 1 and gbar_T is the noisiest.
"""

import math
import sys
from collections.abc import Callable
from dataclasses import asdict, dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray
from scipy.special import gammaln, ndtri

Array = NDArray[np.float64]

NUM_DIFFUSION_STEPS = 1000
BETA_FIRST, BETA_LAST = 1e-4, 0.02
_ROOT_TOLERANCE, _ROOT_PRECISION = 1e-12, 4.0 * sys.float_info.epsilon
SHORTENINGS = ("var", "step")
METHODS = (*SHORTENINGS, "karras", "ddgan")
SHAPES = ("linear", "quadratic")
STEP_SHAPES = (*SHAPES, "trailing")
"""Of method=step."""
VARIANCES = ("small", "large")

SIGMA_DATA = 0.5
"""EDM's standard deviation of the data."""
_LOG_SIGMA_MEAN, _LOG_SIGMA_STD = -1.2, 1.2
_GAN_BETA_MIN, _GAN_BETA_MAX, _GAN_FIRST_TIME = 0.1, 20.0, 1e-3


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


def bisect(function: Callable[[float], float], low: float, high: float) -> float:
    """A root of a function with different signs at both ends, equal to the bit to `scipy.optimize.bisect`.

    Every command computes a schedule, and the import of scipy.optimize takes most of a second.
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
    """The fractional diffusion step k at which `continuous_level(k)` is `level`; clipped to [0, K - 1]."""
    last = NUM_DIFFUSION_STEPS - 1.0
    if level >= continuous_level(0.0):
        return 0.0
    if level <= continuous_level(last):
        return last
    log_level = math.log(level)
    return bisect(lambda k: math.log(continuous_level(k)) - log_level, 0.0, last)


# ----------------------------------------------------------------------------
# Shortening.


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """How the 1000-step model is cut to a few steps."""

    num_steps: int = 5
    """T, the number of policy steps."""
    method: str = "var"
    """var: T new noise levels; step: a subset of the 1000 steps; karras: EDM's levels; ddgan: a diffusion GAN's."""
    shape: str = "quadratic"
    """linear or quadratic spacing of the noise levels (var) or of the chosen steps (step); trailing, of step only: even
    spacing down from the last step, 999 - 1000 t / T, so that no evaluation is spent on almost clean data."""
    kappa: float = 1.0
    """Stochasticity of the initial sigmas: 1 is the DDPM posterior or the ancestral step, 0 is DDIM or Euler."""
    final_sigma: float = 1e-3
    """Standard deviation of the last step, which is never learned."""
    rho: float = 7.0
    """karras: levels are evenly spaced in sigma^(1 / rho)."""
    sigma_min: float = 0.002
    """karras: the lowest level."""
    sigma_max: float = 80.0
    """karras: the level of the start."""
    noisy_end: bool = False
    """karras: the last step leads to `sigma_min`, the last of T + 1 levels, and not from it, the last of T, to 0."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= NUM_DIFFUSION_STEPS:
            raise ValueError(f"num_steps is {self.num_steps}: it must be in 1..{NUM_DIFFUSION_STEPS}")
        if self.method not in METHODS:
            raise ValueError(f"method is {self.method!r}: it must be one of {', '.join(METHODS)}")
        shapes = SHAPES if self.method == "var" else STEP_SHAPES
        if self.shape not in shapes:
            raise ValueError(
                f"shape is {self.shape!r}: with method={self.method} it must be one of {', '.join(shapes)}"
            )
        if not 0.0 <= self.kappa <= 1.0:
            raise ValueError(f"kappa is {self.kappa}: it must be in [0, 1]")
        if not 0.0 <= self.final_sigma < 1.0:
            raise ValueError(f"final_sigma is {self.final_sigma}: it must be in [0, 1)")
        if not 1.0 <= self.rho <= 100.0:
            raise ValueError(f"rho is {self.rho}: it must be in [1, 100]")
        if not 0.0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min is {self.sigma_min}: it must be greater than 0 and less than sigma_max")
        if not self.sigma_max < math.inf:
            raise ValueError(f"sigma_max is {self.sigma_max}: it must be finite")

    @property
    def family(self) -> str:
        """Which models it cuts: those of one family are pretrained alike."""
        return {"karras": "edm", "ddgan": f"ddgan-{self.num_steps}"}.get(self.method, "ddpm")


@dataclass(frozen=True)
class StepSchedule:
    """The tables of a T-step sampler, in generation order (index t = 0 acts on noise); float64.

    x_{t+1} = signal_scale_t x_t + noise_scale_t eps(input_scale_t x_t, diffusion_step_t) + sigma_t z

    Attributes:
        level: signal level before each step and after the last, [T+1], level[T] = 1; karras: noise level.
        diffusion_step: what the network is told, may be fractional, [T].
        signal_scale: [T].
        noise_scale: of the network's output, which for karras and ddgan is not the noise, [T].
        sigma: initial standard deviation of each step, [T]; the last is `final_sigma`.
        eta: variance that the matching forward step adds, the first reference variance of the running cost, [T].
        input_scale: of the network's input, [T]; None for 1.
        start_sigma: standard deviation of x_0.
    """

    level: Array
    diffusion_step: Array
    signal_scale: Array
    noise_scale: Array
    sigma: Array
    eta: Array
    input_scale: Array | None = None
    start_sigma: float = 1.0

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sigma)

    @property
    def signal_and_noise(self) -> tuple[Array, Array]:
        """Scale of the data and standard deviation of the noise in x_0 .. x_T, each [T+1]."""
        if self.input_scale is not None:  # EDM: the data keep their scale
            return np.ones_like(self.level), self.level
        return np.sqrt(self.level), np.sqrt(np.maximum(1.0 - self.level, 0.0))

    def tree(self) -> dict[str, Any]:
        """Every table as a plain list, for a signature; those that are as DDPM's are left out."""
        tables = {name: table.tolist() for name, table in asdict(self).items() if isinstance(table, np.ndarray)}
        return tables if self.start_sigma == 1.0 else {**tables, "start_sigma": self.start_sigma}


def shorten(config: ScheduleConfig) -> StepSchedule:
    """The T-step schedule that `config` describes.

    Raises:
        ValueError: the subset of steps that was asked for has repeated members.
    """
    if config.method == "karras":
        return _karras(config)
    if config.method == "ddgan":
        return _ddgan(config)
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
    return eta_of(bisect(surplus, 0.0, cap))


def chosen_steps(num_steps: int, shape: str) -> NDArray[np.int64]:
    """STEP: which of the K diffusion steps are kept, least noisy first, [T].

    Linear: evenly over 0..999. Quadratic: squares, evenly over 0..sqrt(800). With T = 1 it is the noisiest of these.
    Trailing: round(1000 i / T) - 1 for i = 1..T, which is `timestep_spacing="trailing"` of diffusers.

    Raises:
        ValueError: the squares leave fewer than T distinct steps.
    """
    if shape == "linear":
        last = NUM_DIFFUSION_STEPS - 1
        return np.array([i * last // (num_steps - 1) for i in range(num_steps)] if num_steps > 1 else [last])
    if shape == "trailing":
        return np.rint(NUM_DIFFUSION_STEPS * np.arange(1, num_steps + 1) / num_steps).astype(np.int64) - 1
    root = math.sqrt(0.8 * NUM_DIFFUSION_STEPS)
    fractions = np.linspace(0.0, root, num_steps) if num_steps > 1 else np.array([root])
    steps = np.floor(fractions**2 + 1e-9).astype(np.int64)
    if len(np.unique(steps)) < num_steps:
        raise ValueError(
            f"num_steps is {num_steps}: shape=quadratic has fewer distinct steps; use shape=linear or fewer num_steps"
        )
    return steps


# ----------------------------------------------------------------------------
# EDM (Karras et al., arXiv 2206.00364): x = data + sigma eps, and a network F inside
#
#     D(x) = c_skip x + c_out F(c_in x, 250 log sigma),
#     c_skip = d^2 / (sigma^2 + d^2),  c_out = sigma d / sqrt(sigma^2 + d^2),  c_in = 1 / sqrt(sigma^2 + d^2),  d = 0.5.


def karras_levels(num: int, config: ScheduleConfig) -> Array:
    """Noise levels from sigma_max down to sigma_min, evenly spaced in sigma^(1 / rho) (equation 5), [num]."""
    ramp = np.linspace(config.sigma_max ** (1.0 / config.rho), config.sigma_min ** (1.0 / config.rho), num)
    levels: Array = ramp**config.rho if num > 1 else np.array([config.sigma_max])
    return levels


def _karras(config: ScheduleConfig) -> StepSchedule:
    """The tables on EDM's noise levels."""
    end = np.zeros(0) if config.noisy_end else np.zeros(1)
    level = np.append(karras_levels(config.num_steps + config.noisy_end, config), end)
    return _karras_tables(level, config.kappa, config.final_sigma)


def _karras_tables(level: Array, kappa: float, final_sigma: float) -> StepSchedule:
    """Generation-order tables from noise levels [T+1].

    Euler steps down to sigma_down = sqrt(s'^2 - sigma_up^2), where sigma_up = kappa s' sqrt(1 - s'^2 / s^2) is the
    policy's noise: of its direction (x - D(x)) / s the part in x goes into signal_scale, that in F into noise_scale.
    """
    s, s_next = level[:-1], level[1:]
    sigma = kappa * s_next * np.sqrt(1.0 - s_next**2 / s**2)
    way = np.sqrt(s_next**2 - sigma**2) - s
    total = s**2 + SIGMA_DATA**2
    sigma[-1] = final_sigma
    return StepSchedule(
        level,
        diffusion_step=250.0 * np.log(s),
        signal_scale=1.0 + way * s / total,
        noise_scale=-way * SIGMA_DATA / np.sqrt(total),
        sigma=sigma,
        eta=s**2 - s_next**2,
        input_scale=1.0 / np.sqrt(total),
        start_sigma=float(s[0]),
    )


# ----------------------------------------------------------------------------
# Denoising-diffusion GAN (Xiao et al., arXiv 2112.07804): T large steps; the network predicts the image.


def gan_levels(num_steps: int) -> Array:
    """gbar_1..gbar_T: those of the variance-preserving SDE with beta from 0.1 to 20 at T + 1 even times, relative to
    the first of them, [T].
    """
    time = _GAN_FIRST_TIME + np.linspace(0.0, 1.0, num_steps + 1) * (1.0 - _GAN_FIRST_TIME)
    log_level = -0.5 * time**2 * (_GAN_BETA_MAX - _GAN_BETA_MIN) - time * _GAN_BETA_MIN
    levels: Array = np.exp(log_level[1:] - log_level[0])
    return levels


def _ddgan(config: ScheduleConfig) -> StepSchedule:
    """The posterior of x_{t+1} given x_t and the image (DDPM, equation 7; of variance kappa^2 times that)."""
    level = np.append(gan_levels(config.num_steps)[::-1], 1.0)
    g, g_next = level[:-1], level[1:]
    sigma = config.kappa * np.sqrt((1.0 - g_next) / (1.0 - g) * (1.0 - g / g_next))
    signal_scale = np.sqrt((1.0 - g_next - sigma**2) / (1.0 - g))
    image_scale = np.sqrt(g_next) - np.sqrt(g) * signal_scale
    sigma[-1] = config.final_sigma
    steps = np.arange(config.num_steps - 1.0, -1.0, -1.0)
    return StepSchedule(level, steps, signal_scale, image_scale, sigma, 1.0 - g / g_next)


# ----------------------------------------------------------------------------
# Pretraining: the network sees signal x + noise eps, is told the step, and regresses data_part x + noise_part eps.


@dataclass(frozen=True)
class Noising:
    """How a family of models is pretrained: rows that are drawn evenly; float64.

    Attributes:
        step: what the network is told, [K].
        signal: [K].
        noise: [K].
        data_part: of what it regresses, [K].
        noise_part: of what it regresses, [K].
    """

    step: Array
    signal: Array
    noise: Array
    data_part: Array
    noise_part: Array

    @property
    def regresses_noise(self) -> bool:
        """Whether the network predicts the noise itself."""
        return not self.data_part.any() and bool((self.noise_part == 1.0).all())


def noising(config: ScheduleConfig) -> Noising:
    """How the models are pretrained that a schedule cuts."""
    if config.method == "karras":
        return _edm_noising()
    if config.method == "ddgan":
        levels = gan_levels(config.num_steps)
        return replace(_noised(levels), data_part=np.ones_like(levels), noise_part=np.zeros_like(levels))
    return ddpm_noising()


def ddpm_noising() -> Noising:
    """DDPM's: the noise of each of the K steps."""
    return _noised(forward_levels())


def _noised(level: Array) -> Noising:
    """Variance-preserving noise of these signal levels, which is what the network regresses."""
    step = np.arange(len(level), dtype=np.float64)
    return Noising(step, np.sqrt(level), np.sqrt(1.0 - level), np.zeros_like(level), np.ones_like(level))


def _edm_noising() -> Noising:
    """The logarithm of sigma is normal with mean -1.2 and deviation 1.2: the rows are K of its quantiles. F regresses
    (data - c_skip x) / c_out, which with EDM's weights is its loss (equation 8).
    """
    quantile = ndtri((np.arange(NUM_DIFFUSION_STEPS) + 0.5) / NUM_DIFFUSION_STEPS)
    sigma = np.exp(_LOG_SIGMA_MEAN + _LOG_SIGMA_STD * quantile)
    root = np.sqrt(sigma**2 + SIGMA_DATA**2)
    return Noising(250.0 * np.log(sigma), 1.0 / root, sigma / root, sigma / (SIGMA_DATA * root), -SIGMA_DATA / root)


# ----------------------------------------------------------------------------
# Reference samplers: the same step, other tables. Spacing is trailing everywhere: the first step starts at the noisiest
# level, and the last one, which leads to the data, is as long as the others. (The subset 0..999 of shape=linear ends
# with a step from k = 0, and EDM's grid with one from sigma_min: an evaluation that changes almost nothing.)


def ddim_schedule(num_steps: int) -> StepSchedule:
    """DDIM (arXiv 2010.02502) on trailing steps: deterministic given its starting noise."""
    return _respaced(num_steps, kappa=0.0)


def ancestral_schedule(num_steps: int = NUM_DIFFUSION_STEPS, variance: str = "small") -> StepSchedule:
    """DDPM's ancestral sampler on trailing steps; with 1000 of them, the sampler of the paper.

    Args:
        num_steps: how many steps.
        variance: of each step but the last, which adds no noise: small, that of the posterior, beta-tilde
            (`fixedsmall` in the official code); or large, that of the forward step between the same two levels, which
            with 1000 steps is beta_k (`fixedlarge`). The mean is the posterior's in both.
    """
    small = _respaced(num_steps, kappa=1.0)
    if variance == "small":
        return small
    return replace(small, sigma=np.append(np.sqrt(small.eta[:-1]), 0.0))


def _respaced(num_steps: int, kappa: float) -> StepSchedule:
    """Trailing steps of the 1000, without noise in the last."""
    return shorten(ScheduleConfig(num_steps=num_steps, method="step", shape="trailing", kappa=kappa, final_sigma=0.0))


def karras_schedule(config: ScheduleConfig, num_steps: int, kappa: float) -> StepSchedule:
    """Euler's method (kappa 0) or ancestral steps (kappa 1) on EDM's levels: the last step leads straight to the data.

    The levels are the first `num_steps` of one more, so that none of the few is the lowest, `sigma_min`.
    """
    level = np.append(karras_levels(num_steps + 1, config)[:-1], 0.0)
    return _karras_tables(level, kappa, final_sigma=0.0)
