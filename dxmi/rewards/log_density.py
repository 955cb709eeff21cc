"""The exact log density of a distribution in the plane."""

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.data.planar import DISTRIBUTIONS
from dxmi.errors import UserError
from dxmi.rewards.configs import LogDensityRewardConfig


class LogDensityReward:
    """max(log p(x), floor) in nats.

    Args:
        config: Settings: the distribution and the floor.
    """

    def __init__(self, config: LogDensityRewardConfig) -> None:
        self._distribution = DISTRIBUTIONS[config.distribution]
        self._floor = config.floor

    @torch.no_grad()
    def __call__(self, x: Tensor, condition: Condition) -> Tensor:  # noqa: ARG002  (rewards share a signature)
        """Compute the reward of each sample, [B].

        Raises:
            UserError: the samples are not points in the plane.
        """
        if x.shape[1:] != (2,):
            shape = tuple(x.shape[1:])
            raise UserError(f"reward.kind is log_density, which scores points in the plane, but samples have {shape}.")
        return self._distribution.bounded_log_density(x, self._floor).to(x)
