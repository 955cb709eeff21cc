"""Detection of settings without effect: two configs whose training is bitwise equal differ only in such settings.

A small version of each config is trained for a few iterations. The iterations are sampled from the whole run (the
first, the last, and some in between), so that warm-ups, decays and moving averages take effect. If that would take too
long, or if a result is not finite, no statement is made.
"""

import hashlib
from collections.abc import Iterable, Mapping, Sequence
from functools import lru_cache
from typing import Any

import torch
from torch import Tensor, nn

from dxmi.algorithms.ddpm import DDPM
from dxmi.config import build, to_tree
from dxmi.data.batch import Batch, Condition, Streams
from dxmi.diffusion.schedules.build import forward_process
from dxmi.networks.base import Denoiser
from dxmi.networks.configs import MlpConfig
from dxmi.seeds import generator
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig, ResourcesConfig
from tune.search.space import flat, tree_with

_EVENT = (1, 8, 8)
"""Shape of a sample. Random samples are used, since whether a setting has an effect does not depend on the data."""
_HIDDEN = 8
_SIZES = {"lr": 1e-2, "sigma_lr": 1e-2, "max_grad_norm": 1e-6}
"""Replacements for settings whose values could hide an effect in a few float32 updates: large learning rates, and a
gradient norm limit that always applies."""
_STATES_PER_STEP = 4
"""B / T: each draw of B from the T x B states then misses a step with probability e^-4."""
_MIN_BATCH, _MAX_STEPS = 16, 50

Digest = str | None


def digests(configs: Sequence[ExperimentConfig]) -> dict[str, Digest]:
    """Compute digests that are equal for configs whose training is equal.

    Digests are comparable only within one call, since the small versions depend on which settings vary.

    Returns:
        Digest by signature of the config; None if it could not be determined.
    """
    trees = [flat(to_tree(config)) for config in configs]
    sizes = _sizes(trees)
    narrow = {path: _HIDDEN for path in _common(trees) if path.startswith("network.") and path.endswith(".hidden")}
    found: dict[str, Digest] = {}
    for config, tree in zip(configs, trees, strict=True):
        if config.signature not in found:
            small = narrow | {path: sizes[path].get(value, value) for path, value in tree.items() if path in sizes}
            copy = tree_with(config, small) | {"resources": to_tree(ResourcesConfig(device="cpu"))}
            found[config.signature] = _digest(build(ExperimentConfig, copy))
    return found


def _common(trees: Sequence[Mapping[str, Any]]) -> list[str]:
    """Paths of the settings that have the same value in all configs."""
    return [path for path, value in trees[0].items() if all(path in tree and tree[path] == value for tree in trees)]


def _sizes(trees: Sequence[Mapping[str, Any]]) -> dict[str, dict[float, float]]:
    """For each path in `_SIZES`, the replacement of each value; distinct values have distinct replacements."""
    values: dict[str, set[float]] = {}
    for tree in trees:
        for path, value in tree.items():
            if path.rpartition(".")[2] in _SIZES:
                values.setdefault(path, set()).update([value] if value else [])
    return {
        path: {
            value: _SIZES[path.rpartition(".")[2]] * (1.0 + rank / len(given))
            for rank, value in enumerate(sorted(given))
        }
        for path, given in values.items()
    }


@lru_cache(maxsize=1024)
def _digest(config: ExperimentConfig) -> Digest:
    """Digest of a small config, cached so that it is trained only once per process."""
    networks = (config.network.denoiser, config.network.energy, config.network.value)
    if config.schedule.num_steps > _MAX_STEPS or not all(isinstance(network, MlpConfig) for network in networks):
        return None  # it would take too long
    if config.pretrain.weights is not None or config.pretrain.teacher is not None or config.prompts.are_given:
        return None
    experiment = Experiment(config, event=_EVENT)
    with experiment.precision():
        tensors = _finetuned(experiment, _pretrained(experiment))
    if not all(tensor.isfinite().all() for tensor in tensors):
        return None
    return _hash([*_lengths(config), *(tuple(tensor.shape) for tensor in tensors)], tensors)


def _lengths(config: ExperimentConfig) -> list[int]:
    """Iterations of both phases, and batch sizes of phases with iterations; these settings always have an effect."""
    phases = (
        (config.pretrain.iterations, config.pretrain.batch_size),
        (config.train.iterations, config.train.batch_size),
    )
    return [number for length, batch in phases for number in (length, batch if length else 0)]


def _hash(facts: Iterable[object], tensors: Iterable[Tensor]) -> str:
    digest = hashlib.sha256(repr(list(facts)).encode())
    for tensor in tensors:
        digest.update(tensor.detach().contiguous().numpy().tobytes())
    return digest.hexdigest()


# ----------------------------------------------------------------------------
# A short run


def _iterations(total: int) -> list[int]:
    """The iterations out of `total` that are run, in ascending order.

    They include at least six iterations if there are that many, since RAdam does not use its second moment before the
    sixth, and the last two, since a moving average reaches its final decay late and a target network acts one iteration
    after its update.
    """
    wanted = (0, 1, 2, 3, total // 4, 2 * total // 3, total - 2, total - 1)
    return sorted({iteration for iteration in wanted if 0 <= iteration < total})


def _data(num: int, iteration: int) -> Tensor:
    return 2.0 * torch.rand((num, *_EVENT), generator=generator(iteration, "effects/data")) - 1.0


def _batch(num: int, iteration: int, denoiser: Denoiser) -> Batch:
    labels = torch.arange(num) % denoiser.classes if denoiser.classes else None
    return Batch.single(_data(num, iteration), num, Condition(labels))


def _pretrained(experiment: Experiment) -> Denoiser:
    """The denoiser after a few iterations of pretraining."""
    config = experiment.config
    denoiser, noise = experiment.build_denoiser(), generator(config.seed, "effects/pretrain")
    ddpm = DDPM(config.pretrain, denoiser, forward_process=forward_process(config.schedule))
    for iteration in _iterations(config.pretrain.iterations):
        ddpm.update(_batch(_MIN_BATCH, iteration, denoiser), iteration, Streams([{"noise": noise}]))
    denoiser.load_state_dict(ddpm.average.state_dict())
    return denoiser


def _finetuned(experiment: Experiment, denoiser: Denoiser) -> list[Tensor]:
    """All tensors that the results of a run depend on, after a few iterations of fine-tuning."""
    config, algorithm = experiment.config, experiment.build_algorithm(denoiser)
    streams = Streams([{name: generator(config.seed, f"effects/{name}") for name in algorithm.streams}])
    num = max(_MIN_BATCH, _STATES_PER_STEP * config.schedule.num_steps)
    for iteration in _iterations(config.train.iterations):
        algorithm.update(_batch(num, iteration, denoiser), iteration, streams)
    policy, value = algorithm.policy, algorithm.value
    judged: list[nn.Module] = [algorithm.eval_policy, policy, *([] if value is None else [value])]
    guidance = torch.tensor(algorithm.guidance, dtype=torch.float64)
    schedule = [policy.timestep, policy.signal_scale, policy.output_scale, policy.log_sigma]
    return [guidance, *schedule, *(parameter.detach() for module in judged for parameter in module.parameters())]
