"""The config of a run, from which everything is built. Nothing here imports PyTorch."""

import math
import re
from dataclasses import dataclass, field
from typing import Any

from dxmi.algorithms.configs import AlgorithmConfig, DDPMConfig, DxMIConfig
from dxmi.algorithms.registry import ALGORITHMS
from dxmi.config import NO_RESULT, RESULT, delta, require_choice, signature
from dxmi.data.configs import DataConfig, DigitsConfig, PromptsConfig
from dxmi.data.registry import DATA_SETS
from dxmi.diffusion.schedules.configs import ScheduleConfig, VarScheduleConfig
from dxmi.diffusion.schedules.registry import SCHEDULES
from dxmi.evaluation.config import INCEPTION, PRECISIONS, EvaluateConfig, features_of
from dxmi.metrics.keys import (
    HELD_OUT_REWARD_KEY,
    KL_KEY,
    REWARD_KEY,
    ScoreKey,
    classifier_keys,
    inception_keys,
    planar_keys,
    primary_key,
    with_primary,
)
from dxmi.networks.configs import MlpConfig, NetworkConfig
from dxmi.networks.registry import CRITICS, DENOISERS, TIMED_CRITICS
from dxmi.persistence.files import PLACE
from dxmi.registry import chosen_from
from dxmi.rewards.configs import RewardConfig
from dxmi.rewards.registry import REWARDS

_MAX_THREADS = _MAX_WORKERS = _MAX_STACK = 1024
SCHEMA = 2
"""Version of the defaults and of the names of settings. It is increased when the meaning of a default changes or a
setting is renamed; `dxmi.training.schema` then reads the older configs."""
CHECKPOINTS = ("best", "last")
"""The checkpoints of a run that can be loaded by name."""
EXPORT_FORMATS = ("diffusers",)


@dataclass(frozen=True, kw_only=True)
class NetworksConfig:
    """The networks of a run."""

    denoiser: NetworkConfig = field(default_factory=MlpConfig, metadata=chosen_from(DENOISERS))
    """Denoiser of the policy."""
    energy: NetworkConfig = field(default_factory=MlpConfig, metadata=chosen_from(CRITICS))
    """Network of the energy, and of the value if it is shared."""
    value: NetworkConfig = field(default_factory=MlpConfig, metadata=chosen_from(TIMED_CRITICS))
    """Network of a separate value; unused if the value is shared."""

    def __post_init__(self) -> None:
        for role, registry in (("denoiser", DENOISERS), ("energy", CRITICS), ("value", TIMED_CRITICS)):
            if getattr(self, role).kind not in registry.kinds():
                raise ValueError(registry.refusal(f"{role}.kind", getattr(self, role).kind))
        for role in ("energy", "value"):
            classes = getattr(self, role).classes
            if classes not in (0, self.denoiser.classes):
                raise ValueError(
                    f"{role}.classes is {classes}: it must be 0, or as many as the denoiser's {self.denoiser.classes}"
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Settings of the fine-tuning."""

    iterations: int = 1_500
    """Number of iterations of the algorithm."""
    batch_size: int = 128
    """B: number of data samples and of trajectories in each iteration."""
    log_every: int = 50
    """Number of iterations that are averaged to one logged row."""
    precision: str = "float32"
    """Precision of the networks in training: float32 or bfloat16. Weights, losses and scores are always float32."""

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations is {self.iterations}: it must be 0 or greater")
        require_choice("precision", self.precision, PRECISIONS)
        for name in ("batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """Resources of a run, which are not part of the signature.

    They change results only by rounding, except that another kind of device draws other random numbers.
    """

    device: str = "auto"
    """Device: auto (a GPU if there is one), cpu, cuda or cuda:N."""
    threads: int = 0
    """CPU threads of PyTorch; 0 for all available CPUs (in a sweep: 1 per worker, or on GPUs an equal share)."""
    gpus: float = 1.0
    """Share of a GPU that each worker of a sweep gets, if there are GPUs: with 0.25, four workers share one GPU."""
    num_workers: int = 1
    """Processes that share each batch of a run."""
    accumulate: int = 1
    """Number of micro-batches into which a worker divides its part of a batch, to save memory."""
    compile: bool = False
    """Compile the networks with torch.compile, which takes some minutes at the start of a process."""
    cuda_graphs: bool = False
    """On a GPU, record an iteration as a CUDA graph and replay it, so that the host does not launch each kernel. With
    several workers, or an algorithm that needs the host within an iteration, only the rollout is recorded."""
    deterministic: bool = True
    """On a GPU, use only deterministic kernels, so that a resumed run has the same result as an uninterrupted one."""
    stack_seeds: int | None = None
    """In an ablation, number of seeds of an arm that one program trains; null for the number that is measured to be
    the fastest."""
    allow_code: bool = False
    """Execute a Python file of the current folder that the config names, see reward=function."""
    worker_timeout: float = 1800.0
    """Seconds after which a worker that does not respond is considered to hang, and the workers are restarted."""
    max_restarts: int = 3
    """Maximum number of restarts of a run's workers, from its last checkpoint, after a worker is lost."""
    storage_path: str | None = field(default=None, metadata=PLACE)
    """Where runs and studies are stored if the nodes do not share a file system: a URI like s3://bucket/studies, or a
    path."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"auto|cpu|cuda(:[0-9]{1,3})?", self.device):
            raise ValueError(f"device is {self.device!r}: it must be auto, cpu, cuda or cuda:N")
        if not 0 <= self.threads <= _MAX_THREADS:
            raise ValueError(f"threads is {self.threads}: it must be in 0..{_MAX_THREADS}")
        if not (0.01 <= self.gpus <= 1.0 or (1.0 < self.gpus < math.inf and self.gpus == int(self.gpus))):
            raise ValueError(f"gpus is {self.gpus}: it must be in 0.01..1, or a whole number")
        if not 1 <= self.num_workers <= _MAX_WORKERS:
            raise ValueError(f"num_workers is {self.num_workers}: it must be in 1..{_MAX_WORKERS}")
        if self.num_workers > 1 and self.gpus != 1.0:
            raise ValueError(f"gpus is {self.gpus}, but each of several workers takes one whole GPU: make it 1")
        if self.accumulate < 1:
            raise ValueError(f"accumulate is {self.accumulate}: it must be at least 1")
        self._check_stack()
        if not 1.0 <= self.worker_timeout < math.inf:
            raise ValueError(f"worker_timeout is {self.worker_timeout}: it must be at least 1 second")
        if self.max_restarts < 0:
            raise ValueError(f"max_restarts is {self.max_restarts}: it must be 0 or greater")

    def _check_stack(self) -> None:
        stack = self.stack_seeds
        if stack is None or stack == 1:
            return
        if not 1 <= stack <= _MAX_STACK:
            raise ValueError(f"stack_seeds is {stack}: it must be in 1..{_MAX_STACK}, or null")
        for name in ("num_workers", "accumulate"):
            if getattr(self, name) > 1:
                raise ValueError(
                    f"stack_seeds is {stack} and {name} is {getattr(self, name)}: stacked seeds are trained by one "
                    f"process without micro-batches, so make one of the two 1"
                )
        if self.compile:
            raise ValueError(
                f"stack_seeds is {stack} and compile is true: stacked seeds cannot be compiled, so make compile false "
                "or stack_seeds 1"
            )

    @property
    def can_stack_seeds(self) -> bool:
        """Whether the settings allow several seeds to be trained in one program."""
        return self.num_workers == self.accumulate == 1 and not self.compile


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """The config of a run. Its identity consists of the settings that differ from the defaults."""

    name: str = "digits"
    """Human-readable name of the experiment."""
    seed: int = 0
    """Seed of initial weights, data order and noise."""
    data: DataConfig = field(default_factory=DigitsConfig, metadata=chosen_from(DATA_SETS))
    prompts: PromptsConfig = field(default_factory=PromptsConfig)
    network: NetworksConfig = field(default_factory=NetworksConfig)
    pretrain: DDPMConfig = field(default_factory=DDPMConfig)
    schedule: ScheduleConfig = field(default_factory=VarScheduleConfig, metadata=chosen_from(SCHEDULES))
    algorithm: AlgorithmConfig = field(default_factory=DxMIConfig, metadata=chosen_from(ALGORITHMS))
    reward: RewardConfig | None = field(default=None, metadata=chosen_from(REWARDS))
    """Reward of samples, which the algorithm maximizes or the evaluation reports; null for none."""
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig, metadata=NO_RESULT)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", self.name):
            raise ValueError(f"name is {self.name!r}: it must be 1 to 100 letters, digits, dots, dashes or underscores")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: it must be in 0..2^63 - 1")
        for name in ("kappa", "final_sigma"):  # the log density and the entropy of a step need a sigma
            if getattr(self.schedule, name) == 0.0:
                raise ValueError(f"schedule.{name} is 0: a policy needs noise in every step, so make it greater than 0")
        try:
            self.algorithm.check(self.schedule.num_steps)
        except ValueError as error:
            raise ValueError(f"algorithm.{error}") from error
        self._check_teacher()
        self._check_prompts()
        if self.algorithm.needs_reward and self.reward is None:
            raise ValueError(
                f"reward is null, but algorithm.kind is {self.algorithm.kind}, which maximizes one: it must be one of "
                f"{', '.join(REWARDS.kinds())}"
            )
        try:
            self.score_keys()
        except ValueError as error:
            raise ValueError(f"evaluate.{error}") from error

    def _check_teacher(self) -> None:
        if self.pretrain.teacher is None and self.algorithm.needs_teacher:
            raise ValueError(
                "algorithm.teacher_energy is true, but pretrain.teacher is null: name the run whose energy it is"
            )

    def _check_prompts(self) -> None:
        if not self.prompts.are_given:
            return
        if not self.algorithm.needs_reward:
            raise ValueError(
                f"prompts are given, but algorithm.kind is {self.algorithm.kind}, which learns from the data and their "
                "classes: choose an algorithm that maximizes a reward, or leave them out"
            )
        if self.network.denoiser.classes == 0:
            raise ValueError(
                "prompts are given, but network.denoiser.classes is 0: make it the number of classes of the data"
            )

    def score_keys(self) -> list[ScoreKey]:
        """The keys of all scores of a finished run, one of which is primary.

        Raises:
            ValueError: `evaluate.primary` or `evaluate.constraint` is not one of them.
        """
        keys = self._distance_keys()
        primary = self.evaluate.primary or primary_key(keys).name
        if self.reward is not None:
            keys.append(REWARD_KEY)
            if self.prompts.held_out:
                keys.append(HELD_OUT_REWARD_KEY)
            if self.algorithm.needs_reward and self.evaluate.primary is None:
                primary = REWARD_KEY.name
        if self.algorithm.needs_reward:
            keys.append(KL_KEY)
        for metric in self.evaluate.metrics or ():
            keys += metric.keys()
        self._check_constraint()
        return with_primary(keys, primary)

    def _check_constraint(self) -> None:
        """Check that the score of the constraint is computed for every checkpoint.

        Raises:
            ValueError: it is not.
        """
        computed = [primary_key(self._distance_keys()), *([] if self.reward is None else [REWARD_KEY])]
        for metric in self.evaluate.metrics or ():
            computed += metric.keys()
        names = [key.name for key in computed]
        if self.evaluate.constraint not in (None, *names):
            raise ValueError(
                f"constraint is {self.evaluate.constraint!r}, which is not a score of every checkpoint: it must be one "
                f"of {', '.join(names)}, or null"
            )

    def _distance_keys(self) -> list[ScoreKey]:
        """The keys of the scores that compare samples with the data."""
        if self.data.is_planar:
            return planar_keys()
        if features_of(self.data.kind, self.evaluate) == INCEPTION:
            return inception_keys(self.evaluate.num_samples)
        return classifier_keys(self.data.kind)

    @property
    def signature(self) -> str:
        """12 hex digits, equal for two configs if and only if they describe the same run."""
        return signature(self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything that determines the run, as a tree: the settings that differ from the defaults, and the schema."""
        return {"schema": SCHEMA, **delta(self, RESULT)}
