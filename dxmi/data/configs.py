"""Settings of the data sets. Nothing here imports PyTorch."""

from dataclasses import dataclass, field

from dxmi.persistence.files import PLACE

FOLDER = "image_folder"
IMAGE_SETS = ("digits", "mnist", "mnist8", "fashion_mnist", "cifar10")
"""Sets that have a loader each in `dxmi.data.images`."""
PLANAR = ("gaussians8", "two_spirals", "checkerboard", "moons")
"""Distributions in the plane."""
_MAX_POINTS = 10_000_000
_MAX_SIZE = 1024
NAMES = (*IMAGE_SETS, FOLDER, *PLANAR)
PUBLISHED = tuple(name for name in IMAGE_SETS if name != "digits")
"""Data sets whose files are compared with those that their authors publish."""


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which real samples."""

    name: str = "digits"
    """digits, mnist, mnist8, fashion_mnist, cifar10 or image_folder; in the plane: gaussians8, two_spirals,
    checkerboard or moons."""
    label: int | None = None
    """Keep only this class of images; null for all."""
    num_points: int = 50_000
    """Training points of a distribution in the plane; image sets have a size of their own."""
    folder: str | None = field(default=None, metadata=PLACE)
    """Of image_folder: a path, relative to $DXMI_DATA unless it begins with / or ~."""
    size: int | None = None
    """Of image_folder: side in pixels to which its images are cropped and resized."""
    class_folders: bool = False
    """Of image_folder: each folder in it is a class, as in ImageNet; else all images below it are of one kind."""
    flip: bool = False
    """Mirror half of the images of a training batch, left to right; scores go by the images as they are."""

    accept_unknown_files: bool = False
    """Take files of mnist, mnist8, fashion_mnist or cifar10 that are not those which their authors publish. It enters
    no signature of a config: what the files hold is in that of the data."""

    def __post_init__(self) -> None:
        if self.name not in NAMES:
            raise ValueError(f"name is {self.name!r}: it must be one of {', '.join(NAMES)}")
        self._check_label()
        self._check_folder()
        if self.flip and self.is_planar:
            raise ValueError(f"flip is true, but {self.name} has no images: make it false")
        if self.accept_unknown_files and self.name not in PUBLISHED:
            raise ValueError(
                f"accept_unknown_files is true, but {self.name} is read from no published files: make it false"
            )
        if not 1 <= self.num_points <= _MAX_POINTS:
            raise ValueError(f"num_points is {self.num_points}: it must be in 1..{_MAX_POINTS}")

    def _check_label(self) -> None:
        if self.label is None:
            return
        if self.is_planar or (self.name == FOLDER and not self.class_folders):
            raise ValueError(f"label is {self.label}, but {self.name} has no classes: make it null")
        if self.label < 0 or (self.label > 9 and self.name != FOLDER):
            raise ValueError(f"label is {self.label}: it must be in 0..9, or null for all classes")

    def _check_folder(self) -> None:
        for name in ("folder", "size"):
            value, belongs = getattr(self, name), self.name == FOLDER
            if belongs != (value is not None):
                raise ValueError(f"{name} is {value!r}: {FOLDER} needs one, and no other data set has any")
        if self.class_folders and self.name != FOLDER:
            raise ValueError(f"class_folders is true, but {self.name} is no {FOLDER}: make it false")
        if self.size is not None and not 1 <= self.size <= _MAX_SIZE:
            raise ValueError(f"size is {self.size}: it must be in 1..{_MAX_SIZE}")

    @property
    def is_planar(self) -> bool:
        """Whether the samples are points in the plane, not images."""
        return self.name in PLANAR
