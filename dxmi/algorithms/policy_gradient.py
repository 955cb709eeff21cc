"""The base of algorithms with a score-function policy gradient, sum_t A_t grad log pi(x_{t+1} | x_t).

log pi is a log density in nats, summed over the event. The last step counts as an action only with `last_step=true`.
"""

from collections.abc import Callable, Mapping, Sequence
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor

from dxmi.algorithms.base import Parts, PolicyAlgorithm
from dxmi.algorithms.configs import PolicyGradientConfig
from dxmi.algorithms.losses import score_function_loss, value_loss
from dxmi.data.batch import Batch, Condition
from dxmi.diffusion.trajectory import GaussianStep, Trajectory
from dxmi.errors import UserError
from dxmi.networks.base import TimedCritic
from dxmi.optim.optimizer import StepResult
from dxmi.tensors import batch_rows, chunks, joined_rows, tensors_of


class Actions(NamedTuple):
    """Steps that the policy took, one per row.

    Attributes:
        x: States in which the steps were taken, [K, b, *event].
        x_next: Next states, [K, b, *event].
        t: Number of each step, [K, b].
        condition: Condition of each step, [K, b, ...].
    """

    x: Tensor
    x_next: Tensor
    t: Tensor
    condition: Condition


class PolicyGradient(PolicyAlgorithm):
    """Base class of algorithms that train the policy with the score-function gradient.

    Args:
        config: Settings that these algorithms share.
        parts: Components from which the algorithm is built.

    Raises:
        UserError: the denoiser takes latents, so that the density of a step does not have a closed form.
    """

    panels: ClassVar[Sequence[str]] = ("policy/entropy", "policy/grad_norm", "value/error")
    first_action: int = 0
    """First step that counts as an action."""
    steps: Tensor

    def __init__(self, config: PolicyGradientConfig, parts: Parts) -> None:
        super().__init__(parts, config.policy_ema)
        if self.policy.network.latent:
            raise UserError(
                f"algorithm.kind is {config.kind}, but the denoiser takes latents: the density of a step, which the "
                "policy gradient needs, is then unknown. Use algorithm=dxmi, or another network."
            )
        self.entropy_coef = config.entropy_coef
        self._accumulate = parts.accumulate
        self.num_actions = self.policy.num_steps - (not config.last_step)
        self.register_buffer("steps", torch.arange(self.policy.num_steps), persistent=False)

    def actions(self, trajectory: Trajectory, condition: Condition) -> Actions:
        """Collect all T' actions of each trajectory, x [K, T+1, b, *event], time-major: [K, T' * b, ...]."""
        x, first, num = trajectory.x, self.first_action, self.num_actions
        end = first + num
        t = self.steps[first:end, None].expand(num, x.shape[2]).flatten().expand(len(x), -1)
        x_next = x[:, first + 1 : end + 1].flatten(1, 2)
        return Actions(x[:, first:end].flatten(1, 2), x_next, t, _repeated(condition, num))

    @torch.no_grad()
    def in_pieces(self, function: Callable[..., Any], *inputs: Any) -> Any:
        """Apply a function of some rows of one seed to all rows of all seeds, without gradients.

        The function gets the same rows at a time as a loss in `Optimizer.minimize`, so that it needs no more memory,
        and rounds as it does there.

        Args:
            function: Maps rows of the inputs to tensors, or tuples of them, with as many rows.
            inputs: Nested tuples of tensors [K, b, ...].
        """
        pieces = chunks(tensors_of(inputs)[0].shape[1], self._accumulate)
        return joined_rows([self.seeds.map(function, *batch_rows(inputs, rows)) for rows in pieces])

    def follow_gradient(
        self,
        actions: Actions,
        advantage: Tensor,
        num: int,
        reference: GaussianStep | None = None,
        kl_coef: float = 0.0,
    ) -> StepResult:
        """Take one gradient step that decreases E[sum_t A_t], with the score-function estimate of its gradient.

        Args:
            actions: Actions drawn uniformly from all actions of a batch of trajectories, or all of them.
            advantage: A of each action, a cost, [K, b].
            num: Number of rows of all processes together.
            reference: Steps of the reference policy from the same states; None for no KL divergence from it.
            kl_coef: Weight of the KL divergence from the reference, summed over the actions.
        """

        def loss(actions: Actions, advantage: Tensor, reference: GaussianStep | None) -> Mapping[str, Tensor]:
            x, x_next, t, condition = actions
            log_sigma = self.policy.log_sigma
            step = self.policy.transition(x, t, log_sigma=log_sigma, condition=condition)
            # The mean over rows averages over the steps, but the policy gradient is a sum over them.
            surrogate = self.num_actions * score_function_loss(step.log_prob(x_next), advantage)
            if reference is not None:
                surrogate = surrogate + self.num_actions * kl_coef * step.kl(reference)
            return {"loss": surrogate - self.entropy_coef * log_sigma[t]}

        return self.optimizers["policy"].minimize(loss, actions, advantage, reference, num=num)

    def fit_expected(
        self, predict: Callable[[Tensor, Tensor, Condition], Tensor], actions: Actions, outcome: Tensor, num: int
    ) -> Tensor:
        """Take a step that fits V(x_t, t) to the outcome [K, T' * b] of each action; returns the mean squared error."""

        def loss(x: Tensor, t: Tensor, condition: Condition, outcome: Tensor) -> Mapping[str, Tensor]:
            return {"loss": value_loss(predict(x, t, condition), outcome)}

        inputs = (actions.x, actions.t, actions.condition, outcome)
        return self.optimizers["value"].minimize(loss, *inputs, num=num).means["loss"]

    def per_action(self, values: Tensor) -> Tensor:
        """Repeat values of trajectories [K, b] for each of their actions, in the order of `actions`: [K, T' * b]."""
        return values.repeat(1, self.num_actions)

    def num_rows(self, batch: Batch) -> int:
        """The number of actions in a batch of all processes together."""
        return self.num_actions * batch.share.num


def timed_values(network: TimedCritic, steps: Tensor, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
    """Evaluate a time-conditioned network at states [b, *event] and their steps [b]: [b].

    Args:
        network: Value network.
        steps: All steps, 0 .. T-1, [T].
        x: States.
        t: Step of each state.
        condition: Condition of each state; used only if the network is class-conditional.
    """
    labels = (condition.labels,) if network.classes else ()
    value: Tensor = network(x, network.embed(steps)[t], *labels)
    return value.float()


def _repeated(condition: Condition, times: int) -> Condition:
    """Repeat the condition of every trajectory for each of its actions."""
    return Condition(*(None if own is None else own.repeat(1, times, *[1] * (own.dim() - 2)) for own in condition))
