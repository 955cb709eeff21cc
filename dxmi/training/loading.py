"""Loading a finished or interrupted run, to draw samples from it or to score it again."""

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
from dxmi.training.config import ResourcesConfig
from dxmi.training.schema import StoredConfig, upgrade_tensors
from dxmi.training.state import ALGORITHM

_SHOWN = 20
"""Maximum number of classes that a message lists."""


@dataclass(frozen=True)
class LoadedRun:
    """A trained policy and the algorithm that it belongs to.

    Attributes:
        experiment: experiment of the run, built from its config.
        algorithm: the algorithm with the networks of the checkpoint.
        step: the iteration after which the checkpoint was saved.
        complaints: a message about each damaged checkpoint that was skipped.
        data: signature of the training data; empty if it is unknown.
    """

    experiment: Experiment
    algorithm: PolicyAlgorithm
    step: int
    complaints: list[str]
    data: str = ""

    def states(self, num: int, seed: int | None, guidance: float | None, label: int | None = None) -> Tensor:
        """Draw samples and return all of their states, starting with the noise: [T+1, num, *event].

        The states have the format in which a data set stores samples.

        Args:
            num: number of samples.
            seed: seed of the noise; None for the run's evaluation seed.
            guidance: scale of the guidance by the value; None for the run's setting.
            label: class of all samples; None to draw classes with the frequencies of the data.

        Raises:
            UserError: the policy was not trained on that class.
        """
        if label is not None:
            self._draw_only(label)
        return generate_states(self._sampling("sample", guidance), num, self._config(seed))

    def scores(
        self,
        num_samples: int | None,
        seed: int | None,
        guidance: float | None,
        stream: str = REPORT,
        *,
        on_batch: Callable[[int], None] | None = None,
        on_step: Callable[[], None] | None = None,
    ) -> Scores:
        """Compute all scores, by default on the same noise as in the report of the run.

        Args:
            num_samples: number of samples; None for the run's setting.
            seed: seed of the noise; None for the run's evaluation seed.
            guidance: scale of the guidance by the value; None for the run's setting.
            stream: kind of noise, see `stream_of`.
            on_batch: see `Sampling`.
            on_step: see `Sampling`.
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
        """Check that the data are those of the run, since other data would give scores that differ from its summary."""
        now = self.experiment.data.signature
        if self.data not in ("", now):
            raise UserError(
                f"This run was trained on other data (signature {self.data}) than the current data (signature {now}): "
                "restore the data files."
            )

    def _draw_only(self, label: int) -> None:
        counts = self.experiment.class_counts
        if counts is None:
            raise UserError(f"The label is {label}, but the network of this run has no classes: leave out the label.")
        if not 0 <= label < len(counts) or counts[label] == 0:
            trained = counts.nonzero()[:, 0].tolist()
            shown = ", ".join(str(number) for number in trained[:_SHOWN]) + ", ..." * (len(trained) > _SHOWN)
            raise UserError(
                f"The label is {label}, but the data of this run have no samples of it: choose one of {shown}."
            )
        self.algorithm.eval_policy.draw_classes(counts.where(torch.arange(len(counts)) == label, 0))

    def _config(self, seed: int | None, num_samples: int | None = None) -> EvaluateConfig:
        """The run's evaluation config, with the arguments that are not None."""
        given = {"seed": seed, "num_samples": num_samples}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        try:
            return replace(self.experiment.config.evaluate, **changes)
        except ValueError as error:
            raise UserError(f"{error}.") from error

    def _sampling(self, stream: str, guidance: float | None) -> Sampling:
        scale = self.algorithm.guidance if guidance is None else guidance
        if scale != 0.0 and self.algorithm.guide is None:
            raise UserError(f"The guidance is {scale:g}, but this run has trained no value: leave out the guidance.")
        own = self.algorithm
        precision = self.experiment.config.evaluate.precision
        return Sampling(
            own.eval_policy, stream, own.guide, scale, step=self.step, reference=own.reference, precision=precision
        )


def load_run(
    run: RunDirectory, stored: StoredConfig, which: str, resources: ResourcesConfig | None = None
) -> LoadedRun:
    """Load the `best` or the `last` checkpoint of a run. Its reward is built only when it is needed.

    Args:
        run: folder of the run.
        stored: config of the run, of the present or an earlier schema.
        which: `best` or `last`.
        resources: resources with which it is loaded, without changing the number of threads; by default those of the
            run, which then apply to this process.

    Raises:
        UserError: the run has no intact checkpoint, or its config was edited.
        DivergedError: the weights are not finite.
    """
    found, complaints = _find(run, which)
    if found is None:
        raise UserError(" ".join([*complaints, f"{run.path} has no usable checkpoint."]))
    config = stored.config
    require_signature(found, stored.signature)
    found = replace(found, groups={ALGORITHM: upgrade_tensors(found.groups[ALGORITHM], stored.schema)})
    require_finite_state(found.groups[ALGORITHM], f"Checkpoint {found.path}", found.step)
    # If the class counts were not recorded, they have to be computed from the data.
    recorded = "class_counts" in found.meta or config.network.denoiser.classes == 0
    event = tuple(found.meta["event"]) if recorded else None
    config = config if resources is None else replace(config, resources=resources)
    experiment = Experiment(config, event=event, class_counts=found.meta.get("class_counts"), postpones_reward=True)
    if resources is None:
        experiment.use_threads()
        experiment.choose_kernels()
    algorithm = experiment.build_algorithm(experiment.build_denoiser())
    if not any(name.startswith("reference.") for name in found.groups[ALGORITHM]):
        algorithm.reference = None  # the run did not keep its pretrained policy, as with version 0.2
    checkpoint.restore(algorithm, found, ALGORITHM)
    algorithm.requires_grad_(False)
    return LoadedRun(experiment, algorithm, found.step, complaints, str(found.meta.get("data", "")))


def _find(run: RunDirectory, which: str) -> tuple[Checkpoint | None, list[str]]:
    """The requested checkpoint, or the newest intact one if the former is damaged."""
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
