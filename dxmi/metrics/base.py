"""Further metrics of a run's samples, next to the distances that its data set brings.

A metric is one file with a `Metric`, a config class with its keys, and one line in the registry. Samples are drawn once
for all metrics. Each metric sees them batch by batch and keeps a row of numbers for each, and computes its scores from
the rows of all of them.
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
"""What a metric can need."""


@dataclass(frozen=True)
class Evidence:
    """What scores are computed from.

    Attributes:
        rows: what `observe` kept of every sample, in order, on the host, [N, F]; [N, 0] for a metric that needs none.
        energy: E of stored samples [M, *event], [M] on the host; None if the algorithm learns no energy.
        test: data that training has not seen; None if there is none.
        train: the training data.
    """

    rows: Tensor
    energy: Callable[[Tensor], Tensor] | None
    test: Split | None
    train: Split


class Metric(ABC):
    """Scores of a run's samples, energy or test data.

    Attributes:
        needs: of samples, energy and test_split; a metric whose energy or test split does not exist has no scores.
    """

    needs: ClassVar[frozenset[str]] = frozenset({SAMPLES})

    def observe(self, samples: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002  (a metric may need no samples)
        """What is kept of some samples, as a data set stores them [n, *event], on the host: [n, F]."""
        return torch.empty(len(samples), 0)

    @abstractmethod
    def scores(self, evidence: Evidence) -> Mapping[str, float]:
        """The scores, by the names of the config's keys."""

    def has_evidence(self, evidence: Evidence) -> bool:
        """Whether everything that the metric needs exists."""
        missing = {ENERGY: evidence.energy is None, TEST_SPLIT: evidence.test is None}
        return not any(missing.get(need, False) for need in self.needs)
