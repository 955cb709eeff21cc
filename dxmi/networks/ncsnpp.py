"""NCSN++ (Song et al., arXiv 2011.13456) as the generator of a denoising-diffusion GAN (Xiao et al., arXiv 2112.07804).

A U-Net that predicts the image from a noisy one and a latent z. An MLP of z scales and shifts the norms of the residual
blocks, and the step embedding is added as in DDPM's U-Net. Resampling uses the filter [1, 3, 3, 1]. Every lower
resolution of the encoder also receives the downsampled noisy image. Every sum of two branches is divided by sqrt(2).

Axis letters: B batch, C channels, H height, W width, E embedding (of the step, then of the latent), Z latent.
"""

import math
from collections.abc import Sequence
from functools import partial
from typing import cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dxmi.errors import UserError
from dxmi.networks.base import Denoiser, SinusoidalEmbedding
from dxmi.networks.configs import NcsnppGanConfig
from dxmi.networks.layers import Attention, GroupNorm, as_map, conv, image_event, linear, silu, zero

_EPS = 1e-6
_ROOT_HALF = math.sqrt(0.5)


# ----------------------------------------------------------------------------
# Resampling with the separable filter [1, 3, 3, 1] / 8 and zero padding.


def _filter(x: Tensor, gain: float) -> Tensor:
    """The filter times `gain`, repeated for each channel of `x`, [C, 1, 4, 4]."""
    tap = torch.tensor([1.0, 3.0, 3.0, 1.0], dtype=x.dtype, device=x.device) * (gain / 8.0)
    return torch.outer(tap, tap).expand(x.shape[1], 1, 4, 4)


def fir_half(x: Tensor) -> Tensor:
    """Filter, then take every second pixel: [B, C, H, W] to [B, C, H / 2, W / 2]."""
    return F.conv2d(x, _filter(x, 1.0), stride=2, padding=1, groups=x.shape[1])


def fir_double(x: Tensor) -> Tensor:
    """Insert zeros between the pixels, then filter: [B, C, H, W] to [B, C, 2 H, 2 W]."""
    return F.conv_transpose2d(x, _filter(x, 2.0), stride=2, padding=1, groups=x.shape[1])


class _Pyramid(nn.Module):
    """Maps the noisy image to the next lower resolution: the filter, then a 3x3 convolution with stride 2."""

    def __init__(self, inputs: int, outputs: int, generator: torch.Generator) -> None:
        super().__init__()
        self.conv = conv(inputs, outputs, 3, generator)

    def forward(self, x: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H / 2, W / 2]."""
        smooth = F.conv2d(x, _filter(x, 1.0), padding=2, groups=x.shape[1])  # [B, inputs, H + 1, W + 1]
        return F.conv2d(smooth, self.conv.weight, self.conv.bias, stride=2)


# ----------------------------------------------------------------------------
# Blocks. Each takes a feature map [B, C, H, W], the step embedding after SiLU [1 or B, 4 C], and the embedded latent
# [B, E'].


def _groups(channels: int) -> int:
    return min(channels // 4, 32)


def _norm(channels: int) -> nn.GroupNorm:
    return GroupNorm(_groups(channels), channels, eps=_EPS)


class _AdaptiveNorm(nn.Module):
    """GroupNorm whose scale and shift are functions of the latent, initially near 1 and 0."""

    def __init__(self, channels: int, latent: int, generator: torch.Generator) -> None:
        super().__init__()
        self.style = linear(latent, 2 * channels, generator)
        with torch.no_grad():
            self.style.bias[:channels].fill_(1.0)
        self.groups = _groups(channels)

    def forward(self, x: Tensor, latent: Tensor) -> Tensor:
        """Map [B, C, H, W] to [B, C, H, W]."""
        scale, shift = as_map(self.style(latent)).chunk(2, dim=1)
        return torch.addcmul(shift, scale, F.group_norm(x, self.groups, eps=_EPS))


class _Block(nn.Module):
    """(skip(x) + conv(silu(norm(conv(resample(silu(norm(x)))) + step)))) / sqrt(2) with adaptive norms."""

    def __init__(
        self, inputs: int, outputs: int, config: NcsnppGanConfig, generator: torch.Generator, resample: str = ""
    ) -> None:
        super().__init__()
        self.resample = {"": None, "down": fir_half, "up": fir_double}[resample]
        self.norm_in = _AdaptiveNorm(inputs, config.latent_embedding, generator)
        self.conv_in = conv(inputs, outputs, 3, generator)
        self.step = linear(4 * config.channels, outputs, generator)
        self.norm_out = _AdaptiveNorm(outputs, config.latent_embedding, generator)
        self.conv_out = conv(outputs, outputs, 3, generator, zero)
        straight = inputs == outputs and not resample
        self.skip = nn.Identity() if straight else conv(inputs, outputs, 1, generator)

    def forward(self, x: Tensor, step: Tensor, latent: Tensor) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H', W']."""
        h = silu(self.norm_in(x, latent))
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self.conv_in(h) + as_map(self.step(step))
        h = self.conv_out(silu(self.norm_out(h, latent)))
        skip: Tensor = self.skip(x)
        whole: Tensor = (skip + h) * _ROOT_HALF
        return whole


class _Level(nn.Module):
    """The blocks of one resolution with their attention, and the resampling to the next resolution.

    The encoder has attention after each block, the decoder only after the last one.
    """

    def __init__(
        self, blocks: list[_Block], attention: list[nn.Module], resample: _Block | None, pyramid: _Pyramid | None
    ) -> None:
        super().__init__()
        self.blocks = cast("Sequence[_Block]", nn.ModuleList(blocks))
        self.attention = cast("Sequence[nn.Module]", nn.ModuleList(attention))
        self.resample = resample
        self.pyramid = pyramid


# ----------------------------------------------------------------------------
# The network.


class NcsnppGan(Denoiser):
    """A generator that predicts an image with values in (-1, 1) from a noisy one.

    Args:
        config: settings of the network.
        event: (C, H, W) of one sample, H = W.
        generator: draws the initial weights.

    Raises:
        UserError: the size of the images cannot be halved as often as the config requires.
    """

    def __init__(self, config: NcsnppGanConfig, event: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        in_channels, self.size = image_event(event, "NCSN++", least=1)
        halvings = len(config.multipliers) - 1
        if self.size % 2**halvings:
            raise UserError(f"NCSN++ halves its input {halvings} times, which is impossible with {self.size} pixels.")
        self.config = config
        self.latent = config.latent
        channels, hidden, width = config.channels, 4 * config.channels, config.latent_embedding
        self.sinusoids = SinusoidalEmbedding(channels, endpoint=True)
        self.embed_in = linear(channels, hidden, generator)
        self.embed_out = linear(hidden, hidden, generator)
        inputs = [config.latent, *[width] * config.latent_layers]
        self.latent_layers = nn.ModuleList(linear(size, width, generator) for size in inputs)

        self.conv_in = conv(in_channels, channels, 3, generator)
        self._add_levels(in_channels, generator)
        self.norm_out = _norm(channels * config.multipliers[0])
        self.conv_out = conv(channels * config.multipliers[0], in_channels, 3, generator, zero)
        if config.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _add_levels(self, in_channels: int, generator: torch.Generator) -> None:
        """Add all levels of the encoder and the decoder."""
        config = self.config
        block = partial(_Block, config=config, generator=generator)
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        last, width, pyramid, seen, down = len(widths) - 1, config.channels, in_channels, [config.channels], []

        def attention(level: int, width: int, number: int) -> list[nn.Module]:
            attends = self.size >> level in (config.attention or ())
            return [self._attention(width, generator) for _ in range(number)] if attends else []

        for level, target in enumerate(widths):
            blocks = [block(width if i == 0 else target, target) for i in range(config.blocks)]
            width = target
            seen += [width] * (config.blocks + (level < last))
            lower = (block(width, width, resample="down"), _Pyramid(pyramid, width, generator)) if level < last else ()
            pyramid = width
            down.append(_Level(blocks, attention(level, width, config.blocks), *(lower or (None, None))))
        self.down = cast("Sequence[_Level]", nn.ModuleList(down))

        self.middle_in, self.middle_out = block(width, width), block(width, width)
        self.middle_attention = self._attention(width, generator)

        up = []
        for level in range(last, -1, -1):
            blocks = []
            for _ in range(config.blocks + 1):
                blocks.append(block(width + seen.pop(), widths[level]))
                width = widths[level]
            higher = block(width, width, resample="up") if level else None
            up.append(_Level(blocks, attention(level, width, 1), higher, None))
        self.up = cast("Sequence[_Level]", nn.ModuleList(up))

    @staticmethod
    def _attention(channels: int, generator: torch.Generator) -> Attention:
        return Attention(channels, 1, _norm(channels), generator, scale=_ROOT_HALF)

    def embed(self, steps: Tensor) -> Tensor:
        """Map steps [N] to [N, E], with zeros to which an embedded latent is added."""
        step = self.embed_out(silu(self.embed_in(self.sinusoids(steps))))
        return F.pad(step, (0, self.config.latent_embedding))

    def embed_latent(self, latent: Tensor) -> Tensor:
        """Map latents [B, Z] to [B, E], to be added to the embedding of a step."""
        h = latent * (latent.square().mean(1, keepdim=True) + 1e-8).rsqrt()
        for layer in self.latent_layers:
            h = silu(layer(h))
        return F.pad(h, (4 * self.config.channels, 0))

    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None = None) -> Tensor:  # noqa: ARG002
        """Predict the image in `x` [B, C, H, W], without dropout."""
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        hidden = 4 * self.config.channels
        step, latent = embedding[:, :hidden], embedding[:, hidden:]
        run = partial(self._run, F.silu(step), latent)
        h: Tensor = self.conv_in(x)
        seen, image = [h], x
        for level in self.down:
            for number, block in enumerate(level.blocks):
                h = run(block, h)
                h = level.attention[number](h) if level.attention else h
                seen.append(h)
            if level.resample is not None and level.pyramid is not None:
                h = image = (level.pyramid(image) + run(level.resample, h)) * _ROOT_HALF
                seen.append(h)
        h = run(self.middle_out, self.middle_attention(run(self.middle_in, h)))
        for level in self.up:
            for block in level.blocks:
                h = run(block, torch.cat((h, seen.pop()), dim=1))
            h = level.attention[0](h) if level.attention else h
            h = run(level.resample, h) if level.resample is not None else h
        return torch.tanh(self.conv_out(silu(self.norm_out(h))))

    def _run(self, step: Tensor, latent: Tensor, block: nn.Module, h: Tensor) -> Tensor:
        """Apply a block, with activation checkpointing if `recompute` is set."""
        if self.config.recompute and torch.is_grad_enabled():
            return checkpoint(block, h, step, latent, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return block(h, step, latent)  # type: ignore[no-any-return]
