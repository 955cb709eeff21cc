"""FID, KID, precision, recall and Inception Score from features, and the features of the shipped classifiers.

The values equal those of torch-fidelity, as the tests verify. Only InceptionV3 uses that package: importing it, with
torchvision and PyTorch's compiler, would take seconds in every process of a sweep.
"""

from collections.abc import Callable

import numpy as np
import torch
from torch import Tensor

from dxmi.metrics.classifier import load_classifier
from dxmi.metrics.gaussians import Gaussian
from dxmi.tensors import calling, chunks, require_finite

_BATCH = 1000
_SPLITS = 10
_NEIGHBOR = 3
_ROWS = 10_000
"""Maximum number of rows whose distances to all others are in memory at the same time."""


@torch.no_grad()
def classifier_features(name: str, pixels: Tensor) -> Tensor:
    """Features of uint8 `pixels` [N, 1, H, W] from the classifier `name`, float64 on the host, [N, 64]."""
    classifier = load_classifier(name).to(pixels.device)
    return torch.cat([classifier.features(batch).cpu() for batch in torch.split(pixels, _BATCH)]).double()


def _finite(generated: Tensor, reference: Tensor) -> tuple[Tensor, Tensor]:
    """Return the features after checking that they are finite."""
    return require_finite(generated, "the features of the samples"), require_finite(reference, "the data's features")


def frechet_distance(generated: Tensor, reference: Tensor) -> float:
    """|mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2)) of features [N, D] and [M, D] (FID, arXiv 1706.08500).

    Raises:
        DivergedError: a feature is not finite.
    """
    generated, reference = _finite(generated, reference)
    return Gaussian.of(reference).distance(generated)


def kernel_distance(
    generated: Tensor,
    reference: Tensor,
    *,
    subsets: int,
    subset_size: int,
    seed: int,
    on_step: Callable[[], None] | None = None,
) -> float:
    """Mean unbiased squared MMD with the cubic kernel over random subsets (KID, arXiv 1801.01401).

    A subset has `subset_size` rows, or the size of the smaller set if that is less. `on_step` is called after each
    subset, and may raise.

    Raises:
        DivergedError: a feature is not finite.
    """
    generated, reference = _finite(generated, reference)
    size = min(subset_size, len(generated), len(reference))
    random = np.random.RandomState(seed)

    def subset(features: Tensor) -> Tensor:
        return features[torch.from_numpy(random.choice(len(features), size, replace=False))]

    draws = calling(range(subsets), on_step)
    return float(np.mean([_squared_mmd(subset(generated), subset(reference)) for _ in draws]))


def _squared_mmd(x: Tensor, y: Tensor) -> float:
    """The unbiased estimate for two sets of equal size, [N, D] each."""
    num = len(x)

    def kernel(a: Tensor, b: Tensor) -> Tensor:
        return (a @ b.T / a.shape[1] + 1.0).pow(3)

    def without_diagonal(k: Tensor) -> Tensor:
        return (k.sum() - k.trace()) / (num * (num - 1))

    return float(without_diagonal(kernel(x, x)) + without_diagonal(kernel(y, y)) - 2.0 * kernel(x, y).mean())


def precision_recall(
    generated: Tensor, reference: Tensor, on_step: Callable[[], None] | None = None
) -> tuple[float, float]:
    """The fraction of each set within the 3-nearest-neighbor balls of the other (arXiv 1904.06991).

    `on_step` is called after every 10,000 rows of distances, which take seconds on a CPU, and may raise.

    Raises:
        DivergedError: a feature is not finite, since comparisons with NaN would count every sample as precise.
    """
    generated, reference = _finite(generated, reference)
    return _covered(generated, reference, on_step), _covered(reference, generated, on_step)


def _covered(points: Tensor, centers: Tensor, on_step: Callable[[], None] | None) -> float:
    """The fraction of `points` [N, D] that lie within the ball of at least one of `centers` [M, D]."""
    # Each center is its own nearest neighbor, so the third nearest of the others is the fourth nearest of all.
    blocks = calling(torch.split(centers, _ROWS), on_step)
    radius = torch.cat([torch.cdist(rows, centers).kthvalue(_NEIGHBOR + 1).values for rows in blocks])
    blocks = calling(torch.split(points, _ROWS), on_step)
    inside = [(torch.cdist(rows, centers) <= radius).any(dim=1) for rows in blocks]
    return float(torch.cat(inside).float().mean())


def inception_score(logits: Tensor, seed: int) -> float:
    """Exponential of the mean KL(p(y | x) | p(y)), averaged over ten parts of the samples (arXiv 1606.03498).

    Args:
        logits: logits of the classes, [N, C].
        seed: seed for shuffling the samples.

    Raises:
        DivergedError: a logit is not finite.
    """
    logits = require_finite(logits, "the logits of the samples")
    order = np.random.RandomState(seed).permutation(len(logits))
    log_p = logits[torch.from_numpy(order)].double().log_softmax(dim=1)
    parts = [log_p[rows] for rows in chunks(len(log_p), min(_SPLITS, len(log_p)))]
    return float(torch.stack([_exponential_divergence(part) for part in parts]).mean())


def _exponential_divergence(log_p: Tensor) -> Tensor:
    """Exponential of the mean KL from rows of log probabilities [N, C] to their mean distribution."""
    p = log_p.exp()
    return (p * (log_p - p.mean(dim=0).log())).sum(dim=1).mean().exp()
