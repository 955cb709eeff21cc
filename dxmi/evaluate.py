"""Scoring a policy: samples from fixed noise, features, distances to the data.

Score keys (`X` is the data set whose classifier gives the features, never plain `fid`):

    eval/fid_X               Frechet distance of features, lower is better
    eval/kid_X               kernel distance of features, lower is better
    eval/precision_X         share of samples that lie among the data
    eval/recall_X            share of the data that lies among the samples
    eval/sliced_wasserstein  on pixels in [-1, 1], order 2
    eval/num_samples         how many samples the scores beside it were computed from
"""

import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dxmi.cache import cached
from dxmi.data import Images
from dxmi.errors import UserError
from dxmi.metrics.classifier import CLASSIFIERS
from dxmi.metrics.fidelity import classifier_features, frechet_distance, kernel_distance, precision_recall
from dxmi.metrics.sliced_wasserstein import sliced_wasserstein
from dxmi.sampler import Guide, Policy
from dxmi.seeds import generator
from dxmi.tensors import from_uint8, to_uint8
from dxmi.workers import ALONE, Workers

SELECTION, REPORT = "selection", "report"
"""Noise streams: the best checkpoint is chosen on one and scored on the other."""
SCORING_VERSION = 1
"""Raised whenever a change of the code changes a score, so that cached references are scored again."""
_MIN_SUBSET, _SEEDS = 2, 2**32
MIN_SAMPLES = 4
"""Precision and recall look at a sample's third neighbour."""
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
    """Of the noise; runs that share it are compared on the same noise."""
    kid_subsets: int = 20
    """Random subsets that KID averages over."""
    kid_subset_size: int = 1_000
    """Their size."""
    projections: int = 128
    """Directions of the sliced Wasserstein distance."""
    grid: int = 64
    """Images in a sample grid."""
    generations: int = 1
    """Independent draws of the report's noise on which the best checkpoint is scored; the first is the score."""

    def __post_init__(self) -> None:
        for name in ("every", "batch_size", "kid_subsets", "kid_subset_size", "projections", "grid", "generations"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least 1")
        if self.kid_subset_size < _MIN_SUBSET:
            raise ValueError(f"kid_subset_size is {self.kid_subset_size}: it must be at least {_MIN_SUBSET}")
        if not 0 <= self.seed < _SEEDS:
            raise ValueError(f"seed is {self.seed}: it must be in 0..2^32 - 1")
        if self.num_samples < MIN_SAMPLES:
            raise ValueError(f"num_samples is {self.num_samples}: it must be at least {MIN_SAMPLES}")


@dataclass(frozen=True)
class Scores:
    """Scores of one policy.

    Attributes:
        values: by key, `eval/num_samples` among them.
        seconds_per_1000: wall time of generating 1,000 samples.
    """

    values: dict[str, float]
    seconds_per_1000: float


@dataclass(frozen=True)
class Sampling:
    """How samples are drawn.

    Attributes:
        policy: from what.
        stream: name of the noise; with the seed it fixes every sample.
        guide: gradient of a value to descend, see `Policy.walk`.
        guidance: its strength.
        on_batch: called after each batch with how many samples there are so far; by all workers at the same time.
        workers: take the batches in turn.
    """

    policy: Policy
    stream: str
    guide: Guide | None = None
    guidance: float = 0.0
    on_batch: Callable[[int], None] | None = None
    workers: Workers = ALONE


def generate(sampling: Sampling, num: int, config: EvaluateConfig) -> Tensor:
    """`num` samples as uint8 [num, *event], on every worker.

    The noise of a batch depends on its place alone, so the first samples of a longer run are those of a shorter one
    as long as `batch_size` is the same, and workers change none of them.
    """
    policy, workers = sampling.policy, sampling.workers
    batches = list(_batches(sampling, num, config))
    blocks: list[Tensor] = []
    for first in range(0, len(batches), workers.size):
        mine = first + workers.rank
        if mine < len(batches):
            x = policy.sample(config.batch_size, batches[mine][1], sampling.guide, sampling.guidance)
        else:  # the last round may have fewer batches than workers
            x = torch.zeros((config.batch_size, *policy.event), device=policy.diffusion_step.device)
        blocks += workers.gather(to_uint8(x))
        if sampling.on_batch is not None:
            sampling.on_batch(min((first + workers.size) * config.batch_size, num))
    return torch.cat(blocks)[:num]


def generate_states(sampling: Sampling, num: int, config: EvaluateConfig) -> Tensor:
    """The whole way of the samples that `generate` gives: uint8 [T+1, num, *event], noise first."""
    batches = []
    for start, noise in _batches(sampling, num, config):
        walk = sampling.policy.walk(config.batch_size, noise, sampling.guide, sampling.guidance)
        batches.append(torch.stack([to_uint8(x)[: num - start] for x in walk]))
    return torch.cat(batches, dim=1)


def _batches(sampling: Sampling, num: int, config: EvaluateConfig) -> Iterator[tuple[int, torch.Generator]]:
    """Where each batch starts, and its noise."""
    device = sampling.policy.diffusion_step.device
    for index, start in enumerate(range(0, num, config.batch_size)):
        yield start, generator(config.seed, f"{sampling.stream}/{index}", device)


class Scorer:
    """Scores samples against one data set, whose features are computed once and cached by signature.

    Args:
        images: the data.
        config: what is scored.
        cache: folder of cached features.
        device: where samples are generated and features computed.
        workers: generate samples together; the first scores them.

    Raises:
        UserError: there are too few images to score against.
    """

    def __init__(
        self, images: Images, config: EvaluateConfig, cache: Path, device: torch.device, workers: Workers = ALONE
    ) -> None:
        if len(images) < MIN_SAMPLES:
            raise UserError(f"The data set {images.name} holds {len(images)} images: scoring needs {MIN_SAMPLES}.")
        self.images = images
        self.config = config
        self.device = device
        self.workers = workers
        self.name = images.name
        self.metric = f"eval/fid_{self.name}"
        self.identity = f"{images.signature}-{self.name}-{CLASSIFIERS[self.name].sha256[:12]}"
        path = cache / "features" / f"{self.identity}.cached"
        self.reference = cached(path, self._reference_features)["features"] if workers.is_first else torch.empty(0)

    def _reference_features(self) -> dict[str, Tensor]:
        return {"features": classifier_features(self.name, self.images.pixels.to(self.device))}

    def quick(self, sampling: Sampling) -> Scores:
        """The Frechet distance alone: what the curve shows."""
        return self._scores(sampling, lambda _, features: {self.metric: frechet_distance(features, self.reference)})

    def full(self, sampling: Sampling) -> Scores:
        """Every score that the module's docstring lists."""
        return self._scores(sampling, self._distances)

    def _scores(self, sampling: Sampling, distances: Callable[[Tensor, Tensor], dict[str, float]]) -> Scores:
        """All workers sample; the first computes `distances` of the samples and their features, and tells them."""
        start = time.perf_counter()
        samples = generate(replace(sampling, workers=self.workers), self.config.num_samples, self.config)
        if samples.is_cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) * 1000.0 / self.config.num_samples

        def score() -> list[Any]:
            values = distances(samples, classifier_features(self.name, samples))
            return [self._with_count(values), seconds]

        return Scores(*self.workers.on_first(score))

    def _distances(self, samples: Tensor, features: Tensor) -> dict[str, float]:
        config = self.config
        precision, recall = precision_recall(features, self._neighbours())
        return {
            self.metric: frechet_distance(features, self.reference),
            f"eval/kid_{self.name}": kernel_distance(
                features,
                self.reference,
                subsets=config.kid_subsets,
                subset_size=config.kid_subset_size,
                seed=config.seed,
            ),
            f"eval/precision_{self.name}": precision,
            f"eval/recall_{self.name}": recall,
            "eval/sliced_wasserstein": sliced_wasserstein(
                from_uint8(samples.cpu()),
                from_uint8(self.images.pixels),
                projections=config.projections,
                generator=generator(config.seed, "projections"),
            ),
        }

    def _neighbours(self) -> Tensor:
        """As many reference features as there are samples: comparing all pairs of a large data set takes minutes."""
        if len(self.reference) <= self.config.num_samples:
            return self.reference
        order = torch.randperm(len(self.reference), generator=generator(self.config.seed, "neighbours"))
        return self.reference[order[: self.config.num_samples]]

    def _with_count(self, values: dict[str, float]) -> dict[str, float]:
        return values | {NUM_SAMPLES_KEY: float(self.config.num_samples)}
