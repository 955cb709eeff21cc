"""The loop: pretrain once, score the references once, fine-tune, evaluate, checkpoint, report.

A run is a pure function of its config: killed at any moment and resumed, it ends bitwise as if it had never been
touched. For that, every row, evaluation and checkpoint falls on an iteration that the config alone decides.
"""

import functools
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import ExitStack
from dataclasses import MISSING, asdict, dataclass, field, fields
from enum import StrEnum
from pathlib import Path
from shutil import copytree, rmtree
from typing import Any

import torch
from torch import Tensor

from dxmi.algorithms.ddpm import DDPM
from dxmi.algorithms.dxmi import DxMI
from dxmi.config import build, differences, signature, to_tree
from dxmi.critics.energy import Energy
from dxmi.diffusion.policy import Policy
from dxmi.distributed import Pace, Workers
from dxmi.errors import UserError
from dxmi.evaluation.config import PICTURES, REPORT, SCORING_VERSION, SELECTION
from dxmi.evaluation.references import (
    DATA,
    Reference,
    ScoredReference,
    best_reference,
    full_reference,
    highlights,
    references,
    scored_references,
)
from dxmi.evaluation.sampling import Sampling, generate, generate_states, preview, stream_of
from dxmi.evaluation.scorers import Scorer, Scores, build_scorer
from dxmi.networks.base import Denoiser
from dxmi.persistence import checkpoint
from dxmi.persistence.cache import cache_root, cached, entry
from dxmi.persistence.checkpoint import Checkpoint, DamagedCheckpointError
from dxmi.persistence.provenance import device_name, git_revision, versions
from dxmi.persistence.run_directory import Row, RunDirectory
from dxmi.seeds import generator
from dxmi.tensors import require_finite_metrics, require_finite_state
from dxmi.training.build import PRETRAINING_VERSION, Experiment, require_signature
from dxmi.training.config import ExperimentConfig
from dxmi.training.phase import Story, Stretch, tell, tell_together
from dxmi.training.state import ALGORITHM, TrainingState
from dxmi.visualization.galleries import build_gallery
from dxmi.visualization.pictures import curves_figure, save_figure

_NOT_OF_SCORES = (
    *("every", "grid", "generations", "result", "features"),
    *("reference_images", "full_reference", "reference_steps"),
)
"""What of an evaluation's config changes no score of given weights, or is told by the scorer's identity."""
_PARTIAL_EVERY = 2_000
"""Iterations between checkpoints of pretraining."""
_NUMERICS = [PRETRAINING_VERSION, SCORING_VERSION]
"""Of a checkpoint: versions of what is computed from one config, which its signature does not hold."""
_NO_KERNEL = ("does not have a deterministic implementation", "it uses CuBLAS")
"""From what PyTorch says of a kernel whose bits are not the same every time, if only such are allowed."""
_OTHER_DEVICE = (
    "{path} was saved on another kind of device, whose random numbers cannot be continued here: the run goes on with "
    "others, and ends neither as it would have there nor as a run that was here from the start."
)
_LISTEN_EVERY = 0.5
"""Seconds after which the reporter is asked again whether to stop, while samples are drawn."""


class Phase(StrEnum):
    """What a run is doing."""

    PRETRAIN = "pretrain"
    REFERENCES = "references"
    FINETUNE = "finetune"
    REPORT = "report"


@dataclass(frozen=True)
class Progress:
    """What a run tells while it goes on.

    Attributes:
        phase: where it is.
        step: how far in that phase.
        total: steps of that phase.
        metrics: logged or evaluated just now; empty in between.
        note: a sentence for the user, about a damaged checkpoint say.
        of_data: whether the note is about the data, which all runs of a study share.
    """

    phase: Phase
    step: int
    total: int
    metrics: Mapping[str, float] = field(default_factory=dict)
    note: str = ""
    of_data: bool = False


AfterIteration = Callable[[int, Mapping[str, Tensor]], None]
"""Called with the number of iterations done and the metrics of the last."""
Reporter = Callable[[Progress], bool | None]
"""Called as a run goes on; if it returns True the run writes a checkpoint and returns."""
Saved = Callable[[int], None]
"""Called by every worker when the checkpoint of this iteration is whole."""


class _Stopped(Exception):  # noqa: N818  (not an error)
    """The reporter asked for it."""


@dataclass(frozen=True)
class Summary:
    """What came out of a finished run. The field names are those of summary.json.

    `reference`, `best` and `last` hold the score `metric`, all from `num_samples` samples of noise that took no part in
    choosing the best checkpoint; `scores` holds every score of each, `generations` those of the best on each draw of
    that noise, of which `scores["best"]` is the mean, `seconds_per_1000_images` the time to draw samples, `members` how
    many seeds were trained in the same program at most: `seconds` are wall seconds, the same ones for all of them.
    `scored_with` names the network that gave the features of the scores, and holds its hash and that of the data.
    `labels` says of which classes the samples were, if the network knows any, and `data_notes` what was left out of the
    data or changed. `inputs` are the signatures of the data and of `pretrain.weights` (`Experiment.inputs`). `samplers`
    says of each reference, by its key, what it is in words (label, sampler), how many network evaluations a sample
    takes, and its role.
    """

    name: str
    signature: str
    seed: int
    metric: str
    num_samples: int
    reference: dict[str, float]
    best: dict[str, Any]
    last: dict[str, Any]
    scores: dict[str, dict[str, float]]
    seconds_per_1000_images: dict[str, float]
    iterations: int
    num_steps: int
    seconds: dict[str, float]
    device: str
    threads: int
    git_revision: str | None
    versions: dict[str, str]
    generations: list[dict[str, float]] = field(default_factory=list)
    members: int = 1
    scored_with: dict[str, str] = field(default_factory=dict)
    labels: str = ""
    data_notes: list[str] = field(default_factory=list)
    inputs: dict[str, str] = field(default_factory=dict)
    samplers: dict[str, dict[str, Any]] = field(default_factory=dict)


def train(
    experiment: Experiment,
    *,
    out: Path,
    report: Reporter | None = None,
    saved: Saved | None = None,
    resume_from: Path | None = None,
) -> Summary | None:
    """Run an experiment from pretraining to its summary; each of several workers calls this, the first writes.

    Args:
        experiment: what to run.
        out: the run's folder; if it holds the beginning of this very run, that is gone on with.
        report: hears of every logged step and evaluation, and may ask for a stop.
        saved: hears of every checkpoint of the fine-tuning.
        resume_from: another run folder to go on from, which is copied to `out` first and not touched.

    Returns:
        The summary, or None if `report` asked for a stop.

    Raises:
        UserError: `out` holds another run, was begun with other data, or cannot be written.
        DivergedError: a metric is not finite.
    """
    return tell(_story(Member(experiment, out, report, saved), resume_from))


@dataclass(frozen=True)
class Member:
    """One of several runs that differ in their seeds alone.

    Attributes:
        experiment: what to run, alone with its batches and in one piece.
        out: as for `train`.
        report: as for `train`.
        saved: as for `train`.
    """

    experiment: Experiment
    out: Path
    report: Reporter | None = None
    saved: Saved | None = None


Outcome = Summary | Exception | None
"""What `train` returns, or what it would raise."""


def train_stacked(members: Sequence[Member], ended: Callable[[int, Outcome], None] | None = None) -> list[Outcome]:
    """Run several seeds of one experiment as one program; each is the run that it would be alone, but for rounding.

    Args:
        members: differ in their seeds, folders and reporters alone.
        ended: hears of each, by its number in `members`, as soon as it has ended; the others go on.
    """

    def told(number: int) -> Story[Outcome]:
        outcome: Outcome
        try:
            outcome = yield from _story(members[number])
        except Exception as error:  # noqa: BLE001  (this member's own)
            outcome = error
        if ended is not None:
            ended(number, outcome)
        return outcome

    # By seed: programs that take the locks of two pretrainings in different orders would wait for each other.
    by_seed = sorted(range(len(members)), key=lambda number: members[number].experiment.config.seed)
    outcomes = tell_together([told(number) for number in by_seed])
    return [outcomes[by_seed.index(number)] for number in range(len(members))]


def _story(member: Member, resume_from: Path | None = None) -> Story[Summary | None]:
    """A run from pretraining to its summary; None if it was asked to stop."""
    experiment, out = member.experiment, member.out
    workers, config = experiment.workers, experiment.config
    run = RunDirectory(out)
    held = ExitStack()

    def refuse() -> None:
        if resume_from is not None and resume_from.resolve() != out.resolve():
            copytree(resume_from, out, dirs_exist_ok=False)
        _refuse_other_run(run, experiment)

    def begin() -> None:
        run.create()
        held.enter_context(run.lock())
        run.write_config(to_tree(config))

    workers.on_first(refuse)
    finished = workers.on_first(run.read_summary)
    if finished is not None:
        summary = _read_summary(run, finished)
        if workers.is_first and member.report is not None:
            for sentence in changed_inputs(run, finished, experiment):
                text = f"{sentence} Choose another out to train on the present ones."
                member.report(Progress(Phase.REPORT, 2, 2, note=text))
        return summary
    experiment.choose_kernels()
    scorer = build_scorer(experiment.data, config.evaluate, cache_root(), experiment.device, workers)
    with held:
        workers.on_first(begin)
        try:
            whole = _Run(experiment, run, scorer, member.report or (lambda _: None), member.saved or (lambda _: None))
            return (yield from whole.whole())
        except _Stopped:
            return None
        except RuntimeError as error:
            if not any(words in str(error) for words in _NO_KERNEL):
                raise
            kernel = str(error).partition(",")[0]
            raise UserError(f"resources.deterministic is true, but {kernel}: make it false.") from error


def _refuse_other_run(run: RunDirectory, experiment: Experiment) -> None:
    if not run.config.exists():
        return
    old = build(ExperimentConfig, run.read_config())
    changed = differences(old.identity, experiment.config.identity)
    if changed:
        raise UserError(
            f"{run.path} holds a run with another config ({'; '.join(changed[:5])}). Choose another out, "
            "or delete that folder."
        )


def changed_inputs(run: RunDirectory, summary: Mapping[str, Any], experiment: Experiment) -> list[str]:
    """Sentences about a finished run whose data or public weights are no longer those that it read.

    Args:
        run: the run.
        summary: what its summary.json holds.
        experiment: of its config; the data, and the weights if there are some, are read anew.
    """
    recorded = summary.get("inputs") or _recorded_data(run)
    try:
        now = experiment.inputs()
    except UserError as error:
        return [f"{run.path} shows what it was trained on, which can no longer be read: {error}"]
    names = {"data": "data", "weights": "pretrain.weights"}
    return [
        f"{run.path} was trained on other {names[key]} (signature {recorded[key][:12]}, now {now[key][:12]}): its "
        "numbers are of those."
        for key in now
        if key in recorded and recorded[key] != now[key]
    ]


def _recorded_data(run: RunDirectory) -> dict[str, str]:
    """The signature of the data in a run's newest checkpoint: runs of older versions have no other."""
    found, _ = checkpoint.newest(run.checkpoints)
    return {} if found is None else {"data": found.meta["data"]}


class _Run:
    """One call of `train`: what its phases share."""

    def __init__(
        self, experiment: Experiment, run: RunDirectory, scorer: Scorer, report: Reporter, saved: Saved
    ) -> None:
        self.experiment = experiment
        self.config = experiment.config
        self.workers = experiment.workers
        self.run = run
        self.scorer = scorer
        self.gallery = build_gallery(experiment.config.data.name)
        self.report = report
        self.saved = saved
        self.threads = experiment.use_threads()
        self.clock = _Stopwatch()
        self.best: dict[str, Any] | None = None
        self.generations: list[dict[str, float]] = []
        self.stopping = False
        self.told = Progress(Phase.PRETRAIN, 0, experiment.config.pretrain.iterations)
        self.pace = Pace(experiment.workers, _LISTEN_EVERY)
        self.members = 1
        self.devices = [device_name(experiment.device)]

    # ------------------------------------------------------------------------
    # The story.

    def whole(self) -> Story[Summary]:
        """All phases, in order."""
        finished = self.workers.on_first(self.run.read_summary)
        if finished is not None:
            return _read_summary(self.run, finished)
        self._note(self.experiment.data.notes, of_data=True)
        self.clock.enter(Phase.PRETRAIN)
        denoiser = yield from self._pretrained()
        self.clock.enter(Phase.REFERENCES)
        references = self._references(denoiser)
        self.clock.enter(Phase.FINETUNE)
        dxmi, state = self.experiment.build_finetuning(denoiser)
        start = self._resume(dxmi, state)
        yield self._finetuning(dxmi, state, start)
        self.clock.enter(Phase.REPORT)
        final = self._final_scores(dxmi)
        self.clock.lap()
        summary = self._summary(references, final)
        self.workers.on_first(lambda: self._close(dxmi, summary))
        return summary

    def _close(self, dxmi: DxMI, summary: Summary) -> None:
        self._draw(dxmi, summary)
        self.run.write_summary(asdict(summary))

    def _tell(self, phase: Phase, step: int, total: int, metrics: Mapping[str, float] | None = None) -> None:
        """Report, and remember whether a stop was asked for; all workers hear the same."""
        progress = Progress(phase, step, total, metrics or {})
        self.told = Progress(phase, step, total)
        if self.workers.on_first(lambda: bool(self.report(progress))):
            self.stopping = True

    def _note(self, sentences: Sequence[str], phase: Phase = Phase.FINETUNE, *, of_data: bool = False) -> None:
        total = self.config.pretrain.iterations if phase is Phase.PRETRAIN else self.config.train.iterations
        for sentence in sentences if self.workers.is_first else ():
            self.report(Progress(phase, 0, total, note=sentence, of_data=of_data))

    def _tell_or_stop(self, phase: Phase, step: int, total: int) -> None:
        """Report where stopping loses nothing that a checkpoint could hold."""
        self._tell(phase, step, total)
        if self.stopping:
            raise _Stopped

    def _listen(self) -> None:
        """Called after each step of sampling: a batch on a slow device takes minutes, nobody should wait that long."""
        if self.pace.due():
            self._tell_again()

    def _tell_again(self) -> None:
        """Nothing has changed; a stop may have been asked for. All workers call this at the same time."""
        self._tell_or_stop(self.told.phase, self.told.step, self.told.total)

    # ------------------------------------------------------------------------
    # Pretraining, once for all runs that share its signature.

    def _pretrained(self) -> Story[Denoiser]:
        path = cache_root() / "pretrained" / f"{self.experiment.pretraining_signature}.cached"
        denoiser = self.experiment.build_denoiser()
        if self.config.pretrain.weights is not None:
            self._note(self.experiment.check_public(denoiser), Phase.PRETRAIN)
        partial = path.with_suffix(".partial")
        with entry(path, self.workers, self._tell_again) as held:
            if held.tensors is None:
                ddpm, stretch = self._pretraining(partial)
                yield stretch
                average = ddpm.average.state_dict()
                require_finite_state(average, "The pretrained model", self.config.pretrain.iterations)
                held.write(dict(average))
            assert held.tensors is not None
            denoiser.load_state_dict(held.tensors)
        if self.workers.is_first:
            rmtree(partial, ignore_errors=True)
        total = self.config.pretrain.iterations
        self._tell_or_stop(Phase.PRETRAIN, total, total)
        return denoiser

    def _pretraining(self, partial: Path) -> tuple[DDPM, Stretch]:
        """Pretraining from its newest checkpoint on, which it leaves in `partial`."""
        ddpm, state = self.experiment.build_pretraining()
        total, log_every, window = self.config.pretrain.iterations, self.config.train.log_every, _Window()
        found, _ = _newest(partial, self.workers)
        if found is not None and not state.restore(found):
            # What other runs are to share is not to depend on where it was interrupted.
            self._note([f"{found.path} was saved on another kind of device: pretraining starts afresh."])
            (ddpm, state), found = self.experiment.build_pretraining(), None

        def after(step: int, metrics: Mapping[str, Tensor]) -> None:
            window.add(metrics)
            if step % log_every == 0 or step == total:
                self._tell(Phase.PRETRAIN, step, total, window.mean(step))
            if (step % _PARTIAL_EVERY == 0 or self.stopping) and step < total:
                self.workers.on_first(functools.partial(_keep_only, partial, step, state))
            if self.stopping and step < total:
                raise _Stopped

        return ddpm, self._stretch(ddpm, state, 0 if found is None else found.step, total, after)

    def _stretch(
        self, algorithm: DDPM | DxMI, state: TrainingState, start: int, total: int, after: AfterIteration
    ) -> Stretch:
        """What the story is to yield now; until somebody trains it, its clock stands still."""
        self.clock.pause()
        return Stretch(algorithm, state, start, total, self.experiment.precision, after, self._trained_with)

    def _trained_with(self, members: int) -> None:
        """The run is trained in one program with others, `members` in all."""
        self.clock.go_on()
        self.members = max(self.members, members)

    # ------------------------------------------------------------------------
    # References, once for all runs that share the pretrained model and the evaluation.

    @property
    def _compared(self) -> list[Reference]:
        """The samplers that the policy is compared with."""
        evaluate = self.config.evaluate
        return references(self.config.schedule, full=evaluate.full_reference, steps=evaluate.reference_steps or ())

    def _references(self, denoiser: Denoiser) -> dict[str, Scores]:
        compared, num_samples = self._compared, self.config.evaluate.num_samples
        total, done, scores = sum(num_samples * reference.evaluations for reference in compared), 0, {}
        self._tell_or_stop(Phase.REFERENCES, done, total)
        for reference in compared:
            scores[reference.key] = self._reference(reference, denoiser, done, total)
            done += num_samples * reference.evaluations
            self._tell_or_stop(Phase.REFERENCES, done, total)
        metric = self.scorer.metric
        scored = [reference.scored(scores[reference.key].values[metric]) for reference in compared]
        self._draw_references(denoiser, scored)
        floor = self.scorer.of_data(stream_of(REPORT, self.config.seed))
        return scores if floor is None else {**scores, DATA: floor}

    def _reference_path(self, reference: Reference, **more: Any) -> Path:
        """Where what comes of a sampler of the pretrained model is cached."""
        identity = {
            "version": SCORING_VERSION,
            "pretraining": self.experiment.pretraining_signature,
            "schedule": reference.schedule.tree(),
            "evaluate": {
                key: value for key, value in to_tree(self.config.evaluate).items() if key not in _NOT_OF_SCORES
            },
            "features": self.scorer.identity,
            "stream": stream_of(REPORT, self.config.seed),
            "device": self.experiment.device.type,
            **({} if reference.policy is Policy else {"sampler": reference.policy.__name__}),
            **more,
        }
        return cache_root() / "references" / f"{signature(identity)}.cached"

    def _reference(self, reference: Reference, denoiser: Denoiser, done: int, total: int) -> Scores:
        """One sampler's scores; `done` of `total` network evaluations came before it."""
        path = self._reference_path(reference)

        def on_batch(samples: int) -> None:
            self._tell_or_stop(Phase.REFERENCES, done + samples * reference.evaluations, total)

        def compute() -> dict[str, Tensor]:
            policy = self.experiment.build_policy(denoiser, reference.schedule, reference.policy)
            stream = stream_of(REPORT, self.config.seed)
            sampling = Sampling(policy, stream, on_batch=on_batch, on_step=self._listen, source=reference.label)
            scores = self.scorer.full(sampling)
            numbers = {**scores.values, "seconds_per_1000": scores.seconds_per_1000}
            return {key: torch.tensor(value, dtype=torch.float64) for key, value in numbers.items()}

        found = cached(path, compute, self.workers, self._tell_again)
        numbers = {key: float(value) for key, value in sorted(found.items())}
        seconds = numbers.pop("seconds_per_1000")
        return Scores(numbers, seconds)

    def _draw_references(self, denoiser: Denoiser, scored: Sequence[ScoredReference]) -> None:
        """Pictures to compare samples with: of the data, and on the samples' noise of the best references."""
        by_key = {reference.key: reference for reference in self._compared}
        few = best_reference(scored, self.config.schedule.num_steps)
        pictures = {"data": self._some_data()}
        for name, chosen in {"full": full_reference(scored), "few": few}.items():
            if chosen is not None:
                pictures[name] = self._preview(by_key[chosen.key], denoiser)
        for name, samples in pictures.items():
            path = self.run.reference_picture(name)
            self.workers.on_first(functools.partial(self.gallery.draw_samples, path, samples))

    def _some_data(self) -> Tensor:
        """As many of the data as a grid has, the same ones in every run."""
        data, evaluate = self.experiment.data, self.config.evaluate
        rows = torch.randperm(len(data), generator=generator(evaluate.seed, "picture of the data"))
        return data.stored[rows[: evaluate.grid].sort().values]

    def _preview(self, reference: Reference, denoiser: Denoiser) -> Tensor:
        """A grid of a reference's samples, drawn once for all runs that share the pretrained model."""
        evaluate = self.config.evaluate

        def compute() -> dict[str, Tensor]:
            policy = self.experiment.build_policy(denoiser, reference.schedule, reference.policy)
            sampling = Sampling(policy, PICTURES, on_step=self._listen, source=reference.label)
            return {"samples": preview(sampling, evaluate.grid, evaluate)}

        path = self._reference_path(reference, grid=evaluate.grid)
        return cached(path, compute, self.workers, self._tell_again)["samples"]

    # ------------------------------------------------------------------------
    # Fine-tuning.

    def _start(self, dxmi: DxMI, state: TrainingState) -> int:
        """Iteration 0: score the shortened model, and save."""
        self.workers.on_first(lambda: self._go_back_to(-1))
        self._evaluate_and_save(dxmi, state, 0)
        if self.stopping:
            raise _Stopped
        return 0

    def _go_back_to(self, step: int) -> None:
        """Drop the records and checkpoints of later steps."""
        self.run.forget_after(step)
        folder = self.run.checkpoints
        checkpoint.prune(folder, {s for s in checkpoint.steps_in(folder) if s <= step})

    def _resume(self, dxmi: DxMI, state: TrainingState) -> int:
        """Restore the newest whole checkpoint and return its iteration; without one, start afresh."""
        found, complaints = _newest(self.run.checkpoints, self.workers)
        self._note(complaints)
        if found is None:
            return self._start(dxmi, state)
        self._check_origin(found)
        if not state.restore(found):
            self._note([_OTHER_DEVICE.format(path=found.path)])
        before: list[str] = found.meta.get("devices", [])
        self.devices = before if before[-1:] == self.devices else [*before, *self.devices]
        self.workers.on_first(lambda: self._go_back_to(found.step))
        self.clock.add(found.meta["seconds"])
        self.best = self.workers.on_first(lambda: self._best_that_is_whole(found))
        if found.meta["score"] is None and self._is_evaluated(found.step):  # a stop was asked for in the evaluation
            self._evaluate_and_save(dxmi, state, found.step)
        return found.step

    def _check_origin(self, found: Checkpoint) -> None:
        """Refuse a run that was begun with another config or other data; say so if the code has changed."""
        require_signature(found, self.config)
        data = self.experiment.data.signature
        if found.meta["data"] != data:
            raise UserError(
                f"{self.run.path} was begun with other data (signature {found.meta['data']}, now {data}): "
                "restore the data files, or choose another out."
            )
        if found.meta.get("numerics") != _NUMERICS:
            raise UserError(
                f"{self.run.path} was begun by a version of dxmi whose pretraining or scores are others: scores from "
                "before and after would not compare. Choose another out."
            )
        revision = git_revision()
        if found.meta["git_revision"] != revision:
            self._note([f"this run was begun by revision {found.meta['git_revision']} and goes on with {revision}."])

    def _best_that_is_whole(self, resumed: Checkpoint) -> dict[str, Any] | None:
        """The best checkpoint so far; if it is damaged, the resumed one, with its own score."""
        best: dict[str, Any] | None = resumed.meta["best"]
        if best is None:
            return None
        try:
            checkpoint.load(checkpoint.path_of(self.run.checkpoints, best["step"]))
        except DamagedCheckpointError as error:
            self._note([str(error)])
            score = resumed.meta["score"]
            return None if score is None else {"step": resumed.step, "value": score}
        return best

    def _finetuning(self, dxmi: DxMI, state: TrainingState, start: int) -> Stretch:
        """DxMI iterations; rows, evaluations and checkpoints fall where the config says."""
        train, total, window = self.config.train, self.config.train.iterations, _Window()

        def after(step: int, metrics: Mapping[str, Tensor]) -> None:
            window.add(metrics)
            evaluate = self._is_evaluated(step)
            if not evaluate and step % train.log_every != 0:
                return
            means = window.mean(step)
            self.workers.on_first(functools.partial(self.run.append, [{"step": step, **means}]))
            self._tell(Phase.FINETUNE, step, total, means)
            if evaluate:
                self._evaluate_and_save(dxmi, state, step)
            elif self.stopping:
                self._save(state, step, None)
            if self.stopping and step < total:
                raise _Stopped

        return self._stretch(dxmi, state, start, total, after)

    def _is_evaluated(self, step: int) -> bool:
        return step % self.config.evaluate.every == 0 or step == self.config.train.iterations

    def _evaluate_and_save(self, dxmi: DxMI, state: TrainingState, step: int) -> None:
        """Score and save; if a stop is asked for meanwhile, save without a score, which is made up for on resume."""
        try:
            score = self._evaluate(dxmi, step)
        except _Stopped:
            self._save(state, step, None)
            raise
        self._save(state, step, score)

    def _evaluate(self, dxmi: DxMI, step: int) -> float:
        """The policy's score on the fixed selection noise; also draws its grid and remembers the best."""
        stream = stream_of(SELECTION, self.config.seed)
        sampling = Sampling(dxmi.evaluated, stream, on_step=self._listen, step=step)
        scores = self.scorer.quick(sampling, self._energy(dxmi)).values
        score = scores[self.scorer.metric]
        self.workers.on_first(lambda: self._record_scores(dxmi, step, scores))
        if self.best is None or self.config.evaluate.result == "last" or score < self.best["value"]:
            self.best = {"step": step, "value": score}
        self._tell(Phase.FINETUNE, step, self.config.train.iterations, scores)
        return score

    def _record_scores(self, dxmi: DxMI, step: int, scores: Mapping[str, float]) -> None:
        on_step = self._listen if self.workers.size == 1 else None  # only the first draws; a stop leaves no row behind
        sampling = Sampling(dxmi.evaluated, PICTURES, on_step=on_step)
        samples = generate(sampling, self.config.evaluate.grid, self.config.evaluate)
        self.run.append([{"step": step, **scores}])
        self.gallery.draw_samples(self.run.samples / f"step_{step:06d}.png", samples)

    def _save(self, state: TrainingState, step: int, score: float | None) -> None:
        """Write a checkpoint; keep the best, this one, and the one before it."""
        self.workers.on_first(lambda: self._write_checkpoint(state, step, score))
        self.saved(step)

    def _class_counts(self) -> list[int] | None:
        counts = self.experiment.class_counts
        return None if counts is None else [int(count) for count in counts]

    def _write_checkpoint(self, state: TrainingState, step: int, score: float | None) -> None:
        self.clock.lap()
        folder = self.run.checkpoints
        before = [s for s in checkpoint.steps_in(folder) if s < step][-1:]
        data = self.experiment.data
        meta = {
            "signature": self.config.signature,
            "best": self.best,
            "score": score,
            "seconds": self.clock.seconds,
            "event": list(data.event),
            "data": data.signature,
            "class_counts": self._class_counts(),
            "git_revision": git_revision(),
            "numerics": _NUMERICS,
            "devices": self.devices,
        }
        checkpoint.save(folder, step, state.groups(), meta)
        checkpoint.prune(folder, {step, *before, *([self.best["step"]] if self.best else [])})

    # ------------------------------------------------------------------------
    # The report: the best and the last checkpoint on noise that took no part in the choice.

    def _final_scores(self, dxmi: DxMI) -> dict[str, Scores]:
        assert self.best is not None  # the last iteration is always evaluated
        last = self._report(dxmi, self.config.train.iterations)
        self._tell(Phase.REPORT, 1, 2)
        first, best_is_last = last, self.best["step"] == self.config.train.iterations
        if not best_is_last:
            dxmi.load_state_dict(self.workers.agree(self._best_weights()))
            first = self._report(dxmi, self.best["step"])
        further = range(1, self.config.evaluate.generations)
        self.generations = [first.values, *(self._report(dxmi, self.best["step"], draw).values for draw in further)]
        best = Scores(_mean(self.generations), first.seconds_per_1000)
        self._tell(Phase.REPORT, 2, 2)
        return {"best": best, "last": best if best_is_last else last}

    def _report(self, dxmi: DxMI, step: int, draw: int = 0) -> Scores:
        """Every score of the policy of that iteration, on one draw of the report's noise.

        Further draws tell the spread of the evaluation from that of training, and their mean has less of it.
        """
        stream = stream_of(REPORT, self.config.seed) + (f"/draw_{draw}" if draw else "")
        sampling = Sampling(dxmi.evaluated, stream, on_step=self._listen, step=step)
        return self.scorer.full(sampling, self._energy(dxmi))

    def _energy(self, dxmi: DxMI) -> Energy | None:
        """The energy, unless the run trains none: a random network says nothing about the data."""
        return dxmi.value.energy if self.config.train.iterations else None

    def _best_weights(self) -> dict[str, Tensor]:
        """On the first worker; if the checkpoint is damaged, no worker waits for it."""
        found: dict[str, Tensor] = {}

        def load() -> None:
            if self.best:
                path = checkpoint.path_of(self.run.checkpoints, self.best["step"])
                found.update(checkpoint.load(path).groups[ALGORITHM])

        self.workers.on_first(load)
        return found

    def _summary(self, references: Mapping[str, Scores], final: Mapping[str, Scores]) -> Summary:
        metric, config, scores = self.scorer.metric, self.config, {**references, **final}

        def outcome(name: str, step: int) -> dict[str, Any]:
            where = checkpoint.path_of(self.run.checkpoints, step).relative_to(self.run.path)
            return {"value": final[name].values[metric], "step": step, "checkpoint": str(where)}

        assert self.best is not None
        return Summary(
            name=config.name,
            signature=config.signature,
            seed=config.seed,
            metric=metric,
            num_samples=config.evaluate.num_samples,
            reference={name: scored.values[metric] for name, scored in references.items()},
            best={**outcome("best", self.best["step"]), "selection_value": self.best["value"]},
            last=outcome("last", config.train.iterations),
            scores={name: scored.values for name, scored in scores.items()},
            generations=self.generations,
            members=self.members,
            scored_with=self.scorer.about,
            labels=labels_text(self.experiment.class_counts),
            data_notes=list(self.experiment.data.notes),
            inputs=self.experiment.inputs(),
            samplers={reference.key: reference.tree for reference in self._compared},
            seconds_per_1000_images={name: scored.seconds_per_1000 for name, scored in scores.items()},
            iterations=config.train.iterations,
            num_steps=config.schedule.num_steps,
            seconds=self.clock.seconds,
            device=", then ".join(self.devices),
            threads=self.threads,
            git_revision=git_revision(),
            versions=versions(),
        )

    def _draw(self, dxmi: DxMI, summary: Summary) -> None:
        """The curve, the best policy's samples step by step, and maps of its value."""
        rows = self.run.rows()
        best = (summary.best["step"], summary.best["value"])
        curve = curve_of(rows, summary.metric)
        shown = highlights(scored_references(vars(summary)), summary.num_steps)
        lines = {reference.label: reference.score for reference in shown}
        if DATA in summary.reference:
            lines["the data itself"] = summary.reference[DATA]
        figure = curves_figure(summary.metric, curve, lines, best, logged_curves(rows))
        save_figure(self.run.curves, figure)
        on_step = self._listen if self.workers.size == 1 else None  # only the first draws
        sampling = Sampling(dxmi.evaluated, PICTURES, on_step=on_step, step=summary.best["step"])
        states = generate_states(sampling, self.gallery.num_ways, self.config.evaluate)
        self.gallery.draw_steps(self.run.samples / "steps.png", states)
        if self.config.train.iterations:
            self.gallery.draw_value(self.run.samples, dxmi.value, self.config.schedule.num_steps)


def labels_text(counts: Tensor | None) -> str:
    """Of which classes samples are drawn; nothing if there are none.

    Args:
        counts: samples of each class in the data, [C].
    """
    if counts is None:
        return ""
    shares = counts[counts > 0].double() / counts.sum()
    text = f"drawn with the frequencies of the data: {len(shares):,} of {len(counts):,} classes"
    if shares.max() == shares.min():
        return f"{text}, each as often"
    return f"{text}, {shares.min():.3%} to {shares.max():.3%} each"


def _newest(folder: Path, workers: Workers) -> tuple[Checkpoint | None, list[str]]:
    """The first worker's newest whole checkpoint and its complaints, on all."""
    found, complaints = checkpoint.newest(folder) if workers.is_first else (None, [])
    if workers.size == 1:
        return found, complaints
    about = workers.on_first(lambda: None if found is None else [found.step, found.meta])
    if about is None:
        return None, complaints
    own = {} if found is None else found.groups
    flat = {f"{group}/{key}": value for group, tensors in own.items() for key, value in tensors.items()}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in workers.agree(flat).items():
        group, _, key = name.partition("/")
        groups.setdefault(group, {})[key] = value
    return Checkpoint(checkpoint.path_of(folder, about[0]), about[0], groups, about[1]), complaints


def _keep_only(folder: Path, step: int, state: TrainingState) -> None:
    checkpoint.save(folder, step, state.groups(), {})
    checkpoint.prune(folder, {step})


def _read_summary(run: RunDirectory, tree: dict[str, Any]) -> Summary:
    names = [f.name for f in fields(Summary)]
    if not {f.name for f in fields(Summary) if f.default is MISSING and f.default_factory is MISSING} <= tree.keys():
        raise UserError(f"{run.summary} is damaged: delete it and train again; the run is then only finished anew.")
    return Summary(**{name: tree[name] for name in names if name in tree})


class _Stopwatch:
    """Wall seconds by phase, over all sessions of a run.

    Attributes:
        seconds: by phase.
    """

    def __init__(self) -> None:
        self.seconds = {phase.value: 0.0 for phase in Phase}
        self._phase: Phase | None = None
        self._waiting: Phase | None = None
        self._since = time.perf_counter()

    def enter(self, phase: Phase) -> None:
        """Begin a phase; the one before ends."""
        self.lap()
        self._phase = phase

    def pause(self) -> None:
        """Count no more until `go_on`."""
        self.lap()
        self._waiting, self._phase = self._phase, None

    def go_on(self) -> None:
        """Count for the phase that was paused, if one was."""
        if self._waiting is not None:
            self.enter(self._waiting)
            self._waiting = None

    def lap(self) -> None:
        """Add what has passed to the present phase."""
        now = time.perf_counter()
        if self._phase is not None:
            self.seconds[self._phase] += now - self._since
        self._since = now

    def add(self, earlier: Mapping[str, float]) -> None:
        """Count an earlier session's seconds too."""
        for phase, seconds in earlier.items():
            self.seconds[phase] += seconds


class _Window:
    """Metrics since the last row, still on the device; their mean is taken when a row is due."""

    def __init__(self) -> None:
        self.metrics: list[Mapping[str, Tensor]] = []

    def add(self, metrics: Mapping[str, Tensor]) -> None:
        self.metrics.append(metrics)

    def mean(self, step: int) -> dict[str, float]:
        """The means since the last call.

        Raises:
            DivergedError: one of them is not finite.
        """
        keys = list(self.metrics[0])
        means = torch.stack([torch.stack([m[key] for m in self.metrics]).mean() for key in keys]).tolist()
        self.metrics.clear()
        return require_finite_metrics(dict(zip(keys, means, strict=True)), step)


def _mean(draws: Sequence[Mapping[str, float]]) -> dict[str, float]:
    """Of each score, over the draws of the noise."""
    return {key: sum(draw[key] for draw in draws) / len(draws) for key in draws[0]}


def curve_of(rows: list[Row], key: str) -> list[tuple[float, float]]:
    """(iteration, value) of every row that has `key`."""
    return [(float(row["step"]), float(row[key])) for row in rows if key in row]


_PANELS = (
    *("eval/energy_auc", "energy/data_mean", "energy/sample_mean"),
    *("value/td_error", "policy/entropy", "policy/grad_norm"),
)


def logged_curves(rows: list[Row]) -> dict[str, list[tuple[float, float]]]:
    """What the small panels of curves.png show."""
    return {key: curve_of(rows, key) for key in _PANELS}
