"""Layers that the image networks share: initialised from a generator, and pure functions of what they are given.

Axis letters: B batch, C channels, H height, W width, N = H W pixels, G heads, D channels of a head, E embedding.
"""

import math
from collections.abc import Callable
from typing import TypeVar

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi.errors import UserError
from dxmi.networks.base import SinusoidalEmbedding

LayerT = TypeVar("LayerT", nn.Linear, nn.Conv2d)
Init = Callable[[int, int], tuple[float, float]]
"""From a layer's fan-in and fan-out to the bounds of the uniform distributions of its weights and of its biases."""


# ----------------------------------------------------------------------------
# Initialisation.


def fan_average(fan_in: int, fan_out: int) -> tuple[float, float]:
    """Weights of variance 2 / (fan_in + fan_out), biases zero: DDPM's (arXiv 2006.11239, released code)."""
    return math.sqrt(6.0 / (fan_in + fan_out)), 0.0


def zero(fan_in: int, fan_out: int) -> tuple[float, float]:  # noqa: ARG001
    """Everything zero: the last layer of a residual branch, which then starts as no branch at all."""
    return 0.0, 0.0


def fan_in_uniform(fan_in: int, fan_out: int) -> tuple[float, float]:  # noqa: ARG001
    """Weights and biases within 1 / sqrt(fan_in): PyTorch's own."""
    bound = 1.0 / math.sqrt(fan_in)
    return bound, bound


class Linear(nn.Linear):
    """A linear layer whose weights somebody else sets.

    PyTorch's own initialisation would draw from the global generator. On the meta device it would not, but that takes a
    second of imports in every process.
    """

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class Conv2d(nn.Conv2d):
    """A convolution whose weights somebody else sets, as for `Linear`."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


def fill(layer: LayerT, init: Init, generator: torch.Generator) -> LayerT:
    """`layer` with weights from `generator`."""
    positions = layer.weight[0, 0].numel()
    bounds = init(layer.weight.shape[1] * positions, layer.weight.shape[0] * positions)
    with torch.no_grad():
        for parameter, bound in zip(layer.parameters(), bounds, strict=False):
            parameter.uniform_(-bound, bound, generator=generator) if bound else parameter.zero_()
    return layer


def linear(
    inputs: int, outputs: int, generator: torch.Generator, init: Init = fan_average, *, bias: bool = True
) -> nn.Linear:
    """A linear layer."""
    return fill(Linear(inputs, outputs, bias=bias), init, generator)


def conv(
    inputs: int, outputs: int, size: int, generator: torch.Generator, init: Init = fan_average, *, bias: bool = True
) -> nn.Conv2d:
    """A convolution with a `size` x `size` kernel, an odd number, that keeps height and width."""
    layer = Conv2d(inputs, outputs, size, padding=size // 2, bias=bias)
    return fill(layer, init, generator)


def label_table(classes: int, outputs: int, generator: torch.Generator) -> nn.Embedding:
    """One standard normal row a class, [classes, outputs]."""
    return nn.Embedding(classes, outputs, _weight=torch.randn(classes, outputs, generator=generator))


# ----------------------------------------------------------------------------
# Pointwise.


def silu(x: Tensor) -> Tensor:
    """SiLU, in place where no gradient will ask for what went in."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU of the normalised `x`, which is left alone."""
    return silu(norm(x))


def as_map(vector: Tensor) -> Tensor:
    """[B, C] to [B, C, 1, 1], to be added to a map."""
    return vector[:, :, None, None]


# ----------------------------------------------------------------------------
# Attention.


class Attention(nn.Module):
    """Self-attention over the pixels with a residual: x + W softmax(q k^T / sqrt(D)) v (arXiv 1706.03762).

    Args:
        channels: C.
        heads: G; a divisor of C.
        norm: of the input.
        generator: of the weights.
        scale: of the sum, 1 or 1 / sqrt(2).
    """

    def __init__(
        self, channels: int, heads: int, norm: nn.Module, generator: torch.Generator, scale: float = 1.0
    ) -> None:
        super().__init__()
        self.heads = heads
        self.scale = scale
        self.norm = norm
        self.qkv = linear(channels, 3 * channels, generator)
        self.out = linear(channels, channels, generator, zero)

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to the same."""
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, N, C], without a copy if x is channels-last
        qkv = self.qkv(tokens).view(batch, height * width, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, G, N, D] each
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)  # [B, N, C]
        whole: Tensor = x + self.out(mixed).transpose(1, 2).view(batch, channels, height, width)
        return whole * self.scale if self.scale != 1.0 else whole


# ----------------------------------------------------------------------------
# Dropout.

_LAYER_STRIDE = 0x9E3779B1  # 2^32 over the golden ratio: it sends neighbouring layers far apart


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which every bit of the input changes each of the output with probability
    near 1/2 (Wellons' lowbias32); int32 in, int32 out.
    """
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def dropout_mask(seed: Tensor, layer: int, event: tuple[int, ...], rate: float) -> Tensor:
    """Which activations stay, [B, *event]; each does with probability 1 - `rate`.

    A hash of (the sample's seed, layer, position), not a draw from a stream: it is the same however a batch is shared
    among workers, cut into pieces, stacked, or computed a second time for the gradient.

    Args:
        seed: one for each sample, 62 bits, int64, [B].
        layer: tells apart the masks of one evaluation.
        event: shape of one sample's activations.
        rate: in (0, 1).
    """
    ones = (1,) * len(event)
    number = (layer + 1) * _LAYER_STRIDE % 2**31
    start = _mix(_mix((seed & 0x7FFFFFFF).int()) ^ number).view(-1, *ones)
    stride = _mix(_mix((seed >> 31).int()) ^ number).view(-1, *ones) | 1  # odd: no position is met twice
    position = torch.arange(math.prod(event), dtype=torch.int32, device=seed.device).view(event)
    return _mix(position * stride + start) >= round(rate * 2**32) - 2**31


class Dropout(nn.Module):
    """Dropout whose randomness is handed to it.

    Args:
        rate: probability of an activation to be dropped.
        layer: a number that no other dropout layer of the network has.
    """

    def __init__(self, rate: float, layer: int) -> None:
        super().__init__()
        self.rate = rate
        self.layer = layer

    def forward(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """[B, C, H, W] to the same; nothing is dropped without `seed` [B]."""
        if seed is None or self.rate == 0.0:
            return x
        mask = dropout_mask(seed, self.layer, tuple(x.shape[1:]), self.rate)
        return x * mask * (1.0 / (1.0 - self.rate))


# ----------------------------------------------------------------------------
# Spectral normalisation.

_POWER_ITERATIONS = 12


def spectral(weight: Tensor, start: Tensor) -> Tensor:
    """`weight` [O, ...] over its largest singular value as a matrix [O, I] (arXiv 1802.05957), by power iteration.

    The iteration begins at `start` [O] every time instead of where the last one ended. The result then depends on the
    weights alone, not on how often they were used, at the price of a few more products of a matrix and a vector.
    """
    matrix = weight.flatten(1)
    with torch.no_grad():
        left = start
        for _ in range(_POWER_ITERATIONS):
            right = F.normalize((matrix * left[:, None]).sum(0), dim=0)
            left = F.normalize((matrix * right).sum(1), dim=0)
    return weight / (matrix * left[:, None] * right).sum()


class SpectralConv(nn.Module):
    """A convolution whose weights are divided by their largest singular value.

    Args:
        layer: the convolution.
        generator: of the start of the power iteration.
    """

    start: Tensor

    def __init__(self, layer: nn.Conv2d, generator: torch.Generator) -> None:
        super().__init__()
        self.conv = layer
        start = torch.randn(layer.out_channels, generator=generator)
        self.register_buffer("start", F.normalize(start, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """[B, C, H, W] to [B, O, H, W]."""
        weight = spectral(self.conv.weight, self.start)
        return F.conv2d(x, weight, self.conv.bias, padding=self.conv.kernel_size[0] // 2)


def spectral_convs(network: nn.Module, generator: torch.Generator) -> None:
    """Put each convolution inside `network` into a `SpectralConv`."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(module, name, SpectralConv(child, generator))


# ----------------------------------------------------------------------------
# What critics of images share.


class StepMlp(nn.Module):
    """Steps [N] as sinusoids through two layers: [N, E].

    Args:
        width: E, and the number of sinusoids.
        generator: of the weights.
    """

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.sinusoids = SinusoidalEmbedding(width)
        self.inner = linear(width, width, generator)
        self.outer = linear(width, width, generator)

    def forward(self, steps: Tensor) -> Tensor:
        """[N] to [N, E]."""
        return silu(self.outer(silu(self.inner(self.sinusoids(steps)))))


def image_event(event: tuple[int, ...], what: str, least: int) -> tuple[int, int]:
    """(C, H) of an event that must be a square image of at least `least` pixels a side.

    Raises:
        UserError: it is not.
    """
    if len(event) != 3 or event[1] != event[2] or event[1] < least:
        raise UserError(f"{what} needs square images of {least} pixels or more, but a sample has shape {tuple(event)}.")
    return event[0], event[1]


def require_labels(labels: Tensor | None, classes: int) -> Tensor | None:
    """The labels if there are classes.

    Raises:
        UserError: there are classes and no labels, or labels and no classes.
    """
    if (labels is None) != (classes == 0):
        missing = "but no labels were given" if classes else "but labels were given"
        raise UserError(f"The network has classes={classes}, {missing}.")
    return labels
