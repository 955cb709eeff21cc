"""Composition of an `ExperimentConfig` from names and overrides with Hydra.

Hydra composes plain values; `dxmi.config.build` turns them into frozen dataclasses and rejects invalid values.
"""

import functools
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import yaml
from hydra import compose, initialize_config_dir
from hydra.core.global_hydra import GlobalHydra
from hydra.core.override_parser.overrides_parser import OverridesParser
from hydra.core.override_parser.types import Override
from hydra.errors import HydraException
from omegaconf import DictConfig, OmegaConf, open_dict
from omegaconf.errors import OmegaConfBaseException

from dxmi.config import (
    block_at,
    build,
    completed,
    is_place,
    leaves_of,
    put,
    settings_between,
    shared_fields,
    to_tree,
    unknown_key,
    value_of,
    with_kinds,
)
from dxmi.errors import UserError
from dxmi.persistence.files import require_target, user_path, user_text
from dxmi.persistence.run_directory import read_yaml
from dxmi.training.config import ExperimentConfig
from tune.config import files
from tune.config.ablation import AblationConfig, SeedsConfig, TuningConfig
from tune.config.files import ABLATION, SWEEP
from tune.config.sweep import (
    KINDS,
    BudgetConfig,
    LimitsConfig,
    ObjectiveConfig,
    SamplerConfig,
    StoppingConfig,
    SweepConfig,
    TrackingConfig,
)

_ROOT = "config"
_ASIDE = "dxmi_text_put_aside_"
_SHOWN = 60
"""Largest number of characters of an invalid override that are shown to the user."""
_TRACKING = "tracking"
_BASELINE = "baseline"
_OF_ALL = ("experiment", "debug")
"""Groups whose options may change settings of any other group."""
_OF_ABLATIONS = tuple(f"{ABLATION}.{table}." for table in ("variants", "components", "factors"))


@dataclass(frozen=True)
class Composed:
    """A composed command.

    Attributes:
        experiment: Config of the experiment.
        out: Output folder, or None if it was not given.
    """

    experiment: ExperimentConfig
    out: Path | None


def compose_experiment(overrides: Sequence[str]) -> Composed:
    """Compose the config from `overrides` in Hydra's grammar.

    Raises:
        UserError: an override is malformed, repeated, unknown or invalid.
    """
    out = out_folder([o for o in overrides if o.startswith("out=")])
    raw, rest = _raw_places([o for o in overrides if not o.startswith("out=")])
    parsed, options = _parse(rest), files.groups()
    chosen = [str(o.input_line) for o in parsed if _is_group(o, options) and not _is_left_out(o)]
    values = [o for o in parsed if not _is_group(o, options) or (_is_left_out(o) and o.key_or_group not in _OF_ALL)]
    for override in (o for o in parsed if _is_group(o, options)):
        _check_option(override.key_or_group, override.value(), options)
    known = with_kinds(
        ExperimentConfig, _known(tuple(chosen), files.config_folder(), _last_change()), _settings_of(values)
    )
    values = [o for o in values if not _names_kind(o, known)]  # kinds have been applied already
    for override in values:
        _check_path(override, known, options)
    return Composed(build(ExperimentConfig, _with_places(_with_values(known, values), raw)), out)


def out_folder(given: Sequence[str]) -> Path | None:
    """The folder given by out=DIR, or None.

    Raises:
        UserError: it is given twice, or is not a path.
    """
    text = _raw("out", given)
    return None if text is None else require_target(user_path(text, "out"), "out")


def _raw(key: str, given: Sequence[str]) -> str | None:
    """The value of key=VALUE, taken literally, since Hydra's grammar requires quotes for special characters."""
    if len(given) > 1:
        raise UserError(f"{key} is given twice: keep one.")
    return given[0].removeprefix(f"{key}=") if given else None


# ----------------------------------------------------------------------------
# Studies: sweeps and ablations


@dataclass(frozen=True)
class ComposedSweep:
    """A composed sweep, as nested dictionaries of plain values.

    Attributes:
        experiment: Experiment that the trials vary.
        sweep: Content of the sweep file with overrides, including the space.
        tracking: Where the study is recorded.
        name: Name of the study, if one was given.
        source: Name of the sweep file.
    """

    experiment: ExperimentConfig
    sweep: dict[str, Any]
    tracking: dict[str, Any]
    name: str | None
    source: str


@dataclass(frozen=True)
class ComposedAblation:
    """A composed ablation, as nested dictionaries of plain values.

    Attributes:
        experiment: Experiment of the baseline.
        ablation: Content of the ablation file with overrides, except for the baseline, which is in `experiment`; it is
            parsed by `tune.config.ablation.parse_ablation`.
        tracking: Where the study is recorded.
        name: Name of the study, if one was given.
        source: Name of the ablation file.
    """

    experiment: ExperimentConfig
    ablation: dict[str, Any]
    tracking: dict[str, Any]
    name: str | None
    source: str


def compose_sweep(overrides: Sequence[str]) -> ComposedSweep:
    """Compose a sweep from overrides.

    Args:
        overrides: sweep=NAME or sweep=FILE.yaml, name=STUDY, sweep.KEY=..., tracking.KEY=..., and all overrides of a
            single run.

    Raises:
        UserError: an override or the sweep file is invalid.
    """
    asked = _asked(SWEEP, files.sweeps(), overrides)
    tree = overridden({SWEEP: _whole_sweep(asked.content), _TRACKING: to_tree(TrackingConfig())}, asked.own)
    experiment = compose_experiment(asked.rest).experiment
    if "space" in tree[SWEEP]:
        tree[SWEEP]["space"] = _space_with_options(tree[SWEEP]["space"], asked.rest)
    return ComposedSweep(experiment, tree[SWEEP], tree[_TRACKING], asked.name, asked.source)


def compose_ablation(overrides: Sequence[str]) -> ComposedAblation:
    """Compose an ablation from overrides.

    Args:
        overrides: ablation=NAME or ablation=FILE.yaml, name=STUDY, ablation.KEY=..., tracking.KEY=..., and all
            overrides of a single run, which take precedence over the baseline in the file.

    Raises:
        UserError: an override or the ablation file is invalid.
    """
    asked = _asked(ABLATION, files.ablations(), overrides)
    tree = overridden({ABLATION: _whole_ablation(asked.content), _TRACKING: to_tree(TrackingConfig())}, asked.own)
    ablation = tree[ABLATION]
    baseline = _baseline(ablation.pop(_BASELINE, []), asked.rest)
    overrides = [*baseline, *asked.rest]
    experiment = compose_experiment(overrides).experiment
    ablation = _with_settings(ablation, functools.partial(_with_options, overrides))
    if isinstance(ablation.get("tuning"), dict) and "space" in ablation["tuning"]:
        ablation["tuning"]["space"] = _space_with_options(ablation["tuning"]["space"], overrides)
    return ComposedAblation(experiment, ablation, tree[_TRACKING], asked.name, asked.source)


@dataclass(frozen=True)
class _Asked:
    """The overrides of a study, divided by what they apply to.

    Attributes:
        name: Name of the study, if one was given.
        source: Name of the study's file.
        content: Content of that file.
        own: Overrides of that content and of tracking.
        rest: Overrides of the experiment.
    """

    name: str | None
    source: str
    content: dict[str, Any]
    own: list[str]
    rest: list[str]


def _asked(kind: str, shipped: list[str], overrides: Sequence[str]) -> _Asked:
    """Divide the overrides of a sweep or an ablation (`kind`) by what they apply to, and read its file."""

    def belongs(override: str, *keys: str) -> bool:
        key = _key(override)
        return any(key == known or key.startswith(f"{known}.") for known in keys)

    name = _raw("name", [o for o in overrides if o.startswith("name=")])
    odd = [o for o in overrides if belongs(o, "name") and not o.startswith("name=")]
    if odd:
        raise UserError(f"{odd[0]!r} cannot be used to name a study: write name=STUDY.")
    chosen = _raw(kind, [o for o in overrides if o.startswith(f"{kind}=")])
    if chosen is None:
        raise UserError(f"No {kind} is selected: add {kind}=NAME (one of {', '.join(shipped)}) or {kind}=FILE.yaml.")
    own = [o for o in overrides if belongs(o, kind, _TRACKING) and not o.startswith(f"{kind}=")]
    rest = [o for o in overrides if not belongs(o, kind, _TRACKING, "name")]
    if any(o.startswith("out=") for o in rest):
        raise UserError(
            "out applies to a single run: a study is stored in a folder with its name; use name=... instead."
        )
    return _Asked(name, Path(chosen).stem, _study_file(kind, chosen, shipped), own, rest)


def _key(override: str) -> str:
    return override.lstrip("+~").partition("=")[0]


def overridden(tree: dict[str, Any], overrides: Sequence[str]) -> dict[str, Any]:
    """Apply overrides in Hydra's grammar to a nested dictionary; paths and URIs are taken literally.

    Raises:
        UserError: an override is malformed, repeated or unknown.
    """
    raw, rest = _raw_places(overrides)
    values = _parse(rest)
    for override in values:
        _check_path(override, tree, {})
    for key in (_key(o) for o in overrides if _is_place(o) and not o.startswith("+")):
        _check_key(key, tree, {})
    return _with_places(_with_values(tree, values), raw)


def _whole_sweep(given: dict[str, Any]) -> dict[str, Any]:
    """Add defaults to the content of a sweep file, so that every key can be overridden."""
    whole = {"space": {}, **to_tree(SweepConfig()), **given}
    whole["space"] = _nested("sweep.space", whole["space"], _is_group_of_axes)
    for group, cls in (("sampler", SamplerConfig), ("stopping", StoppingConfig), ("budget", BudgetConfig)):
        if isinstance(whole[group], dict):
            whole[group] = {**to_tree(cls()), **whole[group]}
    return whole


def _whole_ablation(given: dict[str, Any]) -> dict[str, Any]:
    """Add defaults to the content of an ablation file, so that every key can be overridden."""
    defaults = to_tree(AblationConfig(hypothesis="none")) | {"hypothesis": "", "seeds": "auto"}
    whole = {_BASELINE: [], **defaults, **given}
    for group, cls in (
        ("objective", ObjectiveConfig),
        ("seeds", SeedsConfig),
        ("budget", LimitsConfig),
        ("tuning", TuningConfig),
    ):
        if isinstance(whole[group], dict):
            whole[group] = {**to_tree(cls()), **whole[group]}
    if isinstance(whole["tuning"], dict):
        whole["tuning"] = _whole_tuning(whole["tuning"])
    return _with_settings(whole, lambda where, settings: _nested(where, settings, _is_group_of_settings))


def _whole_tuning(tuning: dict[str, Any]) -> dict[str, Any]:
    whole = {**tuning, "space": _nested("ablation.tuning.space", tuning["space"], _is_group_of_axes)}
    for group, cls in (("sampler", SamplerConfig), ("stopping", StoppingConfig)):
        if isinstance(whole[group], dict):
            whole[group] = {**to_tree(cls()), **whole[group]}
    return whole


def _baseline(given: Any, rest: Sequence[str]) -> list[str]:
    """The baseline overrides of an ablation file, except for keys that `rest`, the command line, sets itself."""
    if not isinstance(given, list) or not all(isinstance(override, str) for override in given):
        raise UserError(
            f"ablation.{_BASELINE} is {given!r}: it must be a list of overrides, like [algorithm.entropy_coef=1.0]."
        )
    keys = {_key(override) for override in rest}
    return [override for override in given if _key(override) not in keys]


Settings = Callable[[str, Any], Any]
"""Function that maps the location and the settings of an entry to new settings."""


def _with_settings(ablation: dict[str, Any], change: Settings) -> dict[str, Any]:
    """Apply `change` to the settings of every entry of an ablation's tables, and convert numeric names to text."""
    found = dict(ablation)
    for table in ("variants", "components"):
        found[table] = _named(f"ablation.{table}", found.get(table, {}), change)
    found["factors"] = _named("ablation.factors", found.get("factors", {}), lambda w, levels: _named(w, levels, change))
    return found


def _named(where: str, table: Any, change: Settings) -> Any:
    if not isinstance(table, dict):
        return table
    found: dict[str, Any] = {}
    for key, value in table.items():
        if isinstance(key, bool):
            raise UserError(
                f"{where} has a name that YAML reads as {str(key).lower()}: write on, off, yes, no in quotes."
            )
        if str(key) in found:
            raise UserError(f"{where} names {key} twice: keep one.")
        found[str(key)] = change(f"{where}.{key}", value)
    return found


def _with_options(overrides: Sequence[str], where: str, settings: Any) -> Any:  # noqa: ARG001
    """Replace names of options of config groups by the changes that the options make to the experiment."""
    if not isinstance(settings, dict):
        return settings
    names = {group: name for group, name in settings.items() if group in _variable_groups() and isinstance(name, str)}
    return settings | {group: _option_settings(overrides, group, name) for group, name in names.items()}


def _variable_groups() -> dict[str, list[str]]:
    """Config groups that consist of a single group of settings, with the names of their options."""
    return {group: names for group, names in files.groups().items() if group not in _OF_ALL}


def _space_with_options(space: Any, overrides: Sequence[str]) -> Any:
    """Replace choices between options of a config group by choices between named groups of settings.

    Each group has the name of an option and contains the changes that the option makes to the experiment.
    """
    if not isinstance(space, dict):
        return space
    found = dict(space)
    for group in _variable_groups().keys() & space.keys():
        names = space[group].get("choice") if isinstance(space[group], dict) else None
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            choice = {name: _option_settings(overrides, group, name) for name in names}
            found[group] = {**space[group], "choice": choice}
    return found


def _option_settings(overrides: Sequence[str], group: str, name: str) -> dict[str, Any]:
    """Changes that an option of a group makes to the experiment given by the overrides, by path inside the group.

    They are found by composing the experiment again with that option. If the option changes nothing, the content of its
    file is returned.
    """
    _check_option(group, name, _variable_groups())
    old = to_tree(compose_experiment(overrides).experiment)
    new = to_tree(compose_experiment(_with_option(overrides, group, name, old)).experiment)
    changes = settings_between(ExperimentConfig, old, new)
    return {path.removeprefix(f"{group}."): value for path, value in changes.items()} or _option(group, name)


def _with_option(overrides: Sequence[str], group: str, name: str, old: dict[str, Any]) -> list[str]:
    """The overrides with a different option of a group, without those that the option determines.

    An option determines the settings that it gives and every kind in the group. If it changes the kind of a block, it
    also determines all settings of that block except those shared by all kinds.
    """
    content = _option(group, name)
    decided = {f"{group}.{path}" for path, _ in leaves_of(content)}

    def is_kept(key: str) -> bool:
        block, _, last = key.rpartition(".")
        if key == group or key in decided:
            return False
        place = block_at(ExperimentConfig, old, block) if key.startswith(f"{group}.") else None
        kind = value_of({group: content}, f"{block}.kind")
        is_other = kind is not None and kind != value_of(old, f"{block}.kind")
        return place is None or (last != "kind" and not (is_other and last not in shared_fields(place)))

    return [*(o for o in overrides if is_kept(_key(o))), f"{group}={name}"]


def _nested(where: str, tree: Any, is_group: Callable[[Any], bool]) -> Any:
    """Convert dotted keys to nested groups, as in overrides on the command line.

    Raises:
        UserError: a setting is given twice, or is inside another setting.
    """
    if not is_group(tree):
        return tree
    groups: dict[Any, Any] = {}
    for key, value in tree.items():
        path = key.split(".") if isinstance(key, str) else [key]
        group: Any = groups
        for name in path[:-1]:
            group = group.setdefault(name, {}) if is_group(group) else None
        if not is_group(group) or path[-1] in group:
            raise UserError(f"{where} names {key} twice, directly or as part of a group: keep one.")
        group[path[-1]] = _nested(where, value, is_group)
    return groups


def _is_group_of_axes(tree: Any) -> bool:
    return isinstance(tree, dict) and not any(kind in tree for kind in KINDS)


def _is_group_of_settings(tree: Any) -> bool:
    return isinstance(tree, dict)


def _study_file(kind: str, chosen: str, shipped: list[str]) -> dict[str, Any]:
    """The content of a shipped sweep or ablation, or of a user's own file."""
    if chosen.endswith((".yaml", ".yml")):
        path = require_target(user_path(chosen, kind), kind)
        missing = f"The {kind} file {path} cannot be read."
    else:
        path = files.config_folder() / kind / f"{chosen}.yaml"
        if chosen not in shipped:
            raise UserError(
                f"{kind} {chosen!r} does not exist: {_nearest(chosen, shipped)} The path of a file must end in .yaml."
            )
        missing = f"The {kind} file {path} no longer exists."
    tree = read_yaml(path, missing)
    _refuse_double_keys(path)
    if "${" in str(tree):
        raise UserError(
            f"{path} contains a ${{...}}: write the value out, since a study must not depend on the environment."
        )
    if "_target_" in str(tree):
        raise UserError(f"{path} contains a _target_: the file of a study may contain only values, not code to run.")
    return tree


def _refuse_double_keys(path: Path) -> None:
    """Reject duplicate keys in a YAML mapping, of which only the last would be read."""
    nodes: list[Any] = [yaml.compose(path.read_text(), Loader=yaml.SafeLoader)]
    while nodes:
        node = nodes.pop()
        if isinstance(node, yaml.SequenceNode):
            nodes += node.value
        if isinstance(node, yaml.MappingNode):
            keys = [key for key, _ in node.value if isinstance(key, yaml.ScalarNode)]
            values = [
                yaml.safe_load(key.value) if key.style is None else key.value for key in keys
            ]  # 1 == True in Python, and yes is True in YAML
            twice = next((key for index, key in enumerate(keys) if values[index] in values[:index]), None)
            if twice is not None:
                raise UserError(
                    f"{path} has the key {twice.value} twice in one group, or another key that YAML reads as equal "
                    "(yes, on and 1; no, off and 0): keep one of them, or put it in quotes."
                )
            nodes += [value for _, value in node.value]


# ----------------------------------------------------------------------------
# Paths and URIs, which are taken literally, since = , $ { [ ' and others are special characters in Hydra's grammar


def _is_place(override: str) -> bool:
    """Whether an override sets a path or a URI."""
    key, found, _ = override.lstrip("+").partition("=")
    if not found:
        return False
    group, _, rest = key.partition(".")
    if key.startswith(_OF_ABLATIONS):  # ablation.variants.NAME.PATH, of which a name may have dots
        names = key.split(".")
        return any(is_place(ExperimentConfig, ".".join(names[start:])) for start in range(3, len(names)))
    return is_place(TrackingConfig, rest) if group == _TRACKING else is_place(ExperimentConfig, key)


def _raw_places(overrides: Sequence[str]) -> tuple[dict[str, str | None], list[str]]:
    """Separate the overrides of paths and URIs, by setting, from the other overrides.

    Raises:
        UserError: a setting is given twice.
    """
    raw: dict[str, str | None] = {}
    for override in (o for o in overrides if _is_place(o)):
        key, _, value = override.lstrip("+").partition("=")
        if key in raw:
            raise UserError(f"{key} is given twice: keep one.")
        raw[key] = None if value == "null" else value
        if value != "null":
            user_text(value, key)
    return raw, [o for o in overrides if not _is_place(o)]


def _with_places(tree: dict[str, Any], raw: dict[str, str | None]) -> dict[str, Any]:
    """Insert the values of `raw` into a nested dictionary, by their paths."""
    for key, value in raw.items():
        *groups_above, name = key.split(".")
        group: Any = tree
        for above in groups_above:
            group = group.setdefault(above, {})
            if not isinstance(group, dict):
                raise UserError(f"{key} is not a setting: {above} is a value.")
        group[name] = value
    return tree


def _put_aside(tree: Any, texts: list[str]) -> Any:
    """Replace every text that contains a $, which Hydra would read as an interpolation, by a numbered placeholder."""
    if isinstance(tree, dict):
        return {key: _put_aside(value, texts) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_put_aside(value, texts) for value in tree]
    if not isinstance(tree, str) or "$" not in tree:
        return tree
    texts.append(tree)
    return f"{_ASIDE}{len(texts) - 1}"


def _put_back(tree: Any, texts: list[str]) -> Any:
    """The inverse of `_put_aside`."""
    if isinstance(tree, dict):
        return {str(key): _put_back(value, texts) for key, value in tree.items()}
    if isinstance(tree, list):
        return [_put_back(value, texts) for value in tree]
    return texts[int(tree.removeprefix(_ASIDE))] if isinstance(tree, str) and tree.startswith(_ASIDE) else tree


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
            "and special characters in quotes."
        ) from error
    seen = set()
    for override in parsed:
        if override.is_sweep_override():
            raise UserError(f"{override.input_line} gives several values: a run takes one value for each setting.")
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


_OPTIONAL = ("reward", "debug")
"""Groups that `null` leaves out."""


def _is_left_out(override: Override) -> bool:
    return override.key_or_group in _OPTIONAL and override.value() is None


def _check_option(group: str, name: object, options: dict[str, list[str]]) -> None:
    if name is None and group in _OPTIONAL:
        return
    if name not in options[group]:
        raise UserError(f"{group} {name!r} does not exist: {_nearest(str(name), options[group])}")


def _check_path(override: Override, known: dict[str, Any], options: dict[str, list[str]]) -> None:
    """Reject a key that the composed config does not have; `+key` is checked by the schema."""
    if not override.is_add():
        _check_key(override.key_or_group, known, options)


def _check_key(key: str, known: dict[str, Any], options: dict[str, list[str]]) -> None:
    tree: Any = known
    parts = key.split(".")
    for index, part in enumerate(parts):
        if not isinstance(tree, dict) or part not in tree:
            names = list(dict.fromkeys([*tree, *(options if index == 0 else ())])) if isinstance(tree, dict) else []
            if not names:
                raise UserError(f"{key} is not a setting: {'.'.join(parts[:index])} is a value.")
            kind = tree.get("kind")
            raise UserError(unknown_key(key, part, names, kind if isinstance(kind, str) else None))
        tree = tree[part]


def _nearest(name: str, names: list[str]) -> str:
    return unknown_key("", name, names).removeprefix(" is not a setting: ")


@functools.lru_cache(maxsize=64)
def _known(chosen: tuple[str, ...], folder: Path, changed: int) -> dict[str, Any]:  # noqa: ARG001
    """All settings composed from the chosen groups, with defaults; the result must not be modified.

    Hydra searches several places for each file, which takes tenths of a second, so results are cached. The cache key
    includes the config folder and the time of its last change.
    """
    tree = _composed(chosen)
    options = dict(option.split("=", 1) for option in chosen)
    blocks = {group: name for group, name in options.items() if group not in _OF_ALL and name != "null"}
    if blocks:
        before = completed(ExperimentConfig, _composed(tuple(o for o in chosen if o.startswith(_OF_ALL))))
        for group, name in blocks.items():
            _bring_blocks(tree, before, group, _option(group, name))
    if "debug" in options:
        _leave_out_foreign(tree, _option("debug", options["debug"]))
    return completed(ExperimentConfig, tree)


def _leave_out_foreign(tree: dict[str, Any], debug: dict[str, Any]) -> None:
    """Remove the settings of a debug option, which is for all experiments, that the kind of their block lacks."""
    for name, settings in debug.items():
        place = block_at(ExperimentConfig, tree, name)
        if place is None or not isinstance(settings, dict) or "kind" not in tree[name]:
            continue
        known = {own.name for own in fields(place.registry.config_class(tree[name]["kind"]))}
        for key in settings.keys() - known:
            tree[name].pop(key, None)  # absent if the block was reset by an option of another kind


def _bring_blocks(tree: dict[str, Any], before: dict[str, Any], path: str, content: Any) -> None:
    """Reset each block of an option whose kind differs from the experiment's.

    The block keeps only the option's content and, from the experiment, the settings shared by all kinds.
    """
    if not isinstance(content, dict):
        return
    place = block_at(ExperimentConfig, before, path)
    if place is None:
        for name, own in content.items():
            _bring_blocks(tree, before, f"{path}.{name}", own)
    elif content.get("kind", value_of(before, f"{path}.kind")) != value_of(before, f"{path}.kind"):
        block = value_of(tree, path)
        put(tree, path, {**content, **{name: block[name] for name in shared_fields(place) & block.keys()}})


def _composed(chosen: tuple[str, ...]) -> dict[str, Any]:
    """The settings that Hydra composes from the chosen groups, which are those that differ from the defaults."""
    GlobalHydra.instance().clear()
    with _refusing(), initialize_config_dir(str(files.config_folder()), version_base=None):
        return _plain(compose(_ROOT, overrides=list(chosen)), [])


def _option(group: str, name: str) -> dict[str, Any]:
    """Content of the file of a group's option."""
    path = files.config_folder() / group / f"{name}.yaml"
    return read_yaml(path, f"{path} no longer exists.")


def _names_kind(override: Override, known: dict[str, Any]) -> bool:
    """Whether an override has the form block=KIND."""
    is_block = block_at(ExperimentConfig, known, override.key_or_group) is not None
    return is_block and not override.is_delete() and isinstance(override.value(), str)


def _settings_of(overrides: Sequence[Override]) -> dict[str, Any]:
    """The values that overrides set, by path."""
    return {override.key_or_group: override.value() for override in overrides if not override.is_delete()}


def _last_change() -> int:
    """Newest modification time of the config files in nanoseconds. Links are not followed, since the lock files of
    some editors are dangling links.
    """
    return max((path.lstat().st_mtime_ns for path in files.config_folder().rglob("*")), default=0)


def _with_values(tree: dict[str, Any], overrides: Sequence[Override]) -> dict[str, Any]:
    """A copy of a nested dictionary with overrides applied in the same way as Hydra does after composing the groups."""
    texts: list[str] = []
    with _refusing():
        config = OmegaConf.create(_put_aside(tree, texts), flags={"struct": True})
        for override in overrides:
            _apply(config, override)
        return _plain(config, texts)


def _apply(config: DictConfig, override: Override) -> None:
    """Set, add or delete one value."""
    key, value = override.key_or_group, override.value()
    if override.package is not None:
        raise UserError(f"{override.input_line!r} is not an override: @ is for groups of settings, not for values.")
    if override.is_delete():
        _delete(config, key, value)
        return
    if override.is_add() and not isinstance(value, (dict, list)) and OmegaConf.select(config, key) is not None:
        raise UserError(f"{override.input_line!r} adds a setting that exists already: leave the + out.")
    OmegaConf.update(config, key, value, merge=True, force_add=override.is_add() or override.is_force_add())


def _delete(config: DictConfig, key: str, value: object) -> None:
    group, _, name = key.rpartition(".")
    above = OmegaConf.select(config, group) if group else config
    if not isinstance(above, DictConfig) or name not in above:
        raise UserError(
            f"~{key} removes a setting that another override has already removed: keep one of the two overrides."
        )
    if value is not None and above[name] != value:
        raise UserError(f"{key} is {above[name]}, not {value}: to remove it, write ~{key}.")
    with open_dict(above):
        del above[name]


def _plain(config: DictConfig, texts: list[str]) -> dict[str, Any]:
    """Convert to plain values, with interpolations resolved and placeholders replaced by their texts."""
    tree = OmegaConf.to_container(config, resolve=True)
    assert isinstance(tree, dict)
    return {str(key): _put_back(value, texts) for key, value in tree.items()}


@contextmanager
def _refusing() -> Iterator[None]:
    """Turn errors of Hydra and OmegaConf into a UserError."""
    try:
        yield
    except (HydraException, OmegaConfBaseException, yaml.YAMLError) as error:
        raise UserError("The config cannot be composed: " + " ".join(str(error).split())) from error
    except RecursionError as error:
        raise UserError("The config cannot be composed: its groups are nested too deeply.") from error


def require_no_stack(config: ExperimentConfig, what: str) -> None:
    """Check that a run of a single seed does not ask for stacked seeds.

    Raises:
        UserError: `resources.stack_seeds` is set to more than 1.
    """
    stack = config.resources.stack_seeds
    if stack is not None and stack > 1:
        raise UserError(
            f"resources.stack_seeds is {stack}, but {what} trains seeds separately: leave it out, or use dxmi ablate, "
            "which trains an arm's seeds together."
        )
