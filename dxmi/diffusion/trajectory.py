"""Steps and trajectories of a policy.

Axis letters: T policy steps, B batch, *event. Time counts generation steps: x[0] is noise, and x[T] is the sample.
"""

import math
from typing import NamedTuple

import torch
from torch import Tensor

from dxmi.tensors import event_sum, per_sample


class GaussianStep(NamedTuple):
    """One policy step: the isotropic normal N(mean, sigma^2 I) over the next state.

    Attributes:
        mean: mean, [B, *event].
        sigma: standard deviation, [B].
    """

    mean: Tensor
    sigma: Tensor

    def sample(self, noise: Tensor) -> Tensor:
        """The reparameterized sample mean + sigma * noise, with gradients to both: [B, *event]."""
        return torch.addcmul(self.mean, per_sample(self.sigma, noise), noise)

    def log_prob(self, x: Tensor) -> Tensor:
        """Log density of `x` [B, *event] in nats, summed over the event: [B]."""
        dims = math.prod(x.shape[1:])
        squares = event_sum((x - self.mean).square()) / self.sigma.square()
        return -0.5 * squares - dims * (self.sigma.log() + 0.5 * math.log(2.0 * math.pi))

    def kl(self, other: "GaussianStep") -> Tensor:
        """KL(self || other) in nats, summed over the event: [B]."""
        dims = math.prod(self.mean.shape[1:])
        log_ratio = self.sigma.log() - other.sigma.log()
        squares = event_sum((self.mean - other.mean).square()) / other.sigma.square()
        return 0.5 * (squares + dims * ((2.0 * log_ratio).exp() - 1.0 - 2.0 * log_ratio))


class Trajectory(NamedTuple):
    """A batch of rollouts.

    Attributes:
        x: states, starting with the noise, [T+1, B, *event].
        mean: mean of each step, [T, B, *event].
        sigma: standard deviation of each step, [T, B].
    """

    x: Tensor
    mean: Tensor
    sigma: Tensor

    @property
    def num_steps(self) -> int:
        """T."""
        return self.mean.shape[0]

    @property
    def batch_size(self) -> int:
        """B."""
        return self.mean.shape[1]

    @property
    def states(self) -> Tensor:
        """The states in which the policy acts, x_0 .. x_{T-1}, ordered by time and then by sample: [T * B, *event]."""
        return self.x[:-1].flatten(0, 1)

    @property
    def sample(self) -> Tensor:
        """x_T: [B, *event]."""
        return self.x[-1]

    @property
    def log_prob(self) -> Tensor:
        """Log density of every step in nats, [T, B]."""
        steps = GaussianStep(self.mean.flatten(0, 1), self.sigma.flatten())
        return steps.log_prob(self.x[1:].flatten(0, 1)).view(self.num_steps, self.batch_size)
