"""Several workers against one: the same noise, the same gradients, the same files. Processes of gloo, without Ray."""

import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from dxmi.errors import UserError
from dxmi.tensors import chunks
from dxmi.workers import ALONE, Alone, Share

PROGRAM = """
import json, os, sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from dxmi.config import build
from dxmi.errors import UserError
from dxmi.experiment import Experiment, ExperimentConfig
from dxmi.train import train
from dxmi.workers import ALONE, Group

what, tree, out = sys.argv[1], json.loads(sys.argv[2]), Path(sys.argv[3])
torch.set_num_threads(1)
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
workers = Group(60.0) if size > 1 else ALONE
experiment = Experiment(build(ExperimentConfig, tree), workers=workers)

def gradients():
    dxmi, state = experiment.build_finetuning(experiment.build_denoiser())
    with experiment.precision():
        metrics = dxmi.update(state.stream.next(), 0, state.generators["noise"], state.generators["states"])
    return dxmi, {name: p.grad for name, p in dxmi.named_parameters() if p.grad is not None}, metrics

def after(iterations):
    dxmi, state = experiment.build_finetuning(experiment.build_denoiser())
    for i in range(iterations):
        with experiment.precision():
            metrics = dxmi.update(state.stream.next(), i, state.generators["noise"], state.generators["states"])
    return dict(dxmi.state_dict()) | {f"metric/{k}": v for k, v in metrics.items()}

def pretrained():
    ddpm, state = experiment.build_pretraining()
    for i in range(20):
        metrics = ddpm.update(state.stream.next(), i, state.generators["noise"])
    return dict(ddpm.state_dict()) | {f"metric/{k}": v for k, v in metrics.items()}

if what == "gradients":
    _, tensors, _ = gradients()
elif what == "after":
    tensors = after(20)
elif what == "both":
    _, tensors, _ = gradients()
    tensors = {f"gradient/{name}": value for name, value in tensors.items()} | after(20)
elif what == "pretrained":
    tensors = pretrained()
elif what == "train":
    stop_at = int(sys.argv[4])
    def report(progress):
        return progress.phase == "finetune" and progress.step >= stop_at > 0
    summary = train(experiment, out=out, report=report)
    tensors = {}
    (out.parent / f"said-{rank}.json").write_text(json.dumps(None if summary is None else summary.best))
elif what == "refuse":
    def refuse():
        raise UserError("no")
    try:
        workers.on_first(refuse)
    except UserError as error:
        tensors = {str(error): torch.zeros(1)}
save_file({k: v.detach().contiguous().clone() for k, v in tensors.items()}, out.parent / f"{what}-{rank}.safetensors")
dist.barrier()
"""


def run(tmp_path: Path, what: str, size: int, tree: dict, *, stop_at: int = 0) -> list[dict[str, torch.Tensor]]:
    """What each of `size` workers has made."""
    from safetensors.torch import load_file  # noqa: PLC0415

    tmp_path.mkdir(exist_ok=True)
    command = [sys.executable, "-c", PROGRAM, what, json.dumps(tree), str(tmp_path / "run"), str(stop_at)]
    port = str(_free_port())
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port, "WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(command, env=environment | {"RANK": str(rank)}, stderr=subprocess.PIPE, text=True)
        for rank in range(size)
    ]
    said = [process.communicate(timeout=200)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    return [load_file(tmp_path / f"{what}-{rank}.safetensors") for rank in range(size)]


def _free_port() -> int:
    import socket  # noqa: PLC0415

    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return listener.getsockname()[1]


NETWORK = {"kind": "mlp", "hidden": 32, "layers": 3, "embedding": 16}
SEPARATE = {
    "value": "separate",
    "preset": "objective",
    "resample_next": True,
    "all_states": True,
    "target_ema": 0.9,
    "energy_updates": 2,
    "step_cost": "sigmoid",
}


def tree_of(algorithm: dict | None = None, **changes) -> dict:
    tree = {
        "network": {"denoiser": NETWORK, "energy": NETWORK, "value": NETWORK},
        "algorithm": algorithm or {},
        "pretrain": {"iterations": 40, "batch_size": 30},
        "train": {"iterations": 30, "batch_size": 30, "log_every": 10},
        "evaluate": {"every": 10, "num_samples": 500, "batch_size": 100, "kid_subset_size": 100, "grid": 16},
        "resources": {"device": "cpu", "threads": 1},
    }
    for key, value in changes.items():
        group, name = key.split("__")
        tree[group][name] = value
    return tree


def assert_near(ours: dict[str, torch.Tensor], theirs: dict[str, torch.Tensor], relative: float) -> None:
    """The distance of each tensor, relative to its norm."""
    assert ours.keys() == theirs.keys()
    for name, expected in theirs.items():
        scale = max(float(expected.double().norm()), 1e-3)
        assert float((ours[name].double() - expected.double()).norm()) <= relative * scale, name


# ----------------------------------------------------------------------------
# Shares


@pytest.mark.parametrize(("num", "size"), [(128, 2), (30, 4), (7, 3), (2, 4), (1, 2)])
def test_shares_make_up_the_batch(num, size):
    batch = torch.arange(float(num))
    shares = []
    for rank in range(size):
        workers = Alone()
        workers.rank, workers.size = rank, size
        shares.append(workers.share(num))
    assert torch.equal(torch.cat([share.of(batch) for share in shares]), batch)
    assert sum(float(share.mean(share.of(batch))) for share in shares) == pytest.approx(float(batch.mean()))
    assert max(share.count for share in shares) - min(share.count for share in shares) <= 1


def test_the_share_of_the_only_worker_is_the_batch_itself():
    batch = torch.randn(5, 3)
    share = ALONE.share(5)
    assert share == Share(0, 5, 5)
    assert share.of(batch) is batch
    assert torch.equal(share.mean(batch[:, 0]), batch[:, 0].mean())


@pytest.mark.parametrize(("num", "pieces"), [(10, 1), (10, 3), (2, 5), (0, 3)])
def test_chunks_make_up_the_rows(num, pieces):
    rows = list(range(num))
    parts = [rows[piece] for piece in chunks(num, pieces)]
    assert list(itertools.chain(*parts)) == rows
    assert 1 <= len(parts) <= max(1, min(num, pieces))


# ----------------------------------------------------------------------------
# Equality: DESIGN's floor of data parallelism


@pytest.mark.parametrize("size", [2, 4])
@pytest.mark.parametrize("algorithm", [{}, SEPARATE], ids=["shared", "separate"])
def test_gradients_and_parameters_are_those_of_one_worker(tmp_path, size, algorithm):
    tree = tree_of(algorithm)
    (alone,) = run(tmp_path / "alone", "both", 1, tree)
    group = run(tmp_path / "group", "both", size, tree)
    for wanted, relative in ((True, 1e-5), (False, 1e-4)):
        ours, theirs = ({k: v for k, v in t.items() if k.startswith("gradient/") == wanted} for t in (group[0], alone))
        assert_near(ours, theirs, relative)
    for other in group[1:]:
        assert all(torch.equal(other[name], value) for name, value in group[0].items())


def test_pretraining_is_that_of_one_worker(tmp_path):
    (alone,) = run(tmp_path / "alone", "pretrained", 1, tree_of())
    group = run(tmp_path / "group", "pretrained", 2, tree_of())
    assert_near(group[0], alone, 1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_may_be_smaller_than_the_group_and_odd(tmp_path, batch_size):
    tree = tree_of(train__batch_size=batch_size)
    (alone,) = run(tmp_path / "alone", "after", 1, tree)
    assert_near(run(tmp_path / "group", "after", 2, tree)[0], alone, 1e-4)


@pytest.mark.parametrize("pieces", [2, 7])
def test_accumulated_gradients_are_those_of_the_batch(tmp_path, pieces):
    (alone,) = run(tmp_path / "alone", "after", 1, tree_of(SEPARATE))
    (pieced,) = run(tmp_path / "pieces", "after", 1, tree_of(SEPARATE, resources__accumulate=pieces))
    assert_near(pieced, alone, 1e-4)


def test_bfloat16_trains_close_to_float32_and_keeps_float32_weights(tmp_path):
    (full,) = run(tmp_path / "full", "gradients", 1, tree_of())
    (half,) = run(tmp_path / "half", "gradients", 1, tree_of(train__precision="bfloat16"))
    assert all(value.dtype == torch.float32 for value in half.values())
    assert not all(torch.equal(half[name], full[name]) for name in full)
    for name in ("policy.network.body.layers.0.weight", "value.energy.network.body.layers.0.weight"):
        cosine = torch.nn.functional.cosine_similarity(half[name].flatten(), full[name].flatten(), dim=0)
        assert float(cosine) > 0.95


# ----------------------------------------------------------------------------
# A whole run


def test_a_run_of_two_ends_like_a_run_of_one_and_may_go_on_with_three(tmp_path, monkeypatch):
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))
    alone, two, both = tmp_path / "alone", tmp_path / "two", tmp_path / "both"
    run(alone, "train", 1, tree_of())
    run(two, "train", 2, tree_of())
    run(both, "train", 2, tree_of(), stop_at=10)
    assert json.loads((both / "said-0.json").read_text()) is None
    assert not (both / "run" / "summary.json").exists()
    run(both, "train", 3, tree_of())
    one = json.loads((alone / "run" / "summary.json").read_text())
    for folder in (two, both):
        summary = json.loads((folder / "run" / "summary.json").read_text())
        assert summary["signature"] == one["signature"]
        assert summary["reference"] == one["reference"]  # from the cache
        assert summary["last"]["value"] == pytest.approx(one["last"]["value"], rel=2e-2)
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 10, 10, 20, 20, 30, 30]
    assert (two / "said-0.json").read_text() == (two / "said-1.json").read_text()


def test_what_the_first_worker_refuses_all_refuse(tmp_path):
    assert all(list(made) == ["no"] for made in run(tmp_path, "refuse", 3, tree_of()))


def test_alone_an_action_is_just_called():
    def refuse() -> None:
        raise UserError("no")

    assert ALONE.on_first(lambda: [1]) == [1]
    with pytest.raises(UserError):
        ALONE.on_first(refuse)
