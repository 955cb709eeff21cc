"""A file cache of results that is safe with concurrent and with killed processes.

The file name must contain the signature of everything that the result depends on. On a miss, the caller takes the lock
and computes the result; other processes wait for the lock and then read it. The operating system releases the lock of
a killed process, and a partially written result never has the final name.
"""

import hashlib
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

from filelock import FileLock, Timeout
from torch import Tensor

from dxmi.distributed import SINGLE_PROCESS, ProcessGroup
from dxmi.errors import UserError
from dxmi.persistence.files import variable_folder, write_atomic
from dxmi.tensors import pack, unpack

_DIGEST_BYTES = 32
_POLL_SECONDS = 5.0
_ALONE_POLL_SECONDS = 0.5


def cache_root() -> Path:
    """The cache folder: $DXMI_CACHE, or ~/.cache/dxmi/cache if it is not set."""
    return variable_folder("DXMI_CACHE", "~/.cache/dxmi/cache")


def lock_for(path: Path) -> FileLock:
    """The lock to hold while computing `path`; creates the folder.

    Raises:
        UserError: the folder cannot be created or written.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        (path.parent / f".{path.name}.lock").touch()
    except OSError as error:
        raise UserError(
            f"The cache folder {path.parent} cannot be written ({error.strerror}): set DXMI_CACHE to a writable one."
        ) from error
    return FileLock(path.parent / f".{path.name}.lock")


@dataclass
class Entry:
    """A result in the cache, or the right to compute it.

    Attributes:
        path: file of the result.
        workers: process group of the caller.
        tensors: the result; None if the holder of this entry must compute it.
    """

    path: Path
    workers: ProcessGroup
    tensors: dict[str, Tensor] | None

    def write(self, tensors: dict[str, Tensor]) -> None:
        """Store a result that all workers of the group have computed.

        Afterwards `tensors` is the result of rank 0, with the same bits and strides that later processes will read.
        """
        kept: dict[str, Tensor] = {}
        self.workers.on_rank_zero(lambda: kept.update(_write(self.path, tensors)))
        self.tensors = self.workers.broadcast(kept)


@contextmanager
def entry(
    path: Path, workers: ProcessGroup = SINGLE_PROCESS, on_wait: Callable[[], None] | None = None
) -> Iterator[Entry]:
    """The cache entry of `path`; no other process computes it until the context exits.

    The workers of a group hold the entry together, and rank 0 reads and writes the file. While another process computes
    the result, rank 0 reports this to the others every few seconds, so that their communication does not time out.

    Args:
        path: file of the result.
        workers: process group of the caller.
        on_wait: called regularly by all workers while another process computes the result; may raise to give up.
    """
    on_wait = on_wait or (lambda: None)
    with ExitStack() as held:
        if workers.size == 1:
            yield Entry(path, workers, _found_or_mine(path, held, on_wait))
            return
        tensors: dict[str, Tensor] = {}
        while (claim := workers.on_rank_zero(lambda: _claim(path, held, tensors))) == "busy":
            on_wait()
        yield Entry(path, workers, None if claim == "mine" else workers.broadcast(tensors))


def cached(
    path: Path,
    compute: Callable[[], dict[str, Tensor]],
    workers: ProcessGroup = SINGLE_PROCESS,
    on_wait: Callable[[], None] | None = None,
) -> dict[str, Tensor]:
    """Read the tensors in `path`, or compute and write them if the file is missing or damaged; see `entry`."""
    with entry(path, workers, on_wait) as held:
        if held.tensors is None:
            held.write(compute())
        assert held.tensors is not None
        return held.tensors


def _found_or_mine(path: Path, held: ExitStack, on_wait: Callable[[], None]) -> dict[str, Tensor] | None:
    """Read the result; if there is none, take the lock and return None."""
    found = _read(path)
    if found is None:
        lock = lock_for(path)
        while not _acquired(lock, held, _ALONE_POLL_SECONDS):
            on_wait()
        found = _read(path)  # another process may have written it meanwhile
    return found


def _acquired(lock: FileLock, held: ExitStack, seconds: float) -> bool:
    """Acquire the lock within `seconds`, to be released by `held`; returns whether that succeeded."""
    try:
        lock.acquire(timeout=seconds)
    except Timeout:
        return False
    held.callback(lock.release)
    return True


def _claim(path: Path, held: ExitStack, tensors: dict[str, Tensor]) -> str:
    """Read the result or take the lock.

    Returns:
        "found" (the result is in `tensors`), "mine" (this process must compute it), or "busy" (another process does).
    """
    tensors.update(_read(path) or {})  # first without the lock, which needs write access to the cache
    if tensors:
        return "found"
    if not _acquired(lock_for(path), held, _POLL_SECONDS):
        return "busy"
    found = _read(path)
    tensors.update(found or {})
    return "mine" if found is None else "found"


def _write(path: Path, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Write a sha256 followed by safetensors; returns the tensors as `_read` will."""
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
