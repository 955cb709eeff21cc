"""What every network shares: the interfaces, the common part of a config, and the time embedding."""

import math
from abc import ABC, abstractmethod

import torch
from torch import Tensor, nn

from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.errors import UserError


class Denoiser(nn.Module, ABC):
    """Predicts the noise in a noised input, or what else its schedule reads it as.

    Attributes:
        dropout: share of activations that training drops; if it is not 0, `forward` takes a seed for each sample.
        classes: how many classes it is conditioned on; 0 for none.
        latent: how many numbers are in the latent that it takes beside its input, Z; 0 for none.
    """

    dropout: float = 0.0
    classes: int = 0
    latent: int = 0

    @abstractmethod
    def embed(self, steps: Tensor) -> Tensor:
        """Embeddings [N, E] of diffusion steps [N], which may be fractional."""

    def embed_labels(self, labels: Tensor) -> Tensor:  # noqa: ARG002
        """What labels [B] add to an embedding, [B, E]."""
        raise UserError(f"{type(self).__name__} knows no classes, but was given labels.")

    def embed_latent(self, latent: Tensor) -> Tensor:  # noqa: ARG002
        """What latents [B, Z] add to an embedding, [B, E]."""
        raise UserError(f"{type(self).__name__} takes no latent, but was given one.")

    @abstractmethod
    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None = None) -> Tensor:
        """The noise in `x` [B, *event].

        Args:
            x: [B, *event].
            embedding: one a batch [1, E] or one a sample [B, E].
            seed: of each sample's dropout, 62 bits, int64, [B]; without it nothing is dropped.
        """


def conditioned(
    network: Denoiser, embedding: Tensor, condition: Condition = UNCONDITIONAL, latent: Tensor | None = None
) -> Tensor:
    """An embedding [1 or B, E] of steps with that of the labels and of the latent [B, Z] added to it.

    Raises:
        UserError: the network needs labels or a latent and has none, or the other way round.
    """
    labels = condition.labels
    if condition.embeddings is not None or condition.prompts is not None:
        raise UserError(f"{type(network).__name__} is conditioned on labels only, but was given prompts.")
    if (labels is None) != (network.classes == 0) or (latent is None) != (network.latent == 0):
        raise UserError(
            f"The denoiser has classes={network.classes} and latent={network.latent}: it must be given "
            f"{'labels' if network.classes else 'no labels'} and {'a latent' if network.latent else 'no latent'}."
        )
    if labels is not None:
        embedding = embedding + network.embed_labels(labels)
    return embedding if latent is None else embedding + network.embed_latent(latent)


class Critic(nn.Module, ABC):
    """Scores an input: an energy.

    Attributes:
        classes: how many classes it is conditioned on; 0 for none.
    """

    classes: int = 0

    @property
    def offsets(self) -> tuple[nn.Parameter, ...]:
        """Parameters that do no more than add one constant to all scores."""
        return ()

    @abstractmethod
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The score of `x` [B, *event]: [B]. A network with classes needs the label of each, int64 [B]."""


class TimedCritic(nn.Module, ABC):
    """Scores an input at a step: a value.

    Attributes:
        classes: how many classes it is conditioned on; 0 for none.
    """

    classes: int = 0

    @abstractmethod
    def embed(self, steps: Tensor) -> Tensor:
        """Embeddings [N, E] of policy steps [N]."""

    @abstractmethod
    def forward(self, x: Tensor, embedding: Tensor, labels: Tensor | None = None) -> Tensor:
        """The score of `x` [B, *event], given embeddings [1, E] or [B, E], and labels [B] if it has classes: [B]."""


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of a step at geometric frequencies from 1 to 1 / 10,000 (arXiv 1706.03762, section 3.5).

    Args:
        dim: how many, even.
        endpoint: reach 1 / 10,000, as DDPM's code does; else it would be the next frequency after the last.
        cosine_first: cosines before sines, as in ADM's code.
    """

    frequency: Tensor

    def __init__(self, dim: int, *, endpoint: bool = False, cosine_first: bool = False) -> None:
        super().__init__()
        self.cosine_first = cosine_first
        exponent = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2 - endpoint)
        self.register_buffer("frequency", torch.exp(-math.log(10_000.0) * exponent).float(), persistent=False)

    def forward(self, steps: Tensor) -> Tensor:
        """[N] to [N, dim]."""
        angle = steps.to(self.frequency.dtype)[:, None] * self.frequency
        waves = (angle.cos(), angle.sin()) if self.cosine_first else (angle.sin(), angle.cos())
        return torch.cat(waves, dim=1)
