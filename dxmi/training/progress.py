"""What a run reports while it is in progress."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import StrEnum


class Phase(StrEnum):
    """What a run is doing."""

    PRETRAIN = "pretrain"
    REFERENCES = "references"
    FINETUNE = "finetune"
    REPORT = "report"


@dataclass(frozen=True)
class Progress:
    """What a run reports.

    Attributes:
        phase: where it is.
        step: how far in that phase.
        total: steps of that phase.
        metrics: logged or evaluated just now; empty in between.
        note: a sentence for the user, about a damaged checkpoint for example.
        of_data: whether the note is about the data, which all runs of a study share.
    """

    phase: Phase
    step: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    of_data: bool = False


Reporter = Callable[[Progress], bool | None]
"""Called while a run is in progress; if it returns True the run writes a checkpoint and returns."""


class StopRequestedError(Exception):
    """The reporter asked for a stop."""
