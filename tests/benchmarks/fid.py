"""Sampling and InceptionV3 in turn: `python tests/benchmarks/fid.py [options] [overrides]`.

Prints the seconds of drawing CIFAR-size samples from an untrained policy, of computing their features, of both as an
evaluation does them, and the ratio of the last to the sum of the first two.

`--num 10000`, `--batch 500` and `--rounds 1` are the samples, those of a batch, and how often all is timed.
Without weights (see `dxmi.metrics.inception.find_weights`), random ones are as slow as real ones: `--random`.
"""

import argparse
import io
import time
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor

from dxmi.compat import torch_fidelity
from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.diffusion.schedules.build import shorten
from dxmi.evaluation.config import REPORT, EvaluateConfig
from dxmi.evaluation.sampling import Sampling, measure
from dxmi.metrics.inception import NETWORK, POOL, Inception, find_weights, load_inception
from dxmi.training.build import Experiment
from tune.config.compose import compose_experiment

EVENT = (3, 32, 32)


class _Untrained(torch_fidelity("feature_extractor_inceptionv3").FeatureExtractorInceptionV3):
    def load_state_dict(self, *_: Any, **__: Any) -> None:
        """Stay as you are."""


def random_network(device: torch.device) -> Inception:
    """InceptionV3 with its initial weights."""
    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    extractor = _Untrained(NETWORK, [POOL], feature_extractor_weights_path=nothing)
    return Inception(device, extractor.to(device, memory_format=torch.channels_last))


def seconds(runs: Sequence[Callable[[], object]], rounds: int) -> list[float]:
    """Wall seconds of each, the least of several rounds, in which all take turns: a busy neighbor falls on all."""
    return [min(column) for column in zip(*([_seconds(run) for run in runs] for _ in range(rounds)), strict=True)]


def _seconds(run: Callable[[], object]) -> float:
    """To the end of whatever a GPU does."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    began = time.perf_counter()
    run()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - began


def parsed() -> tuple[argparse.Namespace, list[str]]:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--num", type=int, default=10_000)
    parser.add_argument("--batch", type=int, default=500)
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--random", action="store_true")
    return parser.parse_known_args()


def main() -> None:
    arguments, overrides = parsed()
    chosen = [] if any(o.startswith("network=") for o in overrides) else ["network=unet"]
    experiment = Experiment(compose_experiment(["schedule.num_steps=10", *chosen, *overrides]).experiment, event=EVENT)
    experiment.use_threads()
    device, schedule = experiment.device, shorten(experiment.config.schedule)
    policy = experiment.build_policy(experiment.build_denoiser(), schedule).eval()
    sampling = Sampling(policy, REPORT)
    config = EvaluateConfig(num_samples=arguments.num, batch_size=arguments.batch)

    inception = random_network(device) if arguments.random else load_inception(find_weights(), device)

    def nothing(pixels: Tensor, _: Condition) -> Tensor:
        return torch.zeros(len(pixels), 1)

    def features(pixels: Tensor, _: Condition = UNCONDITIONAL) -> Tensor:
        return inception(pixels).pool.cpu()

    def sampled(work: Callable[[Tensor, Condition], Tensor], num: int = arguments.num) -> None:
        measure(sampling, num, config, work)

    def looked_at() -> None:
        for start in range(0, arguments.num, arguments.batch):
            features(batch[: arguments.num - start])

    batch = torch.zeros(arguments.batch, *experiment.event, dtype=torch.uint8, device=device)
    sampled(features, arguments.batch)  # compiles, allocates, chooses algorithms
    runs = (lambda: sampled(nothing), looked_at, lambda: sampled(features))
    alone, own, both = seconds(runs, arguments.rounds)
    print(f"{arguments.num:,} samples in batches of {arguments.batch}, T = {policy.num_steps}, {device}")
    print(f"sampling alone      {alone:8.2f} s")
    print(f"features alone      {own:8.2f} s")
    print(f"both as evaluated   {both:8.2f} s")
    print(f"ratio to the sum    {both / (alone + own):8.2f}")


if __name__ == "__main__":
    main()
