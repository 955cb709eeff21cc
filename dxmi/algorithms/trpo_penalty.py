"""TRPO's trust region as a penalty whose weight adapts (Schulman et al., arXiv 1707.06347, section 4).

One `update` is one iteration of `dxmi.algorithms.ppo`, whose optimizer steps minimize the negative surrogate plus
penalty * KL(old || new). Then the divergence of a trajectory is measured: the penalty is doubled if it exceeds 1.5
max_kl, and halved if it is below max_kl / 1.5.

Logged metrics (means over the batch):

    reward/mean              mean reward of the rollout, which samples from the policy, not from its moving average
    reward/std               standard deviation of the reward over the batch
    reward/zero_std_ratio    share of the groups whose samples all have the same reward: they have no gradient
    policy/kl                measured KL(old || new) of a trajectory in nats, after the optimizer steps
    policy/penalty           weight of the penalty in this iteration
    policy/ratio             mean of the probability ratio over the optimizer steps
    policy/grad_norm         gradient norm before clipping, only with policy.max_grad_norm
    policy/entropy           mean_t log sigma_t, the per-dimension entropy up to a constant
    policy/kl_reference      KL divergence from the pretrained policy, of a trajectory in nats, only with kl_coef
    value/error              root mean squared r - V(x_t, t) over all actions, only with baseline=learned
"""

from collections.abc import Iterator, Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dxmi.algorithms.base import Metrics, Parts
from dxmi.algorithms.configs import TrpoPenaltyConfig
from dxmi.algorithms.policy_gradient import Actions
from dxmi.algorithms.ppo import Experience, RatioAlgorithm
from dxmi.algorithms.reward_gradient import kl_per_seed
from dxmi.data.batch import Batch
from dxmi.diffusion.trajectory import GaussianStep, Trajectory
from dxmi.distributed import mean_over

_TOO_FAR, _FACTOR = 1.5, 2.0
"""Schulman's rule: the factor of max_kl outside of which the penalty changes, and by which it then does."""

_RANGE = 1e4
"""Factor by which the penalty may differ from its initial value; it could otherwise reach 0 or infinity."""


class TrpoPenalty(RatioAlgorithm):
    """TRPO with an adaptive penalty, with all state that training changes.

    Args:
        config: Settings of the algorithm.
        parts: Components from which it is built.
    """

    config: TrpoPenaltyConfig
    panels: ClassVar[Sequence[str]] = ("reward/mean", "reward/std", "policy/kl", "policy/penalty", "policy/entropy")
    penalty: Tensor

    def __init__(self, config: TrpoPenaltyConfig, parts: Parts) -> None:
        super().__init__(config, parts)
        self.register_buffer("penalty", torch.tensor(config.penalty))

    def optimize(
        self, trajectory: Trajectory, experience: Experience, minibatches: Iterator[Tensor], batch: Batch
    ) -> Metrics:
        """Take one optimizer step for each minibatch, and adapt the penalty to the divergence after them."""
        metrics = super().optimize(trajectory, experience, minibatches, batch)
        weight = self.seeds.table(self.penalty)
        metrics["policy/penalty"] = weight.clone()
        metrics["policy/kl"] = self._divergence(trajectory, experience, batch)
        self._adapt(weight, metrics["policy/kl"])
        return metrics

    def losses(self, actions: Actions, experience: Experience) -> Mapping[str, Tensor]:
        """The surrogate with the penalty, and the ratio, of each action, [b] each."""
        x, x_next, t, condition = actions
        old, reference, advantage = experience
        step = self.policy(x, t, condition)
        ratio = (step.log_prob(x_next) - old.log_prob(x_next)).exp()
        surrogate = self.penalty * old.kl(step) - advantage * ratio
        return {"loss": self.action_loss(surrogate, step, reference), "ratio": ratio}

    @torch.no_grad()
    def _divergence(self, trajectory: Trajectory, experience: Experience, batch: Batch) -> Tensor:
        """KL(old || new) of a trajectory in nats, [K]."""
        actions = self.actions(trajectory, batch.condition)
        new: GaussianStep = self.in_pieces(self.policy, actions.x, actions.t, actions.condition)
        kl = self.num_actions * mean_over(kl_per_seed(experience.old, new), self.num_rows(batch))
        (summed,) = self._workers.sum([kl])
        return summed

    def _adapt(self, weight: Tensor, kl: Tensor) -> None:
        """Schulman's rule."""
        target = self.config.max_kl
        is_far, is_near = kl > _TOO_FAR * target, kl < target / _TOO_FAR
        weight.mul_(torch.where(is_far, _FACTOR, torch.where(is_near, 1.0 / _FACTOR, 1.0)))
        weight.clamp_(self.config.penalty / _RANGE, self.config.penalty * _RANGE)
