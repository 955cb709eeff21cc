"""How different the samples of a condition are from each other."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.metrics.base import Evidence, Metric
from dxmi.metrics.configs import DiversityConfig

_MOST = 1_000
"""Maximum number of samples of a condition whose distances are computed."""


class Diversity(Metric):
    """Mean distance between two samples with the same condition, relative to that of the training data.

    It is 1 if samples of a condition are as different as data of a class, and falls to 0 as they become the same.
    Distances are those of pixels or coordinates. Without conditions, all samples are compared.

    Args:
        config: Settings; there are none.
    """

    applies_to_data: ClassVar[bool] = False

    def __init__(self, config: DiversityConfig) -> None:  # noqa: ARG002  (metrics share a signature)
        self._of_data: float | None = None
        self._is_conditional = False

    def observe(self, samples: Tensor, condition: Condition) -> Tensor:
        """The values of each sample and, in the last column, its class: [n, D + 1]."""
        self._is_conditional = condition.labels is not None
        labels = torch.zeros(len(samples)) if condition.labels is None else condition.labels
        return torch.cat((samples.flatten(1).float().cpu(), labels[:, None].float().cpu()), dim=1)

    def scores(self, evidence: Evidence) -> Mapping[str, float]:
        """The mean distance relative to that of the data."""
        if self._of_data is None:
            train, targets = evidence.train, evidence.train.targets
            has_classes = self._is_conditional and targets is not None
            labels = targets if has_classes else torch.zeros(len(train.x))
            assert labels is not None
            self._of_data = within_distance(train.x.flatten(1).float(), labels)
        found = within_distance(evidence.rows[:, :-1], evidence.rows[:, -1])
        return {"eval/diversity": found / max(self._of_data, 1e-12)}


def within_distance(x: Tensor, labels: Tensor) -> float:
    """Mean Euclidean distance between two rows of x [N, D] with the same label, averaged over the labels."""
    means = []
    for label in sorted(set(labels.tolist())):
        own = x[labels == label][:_MOST]
        if len(own) > 1:
            means.append(torch.pdist(own).double().mean())
    return float(torch.stack(means).mean()) if means else 0.0
