"""A finished or interrupted run, loaded to be sampled from or scored again."""

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from dxmi.algorithms.base import PolicyAlgorithm
from dxmi.errors import UserError
from dxmi.evaluation.config import REPORT, EvaluateConfig
from dxmi.evaluation.sampling import Sampling, generate_states, stream_of
from dxmi.evaluation.scorers import Scores
from dxmi.persistence import checkpoint
from dxmi.persistence.checkpoint import Checkpoint
from dxmi.persistence.run_directory import RunDirectory
from dxmi.tensors import require_finite_state
from dxmi.training.build import Experiment, require_signature
from dxmi.training.config import ExperimentConfig
from dxmi.training.state import ALGORITHM

_SHOWN = 20
"""Classes that a sentence names."""


@dataclass(frozen=True)
class Trained:
    """A policy with its value.

    Attributes:
        experiment: the config and what it builds.
        algorithm: networks as they were saved.
        step: the iteration after which they were.
        complaints: a sentence about each damaged checkpoint that was passed over.
        data: signature of the data that they were trained on; empty if that is unknown.
    """

    experiment: Experiment
    algorithm: PolicyAlgorithm
    step: int
    complaints: list[str]
    data: str = ""

    def states(self, num: int, seed: int | None, guidance: float, label: int | None = None) -> Tensor:
        """Samples with the way to them, as a data set stores them: [T+1, num, *event], noise first.

        Args:
            num: how many.
            seed: of the noise; None for the run's evaluation seed.
            guidance: strength of the value's guidance.
            label: the class of all; None for classes as often as in the data.

        Raises:
            UserError: the policy was never trained on that class.
        """
        if label is not None:
            self._draw_only(label)
        return generate_states(self._sampling("sample", guidance), num, self._config(seed))

    def scores(
        self,
        num_samples: int | None,
        seed: int | None,
        guidance: float,
        stream: str = REPORT,
        *,
        on_batch: Callable[[int], None] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Scores:
        """Every score, on the first draw of the noise of the run's own report unless `seed` or `stream` differs.

        `on_batch` and `on_step` are called as samples are drawn, as those of `Sampling`.
        """
        config = self._config(seed, num_samples)
        self._require_own_data()
        scorer = self.experiment.build_scorer(config)
        energy = self.algorithm.energy if self.experiment.config.train.iterations else None
        own = stream_of(stream, self.experiment.config.seed)
        return scorer.full_evaluation(
            replace(self._sampling(own, guidance), on_batch=on_batch, on_step=on_step), energy
        )

    def _require_own_data(self) -> None:
        """Scores against other data than those of the run would say something else than its summary."""
        now = self.experiment.data.signature
        if self.data not in ("", now):
            raise UserError(
                f"This run was trained on other data (signature {self.data}) than are there now ({now}): restore the "
                "data files."
            )

    def _draw_only(self, label: int) -> None:
        counts = self.experiment.class_counts
        if counts is None:
            raise UserError(
                f"The label asked for is {label}, but the network of this run knows no classes: leave it out."
            )
        if not 0 <= label < len(counts) or counts[label] == 0:
            trained = counts.nonzero()[:, 0].tolist()
            shown = ", ".join(str(number) for number in trained[:_SHOWN]) + ", ..." * (len(trained) > _SHOWN)
            raise UserError(f"The label asked for is {label}, of which the run's data has no sample: it has {shown}.")
        self.algorithm.eval_policy.draw_classes(counts.where(torch.arange(len(counts)) == label, 0))

    def _config(self, seed: int | None, num_samples: int | None = None) -> EvaluateConfig:
        """The run's evaluation with what is not None put in its place."""
        given = {"seed": seed, "num_samples": num_samples}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        try:
            return replace(self.experiment.config.evaluate, **changes)
        except ValueError as error:
            raise UserError(f"{error}.") from error

    def _sampling(self, stream: str, guidance: float) -> Sampling:
        return Sampling(self.algorithm.eval_policy, stream, self.algorithm.guide, guidance, step=self.step)


def load_trained(run: RunDirectory, config: ExperimentConfig, which: str) -> Trained:
    """The `best` or `last` checkpoint of a run.

    Raises:
        UserError: the run has no checkpoint that is whole, or its config was edited.
        DivergedError: its weights are not finite.
    """
    found, complaints = _find(run, which)
    if found is None:
        raise UserError(" ".join([*complaints, f"{run.path} has no checkpoint that can be used."]))
    require_signature(found, config)
    require_finite_state(found.groups[ALGORITHM], f"Checkpoint {found.path}", found.step)
    # A run that did not record how many samples there are of each class needs its data for that.
    recorded = "class_counts" in found.meta or config.network.denoiser.classes == 0
    event = tuple(found.meta["event"]) if recorded else None
    experiment = Experiment(config, event=event, class_counts=found.meta.get("class_counts"))
    experiment.use_threads()
    experiment.choose_kernels()
    algorithm = experiment.build_algorithm(experiment.build_denoiser())
    checkpoint.restore(algorithm, found, ALGORITHM)
    algorithm.requires_grad_(False)
    return Trained(experiment, algorithm, found.step, complaints, str(found.meta.get("data", "")))


def _find(run: RunDirectory, which: str) -> tuple[Checkpoint | None, list[str]]:
    """The checkpoint asked for, or the newest whole one if it is damaged."""
    newest, complaints = checkpoint.newest(run.checkpoints)
    if newest is None or which == "last":
        return newest, complaints
    best: dict[str, Any] | None = newest.meta["best"]
    if best is None or best["step"] == newest.step:
        return newest, complaints
    try:
        return checkpoint.load(checkpoint.path_of(run.checkpoints, best["step"])), complaints
    except checkpoint.DamagedCheckpointError as error:
        return newest, [*complaints, f"{error} Using step {newest.step} instead."]
