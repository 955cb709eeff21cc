"""Networks. A new kind is one file here: a config dataclass with its own `kind`, and two lines in `registry`.

Two interfaces, so that everything above knows no architecture:

    denoiser: embed(steps [N]) -> [N, E];  forward(x [B, *event], embedding [1 or B, E]) -> like x
    critic:   forward(x [B, *event]) -> [B], or the same `embed` and `forward(x, embedding) -> [B]` if it knows time

`embed` is separate from `forward` so that the T embeddings of a rollout are computed once, not once a state.
"""

from dxmi.networks.base import Critic, Denoiser, NetworkConfig, TimedCritic
from dxmi.networks.mlp import MlpConfig
from dxmi.networks.registry import NETWORK_CONFIGS, build_critic, build_denoiser, build_timed_critic

__all__ = [
    "NETWORK_CONFIGS",
    "Critic",
    "Denoiser",
    "MlpConfig",
    "NetworkConfig",
    "TimedCritic",
    "build_critic",
    "build_denoiser",
    "build_timed_critic",
]
