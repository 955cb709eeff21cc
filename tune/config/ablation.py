"""Settings of an ablation: its hypothesis, design, seeds, tuning within arms, and budget.

They are read from configs/ablation/NAME.yaml (or any .yaml file given by `ablation=`), together with the table of the
design, from which `tune.plans.arms` builds the arms:

    design: one_factor                             also list: settings that are compared directly
    variants:                                      by name, what each changes in the baseline
      no_entropy: {algorithm.entropy_coef: 0}
      no_costs: {algorithm.entropy_coef: 0, algorithm.cost_coef: 0}

    design: leave_one_out
    components:                                    by name, what disables each of them
      entropy: {algorithm.entropy_coef: 0}

    design: factorial                              also fractional: two levels per factor, and resolution: 3 or 4
    factors:                                       by name, levels by name; the first is that of the baseline
      method: {var: {}, step: {schedule.kind: step}}
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

from dxmi.config import NO_RESULT, build, require_choice
from dxmi.errors import UserError
from tune.config.sweep import LimitsConfig, ObjectiveConfig, SamplerConfig, StoppingConfig, require_attempts

TABLES = {
    "one_factor": "variants",
    "list": "variants",
    "leave_one_out": "components",
    "factorial": "factors",
    "fractional": "factors",
}
"""The table that describes the arms, by design."""
RESOLUTIONS = (3, 4)
_MIN_SEEDS, _MAX_SEEDS = 2, 1_000
_MAX_GENERATIONS = 100
_SEEDS_EXAMPLE = "give a number (6), a list ([0, 1, 2]), auto, or the limits of auto ({first: 3, cap: 12})"

Table = Mapping[str, Any]


@dataclass(frozen=True, kw_only=True)
class SeedsConfig:
    """The seeds of every arm. In a file: `seeds: 6`, `seeds: [0, 1, 2]`, `seeds: auto`, or these fields."""

    first: int = 3
    """Number of seeds at the beginning."""
    cap: int = 12
    """Maximum number of seeds; more than `first` are added only where the verdict is still open."""
    values: tuple[int, ...] | None = None
    """The seeds in order; null for the experiment's own seed and its successors."""

    def __post_init__(self) -> None:
        if not _MIN_SEEDS <= self.first <= _MAX_SEEDS:
            raise ValueError(f"first is {self.first}: it must be in {_MIN_SEEDS}..{_MAX_SEEDS}")
        if not self.first <= self.cap <= _MAX_SEEDS:
            raise ValueError(f"cap is {self.cap}: it must be at least first, {self.first}, and at most {_MAX_SEEDS}")
        if self.values is None:
            return
        for seed in self.values:
            if not 0 <= seed < 2**63:
                raise ValueError(f"values holds {seed}: a seed must be in 0..2^63 - 1")
        if len(set(self.values)) < len(self.values):
            raise ValueError("values names a seed twice: keep one")
        if len(self.values) != self.cap:
            raise ValueError(f"values has {len(self.values)} entries, but cap is {self.cap}: make them equal")

    def numbers(self, start: int) -> tuple[int, ...]:
        """Return all seeds up to the cap in order; `start` is the experiment's own seed."""
        return self.values or tuple(range(start, start + self.cap))


@dataclass(frozen=True, kw_only=True)
class TuningConfig:
    """A small sweep within each arm over settings that are not compared, with the same budget for every arm."""

    trials: int = 8
    """Number of trials in each arm."""
    seed: int = 1_000
    """Seed of these trials. It must differ from the compared seeds, on which a tuned arm would look too good."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    """Early stopping among the trials of one arm; trials of different arms are never compared."""
    space: Table = field(default_factory=dict)
    """Search space as in a sweep file, see `tune.search.space`."""

    def __post_init__(self) -> None:
        if self.trials < 1:
            raise ValueError(f"trials is {self.trials}: it must be at least 1")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: it must be in 0..2^63 - 1")
        if self.sampler.kind == "nsga2":
            raise ValueError("sampler.kind is 'nsga2', which requires two objectives: an ablation has one")


@dataclass(frozen=True, kw_only=True)
class AblationConfig:
    """Settings of an ablation, except for the experiment that is its baseline."""

    hypothesis: str = ""
    """The expected result and the reason for it; required."""
    design: str = "one_factor"
    """one_factor, leave_one_out, factorial, fractional or list."""
    variants: Table = field(default_factory=dict)
    components: Table = field(default_factory=dict)
    all_off: bool = False
    """For leave_one_out: add an arm without any of the components."""
    factors: Table = field(default_factory=dict)
    resolution: int | None = None
    """For fractional: 3 (main effects are not aliased with each other) or 4 (nor with two-factor interactions); null
    for 4."""
    objective: ObjectiveConfig = field(default_factory=ObjectiveConfig)
    also: tuple[str, ...] | None = field(default=None, metadata=NO_RESULT)
    """Keys of further scores whose means are shown next to the objective but do not affect verdicts; null for precision
    and recall where available, [] for none."""
    seeds: SeedsConfig = field(default_factory=SeedsConfig)
    generations: int = 1
    """Number of independent draws of the evaluation noise for each trained run."""
    level: float = 0.05
    """Significance level of the tests."""
    tuning: TuningConfig | None = None
    budget: LimitsConfig = field(default_factory=LimitsConfig, metadata=NO_RESULT)
    max_failures: int = field(default=2, metadata=NO_RESULT)
    """Number of times a crashed trial is restarted."""
    max_concurrent: int | None = field(default=None, metadata=NO_RESULT)
    """Maximum number of trials at once; null for as many as the devices allow."""

    def __post_init__(self) -> None:
        if not self.hypothesis.strip():
            raise ValueError("hypothesis is missing: state in a sentence what you expect and why")
        require_choice("design", self.design, TABLES)
        self._check_table()
        if self.resolution is not None and self.resolution not in RESOLUTIONS:
            raise ValueError(f"resolution is {self.resolution}: it must be 3 or 4")
        if not 1 <= self.generations <= _MAX_GENERATIONS:
            raise ValueError(f"generations is {self.generations}: it must be in 1..{_MAX_GENERATIONS}")
        if not (math.isfinite(self.level) and 0.0 < self.level < 1.0):
            raise ValueError(f"level is {self.level}: it must be above 0 and below 1")
        require_attempts(self.max_failures, self.max_concurrent)

    def _check_table(self) -> None:
        """Reject settings of other designs, which would have no effect.

        Raises:
            ValueError: there are some.
        """
        own = TABLES[self.design]
        for name in dict.fromkeys(TABLES.values()):
            if name != own and getattr(self, name):
                raise ValueError(f"{name} has no effect with design={self.design}, which takes {own}: leave it out")
        if self.all_off and self.design != "leave_one_out":
            raise ValueError(f"all_off has no effect with design={self.design}: leave it out")
        if self.resolution is not None and self.design != "fractional":
            raise ValueError(f"resolution has no effect with design={self.design}: leave it out")

    @property
    def table(self) -> Table:
        """The table that describes the arms: the variants, components or factors."""
        table: Table = getattr(self, TABLES[self.design])
        return table


# ----------------------------------------------------------------------------
# From a file


def parse_ablation(tree: Any) -> AblationConfig:
    """Build the settings of an ablation from the tree of a file; the inverse of `dxmi.config.to_tree`.

    Raises:
        UserError: a setting is invalid. The table of the design is checked by `tune.plans.arms` against the experiment.
    """
    if not isinstance(tree, Mapping):
        raise UserError(f"ablation is {tree!r}: it must be a group of settings.")
    given = dict(tree)
    variants, components, factors = (
        _table(name, given.pop(name, {})) for name in ("variants", "components", "factors")
    )
    if "seeds" in given:
        given["seeds"] = _seeds(given["seeds"])
    space: Table = {}
    if isinstance(given.get("tuning"), Mapping):
        given["tuning"] = dict(given["tuning"])
        space = _table("tuning.space", given["tuning"].pop("space", {}))
    config = build(AblationConfig, given, "ablation")
    tuning = None if config.tuning is None else replace(config.tuning, space=space)
    try:
        return replace(config, variants=variants, components=components, factors=factors, tuning=tuning)
    except ValueError as error:
        raise UserError(f"ablation.{error}.") from error


def _table(name: str, given: Any) -> Table:
    if not isinstance(given, Mapping):
        raise UserError(f"ablation.{name} is {given!r}: it must be a group, see the files in configs/ablation.")
    return given


def _seeds(given: Any) -> dict[str, Any]:
    """Convert any of the accepted forms of `seeds` to the tree of a `SeedsConfig`."""
    if isinstance(given, Mapping):
        return dict(given)
    if given == "auto":
        return {}
    if isinstance(given, int) and not isinstance(given, bool):
        if not _MIN_SEEDS <= given <= _MAX_SEEDS:
            raise UserError(f"ablation.seeds is {given}: it must be in {_MIN_SEEDS}..{_MAX_SEEDS}.")
        return {"first": given, "cap": given}
    if isinstance(given, Sequence) and not isinstance(given, str) and len(given) >= _MIN_SEEDS:
        return {"first": len(given), "cap": len(given), "values": list(given)}
    raise UserError(f"ablation.seeds is {given!r}: {_SEEDS_EXAMPLE}.")
