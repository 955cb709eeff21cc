"""What a study is to do: its experiment, how trials vary it, how they are judged, and where they are recorded."""

import json
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any, ClassVar

from dxmi.config import build, signature, to_tree
from dxmi.errors import UserError
from dxmi.metrics.keys import MINIMIZE, Direction, ScoreKey, primary_key
from dxmi.training.config import ExperimentConfig
from tune.config.sweep import ObjectiveConfig, SweepConfig, TrackingConfig
from tune.search.samplers import Proposal, num_planned, propose
from tune.search.space import Axis, Value, parse_space, tree_with

if TYPE_CHECKING:
    from optuna.trial import FrozenTrial

FORMAT = 1
"""Of study.yaml."""
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}")


@dataclass(frozen=True)
class Plan:
    """What a study is to do.

    Attributes:
        name: of the study.
        experiment: what each trial changes a little.
        sweep: how.
        space: the sweep file's space, as written.
        tracking: where it is recorded.
    """

    name: str
    experiment: ExperimentConfig
    sweep: SweepConfig
    space: Mapping[str, Any]
    tracking: TrackingConfig = field(default_factory=TrackingConfig)

    def __post_init__(self) -> None:
        require_name(self.name)
        _check_objectives(self.sweep, self.experiment)
        _ = self.num_trials  # a grid may be refused

    command: ClassVar[str] = "sweep"
    """Of `dxmi`, what runs such a study."""

    def resume_line(self, folder: Path | str) -> str:
        """The command line that goes on with the study in a folder."""
        return f"dxmi {self.command} --resume {folder}"

    @cached_property
    def axes(self) -> tuple[Axis, ...]:
        """The space."""
        return parse_space(self.space, self.experiment)

    @cached_property
    def num_trials(self) -> int:
        """Trials of the whole study."""
        return num_planned(self.sweep, self.axes)

    def propose(self, history: "Sequence[FrozenTrial]") -> Proposal | None:
        """The trial that follows `history`; None if there is none, or none before a running one has ended."""
        if len(history) >= self.num_trials:
            return None
        axes = sorted(self.axes, key=lambda axis: axis.path)  # their order in the file is not in the signature
        return propose(replace(self.sweep, objectives=self.objectives), axes, self.experiment, history)

    @property
    def seeds_at_once(self) -> int:
        """How many trials may be begun at a time that differ in their seeds alone."""
        return 1

    def propose_for_program(
        self,
        history: "Sequence[FrozenTrial]",  # noqa: ARG002
        values: Mapping[str, Value],  # noqa: ARG002
        number: int,  # noqa: ARG002
    ) -> Proposal | None:
        """A further trial for the program of the one with these values, see `share_program`; None if there is none."""
        return None

    def share_program(self, one: Mapping[str, Value], other: Mapping[str, Value], number: int) -> bool:  # noqa: ARG002
        """Whether two trials are trained in one program if programs take `number` seeds of an arm.

        It depends on nothing else, since the number of seeds in a program changes results by rounding: a study that is
        interrupted and resumed trains the same seeds together.
        """
        return False

    def is_done(self, history: "Sequence[FrozenTrial]") -> bool:
        """Whether every trial has been begun, and none that runs can call for more."""
        return len(history) >= self.num_trials

    def tree_of(self, values: Mapping[str, Value]) -> dict[str, Any]:
        """The config of the trial with these values, as a tree that may still be refused."""
        groups = {axis.path: axis for axis in self.axes}
        return tree_with(self.experiment, {path: groups[path].settings(value) for path, value in values.items()})

    def config_of(self, values: Mapping[str, Value]) -> ExperimentConfig:
        """The config of the trial with these values.

        Raises:
            UserError: it refuses one of them, or one beside another.
        """
        return build(ExperimentConfig, self.tree_of(values))

    @cached_property
    def primary(self) -> ScoreKey:
        """The experiment's own score."""
        return primary_key(self.experiment.score_keys())

    @property
    def metric(self) -> str:
        """The key of the experiment's own score, like eval/fid_digits."""
        return self.primary.name

    @property
    def direction(self) -> Direction:
        """Whether the experiment's own score is minimized or maximized."""
        return self.primary.direction

    @cached_property
    def objectives(self) -> tuple[ObjectiveConfig, ...]:
        """What trials are judged by, each with its direction."""
        return resolved_objectives(self.sweep.objectives, self.experiment)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that decides the trials and their results."""
        sweep = to_tree(self.sweep)
        for free in ("budget", "max_failures", "max_concurrent"):
            del sweep[free]
        return {"experiment": self.experiment.identity, "sweep": {**sweep, "space": self.space}}

    @property
    def signature(self) -> str:
        """12 hex digits that two plans share exactly if they describe the same trials."""
        return signature(self.identity)

    def tree(self) -> dict[str, Any]:
        """What study.yaml holds."""
        return {
            "format": FORMAT,
            "name": self.name,
            "signature": self.signature,
            "experiment": to_tree(self.experiment),
            "sweep": {**to_tree(self.sweep), "space": json.loads(json.dumps(self.space))},
            "tracking": to_tree(self.tracking),
        }


def plan_from(tree: Mapping[str, Any]) -> Plan:
    """The inverse of `Plan.tree`.

    Raises:
        UserError: something in it is wrong.
    """
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
    )


def require_name(name: str) -> None:
    """Check the name of a study.

    Raises:
        UserError: it could not be the name of a folder and of a run.
    """
    if not _NAME.fullmatch(name) or ".." in name:
        shown = name if len(name) <= 60 else name[:60] + "..."
        raise UserError(
            f"The study's name is {shown!r}: it must be 1 to 100 letters, digits, dots, dashes or underscores."
        )


_OWN_METRICS = ("score", "num_steps", "seconds")


def keys_of(experiment: ExperimentConfig) -> list[str]:
    """The keys of every score of a finished run, the one by which runs are compared first."""
    return [key.name for key in sorted(experiment.score_keys(), key=lambda key: not key.primary)]


def resolved_objectives(
    objectives: Sequence[ObjectiveConfig], experiment: ExperimentConfig
) -> tuple[ObjectiveConfig, ...]:
    """The objectives of a study with the direction of their metric where they name none."""
    keys = experiment.score_keys()
    known = {key.name: key.direction for key in keys} | {"score": primary_key(keys).direction}
    return tuple(
        replace(objective, direction=objective.direction or known.get(objective.metric, MINIMIZE))
        for objective in objectives
    )


def metrics_of(experiment: ExperimentConfig) -> list[str]:
    """Every metric that an objective may name."""
    return [*_OWN_METRICS, *keys_of(experiment)]


def fidelity_keys(experiment: ExperimentConfig) -> list[str]:
    """Precision and recall, which tables show beside the score; none where the data has neither."""
    return [key for key in keys_of(experiment) if key.startswith(("eval/precision_", "eval/recall_"))]


def require_metric(where: str, metric: str, known: Sequence[str]) -> None:
    """Check what a plan calls a metric, at `where`.

    Raises:
        UserError: it is none of those that are known.
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
            f"sweep.stopping.rule is {sweep.stopping.rule!r}, which follows the curve of the score: the objective must "
            f"then be score, and be {own.direction}d."
        )
