"""What the tests share: one thread, a cache that is not the user's, and small objects to test."""

import gc
import io
import os
import shutil
import sqlite3

# Before torch and NumPy are imported:
if "DXMI_TEST_GPU" not in os.environ:  # as `make test-gpu` sets it
    os.environ["CUDA_VISIBLE_DEVICES"] = ""  # the recorded numbers are those of a CPU
# Several processes share the cores. A thread that spins while it waits for another takes the core that the other needs.
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

from collections.abc import Callable, Iterator
from contextlib import closing, nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch
from matplotlib.figure import Figure
from PIL import Image

from dxmi.algorithms.configs import DxMIConfig
from dxmi.algorithms.dxmi import DxMI
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules.build import shorten
from dxmi.diffusion.schedules.configs import VarScheduleConfig
from dxmi.networks.registry import build_denoiser
from support import NETWORK, drawn_figures, figures_are_drawn, make_parts
from tune.compat import mlflow_tables
from tune.integrations import mlflow_store

_LONGEST_FIRST = [
    f"test_{name}"
    for name in (
        *("sweep", "ray_train", "stacking", "readme", "resume", "mlflow_tracker", "workers", "report", "planar_run"),
        *("mlflow_server", "seed_batching", "object_store", "cli", "configs", "oracle", "ablation_config", "ablation"),
        *("inert_settings", "experiments", "cache", "pages", "inception"),
    )
]
"""Files in the order in which the processes take them, so that none is left with a long one at the end."""
_SLOWEST_FIRST = [
    f"test_{name}"
    for name in ("sweep", "multiple_testing", "ray_train", "sequential", "cluster", "power", "statistics")
]
"""The same where slow tests run too."""

MakePolicy = Callable[..., Policy]
MakeDxMI = Callable[..., DxMI]


gc.disable()  # until all that tests import is there


def pytest_collection_finish() -> None:
    """Leave the million objects of libraries and tests, which stay, out of later garbage collections, and make few."""
    gc.freeze()
    gc.set_threshold(50_000, 20, 20)
    gc.enable()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    """Put the longest files first, and give slow tests, of which some take a quarter of an hour, an hour."""
    for item in items:
        if item.get_closest_marker("slow") and not item.get_closest_marker("timeout"):
            item.add_marker(pytest.mark.timeout(3_600))
    first = _LONGEST_FIRST if config.option.markexpr else [*_SLOWEST_FIRST, *_LONGEST_FIRST]
    gone = [name for name in {*_SLOWEST_FIRST, *_LONGEST_FIRST} if not (Path(__file__).parent / f"{name}.py").exists()]
    if gone:
        raise pytest.UsageError(f"tests/conftest.py orders files that do not exist: {', '.join(gone)}")
    rank = {name: number for number, name in enumerate(dict.fromkeys(first))}
    items.sort(key=lambda item: rank.get(item.path.stem, len(rank)))


@pytest.fixture(autouse=True, scope="session")
def _surroundings(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """No test reads or writes the user's cached results, and Ray's workers get as much of the processors as others."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setitem(os.environ, "DXMI_CACHE", str(tmp_path_factory.mktemp("cache")))
        # Ray's workers are nicer than others by 15, and would wait for the tests of the other processes to end.
        patch.setitem(os.environ, "RAY_worker_niceness", "0")
        yield


@pytest.fixture(autouse=True, scope="session")
def _copied_tables(tmp_path_factory: pytest.TempPathFactory) -> Iterator[None]:
    """MLflow's tables are made once and then copied: to make them takes 1.5 s, and many tests need a new store."""
    made = tmp_path_factory.mktemp("store") / "mlflow.db"

    def copy(database: str, artifacts: str) -> None:
        if not made.exists():
            mlflow_tables(f"sqlite:///{made}", artifacts)
            with closing(sqlite3.connect(made)) as connection:
                connection.execute("PRAGMA journal_mode=DELETE")  # all of it is in that file
        shutil.copy(made, database.removeprefix("sqlite:///"))

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mlflow_store, "mlflow_tables", copy)
        yield


@pytest.fixture(autouse=True)
def _one_thread() -> None:
    """Small tensors are slower on two, and a test that trains may have set another number."""
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="session")
def _blank_figures() -> Iterator[None]:
    """Figures are written, but drawn only for tests that are marked `draws`: drawing takes a third of a short run."""
    drawn = Figure.savefig

    def save(figure: Figure, file: io.BytesIO | io.StringIO, *, format: str, **options: Any) -> None:  # noqa: A002  (Matplotlib's name)
        width, height = (round(inches * options.get("dpi", 72)) for inches in figure.get_size_inches())
        if figures_are_drawn():
            drawn(figure, file, format=format, **options)
        elif isinstance(file, io.StringIO):
            file.write(f'<svg width="{width}pt" height="{height}pt" viewBox="0 0 {width} {height}"></svg>')
        else:
            Image.new("RGB", (width, height), "white").save(file, format)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(Figure, "savefig", save)
        yield


@pytest.fixture(autouse=True)
def _draw_if_marked(request: pytest.FixtureRequest) -> Iterator[None]:
    with drawn_figures() if request.node.get_closest_marker("draws") else nullcontext():
        yield


@pytest.fixture
def make_policy() -> MakePolicy:
    """`make(num_steps=4, event=(3,), seed=0, **schedule)`: a policy around a small random MLP."""

    def make(num_steps: int = 4, event: tuple[int, ...] = (3,), seed: int = 0, **schedule: object) -> Policy:
        network = build_denoiser(NETWORK, event, torch.Generator().manual_seed(seed))
        return Policy(network, shorten(VarScheduleConfig(num_steps=num_steps, **schedule)), event)  # type: ignore[arg-type]

    return make


@pytest.fixture
def make_dxmi(make_policy: MakePolicy) -> MakeDxMI:
    """`make(config, num_steps=4, event=(3,), total=100)`: the algorithm around small random MLPs."""

    def make(config: DxMIConfig, num_steps: int = 4, event: tuple[int, ...] = (3,), total: int = 100) -> DxMI:
        policy, schedule = make_policy(num_steps, event), shorten(VarScheduleConfig(num_steps=num_steps))
        return DxMI(config, make_parts(policy, schedule, total))

    return make
