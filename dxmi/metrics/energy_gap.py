"""The difference between the energies of test and training data, a measure of overfitting."""

from collections.abc import Mapping
from typing import ClassVar

from dxmi.metrics.base import ENERGY, TEST_SPLIT, Evidence, Metric
from dxmi.metrics.configs import EnergyGapConfig

_MOST = 10_000
"""Maximum number of samples per split whose energy is computed."""


class EnergyGap(Metric):
    """(mean E(test) - mean E(train)) / std E(train) over the first 10,000 samples of each split.

    Args:
        config: unused, since the metric has no settings.
    """

    needs: ClassVar[frozenset[str]] = frozenset({ENERGY, TEST_SPLIT})

    def __init__(self, config: EnergyGapConfig) -> None:
        pass

    def scores(self, evidence: Evidence) -> Mapping[str, float]:
        """The gap."""
        assert evidence.energy is not None
        assert evidence.test is not None
        test, train = evidence.energy(evidence.test.x[:_MOST]), evidence.energy(evidence.train.x[:_MOST])
        return {"eval/energy_gap": float((test.mean() - train.mean()) / train.std())}
