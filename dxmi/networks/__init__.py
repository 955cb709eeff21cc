"""Networks. A new kind is one file here: a config dataclass with its own `kind`, and two lines in `registry`.

Two interfaces, so that everything above knows no architecture:

    denoiser: embed(steps [N]) -> [N, E];  forward(x [B, *event], embedding [1 or B, E]) -> like x
    critic:   forward(x [B, *event]) -> [B], or the same `embed` and `forward(x, embedding) -> [B]` if it knows time

`embed` is separate from `forward` so that the T embeddings of a rollout are computed once, not once a state. A forward
is a pure function of weights and arguments: whatever it needs at random is handed to it.
"""

from dxmi.networks.base import NOTHING, Critic, Denoiser, Given, NetworkConfig, TimedCritic, conditioned
from dxmi.networks.diffusers_unet import DiffusersConfig
from dxmi.networks.igebm import IgebmConfig
from dxmi.networks.mlp import MlpConfig
from dxmi.networks.ncsnpp import NcsnppGanConfig
from dxmi.networks.registry import NETWORK_CONFIGS, build_critic, build_denoiser, build_timed_critic, kinds
from dxmi.networks.unet import EdmUnetConfig, UnetConfig
from dxmi.networks.wide_resnet import WideResNetConfig

__all__ = [
    "NETWORK_CONFIGS",
    "NOTHING",
    "Critic",
    "Denoiser",
    "DiffusersConfig",
    "EdmUnetConfig",
    "Given",
    "IgebmConfig",
    "MlpConfig",
    "NcsnppGanConfig",
    "NetworkConfig",
    "TimedCritic",
    "UnetConfig",
    "WideResNetConfig",
    "build_critic",
    "build_denoiser",
    "build_timed_critic",
    "conditioned",
    "kinds",
]
