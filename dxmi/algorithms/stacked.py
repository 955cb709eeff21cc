"""Several members of DxMI, or of its pretraining, that differ in their seeds alone, as one program.

Each iteration is that of `dxmi.algorithms.dxmi` and `dxmi.algorithms.ddpm`, whose parts are called for all members at
once. A member has its own weights, noise, data order, stored states and gradient norm, so that it goes the way that it
would go alone, but for rounding.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from dxmi.algorithms.costs import adapt_
from dxmi.algorithms.ddpm import DDPM, loss_metrics
from dxmi.algorithms.dxmi import DxMI, draw_states, energy_metrics, policy_metrics
from dxmi.distributed import ALONE, Share
from dxmi.optim.optimizer import Optimizer
from dxmi.optim.stacking import Stack, StackedOptimizer

Generators = Sequence[torch.Generator]


class StackedDxMI:
    """K members of DxMI with one config.

    Args:
        members: all at the same iteration, each alone with its batches and in one piece; their tensors become rows of
            this stack's.
    """

    def __init__(self, members: Sequence[DxMI]) -> None:
        self._first = members[0]
        self.config = self._first.config
        self._stack = Stack(members)
        self._optimizers: dict[str, Optimizer] = {
            name: StackedOptimizer(self._stack, [member.optimizers[name] for member in members])
            for name in self._first.optimizers
        }
        averages = zip(*(member.moving_averages for member in members), strict=True)
        self._averages = [self._stack.average(own) for own in averages]
        self._policy = self._stack.of("policy")
        self._energy = self._stack.of("value.energy")
        self._all = self._stack.of("policy", "value", "target", "reference_var")

    def update(
        self, data: Tensor, iteration: int, generators: Generators, state_generators: Generators
    ) -> dict[str, Tensor]:
        """One iteration of every member.

        Args:
            data: each member's batch, [K, B, *event].
            iteration: from 0.
            generators: each member's of noise.
            state_generators: each member's of stored states, on the host.

        Returns:
            The metrics of `DxMI.update`, each [K].
        """
        for optimizer in self._optimizers.values():
            optimizer.schedule(iteration)
        share = ALONE.share(data.shape[1])

        # 1. Roll out.
        start = torch.stack([self._first.policy.noise(share.num, generator) for generator in generators])
        x, mean, sigma = self._stack.call(self._policy, "rolled_out", start)

        # 2. Adapt the reference variance.
        squared = (
            self._stack.call(self._all, "squared_steps", x, mean, sigma) if self._first.wants_squared_steps else None
        )
        if squared is not None and self._first.reference_var.adaptive:
            adapt_(
                self._stack.table(self._first.reference_var.variance), squared.mean(-1), self._first.reference_var.decay
            )

        # 3. Energy.
        pair = torch.cat((data, x[:, -1]), dim=1)
        for _ in range(self.config.energy_updates):
            part = self._stack.call(self._energy, "energy_part", pair, share=share)
            metrics = energy_metrics(self._optimizers.get("energy", self._optimizers["value"]).descend([part]))

        # 4. Value.
        for _ in range(self.config.value_updates):
            errors = [
                self._update_value(x, t, squared, share, generators)
                for t in range(self._first.policy.num_steps - 1, -1, -1)
            ]
        metrics["value/td_error"] = torch.stack(errors).mean(0).sqrt()

        # 5. Policy.
        for _ in range(self.config.policy_updates):
            metrics |= self._update_policy(x, share, generators, state_generators)
        metrics["policy/entropy"] = self._mean_log_sigma()

        for average in self._averages:
            average.update(iteration)
        return metrics

    def _noise(self, like: Tensor, generators: Generators) -> Tensor:
        """Standard normal noise like the rows of `like` [K, B, *event]."""
        shape = like.shape[1:]
        return torch.stack([torch.randn(shape, generator=generator, device=like.device) for generator in generators])

    def _update_value(self, x: Tensor, t: int, squared: Tensor | None, share: Share, generators: Generators) -> Tensor:
        stored = None if squared is None else squared[:, t]
        noise = self._noise(x[:, t], generators) if self.config.resample_next else None
        part = self._stack.call(self._all, "value_part", x[:, t], x[:, t + 1], stored, noise, t=t, share=share)
        return self._optimizers["value"].descend([part]).loss

    def _update_policy(
        self, x: Tensor, share: Share, generators: Generators, state_generators: Generators
    ) -> dict[str, Tensor]:
        policy = self._first.policy
        states = x[:, :-1].flatten(1, 2)
        every = self.config.all_states
        draws = [draw_states(policy.num_steps, share.num, generator, every=every) for generator in state_generators]
        metrics = {}
        for drawn in zip(*draws, strict=True):
            noise = self._noise(x[:, 0], generators)
            t_host = torch.stack(drawn) // share.num
            ends = [self._first.num_at_the_end(t) for t in t_host]
            rows = [states[k][own.to(x.device, non_blocking=True)] for k, own in enumerate(drawn)]
            part = self._stack.call(
                self._all,
                "policy_part",
                torch.stack(rows),
                t_host.to(x.device, non_blocking=True),
                noise,
                num_final=min(ends),
                num_open=max(ends) - min(ends),
                share=share,
            )
            metrics = policy_metrics(self._optimizers["policy"].descend([part]))
        return metrics

    def _mean_log_sigma(self) -> Tensor:
        """mean_t log sigma_t of every member, [K]."""
        policy = self._first.policy
        free = self._stack.table(policy.free_log_sigma).detach()
        return torch.cat((free, policy.final_log_sigma.expand(len(free), 1)), dim=1).mean(1)


class StackedDDPM:
    """K members of DDPM pretraining with one config.

    Args:
        members: as those of `StackedDxMI`.
    """

    def __init__(self, members: Sequence[DDPM]) -> None:
        self._first = members[0]
        self._stack = Stack(members)
        self._optimizer = StackedOptimizer(self._stack, [member.optimizer for member in members])
        self._average = self._stack.average([member.moving_average for member in members])
        self._network = self._stack.of("network")

    def update(self, data: Tensor, iteration: int, generators: Generators) -> dict[str, Tensor]:
        """One optimiser step of every member, on its batch of `data` [K, B, *event]; each metric is [K]."""
        self._optimizer.schedule(iteration)
        share = ALONE.share(data.shape[1])
        drawn = [self._first.draw(own, generator) for own, generator in zip(data, generators, strict=True)]
        columns = [_stacked(column) for column in zip(*drawn, strict=True)]
        part = self._stack.call(self._network, "part", data, *columns, share=share)
        descent = self._optimizer.descend([part])
        self._average.update(iteration)
        return loss_metrics(descent)


def _stacked(members: Sequence[Tensor | None]) -> Tensor | None:
    """Each member's tensor, [K, ...], if they have one."""
    tensors = [tensor for tensor in members if tensor is not None]
    return torch.stack(tensors) if tensors else None
