"""What an evaluation looks at: samples of a policy from fixed noise."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.diffusion.policy import Guide, Policy
from dxmi.distributed import ALONE, Workers
from dxmi.errors import DivergedError
from dxmi.evaluation.config import EvaluateConfig
from dxmi.seeds import generator
from dxmi.tensors import encode, num_beyond

_BOUND = 1e6
"""Samples of a working policy are of the order of 1: clipped to pixels, larger ones would look like an image."""


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
        policy: from what.
        stream: name of the noise; with the evaluation's seed it fixes every sample, and everything else that is drawn
            to score them.
        guide: gradient of a value to descend, see `Policy.sample_states`.
        guidance: its strength.
        on_batch: called after each batch with how many samples there are so far; by all workers at the same time.
        on_step: called after each step of a batch, of which each worker has its own, and equally often by one that has
            none left; what it raises ends the sampling.
        workers: take the batches in turn.
        step: the iteration after which the policy was taken.
        source: names the policy where its samples are not finite; by default its iteration.
    """

    policy: Policy
    stream: str
    guide: Guide | None = None
    guidance: float = 0.0
    on_batch: Callable[[int], None] | None = None
    on_step: Callable[[], None] | None = None
    workers: Workers = ALONE
    step: int = 0
    source: str = ""

    @property
    def bound(self) -> float:
        """What no state comes near while all is well: a million times the start's or the data's deviation."""
        return _BOUND * max(1.0, self.policy.start_sigma)

    def states(
        self, num: int, noise: torch.Generator, first: int | None = None, condition: Condition | None = None
    ) -> Iterator[Tensor]:
        """`Policy.sample_states`, during which `on_step` is called."""
        for x in self.policy.sample_states(num, noise, self.guide, self.guidance, condition, first):
            yield x
            if self.on_step is not None:
                self.on_step()

    def sample(self, num: int, noise: torch.Generator, first: int | None = None) -> Tensor:
        """The last of `states`: [num, *event]."""
        return deque(self.states(num, noise, first), maxlen=1).pop()

    def conditioned_sample(self, num: int, noise: torch.Generator) -> tuple[Tensor, Condition]:
        """`sample`, and the condition of each sample."""
        condition = self.policy.draw_condition(num, noise)
        return deque(self.states(num, noise, None, condition), maxlen=1).pop(), condition

    def idle(self) -> None:
        """What a worker does while others sample: it calls `on_step` as often as they do."""
        if self.on_step is not None:
            for _ in range(self.policy.num_steps + 1):
                self.on_step()

    def bad(self, x: Tensor) -> Tensor:
        """How many of the states `x` [B, *event] are not finite or beyond `bound`, []."""
        return num_beyond(x, self.bound)

    def require_finite(self, bad: Tensor, num: int) -> None:
        """Check that no sample of a batch of any worker is bad; all workers come to the same result.

        Args:
            bad: how many of this worker's are, [].
            num: how many samples all workers have drawn.

        Raises:
            DivergedError: some are.
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
            f"Sampling diverged: {what}, and nothing was fine-tuned before. The pretrained model is at fault: lower "
            "pretrain.optimizer.lr, or try other pretrain.weights."
        )


def stream_of(kind: str, seed: int) -> str:
    """The name of a run's own noise of one kind.

    Runs with the same seed, such as the arms of an ablation at that seed, get the same noise, so that their scores are
    paired. Runs with different seeds get independent noise, so that the spread of their scores contains the effect of
    the noise, and the interval of a mean over seeds covers it.

    Args:
        kind: SELECTION, REPORT or CONFIRMATION.
        seed: of the run.
    """
    return f"{kind}/seed_{seed}"


def generate(sampling: Sampling, num: int, config: EvaluateConfig) -> Tensor:
    """`num` samples as a data set stores them [num, *event], pixels in uint8 and points in float32, on every worker.

    The noise of a batch depends on its place only, so the first samples of a longer run are those of a shorter one as
    long as `batch_size` is the same, and the number of workers changes none of them.

    Raises:
        DivergedError: a sample is not finite.
    """
    return generate_conditioned(sampling, num, config)[0]


def generate_conditioned(sampling: Sampling, num: int, config: EvaluateConfig) -> tuple[Tensor, Condition]:
    """The samples that `generate` gives, and the condition of each, on every worker."""
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
    """A worker's batch of this round; the last round may have fewer batches than workers."""
    if mine < len(batches):
        return sampling.conditioned_sample(config.batch_size, batches[mine][1])
    sampling.idle()
    policy = sampling.policy
    x = torch.zeros((config.batch_size, *policy.event), device=policy.timestep.device)
    return x, policy.draw_condition(config.batch_size, generator(config.seed, "idle", x.device))


def _gathered(condition: Condition, workers: Workers) -> list[Condition]:
    """Every worker's condition, in the order of ranks."""
    columns = [[None] * workers.size if own is None else workers.gather(own) for own in condition]
    return [Condition(*row) for row in zip(*columns, strict=True)]


def preview(sampling: Sampling, num: int, config: EvaluateConfig) -> Tensor:
    """The first `num` samples that `generate` gives, up to rounding, without computing the rest of their batches.

    Args:
        sampling: how samples are drawn; `on_batch` and `workers` have no part in this.
        num: how many.
        config: their noise and batches.

    Raises:
        DivergedError: a sample is not finite.
    """
    blocks = []
    for start, noise in _batches(sampling, num, config):
        first = min(config.batch_size, num - start)
        x = sampling.sample(config.batch_size, noise, first)
        sampling.require_finite(sampling.bad(x), first)
        blocks.append(encode(x))
    return torch.cat(blocks)


class Measured(NamedTuple):
    """What came of samples that were looked at as they were drawn.

    Attributes:
        features: one row a sample, in order, on the host, [num, F].
        seconds_per_1000: wall time of generating 1,000 samples: the fastest batch's, since others share the device.
    """

    features: Tensor
    seconds_per_1000: float


def measure(
    sampling: Sampling, num: int, config: EvaluateConfig, features_of: Callable[[Tensor, Condition], Tensor]
) -> Measured:
    """The features of the samples that `generate` gives; each worker computes those of its own batches as they come.

    Args:
        sampling: how samples are drawn.
        num: how many.
        config: their noise and batches.
        features_of: samples as a data set stores them, on the device, with their conditions, to rows of features
            [N, F] on the host; of none [0] for a worker that has no batch left while others have.

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
    """A batch of samples as a data set stores them, with their conditions, the number of bad ones, and the seconds."""
    began = time.perf_counter()
    drawn, condition = sampling.conditioned_sample(config.batch_size, noise)
    x = encode(drawn)
    if x.is_cuda:
        torch.cuda.current_stream(x.device).synchronize()
    return x, condition, sampling.bad(drawn), time.perf_counter() - began


def _in_order(own: list[Tensor], num_batches: int, batch_size: int, workers: Workers) -> Tensor:
    """The rows of all workers, who have taken batches of `batch_size` in turn; the last one may be shorter."""
    if workers.size == 1:
        return torch.cat(own)
    width = workers.on_first(lambda: own[0].shape[1])
    blocks: list[Tensor] = []
    for turn in range(math.ceil(num_batches / workers.size)):  # gathered blocks have to be of one shape
        block = torch.zeros(batch_size, width)
        if turn < len(own) and len(own[turn]):
            block[: len(own[turn])] = own[turn]
        blocks += workers.gather(block)
    return torch.cat(blocks)


def generate_states(sampling: Sampling, num: int, config: EvaluateConfig) -> Tensor:
    """The whole way of the samples that `generate` gives: [T+1, num, *event], noise first.

    Raises:
        DivergedError: a state on the way is not finite.
    """
    alone, batches = replace(sampling, workers=ALONE), []
    for start, noise in _batches(sampling, num, config):
        states = []
        for x in sampling.states(config.batch_size, noise):
            alone.require_finite(alone.bad(x), config.batch_size)
            states.append(encode(x)[: num - start])
        batches.append(torch.stack(states))
    return torch.cat(batches, dim=1)


def _batches(sampling: Sampling, num: int, config: EvaluateConfig) -> Iterator[tuple[int, torch.Generator]]:
    """Where each batch starts, and its noise."""
    device = sampling.policy.timestep.device
    for index, start in enumerate(range(0, num, config.batch_size)):
        yield start, generator(config.seed, f"{sampling.stream}/{index}", device)
