"""U-Nets: that of DDPM for 32x32 images (arXiv 2006.11239), and that of ADM, which EDM uses (2105.05233, 2206.00364).

Both are the same network with different blocks: an encoder whose levels halve the resolution, and a decoder with skip
connections by concatenation. By default they differ in these points:

           embedding                 between levels                      attention              GroupNorm
    DDPM   added                     convolutions                        one head               eps 1e-6
    ADM    scales and shifts a norm  residual blocks that resample       heads of 64 channels   eps 1e-5

Axis letters: B batch, C channels, H height, W width, E embedding.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple, cast

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from dxmi.errors import UserError
from dxmi.networks.base import Denoiser, SinusoidalEmbedding
from dxmi.networks.configs import EdmUnetConfig, UnetConfig
from dxmi.networks.layers import (
    Attention,
    Dropout,
    GroupNorm,
    as_map,
    conv,
    image_event,
    label_table,
    linear,
    norm_silu,
    silu,
    zero,
)

# ----------------------------------------------------------------------------
# Configs.


class Style(NamedTuple):
    """The differences between the two kinds of U-Net.

    Attributes:
        adm: whether it is the ADM kind: cosines before sines, and strided convolutions padded on all sides.
        eps: epsilon of each GroupNorm.
        scale_shift: see `EdmUnetConfig`.
        resample_in_blocks: see `EdmUnetConfig`.
        step_scale: see `EdmUnetConfig`.
    """

    adm: bool = False
    eps: float = 1e-6
    scale_shift: bool = False
    resample_in_blocks: bool = False
    step_scale: float = 1.0


def style_of(config: UnetConfig) -> Style:
    """The style of a config's kind."""
    if isinstance(config, EdmUnetConfig):
        return Style(True, 1e-5, config.scale_shift, config.resample_in_blocks, config.step_scale)
    return Style()


Resample = Callable[[Tensor], Tensor]

# ----------------------------------------------------------------------------
# Blocks. Each takes a feature map [B, C, H, W], the embedding after SiLU [1 or B, E], and the seed [B] or None.


def downsample(x: Tensor) -> Tensor:
    """Average 2x2 pixels: [B, C, H, W] to [B, C, H / 2, W / 2]."""
    return F.avg_pool2d(x, 2)


def upsample(x: Tensor) -> Tensor:
    """Repeat each pixel 2x2 times: [B, C, H, W] to [B, C, 2 H, 2 W]."""
    with torch.autocast(x.device.type, enabled=False):  # it would compute in float32, although it only copies
        return F.interpolate(x, scale_factor=2.0, mode="nearest")


class ResidualBlock(nn.Module):
    """skip(x) + conv(dropout(silu(norm(conv(silu(norm(x))) with the embedding)))).

    Args:
        inputs: number of input channels.
        outputs: number of output channels.
        layers: factory of the network's layers.
        resample: `downsample`, `upsample` or None, applied between the first norm and the first convolution.
    """

    def __init__(self, inputs: int, outputs: int, layers: "LayerFactory", resample: Resample | None = None) -> None:
        super().__init__()
        generator, scale_shift = layers.generator, layers.style.scale_shift
        self.scale_shift = scale_shift
        self.resample = resample
        self.norm_in = layers.norm(inputs)
        self.conv_in = conv(inputs, outputs, 3, generator)
        self.embedding = linear(4 * layers.config.channels, outputs * (2 if scale_shift else 1), generator)
        self.norm_out = layers.norm(outputs)
        self.dropout = Dropout(layers.config.dropout, layers.next_number())
        self.conv_out = conv(outputs, outputs, 3, generator, zero)
        self.skip = conv(inputs, outputs, 1, generator) if inputs != outputs else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H', W']."""
        h: Tensor = norm_silu(self.norm_in, x)
        if self.resample is not None:
            h, x = self.resample(h), self.resample(x)
        h = self._embedded(self.conv_in(h), as_map(self.embedding(embedding)))
        h = self.conv_out(self.dropout(h, seed))
        skip: Tensor = self.skip(x)
        return skip + h

    def _embedded(self, h: Tensor, embedding: Tensor) -> Tensor:
        if not self.scale_shift:
            return norm_silu(self.norm_out, h + embedding)
        scale, shift = embedding.chunk(2, dim=1)
        return silu(torch.addcmul(shift, self.norm_out(h), 1.0 + scale))


class Stage(nn.Module):
    """A residual block, followed by attention on some levels."""

    def __init__(self, inputs: int, outputs: int, layers: "LayerFactory", *, attention: bool) -> None:
        super().__init__()
        self.block = ResidualBlock(inputs, outputs, layers)
        self.attention = layers.attention(outputs) if attention else nn.Identity()

    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H, W]."""
        h: Tensor = self.attention(self.block(x, embedding, seed))
        return h


class Downsample(nn.Module):
    """A 3x3 convolution with stride 2; DDPM's is padded only at the right and at the bottom, as in TensorFlow."""

    def __init__(self, channels: int, layers: "LayerFactory") -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, layers.generator)
        self.pads = (1, 1, 1, 1) if layers.style.adm else (0, 1, 0, 1)

    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None) -> Tensor:  # noqa: ARG002
        """Map [B, C, H, W] to [B, C, H / 2, W / 2]."""
        return F.conv2d(F.pad(x, self.pads), self.conv.weight, self.conv.bias, stride=2)


class Upsample(nn.Module):
    """Nearest-neighbor upsampling by a factor of 2, then a 3x3 convolution."""

    def __init__(self, channels: int, layers: "LayerFactory") -> None:
        super().__init__()
        self.conv = conv(channels, channels, 3, layers.generator)

    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None) -> Tensor:  # noqa: ARG002
        """Map [B, C, H, W] to [B, C, 2 H, 2 W]."""
        h: Tensor = self.conv(upsample(x))
        return h


class Level(nn.Module):
    """The stages of one resolution, and the resampling to the next one, if there is one."""

    def __init__(self, stages: list[Stage], resample: nn.Module | None) -> None:
        super().__init__()
        self.stages = cast("Sequence[Stage]", nn.ModuleList(stages))
        self.resample = resample


class LayerFactory:
    """Builds the layers of one network from its settings.

    Args:
        config: settings of the network.
        generator: draws the initial weights.
    """

    def __init__(self, config: UnetConfig, generator: torch.Generator) -> None:
        self.config = config
        self.style = style_of(config)
        self.generator = generator
        self._numbers = 0

    def next_number(self) -> int:
        """The number of the next dropout layer, counted from 0."""
        self._numbers += 1
        return self._numbers - 1

    def norm(self, channels: int) -> nn.GroupNorm:
        """A GroupNorm with the config's number of groups."""
        return GroupNorm(self.config.groups, channels, eps=self.style.eps)

    def attention(self, channels: int) -> Attention:
        """Attention with heads of the config's size."""
        heads = channels // (self.config.head_channels or channels)
        return Attention(channels, heads, self.norm(channels), self.generator)

    def down(self, channels: int) -> nn.Module:
        """The downsampling from one level to the next lower resolution."""
        blocks = self.style.resample_in_blocks
        return ResidualBlock(channels, channels, self, downsample) if blocks else Downsample(channels, self)

    def up(self, channels: int) -> nn.Module:
        """The upsampling from one level to the next higher resolution."""
        blocks = self.style.resample_in_blocks
        return ResidualBlock(channels, channels, self, upsample) if blocks else Upsample(channels, self)


# ----------------------------------------------------------------------------
# The network.


class Unet(Denoiser):
    """A U-Net whose output has the shape of its input.

    Args:
        config: settings of the network.
        event: (C, H, W) of one sample, H = W.
        generator: draws the initial weights.

    Raises:
        UserError: the size of the images is not divisible as the config requires.
    """

    def __init__(self, config: UnetConfig, event: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        in_channels, self.size = _checked(config, event)
        self.config = config
        self.dropout, self.classes = config.dropout, config.classes
        layers = LayerFactory(config, generator)
        channels, hidden, adm = config.channels, 4 * config.channels, layers.style.adm
        self.style = layers.style
        self.sinusoids = SinusoidalEmbedding(channels, endpoint=not adm, cosine_first=adm)
        self.embed_in = linear(channels, hidden, generator)
        self.embed_out = linear(hidden, hidden, generator)
        self.labels = label_table(config.classes, hidden, generator) if config.classes else None

        width = channels * config.multipliers[0]
        self.conv_in = conv(in_channels * config.patch**2, width, 3, generator)
        self._add_levels(layers, width)
        self.norm_out = layers.norm(width)
        self.conv_out = conv(width, in_channels * config.patch**2, 3, generator, zero)
        if config.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def _add_levels(self, layers: LayerFactory, width: int) -> None:
        """Add all levels of the encoder and the decoder, starting from `width` channels."""
        config = self.config
        widths = [config.channels * multiplier for multiplier in config.multipliers]
        last = len(widths) - 1
        attends = [self.size >> level in (config.attention or ()) for level in range(len(widths))]

        seen, down = [width], []
        for level, target in enumerate(widths):
            stages = []
            for _ in range(config.blocks):
                stages.append(Stage(width, target, layers, attention=attends[level]))
                width = target
                seen.append(width)
            down.append(Level(stages, layers.down(width) if level < last else None))
            seen += [width] if level < last else []
        self.down = cast("Sequence[Level]", nn.ModuleList(down))

        self.middle_in = Stage(width, width, layers, attention=True)
        self.middle_out = Stage(width, width, layers, attention=False)

        up = []
        for level in range(last, -1, -1):
            stages = []
            for _ in range(config.blocks + 1):
                stages.append(Stage(width + seen.pop(), widths[level], layers, attention=attends[level]))
                width = widths[level]
            up.append(Level(stages, layers.up(width) if level else None))
        self.up = cast("Sequence[Level]", nn.ModuleList(up))

    def regions(self) -> Iterator[nn.Module]:
        """The stages, of which many have the same shape and are compiled once, and what lies between them."""
        for level in (*self.down, *self.up):
            yield from level.stages
            if level.resample is not None:
                yield level.resample
        yield from (self.middle_in, self.middle_out, self.norm_out)

    def embed(self, steps: Tensor) -> Tensor:
        """Map steps [N] to [N, E]."""
        h = silu(self.embed_in(self.sinusoids(steps * self.style.step_scale)))
        embedding: Tensor = self.embed_out(h)
        return embedding

    def embed_labels(self, labels: Tensor) -> Tensor:
        """Map labels [B] to [B, E]."""
        if self.labels is None:
            return super().embed_labels(labels)
        embedding: Tensor = self.labels(labels)
        return embedding

    def forward(self, x: Tensor, embedding: Tensor, seed: Tensor | None = None) -> Tensor:
        """Predict the noise in `x` [B, C, H, W], or the quantity that the schedule interprets the output as."""
        patch = self.config.patch
        if patch > 1:
            x = F.pixel_unshuffle(x, patch)
        if self.config.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        run = partial(self._run, F.silu(embedding), seed)
        h: Tensor = self.conv_in(x)
        seen = [h]
        for level in self.down:
            for stage in level.stages:
                h = run(stage, h)
                seen.append(h)
            if level.resample is not None:
                h = run(level.resample, h)
                seen.append(h)
        h = run(self.middle_out, run(self.middle_in, h))
        for level in self.up:
            for stage in level.stages:
                h = run(stage, torch.cat((h, seen.pop()), dim=1))
            if level.resample is not None:
                h = run(level.resample, h)
        h = self.conv_out(norm_silu(self.norm_out, h))
        return F.pixel_shuffle(h, patch) if patch > 1 else h

    def _run(self, embedding: Tensor, seed: Tensor | None, block: nn.Module, h: Tensor) -> Tensor:
        """Apply a block, with activation checkpointing if `recompute` is set."""
        if self.config.recompute and torch.is_grad_enabled():  # blocks draw no random numbers
            return checkpoint(block, h, embedding, seed, use_reentrant=False, preserve_rng_state=False)  # type: ignore[no-any-return]
        return block(h, embedding, seed)  # type: ignore[no-any-return]


def _checked(config: UnetConfig, event: tuple[int, ...]) -> tuple[int, int]:
    """The channels of an event and its height in patches, which must be divisible as the config requires."""
    in_channels, pixels = image_event(event, "A U-Net", least=1)
    halvings = len(config.multipliers) - 1
    if pixels % config.patch:
        raise UserError(
            f"network.denoiser.patch is {config.patch}, which does not divide {pixels} pixels: make it one of "
            f"{', '.join(str(side) for side in range(1, pixels // 2 + 1) if pixels % side == 0)}."
        )
    size = pixels // config.patch
    if size % 2**halvings:
        raise UserError(
            f"A U-Net with {halvings + 1} multipliers halves its input {halvings} times, which is "
            f"impossible with {size} {'pixels' if config.patch == 1 else 'patches'}: use fewer multipliers"
            f"{'' if config.patch == 1 else ', or a smaller patch'}."
        )
    return in_channels, size
