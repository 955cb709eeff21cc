"""Files that are either there whole or not there: written under a temporary name, synced, renamed."""

import json
import os
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dxmi.errors import UserError

PLACE: Mapping[str, bool] = {"is_place": True}
"""Metadata of a config's field that holds a path or an address: what a user writes there is taken as it is written."""
_SPACE = 0x20


def user_path(text: str, what: str) -> Path:
    """A path that a user wrote, with ~ expanded.

    Raises:
        UserError: it is empty, holds control characters, is not UTF-8, or names an unknown user.
    """
    user_text(text, what)
    try:
        return Path(text).expanduser()
    except RuntimeError as error:
        own = text == "~" or text.startswith("~/")
        why = "your home folder is unknown: set HOME" if own else "there is no such home folder"
        raise UserError(f"{what} is {text}: {why}.") from error


def require_target(path: Path, what: str) -> Path:
    """The path itself, unless a symbolic link in it leads nowhere.

    Args:
        path: what a user named; it need not exist.
        what: the setting, option or variable that names it.

    Raises:
        UserError: the path or a folder above it is a link whose target does not exist.
    """
    for place in (*reversed(path.parents), path):
        if os.path.islink(place) and not os.path.exists(place):
            raise UserError(
                f"{what} is {path}, but {place} is a link to {os.readlink(place)}, which does not exist: restore what "
                "it leads to, or change the link."
            )
    return path


def variable_folder(variable: str, usual: str) -> Path:
    """The folder that an environment variable names, else the usual one.

    Raises:
        UserError: the variable names none, the usual one is in a home folder that is unknown, or a link leads nowhere.
    """
    given = os.environ.get(variable)
    if given:
        return require_target(user_path(given, variable), variable)
    try:
        return require_target(Path(usual).expanduser(), f"{variable} is not set: the folder")
    except RuntimeError as error:
        raise UserError(f"Your home folder, for {usual}, is unknown: set HOME, or {variable} to a folder.") from error


def user_text(text: str, what: str) -> None:
    """Refuse what can be no path or address.

    Raises:
        UserError: it is empty, holds control characters, or is not UTF-8.
    """
    if not text.strip() or any(ord(character) < _SPACE for character in text):
        raise UserError(f"{what} is {text!r}: it must be the path of a folder.")
    try:
        text.encode()
    except UnicodeEncodeError as error:  # bytes of a command line that no encoding explains
        raise UserError(f"{what} is {text!r}: it must be UTF-8 text; rename the file or folder.") from error


def sync_folder(folder: Path) -> None:
    """Make renames inside `folder` survive a power cut."""
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


@contextmanager
def naming(path: Path) -> Iterator[None]:
    """Let an error of the file system name this path, where it would name none or a temporary one."""
    try:
        yield
    except OSError as error:
        raise OSError(error.errno, error.strerror or str(error), str(path)) from error


def write_synced(path: Path, data: bytes) -> None:
    """Write and fsync; not atomic by itself."""
    with path.open("wb") as file:
        file.write(data)
        file.flush()
        os.fsync(file.fileno())


def write_atomic(path: Path, data: bytes | str) -> None:
    """Replace `path` by `data`: a reader or a crash sees the old content or the new, nothing between."""
    part = path.with_name(f".{path.name}.{os.getpid()}.part")
    with naming(path):
        try:
            write_synced(part, data.encode() if isinstance(data, str) else data)
            part.replace(path)
        finally:
            part.unlink(missing_ok=True)
        sync_folder(path.parent)


def write_json(path: Path, tree: Any) -> None:
    """`write_atomic` of indented JSON; NaN and infinity are refused, since JSON has none."""
    write_atomic(path, json.dumps(tree, indent=2, allow_nan=False) + "\n")
