"""Settings of the further metrics, and the keys of their scores. Nothing here imports PyTorch."""

from abc import ABC, abstractmethod
from dataclasses import dataclass

from dxmi.config import require_choice
from dxmi.data.configs import LogDensityFields
from dxmi.metrics.keys import MAXIMIZE, ScoreKey

CLASSIFIER_SETS = ("digits", "mnist8", "mnist", "fashion_mnist")
"""Data sets for which a classifier ships with the package."""


@dataclass(frozen=True, kw_only=True)
class MetricConfig(ABC):
    """The part of a metric's config that all kinds share."""

    kind: str = "class_entropy"
    """Which metric: its key in `dxmi.metrics.registry`."""

    @abstractmethod
    def keys(self) -> list[ScoreKey]:
        """The scores that the metric gives."""


@dataclass(frozen=True, kw_only=True)
class ClassEntropyConfig(MetricConfig):
    """Entropy of the classes that a shipped classifier sees in the samples: low where modes were lost."""

    classifier: str = "digits"
    """The data set whose classifier tells the classes: digits, mnist8, mnist or fashion_mnist."""

    def __post_init__(self) -> None:
        require_choice("classifier", self.classifier, CLASSIFIER_SETS)

    def keys(self) -> list[ScoreKey]:
        """In nats; log 10 at most."""
        return [ScoreKey("eval/class_entropy", MAXIMIZE)]


@dataclass(frozen=True, kw_only=True)
class LogDensityConfig(LogDensityFields, MetricConfig):
    """Mean log density of samples in the plane under the exact distribution of the data."""

    kind: str = "log_density"

    def keys(self) -> list[ScoreKey]:
        """In nats."""
        return [ScoreKey("eval/log_density", MAXIMIZE)]


@dataclass(frozen=True, kw_only=True)
class EnergyGapConfig(MetricConfig):
    """Mean energy of test data less that of the training data, in standard deviations of the latter: overfitting."""

    kind: str = "energy_gap"

    def keys(self) -> list[ScoreKey]:
        """0 where the energy generalizes."""
        return [ScoreKey("eval/energy_gap")]
