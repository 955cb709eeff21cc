"""Packages that are optional, slow to import, or need a workaround to be imported."""

import contextlib
import importlib
import importlib.util
import sys
from contextlib import AbstractContextManager
from functools import cache
from pathlib import Path
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode

from dxmi.errors import UserError


@cache
def declare_torchvision_operators() -> torch.library.Library | None:
    """Make torchvision importable with a CPU-only torch; must be called before torchvision is imported.

    torchvision's compiled operators are linked against CUDA and do not load with a CPU build of torch; the import then
    fails because two of them have no schema. Declaring the schemas is sufficient for everything written in Python. With
    a CUDA build of torch this does nothing.

    Returns:
        The library of declarations, which exist only as long as it is referenced; the cache keeps a reference.
    """
    if torch.version.cuda is not None:
        return None
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # the operator exists
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    return library


@cache
def spare_dynamo() -> None:
    """Prevent optimizers from importing TorchDynamo, which takes two seconds in every process.

    PyTorch disables Dynamo for some methods of its optimizers, and imports Dynamo to do so when they are first called.
    dxmi never compiles an optimizer. If a version of PyTorch implements this differently, nothing is changed.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(getattr(torch.optim.Optimizer, name, None), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            setattr(method, "__dynamo_disable", method)  # where PyTorch caches the method with Dynamo disabled


_VARIANTS = 256
"""Number of compiled versions of one function: stages differ in their shapes, and are called with several batch sizes,
with and without gradients, in the policy, in its moving average and in the pretrained model."""


def allow_recompilation() -> None:
    """Let TorchDynamo compile a function as often as a run needs; by default it gives up after eight times."""
    dynamo = importlib.import_module("torch._dynamo")
    for name in ("recompile_limit", "accumulated_recompile_limit"):
        setattr(dynamo.config, name, max(getattr(dynamo.config, name), _VARIANTS))


def uncompiled() -> AbstractContextManager[object]:
    """Return a context in which compiled functions are executed as they are written.

    For inputs of an unusual shape, whose compilation would take longer than it saves.
    """
    if "torch._dynamo" not in sys.modules:
        return contextlib.nullcontext()
    eager: AbstractContextManager[object] = torch.compiler.set_stance("force_eager")
    return eager


class DispatchMode(TorchDispatchMode):  # type: ignore[no-untyped-call]
    """A context whose `__torch_dispatch__` executes all operations on tensors."""

    def __init__(self) -> None:
        super().__init__()  # type: ignore[no-untyped-call]

    def __init_subclass__(cls) -> None:
        super().__init_subclass__()  # type: ignore[no-untyped-call]


def tensors_without_content() -> AbstractContextManager[object]:
    """Return a context in which new tensors have shapes but no content, and operations compute only shapes."""
    fake = importlib.import_module("torch._subclasses.fake_tensor")
    mode: AbstractContextManager[object] = fake.FakeTensorMode(allow_non_fake_inputs=True)
    return mode


def package_folder(name: str) -> Path:
    """The folder of an installed package, found without importing it.

    Raises:
        UserError: the package is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f"The package {name} is not installed: install dxmi again.")
    return Path(spec.origin).parent


def torch_fidelity(module: str) -> Any:
    """Import a module of torch-fidelity, for example `feature_extractor_inceptionv3`.

    torch-fidelity imports torchvision and PyTorch's compiler, so it is imported only where it is needed.
    """
    declare_torchvision_operators()
    return importlib.import_module(f"torch_fidelity.{module}")


def diffusers() -> Any:
    """Import the package diffusers.

    Raises:
        UserError: the package is not installed.
    """
    declare_torchvision_operators()
    try:
        return importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        raise UserError("kind=diffusers needs the package diffusers: pip install 'dxmi[diffusers]'.") from error
