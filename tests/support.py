"""What several test files need: the smallest settings that train, waiting, ports, and the processes of a test."""

import random
import re
import socket
import struct
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor
from torch.utils.data import Dataset

from dxmi.algorithms.base import Algorithm, Parts
from dxmi.data.batch import Batch, Condition, Streams
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules.base import StepSchedule
from dxmi.distributed import SingleProcess
from dxmi.networks.configs import MlpConfig
from dxmi.networks.registry import build_critic, build_timed_critic
from dxmi.optim.optimizer import Optimizer, StepResult
from dxmi.training.state import TrainingState


def changed(settings: list[str], *overrides: str) -> list[str]:
    """Settings of a command line with other values for some keys, and further ones."""
    keys = {override.partition("=")[0] for override in overrides}
    return [setting for setting in settings if setting.partition("=")[0] not in keys] + list(overrides)


def missing(facts: str, text: str) -> list[str]:
    """Which of the facts, written `fact … fact`, a text does not state, in whatever words and order.

    A fact is what identifies an error: a setting with its value, a file, a number, the cure. Part of a longer number,
    name or setting does not count as it, so that `seed` is not found in `evaluate.seed`, nor `1` in `1.5`. A value may
    be without its quotes, and as YAML writes it.
    """
    return [fact for fact in facts.split(" … ") if not re.search(_whole(fact), text)]


def stating(facts: str) -> str:
    """A regular expression for a text that states all these facts, as `missing` understands them."""
    return r"(?s)\A" + "".join(f"(?=.*{_whole(fact)})" for fact in facts.split(" … "))


def _whole(fact: str) -> str:
    before = r"(?<![\w-])(?<!\w\.)" if re.match(r"\w", fact) else ""
    after = r"(?!\w)(?![.,]\w)" if re.search(r"\w$", fact) else ""
    text = re.escape(fact).replace("None", "(?:None|null)").replace("True", "[Tt]rue")
    return before + re.sub(r"(?<!')'(?!')", "['\"]?", text) + after


_DRAWING: list[bool] = []


@contextmanager
def drawn_figures() -> Iterator[None]:
    """Figures are drawn meanwhile: conftest.py leaves them blank. A test that needs it is marked `draws`."""
    _DRAWING.append(True)
    try:
        yield
    finally:
        _DRAWING.pop()


def figures_are_drawn() -> bool:
    """Whether a `drawn_figures` is open."""
    return bool(_DRAWING)


TINY = [
    "experiment=digits",
    "network.denoiser.hidden=16",
    "network.energy.hidden=16",
    "pretrain.iterations=60",
    "train.iterations=40",
    "train.batch_size=16",
    "train.log_every=5",
    "evaluate.every=10",
    "evaluate.num_samples=64",
    "evaluate.batch_size=64",
    "evaluate.grid=4",
    "evaluate.full_steps=[50]",
    "resources.threads=1",
]
"""A run of a second."""

SLOWER = [
    "experiment=digits",
    "pretrain.iterations=100",
    "train.iterations=60",
    "train.batch_size=64",
    "train.log_every=5",
    "evaluate.every=5",
    "evaluate.num_samples=200",
    "evaluate.batch_size=50",
    "evaluate.kid_subset_size=50",
    "evaluate.grid=16",
    "resources.device=cpu",
    "resources.threads=1",
]
"""A run of ten seconds, in which something can happen; its networks are the experiment's own."""


NARROW = {
    "unet": ["network.denoiser.channels=32", "network.energy.channels=8", "network.value.channels=8"],
    "edm_unet": [
        *("network.denoiser.channels=32", "network.denoiser.head_channels=32", "network.denoiser.multipliers=[1,2]"),
        *("network.denoiser.blocks=1", "network.energy.channels=8", "network.value.channels=8"),
    ],
    "edm_unet_256": [
        *("network.denoiser.channels=32", "network.denoiser.head_channels=32", "network.denoiser.multipliers=[1,1,2]"),
        *("network.denoiser.blocks=1", "network.energy.width=1", "network.value.width=1"),
    ],
    "ddgan": ["network.denoiser.channels=16", "network.energy.channels=8", "network.value.channels=8"],
}
"""What makes large networks small, by the file that describes them."""

NETWORK_OF = {
    "cifar10_t10": "unet",
    "cifar10_t4": "ddgan",
    "imagenet64_t10": "edm_unet",
    "imagenet64_t4": "edm_unet",
    "lsun_t4": "edm_unet_256",
}
"""The large networks of the published experiments."""
LARGE = {"cifar10_small": "unet", **NETWORK_OF}
"""Those of all experiments."""


NETWORK = MlpConfig(hidden=16, layers=3, embedding=8)
"""A small network of any role."""


def make_parts(policy: Policy, schedule: StepSchedule, iterations: int = 100, **settings: Any) -> Parts:
    """What an algorithm is built from, with small random networks; further settings are those of `Parts`."""
    networks = {
        "critic": lambda: build_critic(NETWORK, policy.event, torch.Generator().manual_seed(1)),
        "timed_critic": lambda: build_timed_critic(NETWORK, policy.event, torch.Generator().manual_seed(2)),
    }
    return Parts(policy, schedule, iterations, **{**networks, **settings})


def without_seeds(metrics: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The metrics of one seed as scalars."""
    return {name: only for name, values in metrics.items() for only in values.view(1).unbind()}


def update(
    algorithm: Algorithm, x: Tensor, iteration: int, *generators: torch.Generator, labels: Tensor | None = None
) -> dict[str, Tensor]:
    """The metrics of one update of one seed, as scalars.

    Args:
        algorithm: updated.
        x: real samples, [B, *event].
        iteration: from 0.
        generators: in the order of `algorithm.streams`.
        labels: the class of each sample, [B].
    """
    streams = Streams([dict(zip(algorithm.streams, generators, strict=True))])
    return without_seeds(algorithm.update(Batch.single(x, len(x), Condition(labels)), iteration, streams))


def step(algorithm: Algorithm, state: TrainingState, iteration: int) -> dict[str, Tensor]:
    """The metrics of one update of one seed on its next batch, as scalars."""
    return without_seeds(algorithm.update(state.stream.next(), iteration, Streams([state.generators])))


def stacked_step(algorithm: Algorithm, states: list[TrainingState], iteration: int) -> dict[str, Tensor]:
    """The metrics of one update of several seeds as one algorithm, each on its next batch: [K]."""
    batch = Batch.stacked([state.stream.next() for state in states])
    return algorithm.update(batch, iteration, Streams([state.generators for state in states]))


def descend(optimizer: Optimizer, loss: Callable[[], Tensor]) -> StepResult:
    """One step of an optimizer down a scalar."""
    return optimizer.minimize(lambda _: {"loss": loss().view(1)}, torch.zeros(1, 1), num=1)


class FirstOfTwo(SingleProcess):
    """A worker whose fellow does as it does."""

    size = 2


def idx_bytes(array: np.ndarray) -> bytes:
    """Bytes in the layout of MNIST's files."""
    return struct.pack(f">BBBB{array.ndim}I", 0, 0, 8, array.ndim, *array.shape) + array.tobytes()


def wait_until(condition: Callable[[], object], seconds: float = 120.0) -> None:
    """Wait until something holds, or fail."""
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.05)


@contextmanager
def locked_by_another(path: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A process that holds the lock `path` until it is left or killed."""
    code = (
        "import sys; from filelock import FileLock\n"
        "lock = FileLock(sys.argv[1]); lock.acquire(); print('locked', flush=True); sys.stdin.read()"
    )
    command = [sys.executable, "-c", code, str(path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as holder:
        assert holder.stdout is not None
        holder.stdout.readline()
        yield holder
        holder.kill()


def free_port() -> int:
    """A port of this machine that nobody listens on."""
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def processes_with(mark: str, kind: str = "") -> list[int]:
    """Processes that have this in their environment, and in their command line."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(OSError):
            if kind.encode() in (entry / "cmdline").read_bytes() and mark.encode() in (entry / "environ").read_bytes():
                found.append(int(entry.name))
    return sorted(found)


class Pixels(Dataset[Tensor]):
    """uint8 images [N, C, H, W], one tensor an item, as torch-fidelity reads them."""

    def __init__(self, pixels: Tensor) -> None:
        self.pixels = pixels

    def __len__(self) -> int:
        return len(self.pixels)

    def __getitem__(self, index: int) -> Tensor:
        return self.pixels[index]


OTHER_CONTENT = (b"", b"<!doctype html><title>404</title>", b"version https://git-lfs.github.com/spec/v1\noid", b"\n")
"""What is found in the place of a file."""


def fuzzed(data: bytes, rng: random.Random) -> bytes:
    """A file's bytes cut, altered, lengthened, or replaced by those of something else."""
    changed, kind = bytearray(data), rng.randrange(8)
    if kind == 0:
        return data[: rng.randrange(len(data))]
    if kind == 1:
        return rng.choice(OTHER_CONTENT) + data[: rng.choice([0, 0, 100])]
    if kind == 2:
        start = rng.randrange(len(data))
        del changed[start : start + rng.choice([1, 8, 512])]
        return bytes(changed)
    if kind == 3:
        start = rng.randrange(len(data))
        changed[start:start] = rng.randbytes(rng.choice([1, 8, 512]))
        return bytes(changed)
    places = min(len(data), rng.choice([32, 256, 4096, len(data)]))  # headers matter most
    offset = rng.choice([0, len(data) - places])
    for _ in range(rng.choice([1, 1, 4, 64])):
        changed[offset + rng.randrange(places)] = rng.randrange(256)
    return bytes(changed)
