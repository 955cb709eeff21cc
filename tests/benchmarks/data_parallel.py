"""What a second worker brings: `python tests/benchmarks/data_parallel.py [overrides]`.

Part 1: milliseconds of an iteration on one worker and on two, each with one thread, of the same global batch; their
ratio; and the share of the second that goes into all-reduces, waiting for the other worker included.
Part 2: one policy step with its gradients averaged by PyTorch's DistributedDataParallel and by one bucket, which is
what this project does.
Then what 8 GPUs would make of it, from the bytes that are sent.
"""

import os
import sys
import time
from typing import Any

import torch
import torch.distributed as dist
import torch.multiprocessing as mp
from torch import nn

from dxmi.data.batch import Streams
from dxmi.distributed import SINGLE_PROCESS, ProcessGroup, TorchProcessGroup
from dxmi.optim.config import OptimizerConfig
from dxmi.optim.optimizer import Optimizer
from dxmi.tensors import event_mean
from dxmi.training.build import Experiment
from iteration import PER_ROUND, ROUNDS, seconds_each
from tune.config.compose import compose_experiment

_WARM_UP = 20
_NVLINK, _ETHERNET = 300e9, 12.5e9
"""Bytes a second of an all-reduce's slowest link: between GPUs of one machine; 100 Gbit/s between machines."""


class _Timed:
    """Counts the seconds and bytes of all-reduces."""

    def __init__(self) -> None:
        self.seconds, self.bytes, self.calls = 0.0, 0, 0
        self._all_reduce = dist.all_reduce

    def __call__(self, tensor: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        start = time.perf_counter()
        result = self._all_reduce(tensor, *args, **kwargs)
        self.seconds += time.perf_counter() - start
        self.bytes += tensor.numel() * tensor.element_size()
        self.calls += 1
        return result


def _median_seconds(run: Any) -> float:
    for _ in range(_WARM_UP):
        run()
    return seconds_each(run)[0]


def _iterations(overrides: list[str], workers: ProcessGroup) -> dict[str, float]:
    experiment = Experiment(compose_experiment(overrides).experiment, workers=workers)
    algorithm, state = experiment.build_finetuning(experiment.build_denoiser())
    streams = Streams([state.generators])
    timed = _Timed()
    dist.all_reduce = timed
    start = time.perf_counter()
    seconds = _median_seconds(lambda: algorithm.update(state.stream.next(), 0, streams))
    whole, count = time.perf_counter() - start, _WARM_UP + ROUNDS * PER_ROUND
    return {
        "seconds": seconds,
        "share": timed.seconds / whole,
        "bytes": timed.bytes / count,
        "calls": timed.calls / count,
    }


def _policy_steps(overrides: list[str], workers: ProcessGroup) -> dict[str, float]:
    """The denoiser's regression step, averaged in two ways."""
    experiment = Experiment(compose_experiment(overrides).experiment)
    config = experiment.config
    share = workers.share(config.train.batch_size)
    x, step = torch.randn(share.count, *experiment.event), torch.zeros(share.count)
    settings = OptimizerConfig()

    bucketed = experiment.build_denoiser()
    optimizer = Optimizer(settings, [(bucketed.parameters(), 1e-5)], 1, workers)

    def loss(x: torch.Tensor, step: torch.Tensor) -> dict[str, torch.Tensor]:
        return {"loss": event_mean(bucketed(x, bucketed.embed(step)).square())}

    def by_bucket() -> None:
        optimizer.minimize(loss, x[None], step[None], num=share.num)

    class Whole(nn.Module):
        """Embedding and network in one forward pass, since DDP synchronises one."""

        def __init__(self) -> None:
            super().__init__()
            self.network = experiment.build_denoiser()

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.network(x, self.network.embed(step))

    wrapped = nn.parallel.DistributedDataParallel(Whole())
    adam = torch.optim.Adam(wrapped.parameters(), lr=1e-5, fused=True)

    def by_ddp() -> None:
        adam.zero_grad()
        wrapped(x).square().mean().backward()
        adam.step()

    return {"bucket": _median_seconds(by_bucket), "ddp": _median_seconds(by_ddp)}


def _worker(rank: int, size: int, overrides: list[str], results: Any) -> None:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=results["port"], RANK=str(rank), WORLD_SIZE=str(size))
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    workers = TorchProcessGroup(60.0) if size > 1 else SINGLE_PROCESS
    if rank == 0:
        results[f"iteration{size}"] = _iterations(overrides, workers)
    else:
        _iterations(overrides, workers)
    if size > 1:
        steps = _policy_steps(overrides, workers)
        if rank == 0:
            results["steps"] = steps
    dist.destroy_process_group()


def main() -> None:
    """Measure the experiment that the overrides describe, digits by default."""
    overrides = sys.argv[1:] or ["experiment=digits", "resources.threads=1", "resources.device=cpu"]
    with mp.Manager() as manager:
        results = manager.dict()
        for size, port in ((1, "29611"), (2, "29612")):
            results["port"] = port
            mp.spawn(_worker, (size, overrides, results), nprocs=size)
        one, two, steps = results["iteration1"], results["iteration2"], results["steps"]
    ratio = two["seconds"] / one["seconds"]
    print(f"{' '.join(overrides)}")
    print(f"one worker     {one['seconds'] * 1e3:7.2f} ms an iteration")
    print(f"two workers    {two['seconds'] * 1e3:7.2f} ms; ratio {ratio:.2f} (0.50 would be perfect)")
    print(f"all-reduces    {two['share']:.0%} of it: {two['calls']:.0f} of {two['bytes'] / 1e6:.2f} MB together")
    print(f"a policy step  {steps['bucket'] * 1e3:.2f} ms by one bucket, {steps['ddp'] * 1e3:.2f} ms by DDP")
    for name, bandwidth in (("NVLink, 300 GB/s", _NVLINK), ("100 Gbit Ethernet", _ETHERNET)):
        sent = 2 * 7 / 8 * two["bytes"]  # of a ring of 8, each member's part
        print(f"8 GPUs         {sent / bandwidth * 1e3:.3f} ms of transfer an iteration over {name}")


if __name__ == "__main__":
    main()
