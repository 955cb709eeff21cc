"""Scores of a policy's samples and of an energy: distances to the data.

Score keys of images, with the features of a classifier (`X` is its data set; the key is never plain `fid`):

    eval/fid_X               Frechet distance of features, lower is better
    eval/kid_X               kernel distance of features, lower is better
    eval/precision_X         share of samples that lie among the data
    eval/recall_X            share of the data that lies among the samples
    eval/sliced_wasserstein  on pixels in [-1, 1], order 2

of images, with the features of InceptionV3 (`N` is the number of samples, such as 5k, 50k or 1234):

    eval/fid_N               Frechet distance, which decreases with N: compare only scores with equal N
    eval/fid_infinity        the same, extrapolated to infinitely many samples
    eval/kid                 kernel distance, whose expectation does not depend on N
    eval/precision_N         share of samples that lie among the data, from at most 10,000 of each
    eval/recall_N            share of the data that lies among the samples, likewise
    eval/inception_score_N   higher is better; only if the weights include InceptionV3's classes

of points in the plane:

    eval/sliced_wasserstein  distance to the same number of data points, order 2
    eval/energy_auc          area under the ROC curve of -E as a classifier of data against uniform noise on [-4, 4]^2
    eval/energy_kl           KL(p | exp(-beta E) / Z) on a grid over that square, p the exact density, beta fitted
    eval/energy_beta         that beta, an inverse temperature

and of both:

    eval/kl_reference        KL(policy | pretrained policy) of a trajectory in nats, if the algorithm maximizes a reward
    eval/num_samples         number of samples from which the other scores were computed

All random quantities in a score (subsets, directions, uniform noise, held-out points of the plane) are drawn from
streams named after the stream of the samples, like their noise. Scores in runs that share a stream therefore differ
only because of the samples, and the spread between streams is that of the whole measurement. Random choices that depend
only on the data (the images with which samples are compared) are the same for all streams.

Why beta is fitted: with a fixed reference variance and cost_coef = entropy_coef = tau, the objective of the policy is
E[E(x_T)] + (tau / D) KL(policy's path | x_T followed by the reference's noise), where D is the dimension of a sample,
since tau weights means over dimensions. Where that bound is tight, it is minimized by x_T with the density
exp(-D E / tau) / Z. An energy whose policy has learned the data therefore has beta = D / tau, and another beta shows by
how much it has not. With tau = 0 there is no such temperature, although E may separate data from noise. With a fitted
beta, runs with any tau can be compared.
"""

import functools
import time
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

from dxmi.critics.energy import Energy
from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.data.dataset import Dataset, Split
from dxmi.data.images import Images
from dxmi.data.planar import SQUARE, Points
from dxmi.distributed import SINGLE_PROCESS, ProcessGroup
from dxmi.errors import UserError
from dxmi.evaluation.config import (
    INCEPTION,
    MIN_SAMPLES,
    NUM_SAMPLES_KEY,
    REPORT,
    SCORING_VERSION,
    EvaluateConfig,
    features_of,
)
from dxmi.evaluation.divergence import policy_divergence
from dxmi.evaluation.sampling import Sampling, generate_conditioned, measure
from dxmi.metrics.base import TEST_SPLIT, Evidence, Metric
from dxmi.metrics.classifier import CLASSIFIERS
from dxmi.metrics.density import calibrated_kl, grid_log_density, roc_auc, square_grid
from dxmi.metrics.fidelity import (
    classifier_features,
    frechet_distance,
    inception_score,
    kernel_distance,
    precision_recall,
)
from dxmi.metrics.gaussians import Gaussian, Moments
from dxmi.metrics.inception import NETWORK, NUM_FEATURES, Inception, file_digest, find_weights, load_inception
from dxmi.metrics.keys import (
    KL_KEY,
    Direction,
    ScoreKey,
    classifier_keys,
    count_name,
    inception_keys,
    inception_score_key,
    mean_scores,
    planar_keys,
    primary_key,
)
from dxmi.metrics.sliced_wasserstein import sliced_wasserstein
from dxmi.persistence.cache import cached
from dxmi.seeds import generator
from dxmi.tensors import decode, require_finite, require_finite_metrics

_CELLS = 160
"""Cells per side of the grid over the square; each is 0.05 wide, half the narrowest distribution's deviation."""
TEST_FLOOR, HALVES_FLOOR = "test images", "half against half"
"""Descriptions of the real images that are scored as the floor."""
_FLOOR_HALVES = 4
"""Number of random divisions of the data into halves whose mean score is the floor, if there are no test images."""
_FLOOR_SETS = 8
"""Number of sets of fresh data whose mean score is the floor."""
_KEPT = 10_000
"""Maximum number of images of the data whose features are kept, for the kernel distance, precision and recall."""
_ROLLOUTS = 1_000
"""Maximum number of rollouts over which the divergence from the pretrained policy is averaged."""
_REFERENCE_BATCH = 500
"""Number of images of the data whose features a worker computes at once."""

Score = Callable[[Tensor], dict[str, float]]
"""Maps samples in the format of a data set to scores by key."""


@dataclass(frozen=True)
class Scores:
    """Scores of one policy.

    Attributes:
        values: scores by key, including `eval/num_samples`.
        seconds_per_1000: wall time to generate 1,000 samples.
    """

    values: dict[str, float]
    seconds_per_1000: float


class Scorer(ABC):
    """Scores samples against one data set.

    Args:
        data: the data set.
        config: evaluation settings.
        workers: process group that generates samples; rank 0 scores them.

    Attributes:
        keys: keys of all scores of samples.
        metrics: further metrics of the same samples.
        panels: keys of scores to show in panels of curves.png next to the primary one.
        identity: identifies everything that scores depend on except for the config and the samples.
        about: the same in readable form: network for the features, hash of its weights, and signature of the data.
    """

    keys: Sequence[ScoreKey]
    metrics: Sequence[Metric] = ()
    panels: Sequence[str] = ()
    identity: str
    about: dict[str, str]

    @property
    def metric(self) -> str:
        """Name of the score by which checkpoints and trials are compared."""
        return primary_key(self.keys).name

    @property
    def direction(self) -> Direction:
        """Whether that score is minimized or maximized."""
        return primary_key(self.keys).direction

    def __init__(self, data: Dataset, config: EvaluateConfig, workers: ProcessGroup) -> None:
        self.data = data
        self.config = config
        self.workers = workers

    @abstractmethod
    def score(self, sampling: Sampling, energy: Energy | None = None) -> Scores:
        """Compute the scores that are logged during training, including `metric`."""

    @abstractmethod
    def full_evaluation(self, sampling: Sampling, energy: Energy | None = None) -> Scores:
        """Compute all scores in the module's docstring for this data, including those of the energy if it is given."""

    @abstractmethod
    def of_data(self, stream: str = REPORT) -> Scores | None:
        """The floor: the scores of real data in place of samples of `stream`; None if there are no data for it.

        For images, `about["floor"]` then says which were scored.
        """

    def _scores(self, sampling: Sampling, energy: Energy | None, score: Score) -> Scores:
        """Sample on all workers, score on rank 0, and broadcast the scores."""
        start, config = time.perf_counter(), self.config
        samples, condition = generate_conditioned(replace(sampling, workers=self.workers), config.num_samples, config)
        if samples.is_cuda:
            torch.cuda.synchronize()
        seconds = (time.perf_counter() - start) * 1000.0 / config.num_samples

        def scores() -> list[Any]:
            rows = [metric.observe(samples, condition) for metric in self.metrics]
            further = self._further(rows, energy, samples.device)
            values = {**score(samples), **further, **self._divergence(sampling)}
            return [self._checked(values, sampling.step), seconds]

        return Scores(*self.workers.on_rank_zero(scores))

    def _divergence(self, sampling: Sampling) -> dict[str, float]:
        """The divergence from the reference policy, if there is one, on noise of its own."""
        if sampling.reference is None:
            return {}
        device = sampling.policy.timestep.device
        noise = generator(self.config.seed, f"{sampling.stream}/divergence", device)
        num = min(self.config.num_samples, _ROLLOUTS)
        batch_size = self.config.batch_size
        return {KL_KEY.name: policy_divergence(sampling.policy, sampling.reference, num, noise, batch_size)}

    def _further(
        self,
        rows: Sequence[Tensor],
        energy: Energy | None,
        device: torch.device,
        metrics: Sequence[Metric] | None = None,
    ) -> dict[str, float]:
        """The scores of the further metrics (or of `metrics`); `rows` holds the observations of each."""
        values: dict[str, float] = {}
        for metric, own in zip(self.metrics if metrics is None else metrics, rows, strict=True):
            evidence = Evidence(own, self._energy_of(energy, device), self._test_split, self._train_split)
            if metric.has_evidence(evidence):
                values |= metric.scores(evidence)
        return values

    def _energy_of(self, energy: Energy | None, device: torch.device) -> Callable[[Tensor], Tensor] | None:
        """A function that computes E of stored samples in batches, on the host; None if E is missing or conditional."""
        if energy is None or energy.network.classes:
            return None

        @torch.no_grad()
        def energies(stored: Tensor) -> Tensor:
            batches = torch.split(stored, self.config.batch_size)
            return torch.cat([energy(decode(batch.to(device))).cpu() for batch in batches])

        return energies

    @functools.cached_property
    def _test_split(self) -> Split | None:
        needed = any(TEST_SPLIT in metric.needs for metric in self.metrics)
        return self.data.split("test") if needed else None

    @property
    def _train_split(self) -> Split:
        split = self.data.split("train")
        assert split is not None
        return split

    def _checked(self, values: dict[str, float], step: int = 0) -> dict[str, float]:
        """Check that the scores of iteration `step` are finite, and add the number of samples."""
        return require_finite_metrics(values, step) | {NUM_SAMPLES_KEY: float(self.config.num_samples)}

    def _generator(self, stream: str, what: str) -> torch.Generator:
        """The generator of a random quantity `what` in a score of samples of `stream`."""
        return generator(self.config.seed, f"{stream}/{what}")

    def _seed(self, stream: str, what: str) -> int:
        """The same as a seed in 0..2^31 - 1, for libraries that take a seed."""
        return int(torch.randint(2**31, (), generator=self._generator(stream, what)))

    def _sliced_wasserstein(self, samples: Tensor, data: Tensor, stream: str) -> float:
        """The distance between two sets in the format of a data set."""
        directions = self._generator(stream, "projections")
        projections = self.config.projections
        return sliced_wasserstein(decode(samples.cpu()), decode(data), projections=projections, generator=directions)


class _FeatureScorer(Scorer):
    """Scores images by comparing their features with those of the data.

    Args:
        images: the data.
        config: evaluation settings.
        device: device on which samples are generated and features computed.
        workers: process group that generates samples; rank 0 scores them.

    Raises:
        UserError: there are too few images to score against.
    """

    def __init__(self, images: Images, config: EvaluateConfig, device: torch.device, workers: ProcessGroup) -> None:
        super().__init__(images, config, workers)
        if len(images) < MIN_SAMPLES:
            raise UserError(f"The data set {images.name} holds {len(images)} images: scoring needs {MIN_SAMPLES}.")
        self.images = images
        self.device = device

    def _test_images(self) -> Tensor | None:
        """The published test images; None if there are none."""
        if not self.workers.on_rank_zero(self._has_test_images):
            return None
        test = self.images.split("test")
        assert test is not None
        return test.x

    def _as_many(self, rows: Tensor, stream: str) -> Tensor:
        """As many random rows, of test images or their features, as there are samples of `stream`, or fewer."""
        return some_rows(rows, self.config.num_samples, self._generator(stream, "floor"))

    def _has_test_images(self) -> bool:
        try:
            test = self.images.split("test")
        except UserError:  # their files are missing, which concerns only the floor
            return False
        return test is not None and len(test.x) >= MIN_SAMPLES

    def _floor(self, compute: Callable[[], dict[str, float]], num: int, what: str) -> Scores:
        """The scores of `num` real images, computed on rank 0; `what` describes the images."""
        values = self.workers.on_rank_zero(lambda: self._checked(compute()))
        self.about = {**self.about, "floor": what}
        return Scores(values | {NUM_SAMPLES_KEY: float(num)}, 0.0)


class ImageScorer(_FeatureScorer):
    """Scores images by the features of a classifier; those of the data are computed once and cached by signature.

    Args:
        images: the data.
        config: evaluation settings.
        cache: folder of cached features.
        device: device on which samples are generated and features computed.
        workers: process group that generates samples; rank 0 scores them.

    Raises:
        UserError: there are too few images to score against.
    """

    def __init__(
        self,
        images: Images,
        config: EvaluateConfig,
        cache: Path,
        device: torch.device,
        workers: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        super().__init__(images, config, device, workers)
        self.name = images.name
        self.keys = classifier_keys(self.name)
        self.distance_key = self.metric
        self.identity = f"{images.signature}-{self.name}-{CLASSIFIERS[self.name].sha256[:12]}"
        weights = CLASSIFIERS[self.name].sha256
        self.about = {"features": f"dxmi-{self.name}", "weights": weights, "reference": images.signature}
        path = cache / "features" / f"{self.identity}.cached"
        self.reference = torch.empty(0)
        workers.on_rank_zero(lambda: self._look_up(path))

    def _look_up(self, path: Path) -> None:
        """Load the features of the data on rank 0; an error there is raised on all workers."""
        self.reference = cached(path, self._reference_features)["features"]

    def _reference_features(self) -> dict[str, Tensor]:
        return {"features": classifier_features(self.name, self.images.pixels.to(self.device))}

    def score(self, sampling: Sampling, energy: Energy | None = None) -> Scores:
        """Compute the Frechet distance and the further metrics."""

        def distance(samples: Tensor) -> dict[str, float]:
            return {self.distance_key: frechet_distance(classifier_features(self.name, samples), self.reference)}

        return self._scores(sampling, energy, distance)

    def full_evaluation(self, sampling: Sampling, energy: Energy | None = None) -> Scores:
        """Compute all scores of images."""
        return self._scores(sampling, energy, lambda samples: self._distances(samples, sampling.stream))

    def of_data(self, stream: str = REPORT) -> Scores | None:
        """The scores of test images or, if there are none, the mean scores of random halves against the other halves.

        Further metrics are not computed of halves, which are part of the training data.
        """
        test = self._test_images()
        if test is None:
            return self._floor(lambda: self._mean_of_halves(stream), len(self.images) // 2, HALVES_FLOOR)
        held_out = self._as_many(test, stream)
        own = [metric for metric in self.metrics if metric.applies_to_data]

        def scores() -> dict[str, float]:
            rows = [metric.observe(held_out, UNCONDITIONAL) for metric in own]
            return {**self._distances(held_out, stream), **self._further(rows, None, held_out.device, own)}

        return self._floor(scores, len(held_out), TEST_FLOOR)

    def _mean_of_halves(self, stream: str) -> dict[str, float]:
        return mean_scores([self._half_scores(stream, number) for number in range(_FLOOR_HALVES)])

    def _half_scores(self, stream: str, number: int) -> dict[str, float]:
        """Distance, precision and recall of one random half of the data against the other."""
        order = torch.randperm(len(self.images), generator=self._generator(stream, f"halves/{number}"))
        one, other = order.tensor_split(2)
        return self._compared(self.reference[one], self.reference[other], stream)

    def _distances(self, samples: Tensor, stream: str) -> dict[str, float]:
        config, features = self.config, classifier_features(self.name, samples)
        return {
            **self._compared(features, self.reference, stream),
            f"eval/kid_{self.name}": kernel_distance(
                features,
                self.reference,
                subsets=config.kid_subsets,
                subset_size=config.kid_subset_size,
                seed=self._seed(stream, "kid"),
            ),
            "eval/sliced_wasserstein": self._sliced_wasserstein(samples, self.images.pixels, stream),
        }

    def _compared(self, features: Tensor, reference: Tensor, stream: str) -> dict[str, float]:
        """Distance, precision and recall of samples, compared with images with the features `reference`."""
        # As many as samples, since comparing all pairs of a large data set takes minutes.
        neighbors = some_rows(reference, self.config.num_samples, self._generator(stream, "neighbours"))
        precision, recall = precision_recall(features, neighbors)
        return {
            self.distance_key: frechet_distance(features, reference),
            f"eval/precision_{self.name}": precision,
            f"eval/recall_{self.name}": recall,
        }


def some_rows(x: Tensor, num: int, generator: torch.Generator) -> Tensor:
    """Select `num` random rows, or all rows if there are at most `num`."""
    return x if len(x) <= num else x[torch.randperm(len(x), generator=generator)[:num]]


@dataclass(frozen=True)
class _Reference:
    """The features of the data, reduced to what scores need.

    Attributes:
        gaussian: Gaussian fitted to the features of all images.
        features: features of a random subset, float32 on the host, [M, 2048].
    """

    gaussian: Gaussian
    features: Tensor

    def distance(self, features: Tensor) -> float:
        """The FID of samples with features [N, 2048]."""
        return self.gaussian.distance(features.to(self.gaussian.mean.device))


class InceptionScorer(_FeatureScorer):
    """Scores images by the features of InceptionV3, which are computed after each batch of samples.

    Args:
        images: the data.
        config: evaluation settings.
        cache: folder of cached features.
        device: device on which samples are generated and features computed.
        workers: process group that generates samples and computes features; rank 0 computes the scores.

    Raises:
        UserError: there are too few images to score against, they have neither 1 nor 3 channels, or the network's
            weights are not available.
    """

    def __init__(
        self,
        images: Images,
        config: EvaluateConfig,
        cache: Path,
        device: torch.device,
        workers: ProcessGroup = SINGLE_PROCESS,
    ) -> None:
        super().__init__(images, config, device, workers)
        if images.event[0] not in (1, 3):
            raise UserError(f"The data set {images.name} has {images.event[0]} channels: InceptionV3 sees 1 or 3.")
        workers.on_rank_zero(lambda: str(find_weights()))  # on rank 0 first, so that a download happens only once
        self.weights = find_weights()
        sha256 = workers.on_rank_zero(lambda: file_digest(self.weights))
        self.keys = inception_keys(config.num_samples)
        self.distance_key = self.metric
        self.identity = f"{images.signature}-{NETWORK}-{sha256[:12]}"
        self.about = {"features": NETWORK, "weights": sha256, "reference": images.signature}
        self.path = cache / "features" / f"{self.identity}-v{SCORING_VERSION}.cached"
        self._reference: _Reference | None = None

    def network(self) -> Inception:
        """InceptionV3 on the device, which all scorers of this process share."""
        return load_inception(self.weights, self.device)

    def reference(self, on_step: Callable[[], None] | None = None) -> _Reference:
        """The features of the data, computed once by all workers and cached; for `on_step` see `Sampling`."""
        if self._reference is None:
            compute = functools.partial(self._reference_tensors, on_step)
            tensors = cached(self.path, compute, self.workers, on_step)
            gaussian = Gaussian(tensors["mean"].to(self.device), tensors["root"].to(self.device))
            self._reference = _Reference(gaussian, tensors["features"])
        return self._reference

    def of_data(self, stream: str = REPORT) -> Scores | None:
        """The distance, precision and recall of test images; None if there are none, since halves would be too few."""
        test = self._test_images()
        if test is None:
            return None
        reference = self.reference()
        path = self.path.with_name(f"{self.identity}-test-v{SCORING_VERSION}.cached")
        features = cached(path, lambda: {"features": self._features_of(test)}, self.workers)["features"]
        pool = self._as_many(features, stream)
        return self._floor(lambda: self._compared(stream, None, reference, pool), len(pool), TEST_FLOOR)

    def _features_of(self, pixels: Tensor) -> Tensor:
        """The features [N, 2048] of images on the host, computed by all workers."""
        return torch.cat([features for _, features in self._data_features(None, pixels)])

    def _reference_tensors(self, on_step: Callable[[], None] | None) -> dict[str, Tensor]:
        num, moments, kept = len(self.images), None, []
        chosen = torch.zeros(num, dtype=torch.bool)
        chosen[torch.randperm(num, generator=generator(0, "reference"))[:_KEPT]] = True
        for rows, features in self._data_features(on_step, self.images.pixels):
            new = Moments.of(features.to(self.device))
            moments = new if moments is None else moments.merged(new)
            kept.append(features[chosen[rows]])
        assert moments is not None
        features = torch.cat(kept)
        gaussian = Gaussian.fitted(moments) if num > len(features) else Gaussian.of(features.to(self.device))
        return {"mean": gaussian.mean, "root": gaussian.root, "features": features}

    def _data_features(self, on_step: Callable[[], None] | None, pixels: Tensor) -> Iterator[tuple[slice, Tensor]]:
        """Yield the features of consecutive images, with their indices; each worker computes a block of them."""
        num, together, network = len(pixels), _REFERENCE_BATCH * self.workers.size, self.network()
        disable = None if self.workers.is_rank_zero else True
        with tqdm(total=num, unit="images", desc="features of the data", leave=False, disable=disable) as bar:
            for start in range(0, num, together):
                first = start + _REFERENCE_BATCH * self.workers.rank
                own = pixels[first : min(first + _REFERENCE_BATCH, num)]
                block = torch.zeros(_REFERENCE_BATCH, NUM_FEATURES)
                if len(own):
                    block[: len(own)] = network(own, on_step).pool.cpu()
                self._keep_step(on_step, len(own), _REFERENCE_BATCH)
                count = min(together, num - start)
                yield slice(start, start + count), torch.cat(self.workers.gather(block))[:count]
                bar.update(count)

    def score(self, sampling: Sampling, energy: Energy | None = None) -> Scores:
        """Compute the Frechet distance and the further metrics."""

        def distance(reference: _Reference, pool: Tensor, _: Tensor) -> dict[str, float]:
            return {self.distance_key: reference.distance(pool)}

        return self._measured(sampling, energy, distance)

    def full_evaluation(self, sampling: Sampling, energy: Energy | None = None) -> Scores:
        """Compute all scores of images."""
        on_step = (
            sampling.on_step if self.workers.size == 1 else None
        )  # all workers must call it, but only rank 0 would
        return self._measured(sampling, energy, functools.partial(self._distances, sampling.stream, on_step))

    def _measured(
        self,
        sampling: Sampling,
        energy: Energy | None,
        score: Callable[[_Reference, Tensor, Tensor], dict[str, float]],
    ) -> Scores:
        """Sample and compute features on all workers, score on rank 0, and broadcast the scores."""
        reference, network = self.reference(sampling.on_step), self.network()
        on_piece = sampling.on_step if self.device.type == "cpu" else None  # on a GPU, features take little time

        widths: list[int] = []

        def features(pixels: Tensor, condition: Condition) -> Tensor:
            if not len(pixels):
                self._keep_step(on_piece, 0, self.config.batch_size)
                return torch.empty(0)
            columns = [torch.cat(network(pixels, on_piece), dim=1).cpu()]
            columns += [metric.observe(pixels, condition).float() for metric in self.metrics]
            widths[:] = [column.shape[1] for column in columns]
            self._keep_step(on_piece, len(pixels), self.config.batch_size)
            return torch.cat(columns, dim=1)

        measured = measure(replace(sampling, workers=self.workers), self.config.num_samples, self.config, features)

        def scores() -> dict[str, float]:
            found, *rows = torch.split(measured.features, widths, dim=1)
            pool, logits = found[:, :NUM_FEATURES], found[:, NUM_FEATURES:]
            further = self._further(rows, energy, self.device)
            values = {**score(reference, pool, logits), **further, **self._divergence(sampling)}
            return self._checked(values, sampling.step)

        return Scores(self.workers.on_rank_zero(scores), measured.seconds_per_1000)

    def _keep_step(self, on_piece: Callable[[], None] | None, num: int, most: int) -> None:
        """Call `on_piece` for the missing pieces of a worker with `num` images, as often as one with `most` images."""
        if on_piece is not None:
            for _ in range(self.network().num_pieces(most) - self.network().num_pieces(num)):
                on_piece()

    def _distances(
        self, stream: str, on_step: Callable[[], None] | None, reference: _Reference, pool: Tensor, logits: Tensor
    ) -> dict[str, float]:
        """The scores of features [N, 2048] and logits [N, 1008], or [N, 0] if there are none."""
        config, kept = self.config, reference.features
        values = {
            **self._compared(stream, on_step, reference, pool),
            "eval/fid_infinity": reference.gaussian.distance_at_infinity(
                pool.to(self.device), self._generator(stream, "extrapolation"), on_step
            ),
            "eval/kid": kernel_distance(
                pool.double(),
                kept.double(),
                subsets=config.kid_subsets,
                subset_size=config.kid_subset_size,
                seed=self._seed(stream, "kid"),
                on_step=on_step,
            ),
        }
        if logits.shape[1]:
            key = inception_score_key(config.num_samples).name
            values[key] = inception_score(logits, self._seed(stream, "inception_score"))
        return values

    def _compared(
        self, stream: str, on_step: Callable[[], None] | None, reference: _Reference, pool: Tensor
    ) -> dict[str, float]:
        """Distance, precision and recall of features [N, 2048]."""
        some = some_rows(pool, _KEPT, self._generator(stream, "neighbours/samples"))
        neighbors = some_rows(reference.features, len(some), self._generator(stream, "neighbours"))
        precision, recall = precision_recall(some, neighbors, on_step)
        size_name = count_name(self.config.num_samples)
        return {
            self.distance_key: reference.distance(pool),
            f"eval/precision_{size_name}": precision,
            f"eval/recall_{size_name}": recall,
        }


_PLANAR_DISTANCE = primary_key(planar_keys()).name


class PlanarScorer(Scorer):
    """Scores points in the plane, and the energy against the exact density.

    Args:
        points: the data, from whose distribution as many held-out points are drawn as there are samples.
        config: evaluation settings.
        workers: process group that generates samples; rank 0 scores them.
    """

    panels = ("eval/energy_auc",)

    def __init__(self, points: Points, config: EvaluateConfig, workers: ProcessGroup = SINGLE_PROCESS) -> None:
        super().__init__(points, config, workers)
        self.keys = planar_keys()
        self.points = points
        self.identity = f"{points.signature}-{points.name}"
        self.about = {"reference": points.signature}
        self._held_out: tuple[str, Tensor] | None = None
        self.cells = square_grid(SQUARE, _CELLS)

    def reference(self, stream: str) -> Tensor:
        """Held-out points with which samples of a stream are compared, [num_samples, 2]; those last used are kept."""
        if self._held_out is None or self._held_out[0] != stream:
            name = f"{self.config.seed}/{stream}"
            self._held_out = stream, self.points.held_out(self.config.num_samples, f"test/{name}")
        return self._held_out[1]

    @property
    def log_density(self) -> Tensor:
        """The log density of the data in each cell of the grid, [G]."""
        return grid_log_density(self.points.distribution, _CELLS)

    def score(self, sampling: Sampling, energy: Energy | None = None) -> Scores:
        """Compute all scores, which take little time."""
        return self.full_evaluation(sampling, energy)

    def full_evaluation(self, sampling: Sampling, energy: Energy | None = None) -> Scores:
        """Compute all scores of points."""
        stream = sampling.stream

        def score(samples: Tensor) -> dict[str, float]:
            distance = {_PLANAR_DISTANCE: self._sliced_wasserstein(samples, self.reference(stream), stream)}
            return distance if energy is None else distance | self._energy_scores(energy, samples.device, sampling)

        return self._scores(sampling, energy, score)

    def of_data(self, stream: str = REPORT) -> Scores | None:
        """The scores of the data: the mean distance of sets of fresh points, the area under the ROC curve of the exact
        density, and the further metrics of all these points.
        """
        start, reference = time.perf_counter(), self.reference(stream)
        sets = [
            self.points.held_out(self.config.num_samples, f"floor/{index}/{stream}") for index in range(_FLOOR_SETS)
        ]
        seconds = (time.perf_counter() - start) * 1000.0 / (self.config.num_samples * _FLOOR_SETS)
        floor = sum(self._sliced_wasserstein(points, reference, stream) for points in sets) / _FLOOR_SETS
        # The density, not its logarithm, which may be minus infinity; the ranks are the same.
        exact = [self.points.distribution.log_density(points).exp() for points in (reference, self._uniform(stream))]
        rows = [metric.observe(torch.cat(sets), UNCONDITIONAL) for metric in self.metrics]
        further = self._further(rows, None, torch.device("cpu"))
        values = {_PLANAR_DISTANCE: floor, "eval/energy_auc": roc_auc(*exact), **further}
        return Scores(self._checked(values), seconds)

    @torch.no_grad()
    def _energy_scores(self, energy: Energy, device: torch.device, sampling: Sampling) -> dict[str, float]:
        stream, step = sampling.stream, sampling.step

        def score(points: Tensor) -> Tensor:
            return require_finite(energy(points.to(device)).cpu(), f"the energy of iteration {step}", step)

        calibrated = calibrated_kl(score(self.cells), self.log_density)
        return {
            "eval/energy_auc": roc_auc(-score(self.reference(stream)), -score(self._uniform(stream))),
            "eval/energy_kl": calibrated.kl,
            "eval/energy_beta": calibrated.beta,
        }

    def _uniform(self, stream: str) -> Tensor:
        """Uniform noise on the square, [num_samples, 2]."""
        noise = torch.rand((self.config.num_samples, 2), generator=self._generator(stream, "uniform"))
        return (2.0 * noise - 1.0) * SQUARE


def build_scorer(
    data: Dataset,
    config: EvaluateConfig,
    cache: Path,
    device: torch.device,
    workers: ProcessGroup = SINGLE_PROCESS,
    *,
    metrics: Sequence[Metric] = (),
    keys: Sequence[ScoreKey] | None = None,
) -> Scorer:
    """Build the scorer for the samples of a data set.

    Args:
        data: the data set.
        config: evaluation settings.
        cache: folder of cached features.
        device: device on which samples are generated and features computed.
        workers: process group that generates samples.
        metrics: further metrics of the same samples.
        keys: keys of all scores; None if there are only distances to the data.

    Raises:
        UserError: there are too few images to score against, or no network for their features.
    """
    scorer = _distance_scorer(data, config, cache, device, workers)
    scorer.metrics = metrics
    scorer.keys = scorer.keys if keys is None else keys
    return scorer


def _distance_scorer(
    data: Dataset, config: EvaluateConfig, cache: Path, device: torch.device, workers: ProcessGroup
) -> Scorer:
    if isinstance(data, Points):
        return PlanarScorer(data, config, workers)
    assert isinstance(data, Images)
    if config.reference_images is not None:
        data = _some_images(data, config.reference_images)
    try:
        features = features_of(data.name, config)
    except ValueError as error:
        raise UserError(f"evaluate.{error}.") from error
    return (InceptionScorer if features == INCEPTION else ImageScorer)(data, config, cache, device, workers)


def _some_images(images: Images, num: int) -> Images:
    """Select `num` images, always the same ones, in their original order; all images if there are at most `num`."""
    if len(images) <= num:
        return images
    rows = torch.randperm(len(images), generator=generator(0, "reference images"))[:num].sort().values
    signature = f"{images.signature}-{num}"
    return replace(images, pixels=images.pixels[rows], labels=images.labels[rows], signature=signature)
