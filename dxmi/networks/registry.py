"""The registries of networks, one per role. Nothing here imports PyTorch, see `dxmi.registry`."""

from typing import TYPE_CHECKING

from dxmi.registry import Registry

if TYPE_CHECKING:
    import torch

    from dxmi.networks.base import Critic, Denoiser, TimedCritic
    from dxmi.networks.configs import NetworkConfig

_CONFIGS = "dxmi.networks.configs"
_MLP, _IGEBM, _WIDE = f"{_CONFIGS}:MlpConfig", f"{_CONFIGS}:IgebmConfig", f"{_CONFIGS}:WideResNetConfig"

DENOISERS: Registry["Denoiser"] = Registry(
    "denoiser",
    {
        "mlp": (_MLP, "dxmi.networks.mlp:MlpDenoiser"),
        "unet": (f"{_CONFIGS}:UnetConfig", "dxmi.networks.unet:Unet"),
        "edm_unet": (f"{_CONFIGS}:EdmUnetConfig", "dxmi.networks.unet:Unet"),
        "ncsnpp_gan": (f"{_CONFIGS}:NcsnppGanConfig", "dxmi.networks.ncsnpp:NcsnppGan"),
        "diffusers": (f"{_CONFIGS}:DiffusersConfig", "dxmi.networks.diffusers_unet:DiffusersDenoiser"),
    },
)
CRITICS: Registry["Critic"] = Registry(
    "energy network",
    {
        "mlp": (_MLP, "dxmi.networks.mlp:MlpCritic"),
        "igebm": (_IGEBM, "dxmi.networks.igebm:IgebmCritic"),
        "wide_resnet": (_WIDE, "dxmi.networks.wide_resnet:WideResNetCritic"),
    },
)
TIMED_CRITICS: Registry["TimedCritic"] = Registry(
    "value network",
    {
        "mlp": (_MLP, "dxmi.networks.mlp:MlpTimedCritic"),
        "igebm": (_IGEBM, "dxmi.networks.igebm:IgebmTimedCritic"),
        "wide_resnet": (_WIDE, "dxmi.networks.wide_resnet:WideResNetTimedCritic"),
    },
)


def build_denoiser(config: "NetworkConfig", event: tuple[int, ...], generator: "torch.Generator") -> "Denoiser":
    """Build a denoiser for events of shape `event`, initialized from `generator`."""
    return DENOISERS.build(config, event, generator)


def build_critic(config: "NetworkConfig", event: tuple[int, ...], generator: "torch.Generator") -> "Critic":
    """Build a time-independent critic for events of shape `event`, initialized from `generator`."""
    return CRITICS.build(config, event, generator)


def build_timed_critic(config: "NetworkConfig", event: tuple[int, ...], generator: "torch.Generator") -> "TimedCritic":
    """Build a time-conditioned critic for events of shape `event`, initialized from `generator`."""
    return TIMED_CRITICS.build(config, event, generator)
