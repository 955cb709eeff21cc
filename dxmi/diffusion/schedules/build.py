"""From a schedule's config to its tables."""

from dxmi.diffusion.schedules.base import ForwardProcess, StepSchedule
from dxmi.diffusion.schedules.configs import ScheduleConfig
from dxmi.diffusion.schedules.registry import SCHEDULES


def shorten(config: ScheduleConfig) -> StepSchedule:
    """The T-step schedule that `config` describes."""
    return SCHEDULES.build(config).steps()


def forward_process(config: ScheduleConfig) -> ForwardProcess:
    """How the models are pretrained that a schedule cuts."""
    return SCHEDULES.build(config).forward_process()
