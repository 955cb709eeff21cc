"""From a data config to a data set."""

from dataclasses import dataclass

from dxmi.data.dataset import Dataset
from dxmi.data.images import LOADERS, load_images
from dxmi.data.planar import DISTRIBUTIONS, load_points

_MAX_POINTS = 10_000_000


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which real samples."""

    name: str = "digits"
    """digits, mnist, mnist8 or fashion_mnist; in the plane: gaussians8, two_spirals, checkerboard or moons."""
    label: int | None = None
    """Keep only this class of images; null for all."""
    num_points: int = 50_000
    """Training points of a distribution in the plane; image sets have a size of their own."""

    def __post_init__(self) -> None:
        if self.name not in (*LOADERS, *DISTRIBUTIONS):
            raise ValueError(f"name is {self.name!r}: it must be one of {', '.join((*LOADERS, *DISTRIBUTIONS))}")
        if self.label is not None and not 0 <= self.label <= 9:
            raise ValueError(f"label is {self.label}: it must be in 0..9, or null for all classes")
        if self.label is not None and self.is_planar:
            raise ValueError(f"label is {self.label}, but {self.name} has no classes: make it null")
        if not 1 <= self.num_points <= _MAX_POINTS:
            raise ValueError(f"num_points is {self.num_points}: it must be in 1..{_MAX_POINTS}")

    @property
    def is_planar(self) -> bool:
        """Whether the samples are points in the plane, not images."""
        return self.name in DISTRIBUTIONS


def load(config: DataConfig) -> Dataset:
    """The data set that `config` names.

    Raises:
        UserError: a file is missing or damaged; the sentence says which, where it was looked for and how to get it.
    """
    return load_points(config.name, config.num_points) if config.is_planar else load_images(config.name, config.label)
