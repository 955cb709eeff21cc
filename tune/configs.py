"""Where Hydra enters: from names and overrides to an `ExperimentConfig`.

Hydra composes plain values; `dxmi.config.build` turns them into frozen dataclasses and refuses what is wrong.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hydra import compose, initialize_config_dir
from hydra.core.config_store import ConfigStore
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from dxmi.config import build, to_tree, unknown_key
from dxmi.errors import UserError
from dxmi.experiment import ExperimentConfig
from dxmi.files import user_path

_ROOT = "config"
_SHOWN = 60
"""Characters of a bad override that are repeated to the user."""
_DEFAULTS = "dxmi_defaults"


@dataclass(frozen=True)
class Composed:
    """A composed command.

    Attributes:
        experiment: what to run.
        out: the folder that was asked for, if any.
    """

    experiment: ExperimentConfig
    out: Path | None


def config_folder() -> Path:
    """configs/ beside the packages in a checkout, tune/_configs in an installed distribution."""
    here = Path(__file__).resolve().parent
    installed = here / "_configs"
    return installed if installed.is_dir() else here.parent / "configs"


def groups() -> dict[str, list[str]]:
    """Config groups and the names of their options."""
    return {
        folder.name: sorted(file.stem for file in folder.glob("*.yaml"))
        for folder in sorted(config_folder().iterdir())
        if folder.is_dir()
    }


def compose_experiment(overrides: Sequence[str]) -> Composed:
    """The config that `overrides` (Hydra's grammar) describe.

    Raises:
        UserError: an override is malformed, repeated, unknown or refused.
    """
    out = _out([o for o in overrides if o.startswith("out=")])
    parsed = _parse([o for o in overrides if not o.startswith("out=")])
    options = groups()
    chosen = [str(o.input_line) for o in parsed if _is_group(o, options)]
    values = [o for o in parsed if not _is_group(o, options)]
    for override in (o for o in parsed if _is_group(o, options)):
        _check_option(override, options)
    known = _compose(chosen)
    for override in values:
        _check_path(override, known, options)
    tree = _compose([*chosen, *(str(o.input_line) for o in values)])
    return Composed(build(ExperimentConfig, tree), out)


def _out(given: Sequence[str]) -> Path | None:
    """The folder that out=DIR names; taken as it is written, since Hydra's grammar would want odd names quoted."""
    if len(given) > 1:
        raise UserError("out is given twice: keep one.")
    return user_path(given[0].removeprefix("out="), "out") if given else None


def _parse(overrides: Sequence[str]) -> list[Override]:
    try:
        parsed = OverridesParser.create().parse_overrides(list(overrides))
    except (HydraException, ValueError) as error:
        bad = next((o for o in overrides if not _parses(o)), overrides[0])
        shown = bad if len(bad) <= _SHOWN else bad[:_SHOWN] + "..."
        raise UserError(
            f"{shown!r} is not an override: write key=value, like algorithm.entropy_coef=0.03, "
            "and odd characters in quotes."
        ) from error
    seen = set()
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(f"{override.input_line} names several values: one run has one value for each setting.")
        if override.key_or_group in seen:
            raise UserError(f"{override.key_or_group} is given twice: keep one.")
        seen.add(override.key_or_group)
    return parsed


def _parses(override: str) -> bool:
    try:
        OverridesParser.create().parse_override(override)
    except (HydraException, ValueError):
        return False
    return True


def _is_group(override: Override, options: dict[str, list[str]]) -> bool:
    return override.key_or_group in options


def _check_option(override: Override, options: dict[str, list[str]]) -> None:
    group, name = override.key_or_group, override.value()
    if name not in options[group]:
        raise UserError(f"{group} {name!r} does not exist: {_nearest(str(name), options[group])}")


def _check_path(override: Override, known: dict[str, Any], options: dict[str, list[str]]) -> None:
    """Refuse a key that the composed config does not have; `+key` is left to the schema."""
    if override.is_add():
        return
    tree: Any = known
    parts = override.key_or_group.split(".")
    for index, part in enumerate(parts):
        if not isinstance(tree, dict) or part not in tree:
            names = list(dict.fromkeys([*tree, *(options if index == 0 else ())])) if isinstance(tree, dict) else []
            if not names:
                raise UserError(f"{override.key_or_group} is not a setting: {'.'.join(parts[:index])} is a value.")
            raise UserError(unknown_key(override.key_or_group, part, names))
        tree = tree[part]


def _nearest(name: str, names: list[str]) -> str:
    return unknown_key("", name, names).removeprefix(" is not a setting: ")


def _compose(overrides: Sequence[str]) -> dict[str, Any]:
    defaults = to_tree(ExperimentConfig())
    del defaults["network"]  # a network's fields depend on its kind: its group lists them all
    ConfigStore.instance().store(name=_DEFAULTS, node=defaults)
    GlobalHydra.instance().clear()
    try:
        with initialize_config_dir(str(config_folder()), version_base=None):
            config = compose(_ROOT, overrides=list(overrides))
        tree = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError("The config cannot be composed: " + " ".join(str(error).split())) from error
    assert isinstance(tree, dict)
    return {str(key): value for key, value in tree.items()}
