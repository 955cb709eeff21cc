"""Settings of the data sets, one class per kind. Nothing here imports PyTorch."""

import math
from dataclasses import dataclass, field
from typing import ClassVar

from dxmi.config import NO_RESULT, require_choice
from dxmi.persistence.files import PLACE

PLANAR = ("gaussians8", "two_spirals", "checkerboard", "moons")
"""Kinds of data sets whose samples are points in the plane."""
_MAX_POINTS = 10_000_000
_MAX_SIZE = 1024
_MAX_WEIGHT = 1000


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """The settings that all kinds of data sets share."""

    kind: str = "digits"
    """Kind of the data set: its key in `dxmi.data.registry`."""

    @property
    def is_planar(self) -> bool:
        """Whether the samples are points in the plane, not images."""
        return False

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W) of an image or (2,) of a point, which is known without reading the data."""
        raise NotImplementedError

    @property
    def mirrors(self) -> bool:
        """Whether training images are mirrored at random."""
        return False


# ----------------------------------------------------------------------------
# Images.


@dataclass(frozen=True, kw_only=True)
class ImagesConfig(DataConfig):
    """The settings that all data sets of images share."""

    label: int | None = None
    """Class to which the images are restricted; null for all classes."""
    flip: bool = False
    """Mirror each training image left to right with probability 1/2; scores compare with the images as stored."""

    @property
    def mirrors(self) -> bool:
        """Whether `flip` is set."""
        return self.flip


@dataclass(frozen=True, kw_only=True)
class TenClassesConfig(ImagesConfig):
    """Settings of data sets of images of ten classes."""

    shape: ClassVar[tuple[int, int, int]] = (1, 8, 8)
    """Shape of an image, (C, H, W)."""

    @property
    def event(self) -> tuple[int, ...]:
        """`shape`."""
        return self.shape

    def __post_init__(self) -> None:
        if self.label is not None and not 0 <= self.label <= 9:
            raise ValueError(f"label is {self.label}: it must be in 0..9, or null for all classes")


@dataclass(frozen=True, kw_only=True)
class DigitsConfig(TenClassesConfig):
    """1,797 handwritten digits of 8x8 pixels, included in scikit-learn."""

    kind: str = "digits"


@dataclass(frozen=True, kw_only=True)
class PublishedImagesConfig(TenClassesConfig):
    """Settings of data sets whose files are verified against the officially published ones."""

    accept_unknown_files: bool = field(default=False, metadata=NO_RESULT)
    """Accept files that differ from the officially published ones. It is not part of a config's identity, since the
    signature of the data covers the content of the files."""


@dataclass(frozen=True, kw_only=True)
class MnistConfig(PublishedImagesConfig):
    """MNIST at 28x28."""

    kind: str = "mnist"
    shape: ClassVar[tuple[int, int, int]] = (1, 28, 28)


@dataclass(frozen=True, kw_only=True)
class Mnist8Config(PublishedImagesConfig):
    """The first 20,000 images of MNIST at 8x8."""

    kind: str = "mnist8"


@dataclass(frozen=True, kw_only=True)
class FashionMnistConfig(PublishedImagesConfig):
    """Fashion-MNIST at 28x28."""

    kind: str = "fashion_mnist"
    shape: ClassVar[tuple[int, int, int]] = (1, 28, 28)


@dataclass(frozen=True, kw_only=True)
class Cifar10Config(PublishedImagesConfig):
    """CIFAR-10 at 32x32."""

    kind: str = "cifar10"
    shape: ClassVar[tuple[int, int, int]] = (3, 32, 32)


@dataclass(frozen=True, kw_only=True)
class ImageFolderConfig(ImagesConfig):
    """Images in a folder of the user, resized and cropped to squares."""

    kind: str = "image_folder"
    folder: str = field(metadata=PLACE)
    """Path of the folder, relative to $DXMI_DATA unless it begins with / or ~."""
    size: int
    """Side of the squares in pixels."""
    class_folders: bool = False
    """Whether each subfolder is a class, as in ImageNet; if false, the images have no classes."""

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of the squares in RGB."""
        return (3, self.size, self.size)

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
    """Settings of points drawn from a distribution in the plane."""

    num_points: int = 50_000
    """Number of training points."""

    def __post_init__(self) -> None:
        if not 1 <= self.num_points <= _MAX_POINTS:
            raise ValueError(f"num_points is {self.num_points}: it must be in 1..{_MAX_POINTS}")

    @property
    def event(self) -> tuple[int, ...]:
        """Shape of a point."""
        return (2,)

    @property
    def is_planar(self) -> bool:
        """Always true."""
        return True


@dataclass(frozen=True, kw_only=True)
class LogDensityFields:
    """Settings of a log density in the plane, shared by the reward and the metric."""

    distribution: str = "gaussians8"
    """Distribution: gaussians8, two_spirals, checkerboard or moons."""
    floor: float = -20.0
    """Lower bound; without it, the log density would be minus infinity outside of the distribution's support."""

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
    """Two interleaved half circles."""

    kind: str = "moons"


@dataclass(frozen=True, kw_only=True)
class PromptsConfig:
    """Prompts of a run that maximizes a reward; without any, classes have the frequencies of the data."""

    texts: tuple[str, ...] | None = None
    """Prompts, each with the word for one class, such as "a handwritten seven"; with {} in its place, one prompt for
    every class that is not held out."""
    file: str | None = field(default=None, metadata=PLACE)
    """Text file with further prompts, one per line; lines that begin with # are comments."""
    weights: tuple[int, ...] | None = None
    """How often each of the texts is drawn, relative to the others; null for equally often. The lines of a file have
    weight 1."""
    held_out: tuple[str, ...] | None = None
    """Prompts that are not trained on. Their classes must not be those of other prompts."""

    def __post_init__(self) -> None:
        if self.held_out and not (self.texts or self.file):
            raise ValueError("held_out is set, but neither texts nor file is: name the prompts to train on")
        if self.weights is not None and len(self.weights) != len(self.texts or ()):
            raise ValueError(
                f"weights has {len(self.weights)} entries and texts has {len(self.texts or ())}: give one for each text"
            )
        if not all(1 <= weight <= _MAX_WEIGHT for weight in self.weights or ()):
            raise ValueError(f"weights is {self.weights}: each must be a whole number in 1..{_MAX_WEIGHT}")

    @property
    def are_given(self) -> bool:
        """Whether there are prompts."""
        return bool(self.texts or self.file)
