"""REINFORCE on a scalar reward (Williams, 1992), with a baseline.

One `update` is one iteration:

    1. roll out the policy                       without gradient
    2. reward of the samples                     r(x_T, c), which need not be differentiable
    3. policy: all actions of the batch          one optimizer step that ascends E[(r - b) sum_t log pi(x_{t+1} | x_t)]
    4. baseline: fit V(x_t, t) to r              one optimizer step (or baseline_updates)

The baseline used in an iteration was fitted only in earlier ones, so it does not bias the gradient.

Logged metrics (means over the batch):

    reward/mean          mean reward of the rollout, which samples from the policy, not from its moving average
    reward/std           standard deviation of the reward over the batch
    policy/grad_norm     gradient norm before clipping, only with policy.max_grad_norm
    policy/entropy       mean_t log sigma_t, the per-dimension entropy up to a constant
    value/error          root mean squared r - V(x_t, t) over all actions, only with baseline=learned
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dxmi.algorithms.base import Metrics, Parts
from dxmi.algorithms.configs import ReinforceConfig
from dxmi.algorithms.policy_gradient import Actions, PolicyGradient, timed_values
from dxmi.data.batch import Batch, Condition, Streams
from dxmi.diffusion.trajectory import Trajectory


class Reinforce(PolicyGradient):
    """REINFORCE, with all state that training changes.

    Args:
        config: Settings of REINFORCE.
        parts: Components from which it is built.
    """

    needs_data = False
    panels: ClassVar[Sequence[str]] = ("reward/mean", "reward/std", *PolicyGradient.panels)

    def __init__(self, config: ReinforceConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.config = config
        self._reward = parts.reward()
        self.baseline = parts.timed_critic() if config.baseline == "learned" else None
        self.optimizers = {"policy": self._policy_optimizer(config, parts)}
        if self.baseline is not None:
            self.optimizers["value"] = parts.optimizer(config.critic, (self.baseline.parameters(), config.critic.lr))

    def update(self, batch: Batch, iteration: int, streams: Streams) -> Metrics:
        """Perform one iteration; returns the metrics listed in the module's docstring."""
        self.schedule(iteration)
        trajectory = self.rollout(batch, streams)
        reward = self._rewards(trajectory, batch.condition)
        actions, num = self.actions(trajectory, batch.condition), self.num_rows(batch)

        advantage = self._baseline(actions, reward, batch) - self.per_action(reward)
        metrics = self.follow_gradient(actions, advantage, num).metrics("policy")
        del metrics["policy/loss"]  # only the gradient of this surrogate loss has a meaning

        mean, square = self._workers.sum([batch.share.mean(reward), batch.share.mean(reward.square())])
        metrics |= {"reward/mean": mean, "reward/std": (square - mean.square()).clamp_min(0.0).sqrt()}
        if self.baseline is not None:
            for _ in range(self.config.baseline_updates):
                error = self.fit_expected(self._expected, actions, self.per_action(reward), num)
            metrics["value/error"] = error.sqrt()
        metrics["policy/entropy"] = self.mean_log_sigma()
        self.update_averages()
        return metrics

    def _rewards(self, trajectory: Trajectory, condition: Condition) -> Tensor:
        """r(x_T, c) of every trajectory, [K, b]; the reward is not mapped over the seeds, but called once for all."""
        samples = trajectory.x[:, -1]
        flat = Condition(*(None if own is None else own.flatten(0, 1) for own in condition))
        return self._reward(samples.flatten(0, 1), flat).view(samples.shape[:2])

    def _baseline(self, actions: Actions, reward: Tensor, batch: Batch) -> Tensor:
        """The baseline of every action, [K, T' * b]."""
        if self.baseline is not None:
            with torch.no_grad():
                expected: Tensor = self.seeds.map(self._expected, actions.x, actions.t, actions.condition)
            return expected
        if self.config.baseline == "none":
            return self.per_action(torch.zeros_like(reward))
        (mean,) = self._workers.sum([batch.share.mean(reward)])
        baseline = mean[:, None].expand_as(reward)
        if self.config.baseline == "leave_one_out":
            num = batch.share.num
            baseline = (num * baseline - reward) / (num - 1)
        return self.per_action(baseline)

    def _expected(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """V(x_t, t), the expected reward given states [b, *event] at steps [b]: [b]."""
        assert self.baseline is not None
        return timed_values(self.baseline, self.steps, x, t, condition)
