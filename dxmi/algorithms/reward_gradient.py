"""The base of policy-gradient algorithms that maximize a scalar reward of the samples.

The objective is E[r(x_T, c)] - kl_coef * sum_t E[KL_t], where KL_t is the divergence of a step from that of the
pretrained policy at the same state. Its gradient is that of the expected return

    sum_t A_t grad log pi(x_{t+1} | x_t) - kl_coef grad KL_t(x_t)

with A_t = r - baseline - kl_coef (sum of KL_s over s > t, minus its mean over the other trajectories).
"""

from collections.abc import Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dxmi.algorithms.advantages import Advantages, group_moments
from dxmi.algorithms.base import Metrics, Parts
from dxmi.algorithms.configs import PolicyOptimizerFields, RewardGradientConfig
from dxmi.algorithms.policy_gradient import Actions, PolicyGradient, timed_values
from dxmi.data.batch import Batch, Condition
from dxmi.diffusion.trajectory import GaussianStep, Trajectory
from dxmi.distributed import Share, mean_over
from dxmi.optim.config import PolicyOptimizerConfig


class RewardGradient(PolicyGradient):
    """Base class of algorithms that maximize a scalar reward with the score-function gradient.

    Args:
        config: Settings that these algorithms share.
        parts: Components from which the algorithm is built.

    Attributes:
        baseline: Value network of the learned baseline; None if it is not learned.
    """

    needs_data = False
    unmapped: ClassVar[Sequence[str]] = (*PolicyGradient.unmapped, "advantages")
    panels: ClassVar[Sequence[str]] = ("reward/mean", "reward/std", "policy/entropy", "policy/grad_norm")

    def __init__(self, config: RewardGradientConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.config = config
        self.first_action = config.first_step
        self.num_actions -= config.first_step
        self.reward = parts.reward()
        self.advantages = Advantages(config, max(self.policy.network.classes, 1))
        self.keep_reference()
        self.baseline = parts.timed_critic() if config.baseline == "learned" else None
        self.optimizers = {"policy": self.policy_optimizer(self._policy_settings(config), parts)}
        if self.baseline is not None:
            self.optimizers["value"] = parts.optimizer(config.critic, (self.baseline.parameters(), config.critic.lr))

    @staticmethod
    def _policy_settings(config: RewardGradientConfig) -> PolicyOptimizerConfig:
        """The settings of the policy's optimizer."""
        assert isinstance(config, PolicyOptimizerFields)
        return config.policy

    def whole(self, values: Tensor, share: Share) -> Tensor:
        """Collect a number for each trajectory of all processes, [K, b] -> [K, B]."""
        if share.count == share.num:
            return values
        padded = values.new_zeros((len(values), share.num), dtype=torch.float32)
        padded[:, share.start : share.start + share.count] = values
        (collected,) = self._workers.sum([padded])
        return collected.to(values.dtype)

    def advantage_of(self, reward: Tensor, actions: Actions, kl: Tensor | None, batch: Batch) -> tuple[Tensor, Metrics]:
        """The advantage of each action of this process, [K, T' * b], and the metrics of the rewards.

        Args:
            reward: Rewards of this process's trajectories, [K, b].
            actions: All actions of this process.
            kl: KL divergence of each action from the reference, [K, T' * b]; None with kl_coef=0.
            batch: The batch.
        """
        config, share = self.config, batch.share
        everyone = self.whole(reward, share)
        labels = None if batch.condition.labels is None else self.whole(batch.condition.labels, share)
        group = self.advantages.groups(labels, everyone)
        moments = group_moments(everyone, group, self.advantages.num_groups)
        statistics = self.advantages.statistics(everyone, group, moments, self.seeds)
        baseline, spread = (share.of(own, dim=1) for own in statistics)
        advantage = self.per_action(reward - baseline)
        if self.baseline is not None:
            advantage = advantage - self.in_pieces(self.expected, actions.x, actions.t, actions.condition)
        advantage = advantage / self.per_action(spread)
        if config.advantage_clip is not None:
            advantage = advantage.clamp(-config.advantage_clip, config.advantage_clip)
        metrics = {
            "reward/mean": everyone.mean(1),
            "reward/std": everyone.std(1, correction=0),
            "reward/zero_std_ratio": moments.constant_share(),
        }
        if kl is None:
            return advantage, metrics
        (metrics["policy/kl_reference"],) = self._workers.sum([self.num_actions * mean_over(kl, self.num_rows(batch))])
        return advantage - config.kl_coef * self._later_kl(kl, batch), metrics

    def _later_kl(self, kl: Tensor, batch: Batch) -> Tensor:
        """Sum of the divergences after each action, minus its mean over the other trajectories, [K, T' * b]."""
        table, num = kl.view(len(kl), self.num_actions, -1), batch.share.num
        sums = [torch.zeros_like(table[:, 0])]  # a loop, since cumsum has no deterministic kernel on a GPU
        for t in reversed(range(1, self.num_actions)):
            sums.append(sums[-1] + table[:, t])
        later = torch.stack(sums[::-1], dim=1)
        (mean,) = self._workers.sum([batch.share.mean(later)])
        return ((later - mean[..., None]) * (num / max(num - 1, 1))).flatten(1)

    def reference_steps(self, actions: Actions) -> GaussianStep | None:
        """The steps of the pretrained policy from the states of the actions, [K, T' * b, ...]; None with kl_coef=0."""
        if not self.config.kl_coef:
            return None
        assert self.reference is not None
        steps: GaussianStep = self.in_pieces(self.reference, actions.x, actions.t, actions.condition)
        return steps

    def policy_steps(self, trajectory: Trajectory) -> GaussianStep:
        """The steps of the policy that drew the trajectories, in the order of `actions`, [K, T' * b, ...]."""
        steps = slice(self.first_action, self.first_action + self.num_actions)
        return GaussianStep(trajectory.mean[:, steps].flatten(1, 2), trajectory.sigma[:, steps].flatten(1))

    def action_loss(self, surrogate: Tensor, step: GaussianStep, reference: GaussianStep | None) -> Tensor:
        """The loss of each action of one seed, [b]: its surrogate, the penalty of the KL divergence, and the entropy.

        The mean over rows averages over the steps, but the policy gradient is a sum over them; hence T'.
        """
        loss = self.num_actions * surrogate
        if reference is not None:
            loss = loss + self.num_actions * self.config.kl_coef * step.kl(reference)
        return loss - self.entropy_coef * step.sigma.log()

    def fit_baseline(self, actions: Actions, reward: Tensor, num: int) -> Metrics:
        """Fit a learned baseline to the rewards of the trajectories [K, b]; the metrics are empty without one."""
        if self.baseline is None:
            return {}
        for _ in range(self.config.baseline_updates):
            error = self.fit_expected(self.expected, actions, self.per_action(reward), num)
        return {"value/error": error.sqrt()}

    def expected(self, x: Tensor, t: Tensor, condition: Condition) -> Tensor:
        """V(x_t, t), the expected reward given states [b, *event] at steps [b]: [b]."""
        assert self.baseline is not None
        return timed_values(self.baseline, self.steps, x, t, condition)


def kl_per_seed(steps: GaussianStep, other: GaussianStep) -> Tensor:
    """KL(steps || other) with a leading seed axis, [K, b]."""
    flat = [GaussianStep(step.mean.flatten(0, 1), step.sigma.flatten()) for step in (steps, other)]
    return flat[0].kl(flat[1]).view(steps.sigma.shape)
