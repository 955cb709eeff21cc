"""DxMI: Diffusion by Maximum-Entropy Inverse RL (Yoon et al., NeurIPS 2024, arXiv 2407.00626), with DxDP.

One `update` is one iteration of Algorithm 1, with the dynamic programming of Algorithm 2:

    1. roll out the policy                      without gradient
    2. adapt the reference variance             AVR
    3. energy: low on data, high on samples     one optimizer step (or energy_updates)
    4. value: t = T-1 .. 0, temporal difference one optimizer step each (value_updates sweeps)
    5. policy: new steps from stored states     one optimizer step per minibatch (policy_updates draws)

The paper takes one new step and evaluates V after it. With `policy_horizon` h, the policy takes h new steps, through
which the loss is differentiated, before V is evaluated (value expansion, arXiv 1803.00101); with h = T, this is
backpropagation through the trajectory, and V before T is not used.

Logged metrics (means over the batch, of the last update of the iteration):

    energy/data_mean     mean E(x_data)
    energy/sample_mean   mean E(x_T)
    energy/loss          loss of step 3
    energy/penalty       |grad E|^2, summed over data and samples, only with energy_gradient_penalty
    value/td_error       root mean squared V(x_t, t) - target, over all t; absent if value_updates is 0
    policy/loss          loss of step 5
    policy/grad_norm     gradient norm before clipping, only with policy.max_grad_norm
    policy/entropy       mean_t log sigma_t, the per-dimension entropy up to a constant
    policy/cost          mean running cost of step 5, summed over its new steps; absent if policy_mask is 0
"""

import copy
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from dxmi.algorithms.base import DEVICE, HOST, Metrics, Parts, PolicyAlgorithm
from dxmi.algorithms.configs import DxMIConfig
from dxmi.algorithms.costs import ControlCost, RunningCost, adapt_, per_step_table, step_costs
from dxmi.algorithms.losses import energy_loss, policy_loss, squared_gradient, td_target, value_loss
from dxmi.algorithms.states import StoredStates, draw_states
from dxmi.critics.energy import Energy
from dxmi.critics.value import SeparateValue, SharedValue, Value
from dxmi.data.batch import Batch, Condition, Streams
from dxmi.diffusion.policy import Guide
from dxmi.diffusion.trajectory import GaussianStep, Trajectory
from dxmi.optim.config import OptimizerConfig
from dxmi.optim.moving_average import MovingAverage
from dxmi.optim.optimizer import Optimizer
from dxmi.tensors import per_sample


class DxMI(PolicyAlgorithm):
    """DxMI, with all state that training changes: networks, reference variance, averages, optimizers.

    Args:
        config: Settings of DxMI.
        parts: Components from which it is built.
        value: Value and its energy, trained in place; by default untrained ones.
    """

    streams: ClassVar[Mapping[str, str]] = {"noise": DEVICE, "states": HOST}
    is_recordable: ClassVar[bool] = True
    panels: ClassVar[Sequence[str]] = (
        *("energy/data_mean", "energy/sample_mean"),
        *("value/td_error", "policy/entropy", "policy/grad_norm"),
    )
    value: Value
    step_cost: Tensor

    def __init__(self, config: DxMIConfig, parts: Parts, value: Value | None = None) -> None:
        super().__init__(parts, config.policy_ema)
        self.config = config
        self.value = value or _untrained_value(config, parts)
        self._set_costs(torch.from_numpy(parts.schedule.eta).float())
        self._set_target()
        self.optimizers = self._optimizers(parts)

    def _set_costs(self, eta: Tensor) -> None:
        config, num_steps = self.config, self.policy.num_steps
        start = eta if config.reference_var is None else per_step_table(config.reference_var, num_steps)
        self.running_cost = RunningCost(config.running_cost, start, config.reference_var_ema)
        coefficients = (config.cost_coef, config.entropy_coef, num_steps)
        value_mask = config.value_mask or ((1.0,) if config.preset == "objective" else (0.0,))
        self.value_control = ControlCost(value_mask, *coefficients)
        self.policy_control = ControlCost(config.policy_mask, *coefficients)
        step_cost = step_costs(config.step_cost, config.step_cost_scale, num_steps)
        self.register_buffer("step_cost", step_cost, persistent=False)

    def _set_target(self) -> None:
        decay = self.config.target_ema
        self.target = None if decay is None else copy.deepcopy(self.value)
        if self.target is not None and decay is not None:
            average = MovingAverage.between(self.value, self.target, decay, warm_up=False)
            self.averages = [*self.averages, average]

    def _optimizers(self, parts: Parts) -> dict[str, Optimizer]:
        """Create the optimizers by the name of what they train; a shared value is trained together with its energy."""
        config, value = self.config, self.value

        def critic(settings: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
            return parts.optimizer(settings, (parameters, settings.lr))

        found = {"policy": self.policy_optimizer(config.policy, parts)}
        if not isinstance(value, SeparateValue):
            return {**found, "value": critic(config.critic, value.parameters())}
        found["value"] = critic(config.critic, value.network.parameters())
        return {**found, "energy": critic(config.energy, self._trained_of(value.energy))}

    def _trained_of(self, energy: Energy) -> list[nn.Parameter]:
        """The parameters of a separate energy on which its loss depends.

        Without the squared-energy regularizer, the loss is a difference of mean energies, in which a constant cancels.
        The gradient of the energy's offset is then rounding noise, which Adam would scale to steps of the full learning
        rate. The offset of a shared energy is trained, since the value's loss depends on it.
        """
        idle = {id(offset) for offset in energy.network.offsets} if self.config.energy_l2 == 0.0 else set()
        return [parameter for parameter in energy.parameters() if id(parameter) not in idle]

    @property
    def energy(self) -> Energy:
        """The energy E = V(., T)."""
        return self.value.energy

    @property
    def guidance(self) -> float:
        """Scale of the value guidance with which the policy is evaluated."""
        return self.config.guidance

    @property
    def guide(self) -> Guide | None:
        """The gradient of the value; None if the value before T is not trained."""
        return super().guide if self.config.trains_value else None

    # ------------------------------------------------------------------------
    # One iteration: Algorithm 1.

    def variant(self, iteration: int) -> bool:
        """Whether the policy is updated in this iteration."""
        return iteration >= self.config.policy_start

    def iterate(self, batch: Batch, iteration: int, streams: Streams) -> Metrics:
        """Perform one DxMI iteration; returns the metrics listed in the module's docstring."""
        config, num_steps = self.config, self.policy.num_steps
        draws = [
            draw
            for _ in range(config.policy_updates if self.variant(iteration) else 0)
            for draw in draw_states(streams, "states", num_steps, batch.share.num, every=config.all_states)
        ]

        # 1. Roll out.
        trajectory = self.rollout(batch, streams)

        # 2. Adapt the reference variance.
        displacement = self.displacements(trajectory)
        if displacement is not None and self.running_cost.is_adaptive:
            self._adapt(displacement, batch)

        # 3. Energy: low on data, high on samples.
        for _ in range(config.energy_updates):
            metrics = self.update_energy(batch, trajectory, streams)

        # 4. Value: one temporal-difference step at each t, backwards in time.
        for _ in range(config.value_updates):
            errors = [
                self.update_value(t, batch, trajectory, displacement, streams) for t in reversed(range(num_steps))
            ]
            metrics["value/td_error"] = torch.stack(errors).mean(0).sqrt()

        # 5. Policy: new reparameterized steps from stored states.
        for drawn in draws:
            states = StoredStates.gather(trajectory, batch.condition, drawn, batch.share, on_host=not streams.fixed)
            metrics |= self.update_policy(states, streams)
        metrics["policy/entropy"] = self.mean_log_sigma()

        self.update_averages()
        return metrics

    def displacements(self, trajectory: Trajectory) -> Tensor | None:
        """The displacement of each stored step, see `RunningCost.displacement`, [K, T, b]; None if it is not used."""
        is_in_target = bool(self.value_control.steps) and not self.config.resample_next
        if not self.running_cost.is_adaptive and not is_in_target:
            return None

        def displacement(x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
            steps = GaussianStep(mean.flatten(0, 1), sigma.flatten())
            found = self.running_cost.displacement(x[:-1].flatten(0, 1), x[1:].flatten(0, 1), steps)
            return found.view(mean.shape[:2])

        found: Tensor = self.seeds.map(displacement, *trajectory)
        return found

    def _adapt(self, displacement: Tensor, batch: Batch) -> None:
        """Move s_t^2 towards the mean squared displacement of the policy's steps (AVR)."""
        (mean,) = self._workers.sum([batch.share.mean(displacement)])
        adapt_(self.seeds.table(self.running_cost.reference_var), mean, self.running_cost.decay)

    def update_energy(self, batch: Batch, trajectory: Trajectory, streams: Streams) -> Metrics:
        """Step 3: minimize mean E(x_data) - mean E(x_T) + l2 (mean E(x_data)^2 + mean E(x_T)^2) + gradient penalty."""
        config = self.config

        def loss(data: Tensor, sample: Tensor, noise: Tensor | None, condition: Condition) -> Mapping[str, Tensor]:
            x = torch.cat((data, sample))
            if noise is not None:
                x = x.add(torch.cat(noise.unbind(1)), alpha=config.energy_noise)
            both = Condition(*(None if c is None else torch.cat((c, c)) for c in condition))
            energies, penalty = self._energies(x, both)
            energy_data, energy_sample = energies.chunk(2)
            values = {"data_mean": energy_data, "sample_mean": energy_sample}
            contrast = energy_loss(energy_data, energy_sample, config.energy_l2)
            if penalty is None:
                return {"loss": contrast, **values}
            return {"loss": contrast + config.energy_gradient_penalty * penalty, **values, "penalty": penalty}

        optimizer = self.optimizers.get("energy", self.optimizers["value"])
        inputs = (batch.x, trajectory.x[:, -1], self._energy_noise(batch, streams), batch.condition)
        result = optimizer.minimize(loss, *inputs, num=batch.share.num)
        return {f"energy/{name}": mean for name, mean in result.means.items()}

    def _energy_noise(self, batch: Batch, streams: Streams) -> Tensor | None:
        """Draw noise for data and samples of the energy's update, [K, b, 2, *event]; None if none is added."""
        if self.config.energy_noise == 0.0:
            return None
        return batch.share.of(streams.normal("noise", (batch.share.num, 2, *self.policy.event)), dim=1)

    def _energies(self, x: Tensor, condition: Condition) -> tuple[Tensor, Tensor | None]:
        """E of data and samples [2b, *event]: [2b]; and the sum of their gradient penalties, [b], if there is one."""
        if self.config.energy_gradient_penalty == 0.0:
            return self.energy(x, condition), None

        def total(x: Tensor) -> tuple[Tensor, Tensor]:
            energies = self.energy(x, condition)
            return energies.sum(), energies

        gradient, energies = torch.func.grad(total, has_aux=True)(x)
        of_data, of_sample = squared_gradient(gradient).chunk(2)
        return energies, of_data + of_sample

    def update_value(
        self, t: int, batch: Batch, trajectory: Trajectory, displacement: Tensor | None, streams: Streams
    ) -> Tensor:
        """Step 4 at one t: minimize mean (V(x_t, t) - target)^2; returns this mean, [K]."""
        stored = None if displacement is None else displacement[:, t]
        fresh = self._noise_and_latent(batch, streams) if self.config.resample_next else None

        def loss(
            x: Tensor,
            x_next: Tensor,
            displacement: Tensor | None,
            fresh: tuple[Tensor, Tensor | None] | None,
            condition: Condition,
        ) -> Mapping[str, Tensor]:
            with torch.no_grad():
                if fresh is not None:
                    x_next, displacement = self._resampled(x, t, *fresh, condition)
                target = self._target(x_next, t, displacement, condition)
            return {"loss": value_loss(self.value(x, t, condition), target)}

        inputs = (trajectory.x[:, t], trajectory.x[:, t + 1], stored, fresh, batch.condition)
        return self.optimizers["value"].minimize(loss, *inputs, num=batch.share.num).means["loss"]

    def _noise_and_latent(self, batch: Batch, streams: Streams) -> tuple[Tensor, Tensor | None]:
        """Draw noise and, if the network takes one, a latent for one step of every trajectory."""
        share = batch.share
        noise = share.of(streams.normal("noise", (share.num, *self.policy.event)), dim=1)
        latent = self.draw_latent(share.num, streams)
        return noise, None if latent is None else share.of(latent, dim=1)

    def _resampled(
        self, x: Tensor, t: int, noise: Tensor, latent: Tensor | None, condition: Condition
    ) -> tuple[Tensor, Tensor | None]:
        """Sample new next states of `x` at step t; also returns their displacement if the target uses it."""
        step = self.policy.transition(x, t, condition=condition, latent=latent)
        x_next = step.sample(noise)
        return x_next, self.running_cost.displacement(x, x_next, step) if t in self.value_control.steps else None

    def _target(self, x_next: Tensor, t: int, displacement: Tensor | None, condition: Condition) -> Tensor:
        """Compute the target of V(x_t, t), [b]."""
        control, at = None, slice(t, t + 1)
        if displacement is not None and t in self.value_control.steps:
            cost = self.running_cost(displacement, at)
            control = self.value_control(cost, self.policy.log_sigma[at], at)
        value = (self.target or self.value)(x_next, t + 1, condition)
        return td_target(value, self.step_cost[t], control)

    @property
    def horizon(self) -> int:
        """Number of new steps of the policy's update, h."""
        return self.config.policy_horizon or self.policy.num_steps

    def update_policy(self, states: StoredStates, streams: Streams) -> Metrics:
        """Step 5: minimize the mean of V(x_{t+h}, t+h) + control costs over h new steps from stored states.

        A trajectory ends at T: states from which fewer than h steps are left are taken to x_T.
        """
        horizon, num_steps = self.horizon, self.policy.num_steps
        noise = tuple(states.own(streams.normal("noise", (states.num, *self.policy.event))) for _ in range(horizon))
        latents = tuple(states.own(self.draw_latent(states.num, streams)) for _ in range(horizon))

        def loss(
            x: Tensor,
            t: Tensor,
            noise: Sequence[Tensor],
            latents: Sequence[Tensor | None],
            condition: Condition,
            *,
            acting: Sequence[int],
            **split: int,
        ) -> Mapping[str, Tensor]:
            x, costs = self._expand(x, t, noise, latents, condition, acting)
            value = self.value.forward_timesteps(x, (t + horizon).clamp(max=num_steps), condition, **split)
            named = {"cost": costs["running"]} if costs else {}
            return {"loss": policy_loss(value, costs.get("control")), **named}

        def static(rows: slice) -> Mapping[str, Any]:
            return {"acting": states.acting(rows, horizon), **states.split(rows, horizon)}

        inputs = (states.x, states.t, noise, latents, states.condition)
        return self.optimizers["policy"].minimize(loss, *inputs, num=states.num, static=static).metrics("policy")

    def _expand(  # noqa: PLR0917
        self,
        x: Tensor,
        t: Tensor,
        noise: Sequence[Tensor],
        latents: Sequence[Tensor | None],
        condition: Condition,
        acting: Sequence[int],
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take new steps from states `x` at ascending steps `t`; the first `acting[k]` states take the k-th of them.

        Returns:
            The states after them, [b, *event], and their costs, see `_new_step`, each summed over the steps.
        """
        sums: dict[str, Tensor] = {}
        for k, num in enumerate(acting):
            rows, now = slice(num), t[:num] + k
            latent = latents[k]
            x_next, costs = self._new_step(
                x[rows],
                now.clamp(max=self.policy.num_steps - 1),
                noise[k][rows],
                None if latent is None else latent[rows],
                condition.rows(rows),
            )
            if k > 0:
                is_left = now < self.policy.num_steps  # some rows may be at T for some of the seeds only
                x_next = torch.cat((torch.where(per_sample(is_left, x_next), x_next, x[rows]), x[num:]))
                costs = {name: nn.functional.pad(cost * is_left, (0, len(x) - num)) for name, cost in costs.items()}
            x, sums = x_next, {name: sums[name] + cost if k > 0 else cost for name, cost in costs.items()}
        return x, sums

    def _new_step(
        self, x: Tensor, t: Tensor, noise: Tensor, latent: Tensor | None, condition: Condition
    ) -> tuple[Tensor, dict[str, Tensor]]:
        """Take a step; returns x_{t+1} and its `running` and `control` costs, [b] each, unless all masks are 0."""
        log_sigma = self.policy.log_sigma
        step = self.policy.transition(x, t, log_sigma=log_sigma, condition=condition, latent=latent)
        x_next = step.sample(noise)
        if not self.policy_control.steps:
            return x_next, {}
        running = self.running_cost(self.running_cost.displacement(x, x_next, step), t)
        return x_next, {"running": running, "control": self.policy_control(running, log_sigma[t], t)}


def _untrained_value(config: DxMIConfig, parts: Parts) -> Value:
    """Create the value and its energy with random weights."""
    energy = Energy(parts.critic())
    if config.value == "shared":
        return SharedValue(energy)
    return SeparateValue(energy, parts.timed_critic(), parts.policy.num_steps)
