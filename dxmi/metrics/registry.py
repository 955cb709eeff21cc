"""The registry of further metrics. Nothing here imports PyTorch, see `dxmi.registry`."""

from typing import TYPE_CHECKING

from dxmi.registry import Registry

if TYPE_CHECKING:
    from dxmi.metrics.base import Metric

_CONFIGS = "dxmi.metrics.configs"

METRICS: Registry["Metric"] = Registry(
    "metric",
    {
        "class_entropy": (f"{_CONFIGS}:ClassEntropyConfig", "dxmi.metrics.class_entropy:ClassEntropy"),
        "log_density": (f"{_CONFIGS}:LogDensityConfig", "dxmi.metrics.log_density:LogDensity"),
        "nearest_neighbor": (f"{_CONFIGS}:NearestNeighborConfig", "dxmi.metrics.nearest_neighbor:NearestNeighbor"),
        "held_out": (f"{_CONFIGS}:HeldOutConfig", "dxmi.metrics.held_out:HeldOut"),
        "diversity": (f"{_CONFIGS}:DiversityConfig", "dxmi.metrics.diversity:Diversity"),
        "energy_gap": (f"{_CONFIGS}:EnergyGapConfig", "dxmi.metrics.energy_gap:EnergyGap"),
    },
)
