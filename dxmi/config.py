"""Conversion between trees of plain values and frozen dataclasses, with an error message for every mistake.

A config is a frozen dataclass in a module that does not import PyTorch. Its `__post_init__` raises a ValueError whose
message begins with the name of the field. `build` turns nested mappings (from YAML or Hydra) into a config; its errors
contain the full path of the setting. Defaults are defined only in the dataclasses.

Some settings are blocks: the metadata of the field names a registry (`dxmi.registry.chosen_from`), and `kind` in the
tree of the block chooses its class. A change of the kind replaces the whole block, see `with_settings`.

A config is identified by the settings that differ from the defaults, see `delta`.
"""

import difflib
import functools
import hashlib
import json
import types
import typing
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import MISSING, Field, asdict, fields, is_dataclass
from typing import Any, TypeVar

from dxmi.errors import UserError
from dxmi.registry import Registry, registry_of

T = TypeVar("T")
Tree = dict[str, Any]

RESULT, SCORES = "result", "scores"
"""Names of the two identities: that of the result of a config, and that of the scores of given weights."""
NO_RESULT: Mapping[str, Any] = {"not_in": frozenset({RESULT, SCORES})}
"""Metadata of a field that does not change the result: it is not part of any identity."""
NO_SCORE: Mapping[str, Any] = {"not_in": frozenset({SCORES})}
"""Metadata of a field that does not change the scores of given weights, or that the scorer's identity covers."""

_type_hints = functools.cache(typing.get_type_hints)
_WORDS = {int: "a whole number", float: "a number", str: "text", bool: "true or false"}


def require_choice(name: str, value: object, choices: Iterable[str], *, or_null: bool = False) -> None:
    """Raise a ValueError that names the field, its value and the choices, unless the value is one of them (or null)."""
    choices = tuple(choices)
    if value not in choices and not (or_null and value is None):
        end = ", or null" if or_null else ""
        raise ValueError(f"{name} is {value!r}: it must be one of {', '.join(choices)}{end}")


# ----------------------------------------------------------------------------
# Conversion from a tree to a config and back


def build(cls: type[T], tree: Any, path: str = "", base: T | None = None) -> T:
    """Create an object of the dataclass `cls` from nested mappings.

    Args:
        cls: the config class.
        tree: values by field name; a missing field takes its default.
        path: path of this tree in the whole config, for messages.
        base: config that supplies the defaults instead of `cls`.

    Raises:
        UserError: a field is unknown (the message suggests the closest known one), a value is missing or has the wrong
            type, or the config class rejects a value.
    """
    known = _known_fields(cls)
    for key in _group(tree, path):
        if key not in known:
            raise UserError(unknown_key(_joined(path, key), str(key), list(known), _kind(cls)))
    hints = _type_hints(typing.cast("Any", cls))
    values: Tree = {} if base is None else {name: getattr(base, name) for name in known}
    for key, own in known.items():
        where, default = _joined(path, key), values.get(key, default_of(own))
        if key in tree and not (default is MISSING and tree[key] is None):
            values[key] = _field_value(own, hints[key], tree[key], where, default)
        elif default is MISSING:
            raise UserError(f"{where} is missing: it must be {_WORDS.get(hints[key], 'given')}.")
    try:
        return cls(**values)
    except ValueError as error:
        raise UserError(f"{_joined(path, str(error))}.") from error


def to_tree(config: Any) -> Tree:
    """The inverse of `build`: nested dicts, lists and scalars that YAML and JSON can represent."""
    return typing.cast("Tree", json.loads(json.dumps(asdict(config))))


def default_of(own: Field[Any]) -> Any:
    """The default of a config's field; MISSING if it has none."""
    return own.default if own.default_factory is MISSING else own.default_factory()


def unknown_key(where: str, key: str, known: list[str], kind: str | None = None) -> str:
    """The error message for an unknown key, with the closest known one; `kind` is the kind of the block, if any."""
    near = difflib.get_close_matches(key, known, n=1, cutoff=0.5)
    above, _, below = where.partition(f"{key}.")
    meant = [f"{above}{name}.{below}" if below else name for name in near]
    hint = f"did you mean {meant[0]}?" if meant else f"known here: {', '.join(known)}."
    return f"{where} is not a setting{'' if kind is None else f' of {kind}'}: {hint}"


def kind_class(registry: Registry[Any], kind: object, path: str) -> type[Any]:
    """The config class of a kind; `path` is the path of the block, for messages.

    Raises:
        UserError: there is no such kind.
    """
    if not isinstance(kind, str) or kind not in registry.kinds():
        raise UserError(f"{registry.refusal(f'{path}.kind', kind)}.")
    return registry.config_class(kind)


def _group(tree: Any, path: str) -> Mapping[str, Any]:
    if not isinstance(tree, Mapping):
        raise UserError(f"{path or 'The config'} is {tree!r}: it must be a group of settings.")
    return tree


def _joined(path: str, key: object) -> str:
    return f"{path}.{key}" if path else str(key)


def _known_fields(cls: type) -> dict[str, Field[Any]]:
    return {own.name: own for own in fields(cls)}


def _field_value(own: Field[Any], hint: Any, value: Any, path: str, default: Any) -> Any:
    """Convert `value` to the type of the field; for a block, to the config class of its `kind`."""
    registry = registry_of(own.metadata)
    if registry is None or (value is None and type(None) in typing.get_args(hint)):
        return _value(hint, value, path, default)
    if not _holds_several(hint):
        return _of_kind(registry, value, path, _kind(default))
    if not isinstance(value, (list, tuple)) or not value:
        raise UserError(f"{path} is {value!r}: it must be a list of kinds, like [{registry.kinds()[0]}], or null.")
    return tuple(_of_kind(registry, item, f"{path}[{index}]", None) for index, item in enumerate(value))


def _holds_several(hint: Any) -> bool:
    """Whether a field holds a tuple (or a tuple or null)."""
    return any(typing.get_origin(one) is tuple for one in (hint, *typing.get_args(hint)))


def _of_kind(registry: Registry[Any], value: Any, path: str, kind: str | None) -> Any:
    """Build a config from the name of a kind or from a group of settings; `kind` applies if the group has none."""
    tree = _as_block(value)
    if not isinstance(tree, Mapping):
        raise UserError(
            f"{path} is {value!r}: it must be a group of settings, or one of {', '.join(registry.kinds())}."
        )
    return build(kind_class(registry, tree.get("kind", kind), path), tree, path)


def _as_block(value: Any) -> Any:
    """Expand the name of a kind to a block with that kind; other values are returned unchanged."""
    return {"kind": value} if isinstance(value, str) else value


def _kind(block: Any) -> str | None:
    """The kind of a config or of a config class, if it has one."""
    kind = getattr(block, "kind", None)
    return kind if isinstance(kind, str) else None


def _value(hint: Any, value: Any, path: str, default: Any = None) -> Any:
    """Convert `value` to the type `hint`."""
    origin, args = typing.get_origin(hint), typing.get_args(hint)
    if origin in (types.UnionType, typing.Union):  # only `X | None` occurs
        if value is None:
            return None
        return _value(next(arg for arg in args if arg is not type(None)), value, path, default)
    if origin is tuple:
        if not isinstance(value, (list, tuple)) or not value:
            raise UserError(f"{path} is {value!r}: it must be a list with something in it, like [2, 1].")
        return tuple(_value(args[0], item, f"{path}[{index}]") for index, item in enumerate(value))
    if is_dataclass(hint):
        return build(typing.cast("type[Any]", hint), value, path, default if type(default) is hint else None)
    if hint is float and isinstance(value, int) and not isinstance(value, bool):
        try:
            return float(value)
        except OverflowError as error:
            raise UserError(f"{path} is too large a number.") from error
    if not isinstance(value, hint) or (hint is not bool and isinstance(value, bool)):
        raise UserError(f"{path} is {value!r}: it must be {_WORDS[hint]}.")
    return value


# ----------------------------------------------------------------------------
# Whole trees, and changes of their values


def completed(cls: type, tree: Any, path: str = "", base: Any = None) -> Tree:
    """Add the default of every setting of `cls` that `tree` leaves out, or None for a setting without a default.

    Unknown keys are kept, and `build` rejects them.
    """
    hints = _type_hints(cls)
    found = dict(_group(tree, path))
    for own in fields(cls):
        default = default_of(own) if base is None else getattr(base, own.name)
        group = _group_class(own, hints[own.name], found.get(own.name, {}), default, _joined(path, own.name))
        if group is not None:
            own_base = default if type(default) is group and registry_of(own.metadata) is None else None
            found[own.name] = completed(group, _as_block(found.get(own.name, {})), _joined(path, own.name), own_base)
        elif own.name not in found:
            found[own.name] = None if default is MISSING else _plain(default)
    return found


def _group_class(own: Field[Any], hint: Any, value: Any, default: Any, path: str) -> type[Any] | None:
    """The config class of a field that holds a group of settings; None for a plain value or an absent block."""
    registry = registry_of(own.metadata)
    if registry is None:
        return hint if is_dataclass(hint) and isinstance(hint, type) and isinstance(value, Mapping) else None
    value = _as_block(value)
    if _holds_several(hint) or not isinstance(value, Mapping) or not (value or default is not None):
        return None
    return kind_class(registry, value.get("kind", _kind(default)), path)


def _plain(value: Any) -> Any:
    return to_tree(value) if is_dataclass(value) else json.loads(json.dumps(value, default=asdict))


def with_settings(cls: type, tree: Mapping[str, Any], settings: Mapping[str, Any]) -> Tree:
    """Change settings of a whole tree; `build` may still reject the result.

    Kinds are changed first, which replaces their whole blocks, see `with_kinds`. The other settings then apply to the
    new blocks. A group of settings changes only the settings that it contains.

    Args:
        cls: the config class.
        tree: whole tree, from `completed` or `to_tree`.
        settings: new values by dotted path.
    """
    found = with_kinds(cls, tree, settings)
    for path, value in named_settings(cls, tree, settings).items():
        if not (value == {} and isinstance(value_of(found, path), Mapping)):  # an empty group changes nothing
            put(found, path, value)
    return found


def with_kinds(cls: type, tree: Mapping[str, Any], settings: Mapping[str, Any]) -> Tree:
    """Change the kinds of a whole tree to those in `settings`; the other settings are ignored.

    The new block has the defaults of its kind. Settings that all kinds share keep their values if these differ from the
    defaults of the old kind.
    """
    found: Tree = json.loads(json.dumps(tree))
    named = named_settings(cls, tree, settings)
    for path in sorted((path for path in named if path.endswith(".kind")), key=lambda path: path.count(".")):
        block = path.removesuffix(".kind")
        place, old = block_at(cls, found, block), value_of(found, block)
        if place is not None and (not isinstance(old, Mapping) or old.get("kind") != named[path]):
            put(found, block, _new_block(place, named[path], old, block))
    return found


def named_settings(cls: type, tree: Mapping[str, Any], settings: Mapping[str, Any]) -> Tree:
    """Flatten settings to single values by dotted path; the name of a kind in place of a block becomes its `.kind`."""
    return {
        f"{path}.kind" if isinstance(value, str) and block_at(cls, tree, path) is not None else path: value
        for path, value in leaves_of(settings)
    }


def settings_between(cls: type, old: Mapping[str, Any], new: Mapping[str, Any]) -> Tree:
    """The smallest set of settings, by path, with which `with_settings` turns the whole tree `old` into `new`."""
    kinds = {
        path: kind
        for path, kind in leaves_of(new)
        if path.endswith(".kind") and block_at(cls, new, path.removesuffix(".kind")) and value_of(old, path) != kind
    }
    before = with_kinds(cls, old, kinds)
    return kinds | {path: value for path, value in leaves_of(new) if value != value_of(before, path)}


class Block(typing.NamedTuple):
    """A place in a config whose class is chosen by its `kind`.

    Attributes:
        registry: registry of its kinds.
        shared: base class of the configs of all kinds.
    """

    registry: Registry[Any]
    shared: type[Any]


def shared_fields(place: Block) -> set[str]:
    """The settings that all kinds of a block have."""
    return set(_known_fields(place.shared))


def block_at(cls: type, tree: Mapping[str, Any], path: str) -> Block | None:
    """The block at a path of a whole tree; None if there is none."""
    name, _, rest = path.partition(".")
    own = _known_fields(cls).get(name)
    if own is None:
        return None
    hint, registry = _type_hints(cls)[name], registry_of(own.metadata)
    shared = next((arg for arg in (hint, *typing.get_args(hint)) if is_dataclass(arg)), None)
    if not rest:
        return Block(registry, typing.cast("type[Any]", shared)) if registry is not None and shared else None
    value = tree.get(name)
    group = _group_class(own, hint, value, default_of(own), name) if isinstance(value, Mapping) else None
    return None if group is None else block_at(group, value or {}, rest)


def _new_block(place: Block, kind: object, old: Any, path: str) -> Tree:
    """The defaults of a kind, except for the shared settings that differ from their defaults in the block `old`."""
    new = kind_class(place.registry, kind, path)
    kept: Tree = {}
    if isinstance(old, Mapping):
        before = completed(kind_class(place.registry, old.get("kind"), path), {}, path)
        kept = {name: old[name] for name in _known_fields(place.shared) if old.get(name) != before.get(name)}
    return completed(new, {**kept, "kind": kind}, path)


def leaves_of(tree: Mapping[str, Any], path: str = "") -> Iterator[tuple[str, Any]]:
    """Yield (path, value) of each setting; groups may be nested or written with dots."""
    for key, value in tree.items():
        where = _joined(path, key)
        if isinstance(value, Mapping) and value:
            yield from leaves_of(value, where)
        else:
            yield where, value


def value_of(tree: Mapping[str, Any], path: str) -> Any:
    """The value or group at a dotted path; None if it does not exist."""
    value: Any = tree
    for name in path.split("."):
        value = value.get(name) if isinstance(value, Mapping) else None
    return value


def put(tree: Tree, path: str, value: Any) -> None:
    """Set the value or group at a dotted path.

    Raises:
        UserError: the path leads through a value that is not a group.
    """
    *above, last = path.split(".")
    group: Any = tree
    for name in above:
        group = group.setdefault(name, {}) if isinstance(group, dict) else None
    if not isinstance(group, dict):
        raise UserError(f"{path} is not a setting: {above[-1]} is a value.")
    group[last] = value


def is_place(cls: type, path: str) -> bool:
    """Whether a setting holds a path or an address, see `dxmi.persistence.files.PLACE`.

    Config classes of kinds are imported only for the blocks on the path.
    """
    name, _, rest = path.partition(".")
    own = _known_fields(cls).get(name)
    if own is None or not rest:
        return own is not None and bool(own.metadata.get("is_place"))
    return any(is_place(group, rest) for group in groups_of(cls, own))


def places(cls: type, path: str = "", within: tuple[type, ...] = ()) -> list[str]:
    """The paths of all settings of `cls` that hold a path or an address.

    Args:
        cls: A config class.
        path: Path of the group with this class.
        within: Classes of the groups that contain it; a group within a group of its own class is left out.
    """
    found = []
    for own in fields(cls):
        where = _joined(path, own.name)
        found += [where] if own.metadata.get("is_place") else []
        inner = [group for group in groups_of(cls, own) if group not in (*within, cls)]
        found += [place for group in inner for place in places(group, where, (*within, cls))]
    return list(dict.fromkeys(found))


def groups_of(cls: type, own: Field[Any]) -> list[type]:
    """The config classes that a field of `cls` may hold: one for a group of settings, one per kind for a block."""
    registry = registry_of(own.metadata)
    if registry is not None:
        return [registry.config_class(kind) for kind in registry.kinds()]
    hint = _type_hints(cls)[own.name]
    return [hint] if is_dataclass(hint) and isinstance(hint, type) else []


# ----------------------------------------------------------------------------
# Identity


def delta(config: Any, identity: str | None = None, base: Any = None) -> Tree:
    """The settings that differ from the defaults, as a tree from which `build` recreates the config.

    A block whose kind differs from the default has its `kind`, and the settings that differ from the defaults of that
    kind. The delta of an existing config therefore does not change when a field with a default is added.

    Args:
        config: an object of a config class.
        identity: name of an identity, to omit the fields that are not part of it; None for all fields.
        base: config that supplies the defaults instead of the class.
    """
    found = {}
    for own in fields(config):
        if identity is not None and identity in own.metadata.get("not_in", ()):
            continue
        value, default = getattr(config, own.name), default_of(own) if base is None else getattr(base, own.name)
        change = _change(own, value, default, identity)
        if change is not MISSING:
            found[own.name] = change
    return found


def _change(own: Field[Any], value: Any, default: Any, identity: str | None) -> Any:
    """The value of a field, or the delta of a group, if it differs from the default; else MISSING."""
    if not is_dataclass(value):
        plain = _items(value, identity)
        return plain if default is MISSING or plain != _items(default, identity) else MISSING
    if registry_of(own.metadata) is None:
        changes = delta(value, identity, default if type(default) is type(value) else None)
        return changes if changes or default is None or default is MISSING else MISSING
    is_other = getattr(value, "kind", None) != _kind(default)
    changes = {**({"kind": value.kind} if is_other else {}), **delta(value, identity)}  # type: ignore[union-attr]
    return changes or MISSING


def _items(value: Any, identity: str | None) -> Any:
    if isinstance(value, (tuple, list)):
        return [_items(item, identity) for item in value]
    if not is_dataclass(value):
        return _plain(value)
    return block_delta(value, identity)


def block_delta(config: Any, identity: str | None = None) -> Tree:
    """The kind of a config, if it has one, and the settings that differ from the defaults of that kind."""
    return {**({"kind": config.kind} if hasattr(config, "kind") else {}), **delta(config, identity)}


def identity_tree(config: Any, identity: str) -> Tree:
    """The values of all settings that are part of an identity, including defaults, which `delta` does not show."""
    return {
        own.name: identity_tree(value, identity) if is_dataclass(value) else _plain(value)
        for own in fields(config)
        if identity not in own.metadata.get("not_in", ())
        for value in [getattr(config, own.name)]
    }


def signature(tree: Any) -> str:
    """The first 12 hex digits of the sha256 of a tree of plain values; the order of keys does not matter."""
    return hashlib.sha256(json.dumps(tree, sort_keys=True).encode()).hexdigest()[:12]


def differences(old: Mapping[str, Any], new: Mapping[str, Any], path: str = "") -> list[str]:
    """The differences between two trees, one line `path: old -> new` for each."""
    lines = []
    for key in sorted({*old, *new}):
        where = _joined(path, key)
        before, after = old.get(key), new.get(key)
        if isinstance(before, Mapping) and isinstance(after, Mapping):
            lines += differences(before, after, where)
        elif before != after:
            lines.append(f"{where}: {before} -> {after}")
    return lines
