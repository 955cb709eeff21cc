"""Copies that every node can reach: equal, whole, in a safe order; runs and studies that go on from them alone."""

import json
import os
import shutil
from pathlib import Path

import pytest
from rich.console import Console

from dxmi.errors import UserError
from dxmi.persistence import checkpoint
from dxmi.training.build import Experiment
from dxmi.training.run import train
from support import TINY, changed, stating
from tune import Sweep
from tune.cli.main import main
from tune.config.compose import compose_experiment
from tune.integrations import object_store as storage
from tune.integrations.object_store import Remote, join, kept, light, node_folder, whole
from tune.integrations.study_sync import StudySync
from tune.studies.folder import StudyFolder
from tune.studies.records import TrialState

QUIET = Console(quiet=True)


def fill(folder: Path, **files: str) -> Path:
    for name, text in files.items():
        path = folder / name.replace("__", "/").replace("_json", ".json")
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return folder


def content(folder: Path) -> dict[str, str]:
    files = (path for path in folder.rglob("*") if path.is_file())
    return {path.relative_to(folder).as_posix(): path.read_text() for path in files}


@pytest.fixture
def written(monkeypatch):
    """The names that go up, in order."""
    names = []
    write = Remote.write
    monkeypatch.setattr(Remote, "write", lambda self, name, data: (names.append(name), write(self, name, data)))
    return names


# ----------------------------------------------------------------------------
# A copy


def test_a_copy_is_equal_and_comes_back_equal(tmp_path):
    here = fill(tmp_path / "here", a="1", deep__er__b="2")
    Remote(str(tmp_path / "kept")).push(here)
    Remote(f"file://{tmp_path}/kept").pull(tmp_path / "there")
    assert content(tmp_path / "there") == {"a": "1", "deep/er/b": "2"}


def test_what_changed_goes_up_and_what_is_gone_is_deleted(tmp_path, written):
    here, remote = fill(tmp_path / "here", a="1", old__b="2"), Remote(str(tmp_path / "kept"))
    remote.push(here)
    shutil.rmtree(here / "old")
    fill(here, a="11", c="3")
    written.clear()
    remote.push(here)
    assert sorted(written) == ["a", "c"]
    assert content(tmp_path / "kept") == {"a": "11", "c": "3"}
    assert not (tmp_path / "kept" / "old").exists()


def test_another_process_deletes_what_the_first_one_sent(tmp_path):
    here = fill(tmp_path / "here", a="1", b="2")
    Remote(str(tmp_path / "kept")).push(here)
    (here / "b").unlink()
    Remote(str(tmp_path / "kept")).push(here)
    assert content(tmp_path / "kept") == {"a": "1"}


def test_a_pull_deletes_what_is_not_kept_and_sends_nothing_back(tmp_path, written):
    here = fill(tmp_path / "here", stale__a="1")
    fill(tmp_path / "kept", b="2")
    remote = Remote(str(tmp_path / "kept"))
    remote.pull(here)
    assert content(here) == {"b": "2"}
    remote.push(here)
    assert written == []


def test_rows_go_before_checkpoints_manifests_after_them_and_the_summary_last(tmp_path, written):
    here = fill(
        tmp_path / "here", summary_json="", checkpoints__s__manifest_json="", checkpoints__s__a="", metrics="", z=""
    )
    Remote(str(tmp_path / "kept")).push(here)
    assert written == ["metrics", "z", "checkpoints/s/a", "checkpoints/s/manifest.json", "summary.json"]


def test_locks_and_halves_stay_at_home(tmp_path):
    names = [".lock", ".ray/x", "a.part", ".ray_train/group"]
    here = fill(tmp_path / "here", a="1")
    for name in names:
        (here / name).parent.mkdir(exist_ok=True)
        (here / name).write_text("")
    Remote(str(tmp_path / "kept")).push(here)
    assert content(tmp_path / "kept") == {"a": "1"}
    assert [whole(name) for name in [*names, "trials/0000/checkpoints/a"]] == [False] * 4 + [True]
    assert [light(name) for name in ("metrics.jsonl", "checkpoints/a", "trials/0000/checkpoints/a")] == [
        True, False, False,
    ]  # fmt: skip


def test_a_store_that_stumbles_is_asked_again_and_one_that_lies_down_is_named(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_WAIT", 0.0)
    remote, failures = Remote(str(tmp_path / "kept")), [OSError("busy")] * 3

    def stumble(*_):
        if failures:
            raise failures.pop()

    monkeypatch.setattr(Remote, "_replace", stumble)
    remote.write("a", b"1")
    failures += [OSError("gone")] * 4
    with pytest.raises(OSError, match="gone"):
        remote.write("a", b"1")


@pytest.mark.parametrize(
    ("address", "sentence"),
    [
        ("studies", "absolute path or a URI"),
        ("ftp://host/studies", "absolute path or a URI"),
        ("s3://id:hunter2@bucket/studies", "holds credentials"),
        ("s3://bucket/studies?secret_key=hunter2", "holds credentials"),
    ],
)
def test_a_bad_address_is_refused_without_repeating_a_secret(tmp_path, monkeypatch, capsys, address, sentence):
    monkeypatch.chdir(tmp_path)
    for command in (["train", f"out={tmp_path / 'run'}"], ["sweep", "sweep=demo"]):
        assert main([*command, *TINY, f"resources.storage_path={address}"]) == 2
        said = capsys.readouterr().err
        assert sentence in said
        assert "hunter2" not in said
    assert not list(tmp_path.iterdir())


def test_addresses_below_an_address():
    assert join("/a b/#c/", "x", "y") == "/a b/#c/x/y"
    assert join("s3://bucket/studies?region=eu", "x") == "s3://bucket/studies/x?region=eu"


def test_a_nodes_folder_is_its_users_alone(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    assert node_folder("s3://a") != node_folder("s3://b")
    assert oct((tmp_path / f"dxmi-{os.getuid()}").stat().st_mode)[-3:] == "700"
    (tmp_path / "theirs").mkdir()
    (tmp_path / f"dxmi-{os.getuid()}").rmdir()
    (tmp_path / f"dxmi-{os.getuid()}").symlink_to(tmp_path / "theirs")
    with pytest.raises(UserError, match=stating("another user")):
        node_folder("s3://a")


# ----------------------------------------------------------------------------
# A run


def experiment() -> Experiment:
    return Experiment(compose_experiment(TINY).experiment)


def learned(run: Path) -> bytes:
    return (checkpoint.path_of(run / "checkpoints", 40) / "algorithm.safetensors").read_bytes()


def test_a_run_that_changes_nodes_ends_as_if_it_had_not(tmp_path, monkeypatch):
    train(experiment(), out=tmp_path / "undisturbed")
    address = str(tmp_path / "kept")
    for node, last in (("first", 20), ("second", 40)):
        monkeypatch.setattr(storage.tempfile, "gettempdir", lambda node=node: str(tmp_path / node))
        (tmp_path / node).mkdir()
        with kept(address, tmp_path / "elsewhere") as (here, keep):
            train(experiment(), out=here, report=lambda p, last=last: p.step >= last < 40, saved=lambda _: keep())
        assert not list((tmp_path / node).glob("*/*"))
    assert learned(tmp_path / "kept") == learned(tmp_path / "undisturbed")
    rows = [(tmp_path / name / "metrics.jsonl").read_text() for name in ("kept", "undisturbed")]
    assert rows[0] == rows[1]
    assert not (tmp_path / "elsewhere").exists()


def test_a_node_that_dies_costs_what_came_after_its_last_checkpoint(tmp_path, monkeypatch):
    monkeypatch.setattr(storage.tempfile, "gettempdir", lambda: str(tmp_path))
    address, there = str(tmp_path / "kept"), Remote(str(tmp_path / "kept"))
    here = node_folder(address)

    class PowerCutError(Exception):
        pass

    def cut(progress):
        if progress.phase == "finetune" and progress.step >= 25:
            raise PowerCutError

    with pytest.raises(PowerCutError):
        train(experiment(), out=here, report=cut, saved=lambda _: there.push(here))
    shutil.rmtree(here)
    seen = []
    with kept(address, tmp_path) as (again, keep):
        assert checkpoint.steps_in(again / "checkpoints")[-1] == 20
        train(experiment(), out=again, report=lambda p: seen.append((p.phase, p.step)), saved=lambda _: keep())
    assert min(step for phase, step in seen if phase == "finetune") == 25
    train(experiment(), out=tmp_path / "undisturbed")
    assert learned(tmp_path / "kept") == learned(tmp_path / "undisturbed")


def test_the_command_keeps_a_run_and_goes_on_with_what_is_kept(tmp_path, capsys):
    arguments = [*TINY, f"resources.storage_path={tmp_path / 'kept'}"]
    assert main(["train", *arguments, f"out={tmp_path / 'a' / 'run'}"]) == 0
    ours, theirs = tmp_path / "a" / "run", tmp_path / "kept" / "run"
    names = {path.relative_to(ours) for path in ours.rglob("*")} - {Path(".lock")}
    assert names == {path.relative_to(theirs) for path in theirs.rglob("*")}
    capsys.readouterr()
    assert main(["train", *arguments, f"out={tmp_path / 'b' / 'run'}"]) == 0
    assert "already finished" in capsys.readouterr().out
    assert learned(tmp_path / "b" / "run") == learned(ours)


# ----------------------------------------------------------------------------
# A study


@pytest.fixture(scope="module")
def studied(tmp_path_factory):
    """A study of two trials whose nodes and driver have no folder in common."""
    folder = tmp_path_factory.mktemp("studied")
    sweep = Sweep(*settings(folder), name="kept", studies=folder / "driver")
    return folder, sweep.run(console=QUIET)


def settings(folder: Path) -> list[str]:
    budget = ["sweep=demo", "sweep.budget.trials=2", "sweep.stopping.rule=none", "sweep.max_concurrent=1"]
    return [*TINY, *budget, "tracking.uri=none", f"resources.storage_path={folder / 'kept'}"]


def test_a_studys_runs_reach_its_driver_and_its_copy(studied):
    folder, result = studied
    assert [record.state for record in result.records] == [TrialState.COMPLETE] * 2
    ours, theirs = folder / "driver" / "kept", folder / "kept" / "kept"
    files = {
        path.relative_to(ours) for path in ours.rglob("*") if path.is_file() and whole(str(path.relative_to(ours)))
    }
    assert {Path("report.html"), Path("trials/0001/summary.json")} <= files
    assert files == {path.relative_to(theirs) for path in theirs.rglob("*") if path.is_file()}
    assert all((ours / name).read_bytes() == (theirs / name).read_bytes() for name in files)


@pytest.mark.slow
def test_another_machine_goes_on_with_the_copy(studied, tmp_path):
    folder, first = studied
    arguments = changed(settings(folder), "sweep.budget.trials=3")
    result = Sweep(*arguments, name="kept", studies=tmp_path / "other").run(console=QUIET)
    assert [record.state for record in result.records] == [TrialState.COMPLETE] * 3
    assert [r.outcome.score for r in result.records[:2]] == [r.outcome.score for r in first.records]
    assert (folder / "kept" / "kept" / "trials" / "0002" / "summary.json").exists()


def test_fetch_brings_a_study_here_and_up_to_date(studied, tmp_path, capsys):
    folder, _ = studied
    address = str(folder / "kept" / "kept")
    for _ in range(2):
        assert main(["fetch", address, "--into", str(tmp_path), "--without-checkpoints"]) == 0
    assert not list(tmp_path.rglob("checkpoints"))
    assert main(["report", "kept", "--studies", str(tmp_path)]) == 0
    assert main(["fetch", address, "--into", str(tmp_path)]) == 0
    assert (
        main(["sample", str(tmp_path / "kept" / "trials" / "0000"), "--out", str(tmp_path / "x.png"), "--num", "4"])
        == 0
    )
    capsys.readouterr()
    (tmp_path / "own" / "kept").mkdir(parents=True)
    assert main(["fetch", address, "--into", str(tmp_path / "own")]) == 2
    assert "was not fetched from" in capsys.readouterr().err
    assert main(["fetch", str(folder / "kept"), "--into", str(tmp_path)]) == 2
    assert "neither a study nor a run" in capsys.readouterr().err


def mirrored(tmp_path, journal: str, copy: str) -> StudySync:
    fill(tmp_path / "here" / "s").mkdir(parents=True)
    (tmp_path / "here" / "s" / "optuna.journal").write_text(journal)
    fill(tmp_path / "kept" / "s").mkdir(parents=True)
    (tmp_path / "kept" / "s" / "optuna.journal").write_text(copy)
    return StudySync(StudyFolder(tmp_path / "here" / "s"), str(tmp_path / "kept"), lambda _: None)


@pytest.mark.parametrize(("ours", "copy", "then"), [("a\n", "a\nb\n", "a\nb\n"), ("a\nb\n", "a\n", "a\nb\n")])
def test_the_longer_history_wins(tmp_path, ours, copy, then):
    sync = mirrored(tmp_path, ours, copy)
    sync.begin()
    sync.finish()
    for place in ("here", "kept"):
        assert (tmp_path / place / "s" / "optuna.journal").read_text() == then


def test_two_histories_are_refused(tmp_path):
    with pytest.raises(UserError, match=stating("separately")):
        mirrored(tmp_path, "a\nb\n", "a\nc\n").begin()


def test_a_second_driver_is_refused_and_a_dead_one_is_waited_out(tmp_path, monkeypatch):
    monkeypatch.setattr("tune.integrations.study_sync._POLL_SECONDS", 0.01)
    monkeypatch.setattr("tune.integrations.study_sync._LEASE_SECONDS", 0.1)
    first = mirrored(tmp_path, "a\n", "a\n")
    lease = tmp_path / "kept" / "s" / ".driver.json"
    first.begin()
    held = json.loads(lease.read_text())
    second = StudySync(StudyFolder(tmp_path / "here" / "s"), str(tmp_path / "kept"), lambda _: None)
    second.begin()  # the first one is silent
    assert json.loads(lease.read_text())["time"] > held["time"]

    def alive(self, name, read=Remote.read):
        lease.write_text(json.dumps({**held, "time": os.urandom(4).hex()}))
        return read(self, name)

    monkeypatch.setattr(Remote, "read", alive)
    with pytest.raises(UserError, match=f"process {os.getpid()} on "):
        second.begin()
    monkeypatch.undo()
    second.finish()
    assert not lease.exists()


def test_a_copy_that_cannot_be_made_is_said_once_and_made_good(tmp_path, monkeypatch):
    monkeypatch.setattr(storage, "_WAIT", 0.0)
    said = []
    sync = mirrored(tmp_path, "a\n", "")
    sync._complain = said.append
    sync.begin()
    monkeypatch.setattr("tune.integrations.study_sync._SEND_EVERY", -1.0)
    replace = Remote._replace
    monkeypatch.setattr(Remote, "_replace", lambda *_: (_ for _ in ()).throw(OSError("no route")))
    for _ in range(3):
        sync.send_study()
    assert len(said) == 1
    assert "no route" in said[0]
    sync.finish()
    assert "is incomplete" in said[-1]
    monkeypatch.setattr(Remote, "_replace", replace)
    sync.send_study()
    assert (tmp_path / "kept" / "s" / "optuna.journal").read_text() == "a\n"
