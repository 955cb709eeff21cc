"""The search space: the settings that a sweep varies, and their ranges.

A sweep file has one line per setting, with its path in the experiment's config:

    algorithm.policy.lr: {log_uniform: [1.0e-6, 1.0e-4]}
    algorithm.entropy_coef: {uniform: [0, 1]}
    schedule.num_steps: {integer: [3, 8]}
    algorithm.preset: {choice: [as_released, objective]}
    schedule: {choice: [var_quadratic, step_linear]}             options of a config group
    schedule: {choice: {few: {num_steps: 3}, many: {num_steps: 10}}}      groups of settings by name

A different kind (schedule.kind: {choice: [var, step]}) replaces the whole block by its defaults. A grid needs finitely
many values, so ranges give their number: {log_uniform: [1.0e-6, 1.0e-4], points: 5}.
"""

import copy
import difflib
import json
import math
import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from dxmi.config import build, to_tree, unknown_key, value_of, with_settings
from dxmi.errors import UserError
from dxmi.training.config import ExperimentConfig
from tune.config.sweep import KINDS

if TYPE_CHECKING:
    from optuna.distributions import BaseDistribution

_EXAMPLE = "write one of {log_uniform: [1.0e-6, 1.0e-4]}, {uniform: [0, 1]}, {integer: [3, 8]}, {choice: [a, b]}"
FIXED = {
    "resources": "it changes no result",
    "evaluate": "trials that are measured differently cannot be compared",
    "name": "it changes no result",
}
"""Groups of settings that cannot vary in a study, and why."""
_MAX_GRID = 100_000
_CLOSE_TO_1 = 0.99

Value = Any
Param = str | float | int | bool | None


@dataclass(frozen=True)
class Axis:
    """One setting that varies.

    Attributes:
        path: Path of the setting, like algorithm.policy.lr.
        kind: One of KINDS.
        low: Lower bound of a range.
        high: Upper bound of a range, inclusive.
        choices: Values of a choice, in the order of the file.
        points: Number of values of a range in a grid; 0 if the file does not specify it.
        groups: Settings of each group by name, if the choice is between groups of settings; the names are the choices.
    """

    path: str
    kind: str
    low: float = 0.0
    high: float = 0.0
    choices: tuple[Value, ...] = ()
    points: int = 0
    groups: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    def settings(self, value: Value) -> Value:
        """The config value for a value of the axis: the value itself, or the settings of the group with that name."""
        return self.groups[value] if self.groups else value

    def own(self, experiment: ExperimentConfig) -> Value:
        """The experiment's own value, or the name of the first group of settings that does not change it."""
        if not self.groups:
            return value_at(experiment, self.path)
        same = (name for name in self.choices if configured(experiment, {self.path: self.groups[name]}) == experiment)
        return next(same, "none of these")

    @property
    def distribution(self) -> "BaseDistribution":
        """The corresponding distribution in Optuna."""
        from optuna.distributions import (  # noqa: PLC0415  (Optuna loads 400 modules)
            CategoricalDistribution,
            FloatDistribution,
            IntDistribution,
        )

        if self.kind == "choice":
            return CategoricalDistribution([self.param(value) for value in self.choices])
        if self.kind == "integer":
            return IntDistribution(int(self.low), int(self.high))
        return FloatDistribution(self.low, self.high, log=self.kind == "log_uniform")

    def param(self, value: Value) -> Param:
        """Value as stored by Optuna: unchanged, or JSON text if it is a list, with numbers written as in the file."""
        if value is None or isinstance(value, (str, int, float, bool)):
            return value
        return json.dumps(next(choice for choice in self.choices if _same(choice, value)))

    def value(self, param: Param) -> Value:
        """The inverse of `param`."""
        if self.kind != "choice":
            return param
        return next(value for value in self.choices if _same(self.param(value), param))

    def contains(self, value: Value) -> bool:
        """Whether the value lies in the range or is one of the choices."""
        if self.kind == "choice":
            return any(_same(choice, value) for choice in self.choices)
        is_number = isinstance(value, (int, float)) and not isinstance(value, bool)
        is_inside = is_number and self.low <= value <= self.high
        return is_inside and (self.kind != "integer" or value == int(value))

    def at(self, unit: float) -> Value:
        """Map `unit` in [0, 1) to a value; uniform `unit` gives values distributed according to the kind."""
        if self.kind == "choice":
            return self.choices[int(unit * len(self.choices))]
        if self.kind == "integer":
            return int(self.low) + int(unit * (int(self.high) - int(self.low) + 1))
        if self.kind == "log_uniform":
            value = self.low ** (1.0 - unit) * self.high**unit
        else:
            value = self.low * (1.0 - unit) + self.high * unit
        return min(max(value, self.low), self.high)  # rounding may leave the range

    def grid(self) -> list[Value]:
        """The values of this axis in a grid.

        Raises:
            UserError: a continuous range has no `points`, or there are too many values.
        """
        if self.kind == "choice":
            return list(self.choices)
        if self.kind != "integer" and not self.points:
            raise UserError(
                f"sweep.space.{self.path} has infinitely many values: for a grid, give their number as points, "
                f"like {{{self.kind}: [{self.low:g}, {self.high:g}], points: 5}}."
            )
        count = self.points or int(self.high) - int(self.low) + 1
        if count > _MAX_GRID:
            raise UserError(f"sweep.space.{self.path} has {count:,} values: a grid may have at most {_MAX_GRID:,}.")
        if not self.points:
            return list(range(int(self.low), int(self.high) + 1))
        units = [index / (self.points - 1) for index in range(self.points)] if self.points > 1 else [0.5]
        if self.kind == "integer":
            return list(dict.fromkeys(round(self.low + (self.high - self.low) * unit) for unit in units))
        return [self.at(unit) for unit in units]

    def __str__(self) -> str:
        if self.kind == "choice":
            return "one of " + ", ".join(show(value) for value in self.choices)
        return f"{self.kind.replace('_', '-')} in [{self.low:g}, {self.high:g}]"


def show(value: Value) -> str:
    """Format a value for messages: short numbers, text without quotes.

    Numbers have three significant digits; those close below 1, such as decays, are shown by their distance from 1.
    """
    if isinstance(value, float) and _CLOSE_TO_1 < value < 1.0:
        return f"{value:.{2 - math.floor(math.log10(1.0 - value))}f}".rstrip("0")
    if isinstance(value, float):
        return f"{value:.3g}"
    return value if isinstance(value, str) else json.dumps(value, default=str)


def _same(one: Value, other: Value) -> bool:
    """Whether two values are equal, where True and 1 count as different."""
    return bool(one == other) and isinstance(one, bool) == isinstance(other, bool)


# ----------------------------------------------------------------------------
# From a sweep file


def parse_space(tree: Any, experiment: ExperimentConfig, *, is_checked: bool = True) -> tuple[Axis, ...]:
    """Parse the `space` of a sweep file into axes, in the same order.

    Raises:
        UserError: a path is not a setting of the experiment (the message suggests the closest one), a range is empty or
            reversed, a log range includes 0, a choice is empty, or a bound is invalid for the experiment.
    """
    specs: dict[str, Mapping[str, Any]] = {}
    for path, spec in _specs(tree, ""):
        if path in specs:
            raise UserError(f"sweep.space.{path} is given twice: keep one.")
        specs[path] = spec
    if not specs:
        raise UserError(f"sweep.space is empty: a sweep must vary at least one setting; {_EXAMPLE}.")
    known = to_tree(experiment)
    axes = []
    for path, spec in specs.items():
        axis = _axis(path, spec)
        if is_checked:
            require_setting(f"sweep.space.{path}", path, known, is_group=bool(axis.groups))
            _check_values(axis, experiment)
        axes.append(axis)
    return tuple(axes)


def _specs(tree: Any, path: str) -> Iterator[tuple[str, Mapping[str, Any]]]:
    """Yield (path, spec) of each setting; groups may be nested or written with dots."""
    where = f"sweep.space.{path}".rstrip(".")
    if not isinstance(tree, Mapping):
        raise UserError(f"{where} is {tree!r}: {_EXAMPLE}.")
    if any(kind in tree for kind in KINDS):
        yield path, tree
        return
    for key, value in tree.items():
        yield from _specs(value, f"{path}.{key}" if path else str(key))


def require_setting(
    where: str, path: str, known: Mapping[str, Any], fixed: Mapping[str, str] = FIXED, *, is_group: bool = False
) -> None:
    """Check that `path` is a setting (or a group of settings) of an experiment, and that it may vary.

    Args:
        where: Location of the path in its file, for messages.
        path: Dotted path.
        known: The experiment as a nested dictionary.
        fixed: Groups that must not vary, and why.
        is_group: Whether the path must be that of a group of settings instead of a single setting.

    Raises:
        UserError: the path is not a setting (the message suggests the closest one), is a group where a single setting
            is expected or vice versa, or is fixed.
    """
    tree: Any = known
    group = path.partition(".")[0]
    if group in fixed:
        raise UserError(f"{where} cannot vary: {fixed[group]}.")
    for part in path.split("."):
        if not isinstance(tree, Mapping) or part not in tree:
            every = [name for name in flat(known) if name.partition(".")[0] not in fixed]
            near = difflib.get_close_matches(path, every, n=1, cutoff=0.5)
            groups = [name for name in known if name not in fixed]
            raise UserError(unknown_key(where, path, near or groups))
        tree = tree[part]
    if isinstance(tree, Mapping) and not is_group:
        raise UserError(f"{where} is a group of settings: name one of them, like {path}.{next(iter(tree))}.")
    if is_group and not isinstance(tree, Mapping):
        raise UserError(f"{where} is one setting, not a group: give its choices as a list.")


def _axis(path: str, spec: Mapping[str, Any]) -> Axis:
    where = f"sweep.space.{path}"
    kinds = [kind for kind in KINDS if kind in spec]
    extra = [str(key) for key in spec if key not in (*KINDS, "points")]
    if len(kinds) != 1 or extra:
        raise UserError(f"{where} is {dict(spec)!r}: {_EXAMPLE}.")
    kind, body = kinds[0], spec[kinds[0]]
    if kind == "choice" and isinstance(body, Mapping):
        _check_groups(f"{where}.choice", body)
        return Axis(path, kind, choices=_choices(where, [*body], spec), groups=copy.deepcopy(dict(body)))
    if not isinstance(body, Sequence) or isinstance(body, str):
        raise UserError(f"{where}.{kind} is {body!r}: it must be a list.")
    if kind == "choice":
        return Axis(path, kind, choices=_choices(where, body, spec))
    low, high = _bounds(f"{where}.{kind}", kind, body)
    points = spec.get("points", 0)
    if not isinstance(points, int) or isinstance(points, bool) or not (points >= 1 or "points" not in spec):
        raise UserError(f"{where}.points is {points!r}: it must be a whole number of at least 1.")
    return Axis(path, kind, low, high, points=points)


def _choices(where: str, body: Sequence[Any], spec: Mapping[str, Any]) -> tuple[Value, ...]:
    if "points" in spec:
        raise UserError(f"{where}.points has no effect on a choice: leave it out.")
    if not body:
        raise UserError(f"{where}.choice is empty: name at least one value.")
    for index, value in enumerate(body):
        if any(_same(value, other) for other in body[:index]):
            raise UserError(f"{where}.choice names {value!r} twice.")
    return tuple(copy.deepcopy(list(body)))


def _check_groups(where: str, body: Mapping[Any, Any]) -> None:
    for name, settings in body.items():
        if not isinstance(name, str) or not isinstance(settings, Mapping):
            raise UserError(f"{where}.{name} is {settings!r}: it must be a name with a group of settings.")


def _bounds(where: str, kind: str, body: Sequence[Any]) -> tuple[float, float]:
    largest = sys.float_info.max
    numbers = [n for n in body if isinstance(n, (int, float)) and not isinstance(n, bool) and abs(n) <= largest]
    if len(body) != 2 or len(numbers) != 2:
        hint = " YAML reads 1e-6 as text: write 1.0e-6." if any(isinstance(n, str) for n in body) else ""
        raise UserError(f"{where} is {list(body)!r}: it must be [low, high], two finite numbers.{hint}")
    low, high = numbers
    if low > high:
        raise UserError(f"{where} is [{low}, {high}]: low is above high.")
    if low == high:
        raise UserError(f"{where} is [{low}, {high}]: a range needs two different bounds; use an override instead.")
    if kind == "log_uniform" and low <= 0:
        raise UserError(f"{where} is [{low}, {high}]: a log range must begin above 0.")
    if kind == "integer" and (low != int(low) or high != int(high)):
        raise UserError(f"{where} is [{low}, {high}]: both must be whole numbers.")
    return (int(low), int(high)) if kind == "integer" else (float(low), float(high))


def _check_values(axis: Axis, experiment: ExperimentConfig) -> None:
    """Validate bounds and choices with the experiment's own checks, before any trial starts."""
    for value in axis.choices or (axis.low, axis.high):
        try:
            configured(experiment, {axis.path: axis.settings(value)})
        except UserError as error:
            raise UserError(f"sweep.space.{axis.path} cannot take {show(value)}: {error}") from error


# ----------------------------------------------------------------------------
# Values in a config


def flat(tree: Mapping[str, Any], path: str = "") -> dict[str, Any]:
    """Every setting by its dotted path."""
    found: dict[str, Any] = {}
    for key, value in tree.items():
        where = f"{path}.{key}" if path else str(key)
        found |= flat(value, where) if isinstance(value, Mapping) else {where: value}
    return found


def configured(experiment: ExperimentConfig, values: Mapping[str, Value]) -> ExperimentConfig:
    """The experiment with new values at some paths.

    Raises:
        UserError: the result is invalid.
    """
    return build(ExperimentConfig, tree_with(experiment, values))


def tree_with(experiment: ExperimentConfig, values: Mapping[str, Value]) -> dict[str, Any]:
    """The experiment as a nested dictionary with new values, which are not validated; see `with_settings`."""
    return with_settings(ExperimentConfig, to_tree(experiment), values)


def value_at(experiment: ExperimentConfig, path: str) -> Value:
    """The experiment's own value of a setting."""
    return value_of(to_tree(experiment), path)


def grid_points(axes: Sequence[Axis]) -> list[dict[str, Value]]:
    """All combinations of the axes' grid values, the last axis varying fastest.

    Raises:
        UserError: there are too many.
    """
    lists = [axis.grid() for axis in axes]
    size = math.prod(len(values) for values in lists)
    if size > _MAX_GRID:
        raise UserError(f"The grid of sweep.space has {size:,} points: at most {_MAX_GRID:,} are allowed.")
    points: list[dict[str, Value]] = [{}]
    for axis, values in zip(axes, lists, strict=True):
        points = [{**point, axis.path: value} for point in points for value in values]
    return points
