"""From a data config to a data set."""

from dxmi.data.configs import DataConfig
from dxmi.data.dataset import Dataset
from dxmi.data.registry import DATA_SETS


def load(config: DataConfig) -> Dataset:
    """The data set that `config` describes.

    Raises:
        UserError: a file is missing, damaged or of another data set; the sentence says which, where it was looked for
            and how to get it.
    """
    return DATA_SETS.build(config)
