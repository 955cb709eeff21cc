"""A study: its folder, its plan, and the records of its trials.

    studies/NAME/
        study.yaml        the plan: experiment, sweep with its space, tracking; written once
        optuna.journal    every trial: values, state, scores by iteration; can be opened in optuna-dashboard
        trials/0007/      run folder of trial 7, as written by `dxmi train`; error.txt if it crashed
        progress.json     wall seconds so far, and why the last session ended
        confirmation.json the best trial's scores on fresh noise, see tune.studies.confirmation
        leaderboard.csv, best.yaml, report.html

The journal and the run folders are the source of truth: everything else is derived from them. Only one driver writes at
a time. Nothing is pickled, so opening a study executes no code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from typing import TYPE_CHECKING, Any, Self

from dxmi.config import signature
from dxmi.errors import UserError
from dxmi.metrics.keys import sign_of
from dxmi.training.config import ExperimentConfig
from tune.compat import set_intermediate_value, set_user_attribute
from tune.plans.ablation import AblationPlan
from tune.plans.sweep import Plan
from tune.search.pruners import should_prune
from tune.search.samplers import Proposal, template
from tune.studies import journal
from tune.studies.folder import StudyFolder
from tune.studies.records import Outcome, TrialRecord, TrialSpec, TrialState, completed, pruned
from tune.studies.seed_means import seed_runs

if TYPE_CHECKING:
    import optuna
    from optuna.trial import FrozenTrial

_RECORDED = "dxmi"
"""User attribute of an Optuna trial that holds the fields that Optuna does not have."""


_TO_OPTUNA = {
    TrialState.COMPLETE: "COMPLETE",
    TrialState.PRUNED: "PRUNED",
    TrialState.STOPPED: "PRUNED",
    TrialState.DIVERGED: "FAIL",
    TrialState.FAILED: "FAIL",
}
"""Names of Optuna's states by state of a trial."""


# ----------------------------------------------------------------------------
# The folder


# ----------------------------------------------------------------------------
# The study


class Study:
    """The trials of a study; every change is on disk when the method returns.

    Open it with `Study.drive` to change it, or with `Study.read` to read it.
    """

    def __init__(self, folder: StudyFolder, plan: Plan, optuna_study: "optuna.Study") -> None:
        self.folder = folder
        self.plan = plan
        self._optuna = optuna_study
        self._specs: dict[int, TrialSpec] = {}
        self._curves: dict[int, dict[int, float]] = {}
        self._ended: dict[int, TrialRecord] = {}
        self._complete_by_signature: dict[str, int] = {}

    @classmethod
    def drive(cls, folder: StudyFolder, plan: Plan) -> Self:
        """Create or resume the study. The caller must hold the folder's lock.

        Raises:
            UserError: the folder holds a different study.
        """
        plan = folder.begin(plan)
        journal.mend(folder.journal)
        directions: list[Any] = [objective.direction for objective in plan.objectives]
        with journal.readable(folder.journal):
            return cls(folder, plan, journal.create(folder.journal, plan.name, directions))._with_whole_records()

    @classmethod
    def read(cls, folder: StudyFolder) -> Self:
        """Open the current state of the study for reading; another process may be driving it.

        Raises:
            UserError: there is no study, or its driver was killed before the first trial.
        """
        plan = folder.read_plan()
        missing = UserError(f"The study {plan.name} has no trials yet. Resume it with: {plan.resume_line(folder.path)}")
        with journal.readable(folder.journal):
            study = journal.load(folder.journal, plan.name)
            if study is None:
                raise missing
            return cls(folder, plan, study)._with_whole_records()

    def _with_whole_records(self) -> Self:
        """Read every record, which detects lines that are missing in the journal, and return this study."""
        self.records()
        return self

    # ------------------------------------------------------------------------
    # Reading

    def records(self) -> list[TrialRecord]:
        """Records of all trials, in the order of their numbers."""
        return [self._record(trial) for trial in self._trials()]

    def record(self, number: int) -> TrialRecord:
        """Record of one trial."""
        return self._record(self._trials()[number])

    @property
    def optuna(self) -> "optuna.Study":
        """The Optuna study, for plots and parameter importances."""
        return self._optuna

    def _trials(self) -> "list[FrozenTrial]":
        return self._optuna.get_trials(deepcopy=False)

    def _record(self, trial: "FrozenTrial") -> TrialRecord:
        """A trial's record; records of ended trials are cached, since they do not change anymore."""
        if trial.number in self._ended:
            return self._ended[trial.number]
        record = self._made_record(trial)
        if record.state is not TrialState.RUNNING:
            self._ended[trial.number] = record
        if record.state is TrialState.COMPLETE:
            self._complete_by_signature.setdefault(record.signature, record.number)
        return record

    def _made_record(self, trial: "FrozenTrial") -> TrialRecord:
        about: dict[str, Any] = {**trial.user_attrs[_RECORDED]}
        return TrialRecord(
            number=trial.number,
            values={axis.path: axis.value(trial.params[self.plan.journal_name(axis.path)]) for axis in self.plan.axes},
            signature=about["signature"],
            seed=about["seed"],
            run=self.folder.run(trial.number),
            outcome=_outcome(trial, about.get("outcome")),
            same_as=about["same_as"],
            further_runs=seed_runs(self.folder.run(trial.number).path, self.plan.trial_seeds)[1:],
        )

    def config(self, record: TrialRecord) -> ExperimentConfig:
        """The config of a trial.

        Raises:
            UserError: the combination of its values is invalid.
        """
        spec = self.spec(record)
        if spec.config is None:
            raise UserError(spec.refusal)
        return spec.config

    def spec(self, record: TrialRecord) -> TrialSpec:
        """A trial as it was proposed; its config is built once and cached in this object."""
        if record.number not in self._specs:
            self._specs[record.number] = TrialSpec.of(self.plan, record.number, record.values)
        return self._specs[record.number]

    def curves(self) -> dict[int, dict[int, float]]:
        """Scores by iteration of every trial."""
        for trial in self._trials():
            if trial.number not in self._curves:
                self._curves[trial.number] = dict(trial.intermediate_values)
        return self._curves

    # ------------------------------------------------------------------------
    # Changing

    def add(self) -> TrialRecord | None:
        """Propose a trial and record it as running; None if there is none to start, or not before another ends."""
        history = self._trials()
        return self._add(history, self.plan.propose(history))

    def add_to_program(self, record: TrialRecord, number: int) -> TrialRecord | None:
        """Propose a trial that shares this one's program of `number` seeds and record it as running; else None."""
        history = self._trials()
        return self._add(history, self.plan.propose_for_program(history, record.values, number))

    def record_stack(self, number: int) -> None:
        """Record in the plan how many seeds of an arm each program trains."""
        if isinstance(self.plan, AblationPlan) and self.plan.stacked != number:
            self.plan = replace(self.plan, stacked=number)
            self.folder.write_plan(self.plan)

    def _add(self, history: "Sequence[FrozenTrial]", proposal: Proposal | None) -> TrialRecord | None:
        if proposal is None:
            return None
        spec = TrialSpec.of(self.plan, len(history), proposal.values)
        about = self._about(spec)
        self._optuna.add_trial(template(self.plan.axes, proposal, {_RECORDED: about}))
        self._specs[spec.number] = spec
        return self.record(spec.number)

    @property
    def is_done(self) -> bool:
        """Whether no further trial will be started."""
        return self.plan.is_done(self._trials())

    def _about(self, spec: TrialSpec) -> dict[str, Any]:
        if spec.config is not None:
            about = {"signature": spec.config.signature, "seed": spec.config.seed}
        else:
            made_up = signature([self.plan.signature, dict(spec.values)])
            about = {"signature": made_up, "seed": self.plan.experiment.seed}
        self.records()  # updates the index of complete trials
        return {**about, "same_as": self._complete_by_signature.get(str(about["signature"]))}

    def score(self, number: int, step: int, score: float) -> None:
        """Record an intermediate score of a trial."""
        self.curves().setdefault(number, {})[step] = score
        set_intermediate_value(self._optuna, self._trials()[number], step, score)

    def should_prune(self, number: int, step: int) -> bool:
        """Whether a trial that has just been scored should stop early; never true at its last iteration."""
        if step >= self.spec(self.record(number)).iterations:
            return False
        if number == 0 and self.plan.sweep.stopping.spare_first:
            return False
        finished = [record.number for record in self._complete()]
        sign = sign_of(self.plan.direction)
        curves = {n: {s: sign * score for s, score in curve.items()} for n, curve in self.curves().items()}
        return should_prune(self.plan.sweep.stopping, curves, finished, number, step)

    def _complete(self) -> "list[FrozenTrial]":
        from optuna.trial import TrialState as OptunaState  # noqa: PLC0415

        return self._optuna.get_trials(deepcopy=False, states=(OptunaState.COMPLETE,))

    def finish(self, number: int, outcome: Outcome) -> None:
        """Record how a trial ended; has no effect if it is already recorded."""
        from optuna.trial import TrialState as OptunaState  # noqa: PLC0415

        trial = self._trials()[number]
        if trial.state.is_finished():
            return
        about = {**trial.user_attrs[_RECORDED], "outcome": asdict(outcome)}
        set_user_attribute(self._optuna, trial, _RECORDED, about)
        values = list(outcome.objectives) if outcome.state is TrialState.COMPLETE else None
        self._optuna.tell(number, values, state=OptunaState[_TO_OPTUNA[outcome.state]])

    def tidy(self, number: int) -> int:
        """Delete all checkpoints of an ended trial except the best and the last.

        Returns:
            Size of the run folder in bytes.
        """
        from dxmi.persistence.checkpoint import newest, prune  # noqa: PLC0415  (it imports PyTorch)

        record = self.record(number)
        for run in record.runs:
            saved, _ = newest(run.checkpoints)
            if saved is not None:
                best = saved.meta["best"]
                prune(run.checkpoints, {saved.step, *([best["step"]] if best else [])})
        return sum(file.stat().st_size for file in record.run.path.rglob("*") if file.is_file())

    # ------------------------------------------------------------------------
    # After a crash

    def reconcile(self) -> list[TrialRecord]:
        """Update the journal from the run folders.

        A trial may have ended, or may have been about to be pruned, when its driver was killed.

        Returns:
            The unfinished trials that should be resumed, oldest first.
        """
        unfinished = []
        for record in self.records():
            if record.state is not TrialState.RUNNING:
                continue
            for step, score in record.curve(self.plan.metric).items():
                self.score(record.number, step, score)
            outcome = self._missed_outcome(record)
            if outcome is None:
                unfinished.append(record)
            else:
                self.finish(record.number, outcome)
        return unfinished

    def _missed_outcome(self, record: TrialRecord) -> Outcome | None:
        from dxmi.persistence.checkpoint import newest  # noqa: PLC0415  (it imports PyTorch)

        summary = record.summary()
        if summary is not None:
            return completed(self.plan, summary)
        saved = [found.step for run in record.runs if (found := newest(run.checkpoints)[0]) is not None]
        curve = self.curves()[record.number]
        step = min(saved, default=-1)  # that of the seed that is furthest behind
        if len(saved) == len(record.runs) and step in curve and self.should_prune(record.number, step):
            return pruned(self.plan, curve, step)
        return None


def _outcome(trial: "FrozenTrial", recorded: Mapping[str, Any] | None) -> Outcome:
    if recorded is None or not trial.state.is_finished():
        return Outcome(TrialState.RUNNING)
    outcome = Outcome(**recorded)
    objectives, by_seed = tuple(outcome.objectives), tuple(outcome.by_seed)
    return replace(outcome, state=TrialState(outcome.state), objectives=objectives, by_seed=by_seed)


# ----------------------------------------------------------------------------
# Ranking
