"""Where the config files are, and what their names are; nothing is composed here, so that help needs no Hydra."""

from pathlib import Path

SWEEP, ABLATION = "sweep", "ablation"
"""Folders of configs that do not belong to an experiment."""


def config_folder() -> Path:
    """The folder configs/ next to the packages in a checkout, or tune/_configs in an installed distribution."""
    tune = Path(__file__).resolve().parents[1]
    installed = tune / "_configs"
    return installed if installed.is_dir() else tune.parent / "configs"


def groups() -> dict[str, list[str]]:
    """Config groups of an experiment and the names of their options."""
    return {
        folder.name: _options(folder)
        for folder in sorted(config_folder().iterdir())
        if folder.is_dir() and folder.name not in (SWEEP, ABLATION)
    }


def sweeps() -> list[str]:
    """Names of the sweeps that are shipped."""
    return _options(config_folder() / SWEEP)


def ablations() -> list[str]:
    """Names of the ablations that are shipped."""
    return _options(config_folder() / ABLATION)


def _options(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.yaml"))
