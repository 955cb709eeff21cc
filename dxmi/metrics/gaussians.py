"""The Frechet distance of many features: a Gaussian fitted once, and the distance that infinitely many samples have.

    FID(N) = |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2))      mu, S of N samples, mu', S' of the reference

With S' = R R^T and centred features X [N, D], tr (S S')^(1/2) is the sum of the singular values of X R / sqrt(N - 1):
a symmetric problem of min(N, D) dimensions, where torch-fidelity solves a general one of D; the values are the same.

FID(N) is biased, by b / N with a b that depends on the sampler, so that two samplers may swap places as N grows. A line
through FID against 1 / N meets 1 / N = 0 at an estimate without that bias (Chong and Forsyth, arXiv 1911.07023).

Axis letters: N samples, D features. Everything is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dxmi.tensors import calling, require_finite

POINTS = 15
"""Of the line, as in the paper's code."""
FEWEST = 5_000
"""Samples of its smallest set, likewise; half of them where there are fewer than twice as many."""


@dataclass(frozen=True)
class Moments:
    """What a Gaussian is fitted to.

    Attributes:
        count: samples seen.
        mean: [D].
        scatter: sum of (f - mean)(f - mean)^T over them, [D, D].
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """Of features [N, D]."""
        features = features.double()
        mean = features.mean(0)
        centred = features - mean
        return cls(len(features), mean, centred.T @ centred)

    def merged(self, other: "Moments") -> "Moments":
        """Of the samples of both (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        gap = other.mean - self.mean
        between = torch.outer(gap, gap) * (self.count * other.count / count)
        return Moments(count, self.mean + gap * (other.count / count), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """With N - 1 in the denominator, [D, D]."""
        return self.scatter / (self.count - 1)


@dataclass(frozen=True)
class Gaussian:
    """A reference to measure distances to.

    Attributes:
        mean: [D].
        root: R with R R^T its covariance, [D, R].
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Gaussian":
        """Fitted to features [N, D]."""
        if len(features) > features.shape[1]:
            return cls.fitted(Moments.of(features))
        mean = features.double().mean(0)
        return cls(mean, (features.double() - mean).T.contiguous() / (len(features) - 1) ** 0.5)

    @classmethod
    def fitted(cls, moments: Moments) -> "Gaussian":
        """To moments of samples."""
        root, failed = torch.linalg.cholesky_ex(moments.covariance)
        if failed:  # fewer samples than features, or features that never differ
            values, vectors = torch.linalg.eigh(moments.covariance)
            root = vectors * values.clamp_min(0.0).sqrt()
        return cls(moments.mean, root.contiguous())  # LAPACK's are column-major, those read from a file are not

    def distance(self, features: Tensor) -> float:
        """FID of features [N, D], at least two of them, on the reference's device.

        Raises:
            DivergedError: a feature is not finite.
        """
        features = require_finite(features, "the features of the samples").to(self.mean)
        mean = features.mean(0)
        centred = (features - mean) / (len(features) - 1) ** 0.5
        crossed = centred @ self.root
        gram = crossed @ crossed.T if len(crossed) < crossed.shape[1] else crossed.T @ crossed  # the smaller one
        cross = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt().sum()
        variances = centred.square().sum() + self.root.square().sum()
        return float((mean - self.mean).square().sum() + variances - 2.0 * cross)

    def distance_at_infinity(
        self, features: Tensor, generator: torch.Generator, on_step: Callable[[], None] | None = None
    ) -> float:
        """FID of infinitely many samples, extrapolated from random subsets of these [N, D].

        Args:
            features: of samples, on the reference's device.
            generator: draws the subsets, on the host.
            on_step: called after each of them, and may raise.
        """
        sizes = set_sizes(len(features))
        drawn = [torch.randperm(len(features), generator=generator)[:size] for size in sizes]
        distances = [self.distance(features[rows.to(features.device)]) for rows in calling(drawn, on_step)]
        return intercept(torch.tensor([1.0 / size for size in sizes]).double(), torch.tensor(distances).double())


def set_sizes(num: int) -> list[int]:
    """Of the subsets of `num` samples, evenly spaced up to all of them."""
    smallest = max(min(FEWEST, num // 2), 2)
    return torch.linspace(smallest, num, POINTS, dtype=torch.float64).round().long().unique().tolist()  # type: ignore[no-any-return, no-untyped-call]


def intercept(x: Tensor, y: Tensor) -> float:
    """Where the line of least squares through points (x, y), each [P], meets x = 0."""
    spread = x - x.mean()
    slope = (spread @ y) / (spread @ spread)
    return float(y.mean() - slope * x.mean())
