"""What algorithms share whose policy gradient is the score function's: sum_t A_t grad log pi(x_{t+1} | x_t).

log pi is a true log density in nats, summed over the event. The last step is no action unless it is asked for.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import ClassVar, NamedTuple

import torch
from torch import Tensor

from dxmi.algorithms.base import Parts, PolicyAlgorithm
from dxmi.algorithms.configs import PolicyGradientConfig
from dxmi.algorithms.losses import score_function_loss, value_loss
from dxmi.data.batch import Batch, Condition
from dxmi.diffusion.trajectory import Trajectory
from dxmi.errors import UserError
from dxmi.networks.base import TimedCritic
from dxmi.optim.optimizer import Optimizer, StepResult


class Actions(NamedTuple):
    """Steps of the policy, one a row.

    Attributes:
        x: the states in which they were taken, [K, b, *event].
        x_next: the states that they led to, [K, b, *event].
        t: the steps, [K, b].
        condition: of each, [K, b, ...].
    """

    x: Tensor
    x_next: Tensor
    t: Tensor
    condition: Condition


class PolicyGradient(PolicyAlgorithm):
    """A policy that is trained by the score function, and what that needs.

    Args:
        config: what these algorithms share.
        parts: what the algorithm is built from.

    Raises:
        UserError: the denoiser takes latents, so that the density of a step has no closed form.
    """

    panels: ClassVar[Sequence[str]] = ("policy/entropy", "policy/grad_norm", "value/error")
    steps: Tensor

    def __init__(self, config: PolicyGradientConfig, parts: Parts) -> None:
        super().__init__(parts, config.policy_ema)
        if self.policy.network.latent:
            raise UserError(
                f"algorithm.kind is {config.kind}, but the denoiser takes latents: the density of a step, which the "
                "policy gradient needs, is then unknown. Use algorithm=dxmi, or another network."
            )
        self.entropy_coef = config.entropy_coef
        self.num_actions = self.policy.num_steps - (not config.last_step)
        self.register_buffer("steps", torch.arange(self.policy.num_steps), persistent=False)

    def _policy_optimizer(self, config: PolicyGradientConfig, parts: Parts) -> Optimizer:
        policy, settings = self.policy, config.policy
        groups = ((policy.network.parameters(), settings.lr), ([policy.free_log_sigma], settings.sigma_lr))
        return parts.optimizer(settings, *groups)

    def actions(self, trajectory: Trajectory, condition: Condition) -> Actions:
        """Every action of trajectories x [K, T+1, b, *event], time-major: [K, T' * b, ...]."""
        x, num = trajectory.x, self.num_actions
        t = self.steps[:num, None].expand(num, x.shape[2]).flatten().expand(len(x), -1)
        return Actions(x[:, :num].flatten(1, 2), x[:, 1 : num + 1].flatten(1, 2), t, _repeated(condition, num))

    def follow_gradient(self, actions: Actions, advantage: Tensor, num: int) -> StepResult:
        """One step down E[sum_t A_t], by its score-function estimate.

        Args:
            actions: rows drawn evenly from all actions of a batch of trajectories.
            advantage: A of each, a cost, [K, b].
            num: rows of all processes together.
        """

        def loss(x: Tensor, x_next: Tensor, t: Tensor, condition: Condition, advantage: Tensor) -> Mapping[str, Tensor]:
            log_sigma = self.policy.log_sigma
            step = self.policy.transition(x, t, log_sigma=log_sigma, condition=condition)
            # A mean over rows is that over steps too, where the policy gradient is a sum over them.
            surrogate = self.num_actions * score_function_loss(step.log_prob(x_next), advantage)
            return {"loss": surrogate - self.entropy_coef * log_sigma[t]}

        return self.optimizers["policy"].minimize(loss, *actions, advantage, num=num)

    def fit_expected(
        self, predict: Callable[[Tensor, Tensor, Condition], Tensor], actions: Actions, outcome: Tensor, num: int
    ) -> Tensor:
        """One step of V(x_t, t) towards the outcome of each action's trajectory [K, b]; returns the mean square."""

        def loss(x: Tensor, t: Tensor, condition: Condition, outcome: Tensor) -> Mapping[str, Tensor]:
            return {"loss": value_loss(predict(x, t, condition), outcome)}

        inputs = (actions.x, actions.t, actions.condition, outcome)
        return self.optimizers["value"].minimize(loss, *inputs, num=num).means["loss"]

    def per_action(self, values: Tensor) -> Tensor:
        """Values of trajectories [K, b] for each of their actions, as `actions` orders them: [K, T' * b]."""
        return values.repeat(1, self.num_actions)

    def num_rows(self, batch: Batch) -> int:
        """Actions of a batch, of all processes together."""
        return self.num_actions * batch.share.num


def timed_values(network: TimedCritic, steps: Tensor, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """A time-conditioned network's value of states [b, *event] at their steps [b]: [b].

    Args:
        network: the network.
        steps: all steps, [T].
        x: states.
        t: their steps.
        condition: of each, where the network knows classes.
    """
    labels = (condition.labels,) if network.classes else ()
    value: Tensor = network(x, network.embed(steps)[t], *labels)
    return value.float()


def _repeated(condition: Condition, times: int) -> Condition:
    """The condition of every trajectory, once for each of its actions."""
    return Condition(*(None if own is None else own.repeat(1, times, *[1] * (own.dim() - 2)) for own in condition))
