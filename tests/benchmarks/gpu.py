"""The speed of pretraining, fine-tuning, stacked seeds and sampling: `python tests/benchmarks/gpu.py [SECTION ...]`.

Each line is printed as soon as it is measured, with the milliseconds, the ratio to the first line of its section and,
where the operations are counted, the share of the rate of a large matrix product in bfloat16 that is measured first.
Without a GPU, the lines that need one are left out. Sections, in the default order:

    small      a pretraining step and a fine-tuning iteration of experiment=cifar10_small
    sampling   1,000 images of cifar10_small, T = 10
    stacks     1, 8 and 64 seeds of experiment=digits in one program
    published  an iteration of experiment=cifar10_t10, batch 128, in plain float32 and with all options

`--seconds N` starts no further measurement after N seconds.
"""

import argparse
import statistics
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field

import torch
from torch.utils.flop_counter import FlopCounterMode

from dxmi.algorithms.base import Algorithm
from dxmi.data.batch import Batch
from dxmi.data.images import Images
from dxmi.evaluation.config import SELECTION
from dxmi.evaluation.sampling import Sampling, generate
from dxmi.training.build import Experiment
from dxmi.training.recording import update_of
from dxmi.training.state import TrainingState
from tune.config.compose import compose_experiment

WARM_UP, ROUNDS = 5, 10
EVENT = (3, 32, 32)
SIDE = 8192
Work = Callable[[], object]

PLAIN = [
    "train.precision=float32",
    *(f"network.{name}.channels_last=false" for name in ("denoiser", "energy", "value")),
]
BFLOAT16 = [word.replace("float32", "bfloat16").replace("false", "true") for word in PLAIN]
RECORDED = ["resources.cuda_graphs=true"]
COMPILED = ["resources.compile=true"]
ANY_KERNELS = ["resources.deterministic=false"]


@dataclass
class Table:
    """Prints the lines of a section.

    Attributes:
        title: What is measured.
        peak: Operations per second of a large matrix product.
        first: Seconds of the first line.
    """

    title: str
    peak: float
    first: float | None = field(default=None, init=False)

    def __post_init__(self) -> None:
        print(f"\n{self.title}", flush=True)

    def line(self, name: str, seconds: float, count: int | None = None, note: str = "") -> None:
        """Print one line; `count` is the number of operations."""
        self.first = self.first or seconds
        share = "" if count is None else f"{100.0 * count / seconds / self.peak:6.1f} %"
        print(f"  {name:42} {seconds * 1e3:10.2f} ms {self.first / seconds:7.2f} x {share} {note}", flush=True)


def experiment(overrides: Sequence[str], seed: int = 0) -> Experiment:
    """An experiment on random pixels, or on the digits."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    given = [*overrides, f"seed={seed}", f"resources.device={device}"]
    made = Experiment(compose_experiment(list({word.partition("=")[0]: word for word in given}.values())).experiment)
    if "experiment=digits" not in overrides:
        pixels = torch.randint(256, (1024, *EVENT), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
        made.__dict__["data"] = Images("random", pixels, torch.zeros(1024, dtype=torch.int64), "random")
    made.choose_kernels()
    return made


def pretraining_step(overrides: Sequence[str]) -> Work:
    """A step of the pretraining."""
    made = experiment(overrides)
    return iteration_of(made, *made.build_pretraining())


def finetuning_iteration(overrides: Sequence[str]) -> Work:
    """An iteration of the fine-tuning."""
    made = experiment(overrides)
    return iteration_of(made, *made.build_finetuning(made.build_denoiser()))


def stacked_iteration(overrides: Sequence[str], seeds: int) -> Work:
    """An iteration of several seeds in one program."""
    made = [experiment(overrides, seed) for seed in range(seeds)]
    members, states = zip(*(one.build_finetuning(one.build_denoiser()) for one in made), strict=True)
    algorithm = members[0] if seeds == 1 else type(members[0]).stacked(list(members))
    return iteration_of(made[0], algorithm, *states)


def iteration_of(made: Experiment, algorithm: Algorithm, *states: TrainingState) -> Work:
    """The iteration that the training loop performs, with the next batch."""
    generators = [state.generators for state in states]
    update = update_of(algorithm, generators, made.precision, recorded=made.records(algorithm))
    return lambda: update(Batch.stacked([state.stream.next() for state in states]), 0)


def sampling(overrides: Sequence[str]) -> Work:
    """Drawing 1,000 images."""
    made = experiment(overrides)
    policy, evaluate = made.build_algorithm(made.build_denoiser()).eval_policy, made.config.evaluate
    drawing = Sampling(policy, SELECTION, precision=evaluate.precision)
    return lambda: generate(drawing, 1000, evaluate)


def seconds(work: Work, rounds: int = ROUNDS) -> float:
    """The median time of some calls, after others that compile, record and choose kernels."""
    for _ in range(WARM_UP):
        work()
    times = []
    for _ in range(rounds):
        wait()
        start = time.perf_counter()
        work()
        wait()
        times.append(time.perf_counter() - start)
    return statistics.median(times)


def wait() -> None:
    """Wait for the GPU, if there is one."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()


def operations(work: Work) -> int:
    """Additions and multiplications of matrix products, convolutions and attention in one call."""
    with FlopCounterMode(display=False) as counter:
        work()
    return int(counter.get_total_flops())


def peak_rate() -> float:
    """Operations per second of a product of two 8192 x 8192 matrices in bfloat16; of smaller ones without a GPU."""
    on_gpu = torch.cuda.is_available()
    side, device = (SIDE, "cuda") if on_gpu else (SIDE // 8, "cpu")
    a, b = (torch.randn(side, side, device=device, dtype=torch.bfloat16) for _ in range(2))
    return float(2 * side**3 / seconds(lambda: a @ b))


@dataclass(frozen=True)
class Variant:
    """One line of a section: its name, its work, and whether it needs a GPU."""

    name: str
    make: Callable[[], Work]
    needs_gpu: bool = False


def options(make: Callable[[Sequence[str]], Work], given: Sequence[str], *, plain: bool = True) -> Iterator[Variant]:
    """The same work with ever more options."""
    if plain:
        yield Variant("float32, deterministic", lambda: make([*given, *PLAIN]))
    yield Variant("bfloat16, channels last", lambda: make([*given, *BFLOAT16]))
    yield Variant("  recorded", lambda: make([*given, *BFLOAT16, *RECORDED]), needs_gpu=True)
    if not plain:
        yield Variant(
            "  recorded, any kernels", lambda: make([*given, *BFLOAT16, *RECORDED, *ANY_KERNELS]), needs_gpu=True
        )
    yield Variant("  recorded, compiled", lambda: make([*given, *BFLOAT16, *RECORDED, *COMPILED]), needs_gpu=True)


def sections() -> dict[str, list[tuple[str, list[Variant]]]]:
    """The tables of each section, with their lines."""
    small, published = ["experiment=cifar10_small"], ["experiment=cifar10_t10", "pretrain.weights=null"]
    fast = [*small, "evaluate.precision=bfloat16", *COMPILED]
    digits = ["experiment=digits", *RECORDED]
    return {
        "small": [
            ("pretraining step of cifar10_small", list(options(pretraining_step, small, plain=False))),
            ("iteration of cifar10_small", list(options(finetuning_iteration, small, plain=False))),
        ],
        "sampling": [
            (
                "1,000 images of cifar10_small, T = 10",
                [Variant("float32", lambda: sampling(small)), Variant("bfloat16, compiled", lambda: sampling(fast))],
            )
        ],
        "stacks": [
            (
                "iteration of digits",
                [Variant("1 seed, not recorded", lambda: stacked_iteration(digits[:1], 1))]
                + [Variant(f"{n} seeds, recorded", lambda n=n: stacked_iteration(digits, n), True) for n in (1, 8, 64)],
            )
        ],
        "published": [("iteration of cifar10_t10", list(options(finetuning_iteration, published)))],
    }


def main() -> None:
    """Print the tables of the sections that are asked for."""
    known = sections()
    parser = argparse.ArgumentParser(description="The speed of dxmi on a GPU.")
    parser.add_argument("sections", nargs="*", choices=[*known, []], default=list(known))
    parser.add_argument("--seconds", type=float, default=float("inf"), help="start no measurement after these seconds")
    asked = parser.parse_args()
    began, on_gpu = time.perf_counter(), torch.cuda.is_available()
    peak = peak_rate()
    device = torch.cuda.get_device_name() if on_gpu else "CPU"
    print(f"{device}, PyTorch {torch.__version__}: {peak / 1e12:.3g} TFLOP/s in a matrix product", flush=True)
    for name in asked.sections:
        for title, variants in known[name]:
            table, count = Table(title, peak), None
            for variant in variants:
                if (variant.needs_gpu and not on_gpu) or time.perf_counter() - began > asked.seconds:
                    continue
                start = time.perf_counter()
                work = variant.make()
                if count is None and name in {"small", "published"}:
                    count = operations(work)
                work()
                wait()
                note = f"(first call after {time.perf_counter() - start:.0f} s)"
                table.line(variant.name, seconds(work), count, note)


if __name__ == "__main__":
    main()
