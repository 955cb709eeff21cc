"""Layers of the image networks. They are initialized from a generator and are pure functions of their arguments.

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
"""Maps a layer's fan-in and fan-out to the bounds of the uniform distributions of its weights and of its biases."""


# ----------------------------------------------------------------------------
# Initialization.


def fan_average(fan_in: int, fan_out: int) -> tuple[float, float]:
    """Weights of variance 2 / (fan_in + fan_out) and zero biases, as in DDPM's released code (arXiv 2006.11239)."""
    return math.sqrt(6.0 / (fan_in + fan_out)), 0.0


def zero(fan_in: int, fan_out: int) -> tuple[float, float]:  # noqa: ARG001
    """Zero weights and biases, for the last layer of a residual branch, so that the block starts as the identity."""
    return 0.0, 0.0


def fan_in_uniform(fan_in: int, fan_out: int) -> tuple[float, float]:  # noqa: ARG001
    """Weights and biases within 1 / sqrt(fan_in), PyTorch's default."""
    bound = 1.0 / math.sqrt(fan_in)
    return bound, bound


class Linear(nn.Linear):
    """A linear layer that does not initialize its weights; `fill` does.

    PyTorch's default initialization would draw from the global generator. Creating the layer on the meta device avoids
    that, but costs a second of imports in every process.
    """

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


class Conv2d(nn.Conv2d):
    """A convolution that does not initialize its weights, see `Linear`."""

    def reset_parameters(self) -> None:
        """Leave the weights as they are."""


def fill(layer: LayerT, init: Init, generator: torch.Generator) -> LayerT:
    """Draw the weights and biases of `layer` from `generator` and return `layer`."""
    positions = layer.weight[0, 0].numel()
    bounds = init(layer.weight.shape[1] * positions, layer.weight.shape[0] * positions)
    with torch.no_grad():
        for parameter, bound in zip(layer.parameters(), bounds, strict=False):
            parameter.uniform_(-bound, bound, generator=generator) if bound else parameter.zero_()
    return layer


def linear(
    inputs: int, outputs: int, generator: torch.Generator, init: Init = fan_average, *, bias: bool = True
) -> nn.Linear:
    """A linear layer with weights drawn from `generator`."""
    return fill(Linear(inputs, outputs, bias=bias), init, generator)


def conv(
    inputs: int, outputs: int, size: int, generator: torch.Generator, init: Init = fan_average, *, bias: bool = True
) -> nn.Conv2d:
    """A convolution with a `size` x `size` kernel, `size` odd, that keeps height and width."""
    layer = Conv2d(inputs, outputs, size, padding=size // 2, bias=bias)
    return fill(layer, init, generator)


def label_table(classes: int, outputs: int, generator: torch.Generator) -> nn.Embedding:
    """An embedding table with one standard normal row per class, [classes, outputs]."""
    return nn.Embedding(classes, outputs, _weight=torch.randn(classes, outputs, generator=generator))


# ----------------------------------------------------------------------------
# Pointwise.


def silu(x: Tensor) -> Tensor:
    """SiLU, in place when gradients are disabled."""
    return F.silu(x, inplace=not torch.is_grad_enabled())


def norm_silu(norm: nn.Module, x: Tensor) -> Tensor:
    """SiLU of the normalized `x`; `x` itself is not modified."""
    return silu(norm(x))


class GroupNorm(nn.GroupNorm):
    """Group normalization (arXiv 1803.08494), computed channel by channel in a compiled channels-last network.

    There, the pixels of a group are far apart in memory, and a compiled reduction over a group would read several times
    what it needs. Mean and variance of each channel are read in one pass instead, and then combined.
    """

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, *] to [B, C, *]."""
        if torch.compiler.is_compiling() and x.dim() == 4 and x.is_contiguous(memory_format=torch.channels_last):
            return self.by_channel(x)
        return super().forward(x)

    def by_channel(self, x: Tensor) -> Tensor:
        """Compute the same for [B, C, H, W]; as by autocast, in float32 and with a float32 result."""
        x = x.float()
        var, mean = torch.var_mean(x, dim=(2, 3), correction=0)  # [B, C]
        center = _group_mean(mean, self.num_groups)
        spread = _group_mean(var + (mean - center).square(), self.num_groups)
        scale = self.weight * (spread + self.eps).rsqrt()
        return torch.addcmul(as_map(self.bias - center * scale), x, as_map(scale))


def _group_mean(x: Tensor, groups: int) -> Tensor:
    """Replace each channel of `x` [B, C] by the mean over its group."""
    grouped = x.view(len(x), groups, -1)
    mean: Tensor = grouped.mean(2, keepdim=True).expand_as(grouped).flatten(1)
    return mean


def as_map(vector: Tensor) -> Tensor:
    """Reshape [B, C] to [B, C, 1, 1], which broadcasts over a feature map."""
    return vector[:, :, None, None]


# ----------------------------------------------------------------------------
# Attention.


class Attention(nn.Module):
    """Self-attention over the pixels with a residual: x + W softmax(q k^T / sqrt(D)) v (arXiv 1706.03762).

    Args:
        channels: C.
        heads: G, a divisor of C.
        norm: applied to the input of the attention.
        generator: draws the initial weights.
        scale: factor of the sum, 1 or 1 / sqrt(2).
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
        """Map [B, C, H, W] to [B, C, H, W]."""
        batch, channels, height, width = x.shape
        tokens = self.norm(x).flatten(2).transpose(1, 2)  # [B, N, C], without a copy if x is channels-last
        qkv = self.qkv(tokens).view(batch, height * width, 3, self.heads, channels // self.heads)
        query, key, value = qkv.permute(2, 0, 3, 1, 4).unbind(0)  # [B, G, N, D] each
        mixed = F.scaled_dot_product_attention(query, key, value).transpose(1, 2).flatten(2)  # [B, N, C]
        whole: Tensor = x + self.out(mixed).transpose(1, 2).view(batch, channels, height, width)
        return whole * self.scale if self.scale != 1.0 else whole


# ----------------------------------------------------------------------------
# Dropout.

_LAYER_STRIDE = 0x9E3779B1  # 2^32 / golden ratio: maps consecutive layer numbers to distant values


def _mix(x: Tensor) -> Tensor:
    """A bijection of 32-bit integers in which each input bit flips each output bit with a probability near 1/2.

    This is Wellons' lowbias32; int32 in, int32 out.
    """
    x = x ^ (x >> 16 & 0xFFFF)
    x = x * 0x7FEB352D
    x = x ^ (x >> 15 & 0x1FFFF)
    x = x * (0x846CA68B - 2**32)
    return x ^ (x >> 16 & 0xFFFF)


def dropout_mask(seed: Tensor, layer: int, event: tuple[int, ...], rate: float) -> Tensor:
    """The mask of activations to keep, each with probability 1 - `rate`: bool, [B, *event].

    The mask is a hash of (seed of the sample, layer, position) and is not drawn from a generator. It is therefore the
    same when a batch is sharded, split into micro-batches, stacked, or recomputed in the backward pass.

    Args:
        seed: one per sample, 62 bits, int64, [B].
        layer: number of the dropout layer, so that the masks of the layers differ.
        event: shape of one sample's activations.
        rate: probability of dropping an activation, in (0, 1).
    """
    ones = (1,) * len(event)
    number = (layer + 1) * _LAYER_STRIDE % 2**31
    start = _mix(_mix((seed & 0x7FFFFFFF).int()) ^ number).view(-1, *ones)
    stride = _mix(_mix((seed >> 31).int()) ^ number).view(-1, *ones) | 1  # odd: distinct positions stay distinct
    position = torch.arange(math.prod(event), dtype=torch.int32, device=seed.device).view(event)
    return _mix(position * stride + start) >= round(rate * 2**32) - 2**31


class Dropout(nn.Module):
    """Dropout whose randomness comes from a seed per sample.

    Args:
        rate: probability of dropping an activation.
        layer: a number that is unique among the dropout layers of the network.
    """

    def __init__(self, rate: float, layer: int) -> None:
        super().__init__()
        self.rate = rate
        self.layer = layer

    def forward(self, x: Tensor, seed: Tensor | None) -> Tensor:
        """Map [B, C, H, W] to [B, C, H, W]; nothing is dropped if `seed` [B] is None."""
        if seed is None or self.rate == 0.0:
            return x
        mask = dropout_mask(seed, self.layer, tuple(x.shape[1:]), self.rate)
        return x * mask * (1.0 / (1.0 - self.rate))


# ----------------------------------------------------------------------------
# Spectral normalization.

_POWER_ITERATIONS = 12


def spectral(weight: Tensor, start: Tensor) -> Tensor:
    """Divide `weight` [O, ...] by the largest singular value of its matrix [O, I] (arXiv 1802.05957).

    The power iteration always starts from `start` [O], not from its previous result, so that the output depends only on
    the weights and not on the number of previous calls. This costs a few more matrix-vector products.
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
        generator: draws the start of the power iteration.
    """

    start: Tensor

    def __init__(self, layer: nn.Conv2d, generator: torch.Generator) -> None:
        super().__init__()
        self.conv = layer
        start = torch.randn(layer.out_channels, generator=generator)
        self.register_buffer("start", F.normalize(start, dim=0))

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, O, H, W]."""
        weight = spectral(self.conv.weight, self.start)
        return F.conv2d(x, weight, self.conv.bias, padding=self.conv.kernel_size[0] // 2)


def spectral_convs(network: nn.Module, generator: torch.Generator) -> None:
    """Wrap each convolution inside `network` in a `SpectralConv`."""
    for module in list(network.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.Conv2d):
                setattr(module, name, SpectralConv(child, generator))


# ----------------------------------------------------------------------------
# Layers and checks for the image networks.


class StepMlp(nn.Module):
    """A sinusoidal embedding of steps, followed by two layers.

    Args:
        width: E, which is also the number of sinusoids.
        generator: draws the initial weights.
    """

    def __init__(self, width: int, generator: torch.Generator) -> None:
        super().__init__()
        self.sinusoids = SinusoidalEmbedding(width)
        self.inner = linear(width, width, generator)
        self.outer = linear(width, width, generator)

    def forward(self, steps: Tensor) -> Tensor:
        """Map steps [N] to [N, E]."""
        return silu(self.outer(silu(self.inner(self.sinusoids(steps)))))


def image_event(event: tuple[int, ...], what: str, least: int) -> tuple[int, int]:
    """Return (C, H) of an event, which must be a square image with sides of at least `least` pixels.

    Raises:
        UserError: the event is not such an image.
    """
    if len(event) != 3 or event[1] != event[2] or event[1] < least:
        raise UserError(f"{what} needs square images of {least} pixels or more, but a sample has shape {tuple(event)}.")
    return event[0], event[1]


def require_labels(labels: Tensor | None, classes: int) -> Tensor | None:
    """Return the labels, which must be None exactly if the network is unconditional.

    Raises:
        UserError: there are classes but no labels, or labels but no classes.
    """
    if (labels is None) != (classes == 0):
        missing = "but no labels were given" if classes else "but labels were given"
        raise UserError(f"The network has classes={classes}, {missing}.")
    return labels
