"""Image data sets: small ones in memory, folders of images in a memory map."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dxmi.cache import cache_root
from dxmi.data import cifar
from dxmi.data.dataset import Dataset, content_signature
from dxmi.data.folders import open_folder
from dxmi.data.idx import read_idx
from dxmi.errors import UserError
from dxmi.files import user_path, variable_folder

MNIST8_IMAGES = 20_000
FOLDER = "image_folder"
"""The name of every data set that is a folder of images."""
_NUM_CLASSES = 10
"""Of every data set that has a loader of its own."""


@dataclass(frozen=True)
class Images(Dataset):
    """Images with their classes.

    Attributes:
        name: as in `DataConfig`.
        pixels: uint8, [N, C, H, W].
        labels: class of each, int64, [N]; all 0 if there are no classes.
        signature: hash of the pixels, 12 hex digits.
        num_classes: how many classes there are; 0 for none.
    """

    name: str
    pixels: Tensor
    labels: Tensor
    signature: str
    num_classes: int = 0

    @property
    def stored(self) -> Tensor:
        """The pixels."""
        return self.pixels

    @property
    def classes(self) -> Tensor | None:
        """The labels, if there are classes."""
        return self.labels if self.num_classes else None


def data_root() -> Path:
    """Where files of data sets are looked for: $DXMI_DATA, else ~/.cache/dxmi."""
    return variable_folder("DXMI_DATA", "~/.cache/dxmi")


def load_images(name: str, label: int | None) -> Images:
    """The training images of the data set `name`, those of class `label` alone unless it is None.

    Raises:
        UserError: a file is missing or damaged; the sentence says which, where it was looked for and how to get it.
    """
    pixels, labels = LOADERS[name](train=True)
    images = Images(name, pixels, labels, content_signature(pixels), _NUM_CLASSES)
    return images if label is None else only_class(images, label)


def load_folder(folder: str, size: int, label: int | None, *, class_folders: bool) -> Images:
    """The images of a folder as squares; see `dxmi.data.folders`.

    Args:
        folder: a path; if it is relative, inside `data_root()`.
        size: side of a square.
        label: keep this class alone, unless it is None.
        class_folders: each folder in it is a class.

    Raises:
        UserError: it is missing or holds what is no image; the sentence says which.
    """
    where = data_root() / user_path(folder, "data.folder")
    mapped = open_folder(where, size, class_folders=class_folders, cache=cache_root() / "images")
    images = Images(FOLDER, mapped.pixels, mapped.labels, mapped.signature, mapped.num_classes)
    return images if label is None else only_class(images, label)


def only_class(images: Images, label: int) -> Images:
    """The images of one class, in memory.

    Raises:
        UserError: there are none.
    """
    chosen = (images.labels == label).nonzero()[:, 0]
    if len(chosen) == 0:
        raise UserError(f"data.label is {label}, but {images.name} has no image of that class.")
    pixels = images.pixels[chosen]
    return Images(images.name, pixels, images.labels[chosen], content_signature(pixels), images.num_classes)


# ----------------------------------------------------------------------------
# Loaders: `train` chooses the split; each returns pixels uint8 [N, C, H, W] and labels int64 [N].


def digits(*, train: bool) -> tuple[Tensor, Tensor]:  # noqa: ARG001  (the loaders share a signature)
    """1,797 8x8 images of handwritten digits (UCI, carried by scikit-learn), 17 grey levels stretched to 0..255.

    They come without a split: training and test set are the same.
    """
    bunch = load_digits()
    pixels = (torch.from_numpy(bunch.images) * (255.0 / 16.0)).round().to(torch.uint8)
    return pixels[:, None], torch.from_numpy(bunch.target).long()


def _mnist_like(folder: str, source: str, *, train: bool) -> tuple[Tensor, Tensor]:
    part = "train" if train else "t10k"
    pixels = read_idx(_find(folder, f"{part}-images-idx3-ubyte", source))
    labels = read_idx(_find(folder, f"{part}-labels-idx1-ubyte", source))
    if pixels.ndim != 3 or labels.shape != pixels.shape[:1]:
        raise UserError(f"The images and labels in {data_root() / folder / 'raw'} do not match. Fetch them again.")
    return torch.from_numpy(pixels.copy())[:, None], torch.from_numpy(labels.copy()).long()


def _find(folder: str, name: str, source: str) -> Path:
    raw = data_root() / folder / "raw"
    for path in (raw / name, raw / f"{name}.gz"):
        if path.exists():
            return path
    raise UserError(
        f"{name} is missing: it was looked for, plain or as .gz, in {raw}. "
        f"torchvision.datasets.{source}({str(data_root())!r}, download=True) puts it there; "
        "set DXMI_DATA if you keep it elsewhere."
    )


def mnist(*, train: bool) -> tuple[Tensor, Tensor]:
    """MNIST, 28x28: 60,000 or 10,000 images."""
    return _mnist_like("MNIST", "MNIST", train=train)


def fashion_mnist(*, train: bool) -> tuple[Tensor, Tensor]:
    """Fashion-MNIST (arXiv 1708.07747), 28x28: 60,000 or 10,000 images."""
    return _mnist_like("FashionMNIST", "FashionMNIST", train=train)


def mnist8(*, train: bool) -> tuple[Tensor, Tensor]:
    """The first 20,000 MNIST images (or the 10,000 test images) at 8x8, bilinear with antialiasing."""
    pixels, labels = mnist(train=train)
    pixels, labels = pixels[:MNIST8_IMAGES], labels[:MNIST8_IMAGES]
    small = torch.nn.functional.interpolate(pixels.float(), size=(8, 8), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8), labels


def cifar10(*, train: bool) -> tuple[Tensor, Tensor]:
    """CIFAR-10, 32x32 in colour: 50,000 or 10,000 images, from the binary batches or else from Python's."""
    names = [f"data_batch_{number}" for number in range(1, 6)] if train else ["test_batch"]
    binary, python = data_root() / cifar.BINARY, data_root() / cifar.PYTHON
    if binary.is_dir():
        batches = [cifar.read_binary_batch(binary / f"{name}.bin") for name in names]
    elif python.is_dir():
        batches = [cifar.read_python_batch(python / name) for name in names]
    else:
        raise UserError(
            f"CIFAR-10 is missing: {cifar.BINARY} and {cifar.PYTHON} were looked for in {data_root()}. Unpack "
            "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz there; set DXMI_DATA if you keep it elsewhere."
        )
    pixels, labels = (np.concatenate(parts) for parts in zip(*batches, strict=True))
    return torch.from_numpy(pixels), torch.from_numpy(labels)


LOADERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "digits": digits,
    "mnist": mnist,
    "mnist8": mnist8,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
}
