"""Estimates the time and disk usage of a sweep by timing a few iterations, which takes a second or two."""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import torch

from dxmi.algorithms.base import Algorithm
from dxmi.diffusion.cuda_graphs import WARM_UP
from dxmi.evaluation.config import SELECTION
from dxmi.evaluation.sampling import Sampling, generate
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.recording import update_of
from dxmi.training.references import references_of
from dxmi.training.state import TrainingState
from tune.execution.slots import Slots
from tune.plans.sweep import Plan

_REPEATS = 3
_SCORING = 1.5
"""Time of generating and scoring samples, relative to only generating them."""
_OTHER_BYTES = 1_000_000
"""Size of a run's images and records."""
_CHECKPOINTS = 2
"""The best and the last checkpoint."""
_START_SECONDS = 10.0
"""Startup time of Ray and of PyTorch in its workers."""


@dataclass(frozen=True)
class Estimate:
    """Estimated cost of a sweep.

    Attributes:
        shared_seconds: time of pretraining and references of all pretrained models that the cache does not hold.
        models: number of these models.
        trial_seconds: time of each trial that is not stopped early.
        trial_bytes: size of each trial's folder.
        trials: number of planned trials.
        concurrent: number of trials at once.
        elsewhere: whether trials run on GPUs of other machines, while this machine's CPU was timed.
    """

    shared_seconds: float
    models: int
    trial_seconds: float
    trial_bytes: int
    trials: int
    concurrent: int
    elsewhere: bool = False

    @property
    def seconds(self) -> float:
        """Time of the whole sweep if no trial is stopped early."""
        shared = self.shared_seconds / min(self.concurrent, max(self.models, 1))
        return _START_SECONDS + shared + self.trials * self.trial_seconds / self.concurrent

    @property
    def bytes(self) -> int:
        """Size of the study's folder."""
        return self.trials * self.trial_bytes


def estimate(plan: Plan, slots: Slots) -> Estimate:
    """Time a few iterations of each phase with one trial's threads.

    All trials are assumed to take as long as the plan's own experiment. Pretrained models are counted among the trials
    of an ablation, and among random ones of a sweep's search space.

    The GPUs of a cluster may be on other nodes or not yet available: if this machine has none, its CPU is timed.

    Raises:
        UserError: the data cannot be read.
    """
    config, seeds = plan.experiment, len(plan.trial_seeds)
    elsewhere = slots.gpu_share > 0.0 and not torch.cuda.is_available()
    if elsewhere:
        config = replace(config, resources=replace(config.resources, device="cpu", cuda_graphs=False))
    before = torch.get_num_threads()
    torch.set_num_threads(slots.threads)
    try:
        experiment = Experiment(config)
        models = _new_models(experiment, plan)
        one = _measured(experiment, slots, plan.num_trials, models)
        return replace(
            one, trial_seconds=seeds * one.trial_seconds, trial_bytes=seeds * one.trial_bytes, elsewhere=elsewhere
        )
    finally:
        torch.set_num_threads(before)


def _new_models(experiment: Experiment, plan: Plan) -> list[Experiment]:
    """One experiment for each pretrained model that the trials need and the cache does not hold."""
    models: dict[str, Experiment] = {}
    seen = set()
    for config in plan.sampled_configs():
        own = (config.data, config.network.denoiser, config.schedule, config.pretrain, config.train.precision)
        key = repr((config.seed, *own))
        if key not in seen:
            seen.add(key)
            other = experiment.with_config(replace(config, resources=experiment.config.resources))
            models.setdefault(other.pretraining_signature, other)
    return [other for other in models.values() if not other.pretraining_path.exists()]


def _measured(experiment: Experiment, slots: Slots, trials: int, models: Sequence[Experiment]) -> Estimate:
    config, train = experiment.config, experiment.config.train
    ddpm, pretraining = experiment.build_pretraining()
    algorithm, state = experiment.build_finetuning(experiment.build_denoiser())
    iteration = _seconds(_iteration(experiment, algorithm, state))
    drawing = Sampling(algorithm.policy, SELECTION, precision=config.evaluate.precision)
    batch = _seconds(lambda: generate(drawing, config.evaluate.batch_size, config.evaluate))
    sampling = batch * config.evaluate.num_samples / config.evaluate.batch_size
    evaluation = sampling / config.schedule.num_steps
    shared = sum(evaluation * _reference_evaluations(model.config) for model in models)
    trained = [model.config.pretrain.iterations for model in models if model.shipped is None]
    if trained:
        shared += sum(trained) * _seconds(_iteration(experiment, ddpm, pretraining))
    evaluations = train.iterations / config.evaluate.every + 3
    seconds = train.iterations * iteration + evaluations * sampling * _SCORING
    return Estimate(shared, len(models), seconds, _bytes(state.groups()), trials, slots.concurrent)


def _iteration(experiment: Experiment, algorithm: Algorithm, state: TrainingState) -> Callable[[], object]:
    """The iteration that the training loop performs, already recorded if the run records it."""
    recorded = experiment.records(algorithm)
    update = update_of(algorithm, [state.generators], experiment.precision, recorded=recorded)
    for _ in range(WARM_UP + 1 if recorded else 0):
        update(state.stream.next(), 0)
    return lambda: update(state.stream.next(), 0)


def _reference_evaluations(config: ExperimentConfig) -> int:
    """Total number of network evaluations for one sample from every reference."""
    return sum(reference.evaluations for reference in references_of(config))


def _seconds(work: Callable[[], object]) -> float:
    """Return the shortest time of a few calls."""
    times = []
    for _ in range(_REPEATS):
        start = time.perf_counter()
        work()
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        times.append(time.perf_counter() - start)
    return min(times)


def _bytes(groups: object) -> int:
    return _CHECKPOINTS * _tensor_bytes(groups) + _OTHER_BYTES


def _tensor_bytes(tree: object) -> int:
    if isinstance(tree, torch.Tensor):
        return tree.numel() * tree.element_size()
    return sum(_tensor_bytes(value) for value in tree.values()) if isinstance(tree, dict) else 0
