"""The wide residual network (Zagoruyko & Komodakis, arXiv 1605.07146) as a critic, the larger one for LSUN.

It consists of an input convolution; three groups of n pre-activation blocks with 16k, 32k and 64k channels, where the
second and the third group halve the resolution; a norm, leaky ReLU, the mean over the pixels, and a linear map to one
number. It has 6n + 4 convolutions, including one in the skip connection of each group.

Axis letters: B batch, C channels, H height, W width, E embedding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi.networks.base import Critic, TimedCritic
from dxmi.networks.configs import WideResNetConfig
from dxmi.networks.layers import (
    GroupNorm,
    StepMlp,
    as_map,
    conv,
    fan_average,
    image_event,
    label_table,
    linear,
    require_labels,
)

_SLOPE = 0.2


class _Block(nn.Module):
    """skip(x) + conv(lrelu(norm(conv(lrelu(norm(x)))))); step and class embeddings shift the second norm's input."""

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
        """Map [B, inputs, H, W] to [B, outputs, H / stride, W / stride], shifted by an embedding [1 or B, E]."""
        h: Tensor = self.conv_in(_leaky(self.norm_in(x)))
        if self.shift is not None and shift is not None:
            h = h + as_map(self.shift(shift))
        h = _leaky(self.norm_out(h))
        h = F.conv2d(h, self.conv_out.weight, self.conv_out.bias, stride=self.stride, padding=1)
        if self.stride == 2:  # together with the 1x1 convolution `skip`, a convolution with stride 2
            x = x[:, :, ::2, ::2]
        skip: Tensor = self.skip(x)
        return skip + h


def _norm(config: WideResNetConfig, channels: int) -> nn.Module:
    return GroupNorm(config.groups, channels) if config.groups else nn.Identity()


def _leaky(x: Tensor) -> Tensor:
    return F.leaky_relu(x, _SLOPE)


class _Body(nn.Module):
    """The network without the critic interfaces."""

    def __init__(
        self, config: WideResNetConfig, event: tuple[int, ...], generator: torch.Generator, *, timed: bool
    ) -> None:
        super().__init__()
        in_channels, _ = image_event(event, "The wide residual energy", least=4)
        self.channels_last = config.channels_last
        self.conv_in = conv(in_channels, 16, 3, generator)
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
        """Map [B, C, H, W] to scores [B]."""
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
        """Map [B, C, H, W] to scores [B]."""
        score: Tensor = self.body(x, require_labels(labels, self.classes))
        return score


class WideResNetTimedCritic(TimedCritic):
    """A time-conditioned score."""

    def __init__(self, config: WideResNetConfig, event: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.classes = config.classes
        self.body = _Body(config, event, generator, timed=True)

    def embed(self, steps: Tensor) -> Tensor:
        """Map steps [N] to [N, E]."""
        embedding: Tensor = self.body.steps(steps)  # type: ignore[misc]
        return embedding

    def forward(self, x: Tensor, embedding: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map [B, C, H, W] and embedded steps [1 or B, E] to scores [B]."""
        score: Tensor = self.body(x, require_labels(labels, self.classes), embedding)
        return score
