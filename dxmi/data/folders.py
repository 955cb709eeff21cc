"""Folders of images, of any size and number, as a memory map of uint8 pixels that is made once.

An image is cropped and resized as ADM does (arXiv 2105.05233), whose ImageNet-64 and LSUN later papers use: halved
with a box filter while its shorter side is at least twice the wanted one, then bicubic to that side, then the central
square. Beside the pixels lies a manifest, written last: where there is one, the rest is whole.

Axis letters: N images, S side in pixels.
"""

import hashlib
import json
import os
import warnings
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np
import torch
from filelock import FileLock
from numpy.typing import NDArray
from PIL import Image, UnidentifiedImageError
from torch import Tensor
from tqdm import tqdm

from dxmi.data.dataset import shape_hash
from dxmi.errors import UserError
from dxmi.files import sync_folder, write_json
from dxmi.machine import available_cpus

SUFFIXES = frozenset({".jpeg", ".jpg", ".png", ".webp", ".bmp", ".ppm"})
_VERSION = 1
"""Raised whenever a change of the code changes a pixel."""
_CHUNK = 256
"""Images decoded together."""


@dataclass(frozen=True)
class Listing:
    """The images in a folder.

    Attributes:
        folder: where they lie.
        files: paths inside it, in order.
        labels: class of each, int64, [N]; all 0 without classes.
        classes: names of the folders that are classes, in order; empty without classes.
    """

    folder: Path
    files: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]

    def fingerprint(self, size: int) -> str:
        """Of every file's name, bytes and time of change, and of what is made of them: 16 hex digits."""
        digest = hashlib.sha256(f"{_VERSION} {size} {self.classes}".encode())
        for name in self.files:
            about = (self.folder / name).stat()
            digest.update(f"{name}\0{about.st_size}\0{about.st_mtime_ns}\0".encode(errors="surrogateescape"))
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class MappedImages:
    """Images in a memory map; a row is read from disk when it is asked for.

    Attributes:
        pixels: uint8, [N, 3, S, S].
        labels: int64, [N].
        num_classes: 0 without classes.
        signature: of the pixels, 12 hex digits.
    """

    pixels: Tensor
    labels: Tensor
    num_classes: int
    signature: str


def list_images(folder: Path, *, class_folders: bool) -> Listing:
    """The images below a folder, sorted by path.

    Args:
        folder: where.
        class_folders: each folder in it is a class, numbered in the order of their names, as in ImageNet.

    Raises:
        UserError: there is no such folder, or no image in it.
    """
    if not folder.is_dir():
        raise UserError(f"The folder of images {folder} is missing: put it there, or set DXMI_DATA or data.folder.")
    classes = sorted(entry.name for entry in os.scandir(folder) if entry.is_dir()) if class_folders else []
    if class_folders and not classes:
        raise UserError(f"{folder} holds no folders of classes: put each class into one, or data.class_folders=false.")
    files, labels = [], []
    for label, name in enumerate(classes or [""]):
        found = sorted(_below(folder, folder / name))
        files += found
        labels += [label] * len(found)
    if not files:
        kinds = ", ".join(sorted(SUFFIXES))
        raise UserError(f"{folder} holds no images{' in folders of classes' if class_folders else ''} ({kinds}).")
    return Listing(folder, tuple(files), torch.tensor(labels), tuple(classes))


def _below(root: Path, folder: Path) -> Iterator[str]:
    for where, _, names in os.walk(folder):
        for name in names:
            if os.path.splitext(name)[1].lower() in SUFFIXES:
                yield os.path.relpath(os.path.join(where, name), root)


def open_folder(folder: Path, size: int, *, class_folders: bool, cache: Path) -> MappedImages:
    """The images of a folder at S = `size`; the first who asks makes the map, and whoever else asks meanwhile waits.

    Args:
        folder: as for `list_images`.
        size: S.
        class_folders: as for `list_images`.
        cache: folder of maps.

    Raises:
        UserError: there are no images, one cannot be read, or the map cannot be written.
    """
    listing = list_images(folder, class_folders=class_folders)
    path = cache / f"{listing.fingerprint(size)}.u8"
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            manifest = _read_manifest(path) or _make(listing, size, path)
    except OSError as error:
        raise UserError(f"The map of {folder} cannot be written to {cache} ({error.strerror or error}).") from error
    return MappedImages(_mapped(path, manifest["shape"]), listing.labels, len(listing.classes), manifest["signature"])


def _mapped(path: Path, shape: Sequence[int]) -> Tensor:
    """The whole file as a tensor, of which nothing is read yet; writing to it would change memory alone."""
    return torch.from_file(str(path), shared=False, size=int(np.prod(shape)), dtype=torch.uint8).view(*shape)


def _manifest_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a whole map; None if there is none, or the map has another size than it says."""
    try:
        manifest: dict[str, Any] = json.loads(_manifest_path(path).read_text())
        whole = path.stat().st_size == int(np.prod(manifest["shape"]))
    except (FileNotFoundError, ValueError, KeyError):
        return None
    return manifest if whole else None


def _make(listing: Listing, size: int, path: Path) -> dict[str, Any]:
    """Write the map, then its manifest."""
    shape = (len(listing.files), 3, size, size)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    try:
        with part.open("wb") as file:
            digest = _write_pixels(listing, size, file)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)
    manifest = {
        "shape": list(shape),
        "signature": digest,
        "folder": str(listing.folder),
        "classes": list(listing.classes),
        "filter": "box halving, bicubic, central square",
    }
    write_json(_manifest_path(path), manifest)
    return manifest


def _write_pixels(listing: Listing, size: int, file: BinaryIO) -> str:
    """All images, in order; returns the signature of their pixels."""
    digest = shape_hash((len(listing.files), 3, size, size))
    threads = min(available_cpus(), 32)  # decoding and resizing let go of the interpreter's lock
    bar = tqdm(total=len(listing.files), unit="images", desc=f"reading {listing.folder.name}", disable=None)
    with ThreadPoolExecutor(threads) as pool, bar:
        for start in range(0, len(listing.files), _CHUNK):
            names = listing.files[start : start + _CHUNK]
            rows = b"".join(pool.map(lambda name: read_square(listing.folder / name, size).tobytes(), names))
            file.write(rows)
            digest.update(rows)
            bar.update(len(names))
    file.flush()
    os.fsync(file.fileno())
    return digest.hexdigest()[:12]


def read_square(path: Path, size: int) -> NDArray[np.uint8]:
    """An image's central square at S = `size`, RGB: [3, S, S].

    Raises:
        UserError: it cannot be read.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            with Image.open(path) as image:
                square = central_square(image.convert("RGB"), size)
    except (OSError, UnidentifiedImageError, Image.DecompressionBombError, SyntaxError, ValueError) as error:
        raise UserError(f"The image {path} cannot be read ({error}): fetch it again or take it away.") from error
    return np.asarray(square).transpose(2, 0, 1)


def central_square(image: Image.Image, size: int) -> Image.Image:
    """The central S x S square after resizing, see the module's docstring."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
