"""The Frechet distance to a Gaussian that is fitted once, and its extrapolation to infinitely many samples.

    FID(N) = |mu - mu'|^2 + tr(S + S' - 2 (S S')^(1/2))      mu, S: N samples;  mu', S': reference

With S' = R R^T and centered features X [N, D], tr (S S')^(1/2) is the sum of the singular values of X R / sqrt(N - 1).
This is a symmetric eigenvalue problem of size min(N, R), where torch-fidelity solves a general one of size D.

FID(N) has a bias of about b / N, where b depends on the sampler, so the ranking of two samplers may change with N. The
intercept of a line fitted to FID against 1 / N is an estimate without this bias (Chong and Forsyth, arXiv 1911.07023).

Axis letters: N samples, D features. Everything is float64.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from dxmi.tensors import calling, require_finite

POINTS = 15
"""Number of points to which the line is fitted, as in the paper's code."""
FEWEST = 5_000
"""Size of the smallest subset, as in the paper's code; with fewer than 10,000 samples it is half of them."""


@dataclass(frozen=True)
class Moments:
    """The moments of features, from which a Gaussian is fitted.

    Attributes:
        count: number of samples.
        mean: mean of the features, [D].
        scatter: sum of (f - mean)(f - mean)^T over the samples, [D, D].
    """

    count: int
    mean: Tensor
    scatter: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Moments":
        """The moments of features [N, D]."""
        features = features.double()
        mean = features.mean(0)
        centered = features - mean
        return cls(len(features), mean, centered.T @ centered)

    def merged(self, other: "Moments") -> "Moments":
        """The moments of the union of two sets of samples (Chan, Golub and LeVeque, 1979)."""
        count = self.count + other.count
        gap = other.mean - self.mean
        between = torch.outer(gap, gap) * (self.count * other.count / count)
        return Moments(count, self.mean + gap * (other.count / count), self.scatter + other.scatter + between)

    @property
    def covariance(self) -> Tensor:
        """The covariance with N - 1 in the denominator, [D, D]."""
        return self.scatter / (self.count - 1)


@dataclass(frozen=True)
class Gaussian:
    """The Gaussian of a reference, to which distances are computed.

    Attributes:
        mean: mean, [D].
        root: matrix R with covariance R R^T, [D, R].
    """

    mean: Tensor
    root: Tensor

    @classmethod
    def of(cls, features: Tensor) -> "Gaussian":
        """Fit a Gaussian to features [N, D]."""
        if len(features) > features.shape[1]:
            return cls.fitted(Moments.of(features))
        mean = features.double().mean(0)
        return cls(mean, (features.double() - mean).T.contiguous() / (len(features) - 1) ** 0.5)

    @classmethod
    def fitted(cls, moments: Moments) -> "Gaussian":
        """Fit a Gaussian to moments."""
        root, failed = torch.linalg.cholesky_ex(moments.covariance)
        if failed:  # fewer samples than features, or constant features
            values, vectors = torch.linalg.eigh(moments.covariance)
            root = vectors * values.clamp_min(0.0).sqrt()
        return cls(moments.mean, root.contiguous())  # LAPACK returns column-major matrices; files hold row-major ones

    def distance(self, features: Tensor) -> float:
        """FID of features [N, D], N >= 2, computed on the device of the reference.

        Raises:
            DivergedError: a feature is not finite.
        """
        features = require_finite(features, "the features of the samples").to(self.mean)
        mean = features.mean(0)
        centered = (features - mean) / (len(features) - 1) ** 0.5
        crossed = centered @ self.root
        gram = crossed @ crossed.T if len(crossed) < crossed.shape[1] else crossed.T @ crossed  # the smaller of the two
        cross = torch.linalg.eigvalsh(gram).clamp_min(0.0).sqrt().sum()
        variances = centered.square().sum() + self.root.square().sum()
        return float((mean - self.mean).square().sum() + variances - 2.0 * cross)

    def distance_at_infinity(
        self, features: Tensor, generator: torch.Generator, on_step: Callable[[], None] | None = None
    ) -> float:
        """Extrapolate the FID to infinitely many samples from random subsets of the features.

        Args:
            features: features of samples, on the device of the reference, [N, D].
            generator: draws the subsets, on the host.
            on_step: called after each subset; may raise.
        """
        sizes = set_sizes(len(features))
        drawn = [torch.randperm(len(features), generator=generator)[:size] for size in sizes]
        distances = [self.distance(features[rows.to(features.device)]) for rows in calling(drawn, on_step)]
        return intercept(torch.tensor([1.0 / size for size in sizes]).double(), torch.tensor(distances).double())


def set_sizes(num: int) -> list[int]:
    """The sizes of the subsets of `num` samples, evenly spaced up to `num`."""
    smallest = max(min(FEWEST, num // 2), 2)
    return torch.linspace(smallest, num, POINTS, dtype=torch.float64).round().long().unique().tolist()  # type: ignore[no-any-return, no-untyped-call]


def intercept(x: Tensor, y: Tensor) -> float:
    """The value at x = 0 of the least-squares line through points (x, y), each [P]."""
    spread = x - x.mean()
    slope = (spread @ y) / (spread @ spread)
    return float(y.mean() - slope * x.mean())
