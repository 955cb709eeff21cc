"""The mean reward of a run's samples, as a metric."""

from collections.abc import Mapping
from typing import ClassVar

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.metrics.base import Evidence, Metric
from dxmi.metrics.keys import HELD_OUT_REWARD_KEY, REWARD_KEY
from dxmi.rewards.base import Reward
from dxmi.tensors import decode


class MeanReward(Metric):
    """The mean reward of samples, given the conditions under which they were drawn.

    Args:
        reward: Reward of the run.
        held_out: Classes of held-out prompts, whose samples have a score of their own.
    """

    applies_to_data: ClassVar[bool] = False

    def __init__(self, reward: Reward, held_out: frozenset[int] = frozenset()) -> None:
        self._reward = reward
        self._held_out = held_out

    @torch.no_grad()
    def observe(self, samples: Tensor, condition: Condition) -> Tensor:
        """Compute the reward of every sample and whether its prompt is held out, [n, 2]."""
        reward = self._reward(decode(samples), condition)
        is_held_out = torch.zeros_like(reward)
        if self._held_out and condition.labels is not None:
            is_held_out = torch.isin(condition.labels, condition.labels.new_tensor(sorted(self._held_out))).to(reward)
        return torch.stack((reward, is_held_out), dim=1).cpu()

    def scores(self, evidence: Evidence) -> Mapping[str, float]:
        """Compute the mean reward of the samples whose prompts are trained on and, if there are any, of the others."""
        reward, is_held_out = evidence.rows[:, 0].double(), evidence.rows[:, 1] > 0.0
        found = {REWARD_KEY.name: float(reward[~is_held_out].mean())}
        return {**found, HELD_OUT_REWARD_KEY.name: float(reward[is_held_out].mean())} if is_held_out.any() else found
