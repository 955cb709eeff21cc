"""DRaFT: backpropagation of a differentiable reward (Clark et al., ICLR 2024, arXiv 2309.17400).

One `update` is one iteration:

    1. the first T - K steps of the policy       without gradient
    2. the last K steps, and the reward          r(x_T, c), with gradients through steps and reward (`steps` = K)
    3. policy                                    one optimizer step that ascends E[r - kl_coef sum of KL_t over 2.]

With K = T this is the gradient of E r, and with K = 1 only the last step learns what the reward prefers. It needs far
fewer samples than a score function, but a reward with gradients.

Differences from the published version. The policy draws noise in each step and is short, so that gradients are not
checkpointed; the published sampler is DDIM with 50 steps and LoRA. DRaFT-LV is not included.

Logged metrics (means over the batch):

    reward/mean              mean reward of the samples, with the policy before the step
    reward/std               standard deviation of the reward over the batch
    policy/grad_norm         gradient norm before clipping, only with policy.max_grad_norm
    policy/entropy           mean_t log sigma_t, the per-dimension entropy up to a constant
    policy/kl_reference      KL divergence from the pretrained policy in the last K steps, in nats, only with kl_coef
"""

from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dxmi.algorithms.base import Metrics, Parts, PolicyAlgorithm
from dxmi.algorithms.configs import DraftConfig
from dxmi.data.batch import Batch, Condition, Streams
from dxmi.rewards.base import differentiable
from dxmi.tensors import require_finite


class Draft(PolicyAlgorithm):
    """DRaFT, with all state that training changes.

    Args:
        config: Settings of DRaFT.
        parts: Components from which it is built.

    Raises:
        UserError: the reward is not differentiable.
    """

    needs_data = False
    panels: ClassVar[Sequence[str]] = ("reward/mean", "reward/std", "policy/entropy", "policy/grad_norm")

    def __init__(self, config: DraftConfig, parts: Parts) -> None:
        super().__init__(parts, config.policy_ema)
        self.config = config
        self.reward = differentiable(parts.reward())
        self.keep_reference()
        self.optimizers = {"policy": self.policy_optimizer(config.policy, parts)}

    def iterate(self, batch: Batch, iteration: int, streams: Streams) -> Metrics:
        """Perform one iteration; returns the metrics listed in the module's docstring."""
        share, policy = batch.share, self.policy
        noise = share.of(streams.draw("noise", lambda own: policy.noise(share.num, own)), dim=2).transpose(1, 2)
        latents = None
        if policy.network.latent:
            drawn = streams.normal("noise", (share.num, policy.num_steps, policy.network.latent))
            latents = share.of(drawn, dim=1)

        def is_finite(means: Mapping[str, Tensor]) -> Tensor:
            require_finite(means["reward"], "The reward", iteration)
            return torch.ones_like(means["reward"], dtype=torch.bool)

        result = self.optimizers["policy"].minimize(
            self._loss, noise, latents, batch.condition, num=share.num, takes=is_finite
        )
        means = result.means
        spread = (means["square"] - means["reward"].square()).clamp_min(0.0).sqrt()
        metrics = {"reward/mean": means["reward"], "reward/std": spread}
        if result.grad_norm is not None:
            metrics["policy/grad_norm"] = result.grad_norm
        if self.config.kl_coef:
            metrics["policy/kl_reference"] = means["kl"]
        metrics["policy/entropy"] = self.mean_log_sigma()
        self.update_averages()
        return metrics

    def _loss(self, noise: Tensor, latents: Tensor | None, condition: Condition) -> Mapping[str, Tensor]:
        """-r + kl_coef KL of each trajectory, [b], from noise [b, T+1, *event]."""
        config, num_steps = self.config, self.policy.num_steps
        first = 0 if config.steps is None else num_steps - config.steps
        num_actions = num_steps - (not config.last_step)
        kl = noise.new_zeros(len(noise))
        with torch.no_grad():
            x = self.policy.start(noise[:, 0])
            for t in range(first):
                x = self.policy.step(x, t, noise[:, t + 1], condition, None if latents is None else latents[:, t])
        for t in range(first, num_steps):
            latent = None if latents is None else latents[:, t]
            step = self.policy.transition(x, t, condition=condition, latent=latent)
            if config.kl_coef and t < num_actions:
                assert self.reference is not None
                kl = kl + step.kl(self.reference.transition(x, t, condition=condition, latent=latent))
            x = step.sample(noise[:, t + 1])
        reward = self.reward(x, condition).float()
        return {"loss": config.kl_coef * kl - reward, "reward": reward, "square": reward.square(), "kl": kl}
