"""One run on several workers of Ray Train: ended, interrupted, killed, hung; alone and as a trial of a sweep."""

import hashlib
import json
import os
import random
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from dxmi.errors import UserError
from dxmi.training.config import ResourcesConfig
from support import SLOWER, TINY, processes_with, wait_until
from tune.cli.main import main
from tune.execution.resources import share
from tune.studies.folder import StudyFolder
from tune.studies.records import TrialState
from tune.studies.study import Study

GROUP = [*SLOWER, "resources.num_workers=2"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where this module's runs and their cache are."""
    return tmp_path_factory.mktemp("groups")


def start(folder: Path, *arguments: str) -> subprocess.Popen[str]:
    environment = os.environ | {"DXMI_CACHE": str(folder / "cache")}
    return subprocess.Popen(
        [sys.executable, "-m", "tune.cli.main", *arguments],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
    )


def train(folder: Path, name: str, *arguments: str) -> subprocess.Popen[str]:
    return start(folder, "train", *GROUP, f"out={folder / name}", *arguments)


def ended(process: subprocess.Popen[str], code: int = 0, seconds: float = 200) -> str:
    said, _ = process.communicate(timeout=seconds)
    assert process.returncode == code, said
    return said


def workers_of(folder: Path, kind: str = "RayTrainWorker") -> list[int]:
    """Processes of Ray Train's workers, or of another kind, that belong to this module's runs."""
    return processes_with(f"DXMI_CACHE={folder / 'cache'}", kind)


def iteration(run: Path) -> int:
    """The last row's."""
    try:
        return json.loads((run / "metrics.jsonl").read_text().splitlines()[-1])["step"]
    except (OSError, IndexError, ValueError):
        return -1


def result(run: Path) -> tuple[str, str]:
    """What a finished run has learned and scored, to the bit."""
    summary = json.loads((run / "summary.json").read_text())
    weights = (run / summary["last"]["checkpoint"] / "algorithm.safetensors").read_bytes()
    return hashlib.sha256(weights).hexdigest(), json.dumps([summary["best"], summary["last"]])


@pytest.fixture(scope="module")
def undisturbed(folder):
    assert "Traceback" not in ended(train(folder, "undisturbed"))
    return folder / "undisturbed"


def test_a_run_on_two_workers_leaves_what_one_leaves(folder):
    small = folder / "small"
    assert "Traceback" not in ended(start(folder, "train", *TINY, "resources.num_workers=2", f"out={small}"))
    assert sorted(path.name for path in small.iterdir() if path.name != ".lock") == [
        "checkpoints", "config.yaml", "curves.png", "metrics.jsonl", "samples", "summary.json",
    ]  # fmt: skip
    assert iteration(small) == 40


@pytest.mark.slow
def test_ctrl_c_saves_and_another_number_of_workers_goes_on(folder, undisturbed):
    process = train(folder, "stopped")
    run = folder / "stopped"
    wait_until(lambda: iteration(run) >= 10)
    process.send_signal(signal.SIGINT)
    said = ended(process, 130)
    assert f"To resume: dxmi train --resume {run}" in said
    assert not workers_of(folder)
    ended(start(folder, "train", "--resume", str(run), "resources.num_workers=1"))
    ours, theirs = (json.loads((r / "summary.json").read_text()) for r in (run, undisturbed))
    assert ours["signature"] == theirs["signature"]
    assert ours["last"]["value"] == pytest.approx(theirs["last"]["value"], rel=0.05)


def lose_workers(folder: Path, name: str, chance: random.Random, losses: int) -> Path:
    """A run that loses `losses` workers, chosen at random, at random moments."""
    run = folder / name
    process = train(folder, name, "resources.max_restarts=10", "resources.worker_timeout=20")
    lost: set[int] = set()
    for _ in range(losses):
        aim = chance.randint(0, 50)
        wait_until(lambda aim=aim: iteration(run) >= aim and set(workers_of(folder)) - lost, 200)  # noqa: B023
        time.sleep(chance.uniform(0.0, 0.3))
        present = sorted(set(workers_of(folder)) - lost)
        if not present or (run / "summary.json").exists():
            break
        victim = chance.choice(present)
        lost |= set(present)  # those that are left go down with it
        os.kill(victim, signal.SIGKILL)
    ended(process, seconds=300)
    return run


@pytest.mark.slow
def test_a_run_that_loses_a_worker_ends_like_one_that_does_not(folder, undisturbed):
    assert result(lose_workers(folder, "killed", random.Random(1), 1)) == result(undisturbed)


@pytest.mark.slow
def test_a_hung_worker_is_found_within_its_timeout(folder, undisturbed):
    process = train(folder, "hung", "resources.worker_timeout=20")
    wait_until(lambda: iteration(folder / "hung") >= 10, 300)
    victim = workers_of(folder)[-1]
    os.kill(victim, signal.SIGSTOP)
    began = time.monotonic()
    wait_until(lambda: victim not in workers_of(folder), 100)
    assert time.monotonic() - began < 20 + 30  # its group is ended in that time
    ended(process, seconds=300)
    assert result(folder / "hung") == result(undisturbed)


@pytest.mark.slow
@pytest.mark.timeout(3600)
def test_twenty_kills_at_random_moments(folder, undisturbed):
    chance = random.Random(3)
    for number in range(7):
        assert result(lose_workers(folder, f"killed-{number}", chance, 3)) == result(undisturbed)


@pytest.mark.slow
def test_workers_that_are_lost_too_often_fail_the_run_and_say_why(folder, undisturbed):
    process = train(folder, "hopeless", "resources.max_restarts=0")
    wait_until(lambda: iteration(folder / "hopeless") >= 5)
    os.kill(workers_of(folder)[0], signal.SIGKILL)
    said = ended(process, 1)
    assert "resources.max_restarts" in said
    assert "Traceback" not in said
    ended(start(folder, "train", "--resume", str(folder / "hopeless")))
    assert result(folder / "hopeless") == result(undisturbed)


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("resources.num_workers=0", "num_workers is 0"),
        ("resources.num_workers=64", "num_workers"),
        ("resources.accumulate=0", "accumulate is 0"),
        ("resources.worker_timeout=0", "worker_timeout is 0"),
        ("train.precision=int8", "precision is 'int8'"),
    ],
)
def test_bad_settings_are_refused_with_a_sentence(tmp_path, capsys, override, sentence):
    key = override.partition("=")[0]
    arguments = [argument for argument in GROUP if not argument.startswith(key)]
    assert main(["train", *arguments, override, f"out={tmp_path / 'refused'}"]) == 2
    assert sentence in capsys.readouterr().err
    assert not (tmp_path / "refused").exists()


@pytest.mark.slow
def test_another_run_in_the_folder_is_refused_by_all_workers(folder, undisturbed):
    said = ended(start(folder, "train", *GROUP, "algorithm.entropy_coef=0.5", f"out={undisturbed}"), 2)
    assert "holds a run with another config" in said


# ----------------------------------------------------------------------------
# As a trial


def test_slots_of_trials_with_several_workers():
    resources = ResourcesConfig(num_workers=2, threads=2)
    slots = share(resources, None, cpus=9, gpus=0)
    assert (slots.concurrent, slots.workers, slots.devices_of_a_trial) == (2, 2, 4.0)
    assert share(ResourcesConfig(num_workers=4), None, cpus=32, gpus=8).concurrent == 2
    with pytest.raises(UserError, match="num_workers is 3"):
        share(ResourcesConfig(num_workers=3), None, cpus=2, gpus=0)
    with pytest.raises(UserError, match="num_workers is 4"):
        share(ResourcesConfig(num_workers=4), None, cpus=32, gpus=2)


@pytest.mark.slow
def test_a_sweep_of_groups_prunes_and_finishes_and_loses_no_device(folder):
    sweep = [argument for argument in GROUP if "iterations=60" not in argument]
    said = ended(
        start(
            folder, "sweep", *sweep, "train.iterations=20", "sweep=demo", "sweep.budget.trials=3",
            "sweep.stopping.first_step=5", "name=groups", "--studies", str(folder / "studies"),
        ),
        seconds=390,
    )  # fmt: skip
    records = Study.read(StudyFolder(folder / "studies/groups")).records()
    states = [record.state for record in records]
    assert len(states) == 3
    assert set(states) == {TrialState.COMPLETE, TrialState.PRUNED}
    assert "1 at once, each with 2 workers" in said
    assert not workers_of(folder)


@pytest.mark.slow
def test_a_killed_trial_gives_its_workers_devices_back(folder):
    studies = folder / "studies"
    process = start(
        folder, "sweep", *GROUP, "sweep=demo", "sweep.budget.trials=2", "sweep.stopping.rule=none",
        "sweep.max_failures=1", "name=killed", "--studies", str(studies),
    )  # fmt: skip
    for number in (0, 1):
        run = studies / "killed" / "trials" / f"{number:04d}"
        wait_until(lambda run=run: iteration(run) >= 5, 200)
        (trial,) = workers_of(folder, "ImplicitFunc")
        os.kill(trial, signal.SIGKILL)
        wait_until(lambda trial=trial: trial not in workers_of(folder, "ImplicitFunc"))
    ended(process, seconds=300)
    records = Study.read(StudyFolder(studies / "killed")).records()
    assert [record.state for record in records] == [TrialState.COMPLETE] * 2
