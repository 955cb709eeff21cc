"""What several seeds in one program cost: `python tests/benchmarks/stacking.py [overrides] [-- NUMBERS]`.

Prints, for each number of seeds, milliseconds of one iteration of all of them stacked, beside one seed's alone, and
their ratio: over the number of seeds, the part of the time in turn. Goals: on a CPU at most 1.10 of the time in turn;
on a GPU, for the MLP experiments, 8 seeds in at most 1.5 x and 64 in at most 4 x the time of one.
"""

import statistics
import sys
import time
from collections.abc import Callable

import torch

from dxmi.data.batch import Batch, Streams
from dxmi.training.build import Experiment
from tune.config.compose import compose_experiment

ROUNDS, PER_ROUND = 7, 5


def alone(overrides: list[str]) -> Callable[[int], object]:
    """An iteration of one seed."""
    experiment = Experiment(compose_experiment(overrides).experiment)
    experiment.use_threads()
    algorithm, state = experiment.build_finetuning(experiment.build_denoiser())
    streams = Streams([state.generators])
    return lambda i: algorithm.update(state.stream.next(), i, streams)


def stacked(overrides: list[str], number: int) -> Callable[[int], object]:
    """An iteration of that many seeds."""
    experiments = [Experiment(compose_experiment([*overrides, f"seed={k}"]).experiment) for k in range(number)]
    members, states = zip(*(e.build_finetuning(e.build_denoiser()) for e in experiments), strict=True)
    stack = type(members[0]).stacked(members)
    streams = Streams([state.generators for state in states])
    return lambda i: stack.update(Batch.stacked([state.stream.next() for state in states]), i, streams)


def timed(one: Callable[[int], object], other: Callable[[int], object]) -> tuple[float, float]:
    """Median milliseconds of both, taken in turn, so that a busy neighbor falls on both."""
    times: tuple[list[float], list[float]] = ([], [])
    for round_number in range(ROUNDS + 1):
        for work, own in zip((one, other), times, strict=True):
            start = time.perf_counter()
            for i in range(PER_ROUND):
                work(round_number * PER_ROUND + i)
            if torch.cuda.is_available():
                torch.cuda.synchronize()
            own.append((time.perf_counter() - start) / PER_ROUND * 1e3)
    return statistics.median(times[0][1:]), statistics.median(times[1][1:])


def main(arguments: list[str]) -> None:
    """Print one line a number of seeds."""
    cut = arguments.index("--") if "--" in arguments else len(arguments)
    overrides = arguments[:cut] or ["experiment=digits", "resources.threads=1"]
    numbers = [int(text) for text in arguments[cut + 1 :]] or [2, 4, 8]
    print(f"{' '.join(overrides)}\n{'seeds':>5} {'one':>9} {'stacked':>9} {'ratio':>6} {'of in turn':>10}")
    for number in numbers:
        one, all_of_them = timed(alone(overrides), stacked(overrides, number))
        ratio = all_of_them / one
        print(f"{number:5d} {one:6.1f} ms {all_of_them:6.1f} ms {ratio:6.2f} {ratio / number:10.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
