"""SAC along the chain (Haarnoja et al., arXiv 1801.01290 and 1812.05905): soft values on a surrogate of the reward.

Two networks learn the reward of samples, and two values the expected return from earlier states. The policy follows
their gradients, so the reward need not be differentiable. As everywhere here, energies and values are costs: E = -r.

One `update` is one iteration:

    1. roll out the policy                       without gradient
    2. energies: fit E(x_T) to -r(x_T, c)        reward_updates optimizer steps
    3. values: t = T-1 .. 0, soft targets        one optimizer step each, in value_updates sweeps
    4. policy: new steps from B stored states    one optimizer step (or policy_updates)
    5. temperature: towards target_entropy       one step on the log temperature, if it is learned

With h_t = log(sigma_t / sigma_ref_t) D, the entropy of an action relative to the pretrained policy in nats, and KL_t,
its divergence from it, the target of step 3 is

    max_i V_target_i(x_{t+1}, t + 1) - temperature h_t + kl_coef KL_t

and the loss of step 4 is the same with V instead of the target and a new reparameterized step. DxMI is this with an
energy that is learned from data instead of a reward, a single value, and a running cost instead of the divergence.

Differences from the published version. The horizon is finite and there is no discount, so each step has its own value.
The states are those of the last rollout; there is no replay buffer. Entropies are those of the Gaussian steps, not
samples of -log pi. The target of the temperature is stated relative to the pretrained policy, since -dim, the usual
target, has no meaning here.

Logged metrics (means over the batch, of the last update of the iteration):

    reward/mean              mean reward of the rollout, which samples from the policy, not from its moving average
    reward/std               standard deviation of the reward over the batch
    reward/error             root mean squared E(x_T) + r of the surrogates, before the step
    value/td_error           root mean squared V(x_t, t) - target, over all t and both values
    policy/loss              loss of step 4
    policy/relative_entropy  mean of log(sigma_t / sigma_ref_t) over the actions, in nats per dimension, after the step
    policy/temperature       temperature of this iteration
    policy/grad_norm         gradient norm before clipping, only with policy.max_grad_norm
    policy/entropy           mean_t log sigma_t, the per-dimension entropy up to a constant
    policy/kl_reference      KL divergence from the pretrained policy, of a trajectory in nats, only with kl_coef
"""

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor

from dxmi.algorithms.base import DEVICE, HOST, Metrics, Parts, PolicyAlgorithm
from dxmi.algorithms.configs import SacConfig
from dxmi.algorithms.losses import policy_loss, td_target, value_loss
from dxmi.algorithms.states import StoredStates, draw_states
from dxmi.critics.energy import Energy
from dxmi.critics.value import SeparateValue, TwinValue
from dxmi.data.batch import Batch, Condition, Streams
from dxmi.diffusion.trajectory import GaussianStep, Trajectory
from dxmi.errors import UserError
from dxmi.optim.moving_average import MovingAverage
from dxmi.rewards.base import rewards_of


class Sac(PolicyAlgorithm):
    """SAC, with all state that training changes.

    Args:
        config: Settings of SAC.
        parts: Components from which it is built.

    Raises:
        UserError: kl_coef is set, but the denoiser takes latents.
    """

    needs_data = False
    streams: ClassVar[Mapping[str, str]] = {"noise": DEVICE, "states": HOST}
    panels: ClassVar[Sequence[str]] = (
        *("reward/mean", "reward/error", "value/td_error"),
        *("policy/temperature", "policy/relative_entropy", "policy/grad_norm"),
    )
    value: TwinValue
    temperature: Tensor
    counts: Tensor

    def __init__(self, config: SacConfig, parts: Parts) -> None:
        super().__init__(parts, config.policy_ema)
        self.config = config
        if config.kl_coef and self.policy.network.latent:
            raise UserError(
                f"algorithm.kl_coef is {config.kl_coef}, but the denoiser takes latents, with which the divergence of "
                "a step is unknown: make it 0."
            )
        self.reward = parts.reward()
        num_steps = self.policy.num_steps
        twins = [SeparateValue(Energy(parts.critic()), parts.timed_critic(), num_steps) for _ in range(2)]
        self.value = TwinValue(*twins)
        self.target = copy.deepcopy(self.value).requires_grad_(False)
        average = MovingAverage.between(self.value, self.target, config.target_ema, warm_up=False)
        self.averages = [*self.averages, average]
        self.keep_reference()
        self.register_buffer("temperature", torch.tensor(config.temperature))
        counts = torch.ones(num_steps)
        counts[-1] = float(config.last_step)
        self.register_buffer("counts", counts, persistent=False)
        self.optimizers = {
            "policy": self.policy_optimizer(config.policy, parts),
            "value": parts.optimizer(config.critic, (self.value.timed_parameters(), config.critic.lr)),
            "energy": parts.optimizer(config.energy, (self.value.energy_parameters(), config.energy.lr)),
        }

    def iterate(self, batch: Batch, iteration: int, streams: Streams) -> Metrics:
        """Perform one iteration; returns the metrics listed in the module's docstring."""
        config, num_steps = self.config, self.policy.num_steps
        draws = [
            draw_states(streams, "states", num_steps, batch.share.num, every=False)[0]
            for _ in range(config.policy_updates)
        ]
        trajectory = self.rollout(batch, streams)
        reward = rewards_of(self.reward, trajectory.x[:, -1], batch.condition, iteration, self._workers)
        mean, square = self._workers.sum([batch.share.mean(reward), batch.share.mean(reward.square())])
        metrics = {"reward/mean": mean, "reward/std": (square - mean.square()).clamp_min(0.0).sqrt()}

        for _ in range(config.reward_updates):
            metrics["reward/error"] = self._fit_reward(trajectory, reward, batch)
        for _ in range(config.value_updates):
            errors = [self._fit_values(t, trajectory, batch) for t in reversed(range(num_steps))]
            metrics["value/td_error"] = torch.stack(errors).mean(0).sqrt()
        for drawn in draws:
            states = StoredStates.gather(trajectory, batch.condition, drawn, batch.share)
            metrics |= self._update_policy(states, streams)
        metrics |= self._adapt()
        metrics["policy/entropy"] = self.mean_log_sigma()
        self.update_averages()
        return metrics

    def _fit_reward(self, trajectory: Trajectory, reward: Tensor, batch: Batch) -> Tensor:
        """Step 2; returns the root mean squared error of the two energies, [K]."""

        def loss(x: Tensor, reward: Tensor, condition: Condition) -> Mapping[str, Tensor]:
            first, second = self.value.both(x, self.policy.num_steps, condition)
            return {"loss": value_loss(first, -reward) + value_loss(second, -reward)}

        inputs = (trajectory.x[:, -1], reward, batch.condition)
        means = self.optimizers["energy"].minimize(loss, *inputs, num=batch.share.num).means
        return (means["loss"] / 2.0).sqrt()

    def _fit_values(self, t: int, trajectory: Trajectory, batch: Batch) -> Tensor:
        """Step 3 at one t; returns the mean squared error of the two values, [K]."""

        def loss(x: Tensor, x_next: Tensor, mean: Tensor, sigma: Tensor, condition: Condition) -> Mapping[str, Tensor]:
            with torch.no_grad():
                steps = torch.full_like(sigma, t, dtype=torch.int64)
                control = self._control(GaussianStep(mean, sigma), x, steps, condition)["control"]
                target = td_target(self.target(x_next, t + 1, condition), torch.zeros(()), control)
            first, second = self.value.both(x, t, condition)
            return {"loss": value_loss(first, target) + value_loss(second, target)}

        stored = (trajectory.x[:, t], trajectory.x[:, t + 1], trajectory.mean[:, t], trajectory.sigma[:, t])
        means = self.optimizers["value"].minimize(loss, *stored, batch.condition, num=batch.share.num).means
        return means["loss"] / 2.0

    def _control(self, step: GaussianStep, x: Tensor, t: Tensor, condition: Condition) -> dict[str, Tensor]:
        """The cost `control` of actions at steps t [b]: -temperature h_t + kl_coef KL_t; and `kl`, KL_t; [b] each."""
        counts = self.counts[t]
        assert self.reference is not None
        dims = x[0].numel()
        relative = dims * (step.sigma.log() - self.reference.log_sigma[t])
        control = -self.temperature * counts * relative
        if not self.config.kl_coef:
            return {"control": control}
        kl = counts * step.kl(self.reference.transition(x, t, condition=condition))
        return {"control": control + self.config.kl_coef * kl, "kl": kl}

    def _update_policy(self, states: StoredStates, streams: Streams) -> Metrics:
        """Step 4: minimize the mean of max_i V_i(x_{t+1}, t + 1) + control cost over new steps from stored states."""
        noise = states.own(streams.normal("noise", (states.num, *self.policy.event)))
        latent = states.own(self.draw_latent(states.num, streams))

        def loss(
            x: Tensor, t: Tensor, noise: Tensor, latent: Tensor | None, condition: Condition, **split: int
        ) -> Mapping[str, Tensor]:
            step = self.policy.transition(x, t, condition=condition, latent=latent)
            cost = self._control(step, x, t, condition)
            value = self.value.forward_timesteps(step.sample(noise), t + 1, condition, **split)
            # Actions are drawn uniformly from T steps, and the divergence of a trajectory is a sum over them.
            named = {"kl_reference": self.policy.num_steps * cost["kl"]} if "kl" in cost else {}
            return {"loss": policy_loss(value, cost["control"]), **named}

        def static(rows: slice) -> Mapping[str, Any]:
            return states.split(rows)

        inputs = (states.x, states.t, noise, latent, states.condition)
        return self.optimizers["policy"].minimize(loss, *inputs, num=states.num, static=static).metrics("policy")

    @torch.no_grad()
    def _adapt(self) -> Metrics:
        """Step 5: log temperature -= lr (entropy - target_entropy); both entropies are relative and per dimension."""
        assert self.reference is not None
        temperature = self.seeds.table(self.temperature)
        own, theirs = (self.seeds.table(policy.free_log_sigma) for policy in (self.policy, self.reference))
        counts = self.counts[:-1]
        entropy = ((own - theirs) * counts).sum(1) / self.counts.sum()
        metrics = {"policy/relative_entropy": entropy, "policy/temperature": temperature.clone()}
        if self.config.target_entropy is not None:
            temperature.mul_((-self.config.temperature_lr * (entropy - self.config.target_entropy)).exp())
        return metrics
