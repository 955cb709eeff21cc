"""REINFORCE on a scalar reward (Williams, 1992), with a baseline.

One `update` is one iteration:

    1. roll out the policy                       without gradient
    2. reward of the samples                     r(x_T, c), which need not be differentiable
    3. policy: all actions of the batch          one optimizer step that ascends E[(r - b) sum_t log pi(x_{t+1} | x_t)]
    4. baseline: fit V(x_t, t) to r              one optimizer step (or baseline_updates)

The baseline used in an iteration was fitted only in earlier ones, so it does not bias the gradient.

Logged metrics (means over the batch):

    reward/mean              mean reward of the rollout, which samples from the policy, not from its moving average
    reward/std               standard deviation of the reward over the batch
    reward/zero_std_ratio    share of the groups whose samples all have the same reward: they have no gradient
    policy/grad_norm         gradient norm before clipping, only with policy.max_grad_norm
    policy/entropy           mean_t log sigma_t, the per-dimension entropy up to a constant
    policy/kl_reference      KL divergence from the pretrained policy, of a trajectory in nats, only with kl_coef
    value/error              root mean squared r - V(x_t, t) over all actions, only with baseline=learned
"""

from collections.abc import Sequence
from typing import ClassVar

from dxmi.algorithms.base import Metrics
from dxmi.algorithms.reward_gradient import RewardGradient, kl_per_seed
from dxmi.data.batch import Batch, Streams
from dxmi.rewards.base import rewards_of


class Reinforce(RewardGradient):
    """REINFORCE, with all state that training changes."""

    panels: ClassVar[Sequence[str]] = (*RewardGradient.panels, "value/error")

    def iterate(self, batch: Batch, iteration: int, streams: Streams) -> Metrics:
        """Perform one iteration; returns the metrics listed in the module's docstring."""
        trajectory = self.rollout(batch, streams)
        reward = rewards_of(self.reward, trajectory.x[:, -1], batch.condition, iteration, self._workers)
        actions, num = self.actions(trajectory, batch.condition), self.num_rows(batch)

        reference = self.reference_steps(actions)
        kl = None if reference is None else kl_per_seed(self.policy_steps(trajectory), reference)
        advantage, metrics = self.advantage_of(reward, actions, kl, batch)
        result = self.follow_gradient(actions, -advantage, num, reference, self.config.kl_coef)
        metrics |= result.metrics("policy")
        del metrics["policy/loss"]  # only the gradient of this surrogate loss has a meaning

        metrics |= self.fit_baseline(actions, reward, num)
        metrics["policy/entropy"] = self.mean_log_sigma()
        self.update_averages()
        return metrics
