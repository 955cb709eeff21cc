"""Arms of an ablation, built from its table: each is the baseline with some settings changed.

Misleading arms are rejected before anything runs: an arm without changes, duplicate arms, a setting without effect
under the baseline, and changes that would make arms incomparable.
"""

import itertools
import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from dxmi.config import leaves_of, named_settings, settings_between, to_tree, with_kinds
from dxmi.errors import UserError
from dxmi.training.config import ExperimentConfig
from tune.config.ablation import TABLES, AblationConfig, Table
from tune.plans.factorial import MAX_FACTORS, TwoLevelDesign, smallest_fraction
from tune.search.space import FIXED, Axis, Value, configured, flat, parse_space, require_setting, show, value_at

BASELINE = "baseline"
MAX_ARMS = 64
_ALL_OFF = "without_all"
_SHOWN = 80
"""Largest number of characters of an invalid name that are shown to the user."""
_FIXED = {
    **FIXED,
    "seed": "every arm is run with the same seeds",
    "data": "scores against other data cannot be compared",
}
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.-]{0,39}")
_EXAMPLES = {
    "variants": "{no_entropy: {algorithm.entropy_coef: 0}}",
    "components": "{entropy: {algorithm.entropy_coef: 0}}",
    "factors": "{method: {var: {}, step: {schedule.kind: step}}}",
}


@dataclass(frozen=True)
class Arm:
    """One arm of a comparison.

    Attributes:
        name: Name of letters, digits, dots, dashes and underscores.
        changes: Changes to the baseline by path; empty for the baseline itself. A change of kind replaces the whole
            block with the defaults of the new kind; other changes in the block are then applied to these defaults.
        levels: Level of each factor in a factorial design, otherwise empty.
    """

    name: str
    changes: Mapping[str, Value] = field(default_factory=dict)
    levels: Mapping[str, str] = field(default_factory=dict)

    def config(self, experiment: ExperimentConfig) -> ExperimentConfig:
        """The baseline with this arm's changes."""
        return configured(experiment, self.changes)


@dataclass(frozen=True)
class _Change:
    """Changes of one entry of the table.

    Attributes:
        where: Location of the entry, for messages.
        name: Name of the entry or the level.
        settings: Values by path that differ from the baseline.
        factor: Name of the factor, for a level.
    """

    where: str
    name: str
    settings: Mapping[str, Value]
    factor: str = ""


def arms(config: AblationConfig, experiment: ExperimentConfig) -> list[Arm]:
    """The arms of an ablation of `experiment`, the baseline first.

    Raises:
        UserError: the table is empty or too large, a name is invalid, a setting is unknown, of the wrong type or must
            not vary, an arm equals the baseline or another arm, or a setting has no effect.
    """
    changes = _changes(config, experiment)
    found = _combined(config, changes)
    _require_distinct(found, experiment)
    _require_effects(changes, found, experiment)
    _check_tuning(config, experiment, found)
    return found


def two_level_design(config: AblationConfig) -> TwoLevelDesign | None:
    """The two-level design of a factorial or fractional ablation, whose rows are the arms in their order.

    Args:
        config: Ablation with a valid table.

    Returns:
        The design; None for other ablations and for factors with more than two levels.
    """
    factors = list(config.factors)
    if config.design == "fractional":
        return smallest_fraction(factors, config.resolution or 4)
    is_two_level = config.design == "factorial" and all(len(levels) == 2 for levels in config.factors.values())
    return TwoLevelDesign(tuple(factors)) if is_two_level else None


def tuning_axes(config: AblationConfig, arm: ExperimentConfig) -> tuple[Axis, ...]:
    """The axes that are tuned inside an arm; empty without tuning.

    Raises:
        UserError: the space is invalid.
    """
    if config.tuning is None:
        return ()
    try:
        return parse_space(config.tuning.space, arm)
    except UserError as error:  # the space has the format of a sweep's, but another location in the file
        raise UserError(str(error).replace("sweep.space", "ablation.tuning.space")) from error


# ----------------------------------------------------------------------------
# Entries of the table


def _changes(config: AblationConfig, experiment: ExperimentConfig) -> list[_Change]:
    """Changes of each entry; for a factor, of each level except the first, which is the baseline's."""
    table = TABLES[config.design]
    if not config.table:
        raise UserError(f"ablation.{table} is empty: an ablation needs arms to compare; write {_EXAMPLES[table]}.")
    if table == "factors":
        _check_factors(config)
        return [change for name, levels in config.factors.items() for change in _levels(name, levels, experiment)]
    found = []
    for name, given in config.table.items():
        where = f"ablation.{table}.{name}"
        _require_name(where, name)
        change = _Change(where, str(name), _settings(where, given, experiment))
        _require_changed(change, given)
        found.append(change)
    return found


def _require_name(where: str, name: object) -> None:
    if not isinstance(name, str) or not _NAME.fullmatch(name):
        shown = " ".join(where.split())[:_SHOWN]
        raise UserError(f"{shown} is not a name for an arm: use 1 to 40 letters, digits, dots, dashes or underscores.")
    if name == BASELINE:
        raise UserError(f"{where} is the reserved name of the unchanged arm: choose another.")


def _check_factors(config: AblationConfig) -> None:
    if config.design == "fractional" and len(config.factors) > MAX_FACTORS:
        raise UserError(
            f"ablation.factors has {len(config.factors)} entries: design=fractional takes at most {MAX_FACTORS}."
        )
    for name, levels in config.factors.items():
        where = f"ablation.factors.{name}"
        _require_name(where, name)
        if not isinstance(levels, Mapping):
            raise UserError(f"{where} is {levels!r}: it must be a group of levels, like {_EXAMPLES['factors']}.")
        if len(levels) < 2:
            raise UserError(
                f"{where} has fewer than two levels: give at least two, that of the baseline first, like {{own: {{}}}}."
            )
        if config.design == "fractional" and len(levels) != 2:
            raise UserError(f"{where} has {len(levels)} levels: design=fractional takes two; use design=factorial.")
        for level in levels:
            _require_name(f"{where}.{level}", level)
    if (
        config.design == "fractional"
        and smallest_fraction(list(config.factors), config.resolution or 4).resolution is None
    ):
        raise UserError(
            f"ablation.factors has {len(config.factors)} entries, too few for a fractional design of resolution "
            f"{config.resolution or 4}: use design=factorial, which runs all combinations, or add factors."
        )


def _levels(factor: str, levels: Table, experiment: ExperimentConfig) -> Iterator[_Change]:
    for index, (level, given) in enumerate(levels.items()):
        where = f"ablation.factors.{factor}.{level}"
        change = _Change(where, level, _settings(where, given, experiment), factor)
        if index:
            _require_changed(change, given)
            yield change
        elif change.settings:
            path, value = next(iter(change.settings.items()))
            raise UserError(
                f"{where} is the first level, which must be the baseline's own, but it changes {path} from "
                f"{show(value_at(experiment, path))} to {show(value)}: put the baseline's level first, or write {{}}."
            )


def _require_changed(change: _Change, given: Mapping[str, Any]) -> None:
    if change.settings:
        return
    named = flat(given)
    if not named:
        raise UserError(f"{change.where} equals the baseline, since it changes nothing: name a setting.")
    path, value = next(iter(named.items()))
    raise UserError(f"{change.where} equals the baseline, where {path} is {show(value)} already: leave it out.")


def _settings(where: str, given: Any, experiment: ExperimentConfig) -> dict[str, Value]:
    """The settings of an entry that differ from the baseline, normalized by the experiment's config.

    A group changes only the settings that are given in it.
    """
    if not isinstance(given, Mapping):
        raise UserError(f"{where} is {given!r}: it must be a group of settings, like {{algorithm.entropy_coef: 0}}.")
    known, named = to_tree(experiment), {}
    for path, value in leaves_of(given):
        if path in named:
            raise UserError(f"{where} names {path} twice: keep one.")
        named[path] = value
    named = named_settings(ExperimentConfig, known, named)
    try:
        known = with_kinds(ExperimentConfig, known, named)
    except UserError as error:
        raise UserError(f"{where} is refused: {error}") from error
    for path in named:
        require_setting(f"{where}.{path}", path, known, _FIXED)
    try:
        built = configured(experiment, named)
    except UserError as error:
        raise UserError(f"{where} is refused: {error}") from error
    return _changed(experiment, built, named)


def _changed(experiment: ExperimentConfig, built: ExperimentConfig, named: Mapping[str, Value]) -> dict[str, Value]:
    """The named settings that differ from the baseline, with their values as built."""
    changes = settings_between(ExperimentConfig, to_tree(experiment), to_tree(built))
    return {path: changes[path] for path in named if path in changes}


# ----------------------------------------------------------------------------
# Arms


def _combined(config: AblationConfig, changes: Sequence[_Change]) -> list[Arm]:
    """The baseline and the arms that the design forms from the changes."""
    if config.design in ("factorial", "fractional"):
        return _cells(config, changes)
    if config.design == "leave_one_out":
        found = [Arm(f"without_{change.name}", change.settings) for change in changes]
        found += [Arm(_ALL_OFF, _union(changes))] if config.all_off else []
    else:
        found = [Arm(change.name, change.settings) for change in changes]
    _require_number(len(found) + 1)
    return [Arm(BASELINE), *found]


def _cells(config: AblationConfig, changes: Sequence[_Change]) -> list[Arm]:
    """One arm per combination of levels, the baseline first."""
    by_level = {(change.factor, change.name): change for change in changes}
    design = two_level_design(config)
    _require_number(math.prod(map(len, config.factors.values())) if design is None else design.num_arms)
    names = [list(levels) for levels in config.factors.values()]
    if design is None:
        cells = list(itertools.product(*names))
    else:
        cells = [tuple(pair[int(sign < 0)] for pair, sign in zip(names, row, strict=True)) for row in design.matrix]
    found = []
    for cell in cells:
        levels = dict(zip(config.factors, cell, strict=True))
        changed = [by_level[level] for level in levels.items() if level in by_level]
        name = ".".join(f"{change.factor}-{change.name}" for change in changed)
        found.append(Arm(name or BASELINE, _union(changed), levels))
    return found


def _require_number(number: int) -> None:
    if number > MAX_ARMS:
        raise UserError(f"The ablation has {number} arms, including the baseline: at most {MAX_ARMS} are allowed.")


def _union(changes: Sequence[_Change]) -> dict[str, Value]:
    """Merge changes that are made together."""
    found: dict[str, Value] = {}
    for change in changes:
        for path in change.settings:
            if any(_overlap(path, other) for other in found):
                raise UserError(f"{change.where} changes {path}, which another entry changes too: keep one.")
        found |= change.settings
    return found


def _overlap(one: str, other: str) -> bool:
    """Whether two paths are equal, or one is inside the other."""
    return f"{one}.".startswith(f"{other}.") or f"{other}.".startswith(f"{one}.")


# ----------------------------------------------------------------------------
# Checks


def _require_distinct(found: Sequence[Arm], experiment: ExperimentConfig) -> None:
    """Check that names (ignoring case) and configs are distinct, and that every arm's config is valid."""
    names: dict[str, str] = {}
    owners: dict[str, str] = {}
    for arm in found:
        if (other := names.get(arm.name.casefold())) is not None:
            called = arm.name if arm.name == other else f"{other} and {arm.name}, which differ only in case"
            raise UserError(f"Two arms of the ablation are called {called}: rename one.")
        names[arm.name.casefold()] = arm.name
        try:
            signature = arm.config(experiment).signature
        except UserError as error:
            raise UserError(f"The arm {arm.name} of the ablation is refused: {error}") from error
        owner = owners.setdefault(signature, arm.name)
        if owner != arm.name:
            raise UserError(f"The arms {owner} and {arm.name} of the ablation are equal: leave one of them out.")


def _require_effects(changes: Sequence[_Change], found: Sequence[Arm], experiment: ExperimentConfig) -> None:
    """Reject changes without effect under the baseline, parts of a change without further effect, and equal arms."""
    alone = [configured(experiment, change.settings) for change in changes]
    whole = [arm.config(experiment) for arm in found]
    parts = [list(_without_one(change, experiment)) for change in changes]
    from tune.plans.inert_settings import digests  # noqa: PLC0415  (it imports PyTorch)

    told = digests([experiment, *alone, *whole, *(config for rest in parts for _, config in rest)])
    for change, config, rest in zip(changes, alone, parts, strict=True):
        own = told[config.signature]
        if _same(own, told[experiment.signature]):
            raise UserError(
                f"{change.where} has no effect under this baseline: training is bitwise identical with and without the "
                f"change of {' and '.join(change.settings)}. Leave it out."
            )
        for path, without in rest:
            if _same(own, told[without.signature]):
                raise UserError(f"{change.where}.{path} has no effect with the other changes: leave it out.")
    _require_different(found, [told[config.signature] for config in whole])


def _without_one(change: _Change, experiment: ExperimentConfig) -> Iterator[tuple[str, ExperimentConfig]]:
    """For an entry with several settings, yield each path and the config with all the other settings."""
    for path in change.settings if len(change.settings) > 1 else ():
        others = {other: value for other, value in change.settings.items() if other != path}
        try:
            yield path, configured(experiment, others)
        except UserError:  # the other settings need it, so it has an effect
            continue


def _require_different(found: Sequence[Arm], told: Sequence[str | None]) -> None:
    for (one, a), (other, b) in itertools.combinations(zip(found, told, strict=True), 2):
        if _same(a, b):
            raise UserError(
                f"The arms {one.name} and {other.name} of the ablation are trained identically, bit for bit, since no "
                "setting that differs between them has an effect: leave one of them out."
            )


def _same(one: str | None, other: str | None) -> bool:
    return one is not None and one == other


def _check_tuning(config: AblationConfig, experiment: ExperimentConfig, found: Sequence[Arm]) -> None:
    if config.tuning is None:
        return
    for axis in tuning_axes(config, experiment):
        where = f"ablation.tuning.space.{axis.path}"
        if axis.path.partition(".")[0] in _FIXED:
            raise UserError(f"{where} cannot vary: {_FIXED[axis.path.partition('.')[0]]}.")
        for arm in found:
            if any(_overlap(axis.path, path) for path in arm.changes):
                raise UserError(f"{where} would overwrite a change of the arm {arm.name}: tune another setting.")
    for arm in found:
        try:
            tuning_axes(config, arm.config(experiment))
        except UserError as error:
            raise UserError(f"The arm {arm.name} of the ablation cannot be tuned: {error}") from error
    if config.tuning.seed in config.seeds.numbers(experiment.seed):
        raise UserError(
            f"ablation.tuning.seed is {config.tuning.seed}, one of the seeds that are compared: choose another."
        )
