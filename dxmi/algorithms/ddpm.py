"""DDPM pretraining (Ho et al., arXiv 2006.11239): regress the noise at a random timestep; evaluate the moving average.

Other families of models are pretrained at other noise levels and regress another mixture of noise and data; see
`dxmi.diffusion.schedules.base.ForwardProcess`.

Logged metrics:

    pretrain/loss        mean_dims (eps_theta(x_k, k) - eps)^2, batch mean; eps is the regression target
    pretrain/grad_norm   gradient norm before clipping, only with optimizer.max_grad_norm
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
from dxmi.diffusion.schedules.base import ForwardProcess
from dxmi.diffusion.schedules.ddpm import ddpm_forward_process
from dxmi.distributed import SINGLE_PROCESS, ProcessGroup
from dxmi.networks.base import Denoiser, conditioned
from dxmi.optim.moving_average import MovingAverage
from dxmi.optim.optimizer import Optimizer
from dxmi.tensors import per_sample


class DDPM(Algorithm):
    """A denoiser in training, its moving average, and its optimizer.

    Args:
        config: Settings of the pretraining.
        network: Denoiser, trained in place.
        workers: Processes that share each batch.
        accumulate: Number of micro-batches into which each process divides its rows.
        forward_process: Defines the network's input and regression target; by default that of DDPM.

    Attributes:
        average: Moving average of the network.
    """

    unmapped: ClassVar[Sequence[str]] = ("average",)
    is_recordable: ClassVar[bool] = True
    timestep: Tensor
    signal_scale: Tensor
    noise_scale: Tensor
    data_target: Tensor
    noise_target: Tensor

    def __init__(
        self,
        config: DDPMConfig,
        network: Denoiser,
        workers: ProcessGroup = SINGLE_PROCESS,
        accumulate: int = 1,
        forward_process: ForwardProcess | None = None,
    ) -> None:
        super().__init__()
        self.network = network
        self.average = copy.deepcopy(network)
        self.averages = [MovingAverage.between(network, self.average, config.ema)]
        groups = [(network.parameters(), config.optimizer.lr)]
        self.optimizers = {"network": Optimizer(config.optimizer, groups, config.iterations, workers, accumulate)}
        process = forward_process or ddpm_forward_process()
        self.regresses_noise = process.regresses_noise
        for name in ("timestep", "signal_scale", "noise_scale", "data_target", "noise_target"):
            self.register_buffer(name, torch.from_numpy(getattr(process, name)).float(), persistent=False)

    def iterate(self, batch: Batch, iteration: int, streams: Streams) -> Metrics:  # noqa: ARG002
        """Perform one optimizer step; returns the metrics listed in the module's docstring."""
        share = batch.share
        assert batch.x is not None
        num, event = share.num, tuple(batch.x.shape[2:])
        step = self._integers(streams, len(self.timestep), num)
        noise = streams.normal("noise", (num, *event))
        dropout = self._integers(streams, 2**62, num) if self.network.dropout else None
        latent = streams.normal("noise", (num, self.network.latent)) if self.network.latent else None
        drawn = (None if x is None else share.of(x, dim=1) for x in (step, noise, dropout, latent))
        result = self.optimizers["network"].minimize(self._loss, batch.x, *drawn, batch.condition, num=num)
        self.update_averages()
        return result.metrics("pretrain")

    @staticmethod
    def _integers(streams: Streams, bound: int, num: int) -> Tensor:
        """Draw integers in 0 .. bound - 1, [K, num]."""
        return streams.draw("noise", lambda own: torch.randint(bound, (num,), generator=own, device=own.device))

    def _loss(  # noqa: PLR0917
        self,
        data: Tensor,
        step: Tensor,
        noise: Tensor,
        dropout: Tensor | None,
        latent: Tensor | None,
        condition: Condition,
    ) -> Mapping[str, Tensor]:
        """Compute the denoising loss of samples [b, *event] at rows [b] of the forward process."""
        noised = (per_sample(self.signal_scale[step], data) * data).addcmul(
            per_sample(self.noise_scale[step], data), noise
        )
        embedding = conditioned(self.network, self.network.embed(self.timestep[step]), condition, latent)
        predicted = self.network(noised, embedding, dropout).float()
        return {"loss": denoising_loss(predicted, self._target(data, step, noise))}

    def _target(self, data: Tensor, step: Tensor, noise: Tensor) -> Tensor:
        """Compute the regression target of the network, [b, *event]."""
        if self.regresses_noise:
            return noise
        return (per_sample(self.data_target[step], data) * data).addcmul(
            per_sample(self.noise_target[step], data), noise
        )
