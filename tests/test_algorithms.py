"""Every algorithm of the registry does what the loop, resuming, stacking and groups of processes ask of it.

A new algorithm is picked up here by its line in the registry.
"""

import copy
import threading
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dxmi.algorithms.base import PolicyAlgorithm
from dxmi.algorithms.configs import PpoConfig
from dxmi.algorithms.registry import ALGORITHMS
from dxmi.config import build, to_tree
from dxmi.data.batch import Batch, Streams
from dxmi.distributed import SINGLE_PROCESS, ProcessGroup
from dxmi.persistence.checkpoint import Checkpoint
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.state import TrainingState

KINDS = ALGORITHMS.kinds()
NETWORK = {"kind": "mlp", "hidden": 16, "layers": 3, "embedding": 8}
SETTINGS: dict[str, dict[str, Any]] = {"trpo": {"max_kl": 0.01}}
"""With a longer step, the ratios of 25 trajectories differ by so many orders of magnitude that rounding shows."""
PAGE = Path(__file__).parents[1] / "dxmi" / "algorithms" / "README.md"


def experiment(
    kind: str, workers: ProcessGroup = SINGLE_PROCESS, *, seed: int = 0, classes: int = 0, **changes: Any
) -> Experiment:
    network = {**NETWORK, "classes": classes}
    tree: dict[str, Any] = {
        "seed": seed,
        "network": {"denoiser": network, "energy": network, "value": network},
        "schedule": {"num_steps": 4},
        "algorithm": {"kind": kind, **SETTINGS.get(kind, {})},
        "train": {"iterations": 60, "batch_size": 25},
        **changes,
    }
    if ALGORITHMS.config_class(kind).needs_reward:
        tree["reward"] = {"kind": "classifier", "label": 3}
    return Experiment(build(ExperimentConfig, tree), workers=workers)


def start(made: Experiment) -> tuple[PolicyAlgorithm, TrainingState]:
    return made.build_finetuning(made.build_denoiser())


def advance(algorithm: PolicyAlgorithm, states: Sequence[TrainingState], iterations: range) -> dict[str, Tensor]:
    streams = Streams([state.generators for state in states])
    for iteration in iterations:
        batch = Batch.stacked([state.stream.next() for state in states])
        metrics = algorithm.update(batch, iteration, streams)
    return metrics


def tensors(algorithm: PolicyAlgorithm, state: TrainingState) -> dict[str, Tensor]:
    return {f"{group}/{name}": value.clone() for group, own in state.groups().items() for name, value in own.items()}


def require_close(one: Mapping[str, Tensor], other: Mapping[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, value in one.items():
        torch.testing.assert_close(value, other[name], rtol=1e-4, atol=1e-5, msg=lambda text, n=name: f"{n}: {text}")


@pytest.mark.parametrize("kind", KINDS)
def test_an_update_changes_what_is_trained_and_nothing_else(kind):
    """Every optimizer moves its parameters; what no optimizer and no average owns stays."""
    algorithm, state = start(experiment(kind))
    before = {name: value.clone() for name, value in algorithm.state_dict().items()}
    metrics = advance(algorithm, [state], range(2))
    after = algorithm.state_dict()
    names = {id(parameter): name for name, parameter in algorithm.named_parameters()}
    for optimizer_name, optimizer in algorithm.optimizers.items():
        moved = [
            names[id(p)] for p in optimizer.parameters if not torch.equal(before[names[id(p)]], after[names[id(p)]])
        ]
        assert moved, optimizer_name
    trained = {names[id(p)] for optimizer in algorithm.optimizers.values() for p in optimizer.parameters}
    averaged = {names[id(p)] for average in algorithm.averages for p in average.targets if id(p) in names}
    buffers = {name for name, _ in algorithm.named_buffers()}
    changed = {name for name in before if not torch.equal(before[name], after[name])}
    assert changed <= trained | averaged | buffers
    assert all(value.shape == (1,) and value.isfinite().all() for value in metrics.values())


@pytest.mark.parametrize("kind", KINDS)
def test_it_resumes_to_the_bit(kind):
    whole, state = start(experiment(kind))
    advance(whole, [state], range(3))
    saved = {group: {k: v.clone() for k, v in own.items()} for group, own in state.groups().items()}
    advance(whole, [state], range(3, 6))
    resumed, other = start(experiment(kind))
    assert other.restore(Checkpoint(Path(), 3, saved, {}))
    advance(resumed, [other], range(3, 6))
    one, two = tensors(whole, state), tensors(resumed, other)
    assert one.keys() == two.keys()
    assert [name for name, value in one.items() if not torch.equal(value, two[name])] == []


@pytest.mark.parametrize("classes", [0, 10])
@pytest.mark.parametrize("kind", KINDS)
def test_stacked_seeds_do_what_they_do_by_themselves(kind, classes):
    seeds = (0, 3)
    members, states = map(list, zip(*(start(experiment(kind, seed=s, classes=classes)) for s in seeds), strict=True))
    metrics = advance(type(members[0]).stacked(members), states, range(4))
    for k, seed in enumerate(seeds):
        algorithm, state = start(experiment(kind, seed=seed, classes=classes))
        own = advance(algorithm, [state], range(4))
        require_close(tensors(algorithm, state), tensors(members[k], states[k]))
        require_close({name: value[0] for name, value in own.items()}, {n: v[k] for n, v in metrics.items()})


@pytest.mark.parametrize("kind", KINDS)
def test_micro_batches_change_nothing_but_rounding(kind):
    whole, state = start(experiment(kind))
    pieces, other = start(experiment(kind, resources={"accumulate": 3}))
    require_close(advance(whole, [state], range(4)), advance(pieces, [other], range(4)))
    require_close(tensors(whole, state), tensors(pieces, other))


@pytest.mark.parametrize("kind", [kind for kind in KINDS if ALGORITHMS.config_class(kind).needs_reward])
def test_no_network_sees_more_rows_at_once_than_a_micro_batch_has(kind):
    """25 trajectories have 75 actions; rollouts have 25 rows at a time, and every other call at most as many."""
    algorithm, state = start(experiment(kind, resources={"accumulate": 3}))
    rows: list[int] = []
    for policy in (algorithm.policy, algorithm.reference):
        assert policy is not None
        policy.network.register_forward_pre_hook(lambda _, inputs: rows.append(len(inputs[0])))
    advance(algorithm, [state], range(2))
    assert rows
    assert max(rows) <= 25


def test_the_ratio_starts_at_exactly_one_with_micro_batches():
    settings = {"kind": "ppo", "epochs": 1, "minibatches": 1}
    algorithm, state = start(experiment("ppo", algorithm=settings, resources={"accumulate": 3}))
    metrics = advance(algorithm, [state], range(1))
    assert metrics["policy/ratio"] == 1.0
    assert metrics["policy/ratio_std"] == 0.0


class Pair(ProcessGroup):
    """One of two processes, which are threads here."""

    size = 2

    def __init__(self, rank: int, board: dict[int, Any], barrier: threading.Barrier) -> None:
        self.rank, self._board, self._barrier = rank, board, barrier

    def _exchange(self, own: Any) -> list[Any]:
        self._board[self.rank] = own
        self._barrier.wait(60)
        found = [self._board[0], self._board[1]]
        self._barrier.wait(60)
        return found

    def sum(self, tensors: Sequence[Tensor]) -> list[Tensor]:
        return [a + b for a, b in zip(*self._exchange([t.detach().clone() for t in tensors]), strict=True)]

    def gather(self, block: Tensor) -> list[Tensor]:
        return self._exchange(block)

    def _broadcast_bytes(self, content: bytes) -> bytes:
        return self._exchange(content)[0]


def on_two(work: Callable[[ProcessGroup], Any]) -> list[Any]:
    """What `work` returns in each of two processes."""
    board: dict[int, Any] = {}
    barrier, found = threading.Barrier(2), {}

    def run(rank: int) -> None:
        torch.set_num_threads(1)
        found[rank] = work(Pair(rank, board, barrier))

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    return [found[0], found[1]]


@pytest.mark.parametrize("kind", KINDS)
def test_two_processes_do_what_one_does(kind):
    def work(workers: ProcessGroup) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        algorithm, state = start(experiment(kind, workers))
        metrics = advance(algorithm, [state], range(3))
        return {name: value.clone() for name, value in algorithm.state_dict().items()}, metrics

    algorithm, state = start(experiment(kind))
    metrics = advance(algorithm, [state], range(3))
    for weights, own in on_two(work):
        require_close(algorithm.state_dict(), weights)
        require_close(metrics, own)


@pytest.mark.parametrize("kind", [kind for kind in KINDS if hasattr(ALGORITHMS.config_class(kind)(), "policy")])
def test_learning_rates_and_decays_are_tensors_that_change_in_place(kind):
    """So that an iteration can be recorded whole: nothing that varies is a number of the host's."""
    policy = {"warmup": 5, "decay": "cosine"}
    algorithm, state = start(experiment(kind, algorithm={"kind": kind, "policy": policy}))
    rates = [group["lr"] for optimizer in algorithm.optimizers.values() for group in optimizer.torch.param_groups]
    assert all(isinstance(rate, Tensor) for rate in rates)
    before = [float(rate) for rate in rates]
    advance(algorithm, [state], range(3))
    now = [group["lr"] for optimizer in algorithm.optimizers.values() for group in optimizer.torch.param_groups]
    assert all(one is other for one, other in zip(rates, now, strict=True))
    assert [float(rate) for rate in now] != before


@pytest.mark.parametrize("kind", KINDS)
def test_it_logs_what_its_page_and_its_panels_name(kind):
    algorithm, state = start(experiment(kind))
    metrics = advance(algorithm, [state], range(1))
    assert {panel for panel in algorithm.panels if not panel.startswith("eval/")} <= metrics.keys()
    module = type(algorithm).__module__
    documentation = __import__(module, fromlist=["__doc__"]).__doc__ + PAGE.read_text()
    assert [name for name in metrics if name not in documentation] == []


@pytest.mark.parametrize("kind", KINDS)
def test_a_copy_is_independent(kind):
    """`stacked` copies the first member shallowly: a member alone keeps its own optimizers."""
    members, states = map(list, zip(*(start(experiment(kind, seed=s)) for s in (0, 1)), strict=True))
    own = copy.copy(members[0].optimizers)
    advance(type(members[0]).stacked(members), states, range(1))
    assert members[0].optimizers == own
    assert members[0].seeds.size == 1


CHANGED: dict[str, tuple[Any, ...]] = {
    "entropy_coef": (0.5,),
    "first_step": (1,),
    "last_step": (True,),
    "policy_ema": (0.05,),
    "baseline": ("mean", "none"),
    "baseline_updates": (3,),
    "gradient_penalty": (1.0,),
    "critic_updates": (3,),
    "value_updates": (3,),
    "policy_updates": (1, 2),
    "groups": ("condition", "batch"),
    "spread": ("batch",),
    "buffer": (8,),
    "min_count": (1000,),
    "advantage_clip": (0.1,),
    "kl_coef": (0.1,),
    "epochs": (1,),
    "minibatches": (3,),
    "clip": (1e-3,),
    "dual_clip": (None,),
    "log_ratio": ("mean",),
    "target_kl": (1e-9,),
    "max_kl": (1e-9,),
    "cg_iterations": (2,),
    "damping": (0.5,),
    "backtracks": (0,),
    "train_sigmas": (False,),
    "penalty": (10.0,),
    "steps": (2,),
    "target_ema": (0.5,),
    "reward_updates": (3,),
    "temperature": (3.0,),
    "temperature_lr": (0.1,),
    "target_entropy": (-1.0,),
    **{name: ({"lr": 0.01},) for name in ("policy", "critic", "energy")},
}
"""Other values of every setting of the policy-gradient algorithms; test_algorithm has those of DxMI."""
COMPANIONS: dict[str, dict[str, Any]] = {
    **{key: {"baseline": "learned"} for key in ("critic", "baseline_updates")},
    "groups": {"baseline": "mean"},
    "last_step": {"kl_coef": 0.1},
    "buffer": {"baseline": "mean", "spread": "none"},
    "min_count": {"baseline": "mean", "spread": "none", "buffer": 30, "groups": "batch"},
    "dual_clip": {"clip": 1e-4, "dual_clip": 1.0002},
    "backtracks": {"max_kl": 1e6},
    "temperature_lr": {"target_entropy": -1.0},
}
"""Settings with which another one has an effect."""


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "dxmi"])
def test_no_setting_is_without_effect(kind):
    def trained(**changes: Any) -> dict[str, Tensor]:
        algorithm, state = start(experiment(kind, classes=10, algorithm={"kind": kind, **changes}))
        advance(algorithm, [state], range(3))
        return tensors(algorithm, state)

    defaults = to_tree(ALGORITHMS.config_class(kind)())
    dead = []
    for name in sorted(defaults.keys() - {"kind"}):
        companions = {key: value for key, value in COMPANIONS.get(name, {}).items() if key in defaults}
        before = companions.get(name, defaults[name])
        changed = next(value for value in CHANGED[name] if value != before)
        plain, other = trained(**companions), trained(**companions | {name: changed})
        if plain.keys() == other.keys() and all(torch.equal(value, other[key]) for key, value in plain.items()):
            dead.append(name)
    assert dead == []


def test_the_twins_of_sac_start_and_stay_different():
    algorithm, state = start(experiment("sac"))
    advance(algorithm, [state], range(2))
    first, second = algorithm.value.first.state_dict(), algorithm.value.second.state_dict()
    same = [name for name, value in first.items() if torch.equal(value, second[name])]
    assert [name for name in same if name.endswith("weight")] == []


def test_a_step_of_trpo_has_its_divergence_with_attention_and_groups_too():
    """A U-Net whose attention and normalization have no forward mode."""
    unet = {"kind": "unet", "channels": 8, "multipliers": [1, 2], "blocks": 1, "attention": [4], "groups": 4}
    networks = {"denoiser": {**unet, "dropout": 0.0}, "energy": NETWORK, "value": NETWORK}
    settings = {"kind": "trpo", "max_kl": 0.01, "cg_iterations": 3}
    algorithm, state = start(experiment("trpo", network=networks, train={"batch_size": 6}, algorithm=settings))
    metrics = advance(algorithm, [state], range(1))
    assert float(metrics["policy/kl"]) == pytest.approx(0.01, rel=0.01)


@pytest.mark.parametrize(("settings", "steps", "last"), [({}, 4, 2), ({"last_step": True}, 4, 3), ({}, 5, 3)])
def test_the_first_action_is_at_most_the_last_one(settings, steps, last):
    PpoConfig(first_step=last, **settings).check(steps)
    with pytest.raises(ValueError, match=rf"^first_step is {last + 1}, but {last} is the last step that counts"):
        PpoConfig(first_step=last + 1, **settings).check(steps)
    with pytest.raises(ValueError, match=r"^first_step is -1: it must be at least 0"):
        PpoConfig(first_step=-1, **settings)
