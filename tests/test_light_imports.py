"""What is imported with what: no command that only composes a config, decides about trials, or prints help, waits for
PyTorch or Ray.
"""

import subprocess
import sys
from pathlib import Path

import pytest

import tune.studies

LIGHT = (
    *(
        "dxmi",
        "dxmi.registry",
        "dxmi.config",
        "dxmi.networks",
        "dxmi.networks.registry",
        "dxmi.data",
        "dxmi.algorithms",
    ),
    *("dxmi.optim", "dxmi.optim.config", "dxmi.diffusion", "dxmi.diffusion.schedules", "dxmi.evaluation.config"),
    *(
        "dxmi.training",
        "dxmi.training.config",
        "dxmi.persistence",
        "dxmi.metrics",
        "dxmi.critics",
        "dxmi.visualization",
    ),
)
DECIDING = [
    "tune.execution.controller", "tune.plans.sweep", "tune.plans.ablation",
    "tune.search.samplers", "tune.search.pruners",
    *(f"tune.studies.{file.stem}" for file in Path(tune.studies.__path__[0]).glob("[a-z]*.py")),
]  # fmt: skip
FRAMEWORKS = {"matplotlib", "mlflow", "optuna", "pandas", "ray", "rich", "scipy", "torch", "torchvision"}


def loaded_by(*modules: str) -> set[str]:
    """Every module that is loaded in a process that has imported these."""
    program = f"import sys, {', '.join(modules)}; print(*sys.modules)"
    found = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=True)
    return set(found.stdout.split())


def test_the_config_of_a_run_is_imported_without_arrays():
    assert {"torch", "numpy", "scipy"} & loaded_by(*LIGHT) == set()


def test_deciding_about_trials_imports_no_framework():
    loaded = loaded_by(*DECIDING)
    assert len(DECIDING) > 10
    assert FRAMEWORKS & loaded == set()
    assert len(loaded) < 400


@pytest.mark.parametrize("module", ["tune", "tune.machine", "tune.messages", "tune.execution.control_channel"])
def test_what_every_command_or_actor_imports_first_is_small(module):
    loaded = loaded_by(module)
    assert (FRAMEWORKS | {"numpy"}) & loaded == set()
    assert len(loaded) < 150


def test_help_imports_no_framework():
    loaded = loaded_by("tune.cli.main", "tune.cli.parser", "tune.cli.dispatch")
    assert (FRAMEWORKS | {"hydra", "numpy"}) & loaded == set()
    assert len(loaded) < 160


def test_showing_a_config_imports_hydra_only():
    loaded = loaded_by("tune.cli.config")
    assert (FRAMEWORKS | {"numpy"}) & loaded == set()
    assert len(loaded) < 400


def test_listing_studies_needs_neither_ray_nor_pytorch():
    assert (FRAMEWORKS - {"rich"}) & loaded_by("tune.cli.studies") == set()
