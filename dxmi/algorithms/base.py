"""What every algorithm is: parameters and everything else that training changes, and `update`, which is one iteration.

An algorithm is one file with a subclass of `Algorithm` and one line in the registry. Its `update` is written once, on
tensors with the seeds in front ([K, b, ...], see `dxmi.optim.seeds`), and reads neither how many seeds or processes
there are nor into how many micro-batches they divide their rows.
"""

import copy
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterable, Mapping, Sequence
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
from dxmi.optim.config import OptimizerConfig
from dxmi.optim.moving_average import MovingAverage
from dxmi.optim.optimizer import Optimizer, StackedOptimizer
from dxmi.optim.seeds import SINGLE_SEED, Seeds, StackedSeeds
from dxmi.rewards.base import Reward, no_reward

HOST, DEVICE = "host", "device"
"""Where a random stream draws."""
Metrics = dict[str, Tensor]
"""Scalars by name, one for each seed: [K], still on the device."""


@dataclass(frozen=True)
class Parts:
    """What an algorithm is built from; nothing is built that is not asked for.

    Attributes:
        policy: fine-tuned in place.
        schedule: of the policy.
        iterations: planned, the end of a learning-rate decay.
        critic: makes an untrained energy network.
        timed_critic: makes an untrained network of a time-conditioned value.
        reward: makes the reward of the run.
        workers: processes that share each batch.
        accumulate: micro-batches into which each process divides its rows.
        graphed: record the rollout as a CUDA graph.
    """

    policy: Policy
    schedule: StepSchedule
    iterations: int
    critic: Callable[[], Critic]
    timed_critic: Callable[[], TimedCritic]
    reward: Callable[[], Reward] = no_reward
    workers: ProcessGroup = SINGLE_PROCESS
    accumulate: int = 1
    graphed: bool = False

    def optimizer(self, config: OptimizerConfig, *groups: tuple[Iterable[nn.Parameter], float]) -> Optimizer:
        """An optimizer of groups of parameters, each with its learning rate."""
        return Optimizer(config, groups, self.iterations, self.workers, self.accumulate)


class Algorithm(nn.Module, ABC):
    """Parameters in training, with their optimizers and moving averages.

    Attributes:
        streams: the named random streams that `update` draws from, and whether on the host or the device.
        optimizers: by the name of what they train.
        averages: moving averages, updated at the end of an iteration.
        seeds: the seeds that one program trains; algorithms map what they compute over them.
    """

    streams: ClassVar[Mapping[str, str]] = {"noise": DEVICE}
    unmapped: ClassVar[Sequence[str]] = ()
    """Submodules that `update` never reads."""
    seeds: Seeds = SINGLE_SEED
    optimizers: Mapping[str, Optimizer]
    averages: Sequence[MovingAverage] = ()

    @abstractmethod
    def update(self, batch: Batch, iteration: int, streams: Streams) -> Metrics:
        """One iteration.

        Args:
            batch: this process's part of the batch, with the seeds in front.
            iteration: from 0; sets learning rates and decays.
            streams: the random streams that `self.streams` names.

        Returns:
            The metrics that the module's docstring lists, each [K], still on the device.
        """

    def schedule(self, iteration: int) -> None:
        """Set the learning rates and decays of `iteration`; the first line of an `update`."""
        for optimizer in self.optimizers.values():
            optimizer.schedule(iteration)
        for average in self.averages:
            average.schedule(iteration)

    def update_averages(self) -> None:
        """Move every average towards what it averages; the last line of an `update`."""
        for average in self.averages:
            average.update()

    @classmethod
    def stacked(cls, members: Sequence[Self]) -> Self:
        """Several seeds of one algorithm as one, whose `update` trains all of them.

        The members' tensors become rows of tables. Each member has its own noise, data order and gradient norm, so that
        it does what it would do by itself, up to rounding.

        Args:
            members: of one config and shape, at the same iteration, in one process and without micro-batches.
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
        parts: what it is built from.
        policy_ema: decay of the policy's moving average, which is what is evaluated; None to evaluate the policy
            itself.

    Attributes:
        policy: fine-tuned.
        ema_policy: its moving average, if there is one.
        value: the value whose gradient can guide sampling and whose map is drawn, if the algorithm learns one.
        needs_data: whether `update` reads real samples.
        panels: logged metrics worth a panel in curves.png.
    """

    unmapped: ClassVar[Sequence[str]] = ("ema_policy",)
    panels: ClassVar[Sequence[str]] = ()
    needs_data: ClassVar[bool] = True

    def __init__(self, parts: Parts, policy_ema: float | None) -> None:
        super().__init__()
        self.policy = parts.policy
        self.value: Value | None = None
        self.ema_policy = copy.deepcopy(parts.policy) if policy_ema is not None else None
        if self.ema_policy is not None and policy_ema is not None:
            self.averages = [MovingAverage.between(self.policy, self.ema_policy, policy_ema)]
        self._workers = parts.workers
        self._rollout = GraphedRollout(self.policy) if parts.graphed else self.policy.rollout

    @property
    def eval_policy(self) -> Policy:
        """The policy that evaluation samples from: the moving average, or the policy itself without one."""
        return self.policy if self.ema_policy is None else self.ema_policy

    @property
    def energy(self) -> Energy | None:
        """The learned energy, if the algorithm learns one."""
        return None

    @property
    def guide(self) -> Guide | None:
        """Gradient of the value, for guidance."""
        return None if self.value is None else self.value.gradient

    def rollout(self, batch: Batch, streams: Streams) -> Trajectory:
        """Trajectories of the present policy under the batch's conditions, without gradient: x [K, T+1, b, *event]."""
        share, policy = batch.share, self.policy
        noise = share.of(streams.draw("noise", lambda own: policy.noise(share.num, own)), dim=2)
        latents = None
        if policy.network.latent:
            shape = (self.policy.num_steps, share.num, policy.network.latent)
            latents = share.of(streams.normal("noise", shape), dim=2)
        rollout: Trajectory = self.seeds.map(self._rollout, noise, batch.condition, latents)
        return rollout

    def draw_latent(self, num: int, streams: Streams) -> Tensor | None:
        """Latents for one step of `num` samples, [K, num, Z]; None if the network takes none."""
        if self.policy.network.latent == 0:
            return None
        return streams.normal("noise", (num, self.policy.network.latent))

    def mean_log_sigma(self) -> Tensor:
        """mean_t log sigma_t, the entropy per dimension up to a constant, of every seed: [K]."""
        free = self.seeds.table(self.policy.free_log_sigma).detach()
        return torch.cat((free, self.policy.final_log_sigma.expand(len(free), 1)), dim=1).mean(1)

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
        for policy in (self.policy, *([] if self.ema_policy is None else [self.ema_policy])):
            with torch.no_grad():
                policy.free_log_sigma.copy_(log_sigma[:-1])
