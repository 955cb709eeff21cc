"""The interface of the algorithms: all state that training changes, and `update`, which performs one iteration.

An algorithm consists of one file with a subclass of `Algorithm` and one line in the registry. Its `update` is written
for tensors with a leading seed axis ([K, b, ...], see `dxmi.optim.seeds`), and does not depend on the number of seeds,
processes or micro-batches.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Hashable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import ClassVar, Self

import torch
from torch import Tensor, nn

from dxmi.critics.energy import Energy
from dxmi.critics.value import Value
from dxmi.data.batch import Batch, Streams
from dxmi.diffusion.cuda_graphs import GraphedRollout
from dxmi.diffusion.policy import Guide, Policy
from dxmi.diffusion.schedules.base import StepSchedule
from dxmi.diffusion.trajectory import Trajectory
from dxmi.distributed import SINGLE_PROCESS, ProcessGroup
from dxmi.errors import UserError
from dxmi.networks.base import Critic, TimedCritic
from dxmi.optim.config import OptimizerConfig, PolicyOptimizerConfig
from dxmi.optim.moving_average import MovingAverage
from dxmi.optim.optimizer import Optimizer, StackedOptimizer
from dxmi.optim.seeds import SINGLE_SEED, Seeds, StackedSeeds
from dxmi.rewards.base import Reward, no_reward

HOST, DEVICE = "host", "device"
"""Where the generator of a random stream is: on the host or on the device."""
Metrics = dict[str, Tensor]
"""Scalars by name, one per seed: [K], on the device."""


@dataclass(frozen=True)
class Parts:
    """The components from which an algorithm is built; factories create only what the algorithm needs.

    Attributes:
        policy: Policy, fine-tuned in place.
        schedule: Schedule of the policy's steps.
        iterations: Planned number of iterations, at which a learning-rate decay ends.
        critic: Creates an untrained energy network.
        timed_critic: Creates an untrained, time-conditioned value network.
        reward: Creates the reward of the run.
        workers: Processes that share each batch.
        accumulate: Number of micro-batches into which each process divides its rows.
    """

    policy: Policy
    schedule: StepSchedule
    iterations: int
    critic: Callable[[], Critic]
    timed_critic: Callable[[], TimedCritic]
    reward: Callable[[], Reward] = no_reward
    workers: ProcessGroup = SINGLE_PROCESS
    accumulate: int = 1

    def optimizer(self, config: OptimizerConfig, *groups: tuple[Iterable[nn.Parameter], float]) -> Optimizer:
        """Create an optimizer for groups of parameters, each given with its learning rate."""
        return Optimizer(config, groups, self.iterations, self.workers, self.accumulate)


class Algorithm(nn.Module, ABC):
    """Parameters in training, with their optimizers and moving averages.

    Attributes:
        streams: Names of the random streams that `update` draws from, each with `HOST` or `DEVICE`.
        optimizers: Optimizers by the name of the module that they train.
        averages: Moving averages, updated at the end of each iteration.
        seeds: Seeds that are trained together; algorithms map their computations over them.
    """

    streams: ClassVar[Mapping[str, str]] = {"noise": DEVICE}
    unmapped: ClassVar[Sequence[str]] = ()
    """Names of the submodules that no function mapped over the seeds reads."""
    is_recordable: ClassVar[bool] = False
    """Whether no step of `iterate` needs the host; see `can_be_recorded`."""
    seeds: Seeds = SINGLE_SEED
    optimizers: Mapping[str, Optimizer]
    averages: Sequence[MovingAverage] = ()

    def update(self, batch: Batch, iteration: int, streams: Streams) -> Metrics:
        """Set the learning rates and decays of `iteration`, and perform it; see `iterate`."""
        self.schedule(iteration)
        return self.iterate(batch, iteration, streams)

    @abstractmethod
    def iterate(self, batch: Batch, iteration: int, streams: Streams) -> Metrics:
        """Perform one iteration with the present learning rates and decays.

        Args:
            batch: This process's part of the batch, with a leading seed axis.
            iteration: Number of the iteration, from 0.
            streams: The random streams named in `self.streams`.

        Returns:
            The metrics listed in the module's docstring, each [K], on the device.
        """

    @property
    def can_be_recorded(self) -> bool:
        """Whether `iterate` can be recorded as a CUDA graph.

        If it can, `iterate` transfers no values from the device to the host, draws all its random numbers from
        `streams`, and depends on its `iteration` only through `variant`.
        """
        return self.is_recordable and all(optimizer.can_be_recorded for optimizer in self.optimizers.values())

    def variant(self, iteration: int) -> Hashable:  # noqa: ARG002
        """What distinguishes the computations of `iterate` at different iterations; each value is recorded once."""
        return None

    def schedule(self, iteration: int) -> None:
        """Set the learning rates and decays of `iteration`; `update` calls this first."""
        for optimizer in self.optimizers.values():
            optimizer.schedule(iteration)
        for average in self.averages:
            average.schedule(iteration)

    def update_averages(self) -> None:
        """Update every moving average; `update` calls this last."""
        for average in self.averages:
            average.update()

    @classmethod
    def stacked(cls, members: Sequence[Self]) -> Self:
        """Combine several seeds of an algorithm into one whose `update` trains all of them.

        The members' tensors become rows of tables. Each member keeps its own noise, data order and gradient norm, and
        computes the same as when it is trained separately, up to rounding.

        Args:
            members: One algorithm per seed, with the same config and shapes, at the same iteration, in one process and
                without micro-batches.
        """
        first = members[0]
        seeds = StackedSeeds(members, first.unmapped)
        stack = copy.copy(first)
        stack.seeds = seeds
        stack.optimizers = {
            name: StackedOptimizer(seeds, [member.optimizers[name] for member in members]) for name in first.optimizers
        }
        stack.averages = [
            MovingAverage.stacked(seeds, own) for own in zip(*(member.averages for member in members), strict=True)
        ]
        return stack


class PolicyAlgorithm(Algorithm):
    """An algorithm that fine-tunes a policy.

    Args:
        parts: Components from which it is built.
        policy_ema: Decay of the moving average of the policy, which is evaluated instead of the policy; None for no
            moving average.

    Attributes:
        policy: Policy that is fine-tuned.
        reference: The pretrained policy, which is not trained; None if the algorithm does not keep it.
        ema_policy: Moving average of the policy; None if there is none.
        value: Value whose gradient can guide sampling, and of which a map is drawn; None if none is learned.
        needs_data: Whether `update` reads real samples.
        panels: Logged metrics that have a panel in curves.png.
    """

    unmapped: ClassVar[Sequence[str]] = ("ema_policy",)
    panels: ClassVar[Sequence[str]] = ()
    needs_data: ClassVar[bool] = True

    def __init__(self, parts: Parts, policy_ema: float | None) -> None:
        super().__init__()
        self.policy = parts.policy
        self.reference: Policy | None = None
        self.value: Value | None = None
        self.ema_policy = copy.deepcopy(parts.policy) if policy_ema is not None else None
        if self.ema_policy is not None and policy_ema is not None:
            self.averages = [MovingAverage.between(self.policy, self.ema_policy, policy_ema)]
        self._workers = parts.workers
        self._rollout: Callable[..., Trajectory] = self.policy.rollout

    def record_rollout(self) -> None:
        """Record the rollout as a CUDA graph from now on, for an algorithm whose whole iteration is not recorded."""
        self._rollout = GraphedRollout(self.policy)

    @classmethod
    def stacked(cls, members: Sequence[Self]) -> Self:
        """Combine several seeds, see `Algorithm.stacked`; a rollout of all of them is not recorded on its own."""
        stack = super().stacked(members)
        stack._rollout = stack.policy.rollout
        return stack

    def policy_optimizer(self, settings: PolicyOptimizerConfig, parts: Parts) -> Optimizer:
        """Create the optimizer of the denoiser and the free log sigmas."""
        policy = self.policy
        groups = ((policy.network.parameters(), settings.lr), ([policy.free_log_sigma], settings.sigma_lr))
        return parts.optimizer(settings, *groups)

    def keep_reference(self) -> None:
        """Keep a copy of the policy as it is now, from which divergences are computed."""
        self.reference = copy.deepcopy(self.policy).requires_grad_(False)

    @property
    def eval_policy(self) -> Policy:
        """The policy that is evaluated: the moving average if there is one, otherwise the policy itself."""
        return self.policy if self.ema_policy is None else self.ema_policy

    @property
    def energy(self) -> Energy | None:
        """The learned energy; None if the algorithm does not learn one."""
        return None

    @property
    def guidance(self) -> float:
        """Scale of the value guidance with which the policy is evaluated."""
        return 0.0

    @property
    def guide(self) -> Guide | None:
        """The gradient of the value, which can guide sampling; None if there is no value."""
        return None if self.value is None else self.value.gradient

    def rollout(self, batch: Batch, streams: Streams) -> Trajectory:
        """Roll out the current policy under the batch's conditions, without gradients: x [K, T+1, b, *event]."""
        share, policy = batch.share, self.policy
        noise = share.of(streams.draw("noise", lambda own: policy.noise(share.num, own)), dim=2)
        latents = None
        if policy.network.latent:
            shape = (self.policy.num_steps, share.num, policy.network.latent)
            latents = share.of(streams.normal("noise", shape), dim=2)
        rollout: Trajectory = self.seeds.map(self._rollout, noise, batch.condition, latents)
        return rollout

    def draw_latent(self, num: int, streams: Streams) -> Tensor | None:
        """Draw latents for one step of `num` samples, [K, num, Z]; None if the network does not take a latent."""
        if self.policy.network.latent == 0:
            return None
        return streams.normal("noise", (num, self.policy.network.latent))

    def mean_log_sigma(self) -> Tensor:
        """mean_t log sigma_t of each seed, which is the entropy per dimension up to a constant: [K]."""
        free = self.seeds.table(self.policy.free_log_sigma).detach()
        return torch.cat((free, self.policy.final_log_sigma.expand(len(free), 1)), dim=1).mean(1)

    def start_from(self, log_sigma: Tensor | None) -> None:
        """Start from the sigmas of a policy that was fine-tuned earlier; called before the first iteration.

        Args:
            log_sigma: Log sigma_t, [T]; None keeps those of the schedule. The last one is not used, since it is fixed.

        Raises:
            UserError: the earlier policy had another number of steps.
        """
        if log_sigma is None:
            return
        num_steps = self.policy.num_steps
        if len(log_sigma) != num_steps:
            raise UserError(
                f"pretrain.weights is a policy of {len(log_sigma)} steps, but schedule.num_steps is {num_steps}."
            )
        for policy in (self.policy, self.ema_policy, self.reference):
            if policy is None:
                continue
            with torch.no_grad():
                policy.free_log_sigma.copy_(log_sigma[:-1])
