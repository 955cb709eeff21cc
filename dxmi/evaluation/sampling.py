"""Drawing samples from a policy with fixed noise, for evaluation."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dxmi.compat import uncompiled
from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.diffusion.policy import Guide, Policy
from dxmi.distributed import SINGLE_PROCESS, ProcessGroup
from dxmi.errors import DivergedError
from dxmi.evaluation.config import EvaluateConfig
from dxmi.seeds import generator
from dxmi.tensors import encode, num_beyond

_BOUND = 1e6
"""Limit above which a sample counts as diverged.

Samples of a working policy are of the order of 1; much larger ones would still look like an image after clipping.
"""


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
        policy: the policy to sample from.
        stream: name of the noise stream; with the evaluation seed it determines all samples, and all random choices in
            their scoring.
        guide: gradient of a value to descend, see `Policy.sample_states`.
        guidance: strength of the guidance.
        on_batch: called after each batch with the number of samples so far, on all workers at the same time.
        on_step: called after each step of a worker's batch, and equally often on a worker without a batch; an
            exception that it raises ends the sampling.
        workers: process group whose workers take the batches in turn.
        step: iteration of the policy.
        source: name of the policy in the message about samples that are not finite; by default its iteration.
        reference: the pretrained policy, if the divergence from it is a score; None otherwise.
        precision: precision of the networks, float32 or bfloat16; the states are float32.
    """

    policy: Policy
    stream: str
    guide: Guide | None = None
    guidance: float = 0.0
    on_batch: Callable[[int], None] | None = None
    on_step: Callable[[], None] | None = None
    workers: ProcessGroup = SINGLE_PROCESS
    step: int = 0
    source: str = ""
    reference: Policy | None = None
    precision: str = "float32"

    @property
    def bound(self) -> float:
        """The magnitude above which a state counts as diverged: a million times the deviation of noise or data."""
        return _BOUND * max(1.0, self.policy.start_sigma)

    def states(
        self, num: int, noise: torch.Generator, first: int | None = None, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """Yield the states of `Policy.sample_states`, and call `on_step` after each."""
        states = self.policy.sample_states(num, noise, self.guide, self.guidance, condition, first)
        with self._cast():
            x = next(states, None)
        while x is not None:
            yield x
            if self.on_step is not None:
                self.on_step()
            with self._cast():
                x = next(states, None)

    def _cast(self) -> torch.autocast:
        """The autocast context of a step."""
        device = self.policy.timestep.device.type
        return torch.autocast(device, dtype=torch.bfloat16, enabled=self.precision == "bfloat16")

    def sample(self, num: int, noise: torch.Generator, first: int | None = None) -> Tensor:
        """Draw samples, the last of `states`: [num, *event]."""
        return deque(self.states(num, noise, first), maxlen=1).pop()

    def conditioned_sample(self, num: int, noise: torch.Generator) -> tuple[Tensor, Condition]:
        """Draw samples with random conditions; returns both."""
        condition = self.policy.draw_condition(num, noise)
        return deque(self.states(num, noise, None, condition), maxlen=1).pop(), condition

    def idle(self) -> None:
        """Call `on_step` as often as for a batch, on a worker that has no batch while others sample."""
        if self.on_step is not None:
            for _ in range(self.policy.num_steps + 1):
                self.on_step()

    def bad(self, x: Tensor) -> Tensor:
        """The number of states in `x` [B, *event] that are not finite or beyond `bound`, []."""
        return num_beyond(x, self.bound)

    def require_finite(self, bad: Tensor, num: int) -> None:
        """Check that no worker has bad samples; the result is the same on all workers.

        Args:
            bad: number of bad samples of this worker, [].
            num: number of samples of all workers.

        Raises:
            DivergedError: there are bad samples.
        """
        total = sum(int(one) for one in self.workers.gather(bad.view(1)))
        if total:
            raise DivergedError(self.step, "samples", math.nan, self._sentence(total, num))

    def _sentence(self, bad: int, num: int) -> str:
        source = self.source or f"iteration {self.step}"
        what = f"{bad} of {num} samples of {source} are not finite or beyond {self.bound:g}"
        if self.guidance != 0.0:
            return f"Sampling diverged: with guidance {self.guidance:g}, {what}. Choose a weaker guidance."
        if self.step:
            return f"Training diverged: {what}. Lower the learning rates."
        return (
            f"Sampling diverged before any fine-tuning: {what}. The pretrained model is the cause: lower "
            "pretrain.optimizer.lr, or try other pretrain.weights."
        )


def stream_of(kind: str, seed: int) -> str:
    """The name of the noise stream of a run.

    Runs with the same seed, such as the arms of an ablation at that seed, have the same noise, so that their scores are
    paired. Runs with different seeds have independent noise, so that the spread of their scores, and the confidence
    interval of a mean over seeds, include the effect of the noise.

    Args:
        kind: SELECTION, REPORT or CONFIRMATION.
        seed: seed of the run.
    """
    return f"{kind}/seed_{seed}"


def generate(sampling: Sampling, num: int, config: EvaluateConfig) -> Tensor:
    """Draw `num` samples in the format of a data set [num, *event]: pixels in uint8, points in float32.

    The noise of a batch depends only on its index. With the same `batch_size`, the first samples are therefore the same
    for any `num`, and for any number of workers. All workers receive all samples.

    Raises:
        DivergedError: a sample is not finite.
    """
    return generate_conditioned(sampling, num, config)[0]


def generate_conditioned(sampling: Sampling, num: int, config: EvaluateConfig) -> tuple[Tensor, Condition]:
    """Draw samples as `generate` does; returns them and their conditions, on every worker."""
    workers, batches = sampling.workers, list(_batches(sampling, num, config))
    blocks: list[Tensor] = []
    conditions: list[Condition] = []
    for first in range(0, len(batches), workers.size):
        x, condition = _own_batch(sampling, batches, first + workers.rank, config)
        sampling.require_finite(sampling.bad(x), min(workers.size, len(batches) - first) * config.batch_size)
        blocks += workers.gather(encode(x))
        conditions += _gathered(condition, workers)
        if sampling.on_batch is not None:
            sampling.on_batch(min((first + workers.size) * config.batch_size, num))
    whole = (None if column[0] is None else torch.cat(column)[:num] for column in zip(*conditions, strict=True))
    return torch.cat(blocks)[:num], Condition(*whole)


def _own_batch(
    sampling: Sampling, batches: Sequence[tuple[int, torch.Generator]], mine: int, config: EvaluateConfig
) -> tuple[Tensor, Condition]:
    """Draw the worker's batch of a round, or a placeholder if the last round has fewer batches than workers."""
    if mine < len(batches):
        return sampling.conditioned_sample(config.batch_size, batches[mine][1])
    sampling.idle()
    policy = sampling.policy
    x = torch.zeros((config.batch_size, *policy.event), device=policy.timestep.device)
    return x, policy.draw_condition(config.batch_size, generator(config.seed, "idle", x.device))


def _gathered(condition: Condition, workers: ProcessGroup) -> list[Condition]:
    """Gather the conditions of all workers, in the order of ranks."""
    columns = [[None] * workers.size if own is None else workers.gather(own) for own in condition]
    return [Condition(*row) for row in zip(*columns, strict=True)]


def preview(sampling: Sampling, num: int, config: EvaluateConfig) -> Tensor:
    """Draw the first `num` samples of `generate`, up to rounding, without computing the rest of their batches.

    Args:
        sampling: how samples are drawn; `on_batch` and `workers` are not used.
        num: number of samples.
        config: sets the seed of the noise and the batch size.

    Raises:
        DivergedError: a sample is not finite.
    """
    blocks = []
    for start, noise in _batches(sampling, num, config):
        first = min(config.batch_size, num - start)
        with uncompiled():
            x = sampling.sample(config.batch_size, noise, first)
        sampling.require_finite(sampling.bad(x), first)
        blocks.append(encode(x))
    return torch.cat(blocks)


class Measured(NamedTuple):
    """Features of samples, and the sampling speed.

    Attributes:
        features: one row per sample, in order, on the host, [num, F].
        seconds_per_1000: wall time per 1,000 samples, from the fastest batch, since other processes may use the device.
    """

    features: Tensor
    seconds_per_1000: float


def measure(
    sampling: Sampling, num: int, config: EvaluateConfig, features_of: Callable[[Tensor, Condition], Tensor]
) -> Measured:
    """Compute the features of the samples of `generate`; each worker computes those of its own batches.

    Args:
        sampling: how samples are drawn.
        num: number of samples.
        config: sets the seed of the noise and the batch size.
        features_of: maps samples in the format of a data set, on the device, and their conditions to features [N, F]
            on the host; a worker without a batch in the last round calls it with an empty tensor [0].

    Raises:
        DivergedError: a sample is not finite.
    """
    workers, device = sampling.workers, sampling.policy.timestep.device
    batches, fastest, found = list(_batches(sampling, num, config)), math.inf, []
    for first in range(0, len(batches), workers.size):
        x, bad = torch.empty(0, device=device), torch.zeros((), dtype=torch.int64, device=device)
        condition = UNCONDITIONAL
        if first + workers.rank >= len(batches):
            sampling.idle()
        else:
            start, noise = batches[first + workers.rank]
            x, condition, bad, seconds = _timed_batch(sampling, noise, config)
            x, condition = x[: num - start], condition.rows(slice(num - start))
            fastest = min(fastest, seconds)
        sampling.require_finite(bad, min(workers.size, len(batches) - first) * config.batch_size)
        found.append(features_of(x, condition))
        if sampling.on_batch is not None:
            sampling.on_batch(min((first + workers.size) * config.batch_size, num))
    features = _in_order(found, len(batches), config.batch_size, workers)
    return Measured(features[:num], fastest * 1000.0 / (config.batch_size * workers.size))


def _timed_batch(
    sampling: Sampling, noise: torch.Generator, config: EvaluateConfig
) -> tuple[Tensor, Condition, Tensor, float]:
    """Draw a batch; returns samples in the format of a data set, conditions, number of bad samples, and seconds."""
    began = time.perf_counter()
    drawn, condition = sampling.conditioned_sample(config.batch_size, noise)
    x = encode(drawn)
    if x.is_cuda:
        torch.cuda.current_stream(x.device).synchronize()
    return x, condition, sampling.bad(drawn), time.perf_counter() - began


def _in_order(own: list[Tensor], num_batches: int, batch_size: int, workers: ProcessGroup) -> Tensor:
    """Gather the rows of all workers in the order of the batches; the last batch may be shorter than the others."""
    if workers.size == 1:
        return torch.cat(own)
    width = workers.on_rank_zero(lambda: own[0].shape[1])
    blocks: list[Tensor] = []
    for turn in range(math.ceil(num_batches / workers.size)):  # gathered blocks must have the same shape
        block = torch.zeros(batch_size, width)
        if turn < len(own) and len(own[turn]):
            block[: len(own[turn])] = own[turn]
        blocks += workers.gather(block)
    return torch.cat(blocks)


def generate_states(sampling: Sampling, num: int, config: EvaluateConfig) -> Tensor:
    """Return all states of the samples of `generate`, starting with the noise: [T+1, num, *event].

    Raises:
        DivergedError: a state is not finite.
    """
    alone, batches = replace(sampling, workers=SINGLE_PROCESS), []
    for start, noise in _batches(sampling, num, config):
        states = []
        for x in sampling.states(config.batch_size, noise):
            alone.require_finite(alone.bad(x), config.batch_size)
            states.append(encode(x)[: num - start])
        batches.append(torch.stack(states))
    return torch.cat(batches, dim=1)


def _batches(sampling: Sampling, num: int, config: EvaluateConfig) -> Iterator[tuple[int, torch.Generator]]:
    """Yield the index of the first sample of each batch, and the generator of its noise."""
    device = sampling.policy.timestep.device
    for index, start in enumerate(range(0, num, config.batch_size)):
        yield start, generator(config.seed, f"{sampling.stream}/{index}", device)
