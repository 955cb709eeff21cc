"""The interface of rewards: functions of samples and their conditions."""

from collections.abc import Callable

from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.errors import UserError

Reward = Callable[[Tensor, Condition], Tensor]
"""Maps samples [B, *event], which are in [-1, 1] if they are images, and their conditions to unreduced rewards [B].
Higher is better; the function need not be differentiable."""


def no_reward() -> Reward:
    """Raise an error: the factory of the reward for runs without one.

    Raises:
        UserError: always.
    """
    raise UserError("reward is null, but the algorithm maximizes one: choose a reward, such as reward=classifier.")
