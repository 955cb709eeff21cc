"""What an evaluation looks at: samples of a policy from fixed noise."""

import math
import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from dxmi.diffusion.policy import Guide, Policy
from dxmi.diffusion.schedules import NUM_DIFFUSION_STEPS
from dxmi.distributed import ALONE, Workers
from dxmi.errors import DivergedError
from dxmi.evaluation.overlap import Beside
from dxmi.seeds import generator
from dxmi.tensors import encode, num_beyond

SELECTION, REPORT, CONFIRMATION = "selection", "report", "confirmation"
"""Noise streams: a run's best checkpoint is chosen on the first and scored on the second; the best trial of a sweep,
which is chosen by the second, is scored once more on the third. Each run has its own draw: see `stream_of`."""
PICTURES = "pictures"
"""The noise of the sample grids, which is the same for every run, so that their pictures can be compared."""
SCORING_VERSION = 2
"""Raised whenever a change of the code changes a score, so that cached references are scored again."""
RESULTS = ("best", "last")
CLASSIFIER, INCEPTION = FEATURES = ("classifier", "inception")
_MIN_SUBSET, _SEEDS = 2, 2**32
MIN_SAMPLES = 4
"""Precision and recall look at a sample's third neighbour."""
_BOUND = 1e6
"""Samples of a working policy are of the order of 1: clipped to pixels, larger ones would look like an image."""
NUM_SAMPLES_KEY = "eval/num_samples"


@dataclass(frozen=True, kw_only=True)
class EvaluateConfig:
    """What is scored, from how many samples, how often."""

    every: int = 150
    """Iterations between evaluations."""
    num_samples: int = 5_000
    """Samples of every score: of the curve, of the references and of the final report alike."""
    batch_size: int = 1_000
    """Samples generated at once."""
    seed: int = 0
    """Of the noise, together with the run's own seed: runs that share both are compared on the same noise."""
    kid_subsets: int = 20
    """Random subsets that KID averages over."""
    kid_subset_size: int = 1_000
    """Their size."""
    projections: int = 128
    """Directions of the sliced Wasserstein distance."""
    grid: int = 64
    """Images in a sample grid, or points in a picture of samples."""
    generations: int = 1
    """Independent draws of the report's noise on which the best checkpoint is scored; their mean is the score."""
    result: str = "best"
    """The checkpoint that counts as the best: best, which has the best score of the samples on noise of its own; or
    last, where that score is not all that matters, as in the plane, where the energy has to be right too."""
    features: str | None = None
    """Of images: classifier, the small one that ships for some data sets; or inception, InceptionV3's. null for the
    former where there is one, else the latter."""
    reference_images: int | None = None
    """Of images: how many of the data, drawn once, samples are compared with; null for all of them."""
    full_reference: bool = True
    """Score the pretrained model with all of its steps too, to which end hundreds of evaluations of the network are
    needed for each sample."""
    reference_steps: tuple[int, ...] | None = None
    """Numbers of network evaluations of further references, or null: with each, all samplers that a policy with so many
    steps is compared with. 1000 adds the 1000-step sampler with the large variance."""

    def __post_init__(self) -> None:
        for name in ("every", "batch_size", "kid_subsets", "kid_subset_size", "projections", "grid", "generations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.result not in RESULTS:
            raise ValueError(f"result is {self.result!r}: it must be one of {', '.join(RESULTS)}")
        if self.features is not None and self.features not in FEATURES:
            raise ValueError(f"features is {self.features!r}: it must be one of {', '.join(FEATURES)}, or null")
        if not all(1 <= steps <= NUM_DIFFUSION_STEPS for steps in self.reference_steps or ()):
            raise ValueError(f"reference_steps is {self.reference_steps}: each must be in 1..{NUM_DIFFUSION_STEPS}")
        if len(set(self.reference_steps or ())) < len(self.reference_steps or ()):
            raise ValueError(f"reference_steps is {self.reference_steps}: it names a number twice")
        if self.kid_subset_size < _MIN_SUBSET:
            raise ValueError(f"kid_subset_size is {self.kid_subset_size}: it must be at least {_MIN_SUBSET}")
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"seed is {self.seed}: it must be in 0..2^32 - 1")
        for name in ("num_samples", "reference_images"):
            number = getattr(self, name)
            if number is not None and number < MIN_SAMPLES:
                raise ValueError(f"{name} is {number}: it must be at least {MIN_SAMPLES}")


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
        policy: from what.
        stream: name of the noise; with the evaluation's seed it fixes every sample, and everything else that is drawn
            to score them.
        guide: gradient of a value to descend, see `Policy.walk`.
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

    def walk(self, num: int, noise: torch.Generator, first: int | None = None) -> Iterator[Tensor]:
        """`Policy.walk`, during which `on_step` is called."""
        for x in self.policy.walk(num, noise, self.guide, self.guidance, first=first):
            yield x
            if self.on_step is not None:
                self.on_step()

    def sample(self, num: int, noise: torch.Generator, first: int | None = None) -> Tensor:
        """The last state of `walk`: [num, *event]."""
        return deque(self.walk(num, noise, first), maxlen=1).pop()

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

    The noise of a batch depends on its place alone, so the first samples of a longer run are those of a shorter one
    as long as `batch_size` is the same, and workers change none of them.

    Raises:
        DivergedError: a sample is not finite.
    """
    policy, workers = sampling.policy, sampling.workers
    batches = list(_batches(sampling, num, config))
    blocks: list[Tensor] = []
    for first in range(0, len(batches), workers.size):
        mine = first + workers.rank
        if mine < len(batches):
            x = sampling.sample(config.batch_size, batches[mine][1])
        else:  # the last round may have fewer batches than workers
            sampling.idle()
            x = torch.zeros((config.batch_size, *policy.event), device=policy.diffusion_step.device)
        sampling.require_finite(sampling.bad(x), min(workers.size, len(batches) - first) * config.batch_size)
        blocks += workers.gather(encode(x))
        if sampling.on_batch is not None:
            sampling.on_batch(min((first + workers.size) * config.batch_size, num))
    return torch.cat(blocks)[:num]


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
    sampling: Sampling,
    num: int,
    config: EvaluateConfig,
    work: Callable[[Tensor], Tensor],
    *,
    threaded: bool | None = None,
) -> Measured:
    """The features of the samples that `generate` gives, computed by each worker of its own batches as they come.

    Args:
        sampling: how samples are drawn.
        num: how many.
        config: their noise and batches.
        work: samples as a data set stores them, on the device, to rows of features [N, F] on the host; of none [0] for
            a worker that has no batch left while others have.
        threaded: as for `Beside`.

    Raises:
        DivergedError: a sample is not finite.
    """
    workers, device = sampling.workers, sampling.policy.diffusion_step.device
    batches, fastest = list(_batches(sampling, num, config)), math.inf
    with Beside(work, device, threaded=threaded) as beside:
        for first in range(0, len(batches), workers.size):
            drawn = None
            if first + workers.rank >= len(batches):
                sampling.idle()
            else:
                start, noise = batches[first + workers.rank]
                began = time.perf_counter()
                drawn = sampling.sample(config.batch_size, noise)
                x = encode(drawn)
                if device.type == "cuda":
                    torch.cuda.current_stream(device).synchronize()
                fastest = min(fastest, time.perf_counter() - began)
            bad = torch.zeros((), dtype=torch.int64, device=device) if drawn is None else sampling.bad(drawn)
            sampling.require_finite(bad, min(workers.size, len(batches) - first) * config.batch_size)
            beside.put(torch.empty(0, device=device) if drawn is None else x[: num - start])
            if sampling.on_batch is not None:
                sampling.on_batch(min((first + workers.size) * config.batch_size, num))
        features = _in_order(beside.results(), len(batches), config.batch_size, workers)
    return Measured(features[:num], fastest * 1000.0 / (config.batch_size * workers.size))


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
        for x in sampling.walk(config.batch_size, noise):
            alone.require_finite(alone.bad(x), config.batch_size)
            states.append(encode(x)[: num - start])
        batches.append(torch.stack(states))
    return torch.cat(batches, dim=1)


def _batches(sampling: Sampling, num: int, config: EvaluateConfig) -> Iterator[tuple[int, torch.Generator]]:
    """Where each batch starts, and its noise."""
    device = sampling.policy.diffusion_step.device
    for index, start in enumerate(range(0, num, config.batch_size)):
        yield start, generator(config.seed, f"{sampling.stream}/{index}", device)
