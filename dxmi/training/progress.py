"""What a run reports while it is in progress."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    """The phases of a run."""

    PRETRAIN = "pretrain"
    REFERENCES = "references"
    FINETUNE = "finetune"
    REPORT = "report"


@dataclass(frozen=True)
class Progress:
    """A progress report of a run.

    Attributes:
        phase: current phase.
        step: number of completed steps of the phase.
        total: number of steps of the phase.
        metrics: newly logged metrics, or scores with the primary one first; empty if there are none.
        note: message for the user, for example about a damaged checkpoint.
        of_data: whether the note is about the data, which all runs of a study share.
    """

    phase: Phase
    step: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    of_data: bool = False


Reporter = Callable[[Progress], bool | None]
"""Called while a run is in progress; if it returns True, the run writes a checkpoint and stops."""


class StopRequestedError(Exception):
    """The reporter requested a stop."""
