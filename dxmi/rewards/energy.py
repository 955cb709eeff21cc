"""Minus the energy that a finished run has learned, as a reward."""

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.rewards.base import Reward, RewardContext
from dxmi.rewards.configs import EnergyRewardConfig


class EnergyReward:
    """-E(x) of another run. It is differentiable.

    Args:
        config: Settings: the folder of the run.
    """

    def __init__(self, config: EnergyRewardConfig) -> None:
        self._run = config.run
        self._energy: Reward | None = None

    def prepare(self, context: RewardContext) -> None:
        """Load the energy.

        Raises:
            UserError: there is no such run, or it has no energy, or one of other samples.
        """
        self._energy = context.energy_of(self._run)

    @torch.no_grad()
    def __call__(self, x: Tensor, condition: Condition) -> Tensor:
        """Compute the reward of each sample: [B]."""
        assert self._energy is not None
        return -self._energy(x, condition)

    def differentiable(self, x: Tensor, condition: Condition) -> Tensor:
        """Compute the reward of each sample with gradients: [B]."""
        assert self._energy is not None
        return -self._energy(x, condition)
