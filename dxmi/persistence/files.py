"""Atomic file writes (temporary name, fsync, rename), and checks of paths that the user gives."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dxmi.errors import UserError

PLACE: Mapping[str, bool] = {"is_place": True}
"""Metadata of a config field that holds a path or an address, whose value is used literally."""
_SPACE = 0x20


def user_path(text: str, what: str) -> Path:
    """A path given by the user, with ~ expanded.

    Raises:
        UserError: it is empty, contains control characters, is not UTF-8, or names an unknown user.
    """
    user_text(text, what)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        own = text == "~" or text.startswith("~/")
        why = "your home folder is unknown: set HOME" if own else "there is no such home folder"
        raise UserError(f"{what} is {text}: {why}.") from error


def require_target(path: Path, what: str) -> Path:
    """Return the path after checking that it contains no dangling symbolic link.

    Args:
        path: a path given by the user, which need not exist.
        what: the setting, option or variable that gives it.

    Raises:
        UserError: the path or a folder above it is a link whose target does not exist.
    """
    for place in (*reversed(path.parents), path):
        if os.path.islink(place) and not os.path.exists(place):
            raise UserError(
                f"{what} is {path}, but {place} is a link to {os.readlink(place)}, which does not exist: restore its "
                "target, or change the link."
            )
    return path


def variable_folder(variable: str, usual: str) -> Path:
    """The folder that an environment variable names, or the default if it is not set.

    Raises:
        UserError: the value is not a path, the default is in an unknown home folder, or a link is dangling.
    """
    given = os.environ.get(variable)
    if given:
        return require_target(user_path(given, variable), variable)
    try:
        return require_target(Path(usual).expanduser(), f"{variable} is not set: the folder")
    except RuntimeError as error:
        raise UserError(f"Your home folder, for {usual}, is unknown: set HOME, or {variable} to a folder.") from error


def user_text(text: str, what: str) -> None:
    """Check that a string can be a path or an address.

    Raises:
        UserError: it is empty, contains control characters, or is not UTF-8.
    """
    if not text.strip() or any(ord(character) < _SPACE for character in text):
        raise UserError(f"{what} is {text!r}: it must be the path of a folder.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # undecodable bytes of a command line
        raise UserError(f"{what} is {text!r}: it must be UTF-8 text; rename the file or folder.") from error


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` durable against a power failure."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Make file system errors name this path instead of a temporary path or none."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_synced(path: Path, data: bytes) -> None:
    """Write a file and fsync it; the write is not atomic."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace the content of `path` atomically: readers, and a crash, see either the old or the new content."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path):
        try:
            write_synced(part, data.encode() if isinstance(data, str) else data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_json(path: Path, tree: Any) -> None:
    """Write indented JSON atomically; NaN and infinity raise a ValueError, since JSON cannot represent them."""
    write_atomic(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")
