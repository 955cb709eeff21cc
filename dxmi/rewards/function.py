"""A Python function of the user's project as the reward.

The function is called with samples [B, *event] (images are in [-1, 1]) and their classes [B] or None, and returns [B].
"""

import importlib.util
import sys
import traceback
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.errors import UserError
from dxmi.rewards.base import RewardContext
from dxmi.rewards.configs import FunctionRewardConfig
from dxmi.rewards.files import function_file


class FunctionReward:
    """Calls a function of a module below the current folder. Nothing is imported before `prepare` allows it.

    Args:
        config: Settings: the import path.
    """

    def __init__(self, config: FunctionRewardConfig) -> None:
        self._path = config.function
        self._function: Callable[[Tensor, Tensor | None], Tensor] | None = None

    def prepare(self, context: RewardContext) -> None:
        """Import the function, if that is allowed.

        Raises:
            UserError: it is not allowed, or there is no such function in a file below the current folder.
        """
        if not context.allow_code:
            raise UserError(
                f"reward.function is {self._path}, but resources.allow_code is false: set it to true if this file may "
                "be executed (dxmi evaluate: --allow-code)."
            )
        self._function = _imported(self._path)

    @torch.no_grad()
    def __call__(self, x: Tensor, condition: Condition) -> Tensor:
        """Compute the reward of each sample: [B].

        Raises:
            UserError: the function did not return one number for each sample.
        """
        assert self._function is not None
        with _naming_errors(self._path):
            found: Any = self._function(x, condition.labels)
        if not isinstance(found, Tensor) or found.shape != (len(x),):
            shape = tuple(found.shape) if isinstance(found, Tensor) else type(found).__name__
            raise UserError(
                f"reward.function {self._path} returned {shape} for {len(x)} samples: it must return a tensor with one "
                "number for each."
            )
        return found.to(x.device, torch.float32)


def _imported(path: str) -> Callable[[Tensor, Tensor | None], Tensor]:
    module, _, name = path.partition(":")
    root, file = Path.cwd().resolve(), function_file(path)
    spec = importlib.util.spec_from_file_location(f"dxmi_reward_{module.replace('.', '_')}", file)
    assert spec is not None
    assert spec.loader is not None
    loaded = importlib.util.module_from_spec(spec)  # exactly this file, whatever else has its name
    sys.path.insert(0, str(root))
    try:
        with _naming_errors(path):
            spec.loader.exec_module(loaded)
    finally:
        sys.path.remove(str(root))
    found = getattr(loaded, name, None)
    if not callable(found):
        raise UserError(f"reward.function is {path}, but {file.name} has no function {name}.")
    return found  # type: ignore[no-any-return]


@contextmanager
def _naming_errors(path: str) -> Iterator[None]:
    """Raise a UserError with the file and the line for any exception in the user's function."""
    try:
        yield
    except Exception as error:
        if isinstance(error, SyntaxError):
            place = f"{Path(error.filename or '').name}:{error.lineno}"
        else:
            last = traceback.extract_tb(error.__traceback__)[-1]
            place = f"{Path(last.filename).name}:{last.lineno}"
        raise UserError(
            f"reward.function {path} failed at {place} with {type(error).__name__}: {error}. It is called with samples "
            "[B, ...] and their classes [B] or None, and must return a tensor [B]."
        ) from error
