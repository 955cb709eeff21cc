"""Image data sets in memory."""

import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dxmi.data.dataset import Dataset, content_signature
from dxmi.data.idx import read_idx
from dxmi.errors import UserError
from dxmi.files import user_path

MNIST8_IMAGES = 20_000


@dataclass(frozen=True)
class Images(Dataset):
    """Images with their classes.

    Attributes:
        name: as in `DataConfig`.
        pixels: uint8, [N, C, H, W].
        labels: class of each, int64, [N].
        signature: hash of the pixels, 12 hex digits.
    """

    name: str
    pixels: Tensor
    labels: Tensor
    signature: str

    @property
    def stored(self) -> Tensor:
        """The pixels."""
        return self.pixels


def data_root() -> Path:
    """Where files of data sets are looked for: $DXMI_DATA, else ~/.cache/dxmi."""
    return user_path(os.environ.get("DXMI_DATA") or "~/.cache/dxmi", "DXMI_DATA")


def load_images(name: str, label: int | None) -> Images:
    """The training images of the data set `name`, those of class `label` alone unless it is None.

    Raises:
        UserError: a file is missing or damaged; the sentence says which, where it was looked for and how to get it.
    """
    pixels, labels = LOADERS[name](train=True)
    if label is not None:
        pixels, labels = pixels[labels == label], labels[labels == label]
    return Images(name, pixels, labels, content_signature(pixels))


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


LOADERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "digits": digits,
    "mnist": mnist,
    "mnist8": mnist8,
    "fashion_mnist": fashion_mnist,
}
