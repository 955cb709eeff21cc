"""Distributions in the plane with exact densities: that of the 2D study (arXiv 2407.00626, section 5.1) and others.

Each lies within the square [-4, 4]^2, except for the tails of its noise. The densities of the two distributions with
normal noise around curves are line integrals, computed by Gauss-Legendre quadrature whose nodes are at most 0.6
standard deviations of the noise apart; the error is below 1e-6 of the largest density.

Axis letters: N points, M nodes of a curve or centers of a mixture.
"""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from functools import cache

import numpy as np
import torch
from torch import Tensor

from dxmi.data.configs import PointsConfig
from dxmi.data.dataset import Dataset, Split, content_signature
from dxmi.seeds import generator

SQUARE = 4.0
"""Half the side of the square that contains the distributions, and in which densities are compared."""
_NODES = 512
"""Number of quadrature nodes per curve."""
_ROWS = 4096
"""Number of points whose distances to all nodes are in memory at the same time."""


class Distribution(ABC):
    """A distribution in the plane."""

    @abstractmethod
    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw independent points, float32 on the host: [num, 2]."""

    def bounded_log_density(self, points: Tensor, floor: float) -> Tensor:
        """Compute max(log density, floor) at `points` [N, 2] on any device: float64 on the host, [N]."""
        return self.log_density(points.cpu()).clamp_min(floor)

    @abstractmethod
    def log_density(self, points: Tensor) -> Tensor:
        """Compute the log density at `points` [N, 2] in nats, float64; minus infinity outside of the support: [N]."""


def _mixture_log_density(points: Tensor, centers: Tensor, log_weights: Tensor, std: float) -> Tensor:
    """Compute log sum_m w_m N(x; center_m, std^2 I), float64: [N].

    Args:
        points: Points x, [N, 2].
        centers: Centers of the components, [M, 2].
        log_weights: Log weights of the components, [M].
        std: Standard deviation of every component.
    """
    log_normalizer = math.log(2.0 * math.pi * std**2)

    def of(rows: Tensor) -> Tensor:
        squares = torch.cdist(rows, centers, compute_mode="donot_use_mm_for_euclid_dist").square()
        return torch.logsumexp(log_weights - squares / (2.0 * std**2), dim=1) - log_normalizer

    return torch.cat([of(rows) for rows in torch.split(points.double(), _ROWS)])


def _uniform(num: int, generator: torch.Generator) -> Tensor:
    return torch.rand(num, generator=generator, dtype=torch.float64)


def _noise(num: int, generator: torch.Generator) -> Tensor:
    return torch.randn((num, 2), generator=generator, dtype=torch.float64)


class Gaussians8(Distribution):
    """Eight normal clusters of equal weight on a circle: radius 4 and standard deviation 0.5, both divided by 1.414."""

    std = 0.5 / 1.414

    def __init__(self) -> None:
        angle = torch.arange(8, dtype=torch.float64) * (math.pi / 4.0)
        self.centers = torch.stack((angle.cos(), angle.sin()), dim=1) * (4.0 / 1.414)

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw a cluster for each point, and normal noise around its center."""
        cluster = torch.randint(8, (num,), generator=generator)
        return (self.centers[cluster] + self.std * _noise(num, generator)).float()

    def log_density(self, points: Tensor) -> Tensor:
        """Compute the log density of the mixture."""
        return _mixture_log_density(
            points, self.centers, torch.full((8,), -math.log(8.0), dtype=torch.float64), self.std
        )


@cache
def _quadrature() -> tuple[Tensor, Tensor]:
    """Compute Gauss-Legendre nodes in [0, 1] and their weights, which add up to 1: [M] each."""
    nodes, weights = (torch.from_numpy(table) for table in np.polynomial.legendre.leggauss(_NODES))
    return (nodes + 1.0) / 2.0, weights / 2.0


class _Curve(Distribution):
    """Normal noise around two curves with a known distribution of the curve parameter u in [0, 1]."""

    std: float

    @abstractmethod
    def branches(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the points of the two curves at u [N]; each curve has half of the mass: [N, 2] each."""

    @abstractmethod
    def quantile(self, share: Tensor) -> Tensor:
        """Compute the quantile function of u."""

    @abstractmethod
    def speed(self, u: Tensor) -> Tensor:
        """Compute the density of u: the derivative of the inverse of `quantile`."""

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw a curve and a position on it for each point, and add normal noise."""
        first, second = self.branches(self.quantile(_uniform(num, generator)))
        is_first = torch.randint(2, (num, 1), generator=generator) == 0
        return (torch.where(is_first, first, second) + self.std * _noise(num, generator)).float()

    def log_density(self, points: Tensor) -> Tensor:
        """Integrate the density of the noise along both curves."""
        u, weights = _quadrature()
        centers = torch.cat(self.branches(u))
        log_weights = (weights * self.speed(u) / 2.0).log().repeat(2)
        return _mixture_log_density(points, centers, log_weights, self.std)


class TwoSpirals(_Curve):
    """Two arms of one and a half turns, each the point reflection of the other in the origin: radius theta / 3 at the
    angle theta in [0, 3 pi], with uniform theta^2 and normal noise of standard deviation 0.1.
    """

    std = 0.1

    def branches(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the points of the arms at theta = 3 pi u."""
        theta = 3.0 * math.pi * u
        arm = torch.stack((theta.cos(), theta.sin()), dim=1) * (theta / 3.0)[:, None]
        return arm, -arm

    def quantile(self, share: Tensor) -> Tensor:
        """Compute the square root of `share`, since u^2 is uniform."""
        return share.sqrt()

    def speed(self, u: Tensor) -> Tensor:
        """Compute 2 u, the derivative of u^2."""
        return 2.0 * u


class Moons(_Curve):
    """Two interleaved half circles of radius 2 with normal noise of standard deviation 0.2: an upper one around
    (-1, -0.5), and a lower one around (1, 0.5).
    """

    std = 0.2

    def branches(self, u: Tensor) -> tuple[Tensor, Tensor]:
        """Compute the points of the half circles at the angle pi u."""
        upper = 2.0 * torch.stack(((math.pi * u).cos(), (math.pi * u).sin()), dim=1)
        offset = torch.tensor([1.0, 0.5], dtype=torch.float64)
        return upper - offset, offset - upper

    def quantile(self, share: Tensor) -> Tensor:
        """Return `share`, since u is uniform."""
        return share

    def speed(self, u: Tensor) -> Tensor:
        """Return 1, since u is uniform."""
        return torch.ones_like(u)


class Checkerboard(Distribution):
    """The uniform distribution on the eight dark squares of a board of four by four squares with side 2."""

    def sample(self, num: int, generator: torch.Generator) -> Tensor:
        """Draw a dark square and a position in it for each point."""
        row = torch.randint(4, (num,), generator=generator)
        column = 2 * torch.randint(2, (num,), generator=generator) + row % 2
        place = torch.rand((num, 2), generator=generator, dtype=torch.float64)
        return (2.0 * (torch.stack((column, row), dim=1) + place) - SQUARE).float()

    def log_density(self, points: Tensor) -> Tensor:
        """Compute the log density: -log 32 on the dark squares, which have area 4 each."""
        field = ((points.double() + SQUARE) / 2.0).floor()
        is_dark = ((field >= 0.0) & (field < 4.0)).all(dim=1) & (field.sum(dim=1) % 2.0 == 0.0)
        return torch.full((len(points),), -math.log(32.0), dtype=torch.float64).where(is_dark, -math.inf)


DISTRIBUTIONS: dict[str, Distribution] = {
    "gaussians8": Gaussians8(),
    "two_spirals": TwoSpirals(),
    "checkerboard": Checkerboard(),
    "moons": Moons(),
}


@dataclass(frozen=True)
class Points(Dataset):
    """Points drawn from a distribution in the plane, which do not depend on the seed of a run.

    Attributes:
        name: Kind of the data set's config.
        points: Training points, float32, [N, 2].
        signature: Hash of the points, 12 hex digits.
    """

    name: str
    points: Tensor
    signature: str

    @property
    def stored(self) -> Tensor:
        """The points."""
        return self.points

    @property
    def distribution(self) -> Distribution:
        """The distribution from which the points were drawn."""
        return DISTRIBUTIONS[self.name]

    def test_split(self) -> Split:
        """Draw as many points again, which training does not use."""
        return Split(self.held_out(len(self.points)))

    def held_out(self, num: int, stream: str = "test") -> Tensor:
        """Draw points that training does not use, the same at every call with the same `stream`: [num, 2]."""
        return _drawn(self.name, num, stream)


def load_points(config: PointsConfig) -> Points:
    """Draw the training points of a distribution."""
    points = _drawn(config.kind, config.num_points, "train")
    return Points(config.kind, points, content_signature(points))


def _drawn(name: str, num: int, stream: str) -> Tensor:
    return DISTRIBUTIONS[name].sample(num, generator(0, f"data/{name}/{stream}"))
