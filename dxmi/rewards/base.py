"""The interface of rewards: functions of samples and their conditions."""

from collections.abc import Callable

from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.errors import UserError
from dxmi.tensors import require_finite

Reward = Callable[[Tensor, Condition], Tensor]
"""Maps samples [B, *event], which are in [-1, 1] if they are images, and their conditions to unreduced rewards [B].
Higher is better; the function need not be differentiable."""


def rewards_of(reward: Reward, samples: Tensor, condition: Condition, iteration: int) -> Tensor:
    """r(x_T, c) of samples with a leading seed axis [K, b, *event]: [K, b]; the reward is called once for all seeds.

    Raises:
        DivergedError: a reward is not finite.
    """
    flat = Condition(*(None if own is None else own.flatten(0, 1) for own in condition))
    found = reward(samples.flatten(0, 1), flat).view(samples.shape[:2]).float()
    return require_finite(found, "The reward", iteration)


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
