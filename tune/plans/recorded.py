"""Reading studies that were recorded with an earlier schema, see `dxmi.training.schema`.

Such a study keeps its old signature. To build the config of a trial, its values are set in the recorded experiment
under their old names, and the result is upgraded.
"""

import copy
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from dxmi.config import put, signature
from dxmi.errors import UserError
from dxmi.training.config import SCHEMA
from dxmi.training.schema import RENAMED, identity_of_schema_1, outdated, schema_of, upgrade

_OLD_NAMES = {new: old for old, new in RENAMED.items()}
_LIMITS = ("budget", "max_failures", "max_concurrent")
_FREE: dict[str, tuple[str, ...]] = {"sweep": _LIMITS, "ablation": ("also", *_LIMITS)}
"""Settings that did not take part in a study's identity under schema 1."""


@dataclass(frozen=True)
class Recorded:
    """The record of a study in an earlier schema.

    Attributes:
        schema: number of the schema.
        signature: signature of the study as that schema defined it.
        experiment: its experiment as a nested dictionary in that schema.
    """

    schema: int
    signature: str
    experiment: Mapping[str, Any]

    def name_of(self, path: str) -> str:
        """The name of a setting in that schema."""
        return _OLD_NAMES.get(path, path)

    def tree_of(self, settings: Mapping[str, Any]) -> dict[str, Any]:
        """The config of a trial in the current schema, given the settings that the trial changes."""
        found = copy.deepcopy(dict(self.experiment))
        for path, value in settings.items():
            put(found, self.name_of(path), value)
        return upgrade(found, self.schema)

    def refusal(self, study: str) -> str:
        """Error message for an attempt to resume such a study."""
        return outdated(f"The study {study}", self.schema)


def present_study(tree: Mapping[str, Any]) -> tuple[dict[str, Any], Recorded | None]:
    """The content of study.yaml in the current schema, and its record if it was written with an earlier one.

    Raises:
        UserError: the schema is a later one, or the content is not that of a study.
    """
    schema, found = schema_of(tree), copy.deepcopy(dict(tree))
    if schema == SCHEMA:
        return found, None
    experiment = _group(found, "experiment")
    recorded = Recorded(schema, signature(_identity_of_schema_1(tree)), experiment)
    found["experiment"] = upgrade(experiment, schema)
    if "ablation" in found:
        for arm in found.get("arms", []):
            arm["changes"] = {RENAMED.get(path, path): value for path, value in arm["changes"].items()}
    else:
        sweep = _group(found, "sweep")
        sweep["space"] = _renamed(sweep.get("space", {}))
    return found, recorded


def _identity_of_schema_1(tree: Mapping[str, Any]) -> dict[str, Any]:
    kind = "ablation" if "ablation" in tree else "sweep"
    own = {key: value for key, value in _group(tree, kind).items() if key not in _FREE[kind]}
    arms = {"arms": tree.get("arms")} if kind == "ablation" else {}
    return {"experiment": identity_of_schema_1(_group(tree, "experiment")), kind: own, **arms}


def _renamed(space: Any) -> Any:
    """A search space, nested or with dotted paths, with settings renamed to their current names."""
    if not isinstance(space, Mapping):
        return space
    found = {RENAMED.get(str(key), key): value for key, value in space.items()}
    for old, new in RENAMED.items():
        group, old_name = old.split(".")
        if isinstance(found.get(group), Mapping):
            found[group] = {new.split(".")[1] if key == old_name else key: own for key, own in found[group].items()}
    return found


def _group(tree: Mapping[str, Any], key: str) -> dict[str, Any]:
    group = tree.get(key, {})
    if not isinstance(group, dict):
        raise UserError(f"{key} is {group!r}: it must be a group of settings.")
    return group
