"""The plan of a study: its experiment, how trials vary it, how they are ranked, and where they are recorded."""

import json
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np

from dxmi.config import RESULT, build, delta, identity_tree, signature, to_tree
from dxmi.errors import UserError
from dxmi.metrics.keys import MINIMIZE, Direction, ScoreKey, primary_key
from dxmi.training.config import SCHEMA, ExperimentConfig
from dxmi.training.schema import KEY
from tune.config.sweep import ObjectiveConfig, SweepConfig, TrackingConfig
from tune.plans.recorded import Recorded, present_study
from tune.search.samplers import Proposal, num_planned, propose
from tune.search.space import Axis, Value, parse_space, tree_with

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FORMAT = 1
"""Version of the format of study.yaml."""
_MAX_SAMPLED = 100
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class Plan:
    """The plan of a study.

    Attributes:
        name: Name of the study.
        experiment: Experiment that the trials vary.
        sweep: Config of the sweep.
        space: Search space as written in the sweep file.
        tracking: Where the study is recorded.
        recorded: The study's record in an earlier schema, if it has one: such a study can be read, but not resumed.
    """

    name: str
    experiment: ExperimentConfig
    sweep: SweepConfig
    space: Mapping[str, Any]
    tracking: TrackingConfig = field(default_factory=TrackingConfig)
    recorded: Recorded | None = field(default=None, kw_only=True)

    def __post_init__(self) -> None:
        require_name(self.name)
        _check_objectives(self.sweep, self.experiment)
        self._check_seeds()
        _ = self.num_trials  # validates a grid

    def _check_seeds(self) -> None:
        """Check that a trial can have several seeds.

        Raises:
            UserError: it cannot.
        """
        seeds, resources = self.sweep.seeds, self.experiment.resources
        if seeds == 1:
            return
        if "seed" in self.space:
            raise UserError(f"sweep.seeds is {seeds}, but sweep.space varies seed: remove one of the two.")
        if not resources.can_stack_seeds:
            raise UserError(
                f"sweep.seeds is {seeds}, but the seeds of a trial are trained by one process and in one program: make "
                "resources.num_workers and resources.accumulate 1, and resources.compile false, or sweep.seeds 1."
            )

    @property
    def is_of_parents(self) -> bool:
        """Whether trials are ranked by their pretrained models, whatever the fine-tuned policies are like."""
        return self.objectives[0].metric == "pretrained"

    @property
    def trial_seeds(self) -> tuple[int, ...]:
        """The seeds of each trial."""
        return tuple(range(self.experiment.seed, self.experiment.seed + self.sweep.seeds))

    command: ClassVar[str] = "sweep"
    """Subcommand of `dxmi` that runs such a study."""

    def resume_line(self, folder: Path | str) -> str:
        """The command line that resumes the study in a folder."""
        permission = " resources.allow_code=true" if self.experiment.resources.allow_code else ""
        return f"dxmi {self.command} --resume {folder}{permission}"

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The axes of the search space."""
        return parse_space(self.space, self.experiment, is_checked=self.recorded is None)

    @cached_property
    def num_trials(self) -> int:
        """Number of trials of the whole study."""
        return num_planned(self.sweep, self.axes)

    def propose(self, history: "Sequence[FrozenTrial]") -> Proposal | None:
        """Propose the trial that follows `history`; None if there is none, or not before a running trial ends."""
        if len(history) >= self.num_trials:
            return None
        axes = sorted(self.axes, key=lambda axis: axis.path)  # so that it does not depend on their order in the file
        return propose(replace(self.sweep, objectives=self.objectives), axes, self.experiment, history)

    @property
    def seeds_at_once(self) -> int:
        """Number of trials that differ only in their seeds and may be started together."""
        return 1

    def propose_for_program(
        self,
        history: "Sequence[FrozenTrial]",  # noqa: ARG002
        values: Mapping[str, Value],  # noqa: ARG002
        number: int,  # noqa: ARG002
    ) -> Proposal | None:
        """Propose a trial for the same program as the one with these values, see `share_program`; None if there is
        none.
        """
        return None

    def share_program(self, one: Mapping[str, Value], other: Mapping[str, Value], number: int) -> bool:  # noqa: ARG002
        """Whether two trials are trained in the same program if each program trains `number` seeds of an arm.

        The result depends only on the arguments, so that an interrupted and resumed study trains the same seeds
        together: the number of seeds in a program changes results by rounding.
        """
        return False

    def is_done(self, history: "Sequence[FrozenTrial]") -> bool:
        """Whether all trials have been started, and no running trial can lead to further ones."""
        return len(history) >= self.num_trials

    def tree_of(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """The config of the trial with these values, as a nested dictionary that is not validated."""
        meant = {axis.path: axis.settings(values[axis.path]) for axis in self.axes if axis.path in values}
        return self.tree_with({**values, **meant})

    def tree_with(self, settings: Mapping[str, Value]) -> dict[str, Any]:
        """The experiment with other settings, as a nested dictionary that is not validated."""
        return tree_with(self.experiment, settings) if self.recorded is None else self.recorded.tree_of(settings)

    def journal_name(self, path: str) -> str:
        """Name of a varying setting in the study's journal."""
        return path if self.recorded is None else self.recorded.name_of(path)

    def require_present(self) -> None:
        """Check that the study may be resumed.

        Raises:
            UserError: it was recorded with an earlier schema.
        """
        if self.recorded is not None:
            raise UserError(self.recorded.refusal(self.name))

    def config_of(self, values: Mapping[str, Value]) -> ExperimentConfig:
        """The config of the trial with these values.

        Raises:
            UserError: a value or the combination of values is invalid.
        """
        return build(ExperimentConfig, self.tree_of(values))

    def sampled_configs(self) -> Iterator[ExperimentConfig]:
        """Valid configs like those of the trials, whose values are drawn at random from the search space."""
        draws = np.random.default_rng(0)
        for _ in range(min(self.num_trials, _MAX_SAMPLED)):
            values = {axis.path: axis.at(float(draws.random())) for axis in self.axes}
            for seed in self.trial_seeds:
                with suppress(UserError):
                    yield self.config_of({"seed": seed, **values})

    @cached_property
    def primary(self) -> ScoreKey:
        """Key of the experiment's primary score."""
        return primary_key(self.experiment.score_keys())

    @property
    def metric(self) -> str:
        """Name of the experiment's primary score, like eval/fid_digits."""
        return self.primary.name

    @property
    def direction(self) -> Direction:
        """Whether the experiment's primary score is minimized or maximized."""
        return self.primary.direction

    @cached_property
    def objectives(self) -> tuple[ObjectiveConfig, ...]:
        """The objectives of the study, each with its direction."""
        return resolved_objectives(self.sweep.objectives, self.experiment)

    @property
    def identity(self) -> dict[str, Any]:
        """All settings that determine the trials and their results."""
        return {"experiment": self.experiment.identity, "sweep": {**delta(self.sweep, RESULT), "space": self.space}}

    @property
    def settings(self) -> dict[str, Any]:
        """The settings that `identity` covers, including defaults, in human-readable form."""
        sweep = {**identity_tree(self.sweep, RESULT), "space": self.space}
        return {"experiment": identity_tree(self.experiment, RESULT), "sweep": sweep}

    @property
    def signature(self) -> str:
        """Hash of 12 hex digits; two plans have the same one exactly if they describe the same trials."""
        return signature(self.identity) if self.recorded is None else self.recorded.signature

    def tree(self) -> dict[str, Any]:
        """Content of study.yaml."""
        return {
            "format": FORMAT,
            KEY: SCHEMA,
            "name": self.name,
            "signature": self.signature,
            "experiment": to_tree(self.experiment),
            "sweep": {**to_tree(self.sweep), "space": json.loads(json.dumps(self.space))},
            "tracking": to_tree(self.tracking),
        }


def plan_from(tree: Mapping[str, Any]) -> Plan:
    """Build a plan from the content of study.yaml, the inverse of `Plan.tree`.

    Raises:
        UserError: the content is invalid.
    """
    tree, recorded = present_study(tree)
    given = tree.get("sweep", {})
    if not isinstance(given, Mapping):
        raise UserError(f"sweep is {given!r}: it must be a group of settings.")
    sweep = dict(given)
    space = sweep.pop("space", {})
    return Plan(
        name=str(tree.get("name")),
        experiment=build(ExperimentConfig, tree.get("experiment", {}), "experiment"),
        sweep=build(SweepConfig, sweep, "sweep"),
        space=space,
        tracking=build(TrackingConfig, tree.get("tracking", {}), "tracking"),
        recorded=recorded,
    )


def require_name(name: str) -> None:
    """Check the name of a study.

    Raises:
        UserError: it is not valid as the name of a folder and of a run.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        shown = name if len(name) <= 60 else name[:60] + "..."
        raise UserError(
            f"The study's name is {shown!r}: it must be 1 to 100 letters, digits, dots, dashes or underscores."
        )


_OWN_METRICS = ("score", "pretrained", "last", "num_steps", "seconds")
_LIKE_THE_SCORE = ("score", "pretrained", "last")
"""Those that are values of the primary score."""


def keys_of(experiment: ExperimentConfig) -> list[str]:
    """The keys of all scores of a finished run, the primary one first."""
    return [key.name for key in sorted(experiment.score_keys(), key=lambda key: not key.primary)]


def resolved_objectives(
    objectives: Sequence[ObjectiveConfig], experiment: ExperimentConfig
) -> tuple[ObjectiveConfig, ...]:
    """The objectives of a study, with the direction of their metric where none is given."""
    keys = experiment.score_keys()
    known = {key.name: key.direction for key in keys}
    known |= dict.fromkeys(_LIKE_THE_SCORE, primary_key(keys).direction)
    return tuple(
        replace(objective, direction=objective.direction or known.get(objective.metric, MINIMIZE))
        for objective in objectives
    )


def metrics_of(experiment: ExperimentConfig) -> list[str]:
    """All metrics that can be objectives."""
    return [*_OWN_METRICS, *keys_of(experiment)]


def fidelity_keys(experiment: ExperimentConfig) -> list[str]:
    """Keys of precision and recall, which tables show next to the score; empty if the data does not have them."""
    return [key for key in keys_of(experiment) if key.startswith(("eval/precision_", "eval/recall_"))]


def require_metric(where: str, metric: str, known: Sequence[str]) -> None:
    """Check that a metric is known; `where` is its location in the plan, for the message.

    Raises:
        UserError: it is not one of the known metrics.
    """
    if metric not in known:
        raise UserError(f"{where} is {metric!r}, which no trial reports: it must be one of {', '.join(known)}.")


def _check_objectives(sweep: SweepConfig, experiment: ExperimentConfig) -> None:
    known = metrics_of(experiment)
    for index, objective in enumerate(sweep.objectives):
        require_metric(f"sweep.objectives[{index}].metric", objective.metric, known)
    first = resolved_objectives(sweep.objectives, experiment)[0]
    own = primary_key(experiment.score_keys())
    follows_curve = first.metric in ("score", own.name) and first.direction == own.direction
    if sweep.stopping.rule != "none" and not follows_curve:
        raise UserError(
            f"sweep.stopping.rule is {sweep.stopping.rule!r}, which compares score curves: the objective must be "
            f"score, and it must be {own.direction}d."
        )
