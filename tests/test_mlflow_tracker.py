"""MLflow has every study once and whole, whoever was killed, locked or away meanwhile."""

import json
import math
import os
import random
import shutil
import signal
import sqlite3
import subprocess
import sys
import threading
import time
import urllib.request
from collections import Counter
from dataclasses import replace
from pathlib import Path

import pytest
import torch

import tune.integrations.mlflow_store
import tune.integrations.mlflow_tracker
from dxmi.config import to_tree
from dxmi.errors import UserError
from dxmi.persistence import checkpoint
from dxmi.persistence.files import write_atomic, write_json
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.schema import config_tree
from support import free_port, missing, stating, wait_until
from tune.config.compose import compose_experiment
from tune.config.sweep import ObjectiveConfig, SweepConfig, TrackingConfig
from tune.integrations.mlflow_store import open_store
from tune.integrations.mlflow_tracker import Tracker
from tune.plans.sweep import Plan
from tune.search.space import configured, flat
from tune.studies.folder import StudyFolder
from tune.studies.records import Outcome, TrialRecord, TrialState

EXPERIMENT = compose_experiment(["train.iterations=40", "evaluate.every=10", "resources.threads=1"]).experiment
SPACE = {"algorithm.policy.lr": {"log_uniform": [1e-6, 1e-4]}}
ENDS = {
    TrialState.COMPLETE: "FINISHED",
    TrialState.PRUNED: "KILLED",
    TrialState.STOPPED: "KILLED",
    TrialState.DIVERGED: "FAILED",
    TrialState.FAILED: "FAILED",
}


@pytest.fixture(autouse=True)
def _quick(monkeypatch):
    monkeypatch.setattr(tune.integrations.mlflow_tracker, "_PAUSE", 0.01)
    monkeypatch.setattr(tune.integrations.mlflow_tracker, "_FIRST_DELAY", 0.02)
    monkeypatch.setattr(tune.integrations.mlflow_tracker, "_LONGEST_DELAY", 0.2)


@pytest.fixture(scope="session")
def template(tmp_path_factory):
    """A store as it is when nothing was recorded, made once: it takes a second."""
    root = tmp_path_factory.mktemp("template") / "studies"
    open_store(root, "dxmi")
    return root


@pytest.fixture
def studies(template, tmp_path):
    """A folder of studies at an awkward place; its store comes from elsewhere and must be told so."""
    root = tmp_path / "my studies, 50% #1 é"
    shutil.copytree(template, root)
    return root


class Made:
    """A study whose trials are made by hand, as `dxmi train` would write them."""

    def __init__(self, root: Path, name: str = "demo", **tracking) -> None:
        objectives = (ObjectiveConfig(metric="score"),)
        self.plan = Plan(name, EXPERIMENT, SweepConfig(objectives=objectives), SPACE, TrackingConfig(**tracking))
        self.folder = StudyFolder(root / name)
        self.folder.trials.mkdir(parents=True, exist_ok=True)
        self.folder.begin(self.plan)
        self.records: list[TrialRecord] = []
        self.said: list[str] = []

    def tracker(self) -> Tracker:
        tracker = Tracker(self.folder, self.plan, self.said.append)
        tracker.start()
        return tracker

    def add(self) -> int:
        number = len(self.records)
        values = {"algorithm.policy.lr": 1e-5 * (number + 1)}
        config = configured(EXPERIMENT, values)
        run = self.folder.run(number)
        self.records.append(TrialRecord(number, values, config.signature, 0, run, Outcome(TrialState.RUNNING)))
        run.create()
        run.write_config(config_tree(config))
        self.go_on(number, 0)
        return number

    def go_on(self, number: int, step: int) -> None:
        """The rows, the picture and the checkpoint of an iteration."""
        run, score = self.folder.run(number), 10.0 + number - step / 100
        if step:
            run.append([{"step": step, "energy/data_mean": -step / 7, "policy/entropy": 1.0 / step}])
        run.append([{"step": step, "eval/fid_digits": score, "eval/num_samples": 64}])
        write_atomic(run.samples / f"step_{step:06d}.png", b"png %d" % step)
        checkpoint.save(run.checkpoints, step, {"algorithm": {"w": torch.full((3,), float(step))}}, {})

    def end(self, number: int, state=TrialState.COMPLETE, best: int = 40, last: int = 40) -> None:
        run, score = self.folder.run(number), 5.0 + number
        if state is TrialState.COMPLETE:
            kept = {"eval/fid_digits": score, "eval/kid_digits": 0.5, "eval/num_samples": 64}
            write_json(
                run.summary,
                {
                    "best": {"value": score, "step": best},
                    "last": {"value": score + 1, "step": last},
                    "reference": {"ddpm_1000": 2.5, "shortened": 9.5},
                    "scores": {"best": kept, "last": {"eval/fid_digits": score + 1}},
                },
            )
            write_atomic(run.curves, b"curves")
        if state is TrialState.FAILED:
            self.folder.write_error(number, "Traceback: it crashed")
        reason = "" if state is TrialState.COMPLETE else f"it {state}"
        objectives = (score,) if state is TrialState.COMPLETE else ()
        scored = None if state is TrialState.FAILED else score
        outcome = Outcome(state, reason, scored, best if scored else None, objectives)
        self.records[number] = replace(self.records[number], outcome=outcome)

    def whole(self, state=TrialState.COMPLETE) -> int:
        number = self.add()
        for step in (10, 20, 30, 40):
            self.go_on(number, step)
        self.end(number, state)
        return number

    def record(self, tracker: Tracker | None = None, ended: str = "") -> int:
        """All that there is, by a tracker of its own if need be; returns what was left."""
        tracker = tracker or self.tracker()
        tracker.update(self.records, running=())
        return tracker.finish(ended)

    @property
    def seen(self) -> "Seen":
        uri = self.plan.tracking.uri
        return Seen(tune.integrations.mlflow_store.store_address(self.folder.path.parent) if uri == "local" else uri)

    def rows(self, number: int) -> list[tuple[str, int, float]]:
        """What of metrics.jsonl MLflow is to have."""
        rows = self.folder.run(number).rows()
        return sorted((key, row["step"], row[key]) for row in rows for key in row if key != "step")


class Seen:
    """What MLflow has."""

    def __init__(self, uri: str) -> None:
        from mlflow import MlflowClient  # noqa: PLC0415  (it takes a second)

        self.client = MlflowClient(uri)
        found = self.client.get_experiment_by_name("dxmi")
        every = self.client.search_runs([found.experiment_id], max_results=1000) if found else []
        self.parents = [run for run in every if "mlflow.parentRunId" not in run.data.tags]
        self.runs = [run for run in every if "mlflow.parentRunId" in run.data.tags]
        self.children = {run.data.tags["trial_id"]: run for run in self.runs}
        assert len(self.children) == len(self.runs), "a trial has two runs"

    @property
    def parent(self):
        (parent,) = self.parents
        return parent

    def child(self, number: int):
        return self.children[f"demo/{number:04d}"]

    def history(self, run) -> list[tuple[str, int, float]]:
        """Every point, in the order in which it was sent."""
        return [
            (key, point.step, point.value)
            for key in run.data.metrics
            for point in self.client.get_metric_history(run.info.run_id, key)
        ]

    def logged(self, number: int) -> list[tuple[str, int, float]]:
        """The points that come from metrics.jsonl."""
        every = self.history(self.child(number))
        return sorted(point for point in every if not point[0].startswith(("best/", "last/")))

    def files(self, run, folder=None) -> set[str]:
        return {Path(file.path).name for file in self.client.list_artifacts(run.info.run_id, folder)}


# ----------------------------------------------------------------------------
# What a record holds


def test_a_study_is_a_parent_run_and_its_trials_are_children(studies):
    made = Made(studies)
    for _ in range(2):
        made.whole()
    assert made.record() == 0
    seen, plan = made.seen, made.plan
    parent = seen.parent
    assert parent.info.status == "FINISHED"
    assert parent.info.run_name == "demo"
    assert parent.data.tags["study"] == "demo"
    assert parent.data.tags["signature"] == plan.signature
    assert parent.data.params["sweep.sampler.kind"] == "tpe"
    assert sorted(seen.children) == ["demo/0000", "demo/0001"]
    for number, record in enumerate(made.records):
        run = seen.child(number)
        tags = run.data.tags
        assert run.info.status == "FINISHED"
        assert run.info.run_name == tags["trial_id"]
        assert tags["mlflow.parentRunId"] == parent.info.run_id
        assert tags["study"] == "demo"
        assert tags["signature"] == record.signature != plan.signature
        assert tags["arm"] == "sweep"
        assert tags["seed"] == "0"
        assert tags["state"] == "complete"
        assert tags["git_revision"]
        assert "reason" not in tags
        assert run.info.start_time <= run.info.end_time <= time.time() * 1000
    assert made.said == []


def test_params_are_the_whole_config_by_path_without_resources(studies):
    made = Made(studies)
    made.whole()
    made.record()
    params = made.seen.child(0).data.params
    config = flat(to_tree(configured(EXPERIMENT, made.records[0].values)))
    assert set(params) == {path for path in config if not path.startswith("resources.")}
    assert params["algorithm.policy.lr"] == "1e-05"
    assert params["data.kind"] == "digits"
    assert params["algorithm.policy_mask"] == "[1.0]"


def test_metrics_are_the_rows_on_the_trials_own_steps(studies):
    made = Made(studies)
    made.whole()
    made.record()
    seen = made.seen
    assert seen.logged(0) == made.rows(0)
    assert [step for key, step, _ in seen.history(seen.child(0)) if key == "eval/fid_digits"] == [0, 10, 20, 30, 40]


def test_a_complete_trial_has_best_and_last_from_its_summary(studies):
    made = Made(studies)
    made.whole()
    made.end(0, best=30)
    made.record()
    seen = made.seen
    found = {point for point in seen.history(seen.child(0)) if point[0].startswith(("best/", "last/"))}
    assert found == {
        ("best/fid_digits", 30, 5.0),
        ("best/kid_digits", 30, 0.5),
        ("best/num_samples", 30, 64.0),
        ("last/fid_digits", 40, 6.0),
    }


@pytest.mark.parametrize("state", ENDS)
def test_each_end_has_its_own_status_and_reason(studies, state):
    made = Made(studies)
    made.whole(state)
    made.record()
    run = made.seen.child(0)
    assert run.info.status == ENDS[state]
    assert run.data.tags["state"] == state.value
    assert run.data.tags.get("reason", "") == made.records[0].outcome.reason
    assert ("best/score" in run.data.metrics) == (state in (TrialState.PRUNED, TrialState.STOPPED, TrialState.DIVERGED))


def test_files_of_a_trial(studies):
    made = Made(studies)
    made.whole()
    made.end(0, best=30)
    made.whole(TrialState.FAILED)
    made.whole()
    write_atomic(made.folder.run(0).samples / "steps.png", b"all steps")
    made.record()
    seen = made.seen
    run = seen.child(0)
    assert seen.files(run) == {"config.yaml", "samples", "curves.png", "summary.json", "checkpoints"}
    grids = {f"step_{step:06d}.png" for step in (0, 10, 20, 30, 40)}
    assert seen.files(run, "samples") == {*grids, "steps.png"}
    assert seen.files(run, "checkpoints") == {"step_00000030", "step_00000040"}
    whole = {"algorithm.safetensors", "meta.json", "manifest.json"}
    assert seen.files(run, "checkpoints/step_00000030") == whole
    assert "error.txt" in seen.files(seen.child(1))
    assert seen.files(seen.child(2), "checkpoints") == {"step_00000040"}, "best and last are one"


def test_local_files_are_links_and_the_checkpoint_can_be_loaded(studies):
    made = Made(studies)
    made.whole()
    made.record()
    run = made.seen.child(0)
    artifacts = studies / "mlartifacts" / run.info.run_id / "artifacts"
    recorded = artifacts / "checkpoints" / "step_00000040"
    ours = made.folder.run(0).checkpoints / "step_00000040"
    assert (recorded / "algorithm.safetensors").samefile(ours / "algorithm.safetensors")
    assert (artifacts / "config.yaml").samefile(made.folder.run(0).config)
    assert checkpoint.load(recorded).step == 40
    made.record()
    assert not [path for path in artifacts.rglob("*") if path.name.endswith(".part")]


def test_where_links_cannot_be_files_are_copied(studies, monkeypatch):
    def refuse(*_: object) -> None:
        raise OSError(18, "Invalid cross-device link")

    monkeypatch.setattr(os, "link", refuse)
    made = Made(studies)
    made.whole()
    assert made.record() == 0
    recorded = studies / "mlartifacts" / made.seen.child(0).info.run_id / "artifacts" / "config.yaml"
    assert recorded.read_bytes() == made.folder.run(0).config.read_bytes()
    assert not recorded.samefile(made.folder.run(0).config)


def test_the_study_shows_counts_the_best_and_the_references(studies):
    made = Made(studies)
    tracker = made.tracker()
    made.whole()
    tracker.update(made.records, running=())
    wait_until(lambda: Seen(tracker.address).parents and "best/score" in Seen(tracker.address).parent.data.metrics)
    made.whole(TrialState.PRUNED)
    made.whole(TrialState.FAILED)
    made.add()
    (made.folder.path / "leaderboard.csv").write_text("trial\n")
    made.record(tracker, ended="interrupted")
    seen = made.seen
    metrics = seen.parent.data.metrics
    assert metrics["best/score"] == 5.0
    assert metrics["reference/ddpm_1000"] == 2.5
    counts = {key: value for key, value in metrics.items() if key.startswith("trials/")}
    assert counts == {
        "trials/complete": 1,
        "trials/pruned": 1,
        "trials/stopped": 0,
        "trials/diverged": 0,
        "trials/failed": 1,
        "trials/running": 1,
    }
    history = [(step, value) for key, step, value in seen.history(seen.parent) if key == "trials/failed"]
    assert history == [(1, 0.0), (3, 1.0)]
    assert seen.parent.data.tags["ended"] == "interrupted"
    assert seen.parent.info.status == "KILLED"
    assert seen.files(seen.parent) == {"study.yaml", "leaderboard.csv"}


def test_nothing_that_is_no_number_is_drawn(studies):
    made = Made(studies)
    made.add()
    with made.folder.run(0).metrics.open("a") as file:
        file.write('{"step": 10, "energy/data_mean": NaN, "eval/fid_digits": Infinity, "note": "x", "good": 1}\n')
    made.record()
    every = made.seen.history(made.seen.child(0))
    assert ("good", 10, 1.0) in every
    assert all(math.isfinite(value) and key != "note" for key, _, value in every)
    assert all(abs(value) < 1e300 for _, _, value in every), "MLflow writes infinity as a large number"


def test_a_damaged_file_is_named_and_costs_only_itself(studies):
    made = Made(studies)
    made.whole()
    metrics = made.folder.run(0).metrics
    metrics.write_text("{broken\n" + metrics.read_text())
    assert made.record() == 0
    assert made.seen.child(0).info.status == "FINISHED"
    assert made.seen.child(0).data.metrics["best/fid_digits"] == 5.0
    assert len(made.said) == 1
    assert missing("metrics.jsonl … line 1", made.said[0]) == []


def test_a_trial_whose_config_was_refused_is_recorded_too(studies):
    made = Made(studies)
    values = {"algorithm.policy.lr": 1e-5, "train.batch_size": -1}
    outcome = Outcome(TrialState.FAILED, "train.batch_size is -1")
    made.records.append(TrialRecord(0, values, "0" * 12, 0, made.folder.run(0), outcome))
    assert made.record() == 0
    run = made.seen.child(0)
    assert run.info.status == "FAILED"
    assert run.data.params["train.batch_size"] == "-1"
    assert run.info.start_time <= run.info.end_time


def test_with_tracking_none_nothing_happens(tmp_path):
    made = Made(tmp_path, uri="none")
    made.whole()
    tracker = made.tracker()
    assert tracker.address == ""
    assert made.record(tracker) == 0
    assert [path.name for path in tmp_path.iterdir()] == ["demo"]


# ----------------------------------------------------------------------------
# Sessions


def test_interrupted_resumed_finished(studies):
    made = Made(studies)
    made.whole()
    made.add()
    made.go_on(1, 10)
    made.add()  # it never gets to run
    first = made.tracker()
    first.update(made.records, running={1})
    wait_until(lambda: "demo/0001" in Seen(first.address).children and made.seen.logged(1) == made.rows(1))
    assert made.seen.child(1).info.status == "RUNNING"
    assert made.seen.child(1).data.tags["state"] == "running"
    assert made.seen.parent.info.status == "RUNNING"
    assert "demo/0002" not in made.seen.children
    assert made.record(first, ended="interrupted") == 0
    seen = made.seen
    assert {run.info.status for run in seen.children.values()} == {"FINISHED", "KILLED"}
    assert seen.child(1).data.tags["state"] == seen.child(2).data.tags["state"] == "interrupted"
    assert seen.files(seen.child(1)) == {"config.yaml", "samples"}, "its checkpoints may still change"

    second = made.tracker()
    second.update(made.records, running={1})
    wait_until(lambda: made.seen.child(1).info.status == "RUNNING")
    assert made.seen.child(1).data.tags["state"] == "running"
    assert made.seen.parent.info.status == "RUNNING"
    for number in (1, 2):
        made.go_on(number, 20)
        made.end(number, best=20)
    assert made.record(second) == 0
    after = made.seen
    assert after.parent.info.run_id == seen.parent.info.run_id
    assert {name: run.info.run_id for name, run in after.children.items()} == {
        name: run.info.run_id for name, run in seen.children.items()
    }
    assert {run.info.status for run in (after.parent, *after.children.values())} == {"FINISHED"}
    assert {run.data.tags["state"] for run in after.children.values()} == {"complete"}
    assert [after.logged(number) for number in range(3)] == [made.rows(number) for number in range(3)]
    assert made.said == []


def test_rows_that_a_resumed_trial_writes_again_are_not_sent_again(studies):
    made = Made(studies)
    made.add()
    made.go_on(0, 10)
    made.go_on(0, 20)
    tracker = made.tracker()
    tracker.update(made.records, running={0})
    wait_until(lambda: made.seen.children and made.seen.logged(0) == made.rows(0))
    made.folder.run(0).forget_after(10)
    tracker.update(made.records, running={0})
    made.add()
    tracker.update(made.records, running={0, 1})
    wait_until(lambda: "demo/0001" in made.seen.children)  # so the shorter file was looked at
    made.go_on(0, 20)
    made.go_on(0, 30)
    for number in (0, 1):
        made.end(number, best=0)
    made.record(tracker)
    assert made.seen.logged(0) == made.rows(0)


def test_a_pruned_trial_is_never_finished(studies):
    """Not in the session that pruned it, nor if the driver was killed before it could say so."""
    made = Made(studies)
    made.add()
    made.record(ended="interrupted")
    made.end(0, TrialState.PRUNED, best=0)
    statuses = set()
    tracker = made.tracker()
    tracker.update(made.records, running=())
    wait_until(
        lambda: statuses.add(made.seen.child(0).info.status) or made.seen.child(0).data.tags["state"] == "pruned"
    )
    made.record(tracker)
    statuses.add(made.seen.child(0).info.status)
    assert statuses == {"KILLED"}
    assert made.seen.files(made.seen.child(0), "checkpoints") == {"step_00000000"}


def test_a_killed_driver_leaves_nothing_running_after_the_next_session(studies):
    made = Made(studies)
    made.add()
    first = made.tracker()
    first.update(made.records, running={0})
    wait_until(lambda: made.seen.children)
    first._uploader.given_up.set()  # as far as MLflow can tell, it was killed
    first._something_new.set()
    first._thread.join()
    assert made.seen.child(0).info.status == "RUNNING"
    assert made.record(ended="interrupted") == 0
    assert made.seen.child(0).info.status == "KILLED"


def test_files_that_a_killed_driver_did_not_send_are_sent_by_the_next(studies, monkeypatch):
    made = Made(studies)
    made.whole()
    with monkeypatch.context() as patch:
        patch.setattr(tune.integrations.mlflow_tracker._StudyUploader, "_upload", lambda *_: None)
        made.record()
    assert made.seen.child(0).info.status == "FINISHED"
    assert made.seen.files(made.seen.child(0)) == set()
    made.record()
    assert made.seen.files(made.seen.child(0), "checkpoints") == {"step_00000040"}


def test_other_settings_under_the_same_name_are_another_study(studies):
    made = Made(studies)
    made.whole()
    made.record()
    shutil.rmtree(made.folder.path)
    other = Made(studies)
    other.plan = replace(other.plan, space={"algorithm.entropy_coef": {"uniform": [0, 1]}})
    other.record()
    assert len(other.seen.parents) == 2


def test_a_study_recorded_elsewhere_before_is_recorded_whole(studies, template, tmp_path):
    made = Made(studies)
    made.whole()
    made.record()
    shutil.copytree(template, tmp_path / "other")
    moved = Made(tmp_path / "other")
    shutil.copytree(made.folder.trials, moved.folder.trials, dirs_exist_ok=True)
    moved.records = [replace(record, run=moved.folder.run(record.number)) for record in made.records]
    moved.record()
    assert moved.seen.logged(0) == made.rows(0)


def test_two_studies_are_recorded_in_one_store_at_once(studies):
    both = [Made(studies, name) for name in ("one", "two")]
    trackers = [made.tracker() for made in both]
    for made, tracker in zip(both, trackers, strict=True):
        for _ in range(4):
            made.whole()
            tracker.update(made.records, running=())
    assert [made.record(tracker) for made, tracker in zip(both, trackers, strict=True)] == [0, 0]
    seen = both[0].seen
    assert len(seen.parents) == 2
    assert sorted(seen.children) == [f"{name}/{number:04d}" for name in ("one", "two") for number in range(4)]
    for run in seen.children.values():
        points = Counter((key, step) for key, step, _ in seen.history(run))
        assert points.total() == len(points) == 22


# ----------------------------------------------------------------------------
# A client that fails


class Flaky:
    """MLflow's client, but `fate(name)` may say that a call fails "before" or "after" it did its work, or that it fails
    and is done "late", when it has been made again.
    """

    def __init__(self, client, fate) -> None:
        self.client = client
        self.fate = fate
        self.calls = Counter()
        self.late = []

    def __getattr__(self, name):
        def call(*args, **kwargs):
            self.calls[name] += 1
            fate = self.fate("log_metrics" if kwargs.get("metrics") else name)
            if fate == "before":
                raise ConnectionError(111, "Connection refused")
            if fate == "late":
                self.late.append((name, args, kwargs))
                raise TimeoutError("Read timed out")
            result = getattr(self.client, name)(*args, **kwargs)
            again = [late for late in self.late if late[:2] == (name, args) and late[2].keys() == kwargs.keys()]
            for late in again:
                self.late.remove(late)
                getattr(self.client, name)(*args, **late[2])
            if fate == "after":
                raise TimeoutError("Read timed out")
            return result

        return call


@pytest.fixture
def flaky(monkeypatch):
    """`flaky(fate)`: from now on every tracker's client is that `Flaky`."""
    whole = tune.integrations.mlflow_tracker._open_writer

    def make(fate):
        made = Flaky(None, fate)

        def open_writer(folder, plan):
            writer = whole(folder, plan)
            made.client, writer._client = writer._client, made
            return writer

        monkeypatch.setattr(tune.integrations.mlflow_tracker, "_open_writer", open_writer)
        return made

    return make


@pytest.mark.parametrize("fate", ["before", "after"])
@pytest.mark.parametrize(
    "name", ["create_run", "log_batch", "log_metrics", "search_runs", "set_terminated", "update_run"]
)
def test_a_call_that_fails_is_made_up_for_once(studies, flaky, name, fate):
    made = Made(studies)
    made.add()
    made.record(ended="interrupted")
    failed = Counter()

    def first_two(called):
        failed[called] += called == name
        return fate if called == name and failed[name] in (1, 3) else ""

    client = flaky(first_two)
    tracker = made.tracker()
    tracker.update(made.records, running={0})
    wait_until(lambda: made.seen.child(0).info.status == "RUNNING")
    made.go_on(0, 10)
    made.end(0, best=10)
    made.whole(TrialState.PRUNED)
    assert made.record(tracker) == 0
    assert failed[name] >= 1, f"{client.calls} never got there"
    seen = made.seen
    assert [seen.logged(number) for number in (0, 1)] == [made.rows(0), made.rows(1)]
    assert [seen.child(number).info.status for number in (0, 1)] == ["FINISHED", "KILLED"]
    assert seen.parent.info.status == "FINISHED"
    points = Counter((key, step) for run in (seen.parent, seen.child(0)) for key, step, _ in seen.history(run))
    assert [key for (key, _), count in points.items() if key.startswith(("trials/", "best/")) and count > 1] == []
    assert made.said


@pytest.mark.parametrize("seed", range(3))
def test_whatever_fails_every_row_arrives_once_and_in_order(studies, flaky, seed):
    made = Made(studies)
    rng = random.Random(seed)
    flaky(lambda _: rng.choices(["", "before", "after"], weights=[16, 1, 1])[0])
    tracker = made.tracker()
    for _ in range(4):
        made.add()
    for step in (10, 20, 30, 40):
        for number in range(4):
            made.go_on(number, step)
            tracker.update(made.records, running={0, 1, 2, 3})
        time.sleep(0.05)
    for number in range(4):
        made.end(number)
    assert made.record(tracker) == 0
    seen = made.seen
    for number in range(4):
        assert seen.logged(number) == made.rows(number)
        sent = [step for key, step, _ in seen.history(seen.child(number)) if key == "eval/fid_digits"]
        assert sent == [0, 10, 20, 30, 40]
        assert seen.files(seen.child(number), "checkpoints") == {"step_00000040"}
    assert {run.info.status for run in (seen.parent, *seen.children.values())} == {"FINISHED"}
    assert max(Counter((key, step) for key, step, _ in seen.history(seen.parent)).values()) == 1


def test_rows_that_arrive_after_they_were_given_up_are_there_once(studies, flaky):
    made = Made(studies)
    made.add()
    made.end(0, best=0)
    metrics = made.folder.run(0).metrics
    fates = iter(["late"])

    def fate(name):
        found = next(fates, "") if name == "log_metrics" else ""
        if found:
            os.utime(metrics, (2e9, 2e9))  # the trial goes on meanwhile
        return found

    client = flaky(fate)
    assert made.record() == 0
    assert made.said
    assert client.late == []
    assert made.seen.logged(0) == made.rows(0)


def test_a_run_that_somebody_deleted_is_made_again(studies):
    made = Made(studies)
    made.add()
    made.go_on(0, 10)
    tracker = made.tracker()
    tracker.update(made.records, running={0})
    wait_until(lambda: made.seen.children and made.seen.logged(0) == made.rows(0))
    made.seen.client.delete_run(made.seen.child(0).info.run_id)
    assert made.record(tracker, ended="interrupted") == 0
    assert made.seen.logged(0) == made.rows(0)
    assert made.seen.child(0).data.params


def test_a_study_that_somebody_deleted_is_made_again(studies):
    made = Made(studies)
    made.whole()
    made.add()
    tracker = made.tracker()
    tracker.update(made.records, running={1})
    wait_until(lambda: "demo/0001" in made.seen.children and made.seen.logged(1) == made.rows(1))
    seen = made.seen
    for run in (seen.parent, *seen.children.values()):
        seen.client.delete_run(run.info.run_id)
    made.go_on(1, 10)
    made.end(1, best=10)
    assert made.record(tracker) == 0
    again = [run for run in made.seen.runs if run.data.tags.get("mlflow.parentRunId") == made.seen.parent.info.run_id]
    assert sorted(run.data.tags["trial_id"] for run in again) == ["demo/0000", "demo/0001"]
    assert [made.seen.logged(number) for number in (0, 1)] == [made.rows(0), made.rows(1)]


def test_a_server_that_takes_no_files_gets_all_else(studies, monkeypatch):
    def full(*_: object) -> None:
        raise OSError(28, "No space left on device")

    made = Made(studies, patience_seconds=0.3)
    for _ in range(5):
        made.whole()
    with monkeypatch.context() as patch:
        patch.setattr(tune.integrations.mlflow_store, "link", full)
        assert made.record() >= 5
    seen = made.seen
    assert {run.info.status for run in (seen.parent, *seen.children.values())} == {"FINISHED"}
    assert [seen.logged(number) for number in range(5)] == [made.rows(number) for number in range(5)]
    assert len(made.said) == 1
    assert "No space left on device" in made.said[0]
    assert made.record() == 0
    assert made.seen.files(made.seen.child(4), "checkpoints") == {"step_00000040"}


def test_at_the_end_patience_is_kept_and_what_is_left_is_counted(studies, flaky):
    made = Made(studies, patience_seconds=0.5)
    made.whole()
    for _ in range(2):
        made.add()
    made.record(ended="interrupted")  # as the third trial still is afterwards
    for step in (10, 20):
        made.go_on(1, step)
    away = threading.Event()
    flaky(lambda _: "before" if away.is_set() else "")
    tracker = made.tracker()
    tracker.update(made.records, running={1})
    wait_until(lambda: "demo/0001" in made.seen.children and made.seen.logged(1) == made.rows(1))
    wait_until(lambda: made.seen.child(0).data.tags.get("artifacts") == "complete")
    away.set()
    made.go_on(1, 30)
    made.go_on(1, 40)
    began = time.monotonic()
    left = made.record(tracker, ended="interrupted")
    assert 0.5 <= time.monotonic() - began < 5.0
    assert left == 2, "two iterations of one trial"
    assert "Connection refused" in made.said[0]
    away.clear()
    made.end(1)
    assert made.record() == 0
    assert made.seen.logged(1) == made.rows(1)


def test_an_impatient_end_does_not_wait(studies, flaky):
    made = Made(studies, patience_seconds=600.0)
    made.whole()
    flaky(lambda _: "before")
    tracker = made.tracker()
    tracker.update(made.records, running=())
    began = time.monotonic()
    assert tracker.finish("interrupted", patient=False) >= 1
    assert time.monotonic() - began < 10.0


def test_the_driver_is_never_blocked(studies, monkeypatch):
    held = threading.Event()
    monkeypatch.setattr(tune.integrations.mlflow_tracker, "_open_writer", lambda *_: held.wait() and None)
    made = Made(studies)
    made.whole()
    began = time.monotonic()
    tracker = made.tracker()
    for _ in range(100):
        tracker.update(made.records, running=())
    assert time.monotonic() - began < 0.5
    held.set()


def test_an_error_in_the_thread_is_said_once_and_survived(studies, monkeypatch):
    made = Made(studies)
    made.whole()
    whole, failures = (
        tune.integrations.mlflow_tracker._open_writer,
        iter([KeyError("odd"), KeyError("odd"), KeyError("odd")]),
    )

    def sometimes(*args):
        for error in failures:
            raise error
        return whole(*args)

    monkeypatch.setattr(tune.integrations.mlflow_tracker, "_open_writer", sometimes)
    assert made.record() == 0
    assert len(made.said) == 1
    assert "odd" in made.said[0]
    assert made.seen.logged(0) == made.rows(0)


def test_trials_that_are_done_cost_nothing(studies, flaky, monkeypatch):
    client = flaky(lambda _: "")
    made = Made(studies)
    tracker = made.tracker()
    for _ in range(8):
        made.whole()
    tracker.update(made.records, running=())
    wait_until(lambda: tracker._uploader._first == 8)
    made.add()
    tracker.update(made.records, running={8})
    wait_until(lambda: "demo/0008" in made.seen.children and made.seen.logged(8) == made.rows(8))
    before = client.calls.copy()
    with monkeypatch.context() as patch:
        patch.setattr(RunDirectory, "rows", lambda _: 1 / 0)  # nothing is read again that has not changed
        patch.setattr(tune.integrations.mlflow_store, "link", lambda *_: 1 / 0)
        for _ in range(5):
            tracker.update(made.records, running={8})
            wait_until(lambda: not tracker._something_new.is_set())
        time.sleep(0.1)
    assert client.calls == before
    assert made.said == []
    made.end(8, best=0)
    made.record(tracker)
    client.calls.clear()
    made.record()
    assert client.calls.pop("get_metric_history") <= 10, "of the study's own metrics"
    assert client.calls == {"search_runs": 2, "update_run": 1, "set_terminated": 1}, "all trials are found at once"


def test_no_secret_is_ever_shown(tmp_path, monkeypatch, capfd):
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", "olga.researcher")
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", "hunter22")
    made = Made(tmp_path, uri=f"http://127.0.0.1:{free_port()}", patience_seconds=0.0)
    made.whole()
    assert made.record() >= 1
    assert "Connection refused" in made.said[0]

    def refuse(*_):
        raise PermissionError("401 for http://olga.researcher:hunter22@host with hunter22")

    monkeypatch.setattr(tune.integrations.mlflow_tracker, "_open_writer", refuse)
    made.record()
    assert "401" in made.said[1]
    shown = "".join(made.said) + "".join(capfd.readouterr())
    files = "".join(path.read_text(errors="replace") for path in tmp_path.rglob("*") if path.is_file())
    for secret in ("olga", "hunter22"):
        assert secret not in shown
        assert secret not in files


# ----------------------------------------------------------------------------
# The local store

FORKS = """
import os, sys
from pathlib import Path
import tune.integrations.mlflow_store
tune.integrations.mlflow_store.import_quietly()
import mlflow.store.tracking.sqlalchemy_store
for root in sys.stdin:
    pid = os.fork()
    if pid == 0:
        print(os.getpid(), *tune.integrations.mlflow_store.open_store(Path(root.strip()), "dxmi"), flush=True)
        os._exit(0)
    print(pid, flush=True)
for _ in range(int(sys.argv[1])):
    print("ended", os.wait()[1], flush=True)
"""


def is_alive(pid: int) -> bool:
    """Whether a process runs, a zombie not counted."""
    return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"


def is_whole(root: Path) -> bool:
    with sqlite3.connect(root / "mlflow.db") as connection:
        (verdict,) = connection.execute("PRAGMA integrity_check").fetchone()
    return verdict == "ok" and not [*root.glob(".mlflow.*.part")]


def test_eight_processes_open_a_new_store_at_once(tmp_path):
    root = tmp_path / "studies"
    # Python 3.12 warns of forks in a process with threads; which of MLflow's are there is not the question.
    command = [sys.executable, "-W", "ignore::DeprecationWarning:__main__", "-c", FORKS, "8"]
    said = subprocess.run(command, input=f"{root}\n" * 8, capture_output=True, text=True, timeout=120, check=True)
    lines = said.stdout.splitlines()
    assert lines.count("ended 0") == 8
    opened = [line.partition(" ")[2] for line in lines if "sqlite" in line]
    assert len(opened) == 8
    assert len(set(opened)) == 1, "one experiment"
    assert said.stderr == ""
    assert is_whole(root)


def test_a_kill_while_the_store_is_made_leaves_nothing_behind(tmp_path):
    root, kills = tmp_path / "studies", 6
    command = [sys.executable, "-c", FORKS, str(kills)]
    pipe, killed = subprocess.PIPE, 0
    with subprocess.Popen(command, stdin=pipe, stdout=pipe, text=True) as parent:
        for kill in range(kills):
            parent.stdin.write(f"{root}\n")
            parent.stdin.flush()
            pid = int(parent.stdout.readline().split()[0])
            wait_until(lambda: [*root.glob(".mlflow.*.part/mlflow.db")])
            time.sleep(kill * 0.15)
            killed += not (root / "mlflow.db").exists()
            os.kill(pid, signal.SIGKILL)
            wait_until(lambda: not is_alive(pid))  # noqa: B023
            (root / "mlflow.db").unlink(missing_ok=True)
        parent.communicate()
    assert killed >= 2
    made = Made(root)
    made.whole()
    assert made.record() == 0
    assert is_whole(root)
    assert made.seen.logged(0) == made.rows(0)


@pytest.mark.parametrize("kind", ["empty", "text", "other"])
def test_what_is_no_store_is_refused_with_a_sentence_unless_it_is_empty(tmp_path, kind):
    database = tmp_path / "mlflow.db"
    if kind == "other":
        with sqlite3.connect(database) as connection:
            connection.execute("CREATE TABLE notes (text)")
    else:
        database.write_text("no database " * 100 if kind == "text" else "")
    if kind == "empty":
        open_store(tmp_path, "dxmi")
        assert is_whole(tmp_path)
    else:
        with pytest.raises(UserError, match=stating("Move … away")):
            open_store(tmp_path, "dxmi")


def test_a_deleted_experiment_is_named(studies):
    from mlflow import MlflowClient  # noqa: PLC0415

    uri, experiment = open_store(studies, "gone")
    MlflowClient(uri).delete_experiment(experiment)
    with pytest.raises(UserError, match=f"restore -x {experiment}"):
        open_store(studies, "gone")
    assert open_store(studies, "dxmi")[1] != experiment


def test_a_moved_folder_of_studies_works_at_its_new_place(studies, tmp_path):
    made = Made(studies)
    made.whole()
    made.add()
    made.record(ended="interrupted")
    root = tmp_path / "elsewhere"
    shutil.move(studies, root)
    moved = Made(root)
    moved.records = [replace(record, run=moved.folder.run(record.number)) for record in made.records]
    moved.end(1, best=0)
    assert moved.record() == 0
    seen = moved.seen
    assert len(seen.children) == 2
    for run in (seen.parent, *seen.children.values()):
        assert run.info.artifact_uri == f"{(root / 'mlartifacts' / run.info.run_id).as_uri()}/artifacts"
    local = seen.client.download_artifacts(seen.child(0).info.run_id, "summary.json", str(tmp_path))
    assert json.loads(Path(local).read_text())["best"]["value"] == 5.0
    assert not studies.exists()


def hold(database: Path, seconds: float) -> threading.Thread:
    """Keep a database locked for a while, from the moment at which this returns."""
    locked = threading.Event()

    def work() -> None:
        connection = sqlite3.connect(database)
        connection.execute("BEGIN EXCLUSIVE")
        locked.set()
        time.sleep(seconds)
        connection.close()

    thread = threading.Thread(target=work)
    thread.start()
    locked.wait()
    return thread


def check_a_lock_costs_nothing(studies: Path, seconds: float) -> None:
    made = Made(studies)
    made.add()
    tracker = made.tracker()
    tracker.update(made.records, running={0})
    wait_until(lambda: made.seen.children)
    holder = hold(studies / "mlflow.db", seconds)
    for step in (10, 20, 30, 40):
        made.go_on(0, step)
        tracker.update(made.records, running={0})
    made.end(0)
    made.whole()
    assert made.record(tracker) == 0
    holder.join()
    assert [made.seen.logged(number) for number in (0, 1)] == [made.rows(0), made.rows(1)]
    assert {run.info.status for run in made.seen.children.values()} == {"FINISHED"}


def test_a_lock_that_is_held_too_long_costs_nothing(studies, monkeypatch):
    """MLflow waits 20 s for a lock: here 0.2, so that it gives up several times."""
    from sqlalchemy.orm import Session  # noqa: PLC0415

    whole = Session.execute

    def execute(self, statement, *args, **kwargs):
        if "busy_timeout" in str(statement):
            statement = type(statement)("PRAGMA busy_timeout = 200;")
        return whole(self, statement, *args, **kwargs)

    monkeypatch.setattr(Session, "execute", execute)
    check_a_lock_costs_nothing(studies, 2.0)


@pytest.mark.slow
def test_a_lock_that_is_held_for_thirty_seconds_costs_nothing(studies):
    check_a_lock_costs_nothing(studies, 30.0)


# ----------------------------------------------------------------------------
# A server


class Server:
    """A real one, on a store that it finds again when it is started again."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.uri = f"http://127.0.0.1:{free_port()}"
        self.process = None

    def __enter__(self) -> "Server":
        command = [sys.executable, "-m", "mlflow", "server", "--host", "127.0.0.1", "--workers", "1"]
        command += ["--port", self.uri.rpartition(":")[2], "--backend-store-uri", f"sqlite:///{self.folder}/server.db"]
        command += ["--artifacts-destination", str(self.folder / "artifacts")]
        environment = {**os.environ, "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false"}
        self.process = subprocess.Popen(
            command, env=environment, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL, start_new_session=True
        )
        wait_until(self.is_up, 120.0)
        return self

    def is_up(self) -> bool:
        try:
            return urllib.request.urlopen(f"{self.uri}/health", timeout=2).status == 200
        except OSError:
            return False

    def __exit__(self, *_: object) -> None:
        os.killpg(self.process.pid, signal.SIGKILL)  # its own session: the server and its workers
        self.process.wait()


@pytest.mark.slow
def test_a_server_that_is_killed_and_started_again_has_everything_once_and_in_order(tmp_path):
    server = Server(tmp_path)
    made = Made(tmp_path / "studies", uri=server.uri)
    with server:
        tracker = made.tracker()
        made.whole()
        made.add()
        tracker.update(made.records, running={1})
        wait_until(lambda: "demo/0001" in made.seen.children and made.seen.logged(1) == made.rows(1), 60.0)
        made.go_on(1, 10)
        tracker.update(made.records, running={1})
    for step in (20, 30, 40):
        made.go_on(1, step)
        tracker.update(made.records, running={1})
    made.end(1)
    made.whole(TrialState.PRUNED)
    tracker.update(made.records, running=())
    wait_until(lambda: made.said, 60.0)
    with server:
        assert made.record(tracker) == 0
        seen = made.seen
        for number in range(3):
            assert seen.logged(number) == made.rows(number)
            sent = [step for key, step, _ in seen.history(seen.child(number)) if key == "policy/entropy"]
            assert sent == [10, 20, 30, 40]
        assert [seen.child(number).info.status for number in range(3)] == ["FINISHED", "FINISHED", "KILLED"]
        assert seen.files(seen.child(1), "checkpoints/step_00000040") == {
            "algorithm.safetensors",
            "meta.json",
            "manifest.json",
        }
        assert seen.files(seen.child(1), "samples") == {f"step_{step:06d}.png" for step in (0, 10, 20, 30, 40)}
        assert seen.parent.info.status == "FINISHED"
    assert [path.name for path in (tmp_path / "studies").iterdir()] == ["demo"]
