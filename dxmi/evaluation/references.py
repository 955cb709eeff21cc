"""Reference samplers: what a policy of T steps is compared with, and how a summary tells of them.

Each is named once, here: its key, its words and its network evaluations go into the summary, from which the table at
the end of a run, curves.png, leaderboards and reports take them. All are training-free: they sample from the pretrained
model as it is, each in its strongest usual form, with trailing spacing.
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
from dxmi.diffusion.solvers import DpmSolver, HeunSolver
from dxmi.evaluation.scored_references import SHORTENED, Role, ScoredReference

_RHO = 7.0
"""Of EDM's levels (arXiv 2206.00364, table 1)."""
_ANCESTRAL_STEPS, _HEUN_STEPS = 250, 40
"""Of the samplers of an EDM model that show what it can do; the latter as in EDM's paper for ImageNet-64."""


@dataclass(frozen=True)
class Reference:
    """A sampler of the pretrained model.

    Attributes:
        key: its name in a summary: short, and another one for another spacing.
        sampler: in words, without the number of steps.
        role: what it is compared for.
        schedule: its tables.
        policy: what walks along them.
        evaluations: of the network, a sample.
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
        """In words."""
        steps = f"{self.schedule.num_steps} step{'s' if self.schedule.num_steps > 1 else ''}"
        if self.role is Role.SHORTENED:
            return f"{steps}, {self.sampler}"
        more = "" if self.evaluations == self.schedule.num_steps else f", {self.evaluations} evaluations"
        return f"{steps} ({self.sampler}{more})"

    @property
    def tree(self) -> dict[str, Any]:
        """What a summary says about it."""
        return {
            "label": self.label,
            "sampler": self.sampler,
            "evaluations": self.evaluations,
            "role": self.role.value,
        }

    def scored(self, score: float) -> "ScoredReference":
        """With its score, as a summary will tell it."""
        return ScoredReference(self.key, self.label, self.sampler, self.role, self.evaluations, score)


def references(config: ScheduleConfig, *, full: bool = True, steps: Sequence[int] = ()) -> list[Reference]:
    """The samplers that a policy of `config` is compared with; no two have the same key.

    Args:
        config: of the policy.
        full: with those that show what the model can do with all of its steps.
        steps: further numbers of steps.
    """
    found = [*(_full(config) if full else []), *_of_steps(config, config.num_steps, Role.FEW)]
    for number in steps:
        found += _of_steps(config, number, Role.FURTHER)
    found.append(Reference(SHORTENED, "before", Role.SHORTENED, shorten(config)))
    unique: dict[str, Reference] = {}
    for reference in found:
        unique.setdefault(reference.key, reference)
    return list(unique.values())


def _full(config: ScheduleConfig) -> list[Reference]:
    """The model's own sampler, with all of its steps."""
    if isinstance(config, DdganScheduleConfig):
        return []
    if isinstance(config, KarrasScheduleConfig):
        many = replace(config, rho=_RHO)
        return [_karras_ancestral(many, _ANCESTRAL_STEPS, Role.FULL), _heun(many, _HEUN_STEPS, Role.FULL)]
    return [_ancestral(NUM_DIFFUSION_STEPS, "small", Role.FULL)]


def _of_steps(config: ScheduleConfig, num_steps: int, role: Role) -> list[Reference]:
    """Every sampler with so many network evaluations that is not the equal of another; a diffusion GAN has none.

    With one step all are the same, the jump from the noise to the predicted data. With two, DPM-Solver++(2M) is DDIM
    (or Euler), since its first and last steps are of first order, and Heun's method has one step.
    """
    if isinstance(config, DdganScheduleConfig):
        return []
    if isinstance(config, KarrasScheduleConfig):
        return _karras_of_steps(config, num_steps, role)
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
# The samplers of a DDPM. Those with all 1000 steps have no spacing.


def _spacing(num_steps: int) -> tuple[str, str]:
    """The end of a key, and in words."""
    return ("", "") if num_steps == NUM_DIFFUSION_STEPS else ("_trailing", ", trailing")


def _ddim(num_steps: int, role: Role) -> Reference:
    key, words = _spacing(num_steps)
    return Reference(f"ddim_{num_steps}{key}", f"DDIM{words}", role, ddim_schedule(num_steps))


def _solver(num_steps: int, role: Role) -> Reference:
    key, words = _spacing(num_steps)
    name = f"DPM-Solver++(2M){words}"
    return Reference(f"dpm_solver_{num_steps}{key}", name, role, ddim_schedule(num_steps), DpmSolver)


def _ancestral(num_steps: int, variance: str, role: Role) -> Reference:
    key, words = _spacing(num_steps)
    end = "" if variance == "small" else f"_{variance}"
    name = f"DDPM{words}, {variance} variance"
    return Reference(f"ddpm_{num_steps}{key}{end}", name, role, ancestral_schedule(num_steps, variance))


# ----------------------------------------------------------------------------
# The samplers of an EDM model. Its ancestral steps have the small variance only: the large one, s^2 - s'^2, is far
# above the noise that is left at the next level, s'^2, unless there are very many steps.


def _karras_spacing(config: KarrasScheduleConfig) -> tuple[str, str]:
    """The end of a key, and in words; levels are spaced by rho, which is 7 in the paper."""
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
    """Two evaluations a step, one in the last."""
    key, words = _karras_spacing(config)
    schedule, evaluations = karras_schedule(config, num_steps, kappa=0.0), 2 * num_steps - 1
    return Reference(f"heun_{evaluations}{key}", f"Heun{words}", role, schedule, HeunSolver, evaluations)
