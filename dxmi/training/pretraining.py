"""Pretraining, once for all runs that share its signature."""

from collections.abc import Mapping
from contextlib import ExitStack
from pathlib import Path
from shutil import rmtree

from torch import Tensor

from dxmi.algorithms.ddpm import DDPM
from dxmi.algorithms.distillation import Distillation
from dxmi.networks.base import Denoiser
from dxmi.persistence import checkpoint
from dxmi.persistence.cache import Entry, entry
from dxmi.tensors import require_finite_state
from dxmi.training.build import Experiment
from dxmi.training.fit import TrainingPhase
from dxmi.training.progress import Phase
from dxmi.training.reporter import MetricWindow, RunReporter, Stopwatch
from dxmi.training.state import TrainingState, newest_checkpoint

_PARTIAL_EVERY = 2_000
"""Iterations between checkpoints of pretraining."""


class Pretraining:
    """Provides the pretrained denoiser of a run: from the cache, or by training it while holding the cache lock.

    Args:
        experiment: the experiment of the run.
        reporter: the reporter of the run.
        clock: the stopwatch of the run.
    """

    def __init__(self, experiment: Experiment, reporter: RunReporter, clock: Stopwatch) -> None:
        self._experiment = experiment
        self._reporter = reporter
        self._clock = clock
        self._total = experiment.config.pretrain.iterations
        self._path = experiment.pretraining_path
        self._held = ExitStack()
        self._entry: Entry | None = None
        self._algorithm: DDPM | Distillation | None = None

    @property
    def _partial(self) -> Path:
        """The folder of checkpoints from which an interrupted pretraining resumes."""
        return self._path.with_suffix(".partial")

    def open(self) -> TrainingPhase | None:
        """Look up the denoiser in the cache; on a miss, take the lock and return the training phase."""
        denoiser = self._experiment.build_denoiser()
        if self._experiment.config.pretrain.weights is not None:
            self._reporter.note(self._experiment.check_public(denoiser), Phase.PRETRAIN, self._total)
        found = entry(self._path, self._experiment.workers, self._reporter.ask_again)
        self._entry = self._held.enter_context(found)
        shipped = self._experiment.shipped
        if shipped is not None:
            if self._entry.tensors is None:
                self._entry.write(dict(shipped.tensors))
            sentence = f"the pretrained model {shipped.name} ships with the package; --from-scratch trains it here."
            self._reporter.note([sentence], Phase.PRETRAIN, self._total, of_data=True)
        return self._phase() if self._entry.tensors is None else None

    def _phase(self) -> TrainingPhase:
        """The pretraining phase, from its newest checkpoint."""
        self._algorithm, state, start = self._resumed()
        window, total, log_every = MetricWindow(), self._total, self._experiment.config.train.log_every

        def after_iteration(step: int, metrics: Mapping[str, Tensor]) -> None:
            window.add(metrics)
            if step % log_every == 0 or step == total:
                self._reporter.tell(Phase.PRETRAIN, step, total, window.mean(step))
            if (step % _PARTIAL_EVERY == 0 or self._reporter.stop_requested) and step < total:
                self._experiment.workers.on_rank_zero(lambda: self._keep_only(step, state))
            if step < total:
                self._reporter.raise_if_stopped()

        def joined(_: int) -> None:
            self._clock.enter(Phase.PRETRAIN)

        return TrainingPhase(
            algorithm=self._algorithm,
            state=state,
            start=start,
            total=total,
            precision=self._experiment.precision,
            joined=joined,
            after_iteration=after_iteration,
            recorded=self._experiment.records(self._algorithm),
            began=lambda seconds: self._reporter.began(
                Phase.PRETRAIN, total, is_compiled=self._experiment.config.resources.compile, seconds=seconds
            ),
        )

    def _resumed(self) -> tuple[DDPM | Distillation, TrainingState, int]:
        """The pretraining algorithm, its state, and the next iteration."""
        algorithm, state = self._experiment.build_pretraining()
        found, _ = newest_checkpoint(self._partial, self._experiment.workers)
        if found is None:
            return algorithm, state, 0
        if state.restore(found):
            return algorithm, state, found.step
        # Other runs will share the result, so it must not depend on where pretraining was interrupted.
        sentence = f"{found.path} was saved on another kind of device: pretraining starts afresh."
        self._reporter.note([sentence], Phase.FINETUNE, self._experiment.config.train.iterations)
        return *self._experiment.build_pretraining(), 0

    def _keep_only(self, step: int, state: TrainingState) -> None:
        checkpoint.save(self._partial, step, state.groups(), {})
        checkpoint.prune(self._partial, {step})

    def finish(self) -> Denoiser:
        """Return the pretrained denoiser; if it was trained in this process, write it to the cache first.

        Raises:
            DivergedError: its weights are not finite.
        """
        assert self._entry is not None
        with self._held:
            if self._algorithm is not None:
                average = self._algorithm.average.state_dict()
                require_finite_state(average, "The pretrained model", self._total)
                self._entry.write(dict(average))
            assert self._entry.tensors is not None
            denoiser = self._experiment.build_denoiser()
            denoiser.load_state_dict(self._entry.tensors)
        if self._experiment.workers.is_rank_zero:
            rmtree(self._partial, ignore_errors=True)
        self._reporter.tell_or_stop(Phase.PRETRAIN, self._total, self._total)
        return denoiser

    def close(self) -> None:
        """Release the cache lock, if it is held."""
        self._held.close()
