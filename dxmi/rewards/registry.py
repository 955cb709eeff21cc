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
        "log_density": (f"{_CONFIGS}:LogDensityRewardConfig", "dxmi.rewards.log_density:LogDensityReward"),
        "quadratic": (f"{_CONFIGS}:QuadraticRewardConfig", "dxmi.rewards.quadratic:QuadraticReward"),
    },
)
