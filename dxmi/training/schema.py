"""Configs in files, with the version of their schema; configs of earlier schemas can be read.

Schema 1 (dxmi 0.1) has one flat group `data` with a `name`, one flat group `schedule` with a `method`, and identifies a
run by its whole config. Schema 2 has a class for each kind of data set and schedule, and identifies a run by the
settings that differ from the defaults.

A run or study of an earlier schema can be read, scored again and sampled from. It cannot be continued, because the
meaning of the defaults or the identity of a run has changed.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass, fields, replace
from typing import Any, TypeVar

from dxmi.config import Tree, build, signature, to_tree
from dxmi.data.registry import DATA_SETS
from dxmi.diffusion.schedules.registry import SCHEDULES
from dxmi.errors import UserError
from dxmi.registry import Registry
from dxmi.training.config import SCHEMA, ExperimentConfig

KEY = "schema"
"""Key of the schema in a file; files of schema 1 do not have it."""
CHANGES = {
    2: "a run is identified by what differs from the defaults, data.name is data.kind, and schedule.method is "
    "schedule.kind"
}
"""Description of the changes in each schema."""
RENAMED = {"data.name": "data.kind", "schedule.method": "schedule.kind"}
"""Names of settings in schema 1, and their present names."""


_TENSORS_OF_SCHEMA_1 = {"average.": "ema_policy.", "reference_var.variance": "running_cost.reference_var"}
"""Prefixes of the names of an algorithm's tensors in schema 1, and their present names."""
Named = TypeVar("Named")


@dataclass(frozen=True)
class StoredConfig:
    """A config that was read from a file.

    Attributes:
        config: config in the present schema.
        schema: schema of the file.
        signature: signature in the run's checkpoints, computed by the rule of the file's schema.
    """

    config: ExperimentConfig
    schema: int
    signature: str

    def permitting_code(self) -> "StoredConfig":
        """The same config with permission to execute the Python files that it names."""
        resources = replace(self.config.resources, allow_code=True)
        return replace(self, config=replace(self.config, resources=resources))

    def require_present(self, what: str) -> None:
        """Check that the file is of the present schema.

        Args:
            what: description of the run, for the message.

        Raises:
            UserError: the file is of an earlier schema; the message states what has changed.
        """
        if self.schema != SCHEMA:
            raise UserError(outdated(what, self.schema))


def outdated(what: str, schema: int) -> str:
    """The error message for an attempt to continue a run or study of an earlier schema."""
    changes = "; ".join(CHANGES[number] for number in range(schema + 1, SCHEMA + 1))
    return (
        f"{what} was begun by an earlier version of dxmi (schema {schema}; this version has {SCHEMA}: {changes}). It "
        "can be read, but not continued: begin a new one under another name."
    )


def config_tree(config: ExperimentConfig) -> Tree:
    """The whole tree of a config, with the schema, as it is stored in files."""
    return {KEY: SCHEMA, **without_permission(to_tree(config))}


def without_permission(tree: Mapping[str, Any]) -> Tree:
    """The tree of a config without permission to execute code, `resources.allow_code`.

    Permission is given anew in each command, and neither written to a file nor read from one, since a file of another
    person could give it.
    """
    resources = tree.get("resources")
    if not isinstance(resources, Mapping):
        return dict(tree)
    return {**tree, "resources": {key: value for key, value in resources.items() if key != "allow_code"}}


def read_config(tree: Mapping[str, Any]) -> StoredConfig:
    """Build the config from the tree in a file, of the present or an earlier schema.

    Permission to execute code is not read, see `without_permission`.

    Raises:
        UserError: the schema is unknown, or a setting is invalid.
    """
    schema = schema_of(tree)
    own = without_permission({key: value for key, value in tree.items() if key != KEY})
    config = build(ExperimentConfig, upgrade(own, schema))
    return StoredConfig(config, schema, config.signature if schema == SCHEMA else signature(identity_of_schema_1(own)))


def schema_of(tree: Mapping[str, Any]) -> int:
    """The schema of a file's tree.

    Raises:
        UserError: this version does not know the schema.
    """
    schema = tree.get(KEY, 1)
    if type(schema) is not int or not 1 <= schema <= SCHEMA:
        raise UserError(f"schema is {schema!r}: this version of dxmi reads 1 to {SCHEMA}.")
    return schema


def upgrade(tree: Mapping[str, Any], schema: int) -> Tree:
    """Convert the tree of a config to the present schema; invalid settings remain, and `build` rejects them."""
    found: Tree = copy.deepcopy(dict(tree))
    if schema == 1:
        for group, old_name, registry in (("data", "name", DATA_SETS), ("schedule", "method", SCHEDULES)):
            if isinstance(found.get(group), dict) and old_name in found[group]:
                found[group] = _own_fields(found[group], old_name, registry)
    return found


def _own_fields(group: Tree, old_name: str, registry: Registry[Any]) -> Tree:
    """Convert a flat group of schema 1 to the block of its kind, without the fields of other kinds."""
    kind = group[old_name]
    if kind not in registry.kinds():
        return {**group, "kind": kind}
    known = {own.name for own in fields(registry.config_class(kind))}
    return {"kind": kind, **{name: value for name, value in group.items() if name in known}}


def upgrade_tensors(tensors: Mapping[str, Named], schema: int) -> dict[str, Named]:
    """Rename the tensors of an algorithm to their present names."""
    return {_tensor_name(name) if schema == 1 else name: tensor for name, tensor in tensors.items()}


def _tensor_name(name: str) -> str:
    for old, new in _TENSORS_OF_SCHEMA_1.items():
        if name.startswith(old):
            return new + name.removeprefix(old)
    return name


def identity_of_schema_1(tree: Mapping[str, Any]) -> Tree:
    """The identity of a run in schema 1: its whole tree, except for settings that do not change the result."""
    found: Tree = copy.deepcopy(dict(tree))
    found.pop("resources", None)
    if isinstance(found.get("data"), dict):
        found["data"].pop("accept_unknown_files", None)
    return found
