"""Results that are computed once and read ever after, by file name; safe against a second process and a killed one.

The name has to hold the signature of everything that the result depends on. Whoever finds no result takes the lock and
computes it; the others wait for the lock and then read. A killed writer's lock is freed by the system, and what it had
half written is never at the final name.
"""

import os
from collections.abc import Callable
from pathlib import Path

from filelock import FileLock
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from dxmi.errors import UserError
from dxmi.files import write_atomic


def cache_root() -> Path:
    """Where results are kept: $DXMI_CACHE, else ~/.cache/dxmi/cache."""
    return Path(os.environ.get("DXMI_CACHE") or Path.home() / ".cache" / "dxmi" / "cache").expanduser()


def lock_for(path: Path) -> FileLock:
    """The lock of the one who computes `path`; its folder is made.

    Raises:
        UserError: the folder cannot be made or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / f".{path.name}.lock").touch()
    except OSError as error:
        raise UserError(
            f"The cache folder {path.parent} cannot be written ({error.strerror}): set DXMI_CACHE to one that can."
        ) from error
    return FileLock(path.parent / f".{path.name}.lock")


def cached(path: Path, compute: Callable[[], dict[str, Tensor]]) -> dict[str, Tensor]:
    """The tensors in `path`, computed and written first if they are not there or damaged."""
    found = _read(path)
    if found is not None:
        return found
    with lock_for(path):
        found = _read(path)  # another process may have been first
        if found is None:
            found = compute()
            write_atomic(
                path, save_safetensors({key: value.detach().cpu().contiguous() for key, value in found.items()})
            )
    return found


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        return load_safetensors(path.read_bytes())
    except (FileNotFoundError, NotADirectoryError, SafetensorError):
        return None
