"""Configs as files hold them: with the version of their schema, and those of earlier versions.

Schema 1 (dxmi 0.1) has one flat group `data` with a `name`, one flat group `schedule` with a `method`, and identifies a
run by its whole config. Schema 2 has a class for each kind of data set and schedule, and identifies a run by what
differs from the defaults.

A run or a study of an earlier schema can be read, scored again and sampled from. It cannot be continued: what the
defaults mean, or what tells two runs apart, has changed since.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, TypeVar

from dxmi.config import Tree, build, signature, to_tree
from dxmi.data.registry import DATA_SETS
from dxmi.diffusion.schedules.registry import SCHEDULES
from dxmi.errors import UserError
from dxmi.registry import Registry
from dxmi.training.config import SCHEMA, ExperimentConfig

KEY = "schema"
"""Where a file holds its schema; files of schema 1 do not have it."""
CHANGES = {
    2: "a run is identified by what differs from the defaults, data.name is data.kind, and schedule.method is "
    "schedule.kind"
}
"""For each schema, what it changed."""
RENAMED = {"data.name": "data.kind", "schedule.method": "schedule.kind"}
"""Settings of schema 1, and what they are called now."""


_TENSORS_OF_SCHEMA_1 = {"average.": "ema_policy.", "reference_var.variance": "running_cost.reference_var"}
"""Tensors of an algorithm under schema 1, by the beginnings of their names, and what they are called now."""
Named = TypeVar("Named")


@dataclass(frozen=True)
class StoredConfig:
    """A config that was read from a file.

    Attributes:
        config: the config under the present schema.
        schema: the schema of the file.
        signature: what the run's checkpoints carry, by the rule of that schema.
    """

    config: ExperimentConfig
    schema: int
    signature: str

    def require_present(self, what: str) -> None:
        """Check that the file is of the present schema.

        Args:
            what: the run, for the message.

        Raises:
            UserError: it is of an earlier one; the sentence says what has changed.
        """
        if self.schema != SCHEMA:
            raise UserError(outdated(what, self.schema))


def outdated(what: str, schema: int) -> str:
    """The sentence about a run or a study of an earlier schema that was to be continued."""
    changes = "; ".join(CHANGES[number] for number in range(schema + 1, SCHEMA + 1))
    return (
        f"{what} was begun by an earlier version of dxmi (schema {schema}; this version has {SCHEMA}: {changes}). It "
        "can be read, but not continued: begin a new one under another name."
    )


def config_tree(config: ExperimentConfig) -> Tree:
    """The whole tree of a config, with its schema, as files hold it."""
    return {KEY: SCHEMA, **to_tree(config)}


def read_config(tree: Mapping[str, Any]) -> StoredConfig:
    """The config that a file holds, whatever its schema.

    Raises:
        UserError: it is of a later schema, or it is refused.
    """
    schema = schema_of(tree)
    own = {key: value for key, value in tree.items() if key != KEY}
    config = build(ExperimentConfig, upgrade(own, schema))
    return StoredConfig(config, schema, config.signature if schema == SCHEMA else signature(identity_of_schema_1(own)))


def schema_of(tree: Mapping[str, Any]) -> int:
    """The schema of a file's tree.

    Raises:
        UserError: it is none that this version knows.
    """
    schema = tree.get(KEY, 1)
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise UserError(f"schema is {schema!r}: this version of dxmi reads 1 to {SCHEMA}.")
    return schema


def upgrade(tree: Mapping[str, Any], schema: int) -> Tree:
    """The tree of a config under the present schema, from its tree under an earlier one. What is wrong stays wrong."""
    found: Tree = copy.deepcopy(dict(tree))
    if schema == 1:
        for group, old_name, registry in (("data", "name", DATA_SETS), ("schedule", "method", SCHEDULES)):
            if isinstance(found.get(group), dict) and old_name in found[group]:
                found[group] = _own_fields(found[group], old_name, registry)
    return found


def _own_fields(group: Tree, old_name: str, registry: Registry[Any]) -> Tree:
    """A flat group of schema 1 as the block of its kind, without the fields of other kinds."""
    kind = group[old_name]
    if kind not in registry.kinds():
        return {**group, "kind": kind}
    known = {own.name for own in fields(registry.config_class(kind))}
    return {"kind": kind, **{name: value for name, value in group.items() if name in known}}


def upgrade_tensors(tensors: Mapping[str, Named], schema: int) -> dict[str, Named]:
    """The tensors of an algorithm by their present names."""
    return {_tensor_name(name) if schema == 1 else name: tensor for name, tensor in tensors.items()}


def _tensor_name(name: str) -> str:
    for old, new in _TENSORS_OF_SCHEMA_1.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def identity_of_schema_1(tree: Mapping[str, Any]) -> Tree:
    """What identified a run under schema 1: its whole tree, except for what changes no result."""
    found: Tree = copy.deepcopy(dict(tree))
    found.pop("resources", None)
    if isinstance(found.get("data"), dict):
        found["data"].pop("accept_unknown_files", None)
    return found
