"""The mean reward of a run's samples, as a metric."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.metrics.base import Evidence, Metric
from dxmi.metrics.keys import REWARD_KEY
from dxmi.rewards.base import Reward
from dxmi.tensors import decode


class MeanReward(Metric):
    """The mean reward of samples, given the conditions under which they were drawn.

    Args:
        reward: Reward of the run.
    """

    applies_to_data: ClassVar[bool] = False

    def __init__(self, reward: Reward) -> None:
        self._reward = reward

    @torch.no_grad()
    def observe(self, samples: Tensor, condition: Condition) -> Tensor:
        """Compute the reward of every sample, [n, 1]."""
        return self._reward(decode(samples), condition)[:, None].cpu()

    def scores(self, evidence: Evidence) -> Mapping[str, float]:
        """Compute the mean reward."""
        return {REWARD_KEY.name: float(evidence.rows.double().mean())}
