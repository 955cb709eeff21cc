"""The residual energy of IGEBM (Du & Mordatch, arXiv 1903.08689) as used by DxMI, a critic of images.

It consists of a convolution, six residual blocks without normalization (the 1st, 3rd and 5th halve the resolution),
ReLU, a sum over the pixels, a linear map to one number, and a learned scale and shift of that number.

Axis letters: B batch, C channels, H height, W width, E embedding.
"""

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from dxmi.networks.base import Critic, TimedCritic
from dxmi.networks.configs import IgebmConfig
from dxmi.networks.layers import (
    StepMlp,
    as_map,
    conv,
    fan_in_uniform,
    image_event,
    linear,
    require_labels,
    spectral_convs,
)

_SLOPE = 0.2


class _Block(nn.Module):
    """lrelu(half(skip(x) + conv(lrelu(conv(x))))); with classes, each convolution has a scale and a shift per class."""

    def __init__(
        self, inputs: int, outputs: int, config: IgebmConfig, generator: torch.Generator, *, down: bool, timed: bool
    ) -> None:
        super().__init__()
        self.down = down
        bias = config.classes == 0
        self.conv_in = conv(inputs, outputs, 3, generator, fan_in_uniform, bias=bias)
        self.conv_out = conv(outputs, outputs, 3, generator, fan_in_uniform, bias=bias)
        straight = inputs == outputs and not down
        self.skip = nn.Identity() if straight else conv(inputs, outputs, 1, generator, fan_in_uniform, bias=False)
        self.labels = _unit_table(config.classes, outputs) if config.classes else None
        self.steps = linear(config.embedding, outputs, generator) if timed else None

    def forward(self, x: Tensor, labels: Tensor | None, embedding: Tensor | None) -> Tensor:
        """Map [B, inputs, H, W] to [B, outputs, H', W'], given the embedded steps [1 or B, E]."""
        h: Tensor = self.conv_in(x)
        if self.steps is not None and embedding is not None:
            h = h + as_map(self.steps(embedding))
        if self.labels is None:
            h = self.conv_out(_leaky(h))
        else:
            scale_in, scale_out, shift_in, shift_out = as_map(self.labels(labels)).chunk(4, dim=1)
            h = self.conv_out(_leaky(torch.addcmul(shift_in, scale_in, h)))
            h = torch.addcmul(shift_out, scale_out, h)
        h = self.skip(x) + h
        return _leaky(F.avg_pool2d(h, 2) if self.down else h)


def _unit_table(classes: int, outputs: int) -> nn.Embedding:
    """A table [classes, 4 C] that holds two scales of 1 and two shifts of 0 per class and channel."""
    ones, zeros = torch.ones(classes, 2 * outputs), torch.zeros(classes, 2 * outputs)
    return nn.Embedding(classes, 4 * outputs, _weight=torch.cat((ones, zeros), dim=1))


def _leaky(x: Tensor) -> Tensor:
    """Leaky ReLU, in place when gradients are disabled; `x` must not be used afterwards."""
    return F.leaky_relu(x, _SLOPE, inplace=not torch.is_grad_enabled())


class _Body(nn.Module):
    """The network without the critic interfaces."""

    def __init__(self, config: IgebmConfig, event: tuple[int, ...], generator: torch.Generator, *, timed: bool) -> None:
        super().__init__()
        in_channels, _ = image_event(event, "The IGEBM energy", least=8)
        width = config.channels
        self.channels_last = config.channels_last
        self.conv_in = conv(in_channels, width, 3, generator, fan_in_uniform)
        widths = [(width, width), (width, width), (width, 2 * width), *[(2 * width, 2 * width)] * 3]
        self.blocks = nn.ModuleList(
            _Block(a, b, config, generator, down=index % 2 == 0, timed=timed) for index, (a, b) in enumerate(widths)
        )
        self.linear = linear(2 * width, 1, generator, fan_in_uniform)
        self.output_scale = linear(1, 1, generator, fan_in_uniform) if config.output_scale else nn.Identity()
        self.steps = StepMlp(config.embedding, generator) if timed else None
        if config.spectral_norm:
            spectral_convs(self, generator)
        if config.channels_last:
            self.to(memory_format=torch.channels_last)  # type: ignore[call-overload]

    def forward(self, x: Tensor, labels: Tensor | None, embedding: Tensor | None = None) -> Tensor:
        """Map [B, C, H, W] to scores [B]."""
        if self.channels_last:
            x = x.contiguous(memory_format=torch.channels_last)
        h = _leaky(self.conv_in(x))
        for block in self.blocks:
            h = block(h, labels, embedding)
        score: Tensor = self.output_scale(self.linear(F.relu(h).sum(dim=(2, 3))))
        return score.squeeze(1)


class IgebmCritic(Critic):
    """A time-independent score."""

    def __init__(self, config: IgebmConfig, event: tuple[int, ...], generator: torch.Generator) -> None:
        super().__init__()
        self.classes = config.classes
        self.body = _Body(config, event, generator, timed=False)

    @property
    def offsets(self) -> tuple[nn.Parameter, ...]:
        """The bias of the last layer, and that of the output scale if there is one."""
        last = (self.body.linear, self.body.output_scale)
        return tuple(layer.bias for layer in last if isinstance(layer, nn.Linear))

    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        """Map [B, C, H, W] to scores [B]."""
        score: Tensor = self.body(x, require_labels(labels, self.classes))
        return score


class IgebmTimedCritic(TimedCritic):
    """A time-conditioned score: the embedded step shifts the output of each block's first convolution."""

    def __init__(self, config: IgebmConfig, event: tuple[int, ...], generator: torch.Generator) -> None:
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
