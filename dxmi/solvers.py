"""Deterministic samplers of a pretrained model, to compare few-step policies with."""

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from dxmi.networks import Denoiser
from dxmi.sampler import Policy
from dxmi.schedules import SHORTENINGS, ScheduleConfig, StepSchedule, deterministic_schedule, solver_schedule
from dxmi.trajectory import Gaussian


class DpmSolver(Policy):
    """DPM-Solver++(2M) in data prediction (arXiv 2211.01095, algorithm 2), on `solver_schedule`.

    With a_t^2 = gbar_t, s_t^2 = 1 - gbar_t, l_t = log(a_t / s_t), h_t = l_{t+1} - l_t and the prediction
    D_t = (x_t - s_t eps(x_t)) / a_t of the data:

        x_{t+1} = (s_{t+1} / s_t) x_t + a_{t+1} (1 - e^{-h_t}) (D_t + (h_t / (2 h_{t-1})) (D_t - D_{t-1}))

    Without the second difference this is DDIM's step, of which it makes the whole first one, and the last, where h is
    infinite; D_t is found from it. The prediction before is remembered, so that one object does one walk at a time.

    Args:
        network: predicts the noise.
        schedule: without noise; a step is one network evaluation.
        event: shape of one sample.
    """

    def __init__(self, network: Denoiser, schedule: StepSchedule, event: tuple[int, ...]) -> None:
        super().__init__(network, schedule, event)
        level = torch.from_numpy(schedule.level)
        signal, noise = level.sqrt(), (1.0 - level).clamp_min(0.0).sqrt()
        ratio = noise[1:] / noise[:-1]
        h = (signal / noise).log().diff()
        self._ratio: list[float] = ratio.tolist()
        self._gain: list[float] = (signal[1:] - signal[:-1] * ratio).tolist()  # a_{t+1} (1 - e^{-h_t})
        self._weight: list[float] = [0.0, *(h[1:] / (2.0 * h[:-1])).tolist()]
        self._before: Tensor | None = None

    def transition(self, x: Tensor, t: int | Tensor, *args: Any, **kwargs: Any) -> Gaussian:
        """DDIM's step and the second difference: all samples are at the same step t, and come from step t - 1."""
        assert isinstance(t, int)
        step = super().transition(x, t, *args, **kwargs)
        data = (step.mean - self._ratio[t] * x) / self._gain[t]
        before, self._before = self._before, data
        if t in (0, self.num_steps - 1):
            return step
        assert before is not None
        return Gaussian(step.mean + self._gain[t] * self._weight[t] * (data - before), step.sigma)


def further_references(config: ScheduleConfig, steps: Sequence[int]) -> dict[str, tuple[type[Policy], StepSchedule]]:
    """Deterministic samplers of the model that `config` cuts, with each number of steps, by name.

    DDIM and DPM-Solver++(2M); of EDM's noise levels, Euler's method, which is DDIM there; of a diffusion GAN, none.

    Returns:
        For each the class and what it is built with.
    """
    if config.method == "ddgan":
        return {}
    first_order = dict(deterministic_schedule(config, number) for number in steps)
    references: dict[str, tuple[type[Policy], StepSchedule]] = {
        name: (Policy, schedule) for name, schedule in first_order.items()
    }
    if config.method in SHORTENINGS:
        references |= {f"dpm_solver_{number}": (DpmSolver, solver_schedule(number)) for number in steps}
    return references
