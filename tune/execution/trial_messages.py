"""Messages between the controller's process and a trial's process: tasks to the trial, reports back.

Both are passed as JSON text, since Ray Tune would flatten, copy and store every value of a tree.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrialTask:
    """A trial to run.

    Attributes:
        number: number of the trial.
        tree: its config as plain values, from which the trial's process builds the config.
        out: its run folder.
        address: storage address of the run, or None if it is stored in its folder.
        metric: the score that every evaluation must report.
        same_as: folder or address of a finished run with the same config, or None.
        seeds: seeds of the trial, of which `tree` has the first.
    """

    number: int
    tree: Mapping[str, Any]
    out: str
    address: str | None
    metric: str
    same_as: str | None = None
    seeds: tuple[int, ...] = ()


def tasks_to_json(tasks: Sequence[TrialTask]) -> str:
    """Convert tasks to JSON text."""
    return json.dumps([asdict(task) for task in tasks])


def tasks_from_json(text: str) -> list[TrialTask]:
    """Inverse of `tasks_to_json`."""
    return [TrialTask(**{**task, "seeds": tuple(task["seeds"])}) for task in json.loads(text)]


@dataclass(frozen=True)
class Scored:
    """A trial has evaluated its policy.

    Attributes:
        number: number of the trial.
        step: iteration of the evaluation.
        metrics: finite numbers by key.
    """

    number: int
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Finished:
    """A trial has run to its end.

    Attributes:
        number: number of the trial.
        summary: summary of its run.
    """

    number: int
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Stopped:
    """A trial has saved its state and returned on request.

    Attributes:
        number: number of the trial.
    """

    number: int


@dataclass(frozen=True)
class Diverged:
    """A trial has produced a non-finite value.

    Attributes:
        number: number of the trial.
        reason: a sentence that names the value.
    """

    number: int
    reason: str


@dataclass(frozen=True)
class Refused:
    """A trial's config, or a file it refers to, is invalid.

    Attributes:
        number: number of the trial.
        reason: a sentence that says why.
    """

    number: int
    reason: str


@dataclass(frozen=True)
class OutOfDisk:
    """A trial could not write because the disk is full.

    Attributes:
        number: number of the trial.
        reason: the system's error message and the file.
    """

    number: int
    reason: str


LastReport = Finished | Stopped | Diverged | Refused | OutOfDisk
"""How a trial ended."""
TrialReport = Scored | LastReport
"""Any report of a trial."""

_KINDS: dict[str, type[TrialReport]] = {
    "scored": Scored,
    "finished": Finished,
    "stopped": Stopped,
    "diverged": Diverged,
    "refused": Refused,
    "out_of_disk": OutOfDisk,
}


def to_json(report: TrialReport) -> str:
    """Convert a report to JSON text."""
    kind = next(kind for kind, cls in _KINDS.items() if type(report) is cls)
    return json.dumps({"kind": kind, **asdict(report)})


def from_json(text: str) -> TrialReport:
    """Inverse of `to_json`."""
    tree = json.loads(text)
    return _KINDS[tree.pop("kind")](**tree)
