"""Estimates how much memory training takes, from one iteration on tensors that have shapes but no content.

Such an iteration takes seconds for any network, on any machine: nothing is stored or computed, but PyTorch's fake
tensors have the sizes of real ones. What an operation allocates only while it runs is not counted.
"""

import warnings
import weakref
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import torch
from torch import Tensor, nn

from dxmi.algorithms.base import Algorithm, PolicyAlgorithm
from dxmi.compat import DispatchMode, tensors_without_content
from dxmi.data.batch import Batch, Condition
from dxmi.rewards.base import Reward
from dxmi.tensors import tensors_of
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.recording import FixedStreams

_LATE = 10**9
"""Number of an iteration in which every part of an algorithm is trained."""


class Footprint(NamedTuple):
    """Peak memory of an iteration, including networks, gradients, moments and averages, in bytes.

    Attributes:
        pretraining: Peak in pretraining; None if there is none, or if it cannot be estimated.
        finetuning: Peak in fine-tuning, without the networks of a reward; None if it cannot be estimated.
    """

    pretraining: int | None
    finetuning: int | None


def footprint(config: ExperimentConfig) -> Footprint:
    """Estimate the memory that each worker of a run needs for training."""
    experiment = _Imagined(config)
    is_pretrained = config.pretrain.iterations > 0 and config.pretrain.teacher is None
    return Footprint(
        pretraining=_peak(experiment, experiment.imagine_pretraining) if is_pretrained else None,
        finetuning=_peak(experiment, experiment.imagine_finetuning),
    )


class _Imagined(Experiment):
    """An experiment whose networks are built without content, with any reward.

    Args:
        config: Config of the run.
    """

    def __init__(self, config: ExperimentConfig) -> None:
        resources = replace(config.resources, device="cpu", compile=False, cuda_graphs=False)
        config = replace(config, resources=resources, pretrain=replace(config.pretrain, weights=None))
        classes = config.network.denoiser.classes
        super().__init__(config, event=config.data.event, class_counts=[1] * classes if classes else None)

    def imagine_pretraining(self) -> tuple[Algorithm, Batch]:
        """The pretraining algorithm and a batch."""
        return self._build_ddpm(), self._batch(self.config.pretrain.batch_size)

    def imagine_finetuning(self) -> tuple[Algorithm, Batch]:
        """The fine-tuning algorithm and a batch."""
        algorithm: PolicyAlgorithm = self.build_algorithm(self.build_denoiser())
        return algorithm, self._batch(self.config.train.batch_size, reads_samples=algorithm.needs_data)

    def build_reward(self) -> Reward:
        """A reward that needs no memory of its own."""
        return _AnyReward()

    def _batch(self, batch_size: int, *, reads_samples: bool = True) -> Batch:
        """The part of a batch of one worker."""
        num = -(-batch_size // self.config.resources.num_workers)
        labels = torch.zeros(num, dtype=torch.int64) if self.config.network.denoiser.classes else None
        return Batch.single(torch.zeros(num, *self.event) if reads_samples else None, num, Condition(labels))

    def _weights(self, name: str, phase: str = "finetune") -> torch.Generator:  # noqa: ARG002
        """A generator whose state is not computed, as that takes tensors with content."""
        return torch.Generator()


class _AnyReward:
    """The mean of each sample, which has a gradient."""

    def __call__(self, x: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002
        return x.flatten(1).mean(1)

    differentiable = __call__


def _peak(experiment: Experiment, build: Callable[[], tuple[Algorithm, Batch]]) -> int | None:
    """The largest number of bytes in use in an iteration; None if an operation needs tensors with content."""
    try:
        with _without_content() as meter:
            algorithm, batch = build()
            streams = FixedStreams([{name: torch.Generator() for name in algorithm.streams}], torch.device("cpu"))
            meter.peak = meter.live
            with experiment.precision():
                algorithm.update(batch, _LATE, streams)
            return meter.peak
    except (RuntimeError, TypeError, NotImplementedError):
        return None


@contextmanager
def _without_content() -> Iterator["Meter"]:
    """A context in which tensors have no content, with the meter of their memory."""
    # Conversions of modules replace their parameters, which is not supported for fake ones, and change no size.
    unchanged = mock.patch.object(nn.Module, "to", lambda module, *_, **__: module)
    with warnings.catch_warnings(), unchanged, tensors_without_content(), Meter() as meter, _Guesses():
        warnings.simplefilter("ignore")
        yield meter


class _Guesses(DispatchMode):
    """Answers the host, which reads values that are not known: flags are taken to be true, and numbers to be 1."""

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute an operation that returns tensors, or guess a value."""
        if func is torch.ops.aten._local_scalar_dense.default:
            return True if args[0].dtype == torch.bool else 1
        return func(*args, **(kwargs or {}))


class Meter(DispatchMode):
    """Counts the bytes of the tensors that exist.

    Attributes:
        live: Bytes of the tensors that exist now.
        peak: The largest value of `live`.
    """

    def __init__(self) -> None:
        super().__init__()
        self.live = 0
        self.peak = 0
        self._known: weakref.WeakKeyDictionary[Any, int] = weakref.WeakKeyDictionary()

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Execute an operation and count the memory of its results."""
        result = func(*args, **(kwargs or {}))
        for tensor in tensors_of(tuple(result) if isinstance(result, list) else result):
            self._count(tensor)
        return result

    def _count(self, tensor: Tensor) -> None:
        storage = tensor.untyped_storage()
        if storage in self._known:
            return
        size = self._known[storage] = storage.nbytes()
        self.live += size
        self.peak = max(self.peak, self.live)
        weakref.finalize(storage, self._release, size)

    def _release(self, size: int) -> None:
        self.live -= size
