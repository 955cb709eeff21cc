"""What a reward is: a function of samples and their conditions."""

from collections.abc import Callable

from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.errors import UserError

Reward = Callable[[Tensor, Condition], Tensor]
"""From samples in [-1, 1] [B, *event] and their condition to rewards [B], higher is better, unreduced. It need not be
differentiable."""


def no_reward() -> Reward:
    """Refuse to make the reward of a run that has none.

    Raises:
        UserError: always.
    """
    raise UserError("reward is null, but the algorithm maximizes one: choose a reward, such as reward=classifier.")
