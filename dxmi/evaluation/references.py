"""Reference samplers, with which a policy of T steps is compared, and their descriptions in a summary.

The key, the description and the number of network evaluations of each sampler are defined only here. They are stored in
the summary, from which the table at the end of a run, curves.png, leaderboards and reports read them. All samplers are
training-free: they use the pretrained model unchanged. Except for the policy before fine-tuning, which keeps its own
schedule, each sampler is in its strongest usual form: with trailing spacing, and the deterministic ones with few steps
also with even spacing in the log-SNR. None of these is the strongest for every model and number of steps. On images,
the last of these is also clipped: with two or three steps, this may make it the strongest. With more steps and with
trailing spacing, clipping never gave the best score, see configs/README.md.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules.base import StepSchedule
from dxmi.diffusion.schedules.build import shorten
from dxmi.diffusion.schedules.configs import (
    NUM_DIFFUSION_STEPS,
    VARIANCES,
    DdganScheduleConfig,
    KarrasScheduleConfig,
    ScheduleConfig,
)
from dxmi.diffusion.schedules.ddpm import ancestral_schedule, ddim_schedule
from dxmi.diffusion.schedules.edm import karras_schedule
from dxmi.diffusion.solvers import ClippedDpmSolver, DpmSolver, HeunSolver
from dxmi.evaluation.config import FULL_STEPS
from dxmi.evaluation.scored_references import SHORTENED, Role, ScoredReference

_RHO = 7.0
"""Exponent of the spacing of EDM's noise levels (arXiv 2206.00364, table 1)."""
_ANCESTRAL_STEPS, _HEUN_STEPS = 250, 40
"""Numbers of steps that show what an EDM model can do; that of Heun's method is from EDM's paper for ImageNet-64."""
_MOST_BY_LOG_SNR = 20
"""Largest number of steps for which log-SNR spacing is compared with trailing spacing. With more, it would spend most
steps on almost clean data."""


@dataclass(frozen=True)
class Reference:
    """A sampler of the pretrained model.

    Attributes:
        key: short key in a summary, which contains the number of steps and the spacing.
        sampler: readable name of the sampler, without the number of steps.
        role: what the reference shows.
        schedule: tables of coefficients of the steps.
        policy: class that samples with this schedule.
        evaluations: number of network evaluations per sample; by default the number of steps.
    """

    key: str
    sampler: str
    role: Role
    schedule: StepSchedule
    policy: type[Policy] = Policy
    evaluations: int = 0

    def __post_init__(self) -> None:
        if not self.evaluations:
            object.__setattr__(self, "evaluations", self.schedule.num_steps)

    @property
    def label(self) -> str:
        """A readable description."""
        steps = f"{self.schedule.num_steps} step{'s' if self.schedule.num_steps > 1 else ''}"
        if self.role is Role.SHORTENED:
            return f"{steps}, {self.sampler}"
        more = "" if self.evaluations == self.schedule.num_steps else f", {self.evaluations} evaluations"
        return f"{steps} ({self.sampler}{more})"

    @property
    def tree(self) -> dict[str, Any]:
        """The description in a summary."""
        return {
            "label": self.label,
            "sampler": self.sampler,
            "evaluations": self.evaluations,
            "role": self.role.value,
        }

    def scored(self, score: float) -> "ScoredReference":
        """Combine the reference with its score, as it will be read from a summary."""
        return ScoredReference(self.key, self.label, self.sampler, self.role, self.evaluations, score)


def references(
    config: ScheduleConfig,
    *,
    full_steps: Sequence[int] | None = FULL_STEPS,
    steps: Sequence[int] = (),
    are_images: bool = True,
    is_student: bool = False,
) -> list[Reference]:
    """The samplers that a policy is compared with, each with a distinct key.

    Args:
        config: schedule of the policy.
        full_steps: numbers of network evaluations with which a DDPM is sampled to show its own quality (an EDM model
            is sampled in the usual ways instead); None for no such samplers.
        steps: further numbers of network evaluations.
        are_images: whether the data are images, whose pixels are in [-1, 1], so that predictions of a DDPM are also
            clipped.
        is_student: whether the network was distilled from a policy; it then predicts no noise, and has no other
            sampler than the policy before fine-tuning.
    """
    shortened = Reference(SHORTENED, "before", Role.SHORTENED, shorten(config))
    if is_student:
        return [shortened]
    found = [] if full_steps is None else _full(config, full_steps)
    found += _of_steps(config, config.num_steps, Role.FEW, are_images=are_images)
    for number in steps:
        found += _of_steps(config, number, Role.FURTHER, are_images=are_images)
    found.append(shortened)
    unique: dict[str, Reference] = {}
    for reference in found:
        unique.setdefault(reference.key, reference)
    return list(unique.values())


def _full(config: ScheduleConfig, full_steps: Sequence[int]) -> list[Reference]:
    """The samplers that show what the model can do with many steps; a diffusion GAN has none.

    Which is the best depends on the model. On well-trained models of small images, the deterministic samplers with 20
    to 100 steps are better than DDPM's ancestral sampler with 1000, whose samples are more alike.
    """
    if isinstance(config, DdganScheduleConfig):
        return []
    if isinstance(config, KarrasScheduleConfig):
        many = replace(config, rho=_RHO)
        return [_karras_ancestral(many, _ANCESTRAL_STEPS, Role.FULL), _heun(many, _HEUN_STEPS, Role.FULL)]
    return [reference for number in full_steps for reference in _trailing(number, Role.FULL)]


def _of_steps(config: ScheduleConfig, num_steps: int, role: Role, *, are_images: bool) -> list[Reference]:
    """All distinct samplers with this number of network evaluations, or one fewer; a diffusion GAN has none.

    With one step all samplers are the same: they return the data predicted from the noise. With two steps,
    DPM-Solver++(2M) equals DDIM (or Euler), since its first and last steps are of first order. Heun's method needs at
    least three evaluations for two steps.
    """
    if isinstance(config, DdganScheduleConfig):
        return []
    if isinstance(config, KarrasScheduleConfig):
        return _karras_of_steps(config, num_steps, role)
    found = _trailing(num_steps, role)
    if 1 < num_steps <= _MOST_BY_LOG_SNR:
        found.append(_ddim(num_steps, role, "log_snr"))
        if num_steps > 2:
            found.append(_solver(num_steps, role, "log_snr"))
        if are_images:
            found.append(_clipped(found[-1]))
    return found


def _trailing(num_steps: int, role: Role) -> list[Reference]:
    """All distinct samplers of a DDPM with this number of trailing steps."""
    found = [_ddim(num_steps, role)]
    if num_steps > 2:
        found.append(_solver(num_steps, role))
    if num_steps > 1:
        found += [_ancestral(num_steps, variance, role) for variance in VARIANCES]
    return found


def _karras_of_steps(config: KarrasScheduleConfig, num_steps: int, role: Role) -> list[Reference]:
    found = [_euler(config, num_steps, role)]
    if num_steps > 2:
        found.append(_karras_solver(config, num_steps, role))
    if num_steps > 1:
        found.append(_karras_ancestral(config, num_steps, role))
    if num_steps > 2:
        found.append(_heun(config, (num_steps + 1) // 2, role))
    return found


# ----------------------------------------------------------------------------
# The samplers of a DDPM. With all 1000 steps there is no choice of a spacing.


def _spacing(num_steps: int, shape: str = "trailing") -> tuple[str, str]:
    """The spacing as a suffix of the key, and as text."""
    if num_steps == NUM_DIFFUSION_STEPS:
        return "", ""
    return f"_{shape}", ", log-SNR" if shape == "log_snr" else f", {shape}"


def _ddim(num_steps: int, role: Role, shape: str = "trailing") -> Reference:
    key, words = _spacing(num_steps, shape)
    return Reference(f"ddim_{num_steps}{key}", f"DDIM{words}", role, ddim_schedule(num_steps, shape))


def _solver(num_steps: int, role: Role, shape: str = "trailing") -> Reference:
    key, words = _spacing(num_steps, shape)
    name, schedule = f"DPM-Solver++(2M){words}", ddim_schedule(num_steps, shape)
    return Reference(f"dpm_solver_{num_steps}{key}", name, role, schedule, DpmSolver)


def _clipped(plain: Reference) -> Reference:
    """The same deterministic sampler with clipped predictions of the data."""
    return replace(plain, key=f"{plain.key}_clipped", sampler=f"{plain.sampler}, clipped", policy=ClippedDpmSolver)


def _ancestral(num_steps: int, variance: str, role: Role) -> Reference:
    key, words = _spacing(num_steps)
    end = "" if variance == "small" else f"_{variance}"
    name = f"DDPM{words}, {variance} variance"
    return Reference(f"ddpm_{num_steps}{key}{end}", name, role, ancestral_schedule(num_steps, variance))


# ----------------------------------------------------------------------------
# The samplers of an EDM model. Its ancestral steps have only the small variance: the large one, s^2 - s'^2, is far
# greater than the variance of the noise at the next level, s'^2, unless there are very many steps.


def _karras_spacing(config: KarrasScheduleConfig) -> tuple[str, str]:
    """The spacing as a suffix of the key, and as text; levels are spaced by rho, which is 7 in the paper."""
    key, words = ("", "") if config.rho == _RHO else (f"_rho{config.rho:g}", f", rho {config.rho:g}")
    return f"_trailing{key}", f", trailing{words}"


def _euler(config: KarrasScheduleConfig, num_steps: int, role: Role) -> Reference:
    key, words = _karras_spacing(config)
    schedule = karras_schedule(config, num_steps, kappa=0.0)
    return Reference(f"euler_{num_steps}{key}", f"Euler{words}", role, schedule)


def _karras_solver(config: KarrasScheduleConfig, num_steps: int, role: Role) -> Reference:
    key, words = _karras_spacing(config)
    schedule = karras_schedule(config, num_steps, kappa=0.0)
    return Reference(f"dpm_solver_{num_steps}{key}", f"DPM-Solver++(2M){words}", role, schedule, DpmSolver)


def _karras_ancestral(config: KarrasScheduleConfig, num_steps: int, role: Role) -> Reference:
    key, words = _karras_spacing(config)
    schedule = karras_schedule(config, num_steps, kappa=1.0)
    return Reference(f"ancestral_{num_steps}{key}", f"ancestral{words}", role, schedule)


def _heun(config: KarrasScheduleConfig, num_steps: int, role: Role) -> Reference:
    """Heun's method, with two network evaluations per step, but only one in the last."""
    key, words = _karras_spacing(config)
    schedule, evaluations = karras_schedule(config, num_steps, kappa=0.0), 2 * num_steps - 1
    return Reference(f"heun_{evaluations}{key}", f"Heun{words}", role, schedule, HeunSolver, evaluations)
