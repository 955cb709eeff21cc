"""Image data sets: published ones in memory, folders of images in a memory map."""

import functools
from collections.abc import Callable
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from dxmi.compat import package_folder
from dxmi.data import cifar, known_files
from dxmi.data.batch import Condition
from dxmi.data.configs import ImageFolderConfig, PublishedImagesConfig, TenClassesConfig
from dxmi.data.dataset import Dataset, Split, content_signature, labeled_signature
from dxmi.data.folders import open_folder
from dxmi.data.idx import idx_content, parsed_idx
from dxmi.errors import UserError
from dxmi.persistence.cache import cache_root
from dxmi.persistence.files import require_target, user_path, variable_folder
from dxmi.persistence.tensor_files import printable

MNIST8_IMAGES = 20_000
_WITHOUT_TEST = ("digits",)
"""Data sets that were published without a test split."""
_DIGITS = "datasets/data/digits.csv.gz"
"""Path in the package scikit-learn; importing its `load_digits` would take seconds."""
_MNIST_FOLDER, _FASHION_FOLDER = "MNIST", "FashionMNIST"
"""Names of the folders in `data_root()`, and of the classes in torchvision."""


@dataclass(frozen=True)
class Images(Dataset):
    """Images with their classes.

    Attributes:
        name: Kind of the data set's config.
        pixels: Pixels, uint8, [N, C, H, W].
        labels: Class of each image, int64, [N]; all 0 if there are no classes.
        signature: Hash of the pixels, and of the labels and class names if there are any, 12 hex digits.
        num_classes: Number of classes; 0 if there are no classes.
        class_names: Names of the classes, in order; empty if there are no classes.
        source: Description of the place from which the images were read.
        notes: Notes on images that were left out or changed, one sentence per reason.
        read_test: Reads pixels and labels of the test images; None if there are none.
    """

    name: str
    pixels: Tensor
    labels: Tensor
    signature: str
    num_classes: int = 0
    class_names: tuple[str, ...] = ()
    source: str = ""
    notes: tuple[str, ...] = ()
    read_test: Callable[[], tuple[Tensor, Tensor]] | None = None

    @property
    def stored(self) -> Tensor:
        """The pixels."""
        return self.pixels

    @property
    def classes(self) -> Tensor | None:
        """The labels; None if there are no classes."""
        return self.labels if self.num_classes else None

    def test_split(self) -> Split | None:
        """Read the published test images; None if there are none.

        Raises:
            UserError: their files are missing or damaged.
        """
        if self.read_test is None:
            return None
        pixels, labels = self.read_test()
        return Split(pixels, Condition(labels), labels)


def data_root() -> Path:
    """The folder of the data sets' files: $DXMI_DATA, or ~/.cache/dxmi by default."""
    return variable_folder("DXMI_DATA", "~/.cache/dxmi")


def load_images(config: TenClassesConfig) -> Images:
    """Load one of the data sets in `LOADERS`.

    Raises:
        UserError: a file is missing, damaged or of another data set; the message names it, states where it was expected
            and how to get it.
    """
    name, label = config.kind, config.label
    accept_unknown = isinstance(config, PublishedImagesConfig) and config.accept_unknown_files
    pixels, labels = LOADERS[name](train=True, accept_unknown=accept_unknown)
    names = CLASS_NAMES[name]
    names += tuple(str(number) for number in range(len(names), int(labels.max()) + 1))  # labels in unknown files
    signature = labeled_signature(content_signature(pixels), labels, names)
    notes = (f"not compared with the published files of {name} (data.accept_unknown_files)",) * accept_unknown
    test = None if name in _WITHOUT_TEST else functools.partial(_test_images, name, label, accept_unknown)
    images = Images(name, pixels, labels, signature, len(names), names, _SOURCES[name](), notes, test)
    return images if label is None else only_class(images, label)


def _test_images(name: str, label: int | None, accept_unknown: bool) -> tuple[Tensor, Tensor]:
    """Read pixels and labels of the published test images, restricted to class `label` unless it is None."""
    pixels, labels = LOADERS[name](train=False, accept_unknown=accept_unknown)
    chosen = slice(None) if label is None else labels == label
    return pixels[chosen], labels[chosen]


def load_folder(config: ImageFolderConfig) -> Images:
    """Load the images of a folder as squares; see `dxmi.data.folders`.

    Raises:
        UserError: the folder is missing or has no images, or an image cannot be read; the message names it.
    """
    where = require_target(data_root() / user_path(config.folder, "data.folder"), "data.folder")
    mapped = open_folder(where, config.size, class_folders=config.class_folders, cache=cache_root() / "images")
    images = Images(
        name=config.kind,
        pixels=mapped.pixels,
        labels=mapped.labels,
        signature=mapped.signature,
        num_classes=mapped.num_classes,
        class_names=tuple(printable(name) for name in mapped.classes),
        source=printable(where),
        notes=mapped.notes,
    )
    return images if config.label is None else only_class(images, config.label)


def only_class(images: Images, label: int) -> Images:
    """Select the images of one class, and copy them to memory.

    Raises:
        UserError: there are no images of this class.
    """
    chosen = (images.labels == label).nonzero()[:, 0]
    if len(chosen) == 0:
        raise UserError(f"data.label is {label}, but {images.name} has no image of that class.")
    pixels, labels = images.pixels[chosen], images.labels[chosen]
    signature = labeled_signature(content_signature(pixels), labels, images.class_names)
    return replace(images, pixels=pixels, labels=labels, signature=signature)


# ----------------------------------------------------------------------------
# Loaders: `train` selects the training or the test split, and `accept_unknown` accepts files that differ from the
# published ones. Each loader returns pixels, uint8 [N, C, H, W], and labels, int64 [N].


def digits(*, train: bool, accept_unknown: bool = False) -> tuple[Tensor, Tensor]:  # noqa: ARG001  (the loaders share a signature)
    """Load 1,797 8x8 images of handwritten digits (UCI, from scikit-learn), 17 gray levels scaled to 0..255.

    They have no test split: the training and the test set are the same.
    """
    rows = torch.from_numpy(np.loadtxt(package_folder("sklearn") / _DIGITS, delimiter=","))  # 64 pixels, then the class
    pixels = (rows[:, :64].view(-1, 1, 8, 8) * (255.0 / 16.0)).round().to(torch.uint8)
    return pixels, rows[:, 64].long()


def _mnist_like(folder: str, published: str, *, train: bool, accept_unknown: bool) -> tuple[Tensor, Tensor]:
    """Load the data set known as `published` from its `folder`, which is also its name in torchvision."""

    def read(file: str) -> NDArray[np.uint8]:
        path = _find(folder, file)
        content = idx_content(path)
        array = parsed_idx(path, content)
        if not accept_unknown:
            known_files.require_published(path, content, published, file)
        return array

    part = "train" if train else "t10k"
    pixels, labels = read(f"{part}-images-idx3-ubyte"), read(f"{part}-labels-idx1-ubyte")
    if pixels.ndim != 3 or labels.shape != pixels.shape[:1] or pixels.size == 0:
        raise UserError(
            f"The images and labels in {data_root() / folder / 'raw'} do not match, or hold nothing. Fetch them again."
        )
    return torch.from_numpy(pixels.copy())[:, None], torch.from_numpy(labels.copy()).long()


def _find(folder: str, name: str) -> Path:
    raw = data_root() / folder / "raw"
    places = (raw / name, raw / f"{name}.gz")
    for path in places:
        if path.exists():
            return path
    for path in places:
        require_target(path, f"A file of {folder}")
    raise UserError(
        f"{name} is missing: it was looked for, plain or as .gz, in {raw}. "
        f"torchvision.datasets.{folder}({str(data_root())!r}, download=True) puts it there; "
        "set DXMI_DATA if you keep it elsewhere."
    )


def mnist(*, train: bool, accept_unknown: bool = False) -> tuple[Tensor, Tensor]:
    """Load MNIST at 28x28: 60,000 training or 10,000 test images."""
    return _mnist_like(_MNIST_FOLDER, known_files.MNIST, train=train, accept_unknown=accept_unknown)


def fashion_mnist(*, train: bool, accept_unknown: bool = False) -> tuple[Tensor, Tensor]:
    """Load Fashion-MNIST (arXiv 1708.07747) at 28x28: 60,000 training or 10,000 test images."""
    return _mnist_like(_FASHION_FOLDER, known_files.FASHION_MNIST, train=train, accept_unknown=accept_unknown)


def mnist8(*, train: bool, accept_unknown: bool = False) -> tuple[Tensor, Tensor]:
    """Load the first 20,000 training or the 10,000 test images of MNIST at 8x8, bilinear with antialiasing."""
    pixels, labels = mnist(train=train, accept_unknown=accept_unknown)
    pixels, labels = pixels[:MNIST8_IMAGES], labels[:MNIST8_IMAGES]
    small = torch.nn.functional.interpolate(pixels.float(), size=(8, 8), mode="bilinear", antialias=True)
    return small.round().clamp(0, 255).to(torch.uint8), labels


def cifar10(*, train: bool, accept_unknown: bool = False) -> tuple[Tensor, Tensor]:
    """Load CIFAR-10 at 32x32: 50,000 training or 10,000 test images, from the binary or else the Python batches."""
    folder = _cifar_folder()
    binary = folder.name == cifar.BINARY

    def read(name: str) -> cifar.Batch:
        path = require_target(folder / (f"{name}.bin" if binary else name), "A file of CIFAR-10")
        batch = cifar.read_binary_batch(path) if binary else cifar.read_python_batch(path)
        if not accept_unknown:
            known_files.require_published(path, cifar.binary_rows(batch), known_files.CIFAR10, name)
        return batch

    names = [f"data_batch_{number}" for number in range(1, 6)] if train else ["test_batch"]
    pixels, labels = (np.concatenate(parts) for parts in zip(*(read(name) for name in names), strict=True))
    return torch.from_numpy(pixels), torch.from_numpy(labels)


def _cifar_folder() -> Path:
    """The folder of the binary batches, or else of the Python batches."""
    for folder in (data_root() / cifar.BINARY, data_root() / cifar.PYTHON):
        require_target(folder, "The folder of CIFAR-10")
        if folder.is_dir():
            return folder
    raise UserError(
        f"CIFAR-10 is missing: {cifar.BINARY} and {cifar.PYTHON} were looked for in {data_root()}. Unpack "
        "https://www.cs.toronto.edu/~kriz/cifar-10-binary.tar.gz there; set DXMI_DATA if you keep it elsewhere."
    )


LOADERS: dict[str, Callable[..., tuple[Tensor, Tensor]]] = {
    "digits": digits,
    "mnist": mnist,
    "mnist8": mnist8,
    "fashion_mnist": fashion_mnist,
    "cifar10": cifar10,
}

_TEN = tuple(str(number) for number in range(10))
CLASS_NAMES: dict[str, tuple[str, ...]] = {
    "digits": _TEN,
    "mnist": _TEN,
    "mnist8": _TEN,
    "fashion_mnist": (
        *("T-shirt", "trouser", "pullover", "dress", "coat"),
        *("sandal", "shirt", "sneaker", "bag", "ankle boot"),
    ),
    "cifar10": (
        *("airplane", "automobile", "bird", "cat", "deer"),
        *("dog", "frog", "horse", "ship", "truck"),
    ),
}
"""Names of the classes of each data set, in order."""
_SOURCES: dict[str, Callable[[], str]] = {
    "digits": lambda: "scikit-learn",
    "mnist": lambda: str(data_root() / _MNIST_FOLDER / "raw"),
    "mnist8": lambda: str(data_root() / _MNIST_FOLDER / "raw"),
    "fashion_mnist": lambda: str(data_root() / _FASHION_FOLDER / "raw"),
    "cifar10": lambda: str(_cifar_folder()),
}
