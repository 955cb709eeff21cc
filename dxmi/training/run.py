"""A run: pretrain once, score the references once, fine-tune, evaluate, checkpoint, report.

A run is a pure function of its config: if it is killed at any moment and resumed, its result is bitwise that of an
uninterrupted run. For this, the iterations of logged rows and evaluations are determined by the config only.
"""

from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import asdict, dataclass, replace
from functools import partial
from pathlib import Path
from shutil import copytree
from typing import Any

import torch
from torch import Tensor

from dxmi.config import RESULT, differences, identity_tree
from dxmi.critics.energy import Energy
from dxmi.errors import UserError
from dxmi.evaluation.config import PICTURES, REPORT, SCORING_VERSION, SELECTION
from dxmi.evaluation.sampling import Sampling, generate, generate_states, stream_of
from dxmi.evaluation.scored_references import DATA, data_label, highlights, scored_references
from dxmi.evaluation.scorers import Scores
from dxmi.metrics.keys import KL_KEY, is_better, mean_scores, sign_of
from dxmi.networks.base import Denoiser
from dxmi.persistence import checkpoint
from dxmi.persistence.checkpoint import Checkpoint, DamagedCheckpointError
from dxmi.persistence.provenance import device_name, git_revision, versions
from dxmi.persistence.run_directory import Row, RunDirectory
from dxmi.training.build import PRETRAINING_VERSION, Experiment, require_signature
from dxmi.training.fit import TrainingPhase, fit
from dxmi.training.memory import evaluation_too_large, in_smaller_pieces, iteration_too_large, release_memory
from dxmi.training.pretraining import Pretraining
from dxmi.training.progress import Phase, Progress, Reporter, StopRequestedError
from dxmi.training.references import References, primary_scores
from dxmi.training.reporter import MetricWindow, RunReporter, Stopwatch
from dxmi.training.schema import config_tree, read_config
from dxmi.training.state import ALGORITHM, newest_checkpoint
from dxmi.training.summary import Summary, read_summary
from dxmi.visualization.divergence import divergence_figure
from dxmi.visualization.pictures import curves_figure, save_figure
from dxmi.visualization.visualizers import build_visualizer

_NUMERICS = [PRETRAINING_VERSION, SCORING_VERSION]
"""Versions of the computations, which are not part of a config's signature; recorded in checkpoints."""
_NO_KERNEL = ("does not have a deterministic implementation", "it uses CuBLAS")
"""Parts of PyTorch's error messages about a nondeterministic kernel if only deterministic ones are allowed."""
_OTHER_DEVICE = (
    "{path} was saved on another kind of device, whose random numbers cannot be continued here: the run continues with "
    "others, so its result will differ from that of an uninterrupted run on either device."
)

Saved = Callable[[int], None]
"""Called by every worker with the iteration of a checkpoint when the checkpoint is complete."""


@dataclass(frozen=True)
class SeedRun:
    """One of several runs that differ only in their seeds.

    Attributes:
        experiment: the experiment to run; several runs require one process and no micro-batches.
        out: see `train`.
        report: see `train`.
        saved: see `train`.
        resume_from: see `train`.
    """

    experiment: Experiment
    out: Path
    report: Reporter | None = None
    saved: Saved | None = None
    resume_from: Path | None = None


Result = Summary | Exception | None
"""The return value of `train`, or the exception that it would raise."""


def train(
    experiment: Experiment,
    *,
    out: Path,
    report: Reporter | None = None,
    saved: Saved | None = None,
    resume_from: Path | None = None,
) -> Summary | None:
    """Run an experiment from pretraining to its summary.

    If there are several workers, all of them call this function, and rank 0 writes the files.

    Args:
        experiment: the experiment to run.
        out: folder of the run; if it holds an unfinished run with the same config, that run is resumed.
        report: called at every logged step and evaluation; may request a stop.
        saved: called at every checkpoint of the fine-tuning.
        resume_from: folder of another run to resume, which is copied to `out` and not changed.

    Returns:
        The summary, or None if `report` requested a stop.

    Raises:
        UserError: `out` holds another run, was begun with other data, or cannot be written.
        DivergedError: a metric is not finite.
    """
    (result,) = train_stacked([SeedRun(experiment, out, report, saved, resume_from)])
    if isinstance(result, Exception):
        raise result
    return result


def train_stacked(members: Sequence[SeedRun], ended: Callable[[int, Result], None] | None = None) -> list[Result]:
    """Run several seeds of one experiment as one program, which changes each run only by rounding.

    If an iteration of a single run does not fit in the memory of the device, the run continues once from its last
    checkpoint with twice as many micro-batches.

    Args:
        members: runs that differ only in their seeds, folders and callbacks.
        ended: called with the index in `members` and the result of a run as soon as it ends; the others continue.

    Returns:
        The results, in the order of `members`.

    Raises:
        UserError: an iteration does not fit in the memory of the device.
    """
    try:
        return _train_together(members, ended)
    except torch.OutOfMemoryError as error:
        first = members[0]
        smaller = in_smaller_pieces(first.experiment) if len(members) == 1 else None
        if smaller is None:
            raise iteration_too_large(first.experiment, len(members)) from error
    release_memory()  # outside of the handler, whose exception refers to the tensors of the iteration
    if first.report is not None:
        first.report(Progress(Phase.FINETUNE, 0, smaller.config.train.iterations, note=_smaller_pieces_note(smaller)))
    try:
        return _train_together([replace(first, experiment=smaller, resume_from=None)], ended)
    except torch.OutOfMemoryError as error:
        raise iteration_too_large(smaller, 1) from error


def _smaller_pieces_note(experiment: Experiment) -> str:
    return (
        "an iteration did not fit in the memory of the device: the run continues from its last checkpoint with "
        f"resources.accumulate={experiment.config.resources.accumulate}, which changes its result by rounding."
    )


def _train_together(members: Sequence[SeedRun], ended: Callable[[int, Result], None] | None) -> list[Result]:
    """Run several seeds as one program, see `train_stacked`; the error of an iteration propagates."""
    runs = [Run(member, partial(ended, number) if ended else None) for number, member in enumerate(members)]
    # In the order of seeds: programs that take the locks of two pretrainings in different orders would deadlock.
    in_order = sorted(runs, key=lambda run: run.config.seed)
    try:
        _each(in_order, Run.begin)
        for wave in _waves(in_order):
            _fit(wave, Run.open_pretraining)
            _each(wave, Run.finish_pretraining)
        _each(in_order, Run.score_references)
        _fit(in_order, Run.open_finetuning)
        _each(in_order, Run.finish)
    finally:
        for run in runs:  # also if a KeyboardInterrupt ends all of them
            run.close()
    return [run.result for run in runs]


def _waves(runs: Sequence["Run"]) -> list[list["Run"]]:
    """Divide runs into groups that can be pretrained together: no two of a group need the same pretrained model.

    The first group trains the models, and the others find them in the cache.
    """
    waves: list[dict[Path | None, Run]] = []
    for run in runs:
        path = run.attempt(partial(getattr, run.experiment, "pretraining_path"))
        wave = next((wave for wave in waves if path not in wave), None)
        if wave is None:
            waves.append(wave := {})
        wave[path] = run
    return [list(wave.values()) for wave in waves]


def _each(runs: Sequence["Run"], step: Callable[["Run"], Any]) -> list[Any]:
    """Execute a step of every run that has not ended; an exception ends only that run."""
    return [run.attempt(partial(step, run)) for run in runs]


def _fit(runs: Sequence["Run"], open_phase: Callable[["Run"], TrainingPhase | None]) -> None:
    """Train the runs that have iterations to compute, as one program."""
    phases = dict(zip(runs, _each(runs, open_phase), strict=True))
    waiting = {run: run.ending_with(phase) for run, phase in phases.items() if phase is not None}
    fit(list(waiting.values()))
    for run in waiting:
        run.clock.enter(None)


class Run:
    """One run, from its config to its summary.

    Args:
        member: experiment, folder and callbacks of the run.
        ended: called with the result.

    Attributes:
        result: the result, once the run has ended.
    """

    def __init__(self, member: SeedRun, ended: Callable[[Result], None] | None = None) -> None:
        self.experiment = member.experiment
        self.config = member.experiment.config
        self.workers = member.experiment.workers
        self.directory = RunDirectory(member.out)
        self.reporter = RunReporter(member.report, self.workers)
        self.clock = Stopwatch()
        self.result: Result = None
        self._member = member
        self._ended = ended
        self._has_ended = False
        self._saved = member.saved or (lambda _: None)
        self._held = ExitStack()
        self._best: dict[str, Any] | None = None
        self._score_before: float | None = None  # of the constraint's score
        self._generations: list[dict[str, float]] = []
        self._members = 1
        self._devices = [device_name(self.experiment.device)]

    # ------------------------------------------------------------------------
    # The end of a run.

    def attempt(self, step: Callable[[], Any]) -> Any:
        """Execute a step of this run and return its value; None if the run has ended, in this step or before."""
        if self._has_ended:
            return None
        try:
            return step()
        except Exception as error:  # noqa: BLE001  (it is this run's result)
            self.end(error)
            return None
        finally:
            self.clock.enter(None)

    def end(self, result: Result) -> None:
        """End the run with a summary or an exception; after a requested stop the result is None."""
        if isinstance(result, StopRequestedError):
            result = None
        elif isinstance(result, torch.OutOfMemoryError):
            result = evaluation_too_large(self.experiment)
        elif isinstance(result, RuntimeError) and any(words in str(result) for words in _NO_KERNEL):
            kernel = str(result).partition(",")[0]
            result = UserError(f"resources.deterministic is true, but {kernel}: make it false.")
        self._has_ended, self.result = True, result
        self.close()
        if self._ended is not None:
            self._ended(result)

    def ending_with(self, phase: TrainingPhase) -> TrainingPhase:
        """A phase that ends this run as soon as one of its iterations raises an exception."""

        def after_iteration(step: int, metrics: Mapping[str, Tensor]) -> None:
            try:
                phase.after_iteration(step, metrics)
            except Exception as error:
                self.end(error)
                raise

        return replace(phase, after_iteration=after_iteration)

    def close(self) -> None:
        """Release the locks that the run holds."""
        self._held.close()

    # ------------------------------------------------------------------------
    # The beginning of a run.

    def begin(self) -> None:
        """Lock the folder and build the scorer, or end the run if the folder already holds its summary.

        Raises:
            UserError: the folder holds another run, is in use, or cannot be written, or the reward does not fit the
                data.
        """
        self.workers.on_rank_zero(self._refuse_other_run)
        if self._end_if_finished(says_changes=True):
            return
        self.experiment.choose_kernels()
        self.experiment.check()
        self.scorer = self.experiment.build_scorer()
        self.workers.on_rank_zero(self._take_folder)
        if self._end_if_finished():  # another process finished the run before this one took the lock
            return
        self.visualizer = build_visualizer(self.config.data.kind)
        self._threads = self.experiment.use_threads()
        self._note(self.experiment.data.notes, of_data=True)

    def _refuse_other_run(self) -> None:
        source, out = self._member.resume_from, self.directory.path
        if source is not None and source.resolve() != out.resolve():
            copytree(source, out, dirs_exist_ok=False)
        refuse_other_run(self.directory, self.experiment)

    def _end_if_finished(self, *, says_changes: bool = False) -> bool:
        """End the run if the folder holds its summary; returns whether it does."""
        finished = self.workers.on_rank_zero(self.directory.read_summary)
        if finished is None:
            return False
        summary = read_summary(self.directory, finished)
        if says_changes and self.workers.is_rank_zero and self._member.report is not None:
            for sentence in changed_inputs(self.directory, finished, self.experiment):
                text = f"{sentence} Choose another out to train on the present ones."
                self._member.report(Progress(Phase.REPORT, 2, 2, note=text))
        self.end(summary)
        return True

    def _take_folder(self) -> None:
        self.directory.create()
        self._held.enter_context(self.directory.lock())
        self.directory.write_config(config_tree(self.config))

    def _note(self, sentences: Sequence[str], *, of_data: bool = False) -> None:
        phase = Phase.PRETRAIN if of_data else Phase.FINETUNE
        total = self.config.pretrain.iterations if of_data else self.config.train.iterations
        self.reporter.note(sentences, phase, total, of_data=of_data)

    # ------------------------------------------------------------------------
    # Pretraining and references.

    def open_pretraining(self) -> TrainingPhase | None:
        """The training phase of pretraining; None if the cache holds its result."""
        self.clock.enter(Phase.PRETRAIN)
        self._pretraining = Pretraining(self.experiment, self.reporter, self.clock)
        self._held.callback(self._pretraining.close)
        return self._pretraining.open()

    def finish_pretraining(self) -> None:
        """Store the pretrained denoiser for the following steps."""
        self.clock.enter(Phase.PRETRAIN)
        self._denoiser: Denoiser = self._pretraining.finish()

    def score_references(self) -> None:
        """Score and draw the training-free samplers."""
        self.clock.enter(Phase.REFERENCES)
        self._references = References(self.experiment, self.scorer, self.reporter)
        self._reference_scores = self._references.scores(self._denoiser)
        self._references.draw(self.directory, self.visualizer, self._denoiser, self._reference_scores)

    # ------------------------------------------------------------------------
    # Fine-tuning.

    def open_finetuning(self) -> TrainingPhase:
        """The training phase of fine-tuning, from the newest checkpoint."""
        self.clock.enter(Phase.FINETUNE)
        self._algorithm, self._state = self.experiment.build_finetuning(self._denoiser)
        start, total, window = self._resume(), self.config.train.iterations, MetricWindow()

        def after_iteration(step: int, metrics: Mapping[str, Tensor]) -> None:
            window.add(metrics)
            is_evaluated = self._is_evaluated(step)
            if not is_evaluated and step % self.config.train.log_every != 0:
                return
            means = window.mean(step)
            self.workers.on_rank_zero(lambda: self.directory.append([{"step": step, **means}]))
            self.reporter.tell(Phase.FINETUNE, step, total, means)
            if is_evaluated:
                self._evaluate_and_save(step)
            elif self.reporter.stop_requested:
                self._save(step, None)
            if step < total:
                self.reporter.raise_if_stopped()

        return TrainingPhase(
            algorithm=self._algorithm,
            state=self._state,
            start=start,
            total=total,
            precision=self.experiment.precision,
            joined=self._joined,
            after_iteration=after_iteration,
            recorded=self.experiment.records(self._algorithm),
            began=lambda seconds: self.reporter.began(
                Phase.FINETUNE, total, is_compiled=self.config.resources.compile, seconds=seconds
            ),
        )

    def _joined(self, members: int) -> None:
        """Record that one program trains this run together with others, `members` in total."""
        self.clock.enter(Phase.FINETUNE)
        self._members = max(self._members, members)

    def _resume(self) -> int:
        """Restore the newest intact checkpoint and return its iteration; start from iteration 0 if there is none."""
        found, complaints = newest_checkpoint(self.directory.checkpoints, self.workers)
        self._note(complaints)
        if found is None:
            return self._start()
        self._check_origin(found)
        if not self._state.restore(found):
            self._note([_OTHER_DEVICE.format(path=found.path)])
        before: list[str] = found.meta.get("devices", [])
        self._devices = before if before[-1:] == self._devices else [*before, *self._devices]
        self.workers.on_rank_zero(lambda: self._go_back_to(found.step))
        self.clock.add(found.meta["seconds"])
        self._best = self.workers.on_rank_zero(lambda: self._best_that_is_whole(found))
        self._score_before = found.meta.get("score_before")
        if found.meta["score"] is None and self._is_evaluated(found.step):  # a stop interrupted the evaluation
            self._evaluate_and_save(found.step)
        return found.step

    def _start(self) -> int:
        """Score and save the shortened model as iteration 0."""
        self.workers.on_rank_zero(lambda: self._go_back_to(-1))
        self._evaluate_and_save(0)
        self.reporter.raise_if_stopped()
        return 0

    def _go_back_to(self, step: int) -> None:
        """Delete the rows and checkpoints of later steps."""
        self.directory.forget_after(step)
        folder = self.directory.checkpoints
        checkpoint.prune(folder, {s for s in checkpoint.steps_in(folder) if s <= step})

    def _check_origin(self, found: Checkpoint) -> None:
        """Check that the run was begun with this config, data and numerics; note a change of the code's revision.

        Raises:
            UserError: it was not.
        """
        require_signature(found, self.config.signature)
        path, data = self.directory.path, self.experiment.data.signature
        if found.meta["data"] != data:
            raise UserError(
                f"{path} was begun with other data (signature {found.meta['data']}, now {data}): restore the data "
                "files, or choose another out."
            )
        if found.meta.get("numerics") != _NUMERICS:
            raise UserError(
                f"{path} was begun by a version of dxmi whose pretraining or scores differ: scores from before and "
                "after would not be comparable. Choose another out."
            )
        revision = git_revision()
        if found.meta["git_revision"] != revision:
            began = found.meta["git_revision"]
            self._note([f"this run was begun by revision {began} and continues with {revision}."])

    def _best_that_is_whole(self, resumed: Checkpoint) -> dict[str, Any] | None:
        """Step and score of the best checkpoint so far, or of the resumed one if the best is damaged."""
        best: dict[str, Any] | None = resumed.meta["best"]
        if best is None:
            return None
        try:
            checkpoint.load(checkpoint.path_of(self.directory.checkpoints, best["step"]))
        except DamagedCheckpointError as error:
            self._note([str(error)])
            score = resumed.meta["score"]
            return None if score is None else {"step": resumed.step, "value": score}
        return best

    # ------------------------------------------------------------------------
    # Evaluation and checkpoints during fine-tuning.

    def _is_evaluated(self, step: int) -> bool:
        return step % self.config.evaluate.every == 0 or step == self.config.train.iterations

    def _evaluate_and_save(self, step: int) -> None:
        """Score and save; if a stop is requested during scoring, save without a score, which a resumed run computes."""
        try:
            score = self._evaluate(step)
        except StopRequestedError:
            self._save(step, None)
            raise
        self._save(step, score)

    def _evaluate(self, step: int) -> float:
        """Score the policy on the selection noise, draw a grid, and update the best; returns the primary score."""
        sampling = self._sampling(stream_of(SELECTION, self.config.seed), step)
        scores = self.scorer.score(sampling, self._energy).values
        score = scores[self.scorer.metric]
        self.workers.on_rank_zero(lambda: self._record_scores(step, scores))
        best, takes_last = self._best, self.config.evaluate.result == "last"
        is_allowed = self._meets_constraint(scores)
        if best is None or takes_last or (is_allowed and is_better(score, best["value"], self.scorer.direction)):
            self._best = {"step": step, "value": score}
        primary_first = {self.scorer.metric: score, **scores}
        self.reporter.tell(Phase.FINETUNE, step, self.config.train.iterations, primary_first)
        return score

    def _meets_constraint(self, scores: Mapping[str, float]) -> bool:
        """Whether a checkpoint with these scores may be the best; the first ones are those before fine-tuning."""
        key, factor = self.config.evaluate.constraint, self.config.evaluate.constraint_factor
        if key is None or key not in scores:
            return True
        if self._score_before is None:
            self._score_before = scores[key]
        direction = next(known.direction for known in self.config.score_keys() if known.name == key)
        worse_by = sign_of(direction) * (scores[key] - self._score_before)
        return worse_by <= (factor - 1.0) * abs(self._score_before)

    def _sampling(self, stream: str, step: int) -> Sampling:
        own = self._algorithm
        return Sampling(
            own.eval_policy,
            stream,
            own.guide,
            own.guidance,
            on_step=self.reporter.listen,
            step=step,
            reference=own.reference,
            precision=self.config.evaluate.precision,
        )

    def _picture_sampling(self, step: int = 0) -> Sampling:
        """The sampling for pictures, which only rank 0 draws."""
        on_step = self.reporter.listen if self.workers.size == 1 else None
        own = self._algorithm
        return Sampling(own.eval_policy, PICTURES, own.guide, own.guidance, on_step=on_step, step=step)

    def _record_scores(self, step: int, scores: Mapping[str, float]) -> None:
        samples = generate(self._picture_sampling(), self.config.evaluate.grid, self.config.evaluate)
        self.directory.append([{"step": step, **scores}])
        self.visualizer.draw_samples(self.directory.samples / f"step_{step:06d}.png", samples)

    @property
    def _energy(self) -> Energy | None:
        """The energy; None without fine-tuning, since an untrained energy carries no information about the data."""
        return self._algorithm.energy if self.config.train.iterations else None

    def _save(self, step: int, score: float | None) -> None:
        """Write a checkpoint; keep it, the previous one, and the best."""
        self.workers.on_rank_zero(lambda: self._write_checkpoint(step, score))
        self._saved(step)

    def _write_checkpoint(self, step: int, score: float | None) -> None:
        self.clock.lap()
        folder = self.directory.checkpoints
        before = [s for s in checkpoint.steps_in(folder) if s < step][-1:]
        checkpoint.save(folder, step, self._state.groups(), self._checkpoint_meta(score))
        checkpoint.prune(folder, {step, *before, *([self._best["step"]] if self._best else [])})

    def _checkpoint_meta(self, score: float | None) -> dict[str, Any]:
        data, counts = self.experiment.data, self.experiment.class_counts
        return {
            "signature": self.config.signature,
            "best": self._best,
            "score_before": self._score_before,
            "score": score,
            "seconds": self.clock.seconds,
            "event": list(data.event),
            "data": data.signature,
            "class_counts": None if counts is None else counts.tolist(),
            "git_revision": git_revision(),
            "numerics": _NUMERICS,
            "devices": self._devices,
        }

    # ------------------------------------------------------------------------
    # The report: scores of the best and the last checkpoint, on noise that was not used to choose the best.

    def finish(self) -> None:
        """Score the best and the last checkpoint, and write the summary and the pictures."""
        self.clock.enter(Phase.REPORT)
        final = self._final_scores()
        self.clock.lap()
        summary = self._summary(final)

        def write() -> None:
            self._draw(summary)
            self.directory.write_summary(asdict(summary))

        self.workers.on_rank_zero(write)
        self.end(summary)

    def _final_scores(self) -> dict[str, Scores]:
        assert self._best is not None  # the last iteration is always evaluated
        last = self._report(self.config.train.iterations)
        self.reporter.tell(Phase.REPORT, 1, 2)
        first, best_is_last = last, self._best["step"] == self.config.train.iterations
        if not best_is_last:
            self._algorithm.load_state_dict(self.workers.broadcast(self._best_weights()))
            first = self._report(self._best["step"])
        further = range(1, self.config.evaluate.generations)
        self._generations = [first.values, *(self._report(self._best["step"], draw).values for draw in further)]
        best = Scores(mean_scores(self._generations), first.seconds_per_1000)
        self.reporter.tell(Phase.REPORT, 2, 2)
        return {"best": best, "last": best if best_is_last else last}

    def _report(self, step: int, draw: int = 0) -> Scores:
        """Compute all scores of the policy of an iteration, on one draw of the report noise.

        Further draws show how much of the spread of scores is due to the evaluation, and their mean reduces it.
        """
        stream = stream_of(REPORT, self.config.seed) + (f"/draw_{draw}" if draw else "")
        return self.scorer.full_evaluation(self._sampling(stream, step), self._energy)

    def _best_weights(self) -> dict[str, Tensor]:
        """Load the weights of the best checkpoint on rank 0; a damaged checkpoint raises an error on all workers."""
        found: dict[str, Tensor] = {}

        def load() -> None:
            if self._best:
                path = checkpoint.path_of(self.directory.checkpoints, self._best["step"])
                found.update(checkpoint.load(path).groups[ALGORITHM])

        self.workers.on_rank_zero(load)
        return found

    def _summary(self, final: Mapping[str, Scores]) -> Summary:
        metric, config, references = self.scorer.metric, self.config, self._reference_scores
        scores = {**references, **final}
        assert self._best is not None
        return Summary(
            name=config.name,
            signature=config.signature,
            seed=config.seed,
            metric=metric,
            direction=self.scorer.direction,
            directions={key.name: key.direction for key in self.scorer.keys},
            num_samples=config.evaluate.num_samples,
            reference=primary_scores(metric, references),
            best={**self._outcome(final["best"], self._best["step"]), "selection_value": self._best["value"]},
            last=self._outcome(final["last"], config.train.iterations),
            scores={name: scored.values for name, scored in scores.items()},
            generations=self._generations,
            members=self._members,
            scored_with=self.scorer.about,
            labels=self._labels(),
            data_notes=list(self.experiment.data.notes),
            inputs=self.experiment.inputs(),
            samplers={reference.key: reference.tree for reference in self._references.compared},
            seconds_per_1000_images={name: scored.seconds_per_1000 for name, scored in scores.items()},
            iterations=config.train.iterations,
            num_steps=config.schedule.num_steps,
            seconds=dict(self.clock.seconds),
            device=", then ".join(self._devices),
            threads=self._threads,
            git_revision=git_revision(),
            versions=versions(),
        )

    def _labels(self) -> str:
        """The description of the classes of samples, with the number of those that are not trained on."""
        text = labels_text(self.experiment.class_counts, self.experiment.label_source)
        held_out = self.experiment.prompts.held_out_labels if self.config.prompts.held_out else ()
        return f"{text}; held out of training: {len(held_out)}" if held_out else text

    def _outcome(self, scored: Scores, step: int) -> dict[str, Any]:
        where = checkpoint.path_of(self.directory.checkpoints, step).relative_to(self.directory.path)
        return {"value": scored.values[self.scorer.metric], "step": step, "checkpoint": str(where)}

    def _draw(self, summary: Summary) -> None:
        """Draw the curves, the states of samples of the best policy, and maps of its value."""
        rows, panels = self.directory.rows(), (*self.scorer.panels, *self._algorithm.panels)
        best = (summary.best["step"], summary.best["value"])
        shown = highlights(scored_references(vars(summary)), summary.num_steps, summary.direction)
        lines = {reference.label: reference.score for reference in shown}
        if DATA in summary.reference:
            lines[data_label(vars(summary))] = summary.reference[DATA]
        others = {key: curve_of(rows, key) for key in panels}
        save_figure(
            self.directory.curves, curves_figure(summary.metric, curve_of(rows, summary.metric), lines, best, others)
        )
        self._draw_divergence(rows)
        sampling = self._picture_sampling(summary.best["step"])
        states = generate_states(sampling, self.visualizer.num_rows, self.config.evaluate)
        self.visualizer.draw_steps(self.directory.samples / "steps.png", states)
        if self.config.train.iterations and self._algorithm.value is not None:
            self.visualizer.draw_value(self.directory.samples, self._algorithm.value, self.config.schedule.num_steps)

    def _draw_divergence(self, rows: Sequence[Row]) -> None:
        """Draw the scores against the divergence from the pretrained policy, if it is one of them."""
        evaluated = [row for row in rows if KL_KEY.name in row]
        names = [key.name for key in self.config.score_keys() if key.name != KL_KEY.name]
        names.sort(key=lambda name: name != self.scorer.metric)  # the primary score first
        shown = [name for name in names if all(name in row for row in evaluated)]
        if len(evaluated) > 1 and shown:
            save_figure(self.directory.divergence, divergence_figure(evaluated, KL_KEY.name, shown))


def refuse_other_run(run: RunDirectory, experiment: Experiment) -> None:
    """Check that a folder does not hold the run of another experiment.

    Raises:
        UserError: it does (the message lists differing settings), or its config is of an earlier schema.
    """
    if not run.config.exists():
        return
    stored = read_config(run.read_config())
    stored.require_present(f"The run in {run.path}")
    changed = differences(identity_tree(stored.config, RESULT), identity_tree(experiment.config, RESULT))
    if changed:
        raise UserError(
            f"{run.path} holds a run with another config ({'; '.join(changed[:5])}). Choose another out, "
            "or delete that folder."
        )


def changed_inputs(run: RunDirectory, summary: Mapping[str, Any], experiment: Experiment) -> list[str]:
    """Messages about the inputs (data and public weights) of a finished run that have changed since.

    Args:
        run: folder of the run.
        summary: content of its summary.json.
        experiment: experiment with the run's config, which reads the current inputs.
    """
    recorded = summary.get("inputs") or _recorded_data(run)
    try:
        now = experiment.inputs()
    except UserError as error:
        return [f"{run.path} was trained on inputs that can no longer be read: {error}"]
    names = {
        "data": "data",
        "weights": "pretrain.weights",
        "teacher": "pretrain.teacher",
        "parent": "shipped model",
        "reward": "files of the reward",
    }
    return [
        f"{run.path} was trained on other {names[key]} (signature {recorded[key][:12]}, now {now[key][:12]}): its "
        "scores refer to the former."
        for key in now
        if key in recorded and recorded[key] != now[key]
    ]


def _recorded_data(run: RunDirectory) -> dict[str, str]:
    """The signature of the data in the newest checkpoint; runs of older versions record it only there."""
    found, _ = checkpoint.newest(run.checkpoints)
    return {} if found is None else {"data": found.meta["data"]}


def labels_text(counts: Tensor | None, source: str = "data") -> str:
    """A description of the classes of generated samples; empty if there are no classes.

    Args:
        counts: number of samples of each class in the source, [C].
        source: what the frequencies are those of: data or prompts.
    """
    if counts is None:
        return ""
    shares = counts[counts > 0].double() / counts.sum()
    text = f"drawn with the frequencies of the {source}: {len(shares):,} of {len(counts):,} classes"
    if shares.max() == shares.min():
        return f"{text}, each equally often"
    return f"{text}, {shares.min():.3%} to {shares.max():.3%} each"


def curve_of(rows: list[Row], key: str) -> list[tuple[float, float]]:
    """The (iteration, value) of every row that has `key`."""
    return [(float(row["step"]), float(row[key])) for row in rows if key in row]
