"""DPOK on the steps of the policy (Fan et al., arXiv 2305.16381): a policy gradient with a KL penalty.

One `update` is one iteration of `dxmi.algorithms.ppo`. The advantage is r - V(x_t, t) with a learned baseline, the
probability ratio is limited to [1 - clip, 1 + clip] without PPO's minimum, so that an action outside of the interval
has no gradient, and the KL divergence from the pretrained policy is penalized at the states of the rollout.

Differences from the published code. Its penalty is the squared difference of the predicted noises, without the factor
1 / (2 sigma^2); here it is the exact divergence of Gaussians. As there, only the divergence of each step itself is
differentiated, and not its effect on later states; `algorithm=ppo` with `kl_coef` has the whole gradient. It averages
the log-probability over the dimensions and limits the ratio at 1e-4. It keeps a replay buffer of 1,000 states from
which the policy is updated; here, the states are those of the last rollout.

Logged metrics (means over the batch and over the optimizer steps of the iteration, except for the reward's):

    reward/mean              mean reward of the rollout, which samples from the policy, not from its moving average
    reward/std               standard deviation of the reward over the batch
    reward/zero_std_ratio    share of the groups whose samples all have the same reward
    policy/ratio             mean of the probability ratio
    policy/clipped           share of the actions whose ratio is outside of the interval
    policy/grad_norm         gradient norm before clipping, only with policy.max_grad_norm
    policy/entropy           mean_t log sigma_t, the per-dimension entropy up to a constant
    policy/kl_reference      KL divergence from the pretrained policy, of a trajectory in nats, only with kl_coef
    value/error              root mean squared r - V(x_t, t) over all actions, only with baseline=learned
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dxmi.algorithms.configs import DpokConfig
from dxmi.algorithms.policy_gradient import Actions
from dxmi.algorithms.ppo import Experience, RatioAlgorithm
from dxmi.data.batch import Batch


class Dpok(RatioAlgorithm):
    """DPOK, with all state that training changes."""

    config: DpokConfig
    panels: ClassVar[Sequence[str]] = (*RatioAlgorithm.panels, "policy/clipped", "value/error")

    def losses(self, actions: Actions, experience: Experience) -> Mapping[str, Tensor]:
        """The surrogate with the limited ratio of each action, and statistics of the ratio, [b] each."""
        clip = self.config.clip
        x, x_next, t, condition = actions
        old, reference, advantage = experience
        step = self.policy(x, t, condition)
        ratio = (step.log_prob(x_next) - old.log_prob(x_next)).exp()
        surrogate = -advantage * ratio.clamp(1.0 - clip, 1.0 + clip)
        outside = ((ratio - 1.0).abs() > clip).float()
        return {"loss": self.action_loss(surrogate, step, reference), "ratio": ratio, "clipped": outside}

    def _later_kl(self, kl: Tensor, batch: Batch) -> Tensor:  # noqa: ARG002
        """Zero: the effect of an action on later divergences is not part of its advantage."""
        return torch.zeros_like(kl)
