"""The best trial of a sweep, scored once more on noise that took no part in choosing it.

The trials of a sweep are ranked by scores that each contain an error from the evaluation's noise, so the first of many
is likely to be one whose error flatters it (the winner's curse). When the sweep ends, the best checkpoint of the best
trial, or of each trial on the Pareto front, is scored on a stream of its own, and that score stands beside the one by
which it was chosen. An ablation chooses nothing, so it has no such scores.

    studies/NAME/confirmation.json    by trial: the iteration of the checkpoint, and every score or why there is none
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from dxmi.evaluation.config import SCORING_VERSION
from dxmi.persistence.files import write_json
from tune.config.sweep import ObjectiveConfig
from tune.plans.ablation import AblationPlan
from tune.plans.sweep import Plan
from tune.studies.folder import StudyFolder
from tune.studies.ranking import pareto_front, ranked
from tune.studies.records import TrialRecord, TrialState
from tune.studies.study import Study

FILE = "confirmation.json"


@dataclass(frozen=True)
class Confirmation:
    """What came out of scoring a trial on fresh noise.

    Attributes:
        step: iteration of the checkpoint.
        scores: by key; empty if it could not be scored.
        problem: why not, in a sentence.
        version: of the scores.
    """

    step: int
    scores: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    version: int = SCORING_VERSION

    def value(self, plan: Plan, objective: ObjectiveConfig) -> float | None:
        """An objective on fresh noise; None if there is none, as of the number of steps, which has no noise."""
        return self.scores.get(plan.metric if objective.metric == "score" else objective.metric)


def chosen(plan: Plan, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that the sweep chooses: the best, or with two objectives the Pareto front."""
    if isinstance(plan, AblationPlan):
        return []
    if len(plan.objectives) > 1:
        return pareto_front(plan, records)
    return [record for record in ranked(plan, records)[:1] if record.state is TrialState.COMPLETE]


def confirmations(folder: StudyFolder, records: Sequence[TrialRecord]) -> dict[int, Confirmation]:
    """What is known of the trials on fresh noise, by number; nothing of another checkpoint or an older way to score."""
    steps, found = {record.number: record.outcome.step for record in records}, {}
    for number, confirmation in _read(folder).items():
        if confirmation.version == SCORING_VERSION and confirmation.step == steps.get(number, -1):
            found[number] = confirmation
    return found


def _read(folder: StudyFolder) -> dict[int, Confirmation]:
    """The file's content; nothing of a file that is damaged, since it is made again."""
    try:
        tree = json.loads((folder.path / FILE).read_text())
        return {int(number): Confirmation(**about) for number, about in tree.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def unconfirmed(study: Study, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The chosen trials that have no score on fresh noise but a checkpoint to score."""
    known = confirmations(study.folder, records)
    waiting = (record for record in chosen(study.plan, records) if record.number not in _scored(known))
    return [record for record in waiting if _has_checkpoint(record)]


def _scored(known: Mapping[int, Confirmation]) -> set[int]:
    return {number for number, confirmation in known.items() if confirmation.scores}


def _has_checkpoint(record: TrialRecord) -> bool:
    from dxmi.persistence.checkpoint import path_of  # noqa: PLC0415  (it imports PyTorch)

    return record.outcome.step is not None and path_of(record.run.checkpoints, record.outcome.step).is_dir()


def obstacle(folder: StudyFolder, record: TrialRecord, records: Sequence[TrialRecord]) -> str:
    """Why a chosen trial has no score on fresh noise, in words; empty if it has one."""
    known = confirmations(folder, records).get(record.number)
    if known is not None:
        return known.problem
    return "the sweep has not ended" if _has_checkpoint(record) else "its checkpoint is gone"


def keep(folder: StudyFolder, record: TrialRecord, result: Mapping[str, Any]) -> None:
    """Write a trial's result into the study's confirmation.json."""
    assert record.outcome.step is not None  # a complete trial has one
    found = {**_read(folder), record.number: Confirmation(record.outcome.step, **result)}
    write_json(folder.path / FILE, {str(number): asdict(found[number]) for number in sorted(found)})
