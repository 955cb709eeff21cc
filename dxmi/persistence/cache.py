"""Results that are computed once and read ever after, by file name; safe against a second process and a killed one.

The name has to hold the signature of everything that the result depends on. Whoever finds no result takes the lock and
computes it; the others wait for the lock and then read. A killed writer's lock is freed by the system, and what it had
half written is never at the final name.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from dxmi.distributed import ALONE, Workers
from dxmi.errors import UserError
from dxmi.persistence.files import variable_folder, write_atomic
from dxmi.tensors import pack, unpack

_DIGEST_BYTES = 32
_POLL_SECONDS = 5.0
_ALONE_POLL_SECONDS = 0.5


def cache_root() -> Path:
    """Where results are kept: $DXMI_CACHE, else ~/.cache/dxmi/cache."""
    return variable_folder("DXMI_CACHE", "~/.cache/dxmi/cache")


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


@dataclass
class Entry:
    """A result in the cache, or the right to compute it.

    Attributes:
        path: its file.
        workers: of this process's group.
        tensors: the result; None if it is to be computed by whoever holds this entry.
    """

    path: Path
    workers: Workers
    tensors: dict[str, Tensor] | None

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Keep what all workers of the group have computed.

        From here on `tensors` is the first one's, and to the bit and the stride what a later process will read.
        """
        kept: dict[str, Tensor] = {}
        self.workers.on_first(lambda: kept.update(_write(self.path, tensors)))
        self.tensors = self.workers.agree(kept)


@contextmanager
def entry(path: Path, workers: Workers = ALONE, on_wait: Callable[[], None] | None = None) -> Iterator[Entry]:
    """The entry of `path`; while it lasts nobody else computes it.

    Workers of a group hold it together, and its first one reads and writes the file. While another process computes
    it, the others are told so every few seconds, so that none takes the first for hung.

    Args:
        path: its file.
        workers: of this process's group.
        on_wait: called by all of them every now and then while another process computes it; may raise to give up.
    """
    on_wait = on_wait or (lambda: None)
    with ExitStack() as held:
        if workers.size == 1:
            yield Entry(path, workers, _found_or_mine(path, held, on_wait))
            return
        tensors: dict[str, Tensor] = {}
        while (claim := workers.on_first(lambda: _claim(path, held, tensors))) == "busy":
            on_wait()
        yield Entry(path, workers, None if claim == "mine" else workers.agree(tensors))


def cached(
    path: Path,
    compute: Callable[[], dict[str, Tensor]],
    workers: Workers = ALONE,
    on_wait: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """The tensors in `path`, computed and written first if they are not there or damaged; `on_wait` as for `entry`."""
    with entry(path, workers, on_wait) as held:
        if held.tensors is None:
            held.write(compute())
        assert held.tensors is not None
        return held.tensors


def _found_or_mine(path: Path, held: ExitStack, on_wait: Callable[[], None]) -> dict[str, Tensor] | None:
    """The result; without one, None and the lock."""
    found = _read(path)
    if found is None:
        lock = lock_for(path)
        while not _acquired(lock, held, _ALONE_POLL_SECONDS):
            on_wait()
        found = _read(path)  # another process may have been first
    return found


def _acquired(lock: FileLock, held: ExitStack, seconds: float) -> bool:
    """Whether the lock could be had within that time; `held` then lets go of it."""
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    held.callback(lock.release)
    return True


def _claim(path: Path, held: ExitStack, tensors: dict[str, Tensor]) -> str:
    """Whether the result is found (and then put into `tensors`), or mine to compute, or another process is busy."""
    tensors.update(_read(path) or {})  # first without the lock, which a cache that may only be read cannot give
    if tensors:
        return "found"
    if not _acquired(lock_for(path), held, _POLL_SECONDS):
        return "busy"
    found = _read(path)
    tensors.update(found or {})
    return "mine" if found is None else "found"


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write the sha256 of what follows, then safetensors; returns what `_read` will."""
    data = pack(tensors)
    write_atomic(path, hashlib.sha256(data).digest() + data)
    return unpack(data)


def _read(path: Path) -> dict[str, Tensor] | None:
    try:
        content = path.read_bytes()
    except (FileNotFoundError, NotADirectoryError):
        return None
    digest, data = content[:_DIGEST_BYTES], content[_DIGEST_BYTES:]
    return unpack(data) if hashlib.sha256(data).digest() == digest else None
