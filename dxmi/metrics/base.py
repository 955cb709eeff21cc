"""Further metrics of a run, in addition to the distances by which its data set scores samples.

A metric is one file with a `Metric`, a config class with its keys, and one line in the registry. Samples are drawn once
for all metrics. Each metric is given the samples in one or more batches, keeps a row of numbers per sample, and
computes its scores from all rows.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.data.dataset import Split

SAMPLES, ENERGY, TEST_SPLIT = "samples", "energy", "test_split"
"""Values of `Metric.needs`."""


@dataclass(frozen=True)
class Evidence:
    """The inputs of a metric's scores.

    Attributes:
        rows: rows that `observe` returned, one per sample and in order, on the host, [N, F]; F = 0 by default.
        energy: maps stored samples [M, *event] to E [M] on the host; None if the algorithm learns no energy.
        test: the test split, which training does not use; None if the data set has none.
        train: the training data.
    """

    rows: Tensor
    energy: Callable[[Tensor], Tensor] | None
    test: Split | None
    train: Split


class Metric(ABC):
    """Scores of a run's samples, energy or test data.

    Attributes:
        needs: a subset of samples, energy and test_split; without a needed energy or test split there are no scores.
    """

    needs: ClassVar[frozenset[str]] = frozenset({SAMPLES})
    applies_to_data: ClassVar[bool] = True
    """Whether it can be computed of real data in place of samples, without the conditions that samples have."""

    def observe(self, samples: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002  (a metric may need no samples)
        """The rows [n, F], on the host, to keep of samples [n, *event] in the format that the data set stores."""
        return torch.empty(len(samples), 0)

    @abstractmethod
    def scores(self, evidence: Evidence) -> Mapping[str, float]:
        """Compute the scores, by the names of the config's keys."""

    def has_evidence(self, evidence: Evidence) -> bool:
        """Whether everything that the metric needs exists."""
        missing = {ENERGY: evidence.energy is None, TEST_SPLIT: evidence.test is None}
        return not any(missing.get(need, False) for need in self.needs)
