"""The Ray backend of the controller: Ray Tune starts trials, restarts crashed ones, and delivers their reports.

Tune's own state is temporary: resuming reads the study's journal and run folders, never Tune's state.
"""

import math
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from pathlib import Path
from typing import Any

import ray
from ray import tune as ray_tune
from ray.tune.experiment import Trial
from ray.tune.search import Searcher
from rich.text import Text

from dxmi.config import to_tree
from dxmi.training.run import train
from tune.execution.confirmation import confirm
from tune.execution.control_channel import ControlChannel
from tune.execution.controller import Controller, StopReason
from tune.execution.ray_runtime import actor_here, ray_session
from tune.execution.seed_batching import seeds_together
from tune.execution.signals import gentle_stop
from tune.execution.slots import Slots
from tune.execution.trial import REPORT, STEP, TASKS, Trainer, run_trials
from tune.execution.trial_messages import Scored, TrialTask, from_json, tasks_from_json, tasks_to_json
from tune.integrations.study_sync import StudySync
from tune.studies.records import TrialRecord
from tune.studies.study import Study

_GRACE = 7.0
"""Seconds for interrupted trials to save; their last checkpoints are complete in any case. With Ray's shutdown, the
user waits about ten seconds in total."""
_COLLECT_EVERY = 0.5
_WAITING_BYTES = 200_000_000
"""Memory reserved for a process that only waits: it must request some resource, but no device."""
_ON_HEAD = {"node:__internal_head__": 0.001}
"""A minimal share of a resource that only the head node has, which pins a process to it. The controller of a group runs
on the node of the process that waits for it; if that node were lost while workers start, Ray would move their
reservation to another node and never free it. Loss of the head node ends the session anyway."""
_NEVER = "1000000000"
_ENVIRONMENT = {
    "RAY_AIR_NEW_OUTPUT": "0",
    "TUNE_DISABLE_AUTO_CALLBACK_LOGGERS": "1",
    "TUNE_DISABLE_SIGINT_HANDLER": "1",  # the first Ctrl-C saves, see tune.execution.signals
    "TUNE_GLOBAL_CHECKPOINT_S": _NEVER,  # its state is never read
    "TUNE_WARN_INSUFFICENT_RESOURCE_THRESHOLD_S": _NEVER,
    "TUNE_WARN_SLOW_EXPERIMENT_CHECKPOINT_SYNC_THRESHOLD_S": _NEVER,
    "TUNE_PRINT_ALL_TRIAL_ERRORS": "0",
    "TUNE_FUNCTION_THREAD_TIMEOUT_S": "10",
}


class StoppedAtOnceError(BaseException):
    """A second Ctrl-C, or trials that did not stop in time. Not an Exception, so that Tune does not wrap it."""


def drive(
    controller: Controller,
    *,
    sync: StudySync,
    look: Callable[[Controller], None],
    trainer: Trainer = train,
) -> None:
    """Run a session of a study until the controller ends it.

    Args:
        controller: makes the decisions.
        sync: copies the study and its runs to shared storage.
        look: called several times a second to update the display and the records.
        trainer: trains one trial.

    Raises:
        StoppedAtOnceError: the user stopped the session, or the grace period expired; the study can be resumed.
    """
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    os.environ["TUNE_MAX_PENDING_TRIALS_PG"] = str(
        controller.slots.concurrent
    )  # otherwise their processes start one by one
    scratch = controller.study.folder.scratch
    shutil.rmtree(scratch, ignore_errors=True)
    control = _Control(controller)
    try:
        slots = controller.slots
        # Listen twice, since ray.init replaces the SIGTERM handler.
        own_ray = ray_session(slots.cpus, slots.gpus, groups=slots.workers > 1, before_try=control.give_up_if_stopped)
        with control.listening(), own_ray, control.listening():
            control.checkpoint()
            if not controller.has_nothing_to_do:
                _run_trials(controller, sync, look, control, trainer)
            if trainer is train and not controller.interrupted:
                confirm(controller.study, slots, sync.address, control.is_stopped)
                control.checkpoint()
    except StoppedAtOnceError:
        if control.error is not None:
            raise control.error from None
        raise
    finally:
        shutil.rmtree(scratch, ignore_errors=True)


def _run_trials(
    controller: Controller,
    sync: StudySync,
    look: Callable[[Controller], None],
    control: "_Control",
    trainer: Trainer,
) -> None:
    """Run Tune's loop until the controller ends the session."""
    if trainer is train:
        together = seeds_together(controller.plan, controller.slots, control.give_up_if_stopped)
        if together is not None:
            controller.stack_seeds(together)
        control.checkpoint()
    channel = actor_here(ControlChannel)
    callback = _Callback(controller, sync, channel, look, control)
    trainable = _trainable(controller.slots, channel, trainer)
    _tuner(trainable, controller, sync, callback, control).fit()


class _Control:
    """Ends a session from inside Tune's loop, where ordinary exceptions would be wrapped.

    Attributes:
        error: the controller's exception, if any.
    """

    def __init__(self, controller: Controller) -> None:
        self.error: Exception | None = None
        self._controller = controller
        self._at_once = False
        self._deadline = math.inf

    def listening(self) -> AbstractContextManager[None]:
        """Return a context in which this object handles SIGINT and SIGTERM."""
        return gentle_stop(self._stop_gently, self._stop_at_once)

    def _stop_gently(self, signal_name: str) -> None:
        """Handle the first signal: let trials save and return, and abandon them after the grace period."""
        self._deadline = time.monotonic() + _GRACE
        self._controller.stop_all(StopReason.INTERRUPT, f"stopped by {signal_name}")

    def _stop_at_once(self) -> None:
        """Handle the second signal."""
        self._at_once = True

    def is_stopped(self) -> bool:
        """Whether a signal was received."""
        return self._at_once or self._controller.interrupted

    def give_up_if_stopped(self) -> None:
        """End the session if a signal was received; called before any trial has started."""
        if self.is_stopped():
            raise StoppedAtOnceError

    def checkpoint(self) -> None:
        """End the session if the grace period is over or a second signal was received.

        Called only where an exception is harmless.
        """
        if self._at_once or time.monotonic() > self._deadline:
            raise StoppedAtOnceError

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Convert an exception of the body to an end of the session."""
        self.checkpoint()
        try:
            yield
        except Exception as error:
            self.error = error
            raise StoppedAtOnceError from error


def _trainable(slots: Slots, channel: Any, trainer: Trainer) -> Any:
    """Return `run_trials` with the arguments and resources that all trials share."""
    function = ray_tune.with_parameters(run_trials, channel=channel, trainer=trainer)
    if slots.workers > 1:  # the workers hold the devices; this process only waits
        return ray_tune.with_resources(function, {"cpu": 0, "memory": _WAITING_BYTES, **_ON_HEAD})
    return ray_tune.with_resources(function, {"cpu": slots.threads, "gpu": slots.gpu_share})


def _tuner(
    trainable: Any, controller: Controller, sync: StudySync, callback: "_Callback", control: _Control
) -> ray_tune.Tuner:
    scratch = controller.study.folder.scratch.resolve()
    return ray_tune.Tuner(
        trainable,
        tune_config=ray_tune.TuneConfig(
            search_alg=_Search(controller, sync, control), num_samples=-1, reuse_actors=True, metric=STEP, mode="max"
        ),
        run_config=ray_tune.RunConfig(
            name="tune",
            storage_path=str(scratch),
            verbose=0,
            callbacks=[callback],
            failure_config=ray_tune.FailureConfig(max_failures=controller.plan.sweep.max_failures),
        ),
    )


class _Unsaved:
    """Excludes an object's state from the pickles that Tune writes for a restore, which is never used."""

    def __getstate__(self) -> dict[str, Any]:
        return {}


class _Search(_Unsaved, Searcher):
    """A Tune searcher that takes its trials from the controller."""

    def __init__(self, controller: Controller, sync: StudySync, control: _Control) -> None:
        super().__init__(metric=STEP, mode="max")
        self._controller, self._sync, self._control = controller, sync, control

    def suggest(self, trial_id: str) -> Any:  # noqa: ARG002
        """Return a trial's arguments, None while all slots are in use, or FINISHED after the last trial."""
        with self._control.watched():
            together = self._controller.next_program()
            if together:
                return {TASKS: tasks_to_json([_task(self._controller, self._sync, record) for record in together])}
            return Searcher.FINISHED if self._controller.ending else None

    def on_trial_complete(self, trial_id: str, result: dict[str, Any] | None = None, error: bool = False) -> None:
        """Do nothing: the controller has already recorded the trial."""

    def save(self, checkpoint_path: str) -> None:
        """Do nothing: the study's journal holds everything."""

    def restore(self, checkpoint_path: str) -> None:
        """Do nothing: Tune's state is never read."""


def _task(controller: Controller, sync: StudySync, record: TrialRecord) -> TrialTask:
    """Build the task that is passed to `run_trials` for one trial."""
    study, slots = controller.study, controller.slots

    def place(number: int) -> str:
        return sync.address(number) or str(study.folder.run(number).path.resolve())

    return TrialTask(
        number=record.number,
        tree=trial_tree(study, record, slots),
        out=str(record.run.path.resolve()),
        address=sync.address(record.number),
        metric=study.plan.metric,
        same_as=None if record.same_as is None else place(record.same_as),
        seeds=study.plan.trial_seeds,
    )


def trial_tree(study: Study, record: TrialRecord, slots: Slots) -> dict[str, Any]:
    """Return a trial's complete config as a tree, with the threads it gets, such that it can also be run by itself."""
    config = study.spec(record).config
    tree = study.plan.tree_of(record.values) if config is None else to_tree(config)
    tree["resources"] |= {"threads": slots.threads, "stack_seeds": None}
    return tree


def _numbers(trial: Trial) -> list[int]:
    """Return the numbers of the study's trials that a Tune trial runs."""
    return [task.number for task in tasks_from_json(trial.config[TASKS])]


def _traceback(trial: Trial) -> str:
    """Return the traceback that Tune recorded when a trial crashed, without ANSI colors."""
    try:
        return Text.from_ansi(Path(trial.error_file).read_text(errors="replace")).plain
    except (OSError, TypeError):
        return ""


class _Callback(_Unsaved, ray_tune.Callback):
    """Tune's callback: delivers reports to the controller and its stop requests to the trials."""

    def __init__(
        self,
        controller: Controller,
        sync: StudySync,
        channel: Any,
        look: Callable[[Controller], None],
        control: _Control,
    ) -> None:
        self._controller, self._sync, self._channel = controller, sync, channel
        self._look, self._control = look, control
        self._collected = 0.0

    def on_trial_start(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:  # noqa: ARG002
        """Handle the start of a trial in its actor."""
        with self._control.watched():
            for number in _numbers(trial):
                if number in self._controller.running:
                    self._controller.started(number)

    def on_trial_result(
        self,
        iteration: int,  # noqa: ARG002
        trials: list[Trial],  # noqa: ARG002
        trial: Trial,  # noqa: ARG002
        result: dict[str, Any],
        **_: Any,
    ) -> None:
        """Handle a trial's report; stop requests are delivered before this returns, while the trial still waits."""
        with self._control.watched():
            report = from_json(result[REPORT])
            has_ended, number = not isinstance(report, Scored), report.number
            if number not in self._controller.running:  # it crashed after its outcome was recorded
                return
            self._sync.fetch(number, ended=has_ended)
            self._controller.receive(report)
            if has_ended:
                self._sync.send(number)
            self._pass_on()
            self._look(self._controller)

    def on_trial_recover(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:  # noqa: ARG002
        """Handle a crash after which Tune restarts the trial."""
        self._crashed(trial, again=True)

    def on_trial_error(self, iteration: int, trials: list[Trial], trial: Trial, **_: Any) -> None:  # noqa: ARG002
        """Handle a crash after which the trial is not restarted."""
        self._crashed(trial, again=False)

    def _crashed(self, trial: Trial, *, again: bool) -> None:
        error = _traceback(trial)
        with self._control.watched():
            for number in _numbers(trial):
                if (
                    len(_numbers(trial)) == 1 or number in self._controller.running
                ):  # some trials of a program may have ended
                    self._crashed_one(number, error, again=again)
            self._look(self._controller)

    def _crashed_one(self, number: int, error: str, *, again: bool) -> None:
        self._sync.fetch(number, ended=not again)
        self._controller.study.folder.write_error(number, error)
        if self._controller.slots.workers > 1:
            from tune.execution.ray_train import release_lost_group  # noqa: PLC0415  (slow to import)

            run = self._controller.study.folder.run(number).path
            release_lost_group(self._sync.address(number) or str(run.resolve()))
        if number in self._controller.running:  # it had not reported its end
            self._controller.crashed(number, error, again=again)
        if not again:
            self._sync.send(number)

    def on_step_end(self, iteration: int, trials: list[Trial], **_: Any) -> None:  # noqa: ARG002
        """Collect messages and check limits; Tune calls this several times a second."""
        self._control.checkpoint()
        now = time.monotonic()
        if now - self._collected < _COLLECT_EVERY:
            return
        self._collected = now
        with self._control.watched():
            self._collect()
            self._controller.tick()
            self._pass_on()
            self._look(self._controller)

    def _collect(self) -> None:
        heartbeats, notes = ray.get(self._channel.collect.remote())
        for number, (phase, step, total) in heartbeats.items():
            self._controller.heartbeat(number, phase, step, total)
        for number, text in notes:
            self._controller.noted(number, text)

    def _pass_on(self) -> None:
        requests = self._controller.take_stop_requests()
        if requests:
            ray.get(self._channel.request_stop.remote(list(requests)))
