"""GRPO (Shao et al., arXiv 2402.03300) on the steps of the policy: PPO with advantages relative to a group.

The samples of a batch that share a condition form a group. The advantage of a sample is its reward minus the mean of
its group, divided by the standard deviation of the group (`spread=group`), or of the batch (`spread=batch`), which
keeps the weights of the conditions. Subtracting the mean of a group of N scales the gradient by 1 - 1/N, and dividing
by the spread of the group changes the objective: conditions whose rewards differ little get larger weights. A group
whose rewards are all equal has no gradient (`reward/zero_std_ratio`).

An iteration is that of `dxmi.algorithms.ppo`. The penalty of the divergence from the
pretrained policy (`kl_coef`) is the exact one of Gaussians, where published code estimates it from samples.

Logged metrics (means over the batch and over the optimizer steps of the iteration, except for the reward's):

    reward/mean              mean reward of the rollout, which samples from the policy, not from its moving average
    reward/std               standard deviation of the reward over the batch
    reward/zero_std_ratio    share of the groups whose samples all have the same reward: they have no gradient
    policy/ratio             mean of the ratio rho; its expectation under the old policy is 1
    policy/ratio_std         standard deviation of the ratio
    policy/clipped_high      share of the actions with a positive advantage and a ratio above 1 + clip
    policy/clipped_low       share of the actions with a negative advantage and a ratio below 1 - clip
    policy/kl                largest KL(old || new) of a trajectory in nats, measured before each optimizer step
    policy/steps             number of optimizer steps that were taken
    policy/grad_norm         gradient norm before clipping, only with policy.max_grad_norm
    policy/entropy           mean_t log sigma_t, the per-dimension entropy up to a constant
    policy/kl_reference      KL divergence from the pretrained policy, of a trajectory in nats, only with kl_coef
    value/error              root mean squared r - V(x_t, t) over all actions, only with baseline=learned
"""

from dxmi.algorithms.configs import GrpoConfig
from dxmi.algorithms.ppo import Ppo


class Grpo(Ppo):
    """GRPO, with all state that training changes."""

    config: GrpoConfig
