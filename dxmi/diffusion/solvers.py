"""Deterministic samplers of a pretrained model, as references for few-step policies."""

from typing import Any

import torch
from torch import Tensor

from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules.base import StepSchedule
from dxmi.diffusion.trajectory import GaussianStep
from dxmi.networks.base import Denoiser


class DpmSolver(Policy):
    """DPM-Solver++(2M) in data prediction (arXiv 2211.01095, algorithm 2), on trailing steps.

    With a_t the scale of the data and s_t that of the noise (DDPM: a_t^2 = gbar_t, s_t^2 = 1 - gbar_t; EDM: a_t = 1),
    l_t = log(a_t / s_t), h_t = l_{t+1} - l_t and the prediction D_t = (x_t - s_t eps(x_t)) / a_t of the data:

        x_{t+1} = (s_{t+1} / s_t) x_t + a_{t+1} (1 - e^{-h_t}) (D_t + (h_t / (2 h_{t-1})) (D_t - D_{t-1}))

    Without the term D_t - D_{t-1} this is DDIM's step, which is used for the first step, and for the last one, where h
    is infinite. D_t is recovered from DDIM's step. The object stores the previous prediction and can therefore sample
    only one batch at a time.

    Args:
        network: predicts the noise.
        schedule: tables of deterministic steps; each step takes one network evaluation.
        event: shape of one sample.
    """

    def __init__(self, network: Denoiser, schedule: StepSchedule, event: tuple[int, ...]) -> None:
        super().__init__(network, schedule, event)
        signal, noise = map(torch.from_numpy, schedule.signal_and_noise)
        ratio = noise[1:] / noise[:-1]
        h = (signal / noise).log().diff()
        self._ratio: list[float] = ratio.tolist()
        self._gain: list[float] = (signal[1:] - signal[:-1] * ratio).tolist()  # a_{t+1} (1 - e^{-h_t})
        self._weight: list[float] = [0.0, *(h[1:] / (2.0 * h[:-1])).tolist()]
        self._before: Tensor | None = None

    def transition(self, x: Tensor, t: int | Tensor, *args: Any, **kwargs: Any) -> GaussianStep:
        """One step of the solver, for samples that are all at step t and were at t - 1 in the previous call."""
        assert isinstance(t, int)
        step, data = self._first_order(super().transition(x, t, *args, **kwargs), x, t)
        before, self._before = self._before, data
        if t in (0, self.num_steps - 1):
            return step
        assert before is not None
        return GaussianStep(step.mean + self._gain[t] * self._weight[t] * (data - before), step.sigma)

    def _first_order(self, ddim: GaussianStep, x: Tensor, t: int) -> tuple[GaussianStep, Tensor]:
        """The step without the term D_t - D_{t-1}, given DDIM's step, and the prediction D_t."""
        return ddim, (ddim.mean - self._ratio[t] * x) / self._gain[t]


class ClippedDpmSolver(DpmSolver):
    """DPM-Solver++(2M) whose predictions D_t are clipped to [-1, 1], the range of pixels.

    DDPM's code does the same in every step of its ancestral sampler. With two steps this is a clipped DDIM.

    Args:
        network: predicts the noise.
        schedule: see `DpmSolver`.
        event: shape of one sample.
    """

    def _first_order(self, ddim: GaussianStep, x: Tensor, t: int) -> tuple[GaussianStep, Tensor]:
        data = super()._first_order(ddim, x, t)[1].clamp(-1.0, 1.0)
        return GaussianStep(self._ratio[t] * x + self._gain[t] * data, ddim.sigma), data


class HeunSolver(Policy):
    """Heun's method on EDM's noise levels (arXiv 2206.00364, algorithm 1).

    Each step takes two network evaluations, except for the last one, which takes one. With d(x, s) = (x - D(x; s)) / s
    and Euler's step x' = x_t + (s_{t+1} - s_t) d(x_t, s_t):

        x_{t+1} = x_t + (s_{t+1} - s_t) (d(x_t, s_t) + d(x', s_{t+1})) / 2

    The second slope is recovered from an Euler step from x' to level s_{t+2}. The last step, to level 0, is Euler's.

    Args:
        network: see `Policy`.
        schedule: tables of Euler's method.
        event: shape of one sample.
    """

    def __init__(self, network: Denoiser, schedule: StepSchedule, event: tuple[int, ...]) -> None:
        super().__init__(network, schedule, event)
        change = torch.from_numpy(schedule.level).diff()
        self._ratio: list[float] = (change[:-1] / change[1:]).tolist()

    def transition(self, x: Tensor, t: int | Tensor, *args: Any, **kwargs: Any) -> GaussianStep:
        """One step with the average of the slopes at both ends of Euler's step, for samples that are all at step t."""
        assert isinstance(t, int)
        euler = super().transition(x, t, *args, **kwargs)
        if t == self.num_steps - 1:
            return euler
        further = super().transition(euler.mean, t + 1, *args, **kwargs)
        return GaussianStep(0.5 * (x + euler.mean + self._ratio[t] * (further.mean - euler.mean)), euler.sigma)
