"""Settings of the further metrics, and the keys of their scores. Nothing here imports PyTorch."""

import math
from dataclasses import dataclass

from dxmi.data.configs import PLANAR
from dxmi.metrics.keys import MAXIMIZE, ScoreKey

CLASSIFIER_SETS = ("digits", "mnist8", "mnist", "fashion_mnist")
"""Data sets for which a classifier ships with the package."""


@dataclass(frozen=True, kw_only=True)
class MetricConfig:
    """The part of a metric's config that all kinds share."""

    kind: str = "class_entropy"
    """Which metric: its key in `dxmi.metrics.registry`."""

    def keys(self) -> list[ScoreKey]:
        """The scores that the metric gives."""
        raise NotImplementedError


@dataclass(frozen=True, kw_only=True)
class ClassEntropyConfig(MetricConfig):
    """Entropy of the classes that a shipped classifier sees in the samples: low where modes were lost."""

    classifier: str = "digits"
    """The data set whose classifier tells the classes: digits, mnist8, mnist or fashion_mnist."""

    def __post_init__(self) -> None:
        if self.classifier not in CLASSIFIER_SETS:
            raise ValueError(f"classifier is {self.classifier!r}: it must be one of {', '.join(CLASSIFIER_SETS)}")

    def keys(self) -> list[ScoreKey]:
        """In nats; log 10 at most."""
        return [ScoreKey("eval/class_entropy", MAXIMIZE)]


@dataclass(frozen=True, kw_only=True)
class LogDensityConfig(MetricConfig):
    """Mean log density of samples in the plane under the exact distribution of the data."""

    kind: str = "log_density"
    distribution: str = "gaussians8"
    """gaussians8, two_spirals, checkerboard or moons."""
    floor: float = -20.0
    """What a sample counts at least: where the distribution has no mass, its log density is minus infinity."""

    def __post_init__(self) -> None:
        if self.distribution not in PLANAR:
            raise ValueError(f"distribution is {self.distribution!r}: it must be one of {', '.join(PLANAR)}")
        if not math.isfinite(self.floor):
            raise ValueError(f"floor is {self.floor}: it must be a finite number")

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
