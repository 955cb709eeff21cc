"""Folders of images, of any size and number, as a memory map of uint8 pixels that is made once.

An image is cropped and resized as ADM does (arXiv 2105.05233), whose ImageNet-64 and LSUN later papers use: halved
with a box filter while its shorter side is at least twice the wanted one, then bicubic to that side, then the central
square. Beside the pixels lies a manifest, written last: where there is one, the rest is whole. What is hidden or of the
system is left out, and nothing without a word: there is one note for each reason, with a count and the first name.

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

from dxmi.data.dataset import labelled_signature, shape_hash
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
"""Folders and files that systems leave behind, in lower case; what begins with a dot is hidden besides."""
_BACK, _FOLLOWED = "a link back to a folder above it", "links to folders, followed"
_OTHER = "no image by its name"
_SHOWN_CLASSES = 20
_VERSION = 2
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
        notes: what was left out, and which classes are empty, one sentence for each reason.
    """

    folder: Path
    files: tuple[str, ...]
    labels: Tensor
    classes: tuple[str, ...]
    notes: tuple[str, ...] = ()

    def fingerprint(self, size: int) -> str:
        """Of every file's name, bytes and times of change, and of what is made of them: 16 hex digits.

        Raises:
            UserError: a file holds nothing.
            OSError: one has just gone.
        """
        digest, empty = hashlib.sha256(f"{_VERSION} {size} {self.classes}".encode(errors="surrogateescape")), []
        for name in self.files:
            about = (self.folder / name).stat()
            # A file that takes another's place may bring its times of writing along, but not that of the change.
            times = f"{about.st_size}\0{about.st_mtime_ns}\0{about.st_ctime_ns}\0"
            digest.update(f"{name}\0{times}".encode(errors="surrogateescape"))
            if about.st_size == 0:
                empty.append(name)
        if empty:
            others = f"; {len(empty) - 1:,} more like it" * (len(empty) > 1)
            first = printable(self.folder / empty[0])
            raise UserError(
                f"The image {first} cannot be read (it holds nothing{others}): fetch it again or delete it."
            )
        return digest.hexdigest()[:16]


@dataclass(frozen=True)
class MappedImages:
    """Images in a memory map; a row is read from disk when it is asked for.

    Attributes:
        pixels: uint8, [N, 3, S, S].
        labels: int64, [N].
        classes: their names, in order; empty without classes.
        signature: of the pixels, and of the labels and classes if there are any, 12 hex digits.
        notes: what was left out or changed, one sentence for each reason.
    """

    pixels: Tensor
    labels: Tensor
    classes: tuple[str, ...]
    signature: str
    notes: tuple[str, ...]

    @property
    def num_classes(self) -> int:
        """0 without classes."""
        return len(self.classes)


def list_images(folder: Path, *, class_folders: bool) -> Listing:
    """The images below a folder, sorted by path.

    Args:
        folder: where.
        class_folders: each folder in it is a class, numbered in the order of their names, as in ImageNet.

    Raises:
        UserError: there is no such folder, it cannot be read, or there is no image in it.
    """
    if not folder.is_dir():
        raise UserError(
            f"The folder of images {folder} is missing: put it there, or set data.folder, which lies under DXMI_DATA "
            "if it is no absolute path."
        )
    search = _Search(folder)
    classes = search.classes() if class_folders else []
    if class_folders and not classes:
        raise UserError(
            f"{folder} holds no folders of classes: put each class into one, or data.class_folders=false."
            f"{search.explanation()}"
        )
    found = [sorted(search.images(name)) for name in classes or [""]]
    files = [name for names in found for name in names]
    if not files:
        kinds = ", ".join(sorted(SUFFIXES))
        where = " in folders of classes" if class_folders else ""
        raise UserError(f"{folder} holds no images{where} ({kinds}).{search.explanation()}")
    labels = torch.tensor([label for label, names in enumerate(found) for _ in names])
    empty = [f"{printable(classes[label])} ({label})" for label, names in enumerate(found) if not names]
    notes = [*search.tally.sentences(), *([_empty_classes(empty)] if empty else [])]
    return Listing(folder, tuple(files), labels, tuple(classes), tuple(notes))


def _empty_classes(names: Sequence[str]) -> str:
    shown = ", ".join(names[:_SHOWN_CLASSES]) + ", ..." * (len(names) > _SHOWN_CLASSES)
    return f"classes without images, which keep their numbers: {len(names):,} ({shown})"


class Tally:
    """How many files there were of each kind, and the first of each."""

    def __init__(self) -> None:
        self.found: dict[str, tuple[int, str]] = {}

    def add(self, kind: str, name: str) -> None:
        """One more."""
        count, first = self.found.get(kind, (0, printable(name)))
        self.found[kind] = count + 1, first

    def sentences(self) -> list[str]:
        """One for each kind, in the order of their names."""
        return [f"{kind}: {count:,} (first: {first})" for kind, (count, first) in sorted(self.found.items())]


class _Search:
    """Looks for images below a folder. Links are followed, but not back to a folder on the way to them.

    Args:
        root: the folder.

    Attributes:
        tally: what was found and not taken, and the links that were followed.
    """

    def __init__(self, root: Path) -> None:
        self.root = root
        self.tally = Tally()

    def explanation(self) -> str:
        """What was left out, to be added to a sentence."""
        sentences = self.tally.sentences()
        return f" {'; '.join(sentences)}.".replace(" left", " Left", 1) if sentences else ""

    def classes(self) -> list[str]:
        """The names of the folders in the root that are classes, in order."""
        names = []
        for entry in self._entries(self.root):
            if _is_folder(entry) and self._is_above(entry):
                self._leave(_BACK, entry.path)
            elif _is_folder(entry):
                if entry.is_symlink():
                    self.tally.add(_FOLLOWED, entry.name)
                names.append(entry.name)
            elif _is_image(entry):
                self._leave("an image in no folder of a class", entry.path)
            else:
                self._leave(_OTHER, entry.path)
        return sorted(names)

    def _is_above(self, entry: os.DirEntry[str]) -> bool:
        """Whether a folder in the root is a link to the root, or to a folder that holds it."""
        real = Path(os.path.realpath(entry.path))
        return Path(os.path.realpath(self.root)).is_relative_to(real)

    def images(self, name: str) -> Iterator[str]:
        """Paths in the root of the images below its folder `name`."""
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
                self._leave("a file that may not be read", entry.path)
            else:
                yield os.path.relpath(entry.path, self.root)

    def _entries(self, folder: Path) -> list[os.DirEntry[str]]:
        """What is in a folder but for what is hidden, of the system, or a link to nothing; in order."""
        try:
            with os.scandir(folder) as found:
                entries = sorted(found, key=lambda entry: entry.name)
        except OSError:
            self._leave("a folder that may not be read", str(folder))
            return []
        kept = []
        for entry in entries:
            if entry.name.startswith(".") or entry.name.lower() in _SYSTEM:
                self._leave("hidden or of the system", entry.path)
            elif entry.is_symlink() and not os.path.exists(entry.path):
                self._leave("a link to nothing", entry.path)
            else:
                kept.append(entry)
        return kept

    def _leave(self, why: str, path: str) -> None:
        self.tally.add(f"left out, {why}", os.path.relpath(path, self.root))


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a link that may not be followed
        return False


def _is_image(entry: os.DirEntry[str]) -> bool:
    """By its name, and a file: nobody reads a pipe to its end."""
    try:
        return os.path.splitext(entry.name)[1].lower() in SUFFIXES and entry.is_file()
    except OSError:
        return False


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
    try:
        path = cache / f"{listing.fingerprint(size)}.u8"
    except OSError as error:
        raise UserError(f"{error.filename} has gone from {folder} meanwhile: start again.") from error
    try:
        cache.mkdir(parents=True, exist_ok=True)
        with FileLock(path.with_suffix(".lock")):
            manifest = _read_manifest(path) or _make(listing, size, path)
    except OSError as error:
        raise UserError(f"The map of {folder} cannot be written to {cache} ({error.strerror or error}).") from error
    signature: str = manifest["signature"]
    if listing.classes:
        signature = labelled_signature(signature, listing.labels, listing.classes)
    notes = (*listing.notes, *manifest["notes"])
    return MappedImages(_mapped(path, manifest["shape"]), listing.labels, listing.classes, signature, notes)


def _mapped(path: Path, shape: Sequence[int]) -> Tensor:
    """The whole file as a tensor, of which nothing is read yet; writing to it would change memory alone."""
    return torch.from_file(str(path), shared=False, size=int(np.prod(shape)), dtype=torch.uint8).view(*shape)


def _manifest_path(path: Path) -> Path:
    return path.with_suffix(".json")


def _read_manifest(path: Path) -> dict[str, Any] | None:
    """The manifest of a whole map; None if there is none, or the map has another size than it says."""
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
    """All images, in order; returns the signature of their pixels, and counts what was done to them."""
    digest = shape_hash((len(listing.files), 3, size, size))
    threads = min(available_cpus(), 32)  # decoding and resizing let go of the interpreter's lock
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
    """An image's central square at S = `size`, upright opaque RGB as `dxmi.data.pixels` says: [3, S, S].

    Raises:
        UserError: it cannot be read, or the range of its numbers is unknown.
    """
    return _read(path, size)[0]


def _read(path: Path, size: int) -> tuple[NDArray[np.uint8], frozenset[str]]:
    """The square, and what had to be done to the image."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # of odd metadata
            with Image.open(path) as image:
                rgb, done = to_rgb(image)
                square = central_square(rgb, size)
    except Exception as error:  # a damaged file makes Pillow raise this and that
        why = str(error) or type(error).__name__
        raise UserError(
            f"The image {printable(path)} cannot be read ({why}): fetch it again or take it away."
        ) from error
    return np.asarray(square).transpose(2, 0, 1), done


def central_square(image: Image.Image, size: int) -> Image.Image:
    """The central S x S square after resizing, see the module's docstring."""
    while min(image.size) >= 2 * size:
        image = image.resize((image.width // 2, image.height // 2), Image.Resampling.BOX)
    scale = size / min(image.size)
    image = image.resize((round(image.width * scale), round(image.height * scale)), Image.Resampling.BICUBIC)
    left, top = (image.width - size) // 2, (image.height - size) // 2
    return image.crop((left, top, left + size, top + size))
