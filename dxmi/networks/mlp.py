"""Multilayer perceptrons for small images and points: denoiser, energy and value.

Axis letters: B batch, D event dimensions flattened, H hidden units, E embedding.
"""

import math
from itertools import pairwise

import torch
from torch import Tensor, nn

from dxmi.networks.base import Critic, Denoiser, SinusoidalEmbedding, TimedCritic
from dxmi.networks.configs import MlpConfig
from dxmi.networks.layers import label_table, linear, require_labels


def _linear(
    inputs: int, outputs: int, generator: torch.Generator, *, bias: bool = True, gain: float = 1.0
) -> nn.Linear:
    """A linear layer with parameters uniform within +-gain / sqrt(inputs), drawn from `generator`."""
    bound = gain / math.sqrt(inputs)
    return linear(inputs, outputs, generator, lambda *_: (bound, bound), bias=bias)


class _Body(nn.Module):
    """Linear layers with SiLU between them."""

    def __init__(self, config: MlpConfig, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        widths = [inputs, *[config.hidden] * (config.layers - 1), outputs]
        gains = [config.first_gain, *[1.0] * (config.layers - 1)]
        ends = zip(pairwise(widths), gains, strict=True)
        self.layers = nn.ModuleList([_linear(a, b, generator, gain=gain) for (a, b), gain in ends])

    def forward(self, x: Tensor, embedding: Tensor | None = None) -> Tensor:
        """Map [B, *event] to [B, outputs]; an embedding [1 or B, H] is added to the first layer's pre-activation.

        Adding a projected embedding is equivalent to concatenating the embedding to the input, and cheaper.
        """
        first, *others = self.layers
        h: Tensor = first(x.flatten(1))
        if embedding is not None:
            h += embedding
        for layer in others:  # in place when gradients are disabled, which saves memory traffic in rollouts
            h = layer(nn.functional.silu(h, inplace=not torch.is_grad_enabled()))
        return h


class _StepEmbedding(nn.Module):
    """Map steps [N] to terms of the first layer's pre-activation, [N, H]."""

    def __init__(self, config: MlpConfig, generator: torch.Generator) -> None:
        super().__init__()
        self.sinusoids = SinusoidalEmbedding(config.embedding)
        self.linear = _linear(config.embedding, config.hidden, generator, bias=False)

    def forward(self, steps: Tensor) -> Tensor:
        projected: Tensor = self.linear(self.sinusoids(steps))
        return projected


class MlpDenoiser(Denoiser):
    """Predicts noise with the shape of its input."""

    def __init__(self, config: MlpConfig, event: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.classes = config.classes
        self.body = _Body(config, math.prod(event), math.prod(event), generator)
        self.steps = _StepEmbedding(config, generator)
        self.labels = label_table(config.classes, config.hidden, generator) if config.classes else None

    def embed(self, steps: Tensor) -> Tensor:
        """Map steps [N] to [N, H]."""
        embedding: Tensor = self.steps(steps)
        return embedding

    def embed_labels(self, labels: Tensor) -> Tensor:
        """Map labels [B] to [B, H]."""
        if self.labels is None:
            return super().embed_labels(labels)
        embedding: Tensor = self.labels(labels)
        return embedding

    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Predict the noise in `x` [B, *event]; the MLP has no dropout."""
        noise: Tensor = self.body(x, embedding)
        return noise.view_as(x)


class MlpCritic(Critic):
    """A time-independent score."""

    def __init__(self, config: MlpConfig, event: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.classes = config.classes
        self.body = _Body(config, math.prod(event), 1, generator)
        self.labels = label_table(config.classes, config.hidden, generator) if config.classes else None

    @property
    def offsets(self) -> tuple[nn.Parameter, ...]:
        """The bias of the last layer."""
        return (self.body.layers[-1].bias,)  # type: ignore[return-value]

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map [B, *event] to scores [B]."""
        labels = require_labels(labels, self.classes)
        score: Tensor = self.body(x, None if self.labels is None else self.labels(labels))
        return score.squeeze(1)


class MlpTimedCritic(TimedCritic):
    """A time-conditioned score."""

    def __init__(self, config: MlpConfig, event: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.classes = config.classes
        self.body = _Body(config, math.prod(event), 1, generator)
        self.steps = _StepEmbedding(config, generator)
        self.labels = label_table(config.classes, config.hidden, generator) if config.classes else None

    def embed(self, steps: Tensor) -> Tensor:
        """Map steps [N] to [N, H]."""
        embedding: Tensor = self.steps(steps)
        return embedding

    def forward(self, x: Tensor, embedding: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map [B, *event] and embedded steps [1 or B, H] to scores [B]."""
        labels = require_labels(labels, self.classes)
        if self.labels is not None:
            embedding = embedding + self.labels(labels)
        score: Tensor = self.body(x, embedding)
        return score.squeeze(1)
