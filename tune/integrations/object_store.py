"""Copies of folders on a shared file system or in an object store, through pyarrow, for exchange between nodes.

A copy never claims to be more complete than the folder: files are uploaded atomically, a checkpoint's manifest after
its other files, `summary.json` last, and files that were deleted in the folder are deleted in the copy afterwards.
"""

import hashlib
import os
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from shutil import rmtree
from typing import Any, TypeVar
from urllib.parse import parse_qsl, urlsplit, urlunsplit

from pyarrow import ArrowInvalid, fs

from dxmi.errors import UserError
from dxmi.persistence.files import write_atomic

_OBJECT_STORES = ("s3", "gcs", "abfs")
"""File systems where a file appears atomically when its stream is closed, and folders need not be created."""
_LAST = ("manifest.json", "summary.json")
_FETCHED = ".fetched_from"
_TRIES, _WAIT = 4, 1.0
_SECRETS = ("key", "secret", "token", "password", "signature", "sig")
T = TypeVar("T")
Chosen = Callable[[str], bool]
"""Predicate that decides whether to copy a file, given its path inside the folder."""


def whole(name: str) -> bool:
    """Select all files except locks, partially written files and Ray's files."""
    return not any(part.startswith(".") or part.endswith(".part") for part in PurePosixPath(name).parts)


def light(name: str) -> bool:
    """Select the files of `whole` except checkpoints."""
    return whole(name) and "checkpoints" not in PurePosixPath(name).parts


def join(place: str, *names: str) -> str:
    """Append path components to an address."""
    if place.startswith("/"):
        return "/".join((place.rstrip("/"), *names))
    parts = urlsplit(place)
    return urlunsplit(parts._replace(path="/".join((parts.path.rstrip("/"), *names))))


class Remote:
    """A folder that every node can reach.

    Args:
        address: Absolute path, or URI of a scheme that pyarrow supports: file, s3, gs, abfs, hdfs.

    Raises:
        UserError: the address is neither, or contains credentials.
    """

    def __init__(self, address: str) -> None:
        self._address = address
        self._files, self._path = _opened(address)
        self._there: set[str] | None = None
        self._same: dict[str, tuple[int, int]] = {}
        self._seen: dict[str, tuple[int, int]] = {}

    def push(self, folder: Path, chosen: Chosen = whole) -> None:
        """Make the copy equal to a local folder, in which files may only be replaced atomically meanwhile.

        Raises:
            OSError: the file system failed repeatedly.
        """
        here = {name: stamp for name, stamp in _stamps(folder).items() if chosen(name)}
        if self._there is None:
            self._there = {name for name in self._listing() if chosen(name)}
        for name in sorted((name for name in here if self._same.get(name) != here[name]), key=_order):
            data = _content(folder / name)
            if data is None:  # deleted just now: the next push handles it
                continue
            self.write(name, data)
            self._same[name] = here[name]
            self._there.add(name)
        for name in self._there - set(here):
            self.delete(name)
        self._there &= set(here)

    def pull(self, folder: Path, chosen: Chosen = whole) -> None:
        """Make a local folder equal to the copy.

        Raises:
            OSError: the file system failed repeatedly.
        """
        there = {name: stamp for name, stamp in self._listing().items() if chosen(name)}
        for name, stamp in there.items():
            path = folder / name
            if self._seen.get(name) == stamp and path.exists():
                continue
            data = self.read(name)
            if data is None:
                continue
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(path, data)
            self._seen[name] = stamp
        here = _stamps(folder)
        for name in set(here) - set(there):
            if chosen(name):
                _remove(folder / name)
        self._same.update({name: here[name] for name in there if name in here})

    def read(self, name: str) -> bytes | None:
        """A file's content, or None if the file does not exist."""
        if not self.has(name):
            return None
        return _persistently(lambda: self._content(f"{self._path}/{name}"))

    def write(self, name: str, data: bytes) -> None:
        """Replace a file atomically."""
        path = f"{self._path}/{name}"
        _persistently(lambda: self._replace(path, data))

    def delete(self, name: str) -> None:
        """Delete a file if it exists."""
        if not self.has(name):
            return
        path = f"{self._path}/{name}"
        _persistently(lambda: self._files.delete_file(path))
        folder = path.rpartition("/")[0]
        if self._files.type_name not in _OBJECT_STORES and not self._files.get_file_info(fs.FileSelector(folder)):
            self._files.delete_dir(folder)

    def clear(self) -> None:
        """Delete everything in the folder."""
        _persistently(lambda: self._files.delete_dir_contents(self._path, missing_dir_ok=True))

    def remove(self) -> None:
        """Delete the folder with everything in it, ignoring errors."""
        with suppress(OSError):
            self._files.delete_dir(self._path)

    def has(self, name: str) -> bool:
        """Whether a file exists."""
        path = f"{self._path}/{name}"
        return bool(_persistently(lambda: self._files.get_file_info(path)).is_file)

    def require_reachable(self) -> None:
        """Check that the file system can be reached.

        Raises:
            UserError: it cannot.
        """
        try:
            _persistently(lambda: self._files.get_file_info(self._path))
        except OSError as error:
            raise UserError(f"resources.storage_path={self._address} cannot be reached ({error}).") from error

    @property
    def for_ray(self) -> tuple[Any, str]:
        """The file system and the path in it, in the form that Ray expects."""
        return self._files, self._path

    def _content(self, path: str) -> bytes:
        with self._files.open_input_stream(path) as stream:
            return bytes(stream.read())

    def _replace(self, path: str, data: bytes) -> None:
        if self._files.type_name in _OBJECT_STORES:
            with self._files.open_output_stream(path) as stream:
                stream.write(data)
            return
        self._files.create_dir(path.rpartition("/")[0], recursive=True)
        part = f"{path}.{os.getpid()}.part"
        with self._files.open_output_stream(part) as stream:
            stream.write(data)
        self._files.move(part, path)

    def _listing(self) -> dict[str, tuple[int, int]]:
        """Size and modification time of each file in the copy, by its path inside the folder."""
        selector = fs.FileSelector(self._path, allow_not_found=True, recursive=True)
        files = [info for info in _persistently(lambda: self._files.get_file_info(selector)) if info.is_file]
        below = {info.path.removeprefix(self._path).lstrip("/"): (info.size, info.mtime_ns or 0) for info in files}
        return {name: stamp for name, stamp in below.items() if ".." not in PurePosixPath(name).parts}


def _opened(address: str) -> tuple[Any, str]:
    if address.startswith("/"):
        return fs.LocalFileSystem(), address.rstrip("/")
    parts = urlsplit(address)
    if parts.password or any(word in key.lower() for key, _ in parse_qsl(parts.query) for word in _SECRETS):
        raise UserError(
            "resources.storage_path holds credentials: leave them out, and set them in the environment of the "
            "cluster's nodes (for s3 AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY)."
        )
    try:
        files, path = fs.FileSystem.from_uri(address)
    except (ArrowInvalid, OSError, NotImplementedError) as error:
        reason = str(error).partition("\n")[0]
        raise UserError(
            f"resources.storage_path is {address}: it must be an absolute path or a URI like s3://bucket/studies, "
            f"and reachable ({reason})."
        ) from error
    return files, path.rstrip("/")


def _persistently(action: Callable[[], T]) -> T:
    """Call `action`, with a few retries after an OSError."""
    for attempt in range(_TRIES - 1):
        try:
            return action()
        except OSError:
            time.sleep(_WAIT * 2.0**attempt)
    return action()


def _stamps(folder: Path) -> dict[str, tuple[int, int]]:
    """Size and modification time of each regular file in a local folder, by its path inside."""
    stamps = {}
    for path in folder.rglob("*"):
        if path.is_file() and not path.is_symlink():
            stat = path.stat()
            stamps[path.relative_to(folder).as_posix()] = (stat.st_size, stat.st_mtime_ns)
    return stamps


def _content(path: Path) -> bytes | None:
    try:
        return path.read_bytes()
    except FileNotFoundError:
        return None


def _order(name: str) -> tuple[int, str]:
    """Sort key of the upload order: checkpoints after other files, and files that mark completeness last."""
    path = PurePosixPath(name)
    return (_LAST.index(path.name) + 2 if path.name in _LAST else int(path.parts[0] == "checkpoints"), name)


def _remove(path: Path) -> None:
    """Delete a file, and its folder if that becomes empty."""
    path.unlink(missing_ok=True)
    with suppress(OSError):
        path.parent.rmdir()


def fetch(address: str, into: Path, chosen: Chosen = whole) -> Path:
    """Copy a study or a run to this machine, or update an earlier copy, and return its folder.

    Raises:
        UserError: the address holds neither, or the target folder exists and is not a copy of it.
    """
    remote = Remote(address)
    remote.require_reachable()
    if not any(remote.has(name) for name in ("study.yaml", "config.yaml")):
        raise UserError(f"{address} holds neither a study nor a run: give the folder that has its study.yaml.")
    folder = into / PurePosixPath(urlsplit(address).path).name
    note = folder / _FETCHED
    if folder.exists() and not (note.is_file() and note.read_text() == address):
        raise UserError(f"{folder} exists and was not fetched from {address}: choose another folder with --into.")
    folder.mkdir(parents=True, exist_ok=True)
    write_atomic(note, address)
    remote.pull(folder, chosen)
    return folder


# ----------------------------------------------------------------------------
# Runs that are written on one node and kept in shared storage


def node_folder(address: str) -> Path:
    """This node's private folder for a run that is kept at an address; other users cannot access it.

    Raises:
        UserError: the folder belongs to another user.
    """
    root = Path(tempfile.gettempdir()) / f"dxmi-{os.getuid()}"
    root.mkdir(mode=0o700, exist_ok=True)
    if root.is_symlink() or root.stat().st_uid != os.getuid():
        raise UserError(f"{root} belongs to another user: set TMPDIR to a folder of your own on every node.")
    root.chmod(0o700)
    return root / hashlib.sha256(address.encode()).hexdigest()[:16]


@contextmanager
def kept(address: str | None, out: Path) -> Iterator[tuple[Path, Callable[[], None]]]:
    """Provide a local folder for writing a run, and a function that copies it to shared storage.

    Args:
        address: Where the run is kept; None if all nodes can reach `out`.
        out: The run's folder.

    Yields:
        `out` and a function without effect if `address` is None. Otherwise this node's folder, with the content of the
        copy, and a function to call after each checkpoint that updates the copy.
    """
    if address is None:
        yield out, lambda: None
        return
    remote, here = Remote(address), node_folder(address)
    here.mkdir(parents=True, exist_ok=True)
    remote.pull(here)
    try:
        yield here, lambda: remote.push(here)
    finally:
        try:
            remote.push(here)
        finally:
            rmtree(here, ignore_errors=True)


def copied(address: str | None, out: Path) -> Callable[[], None]:
    """Return a function that copies a run that this process writes.

    Args:
        address: Where the copy is kept; None for no copy.
        out: The run's folder; if it does not exist, it is created from the copy.
    """
    if address is None:
        return lambda: None
    remote = Remote(address)
    if not out.exists():
        out.mkdir(parents=True)
        remote.pull(out)
    return lambda: remote.push(out)
