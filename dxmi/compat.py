"""Packages that need help to be imported, take seconds to import, or need not be there."""

import contextlib
import importlib
import importlib.util
from functools import cache
from pathlib import Path
from typing import Any

import torch

from dxmi.errors import UserError


@cache
def declare_torchvision_operators() -> torch.library.Library | None:
    """Make torchvision importable beside a CPU-only torch; to be called before what imports it.

    torchvision's compiled operators are linked against CUDA and do not load beside a CPU torch; torchvision then fails
    at import because two of them have no schema. Declaring the schemas is enough for everything written in Python. A
    CUDA build of torch needs and gets no help.

    Returns:
        The declarations, which live as long as a reference to them: the cache holds one.
    """
    if torch.version.cuda is not None:
        return None
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # the operator is there after all
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    return library


@cache
def spare_dynamo() -> None:
    """Let optimisers be made without TorchDynamo, whose import takes two seconds of every process.

    PyTorch keeps Dynamo out of some methods of its optimisers and imports it for that at their first call. Nothing here
    compiles an optimiser. Where a version of PyTorch does this in another way, nothing is changed.
    """
    for name in ("add_param_group", "zero_grad", "state_dict", "load_state_dict"):
        method = getattr(getattr(torch.optim.Optimizer, name, None), "__wrapped__", None)
        if method is not None and not hasattr(method, "__dynamo_disable"):
            setattr(method, "__dynamo_disable", method)  # in a class, a name like this would be another


def package_folder(name: str) -> Path:
    """Where an installed package lies, without importing it.

    Raises:
        UserError: it is not installed.
    """
    spec = importlib.util.find_spec(name)
    if spec is None or spec.origin is None:
        raise UserError(f"The package {name} is not installed: install dxmi again.")
    return Path(spec.origin).parent


def torch_fidelity(module: str) -> Any:
    """A module of torch-fidelity, `feature_extractor_inceptionv3` for instance.

    It is imported where it is needed, not at the top of a module, since it brings torchvision and torch's compiler.
    """
    declare_torchvision_operators()
    return importlib.import_module(f"torch_fidelity.{module}")


def diffusers() -> Any:
    """The package diffusers.

    Raises:
        UserError: it is not installed.
    """
    declare_torchvision_operators()
    try:
        return importlib.import_module("diffusers")
    except ModuleNotFoundError as error:
        raise UserError("kind=diffusers needs the package of that name: pip install 'dxmi[diffusers]'.") from error
