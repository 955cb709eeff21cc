"""From a schedule's config to its tables."""

from dxmi.diffusion.schedules.base import Noising, StepSchedule
from dxmi.diffusion.schedules.configs import ScheduleConfig
from dxmi.diffusion.schedules.registry import SCHEDULES


def shorten(config: ScheduleConfig) -> StepSchedule:
    """The T-step schedule that `config` describes."""
    return SCHEDULES.build(config).steps()


def noising(config: ScheduleConfig) -> Noising:
    """How the models are pretrained that a schedule cuts."""
    return SCHEDULES.build(config).noising()
