"""Scores of an energy as a model of a density: discrimination (AUC), and divergence from the density (KL).

Axis letters: N, M points, G cells of a grid.
"""

from functools import cache
from typing import NamedTuple

import torch
from torch import Tensor

from dxmi.data.planar import SQUARE, Distribution
from dxmi.tensors import require_finite

_STEEPEST = 1e6
"""Upper limit of beta times the range of the energy on the grid; beyond it, all mass is in one cell."""


def roc_auc(positive: Tensor, negative: Tensor) -> float:
    """The exact area under the ROC curve: P(positive > negative) + P(equal) / 2 over all pairs of scores.

    Args:
        positive: scores that should be high, [N].
        negative: scores that should be low, [M].

    Raises:
        DivergedError: a score is not finite and therefore cannot be ranked.
    """
    positive, negative = (require_finite(scores, "the scores of an AUC") for scores in (positive, negative))
    negative = negative.sort().values
    below = torch.searchsorted(negative, positive)
    not_above = torch.searchsorted(negative, positive, right=True)
    return int((below + not_above).sum()) / (2 * len(positive) * len(negative))


def square_grid(half_side: float, cells: int) -> Tensor:
    """The centers of `cells` x `cells` equal cells of the square [-half_side, half_side]^2: float32, [cells^2, 2].

    The first coordinate varies slowest.
    """
    axis = ((torch.arange(cells, dtype=torch.float64) + 0.5) * (2.0 / cells) - 1.0) * half_side
    return torch.cartesian_prod(axis, axis).float()


@cache
def grid_log_density(distribution: Distribution, cells: int) -> Tensor:
    """The log density of a distribution at each point of `square_grid(SQUARE, cells)`: [cells^2].

    The result is cached, since it takes as long as many training iterations; it must not be modified.
    """
    return distribution.log_density(square_grid(SQUARE, cells))


class Calibrated(NamedTuple):
    """The divergence of an energy from a density at the best temperature.

    Attributes:
        kl: KL(p | q_beta) in nats, q_beta proportional to exp(-beta E) on the grid.
        beta: inverse temperature in nats per unit of energy, at least 0; at 0, q_beta is uniform.
    """

    kl: float
    beta: float


def calibrated_kl(energy: Tensor, log_density: Tensor) -> Calibrated:
    """Minimize KL(p | q_beta) over beta >= 0, with both densities normalized over the cells of a grid.

    d KL / d beta = E_p[E] - E_{q_beta}[E] increases with beta, so the minimum is at its only root, or at beta = 0.

    Args:
        energy: E in each cell, [G].
        log_density: log p in each cell up to a constant, minus infinity where p is 0, [G].

    Raises:
        DivergedError: an energy is not finite.
    """
    from scipy.optimize import brentq  # noqa: PLC0415  (importing it takes most of a second)

    energy = require_finite(energy, "the energy on the grid").double()
    energy = energy - energy.min()
    p = log_density.double().softmax(0)
    target, steepest = float(p @ energy), _STEEPEST / max(float(energy.max()), 1.0 / _STEEPEST)

    def surplus(beta: float) -> float:
        return target - float((-beta * energy).softmax(0) @ energy)

    beta = 0.0 if surplus(0.0) >= 0.0 else steepest
    if surplus(0.0) < 0.0 < surplus(steepest):
        beta = float(brentq(surplus, 0.0, steepest, xtol=1e-12, rtol=1e-12))
    cross_entropy = beta * target + float(torch.logsumexp(-beta * energy, 0))
    return Calibrated(cross_entropy - _entropy(p), beta)


def _entropy(p: Tensor) -> float:
    """-sum p log p, where 0 log 0 = 0."""
    return -float(torch.special.xlogy(p, p).sum())
