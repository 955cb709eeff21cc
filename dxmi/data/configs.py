"""Settings of the data sets, a class for each kind. Nothing here imports PyTorch."""

import math
from dataclasses import dataclass, field

from dxmi.config import NO_RESULT, require_choice
from dxmi.persistence.files import PLACE

PLANAR = ("gaussians8", "two_spirals", "checkerboard", "moons")
"""Kinds whose samples are points in the plane."""
_MAX_POINTS = 10_000_000
_MAX_SIZE = 1024


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The part of a data set's config that all kinds share."""

    kind: str = "digits"
    """Which data set: its key in `dxmi.data.registry`."""

    @property
    def is_planar(self) -> bool:
        """Whether the samples are points in the plane, not images."""
        return False

    @property
    def mirrors(self) -> bool:
        """Whether half of a training batch is mirrored."""
        return False


# ----------------------------------------------------------------------------
# Images.


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(DataConfig):
    """The part of the config that all data sets of images share."""

    label: int | None = None
    """Keep only this class of images; null for all."""
    flip: bool = False
    """Mirror half of the images of a training batch, left to right; scores go by the images as they are."""

    @property
    def mirrors(self) -> bool:
        """`flip`."""
        return self.flip


@dataclass(frozen=True, kw_only=True)
class TenClassesConfig(ImagesConfig):
    """Images of ten classes."""

    def __post_init__(self) -> None:
        if self.label is not None and not 0 <= self.label <= 9:
            raise ValueError(f"label is {self.label}: it must be in 0..9, or null for all classes")


@dataclass(frozen=True, kw_only=True)
class DigitsConfig(TenClassesConfig):
    """1,797 handwritten digits of 8x8 pixels, which come with scikit-learn."""

    kind: str = "digits"


@dataclass(frozen=True, kw_only=True)
class PublishedImagesConfig(TenClassesConfig):
    """Images in files that are compared with those that their authors publish."""

    accept_unknown_files: bool = field(default=False, metadata=NO_RESULT)
    """Take files that are not those which the authors publish. It enters no signature of a config: what the files hold
    is in that of the data."""


@dataclass(frozen=True, kw_only=True)
class MnistConfig(PublishedImagesConfig):
    """MNIST at 28x28."""

    kind: str = "mnist"


@dataclass(frozen=True, kw_only=True)
class Mnist8Config(PublishedImagesConfig):
    """The first 20,000 images of MNIST at 8x8."""

    kind: str = "mnist8"


@dataclass(frozen=True, kw_only=True)
class FashionMnistConfig(PublishedImagesConfig):
    """Fashion-MNIST at 28x28."""

    kind: str = "fashion_mnist"


@dataclass(frozen=True, kw_only=True)
class Cifar10Config(PublishedImagesConfig):
    """CIFAR-10 at 32x32."""

    kind: str = "cifar10"


@dataclass(frozen=True, kw_only=True)
class ImageFolderConfig(ImagesConfig):
    """A user's own images, cropped and resized to squares."""

    kind: str = "image_folder"
    folder: str = field(metadata=PLACE)
    """A path, relative to $DXMI_DATA unless it begins with / or ~."""
    size: int
    """Side in pixels to which the images are cropped and resized."""
    class_folders: bool = False
    """Each folder in it is a class, as in ImageNet; else all images below it are of one kind."""

    def __post_init__(self) -> None:
        if not 1 <= self.size <= _MAX_SIZE:
            raise ValueError(f"size is {self.size}: it must be in 1..{_MAX_SIZE}")
        if self.label is None:
            return
        if not self.class_folders:
            raise ValueError(f"label is {self.label}, but there are no classes without class_folders: make it null")
        if self.label < 0:
            raise ValueError(f"label is {self.label}: it must be 0 or greater, or null for all classes")


# ----------------------------------------------------------------------------
# Points in the plane.


@dataclass(frozen=True, kw_only=True)
class PointsConfig(DataConfig):
    """Points drawn from a distribution in the plane."""

    num_points: int = 50_000
    """Training points."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_points <= _MAX_POINTS:
            raise ValueError(f"num_points is {self.num_points}: it must be in 1..{_MAX_POINTS}")

    @property
    def is_planar(self) -> bool:
        """True."""
        return True


@dataclass(frozen=True, kw_only=True)
class LogDensityFields:
    """Which log density is meant, and how low it counts: what a reward and a metric of it share."""

    distribution: str = "gaussians8"
    """gaussians8, two_spirals, checkerboard or moons."""
    floor: float = -20.0
    """The least value: where the distribution has no mass, its log density is minus infinity."""

    def __post_init__(self) -> None:
        require_choice("distribution", self.distribution, PLANAR)
        if not math.isfinite(self.floor):
            raise ValueError(f"floor is {self.floor}: it must be a finite number")


@dataclass(frozen=True, kw_only=True)
class Gaussians8Config(PointsConfig):
    """Eight Gaussians on a circle."""

    kind: str = "gaussians8"


@dataclass(frozen=True, kw_only=True)
class TwoSpiralsConfig(PointsConfig):
    """Two spirals."""

    kind: str = "two_spirals"


@dataclass(frozen=True, kw_only=True)
class CheckerboardConfig(PointsConfig):
    """The dark squares of a checkerboard."""

    kind: str = "checkerboard"


@dataclass(frozen=True, kw_only=True)
class MoonsConfig(PointsConfig):
    """Two half circles that reach into each other."""

    kind: str = "moons"
