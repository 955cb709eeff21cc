"""How close an iteration comes to its matrix products alone: `python tests/benchmarks/iteration.py [overrides]`.

Prints milliseconds of an iteration, of the same matrix products replayed back to back (same shapes, strides and
order), their ratio, and the share of each step. Goal: a ratio of at most 1.3 on a CPU, for DxMI (the default) and for
PPO: `python tests/benchmarks/iteration.py experiment=digits_reward resources.threads=1`.
"""

import statistics
import sys
import time
from collections import defaultdict
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from dxmi.algorithms.base import PolicyAlgorithm
from dxmi.data.batch import Streams
from dxmi.training.build import Experiment
from dxmi.training.state import TrainingState
from tune.config.compose import compose_experiment

_WARM_UP, ROUNDS, PER_ROUND = 20, 15, 10
_STEPS = {
    "rollout": "1 rollout",
    "displacements": "2 reference variance",
    "_adapt": "2 reference variance",
    "update_energy": "3 energy",
    "update_value": "4 value",
    "update_policy": "5 policy",
    "_replay": "2 replay",
    "advantage_of": "3 advantages",
    "optimize": "4 policy",
    "fit_baseline": "5 baseline",
}
"""Methods of DxMI and of PPO that are timed, with the steps that they perform."""
_PRODUCTS = (torch.ops.aten.mm.default, torch.ops.aten.addmm.default)


class Recorder(TorchDispatchMode):
    """Keeps the matrix products that run under it, with copies of their operands' layout."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Tensor, ...]]] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if func in _PRODUCTS:
            with torch.no_grad():
                self.calls.append((func, tuple(_like(a) for a in args)))
        return func(*args, **(kwargs or {}))


def _like(operand: Tensor) -> Tensor:
    """Fresh memory of the operand's shape and strides."""
    return torch.empty_strided(operand.shape, operand.stride()).normal_()


class Runner:
    """An experiment at the start of fine-tuning, ready to take iterations."""

    def __init__(self, experiment: Experiment) -> None:
        self.algorithm: PolicyAlgorithm
        self.state: TrainingState
        self.algorithm, self.state = experiment.build_finetuning(experiment.build_denoiser())
        self.streams = Streams([self.state.generators])
        self.iteration = 0

    def __call__(self) -> None:
        self.algorithm.update(self.state.stream.next(), self.iteration, self.streams)
        self.iteration += 1


def seconds_each(*runs: Callable[[], None]) -> list[float]:
    """For each of `runs`, the median over rounds of the mean time of one call.

    A round takes them in turn, so that what else the machine does, and its clock's changes, fall on all alike.
    """
    rounds: list[list[float]] = [[] for _ in runs]
    for _ in range(ROUNDS):
        for run, seconds in zip(runs, rounds, strict=True):
            start = time.perf_counter()
            for _ in range(PER_ROUND):
                run()
            seconds.append((time.perf_counter() - start) / PER_ROUND)
    return [statistics.median(seconds) for seconds in rounds]


def replay(calls: list[tuple[Any, tuple[Tensor, ...]]]) -> Callable[[], None]:
    """A function that runs the recorded products."""

    @torch.no_grad()
    def run() -> None:
        for func, args in calls:
            func(*args)

    return run


def shares(runner: Runner) -> dict[str, float]:
    """Seconds that each step of the algorithm takes in an iteration."""
    spent: dict[str, float] = defaultdict(float)

    def timed(owner: Any, name: str, label: str) -> None:
        function = getattr(owner, name)

        def wrapper(*args: Any, **kwargs: Any) -> Any:
            start = time.perf_counter()
            try:
                return function(*args, **kwargs)
            finally:
                spent[label] += time.perf_counter() - start

        object.__setattr__(owner, name, wrapper)

    for name, label in _STEPS.items():
        if hasattr(runner.algorithm, name):
            timed(runner.algorithm, name, label)
    count = ROUNDS * PER_ROUND
    start = time.perf_counter()
    for _ in range(count):
        runner()
    whole = (time.perf_counter() - start) / count
    each = {label: total / count for label, total in sorted(spent.items())}
    return each | {"data, reward, averages": whole - sum(each.values())}


def main() -> None:
    """Measure the experiment that the overrides describe, digits on one thread by default."""
    overrides = sys.argv[1:] or ["experiment=digits", "resources.threads=1"]
    experiment = Experiment(compose_experiment(overrides).experiment)
    threads = experiment.use_threads()
    runner = Runner(experiment)
    for _ in range(_WARM_UP):
        runner()
    with Recorder() as recorder:
        runner()
    whole, products = seconds_each(runner, replay(recorder.calls))
    print(f"{' '.join(overrides)}: {threads} thread(s), {len(recorder.calls)} matrix products an iteration")
    print(f"iteration            {whole * 1e3:8.2f} ms")
    print(f"its matrix products  {products * 1e3:8.2f} ms")
    print(f"ratio                {whole / products:8.2f}")
    each = shares(runner)
    for label, seconds in each.items():
        print(f"  {label:<24}{seconds / sum(each.values()):6.1%}")


if __name__ == "__main__":
    main()
