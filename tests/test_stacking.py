"""Stacked seeds: every member goes the way that it goes alone."""

import copy
import math
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from dxmi.algorithms.base import Algorithm
from dxmi.algorithms.ddpm import DDPM
from dxmi.algorithms.dxmi import DxMI
from dxmi.config import build
from dxmi.errors import DivergedError, UserError
from dxmi.optim.config import OptimizerConfig
from dxmi.optim.optimizer import Optimizer, StackedOptimizer
from dxmi.optim.seeds import StackedSeeds
from dxmi.persistence.checkpoint import Checkpoint, load, path_of, steps_in
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.progress import Phase
from dxmi.training.run import SeedRun, train, train_stacked
from dxmi.training.state import TrainingState
from support import TINY, changed, stacked_step, step
from tune.config.compose import compose_experiment
from tune.execution.seed_batching import known_stack

SEEDS = (0, 3, 7)
NETWORK = {"kind": "mlp", "hidden": 32, "layers": 3, "embedding": 16}
SEPARATE = {"value": "separate", "preset": "objective"}
ALGORITHMS = {
    "shared": {},
    "shared objective": {"preset": "objective", "target_ema": 0.9, "step_cost": "sigmoid"},
    "separate": SEPARATE,
    "several updates": {**SEPARATE, "energy_updates": 2, "value_updates": 2, "policy_updates": 2},
    "all states, resampled": {**SEPARATE, "all_states": True, "resample_next": True},
    "several steps": {**SEPARATE, "policy_horizon": 3},
    "all steps, from the second iteration on": {"policy_horizon": None, "value_updates": 0, "policy_start": 1},
    "noise cost, radam, clipped": {
        "running_cost": "noise",
        "policy_ema": None,
        "critic": {"kind": "radam", "max_grad_norm": 0.5, "weight_decay": 0.1},
        "policy": {"kind": "adamw", "decay": "cosine", "warmup": 5},
    },
}


def experiment(seed: int, algorithm: dict) -> Experiment:
    tree = {
        "seed": seed,
        "network": {"denoiser": NETWORK, "energy": NETWORK, "value": NETWORK},
        "algorithm": algorithm,
        "schedule": {"num_steps": 4},
        "pretrain": {"iterations": 60, "batch_size": 32},
        "train": {"iterations": 60, "batch_size": 24},
    }
    return Experiment(build(ExperimentConfig, tree))


def finetuning(seed: int, algorithm: dict) -> tuple[DxMI, TrainingState]:
    made = experiment(seed, algorithm)
    return made.build_finetuning(made.build_denoiser())


def run_alone(member: DxMI, state: TrainingState, iterations: range) -> dict[str, torch.Tensor]:
    for i in iterations:
        metrics = step(member, state, i)
    return metrics


def run_stacked(members: list[DxMI], states: list[TrainingState], iterations: range) -> dict[str, torch.Tensor]:
    stack = DxMI.stacked(members)
    for i in iterations:
        metrics = stacked_step(stack, states, i)
    return metrics


def require_equal(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0.0, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("algorithm", ALGORITHMS.values(), ids=ALGORITHMS)
@pytest.mark.parametrize("num", [10, pytest.param(50, marks=pytest.mark.slow)])
def test_a_member_equals_the_solo_run(algorithm, num):
    members, states = zip(*(finetuning(seed, algorithm) for seed in SEEDS), strict=True)
    metrics = run_stacked(list(members), list(states), range(num))
    for k, seed in enumerate(SEEDS):
        alone, state = finetuning(seed, algorithm)
        alone_metrics = run_alone(alone, state, range(num))
        require_equal(alone.state_dict(), members[k].state_dict())
        require_equal(alone_metrics, {name: values[k] for name, values in metrics.items()})
        require_equal(state.groups()["state"], states[k].groups()["state"])


def test_members_of_a_stack_can_leave_it_and_be_stacked_anew():
    """Solo, then as one of three, then as one of two: all the same run."""
    algorithm = {**SEPARATE, "target_ema": 0.9}
    members, states = map(list, zip(*(finetuning(seed, algorithm) for seed in SEEDS), strict=True))
    for member, state in zip(members, states, strict=True):
        run_alone(member, state, range(5))
    run_stacked(members, states, range(5, 10))
    run_stacked(members[1:], states[1:], range(10, 15))
    run_alone(members[2], states[2], range(15, 20))
    alone, state = finetuning(SEEDS[2], algorithm)
    run_alone(alone, state, range(20))
    require_equal(alone.state_dict(), members[2].state_dict())
    require_equal(state.groups()["state"], states[2].groups()["state"])


def test_a_member_is_saved_and_restored_alone():
    members, states = map(list, zip(*(finetuning(seed, {}) for seed in SEEDS), strict=True))
    run_stacked(members, states, range(10))
    saved = {group: {name: t.clone() for name, t in own.items()} for group, own in states[1].groups().items()}
    run_stacked(members, states, range(10, 15))
    alone, state = finetuning(SEEDS[1], {})
    alone.load_state_dict(saved["algorithm"])
    state.restore(Checkpoint(Path(), 10, saved, {}))
    run_alone(alone, state, range(10, 15))
    require_equal(alone.state_dict(), members[1].state_dict())


def test_pretraining_members_equal_solo_pretraining():
    pairs = [experiment(seed, {}).build_pretraining() for seed in SEEDS]
    stack = DDPM.stacked([ddpm for ddpm, _ in pairs])
    for i in range(50):
        metrics = stacked_step(stack, [state for _, state in pairs], i)
    for k, seed in enumerate(SEEDS):
        ddpm, state = experiment(seed, {}).build_pretraining()
        for i in range(50):
            alone = step(ddpm, state, i)
        require_equal(ddpm.state_dict(), pairs[k][0].state_dict())
        require_equal(alone, {name: values[k] for name, values in metrics.items()})


LABELLED = [
    *("network=mlp_small", "network.denoiser.hidden=16", "network.energy.hidden=12", "network.value.hidden=12"),
    *(f"network.{role}.classes=10" for role in ("denoiser", "energy", "value")),
]
LABELLED_UNET = [
    *("network=unet_small", "network.denoiser.channels=16", "network.denoiser.classes=10"),
    "pretrain.optimizer.lr=1e-4",  # Adam's first steps make rounding of small gradients as large as the learning rate
]
WITH_LATENTS = [
    *("network=ddgan_small", "network.denoiser.channels=8", "network.denoiser.latent=5", "schedule=ddgan"),
    *("network.energy.channels=4", "network.value.channels=4"),
]
FRESH = ["algorithm.value=separate", "algorithm.preset=objective", "algorithm.resample_next=true"]
CONDITIONAL = {
    "labels": LABELLED,
    "labels, fresh next states": [*LABELLED, *FRESH, "algorithm.all_states=true"],
    "labels of a U-Net": LABELLED_UNET,
    "latents": WITH_LATENTS,
    "latents, fresh next states": [*WITH_LATENTS, *FRESH],
}


@pytest.mark.filterwarnings("ignore:There is a performance drop")  # PyTorch attends to one member after the other
@pytest.mark.parametrize(
    ("settings", "phase"),
    [
        pytest.param(settings, phase, id=f"{name}-{phase}", marks=[pytest.mark.slow] * ("U-Net" in name))
        for name, settings in CONDITIONAL.items()
        for phase in ("pretraining", "finetuning")
        if phase == "finetuning" or FRESH[0] not in settings  # which pretraining does not use
    ],
)
def test_members_with_labels_or_latents_equal_the_solo_run(settings, phase):
    """Conditions and latents are drawn for each member by its own streams, and mapped with its samples."""

    def start(seed: int) -> tuple[Algorithm, TrainingState]:
        small = ["experiment=digits", "pretrain.batch_size=8", "train.batch_size=8", "schedule.num_steps=3"]
        made = Experiment(compose_experiment(changed(small, *settings, f"seed={seed}")).experiment)
        assert known_stack(SimpleNamespace(experiment=made.config, seeds_at_once=3)) != 1
        return made.build_finetuning(made.build_denoiser()) if phase == "finetuning" else made.build_pretraining()

    members, states = map(list, zip(*(start(seed) for seed in SEEDS), strict=True))
    stack = type(members[0]).stacked(members)
    for i in range(3):
        metrics = stacked_step(stack, states, i)
    for k, seed in enumerate(SEEDS):
        alone, state = start(seed)
        for i in range(3):
            own = step(alone, state, i)
        require_equal(alone.state_dict(), members[k].state_dict())
        require_equal(own, {name: values[k] for name, values in metrics.items()})


@pytest.mark.parametrize("kind", ["adam", "adamw", "radam"])
def test_each_member_is_clipped_by_its_own_norm(kind):
    """One of three members has gradients a thousand times as large; torch's own clipping says what to expect."""
    config = OptimizerConfig(kind=kind, lr=0.1, max_grad_norm=1.0)
    alone = [torch.nn.Linear(3, 2) for _ in range(3)]
    members = [copy.deepcopy(module) for module in alone]
    optimizers = [Optimizer(config, [(module.parameters(), 0.1)], 10) for module in members]
    stacked = StackedOptimizer(StackedSeeds(members), optimizers)
    x, scale = torch.randn(3, 5, 3), torch.tensor([1.0, 1000.0, 0.01])
    family = {"adam": torch.optim.Adam, "adamw": torch.optim.AdamW, "radam": torch.optim.RAdam}[kind]
    expected = [family(module.parameters(), lr=0.1, weight_decay=0.0) for module in alone]

    def loss(rows: torch.Tensor, factor: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": factor * members[0](rows).square().sum()}

    for _ in range(3):
        norms = stacked.minimize(loss, x, scale[:, None], num=1).grad_norm
        for k, module in enumerate(alone):
            module.zero_grad()
            (scale[k] * module(x[k]).square().sum()).backward()
            norm = torch.nn.utils.clip_grad_norm_(module.parameters(), 1.0)
            expected[k].step()
            torch.testing.assert_close(norms[k], norm, rtol=1e-5, atol=0.0)
            require_equal(dict(module.state_dict()), dict(members[k].state_dict()))


@pytest.mark.parametrize(("num_final", "num_open"), [(0, 0), (3, 0), (8, 0), (1, 3), (0, 8), (2, 6), (0, 2)])
def test_a_value_knows_open_rows(num_final, num_open):
    """Rows that may be at T are given to the energy exactly where they are."""
    made = experiment(0, SEPARATE)
    value, steps = made.build_algorithm(made.build_denoiser()).value, made.config.schedule.num_steps
    x = torch.randn(8, *made.event)
    closed = 8 - num_final - num_open
    for at_end in range(num_open + 1):
        t = torch.tensor([1] * closed + [3] * (num_open - at_end) + [steps] * (at_end + num_final))
        expected = torch.stack([value(row[None], int(step))[0] for row, step in zip(x, t, strict=True)])
        for split in ({"num_nonterminal": closed, "num_terminal": num_final}, {}):  # without one, all rows are open
            torch.testing.assert_close(value.forward_timesteps(x, t, **split), expected, rtol=1e-5, atol=1e-6)


# ----------------------------------------------------------------------------
# Whole runs


def member(seed: int, out: Path, report=None, *overrides: str) -> SeedRun:
    settings = changed(TINY, f"seed={seed}", *overrides)
    return SeedRun(Experiment(compose_experiment(settings).experiment), out / str(seed), report)


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Three runs, one after the other."""
    out = tmp_path_factory.mktemp("alone")
    for seed in SEEDS:
        train(member(seed, out).experiment, out=out / str(seed))
    return out


@pytest.fixture
def own_cache(tmp_path, monkeypatch):
    """Nothing is cached yet: pretraining is part of the run."""
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))


def require_same_run(one: Path, other: Path) -> None:
    """The same rows, scores and last checkpoint, but for rounding."""
    rows, others = RunDirectory(one).rows(), RunDirectory(other).rows()
    assert [row.keys() for row in rows] == [row.keys() for row in others]
    for row, expected in zip(rows, others, strict=True):
        assert row == pytest.approx(expected, rel=2e-3, abs=1e-5)
    summary, expected = RunDirectory(one).read_summary(), RunDirectory(other).read_summary()
    assert summary["signature"] == expected["signature"]
    assert summary["best"]["step"] == expected["best"]["step"]
    last, expected_last = (load(path_of(RunDirectory(out).checkpoints, 40)) for out in (one, other))
    require_equal(expected_last.groups["algorithm"], last.groups["algorithm"])
    assert torch.equal(last.groups["state"]["generator.noise"], expected_last.groups["state"]["generator.noise"])


@pytest.mark.usefixtures("own_cache")
def test_stacked_runs_are_the_solo_runs(alone, tmp_path):
    summaries = train_stacked([member(seed, tmp_path) for seed in reversed(SEEDS)])
    assert [(summary.seed, summary.members) for summary in summaries] == [(seed, 3) for seed in reversed(SEEDS)]
    for seed in SEEDS:
        require_same_run(tmp_path / str(seed), alone / str(seed))


@pytest.mark.usefixtures("own_cache")
def test_stacked_runs_may_share_one_pretrained_model(tmp_path):
    """The first trains it and the second finds it in the cache, though both are in one program."""
    stacked, solo = tmp_path / "stacked", tmp_path / "solo"
    shared = [member(seed, stacked, None, "pretrain.seed=3") for seed in (0, 7)]
    assert len({own.experiment.pretraining_path for own in [*shared, member(3, solo)]}) == 1
    first, second = train_stacked(shared)
    assert first.scores["shortened"] != second.scores["shortened"]  # scored on other noise
    for seed in (0, 7):
        train(member(seed, solo, None, "pretrain.seed=3").experiment, out=solo / str(seed))
        require_same_run(stacked / str(seed), solo / str(seed))
    train(member(3, solo).experiment, out=solo / "3")
    own = RunDirectory(solo / "3").read_summary()
    assert own["scores"] != RunDirectory(solo / "7").read_summary()["scores"]


def stop_at(step: int, phase: Phase = Phase.FINETUNE):
    return lambda progress: progress.phase is phase and progress.step >= step


def diverge_at(step: int):
    def report(progress):
        if progress.phase is Phase.FINETUNE and progress.step >= step:
            raise DivergedError(progress.step, "eval/fid_digits", math.nan)

    return report


def test_members_end_on_their_own_and_go_on_from_where_they_are(alone, tmp_path):
    """One diverges, one is stopped, one finishes; then all are run once more, from three different iterations."""
    reports = [diverge_at(20), stop_at(15), None]
    ended = train_stacked([member(seed, tmp_path, r) for seed, r in zip(SEEDS, reports, strict=True)])
    assert isinstance(ended[0], DivergedError)
    assert ended[1] is None
    assert ended[2].seed == SEEDS[2]
    assert [steps_in(tmp_path / str(seed) / "checkpoints")[-1] for seed in SEEDS] == [10, 15, 40]
    again = train_stacked([member(seed, tmp_path) for seed in SEEDS])
    assert again[2] == ended[2]
    for seed in SEEDS:
        require_same_run(tmp_path / str(seed), alone / str(seed))


@pytest.mark.usefixtures("own_cache")
def test_a_stop_in_stacked_pretraining_loses_nothing(alone, tmp_path):
    reports = [stop_at(50, Phase.PRETRAIN), stop_at(50, Phase.PRETRAIN), None]
    ended = train_stacked([member(seed, tmp_path, r) for seed, r in zip(SEEDS, reports, strict=True)])
    assert [summary is None for summary in ended] == [True, True, False]
    train_stacked([member(seed, tmp_path) for seed in SEEDS])
    for seed in SEEDS:
        require_same_run(tmp_path / str(seed), alone / str(seed))


def test_a_member_that_cannot_begin_says_so_and_the_others_run(alone, tmp_path):
    taken = RunDirectory(tmp_path / str(SEEDS[1]))
    taken.create()
    with taken.lock():
        ended = train_stacked([member(seed, tmp_path) for seed in SEEDS])
    assert isinstance(ended[1], UserError)
    require_same_run(tmp_path / str(SEEDS[2]), alone / str(SEEDS[2]))


def test_an_interrupt_frees_every_lock(tmp_path):
    def interrupt(progress):
        if progress.phase is Phase.FINETUNE and progress.step >= 10:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train_stacked([member(seed, tmp_path, interrupt) for seed in SEEDS])
    for seed in SEEDS:
        RunDirectory(tmp_path / str(seed)).lock().release()
