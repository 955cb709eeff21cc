"""Denoising-diffusion GAN (Xiao et al., arXiv 2112.07804): T large steps; the network predicts the image."""

from dataclasses import replace

import numpy as np

from dxmi.diffusion.schedules.base import Array, ForwardProcess, Schedule, StepSchedule, noised
from dxmi.diffusion.schedules.configs import DdganScheduleConfig

_GAN_BETA_MIN, _GAN_BETA_MAX, _GAN_FIRST_TIME = 0.1, 20.0, 1e-3


def gan_levels(num_steps: int) -> Array:
    """Signal levels gbar_1..gbar_T: those of the variance-preserving SDE with beta from 0.1 to 20 at T + 1 evenly
    spaced times, divided by the level at the first time, [T].
    """
    time = _GAN_FIRST_TIME + np.linspace(0.0, 1.0, num_steps + 1) * (1.0 - _GAN_FIRST_TIME)
    log_level = -0.5 * time**2 * (_GAN_BETA_MAX - _GAN_BETA_MIN) - time * _GAN_BETA_MIN
    levels: Array = np.exp(log_level[1:] - log_level[0])
    return levels


class DdganSteps(Schedule):
    """The T steps of a denoising-diffusion GAN."""

    def __init__(self, config: DdganScheduleConfig) -> None:
        self.config = config

    def steps(self) -> StepSchedule:
        """The posterior of x_{t+1} given x_t and the image (DDPM, equation 7), with kappa^2 times its variance."""
        config = self.config
        level = np.append(gan_levels(config.num_steps)[::-1], 1.0)
        g, g_next = level[:-1], level[1:]
        sigma = config.kappa * np.sqrt((1.0 - g_next) / (1.0 - g) * (1.0 - g / g_next))
        signal_scale = np.sqrt((1.0 - g_next - sigma**2) / (1.0 - g))
        image_scale = np.sqrt(g_next) - np.sqrt(g) * signal_scale
        sigma[-1] = config.final_sigma
        steps = np.arange(config.num_steps - 1.0, -1.0, -1.0)
        return StepSchedule(level, steps, signal_scale, image_scale, sigma, 1.0 - g / g_next)

    def forward_process(self) -> ForwardProcess:
        """The forward process at the T levels, with the image as the target."""
        levels = gan_levels(self.config.num_steps)
        return replace(noised(levels), data_target=np.ones_like(levels), noise_target=np.zeros_like(levels))
