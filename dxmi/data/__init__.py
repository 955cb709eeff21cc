"""Data sets: images are uint8 on disk and [-1, 1] inside, points in the plane are drawn. A new image set is a loader
function and a line in `LOADERS`, a new distribution a class and a line in `DISTRIBUTIONS`.
"""

from dxmi.data.dataset import BatchStream, Dataset
from dxmi.data.description import ClassCount, Description, describe, some_of
from dxmi.data.images import LOADERS, Images, data_root
from dxmi.data.loading import DataConfig, load
from dxmi.data.planar import DISTRIBUTIONS, SQUARE, Distribution, Points

__all__ = [
    "DISTRIBUTIONS",
    "LOADERS",
    "SQUARE",
    "BatchStream",
    "ClassCount",
    "DataConfig",
    "Dataset",
    "Description",
    "Distribution",
    "Images",
    "Points",
    "data_root",
    "describe",
    "load",
    "some_of",
]
