"""DxMI: Diffusion by Maximum-Entropy Inverse RL (Yoon et al., NeurIPS 2024, arXiv 2407.00626), with DxDP.

One `update` is one iteration:

    1. roll out the policy                      without gradient
    2. adapt the reference variance             AVR
    3. energy: low on data, high on samples     one optimiser step (or energy_updates)
    4. value: t = T-1 .. 0, temporal difference one optimiser step each
    5. policy: one fresh step from stored states

Logged metrics (means over the batch, of the last update of the iteration):

    energy/data_mean     mean E(x_data)
    energy/sample_mean   mean E(x_T)
    energy/loss          what step 3 minimised
    value/td_error       root mean squared V(x_t, t) - target, over all t
    policy/loss          what step 5 minimised
    policy/grad_norm     before clipping
    policy/entropy       mean_t log sigma_t, the per-dimension entropy up to a constant
    policy/cost          mean over t of the running cost mean_dims (x_{t+1} - x_t)^2 / (2 s_t^2)
"""

import copy
from collections.abc import Iterable

import torch
from torch import Tensor, nn

from dxmi.algorithms.configs import DxMIConfig, require_per_step
from dxmi.algorithms.costs import ReferenceVariance, running_cost, squared_noise, squared_step, step_costs
from dxmi.algorithms.losses import control_cost, energy_loss, policy_loss, td_target, value_loss
from dxmi.critics.energy import Energy
from dxmi.critics.value import SeparateValue, Value
from dxmi.diffusion.cuda_graphs import GraphedRollout
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.trajectory import Gaussian, Trajectory
from dxmi.distributed import ALONE, Share, Workers
from dxmi.errors import UserError
from dxmi.networks.base import NOTHING, Given
from dxmi.optim.config import OptimizerConfig
from dxmi.optim.optimizer import Descent, MovingAverage, Optimizer, Part
from dxmi.tensors import chunks


def per_step_numbers(name: str, numbers: tuple[float, ...], num_steps: int) -> Tensor:
    """One number for all steps or T numbers, as a table [T].

    Raises:
        ValueError: there are neither one nor T of them.
    """
    require_per_step(name, numbers, num_steps)
    return torch.tensor(numbers, dtype=torch.float32).expand(num_steps).clone()


class DxMI(nn.Module):
    """The algorithm and everything it changes: networks, reference variance, averages, optimisers.

    Args:
        config: its settings.
        policy: fine-tuned in place.
        value: trained in place, its energy included.
        eta: the schedule's variances, [T], the default start of the reference variance.
        total: iterations planned, the end of a learning-rate decay.
        workers: share each batch.
        accumulate: pieces in which each takes its share of an update, one after the other.
        graphed: record the rollout as a CUDA graph.

    Raises:
        ValueError: a per-step setting has neither one nor T entries.
    """

    policy_mask: Tensor
    step_cost: Tensor

    def __init__(
        self,
        config: DxMIConfig,
        policy: Policy,
        value: Value,
        eta: Tensor,
        total: int,
        *,
        workers: Workers = ALONE,
        accumulate: int = 1,
        graphed: bool = False,
    ) -> None:
        super().__init__()
        self.config = config
        self.policy = policy
        self.value = value
        self.workers = workers
        self.accumulate = accumulate
        self._pair: Tensor | None = None
        self._rollout = GraphedRollout(policy) if graphed else policy.rollout
        self._set_tables(eta.float())
        self._set_averages()
        self._set_optimizers(total)

    def _set_tables(self, eta: Tensor) -> None:
        config, num_steps = self.config, self.policy.num_steps
        if config.reference_var is not None:
            eta = per_step_numbers("reference_var", config.reference_var, num_steps)
        if config.running_cost == "noise":  # standardised already
            self.reference_var = ReferenceVariance(torch.ones(num_steps), decay=1.0)
        else:
            self.reference_var = ReferenceVariance(eta, config.reference_var_ema)
        value_mask = config.value_mask or ((1.0,) if config.preset == "objective" else (0.0,))
        # A list of the host's, not a tensor: a step whose mask is 0 is skipped without asking the device.
        self.value_mask: list[float] = per_step_numbers("value_mask", value_mask, num_steps).tolist()
        policy_mask = per_step_numbers("policy_mask", config.policy_mask, num_steps)
        self.policy_has_control = bool(policy_mask.any())
        self.register_buffer("policy_mask", policy_mask, persistent=False)
        step_cost = step_costs(config.step_cost, config.step_cost_scale, num_steps)
        self.register_buffer("step_cost", step_cost, persistent=False)

    def _set_averages(self) -> None:
        config = self.config
        self.average = copy.deepcopy(self.policy) if config.policy_ema is not None else None
        self.target = copy.deepcopy(self.value) if config.target_ema is not None else None
        self.moving_averages = []
        if self.average is not None and config.policy_ema is not None:
            self.moving_averages.append(MovingAverage.between(self.policy, self.average, config.policy_ema))
        if self.target is not None and config.target_ema is not None:
            self.moving_averages.append(
                MovingAverage.between(self.value, self.target, config.target_ema, warm_up=False)
            )

    def start_from(self, log_sigma: Tensor | None) -> None:
        """Give the policy the sigmas of one that was fine-tuned before, log sigma_t [T], before the first iteration.

        Raises:
            UserError: it had another number of steps.
        """
        if log_sigma is None:
            return
        num_steps = self.policy.num_steps
        if len(log_sigma) != num_steps:
            raise UserError(
                f"pretrain.weights is a policy of {len(log_sigma)} steps, but schedule.num_steps is {num_steps}."
            )
        for policy in (self.policy, *([] if self.average is None else [self.average])):
            with torch.no_grad():
                policy.free_log_sigma.copy_(log_sigma[:-1])

    @property
    def evaluated(self) -> Policy:
        """The policy that evaluation samples from: the moving average, or the policy itself without one."""
        return self.policy if self.average is None else self.average

    def _set_optimizers(self, total: int) -> None:
        config, policy, value = self.config, self.policy, self.value

        def critics(settings: OptimizerConfig, parameters: Iterable[nn.Parameter]) -> Optimizer:
            return Optimizer(settings, [(parameters, settings.lr)], total, self.workers)

        groups = [(policy.network.parameters(), config.policy.lr), ([policy.free_log_sigma], config.policy.sigma_lr)]
        self.policy_optimizer = Optimizer(config.policy, groups, total, self.workers)
        if isinstance(value, SeparateValue):
            self.value_optimizer = critics(config.critic, value.network.parameters())
            self.energy_optimizer = critics(config.energy, self._learned_of(value.energy))
        else:
            self.value_optimizer = self.energy_optimizer = critics(config.critic, value.parameters())

    def _learned_of(self, energy: Energy) -> list[nn.Parameter]:
        """Parameters of a separate energy on which its loss depends.

        Without the squared-energy regulariser the loss is a difference of mean energies, in which a constant cancels.
        The gradient of the energy's offset is then rounding noise, which Adam would scale to steps of the full learning
        rate. A shared energy keeps its offset: the value's loss trains it.
        """
        idle = {id(offset) for offset in energy.network.offsets} if self.config.energy_l2 == 0.0 else set()
        return [parameter for parameter in energy.parameters() if id(parameter) not in idle]

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """Every optimiser once, by the name of what it trains."""
        named = {"policy": self.policy_optimizer, "value": self.value_optimizer}
        return named if self.energy_optimizer is self.value_optimizer else named | {"energy": self.energy_optimizer}

    # ------------------------------------------------------------------------
    # One iteration.

    def update(
        self,
        data: Tensor,
        iteration: int,
        generator: torch.Generator,
        state_generator: torch.Generator,
        *,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """One DxMI iteration on a batch of data, of which this worker takes its share.

        Args:
            data: real samples in [-1, 1], the whole batch, [B, *event].
            iteration: from 0; sets the learning rates.
            generator: noise of the policy, on the policy's device.
            state_generator: which stored states the policy update draws, on the host.
            labels: the class of each real sample and of the one that is made beside it, [B], where there are classes.

        Returns:
            The metrics that the module's docstring lists, as scalars still on the device.
        """
        for optimizer in self.optimizers.values():
            optimizer.schedule(iteration)

        share = self.workers.share(len(data))

        # 1. Roll out.
        noise, latents = self.policy.noise(share.num, generator), self.policy.latents(share.num, generator)
        labels = None if labels is None else share.of(labels)
        latents = None if latents is None else share.of(latents, dim=1)
        trajectory = self._rollout(share.of(noise, dim=1), labels, latents)

        # 2. Adapt the reference variance.
        squared = self._squared_steps(trajectory)
        if squared is not None and self.reference_var.adaptive:
            self.reference_var.update(*self.workers.sum([share.mean(squared)]))

        # 3. Energy: low on data, high on samples.
        for _ in range(self.config.energy_updates):
            metrics = self._update_energy(share, share.of(data), trajectory.sample, labels)

        # 4. Value: backwards in time, one temporal difference each.
        for _ in range(self.config.value_updates):
            errors = [
                self._update_value(share, trajectory, t, squared, generator, labels=labels) for t in self._backwards()
            ]
        metrics["value/td_error"] = torch.stack(errors).mean().sqrt()

        # 5. Policy: one fresh reparameterised step from stored states.
        for _ in range(self.config.policy_updates):
            every = self.config.all_states
            for drawn in draw_states(self.policy.num_steps, share.num, state_generator, every=every):
                metrics |= self._update_policy(share, trajectory, drawn, generator, labels)
        metrics["policy/entropy"] = self.policy.log_sigma.detach().mean()

        for moving_average in self.moving_averages:
            moving_average.update(iteration)
        return metrics

    def _backwards(self) -> range:
        return range(self.policy.num_steps - 1, -1, -1)

    def _squared_steps(self, trajectory: Trajectory) -> Tensor | None:
        """What the running cost is made of, for every stored step, [T, B]; None where nothing asks for it."""
        return self.squared_steps(trajectory.x, trajectory.mean, trajectory.sigma) if self.wants_squared_steps else None

    def _pieces(self, num: int) -> list[slice]:
        """Rows that are taken at a time."""
        return chunks(num, self.accumulate)

    def _update_energy(
        self, share: Share, data: Tensor, sample: Tensor, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """Step 3: one optimiser step."""
        parts = (
            self.energy_part(self._paired(data[p], sample[p]), _rows(labels, p), share=share)
            for p in self._pieces(share.count)
        )
        return energy_metrics(self.energy_optimizer.descend(parts))

    def _paired(self, data: Tensor, sample: Tensor) -> Tensor:
        """Data and samples one after the other, [2B, *event], in memory that is allocated once."""
        if self._pair is None or len(self._pair) != 2 * len(data):
            self._pair = data.new_empty((2 * len(data), *data.shape[1:]))
        torch.cat((data, sample), out=self._pair)
        return self._pair

    def _noise(self, num: int, like: Tensor, generator: torch.Generator) -> Tensor:
        """Standard normal noise for `num` states like those of `like` [., *event]."""
        return torch.randn((num, *like.shape[1:]), generator=generator, device=like.device)

    def _update_value(
        self,
        share: Share,
        trajectory: Trajectory,
        t: int,
        squared: Tensor | None,
        generator: torch.Generator,
        *,
        labels: Tensor | None = None,
    ) -> Tensor:
        """Step 4 at one t: one optimiser step towards the TD target; returns the mean squared error."""
        x, x_next, stored = trajectory.x[t], trajectory.x[t + 1], None if squared is None else squared[t]
        noise, given = None, Given(labels)
        if self.config.resample_next:
            noise = share.of(self._noise(share.num, x, generator))
            latent = self.policy.latent(share.num, generator)
            given = Given(labels, None if latent is None else share.of(latent))
        parts = (
            self.value_part(x[p], x_next[p], _rows(stored, p), _rows(noise, p), given.rows(p), t=t, share=share)
            for p in self._pieces(share.count)
        )
        return self.value_optimizer.descend(parts).loss

    def _update_policy(
        self,
        share: Share,
        trajectory: Trajectory,
        drawn: Tensor,
        generator: torch.Generator,
        labels: Tensor | None = None,
    ) -> dict[str, Tensor]:
        """Step 5: one optimiser step."""
        noise = self._noise(len(drawn), trajectory.sample, generator)
        latent = self.policy.latent(len(drawn), generator)
        t_host, row = drawn // share.num, drawn % share.num - share.start
        if share.count < share.num:  # the states that are this worker's own; their number differs from draw to draw
            own = ((row >= 0) & (row < share.count)).nonzero()[:, 0]
            on_device = own.to(noise.device, non_blocking=True)
            t_host, row, noise = t_host[own], row[own], noise[on_device]
            latent = None if latent is None else latent[on_device]
        state = t_host * share.count + row
        given = Given(None if labels is None else labels[row.to(noise.device, non_blocking=True)], latent)

        def part(rows: slice) -> Part:
            num_final = self.num_at_the_end(t_host[rows])
            t = t_host[rows].to(noise.device, non_blocking=True)
            x = trajectory.states[state[rows].to(noise.device, non_blocking=True)]
            return self.policy_part(x, t, noise[rows], given.rows(rows), num_final=num_final, share=share)

        return policy_metrics(self.policy_optimizer.descend(part(rows) for rows in self._pieces(len(state))))

    def num_at_the_end(self, t_host: Tensor) -> int:
        """How many of these steps, on the host, lead to T: nothing is waited for."""
        return int((t_host == self.policy.num_steps - 1).sum())

    # ------------------------------------------------------------------------
    # The parts of an iteration: functions of tensors and of this module's own, which a stack calls with its members'.

    @property
    def wants_squared_steps(self) -> bool:
        """Whether anything asks for what the running cost of the stored steps is made of."""
        stored_costs_used = any(self.value_mask) and not self.config.resample_next
        return self.reference_var.adaptive or stored_costs_used

    def rolled_out(self, noise: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """States, means and sigmas of a trajectory, as `Policy.rollout` makes it."""
        trajectory = self.policy.rollout(noise)
        return trajectory.x, trajectory.mean, trajectory.sigma

    def squared_steps(self, x: Tensor, mean: Tensor, sigma: Tensor) -> Tensor:
        """What the running cost of a trajectory's steps is made of, [T, B]."""
        steps = Gaussian(mean.flatten(0, 1), sigma.flatten())
        return self._squared(x[:-1].flatten(0, 1), x[1:].flatten(0, 1), steps).view(mean.shape[:2])

    def _squared(self, x: Tensor, x_next: Tensor, step: Gaussian) -> Tensor:
        """What the running cost is made of, [B]."""
        return squared_noise(step, x_next) if self.config.running_cost == "noise" else squared_step(x, x_next)

    def energy_part(self, pair: Tensor, labels: Tensor | None = None, *, share: Share) -> Part:
        """Of mean E(x_data) - mean E(x_T) + l2 (mean E(x_data)^2 + mean E(x_T)^2), from `_paired` [2b, *event], where
        a sample was made with the label of the data beside it [b].
        """
        both = None if labels is None else torch.cat((labels, labels))
        energy_data, energy_sample = self.value.energy(pair, both).chunk(2)
        loss = energy_loss(energy_data, energy_sample, self.config.energy_l2)
        return Part(share.mean(loss), (share.mean(energy_data.detach()), share.mean(energy_sample.detach())))

    def value_part(
        self,
        x: Tensor,
        x_next: Tensor,
        squared: Tensor | None,
        noise: Tensor | None,
        given: Given = NOTHING,
        *,
        t: int,
        share: Share,
    ) -> Part:
        """Of mean (V(x_t, t) - target)^2, from stored states x_t and x_{t+1} [b, *event] with what their running cost
        is made of [b]; if there is noise [b, *event], x_{t+1} is drawn afresh with it and the latent given.
        """
        with torch.no_grad():
            if noise is not None:
                x_next, squared = self._resampled(x, t, noise, given)
            target = self._target(x_next, t, squared, given.labels)
        return Part(share.mean(value_loss(self.value(x, t, given.labels), target)))

    def _resampled(self, x: Tensor, t: int, noise: Tensor, given: Given) -> tuple[Tensor, Tensor | None]:
        """Fresh next states of `x` at step t, and what their running cost is made of if it is used."""
        step = self.policy.transition(x, t, given=given)
        x_next = step.sample(noise)
        return x_next, self._squared(x, x_next, step) if self.value_mask[t] != 0.0 else None

    def _target(self, x_next: Tensor, t: int, squared: Tensor | None, labels: Tensor | None = None) -> Tensor:
        """What V(x_t, t) regresses on, [B]."""
        config, control = self.config, None
        if squared is not None and self.value_mask[t] != 0.0:
            cost = running_cost(squared, self.reference_var()[t : t + 1])
            log_sigma = self.policy.log_sigma[t]
            control = self.value_mask[t] * control_cost(cost, log_sigma, config.cost_coef, config.entropy_coef)
        return td_target((self.target or self.value)(x_next, t + 1, labels), self.step_cost[t], control)

    def policy_part(
        self,
        x: Tensor,
        t: Tensor,
        noise: Tensor,
        given: Given = NOTHING,
        *,
        num_final: int,
        num_open: int = 0,
        share: Share,
    ) -> Part:
        """Of mean V(x_{t+1}, t+1) + m_p (control cost), through one fresh step from `x` [b, *event] at `t` [b], which
        ascends; `num_final` and `num_open` as for `Value.at_steps`.
        """
        config, policy = self.config, self.policy
        log_sigma = policy.log_sigma
        step = policy.transition(x, t, log_sigma=log_sigma, given=given)
        x_next = step.sample(noise)
        logged: tuple[Tensor, ...] = ()
        control = None
        if self.policy_has_control:
            cost = running_cost(self._squared(x, x_next, step), self.reference_var()[t])
            control = self.policy_mask[t] * control_cost(cost, log_sigma[t], config.cost_coef, config.entropy_coef)
            logged = (share.mean(cost.detach()),)
        value = self.value.at_steps(x_next, t + 1, num_final, num_open, given.labels)
        return Part(share.mean(policy_loss(value, control)), logged)


def _rows(x: Tensor | None, rows: slice) -> Tensor | None:
    return None if x is None else x[rows]


def draw_states(num_steps: int, num: int, generator: torch.Generator, *, every: bool) -> list[Tensor]:
    """Indices into the T x B states of `num` trajectories, time-major: B of them, or every one in T minibatches; each
    in ascending order, so that the samples of one step lie together.
    """
    shuffled = torch.randperm(num_steps * num, generator=generator)
    draws = torch.split(shuffled, num) if every else (shuffled[:num],)
    return [drawn.sort().values for drawn in draws]


def energy_metrics(descent: Descent) -> dict[str, Tensor]:
    """What is logged of the energy's step."""
    data_mean, sample_mean = descent.logged
    return {"energy/data_mean": data_mean, "energy/sample_mean": sample_mean, "energy/loss": descent.loss}


def policy_metrics(descent: Descent) -> dict[str, Tensor]:
    """What is logged of the policy's step."""
    metrics = {"policy/loss": descent.loss}
    if descent.logged:
        metrics["policy/cost"] = descent.logged[0]
    if descent.norm is not None:
        metrics["policy/grad_norm"] = descent.norm
    return metrics
