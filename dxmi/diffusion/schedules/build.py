"""Build the tables of a schedule from its config."""

from dxmi.diffusion.schedules.base import ForwardProcess, StepSchedule
from dxmi.diffusion.schedules.configs import ScheduleConfig
from dxmi.diffusion.schedules.registry import SCHEDULES


def shorten(config: ScheduleConfig) -> StepSchedule:
    """The T-step schedule that `config` describes."""
    return SCHEDULES.build(config).steps()


def forward_process(config: ScheduleConfig) -> ForwardProcess:
    """The forward process on which the models that a schedule shortens are pretrained."""
    return SCHEDULES.build(config).forward_process()
