"""A quadratic reward, whose expectation under a linear-Gaussian policy has a closed form."""

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.errors import UserError
from dxmi.rewards.configs import QuadraticRewardConfig


class QuadraticReward:
    """-|x - target|^2 / (2 scale^2), summed over the dimensions.

    Args:
        config: Settings: target and scale.
    """

    def __init__(self, config: QuadraticRewardConfig) -> None:
        self._target = torch.tensor(config.target)
        self._scale = config.scale

    def __call__(self, x: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002  (rewards share a signature)
        """Compute the reward of each sample, [B].

        Raises:
            UserError: the target has neither one number nor one number per dimension.
        """
        flat = x.flatten(1)
        if len(self._target) not in (1, flat.shape[1]):
            raise UserError(
                f"reward.target has {len(self._target)} numbers, but samples have {flat.shape[1]} dimensions: it "
                "takes one number, or one for each dimension."
            )
        return -(flat - self._target.to(flat)).square().sum(1) / (2.0 * self._scale**2)

    def differentiable(self, x: Tensor, condition: Condition) -> Tensor:
        """Compute the reward of each sample, [B], which has gradients in any case."""
        return self(x, condition)
