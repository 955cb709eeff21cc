"""What a sweep costs beyond its training.

    python tests/benchmarks/sweep_overhead.py            both parts, about six minutes on two cores
    python tests/benchmarks/sweep_overhead.py --noop     300 trials that do nothing, alone

Part 1: 16 trials of about 20 s, two at a time: wall time against (sum of their own seconds) / 2.
Part 2: 300 trials that do nothing: seconds a trial and the driver's memory, by hundreds.
"""

import argparse
import itertools
import json
import os
import tempfile
import time
from pathlib import Path

import yaml
from rich.console import Console

from tune import Sweep

TRIAL = [
    "experiment=digits",
    "pretrain.iterations=500",
    "train.iterations=450",
    "evaluate.num_samples=1000",
    "resources.threads=1",
]
SPACE = {"algorithm.policy.lr": {"log_uniform": [3e-6, 3e-5]}}
ALLOWED_RATIO, ALLOWED_SECONDS = 1.15, 30.0
QUIET = Console(quiet=True)


def sweep_of(folder: Path, trials: int, max_concurrent: int = 2) -> Sweep:
    """A random search without early stopping."""
    file = folder / "sweep.yaml"
    file.write_text(yaml.safe_dump({"space": SPACE, "sampler": {"kind": "random"}, "budget": {"trials": trials}}))
    concurrency = f"sweep.max_concurrent={max_concurrent}"
    return Sweep(*TRIAL, f"sweep={file}", concurrency, name="bench", studies=folder / "studies")


def nothing():
    """A trainer that reports one score and returns. (Made in a function, so that Ray sends it by value.)"""

    def trainer(experiment, *, out, report=None, saved=None):
        from dxmi.training.progress import Phase, Progress  # noqa: PLC0415
        from dxmi.training.summary import Summary  # noqa: PLC0415

        key, lr = "eval/fid_digits", experiment.config.algorithm.policy.lr
        out.mkdir(parents=True, exist_ok=True)
        if report is not None:
            report(Progress(Phase.FINETUNE, 450, 450, {key: lr}))
        score = {"value": lr, "step": 450, "checkpoint": ""}
        return Summary(
            name="bench", signature=experiment.config.signature, seed=0, metric=key, num_samples=1, reference={},
            best=score, last=score, scores={"best": {key: lr}}, seconds_per_1000_images={}, iterations=450,
            num_steps=5, seconds={"finetune": 0.0}, device="cpu", threads=1, git_revision=None, versions={},
        )  # fmt: skip

    return trainer


def resident_megabytes() -> float:
    """Of this process, the driver."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * os.sysconf("SC_PAGE_SIZE") / 1e6


def training(folder: Path) -> None:
    """Part 1."""
    sweep_of(folder, 1, max_concurrent=1).run(console=QUIET)  # fills the cache
    start = time.perf_counter()
    again = ("sweep.budget.trials=17", "sweep.max_concurrent=2")
    Sweep.resume("bench", *again, studies=folder / "studies").run(console=QUIET)
    wall = time.perf_counter() - start
    table = Sweep.resume("bench", studies=folder / "studies").study().records()[1:]
    seconds = [sum(json.loads(record.run.summary.read_text())["seconds"].values()) for record in table]
    allowed = ALLOWED_RATIO * sum(seconds) / 2 + ALLOWED_SECONDS
    print(f"16 trials of {sum(seconds) / len(seconds):.1f} s, two at a time: {wall:.1f} s")
    half = sum(seconds) / 2
    print(f"(sum of seconds) / 2 = {half:.1f} s; ratio {wall / half:.3f}; allowed {allowed:.1f} s")


def noop(folder: Path, trials: int) -> None:
    """Part 2."""
    from tune.execution.controller import Controller  # noqa: PLC0415

    marks: list[tuple[int, float, float]] = []
    finish = Controller._finish

    def watched(controller, trial, outcome):
        finish(controller, trial, outcome)
        if len(controller.states) % 50 == 0:
            marks.append((len(controller.states), time.perf_counter(), resident_megabytes()))

    Controller._finish = watched
    start = time.perf_counter()
    result = sweep_of(folder, trials).run(console=QUIET, trainer=nothing())
    print(f"{trials} trials that do nothing: {time.perf_counter() - start:.1f} s, the report included")
    for (n0, t0, _), (n1, t1, megabytes) in itertools.pairwise(marks):
        print(f"  trials {n0:4d} to {n1:4d}: {(t1 - t0) / (n1 - n0) * 1000:6.0f} ms each, driver {megabytes:.0f} MB")
    growth = marks[-1][2] / marks[0][2] - 1
    print(
        f"driver's memory from trial {marks[0][0]} to {marks[-1][0]}: {growth:+.1%}; undelivered: {result.undelivered}"
    )


def main() -> None:
    """Run the parts that were asked for."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--noop", action="store_true")
    parser.add_argument("--trials", type=int, default=300)
    args = parser.parse_args()
    if not args.noop:
        with tempfile.TemporaryDirectory() as folder:
            training(Path(folder))
    with tempfile.TemporaryDirectory() as folder:
        noop(Path(folder), args.trials)


if __name__ == "__main__":
    main()
