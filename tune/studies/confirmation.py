"""Scores of a sweep's best trial on fresh noise, which was not used to select it.

The scores that rank the trials of a sweep contain errors from the evaluation's noise, so the best of many trials is
likely to have a favorable error (the winner's curse). When the sweep ends, the best checkpoint of the best trial, or of
each trial on the Pareto front, is scored on a separate random stream, and the result is shown next to the score that
was used for the selection. An ablation does not select a trial, so it has no such scores.

    studies/NAME/confirmation.json    for each trial, the iteration of the checkpoint and all scores, or the problem
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
    """Result of scoring a trial on fresh noise.

    Attributes:
        step: Iteration of the checkpoint.
        scores: Scores by key; empty if the checkpoint could not be scored.
        problem: Why it could not be scored; empty otherwise.
        version: Version of the scoring.
    """

    step: int
    scores: Mapping[str, float] = field(default_factory=dict)
    problem: str = ""
    version: int = SCORING_VERSION

    def value(self, plan: Plan, objective: ObjectiveConfig) -> float | None:
        """The value of an objective on fresh noise; None if it has none, like the number of steps."""
        return self.scores.get(plan.metric if objective.metric == "score" else objective.metric)


def chosen(plan: Plan, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The trials that the sweep selects: the best one, or the Pareto front with two objectives."""
    if isinstance(plan, AblationPlan) or plan.is_of_parents:
        return []
    if len(plan.objectives) > 1:
        return pareto_front(plan, records)
    return [record for record in ranked(plan, records)[:1] if record.state is TrialState.COMPLETE]


def confirmations(folder: StudyFolder, records: Sequence[TrialRecord]) -> dict[int, Confirmation]:
    """Scores on fresh noise by trial number, without those of other checkpoints or scoring versions."""
    steps, found = {record.number: record.outcome.step for record in records}, {}
    for number, confirmation in _read(folder).items():
        if confirmation.version == SCORING_VERSION and confirmation.step == steps.get(number, -1):
            found[number] = confirmation
    return found


def _read(folder: StudyFolder) -> dict[int, Confirmation]:
    """The file's content; empty if the file is missing or damaged, since it can be recomputed."""
    try:
        tree = json.loads((folder.path / FILE).read_text())
        return {int(number): Confirmation(**about) for number, about in tree.items()}
    except (OSError, ValueError, TypeError, AttributeError):
        return {}


def unconfirmed(study: Study, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """The selected trials that have a checkpoint but no score on fresh noise."""
    known = confirmations(study.folder, records)
    waiting = (record for record in chosen(study.plan, records) if record.number not in _scored(known))
    return [record for record in waiting if _has_checkpoint(record)]


def _scored(known: Mapping[int, Confirmation]) -> set[int]:
    return {number for number, confirmation in known.items() if confirmation.scores}


def _has_checkpoint(record: TrialRecord) -> bool:
    from dxmi.persistence.checkpoint import path_of  # noqa: PLC0415  (it imports PyTorch)

    return record.outcome.step is not None and path_of(record.run.checkpoints, record.outcome.step).is_dir()


def obstacle(folder: StudyFolder, record: TrialRecord, records: Sequence[TrialRecord]) -> str:
    """Why a selected trial has no score on fresh noise; empty if it has one."""
    known = confirmations(folder, records).get(record.number)
    if known is not None:
        return known.problem
    return "the sweep has not ended" if _has_checkpoint(record) else "its checkpoint was deleted"


def keep(folder: StudyFolder, record: TrialRecord, result: Mapping[str, Any]) -> None:
    """Add a trial's result to the study's confirmation.json."""
    assert record.outcome.step is not None  # a complete trial has one
    found = {**_read(folder), record.number: Confirmation(record.outcome.step, **result)}
    write_json(folder.path / FILE, {str(number): asdict(found[number]) for number in sorted(found)})
