"""Registry of the algorithms that fine-tune a policy. Nothing here imports PyTorch: see `dxmi.registry`."""

from typing import TYPE_CHECKING

from dxmi.registry import Registry

if TYPE_CHECKING:
    from dxmi.algorithms.base import PolicyAlgorithm

ALGORITHMS: Registry["PolicyAlgorithm"] = Registry(
    "algorithm",
    {
        "dpok": ("dxmi.algorithms.configs:DpokConfig", "dxmi.algorithms.dpok:Dpok"),
        "draft": ("dxmi.algorithms.configs:DraftConfig", "dxmi.algorithms.draft:Draft"),
        "dxmi": ("dxmi.algorithms.configs:DxMIConfig", "dxmi.algorithms.dxmi:DxMI"),
        "grpo": ("dxmi.algorithms.configs:GrpoConfig", "dxmi.algorithms.grpo:Grpo"),
        "ppo": ("dxmi.algorithms.configs:PpoConfig", "dxmi.algorithms.ppo:Ppo"),
        "reinforce": ("dxmi.algorithms.configs:ReinforceConfig", "dxmi.algorithms.reinforce:Reinforce"),
        "sac": ("dxmi.algorithms.configs:SacConfig", "dxmi.algorithms.sac:Sac"),
        "sft_pg": ("dxmi.algorithms.configs:SftPgConfig", "dxmi.algorithms.sft_pg:SftPg"),
        "trpo": ("dxmi.algorithms.configs:TrpoConfig", "dxmi.algorithms.trpo:Trpo"),
        "trpo_penalty": ("dxmi.algorithms.configs:TrpoPenaltyConfig", "dxmi.algorithms.trpo_penalty:TrpoPenalty"),
    },
)
