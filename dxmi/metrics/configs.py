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
        """The keys of the metric's scores."""


@dataclass(frozen=True, kw_only=True)
class ClassEntropyConfig(MetricConfig):
    """Entropy of the classes that a shipped classifier assigns to the samples; a low entropy indicates lost modes."""

    classifier: str = "digits"
    """Data set whose classifier is used: digits, mnist8, mnist or fashion_mnist."""

    def __post_init__(self) -> None:
        require_choice("classifier", self.classifier, CLASSIFIER_SETS)

    def keys(self) -> list[ScoreKey]:
        """The entropy in nats, at most log 10."""
        return [ScoreKey("eval/class_entropy", MAXIMIZE)]


@dataclass(frozen=True, kw_only=True)
class LogDensityConfig(LogDensityFields, MetricConfig):
    """Mean log density of samples in the plane under the exact distribution of the data."""

    kind: str = "log_density"

    def keys(self) -> list[ScoreKey]:
        """The mean in nats."""
        return [ScoreKey("eval/log_density", MAXIMIZE)]


@dataclass(frozen=True, kw_only=True)
class EnergyGapConfig(MetricConfig):
    """Mean energy of test data minus that of training data, in standard deviations of the latter: overfitting."""

    kind: str = "energy_gap"

    def keys(self) -> list[ScoreKey]:
        """The gap, which is near 0 if the energy generalizes."""
        return [ScoreKey("eval/energy_gap")]


@dataclass(frozen=True, kw_only=True)
class NearestNeighborConfig(MetricConfig):
    """A check against memorizing: distances of samples to the nearest training images, next to those of unseen images.

    Unseen images are the published test images or, if there are none, each training image without its own copy.
    """

    kind: str = "nearest_neighbor"

    def keys(self) -> list[ScoreKey]:
        """The keys, neither of which is a goal.

        nearest_ratio is the median distance of samples divided by that of unseen images: 1 if samples are as far from
        the training images as unseen images are, 0 if they are copies. copies is the share of samples that are closer
        to a training image than all but 1 % of the unseen images: .01 if samples are like unseen images.
        """
        return [ScoreKey("eval/nearest_ratio", MAXIMIZE), ScoreKey("eval/copies")]


@dataclass(frozen=True, kw_only=True)
class HeldOutConfig(MetricConfig):
    """Accuracy of a support-vector classifier of raw pixels, fitted to the data, on the classes of the samples.

    It takes no part in training, so it shows whether a reward was maximized or only deceived.
    """

    kind: str = "held_out"
    label: int | None = None
    """Class that all samples should have; null for the class on which each sample was conditioned."""

    def __post_init__(self) -> None:
        if self.label is not None and self.label < 0:
            raise ValueError(f"label is {self.label}: it must be a class of the data, or null")

    def keys(self) -> list[ScoreKey]:
        """The accuracy, in [0, 1]."""
        return [ScoreKey("eval/held_out_accuracy", MAXIMIZE)]


@dataclass(frozen=True, kw_only=True)
class DiversityConfig(MetricConfig):
    """Mean distance between two samples with the same condition, relative to that of the data."""

    kind: str = "diversity"

    def keys(self) -> list[ScoreKey]:
        """The relative distance, 1 for the data."""
        return [ScoreKey("eval/diversity", MAXIMIZE)]
