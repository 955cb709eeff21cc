"""Image data sets in memory, and the order in which a run reads them."""

import hashlib
import os
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import torch
from sklearn.datasets import load_digits
from torch import Tensor

from dxmi.data.idx import read_idx
from dxmi.errors import UserError
from dxmi.files import user_path
from dxmi.tensors import from_uint8

MNIST8_IMAGES = 20_000


@dataclass(frozen=True, kw_only=True)
class DataConfig:
    """Which real samples."""

    name: str = "digits"
    """digits, mnist, mnist8 or fashion_mnist."""
    label: int | None = None
    """Keep only this class; null for all."""

    def __post_init__(self) -> None:
        if self.name not in LOADERS:
            raise ValueError(f"name is {self.name!r}: it must be one of {', '.join(LOADERS)}")
        if self.label is not None and not 0 <= self.label <= 9:
            raise ValueError(f"label is {self.label}: it must be in 0..9, or null for all classes")


@dataclass(frozen=True)
class Images:
    """A data set.

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
    def event(self) -> tuple[int, ...]:
        """Shape of one sample, (C, H, W)."""
        return tuple(self.pixels.shape[1:])

    def __len__(self) -> int:
        return len(self.pixels)


def data_root() -> Path:
    """Where files of data sets are looked for: $DXMI_DATA, else ~/.cache/dxmi."""
    return user_path(os.environ.get("DXMI_DATA") or "~/.cache/dxmi", "DXMI_DATA")


def load(config: DataConfig) -> Images:
    """The data set that `config` names.

    Raises:
        UserError: a file is missing or damaged; the sentence says which, where it was looked for and how to get it.
    """
    pixels, labels = LOADERS[config.name](train=True)
    if config.label is not None:
        pixels, labels = pixels[labels == config.label], labels[labels == config.label]
    signature = hashlib.sha256(str(tuple(pixels.shape)).encode() + pixels.numpy().tobytes()).hexdigest()[:12]
    return Images(config.name, pixels, labels, signature)


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


class BatchStream:
    """Shuffled epochs without end; every batch is full. Its whole state is three tensors.

    Args:
        pixels: uint8, [N, C, H, W], on the device where the batches are wanted.
        batch_size: B; may be larger than N.
        generator: shuffles, on the host.
    """

    def __init__(self, pixels: Tensor, batch_size: int, generator: torch.Generator) -> None:
        self.pixels = pixels
        self.batch_size = batch_size
        self.generator = generator
        self.order = torch.empty(0, dtype=torch.int64)

    def next(self) -> Tensor:
        """The next batch in [-1, 1], [B, C, H, W]."""
        while len(self.order) < self.batch_size:
            epoch = torch.randperm(len(self.pixels), generator=self.generator)
            self.order = torch.cat((self.order, epoch))
        drawn, self.order = self.order[: self.batch_size], self.order[self.batch_size :]
        return from_uint8(self.pixels[drawn.to(self.pixels.device, non_blocking=True)])

    def state(self) -> dict[str, Tensor]:
        """What `load_state` needs to go on from here."""
        return {"order": self.order.clone(), "generator": self.generator.get_state()}

    def load_state(self, state: dict[str, Tensor]) -> None:
        """Go on from where `state` was taken."""
        self.order = state["order"].clone()
        self.generator.set_state(state["generator"])
