"""The floors of the house hold, and dxmi stands without the platform."""

import subprocess
import sys

from importlinter.cli import lint_imports


def test_import_contracts_hold():
    assert lint_imports(no_cache=True) == 0


def test_dxmi_imports_without_hydra_ray_mlflow_or_rich():
    code = (
        "import sys, importlib.abc\n"
        "class Refuse(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name.split('.')[0] in {'hydra', 'omegaconf', 'ray', 'mlflow', 'optuna', 'rich', 'tune'}:\n"
        "            raise ImportError(name)\n"
        "sys.meta_path.insert(0, Refuse())\n"
        "import dxmi.training.run, dxmi.training.loading, dxmi.training.build\n"
    )
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0
