"""Deterministic samplers of a pretrained model, to compare few-step policies with. DDIM is in `dxmi.schedules`."""

from collections.abc import Iterator

import torch
from torch import Tensor

from dxmi.networks import Denoiser
from dxmi.sampler import Guide, Policy
from dxmi.schedules import StepSchedule


class DpmSolver(Policy):
    """DPM-Solver++(2M) in data prediction (arXiv 2211.01095, algorithm 2), on `solver_schedule`.

    With a_t^2 = gbar_t, s_t^2 = 1 - gbar_t, l_t = log(a_t / s_t), h_t = l_{t+1} - l_t and the prediction
    D_t = (x_t - s_t eps(x_t)) / a_t of the data:

        x_{t+1} = (s_{t+1} / s_t) x_t + a_{t+1} (1 - e^{-h_t}) (D_t + (h_t / (2 h_{t-1})) (D_t - D_{t-1}))

    The first step is DDIM's, which is the same without the second difference; so is the last, where h is infinite.

    Args:
        network: predicts the noise.
        schedule: without noise; a step is one network evaluation.
        event: shape of one sample.
    """

    def __init__(self, network: Denoiser, schedule: StepSchedule, event: tuple[int, ...]) -> None:
        super().__init__(network, schedule, event)
        level = torch.from_numpy(schedule.level)
        self._signal, self._noise = level.sqrt(), (1.0 - level).clamp_min(0.0).sqrt()
        self._log_ratio = (self._signal / self._noise).log()

    @torch.no_grad()
    def walk(
        self, num: int, generator: torch.Generator, guide: Guide | None = None, guidance: float = 0.0
    ) -> Iterator[Tensor]:
        """The states x_0 .. x_T of `num` samples; a guide has no part in it, since no step has a sigma."""
        assert guide is None or guidance == 0.0
        embeddings = self.embeddings()
        x = torch.randn((num, *self.event), generator=generator, device=self.diffusion_step.device)
        yield x
        before: Tensor | None = None
        for t in range(self.num_steps):
            noise = self.network(x, embeddings[t : t + 1]).float()
            data = (x - float(self._noise[t]) * noise) / float(self._signal[t])
            x = self._next(x, t, data, before)
            before = data
            yield x

    def _next(self, x: Tensor, t: int, data: Tensor, before: Tensor | None) -> Tensor:
        """x_{t+1} from the predictions of the data at t and at t - 1."""
        ratio = float(self._noise[t + 1] / self._noise[t])
        gain = float(self._signal[t + 1]) - float(self._signal[t]) * ratio  # a_{t+1} (1 - e^{-h_t})
        if before is not None and t + 1 < self.num_steps:
            weight = float(self._log_ratio[t + 1] - self._log_ratio[t])
            weight /= 2.0 * float(self._log_ratio[t] - self._log_ratio[t - 1])
            data = data + weight * (data - before)
        return ratio * x + gain * data
