"""How far a fine-tuned policy is from the pretrained one."""

import torch
from torch import Tensor

from dxmi.data.batch import Condition
from dxmi.diffusion.policy import Policy


@torch.no_grad()
def policy_divergence(policy: Policy, reference: Policy, num: int, noise: torch.Generator, batch_size: int) -> float:
    """Mean KL(policy || reference) of a trajectory in nats, from rollouts of the policy.

    It is the sum over the steps of the exact divergence of two Gaussians at the states of the rollouts. The last step
    is left out: its sigma is so small that a change of .001 per pixel would count half a nat for each.

    Args:
        policy: The policy.
        reference: The policy to which it is compared, with equal steps.
        num: Number of rollouts.
        noise: Generator of the conditions and the noise.
        batch_size: Number of rollouts at once.
    """
    sizes = [min(batch_size, num - start) for start in range(0, num, batch_size)]
    return sum(float(_divergences(policy, reference, size, noise).sum()) for size in sizes) / num


def _divergences(policy: Policy, reference: Policy, num: int, noise: torch.Generator) -> Tensor:
    """The divergence of each of `num` rollouts, float64 [num]."""
    condition: Condition = policy.draw_condition(num, noise)
    x = policy.start(torch.randn((num, *policy.event), generator=noise, device=policy.timestep.device))
    total = torch.zeros(num, dtype=torch.float64, device=x.device)
    for t in range(policy.num_steps - 1):
        latent = policy.latent(num, noise)
        step = policy.transition(x, t, condition=condition, latent=latent)
        total += step.kl(reference.transition(x, t, condition=condition, latent=latent)).double()
        x = step.sample(torch.randn(x.shape, generator=noise, device=x.device))
    return total
