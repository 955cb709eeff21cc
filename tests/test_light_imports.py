"""Configs are read without what they describe: no command that only composes one waits for PyTorch."""

import subprocess
import sys

import pytest

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


@pytest.mark.parametrize("heavy", ["torch", "numpy", "scipy"])
def test_the_config_of_a_run_is_imported_without(heavy):
    imports = "; ".join(f"import {name}" for name in LIGHT)
    code = f"import sys; {imports}; sys.exit({heavy!r} in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
