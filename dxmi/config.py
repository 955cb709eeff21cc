"""From a tree of plain values to frozen dataclasses and back, with a sentence for every mistake.

A config is a frozen dataclass in a module that does not import PyTorch; its `__post_init__` raises a ValueError that
begins with the field's name. `build` turns nested mappings (from YAML, from Hydra) into such an object and names the
full path of what is wrong.
"""

import difflib
import hashlib
import json
import types
import typing
from collections.abc import Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from typing import Any, TypeVar

from dxmi.errors import UserError
from dxmi.registry import Registry, registry_of

T = TypeVar("T")

_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def build(cls: type[T], tree: Any, path: str = "") -> T:
    """An object of the dataclass `cls` from nested mappings.

    Args:
        cls: the config class.
        tree: field names to values; a missing field takes its default.
        path: where in the whole config this tree stands, for messages.

    Raises:
        UserError: an unknown field (the nearest known one is named), a value of the wrong type, or one refused.
    """
    if not isinstance(tree, Mapping):
        raise UserError(f"{path or 'The config'} is {tree!r}: it must be a group of settings.")
    hints = typing.get_type_hints(cls)
    known = {f.name: f for f in fields(cls)}  # type: ignore[arg-type]
    for key in tree:
        if key not in known:
            raise UserError(unknown_key(f"{path}.{key}" if path else str(key), str(key), list(known)))
    values = {
        key: _field_value(known[key], hints[key], value, f"{path}.{key}" if path else key)
        for key, value in tree.items()
    }
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{path}.{error}." if path else f"{error}.") from error


def unknown_key(where: str, key: str, known: list[str]) -> str:
    """The sentence about a key that does not exist, with the nearest one that does."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    hint = f"did you mean {near[0]}?" if near else f"known here: {', '.join(known)}."
    return f"{where} is not a setting: {hint}"


def _field_value(own: Field[Any], hint: Any, value: Any, path: str) -> Any:
    """`value` as the field asks for it; where it names a registry, as the class of its tree's `kind`."""
    registry = registry_of(own.metadata)
    if registry is None:
        return _value(hint, value, path)
    default = default_of(own)
    if value is None and default is None:
        return None
    if _holds_several(hint):
        if not isinstance(value, (list, tuple)) or not value:
            raise UserError(f"{path} is {value!r}: it must be a list of kinds, like [{registry.kinds()[0]}], or null.")
        return tuple(_of_kind(registry, one, None, f"{path}[{index}]") for index, one in enumerate(value))
    return _of_kind(registry, value, None if default is None else default.kind, path)


def _holds_several(hint: Any) -> bool:
    """Whether a field holds a tuple, or null."""
    return any(typing.get_origin(one) is tuple for one in (hint, *typing.get_args(hint)))


def _of_kind(registry: Registry[Any], value: Any, default: str | None, path: str) -> Any:
    """The config of one thing, from the name of its kind or from a group of settings."""
    tree = {"kind": value} if isinstance(value, str) else value
    if not isinstance(tree, Mapping):
        raise UserError(
            f"{path} is {value!r}: it must be a group of settings, or one of {', '.join(registry.kinds())}."
        )
    return build(kind_class(registry, tree.get("kind", default), path), tree, path)


def default_of(own: Field[Any]) -> Any:
    """The default of a config's field."""
    return own.default if own.default_factory is MISSING else own.default_factory()


def kind_class(registry: Registry[Any], kind: object, path: str) -> type[Any]:
    """The config class that `kind`, which stands at `path`, names.

    Raises:
        UserError: there is no such kind.
    """
    if not isinstance(kind, str) or kind not in registry.kinds():
        raise UserError(f"{registry.refusal(f'{path}.kind', kind)}.")
    return registry.config_class(kind)


def _value(hint: Any, value: Any, path: str) -> Any:
    """`value` as the type `hint` asks for."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # only `X | None` occurs
        if value is None:
            return None
        return _value(next(arg for arg in args if arg is not type(None)), value, path)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not value:
            raise UserError(f"{path} is {value!r}: it must be a list with something in it, like [2, 1].")
        return tuple(_value(args[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, path)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise UserError(f"{path} is too large a number.") from error
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise UserError(f"{path} is {value!r}: it must be {_WORDS[hint]}.")
    return value


def places(cls: type, path: str = "") -> list[str]:
    """Paths of the settings below `cls` that hold a path or an address, see `dxmi.persistence.files.PLACE`."""
    hints, found = typing.get_type_hints(cls), []
    for one in fields(cls):
        where = f"{path}.{one.name}" if path else one.name
        if one.metadata.get("is_place"):
            found.append(where)
        elif is_dataclass(hints[one.name]):
            found += places(typing.cast("type", hints[one.name]), where)
    return found


def to_tree(config: Any) -> dict[str, Any]:
    """The inverse of `build`: nested dicts, lists and scalars that YAML and JSON can hold."""
    return typing.cast("dict[str, Any]", json.loads(json.dumps(asdict(config))))


def signature(tree: Any) -> str:
    """The first 12 hex digits of the sha256 of a tree of plain values, whatever the order of its keys."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """What changed between two trees, one `path: old -> new` a line."""
    lines = []
    for key in sorted({*old, *new}):
        where = f"{path}.{key}" if path else key
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, where)
        elif before != after:
            lines.append(f"{where}: {before} -> {after}")
    return lines
