"""Scores the selected trials of a sweep again, on noise that was not used to select them.

The results are stored in confirmation.json, see `tune.studies.confirmation`.
"""

import math
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from dxmi.errors import UserError
from dxmi.evaluation.config import CONFIRMATION
from dxmi.metrics.keys import mean_scores
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.loading import load_run
from dxmi.training.schema import read_config
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
    """Score the selected trials that are not yet confirmed; each result is stored as soon as it is available.

    A single evaluation on the CPU runs in this process, all others as Ray tasks.

    Args:
        study: a study whose trials have ended, driven by this process while Ray is running.
        slots: the share of the machine that one evaluation gets.
        address: maps a trial's number to the storage address of its run; None if the run is in its folder.
        is_stopped: whether to stop early, polled several times a second; the next session continues.
    """
    waiting = unconfirmed(study, study.records())
    allow_code = study.plan.experiment.resources.allow_code
    given = {
        record.number: (_checkpoints(record), slots.threads, address(record.number), allow_code) for record in waiting
    }
    if len(waiting) == 1 and not slots.gpu_share and not on_cluster():
        _confirm_here(study.folder, waiting[0], given[waiting[0].number], is_stopped)
    elif waiting:
        _confirm_on_ray(study.folder, waiting, given, slots, is_stopped)


Given = tuple[list[tuple[str, int]], int, str | None, bool]
"""The arguments of `fresh_scores` for a trial."""


class _Stopped(Exception):  # noqa: N818  (not an error)
    """The user requested a stop."""


def _confirm_here(folder: StudyFolder, record: TrialRecord, given: Given, is_stopped: Callable[[], bool]) -> None:
    """Score one trial in this process, which saves the imports of a new one."""

    def on_step() -> None:
        if is_stopped():
            raise _Stopped

    try:
        result = fresh_scores(*given, on_step)
    except _Stopped:
        return
    except Exception as error:  # noqa: BLE001  (a failure here must not fail the finished sweep)
        result = {"problem": last_line(f"{type(error).__name__}: {error}")}
    keep(folder, record, result)


def _confirm_on_ray(
    folder: StudyFolder,
    waiting: Sequence[TrialRecord],
    given: Mapping[int, Given],
    slots: Slots,
    is_stopped: Callable[[], bool],
) -> None:
    import ray  # noqa: PLC0415  (not needed to write tables)
    from ray.exceptions import RayError  # noqa: PLC0415

    task = ray.remote(num_cpus=slots.threads, num_gpus=slots.gpu_share, max_retries=0)(fresh_scores)
    pending = {}
    for record in waiting:
        pending[task.remote(*given[record.number])] = record
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


def _checkpoints(record: TrialRecord) -> list[tuple[str, int]]:
    """Run folder and iteration of the best checkpoint of each seed of a complete trial; the trial's folder is first."""
    steps = [(run.read_summary() or {}).get("best", {}).get("step") for run in record.runs]
    steps[0] = record.outcome.step
    return [(str(run.path.resolve()), step) for run, step in zip(record.runs, steps, strict=True)]


def fresh_scores(
    checkpoints: Sequence[tuple[str, int]],
    threads: int,
    address: str | None = None,
    allow_code: bool = False,
    on_step: Callable[[], None] | None = None,
) -> dict[str, Any]:
    """Score the best checkpoints of a trial on the noise reserved for confirmation.

    Args:
        checkpoints: run folder and iteration of each seed's checkpoint; the trial's folder is first.
        threads: number of PyTorch threads.
        address: storage address of the trial, if this node does not have its folder.
        allow_code: whether to execute the Python files that the configs name, which only a command can permit.
        on_step: called after each sampling step; its exceptions propagate.

    Returns:
        A dict with the means over the seeds under the key `scores`, or with an error message under the key `problem`.
    """
    try:
        if address is None:
            return {"scores": _mean_scores(checkpoints, threads, allow_code, on_step)}
        with TemporaryDirectory() as here:
            Remote(address).pull(Path(here))
            trial = Path(checkpoints[0][0])
            moved = [(str(Path(here) / Path(out).relative_to(trial)), step) for out, step in checkpoints]
            return {"scores": _mean_scores(moved, threads, allow_code, on_step)}
    except (UserError, OSError) as error:
        return {"problem": str(error)}


def _mean_scores(
    checkpoints: Sequence[tuple[str, int]], threads: int, allow_code: bool, on_step: Callable[[], None] | None
) -> dict[str, float]:
    runs = [(RunDirectory(Path(out)), step) for out, step in checkpoints]
    return mean_scores([_scores(run, step, threads, allow_code, on_step) for run, step in runs])


def _scores(
    run: RunDirectory, step: int, threads: int, allow_code: bool, on_step: Callable[[], None] | None
) -> dict[str, float]:
    tree = run.read_config()
    tree["resources"] = {**tree.get("resources", {}), "threads": threads}
    stored = read_config(tree)
    loaded = load_run(run, stored.permitting_code() if allow_code else stored, "best")
    if loaded.step != step:
        raise UserError(f"the checkpoint of iteration {step} in {run.path} is missing or damaged.")
    values = loaded.scores(None, None, None, CONFIRMATION, on_step=on_step).values
    for key, value in values.items():
        if not math.isfinite(value):
            raise UserError(f"{key} is {value} on fresh noise.")
    return values
