"""Settings of the rewards. Nothing here imports PyTorch."""

import math
from dataclasses import dataclass

from dxmi.config import require_choice
from dxmi.data.configs import LogDensityFields
from dxmi.metrics.configs import CLASSIFIER_SETS


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The settings that all kinds of rewards share."""

    kind: str = "classifier"
    """Kind of the reward: its key in `dxmi.rewards.registry`."""


@dataclass(frozen=True, kw_only=True)
class ClassifierRewardConfig(RewardConfig):
    """log p(label | x) of an included classifier, in nats."""

    classifier: str = "digits"
    """Data set on which the classifier was trained: digits, mnist8, mnist or fashion_mnist."""
    label: int | None = None
    """Desired class; null for the class on which each sample was conditioned."""

    def __post_init__(self) -> None:
        require_choice("classifier", self.classifier, CLASSIFIER_SETS)
        if self.label is not None and not 0 <= self.label <= 9:
            raise ValueError(f"label is {self.label}: it must be in 0..9, or null for each sample's own class")


@dataclass(frozen=True, kw_only=True)
class LogDensityRewardConfig(LogDensityFields, RewardConfig):
    """log p(x) of a distribution in the plane, in nats, with a lower bound."""

    kind: str = "log_density"


@dataclass(frozen=True, kw_only=True)
class QuadraticRewardConfig(RewardConfig):
    """-|x - target|^2 / (2 scale^2), summed over the dimensions."""

    kind: str = "quadratic"
    target: tuple[float, ...] = (0.0,)
    """Maximum of the reward: one number for all dimensions, or one per dimension."""
    scale: float = 1.0
    """Distance from the target at which the reward is -1/2."""

    def __post_init__(self) -> None:
        if not (math.isfinite(self.scale) and self.scale > 0.0):
            raise ValueError(f"scale is {self.scale}: it must be a finite number greater than 0")
        if not all(math.isfinite(number) for number in self.target):
            raise ValueError(f"target is {self.target}: its numbers must be finite")
