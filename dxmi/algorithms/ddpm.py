"""DDPM pretraining (Ho et al., arXiv 2006.11239): regress the noise at a random diffusion step; evaluate the average.

Logged metrics:

    pretrain/loss        mean_dims (eps_theta(x_k, k) - eps)^2, batch mean
    pretrain/grad_norm   before clipping
"""

import copy
from dataclasses import dataclass, field

import torch
from torch import Tensor, nn

from dxmi.losses import denoising_loss
from dxmi.networks import Denoiser
from dxmi.optimizers import Descent, MovingAverage, Optimizer, OptimizerConfig, Part
from dxmi.schedules import NUM_DIFFUSION_STEPS, forward_levels
from dxmi.tensors import chunks, per_sample
from dxmi.workers import ALONE, Share, Workers


@dataclass(frozen=True, kw_only=True)
class DDPMConfig:
    """Pretraining."""

    iterations: int = 10_000
    """Optimiser steps; 0 starts from a random network."""
    batch_size: int = 128
    """Images in each."""
    ema: float = 0.999
    """Decay of the moving average of the weights, which is the pretrained model."""
    optimizer: OptimizerConfig = field(default_factory=lambda: OptimizerConfig(lr=1e-3))
    """Of the denoiser."""

    def __post_init__(self) -> None:
        if self.iterations < 0:
            raise ValueError(f"iterations is {self.iterations}: it must be 0 or greater")
        if self.batch_size < 1:
            raise ValueError(f"batch_size is {self.batch_size}: it must be at least 1")
        if not 0.0 <= self.ema < 1.0:
            raise ValueError(f"ema is {self.ema}: it must be in [0, 1)")


class DDPM(nn.Module):
    """A denoiser in training, its average, and its optimiser.

    Args:
        config: its settings.
        network: the denoiser, trained in place.
        workers: share each batch.
        accumulate: pieces in which each takes its share, one after the other.

    Attributes:
        average: the moving average of the network.
    """

    signal: Tensor
    noise: Tensor

    def __init__(self, config: DDPMConfig, network: Denoiser, workers: Workers = ALONE, accumulate: int = 1) -> None:
        super().__init__()
        self.workers = workers
        self.accumulate = accumulate
        self.network = network
        self.average = copy.deepcopy(network)
        self.moving_average = MovingAverage.between(network, self.average, config.ema)
        rate = config.optimizer.lr
        self.optimizer = Optimizer(config.optimizer, [(network.parameters(), rate)], config.iterations, workers)
        level = torch.from_numpy(forward_levels())
        self.register_buffer("signal", level.sqrt().float(), persistent=False)
        self.register_buffer("noise", (1.0 - level).sqrt().float(), persistent=False)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """Every optimiser, by the name of what it trains."""
        return {"network": self.optimizer}

    def update(self, data: Tensor, iteration: int, generator: torch.Generator) -> dict[str, Tensor]:
        """One optimiser step.

        Args:
            data: real samples in [-1, 1], the whole batch, [B, *event].
            iteration: from 0; sets the learning rate.
            generator: of diffusion steps and noise, on the data's device.

        Returns:
            The metrics that the module's docstring lists, as scalars still on the device.
        """
        self.optimizer.schedule(iteration)
        share = self.workers.share(len(data))
        step, noise = (share.of(drawn) for drawn in self.draw(data, generator))
        data = share.of(data)
        pieces = chunks(share.count, self.accumulate)
        descent = self.optimizer.descend(self.part(data[p], step[p], noise[p], share=share) for p in pieces)
        self.moving_average.update(iteration)
        return loss_metrics(descent)

    @staticmethod
    def draw(data: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The diffusion step [B] of each sample, and its noise [B, *event]."""
        step = torch.randint(NUM_DIFFUSION_STEPS, (len(data),), generator=generator, device=data.device)
        return step, torch.randn(data.shape, generator=generator, device=data.device)

    def part(self, data: Tensor, step: Tensor, noise: Tensor, *, share: Share) -> Part:
        """Of the mean denoising loss, from samples [b, *event] at these diffusion steps [b] with this noise."""
        noised = (per_sample(self.signal[step], data) * data).addcmul(per_sample(self.noise[step], data), noise)
        predicted = self.network(noised, self.network.embed(step)).float()
        return Part(share.mean(denoising_loss(predicted, noise)))


def loss_metrics(descent: Descent) -> dict[str, Tensor]:
    """What is logged of a step of pretraining."""
    metrics = {"pretrain/loss": descent.loss}
    return metrics if descent.norm is None else metrics | {"pretrain/grad_norm": descent.norm}
