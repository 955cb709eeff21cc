"""The wide residual network (Zagoruyko & Komodakis, arXiv 1605.07146) as an energy: the larger critic for LSUN.

6n + 4 convolutions, three of them in skips: one, then three groups of n pre-activation blocks with 16k, 32k and 64k
channels, of which the second and the third halve the resolution; then a norm, leaky ReLU, the mean over the pixels, and
a linear map to one number.

Axis letters: B batch, C channels, H height, W width, E embedding.
"""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi.networks.base import Critic, NetworkConfig, TimedCritic
from dxmi.networks.layers import (
    StepMlp,
    as_map,
    conv,
    fan_average,
    image_event,
    label_table,
    linear,
    require_labels,
)

_MAX_DEPTH, _MAX_WIDTH = 1000, 100
_SLOPE = 0.2


@dataclass(frozen=True, kw_only=True)
class WideResNetConfig(NetworkConfig):
    """A wide residual network; the defaults are those of the published LSUN energy."""

    kind: str = "wide_resnet"
    depth: int = 16
    """Convolutions: 6 n + 4 for n blocks a group."""
    width: int = 10
    """k: multiplies the 16, 32 and 64 channels of the groups."""
    groups: int = 4
    """Of each GroupNorm; 0 for no normalisation."""
    embedding: int = 128
    """Width of the sinusoidal step embedding of a value; an energy, which knows no time, ignores it."""
    channels_last: bool = False
    """Keep C last in memory, which is faster on GPUs with tensor cores."""

    def __post_init__(self) -> None:
        super().__post_init__()
        if not 10 <= self.depth <= _MAX_DEPTH or (self.depth - 4) % 6:
            raise ValueError(f"depth is {self.depth}: it must be 10, 16, 22 and so on, at most {_MAX_DEPTH}")
        if not 1 <= self.width <= _MAX_WIDTH:
            raise ValueError(f"width is {self.width}: it must be in 1..{_MAX_WIDTH}")
        if self.groups < 0 or (self.groups and 16 % self.groups):
            raise ValueError(f"groups is {self.groups}: it must be 0, or divide 16")
        if not 2 <= self.embedding <= 4096 or self.embedding % 2:
            raise ValueError(f"embedding is {self.embedding}: it must be even and in 2..4096")


class _Block(nn.Module):
    """skip(x) + conv(lrelu(norm(conv(lrelu(norm(x)))))); step and class shift the second norm's input."""

    def __init__(
        self,
        inputs: int,
        outputs: int,
        stride: int,
        config: WideResNetConfig,
        generator: torch.Generator,
        *,
        shifted: bool,
    ) -> None:
        super().__init__()
        self.stride = stride
        self.norm_in = _norm(config, inputs)
        self.conv_in = conv(inputs, outputs, 3, generator)
        self.shift = linear(config.embedding, outputs, generator) if shifted else None
        self.norm_out = _norm(config, outputs)
        self.conv_out = conv(outputs, outputs, 3, generator)
        straight = inputs == outputs and stride == 1
        self.skip = nn.Identity() if straight else conv(inputs, outputs, 1, generator)

    def forward(self, x: Tensor, shift: Tensor | None) -> Tensor:
        """[B, inputs, H, W] to [B, outputs, H / stride, W / stride], shifted by an embedding [1 or B, E]."""
        h: Tensor = self.conv_in(_leaky(self.norm_in(x)))
        if self.shift is not None and shift is not None:
            h = h + as_map(self.shift(shift))
        h = _leaky(self.norm_out(h))
        h = F.conv2d(h, self.conv_out.weight, self.conv_out.bias, stride=self.stride, padding=1)
        if self.stride == 2:  # a 1x1 convolution of stride 2
            x = x[:, :, ::2, ::2]
        skip: Tensor = self.skip(x)
        return skip + h


def _norm(config: WideResNetConfig, channels: int) -> nn.Module:
    return nn.GroupNorm(config.groups, channels) if config.groups else nn.Identity()


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _SLOPE)


class _Body(nn.Module):
    """All but the interfaces."""

    def __init__(
        self, config: WideResNetConfig, event: tuple[int, ...], generator: torch.Generator, *, timed: bool
    ) -> None:
        super().__init__()
        colours, _ = image_event(event, "The wide residual energy", least=4)
        self.channels_last = config.channels_last
        self.conv_in = conv(colours, 16, 3, generator)
        blocks, width, shifted = [], 16, timed or config.classes > 0
        for group, channels in enumerate((16, 32, 64)):
            for block in range((config.depth - 4) // 6):
                stride = 2 if group and block == 0 else 1
                blocks.append(_Block(width, channels * config.width, stride, config, generator, shifted=shifted))
                width = channels * config.width
        self.blocks = nn.ModuleList(blocks)
        self.norm_out = _norm(config, width)
        self.linear = linear(width, 1, generator, fan_average)
        self.labels = label_table(config.classes, config.embedding, generator) if config.classes else None
        self.steps = StepMlp(config.embedding, generator) if timed else None
        if config.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, labels: Tensor | None, embedding: Tensor | None = None) -> Tensor:
        """[B, C, H, W] to [B]."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        if self.labels is not None:
            label = self.labels(labels)
            embedding = label if embedding is None else embedding + label
        h: Tensor = self.conv_in(x)
        for block in self.blocks:
            h = block(h, embedding)
        score: Tensor = self.linear(_leaky(self.norm_out(h)).mean(dim=(2, 3)))
        return score.squeeze(1)


class WideResNetCritic(Critic):
    """A time-independent score."""

    def __init__(self, config: WideResNetConfig, event: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.classes = config.classes
        self.body = _Body(config, event, generator, timed=False)

    @property
    def offsets(self) -> tuple[nn.Parameter, ...]:
        """The bias of the last layer."""
        return (self.body.linear.bias,)

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """[B, C, H, W] to [B]."""
        score: Tensor = self.body(x, require_labels(labels, self.classes))
        return score


class WideResNetTimedCritic(TimedCritic):
    """A time-conditioned score."""

    def __init__(self, config: WideResNetConfig, event: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.classes = config.classes
        self.body = _Body(config, event, generator, timed=True)

    def embed(self, steps: Tensor) -> Tensor:
        """[N] to [N, E]."""
        embedding: Tensor = self.body.steps(steps)  # type: ignore[misc]
        return embedding

    def forward(self, x: Tensor, embedding: Tensor, labels: Tensor | None = None) -> Tensor:
        """[B, C, H, W] and [1 or B, E] to [B]."""
        score: Tensor = self.body(x, require_labels(labels, self.classes), embedding)
        return score
