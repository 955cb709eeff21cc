"""A finished or interrupted run, loaded to be sampled from or scored again."""

from dataclasses import dataclass, replace
from typing import Any

from torch import Tensor
from tqdm import tqdm

from dxmi import checkpoint
from dxmi.algorithms.dxmi import DxMI
from dxmi.cache import cache_root
from dxmi.checkpoint import Checkpoint
from dxmi.errors import UserError
from dxmi.evaluate import REPORT, EvaluateConfig, Sampling, generate_states, stream_of
from dxmi.experiment import Experiment, ExperimentConfig, require_signature
from dxmi.run_directory import RunDirectory
from dxmi.scorers import Scores, build_scorer
from dxmi.state import ALGORITHM

CHECKPOINTS = ("best", "last")


@dataclass(frozen=True)
class Trained:
    """A policy with its value.

    Attributes:
        experiment: the config and what it builds.
        dxmi: networks as they were saved.
        step: the iteration after which they were.
        complaints: a sentence about each damaged checkpoint that was passed over.
    """

    experiment: Experiment
    dxmi: DxMI
    step: int
    complaints: list[str]

    def states(self, num: int, seed: int | None, guidance: float) -> Tensor:
        """Samples with the way to them, as a data set stores them: [T+1, num, *event], noise first."""
        return generate_states(self._sampling("sample", guidance), num, self._config(seed))

    def scores(self, num_samples: int | None, seed: int | None, guidance: float, stream: str = REPORT) -> Scores:
        """Every score, on the first draw of the noise of the run's own report unless `seed` or `stream` differs."""
        config = self._config(seed, num_samples)
        scorer = build_scorer(self.experiment.data, config, cache_root(), self.experiment.device)
        energy = self.dxmi.value.energy if self.experiment.config.train.iterations else None
        with tqdm(total=config.num_samples, unit="samples", desc="sampling", leave=False, disable=None) as bar:

            def on_batch(samples: int) -> None:
                bar.update(samples - bar.n)

            own = stream_of(stream, self.experiment.config.seed)
            return scorer.full(replace(self._sampling(own, guidance), on_batch=on_batch), energy)

    def _config(self, seed: int | None, num_samples: int | None = None) -> EvaluateConfig:
        """The run's evaluation with what is not None put in its place."""
        given = {"seed": seed, "num_samples": num_samples}
        changes: dict[str, Any] = {key: value for key, value in given.items() if value is not None}
        try:
            return replace(self.experiment.config.evaluate, **changes)
        except ValueError as error:
            raise UserError(f"{error}.") from error

    def _sampling(self, stream: str, guidance: float) -> Sampling:
        return Sampling(self.dxmi.evaluated, stream, self.dxmi.value.gradient, guidance)


def load_trained(run: RunDirectory, config: ExperimentConfig, which: str) -> Trained:
    """The `best` or `last` checkpoint of a run.

    Raises:
        UserError: the run has no checkpoint that is whole, or its config was edited.
    """
    found, complaints = _find(run, which)
    if found is None:
        raise UserError(" ".join([*complaints, f"{run.path} has no checkpoint that can be used."]))
    require_signature(found, config)
    experiment = Experiment(config, event=tuple(found.meta["event"]))
    experiment.use_threads()
    dxmi = experiment.build_dxmi(experiment.build_denoiser())
    dxmi.load_state_dict(found.groups[ALGORITHM])
    dxmi.requires_grad_(False)
    return Trained(experiment, dxmi, found.step, complaints)


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
