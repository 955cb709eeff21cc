"""The algorithms that fine-tune a policy. Nothing here imports PyTorch: see `dxmi.registry`."""

from typing import TYPE_CHECKING

from dxmi.registry import Registry

if TYPE_CHECKING:
    from dxmi.algorithms.dxmi import DxMI

ALGORITHMS: Registry["DxMI"] = Registry(
    "algorithm", {"dxmi": ("dxmi.algorithms.configs:DxMIConfig", "dxmi.algorithms.dxmi:DxMI")}
)
