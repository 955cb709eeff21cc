"""A study's folder and journal: what is written is read again, whoever was killed, and nothing else is believed."""

import itertools
import json
import os
import random
import shutil
from dataclasses import asdict, replace
from pathlib import Path

import optuna
import pytest
import torch
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend

from dxmi.config import build
from dxmi.errors import UserError
from dxmi.evaluation.config import NUM_SAMPLES_KEY, REPORT
from dxmi.evaluation.sampling import Sampling
from dxmi.evaluation.scorers import build_scorer
from dxmi.persistence import checkpoint
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.summary import Summary
from support import locked_by_another, missing, stating
from tune.config.sweep import BudgetConfig, ObjectiveConfig, SamplerConfig, StoppingConfig, SweepConfig, TrackingConfig
from tune.plans.sweep import Plan, metrics_of, plan_from, require_name
from tune.studies.folder import StudyFolder, studies_in
from tune.studies.ranking import pareto_front, ranked
from tune.studies.records import Outcome, TrialRecord, TrialState, completed, pruned, unfinished
from tune.studies.study import Study

METRIC = "eval/fid_digits"
ITERATIONS = 300
LR = "algorithm.policy.lr"
SPACE = {LR: {"log_uniform": [1e-6, 1e-4]}, "algorithm.entropy_coef": {"uniform": [0, 1]}}
ASHA = StoppingConfig(rule="asha", first_step=100, factor=3)
TWO = (ObjectiveConfig(), ObjectiveConfig(metric="num_steps"))


def make_plan(name: str = "study", space: dict | None = None, experiment: dict | None = None, **sweep) -> Plan:
    sweep.setdefault("sampler", SamplerConfig(kind="random"))
    tree = {"train": {"iterations": ITERATIONS}, "evaluate": {"every": 100}, **(experiment or {})}
    return Plan(name, build(ExperimentConfig, tree), SweepConfig(**sweep), space or SPACE)


def make_study(root: Path, plan: Plan | None = None) -> Study:
    """As a driver has it; the lock has made the folder."""
    plan = plan or make_plan()
    folder = StudyFolder(root / plan.name)
    with folder.lock():
        return Study.drive(folder, plan)


def summary(score: float, *, step: int = 200, num_steps: int = 5, kid: float = 0.5) -> dict:
    """What a finished run leaves."""
    best = {"value": score, "step": step, "checkpoint": f"checkpoints/step_{step:08d}", "selection_value": score - 1}
    return asdict(
        Summary(
            name="digits", signature="0" * 12, seed=0, metric=METRIC, num_samples=64, reference={"ddpm_1000": 9.0},
            best=best, last={**best, "step": ITERATIONS}, scores={"best": {METRIC: score, "eval/kid_digits": kid}},
            seconds_per_1000_images={}, iterations=ITERATIONS, num_steps=num_steps,
            seconds={"pretrain": 1.0, "references": 2.0, "finetune": 30.0, "report": 4.0}, device="cpu", threads=1,
            git_revision=None, versions={},
        )
    )  # fmt: skip


def ran(record: TrialRecord, curve: dict[int, float], saved: list[int]) -> None:
    """A run folder with rows and checkpoints, as far as a trial came."""
    record.run.create()
    record.run.append([{"step": step, METRIC: score} for step, score in curve.items()])
    for step in saved:
        so_far = [s for s in curve if s <= step]
        best = min(so_far, key=lambda s: curve[s])
        meta = {"best": {"step": best, "value": curve[best]}, "score": curve[step]}
        checkpoint.save(record.run.checkpoints, step, {"algorithm": {"w": torch.zeros(2)}}, meta)


def complete(study: Study, number: int, score: float, **more) -> None:
    study.finish(number, completed(study.plan, summary(score, **more)))


def facts(records: list[TrialRecord]) -> list[tuple]:
    """All of the records, comparable."""
    return [(r.number, r.values, r.signature, r.seed, r.run.path, r.outcome, r.same_as) for r in records]


def as_dashboard_does(folder: StudyFolder) -> optuna.Study:
    return optuna.load_study(
        study_name=folder.path.name, storage=JournalStorage(JournalFileBackend(str(folder.journal)))
    )


def everything(folder: Path) -> dict[str, tuple[bytes, int]]:
    """Every file, its bytes and when it was changed."""
    files = (path for path in folder.rglob("*") if path.is_file())
    return {str(path.relative_to(folder)): (path.read_bytes(), path.stat().st_mtime_ns) for path in files}


# ----------------------------------------------------------------------------
# The name and the plan


@pytest.mark.parametrize("name", ["a", "lr-1", "A_b.c-9", "_x", "9", "a" * 100, "digits.demo"])
def test_a_name_that_can_be_a_folder_is_one(name):
    require_name(name)


@pytest.mark.parametrize(
    "name",
    ["", ".", "..", ".hidden", "-x", "a/b", "/a", "a..b", "..a", "a\n", "a\nb", "a b", "a\x00", "ä", "a" * 101, "a:b",
     "a\\b", "~", "$HOME", "*", 300 * "a"],
)  # fmt: skip
def test_a_name_that_could_lead_elsewhere_is_refused(name):
    with pytest.raises(UserError, match=stating("name … 1 … 100")) as refused:
        make_plan(name)
    assert len(str(refused.value)) < 200
    assert "\n" not in str(refused.value)


PLANS = [
    make_plan(),
    make_plan(space={"data": {"label": {"choice": [None, 3]}}, LR: {"choice": [1e-5, 3]}}),
    make_plan(space={"algorithm.policy_mask": {"choice": [[1], [1, 0.5, 0, 1, 1]]}}),
    make_plan(space={LR: {"log_uniform": [1e-22, 1e-4], "points": 3}}, sampler=SamplerConfig(kind="grid")),
    make_plan(objectives=TWO, sampler=SamplerConfig(kind="nsga2"), budget=BudgetConfig(trials=3, wall_minutes=0.5)),
    make_plan(stopping=ASHA, max_concurrent=2, max_failures=0, experiment={"algorithm": {"reference_var": [0.5]}}),
    replace(make_plan(), tracking=TrackingConfig(uri="http://host:5000", experiment="Ünï 'x' #1: no")),
]


@pytest.mark.parametrize("plan", PLANS)
def test_a_plan_survives_the_way_to_yaml_and_back(plan):
    text = yaml.safe_dump(plan.tree(), sort_keys=False, allow_unicode=True)
    again = plan_from(yaml.safe_load(text))
    assert again == plan
    assert (again.signature, again.axes, again.identity) == (plan.signature, plan.axes, plan.identity)


@pytest.mark.parametrize("plan", PLANS)
def test_a_study_remembers_its_plan(plan, tmp_path):
    folder = StudyFolder(tmp_path / plan.name)
    folder.path.mkdir()
    folder.begin(plan)
    assert folder.read_plan() == plan
    folder.begin(plan)
    assert folder.read_plan() == plan


@pytest.mark.parametrize(
    ("other", "difference"),
    [
        (make_plan(experiment={"seed": 1}), "experiment.seed: 0 -> 1"),
        (make_plan(experiment={"train": {"iterations": 301}}), "experiment.train.iterations: 300 -> 301"),
        (make_plan(space={**SPACE, LR: {"log_uniform": [1e-6, 2e-4]}}), "[1e-06, 0.0001] -> [1e-06, 0.0002]"),
        (make_plan(sampler=SamplerConfig(kind="sobol")), "sweep.sampler.kind: random -> sobol"),
        (make_plan(sampler=SamplerConfig(kind="random", seed=1)), "sweep.sampler.seed: 0 -> 1"),
        (make_plan(stopping=ASHA), "sweep.stopping.rule: none -> asha"),
        (make_plan(objectives=(ObjectiveConfig(metric="seconds"),)), "sweep.objectives"),
    ],
)
def test_another_plan_in_the_same_folder_is_refused_with_the_difference(tmp_path, other, difference):
    make_study(tmp_path)
    before = everything(tmp_path)
    with pytest.raises(UserError) as refused:
        make_study(tmp_path, other)
    assert missing(difference, str(refused.value)) == []
    assert everything(tmp_path) == before


@pytest.mark.parametrize(
    "other",
    [
        make_plan(budget=BudgetConfig(trials=50, wall_minutes=3.0)),
        make_plan(max_failures=0),
        make_plan(max_concurrent=1),
        make_plan(experiment={"resources": {"threads": 1}}),
        replace(make_plan(), tracking=TrackingConfig(uri="none")),
    ],
)
def test_budget_resources_and_tracking_may_change_and_are_remembered(tmp_path, other):
    make_study(tmp_path)
    make_study(tmp_path, other)
    assert StudyFolder(tmp_path / "study").read_plan() == other


@pytest.mark.parametrize("kind", ["sobol", "random", "tpe"])
def test_plans_with_one_signature_propose_the_same_trials(tmp_path, kind):
    """Whatever the order in which two files write the same space."""
    sampler = SamplerConfig(kind=kind, start_with_defaults=False)
    plans = [make_plan(space=space, sampler=sampler) for space in (SPACE, dict(reversed(SPACE.items())))]
    values = [make_study(tmp_path / str(index), plan).add().values for index, plan in enumerate(plans)]
    assert plans[0].signature != plans[1].signature or values[0] == values[1]


def rewritten(folder: StudyFolder, *keys: str, to: object) -> None:
    """study.yaml with another value, by hand."""
    tree = yaml.safe_load(folder.plan.read_text())
    *groups, last = keys
    group = tree
    for key in groups:
        group = group[key]
    group[last] = to
    folder.plan.write_text(yaml.safe_dump(tree))


@pytest.mark.parametrize(
    ("keys", "to", "words"),
    [
        (("experiment", "train", "iterations"), 301, "study.yaml … edited"),
        (("sweep", "sampler", "seed"), 1, "study.yaml … edited"),
        (("sweep", "space", LR, "log_uniform"), [1e-6, 2e-4], "study.yaml … edited"),
        (("signature",), "0" * 12, "study.yaml … edited"),
        (("signature",), None, "study.yaml … edited"),
        (("format",), 2, "study.yaml … format 2 … 1"),
        (("format",), None, "study.yaml … format None"),
        (("experiment", "algorithm", "tau"), 1, "experiment.algorithm.tau … setting"),
        (("sweep", "sampler", "kind"), "magic", "sweep.sampler.kind is 'magic' … tpe"),
        (("sweep", "space"), {}, "sweep.space … empty"),
        (("experiment",), None, "experiment is None … group"),
        (("tracking",), "none", "tracking is 'none' … group"),
        (("name",), "other", "called other … folder"),
        (("name",), "../x", "name is '../x' … 1 … 100"),
        (("name",), None, "called None … folder"),
    ],
)
def test_a_study_yaml_that_was_edited_is_refused(tmp_path, keys, to, words):
    folder = make_study(tmp_path).folder
    rewritten(folder, *keys, to=to)
    with pytest.raises(UserError) as refused:
        folder.read_plan()
    assert missing(words, str(refused.value)) == []


@pytest.mark.parametrize("sweep", [None, "demo", 3, [1]])
def test_a_study_yaml_whose_sweep_is_no_group_is_refused_in_a_sentence(tmp_path, sweep):
    folder = make_study(tmp_path).folder
    rewritten(folder, "sweep", to=sweep)
    with pytest.raises(UserError, match="sweep"):
        folder.read_plan()


@pytest.mark.parametrize(
    "text", ["", "- a\n", "a: &x [1]\nb: *x\n", "a: !!python/object/apply:os.system [echo]\n", "{"]
)
def test_a_study_yaml_that_is_no_plain_yaml_is_refused(tmp_path, text):
    folder = make_study(tmp_path).folder
    folder.plan.write_text(text)
    with pytest.raises(UserError, match=r"study\.yaml"):
        folder.read_plan()


@pytest.mark.parametrize(
    ("sweep", "words"),
    [
        (
            {"objectives": (ObjectiveConfig(metric="fid"),)},
            "sweep.objectives[0].metric is 'fid' … score",
        ),
        (
            {"objectives": (ObjectiveConfig(metric="eval/fid_mnist"),)},
            "sweep.objectives[0].metric is 'eval/fid_mnist' … score",
        ),
        ({"objectives": (TWO[0], ObjectiveConfig(metric="loss"))}, "sweep.objectives[1].metric is 'loss'"),
        (
            {"objectives": (ObjectiveConfig(metric="num_steps"),), "stopping": ASHA},
            "sweep.stopping.rule is 'asha' … score",
        ),
        (
            {"objectives": (ObjectiveConfig(metric="eval/kid_digits"),), "stopping": ASHA},
            "sweep.stopping.rule is 'asha' … score",
        ),
        (
            {"objectives": (ObjectiveConfig(metric="seconds"),), "stopping": StoppingConfig(rule="median")},
            "sweep.stopping.rule is 'median' … score",
        ),
        ({"sampler": SamplerConfig(kind="grid")}, "grid … points"),
    ],
)
def test_a_sweep_that_does_not_suit_the_experiment_is_refused(sweep, words):
    with pytest.raises(UserError) as refused:
        make_plan(**sweep)
    assert missing(words, str(refused.value)) == []


@pytest.mark.parametrize("metric", ["score", METRIC])
def test_early_stopping_goes_by_the_score_under_either_name(metric):
    make_plan(objectives=(ObjectiveConfig(metric=metric),), stopping=ASHA)


def test_early_stopping_of_a_score_that_is_to_be_large_is_refused():
    """Its curve would be read the other way round: the best trials would be the ones that are stopped."""
    with pytest.raises(UserError):
        make_plan(objectives=(ObjectiveConfig(direction="maximize"),), stopping=ASHA)


@pytest.mark.parametrize("data", ["digits", "moons"])
def test_the_metrics_that_an_objective_may_name_are_those_that_are_scored(tmp_path, data):
    evaluate = {"num_samples": 32, "batch_size": 32, "projections": 4}
    own = {"kind": data} | ({"num_points": 100} if data == "moons" else {})
    config = build(ExperimentConfig, {"data": own, "evaluate": evaluate})
    experiment = Experiment(config)
    dxmi = experiment.build_algorithm(experiment.build_denoiser())
    scorer = build_scorer(experiment.data, config.evaluate, tmp_path, experiment.device)
    reported = set(scorer.full_evaluation(Sampling(dxmi.policy, REPORT), dxmi.value.energy).values) - {NUM_SAMPLES_KEY}
    assert reported == {metric for metric in metrics_of(config) if metric.startswith("eval/")}
    assert scorer.metric == replace(make_plan(), experiment=config).metric


# ----------------------------------------------------------------------------
# The folder


def test_a_folder_that_was_renamed_is_refused(tmp_path):
    folder = make_study(tmp_path).folder
    moved = folder.path.rename(tmp_path / "other")
    with pytest.raises(UserError, match=stating("called study … folder")):
        StudyFolder(moved).read_plan()


def test_a_folder_that_was_moved_is_read(tmp_path):
    study = make_study(tmp_path)
    study.add()
    (tmp_path / "elsewhere").mkdir()
    moved = StudyFolder(study.folder.path.rename(tmp_path / "elsewhere" / "study"))
    assert Study.read(moved).record(0).run.path == moved.path / "trials" / "0000"


def test_a_folder_of_another_user_is_refused(tmp_path, monkeypatch):
    folder = make_study(tmp_path).folder
    uid = os.getuid()
    monkeypatch.setattr(os, "getuid", lambda: uid + 1)
    for look in (folder.require_own, folder.lock, folder.read_plan, lambda: Study.read(folder)):
        with pytest.raises(UserError, match=stating("study … another user")):
            look()


def test_a_study_that_another_process_drives_is_refused_until_that_process_ends(tmp_path):
    folder = make_study(tmp_path).folder
    with locked_by_another(folder.path / ".lock") as holder:
        with pytest.raises(UserError, match=stating("Another process … study study")):
            folder.lock()
        assert Study.read(folder).records() == []  # looking is free
        holder.kill()
        holder.wait()
        with folder.lock():
            pass


def test_a_folder_that_cannot_be_made_is_refused(tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match=stating(f"{tmp_path / 'file'} … Not a directory")):
        StudyFolder(tmp_path / "file" / "study").lock()


def test_a_study_that_is_not_there_or_has_no_trials_is_said_to_be_so(tmp_path):
    folder = StudyFolder(tmp_path / "study")
    with pytest.raises(UserError, match=stating(f"no study … {tmp_path / 'study'}")):
        Study.read(folder)
    folder.path.mkdir()
    folder.begin(make_plan())
    for content in (None, b"", b'{"op_code": 0, "wor'):
        if content is not None:
            folder.journal.write_bytes(content)
        with pytest.raises(UserError, match=stating("study … no trials")):
            Study.read(folder)
        assert folder.journal.exists() is (content is not None)


def test_a_folder_of_studies_lists_them_by_name(tmp_path):
    for name in ("b", "a"):
        make_study(tmp_path, make_plan(name))
    (tmp_path / "no-study").mkdir()
    (tmp_path / "file").write_text("")
    assert [folder.path.name for folder in studies_in(tmp_path)] == ["a", "b"]
    assert studies_in(tmp_path / "nowhere") == []


def test_wall_time_is_remembered(tmp_path):
    folder = make_study(tmp_path).folder
    assert folder.read_progress() == {"seconds": 0.0, "device_seconds": 0.0, "ended": ""}
    folder.write_progress(12.5, "because", 25.0)
    assert folder.read_progress() == {"seconds": 12.5, "device_seconds": 25.0, "ended": "because"}


@pytest.mark.parametrize("text", ["", "[", "[1]", "3", "null", "{}", '{"seconds": "x"}', '{"ended": "y"}', "\x00"])
def test_a_damaged_progress_file_counts_as_none(tmp_path, text):
    folder = make_study(tmp_path).folder
    folder.progress.write_text(text)
    progress = folder.read_progress()
    assert progress["seconds"] == 0.0
    assert isinstance(progress["ended"], str)


def test_an_error_is_kept_in_the_trials_folder(tmp_path):
    folder = make_study(tmp_path).folder
    folder.write_error(7, "Traceback ...\nKeyError: 1")
    assert (folder.path / "trials" / "0007" / "error.txt").read_text() == "Traceback ...\nKeyError: 1\n"


# ----------------------------------------------------------------------------
# The journal


def session(study: Study) -> None:
    """Three trials in all states of being done."""
    for _ in range(3):
        study.add()
    for step, score in ((0, 9.0), (100, 7.0)):
        study.score(0, step, score)
    complete(study, 0, 6.5)
    study.score(1, 0, 8.0)
    study.finish(1, Outcome(TrialState.FAILED, "it broke", 8.0, 0, seconds=3.0))
    study.score(2, 0, 5.0)


def test_what_was_recorded_is_read_again(tmp_path):
    study = make_study(tmp_path)
    session(study)
    for again in (Study.read(study.folder), make_study(tmp_path)):
        assert facts(again.records()) == facts(study.records())
        assert again.curves() == study.curves() == {0: {0: 9.0, 100: 7.0}, 1: {0: 8.0}, 2: {0: 5.0}}
    states = [record.state for record in study.records()]
    assert states == [TrialState.COMPLETE, TrialState.FAILED, TrialState.RUNNING]


def test_half_a_last_line_and_a_stale_lock_are_mended_and_no_trial_is_lost(tmp_path):
    study = make_study(tmp_path)
    session(study)
    before, whole = facts(study.records()), study.folder.journal.read_bytes()
    lock = study.folder.path / "optuna.journal.lock"
    lock.write_text("")
    study.folder.journal.write_bytes(whole + b'{"op_code": 5, "trial_id": 2, "intermed')
    again = make_study(tmp_path)
    assert facts(again.records()) == before
    mended = study.folder.journal.read_bytes()
    assert mended.startswith(whole)
    assert b"intermed" not in mended.removeprefix(whole)
    assert again.add().number == 3
    assert not lock.exists()
    assert [record.number for record in Study.read(study.folder).records()] == [0, 1, 2, 3]


def test_a_driver_killed_at_any_byte_of_the_journal_leaves_what_it_had_recorded(tmp_path):
    study = make_study(tmp_path)
    session(study)
    whole = study.folder.journal.read_bytes()
    ends = [index + 1 for index, byte in enumerate(whole) if byte == ord("\n")]
    cuts = sorted({0, *ends, *(end - 1 for end in ends), *random.Random(0).sample(range(len(whole)), 25)})
    numbers = []
    for cut in cuts:
        study.folder.journal.write_bytes(whole[:cut])
        again = make_study(tmp_path)
        records = again.records()
        numbers.append(len(records))
        assert [record.number for record in records] == [*range(len(records))]
        for record, full in zip(records, study.records(), strict=False):
            assert (record.values, record.seed, record.signature) == (full.values, full.seed, full.signature)
            assert record.outcome in (full.outcome, Outcome(TrialState.RUNNING))
            assert set(again.curves()[record.number]) <= set(study.curves()[record.number])
        assert again.add().number == len(records)
        assert again.reconcile() is not None
    assert numbers == sorted(numbers)
    assert {0, 1, 2, 3} == set(numbers)


@pytest.mark.parametrize("tail", [b"", b'{"op_code": 5, "trial_id": 2, "intermed'])
def test_reading_changes_nothing_even_while_the_driver_writes(tmp_path, tail):
    study = make_study(tmp_path)
    session(study)
    with study.folder.journal.open("ab") as journal:
        journal.write(tail)
    before = everything(tmp_path)
    with study.folder.lock():
        before = everything(tmp_path)
        reader = Study.read(study.folder)
        ranked(reader.plan, reader.records())
        reader.curves()
        reader.config(reader.record(1))
        assert everything(tmp_path) == before


def test_the_journal_opens_as_optuna_dashboard_opens_it(tmp_path):
    study = make_study(tmp_path)
    session(study)
    seen = as_dashboard_does(study.folder)
    assert [trial.state.name for trial in seen.trials] == ["COMPLETE", "FAIL", "RUNNING"]
    assert seen.best_trial.number == 0
    assert seen.best_value == 6.5
    assert seen.trials[0].intermediate_values == {0: 9.0, 100: 7.0}
    assert set(seen.trials[0].params) == set(SPACE)
    assert seen.direction.name == "MINIMIZE"


@pytest.mark.parametrize("content", [b"garbage\n", b'{"op_code": 99}\n', b"\xff\xfe\n", b"[]\n"])
def test_a_journal_that_is_none_is_refused_in_a_sentence(tmp_path, content):
    folder = make_study(tmp_path).folder
    folder.journal.write_bytes(content + folder.journal.read_bytes())
    for look in (lambda: Study.read(folder), lambda: make_study(tmp_path)):
        with pytest.raises(UserError, match=r"optuna\.journal"):
            look()


# ----------------------------------------------------------------------------
# Trials


def test_a_journal_that_lost_what_we_keep_with_a_trial_is_refused_in_a_sentence(tmp_path):
    folder = make_study(tmp_path).folder
    Study.drive(folder, make_plan()).add()
    folder.journal.write_text(folder.journal.read_text().replace('"dxmi"', '"other"'))
    for look in (lambda: Study.read(folder), lambda: make_study(tmp_path)):
        with pytest.raises(UserError, match=stating("optuna.journal … damaged")):
            look()


def test_trials_are_added_until_all_that_are_planned_have_been(tmp_path):
    study = make_study(tmp_path, make_plan(budget=BudgetConfig(trials=3)))
    records = [study.add() for _ in range(3)]
    assert study.add() is None
    assert [record.number for record in records] == [0, 1, 2]
    assert records[0].values == {LR: 1e-5, "algorithm.entropy_coef": 0.1}  # the defaults
    for record in records:
        config = study.config(record)
        assert config.algorithm.policy.lr == record.values[LR]
        assert config.algorithm.entropy_coef == record.values["algorithm.entropy_coef"]
        assert (record.signature, record.seed) == (config.signature, 0)
        assert record.outcome == Outcome(TrialState.RUNNING)
        assert record.run.path == study.folder.path / "trials" / f"{record.number:04d}"
    more = make_study(tmp_path, make_plan(budget=BudgetConfig(trials=4)))
    assert more.add().number == 3
    assert more.add() is None


def test_a_seed_that_varies_is_the_trials_own(tmp_path):
    study = make_study(tmp_path, make_plan(space={"seed": {"choice": [4, 5]}}, sampler=SamplerConfig(kind="grid")))
    assert [study.add().seed, study.add().seed] == [4, 5]


def test_values_that_are_only_refused_together_are_added_and_their_config_says_so(tmp_path):
    space = {"schedule.num_steps": {"choice": [5, 3]}, "algorithm.policy_mask": {"choice": [[1], [1, 1, 1, 0, 0]]}}
    study = make_study(tmp_path, make_plan(space=space, sampler=SamplerConfig(kind="grid")))
    records = [study.add() for _ in range(4)]
    with pytest.raises(UserError, match=stating("algorithm.policy_mask … 5 entries")):
        study.config(records[3])
    assert len({record.signature for record in records}) == 4
    assert [len(record.signature) for record in records] == [12] * 4


@pytest.mark.parametrize("two", [False, True])
@pytest.mark.parametrize(
    ("state", "in_optuna"),
    [
        (TrialState.COMPLETE, "COMPLETE"),
        (TrialState.PRUNED, "PRUNED"),
        (TrialState.STOPPED, "PRUNED"),
        (TrialState.DIVERGED, "FAIL"),
        (TrialState.FAILED, "FAIL"),
    ],
)
def test_each_end_has_its_state_in_optuna_and_comes_back_as_it_was(tmp_path, state, in_optuna, two):
    sampler = SamplerConfig(kind="nsga2" if two else "random")
    study = make_study(tmp_path, make_plan(objectives=TWO if two else TWO[:1], sampler=sampler))
    study.add()
    study.score(0, 0, 9.0)
    study.score(0, 100, 7.0)
    values = ((7.5, 5.0) if two else (7.5,)) if state is TrialState.COMPLETE else ()
    outcome = Outcome(state, "why", 7.5, 100, values, 12.0)
    study.finish(0, outcome)
    assert Study.read(study.folder).record(0).outcome == outcome
    (trial,) = as_dashboard_does(study.folder).trials
    assert trial.state.name == in_optuna
    assert tuple(trial.values or ()) == values or in_optuna == "PRUNED"
    assert study.reconcile() == []
    assert study.add().number == 1


def test_diverged_and_failed_trials_are_failures_and_no_others_are():
    assert {state for state in TrialState if state.is_failure} == {TrialState.DIVERGED, TrialState.FAILED}


def test_a_trial_ends_once_and_for_all(tmp_path):
    study = make_study(tmp_path)
    study.add()
    first = Outcome(TrialState.FAILED, "first")
    study.finish(0, first)
    journal = study.folder.journal.read_bytes()
    study.finish(0, Outcome(TrialState.COMPLETE, "", 1.0, 100, (1.0,)))
    assert study.record(0).outcome == first
    assert study.folder.journal.read_bytes() == journal


def test_a_trial_whose_config_was_complete_before_is_the_same_as_that_one(tmp_path):
    space = {"seed": {"choice": [0, 1]}}
    sampler = SamplerConfig(kind="random", start_with_defaults=False)
    study = make_study(tmp_path, make_plan(space=space, sampler=sampler, budget=BudgetConfig(trials=30)))
    first: dict[int, int] = {}
    ends = itertools.cycle([TrialState.FAILED, TrialState.PRUNED, TrialState.COMPLETE])
    for _ in range(20):
        record = study.add()
        assert record.same_as == first.get(record.seed)
        assert Study.read(study.folder).record(record.number).same_as == record.same_as
        state = next(ends)
        if state is TrialState.COMPLETE:
            complete(study, record.number, 3.0)
            first.setdefault(record.seed, record.number)
        else:
            study.finish(record.number, Outcome(state))
    assert set(first) == {0, 1}


def test_a_trial_that_still_runs_is_no_trial_to_share_with(tmp_path):
    study = make_study(tmp_path, make_plan(space={"seed": {"choice": [0]}}))
    assert [study.add().same_as, study.add().same_as] == [None, None]


def test_tidying_keeps_the_best_and_the_last_checkpoint(tmp_path):
    study = make_study(tmp_path)
    record = study.add()
    assert study.tidy(0) == 0  # it has no folder yet
    ran(record, {0: 9.0, 100: 5.0, 200: 6.0, 300: 7.0}, saved=[0, 100, 200, 300])
    size = study.tidy(0)
    assert checkpoint.steps_in(record.run.checkpoints) == [100, 300]
    assert size == sum(path.stat().st_size for path in record.run.path.rglob("*") if path.is_file()) > 0
    assert study.tidy(0) == size


# ----------------------------------------------------------------------------
# Outcomes


def test_the_outcome_of_a_summary_has_the_score_of_the_best_checkpoint(tmp_path):
    outcome = completed(make_plan(), summary(6.5, step=200))
    assert (outcome.state, outcome.score, outcome.step, outcome.objectives) == (TrialState.COMPLETE, 6.5, 200, (6.5,))
    assert outcome.seconds == 1.0 + 2.0 + 30.0 + 4.0
    assert completed(make_plan(), summary(6.5), seconds=3.0).seconds == 3.0


@pytest.mark.parametrize(
    ("metric", "value"),
    [("score", 6.5), (METRIC, 6.5), ("eval/kid_digits", 0.25), ("num_steps", 7.0), ("seconds", 30.0)],
)
def test_an_objective_may_be_any_score_the_steps_or_the_seconds(metric, value):
    outcome = completed(make_plan(objectives=(ObjectiveConfig(metric=metric),)), summary(6.5, num_steps=7, kid=0.25))
    assert outcome.objectives == (value,)
    assert outcome.score == 6.5


def test_two_objectives_come_in_the_order_of_the_plan():
    two = (ObjectiveConfig(metric="num_steps"), ObjectiveConfig(metric="score"))
    plan = make_plan(objectives=two, sampler=SamplerConfig(kind="nsga2"))
    assert completed(plan, summary(6.5, num_steps=7)).objectives == (7.0, 6.5)


def test_the_outcome_of_a_pruned_trial_is_its_best_score_until_then():
    outcome = pruned(make_plan(), {0: 9.0, 100: 5.0, 200: 6.0, 300: 1.0}, 200, 4.0)
    assert missing("behind … 200", outcome.reason) == []
    assert outcome == Outcome(TrialState.PRUNED, outcome.reason, 5.0, 100, (), 4.0)


def test_the_outcome_of_a_stopped_trial_is_its_best_score_if_it_has_one():
    assert unfinished(make_plan(), {0: 9.0, 100: 5.0}, TrialState.STOPPED, "why", 4.0) == Outcome(
        TrialState.STOPPED, "why", 5.0, 100, (), 4.0
    )
    assert unfinished(make_plan(), {}, TrialState.FAILED, "why", 4.0) == Outcome(
        TrialState.FAILED, "why", None, None, (), 4.0
    )


# ----------------------------------------------------------------------------
# After a crash


def test_a_trial_falls_behind_at_a_rung_but_never_at_its_last_iteration(tmp_path):
    study = make_study(tmp_path, make_plan(stopping=ASHA))
    for score in (5.0, 9.0):
        record = study.add()
        for step in (0, 100, 200, ITERATIONS):
            study.score(record.number, step, score)
    assert [step for step in (0, 100, 200, ITERATIONS) if study.should_prune(1, step)] == [100]
    assert not any(study.should_prune(0, step) for step in (0, 100, 200, ITERATIONS))


def test_the_first_trial_may_be_spared(tmp_path):
    for spare in (False, True):
        study = make_study(tmp_path / str(spare), make_plan(stopping=replace(ASHA, spare_first=spare)))
        for number, score in enumerate((9.0, 2.0, 1.0)):
            study.add()
            study.score(number, 100, score)
        assert study.should_prune(0, 100) is not spare
        assert study.should_prune(1, 100)


def test_the_median_goes_by_complete_trials_alone(tmp_path):
    study = make_study(tmp_path, make_plan(stopping=StoppingConfig(rule="median", first_step=100, min_trials=2)))
    for _ in range(4):
        study.add()
    for number, score in ((0, 5.0), (1, 5.0), (2, 1.0), (3, 9.0)):
        study.score(number, 100, score)
    complete(study, 0, 5.0)
    study.finish(2, Outcome(TrialState.PRUNED, "", 1.0, 100))
    assert not study.should_prune(3, 100)
    complete(study, 1, 5.0)
    assert study.should_prune(3, 100)


def test_a_crashed_session_is_brought_up_to_date_from_the_run_folders(tmp_path):
    plan = make_plan(stopping=ASHA, budget=BudgetConfig(trials=9))
    study = make_study(tmp_path, plan)
    records = [study.add() for _ in range(7)]
    whole = {0: 9.0, 100: 5.0, 200: 4.0, 300: 3.5}
    # 0 had ended; 1 has a summary that nobody heard of; 2 was told to stop at the rung and saved; 3 is as good as 0
    # there; 4 was killed before it saved at the rung; 5 had only begun; 6 not even that.
    ran(records[0], whole, [300])
    for step, score in whole.items():
        study.score(0, step, score)
    complete(study, 0, 3.6)
    ran(records[1], whole, [200, 300])
    records[1].run.write_summary(summary(3.7, step=300))
    ran(records[2], {0: 9.0, 100: 8.0}, [0, 100])
    ran(records[3], {0: 9.0, 100: 5.0}, [0, 100])
    ran(records[4], {0: 9.0, 100: 8.0}, [0])
    ran(records[5], {}, [])
    before = facts(study.records())[0]

    again = make_study(tmp_path, plan)
    assert [record.number for record in again.reconcile()] == [3, 4, 5, 6]
    outcomes = {record.number: record.outcome for record in again.records()}
    assert facts(again.records())[0] == before
    assert outcomes[1] == Outcome(TrialState.COMPLETE, "", 3.7, 300, (3.7,), 37.0)
    assert missing("behind … 100", outcomes[2].reason) == []
    assert outcomes[2] == Outcome(TrialState.PRUNED, outcomes[2].reason, 8.0, 100)
    assert {outcomes[number].state for number in (3, 4, 5, 6)} == {TrialState.RUNNING}
    assert again.curves()[1] == whole
    assert again.curves()[4] == {0: 9.0, 100: 8.0}
    assert [trial.state.name for trial in as_dashboard_does(again.folder).trials[:3]] == [
        "COMPLETE",
        "COMPLETE",
        "PRUNED",
    ]


def test_reconciling_again_changes_nothing(tmp_path):
    study = make_study(tmp_path, make_plan(stopping=ASHA))
    for curve in ({0: 9.0, 100: 5.0}, {0: 9.0, 100: 8.0}, {0: 9.0}):
        ran(study.add(), curve, [*curve])
    first = [record.number for record in make_study(tmp_path, study.plan).reconcile()]
    records, curves = facts(Study.read(study.folder).records()), Study.read(study.folder).curves()
    assert first == [0, 2]
    assert [record.number for record in make_study(tmp_path, study.plan).reconcile()] == first
    assert (facts(Study.read(study.folder).records()), Study.read(study.folder).curves()) == (records, curves)


def test_a_damaged_summary_is_named(tmp_path):
    study = make_study(tmp_path)
    record = study.add()
    record.run.create()
    record.run.summary.write_text("{")
    with pytest.raises(UserError, match=stating("summary.json … damaged")):
        study.reconcile()


# ----------------------------------------------------------------------------
# Ranking


def made_up(number: int, outcome: Outcome) -> TrialRecord:
    return TrialRecord(number, {}, "", 0, StudyFolder(Path("nowhere")).run(number), outcome)


def test_the_leaderboard_is_complete_trials_then_those_with_a_score_then_the_rest():
    outcomes = [
        Outcome(TrialState.FAILED, "x"),
        Outcome(TrialState.PRUNED, "x", 1.0, 100),
        Outcome(TrialState.COMPLETE, "", 5.0, 100, (5.0,)),
        Outcome(TrialState.RUNNING),
        Outcome(TrialState.STOPPED, "x", 0.5, 100),
        Outcome(TrialState.COMPLETE, "", 3.0, 100, (3.0,)),
        Outcome(TrialState.COMPLETE, "", 5.0, 100, (5.0,)),
    ]
    records = [made_up(number, outcome) for number, outcome in enumerate(outcomes)]
    assert [record.number for record in ranked(make_plan(), records)] == [5, 2, 6, 4, 1, 0, 3]


def test_the_leaderboard_goes_by_the_first_objective_in_its_direction():
    plan = make_plan(objectives=(ObjectiveConfig(metric="eval/recall_digits", direction="maximize"),))
    values = [(5.0, 0.1), (6.0, 0.9), (7.0, 0.5)]
    records = [made_up(n, Outcome(TrialState.COMPLETE, "", s, 1, (r,))) for n, (s, r) in enumerate(values)]
    assert [record.number for record in ranked(plan, records)] == [1, 2, 0]


@pytest.mark.parametrize("seed", range(6))
@pytest.mark.parametrize("directions", [("minimize", "minimize"), ("minimize", "maximize"), ("maximize", "maximize")])
def test_the_pareto_front_by_brute_force(seed, directions):
    rng = random.Random(seed)
    metrics = ("score", "num_steps")
    objectives = tuple(ObjectiveConfig(metric=m, direction=d) for m, d in zip(metrics, directions, strict=True))
    plan = make_plan(objectives=objectives, sampler=SamplerConfig(kind="nsga2"))
    points = [(float(rng.randrange(6)), float(rng.randrange(6))) for _ in range(25)]  # with equal points
    records = [made_up(n, Outcome(TrialState.COMPLETE, "", 1.0, 1, point)) for n, point in enumerate(points)]
    records.append(made_up(25, Outcome(TrialState.PRUNED, "x", -1.0, 1)))

    def better(one: float, other: float, direction: str) -> bool:
        return one < other if direction == "minimize" else one > other

    def beats(one: tuple[float, float], other: tuple[float, float]) -> bool:
        wins = [better(a, b, d) for a, b, d in zip(one, other, directions, strict=True)]
        losses = [better(b, a, d) for a, b, d in zip(one, other, directions, strict=True)]
        return any(wins) and not any(losses)

    expected = {n for n, point in enumerate(points) if not any(beats(other, point) for other in points)}
    front = pareto_front(plan, records)
    assert {record.number for record in front} == expected
    first = [record.outcome.objectives[0] for record in front]
    assert first == sorted(first, reverse=directions[0] == "maximize")


def test_without_complete_trials_there_is_no_front():
    plan = make_plan(objectives=TWO, sampler=SamplerConfig(kind="nsga2"))
    assert pareto_front(plan, [made_up(0, Outcome(TrialState.FAILED, "x"))]) == []
    assert ranked(plan, []) == []


def test_nothing_in_a_study_is_pickled(tmp_path):
    """Opening one runs no code: all of it is text."""
    study = make_study(tmp_path)
    session(study)
    study.folder.write_progress(1.0, "x")
    for line in study.folder.journal.read_text().splitlines():
        json.loads(line)
    yaml.safe_load(study.folder.plan.read_text())
    copied = shutil.copytree(study.folder.path, tmp_path / "copy" / "study")
    assert [r.values for r in Study.read(StudyFolder(copied)).records()] == [r.values for r in study.records()]


def test_permission_to_execute_code_is_neither_written_nor_read(tmp_path):
    """The file of another person must not give it; the resumed command must."""
    plan = make_plan(experiment={"resources": {"allow_code": True}})
    folder = make_study(tmp_path, plan).folder
    assert plan.resume_line("there").endswith(" resources.allow_code=true")
    tree = yaml.safe_load(folder.plan.read_text())
    assert "allow_code" not in tree["experiment"]["resources"]
    tree["experiment"]["resources"]["allow_code"] = True
    folder.plan.write_text(yaml.safe_dump(tree))
    read = folder.read_plan()
    assert not read.experiment.resources.allow_code
    assert read.signature == plan.signature
