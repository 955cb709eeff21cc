"""Scores and pictures of the training-free samplers, cached for all runs with the same model and evaluation."""

import functools
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dxmi.config import SCORES, block_delta, delta, signature
from dxmi.diffusion.policy import Policy
from dxmi.evaluation.config import PICTURES, REPORT, SCORING_VERSION
from dxmi.evaluation.references import Reference, references
from dxmi.evaluation.sampling import Sampling, preview, stream_of
from dxmi.evaluation.scored_references import DATA, ScoredReference, pictured
from dxmi.evaluation.scorers import Scorer, Scores
from dxmi.networks.base import Denoiser
from dxmi.persistence.cache import cache_root, cached
from dxmi.persistence.run_directory import RunDirectory
from dxmi.seeds import generator
from dxmi.training.build import Experiment
from dxmi.training.config import SCHEMA, ExperimentConfig
from dxmi.training.progress import Phase
from dxmi.training.reporter import RunReporter
from dxmi.visualization.visualizers import Visualizer


def primary_scores(metric: str, scores: Mapping[str, Scores]) -> dict[str, float]:
    """The primary score of each sampler that has one: training-free samplers have no scores of an energy."""
    return {key: scored.values[metric] for key, scored in scores.items() if metric in scored.values}


def references_of(config: ExperimentConfig) -> list[Reference]:
    """The training-free samplers that the policy of a run with this config is compared with."""
    evaluate = config.evaluate
    return references(
        config.schedule,
        full_steps=evaluate.full_evaluations,
        steps=evaluate.reference_steps or (),
        are_images=not config.data.is_planar,
        is_student=config.pretrain.teacher is not None,
    )


class References:
    """The training-free samplers that the policy of a run is compared with.

    Args:
        experiment: the experiment of the run.
        scorer: the scorer of the run.
        reporter: the reporter of the run.

    Attributes:
        compared: the samplers.
    """

    def __init__(self, experiment: Experiment, scorer: Scorer, reporter: RunReporter) -> None:
        self._experiment = experiment
        self._config = experiment.config
        self._scorer = scorer
        self._reporter = reporter
        self.compared: list[Reference] = references_of(experiment.config)

    def scores(self, denoiser: Denoiser) -> dict[str, Scores]:
        """The scores of each sampler and, if further data can be drawn, of the data itself, by key."""
        num_samples, done, scores = self._config.evaluate.num_samples, 0, {}
        total = sum(num_samples * reference.evaluations for reference in self.compared)
        self._reporter.tell_or_stop(Phase.REFERENCES, done, total)
        for reference in self.compared:
            scores[reference.key] = self._scores_of(reference, denoiser, done, total)
            done += num_samples * reference.evaluations
            self._reporter.tell_or_stop(Phase.REFERENCES, done, total)
        floor = self._scorer.of_data(stream_of(REPORT, self._config.seed))
        return scores if floor is None else {**scores, DATA: floor}

    def _scores_of(self, reference: Reference, denoiser: Denoiser, done: int, total: int) -> Scores:
        """The scores of one sampler; `done` of `total` network evaluations precede it."""

        def on_batch(samples: int) -> None:
            self._reporter.tell_or_stop(Phase.REFERENCES, done + samples * reference.evaluations, total)

        def compute() -> dict[str, Tensor]:
            policy = self._experiment.build_policy(denoiser, reference.schedule, reference.policy)
            stream, listen = stream_of(REPORT, self._config.seed), self._reporter.listen
            scores = self._scorer.full_evaluation(
                Sampling(
                    policy,
                    stream,
                    on_batch=on_batch,
                    on_step=listen,
                    source=reference.label,
                    precision=self._config.evaluate.precision,
                )
            )
            numbers = {**scores.values, "seconds_per_1000": scores.seconds_per_1000}
            return {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}

        found = cached(self.path(reference), compute, self._experiment.workers, self._reporter.ask_again)
        numbers = {key: float(value) for key, value in sorted(found.items())}
        seconds = numbers.pop("seconds_per_1000")
        return Scores(numbers, seconds)

    def path(self, reference: Reference, **more: Any) -> Path:
        """The path of the cached scores of a sampler, or of its cached samples if `more` is given."""
        reward = self._config.reward
        identity = {
            "schema": SCHEMA,
            "version": SCORING_VERSION,
            "pretraining": self._experiment.pretraining_signature,
            "schedule": reference.schedule.tree(),
            "evaluate": delta(self._config.evaluate, SCORES),
            "reward": None if reward is None else block_delta(reward, SCORES),
            "features": self._scorer.identity,
            "stream": stream_of(REPORT, self._config.seed),
            "device": self._experiment.device.type,
            **self._conditions_and_files(),
            **({} if reference.policy is Policy else {"sampler": reference.policy.__name__}),
            **more,
        }
        return cache_root() / "references" / f"{signature(identity)}.cached"

    def _conditions_and_files(self) -> dict[str, Any]:
        """What the scores of a run with prompts, or with a reward that reads files, depend on as well."""
        found: dict[str, Any] = {}
        if self._config.prompts.are_given:
            prompts, classes = self._experiment.prompts, self._config.network.denoiser.classes
            found["prompts"] = [prompts.counts(classes).tolist(), sorted(prompts.held_out_labels)]
        files = self._experiment.reward_signature
        return found if files is None else {**found, "reward_files": files}

    # ------------------------------------------------------------------------
    # Pictures.

    def draw(self, run: RunDirectory, visualizer: Visualizer, denoiser: Denoiser, scores: Mapping[str, Scores]) -> None:
        """Draw the data, and samples of references on the same noise as those of the policy."""
        found = primary_scores(self._scorer.metric, scores)
        scored = [reference.scored(found[reference.key]) for reference in self.compared if reference.key in found]
        for name, samples in {"data": self._some_data(), **self._previews(denoiser, scored)}.items():
            draw = functools.partial(visualizer.draw_samples, run.reference_picture(name), samples)
            self._experiment.workers.on_rank_zero(draw)

    def _previews(self, denoiser: Denoiser, scored: Sequence[ScoredReference]) -> dict[str, Tensor]:
        """Samples by the name of their picture, see `RunDirectory.reference_picture`."""
        by_key = {reference.key: reference for reference in self.compared}
        chosen = pictured(scored, self._config.schedule.num_steps, self._scorer.direction)
        return {name: self._preview(by_key[one.key], denoiser) for name, one in chosen.items()}

    def _some_data(self) -> Tensor:
        """Data for one grid, the same in every run with this evaluation seed."""
        data, evaluate = self._experiment.data, self._config.evaluate
        rows = torch.randperm(len(data), generator=generator(evaluate.seed, "picture of the data"))
        return data.stored[rows[: evaluate.grid].sort().values]

    def _preview(self, reference: Reference, denoiser: Denoiser) -> Tensor:
        """Samples of a reference for one grid, computed once for all runs that share the pretrained model."""
        evaluate = self._config.evaluate

        def compute() -> dict[str, Tensor]:
            policy = self._experiment.build_policy(denoiser, reference.schedule, reference.policy)
            sampling = Sampling(policy, PICTURES, on_step=self._reporter.listen, source=reference.label)
            return {"samples": preview(sampling, evaluate.grid, evaluate)}

        path = self.path(reference, grid=evaluate.grid)
        return cached(path, compute, self._experiment.workers, self._reporter.ask_again)["samples"]
