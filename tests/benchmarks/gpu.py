"""What each way to be faster brings: `python tests/benchmarks/gpu.py [overrides]`.

Prints milliseconds of one DxMI iteration on random pixels, first in plain fp32 and then with one option more a line,
times as fast as the first, and the share of the device's peak that the counted operations come to. Without overrides it
is the published CIFAR-10 setting, T = 10 and batch 128, on a GPU. Goal: 5 x with all options.
"""

import statistics
import sys
import time
from collections.abc import Callable, Sequence

import torch
from torch.utils.flop_counter import FlopCounterMode

from dxmi.data.batch import Streams
from dxmi.data.images import Images
from dxmi.training.build import Experiment
from tune.config.compose import compose_experiment

WARM_UP, ROUNDS = 3, 10
PUBLISHED = ["experiment=cifar10_t10", "pretrain.weights=null", "resources.device=cuda"]
EVENT = (3, 32, 32)
OPTIONS = {
    "bfloat16": ["train.precision=bfloat16"],
    "channels last": [f"network.{name}.channels_last=true" for name in ("denoiser", "energy", "value")],
    "rollout recorded": ["resources.cuda_graphs=true"],
    "compiled": ["resources.compile=true"],
    "any kernels": ["resources.deterministic=false"],
}
"""Of each line, added to those above it."""
PEAK = {"H200": 989e12, "H100": 989e12, "A100": 312e12, "L40": 181e12, "L4": 121e12, "4090": 165e12, "V100": 112e12}
"""Dense operations a second in bfloat16 (V100: float16) as its maker states them, by a part of the device's name."""


def iterate(overrides: Sequence[str]) -> Callable[[], object]:
    """An iteration on pixels that are made up."""
    experiment = Experiment(compose_experiment(list(overrides)).experiment)
    pixels = torch.randint(256, (1024, *EVENT), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    experiment.__dict__["data"] = Images(
        "random", pixels, torch.zeros(1024, dtype=torch.int64), "random"
    )  # what would have been read
    experiment.choose_kernels()
    algorithm, state = experiment.build_finetuning(experiment.build_denoiser())
    streams = Streams([state.generators])

    def iteration() -> None:
        with experiment.precision():
            algorithm.update(state.stream.next(), 0, streams)

    return iteration


def seconds(work: Callable[[], object]) -> float:
    """The median of some calls."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(ROUNDS):
        _wait()
        start = time.perf_counter()
        work()
        _wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def _wait() -> None:
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def operations(work: Callable[[], object]) -> int:
    """Additions and multiplications of matrix products, convolutions and attention in one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def share_of_peak(rate: float) -> str:
    """Of that many operations a second; empty for a device whose peak is not in the table."""
    name = torch.cuda.get_device_name() if torch.cuda.is_available() else ""
    peak = next((peak for part, peak in PEAK.items() if part in name), None)
    return "" if peak is None else f"{100.0 * rate / peak:5.1f} %"


def main(overrides: list[str]) -> None:
    """Print one line an option."""
    given = list({word.partition("=")[0]: word for word in (*PUBLISHED, *overrides)}.values())
    plain = iterate(given)
    count, first = operations(plain), seconds(plain)
    device = torch.cuda.get_device_name() if torch.cuda.is_available() else "CPU"
    print(f"{device}: {count / 1e12:.3g} million million operations an iteration")
    print(f"{'':20} {'iteration':>12} {'times':>6} {'peak':>7}\n{_line('plain float32', first, first, count)}")
    for name, option in OPTIONS.items():
        if device == "CPU" and name == "rollout recorded":
            continue
        given = [*given, *option]
        print(_line(f"+ {name}", seconds(iterate(given)), first, count), flush=True)


def _line(name: str, took: float, first: float, count: int) -> str:
    return f"{name:20} {took * 1e3:9.1f} ms {first / took:6.2f} {share_of_peak(count / took):>7}"


if __name__ == "__main__":
    main(sys.argv[1:])
