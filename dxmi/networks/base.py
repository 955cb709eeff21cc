"""What every network shares: the interfaces, the common part of a config, and the time embedding."""

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass

import torch
from torch import Tensor, nn


class Denoiser(nn.Module, ABC):
    """Predicts the noise in a noised input."""

    @abstractmethod
    def embed(self, steps: Tensor) -> Tensor:
        """Embeddings [N, E] of diffusion steps [N], which may be fractional."""

    @abstractmethod
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The noise in `x` [B, *event], given one embedding a batch [1, E] or one a sample [B, E]."""


class Critic(nn.Module, ABC):
    """Scores an input: an energy."""

    @abstractmethod
    def forward(self, x: Tensor) -> Tensor:
        """The score of `x` [B, *event]: [B]."""


class TimedCritic(nn.Module, ABC):
    """Scores an input at a step: a value."""

    @abstractmethod
    def embed(self, steps: Tensor) -> Tensor:
        """Embeddings [N, E] of policy steps [N]."""

    @abstractmethod
    def forward(self, x: Tensor, embedding: Tensor) -> Tensor:
        """The score of `x` [B, *event], given embeddings [1, E] or [B, E]: [B]."""


@dataclass(frozen=True, kw_only=True)
class NetworkConfig:
    """The part of a network's config that all kinds share."""

    kind: str = "mlp"
    """Which network: the key of its config class in the registry."""


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of a step at geometric frequencies from 1 to 1 / 10,000 (arXiv 1706.03762, section 3.5)."""

    frequency: Tensor

    def __init__(self, dim: int) -> None:
        super().__init__()
        exponent = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2)
        self.register_buffer("frequency", torch.exp(-math.log(10_000.0) * exponent).float(), persistent=False)

    def forward(self, steps: Tensor) -> Tensor:
        """[N] to [N, dim]."""
        angle = steps.to(self.frequency.dtype)[:, None] * self.frequency
        return torch.cat((angle.sin(), angle.cos()), dim=1)
