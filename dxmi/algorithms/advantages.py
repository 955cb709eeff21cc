"""Baselines that are subtracted from rewards, and spreads by which they are divided.

All functions work on the rewards of the whole batch, [K, B], with a leading seed axis. Samples with the same group
number are compared with each other; groups are the conditions of the samples, or the whole batch is a single group.
"""

from typing import NamedTuple

import torch
from torch import Tensor, nn

from dxmi.algorithms.configs import RewardGradientConfig
from dxmi.optim.seeds import Seeds

EPSILON = 1e-6
"""Added to every spread by which rewards are divided, as in the public code of DDPO."""


class Moments(NamedTuple):
    """The group of every sample, [K, B] each.

    Attributes:
        number: Number of its members in the batch.
        mean: Mean of their values.
        deviation: Standard deviation of their values, over N.
    """

    number: Tensor
    mean: Tensor
    deviation: Tensor

    def constant_share(self) -> Tensor:
        """The share of the groups in the batch whose members all have the same value, [K]."""
        weight = 1.0 / self.number  # the members of a group add up to 1
        return ((self.deviation <= EPSILON) * weight).sum(1) / weight.sum(1)


class Advantages(nn.Module):
    """Baselines and spreads of rewards; stores the most recent rewards of each condition if there is a buffer.

    Args:
        config: Settings of the advantages.
        num_conditions: Number of conditions; 1 without conditions.
    """

    recent: Tensor
    seen: Tensor

    def __init__(self, config: RewardGradientConfig, num_conditions: int) -> None:
        super().__init__()
        self.config = config
        self.num_groups = num_conditions if config.groups == "condition" else 1
        if config.buffer:
            self.register_buffer("recent", torch.zeros(self.num_groups, config.buffer))
            self.register_buffer("seen", torch.zeros(self.num_groups, dtype=torch.int64))

    def groups(self, labels: Tensor | None, like: Tensor) -> Tensor:
        """The group of each sample, int64 [K, B]: its label, or 0 if samples are not grouped by condition."""
        if labels is None or self.num_groups == 1:
            return torch.zeros(like.shape, dtype=torch.int64, device=like.device)
        return labels

    def statistics(self, reward: Tensor, group: Tensor, moments: Moments, seeds: Seeds) -> tuple[Tensor, Tensor]:
        """Baseline and spread of every sample, [K, B] each; records the rewards if there is a buffer.

        The baseline is 0 if there is none or if it is learned, and the spread is 1 if advantages are not divided by it.

        Args:
            reward: Rewards of the whole batch, [K, B].
            group: Group of each sample, [K, B].
            moments: Moments of the rewards in these groups.
            seeds: Seeds of the module that owns these advantages.
        """
        mean, spread = self._recorded(reward, group, seeds) if self.config.buffer else self._of_batch(reward, moments)
        baseline = torch.zeros_like(reward) if mean is None else mean.expand_as(reward)
        return baseline, torch.ones_like(reward) if spread is None else (spread + EPSILON).expand_as(reward)

    def _of_batch(self, reward: Tensor, moments: Moments) -> tuple[Tensor | None, Tensor | None]:
        """Baseline and spread of every sample from the batch itself; None for what is not used."""
        config, mean = self.config, None
        number, center, deviation = moments
        if config.baseline == "mean":
            mean = center
        elif config.baseline == "leave_one_out":
            others = (number - 1.0).clamp_min(1.0)
            mean = torch.where(number > 1.0, (number * center - reward) / others, reward)
        spreads = {"none": None, "group": deviation, "batch": reward.std(1, correction=0, keepdim=True)}
        return mean, spreads[config.spread]

    def _recorded(self, reward: Tensor, group: Tensor, seeds: Seeds) -> tuple[Tensor, Tensor | None]:
        """Record the rewards; returns mean and spread of the last rewards of each sample's group.

        As in the public code of DDPO, the rewards of this batch are among them, and a group with fewer than
        `min_count` rewards has the mean and the spread of this batch.
        """
        size = self.config.buffer
        recent, seen = seeds.table(self.recent), seeds.table(self.seen)
        record_(recent, seen, reward, group)
        is_filled = torch.arange(size, device=reward.device) < seen[..., None].clamp(max=size)
        number = is_filled.sum(-1).clamp_min(1)
        mean = recent.mul(is_filled).sum(-1) / number
        spread = ((recent - mean[..., None]).square().mul(is_filled).sum(-1) / number).sqrt()
        is_known = (seen >= self.config.min_count).gather(1, group)
        mean = torch.where(is_known, mean.gather(1, group), reward.mean(1, keepdim=True))
        if self.config.spread == "none":
            return mean, None
        return mean, torch.where(is_known, spread.gather(1, group), reward.std(1, correction=0, keepdim=True))


def group_moments(values: Tensor, group: Tensor, num_groups: int) -> Moments:
    """Compute the moments of values [K, B] in the groups [K, B]."""
    member = nn.functional.one_hot(group, num_groups).to(values)
    number = member.sum(1)
    # Products with a sum instead of a matrix product, which would be computed in bfloat16 under autocast.
    mean = (values[..., None] * member).sum(1) / number.clamp_min(1.0)
    center = mean.gather(1, group)
    square = ((values - center).square()[..., None] * member).sum(1) / number.clamp_min(1.0)
    return Moments(number.gather(1, group), center, square.gather(1, group).sqrt())


def record_(recent: Tensor, seen: Tensor, reward: Tensor, group: Tensor) -> None:
    """Store rewards [K, B] in the ring buffers [K, C, size] of their groups, in the order of the batch.

    If a group has more rewards in a batch than its buffer has places, only the last ones are stored.
    """
    seeds, num_groups, size = recent.shape
    member = nn.functional.one_hot(group, num_groups)
    number = member.sum(1)
    rank = member.cumsum(1).gather(2, group[..., None])[..., 0] - 1
    place = (seen.gather(1, group) + rank) % size
    is_last = number.gather(1, group) - rank <= size
    spare = num_groups * size  # rewards that are not stored go to an additional place
    index = torch.where(is_last, group * size + place, spare)
    padded = torch.cat((recent.view(seeds, spare), recent.new_zeros(seeds, 1)), dim=1)
    recent.copy_(padded.scatter(1, index, reward.to(recent))[:, :spare].view_as(recent))
    seen.add_(number)
