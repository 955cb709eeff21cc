"""Settings of the rewards. Nothing here imports PyTorch."""

import math
import re
from dataclasses import dataclass, field
from urllib.parse import urlsplit

from dxmi.config import require_choice
from dxmi.data.configs import LogDensityFields
from dxmi.metrics.configs import CLASSIFIER_SETS
from dxmi.persistence.files import PLACE
from dxmi.registry import chosen_from
from dxmi.rewards.registry import REWARDS

AXES = ("vertical", "horizontal")
GOALS = ("compressible", "incompressible")
MAX_QUALITY = 100
LOOPBACK = ("127.0.0.1", "localhost", "::1")


@dataclass(frozen=True, kw_only=True)
class RewardConfig:
    """The settings that all kinds of rewards share."""

    kind: str = "classifier"
    """Kind of the reward: its key in `dxmi.rewards.registry`."""


@dataclass(frozen=True, kw_only=True)
class LabelFields:
    """The class whose log-probability is the reward."""

    label: int | None = None
    """Desired class; null for the class on which each sample was conditioned."""

    def __post_init__(self) -> None:
        if self.label is not None and not 0 <= self.label <= 9:
            raise ValueError(f"label is {self.label}: it must be in 0..9, or null for each sample's own class")


@dataclass(frozen=True, kw_only=True)
class ClassifierRewardConfig(LabelFields, RewardConfig):
    """log p(label | x) of an included classifier, in nats."""

    classifier: str = "digits"
    """Data set on which the classifier was trained: digits, mnist8, mnist or fashion_mnist."""

    def __post_init__(self) -> None:
        super().__post_init__()
        require_choice("classifier", self.classifier, CLASSIFIER_SETS)


@dataclass(frozen=True, kw_only=True)
class CifarResnetRewardConfig(LabelFields, RewardConfig):
    """log p(label | x) of a ResNet for CIFAR-10 (arXiv 1512.03385), in nats."""

    kind: str = "cifar_resnet"
    file: str = field(default="weights/resnet56-cifar10.pth", metadata=PLACE)
    """File of its tensors, from the current folder or from $DXMI_DATA; the depth is found from their names. Its input
    are pixels in [0, 1]."""


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


@dataclass(frozen=True, kw_only=True)
class InkRewardConfig(RewardConfig):
    """Mean brightness of an image, in [0, 1]: how much ink there is on a dark background."""

    kind: str = "ink"


@dataclass(frozen=True, kw_only=True)
class SymmetryRewardConfig(RewardConfig):
    """Minus the mean absolute difference between an image and its mirror image, in [-1, 0]."""

    kind: str = "symmetry"
    axis: str = "vertical"
    """Axis of the mirror: vertical (left to right) or horizontal (top to bottom)."""

    def __post_init__(self) -> None:
        require_choice("axis", self.axis, AXES)


@dataclass(frozen=True, kw_only=True)
class StrokeWidthRewardConfig(RewardConfig):
    """Width of the strokes of a bright drawing in pixels: twice its area divided by its perimeter."""

    kind: str = "stroke_width"
    threshold: float = 0.5
    """Brightness in [0, 1] above which a pixel belongs to the drawing."""

    def __post_init__(self) -> None:
        if not 0.0 < self.threshold < 1.0:
            raise ValueError(f"threshold is {self.threshold}: it must be in (0, 1)")


@dataclass(frozen=True, kw_only=True)
class JpegRewardConfig(RewardConfig):
    """Size of an image as JPEG in kilobytes (DDPO, arXiv 2305.13301), without that of a blank image."""

    kind: str = "jpeg"
    goal: str = "compressible"
    """compressible: minus the size; incompressible: the size."""
    quality: int = 95
    """Quality of the JPEG, 1 to 100."""

    def __post_init__(self) -> None:
        require_choice("goal", self.goal, GOALS)
        if not 1 <= self.quality <= MAX_QUALITY:
            raise ValueError(f"quality is {self.quality}: it must be in 1..{MAX_QUALITY}")


@dataclass(frozen=True, kw_only=True)
class EnergyRewardConfig(RewardConfig):
    """Minus the energy that a finished DxMI run has learned."""

    kind: str = "energy"
    run: str = field(default="runs/digits", metadata=PLACE)
    """Folder of the run, whose best checkpoint is used."""

    def __post_init__(self) -> None:
        if not self.run:
            raise ValueError("run is empty: name the folder of a finished run that has learned an energy")


@dataclass(frozen=True, kw_only=True)
class FunctionRewardConfig(RewardConfig):
    """A Python function of the user's project; it is only called if resources.allow_code is true."""

    kind: str = "function"
    function: str = "rewards:reward"
    """Import path, module:function. The module must be a file below the current folder."""

    def __post_init__(self) -> None:
        if not re.fullmatch(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*", self.function):
            raise ValueError(f"function is {self.function!r}: it must be an import path, module:function")


@dataclass(frozen=True, kw_only=True)
class SumRewardConfig(RewardConfig):
    """A weighted sum of rewards, each of which is standardized with its mean and spread on the training data."""

    kind: str = "sum"
    parts: tuple[RewardConfig, ...] | None = field(default=None, metadata=chosen_from(REWARDS))
    """The rewards, as names of kinds or as groups of settings."""
    weights: tuple[float, ...] | None = None
    """Weight of each part; null for 1 each."""

    def __post_init__(self) -> None:
        parts = self.parts or ()
        if any(part.kind == self.kind for part in parts):
            raise ValueError("parts has a sum among its parts: name the parts of that sum instead")
        if self.weights is not None and len(self.weights) != len(parts):
            raise ValueError(
                f"weights has {len(self.weights)} entries: it takes one for each of the {len(parts)} parts"
            )
        if not all(math.isfinite(weight) for weight in self.weights or ()):
            raise ValueError(f"weights is {self.weights}: its numbers must be finite")


@dataclass(frozen=True, kw_only=True)
class HttpRewardConfig(RewardConfig):
    """Rewards that another process on this machine computes, over HTTP."""

    kind: str = "http"
    url: str = "http://127.0.0.1:8000/rewards"
    """Address, http://127.0.0.1:PORT/PATH; other hosts are refused."""
    timeout: float = 30.0
    """Timeout of a request, in seconds."""
    retries: int = 3
    """Number of times that a failed request is repeated."""
    batch_size: int = 64
    """Number of samples per request."""

    def __post_init__(self) -> None:
        try:
            parts = urlsplit(self.url)
        except ValueError as error:
            raise ValueError(f"url is {self.url!r}: {error}") from error
        try:
            is_valid = parts.scheme == "http" and parts.hostname in LOOPBACK and (parts.port is None or parts.port > 0)
        except ValueError:  # the port is not a number
            is_valid = False
        if not is_valid or re.search(r"\s", self.url):
            raise ValueError(f"url is {self.url!r}: it must be http://127.0.0.1:PORT/PATH, on this machine")
        if not 0.0 < self.timeout < math.inf:
            raise ValueError(f"timeout is {self.timeout}: it must be a number of seconds greater than 0")
        for name, least in {"retries": 0, "batch_size": 1}.items():
            if getattr(self, name) < least:
                raise ValueError(f"{name} is {getattr(self, name)}: it must be at least {least}")
