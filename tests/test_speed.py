"""What makes a run faster and changes no result but by rounding: compiled networks, and a recorded rollout."""

import os
from pathlib import Path

import pytest
import torch

from dxmi.config import build
from dxmi.errors import UserError
from dxmi.networks.base import Critic, Denoiser
from dxmi.persistence.cache import cache_root
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig, ResourcesConfig
from support import stating, step

NETWORK = {"kind": "mlp", "hidden": 32, "layers": 3, "embedding": 16}


def experiment(**resources) -> Experiment:
    tree = {
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


def test_recording_a_rollout_is_refused_on_the_cpu():
    made = experiment(cuda_graphs=True)
    with pytest.raises(UserError, match=stating("resources.cuda_graphs is true … CPU")):
        made.build_algorithm(made.build_denoiser())


@pytest.mark.parametrize("name", ["compile", "cuda_graphs"])
def test_stacked_seeds_are_neither_compiled_nor_recorded(name):
    with pytest.raises(ValueError, match=stating(f"stack_seeds is 4 … {name} is true")):
        ResourcesConfig(stack_seeds=4, **{name: True})
    assert not ResourcesConfig(**{name: True}).can_stack_seeds
