"""torch-fidelity, importable beside a CPU-only torch. Import it from here, never directly."""

import importlib
from typing import Any

from dxmi.imports import declare_torchvision_operators

declare_torchvision_operators()

torch_fidelity: Any = importlib.import_module("torch_fidelity")
feature_extractor_inceptionv3: Any = importlib.import_module("torch_fidelity.feature_extractor_inceptionv3")
metric_fid: Any = importlib.import_module("torch_fidelity.metric_fid")
metric_isc: Any = importlib.import_module("torch_fidelity.metric_isc")
metric_kid: Any = importlib.import_module("torch_fidelity.metric_kid")
metric_prc: Any = importlib.import_module("torch_fidelity.metric_prc")
utils: Any = importlib.import_module("torch_fidelity.utils")
