"""What the controller's process and a trial's tell each other: a task one way, reports the other.

Both cross the border as JSON text, since Ray Tune would flatten, copy and keep each value of a tree.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any


@dataclass(frozen=True)
class TrialTask:
    """A trial to run.

    Attributes:
        number: of the trial.
        tree: its config as plain values, which the trial's process builds once.
        out: its run folder.
        address: where the run is kept, or None if in its folder.
        metric: the score that every evaluation must report.
        same_as: the folder or the address of a finished run with the same config, or None.
    """

    number: int
    tree: Mapping[str, Any]
    out: str
    address: str | None
    metric: str
    same_as: str | None = None


def tasks_to_json(tasks: Sequence[TrialTask]) -> str:
    """Tasks as text."""
    return json.dumps([asdict(task) for task in tasks])


def tasks_from_json(text: str) -> list[TrialTask]:
    """The inverse of `tasks_to_json`."""
    return [TrialTask(**task) for task in json.loads(text)]


@dataclass(frozen=True)
class Scored:
    """A trial evaluated its policy.

    Attributes:
        number: of the trial.
        step: its iteration.
        metrics: finite numbers by key.
    """

    number: int
    step: int
    metrics: Mapping[str, float]


@dataclass(frozen=True)
class Finished:
    """A trial has run to its end.

    Attributes:
        number: of the trial.
        summary: of its run.
    """

    number: int
    summary: Mapping[str, Any]


@dataclass(frozen=True)
class Stopped:
    """A trial has saved and returned, since it was asked to.

    Attributes:
        number: of the trial.
    """

    number: int


@dataclass(frozen=True)
class Diverged:
    """A number of a trial was not finite.

    Attributes:
        number: of the trial.
        reason: which, in a sentence.
    """

    number: int
    reason: str


@dataclass(frozen=True)
class Refused:
    """A trial's config, or what it names, was refused.

    Attributes:
        number: of the trial.
        reason: why, in a sentence.
    """

    number: int
    reason: str


@dataclass(frozen=True)
class OutOfDisk:
    """A trial could not write.

    Attributes:
        number: of the trial.
        reason: the error of the system, and the file.
    """

    number: int
    reason: str


LastReport = Finished | Stopped | Diverged | Refused | OutOfDisk
"""How a trial ended."""
TrialReport = Scored | LastReport
"""What a trial reports."""

_KINDS: dict[str, type[TrialReport]] = {
    "scored": Scored,
    "finished": Finished,
    "stopped": Stopped,
    "diverged": Diverged,
    "refused": Refused,
    "out_of_disk": OutOfDisk,
}


def to_json(report: TrialReport) -> str:
    """A report as text."""
    kind = next(kind for kind, cls in _KINDS.items() if type(report) is cls)
    return json.dumps({"kind": kind, **asdict(report)})


def from_json(text: str) -> TrialReport:
    """The inverse of `to_json`."""
    tree = json.loads(text)
    return _KINDS[tree.pop("kind")](**tree)
