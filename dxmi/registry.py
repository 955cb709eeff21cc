"""Registries of everything that a setting `kind` chooses: networks, data sets, schedules, algorithms and so on.

A registry maps each kind to its config class and to its implementation, both as "module:Name". They are imported on
first use, so that a config can be read without importing PyTorch. To add a kind, write its config class and its
implementation, add a line to the registry and, to make it selectable by name in Hydra, a YAML file in configs/.
"""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from dxmi.errors import UserError

Built = TypeVar("Built")
_METADATA = "registry"


class Registry(Generic[Built]):
    """The kinds of one type of component.

    Args:
        what: the type of component, for messages.
        entries: for each kind, the paths of its config class and of its implementation.
    """

    def __init__(self, what: str, entries: Mapping[str, tuple[str, str]]) -> None:
        self.what = what
        self._entries = dict(entries)

    def kinds(self) -> list[str]:
        """Every kind, in the order of registration."""
        return list(self._entries)

    def config_class(self, kind: str) -> type[Any]:
        """The frozen config class of a kind.

        Raises:
            KeyError: there is no such kind; `refusal` returns a message for the user.
        """
        found: type[Any] = imported(self._entries[kind][0])
        return found

    def config(self, kind: str, **settings: Any) -> Any:
        """Create a config of a kind from `settings`, with defaults for the others.

        Raises:
            KeyError: there is no such kind.
        """
        return self.config_class(kind)(**settings)

    def implementation(self, kind: str) -> Any:
        """The class or function that `build` calls for a kind.

        Raises:
            KeyError: there is no such kind.
        """
        return imported(self._entries[kind][1])

    def build(self, config: Any, *args: Any, **kwargs: Any) -> Built:
        """Call the implementation of the kind of `config`, with the config and the other arguments.

        Raises:
            UserError: this registry does not have that kind.
        """
        if config.kind not in self._entries:
            raise UserError(f"{self.refusal('kind', config.kind)}.")
        built: Built = self.implementation(config.kind)(config, *args, **kwargs)
        return built

    def refusal(self, path: str, kind: object) -> str:
        """The error message for an unknown kind, without a full stop, with the closest known one."""
        near = difflib.get_close_matches(str(kind), self.kinds(), n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{path} is {kind!r}: it must be one of {', '.join(self.kinds())}{hint}"


def imported(path: str) -> Any:
    """Import the object at "module:Name"."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def chosen_from(registry: Registry[Any]) -> dict[str, Any]:
    """Metadata of a config field whose class is chosen from a registry by `kind`."""
    return {_METADATA: registry}


def registry_of(metadata: Mapping[str, Any]) -> Registry[Any] | None:
    """The registry in the metadata of a field, if there is one."""
    return metadata.get(_METADATA)
