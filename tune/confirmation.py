"""The best trial of a sweep, scored once more on noise that took no part in choosing it.

The trials of a sweep are ranked by scores that each contain an error from the evaluation's noise, so the first of many
is likely to be one whose error flatters it (the winner's curse). When the sweep ends, the best checkpoint of the best
trial, or of each trial on the Pareto front, is scored on a stream of its own, and that score stands beside the one by
which it was chosen. An ablation chooses nothing, so it has no such scores.

    studies/NAME/confirmation.json    by trial: the iteration of the checkpoint, and every score or why there is none
"""

import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dxmi.config import build
from dxmi.errors import UserError
from dxmi.evaluation.sampling import CONFIRMATION, SCORING_VERSION
from dxmi.persistence.checkpoint import path_of
from dxmi.persistence.files import write_json
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.build import ExperimentConfig
from dxmi.training.loading import load_trained
from tune.ablation_plan import AblationPlan
from tune.console import last_line
from tune.devices import Slots
from tune.plans import Plan
from tune.ray_session import on_cluster
from tune.storage import Remote
from tune.study import Study, StudyFolder, TrialRecord, TrialState, pareto_front, ranked
from tune.sweep_config import ObjectiveConfig

FILE = "confirmation.json"
_POLL_SECONDS = 0.5


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
    if len(plan.sweep.objectives) > 1:
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
    return record.outcome.step is not None and path_of(record.run.checkpoints, record.outcome.step).is_dir()


def obstacle(folder: StudyFolder, record: TrialRecord, records: Sequence[TrialRecord]) -> str:
    """Why a chosen trial has no score on fresh noise, in words; empty if it has one."""
    known = confirmations(folder, records).get(record.number)
    if known is not None:
        return known.problem
    return "the sweep has not ended" if _has_checkpoint(record) else "its checkpoint is gone"


# ----------------------------------------------------------------------------
# Scoring, on Ray


def confirm(study: Study, slots: Slots, address: Callable[[int], str | None], is_stopped: Callable[[], bool]) -> None:
    """Score the chosen trials that have not been, where trials run; each result is kept as soon as it is there.

    Args:
        study: whose trials have ended; it is driven by this process, and Ray is running.
        slots: the share of the machine that one evaluation gets.
        address: where a trial's run is kept; None if in its run folder.
        is_stopped: whether to give up, looked at several times a second; the next session goes on.
    """
    waiting = unconfirmed(study, study.records())
    if len(waiting) == 1 and not slots.gpu_share and not on_cluster():
        _confirm_here(study.folder, waiting[0], slots, address, is_stopped)
    elif waiting:
        _confirm_on_ray(study.folder, waiting, slots, address, is_stopped)


class _Stopped(Exception):  # noqa: N818  (not an error)
    """The user asked for it."""


def _confirm_here(
    folder: StudyFolder,
    record: TrialRecord,
    slots: Slots,
    address: Callable[[int], str | None],
    is_stopped: Callable[[], bool],
) -> None:
    """In this process, which has imported everything that another one would first have to."""

    def on_step() -> None:
        if is_stopped():
            raise _Stopped

    out, step = str(record.run.path.resolve()), record.outcome.step
    assert step is not None  # a complete trial has one
    try:
        result = fresh_scores(out, step, slots.threads, address(record.number), on_step)
    except _Stopped:
        return
    except Exception as error:  # noqa: BLE001  (the sweep has ended well, whatever happens here)
        result = {"problem": last_line(f"{type(error).__name__}: {error}")}
    _keep(folder, record, result)


def _confirm_on_ray(
    folder: StudyFolder,
    waiting: Sequence[TrialRecord],
    slots: Slots,
    address: Callable[[int], str | None],
    is_stopped: Callable[[], bool],
) -> None:
    import ray  # noqa: PLC0415  (tables are written without it)
    from ray.exceptions import RayError  # noqa: PLC0415

    task = ray.remote(num_cpus=slots.threads, num_gpus=slots.gpu_share, max_retries=0)(fresh_scores)
    pending = {}
    for record in waiting:
        out, step = str(record.run.path.resolve()), record.outcome.step
        pending[task.remote(out, step, slots.threads, address(record.number))] = record
    while pending:
        done, _ = ray.wait([*pending], timeout=_POLL_SECONDS)
        for reference in done:
            record = pending.pop(reference)
            try:
                result: dict[str, Any] = ray.get(reference)
            except RayError as error:
                result = {"problem": last_line(str(error))}
            _keep(folder, record, result)
        if pending and is_stopped():
            for reference in pending:
                ray.cancel(reference, force=True)
            return


def _keep(folder: StudyFolder, record: TrialRecord, result: Mapping[str, Any]) -> None:
    assert record.outcome.step is not None  # a complete trial has one
    found = {**_read(folder), record.number: Confirmation(record.outcome.step, **result)}
    write_json(folder.path / FILE, {str(number): asdict(found[number]) for number in sorted(found)})


def fresh_scores(
    out: str, step: int, threads: int, address: str | None = None, on_step: Callable[[], None] | None = None
) -> dict[str, Any]:
    """`scores` of a run's best checkpoint on the noise of confirmations, or the `problem` that there is.

    Args:
        out: the run's folder.
        step: iteration of the checkpoint.
        threads: of PyTorch.
        address: where the run is kept, if this node has no such folder.
        on_step: called as samples are drawn; what it raises ends this.
    """
    try:
        if address is None:
            return {"scores": _scores(RunDirectory(Path(out)), step, threads, on_step)}
        with TemporaryDirectory() as here:
            Remote(address).pull(Path(here))
            return {"scores": _scores(RunDirectory(Path(here)), step, threads, on_step)}
    except (UserError, OSError) as error:
        return {"problem": str(error)}


def _scores(run: RunDirectory, step: int, threads: int, on_step: Callable[[], None] | None) -> dict[str, float]:
    tree = run.read_config()
    tree["resources"] = {**tree.get("resources", {}), "threads": threads}
    trained = load_trained(run, build(ExperimentConfig, tree), "best")
    if trained.step != step:
        raise UserError(f"the checkpoint of iteration {step} in {run.path} is gone or damaged.")
    values = trained.scores(None, None, 0.0, CONFIRMATION, on_step=on_step).values
    for key, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{key} is {value} there.")
    return values
