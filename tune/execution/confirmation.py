"""Scores the chosen trials of a sweep once more, on noise that took no part in choosing them.

What comes out is kept in confirmation.json, see `tune.studies.confirmation`.
"""

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dxmi.config import build
from dxmi.errors import UserError
from dxmi.evaluation.config import CONFIRMATION
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.config import ExperimentConfig
from dxmi.training.loading import load_trained
from tune.execution.slots import Slots
from tune.integrations.object_store import Remote
from tune.machine import on_cluster
from tune.messages import last_line
from tune.studies.confirmation import keep, unconfirmed
from tune.studies.folder import StudyFolder
from tune.studies.records import TrialRecord
from tune.studies.study import Study

_POLL_SECONDS = 0.5


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
    keep(folder, record, result)


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
            keep(folder, record, result)
        if pending and is_stopped():
            for reference in pending:
                ray.cancel(reference, force=True)
            return


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
