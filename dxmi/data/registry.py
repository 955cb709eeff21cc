"""Registry of the data sets. Nothing here imports PyTorch: see `dxmi.registry`."""

from typing import TYPE_CHECKING

from dxmi.registry import Registry

if TYPE_CHECKING:
    from dxmi.data.dataset import Dataset

_CONFIGS, _IMAGES, _POINTS = "dxmi.data.configs", "dxmi.data.images:load_images", "dxmi.data.planar:load_points"

DATA_SETS: Registry["Dataset"] = Registry(
    "data set",
    {
        "digits": (f"{_CONFIGS}:DigitsConfig", _IMAGES),
        "mnist": (f"{_CONFIGS}:MnistConfig", _IMAGES),
        "mnist8": (f"{_CONFIGS}:Mnist8Config", _IMAGES),
        "fashion_mnist": (f"{_CONFIGS}:FashionMnistConfig", _IMAGES),
        "cifar10": (f"{_CONFIGS}:Cifar10Config", _IMAGES),
        "image_folder": (f"{_CONFIGS}:ImageFolderConfig", "dxmi.data.images:load_folder"),
        "gaussians8": (f"{_CONFIGS}:Gaussians8Config", _POINTS),
        "two_spirals": (f"{_CONFIGS}:TwoSpiralsConfig", _POINTS),
        "checkerboard": (f"{_CONFIGS}:CheckerboardConfig", _POINTS),
        "moons": (f"{_CONFIGS}:MoonsConfig", _POINTS),
    },
)
