"""Whole sweeps on a small local Ray: what is trained, recorded and said, and what one bad trial does to the others."""

import json
import os
import random
import re
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import mlflow
import optuna
import pandas as pd
import pytest
import yaml
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from rich.console import Console

from dxmi.data.images import LOADERS
from dxmi.errors import UserError
from support import TINY, changed, locked_by_another, missing, processes_with, stating, wait_until
from tune import Sweep
from tune.cli.main import main
from tune.execution.confirmation import fresh_scores
from tune.studies.confirmation import chosen, confirmations
from tune.studies.folder import StudyFolder
from tune.studies.leaderboard import fresh_sentence
from tune.studies.records import TrialState
from tune.studies.study import Study

QUIET = Console(quiet=True)


def runs_of(folder: StudyFolder):
    """(parents, children) of a study in its local store."""
    client = mlflow.MlflowClient(f"sqlite:///{(folder.path.parent / 'mlflow.db').resolve()}")
    runs = client.search_runs([client.get_experiment_by_name("dxmi").experiment_id])
    mine = [run for run in runs if run.data.tags["study"] == folder.path.name]
    children = [run for run in mine if "mlflow.parentRunId" in run.data.tags]
    return [run for run in mine if run not in children], children


def optuna_states(folder: StudyFolder):
    storage = JournalStorage(JournalFileBackend(str(folder.journal)))
    return [trial.state.name for trial in optuna.load_study(study_name=folder.path.name, storage=storage).trials]


def summaries(folder: StudyFolder):
    """What came out of each trial, without times and the like."""
    found = {}
    for path in sorted(folder.trials.glob("*/summary.json")):
        tree = json.loads(path.read_text())
        found[path.parent.name] = {key: tree[key] for key in ("signature", "best", "last", "scores", "reference")}
    return found


SMALL = [*TINY, "sweep=demo", "sweep.budget.trials=3", "sweep.stopping.rule=none"]


@pytest.fixture(scope="module")
def studies(tmp_path_factory):
    return tmp_path_factory.mktemp("studies")


@pytest.fixture(scope="module")
def finished(studies):
    """A study of three trials, two at a time, from the command line."""
    assert main(["sweep", "name=first", *SMALL, "--studies", str(studies)]) == 0
    return StudyFolder(studies / "first")


def test_a_sweep_runs_its_trials_and_leaves_a_leaderboard(finished):
    table = pd.read_csv(finished.leaderboard)
    assert list(table["state"]) == ["complete"] * 3
    assert sorted(table["trial"]) == [0, 1, 2]
    assert table["score"].is_monotonic_increasing
    assert finished.report.stat().st_size > 10_000
    assert not finished.scratch.exists()


def test_the_best_trial_is_scored_once_more_on_noise_that_did_not_choose_it(finished):
    records = Study.read(finished).records()
    (best,) = chosen(finished.read_plan(), records)
    confirmation = confirmations(finished, records)[best.number]
    summary = best.run.read_summary()
    assert confirmation.scores.keys() == summary["scores"]["best"].keys()
    assert confirmation.scores["eval/fid_digits"] != summary["best"]["value"]
    assert confirmation.scores == fresh_scores([(str(best.run.path), best.outcome.step)], 1)["scores"]
    (parent,), _ = runs_of(finished)
    assert parent.data.metrics["fresh/fid_digits"] == confirmation.scores["eval/fid_digits"]
    assert fresh_sentence(finished.read_plan(), records) in finished.best.read_text()
    assert missing(f"trial {best.number} … fid_digits", fresh_sentence(finished.read_plan(), records)) == []


def test_a_checkpoint_that_cannot_be_scored_is_a_sentence(finished, tmp_path):
    (best,) = chosen(finished.read_plan(), Study.read(finished).records())
    run = shutil.copytree(best.run.path, tmp_path / "run")
    for path in (run / "checkpoints").rglob("*.safetensors"):
        path.write_bytes(b"damaged")
    assert str(run) in fresh_scores([(str(run), best.outcome.step)], 1)["problem"]
    shutil.rmtree(run)
    assert str(run) in fresh_scores([(str(run), best.outcome.step)], 1)["problem"]


def test_the_first_trial_has_the_experiments_own_values(finished):
    tree = yaml.safe_load(finished.run(0).config.read_text())
    assert (tree["algorithm"]["policy"]["lr"], tree["algorithm"]["entropy_coef"]) == (5e-6, 1.0)


def test_trials_share_one_pretraining(finished):
    references = [summary["reference"]["ddpm_50_trailing"] for summary in summaries(finished).values()]
    assert len(references) == 3
    assert len(set(references)) == 1


def test_mlflow_has_one_parent_and_one_finished_child_a_trial(finished):
    parents, children = runs_of(finished)
    assert [run.info.status for run in parents] == ["FINISHED"]
    assert [run.info.status for run in children] == ["FINISHED"] * 3
    assert len({run.data.tags["trial_id"] for run in children}) == 3


def test_optuna_has_every_trial_as_complete(finished):
    assert optuna_states(finished) == ["COMPLETE"] * 3


def test_best_yaml_trains_to_the_same_signature_and_the_same_numbers(finished, tmp_path):
    assert main(["train", "--config", str(finished.best), f"out={tmp_path / 'again'}"]) == 0
    again = json.loads((tmp_path / "again" / "summary.json").read_text())
    best = pd.read_csv(finished.leaderboard).iloc[0]
    assert again["signature"] == best["signature"]
    assert again["best"]["value"] == pytest.approx(best["score"], rel=1e-12, abs=0)
    trial = summaries(finished)[f"{best['trial']:04d}"]
    assert again["scores"]["best"] == trial["scores"]["best"]


def test_a_finished_study_is_not_run_again(finished, studies, capsys):
    kept = finished.path / "confirmation.json"
    written = kept.stat().st_mtime_ns
    before = {path: path.stat().st_mtime_ns for path in finished.trials.rglob("*") if path.is_file()}
    assert main(["sweep", "--resume", "first", "--studies", str(studies)]) == 0
    assert {path: path.stat().st_mtime_ns for path in finished.trials.rglob("*") if path.is_file()} == before
    assert kept.stat().st_mtime_ns == written
    assert "other data" not in capsys.readouterr().err
    assert len(runs_of(finished)[1]) == 3


def test_a_finished_study_says_that_its_data_have_changed_since(finished, studies, monkeypatch, capsys):
    pixels, labels = LOADERS["digits"](train=True)
    monkeypatch.setitem(LOADERS, "digits", lambda **_: (pixels[::2], labels[::2]))
    assert main(["sweep", "--resume", "first", "--studies", str(studies)]) == 0
    (sentence,) = (line for line in capsys.readouterr().err.splitlines() if "other data" in line)
    assert missing(f"{finished.run(0).path} … another name", sentence) == []


@pytest.mark.slow
def test_a_larger_budget_adds_trials_to_a_finished_study(studies):
    """A study of its own, since others are compared with the first one."""
    assert len(Sweep(*SMALL, name="larger", studies=studies).run(console=QUIET).records) == 3
    result = Sweep.resume("larger", "sweep.budget.trials=4", studies=studies).run(console=QUIET)
    assert [record.state for record in result.records] == [TrialState.COMPLETE] * 4
    assert len(runs_of(result.folder)[1]) == 4


def test_the_same_name_with_other_settings_is_refused_with_the_difference(finished, studies, capsys):
    arguments = ["sweep=demo", "name=first", *changed(TINY, "train.iterations=41")]
    assert main(["sweep", *arguments, "--studies", str(studies)]) == 2
    assert "train.iterations: 40 -> 41" in capsys.readouterr().err


def test_a_notebook_gets_a_data_frame_and_figures(finished, studies):
    sweep = Sweep.resume("first", studies=studies)
    table = sweep.results()
    assert len(table) >= 3
    assert table["algorithm.policy.lr"].between(2e-6, 2e-5).all()
    assert sweep.figures()


def test_studies_report_and_dry_run_say_what_there_is(finished, studies, capsys):
    assert main(["studies", "--studies", str(studies)]) == 0
    assert re.search(r"first\s.*finished", capsys.readouterr().out)
    assert main(["report", "first", "--studies", str(studies)]) == 0
    assert "report.html" in capsys.readouterr().out
    before = sorted(path.name for path in studies.iterdir())
    assert main(["sweep", "sweep=demo", "name=dry", *TINY, "--studies", str(studies), "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert missing("8 … tpe … minimize score", said) == []
    assert "algorithm.policy.lr" in said
    assert sorted(path.name for path in studies.iterdir()) == before


@pytest.mark.parametrize(
    ("changes", "models"),
    [
        ([], 1),
        (["sweep.seeds=3"], 3),
        (["+sweep.space.pretrain.ema.choice=[0.98,0.97]"], 2),
        (["+sweep.space.pretrain.ema.choice=[0.98,0.97]", "sweep.seeds=3"], 6),
        (["+sweep.space.pretrain.ema.uniform=[0.9,0.99]"], 20),
    ],
)
def test_the_estimate_counts_the_pretrained_models_of_all_trials(tmp_path, changes, models):
    """One for each seed, and for each value of a setting of the pretraining; 20 trials have 20 if it is continuous."""
    settings = ["pretrain.batch_size=7", "pretrain.shipped=false", "sweep.budget.trials=20", *changes]
    cost = Sweep(*TINY, "sweep=demo", *settings, studies=tmp_path).estimate()
    assert cost.models == models
    assert cost.shared_seconds > 0.0


BAD = {
    "+sweep.space.algorithm.polcy.lr.uniform=[0,1]": "sweep.space.algorithm.polcy.lr … algorithm.policy.lr",
    "+sweep.space.algorithm.energy_l2.uniform=[2,1]": "sweep.space.algorithm.energy_l2.uniform is [2, 1] … low … high",
    "+sweep.space.algorithm.energy_l2.log_uniform=[0,1]": "sweep.space.algorithm.energy_l2.log_uniform … [0, 1] … 0",
    "+sweep.space.algorithm.preset.choice=[]": "sweep.space.algorithm.preset.choice … empty",
    "+sweep.space.algorithm.critic.lr.uniform=[-1,1]": "sweep.space.algorithm.critic.lr … algorithm.critic.lr is -1.0",
    "sweep.objectives=[{metric: eval/fdi}]": "sweep.objectives[0].metric is 'eval/fdi' … score",
    "sweep.budget.trials=0": "sweep.budget.trials is 0 … 1",
    "sweep.budget.trails=3": "sweep.budget.trails … trials",
    "resources.threads=512": "resources.threads is 512",
    "resources.device=cuda:0": "resources.device is cuda:0 … Ray",
    "sweep.max_concurrent=400": "sweep.max_concurrent is 400",
    "name=a/b": "name is 'a/b' … 1 … 100",
    "name=..": "name is '..' … 1 … 100",
    "name=a\nb": "name is ' … 1 … 100",
    f"name={'n' * 101}": "name is ' … 1 … 100",
    "out=runs/x": "out … name=",
    "tracking.uri=ftp://x": "tracking.uri is 'ftp://x' … http://host:port",
    "experiment=digit": "'digit' … digits",
    "sweep=tag.yaml": "tag.yaml … YAML … python/object/apply:os.system",
    "sweep=target.yaml": "target.yaml … _target_",
    "sweep=gone.yaml": "gone.yaml … read",
}


@pytest.mark.parametrize("bad", BAD)
def test_bad_input_is_a_sentence_and_code_2_and_writes_nothing(tmp_path, monkeypatch, capsys, bad):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tag.yaml").write_text("space: !!python/object/apply:os.system [id]")
    (tmp_path / "target.yaml").write_text("space: {seed: {choice: [{_target_: os.system}]}}")
    before = sorted(tmp_path.iterdir())
    arguments = [bad] if bad.startswith("sweep=") else ["sweep=demo", bad]
    assert main(["sweep", *arguments]) == 2
    said = capsys.readouterr().err
    assert missing(BAD[bad], said) == []
    assert said.count("\n") == 1
    assert sorted(tmp_path.iterdir()) == before


def test_a_full_or_unwritable_folder_is_refused(tmp_path, monkeypatch, capsys):
    monkeypatch.setattr("tune.api.sweep.shutil.disk_usage", lambda _: shutil._ntuple_diskusage(10**12, 10**12, 10**6))
    assert main(["sweep", "sweep=demo", "--studies", str(tmp_path / "studies")]) == 2
    assert missing(f"{tmp_path} … free … space", capsys.readouterr().err) == []
    (tmp_path / "file").write_text("")
    assert main(["sweep", "sweep=demo", "--studies", str(tmp_path / "file")]) == 2
    assert missing(f"{tmp_path / 'file'} … folder", capsys.readouterr().err) == []
    assert not (tmp_path / "studies").exists()


# ----------------------------------------------------------------------------
# Trials that misbehave


def misbehaving():
    """A trainer whose manners depend on the seed. (Made in a function, so that Ray sends it by value.)"""

    def trainer(experiment, *, out, report=None, saved=None):
        import math  # noqa: PLC0415

        import torch  # noqa: PLC0415

        from dxmi.training.progress import Phase, Progress  # noqa: PLC0415
        from dxmi.training.summary import Summary  # noqa: PLC0415

        config = experiment.config
        out.mkdir(parents=True, exist_ok=True)
        attempts = out / "attempts"
        attempts.write_text(attempts.read_text() + "x" if attempts.exists() else "x")
        key, bad = "eval/fid_digits", {1: math.nan, 2: None, 3: torch.tensor(1.0), 4: math.inf}
        for step in range(0, 41, 10):
            metrics = {key: 50.0 - step + config.seed}
            if step == 20 and config.seed in bad:
                metrics = {key: bad[config.seed]}
            if step == 20 and config.seed == 5:
                metrics = {"eval/other": 1.0}
            if step == 20 and config.seed == 6:
                raise RuntimeError("the sixth seed is unlucky")
            if step == 20 and config.seed == 7 and len(attempts.read_text()) == 1:
                os._exit(1)
            if report(Progress(Phase.FINETUNE, step, 40, metrics)) and step < 40:
                return None
        score = {"value": 10.0 + config.seed, "step": 40, "checkpoint": "checkpoints/step_00000040"}
        return Summary(
            name="digits", signature=config.signature, seed=config.seed, metric=key, num_samples=64,
            reference={"ddpm_1000": 20.0}, best=score, last=score, scores={"best": {key: score["value"]}},
            seconds_per_1000_images={}, iterations=40, num_steps=5, seconds={"finetune": 1.0}, device="cpu",
            threads=1, git_revision=None, versions={},
        )  # fmt: skip

    return trainer


def over_seeds(studies: Path, name: str, seeds: list[int], *overrides: str) -> Sweep:
    """A sweep over seeds, from a file of the user's own."""
    file = studies / f"{name}.yaml"
    file.write_text(yaml.safe_dump({"space": {"seed": {"choice": seeds}}, "sampler": {"kind": "grid"}}))
    return Sweep(*TINY, f"sweep={file}", *overrides, name=name, studies=studies)


@pytest.fixture(scope="module")
def mixed(studies):
    return over_seeds(studies, "mixed", list(range(8)), "sweep.max_failures=1").run(
        console=QUIET, trainer=misbehaving()
    )


@pytest.mark.slow  # as are its kin; test_controller.py has the same cases without processes
@pytest.mark.parametrize(
    ("seed", "words"),
    [(1, "nan … 20"), (2, "NoneType … 20"), (3, "Tensor … 20"), (4, "inf … 20"), (5, "eval/fid_digits … missing … 20")],
)  # fmt: skip
def test_a_report_that_is_no_number_fails_that_trial_alone_as_diverged(mixed, seed, words):
    outcome = mixed.records[seed].outcome
    assert outcome.state is TrialState.DIVERGED
    assert missing(words, outcome.reason) == []


@pytest.mark.slow
def test_a_crash_is_tried_again_and_then_failed_with_its_traceback(mixed):
    record = mixed.records[6]
    assert record.state is TrialState.FAILED
    assert "the sixth seed is unlucky" in record.outcome.reason
    assert (record.run.path / "attempts").read_text() == "xx"  # max_failures is 1
    kept = mixed.folder.error(6).read_text()
    assert "in trainer" in kept
    assert "\x1b" not in kept


@pytest.mark.slow
def test_a_trial_whose_process_died_once_completes(mixed):
    assert mixed.records[7].state is TrialState.COMPLETE
    assert "worker process has died" in mixed.folder.error(7).read_text()
    assert (mixed.records[7].run.path / "attempts").read_text() == "xx"


@pytest.mark.slow
def test_the_sweep_goes_on_and_optuna_and_mlflow_have_them_as_failed(mixed):
    assert mixed.records[0].state is TrialState.COMPLETE
    assert not mixed.all_failed
    assert optuna_states(mixed.folder) == ["COMPLETE", *["FAIL"] * 6, "COMPLETE"]
    _, children = runs_of(mixed.folder)
    statuses = {run.data.tags["trial_id"]: run.info.status for run in children}
    assert [statuses[f"mixed/{n:04d}"] for n in range(8)] == ["FINISHED", *["FAILED"] * 6, "FINISHED"]


@pytest.mark.slow
def test_a_sweep_whose_every_trial_fails_says_so(studies):
    sweep = over_seeds(studies, "hopeless", [1, 2], "tracking.uri=none")
    assert sweep.run(console=QUIET, trainer=misbehaving()).all_failed


# ----------------------------------------------------------------------------
# Interruptions


def start(studies: Path, *arguments: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tune.cli.main", "sweep", *arguments, "--studies", str(studies)]
    pipe, environment = subprocess.PIPE, os.environ | {"MARK": str(studies)}
    return subprocess.Popen(
        command, stdout=pipe, stderr=subprocess.STDOUT, text=True, start_new_session=True, env=environment
    )


def ended(process: subprocess.Popen[str], folder: Path) -> StudyFolder:
    """The study that a process of `start` has run to its end."""
    said, _ = process.communicate(timeout=300)
    assert process.returncode == 0, said
    return StudyFolder(folder)


def processes_of(studies: Path) -> set[int]:
    """What runs now of what `start` has started, directly or not."""
    return set(processes_with(f"MARK={studies}"))


SERIAL = [*TINY, "sweep=demo", "sweep.budget.trials=3", "sweep.stopping.first_step=10", "sweep.max_concurrent=1"]


@pytest.fixture(scope="module")
def undisturbed(studies):
    return ended(start(studies, "name=undisturbed", *SERIAL), studies / "undisturbed")


def assert_like(folder: StudyFolder, undisturbed: StudyFolder) -> None:
    """Exactly the planned trials, none running, the same numbers."""
    states = optuna_states(folder)
    assert states == optuna_states(undisturbed)
    parents, children = runs_of(folder)
    assert len(parents) == 1
    assert len(children) == len(states)
    assert "RUNNING" not in {run.info.status for run in (*parents, *children)}
    assert summaries(folder) == summaries(undisturbed)


@pytest.mark.slow
def test_ctrl_c_saves_says_how_to_go_on_and_leaves_nothing_behind(studies, undisturbed):
    process = start(studies, "name=stopped", *SERIAL)
    folder = StudyFolder(studies / "stopped")
    wait_until(lambda: any(folder.trials.glob("0001/metrics.jsonl")), 120)
    process.send_signal(signal.SIGINT)
    asked = time.monotonic()
    said, _ = process.communicate(timeout=60)
    assert time.monotonic() - asked < 30
    assert process.returncode == 130
    assert f"dxmi sweep --resume {folder.path}" in said
    wait_until(lambda: not processes_of(studies), 20)
    assert "RUNNING" not in {run.info.status for runs in runs_of(folder) for run in runs}
    assert_like(ended(start(studies, "--resume", "stopped"), studies / "stopped"), undisturbed)


def test_two_drivers_of_one_study_the_second_is_refused(studies, finished, capsys):
    with locked_by_another(finished.path / ".lock"):
        assert main(["sweep", "--resume", "first", "--studies", str(studies)]) == 2
    assert missing("Another process … study first", capsys.readouterr().err) == []


def kill_and_resume(studies: Path, name: str, after: float) -> StudyFolder:
    """Start a serial study, kill its driver after some seconds, resume, and let the last session end."""
    process = start(studies, f"name={name}", *SERIAL)
    try:
        process.communicate(timeout=after)
    except subprocess.TimeoutExpired:
        os.killpg(process.pid, signal.SIGKILL) if after < 1.0 else process.kill()
        process.communicate(timeout=60)  # until what Ray had begun has noticed, and closed the pipe
    begun = (studies / name / "study.yaml").exists()
    return ended(start(studies, *(["--resume", name] if begun else [f"name={name}", *SERIAL])), studies / name)


def test_a_killed_driver_and_a_resume_end_like_an_undisturbed_sweep(studies, finished):
    process = start(studies, "name=killed", *SMALL, "sweep.max_concurrent=1")
    wait_until(lambda: any((studies / "killed" / "trials").glob("0001/metrics.jsonl")), 120)
    process.kill()
    process.communicate(timeout=60)  # until what Ray had begun has noticed, and closed the pipe
    assert main(["sweep", "--resume", "killed", "--studies", str(studies)]) == 0
    assert_like(StudyFolder(studies / "killed"), finished)


@pytest.mark.slow
def test_ten_kills_at_random_moments(studies, undisturbed):
    moments = random.Random(0)
    for number in range(10):
        folder = kill_and_resume(studies, f"killed-{number}", moments.uniform(0.5, 30.0))
        assert_like(folder, undisturbed)


def test_a_moved_study_goes_on_where_it_is(finished, tmp_path):
    moved = tmp_path / "elsewhere" / "first"
    shutil.copytree(finished.path, moved)
    assert main(["sweep", "--resume", str(moved)]) == 0
    _, children = runs_of(StudyFolder(moved))
    assert len(children) == len(list(moved.glob("trials/*")))
    renamed = moved.rename(moved.with_name("second"))
    with pytest.raises(UserError, match=stating("called first … folder")):
        StudyFolder(renamed).read_plan()
