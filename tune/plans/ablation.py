"""The plan of an ablation: which arm is run with which seed, in which order, and when an arm needs no more seeds."""

import json
import math
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, field, replace
from functools import cached_property
from typing import TYPE_CHECKING, Any, ClassVar

from dxmi.config import RESULT, build, delta, identity_tree, to_tree
from dxmi.errors import UserError
from dxmi.training.config import SCHEMA, ExperimentConfig
from dxmi.training.schema import KEY
from tune.config.ablation import AblationConfig, parse_ablation
from tune.config.sweep import BudgetConfig, SamplerConfig, SweepConfig, TrackingConfig
from tune.plans.arms import BASELINE, Arm
from tune.plans.recorded import Recorded, present_study
from tune.plans.sweep import FORMAT, Plan, fidelity_keys, keys_of, plan_from, require_metric
from tune.search.samplers import Proposal
from tune.search.space import Axis, Value
from tune.stats.sequential import SeedPlan, next_seeds

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

ARM, SEED = "arm", "seed"
"""Names of the two settings that vary between trials."""
Cell = tuple[str, int]
"""An arm and a seed."""


@dataclass(frozen=True, kw_only=True)
class AblationPlan(Plan):
    """A study that compares arms with a baseline, paired by seed.

    Attributes:
        ablation: Config of the ablation.
        arms: All arms, the baseline first.
        tuned: For each arm, the values found by its tuning sweep, by path; empty without tuning.
        stacked: Number of seeds of an arm that each program trains. It is chosen when the first program starts and is
            None before. A resumed or repeated study uses the same number, since it changes results by rounding.
    """

    ablation: AblationConfig
    arms: tuple[Arm, ...]
    tuned: Mapping[str, Mapping[str, Value]] = field(default_factory=dict)
    stacked: int | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        for index, metric in enumerate(self.ablation.also or ()):
            require_metric(f"ablation.also[{index}]", metric, keys_of(self.experiment))

    command: ClassVar[str] = "ablate"

    @cached_property
    def also(self) -> tuple[str, ...]:
        """The further scores that are shown in addition to the objective."""
        if self.ablation.also is not None:
            return self.ablation.also
        return tuple(key for key in fidelity_keys(self.experiment) if key != self.ablation.objective.metric)

    @cached_property
    def seeds(self) -> tuple[int, ...]:
        """All seeds that an arm may get, in the order in which they are run."""
        return self.ablation.seeds.numbers(self.experiment.seed)

    @cached_property
    def seed_plan(self) -> SeedPlan | None:
        """The plan of a sequential study; None if the number of seeds is fixed.

        Raises:
            UserError: there are too few seeds for a verdict, or more than the tests support.
        """
        seeds = self.ablation.seeds
        if seeds.first == seeds.cap:
            return None
        return SeedPlan(len(self.arms) - 1, start=seeds.first, cap=seeds.cap, error_rate=self.ablation.level)

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of the study: arm and seed."""
        names = tuple(arm.name for arm in self.arms)
        return Axis(ARM, "choice", choices=names), Axis(SEED, "choice", choices=self.seeds)

    @cached_property
    def num_trials(self) -> int:
        """Largest number of trials."""
        _ = self.seed_plan  # validates the plan
        return len(self.arms) * len(self.seeds)

    def tree_of(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """The config of an arm with a seed, as a nested dictionary."""
        arm = next(arm for arm in self.arms if arm.name == values[ARM])
        return self.tree_with({**arm.changes, **self.tuned.get(arm.name, {}), SEED: values[SEED]})

    def sampled_configs(self) -> Iterator[ExperimentConfig]:
        """The configs of all trials; those that are not valid are left out."""
        for arm in self.arms:
            for seed in self.seeds:
                with suppress(UserError):
                    yield self.config_of({ARM: arm.name, SEED: seed})

    # ------------------------------------------------------------------------
    # The order of the trials

    def propose(self, history: "Sequence[FrozenTrial]") -> Proposal | None:
        """The next arm and seed, one seed after the other; None if no trial can be started now."""
        found = _by_cell(history)
        return _proposal(cell for cell in self._wanted(found) if cell not in found)

    @property
    def seeds_at_once(self) -> int:
        """Number of seeds that every arm gets."""
        return self.ablation.seeds.first

    def propose_for_program(
        self, history: "Sequence[FrozenTrial]", values: Mapping[str, Value], number: int
    ) -> Proposal | None:
        """The next seed of the same arm and the same program, or None."""
        found = _by_cell(history)
        wanted = (cell for cell in self._wanted(found) if cell not in found)
        return _proposal(cell for cell in wanted if self.share_program({ARM: cell[0], SEED: cell[1]}, values, number))

    def share_program(self, one: Mapping[str, Value], other: Mapping[str, Value], number: int) -> bool:
        """Whether two trials have the same arm and seeds from the same block of `number` consecutive seeds."""
        blocks = {self.seeds.index(int(str(values[SEED]))) // number for values in (one, other)}
        return one[ARM] == other[ARM] and len(blocks) == 1

    def is_done(self, history: "Sequence[FrozenTrial]") -> bool:
        """Whether all needed trials have been started, and no running trial can lead to further ones."""
        found = _by_cell(history)
        wanted = self._wanted(found)
        return all(cell in found for cell in wanted) and (
            self.seed_plan is None or all(found[cell].state.is_finished() for cell in wanted)
        )

    def _wanted(self, found: "Mapping[Cell, FrozenTrial]") -> list[Cell]:
        """The cells that are needed given the scores so far, in the order in which they are run."""
        targets = self._targets(found)
        return [(arm, seed) for k, seed in enumerate(self.seeds) for arm, count in targets.items() if k < count]

    def _targets(self, found: "Mapping[Cell, FrozenTrial]") -> dict[str, int]:
        """Number of seeds that each arm gets, given the scores so far.

        All decisions are repeated from the first interim analysis, so that they do not depend on when they are made.
        """
        targets = {arm.name: self.ablation.seeds.first for arm in self.arms}
        while self.seed_plan is not None and _have_ended(found, targets, self.seeds):
            more = next_seeds(_scores(found, targets, self.seeds), BASELINE, self.seed_plan)
            if not more:
                break
            targets |= {**more, BASELINE: max(targets[BASELINE], *more.values())}
        return targets

    # ------------------------------------------------------------------------
    # Identity

    @property
    def identity(self) -> dict[str, Any]:
        """All settings that determine the trials, their results and the verdicts."""
        ablation = delta(self.ablation, RESULT)
        return {"experiment": self.experiment.identity, "ablation": ablation, "arms": self._arms()}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that `identity` covers, including defaults, in human-readable form."""
        ablation, experiment = identity_tree(self.ablation, RESULT), identity_tree(self.experiment, RESULT)
        return {"experiment": experiment, "ablation": ablation, "arms": self._arms()}

    def tree(self) -> dict[str, Any]:
        """Content of study.yaml."""
        return {
            "format": FORMAT,
            KEY: SCHEMA,
            "name": self.name,
            "signature": self.signature,
            "experiment": to_tree(self.experiment),
            "ablation": json.loads(json.dumps(to_tree(self.ablation))),
            "arms": self._arms(),
            "tuned": json.loads(json.dumps(self.tuned)),
            **({} if self.stacked is None else {"stacked": self.stacked}),
            "tracking": to_tree(self.tracking),
        }

    def _arms(self) -> list[dict[str, Any]]:
        arms: list[dict[str, Any]] = json.loads(json.dumps([asdict(arm) for arm in self.arms]))
        return arms


def ablation_plan(
    name: str,
    experiment: ExperimentConfig,
    ablation: AblationConfig,
    arms: Sequence[Arm],
    *,
    tracking: TrackingConfig,
    tuned: Mapping[str, Mapping[str, Value]] | None = None,
    stacked: int | None = None,
    recorded: Recorded | None = None,
) -> AblationPlan:
    """Build the plan of an ablation from its arms.

    Raises:
        UserError: the name, the objective or the seeds are invalid.
    """
    trials = len(arms) * len(ablation.seeds.numbers(experiment.seed))
    sweep = SweepConfig(
        objectives=(ablation.objective,),
        sampler=SamplerConfig(kind="grid"),
        budget=build(BudgetConfig, {**to_tree(ablation.budget), "trials": trials}),
        max_failures=ablation.max_failures,
        max_concurrent=ablation.max_concurrent,
    )
    return AblationPlan(
        name,
        replace(experiment, evaluate=replace(experiment.evaluate, generations=ablation.generations)),
        sweep,
        {},
        tracking,
        ablation=ablation,
        arms=tuple(arms),
        tuned=tuned or {},
        stacked=stacked,
        recorded=recorded,
    )


def any_plan_from(tree: Mapping[str, Any]) -> Plan:
    """Build the plan of a sweep or an ablation from the content of its study.yaml.

    Raises:
        UserError: the content is invalid.
    """
    if "ablation" not in tree:
        return plan_from(tree)
    tree, recorded = present_study(tree)
    return ablation_plan(
        str(tree.get("name")),
        build(ExperimentConfig, tree.get("experiment", {}), "experiment"),
        parse_ablation(tree["ablation"]),
        [Arm(arm["name"], arm["changes"], arm["levels"]) for arm in tree["arms"]],
        tracking=build(TrackingConfig, tree.get("tracking", {}), "tracking"),
        tuned=tree.get("tuned", {}),
        stacked=_stacked(tree.get("stacked")),
        recorded=recorded,
    )


def _stacked(recorded: Any) -> int | None:
    if recorded is not None and not (type(recorded) is int and recorded >= 1):
        raise UserError(f"stacked is {recorded!r}: it must be a number of seeds, at least 1.")
    return recorded


# ----------------------------------------------------------------------------
# Trials by arm and seed


def _proposal(open_cells: Iterator[Cell]) -> Proposal | None:
    cell = next(open_cells, None)
    return None if cell is None else Proposal({ARM: cell[0], SEED: cell[1]})


def _by_cell(history: "Sequence[FrozenTrial]") -> "dict[Cell, FrozenTrial]":
    return {(trial.params[ARM], trial.params[SEED]): trial for trial in history}


def _cells(targets: Mapping[str, int], seeds: Sequence[int]) -> list[Cell]:
    return [(arm, seed) for arm, count in targets.items() for seed in seeds[:count]]


def _have_ended(found: "Mapping[Cell, FrozenTrial]", targets: Mapping[str, int], seeds: Sequence[int]) -> bool:
    return all(cell in found and found[cell].state.is_finished() for cell in _cells(targets, seeds))


def _scores(
    found: "Mapping[Cell, FrozenTrial]", targets: Mapping[str, int], seeds: Sequence[int]
) -> dict[str, list[float]]:
    from optuna.trial import TrialState  # noqa: PLC0415  (loaded by now, since there are trials)

    def score(arm: str, seed: int) -> float:
        trial = found.get((arm, seed))
        is_complete = trial is not None and trial.state is TrialState.COMPLETE
        return float(trial.values[0]) if trial is not None and is_complete else math.nan

    scores = {arm: [score(arm, seed) for seed in seeds[:count]] for arm, count in targets.items()}
    return {arm: own if arm == BASELINE else _testable(own, scores[BASELINE]) for arm, own in scores.items()}


def _testable(ours: list[float], theirs: list[float]) -> list[float]:
    """The scores of an arm, or only NaN if a run of the arm or the baseline failed.

    No verdict is possible then, see `tune.studies.arm_results`, and the arm gets no more seeds.
    """
    is_whole = not any(map(math.isnan, [*ours, *theirs[: len(ours)]]))
    return ours if is_whole else [math.nan] * len(ours)
