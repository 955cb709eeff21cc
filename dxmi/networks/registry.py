"""From a network config to a network. `kind` names the config class, the config class names the network."""

from collections.abc import Callable
from typing import Any, TypeVar

import torch

from dxmi.networks.base import Critic, Denoiser, NetworkConfig, TimedCritic
from dxmi.networks.mlp import MlpConfig, MlpCritic, MlpDenoiser, MlpTimedCritic

Event = tuple[int, ...]
NetworkT = TypeVar("NetworkT")
Builder = Callable[[Any, Event, torch.Generator], NetworkT]

NETWORK_CONFIGS: dict[str, type[NetworkConfig]] = {"mlp": MlpConfig}

_DENOISERS: dict[type[NetworkConfig], Builder[Denoiser]] = {MlpConfig: MlpDenoiser}
_CRITICS: dict[type[NetworkConfig], Builder[Critic]] = {MlpConfig: MlpCritic}
_TIMED_CRITICS: dict[type[NetworkConfig], Builder[TimedCritic]] = {MlpConfig: MlpTimedCritic}


def build_denoiser(config: NetworkConfig, event: Event, generator: torch.Generator) -> Denoiser:
    """A noise predictor for events of shape `event`, initialised from `generator`."""
    return _DENOISERS[type(config)](config, event, generator)


def build_critic(config: NetworkConfig, event: Event, generator: torch.Generator) -> Critic:
    """A time-independent score for events of shape `event`, initialised from `generator`."""
    return _CRITICS[type(config)](config, event, generator)


def build_timed_critic(config: NetworkConfig, event: Event, generator: torch.Generator) -> TimedCritic:
    """A time-conditioned score for events of shape `event`, initialised from `generator`."""
    return _TIMED_CRITICS[type(config)](config, event, generator)
