"""Settings of the schedules: one class for each kind. Nothing here imports NumPy or PyTorch."""

import math
from dataclasses import dataclass
from itertools import accumulate

NUM_DIFFUSION_STEPS = 1000
BETA_FIRST, BETA_LAST = 1e-4, 0.02
"""First and last variance of DDPM's forward process, which are linear in between."""
LEAST_LEVEL, MOST_LEVEL = 1e-4, 0.99
"""Range of `VarScheduleConfig.last_level`."""
SHORTENINGS = ("var", "step")
"""Kinds that shorten DDPM's 1000 steps."""
SHAPES = ("linear", "quadratic")
STEP_SHAPES = (*SHAPES, "trailing", "log_snr")
"""Spacings that kind `step` supports."""
VARIANCES = ("small", "large")


@dataclass(frozen=True, kw_only=True)
class ScheduleConfig:
    """The part of a schedule's config that all kinds share."""

    kind: str = "var"
    """var: T new noise levels; step: a subset of the 1000 steps; karras: EDM's levels; ddgan: diffusion GAN."""
    num_steps: int = 5
    """T, the number of policy steps."""
    kappa: float = 1.0
    """Scale of the initial sigmas: 1 gives the DDPM posterior or the ancestral step, 0 gives DDIM or Euler."""
    final_sigma: float = 1e-3
    """Standard deviation of the last step, which is never learned."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_steps <= NUM_DIFFUSION_STEPS:
            raise ValueError(f"num_steps is {self.num_steps}: it must be in 1..{NUM_DIFFUSION_STEPS}")
        if not 0.0 <= self.kappa <= 1.0:
            raise ValueError(f"kappa is {self.kappa}: it must be in [0, 1]")
        if not 0.0 <= self.final_sigma < 1.0:
            raise ValueError(f"final_sigma is {self.final_sigma}: it must be in [0, 1)")

    @property
    def family(self) -> str:
        """The family of models that it shortens; all models of a family share a forward process."""
        return "ddpm"


@dataclass(frozen=True, kw_only=True)
class VarScheduleConfig(ScheduleConfig):
    """T new noise levels for a DDPM (FastDPM's VAR)."""

    kind: str = "var"
    shape: str = "quadratic"
    """Spacing of the noise variances: linear or quadratic."""
    last_level: float | None = None
    """Signal level of the noisiest step, at which sampling starts; null for that of step 999, 4e-5. With one or two
    steps, the first step divides by the root of this level and amplifies errors of the network by as much."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_shape(self.kind, self.shape, SHAPES)
        if self.last_level is not None and not LEAST_LEVEL <= self.last_level <= MOST_LEVEL:
            raise ValueError(
                f"last_level is {self.last_level}: it must be in [{LEAST_LEVEL:g}, {MOST_LEVEL:g}], or null"
            )


@dataclass(frozen=True, kw_only=True)
class StepScheduleConfig(ScheduleConfig):
    """A subset of the 1000 steps of a DDPM (FastDPM's STEP)."""

    kind: str = "step"
    shape: str = "quadratic"
    """Spacing of the steps: linear; quadratic; trailing, which is even spacing down from the last step,
    999 - 1000 t / T, so that no network evaluation is spent on almost clean data; or log_snr, which is even spacing in
    the logarithm of the signal-to-noise ratio, as in DPM-Solver."""

    def __post_init__(self) -> None:
        super().__post_init__()
        _require_shape(self.kind, self.shape, STEP_SHAPES)
        if len(set(timestep_subset(self.num_steps, self.shape))) < self.num_steps:
            raise ValueError(
                f"num_steps is {self.num_steps}: shape={self.shape} has fewer distinct steps; use shape=linear or "
                "fewer num_steps"
            )


@dataclass(frozen=True, kw_only=True)
class KarrasScheduleConfig(ScheduleConfig):
    """EDM's noise levels with ancestral steps, for networks with EDM's preconditioning."""

    kind: str = "karras"
    rho: float = 7.0
    """Levels are evenly spaced in sigma^(1 / rho)."""
    sigma_min: float = 0.002
    """The lowest level."""
    sigma_max: float = 80.0
    """The highest level, at which sampling starts."""
    noisy_end: bool = False
    """If true, the last step ends at `sigma_min`, the last of T + 1 levels; else it leads from `sigma_min` to 0."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 1.0 <= self.rho <= 100.0:
            raise ValueError(f"rho is {self.rho}: it must be in [1, 100]")
        if not 0.0 < self.sigma_min < self.sigma_max:
            raise ValueError(f"sigma_min is {self.sigma_min}: it must be greater than 0 and less than sigma_max")
        if not self.sigma_max < math.inf:
            raise ValueError(f"sigma_max is {self.sigma_max}: it must be finite")

    @property
    def family(self) -> str:
        """The family of EDM's models."""
        return "edm"


@dataclass(frozen=True, kw_only=True)
class DdganScheduleConfig(ScheduleConfig):
    """The steps of a denoising-diffusion GAN, whose network predicts the image."""

    kind: str = "ddgan"

    @property
    def family(self) -> str:
        """One family per number of steps, since a diffusion GAN is trained for its number of steps."""
        return f"ddgan-{self.num_steps}"


def _require_shape(kind: str, shape: str, shapes: tuple[str, ...]) -> None:
    if shape not in shapes:
        raise ValueError(f"shape is {shape!r}: with kind={kind} it must be one of {', '.join(shapes)}")


def timestep_subset(num_steps: int, shape: str) -> list[int]:
    """STEP: the diffusion steps that are kept, least noisy first, [T].

    Linear: evenly spaced over 0..999. Quadratic: squares of numbers evenly spaced over 0..sqrt(800), rounded down, with
    duplicates if T is large. With T = 1 both keep only the noisiest of these. Trailing: round(1000 i / T) - 1 for
    i = 1..T, which is `timestep_spacing="trailing"` of diffusers. Log-SNR: for T evenly spaced values of
    log(abar / (1 - abar)), from its value at step 999 to, but not including, that at step 0, the nearest step
    (DPM-Solver, arXiv 2206.00927, section 3.4); steps that would coincide, near the data, are moved apart.
    """
    if shape == "log_snr":
        return _log_snr_subset(num_steps)
    if shape == "trailing":
        return [round(NUM_DIFFUSION_STEPS * i / num_steps) - 1 for i in range(1, num_steps + 1)]
    last, root = NUM_DIFFUSION_STEPS - 1, math.sqrt(0.8 * NUM_DIFFUSION_STEPS)
    if num_steps == 1:
        return [last if shape == "linear" else math.floor(root**2 + 1e-9)]
    if shape == "linear":
        return [i * last // (num_steps - 1) for i in range(num_steps)]
    fractions = [i * (root / (num_steps - 1)) for i in range(num_steps - 1)] + [root]
    return [math.floor(fraction**2 + 1e-9) for fraction in fractions]


def forward_log_snr() -> list[float]:
    """log(abar_k / (1 - abar_k)) of DDPM's forward process, which falls with k, [K]."""
    slope = (BETA_LAST - BETA_FIRST) / (NUM_DIFFUSION_STEPS - 1)
    log_levels = accumulate(math.log1p(-(BETA_FIRST + slope * k)) for k in range(NUM_DIFFUSION_STEPS))
    return [log_level - math.log(-math.expm1(log_level)) for log_level in log_levels]


def _log_snr_subset(num_steps: int) -> list[int]:
    """The steps whose log-SNRs are nearest to T evenly spaced values, see `timestep_subset`."""
    ratios = forward_log_snr()
    gap = (ratios[0] - ratios[-1]) / num_steps
    targets = [ratios[-1] + gap * i for i in range(num_steps)]  # noisiest first
    nearest = [min(range(len(ratios)), key=lambda k: abs(ratios[k] - target)) for target in targets]
    steps = sorted(nearest)
    for i in range(1, num_steps):  # near the data, where the ratio changes most from step to step, several may coincide
        steps[i] = max(steps[i], steps[i - 1] + 1)
    for i in range(num_steps):  # with almost as many steps as there are, that may have gone beyond the last
        steps[i] = min(steps[i], NUM_DIFFUSION_STEPS - num_steps + i)
    return steps
