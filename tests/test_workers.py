"""Several workers against one: the same noise, the same gradients, the same files. Processes of gloo, without Ray."""

import functools
import itertools
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from dxmi.data.configs import DigitsConfig
from dxmi.data.loading import load
from dxmi.distributed import SINGLE_PROCESS, Pace, Share, SingleProcess
from dxmi.errors import UserError
from dxmi.evaluation.config import EvaluateConfig
from dxmi.evaluation.scorers import build_scorer
from dxmi.tensors import chunks
from support import FirstOfTwo, free_port, missing, stating

PROGRAM = """
import json, os, sys
from datetime import timedelta
from pathlib import Path
import torch
import torch.distributed as dist
from safetensors.torch import save_file
from dxmi.config import build
from dxmi.errors import UserError
from dxmi.training.build import Experiment, ExperimentConfig
import dxmi.training.reporter
from dxmi.data.batch import Streams
from dxmi.diffusion.policy import Policy
from dxmi.training.run import train
from dxmi.distributed import SINGLE_PROCESS, TorchProcessGroup

torch.set_num_threads(1)
rank, size = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
dist.init_process_group("gloo", timeout=timedelta(seconds=60))
workers = TorchProcessGroup(60.0) if size > 1 else SINGLE_PROCESS
cases, folder = json.loads(sys.argv[1]), Path(sys.argv[2])

def step(algorithm, state, i):
    metrics = algorithm.update(state.stream.next(), i, Streams([state.generators]))
    return {name: values[0] for name, values in metrics.items()}

def iterations(experiment, num):
    dxmi, state = experiment.build_finetuning(experiment.build_denoiser())
    for i in range(num):
        with experiment.precision():
            metrics = step(dxmi, state, i)
    return dxmi, metrics

def gradients(experiment):
    dxmi, _ = iterations(experiment, 1)
    return {name: p.grad for name, p in dxmi.named_parameters() if p.grad is not None}

def after(experiment):
    dxmi, metrics = iterations(experiment, 20)
    return dict(dxmi.state_dict()) | {f"metric/{k}": v for k, v in metrics.items()}

def pretrained(experiment):
    ddpm, state = experiment.build_pretraining()
    for i in range(20):
        metrics = step(ddpm, state, i)
    return dict(ddpm.state_dict()) | {f"metric/{k}": v for k, v in metrics.items()}

def refused(experiment):
    def refuse():
        raise UserError("no")
    try:
        workers.on_rank_zero(refuse)
    except UserError as error:
        return {str(error): torch.zeros(1)}

def trained(experiment, stop_at=0):
    def report(progress):
        return progress.phase == "finetune" and progress.step >= stop_at > 0
    summary = train(experiment, out=folder / "run", report=report)
    (folder / f"said-{rank}.json").write_text(json.dumps(None if summary is None else summary.best))
    return {}

def begun(experiment):
    return trained(experiment, stop_at=10)

def stopped(experiment):
    # How many steps of the 1000-step reference this worker takes, if the first asks for a stop after 1,500 of its own.
    steps, one_step = [], Policy.transition
    def counted(*args, **options):
        steps.append(1)
        return one_step(*args, **options)
    def report(progress):
        return progress.phase == "references" and len(steps) >= 1500
    Policy.transition, dxmi.training.reporter.LISTEN_EVERY = counted, 0.0
    summary = train(experiment, out=folder / "stopped", report=report)
    Policy.transition = one_step
    assert summary is None
    return {"steps": torch.tensor(len(steps))}

made = {}
for name, what, tree in cases:
    experiment = Experiment(build(ExperimentConfig, tree), workers=workers)
    made |= {f"{name}/{key}": value for key, value in globals()[what](experiment).items()}
save_file({k: v.detach().contiguous().clone() for k, v in made.items()}, folder / f"made-{rank}.safetensors")
dist.barrier()
"""


def run(folder: Path, size: int, cases: list[tuple[str, str, dict]]) -> list[dict[str, torch.Tensor]]:
    """What each of `size` workers has made of the cases: (name, function of the program, tree of a config)."""
    folder.mkdir(exist_ok=True)
    environment = os.environ | {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port()), "WORLD_SIZE": str(size)}
    processes = [
        subprocess.Popen(
            [sys.executable, "-c", PROGRAM, json.dumps(cases), str(folder)],
            env=environment | {"RANK": str(rank)},
            stderr=subprocess.PIPE,
            text=True,
        )
        for rank in range(size)
    ]
    said = [process.communicate(timeout=300)[1] for process in processes]
    assert all(process.returncode == 0 for process in processes), said
    return [load_file(folder / f"made-{rank}.safetensors") for rank in range(size)]


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
        workers = SingleProcess()
        workers.rank, workers.size = rank, size
        shares.append(workers.share(num))
    assert torch.equal(torch.cat([share.of(batch) for share in shares]), batch)
    assert sum(float(share.mean(share.of(batch))) for share in shares) == pytest.approx(float(batch.mean()))
    assert max(share.count for share in shares) - min(share.count for share in shares) <= 1


def test_the_share_of_the_only_worker_is_the_batch_itself():
    batch = torch.randn(5, 3)
    share = SINGLE_PROCESS.share(5)
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
# Equality: as many cases as can be in one group of processes, since to start them takes most of the time

ALGORITHMS = {"shared": {}, "separate": SEPARATE, "all steps": {**SEPARATE, "policy_horizon": None}}
CASES = [
    *[(f"{name}-gradients", "gradients", tree_of(algorithm)) for name, algorithm in ALGORITHMS.items()],
    *[(f"{name}-after", "after", tree_of(algorithm)) for name, algorithm in ALGORITHMS.items()],
    *[(f"batch-{size}", "after", tree_of(train__batch_size=size)) for size in (1, 3)],
    ("pretrained", "pretrained", tree_of()),
    ("stopped", "stopped", tree_of(pretrain__iterations=0, evaluate__num_samples=300, evaluate__full_steps=[1000])),
]
ALONE_ONLY = [
    *[(f"pieces-{n}", "after", tree_of(SEPARATE, resources__accumulate=n)) for n in (2, 7)],
    ("half", "gradients", tree_of(train__precision="bfloat16")),
]


@pytest.fixture(scope="module")
def made(tmp_path_factory):
    """`made(size)`: what a group of that many workers makes of the cases."""
    folder = tmp_path_factory.mktemp("made")

    @functools.cache
    def group(size):
        cases = [case for case in CASES if size <= 2 or not case[0].startswith("batch")]
        return run(folder / str(size), size, cases + (ALONE_ONLY if size == 1 else []))

    return group


SIZES = [2, pytest.param(4, marks=pytest.mark.slow)]


def of(tensors: dict[str, torch.Tensor], case: str) -> dict[str, torch.Tensor]:
    return {key.removeprefix(f"{case}/"): value for key, value in tensors.items() if key.startswith(f"{case}/")}


@pytest.mark.parametrize("size", SIZES)
@pytest.mark.parametrize("name", ALGORITHMS)
def test_gradients_and_parameters_are_those_of_one_worker(made, size, name):
    (alone,), group = made(1), made(size)
    assert_near(of(group[0], f"{name}-gradients"), of(alone, f"{name}-gradients"), 1e-5)
    assert_near(of(group[0], f"{name}-after"), of(alone, f"{name}-after"), 1e-4)
    for other in group[1:]:
        shared = {key: value for key, value in group[0].items() if not key.startswith("stopped/")}
        assert all(torch.equal(other[key], value) for key, value in shared.items())


@pytest.mark.parametrize("size", SIZES)
def test_pretraining_is_that_of_one_worker(made, size):
    assert_near(of(made(size)[0], "pretrained"), of(made(1)[0], "pretrained"), 1e-4)


@pytest.mark.parametrize("batch_size", [1, 3])
def test_a_batch_may_be_smaller_than_the_group_and_odd(made, batch_size):
    case = f"batch-{batch_size}"
    assert_near(of(made(2)[0], case), of(made(1)[0], case), 1e-4)


@pytest.mark.parametrize("pieces", [2, 7])
def test_accumulated_gradients_are_those_of_the_batch(made, pieces):
    (alone,) = made(1)
    assert_near(of(alone, f"pieces-{pieces}"), of(alone, "separate-after"), 1e-4)


def test_bfloat16_trains_close_to_float32_and_keeps_float32_weights(made):
    half, full = of(made(1)[0], "half"), of(made(1)[0], "shared-gradients")
    assert all(value.dtype == torch.float32 for value in half.values())
    assert not all(torch.equal(half[name], full[name]) for name in full)
    for name in ("policy.network.body.layers.0.weight", "value.energy.network.body.layers.0.weight"):
        cosine = torch.nn.functional.cosine_similarity(half[name].flatten(), full[name].flatten(), dim=0)
        assert float(cosine) > 0.95


def test_a_stop_is_heard_by_all_workers_within_a_batch_of_which_one_has_none_left(made):
    """300 samples are three batches of 100: in the last round, the second of two workers only keeps step."""
    assert [int(of(worker, "stopped")["steps"]) for worker in made(2)] == [1500, 1000]


class Clock:
    """Workers whose first one takes this long for each step."""

    def __init__(self, monkeypatch, seconds: float) -> None:
        self.now, self.seconds = 0.0, seconds
        monkeypatch.setattr("dxmi.distributed.time.monotonic", lambda: self.now)

    def looks(self, pace: Pace, steps: int) -> list[int]:
        """The steps after which it is time to look up."""
        found = []
        for step in range(1, steps + 1):
            self.now += self.seconds
            if pace.due():
                found.append(step)
        return found


@pytest.mark.parametrize(("seconds", "expected"), [(2.0, [1, 2, 3, 4, 5, 6]), (2**-2, [1, 3, 5]), (2**-6, [1, 3])])
def test_workers_look_up_every_half_a_second_or_after_each_longer_step(monkeypatch, seconds, expected):
    clock = Clock(monkeypatch, seconds)
    assert clock.looks(Pace(FirstOfTwo(), 0.5), 6) == expected
    if seconds == 2**-6:
        assert np.diff(clock.looks(Pace(FirstOfTwo(), 0.5), 200)).tolist() == [2, 4, 8, 16, *[32] * 5]


def test_one_that_is_alone_looks_up_by_the_clock_whatever_its_steps_take(monkeypatch):
    clock = Clock(monkeypatch, 2**-6)
    pace = Pace(SINGLE_PROCESS, 0.5)
    assert clock.looks(pace, 100) == [32, 64, 96]
    clock.seconds = 2.0
    assert clock.looks(pace, 3) == [1, 2, 3]


def test_what_goes_wrong_in_the_first_worker_alone_is_raised_in_all(tmp_path, monkeypatch):
    """The features of the data are looked up by the first one, in a cache that cannot be written."""
    (tmp_path / "cache").write_text("a file")
    images = load(DigitsConfig())
    told = []
    monkeypatch.setattr(FirstOfTwo, "_broadcast_bytes", lambda _, content: told.append(json.loads(content)) or content)
    with pytest.raises(UserError, match=stating(f"{tmp_path / 'cache'} … written")):
        build_scorer(images, EvaluateConfig(), tmp_path / "cache", torch.device("cpu"), FirstOfTwo())
    assert missing(f"{tmp_path / 'cache'} … written", told[-1]["error"]) == []


# ----------------------------------------------------------------------------
# A whole run


@pytest.mark.slow
def test_a_run_of_two_ends_like_a_run_of_one_and_may_go_on_with_three(tmp_path, monkeypatch):
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))
    alone, two, both = tmp_path / "alone", tmp_path / "two", tmp_path / "both"
    whole, part = [("run", "trained", tree_of())], [("run", "begun", tree_of())]
    run(alone, 1, whole)
    run(two, 2, whole)
    run(both, 2, part)
    assert json.loads((both / "said-0.json").read_text()) is None
    assert not (both / "run" / "summary.json").exists()
    refused = run(both, 3, [*whole, ("refused", "refused", tree_of())])
    one = json.loads((alone / "run" / "summary.json").read_text())
    for folder in (two, both):
        summary = json.loads((folder / "run" / "summary.json").read_text())
        assert summary["signature"] == one["signature"]
        assert summary["reference"] == one["reference"]  # from the cache
        assert summary["last"]["value"] == pytest.approx(one["last"]["value"], rel=2e-2)
        rows = [json.loads(line) for line in (folder / "run" / "metrics.jsonl").read_text().splitlines()]
        assert [row["step"] for row in rows] == [0, 10, 10, 20, 20, 30, 30]
    assert (two / "said-0.json").read_text() == (two / "said-1.json").read_text()
    assert all(list(made) == ["refused/no"] for made in refused)  # what the first refuses, all refuse


def test_alone_an_action_is_just_called():
    def refuse() -> None:
        raise UserError("no")

    assert SINGLE_PROCESS.on_rank_zero(lambda: [1]) == [1]
    with pytest.raises(UserError):
        SINGLE_PROCESS.on_rank_zero(refuse)
