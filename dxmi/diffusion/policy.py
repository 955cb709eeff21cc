"""The policy: a diffusion model shortened to T steps, each a Gaussian with a learned standard deviation.

`transition` is the only place where a step is computed; `step`, `log_prob`, `rollout` and `sample` all call it.
"""

from collections import deque
from collections.abc import Callable, Iterator

import torch
from torch import Tensor, nn

from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.diffusion.schedules.base import StepSchedule
from dxmi.diffusion.trajectory import GaussianStep, Trajectory
from dxmi.errors import UserError
from dxmi.networks.base import Denoiser, conditioned
from dxmi.tensors import per_sample

Guide = Callable[[Tensor, int, Condition], Tensor]
"""Maps x_t [B, *event], t and the condition to the gradient [B, *event] that sampling descends."""


class Policy(nn.Module):
    """pi(x_{t+1} | x_t) = N(signal_scale_t x_t + output_scale_t eps(input_scale_t x_t, k_t), sigma_t^2 I).

    The learned parameters are those of the denoiser and all log sigmas except the last, which the schedule fixes. With
    a class-conditional network, pi is conditioned on a label, by default one drawn with the class frequencies of the
    data. With a network that takes a latent, each step draws a new one, and pi is the normal given that latent.

    Args:
        network: predicts the noise, or the quantity that the schedule interprets its output as.
        schedule: tables of the T steps.
        event: shape of one sample.
    """

    timestep: Tensor
    signal_scale: Tensor
    output_scale: Tensor
    input_scale: Tensor
    final_log_sigma: Tensor
    class_counts: Tensor | None

    def __init__(self, network: Denoiser, schedule: StepSchedule, event: tuple[int, ...]) -> None:
        super().__init__()
        self.network = network
        self.event = event
        self.num_steps = schedule.num_steps
        for name, table in (
            ("timestep", schedule.timestep),
            ("signal_scale", schedule.signal_scale),
            ("output_scale", schedule.output_scale),
        ):
            self.register_buffer(name, torch.from_numpy(table).float(), persistent=False)
        self.start_sigma = schedule.start_sigma
        self.scales_input = schedule.input_scale is not None
        input_scale = torch.from_numpy(schedule.input_scale).float() if schedule.input_scale is not None else None
        self.register_buffer("input_scale", input_scale, persistent=False)
        log_sigma = torch.from_numpy(schedule.sigma).log().float()
        self.free_log_sigma = nn.Parameter(log_sigma[:-1].clone())
        self.register_buffer("final_log_sigma", log_sigma[-1:].clone(), persistent=False)
        self.register_buffer("class_counts", None, persistent=False)

    @property
    def log_sigma(self) -> Tensor:
        """Log sigma_t of every step, [T]."""
        return torch.cat((self.free_log_sigma, self.final_log_sigma))

    def embeddings(self) -> Tensor:
        """The network's embeddings of the diffusion steps of all T policy steps, [T, E]."""
        return self.network.embed(self.timestep)

    def transition(  # noqa: PLR0917
        self,
        x: Tensor,
        t: int | Tensor,
        embeddings: Tensor | None = None,
        log_sigma: Tensor | None = None,
        condition: Condition = UNCONDITIONAL,
        latent: Tensor | None = None,
    ) -> GaussianStep:
        """The Gaussian over x_{t+1}.

        Args:
            x: states, [B, *event].
            t: step, either one for the whole batch or one per sample [B] (int64).
            embeddings: the value of `self.embeddings()`, if it was already computed.
            log_sigma: the value of `self.log_sigma`, if it was already computed.
            condition: condition of each state, if the network is class-conditional.
            latent: latent of each state, [B, Z], if the network takes one.

        Raises:
            UserError: the network needs labels or a latent that are missing, or does not take those that were given.
        """
        row = slice(t, t + 1) if isinstance(t, int) else t
        embeddings = self.embeddings() if embeddings is None else embeddings
        log_sigma = self.log_sigma if log_sigma is None else log_sigma
        seen = x * per_sample(self.input_scale[row], x) if self.scales_input else x
        embedding = conditioned(self.network, embeddings[row], condition, latent)
        noise = self.network(seen, embedding).float()  # it is bfloat16 under autocast
        signal_scale, output_scale = per_sample(self.signal_scale[row], x), per_sample(self.output_scale[row], x)
        mean = (signal_scale * x).addcmul(output_scale, noise)
        return GaussianStep(mean, log_sigma[row].exp().expand(len(x)))

    def forward(self, x: Tensor, t: int | Tensor, condition: Condition = UNCONDITIONAL) -> GaussianStep:
        """The Gaussian over x_{t+1}, for `torch.func.functional_call`."""
        return self.transition(x, t, condition=condition)

    def step(
        self,
        x: Tensor,
        t: int | Tensor,
        noise: Tensor,
        condition: Condition = UNCONDITIONAL,
        latent: Tensor | None = None,
    ) -> Tensor:
        """A reparameterized sample of x_{t+1} [B, *event], computed from `noise` [B, *event]."""
        return self.transition(x, t, condition=condition, latent=latent).sample(noise)

    def log_prob(
        self,
        x_next: Tensor,
        x: Tensor,
        t: int | Tensor,
        condition: Condition = UNCONDITIONAL,
        latent: Tensor | None = None,
    ) -> Tensor:
        """Log pi(x_{t+1} | x_t) in nats, summed over the event and given the latent, if there is one: [B]."""
        return self.transition(x, t, condition=condition, latent=latent).log_prob(x_next)

    def noise(self, batch_size: int, generator: torch.Generator) -> Tensor:
        """Standard normal noise for the start and the T steps of a rollout, [T+1, B, *event]."""
        shape = (self.num_steps + 1, batch_size, *self.event)
        return torch.randn(shape, generator=generator, device=self.timestep.device)

    def latent(self, batch_size: int, generator: torch.Generator) -> Tensor | None:
        """Standard normal latents for one step, [B, Z]; None if the network takes none."""
        if self.network.latent == 0:
            return None
        return torch.randn((batch_size, self.network.latent), generator=generator, device=self.timestep.device)

    def latents(self, batch_size: int, generator: torch.Generator) -> Tensor | None:
        """Standard normal latents for a rollout, [T, B, Z]; None if the network takes none."""
        latents = self.latent(self.num_steps * batch_size, generator)
        return None if latents is None else latents.view(self.num_steps, batch_size, -1)

    def draw_classes(self, counts: Tensor | None) -> None:
        """Set the class frequencies that `draw_condition` uses: counts [C], int64, or None if they are unknown."""
        self.class_counts = None if counts is None else counts.to(self.timestep.device)

    def draw_condition(self, num: int, generator: torch.Generator) -> Condition:
        """Draw labels [num] with the frequencies set by `draw_classes`; an unconditional network has no condition.

        Raises:
            UserError: the class frequencies are unknown.
        """
        if self.network.classes == 0:
            return UNCONDITIONAL
        if self.class_counts is None:
            raise UserError(
                f"The network has {self.network.classes} classes, but their frequencies are unknown: give a label for "
                "each sample."
            )
        bounds = self.class_counts.cumsum(0)
        drawn = torch.randint(int(bounds[-1]), (num,), generator=generator, device=bounds.device)
        return Condition(torch.searchsorted(bounds, drawn, right=True))

    def start(self, noise: Tensor) -> Tensor:
        """x_0 from standard normal noise [B, *event]."""
        return noise if self.start_sigma == 1.0 else noise * self.start_sigma

    @torch.no_grad()
    def rollout(self, noise: Tensor, condition: Condition = UNCONDITIONAL, latents: Tensor | None = None) -> Trajectory:
        """Run the policy from noise[0], with noise[t + 1] in step t, without gradients.

        Args:
            noise: standard normal noise, see `self.noise`, [T+1, B, *event].
            condition: condition of each sample, if the network is class-conditional.
            latents: standard normal latents, see `self.latents`, [T, B, Z], if the network takes them.
        """
        embeddings, log_sigma = self.embeddings(), self.log_sigma
        states, means = [self.start(noise[0])], []
        for t in range(self.num_steps):
            latent = None if latents is None else latents[t]
            step = self.transition(states[-1], t, embeddings, log_sigma, condition, latent)
            means.append(step.mean)
            states.append(step.sample(noise[t + 1]))
        sigma = log_sigma.exp()[:, None].expand(-1, noise.shape[1])
        return Trajectory(torch.stack(states), torch.stack(means), sigma)

    @torch.no_grad()
    def sample_states(  # noqa: PLR0917
        self,
        num: int,
        generator: torch.Generator,
        guide: Guide | None = None,
        guidance: float = 0.0,
        condition: Condition | None = None,
        first: int | None = None,
    ) -> Iterator[Tensor]:
        """Yield the states x_0 .. x_T of `num` rollouts, each [num, *event], without storing them.

        Args:
            num: number of rollouts.
            generator: draws the labels (unless `condition` is given), the start, and the latent and noise of each step.
            guide: gradient of a value V(x, t); after each step x_{t+1} -= guidance * sigma_t * guide(x_{t+1}, t + 1).
            guidance: strength of the guidance, 0 for none. V is a cost, so a positive strength descends it.
            condition: condition of all `num` samples; by default that of `self.draw_condition`.
            first: compute only the first `first` rollouts, with the same noise that they have among all `num`.
        """
        condition = self.draw_condition(num, generator) if condition is None else condition
        embeddings, log_sigma = self.embeddings(), self.log_sigma
        noise = torch.randn((num, *self.event), generator=generator, device=self.timestep.device)
        condition = condition.rows(slice(first))
        x = self.start(noise[:first].clone())
        yield x
        for t in range(self.num_steps):
            latent = self.latent(num, generator)
            step = self.transition(x, t, embeddings, log_sigma, condition, latent if latent is None else latent[:first])
            x = step.sample(noise.normal_(generator=generator)[:first])
            if guide is not None and guidance != 0.0:
                x = x.addcmul(per_sample(step.sigma, x), guide(x, t + 1, condition), value=-guidance)
            yield x

    def sample(
        self,
        num: int,
        generator: torch.Generator,
        guide: Guide | None = None,
        guidance: float = 0.0,
        condition: Condition | None = None,
    ) -> Tensor:
        """The last state of `sample_states`: [num, *event]."""
        return deque(self.sample_states(num, generator, guide, guidance, condition), maxlen=1).pop()
