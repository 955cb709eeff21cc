"""A check against memorizing: distances of samples to the nearest training images, next to those of unseen images."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.metrics.base import SAMPLES, Evidence, Metric
from dxmi.metrics.configs import NearestNeighborConfig

_MOST = 2_000
"""Maximum number of samples, and of unseen images, whose nearest neighbors are found."""
_ROWS = 500
"""Number of rows whose distances to the training data are in memory at the same time."""
_CLOSEST = 0.01
"""Share of unseen images that count as copies."""


class NearestNeighbor(Metric):
    """Compares the Euclidean distances of samples to the nearest training sample with those of unseen data.

    Unseen data are the test split or, if there is none, training samples whose own copy in the training data is left
    out. Of samples and unseen data, the first 2,000 are used.

    Args:
        config: unused, since the metric has no settings.
    """

    needs: ClassVar[frozenset[str]] = frozenset({SAMPLES})

    def __init__(self, config: NearestNeighborConfig) -> None:  # noqa: ARG002  (metrics share a signature)
        self._unseen: Tensor | None = None

    def observe(self, samples: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002  (metrics share a signature)
        """The values of each sample, [n, D]."""
        return samples.flatten(1).float().cpu()

    def scores(self, evidence: Evidence) -> Mapping[str, float]:
        """The median distance relative to that of unseen data, and the share of copies."""
        train = evidence.train.x.flatten(1).float()
        if self._unseen is None:
            self._unseen = _unseen_distances(evidence, train)
        distances = nearest_distances(evidence.rows[:_MOST], train)
        return {
            "eval/nearest_ratio": float(distances.median() / self._unseen.median().clamp(min=1e-12)),
            "eval/copies": float((distances < self._unseen.quantile(_CLOSEST)).float().mean()),
        }


def _unseen_distances(evidence: Evidence, train: Tensor) -> Tensor:
    """The distances of unseen data to the nearest training sample, [n]."""
    if evidence.test is not None:
        return nearest_distances(evidence.test.x[:_MOST].flatten(1).float(), train)
    return nearest_distances(train[:_MOST], train, skip=1)


def nearest_distances(x: Tensor, train: Tensor, skip: int = 0) -> Tensor:
    """The distance of each row of `x` [N, D] to the nearest row of `train` [M, D], [N].

    Args:
        x: points.
        train: points to which distances are measured.
        skip: number of nearest rows to skip, 1 if the rows of `x` are themselves part of `train`.
    """
    norms = train.square().sum(dim=1)

    def nearest(rows: Tensor) -> Tensor:
        # Faster by an order of magnitude than differences, and exact up to rounding, since pixels are whole numbers.
        squared = rows.square().sum(dim=1, keepdim=True) + norms - 2.0 * (rows @ train.T)
        found = squared.kthvalue(skip + 1, dim=1).values if skip else squared.amin(dim=1)
        return found.clamp(min=0.0).sqrt()

    return torch.cat([nearest(rows) for rows in torch.split(x, _ROWS)])
