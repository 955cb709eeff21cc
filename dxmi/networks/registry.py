"""From a network config to a network. `kind` names the config class, the config class names the network."""

from collections.abc import Callable, Iterable
from typing import Any, TypeVar

import torch

from dxmi.networks.base import Critic, Denoiser, NetworkConfig, TimedCritic
from dxmi.networks.diffusers_unet import DiffusersConfig, DiffusersDenoiser
from dxmi.networks.igebm import IgebmConfig, IgebmCritic, IgebmTimedCritic
from dxmi.networks.mlp import MlpConfig, MlpCritic, MlpDenoiser, MlpTimedCritic
from dxmi.networks.ncsnpp import NcsnppGan, NcsnppGanConfig
from dxmi.networks.unet import EdmUnetConfig, Unet, UnetConfig
from dxmi.networks.wide_resnet import WideResNetConfig, WideResNetCritic, WideResNetTimedCritic

Event = tuple[int, ...]
NetworkT = TypeVar("NetworkT")
Builder = Callable[[Any, Event, torch.Generator], NetworkT]

_DENOISERS: dict[type[NetworkConfig], Builder[Denoiser]] = {
    MlpConfig: MlpDenoiser,
    UnetConfig: Unet,
    EdmUnetConfig: Unet,
    NcsnppGanConfig: NcsnppGan,
    DiffusersConfig: DiffusersDenoiser,
}
_CRITICS: dict[type[NetworkConfig], Builder[Critic]] = {
    MlpConfig: MlpCritic,
    IgebmConfig: IgebmCritic,
    WideResNetConfig: WideResNetCritic,
}
_TIMED_CRITICS: dict[type[NetworkConfig], Builder[TimedCritic]] = {
    MlpConfig: MlpTimedCritic,
    IgebmConfig: IgebmTimedCritic,
    WideResNetConfig: WideResNetTimedCritic,
}
_ROLES: dict[str, Iterable[type[NetworkConfig]]] = {"denoiser": _DENOISERS, "energy": _CRITICS, "value": _TIMED_CRITICS}

NETWORK_CONFIGS: dict[str, type[NetworkConfig]] = {config.kind: config for role in _ROLES.values() for config in role}


def kinds(role: str) -> list[str]:
    """Which networks can be the `denoiser`, the `energy` or the `value`."""
    return [config.kind for config in _ROLES[role]]


def build_denoiser(config: NetworkConfig, event: Event, generator: torch.Generator) -> Denoiser:
    """A noise predictor for events of shape `event`, initialised from `generator`."""
    return _DENOISERS[type(config)](config, event, generator)


def build_critic(config: NetworkConfig, event: Event, generator: torch.Generator) -> Critic:
    """A time-independent score for events of shape `event`, initialised from `generator`."""
    return _CRITICS[type(config)](config, event, generator)


def build_timed_critic(config: NetworkConfig, event: Event, generator: torch.Generator) -> TimedCritic:
    """A time-conditioned score for events of shape `event`, initialised from `generator`."""
    return _TIMED_CRITICS[type(config)](config, event, generator)
