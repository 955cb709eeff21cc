"""From a data config to a data set."""

from dxmi.data.configs import DataConfig
from dxmi.data.dataset import Dataset
from dxmi.data.images import load_folder, load_images
from dxmi.data.planar import load_points


def load(config: DataConfig) -> Dataset:
    """The data set that `config` names.

    Raises:
        UserError: a file is missing, damaged or of another data set; the sentence says which, where it was looked for
            and how to get it.
    """
    if config.is_planar:
        return load_points(config.name, config.num_points)
    if config.folder is not None and config.size is not None:
        return load_folder(config.folder, config.size, config.label, class_folders=config.class_folders)
    return load_images(config.name, config.label, accept_unknown=config.accept_unknown_files)
