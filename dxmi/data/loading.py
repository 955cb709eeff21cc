"""Loading of the data set that a config describes."""

from dxmi.data.configs import DataConfig
from dxmi.data.dataset import Dataset
from dxmi.data.registry import DATA_SETS


def load(config: DataConfig) -> Dataset:
    """Load the data set that `config` describes.

    Raises:
        UserError: a file is missing, damaged or of another data set; the message names it, states where it was expected
            and how to get it.
    """
    return DATA_SETS.build(config)
