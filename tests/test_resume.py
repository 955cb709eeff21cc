"""A run killed at any moment and resumed ends bitwise as if nothing had happened; damage is named and survived."""

import itertools
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from contextlib import ExitStack
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from dxmi.diffusion.policy import Policy
from dxmi.errors import DivergedError, UserError
from dxmi.evaluation.scorers import ImageScorer
from dxmi.persistence import checkpoint
from dxmi.persistence.cache import cache_root, lock_for
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.build import Experiment
from dxmi.training.progress import Phase
from dxmi.training.reporter import Stopwatch
from dxmi.training.run import train
from support import TINY, changed, locked_by_another, missing, stating
from tune.config.compose import compose_experiment


def tiny(*overrides: str) -> Experiment:
    return Experiment(compose_experiment(changed(TINY, *overrides)).experiment)


def outcome(out: Path) -> tuple[bytes, bytes, str, dict]:
    """All that must not depend on an interruption: the last checkpoint's tensors, the rows, the scores."""
    last = checkpoint.path_of(out / "checkpoints", 40)
    summary = json.loads((out / "summary.json").read_text())
    scores = {key: summary[key] for key in ("reference", "best", "last", "scores", "signature")}
    files = [(last / name).read_bytes() for name in ("algorithm.safetensors", "state.safetensors")]
    return files[0], files[1], (out / "metrics.jsonl").read_text(), scores


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    assert train(tiny(), out=out) is not None
    return out


REFERENCES = {"reference_data.png", "reference_full.png", "reference_few.png"}


def test_a_run_writes_what_the_readme_says(undisturbed):
    names = {entry.name for entry in undisturbed.iterdir()} - {".lock"}
    assert names == {"config.yaml", "summary.json", "metrics.jsonl", "checkpoints", "samples", "curves.png"}
    grids = {entry.name for entry in (undisturbed / "samples").iterdir()}
    steps = {*(f"step_{step:06d}.png" for step in (0, 10, 20, 30, 40)), "steps.png"}
    assert {name for name in grids if "_5_" not in name} == {*steps, *REFERENCES}
    kept = checkpoint.steps_in(undisturbed / "checkpoints")
    assert {30, 40} <= set(kept)
    assert len(kept) <= 3


def test_the_score_is_the_mean_over_the_draws_of_the_reports_noise_and_the_rest_is_as_with_one(undisturbed, tmp_path):
    train(tiny("evaluate.generations=3"), out=tmp_path / "run")
    ours, theirs = (json.loads((run / "summary.json").read_text()) for run in (tmp_path / "run", undisturbed))
    draws = [draw["eval/fid_digits"] for draw in ours["generations"]]
    assert draws[0] == theirs["best"]["value"]
    assert len(set(draws)) == 3
    assert ours["best"]["value"] == ours["scores"]["best"]["eval/fid_digits"] == pytest.approx(sum(draws) / 3)
    assert theirs["generations"] == [theirs["scores"]["best"]]
    shared = ours["scores"].keys() - {"best"} - ({"last"} if ours["best"]["step"] == ours["last"]["step"] else set())
    assert {name: ours["scores"][name] for name in shared} == {name: theirs["scores"][name] for name in shared}


def test_the_summary_has_at_least_what_was_promised(undisturbed):
    summary = json.loads((undisturbed / "summary.json").read_text())
    assert {"signature", "seed", "git_revision", "versions", "device", "seconds", "iterations"} <= summary.keys()
    assert summary["metric"] == "eval/fid_digits"
    assert {"ddpm_50_trailing", "shortened"} <= summary["reference"].keys()
    assert {"value", "step", "checkpoint"} <= summary["best"].keys()
    assert {"value", "step", "checkpoint"} <= summary["last"].keys()
    assert set(summary["seconds"]) == {phase.value for phase in Phase}
    assert summary["num_samples"] == 64
    assert (undisturbed / summary["best"]["checkpoint"]).is_dir()


def test_the_best_step_is_the_minimum_of_the_curve(undisturbed):
    rows = [row for row in RunDirectory(undisturbed).rows() if "eval/fid_digits" in row]
    assert [row["step"] for row in rows] == [0, 10, 20, 30, 40]
    assert all(row["eval/num_samples"] == 64 for row in rows)
    best = json.loads((undisturbed / "summary.json").read_text())["best"]
    assert best["selection_value"] == min(row["eval/fid_digits"] for row in rows)
    assert best["step"] == min(rows, key=lambda row: row["eval/fid_digits"])["step"]


def test_seconds_by_phase_are_within_the_time_that_passed(tmp_path):
    before = time.perf_counter()
    summary = train(tiny("seed=5"), out=tmp_path / "run")
    passed = time.perf_counter() - before
    assert all(seconds > 0 for seconds in summary.seconds.values())
    assert sum(summary.seconds.values()) <= passed


def test_the_stopwatch_misses_no_second_between_phases(monkeypatch):
    now = itertools.count(100.0, 1.0)
    monkeypatch.setattr("dxmi.training.reporter.time.perf_counter", lambda: next(now))
    clock = Stopwatch()  # reads 100
    for phase in Phase:
        clock.enter(phase)  # 101, 102, ...: one second each, and the last ends by a lap
    clock.lap()
    clock.add({Phase.FINETUNE.value: 10.0})
    assert clock.seconds == {"pretrain": 1.0, "references": 1.0, "finetune": 11.0, "report": 1.0}


def test_two_runs_of_one_config_are_equal_to_the_bit(undisturbed, tmp_path):
    train(tiny(), out=tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(undisturbed)


@pytest.mark.parametrize("stop_at", [0, 5, 10, 35])
def test_a_stopped_run_goes_on_to_the_same_end(undisturbed, tmp_path, stop_at):
    out = tmp_path / "run"
    assert train(tiny(), out=out, report=lambda p: p.phase is Phase.FINETUNE and p.step >= stop_at) is None
    assert not (out / "summary.json").exists()
    assert checkpoint.steps_in(out / "checkpoints")[-1] == stop_at
    train(tiny(), out=out)
    assert outcome(out) == outcome(undisturbed)


def test_a_stop_is_heard_between_the_steps_of_a_reference(undisturbed, tmp_path, monkeypatch):
    """All samples are one batch; what was sampled of it is thrown away."""
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("dxmi.training.reporter.LISTEN_EVERY", 0.0)
    steps, one_step = [], Policy.transition

    def counted(*args, **options):
        steps.append(args[2])
        return one_step(*args, **options)

    out = tmp_path / "run"
    with monkeypatch.context() as patched:
        patched.setattr(Policy, "transition", counted)
        assert train(tiny(), out=out, report=lambda p: p.phase is Phase.REFERENCES and len(steps) >= 3) is None
    assert steps == [0, 1, 2]
    assert not list((tmp_path / "cache" / "references").glob("*.cached"))
    train(tiny(), out=out)
    assert outcome(out) == outcome(undisturbed)


@pytest.mark.parametrize("kind", ["pretrained", "references"])
def test_a_stop_is_heard_while_another_process_computes_what_is_waited_for(undisturbed, tmp_path, monkeypatch, kind):
    cache = tmp_path / "cache"
    shutil.copytree(cache_root(), cache)
    monkeypatch.setenv("DXMI_CACHE", str(cache))
    monkeypatch.setattr("dxmi.persistence.cache._ALONE_POLL_SECONDS", 0.01)
    out, phase = tmp_path / "run", {"pretrained": Phase.PRETRAIN, "references": Phase.REFERENCES}[kind]
    told = []

    def report(event):
        told.append(event.phase)
        return told.count(phase) > 3

    with ExitStack() as held:
        for path in [*(cache / kind).glob("*.cached")]:
            path.unlink()
            held.enter_context(lock_for(path))
        assert train(tiny(), out=out, report=report) is None
    assert not list((cache / kind).glob("*.cached"))
    train(tiny(), out=out)
    assert outcome(out) == outcome(undisturbed)


@pytest.mark.parametrize(("scored", "stop_at"), [("score", 0), ("score", 20), ("score", 40), ("full_evaluation", 40)])
def test_a_stop_within_an_evaluation_loses_no_iteration(undisturbed, tmp_path, monkeypatch, scored, stop_at):
    monkeypatch.setattr("dxmi.training.reporter.LISTEN_EVERY", 0.0)
    out, evaluated, score = tmp_path / "run", [], getattr(ImageScorer, scored)

    def noted(self, sampling, energy=None):
        evaluated.append(sampling.step)
        return score(self, sampling, energy)

    with monkeypatch.context() as patched:
        patched.setattr(ImageScorer, scored, noted)
        assert train(tiny(), out=out, report=lambda p: evaluated[-1:] == [stop_at] and not p.metrics) is None
    saved, _ = checkpoint.newest(out / "checkpoints")
    assert saved.step == stop_at
    assert (saved.meta["score"] is None) == (scored == "score")
    train(tiny(), out=out)
    assert outcome(out) == outcome(undisturbed)


def start(out: Path, cache: Path) -> subprocess.Popen:
    command = [sys.executable, "-m", "tune.cli.main", "train", *TINY, f"out={out}"]
    return subprocess.Popen(command, env={**os.environ, "DXMI_CACHE": str(cache)}, stdout=subprocess.PIPE, text=True)


def test_kill_9_at_random_moments_changes_nothing(undisturbed, tmp_path):
    """Also while it pretrains: the cache is its own, and pretraining goes on from its partial checkpoints."""
    out, cache, rng = tmp_path / "run", tmp_path / "cache", random.Random(0)
    for kill in range(3):
        run = start(out, cache)
        lines = (line for line in run.stdout)
        wanted = ("pretrain", "references", "fine-tune")[kill]
        next((line for line in lines if wanted in line), None)
        time.sleep(rng.random() * 0.3)
        run.send_signal(signal.SIGKILL)
        run.communicate()
    run = start(out, cache)
    run.communicate()
    assert run.returncode == 0
    assert outcome(out) == outcome(undisturbed)


def cut_back(undisturbed: Path, out: Path) -> None:
    """The same run as it was just before its end."""
    shutil.copytree(undisturbed, out)
    (out / "summary.json").unlink()


@pytest.mark.parametrize("name", ["algorithm.safetensors", "state.safetensors", "meta.json", "manifest.json"])
def test_a_damaged_last_checkpoint_is_named_and_the_one_before_is_used(undisturbed, tmp_path, name):
    out = tmp_path / "run"
    cut_back(undisturbed, out)
    path = out / "checkpoints" / "step_00000040" / name
    path.write_bytes(path.read_bytes()[:-7])
    notes = []
    train(tiny(), out=out, report=lambda p: notes.append(p.note))
    assert any("step_00000040" in note and name in note for note in notes)
    assert outcome(out) == outcome(undisturbed)


def test_with_every_checkpoint_damaged_it_starts_afresh(undisturbed, tmp_path):
    out = tmp_path / "run"
    cut_back(undisturbed, out)
    for meta in out.glob("checkpoints/*/meta.json"):
        meta.unlink()
    train(tiny(), out=out)
    assert outcome(out) == outcome(undisturbed)


def test_a_row_cut_short_by_a_kill_is_written_again(undisturbed, tmp_path):
    out = tmp_path / "run"
    cut_back(undisturbed, out)
    shutil.rmtree(out / "checkpoints" / "step_00000040")
    metrics = out / "metrics.jsonl"
    metrics.write_text(metrics.read_text()[:-20])
    train(tiny(), out=out)
    assert outcome(out) == outcome(undisturbed)


def test_a_finished_run_is_not_run_again(undisturbed):
    before = (undisturbed / "summary.json").stat().st_mtime_ns
    summary = train(tiny(), out=undisturbed, report=lambda _: pytest.fail("something was run"))
    assert summary is not None
    assert (undisturbed / "summary.json").stat().st_mtime_ns == before


def test_another_config_in_the_same_folder_is_refused_with_the_difference(undisturbed):
    with pytest.raises(UserError, match="seed: 0 -> 1"):
        train(tiny("seed=1"), out=undisturbed)


def test_other_resources_are_no_other_config(undisturbed):
    assert train(tiny("resources.device=cpu"), out=undisturbed) is not None


def test_a_second_process_in_the_same_folder_is_refused(tmp_path):
    run = RunDirectory(tmp_path / "run")
    run.create()
    with (
        locked_by_another(run.path / ".lock"),
        pytest.raises(UserError, match=stating(f"Another process … {run.path}")),
    ):
        train(tiny(), out=run.path)


def test_a_run_is_resumed_into_another_folder_without_touching_the_first(undisturbed, tmp_path):
    first, second = tmp_path / "first", tmp_path / "second"
    cut_back(undisturbed, first)
    shutil.rmtree(first / "checkpoints" / "step_00000040")
    before = sorted(path.name for path in first.rglob("*"))
    train(tiny(), out=second, resume_from=first)
    assert sorted(path.name for path in first.rglob("*")) == before
    assert outcome(second) == outcome(undisturbed)


def test_other_data_than_it_was_begun_with_is_refused(undisturbed, tmp_path, monkeypatch):
    out = tmp_path / "run"
    cut_back(undisturbed, out)
    experiment = tiny()
    experiment.__dict__["data"] = replace(experiment.data, signature="0123456789ab")
    with pytest.raises(UserError, match=stating(f"{out} … other data")):
        train(experiment, out=out)


@pytest.mark.parametrize("change", [{"numerics": [1, 1]}, {"numerics": None}])
def test_a_run_of_a_version_that_computes_other_numbers_is_not_gone_on_with(undisturbed, tmp_path, change):
    out = tmp_path / "run"
    cut_back(undisturbed, out)
    folder = out / "checkpoints"
    for step in checkpoint.steps_in(folder):
        found = checkpoint.load(checkpoint.path_of(folder, step))
        checkpoint.save(folder, step, found.groups, {**found.meta, **change})
    with pytest.raises(UserError, match=stating(f"{out} … comparable")):
        train(tiny(), out=out)


def test_a_run_that_diverges_says_where(tmp_path, monkeypatch):
    with pytest.raises(DivergedError) as diverged:
        train(tiny("algorithm.critic.lr=1e30"), out=tmp_path / "run")
    assert diverged.value.metric.split("/")[0] in {"energy", "value", "policy", "eval"}
    assert 0 < diverged.value.step <= 40


def test_zero_iterations_of_either_training_are_a_run_too(tmp_path):
    summary = train(tiny("train.iterations=0", "pretrain.iterations=0"), out=tmp_path / "run")
    assert summary is not None
    assert summary.best["step"] == summary.last["step"] == 0
    assert summary.best["value"] == pytest.approx(summary.reference["shortened"], rel=1e-12)


def test_separate_values_targets_and_other_optimizers_resume_bitwise_too(tmp_path):
    overrides = [
        "algorithm.value=separate",
        "algorithm.target_ema=0.9",
        "algorithm.preset=objective",
        "algorithm.resample_next=true",
        "algorithm.all_states=true",
        "algorithm.policy.kind=radam",
        "algorithm.critic.kind=adamw",
        "network.value.hidden=16",
    ]
    whole, cut = tmp_path / "whole", tmp_path / "cut"
    train(tiny(*overrides), out=whole)
    train(tiny(*overrides), out=cut, report=lambda p: p.phase is Phase.FINETUNE and p.step >= 15)
    train(tiny(*overrides), out=cut)
    assert outcome(cut) == outcome(whole)
    assert torch.isfinite(checkpoint.newest(cut / "checkpoints")[0].groups["algorithm"]["policy.free_log_sigma"]).all()


def test_a_run_from_a_gpu_goes_on_with_other_noise_and_says_so(undisturbed, tmp_path):
    """Both times the same. The two generators of a checkpoint of a GPU hold 16 bytes."""
    last = {}
    for name in ("run", "again"):
        out, notes = tmp_path / name, []
        train(tiny(), out=out, report=lambda p: p.phase is Phase.FINETUNE and p.step >= 20)
        found, _ = checkpoint.newest(out / "checkpoints")
        state = {key: value[:16].clone() if ".noise" in key else value for key, value in found.groups["state"].items()}
        shutil.rmtree(found.path)
        checkpoint.save(out / "checkpoints", found.step, {**found.groups, "state": state},
                        {**found.meta, "devices": ["one of its own"]})  # fmt: skip
        train(tiny(), out=out, report=lambda p, notes=notes: notes.append(p.note))
        assert any(missing(f"{found.path} … device", note) == [] for note in notes)
        summary = json.loads((out / "summary.json").read_text())
        assert (
            summary["device"]
            == "one of its own, then " + json.loads((undisturbed / "summary.json").read_text())["device"]
        )
        last[name] = outcome(out)
    assert last["run"] == last["again"]
    assert last["run"][0] != outcome(undisturbed)[0]


def test_what_has_no_deterministic_kernel_is_said_in_a_sentence(tmp_path, monkeypatch):
    def refuse(*args, **options):
        raise RuntimeError("cumsum_cuda_kernel does not have a deterministic implementation, but you set ...")

    monkeypatch.setattr(Policy, "transition", refuse)
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))
    with pytest.raises(UserError, match=stating("resources.deterministic … cumsum_cuda_kernel … false")):
        train(tiny(), out=tmp_path / "run")


def test_pretraining_begun_on_a_gpu_starts_afresh(undisturbed, tmp_path, monkeypatch):
    """Other runs share what comes of it."""
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))
    assert train(tiny(), out=tmp_path / "run", report=lambda p: p.phase is Phase.PRETRAIN and p.step >= 30) is None
    (partial,) = {path.parent for path in (tmp_path / "cache" / "pretrained").rglob("step_*")}
    found, _ = checkpoint.newest(partial)
    state = {key: value[:16].clone() if ".noise" in key else value for key, value in found.groups["state"].items()}
    checkpoint.save(partial, found.step, {**found.groups, "state": state}, found.meta)
    notes = []
    train(tiny(), out=tmp_path / "run", report=lambda p: notes.append(p.note))
    assert any(missing("pretraining … afresh", note) == [] for note in notes)
    assert outcome(tmp_path / "run") == outcome(undisturbed)


def without(tensors: dict[str, torch.Tensor], words: str) -> dict[str, torch.Tensor]:
    return {key: value for key, value in tensors.items() if words not in key}


def with_generators(tensors: dict[str, torch.Tensor], state: torch.Tensor) -> dict[str, torch.Tensor]:
    return {key: state.clone() if key.startswith("generator.") else value for key, value in tensors.items()}


MENDED = {
    "no generator": ("state", lambda t: without(t, "generator.noise"), "lacks … generator.noise"),
    "floats": ("state", lambda t: with_generators(t, torch.zeros(5056)), "generator … 5056 … torch.float32"),
    "three bytes": ("state", lambda t: with_generators(t, torch.zeros(3, dtype=torch.uint8)), "generator … 3"),
    "zeros": ("state", lambda t: with_generators(t, torch.zeros(5056, dtype=torch.uint8)), "mt19937"),
    "no data order": ("state", lambda t: without(t, "stream.order"), "lacks … order"),
    "no state": ("state", None, "lacks … state"),
    "other shapes": ("algorithm", lambda t: {k: v[:1] if v.dim() == 2 else v for k, v in t.items()}, "fit"),
    "no weights": ("algorithm", lambda t: without(t, "policy."), "fit"),
    "no algorithm": ("algorithm", None, "lacks … algorithm"),
}
"""Checkpoints that were edited by hand, with a manifest that fits."""


@pytest.mark.parametrize("damage", MENDED)
def test_a_checkpoint_that_was_edited_is_refused_in_a_sentence(undisturbed, tmp_path, damage):
    group, change, words = MENDED[damage]
    out = tmp_path / "run"
    cut_back(undisturbed, out)
    found, _ = checkpoint.newest(out / "checkpoints")
    groups = {name: tensors for name, tensors in found.groups.items() if name != group or change is not None}
    if change is not None:
        groups[group] = change(groups[group])
    checkpoint.save(out / "checkpoints", found.step, groups, found.meta)
    with pytest.raises(UserError, match=stating(f"{found.path} … {words}")):
        train(tiny(), out=out)


@pytest.mark.parametrize(
    ("meta", "words"),
    [({"best": "x"}, "best … no step"), ({"best": {}}, "best … no step"),
     ({"best": {"step": None}}, "best … no step")],
)  # fmt: skip
def test_a_best_checkpoint_that_is_none_is_named(undisturbed, tmp_path, meta, words):
    out, notes = tmp_path / "run", []
    cut_back(undisturbed, out)
    found, _ = checkpoint.newest(out / "checkpoints")
    checkpoint.save(out / "checkpoints", found.step, found.groups, {**found.meta, **meta})
    train(tiny(), out=out, report=lambda p: notes.append(p.note))
    assert any(missing(f"{found.path} … {words}", note) == [] for note in notes)
    assert outcome(out) == outcome(undisturbed)


@pytest.mark.parametrize("key", ["signature", "data", "seconds", "best", "git_revision", "score"])
def test_what_is_missing_from_a_checkpoints_values_is_named(undisturbed, tmp_path, key):
    out = tmp_path / "run"
    cut_back(undisturbed, out)
    found, _ = checkpoint.newest(out / "checkpoints")
    meta = {name: value for name, value in found.meta.items() if name != key}
    checkpoint.save(out / "checkpoints", found.step, found.groups, meta)
    with pytest.raises(UserError, match=rf"{found.path} .*lacks {key}|begun with|config"):
        train(tiny(), out=out)
