"""Rewards of images that are computed from their pixels: ink, symmetry, and width of the strokes."""

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.errors import UserError
from dxmi.rewards.configs import InkRewardConfig, StrokeWidthRewardConfig, SymmetryRewardConfig

_IMAGE_RANK = 4


def brightness(x: Tensor, kind: str) -> Tensor:
    """Mean of the channels of images [B, C, H, W], scaled to [0, 1] and clipped: [B, H, W].

    Raises:
        UserError: the samples are not images; the message names the `kind` of the reward.
    """
    if x.dim() != _IMAGE_RANK:
        raise UserError(f"reward.kind is {kind}, which scores images, but samples have shape {tuple(x.shape[1:])}.")
    return x.add(1.0).div(2.0).clamp(0.0, 1.0).mean(1)


class InkReward:
    """Mean brightness in [0, 1].

    Args:
        config: Settings; there are none.
    """

    def __init__(self, config: InkRewardConfig) -> None:
        self._kind = config.kind

    def __call__(self, x: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002  (rewards share a signature)
        """Compute the reward of each sample, with gradients: [B]."""
        return brightness(x, self._kind).mean((1, 2))

    differentiable = __call__


class SymmetryReward:
    """-mean |x - mirror(x)| in [-1, 0].

    Args:
        config: Settings: the axis.
    """

    def __init__(self, config: SymmetryRewardConfig) -> None:
        self._kind = config.kind
        self._dim = 2 if config.axis == "vertical" else 1

    def __call__(self, x: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002  (rewards share a signature)
        """Compute the reward of each sample, with gradients: [B]."""
        image = brightness(x, self._kind)
        return -(image - image.flip(self._dim)).abs().mean((1, 2))

    differentiable = __call__


class StrokeWidthReward:
    """2 area / perimeter in pixels, which is nearly the width of a long stroke; 0 for a blank image.

    The perimeter is the number of edges between a pixel of the drawing and one of the ground, or the border.

    Args:
        config: Settings: the threshold.
    """

    def __init__(self, config: StrokeWidthRewardConfig) -> None:
        self._config = config

    @torch.no_grad()
    def __call__(self, x: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002  (rewards share a signature)
        """Compute the reward of each sample: [B]."""
        drawn = (brightness(x, self._config.kind) > self._config.threshold).float()
        padded = torch.nn.functional.pad(drawn, (1, 1, 1, 1))
        edges = padded.diff(dim=1).abs().sum((1, 2)) + padded.diff(dim=2).abs().sum((1, 2))
        return 2.0 * drawn.sum((1, 2)) / edges.clamp_min(1.0)
