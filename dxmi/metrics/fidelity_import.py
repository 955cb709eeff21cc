"""torch-fidelity, importable beside a CPU-only torch. Import it from here, never directly.

torchvision's compiled operators are linked against CUDA and do not load beside a CPU torch; torchvision then fails
at import because two of them have no schema. Declaring the schemas is enough for everything written in Python, which
is all that torch-fidelity uses. A CUDA build of torch needs and gets no help.
"""

import contextlib
import importlib
from typing import Any

import torch


def _declare_missing_operators() -> torch.library.Library | None:
    if torch.version.cuda is not None:
        return None
    library = torch.library.Library("torchvision", "DEF")  # type: ignore[no-untyped-call]
    for name in ("nms", "qnms"):
        with contextlib.suppress(RuntimeError):  # the operator is there after all
            library.define(f"{name}(Tensor dets, Tensor scores, float iou_threshold) -> Tensor")  # type: ignore[no-untyped-call]
    return library


_LIBRARY = _declare_missing_operators()  # the declarations live as long as this reference

torch_fidelity: Any = importlib.import_module("torch_fidelity")
feature_extractor_inceptionv3: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
metric_fid: Any = importlib.import_module("torch_fidelity.metric_fid")
metric_isc: Any = importlib.import_module("torch_fidelity.metric_isc")
metric_kid: Any = importlib.import_module("torch_fidelity.metric_kid")
metric_prc: Any = importlib.import_module("torch_fidelity.metric_prc")
utils: Any = importlib.import_module("torch_fidelity.utils")
