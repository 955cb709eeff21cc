"""The interface of rewards: functions of samples and their conditions."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.distributed import SINGLE_PROCESS, ProcessGroup
from dxmi.errors import DivergedError, UserError
from dxmi.tensors import require_finite

Reward = Callable[[Tensor, Condition], Tensor]
"""Maps samples [B, *event], which are in [-1, 1] if they are images, and their conditions to unreduced rewards [B].
Higher is better; the function need not be differentiable."""


@dataclass(frozen=True)
class RewardContext:
    """What a reward may need beyond its settings; it is passed to its method `prepare`, if it has one.

    Attributes:
        build: Builds and prepares another reward.
        data: Returns the first training samples (their number is given), images in [-1, 1] or points, and their
            conditions.
        energy_of: Loads the energy of the run in a folder, as a function of samples and conditions.
        allow_code: Whether Python files of the user may be executed.
    """

    build: Callable[[Any], Reward]
    data: Callable[[int], tuple[Tensor, Condition]]
    energy_of: Callable[[str], Reward]
    allow_code: bool = False


class PostponedReward:
    """A reward that is built at its first call.

    Args:
        build: Builds it.
    """

    def __init__(self, build: Callable[[], Reward]) -> None:
        self._build = build

    @cached_property
    def _built(self) -> Reward:
        return self._build()

    def __call__(self, x: Tensor, condition: Condition) -> Tensor:
        """Compute the reward of each sample, [B]."""
        return self._built(x, condition)

    def differentiable(self, x: Tensor, condition: Condition) -> Tensor:
        """Compute the reward of each sample with gradients, [B]."""
        return differentiable(self._built)(x, condition)


def rewards_of(
    reward: Reward, samples: Tensor, condition: Condition, iteration: int, workers: ProcessGroup = SINGLE_PROCESS
) -> Tensor:
    """r(x_T, c) of samples with a leading seed axis [K, b, *event]: [K, b]; the reward is called once for all seeds.

    It is computed in float32. An error in one process is raised in all, which would otherwise wait for it.

    Raises:
        UserError: the reward cannot be computed.
        DivergedError: a reward is not finite.
    """
    flat = Condition(*(None if own is None else own.flatten(0, 1) for own in condition))
    error: UserError | None = None
    found = samples.new_zeros(samples.shape[:2], dtype=torch.float32)
    try:
        with torch.autocast(samples.device.type, enabled=False):
            found = reward(samples.flatten(0, 1), flat).view(samples.shape[:2]).float()
    except UserError as raised:
        error = raised
    bad = (~found.isfinite()).sum().float() + float(error is not None)
    (total,) = workers.sum([bad])
    if error is not None:
        raise error
    if bool(total == 0.0):
        return found
    require_finite(found, "The reward", iteration)
    raise DivergedError(iteration, "reward", math.nan, "The reward of another process cannot be used.")


def differentiable(reward: Reward) -> Reward:
    """Return a version of the reward with gradients, for algorithms that backpropagate it.

    Raises:
        UserError: the reward has no such version, a method `differentiable`.
    """
    found: Reward | None = getattr(reward, "differentiable", None)
    if found is None:
        raise UserError(
            f"The reward {type(reward).__name__} is not differentiable, but the algorithm backpropagates it: choose an "
            "algorithm that only evaluates it, such as algorithm=ppo, or another reward."
        )
    return found


def no_reward() -> Reward:
    """Raise an error: the factory of the reward for runs without one.

    Raises:
        UserError: always.
    """
    raise UserError("reward is null, but the algorithm maximizes one: choose a reward, such as reward=classifier.")
