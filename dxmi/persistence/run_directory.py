"""The folder of a run: its config, metrics, checkpoints and images.

config.yaml      the resolved config
metrics.jsonl    one row per logged step
checkpoints/     the best, the last and the second-to-last
samples/         one grid per evaluation, from the same noise; reference_*.png: real data and samples of references
curves.png       scores by iteration, with references as lines
divergence.png   scores against the divergence from the pretrained policy, of runs that maximize a reward
summary.json     the result; exists only if the run has finished
"""

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import yaml
from filelock import FileLock, Timeout

from dxmi.errors import UserError
from dxmi.persistence.files import require_target, write_atomic, write_json

Row = dict[str, float | int | str]


class RunDirectory:
    """Reads and writes the folder of a run.

    Args:
        path: the folder, which need not exist yet.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self.config = path / "config.yaml"
        self.metrics = path / "metrics.jsonl"
        self.checkpoints = path / "checkpoints"
        self.samples = path / "samples"
        self.curves = path / "curves.png"
        self.divergence = path / "divergence.png"
        self.summary = path / "summary.json"

    def reference_picture(self, name: str) -> Path:
        """The path of an image to compare samples with.

        Args:
            name: data, full (the model with many steps), few (the best training-free sampler with no more network
                evaluations than the policy), or the key of another training-free sampler with as many.
        """
        return self.samples / f"reference_{name}.png"

    def create(self) -> None:
        """Create the folders.

        Raises:
            UserError: a folder cannot be created or written, or is a dangling link.
        """
        for folder in (self.path, self.checkpoints, self.samples):
            require_target(folder, "The run folder")
        try:
            for folder in (self.path, self.checkpoints, self.samples):
                folder.mkdir(parents=True, exist_ok=True)
            if not os.access(self.path, os.W_OK):
                raise PermissionError(13, "Permission denied")
        except OSError as error:
            raise UserError(
                f"The run folder {self.path} cannot be written: {error.strerror}. Choose another folder."
            ) from error

    def lock(self) -> FileLock:
        """Take the lock for writing to this folder, which is held until it is released or the process ends.

        Raises:
            UserError: another process holds the lock.
        """
        lock = FileLock(self.path / ".lock")
        try:
            lock.acquire(timeout=0)
        except Timeout as error:
            raise UserError(
                f"Another process is training in {self.path}: wait until it ends, or train in another folder."
            ) from error
        return lock

    def write_config(self, tree: Mapping[str, Any]) -> None:
        """Write the resolved config."""
        write_atomic(self.config, yaml.safe_dump(dict(tree), sort_keys=False))

    def read_config(self) -> dict[str, Any]:
        """Read the config as a tree of plain values.

        Raises:
            UserError: the file is missing, or is not plain YAML.
        """
        return read_yaml(self.config, f"{self.path} is not a run folder: it has no config.yaml.")

    def write_summary(self, tree: Mapping[str, Any]) -> None:
        """Write the result, which marks the run as finished."""
        write_json(self.summary, tree)

    def read_summary(self) -> dict[str, Any] | None:
        """Read the result; None if the run has not finished.

        Raises:
            UserError: the file is not JSON.
        """
        try:
            summary = json.loads(self.summary.read_text())
        except (FileNotFoundError, NotADirectoryError):
            return None
        except ValueError:
            summary = None
        if not isinstance(summary, dict):
            raise UserError(f"{self.summary} is damaged: delete it and resume the run to write it again.")
        return summary

    def append(self, rows: list[Row]) -> None:
        """Append rows to metrics.jsonl, and fsync the file."""
        with self.metrics.open("a") as file:
            file.writelines(json.dumps(row, allow_nan=False) + "\n" for row in rows)
            file.flush()
            os.fsync(file.fileno())

    def rows(self) -> list[Row]:
        """Read the rows of metrics.jsonl; an incomplete last line, left by a killed writer, is ignored.

        Raises:
            UserError: another line is not a valid row.
        """
        if not self.metrics.exists():
            return []
        lines = self.metrics.read_text(errors="replace").split("\n")
        return [self._row(number, line) for number, line in enumerate(lines[:-1], start=1) if line]

    def _row(self, number: int, line: str) -> Row:
        try:
            row = json.loads(line)
        except ValueError:
            row = None
        if not isinstance(row, dict) or not isinstance(row.get("step"), int):
            raise UserError(f"{self.metrics} is damaged: line {number} is not a row. Delete that line.")
        return row

    def forget_after(self, step: int) -> None:
        """Delete the rows of all steps after `step`, which the resumed run will write again."""
        kept = [row for row in self.rows() if int(row["step"]) <= step]
        write_atomic(self.metrics, "".join(json.dumps(row, allow_nan=False) + "\n" for row in kept))


_MAX_YAML_BYTES = 1_000_000


class _AliasError(Exception):
    """A YAML file contains an alias; with aliases, a small file could expand to a huge tree."""


class _PlainLoader(yaml.SafeLoader):
    """A safe loader that refuses aliases.

    It is not based on LibYAML, which takes minutes to read a deeply nested file, or crashes the process.
    """

    def compose_node(self, parent: yaml.Node | None, index: Any) -> yaml.Node | None:
        if self.check_event(yaml.AliasEvent):
            raise _AliasError
        return super().compose_node(parent, index)


def read_yaml(path: Path, missing: str) -> dict[str, Any]:
    """Read a mapping of plain values from a YAML file of at most one megabyte, without object tags and aliases.

    Args:
        path: path of the file.
        missing: message of the error if the file cannot be opened.

    Raises:
        UserError: the file cannot be opened, or is not such a mapping.
    """
    try:
        size = path.stat().st_size
        text = path.read_text() if size <= _MAX_YAML_BYTES else ""
    except OSError as error:
        raise UserError(missing) from error
    except UnicodeDecodeError as error:
        raise UserError(f"{path} is not a plain YAML config: it is not UTF-8 text.") from error
    if size > _MAX_YAML_BYTES:
        raise UserError(f"{path} has {size} bytes: a config may have at most {_MAX_YAML_BYTES}.")
    try:
        tree = yaml.load(text, Loader=_PlainLoader)  # noqa: S506  (it is a safe loader)
    except _AliasError as error:
        raise UserError(f"{path} contains YAML aliases: write out the values.") from error
    except (yaml.YAMLError, ValueError, RecursionError) as error:
        reason = _reason(error)
        raise UserError(f"{path} is not a plain YAML config: {reason}") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} is not a config: it holds no settings, which are lines of key: value.")
    return tree


def _reason(error: Exception) -> str:
    """The problem and the position of a YAML error, with a hint if the cause is an unquoted colon."""
    problem, mark = getattr(error, "problem", None), getattr(error, "problem_mark", None)
    if problem is None or mark is None:
        return " ".join(str(error).split())
    hint = ": text that contains a colon must be quoted" if "mapping values" in problem else ""
    return f"{problem} at line {mark.line + 1}, column {mark.column + 1}{hint}"
