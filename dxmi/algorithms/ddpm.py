"""DDPM pretraining (Ho et al., arXiv 2006.11239): regress the noise at a random diffusion step; evaluate the average.

Models of another family than DDPM's see other noise levels and regress another mixture of noise and image, as
`dxmi.diffusion.schedules.Noising` says.

Logged metrics:

    pretrain/loss        mean_dims (eps_theta(x_k, k) - eps)^2, batch mean; eps, or what else it regresses
    pretrain/grad_norm   before clipping
"""

import copy
from typing import Any

import torch
from torch import Tensor, nn

from dxmi.algorithms.configs import DDPMConfig
from dxmi.algorithms.losses import denoising_loss
from dxmi.diffusion.schedules.base import Noising
from dxmi.diffusion.schedules.ddpm import ddpm_noising
from dxmi.distributed import ALONE, Share, Workers
from dxmi.networks.base import NOTHING, Denoiser, Given, conditioned
from dxmi.optim.optimizer import Descent, MovingAverage, Optimizer, Part
from dxmi.tensors import chunks, per_sample


class DDPM(nn.Module):
    """A denoiser in training, its average, and its optimiser.

    Args:
        config: its settings.
        network: the denoiser, trained in place.
        workers: share each batch.
        accumulate: pieces in which each takes its share, one after the other.
        noising: what the network sees and regresses; by default DDPM's.

    Attributes:
        average: the moving average of the network.
    """

    step: Tensor
    signal: Tensor
    noise: Tensor
    data_part: Tensor
    noise_part: Tensor

    def __init__(
        self,
        config: DDPMConfig,
        network: Denoiser,
        workers: Workers = ALONE,
        accumulate: int = 1,
        noising: Noising | None = None,
    ) -> None:
        super().__init__()
        self.workers = workers
        self.accumulate = accumulate
        self.network = network
        self.average = copy.deepcopy(network)
        self.moving_average = MovingAverage.between(network, self.average, config.ema)
        rate = config.optimizer.lr
        self.optimizer = Optimizer(config.optimizer, [(network.parameters(), rate)], config.iterations, workers)
        noising = noising or ddpm_noising()
        self.regresses_noise = noising.regresses_noise
        for name in ("step", "signal", "noise", "data_part", "noise_part"):
            self.register_buffer(name, torch.from_numpy(getattr(noising, name)).float(), persistent=False)

    @property
    def optimizers(self) -> dict[str, Optimizer]:
        """Every optimiser, by the name of what it trains."""
        return {"network": self.optimizer}

    def update(
        self, data: Tensor, iteration: int, generator: torch.Generator, *, labels: Tensor | None = None
    ) -> dict[str, Tensor]:
        """One optimiser step.

        Args:
            data: real samples in [-1, 1], the whole batch, [B, *event].
            iteration: from 0; sets the learning rate.
            generator: of diffusion steps and noise, on the data's device.
            labels: the class of each sample, [B], where the network knows classes.

        Returns:
            The metrics that the module's docstring lists, as scalars still on the device.
        """
        self.optimizer.schedule(iteration)
        share = self.workers.share(len(data))
        step, noise, seed = (_own(share, drawn) for drawn in self.draw(data, generator))
        given, data = Given(_own(share, labels), _own(share, self._latent(share.num, generator))), share.of(data)

        def part(rows: slice) -> Part:
            own_seed = None if seed is None else seed[rows]
            return self.part(data[rows], step[rows], noise[rows], own_seed, given.rows(rows), share=share)

        descent = self.optimizer.descend(part(rows) for rows in chunks(share.count, self.accumulate))
        self.moving_average.update(iteration)
        return loss_metrics(descent)

    def draw(self, data: Tensor, generator: torch.Generator) -> tuple[Tensor, Tensor, Tensor | None]:
        """The diffusion step [B] of each sample, its noise [B, *event], and a seed [B] if anything is dropped."""
        num, device = len(data), data.device
        step = torch.randint(len(self.step), (num,), generator=generator, device=device)
        noise = torch.randn(data.shape, generator=generator, device=device)
        if self.network.dropout == 0.0:
            return step, noise, None
        return step, noise, torch.randint(2**62, (num,), generator=generator, device=device)

    def _latent(self, num: int, generator: torch.Generator) -> Tensor | None:
        """Latents [num, Z], if the network takes any."""
        if self.network.latent == 0:
            return None
        return torch.randn((num, self.network.latent), generator=generator, device=self.step.device)

    def part(
        self,
        data: Tensor,
        step: Tensor,
        noise: Tensor,
        seed: Tensor | None = None,
        given: Given = NOTHING,
        *,
        share: Share,
    ) -> Part:
        """Of the mean denoising loss, from samples [b, *event] and what `draw` gave for them."""
        noised = (per_sample(self.signal[step], data) * data).addcmul(per_sample(self.noise[step], data), noise)
        embedding = conditioned(self.network, self.network.embed(self.step[step]), given)
        predicted = self.network(noised, embedding, seed).float()
        return Part(share.mean(denoising_loss(predicted, self._target(data, step, noise))))

    def _target(self, data: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """What the network regresses, [b, *event]."""
        if self.regresses_noise:
            return noise
        return (per_sample(self.data_part[step], data) * data).addcmul(per_sample(self.noise_part[step], data), noise)


def _own(share: Share, tensor: Tensor | None) -> Any:
    """A worker's rows of what there may be."""
    return None if tensor is None else share.of(tensor)


def loss_metrics(descent: Descent) -> dict[str, Tensor]:
    """What is logged of a step of pretraining."""
    metrics = {"pretrain/loss": descent.loss}
    return metrics if descent.norm is None else metrics | {"pretrain/grad_norm": descent.norm}
