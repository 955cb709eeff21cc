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
from dxmi.run_directory import read_yaml
from tune.sweep_config import KINDS, BudgetConfig, SamplerConfig, StoppingConfig, SweepConfig, TrackingConfig

_ROOT = "config"
_SHOWN = 60
"""Characters of a bad override that are repeated to the user."""
_DEFAULTS = "dxmi_defaults"
_SWEEP, _TRACKING, _TREE_ROOT = "sweep", "tracking", "dxmi_tree"


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
    """Config groups of an experiment and the names of their options."""
    return {
        folder.name: _options(folder)
        for folder in sorted(config_folder().iterdir())
        if folder.is_dir() and folder.name != _SWEEP
    }


def sweeps() -> list[str]:
    """Names of the sweeps that are shipped."""
    return _options(config_folder() / _SWEEP)


def _options(folder: Path) -> list[str]:
    return sorted(file.stem for file in folder.glob("*.yaml"))


def compose_experiment(overrides: Sequence[str]) -> Composed:
    """The config that `overrides` (Hydra's grammar) describe.

    Raises:
        UserError: an override is malformed, repeated, unknown or refused.
    """
    out = out_folder([o for o in overrides if o.startswith("out=")])
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


def out_folder(given: Sequence[str]) -> Path | None:
    """The folder that out=DIR names, if it is given.

    Raises:
        UserError: it is given twice, or is no path.
    """
    text = _raw("out", given)
    return None if text is None else user_path(text, "out")


def _raw(key: str, given: Sequence[str]) -> str | None:
    """The one value of key=VALUE, taken as it is written, since Hydra's grammar would want odd names quoted."""
    if len(given) > 1:
        raise UserError(f"{key} is given twice: keep one.")
    return given[0].removeprefix(f"{key}=") if given else None


# ----------------------------------------------------------------------------
# A sweep


@dataclass(frozen=True)
class ComposedSweep:
    """A composed sweep, as trees of plain values.

    Attributes:
        experiment: what each trial changes a little.
        sweep: a sweep file's content with overrides, its space included.
        tracking: where it is recorded.
        name: of the study, if one was given.
        source: name of the sweep file.
    """

    experiment: ExperimentConfig
    sweep: dict[str, Any]
    tracking: dict[str, Any]
    name: str | None
    source: str


def compose_sweep(overrides: Sequence[str]) -> ComposedSweep:
    """The sweep that `overrides` describe: sweep=NAME or sweep=FILE.yaml, name=STUDY, sweep.KEY=..., tracking.KEY=...,
    and everything else as for one run.

    Raises:
        UserError: an override or the sweep file is refused.
    """

    def belongs(override: str, *keys: str) -> bool:
        key = override.lstrip("+~").partition("=")[0]
        return any(key == known or key.startswith(f"{known}.") for known in keys)

    name = _raw("name", [o for o in overrides if o.startswith("name=")])
    odd = [o for o in overrides if belongs(o, "name") and not o.startswith("name=")]
    if odd:
        raise UserError(f"{odd[0]!r} is not how a study is named: write name=STUDY.")
    chosen = _raw(_SWEEP, [o for o in overrides if o.startswith(f"{_SWEEP}=")])
    if chosen is None:
        raise UserError(f"Which sweep? Add sweep=NAME, one of {', '.join(sweeps())}, or sweep=FILE.yaml.")
    own = [o for o in overrides if belongs(o, _SWEEP, _TRACKING) and not o.startswith(f"{_SWEEP}=")]
    rest = [o for o in overrides if not belongs(o, _SWEEP, _TRACKING, "name")]
    if any(o.startswith("out=") for o in rest):
        raise UserError("out is for one run: a study lives in the folder of its name; give name=... instead.")
    tree = overridden({_SWEEP: _whole_sweep(_sweep_file(chosen)), _TRACKING: to_tree(TrackingConfig())}, own)
    return ComposedSweep(compose_experiment(rest).experiment, tree[_SWEEP], tree[_TRACKING], name, Path(chosen).stem)


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """A tree with overrides in Hydra's grammar.

    Raises:
        UserError: one of them is malformed, repeated or unknown.
    """
    for override in _parse(overrides):
        _check_path(override, tree, {})
    return _hydra(_TREE_ROOT, tree, overrides)


def _whole_sweep(given: dict[str, Any]) -> dict[str, Any]:
    """A sweep file's content with the defaults of what it leaves out, so that overrides find every key."""
    whole = {"space": {}, **to_tree(SweepConfig()), **given}
    whole["space"] = _nested(whole["space"])
    for group, cls in (("sampler", SamplerConfig), ("stopping", StoppingConfig), ("budget", BudgetConfig)):
        if isinstance(whole[group], dict):
            whole[group] = {**to_tree(cls()), **whole[group]}
    return whole


def _nested(space: Any) -> Any:
    """A space whose dotted keys have become groups, as overrides on the command line write them.

    Raises:
        UserError: a setting is named twice, or is a group of another.
    """
    if not isinstance(space, dict) or any(kind in space for kind in KINDS):
        return space
    groups: dict[Any, Any] = {}
    for key, value in space.items():
        path = key.split(".") if isinstance(key, str) else [key]
        group: Any = groups
        for name in path[:-1]:
            group = group.setdefault(name, {}) if _is_group_of_axes(group) else None
        if not _is_group_of_axes(group) or path[-1] in group:
            raise UserError(f"sweep.space names {key} twice, or inside another setting: keep one.")
        group[path[-1]] = _nested(value)
    return groups


def _is_group_of_axes(tree: Any) -> bool:
    return isinstance(tree, dict) and not any(kind in tree for kind in KINDS)


def _sweep_file(chosen: str) -> dict[str, Any]:
    """The content of a shipped sweep, or of a user's own file."""
    if chosen.endswith((".yaml", ".yml")):
        path = user_path(chosen, _SWEEP)
        missing = f"The sweep file {path} cannot be read."
    else:
        path = config_folder() / _SWEEP / f"{chosen}.yaml"
        if chosen not in sweeps():
            raise UserError(f"sweep {chosen!r} does not exist: {_nearest(chosen, sweeps())} A file ends in .yaml.")
        missing = f"The sweep file {path} has gone."
    tree = read_yaml(path, missing)
    if "${" in str(tree):
        raise UserError(
            f"{path} holds a ${{...}}: write the value out; a study's records must not depend on surroundings."
        )
    if "_target_" in str(tree):
        raise UserError(f"{path} names a _target_: a sweep file holds values only, nothing that is to be run.")
    return tree


# ----------------------------------------------------------------------------
# Overrides


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
    return _hydra(_ROOT, defaults, overrides, node=_DEFAULTS)


def _hydra(root: str, tree: dict[str, Any], overrides: Sequence[str], node: str | None = None) -> dict[str, Any]:
    """What Hydra composes of the config `root` and `overrides`; `tree` is stored as `node`, else as `root` itself."""
    GlobalHydra.instance().clear()
    try:
        ConfigStore.instance().store(name=node or root, node=tree)
        with initialize_config_dir(str(config_folder()), version_base=None):
            config = compose(root, overrides=list(overrides))
        composed = OmegaConf.to_container(config, resolve=True)
    except (HydraException, OmegaConfBaseException) as error:
        raise UserError("The config cannot be composed: " + " ".join(str(error).split())) from error
    except RecursionError as error:
        raise UserError("The config cannot be composed: its groups are nested too deeply.") from error
    assert isinstance(composed, dict)
    return {str(key): value for key, value in composed.items()}
