"""`dxmi doctor`: check whether this machine is ready for a sweep, and advise on what is not."""

import argparse
import os
import platform
import shutil
import socket
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing
from dataclasses import dataclass
from enum import StrEnum
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch
from rich.text import Text

from dxmi.data.images import data_root
from dxmi.errors import UserError
from dxmi.persistence.cache import cache_root
from dxmi.training.config import ResourcesConfig
from tune.cli.exit_codes import FAILED, OK
from tune.cli.ui import DEFAULT_PORT, HOST, is_free
from tune.execution.jobs import UPLOAD_MEGABYTES, survey
from tune.execution.resources import find_slots
from tune.machine import ray_folder
from tune.reporting.terminal import Terminal
from tune.reporting.text_tables import TextTable
from tune.studies.folder import studies_in

_PACKAGES = ("torch", "torchvision", "ray", "optuna", "mlflow", "hydra-core", "torch-fidelity", "numpy", "scikit-learn")
_OLDEST = {"ray": (2, 54), "mlflow": (3, 11), "torch": (2, 10), "hydra-core": (1, 3, 6)}
"""Minimum versions; earlier ones have known vulnerabilities."""
_GB = 1e9
_MIN_MEMORY, _MIN_SHARED_MEMORY, _MIN_DISK = 4 * _GB, 0.2 * _GB, 5 * _GB


_OTHER_FOLDER = {
    "disk for studies": "choose another folder with --studies.",
    "disk for Ray": "set RAY_TMPDIR to another folder.",
}


class Status(StrEnum):
    """Result of a check."""

    GOOD = "ok"
    WARNING = "look"
    BAD = "bad"


@dataclass(frozen=True)
class Check:
    """One completed check.

    Attributes:
        subject: what was checked.
        status: its result.
        text: what was found.
        advice: what to do about it; empty if nothing.
    """

    subject: str
    status: Status
    text: str
    advice: str = ""


def run_checks(studies: Path) -> list[Check]:
    """Run every check. Starts no process and writes no file.

    Args:
        studies: the folder that holds the studies.
    """
    functions: list[Callable[[Path], Iterator[Check]]] = [
        _versions, _devices, _memory, _disk, _caches, _store, _running, _addresses, _upload,
    ]  # fmt: skip
    return [check for function in functions for check in function(studies)]


def _versions(_: Path) -> Iterator[Check]:
    found, old, missing = [f"Python {platform.python_version()}"], [], []
    for package in _PACKAGES:
        try:
            installed = version(package)
        except PackageNotFoundError:
            missing.append(package)
            continue
        found.append(f"{package} {installed}")
        if _numbers(installed) < _OLDEST.get(package, ()):
            old.append(f"{package} {installed}")
    advice = ""
    if missing or old:
        advice = f"missing or too old: {', '.join([*missing, *old])}. Run make setup."
    yield Check("versions", Status.BAD if advice else Status.GOOD, ", ".join(found), advice)


def _numbers(text: str) -> tuple[int, ...]:
    parts = text.partition("+")[0].split(".")
    return tuple(int(part) for part in parts if part.isdigit())


def _devices(_: Path) -> Iterator[Check]:
    try:
        slots = find_slots(ResourcesConfig(), None)
    except UserError as error:
        yield Check("devices", Status.BAD, str(error))
        return
    names = [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
    text = f"{', '.join(names) or 'no GPU'}; trials: {slots}"
    unused = "this build of PyTorch lacks CUDA support: the GPU cannot be used." if torch.version.cuda is None else ""
    yield Check("devices", Status.GOOD, text, unused if Path("/dev/nvidia0").exists() else "")


def _memory(_: Path) -> Iterator[Check]:
    memory = _meminfo()
    if memory:
        low = memory["MemAvailable"] < _MIN_MEMORY
        advice = "Ray and its workers need 4 GB: close other programs, or set sweep.max_concurrent=1." if low else ""
        text = f"{memory['MemAvailable'] / _GB:.1f} of {memory['MemTotal'] / _GB:.1f} GB available"
        yield Check("memory", Status.WARNING if low else Status.GOOD, text, advice)
    shared = Path("/dev/shm")  # noqa: S108  (location of Ray's object store)
    if shared.is_dir():
        free = shutil.disk_usage(shared).free
        low = free < _MIN_SHARED_MEMORY
        advice = "Ray's object store needs 0.2 GB: start a container with --shm-size=1g." if low else ""
        yield Check("shared memory", Status.BAD if low else Status.GOOD, f"{free / _GB:.1f} GB free", advice)


def _meminfo() -> dict[str, float]:
    """Read /proc/meminfo: bytes by name, or an empty dict where the file does not exist."""
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return {}
    return {line.split(":")[0]: float(line.split()[1]) * 1024.0 for line in lines}


def _disk(studies: Path) -> Iterator[Check]:
    try:
        folders = [("disk for studies", studies), ("disk for Ray", ray_folder())]
    except UserError as error:
        folders = [("disk for studies", studies)]
        yield Check("disk for Ray", Status.BAD, "no usable folder for its sockets", str(error))
    for subject, folder in folders:
        place = _existing(folder)
        free = shutil.disk_usage(place).free
        text = f"{free / _GB:.1f} GB free at {folder}"
        if not os.access(place, os.W_OK):
            yield Check(subject, Status.BAD, f"{place} cannot be written to", _OTHER_FOLDER[subject])
        elif free < _MIN_DISK:
            yield Check(subject, Status.WARNING, text, "a study of 40 trials on digits takes about 2 GB.")
        else:
            yield Check(subject, Status.GOOD, text)


def _existing(folder: Path) -> Path:
    """Return the folder, or its nearest parent that exists."""
    folder = folder.resolve()
    while not folder.exists():
        folder = folder.parent
    return folder


def _caches(_: Path) -> Iterator[Check]:
    cache = cache_root()
    kept = sum(1 for _ in cache.rglob("*.cached")) if cache.is_dir() else 0
    yield Check("cache", Status.GOOD, f"{kept} results, {_size(cache) / _GB:.2f} GB in {cache} (DXMI_CACHE)")
    folders = data_root().iterdir() if data_root().is_dir() else iter(())
    sets = sorted(path.name for path in folders if path.is_dir() and path.name != "cache")
    text = f"{', '.join(sets) or 'no files'} in {data_root()} (DXMI_DATA); digits needs no files"
    yield Check("data", Status.GOOD, text)


def _store(studies: Path) -> Iterator[Check]:
    database = studies / "mlflow.db"
    if not database.exists():
        yield Check("tracking store", Status.GOOD, f"none yet; the first sweep creates {database}")
        return
    try:
        runs = _runs_in(database)
    except sqlite3.Error as error:
        advice = "if a sweep is writing to it, try again; otherwise move the file away: the next resume recreates it."
        yield Check("tracking store", Status.BAD, f"{database}: {error}", advice)
        return
    yield Check("tracking store", Status.GOOD, f"{database}: {runs} runs; dxmi ui shows them")


def _runs_in(database: Path) -> int:
    """Count the runs in a tracking store; raises an SQLite error if the store is corrupt."""
    with closing(sqlite3.connect(f"{database.resolve().as_uri()}?mode=ro", uri=True, timeout=2.0)) as connection:
        complaint = connection.execute("PRAGMA quick_check(1)").fetchone()[0]
        if complaint != "ok":
            raise sqlite3.DatabaseError(complaint)
        return int(connection.execute("SELECT count(*) FROM runs").fetchone()[0])


def _running(studies: Path) -> Iterator[Check]:
    names = [folder.path.name for folder in studies_in(studies)]
    if names:
        yield Check("studies", Status.GOOD, f"{len(names)} in {studies}; dxmi studies lists them")


def _addresses(_: Path) -> Iterator[Check]:
    taken = not is_free(DEFAULT_PORT)
    advice = "dxmi ui will use the next free port." if taken else ""
    text = f"{HOST}:{DEFAULT_PORT} is {'taken' if taken else 'free'}"
    yield Check("MLflow UI", Status.WARNING if taken else Status.GOOD, text, advice)
    cluster = os.environ.get("RAY_ADDRESS")
    if cluster:
        yield Check(
            "Ray",
            Status.WARNING,
            f"RAY_ADDRESS is {cluster}",
            "sweeps and multi-worker runs use that cluster; unset it to use only this machine.",
        )
    try:
        socket.getaddrinfo(socket.gethostname(), None)
    except OSError:
        advice = f"add {socket.gethostname()} to /etc/hosts: Ray resolves its own host name."
        yield Check("host name", Status.WARNING, "does not resolve", advice)


def _upload(_: Path) -> Iterator[Check]:
    tree = survey(Path.cwd())
    text = f"{tree.bytes / 1e6:.1f} MB in {tree.folder} would be uploaded to a cluster"
    if tree.bytes <= UPLOAD_MEGABYTES * 1e6:
        yield Check("upload", Status.GOOD, text)
        return
    advice = f"dxmi submit uploads at most {UPLOAD_MEGABYTES} MB. Move away, or list in .gitignore: {tree.biggest}."
    yield Check("upload", Status.WARNING, text, advice)


def _size(path: Path) -> int:
    """Total bytes of a file or of a folder's contents; links are not followed."""
    if path.is_symlink():
        return 0
    if path.is_file():
        return path.stat().st_size
    try:
        return sum(_size(entry) for entry in path.iterdir())
    except OSError:
        return 0


_STYLES = {Status.GOOD: "green", Status.WARNING: "yellow", Status.BAD: "red"}


def doctor(args: argparse.Namespace) -> int:
    """Print whether this machine is ready; returns exit code 1 if any check is bad."""
    checks = run_checks(args.studies)
    table = TextTable("", "check", "found", "what to do")
    for check in checks:
        style = _STYLES[check.status]
        table.add_row(Text(check.status.value, style=style), check.subject, check.text, check.advice)
    Terminal().print(table)
    return FAILED if any(check.status is Status.BAD for check in checks) else OK
