"""Settings of a sweep: objectives, sampler, early stopping, budget, and tracking.

They are read from configs/sweep/NAME.yaml (or any .yaml file given by `sweep=`), together with the search space, see
`tune.search.space`.
"""

import math
from dataclasses import dataclass, field
from urllib.parse import unquote, urlsplit

from dxmi.config import NO_RESULT, require_choice
from dxmi.metrics.keys import DIRECTIONS, MINIMIZE, sign_of
from dxmi.persistence.files import PLACE

SAMPLERS = ("tpe", "sobol", "random", "grid", "nsga2")
RULES = ("none", "asha", "median")
KINDS = ("log_uniform", "uniform", "integer", "choice")
"""Kinds of search dimensions, see `tune.search.space`."""
_SEEDS = 2**32
_MOST_SEEDS = 64


@dataclass(frozen=True, kw_only=True)
class ObjectiveConfig:
    """A metric by which trials are compared."""

    metric: str = "score"
    """score: the experiment's own metric (eval/fid_X, or eval/sliced_wasserstein for planar data) of the best
    checkpoint on fresh noise; any other eval/... key; pretrained: the score of the pretrained model's best
    training-free sampler, for sweeps over pretrain.*; last: the score of the last checkpoint; num_steps: network
    evaluations per sample; seconds: time of fine-tuning."""
    direction: str | None = None
    """minimize or maximize; null for the metric's own direction."""

    def __post_init__(self) -> None:
        require_choice("direction", self.direction, DIRECTIONS, or_null=True)

    @property
    def sign(self) -> float:
        """1 if lower is better, else -1; the direction must be set, see `Plan.objectives`."""
        return sign_of(self.direction or MINIMIZE)


@dataclass(frozen=True, kw_only=True)
class SamplerConfig:
    """The algorithm that proposes trials."""

    kind: str = "tpe"
    """tpe, sobol, random, grid, or nsga2 for two objectives."""
    seed: int = 0
    """Seed of the proposals: with equal seeds and equal earlier results, trial n is the same."""
    startup_trials: int = 10
    """tpe: number of random trials before the model is used; nsga2: the population size."""
    start_with_defaults: bool = True
    """Whether trial 0 uses the experiment's own values, if the space contains them."""

    def __post_init__(self) -> None:
        require_choice("kind", self.kind, SAMPLERS)
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"seed is {self.seed}: it must be in 0..2^32 - 1")
        smallest = 2 if self.kind == "nsga2" else 1
        if self.startup_trials < smallest:
            raise ValueError(f"startup_trials is {self.startup_trials}: it must be at least {smallest}")


@dataclass(frozen=True, kw_only=True)
class StoppingConfig:
    """Early stopping of unpromising trials."""

    rule: str = "none"
    """none; asha: at each rung only the best 1/factor continue; median: stop trials worse than the median of the
    finished trials."""
    first_step: int = 100
    """asha: iteration of the first rung; median: iteration before which no trial is stopped."""
    factor: int = 3
    """asha: rungs are at first_step x factor^k, and the best 1/factor continue."""
    min_trials: int = 3
    """median: number of finished trials required before any trial is stopped."""
    spare_first: bool = False
    """Never stop trial 0, which has the experiment's own values, so that the others can be compared with it."""

    def __post_init__(self) -> None:
        require_choice("rule", self.rule, RULES)
        for name, smallest in (("first_step", 1), ("factor", 2), ("min_trials", 1)):
            if getattr(self, name) < smallest:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {smallest}")


@dataclass(frozen=True, kw_only=True)
class LimitsConfig:
    """Limits that end a study before its last trial. The first one reached applies: running trials save and return."""

    wall_minutes: float | None = None
    """Wall time of the study over all its sessions."""
    device_hours: float | None = None
    """Total hours of all trials, each multiplied by its GPUs (or its CPU threads if it uses no GPU)."""
    failed_trials: int | None = None
    """Number of trials that failed or diverged."""
    trial_minutes: float | None = None
    """Wall time of one trial in one session; stops only that trial."""
    disk_gb: float = 100.0
    """Size of the study's trials in 10^9 bytes; each keeps its best and its last checkpoint, which are not deleted."""

    def __post_init__(self) -> None:
        if self.failed_trials is not None and self.failed_trials < 1:
            raise ValueError(f"failed_trials is {self.failed_trials}: it must be at least 1")
        for name in ("wall_minutes", "device_hours", "trial_minutes", "disk_gb"):
            limit = getattr(self, name)
            if limit is not None and not (math.isfinite(limit) and limit > 0.0):
                raise ValueError(f"{name} is {limit}: it must be a finite number above 0")


@dataclass(frozen=True, kw_only=True)
class BudgetConfig(LimitsConfig):
    """Number of trials and limits of a sweep."""

    trials: int = 20
    """Number of trials, including those that are stopped or fail."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.trials < 1:
            raise ValueError(f"trials is {self.trials}: it must be at least 1")


def require_attempts(max_failures: int, max_concurrent: int | None) -> None:
    """Check the numbers of restarts and of concurrent trials.

    Raises:
        ValueError: one of them is out of range.
    """
    if max_failures < 0:
        raise ValueError(f"max_failures is {max_failures}: it must be 0 or greater")
    if max_concurrent is not None and max_concurrent < 1:
        raise ValueError(f"max_concurrent is {max_concurrent}: it must be at least 1, or null")


@dataclass(frozen=True, kw_only=True)
class SweepConfig:
    """Settings of a sweep, except for its search space.

    All fields except `budget`, `max_failures` and `max_concurrent` are part of the study's signature.
    """

    objectives: tuple[ObjectiveConfig, ...] = (ObjectiveConfig(),)
    """One objective, or two for a Pareto front; the first one ranks the leaderboard."""
    seeds: int = 1
    """Number of seeds of each trial, from the experiment's own on. They are trained in one program; the trial's score
    is their mean, by which it is also stopped early."""
    sampler: SamplerConfig = field(default_factory=SamplerConfig)
    stopping: StoppingConfig = field(default_factory=StoppingConfig)
    budget: BudgetConfig = field(default_factory=BudgetConfig, metadata=NO_RESULT)
    max_failures: int = field(default=2, metadata=NO_RESULT)
    """Number of times a crashed trial is restarted."""
    max_concurrent: int | None = field(default=None, metadata=NO_RESULT)
    """Maximum number of trials at once; null for as many as the devices allow."""

    def __post_init__(self) -> None:
        if not 1 <= self.seeds <= _MOST_SEEDS:
            raise ValueError(f"seeds is {self.seeds}: it must be in 1..{_MOST_SEEDS}")
        if len(self.objectives) > 2:
            raise ValueError(f"objectives has {len(self.objectives)} entries: it takes one or two")
        if len({objective.metric for objective in self.objectives}) < len(self.objectives):
            raise ValueError("objectives names one metric twice: keep one")
        if len(self.objectives) == 2 and self.stopping.rule != "none":
            raise ValueError(f"stopping.rule is {self.stopping.rule!r}: with two objectives it must be none")
        if (self.sampler.kind == "nsga2") != (len(self.objectives) == 2) and self.sampler.kind in ("nsga2", "tpe"):
            raise ValueError(f"sampler.kind is {self.sampler.kind!r}: nsga2 requires two objectives, tpe requires one")
        require_attempts(self.max_failures, self.max_concurrent)


def _is_server(uri: str) -> bool:
    try:
        parts = urlsplit(uri)
        return parts.scheme in ("http", "https") and bool(parts.hostname) and parts.port != 0
    except ValueError:  # malformed brackets or port
        return False


@dataclass(frozen=True, kw_only=True)
class TrackingConfig:
    """Where the study is recorded in MLflow."""

    uri: str = field(default="local", metadata=PLACE)
    """local: an SQLite file in the folder of the studies; http(s)://...: an MLflow server; none: not recorded."""
    experiment: str = "dxmi"
    """Name of the MLflow experiment that holds the studies."""
    patience_seconds: float = 60.0
    """Seconds for which a sweep waits at its end for an unreachable server; a resume delivers the remaining records."""

    def __post_init__(self) -> None:
        if set("@?#") & set(unquote(self.uri)):  # first, since the next sentence repeats it
            raise ValueError(
                "uri contains a user name, a password or a query: set MLFLOW_TRACKING_USERNAME and "
                "MLFLOW_TRACKING_PASSWORD, or MLFLOW_TRACKING_TOKEN, instead"
            )
        if self.uri not in ("local", "none") and not _is_server(self.uri):
            raise ValueError(f"uri is {self.uri!r}: it must be local, none, or http://host:port of an MLflow server")
        if not self.experiment.strip() or not self.experiment.isprintable():
            raise ValueError(f"experiment is {self.experiment!r}: it must be a printable name")
        if not (math.isfinite(self.patience_seconds) and self.patience_seconds >= 0.0):
            raise ValueError(f"patience_seconds is {self.patience_seconds}: it must be a finite number, 0 or greater")
