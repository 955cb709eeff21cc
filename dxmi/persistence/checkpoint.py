"""Checkpoints: folders of safetensors and JSON with a manifest of sha256 sums, renamed into place when complete.

    step_00000150/
        algorithm.safetensors    networks, averages, reference variance
        state.safetensors        optimizers, random generators, data order
        meta.json                step, best score so far, elapsed seconds
        manifest.json            sha256 of the other files

Loading a checkpoint never executes code from it.
"""

import hashlib
import json
import os
import re
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors import SafetensorError
from torch import Tensor, nn

from dxmi.errors import UserError
from dxmi.persistence.files import naming, sync_folder, write_synced
from dxmi.tensors import pack, unpack

_NAME = re.compile(r"step_(\d{8})")

Groups = Mapping[str, Mapping[str, Tensor]]


class DamagedCheckpointError(UserError):
    """A checkpoint is truncated, altered or incomplete; the message names the file."""


class Meta(dict[str, Any]):
    """The plain values of a checkpoint; a missing key raises a `DamagedCheckpointError`."""

    def __init__(self, path: Path, values: Mapping[str, Any]) -> None:
        super().__init__(values)
        self._path = path

    def __missing__(self, key: str) -> Any:
        raise DamagedCheckpointError(f"Checkpoint {self._path} is damaged: meta.json lacks {key}.")


@dataclass(frozen=True)
class Checkpoint:
    """The content of a checkpoint.

    Attributes:
        path: folder of the checkpoint.
        step: the iteration after which it was saved.
        groups: for each tensor file, its tensors by name, on the host.
        meta: plain values.
    """

    path: Path
    step: int
    groups: dict[str, dict[str, Tensor]]
    meta: dict[str, Any]


def path_of(folder: Path, step: int) -> Path:
    """The path of the checkpoint of `step` in `folder`."""
    return folder / f"step_{step:08d}"


def save(folder: Path, step: int, groups: Groups, meta: Mapping[str, Any]) -> Path:
    """Write a checkpoint and return its folder; an existing checkpoint of the same step is replaced."""
    final, part = path_of(folder, step), folder / f".step_{step:08d}.{os.getpid()}.part"
    shutil.rmtree(part, ignore_errors=True)
    with naming(final):
        part.mkdir(parents=True)
        try:
            _write_files(part, step, groups, meta)
            if final.exists():
                shutil.rmtree(final)
            part.rename(final)
        finally:
            shutil.rmtree(part, ignore_errors=True)
        sync_folder(folder)
    return final


def _write_files(folder: Path, step: int, groups: Groups, meta: Mapping[str, Any]) -> None:
    files = {f"{name}.safetensors": pack(group) for name, group in groups.items()}
    files["meta.json"] = json.dumps({"step": step, **meta}, indent=2).encode()
    manifest = {name: hashlib.sha256(data).hexdigest() for name, data in files.items()}
    files["manifest.json"] = json.dumps(manifest, indent=2).encode()
    for name, data in files.items():
        write_synced(folder / name, data)
    sync_folder(folder)


def load(path: Path) -> Checkpoint:
    """Read a checkpoint and verify the checksum of every file.

    Raises:
        DamagedCheckpointError: a file is missing, altered, truncated, or a link.
    """
    manifest = _read_manifest(path)
    files = {name: _read_checked(path / name, digest) for name, digest in manifest.items()}
    meta = _meta(path, files.pop("meta.json"))
    groups = {name.removesuffix(".safetensors"): _tensors(path / name, data) for name, data in files.items()}
    return Checkpoint(path, meta["step"], groups, meta)


def restore(module: nn.Module, saved: Checkpoint, group: str) -> None:
    """Load a group of tensors into a module.

    Raises:
        DamagedCheckpointError: the checkpoint lacks the group, or its tensors do not fit the module.
    """
    try:
        module.load_state_dict(saved.groups[group])
    except KeyError as error:
        raise DamagedCheckpointError(f"Checkpoint {saved.path} is damaged: it lacks {group}.") from error
    except RuntimeError as error:
        last_line = str(error).strip().splitlines()[-1].strip()
        raise DamagedCheckpointError(f"Checkpoint {saved.path} does not fit its run's config: {last_line}") from error


def _meta(path: Path, data: bytes) -> Meta:
    try:
        meta = json.loads(data)
    except ValueError:
        meta = None
    if not isinstance(meta, dict) or not isinstance(meta.get("step"), int):
        raise DamagedCheckpointError(f"Checkpoint {path} is damaged: meta.json has no step.")
    best = meta.get("best")
    if best is not None and not (isinstance(best, dict) and isinstance(best.get("step"), int)):
        raise DamagedCheckpointError(f"Checkpoint {path} is damaged: best in meta.json has no step.")
    return Meta(path, meta)


def _tensors(path: Path, data: bytes) -> dict[str, Tensor]:
    try:
        return unpack(data)
    except SafetensorError as error:
        raise DamagedCheckpointError(f"Checkpoint {path.parent}: {path.name} is not safetensors ({error}).") from error


def _read_manifest(path: Path) -> dict[str, str]:
    damaged = DamagedCheckpointError(f"Checkpoint {path} is damaged: manifest.json is missing or unreadable.")
    try:
        manifest = json.loads(_read(path / "manifest.json"))
    except ValueError as error:
        raise damaged from error
    names = isinstance(manifest, dict) and all(isinstance(v, str) and Path(k).name == k for k, v in manifest.items())
    if not names or "meta.json" not in manifest:
        raise damaged
    return dict(manifest)


def _read_checked(path: Path, digest: str) -> bytes:
    data = _read(path)
    if hashlib.sha256(data).hexdigest() != digest:
        raise DamagedCheckpointError(f"Checkpoint {path.parent} is damaged: {path.name} does not match its sha256.")
    return data


def _read(path: Path) -> bytes:
    if path.is_symlink() or path.parent.is_symlink():
        raise DamagedCheckpointError(f"Checkpoint {path.parent} contains a link, {path.name}: it must be a plain file.")
    try:
        return path.read_bytes()
    except OSError as error:
        raise DamagedCheckpointError(
            f"Checkpoint {path.parent} is damaged: {path.name} cannot be read ({error.strerror})."
        ) from error


def steps_in(folder: Path) -> list[int]:
    """The steps of the checkpoints in `folder`, ascending; links and plain files are ignored."""
    entries = (
        (entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()) if folder.is_dir() else ()
    )
    matches = (_NAME.fullmatch(entry.name) for entry in entries)
    return sorted(int(match[1]) for match in matches if match)


def newest(folder: Path) -> tuple[Checkpoint | None, list[str]]:
    """The newest intact checkpoint, and a message about each newer one that is damaged."""
    complaints: list[str] = []
    for step in reversed(steps_in(folder)):
        try:
            return load(path_of(folder, step)), complaints
        except DamagedCheckpointError as error:
            complaints.append(str(error))
    return None, complaints


def prune(folder: Path, keep: set[int]) -> None:
    """Delete all checkpoints except for the steps in `keep`, and the partial files of killed writers."""
    for step in set(steps_in(folder)) - keep:
        shutil.rmtree(path_of(folder, step))
    for part in folder.glob(".step_*.part"):
        shutil.rmtree(part, ignore_errors=True)
