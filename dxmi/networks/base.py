"""The interfaces of the networks, conditioning, and the time embedding."""

import math
from abc import ABC, abstractmethod
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.errors import UserError


class Denoiser(nn.Module, ABC):
    """Predicts the noise in a noisy input, or the quantity that its schedule interprets the output as.

    Attributes:
        dropout: probability of dropping an activation in training; if not 0, `forward` takes a seed per sample.
        classes: number of classes on which it is conditioned; 0 if it is unconditional.
        latent: dimension Z of the latent that it takes as a further input; 0 if it takes none.
    """

    dropout: float = 0.0
    classes: int = 0
    latent: int = 0

    def regions(self) -> Iterator[nn.Module]:
        """The modules that are compiled, each on its own; by default the network as a whole."""
        yield self

    @abstractmethod
    def embed(self, steps: Tensor) -> Tensor:
        """Embeddings [N, E] of diffusion steps [N], which may be fractional."""

    def embed_labels(self, labels: Tensor) -> Tensor:  # noqa: ARG002
        """The term that labels [B] add to an embedding, [B, E].

        Raises:
            UserError: the network is unconditional.
        """
        raise UserError(f"{type(self).__name__} is not class-conditional, but was given labels.")

    def embed_latent(self, latent: Tensor) -> Tensor:  # noqa: ARG002
        """The term that latents [B, Z] add to an embedding, [B, E].

        Raises:
            UserError: the network does not take a latent.
        """
        raise UserError(f"{type(self).__name__} does not take a latent, but was given one.")

    @abstractmethod
    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None = None) -> Tensor:
        """Predict the noise in `x`: [B, *event].

        Args:
            x: noisy input, [B, *event].
            embedding: one for the batch [1, E] or one per sample [B, E].
            seed: dropout seed of each sample, 62 bits, int64, [B]; None disables dropout.
        """


def conditioned(
    network: Denoiser, embedding: Tensor, condition: Condition = UNCONDITIONAL, latent: Tensor | None = None
) -> Tensor:
    """Add the embeddings of the labels and of the latent [B, Z] to an embedding of steps [1 or B, E].

    Raises:
        UserError: the network needs labels or a latent that are missing, or does not take those that were given, or the
            condition consists of prompts.
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
    """Scores an input; used as an energy.

    Attributes:
        classes: number of classes on which it is conditioned; 0 if it is unconditional.
    """

    classes: int = 0

    @property
    def offsets(self) -> tuple[nn.Parameter, ...]:
        """Parameters whose only effect is to add the same constant to all scores."""
        return ()

    @abstractmethod
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """The scores of `x` [B, *event]: [B]. A class-conditional network needs the labels, int64 [B]."""


class TimedCritic(nn.Module, ABC):
    """Scores an input at a step; used as a value function.

    Attributes:
        classes: number of classes on which it is conditioned; 0 if it is unconditional.
    """

    classes: int = 0

    @abstractmethod
    def embed(self, steps: Tensor) -> Tensor:
        """Embeddings [N, E] of policy steps [N]."""

    @abstractmethod
    def forward(self, x: Tensor, embedding: Tensor, labels: Tensor | None = None) -> Tensor:
        """The scores of `x` [B, *event]: [B].

        Args:
            x: input, [B, *event].
            embedding: one for the batch [1, E] or one per sample [B, E].
            labels: int64 [B] if the network is class-conditional, else None.
        """


class SinusoidalEmbedding(nn.Module):
    """Sines and cosines of a step at geometric frequencies from 1 to 1 / 10,000 (arXiv 1706.03762, section 3.5).

    Args:
        dim: size of the embedding, an even number.
        endpoint: whether the last frequency is 1 / 10,000, as in DDPM's code; else the one after the last would be.
        cosine_first: whether cosines come before sines, as in ADM's code.
    """

    frequency: Tensor

    def __init__(self, dim: int, *, endpoint: bool = False, cosine_first: bool = False) -> None:
        super().__init__()
        self.cosine_first = cosine_first
        exponent = torch.arange(dim // 2, dtype=torch.float64) / (dim // 2 - endpoint)
        self.register_buffer("frequency", torch.exp(-math.log(10_000.0) * exponent).float(), persistent=False)

    def forward(self, steps: Tensor) -> Tensor:
        """Map steps [N] to [N, dim]."""
        angle = steps.to(self.frequency.dtype)[:, None] * self.frequency
        waves = (angle.cos(), angle.sin()) if self.cosine_first else (angle.sin(), angle.cos())
        return torch.cat(waves, dim=1)
