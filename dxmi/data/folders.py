"""Folders of images of any size and number, converted once to a memory map of uint8 pixels.

Images are resized and cropped as in ADM (arXiv 2105.05233), whose versions of ImageNet-64 and LSUN later papers use:
halved with a box filter while the shorter side is at least twice the target, resized to the target with bicubic
interpolation, and cropped to the central square. A manifest is written after the pixels, so that a map with a manifest
is complete. Hidden and system files are left out, as are unreadable ones; a note per reason states the number of
files and the name of the first.

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
from PIL import Image
from torch import Tensor
from tqdm import tqdm

from dxmi.data.dataset import labeled_signature, shape_hash
from dxmi.data.pixels import to_rgb
from dxmi.errors import UserError
from dxmi.machine import available_cpus
from dxmi.persistence.files import sync_folder, write_json
from dxmi.persistence.tensor_files import printable

SUFFIXES = frozenset(
    {".jpeg", ".jpg", ".jpe", ".jfif", ".png", ".webp", ".bmp", ".gif", ".tif", ".tiff"}
    | {".ppm", ".pgm", ".pbm", ".pnm"}
)
_SYSTEM = frozenset(
    {"__macosx", "lost+found", "@eadir", "#recycle", "#snapshot", "$recycle.bin", "system volume information"}
    | {"__pycache__", "thumbs.db", "ehthumbs.db", "desktop.ini"}
)
"""Folders and files that operating systems create, in lower case; names that start with a dot are hidden as well."""
_BACK, _FOLLOWED = "a link back to a folder above it", "links to folders, followed"
_OTHER = "not an image by its name"
_SHOWN_CLASSES = 20
_VERSION = 2
"""Must be incremented whenever a change of the code changes a pixel."""
_CHUNK = 256
"""Number of images that are decoded at a time."""


@dataclass(frozen=True)
class Listing:
    """The images in a folder.

    Attributes:
        folder: Folder that was searched.
        files: Paths relative to the folder, sorted.
        labels: Class of each image, int64, [N]; all 0 if there are no classes.
        classes: Names of the folders that are classes, sorted; empty if there are no classes.
        notes: What was left out, and which classes are empty, one sentence per reason.
    """

    folder: Path
    files: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def fingerprint(self, size: int) -> str:
        """A hash of the names, sizes and modification times of all files, and of the target format: 16 hex digits.

        Raises:
            UserError: a file is empty.
            OSError: a file was deleted meanwhile.
        """
        digest, empty = hashlib.sha256(f"{_VERSION} {size} {self.classes}".encode(errors="surrogateescape")), []
        for name in self.files:
            about = (self.folder / name).stat()
            # A file that replaces another may preserve its modification time, but not its change time (ctime).
            times = f"{about.st_size}\0{about.st_mtime_ns}\0{about.st_ctime_ns}\0"
            digest.update(f"{name}\0{times}".encode(errors="surrogateescape"))
            if about.st_size == 0:
                empty.append(name)
        if empty:
            others = f"; {len(empty) - 1:,} more like it" * (len(empty) > 1)
            first = printable(self.folder / empty[0])
            raise UserError(f"The image {first} cannot be read (it is empty{others}): fetch it again or delete it.")
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class MappedImages:
    """Images in a memory map; a row is read from disk when it is accessed.

    Attributes:
        pixels: uint8, [N, 3, S, S].
        labels: int64, [N].
        classes: Names of the classes, in order; empty if there are no classes.
        signature: Hash of the pixels, and of the labels and classes if there are any, 12 hex digits.
        notes: What was left out or changed, one sentence per reason.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    signature: str
    notes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """The number of classes; 0 if there are no classes."""
        return len(self.classes)


def list_images(folder: Path, *, class_folders: bool) -> Listing:
    """Find the images in a folder and its subfolders, sorted by path.

    Args:
        folder: Folder to search.
        class_folders: Whether each folder in it is a class, numbered in the order of their names, as in ImageNet.

    Raises:
        UserError: the folder does not exist, cannot be read, or contains no image.
    """
    if not folder.is_dir():
        raise UserError(
            f"The folder of images {folder} is missing: put it there, or set data.folder, which is relative to "
            "DXMI_DATA unless it is an absolute path."
        )
    search = _Search(folder)
    classes = search.classes() if class_folders else []
    if class_folders and not classes:
        raise UserError(
            f"{folder} holds no class folders: put each class into its own folder, or set data.class_folders=false."
            f"{search.explanation()}"
        )
    found = [sorted(search.images(name)) for name in classes or [""]]
    files = [name for names in found for name in names]
    if not files:
        kinds = ", ".join(sorted(SUFFIXES))
        where = " in class folders" if class_folders else ""
        raise UserError(f"{folder} holds no images{where} ({kinds}).{search.explanation()}")
    labels = torch.tensor([label for label, names in enumerate(found) for _ in names])
    empty = [f"{printable(classes[label])} ({label})" for label, names in enumerate(found) if not names]
    notes = [*search.tally.sentences(), *([_empty_classes(empty)] if empty else [])]
    return Listing(folder, tuple(files), labels, tuple(classes), tuple(notes))


def _empty_classes(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_CLASSES]) + ", ..." * (len(names) > _SHOWN_CLASSES)
    return f"classes without images, which keep their numbers: {len(names):,} ({shown})"


class Tally:
    """The number of files of each kind, and the first file of each kind."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, name: str) -> None:
        """Count a file."""
        count, first = self.found.get(kind, (0, printable(name)))
        self.found[kind] = count + 1, first

    def sentences(self) -> list[str]:
        """One sentence per kind, sorted by kind."""
        return [f"{kind}: {count:,} (first: {first})" for kind, (count, first) in sorted(self.found.items())]


class _Search:
    """Searches a folder for images. Links are followed unless they lead back to a parent folder.

    Args:
        root: Folder to search.

    Attributes:
        tally: Counts of the files that were left out, and of the links that were followed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tally = Tally()

    def explanation(self) -> str:
        """A sentence about what was left out, to be appended to a message."""
        sentences = self.tally.sentences()
        return f" {'; '.join(sentences)}.".replace(" left", " Left", 1) if sentences else ""

    def classes(self) -> list[str]:
        """The sorted names of the folders in the root that are classes."""
        names = []
        for entry in self._entries(self.root):
            if _is_folder(entry) and self._is_above(entry):
                self._leave(_BACK, entry.path)
            elif _is_folder(entry):
                if entry.is_symlink():
                    self.tally.add(_FOLLOWED, entry.name)
                names.append(entry.name)
            elif _is_image(entry):
                self._leave("an image outside of class folders", entry.path)
            else:
                self._leave(_OTHER, entry.path)
        return sorted(names)

    def _is_above(self, entry: os.DirEntry[str]) -> bool:
        """Whether a folder in the root is a link to the root, or to a parent of the root."""
        real = Path(os.path.realpath(entry.path))
        return Path(os.path.realpath(self.root)).is_relative_to(real)

    def images(self, name: str) -> Iterator[str]:
        """The images in the folder `name` of the root and its subfolders, as paths relative to the root."""
        folder = self.root / name
        return self._below(folder, frozenset({os.path.realpath(self.root), os.path.realpath(folder)}))

    def _below(self, folder: Path, above: frozenset[str]) -> Iterator[str]:
        for entry in self._entries(folder):
            if _is_folder(entry):
                real = os.path.realpath(entry.path)
                if real in above:
                    self._leave(_BACK, entry.path)
                    continue
                if entry.is_symlink():
                    self.tally.add(_FOLLOWED, os.path.relpath(entry.path, self.root))
                yield from self._below(Path(entry.path), above | {real})
            elif not _is_image(entry):
                self._leave(_OTHER, entry.path)
            elif not os.access(entry.path, os.R_OK):
                self._leave("a file that cannot be read", entry.path)
            else:
                yield os.path.relpath(entry.path, self.root)

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """The sorted entries of a folder, except for hidden and system files and dangling links."""
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            self._leave("a folder that cannot be read", str(folder))
            return []
        kept = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in _SYSTEM:
                self._leave("hidden or a system file", entry.path)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                self._leave("a link whose target is missing", entry.path)
            else:
                kept.append(entry)
        return kept

    def _leave(self, why: str, path: str) -> None:
        self.tally.add(f"left out, {why}", os.path.relpath(path, self.root))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that cannot be followed
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """Whether an entry has the suffix of an image, and is a regular file (reading a pipe could block)."""
    try:
        return os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file()
    except OSError:
        return False


def open_folder(folder: Path, size: int, *, class_folders: bool, cache: Path) -> MappedImages:
    """Open the images of a folder at S = `size`, and create the memory map if it does not exist.

    A lock ensures that only one process creates the map while others wait for it.

    Args:
        folder: See `list_images`.
        size: S.
        class_folders: See `list_images`.
        cache: Folder of the maps.

    Raises:
        UserError: there are no images, an image cannot be read, or the map cannot be written.
    """
    listing = list_images(folder, class_folders=class_folders)
    try:
        path = cache / f"{listing.fingerprint(size)}.u8"
    except OSError as error:
        raise UserError(f"{error.filename} was removed from {folder} meanwhile: start again.") from error
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            manifest = _read_manifest(path) or _make(listing, size, path)
    except OSError as error:
        raise UserError(f"The map of {folder} cannot be written to {cache} ({error.strerror or error}).") from error
    signature: str = manifest["signature"]
    if listing.classes:
        signature = labeled_signature(signature, listing.labels, listing.classes)
    notes = (*listing.notes, *manifest["notes"])
    return MappedImages(_mapped(path, manifest["shape"]), listing.labels, listing.classes, signature, notes)


def _mapped(path: Path, shape: Sequence[int]) -> Tensor:
    """Map a file as a tensor, read on access; writing to the tensor would not change the file."""
    return torch.from_file(str(path), shared=False, size=int(np.prod(shape)), dtype=torch.uint8).view(*shape)


def _manifest_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a complete map; None if it is missing or does not match the size of the map."""
    try:
        manifest: dict[str, Any] = json.loads(_manifest_path(path).read_text())
        whole = path.stat().st_size == int(np.prod(manifest["shape"])) and {"signature", "notes"} <= manifest.keys()
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError):
        return None
    return manifest if whole else None


def _make(listing: Listing, size: int, path: Path) -> dict[str, Any]:
    """Write the map, then its manifest."""
    shape = (len(listing.files), 3, size, size)
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    changed = Tally()
    try:
        with part.open("wb") as file:
            digest = _write_pixels(listing, size, file, changed)
        part.replace(path)
    finally:
        part.unlink(missing_ok=True)
    sync_folder(path.parent)
    manifest = {
        "shape": list(shape),
        "signature": digest,
        "notes": changed.sentences(),
        "folder": printable(listing.folder),
        "classes": [printable(name) for name in listing.classes],
        "filter": "box halving, bicubic, central square",
    }
    write_json(_manifest_path(path), manifest)
    return manifest


def _write_pixels(listing: Listing, size: int, file: BinaryIO, changed: Tally) -> str:
    """Write all images in order and count the conversions in `changed`; returns the signature of the pixels."""
    digest = shape_hash((len(listing.files), 3, size, size))
    threads = min(available_cpus(), 32)  # decoding and resizing release the GIL
    bar = tqdm(total=len(listing.files), unit="images", desc=f"reading {listing.folder.name}", disable=None)
    with ThreadPoolExecutor(threads) as pool, bar:
        for start in range(0, len(listing.files), _CHUNK):
            names = listing.files[start : start + _CHUNK]
            squares = list(pool.map(lambda name: _read(listing.folder / name, size), names))
            for name, (_, done) in zip(names, squares, strict=True):
                for what in done:
                    changed.add(what, name)
            rows = b"".join(square.tobytes() for square, _ in squares)
            file.write(rows)
            digest.update(rows)
            bar.update(len(names))
    file.flush()
    os.fsync(file.fileno())
    return digest.hexdigest()[:12]


def read_square(path: Path, size: int) -> NDArray[np.uint8]:
    """Read the central square of an image at S = `size`, as upright opaque RGB (see `dxmi.data.pixels`): [3, S, S].

    Raises:
        UserError: the image cannot be read, or the range of its values is unknown.
    """
    return _read(path, size)[0]


def _read(path: Path, size: int) -> tuple[NDArray[np.uint8], frozenset[str]]:
    """Read the central square; also returns the conversions that were necessary."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # about unusual metadata
            with Image.open(path) as image:
                rgb, done = to_rgb(image)
                square = central_square(rgb, size)
    except Exception as error:  # Pillow raises many types for damaged files
        why = str(error) or type(error).__name__
        raise UserError(f"The image {printable(path)} cannot be read ({why}): fetch it again or delete it.") from error
    return np.asarray(square).transpose(2, 0, 1), done


def central_square(image: Image.Image, size: int) -> Image.Image:
    """Resize an image and crop it to the central S x S square; see the module's docstring."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
