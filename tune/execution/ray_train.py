"""One run on several workers: Ray Train around `dxmi.training.run`.

Every worker calls the same `train` with a `TorchProcessGroup` that determines its rows of each batch. The rank-zero
worker reports to the caller through an actor, one report at a time, and receives whether to stop, which it broadcasts
to the other workers: a run ends when every worker returns, and no worker is killed to stop it.
If a worker is lost or hangs, Ray Train restarts the whole group from the last checkpoint in the run folder.
"""

import json
import os
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import ray
import ray.train
import torch
from ray.train import (
    CheckpointConfig,
    FailureConfig,
    RunConfig,
    ScalingConfig,
    TrainingFailedError,
    WorkerGroupError,
)
from ray.train.torch import TorchConfig, TorchTrainer, get_device
from ray.util.placement_group import PlacementGroup, get_current_placement_group, remove_placement_group

from dxmi.config import build, to_tree
from dxmi.distributed import TorchProcessGroup
from dxmi.errors import DivergedError, UserError, WorkersLostError
from dxmi.persistence.checkpoint import steps_in
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.progress import Phase, Progress, Reporter
from dxmi.training.run import Saved, train
from dxmi.training.summary import Summary
from tune.execution.control_channel import Line
from tune.execution.ray_runtime import actor_here, ray_session
from tune.execution.resources import find_slots
from tune.integrations.object_store import Remote, join, kept
from tune.messages import last_line

_POLL_SECONDS = 0.5
_LATE_SECONDS = 60.0
"""Time within which a network file system makes a new file visible on every node."""
_NOTE = "placement_group"
_POINTER = "checkpoint.json"
_CONTROLLER_FAILURES = 2


def train_on_workers(
    config: ExperimentConfig, *, out: Path, report: Reporter | None = None, address: str | None = None
) -> Summary | None:
    """Run `dxmi.training.run.train` on `resources.num_workers` workers of the Ray instance this process is using.

    Args:
        config: what to run.
        out: the run's folder; without an address, it must be accessible from the node of the rank-zero worker.
        report: as for `train`; called in this process.
        address: storage address to keep the run at instead, see `tune.integrations.object_store.kept`.

    Returns:
        The summary, or None if `report` requested a stop.

    Raises:
        UserError: as `train`.
        DivergedError: as `train`.
        WorkersLostError: the group failed more often than it may be restarted.
    """
    # A single hung worker is detected by the collectives of the others; this timeout detects that all hang.
    os.environ["RAY_TRAIN_WORKER_HEALTH_CHECK_TIMEOUT_S"] = str(config.resources.worker_timeout)
    line = actor_here(Line)
    serving = _Serving(line, report or (lambda _: None))
    place = address or str(out.resolve())
    release_lost_group(place)
    state = _state(place)
    state.clear()  # otherwise Ray Train would resume the state left by a killed caller
    try:
        trainer: Any = _trainer(config, {"out": str(out.resolve()), "line": line, "address": address}, state)
        ended = serving.until_returned(lambda: trainer.fit().return_value)
    finally:
        ray.kill(line)
        state.remove()
    return _summary(ended)


def _state(place: str) -> Remote:
    """Return the location of Ray Train's state for a run's group; needed only while the group exists."""
    return Remote(join(place, ".ray_train"))


def release_lost_group(place: str) -> None:
    """Free the devices of a group whose caller was killed; Ray would hold them until the session ends."""
    state = _state(place)
    note = state.read(_NOTE)
    try:
        group = PlacementGroup(ray.PlacementGroupID(bytes.fromhex((note or b"").decode())))
    except ValueError:
        return
    remove_placement_group(group)
    state.delete(_NOTE)


def _note_group(place: str) -> None:
    """Record the placement group of this worker's group for `release_lost_group`."""
    group = get_current_placement_group()
    if group is not None:
        _state(place).write(_NOTE, group.id.hex().encode())


def _trainer(config: ExperimentConfig, loop_config: dict[str, Any], state: Remote) -> TorchTrainer:
    resources = config.resources
    file_system, path = state.for_ray
    on_gpu = resources.device == "cuda" or (resources.device == "auto" and _cluster_has_gpus())
    return TorchTrainer(
        _work,  # type: ignore[arg-type]
        train_loop_config={"tree": json.dumps(to_tree(config)), **loop_config},
        torch_config=TorchConfig(backend="nccl" if on_gpu else "gloo", timeout_s=int(resources.worker_timeout)),
        scaling_config=ScalingConfig(
            num_workers=resources.num_workers,
            use_gpu=on_gpu,
            resources_per_worker={"CPU": resources.threads or 1, **({"GPU": 1} if on_gpu else {})},
        ),
        run_config=RunConfig(
            name="group",
            storage_path=path,
            storage_filesystem=file_system,
            checkpoint_config=CheckpointConfig(num_to_keep=1),
            failure_config=FailureConfig(  # type: ignore[call-arg]
                max_failures=resources.max_restarts, controller_failure_limit=_CONTROLLER_FAILURES
            ),
        ),
    )


def _cluster_has_gpus() -> bool:
    resources: dict[str, float] = ray.cluster_resources()  # type: ignore[no-untyped-call]
    return resources.get("GPU", 0.0) > 0.0


class _Serving:
    """Answers the reports of the rank-zero worker while a group runs."""

    def __init__(self, line: Any, report: Reporter) -> None:
        self._line, self._report = line, report
        self._error: Exception | None = None
        self._stopping = False

    def until_returned(self, fit: Callable[[], Any]) -> Any:
        """Run `fit` in a separate thread and return its result, answering reports meanwhile.

        Raises:
            Exception: any exception of the reporter or of `fit`.
        """
        result: dict[str, Any] = {}

        def run() -> None:
            try:
                result["returned"] = fit()
            except Exception as error:  # noqa: BLE001  (raised below, in the caller's thread)
                result["error"] = error

        thread = threading.Thread(target=run, name="ray-train", daemon=True)
        thread.start()
        while thread.is_alive():
            message = ray.get(self._line.next.remote())
            if message is not None:
                ray.get(self._line.answer.remote(self._answer(message)))
        if self._error is not None:
            raise self._error
        if "error" in result:
            raise _cause(result["error"])
        return result["returned"]

    def _answer(self, message: str) -> bool:
        """Return whether the group is to stop; once true, it remains true."""
        tree = json.loads(message)
        try:
            progress = Progress(**{**tree, "phase": Phase(tree["phase"])})
            self._stopping = bool(self._report(progress)) or self._stopping
        except Exception as error:  # noqa: BLE001  (raised when the workers have returned)
            self._error, self._stopping = error, True
        return self._stopping


def _cause(error: Exception) -> Exception:
    """Return the exception to raise for a failed `fit`."""
    if isinstance(error, WorkerGroupError):
        for failure in error.worker_failures.values():
            if isinstance(failure, UserError | OSError):
                return failure
    return WorkersLostError(_reason(error), str(error)) if isinstance(error, TrainingFailedError) else error


def _reason(error: TrainingFailedError) -> str:
    """Describe the most likely root cause in one line; lost connections of other workers are only consequences."""
    failures = error.worker_failures.values() if isinstance(error, WorkerGroupError) else (error,)
    lines = [f"{type(failure).__name__}: {last_line(str(failure))}" for failure in failures]
    return next((line for line in lines if "ActorDied" in line or "Timeout" in line), lines[0])


def _summary(ended: Mapping[str, Any] | None) -> Summary | None:
    """Convert what the rank-zero worker returned to a summary, or raise its error."""
    if ended is None:
        return None
    if "diverged" in ended:
        raise DivergedError(**ended["diverged"])
    if "refused" in ended:
        raise UserError(ended["refused"])
    return Summary(**ended["summary"])


# ----------------------------------------------------------------------------
# In a worker


def _work(loop_config: Mapping[str, Any]) -> dict[str, Any] | None:
    """Training function that Ray Train runs in every worker; rank zero's result is the result of the group."""
    config = build(ExperimentConfig, json.loads(loop_config["tree"]))
    config = replace(config, resources=_own_resources(config))
    group = TorchProcessGroup(config.resources.worker_timeout)
    report = _asking(loop_config["line"]) if group.is_rank_zero else None
    try:
        with _run_folder(group, loop_config["address"], Path(loop_config["out"])) as (out, saved):
            summary = train(Experiment(config, workers=group), out=out, report=report, saved=saved)
    except DivergedError as error:  # raised on all workers; a restart would not help
        return {"diverged": error.tree()}
    except UserError as error:
        return {"refused": str(error)}
    return None if summary is None else {"summary": asdict(summary)}


@contextmanager
def _run_folder(group: TorchProcessGroup, address: str | None, out: Path) -> Iterator[tuple[Path, Saved]]:
    """Yield the folder to which rank zero writes, and the function that every worker calls after a checkpoint."""
    if not group.is_rank_zero:
        yield out, _report_checkpoint
        return
    _note_group(address or str(out))
    with kept(address, out) as (here, keep):
        _await_checkpoint(RunDirectory(here).checkpoints, None if address is None else Remote(address))

        def saved(step: int) -> None:
            keep()
            _report_checkpoint(step, {"place": address or str(out), "step": step})

        yield here, saved


def _report_checkpoint(step: int, about: dict[str, Any] | None = None) -> None:
    """Report a checkpoint to Ray Train, as all workers must; rank zero reports its location."""
    with TemporaryDirectory() as folder:
        if about is not None:
            (Path(folder) / _POINTER).write_text(json.dumps(about))
        pointer = None if about is None else ray.train.Checkpoint.from_directory(folder)
        ray.train.report({"step": step}, checkpoint=pointer, checkpoint_dir_name=f"step_{step:08d}")


def _await_checkpoint(checkpoints: Path, remote: Remote | None) -> None:
    """After a restart, wait until the last checkpoint reported to Ray Train is visible on this node.

    A network file system may delay other nodes' files; without them, more than one checkpoint interval would be lost.
    """
    pointer = ray.train.get_checkpoint()
    if pointer is None:
        return
    with pointer.as_directory() as folder:
        step = json.loads((Path(folder) / _POINTER).read_text())["step"]
    deadline = time.monotonic() + _LATE_SECONDS
    while max(steps_in(checkpoints), default=-1) < step and time.monotonic() < deadline:
        time.sleep(_POLL_SECONDS)
        if remote is not None:
            remote.pull(checkpoints.parent)


def _own_resources(config: ExperimentConfig) -> Any:
    """Return the resources settings with this worker's device and threads."""
    device = get_device() if torch.cuda.is_available() and config.resources.device != "cpu" else torch.device("cpu")
    return replace(config.resources, device=str(device), threads=config.resources.threads or 1)


def _asking(line: Any) -> Reporter:
    """Return a reporter that sends each report to the caller and waits for the answer."""

    def report(progress: Progress) -> bool:
        return bool(ray.get(line.ask.remote(json.dumps(asdict(progress)))))

    return report


# ----------------------------------------------------------------------------
# A Ray instance for one run


@contextmanager
def ray_for(config: ExperimentConfig) -> Iterator[None]:
    """Connect to the cluster, or start a local Ray instance for one run.

    Raises:
        UserError: there are not enough devices for the workers.
    """
    slots = find_slots(config.resources, max_concurrent=1)
    with ray_session(slots.cpus, slots.gpus, groups=True):
        yield
