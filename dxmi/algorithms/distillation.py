"""Distillation of a policy into fewer steps: regress the sample that the policy's means lead to from the same noise.

The deterministic chain of a T-step policy, x_{t+1} = mean_t(x_t), maps noise x_0 to a sample x_T. The student, a policy
with fewer steps, usually one, learns this map with its own chain (knowledge distillation, arXiv 2101.02388).

Logged metrics:

    distill/loss        mean_dims (end of the student's chain - x_T)^2, batch mean
    distill/grad_norm   gradient norm before clipping, only with optimizer.max_grad_norm
"""

import copy
from collections.abc import Mapping, Sequence
from typing import ClassVar

import torch
from torch import Tensor

from dxmi.algorithms.base import Algorithm, Metrics
from dxmi.algorithms.configs import DDPMConfig
from dxmi.algorithms.losses import denoising_loss
from dxmi.data.batch import Batch, Condition, Streams
from dxmi.diffusion.policy import Policy
from dxmi.distributed import SINGLE_PROCESS, ProcessGroup
from dxmi.optim.moving_average import MovingAverage
from dxmi.optim.optimizer import Optimizer


def deterministic_sample(policy: Policy, noise: Tensor, condition: Condition) -> Tensor:
    """The end x_T of the chain of means that starts from standard normal `noise` [B, *event]: [B, *event]."""
    embeddings, log_sigma = policy.embeddings(), policy.log_sigma
    x = noise * policy.start_sigma
    for t in range(policy.num_steps):
        x = policy.transition(x, t, embeddings, log_sigma, condition).mean
    return x


class Distillation(Algorithm):
    """A policy that learns the deterministic map of a teacher, its moving average, and its optimizer.

    Args:
        config: Settings of the pretraining, of which distillation takes the place.
        student: Policy with fewer steps; its network is trained in place.
        teacher: Policy that is distilled; not changed.
        workers: Processes that share each batch.
        accumulate: Number of micro-batches into which each process divides its rows.

    Attributes:
        average: Moving average of the student's network.
    """

    unmapped: ClassVar[Sequence[str]] = ("average",)
    is_recordable: ClassVar[bool] = True

    def __init__(
        self,
        config: DDPMConfig,
        student: Policy,
        teacher: Policy,
        workers: ProcessGroup = SINGLE_PROCESS,
        accumulate: int = 1,
    ) -> None:
        super().__init__()
        self.student = student
        self.average = copy.deepcopy(student.network)
        self.averages = [MovingAverage.between(student.network, self.average, config.ema)]
        groups = [(student.network.parameters(), config.optimizer.lr)]
        self.optimizers = {"network": Optimizer(config.optimizer, groups, config.iterations, workers, accumulate)}
        self._teacher = (teacher,)  # in a tuple, so that it is not part of this module's state

    def iterate(self, batch: Batch, iteration: int, streams: Streams) -> Metrics:  # noqa: ARG002
        """Perform one optimizer step; returns the metrics listed in the module's docstring."""
        share = batch.share
        noise = share.of(streams.normal("noise", (share.num, *self.student.event)), dim=1)
        result = self.optimizers["network"].minimize(self._loss, noise, batch.condition, num=share.num)
        self.update_averages()
        return result.metrics("distill")

    def _loss(self, noise: Tensor, condition: Condition) -> Mapping[str, Tensor]:
        """Compute the squared error of the student for noise [b, *event]."""
        with torch.no_grad():
            target = deterministic_sample(self._teacher[0], noise, condition)
        return {"loss": denoising_loss(deterministic_sample(self.student, noise, condition), target)}
