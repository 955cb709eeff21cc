"""Data sets: uint8 on disk, [-1, 1] inside. A new one is a loader function and a line in `LOADERS`."""

from dxmi.data.images import LOADERS, BatchStream, DataConfig, Images, data_root, load

__all__ = ["LOADERS", "BatchStream", "DataConfig", "Images", "data_root", "load"]
