"""From a schedule's config to its tables."""

from dxmi.diffusion.schedules.base import Noising, StepSchedule
from dxmi.diffusion.schedules.configs import ScheduleConfig
from dxmi.diffusion.schedules.ddgan import ddgan_noising, ddgan_steps
from dxmi.diffusion.schedules.ddpm import ddpm_noising, ddpm_steps
from dxmi.diffusion.schedules.edm import edm_noising, edm_steps


def shorten(config: ScheduleConfig) -> StepSchedule:
    """The T-step schedule that `config` describes."""
    if config.method == "karras":
        return edm_steps(config)
    if config.method == "ddgan":
        return ddgan_steps(config)
    return ddpm_steps(config)


def noising(config: ScheduleConfig) -> Noising:
    """How the models are pretrained that a schedule cuts."""
    if config.method == "karras":
        return edm_noising()
    if config.method == "ddgan":
        return ddgan_noising(config.num_steps)
    return ddpm_noising()
