"""The policy: a diffusion model cut to T steps, each a Gaussian with a learned standard deviation.

`transition` is the one place where a step is computed; `step`, `log_prob`, `rollout` and `sample` all call it.
"""

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dxmi.networks import Denoiser
from dxmi.schedules import StepSchedule
from dxmi.tensors import per_sample
from dxmi.trajectory import Gaussian, Trajectory

Guide = Callable[[Tensor, int], Tensor]
"""Given x_t [B, *event] and t, the gradient [B, *event] that sampling should descend."""


class Policy(nn.Module):
    """pi(x_{t+1} | x_t) = N(signal_scale_t x_t + noise_scale_t eps(x_t, k_t), sigma_t^2 I).

    It owns what it learns: the denoiser and the free log sigmas. The last sigma is the schedule's, for ever.

    Args:
        network: predicts the noise.
        schedule: the tables.
        event: shape of one sample.
    """

    diffusion_step: Tensor
    signal_scale: Tensor
    noise_scale: Tensor
    final_log_sigma: Tensor

    def __init__(self, network: Denoiser, schedule: StepSchedule, event: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.event = event
        self.num_steps = schedule.num_steps
        for name in ("diffusion_step", "signal_scale", "noise_scale"):
            table = torch.from_numpy(getattr(schedule, name)).float()
            self.register_buffer(name, table, persistent=False)
        log_sigma = torch.from_numpy(schedule.sigma).log().float()
        self.free_log_sigma = nn.Parameter(log_sigma[:-1].clone())
        self.register_buffer("final_log_sigma", log_sigma[-1:].clone(), persistent=False)

    @property
    def log_sigma(self) -> Tensor:
        """Log sigma_t of every step, [T]."""
        return torch.cat((self.free_log_sigma, self.final_log_sigma))

    def embeddings(self) -> Tensor:
        """The network's embedding of every step's diffusion step, [T, E]."""
        return self.network.embed(self.diffusion_step)

    def transition(
        self, x: Tensor, t: int | Tensor, embeddings: Tensor | None = None, log_sigma: Tensor | None = None
    ) -> Gaussian:
        """The Gaussian over x_{t+1}.

        Args:
            x: states, [B, *event].
            t: the step, one for the batch or one a sample [B] (int64).
            embeddings: `self.embeddings()` if the caller has it at hand.
            log_sigma: `self.log_sigma` if the caller has it at hand.
        """
        row = slice(t, t + 1) if isinstance(t, int) else t
        embeddings = self.embeddings() if embeddings is None else embeddings
        log_sigma = self.log_sigma if log_sigma is None else log_sigma
        noise = self.network(x, embeddings[row]).float()  # under autocast it comes in bfloat16
        signal_scale, noise_scale = per_sample(self.signal_scale[row], x), per_sample(self.noise_scale[row], x)
        mean = (signal_scale * x).addcmul(noise_scale, noise)
        return Gaussian(mean, log_sigma[row].exp().expand(len(x)))

    def step(self, x: Tensor, t: int | Tensor, noise: Tensor) -> Tensor:
        """x_{t+1} [B, *event], reparameterised by `noise` [B, *event]."""
        return self.transition(x, t).sample(noise)

    def log_prob(self, x_next: Tensor, x: Tensor, t: int | Tensor) -> Tensor:
        """Log pi(x_{t+1} | x_t) in nats, summed over the event: [B]."""
        return self.transition(x, t).log_prob(x_next)

    def noise(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise for a rollout: the start and T steps, [T+1, B, *event]."""
        shape = (self.num_steps + 1, batch_size, *self.event)
        return torch.randn(shape, generator=generator, device=self.diffusion_step.device)

    @torch.no_grad()
    def rollout(self, noise: Tensor) -> Trajectory:
        """Run the policy from noise[0], with noise[t + 1] in step t, without gradient.

        Args:
            noise: as `self.noise` makes it, [T+1, B, *event].
        """
        embeddings, log_sigma = self.embeddings(), self.log_sigma
        states, means = [noise[0]], []
        for t in range(self.num_steps):
            step = self.transition(states[-1], t, embeddings, log_sigma)
            means.append(step.mean)
            states.append(step.sample(noise[t + 1]))
        sigma = log_sigma.exp()[:, None].expand(-1, noise.shape[1])
        return Trajectory(torch.stack(states), torch.stack(means), sigma)

    @torch.no_grad()
    def walk(
        self, num: int, generator: torch.Generator, guide: Guide | None = None, guidance: float = 0.0
    ) -> Iterator[Tensor]:
        """The states x_0 .. x_T of `num` rollouts one after the other, each [num, *event]; none is kept here.

        Args:
            num: how many.
            generator: draws the start and then each step's noise.
            guide: gradient of a value V(x, t); after each step x_{t+1} -= guidance * sigma_t * guide(x_{t+1}, t + 1).
            guidance: strength, 0 for none. V is a cost, so a positive strength descends it.
        """
        embeddings, log_sigma = self.embeddings(), self.log_sigma
        x = torch.randn((num, *self.event), generator=generator, device=self.diffusion_step.device)
        yield x
        noise = torch.empty_like(x)
        for t in range(self.num_steps):
            step = self.transition(x, t, embeddings, log_sigma)
            x = step.sample(noise.normal_(generator=generator))
            if guide is not None and guidance != 0.0:
                x = x.addcmul(per_sample(step.sigma, x), guide(x, t + 1), value=-guidance)
            yield x

    def sample(self, num: int, generator: torch.Generator, guide: Guide | None = None, guidance: float = 0.0) -> Tensor:
        """The last state of `walk`: [num, *event]."""
        return deque(self.walk(num, generator, guide, guidance), maxlen=1).pop()
