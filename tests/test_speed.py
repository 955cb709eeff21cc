"""What makes a run faster and changes no result but by rounding: compiled networks, and recorded iterations."""

import os
import sys
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dxmi.algorithms.dxmi import DxMI
from dxmi.algorithms.registry import ALGORITHMS
from dxmi.algorithms.states import StoredStates
from dxmi.config import build
from dxmi.data.batch import Batch
from dxmi.errors import UserError
from dxmi.networks.base import Critic, Denoiser
from dxmi.persistence.cache import cache_root
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig, ResourcesConfig
from dxmi.training.recording import RecordedUpdate
from support import stating, step

NETWORK = {"kind": "mlp", "hidden": 32, "layers": 3, "embedding": 16}


def experiment(seed: int = 0, algorithm: dict | None = None, **resources) -> Experiment:
    tree = {
        "seed": seed,
        "algorithm": algorithm or {},
        "network": {"denoiser": NETWORK, "energy": NETWORK, "value": NETWORK},
        "train": {"iterations": 60, "batch_size": 24},
        "resources": {"device": "cpu", **resources},
    }
    return Experiment(build(ExperimentConfig, tree))


def after_iterations(made: Experiment, number: int) -> dict[str, torch.Tensor]:
    dxmi, state = made.build_finetuning(made.build_denoiser())
    for i in range(number):
        step(dxmi, state, i)
    return dict(dxmi.state_dict())


def require_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0.0, atol=1e-5)


def test_compiling_is_asked_of_every_network(monkeypatch):
    compiled = []
    monkeypatch.setenv("TORCHINDUCTOR_CACHE_DIR", "to be restored")
    monkeypatch.delenv("TORCHINDUCTOR_CACHE_DIR")
    monkeypatch.setattr(torch.nn.Module, "compile", lambda self, **given: compiled.append((type(self), given)))
    experiment(compile=True).build_finetuning(experiment().build_denoiser())
    assert sum(issubclass(kind, Denoiser) for kind, _ in compiled) == 2  # and its moving average
    assert sum(issubclass(kind, Critic) for kind, _ in compiled) == 1
    assert len(compiled) == 3
    folder = Path(os.environ["TORCHINDUCTOR_CACHE_DIR"])
    assert folder == cache_root() / "compiled" / torch.backends.cpu.get_cpu_capability()
    compiled.clear()
    experiment().build_finetuning(experiment().build_denoiser())
    assert not compiled


@pytest.mark.slow
def test_a_compiled_run_is_the_same_run():
    require_close(after_iterations(experiment(compile=True), 20), after_iterations(experiment(), 20))


class NoHost(TorchDispatchMode):
    """Refuses every transfer of a value to the host, which cannot be recorded as a CUDA graph."""

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        if function.name() in {"aten::_local_scalar_dense", "aten::nonzero", "aten::masked_select"}:
            assert called_from(StoredStates.split, StoredStates.acting), function.name()
        return function(*args, **(kwargs or {}))


def called_from(*functions) -> bool:
    """Whether one of these functions, which count steps in a tensor that is on the host anyway, is being executed."""
    frame, codes = sys._getframe(), {function.__code__ for function in functions}
    while frame is not None and frame.f_code not in codes:
        frame = frame.f_back
    return frame is not None


class WithoutHost:
    """Calls a recording in such a mode, except for its first iterations, which are executed by the host."""

    def __init__(self, recorded):
        self.recorded, self.calls = recorded, 0

    def __call__(self, batch, iteration):
        self.calls += 1
        with NoHost() if self.calls > 1 else nullcontext():
            return self.recorded(batch, iteration)


@pytest.mark.parametrize(
    "algorithm",
    [
        {},
        {"policy_horizon": None, "energy_updates": 2, "energy_noise": 0.1},
        {"policy_horizon": 3, "all_states": True, "policy_start": 3, "value": "separate"},
        {"energy_gradient_penalty": 0.1, "resample_next": True, "policy_updates": 2, "policy": {"max_grad_norm": 0.5}},
    ],
)
def test_a_recorded_iteration_is_the_iteration(algorithm):
    """With the same random numbers, although each state may be at any step."""
    eager = after_iterations(experiment(algorithm=algorithm), 8)
    made = experiment(algorithm=algorithm)
    dxmi, state = made.build_finetuning(made.build_denoiser())
    recorded = WithoutHost(RecordedUpdate(dxmi, [state.generators], made.precision))
    kept = [recorded(state.stream.next(), i) for i in range(8)]
    require_close(dict(dxmi.state_dict()), eager)
    assert len({float(metrics["energy/loss"]) for metrics in kept}) == 8


def test_a_recorded_iteration_of_the_pretraining_is_the_iteration():
    made = experiment()
    (one, first), (other, second) = made.build_pretraining(), made.build_pretraining()
    recorded = WithoutHost(RecordedUpdate(one, [first.generators], made.precision))
    for i in range(5):
        recorded(first.stream.next(), i)
        step(other, second, i)
    require_close(dict(one.state_dict()), dict(other.state_dict()))


def test_recorded_stacked_seeds_are_the_stacked_seeds():
    made = [experiment(seed=seed) for seed in (0, 3)]
    members, states = zip(*(one.build_finetuning(one.build_denoiser()) for one in made), strict=True)
    recorded = RecordedUpdate(DxMI.stacked(list(members)), [own.generators for own in states], made[0].precision)
    for i in range(5):
        recorded(Batch.stacked([state.stream.next() for state in states]), i)
    for member, seed in zip(members, (0, 3), strict=True):
        require_close(dict(member.state_dict()), after_iterations(experiment(seed=seed), 5))


def test_which_algorithms_are_recorded():
    recordable = {kind for kind in ALGORITHMS.kinds() if ALGORITHMS.implementation(kind).is_recordable}
    assert recordable == {"dxmi"}
    made = experiment(algorithm={"policy": {"kind": "radam"}})
    assert not made.build_algorithm(made.build_denoiser()).can_be_recorded


def test_recording_is_refused_on_the_cpu():
    made = experiment(cuda_graphs=True)
    with pytest.raises(UserError, match=stating("resources.cuda_graphs is true … CPU")):
        made.build_algorithm(made.build_denoiser())


def test_stacked_seeds_are_not_compiled():
    with pytest.raises(ValueError, match=stating("stack_seeds is 4 … compile is true")):
        ResourcesConfig(stack_seeds=4, compile=True)
    assert not ResourcesConfig(compile=True).can_stack_seeds
    assert ResourcesConfig(stack_seeds=4, cuda_graphs=True).can_stack_seeds
