"""The weighted sum of several rewards, each of which is standardized first."""

from typing import NamedTuple

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.errors import UserError
from dxmi.rewards.base import Reward, RewardContext, differentiable
from dxmi.rewards.configs import SumRewardConfig

_SAMPLES = 1_000
"""Number of training samples on which mean and standard deviation are computed."""


class _Part(NamedTuple):
    reward: Reward
    weight: float
    mean: float
    spread: float


class SumReward:
    """sum_i weight_i (r_i - mean_i) / std_i, with mean and standard deviation on the first 1,000 training samples.

    Rewards of different units then count by their weights only, and one step of a standard deviation on real data is
    worth the same for all of them.

    Args:
        config: Settings: parts and weights.
    """

    def __init__(self, config: SumRewardConfig) -> None:
        self._config = config
        self._parts: list[_Part] = []

    def prepare(self, context: RewardContext) -> None:
        """Build the parts, and measure them on real data.

        Raises:
            UserError: there are no parts, or one cannot be built or does not fit the data.
        """
        parts = self._config.parts
        if not parts:
            raise UserError("reward.parts is empty: name the rewards that are added, such as [ink, symmetry].")
        x, condition = context.data(_SAMPLES)
        weights = self._config.weights or (1.0,) * len(parts)
        for settings, weight in zip(parts, weights, strict=True):
            reward = context.build(settings)
            found = reward(x, condition).double()
            spread = float(found.std(correction=0))
            if not spread > 0.0:
                raise UserError(
                    f"reward.parts has {settings.kind}, which is the same for all training samples, so that it cannot "
                    "be standardized: leave it out."
                )
            self._parts.append(_Part(reward, weight, float(found.mean()), spread))

    @torch.no_grad()
    def __call__(self, x: Tensor, condition: Condition) -> Tensor:
        """Compute the reward of each sample: [B]."""
        return self._total([part.reward for part in self._parts], x, condition)

    def differentiable(self, x: Tensor, condition: Condition) -> Tensor:
        """Compute the reward of each sample with gradients, [B].

        Raises:
            UserError: a part is not differentiable.
        """
        return self._total([differentiable(part.reward) for part in self._parts], x, condition)

    def _total(self, rewards: list[Reward], x: Tensor, condition: Condition) -> Tensor:
        terms = [
            part.weight * (reward(x, condition).float() - part.mean) / part.spread
            for reward, part in zip(rewards, self._parts, strict=True)
        ]
        return torch.stack(terms).sum(0)
