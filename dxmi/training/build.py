"""An experiment: builds the data, networks, algorithm and scorer of a run from its config."""

import itertools
import os
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import cached_property
from pathlib import Path
from typing import Any, TypeVar

import torch
from torch import Tensor, nn

from dxmi.algorithms.base import DEVICE, HOST, Algorithm, Parts, PolicyAlgorithm
from dxmi.algorithms.ddpm import DDPM
from dxmi.algorithms.distillation import Distillation
from dxmi.algorithms.registry import ALGORITHMS
from dxmi.compat import allow_recompilation
from dxmi.config import RESULT, block_delta, delta, differences, signature, to_tree
from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.data.dataset import BatchStream, Dataset
from dxmi.data.images import Images, data_root
from dxmi.data.loading import load
from dxmi.data.prompts import WORDS, Prompts, read_prompts
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules.base import StepSchedule
from dxmi.diffusion.schedules.build import forward_process, shorten
from dxmi.diffusion.schedules.ddpm import forward_betas
from dxmi.distributed import SINGLE_PROCESS, ProcessGroup
from dxmi.errors import UserError
from dxmi.evaluation.config import EvaluateConfig
from dxmi.evaluation.scorers import Scorer, build_scorer
from dxmi.machine import available_cpus
from dxmi.metrics.base import Metric
from dxmi.metrics.registry import METRICS
from dxmi.networks.base import Critic, Denoiser, TimedCritic
from dxmi.networks.pretrained.diffusers_folder import require_same_model, require_same_noise, scheduler_of_folder
from dxmi.networks.pretrained.layouts import DIFFUSERS_MARK, digest, load_public, public_log_sigma
from dxmi.networks.pretrained.public_files import PublicWeights, read_public
from dxmi.networks.registry import build_critic, build_denoiser, build_timed_critic
from dxmi.persistence.cache import cache_root
from dxmi.persistence.checkpoint import Checkpoint
from dxmi.persistence.files import require_target, user_path
from dxmi.persistence.run_directory import RunDirectory
from dxmi.rewards.base import PostponedReward, Reward, RewardContext, differentiable, no_reward
from dxmi.rewards.configs import RewardConfig
from dxmi.rewards.files import reward_signature
from dxmi.rewards.metric import MeanReward
from dxmi.rewards.registry import REWARDS
from dxmi.seeds import generator
from dxmi.tensors import decode
from dxmi.training.config import SCHEMA, ExperimentConfig
from dxmi.training.shipped import ShippedParent, find_shipped
from dxmi.training.state import TrainingState

Network = TypeVar("Network", Critic, TimedCritic)
PRETRAINING_VERSION = 2
"""Increased whenever a change of the code changes the result of pretraining, so that old results are not reused."""


def require_signature(saved: Checkpoint, signature: str) -> None:
    """Check that a checkpoint was written under the config with this signature.

    Raises:
        UserError: it was not, because config.yaml has been edited.
    """
    written = saved.meta.get("signature")
    if written != signature:
        raise UserError(
            f"Checkpoint {saved.path} was written under another config (signature {written}) than config.yaml's "
            f"({signature}): restore that file."
        )


class Experiment:
    """A config, its data, and factories of everything that is built from them.

    Args:
        config: config of the run.
        event: shape of one sample, if it is known without reading the data.
        workers: process group of the run.
        class_counts: number of samples of each class of the denoiser, if known without reading the data.
        postpones_reward: whether the reward is built at its first call, as it is not needed to draw samples.

    Raises:
        UserError: the device does not exist.
    """

    def __init__(
        self,
        config: ExperimentConfig,
        event: tuple[int, ...] | None = None,
        workers: ProcessGroup = SINGLE_PROCESS,
        class_counts: Sequence[int] | None = None,
        *,
        postpones_reward: bool = False,
    ) -> None:
        self.config = config
        self._postpones_reward = postpones_reward
        self.workers = workers
        self.device = _device(config.resources.device)
        self._event = event
        self._class_counts = class_counts

    @cached_property
    def data(self) -> Dataset:
        """The data, read or drawn on first access.

        Raises:
            UserError: the data cannot be read.
        """
        return load(self.config.data)

    def with_config(self, config: ExperimentConfig) -> "Experiment":
        """An experiment with another config; it shares the data if the config has the same."""
        other = Experiment(config, self._event, self.workers, self._class_counts)
        if config.data == self.config.data:
            other.__dict__["data"] = self.data
        return other

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W) of an image or (2,) of a point."""
        return self._event or self.data.event

    @property
    def class_counts(self) -> Tensor | None:
        """The number of data samples of each class, int64 [C]; classes of generated samples have the same frequencies.

        None if the denoiser has no classes, or if `event` was given without `class_counts`.

        Raises:
            UserError: the data have no classes, or more than the denoiser.
        """
        classes = self.config.network.denoiser.classes
        if classes == 0:
            return None
        if self._class_counts is not None:
            return torch.tensor(self._class_counts)
        if self.config.prompts.are_given:
            return self.prompts.counts(classes)
        return None if self._event is not None else torch.bincount(self._labels(), minlength=classes)

    @property
    def label_source(self) -> str:
        """What `class_counts` are the frequencies of: data or prompts."""
        return "prompts" if self.config.prompts.are_given else "data"

    @cached_property
    def prompts(self) -> Prompts:
        """The prompts of the run, with their classes.

        Raises:
            UserError: a prompt cannot be used.
        """
        data, classes = self.data, self.config.network.denoiser.classes
        words: Sequence[str] = WORDS.get(data.name) or (data.class_names if isinstance(data, Images) else ())
        if len(words) != classes:
            raise UserError(
                f"prompts are given, but {data.name} has words for {len(words)} classes and network.denoiser.classes "
                f"is {classes}: leave them out, or name the classes by the folders of the data."
            )
        return read_prompts(self.config.prompts, words)

    def use_threads(self) -> int:
        """Set the number of PyTorch's CPU threads by `resources.threads`, and return it."""
        threads = self.config.resources.threads or available_cpus()
        torch.set_num_threads(threads)
        return threads

    def choose_kernels(self) -> None:
        """On a GPU, apply `resources.deterministic`; kernels on the CPU are deterministic in any case.

        PyTorch then raises an error for an operation without a deterministic kernel. Among the operations of the
        networks here, convolutions and attention have kernels of both kinds.
        """
        if self.device.type == "cuda":
            torch.use_deterministic_algorithms(self.config.resources.deterministic)
            torch.backends.cudnn.benchmark = not self.config.resources.deterministic  # choose kernels by their speed
            # No code here reads uninitialized memory.
            torch.utils.deterministic.fill_uninitialized_memory = False  # type: ignore[attr-defined]

    def precision(self) -> torch.autocast:
        """The autocast context of updates.

        It does not cache cast weights, because the optimizers change the weights within an update.
        """
        enabled = self.config.train.precision == "bfloat16"
        return torch.autocast(self.device.type, dtype=torch.bfloat16, enabled=enabled, cache_enabled=False)

    @property
    def pretraining_recipe(self) -> dict[str, Any]:
        """Everything that determines the pretrained denoiser, except for the version of PyTorch."""
        config = self.config
        pretrain = delta(config.pretrain, RESULT)
        for name in ("shipped", "seed"):
            pretrain.pop(name, None)
        pretrain["weights"] = None if config.pretrain.weights is None else self.weights_signature
        if config.pretrain.teacher is not None:
            pretrain |= {"teacher": self.teacher_signature, "schedule": shorten(config.schedule).tree()}
        return {
            "schema": SCHEMA,
            "version": PRETRAINING_VERSION,
            "seed": self._seed_of("pretrain"),
            "data": self.data.signature,
            "mirrors": config.data.mirrors,
            "network": block_delta(config.network.denoiser, RESULT),
            "pretrain": pretrain,
            "precision": config.train.precision,
            "family": config.schedule.family,
        }

    @cached_property
    def shipped(self) -> ShippedParent | None:
        """The result of the pretraining that ships with the package; None if there is none, or it is not wanted.

        Raises:
            UserError: its file has been altered.
        """
        return find_shipped(self.pretraining_recipe) if self.config.pretrain.shipped else None

    @property
    def pretraining_signature(self) -> str:
        """The signature of everything that the pretrained denoiser depends on."""
        if self.shipped is not None:
            return signature({"shipped": self.shipped.sha256})
        return signature({**self.pretraining_recipe, "torch": torch.__version__})

    @property
    def pretraining_path(self) -> Path:
        """The path of the cached result of the pretraining."""
        return cache_root() / "pretrained" / f"{self.pretraining_signature}.cached"

    # ------------------------------------------------------------------------
    # Building. Every random stream has a name; see dxmi.seeds.

    def _seed_of(self, phase: str) -> int:
        """The seed of a phase, `pretrain` or `finetune`."""
        own = self.config.pretrain.seed
        return self.config.seed if phase == "finetune" or own is None else own

    def _weights(self, name: str, phase: str = "finetune") -> torch.Generator:
        return generator(self._seed_of(phase), f"weights/{name}")

    def build_denoiser(self) -> Denoiser:
        """Build an untrained denoiser on the device."""
        config = self.config.network.denoiser
        network = build_denoiser(config, self.event, self._weights("denoiser", "pretrain")).to(self.device)
        self._compile(network)
        return network

    @cached_property
    def public_weights(self) -> PublicWeights:
        """The tensors of `pretrain.weights`, by their public names.

        Raises:
            UserError: they do not exist at that path or in the data folder, or cannot be read.
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
        """The signatures of the run's inputs: `data` and, if used, `parent` (shipped), `weights`, `teacher`, `reward`.

        Raises:
            UserError: an input cannot be read.
        """
        inputs, pretrain = {"data": self.data.signature}, self.config.pretrain
        if self.shipped is not None:
            inputs["parent"] = self.shipped.sha256
        if pretrain.teacher is not None:
            inputs["teacher"] = self.teacher_signature
        if self.reward_signature is not None:
            inputs["reward"] = self.reward_signature
        return inputs if pretrain.weights is None else {**inputs, "weights": self.weights_signature}

    @cached_property
    def reward_signature(self) -> str | None:
        """The signature of the files that the reward reads; None if there is no reward, or it reads none.

        Raises:
            UserError: a file cannot be read.
        """
        return None if self.config.reward is None else reward_signature(self.config.reward)

    @cached_property
    def weights_signature(self) -> str:
        """The signature of the tensors of `pretrain.weights`."""
        return digest(self.public_weights.tensors)

    def check_public(self, network: Denoiser) -> list[str]:
        """Compare the diffusers configs in the folder of `pretrain.weights` with the run's network and schedule.

        Returns:
            Messages for the user: what was taken from the file, and what could not be compared.

        Raises:
            UserError: config.json or scheduler_config.json describes another model.
        """
        weights = self.public_weights
        notes = [f"pretrain.weights: {weights.note}"] if weights.note else []
        if weights.folder is None:
            if DIFFUSERS_MARK in weights.tensors:
                notes.append(
                    f"pretrain.weights: there is no config.json next to {weights.path} to compare the network with."
                )
            return notes
        require_same_model(weights.folder, network, self.event)
        scheduler = scheduler_of_folder(weights.folder)
        if scheduler is None:
            assumed = "it is taken for a model that predicts the noise, trained on DDPM's linear betas"
            return [*notes, f"pretrain.weights: {weights.path} has no scheduler_config.json: {assumed}."]
        require_same_noise(scheduler, self.config.schedule.family, forward_betas())
        return notes

    @cached_property
    def teacher(self) -> PolicyAlgorithm:
        """The algorithm of `pretrain.teacher` with the weights of its best checkpoint, on the device.

        Raises:
            UserError: there is no such run, it has no checkpoint, or its networks differ from this run's.
        """
        from dxmi.training.loading import load_run  # noqa: PLC0415  (it imports this module)
        from dxmi.training.schema import read_config  # noqa: PLC0415  (likewise)

        folder = user_path(self.config.pretrain.teacher or "", "pretrain.teacher")
        require_target(folder, "pretrain.teacher")
        run = RunDirectory(folder)
        stored = read_config(run.read_config())
        for name in ("denoiser", "energy") if self.config.algorithm.needs_teacher else ("denoiser",):
            theirs, own = (to_tree(getattr(config.network, name)) for config in (stored.config, self.config))
            changed = differences(theirs, own)
            if changed:
                raise UserError(
                    f"network.{name} differs from that of pretrain.teacher, {folder} ({'; '.join(changed[:3])}): leave "
                    "it as it is there."
                )
        return load_run(run, stored, "best").algorithm.to(self.device)

    @cached_property
    def teacher_signature(self) -> str:
        """The signature of the policy, and of the energy if it is used, of `pretrain.teacher`."""
        tensors = {f"policy.{key}": value for key, value in self.teacher.eval_policy.state_dict().items()}
        if self.config.algorithm.needs_teacher and self.teacher.energy is not None:
            tensors |= {f"energy.{key}": value for key, value in self.teacher.energy.state_dict().items()}
        return digest(tensors)

    def build_pretraining(self) -> tuple[DDPM | Distillation, TrainingState]:
        """Build the pretraining algorithm, or the distillation in its place, and its initial state."""
        config = self.config
        algorithm = self._build_ddpm() if config.pretrain.teacher is None else self._build_distillation()
        algorithm = algorithm.to(self.device)
        self._compile(algorithm)
        stream = self._stream(config.pretrain.batch_size, "pretrain")
        return algorithm, TrainingState(
            algorithm, algorithm.optimizers, self._generators("pretrain", algorithm), stream
        )

    def _build_ddpm(self) -> DDPM:
        config, network = self.config, self.build_denoiser()
        if config.pretrain.weights is not None:
            self._load_public(network)
        process = forward_process(config.schedule)
        return DDPM(config.pretrain, network, self.workers, config.resources.accumulate, process)

    def _build_distillation(self) -> Distillation:
        """Build the distillation; the student's network starts from the teacher's."""
        config, network, teacher = self.config, self.build_denoiser(), self.teacher.eval_policy
        if network.latent:
            raise UserError("pretrain.teacher is set, but the network takes a latent: such a policy has no single map.")
        network.load_state_dict(teacher.network.state_dict())
        student = self.build_policy(network, shorten(config.schedule))
        return Distillation(config.pretrain, student, teacher, self.workers, config.resources.accumulate)

    def build_policy(self, denoiser: Denoiser, schedule: StepSchedule, kind: type[Policy] = Policy) -> Policy:
        """Build a sampler (of class `kind`) with a denoiser and a schedule."""
        policy = kind(denoiser, schedule, self.event)
        policy.draw_classes(self.class_counts)
        return policy.to(self.device)

    def build_algorithm(self, denoiser: Denoiser) -> PolicyAlgorithm:
        """Build the fine-tuning algorithm; it trains `denoiser` in place."""
        algorithm = ALGORITHMS.build(self.config.algorithm, self.parts(denoiser)).to(self.device)
        if self._graphed() and not self.records(algorithm):
            algorithm.record_rollout()
        return algorithm

    def parts(self, denoiser: Denoiser) -> Parts:
        """What the algorithm is built from; its policy trains `denoiser` in place."""
        config, event, network = self.config, self.event, self.config.network
        schedule = shorten(config.schedule)
        return Parts(
            policy=self.build_policy(denoiser, schedule),
            schedule=schedule,
            iterations=config.train.iterations,
            critic=self._factory("energy", lambda weights: build_critic(network.energy, event, weights)),
            timed_critic=self._factory("value", lambda weights: build_timed_critic(network.value, event, weights)),
            reward=self.build_reward,
            workers=self.workers,
            accumulate=config.resources.accumulate,
        )

    def _factory(self, name: str, build: Callable[[torch.Generator], Network]) -> Callable[[], Network]:
        """A factory of networks on the device; each call creates one with other initial weights."""
        numbers = itertools.count()

        def make() -> Network:
            number = next(numbers)
            return build(self._weights(f"{name}/{number}" if number else name)).to(self.device)

        return make

    def build_reward(self) -> Reward:
        """Build the reward of the run.

        Raises:
            UserError: the run has no reward, or it cannot be built.
        """
        config = self.config.reward
        if config is None:
            return no_reward()
        if self._postpones_reward:
            return PostponedReward(lambda: self._prepared_reward(config))
        return self._prepared_reward(config)

    def _prepared_reward(self, config: RewardConfig) -> Reward:
        """Build a reward, and give it what it needs beyond its settings."""
        reward = REWARDS.build(config)
        prepare = getattr(reward, "prepare", None)
        if prepare is not None:
            allow_code = self.config.resources.allow_code
            prepare(RewardContext(self._prepared_reward, self._real_samples, self._energy_of, allow_code))
        return reward

    def _real_samples(self, num: int) -> tuple[Tensor, Condition]:
        """The first training samples as floats, with their classes if there are any, on the device."""
        classes = self.data.classes
        labels = None if classes is None else classes[:num].to(self.device)
        return decode(self.data.stored[:num].to(self.device)), Condition(labels)

    def _energy_of(self, folder: str) -> Reward:
        """The energy of the best checkpoint of a run.

        Raises:
            UserError: there is no such run, or it has no energy, or its samples have another shape.
        """
        from dxmi.training.loading import load_run  # noqa: PLC0415  (it imports this module)
        from dxmi.training.schema import read_config  # noqa: PLC0415  (likewise)

        path = user_path(folder, "reward.run")
        require_target(path, "reward.run")
        run = RunDirectory(path)
        loaded = load_run(run, read_config(run.read_config()), "best", self.config.resources)
        energy = loaded.algorithm.energy
        if energy is None:
            raise UserError(f"reward.run is {path}, whose algorithm learns no energy: name a run of algorithm=dxmi.")
        if loaded.experiment.event != self.event:
            raise UserError(
                f"reward.run is {path}, whose samples have shape {loaded.experiment.event}, but those of this run have "
                f"{self.event}: name a run with the same data."
            )
        if energy.network.classes not in (0, self.config.network.denoiser.classes):
            raise UserError(
                f"reward.run is {path}, whose energy knows {energy.network.classes} classes, but "
                f"network.denoiser.classes is {self.config.network.denoiser.classes}: make it {energy.network.classes}."
            )
        return energy.to(self.device).requires_grad_(False)

    def check(self) -> None:
        """Check what would otherwise fail only after pretraining: prompts, reward, and CUDA graphs.

        Raises:
            UserError: a prompt cannot be used, the reward of a training sample cannot be computed, or there is no GPU.
        """
        self._graphed()
        if self.config.prompts.are_given:
            self.prompts  # noqa: B018  (reads and checks them)
        if self.config.reward is not None:
            self._check_reward(self.config.reward)

    def _check_reward(self, config: RewardConfig) -> None:
        """Compute the reward of a training sample."""
        self.reward_signature  # noqa: B018  (reads the files of the reward)
        reward = self.build_reward()
        if self.config.algorithm.needs_gradient:
            reward = differentiable(reward)
        x, condition = self._real_samples(1)
        found = reward(x, condition if self.config.network.denoiser.classes else UNCONDITIONAL)
        if not bool(found.isfinite().all()):
            raise UserError(
                f"reward.kind is {config.kind}, and the reward of the first training sample is {float(found[0])}: it "
                "must be a finite number."
            )

    def build_scorer(self, evaluate: EvaluateConfig | None = None) -> Scorer:
        """Build the scorer of samples, with the evaluation settings of the run unless others are given.

        Raises:
            UserError: there are too few images to score against, or no network for their features.
        """
        config = self.config if evaluate is None else replace(self.config, evaluate=evaluate)
        return build_scorer(
            self.data,
            config.evaluate,
            cache_root(),
            self.device,
            self.workers,
            metrics=self.build_metrics(),
            keys=config.score_keys(),
        )

    def build_metrics(self) -> list[Metric]:
        """Build the metrics other than the distances to the data: the reward, if any, and `evaluate.metrics`."""
        further = [METRICS.build(config) for config in self.config.evaluate.metrics or ()]
        if self.config.reward is None:
            return further
        held_out = self.prompts.held_out_labels if self.config.prompts.held_out else frozenset()
        return [MeanReward(self.build_reward(), held_out), *further]

    def build_finetuning(self, denoiser: Denoiser) -> tuple[PolicyAlgorithm, TrainingState]:
        """Build the fine-tuning algorithm and its initial state."""
        config, algorithm = self.config, self.build_algorithm(denoiser)
        self._compile(algorithm)
        if config.pretrain.weights is not None:
            algorithm.start_from(public_log_sigma(self.public_weights.tensors))
        if config.algorithm.needs_teacher:
            self._take_energy(algorithm)
        generators = self._generators("finetune", algorithm)
        labels = self.prompts.labels if config.prompts.are_given else None
        stream = self._stream(config.train.batch_size, "finetune", labels, reads_samples=algorithm.needs_data)
        return algorithm, TrainingState(algorithm, algorithm.optimizers, generators, stream)

    def _take_energy(self, algorithm: PolicyAlgorithm) -> None:
        """Copy the energy of `pretrain.teacher`."""
        energy = self.teacher.energy
        if energy is None or algorithm.energy is None:
            raise UserError("algorithm.teacher_energy is true, but pretrain.teacher has no energy: make it false.")
        algorithm.energy.load_state_dict(energy.state_dict())

    def _generators(self, phase: str, algorithm: Algorithm) -> dict[str, torch.Generator]:
        """The generators of an algorithm's random streams, by name."""
        devices = {HOST: torch.device("cpu"), DEVICE: self.device}
        return {
            name: generator(self._seed_of(phase), f"{phase}/{name}", devices[where])
            for name, where in algorithm.streams.items()
        }

    def records(self, algorithm: Algorithm) -> bool:
        """Whether the iterations of an algorithm are recorded as CUDA graphs; those of several workers are not."""
        return self._graphed() and self.workers.size == 1 and algorithm.can_be_recorded

    def _graphed(self) -> bool:
        graphed = self.config.resources.cuda_graphs
        if graphed and self.device.type != "cuda":
            raise UserError("resources.cuda_graphs is true, but the run is on the CPU: leave it out.")
        return graphed

    def _compile(self, root: nn.Module) -> None:
        """Compile the networks in a module if `resources.compile` is set; its other computations are cheap."""
        if self.config.resources.compile:
            # One folder per instruction set: PyTorch caches precompiled headers, and fails with those of another one.
            folder = cache_root() / "compiled" / torch.backends.cpu.get_cpu_capability()
            os.environ.setdefault("TORCHINDUCTOR_CACHE_DIR", str(folder))
            allow_recompilation()
            for module in root.modules():
                if isinstance(module, Denoiser | Critic | TimedCritic):
                    for region in module.regions() if isinstance(module, Denoiser) else (module,):
                        region.compile(dynamic=False)

    def _stream(
        self, batch_size: int, phase: str, labels: Tensor | None = None, *, reads_samples: bool = True
    ) -> BatchStream:
        """The batches of a phase; with `labels`, their classes are drawn from these instead of those of the data."""
        stored = self.data.stored if labels is None else torch.empty(len(labels), 0)
        if labels is None and self.config.network.denoiser.classes:
            labels = self._labels()
        return BatchStream(
            stored,
            batch_size,
            generator(self._seed_of(phase), f"{phase}/data"),
            labels,
            flip=self.config.data.mirrors,
            device=self.device,
            workers=self.workers,
            reads_samples=reads_samples,
        )

    def _labels(self) -> Tensor:
        """The class of each data sample.

        Raises:
            UserError: the data have no classes, or more than the denoiser.
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
        # Deterministic matrix products on a GPU require this variable, which is read once, at the first product.
        os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    return torch.device(name)
