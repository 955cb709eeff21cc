"""Registry of the rewards. Nothing here imports PyTorch: see `dxmi.registry`."""

from typing import TYPE_CHECKING

from dxmi.registry import Registry

if TYPE_CHECKING:
    from dxmi.rewards.base import Reward

_CONFIGS = "dxmi.rewards.configs"

REWARDS: Registry["Reward"] = Registry(
    "reward",
    {
        "classifier": (f"{_CONFIGS}:ClassifierRewardConfig", "dxmi.rewards.classifier:ClassifierReward"),
        "cifar_resnet": (f"{_CONFIGS}:CifarResnetRewardConfig", "dxmi.rewards.cifar_resnet:CifarResnetReward"),
        "log_density": (f"{_CONFIGS}:LogDensityRewardConfig", "dxmi.rewards.log_density:LogDensityReward"),
        "ink": (f"{_CONFIGS}:InkRewardConfig", "dxmi.rewards.drawing:InkReward"),
        "symmetry": (f"{_CONFIGS}:SymmetryRewardConfig", "dxmi.rewards.drawing:SymmetryReward"),
        "stroke_width": (f"{_CONFIGS}:StrokeWidthRewardConfig", "dxmi.rewards.drawing:StrokeWidthReward"),
        "jpeg": (f"{_CONFIGS}:JpegRewardConfig", "dxmi.rewards.jpeg:JpegReward"),
        "energy": (f"{_CONFIGS}:EnergyRewardConfig", "dxmi.rewards.energy:EnergyReward"),
        "function": (f"{_CONFIGS}:FunctionRewardConfig", "dxmi.rewards.function:FunctionReward"),
        "sum": (f"{_CONFIGS}:SumRewardConfig", "dxmi.rewards.total:SumReward"),
        "http": (f"{_CONFIGS}:HttpRewardConfig", "dxmi.rewards.http:HttpReward"),
        "quadratic": (f"{_CONFIGS}:QuadraticRewardConfig", "dxmi.rewards.quadratic:QuadraticReward"),
    },
)
