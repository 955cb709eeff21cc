"""From a config tree to built objects."""

import math
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dxmi.algorithms.ddpm import DDPM, DDPMConfig
from dxmi.algorithms.dxmi import DxMI, DxMIConfig, per_step_numbers
from dxmi.config import signature, to_tree
from dxmi.critics.energy import Energy
from dxmi.critics.value import SeparateValue, SharedValue, Value
from dxmi.data import BatchStream, DataConfig, Dataset, data_root, load
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules import ScheduleConfig, StepSchedule, forward_betas, noising, shorten
from dxmi.distributed import ALONE, Workers
from dxmi.errors import UserError
from dxmi.evaluation.sampling import EvaluateConfig
from dxmi.machine import available_cpus
from dxmi.networks import (
    Critic,
    Denoiser,
    MlpConfig,
    NetworkConfig,
    TimedCritic,
    build_critic,
    build_denoiser,
    build_timed_critic,
    kinds,
)
from dxmi.networks.pretrained.diffusers_folder import require_same_model, require_same_noise, scheduler_of_folder
from dxmi.networks.pretrained.layouts import DIFFUSERS_MARK, digest, load_public, public_log_sigma
from dxmi.networks.pretrained.public_files import PublicWeights, read_public
from dxmi.persistence.cache import cache_root
from dxmi.persistence.checkpoint import Checkpoint
from dxmi.persistence.files import PLACE, require_target, user_path
from dxmi.seeds import generator
from dxmi.training.state import TrainingState

_MAX_THREADS = _MAX_WORKERS = _MAX_STACK = 1024
_OF_ONE = {"compile": "compiled", "cuda_graphs": "recorded"}
PRECISIONS = ("float32", "bfloat16")
PRETRAINING_VERSION = 2
"""Raised whenever a change of the code changes what pretraining computes, so that old results are not read."""


@dataclass(frozen=True, kw_only=True)
class NetworksConfig:
    """The networks of a run."""

    denoiser: NetworkConfig = field(default_factory=MlpConfig)
    """The policy's."""
    energy: NetworkConfig = field(default_factory=MlpConfig)
    """The energy's, and the value's too when it is shared."""
    value: NetworkConfig = field(default_factory=MlpConfig)
    """A separate value's; unused when the value is shared."""

    def __post_init__(self) -> None:
        for role in ("denoiser", "energy", "value"):
            kind = getattr(self, role).kind
            if kind not in kinds(role):
                raise ValueError(f"{role}.kind is {kind!r}: it must be one of {', '.join(kinds(role))}")
        for role in ("energy", "value"):
            classes = getattr(self, role).classes
            if classes not in (0, self.denoiser.classes):
                raise ValueError(
                    f"{role}.classes is {classes}: it must be 0, or as many as the denoiser's {self.denoiser.classes}"
                )


@dataclass(frozen=True, kw_only=True)
class TrainConfig:
    """Fine-tuning."""

    iterations: int = 1_500
    """DxMI iterations."""
    batch_size: int = 128
    """B: data and trajectories in each."""
    log_every: int = 50
    """Iterations whose mean is one logged row."""
    precision: str = "float32"
    """Of the networks' arithmetic in training: float32 or bfloat16. Weights, losses and scores are float32 always."""

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations is {self.iterations}: it must be 0 or greater")
        if self.precision not in PRECISIONS:
            raise ValueError(f"precision is {self.precision!r}: it must be one of {', '.join(PRECISIONS)}")
        for name in ("batch_size", "log_every"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")


@dataclass(frozen=True, kw_only=True)
class ResourcesConfig:
    """What a run may use. It changes no result beyond rounding and does not enter the signature."""

    device: str = "auto"
    """auto (a GPU if there is one), cpu, cuda or cuda:N."""
    threads: int = 0
    """CPU threads of PyTorch; 0 for as many as this process may run on (in a sweep: one for each trial)."""
    gpus: float = 1.0
    """In a sweep, each worker's share of a GPU if there is one: 0.25 puts four of them on it."""
    num_workers: int = 1
    """Processes that share each batch of a run."""
    accumulate: int = 1
    """Pieces in which a worker takes its share of an update, one after the other, to save memory."""
    compile: bool = False
    """Compile the networks by torch.compile: some minutes at the start of a process."""
    cuda_graphs: bool = False
    """On a GPU, record the rollout once and replay it, so that the host does not launch each of its kernels."""
    deterministic: bool = True
    """On a GPU, use only kernels that give the same bits every time, so that a resumed run ends as it would have."""
    stack_seeds: int | None = None
    """In an ablation, seeds of an arm that are trained in one program; null for what a measurement finds fastest."""
    worker_timeout: float = 1800.0
    """Seconds after which a worker that does not answer the others counts as hung, and the group starts again."""
    max_restarts: int = 3
    """How often the workers of a run are started again, from its last checkpoint, after one of them was lost."""
    storage_path: str | None = field(default=None, metadata=PLACE)
    """Where runs and studies are kept if the nodes share no file system: a URI like s3://bucket/studies, or a path."""

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
                    f"process in one piece, so make one of the two 1"
                )
        for name in ("compile", "cuda_graphs"):
            if getattr(self, name):
                raise ValueError(f"stack_seeds is {stack} and {name} is true: stacked seeds are not {_OF_ONE[name]}")

    @property
    def can_stack_seeds(self) -> bool:
        """Whether nothing that is asked for stands against training several seeds in one program."""
        return self.num_workers == self.accumulate == 1 and not (self.compile or self.cuda_graphs)


@dataclass(frozen=True, kw_only=True)
class ExperimentConfig:
    """The whole of a run. Everything but `resources` and `data.accept_unknown_files` enters its signature."""

    name: str = "digits"
    """Of the experiment, for people."""
    seed: int = 0
    """Of initial weights, data order and noise."""
    data: DataConfig = field(default_factory=DataConfig)
    network: NetworksConfig = field(default_factory=NetworksConfig)
    pretrain: DDPMConfig = field(default_factory=DDPMConfig)
    schedule: ScheduleConfig = field(default_factory=ScheduleConfig)
    algorithm: DxMIConfig = field(default_factory=DxMIConfig)
    train: TrainConfig = field(default_factory=TrainConfig)
    evaluate: EvaluateConfig = field(default_factory=EvaluateConfig)
    resources: ResourcesConfig = field(default_factory=ResourcesConfig)

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,99}", self.name):
            raise ValueError(f"name is {self.name!r}: it must be 1 to 100 letters, digits, dots, dashes or underscores")
        if not 0 <= self.seed < 2**63:
            raise ValueError(f"seed is {self.seed}: it must be in 0..2^63 - 1")
        for name in ("kappa", "final_sigma"):  # the log density and the entropy of a step need a sigma
            if getattr(self.schedule, name) == 0.0:
                raise ValueError(f"schedule.{name} is 0: a policy needs noise in every step, so make it greater than 0")
        try:
            shorten(self.schedule)
        except ValueError as error:
            raise ValueError(f"schedule.{error}") from error
        try:
            for name in ("reference_var", "value_mask", "policy_mask"):
                per_step_numbers(name, getattr(self.algorithm, name) or (1.0,), self.schedule.num_steps)
        except ValueError as error:
            raise ValueError(f"algorithm.{error}") from error

    @property
    def signature(self) -> str:
        """12 hex digits that two configs share exactly if they describe the same run."""
        return signature(self.identity)

    @property
    def identity(self) -> dict[str, Any]:
        """Everything of a config that decides its run, as a tree.

        All but `resources`, and but for the permission to take unknown files: those are in the signature of the data.
        """
        tree = to_tree(self)
        del tree["resources"], tree["data"]["accept_unknown_files"]
        return tree


def require_signature(saved: Checkpoint, config: ExperimentConfig) -> None:
    """Check that a checkpoint was written under `config`.

    Raises:
        UserError: it was not; somebody has edited config.yaml.
    """
    written = saved.meta.get("signature")
    if written != config.signature:
        raise UserError(
            f"Checkpoint {saved.path} was written under another config (signature {written}) than config.yaml's "
            f"({config.signature}): restore that file."
        )


class Experiment:
    """A config with its data loaded, and what is built from both.

    Args:
        config: the whole of a run.
        event: shape of one sample, if it is known without reading the data.
        workers: share the work of the run.
        class_counts: samples of each class that the denoiser knows, if they are known without reading the data.

    Raises:
        UserError: the device is not there.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        event: tuple[int, ...] | None = None,
        workers: Workers = ALONE,
        class_counts: Sequence[int] | None = None,
    ) -> None:
        self.config = config
        self.workers = workers
        self.device = _device(config.resources.device)
        self._event = event
        self._class_counts = class_counts

    @cached_property
    def data(self) -> Dataset:
        """The data, read or drawn when first asked for.

        Raises:
            UserError: it cannot be read.
        """
        return load(self.config.data)

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W) of an image or (2,) of a point."""
        return self._event or self.data.event

    @property
    def class_counts(self) -> Tensor | None:
        """Samples of each class that the denoiser knows, which is how often its samples are of each, int64 [C].

        None if it knows none, or the data are not to be read.

        Raises:
            UserError: the data have no classes, or more than the denoiser knows.
        """
        classes = self.config.network.denoiser.classes
        if classes == 0:
            return None
        if self._class_counts is not None:
            return torch.tensor(self._class_counts)
        return None if self._event is not None else torch.bincount(self._labels(), minlength=classes)

    def use_threads(self) -> int:
        """Set PyTorch's CPU threads as `resources.threads` says; returns how many."""
        threads = self.config.resources.threads or available_cpus()
        torch.set_num_threads(threads)
        return threads

    def choose_kernels(self) -> None:
        """On a GPU, let PyTorch use the kernels that `resources.deterministic` says; those of a CPU have the same bits.

        PyTorch then refuses what has no such kernel. Of the networks here, convolutions and attention have several.
        """
        if self.device.type == "cuda":
            torch.use_deterministic_algorithms(self.config.resources.deterministic)
            # Nothing here reads what was not written.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def precision(self) -> torch.autocast:
        """The context in which updates are computed.

        Weights are cast anew in each evaluation of a network, since the optimisers change them in between.
        """
        enabled = self.config.train.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)

    @property
    def pretraining_signature(self) -> str:
        """Of everything that the pretrained denoiser depends on."""
        return signature({"version": PRETRAINING_VERSION, "torch": torch.__version__, **self._pretraining_tree()})

    def _pretraining_tree(self) -> dict[str, Any]:
        config = self.config
        tree: dict[str, Any] = {
            "seed": config.seed,
            "data": self.data.signature,
            "network": to_tree(config.network.denoiser),
            "pretrain": to_tree(config.pretrain),
        }
        if config.data.flip:
            tree["flip"] = True
        if config.train.precision != "float32":
            tree["precision"] = config.train.precision
        if config.schedule.family != "ddpm":
            tree["family"] = config.schedule.family
        if config.pretrain.weights is not None:
            tree["pretrain"] = {**tree["pretrain"], "weights": self.weights_signature}
        return tree

    # ------------------------------------------------------------------------
    # Building. Every random stream has a name; see dxmi.seeds.

    def _weights(self, name: str) -> torch.Generator:
        return generator(self.config.seed, f"weights/{name}")

    def build_denoiser(self) -> Denoiser:
        """An untrained denoiser on the device."""
        config = self.config.network.denoiser
        return build_denoiser(config, self.event, self._weights("denoiser")).to(self.device)

    @cached_property
    def public_weights(self) -> PublicWeights:
        """The tensors of `pretrain.weights`, by their public names.

        Raises:
            UserError: they are neither here nor in the folder of the data, or cannot be read.
        """
        given = user_path(self.config.pretrain.weights or "", "pretrain.weights")
        places = dict.fromkeys((given, data_root() / given))
        found = next((place for place in places if place.exists()), None)
        if found is None:
            for place in places:
                require_target(place, "pretrain.weights")
            raise UserError(
                f"pretrain.weights is {given}, but there is no {' and no '.join(str(place) for place in places)}. "
                "Fetch the checkpoint, or start without one: pretrain.weights=null pretrain.iterations=100000."
            )
        return read_public(found)

    def _load_public(self, network: Denoiser) -> None:
        weights = self.public_weights
        try:
            load_public(network, weights.tensors)
        except UserError as error:
            place = f" (from {weights.taken})" if weights.taken else ""
            seen = f" The file holds {weights.keys}." if weights.keys else ""
            raise UserError(f"pretrain.weights is {self.config.pretrain.weights}{place}. {error}{seen}") from error

    def inputs(self) -> dict[str, str]:
        """Signatures of what the run reads beside its config: `data`, and `weights` where there are public ones.

        Raises:
            UserError: one of them cannot be read.
        """
        inputs = {"data": self.data.signature}
        return inputs if self.config.pretrain.weights is None else {**inputs, "weights": self.weights_signature}

    @cached_property
    def weights_signature(self) -> str:
        """Of the tensors of `pretrain.weights`."""
        return digest(self.public_weights.tensors)

    def check_public(self, network: Denoiser) -> list[str]:
        """Compare what lies beside `pretrain.weights` with the network and the schedule of the run.

        Returns:
            Sentences for the user: what was taken of the file, and what could not be compared.

        Raises:
            UserError: a config.json or scheduler_config.json of diffusers describes another model.
        """
        weights = self.public_weights
        notes = [f"pretrain.weights: {weights.note}"] if weights.note else []
        if weights.folder is None:
            if DIFFUSERS_MARK in weights.tensors:
                notes.append(f"pretrain.weights: beside {weights.path} is no config.json to compare the network with.")
            return notes
        require_same_model(weights.folder, network, self.event)
        scheduler = scheduler_of_folder(weights.folder)
        if scheduler is None:
            assumed = "taken as a model that predicts the noise, trained on DDPM's linear betas"
            return [*notes, f"pretrain.weights: {weights.path} has no scheduler_config.json: {assumed}."]
        require_same_noise(scheduler, self.config.schedule.family, forward_betas())
        return notes

    def build_pretraining(self) -> tuple[DDPM, TrainingState]:
        """Pretraining at its start."""
        config = self.config
        network, accumulate = self.build_denoiser(), config.resources.accumulate
        if config.pretrain.weights is not None:
            self._load_public(network)
        ddpm = DDPM(config.pretrain, network, self.workers, accumulate, noising(config.schedule)).to(self.device)
        self._compile(ddpm)
        noise = generator(config.seed, "pretrain/noise", self.device)
        stream = self._stream(config.pretrain.batch_size, "pretrain/data")
        return ddpm, TrainingState(ddpm, ddpm.optimizers, {"noise": noise}, stream)

    def build_policy(self, denoiser: Denoiser, schedule: StepSchedule, kind: type[Policy] = Policy) -> Policy:
        """A sampler of `schedule` around a denoiser."""
        policy = kind(denoiser, schedule, self.event)
        policy.draw_classes(self.class_counts)
        return policy.to(self.device)

    def build_value(self) -> Value:
        """An untrained value with its energy."""
        config, event = self.config, self.event
        energy = Energy(build_critic(config.network.energy, event, self._weights("energy")))
        if config.algorithm.value == "shared":
            return SharedValue(energy).to(self.device)
        network = build_timed_critic(config.network.value, event, self._weights("value"))
        return SeparateValue(energy, network, config.schedule.num_steps).to(self.device)

    def build_dxmi(self, denoiser: Denoiser) -> DxMI:
        """The algorithm at its start, from a pretrained denoiser, which it changes."""
        config = self.config
        schedule = shorten(config.schedule)
        policy = self.build_policy(denoiser, schedule)
        eta = torch.from_numpy(schedule.eta)
        return DxMI(
            config.algorithm,
            policy,
            self.build_value(),
            eta,
            config.train.iterations,
            workers=self.workers,
            accumulate=config.resources.accumulate,
            graphed=self._graphed(),
        ).to(self.device)

    def build_finetuning(self, denoiser: Denoiser) -> tuple[DxMI, TrainingState]:
        """Fine-tuning at its start: the algorithm, and all that changes while it runs."""
        config, dxmi = self.config, self.build_dxmi(denoiser)
        self._compile(dxmi)
        if config.pretrain.weights is not None:
            dxmi.start_from(public_log_sigma(self.public_weights.tensors))
        generators = {
            "noise": generator(config.seed, "finetune/noise", self.device),
            "states": generator(config.seed, "finetune/states"),
        }
        stream = self._stream(config.train.batch_size, "finetune/data")
        return dxmi, TrainingState(dxmi, dxmi.optimizers, generators, stream)

    def _graphed(self) -> bool:
        graphed = self.config.resources.cuda_graphs
        if graphed and self.device.type != "cuda":
            raise UserError("resources.cuda_graphs is true, but the run is on the CPU: leave it out.")
        return graphed

    def _compile(self, algorithm: DDPM | DxMI) -> None:
        """Compile every network of an algorithm, if that is asked for; what else it computes is little."""
        if self.config.resources.compile:
            # PyTorch keeps headers that were compiled for other vector instructions, and fails with them.
            folder = cache_root() / "compiled" / torch.backends.cpu.get_cpu_capability()
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
            for module in algorithm.modules():
                if isinstance(module, Denoiser | Critic | TimedCritic):
                    module.compile(dynamic=False)

    def _stream(self, batch_size: int, name: str) -> BatchStream:
        return BatchStream(
            self.data.stored,
            batch_size,
            generator(self.config.seed, name),
            self._labels() if self.config.network.denoiser.classes else None,
            flip=self.config.data.flip,
            device=self.device,
            workers=self.workers,
        )

    def _labels(self) -> Tensor:
        """The class of each sample.

        Raises:
            UserError: they have none, or there are more than the denoiser knows.
        """
        data, classes = self.data, self.config.network.denoiser.classes
        labels = data.classes
        if labels is None:
            raise UserError(f"network.denoiser.classes is {classes}, but {data.name} has no classes: make it 0.")
        largest = int(labels.max())
        if largest >= classes:
            raise UserError(
                f"network.denoiser.classes is {classes}, but {data.name} has labels up to {largest}: "
                f"make it {largest + 1}."
            )
        return labels


def _device(name: str) -> torch.device:
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    if name.startswith("cuda"):
        index = int(name.partition(":")[2] or 0)
        if index >= torch.cuda.device_count():
            raise UserError(
                f"resources.device is {name}, but PyTorch sees {torch.cuda.device_count()} GPUs: use auto or cpu."
            )
        # PyTorch looks at it once, at the first matrix product on a GPU, and without it allows no deterministic ones.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device(name)
