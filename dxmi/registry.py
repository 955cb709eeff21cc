"""One mechanism for everything that a setting `kind` chooses: networks, data sets, schedules, algorithms and so on.

A registry maps a kind to the path of its config class and to the path of what is built from it, both as "module:Name".
They are imported when they are asked for, so that a config is read without PyTorch. A new kind is one file with its
config class and its implementation, one line in a registry, and a YAML file in configs/ if it is to have a name there.
"""

import difflib
import importlib
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

from dxmi.errors import UserError

Built = TypeVar("Built")
_METADATA = "registry"


class Registry(Generic[Built]):
    """Kinds of one sort of thing.

    Args:
        what: the sort, for messages.
        entries: for each kind the path of its config class and that of its implementation.
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
            KeyError: there is no such kind; `refusal` has the sentence.
        """
        found: type[Any] = imported(self._entries[kind][0])
        return found

    def config(self, kind: str, **settings: Any) -> Any:
        """A config of a kind, with its defaults where `settings` say nothing.

        Raises:
            KeyError: there is no such kind.
        """
        return self.config_class(kind)(**settings)

    def implementation(self, kind: str) -> Any:
        """The class or the function that `build` calls.

        Raises:
            KeyError: there is no such kind.
        """
        return imported(self._entries[kind][1])

    def build(self, config: Any, *args: Any, **kwargs: Any) -> Built:
        """What `config` describes: its kind's implementation, called with the config and the other arguments.

        Raises:
            UserError: things of that kind are not of this sort.
        """
        if config.kind not in self._entries:
            raise UserError(f"{self.refusal('kind', config.kind)}.")
        built: Built = self.implementation(config.kind)(config, *args, **kwargs)
        return built

    def refusal(self, path: str, kind: object) -> str:
        """The beginning of a sentence about a kind that does not exist, with the nearest one that does."""
        near = difflib.get_close_matches(str(kind), self.kinds(), n=1, cutoff=0.5)
        hint = f" (did you mean {near[0]}?)" if near else ""
        return f"{path} is {kind!r}: it must be one of {', '.join(self.kinds())}{hint}"


def imported(path: str) -> Any:
    """What "module:Name" names."""
    module, _, name = path.partition(":")
    return getattr(importlib.import_module(module), name)


def chosen_from(registry: Registry[Any]) -> dict[str, Any]:
    """Metadata of a config's field whose class is chosen from a registry, by the `kind` in its tree."""
    return {_METADATA: registry}


def registry_of(metadata: Mapping[str, Any]) -> Registry[Any] | None:
    """The registry that a field's metadata names, if it names any."""
    return metadata.get(_METADATA)
