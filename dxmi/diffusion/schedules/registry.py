"""The registry of schedules. Nothing here imports NumPy or PyTorch, see `dxmi.registry`."""

from typing import TYPE_CHECKING

from dxmi.registry import Registry

if TYPE_CHECKING:
    from dxmi.diffusion.schedules.base import Schedule

_HERE = "dxmi.diffusion.schedules"

SCHEDULES: Registry["Schedule"] = Registry(
    "schedule",
    {
        "var": (f"{_HERE}.configs:VarScheduleConfig", f"{_HERE}.ddpm:VarSteps"),
        "step": (f"{_HERE}.configs:StepScheduleConfig", f"{_HERE}.ddpm:SubsetSteps"),
        "karras": (f"{_HERE}.configs:KarrasScheduleConfig", f"{_HERE}.edm:KarrasSteps"),
        "ddgan": (f"{_HERE}.configs:DdganScheduleConfig", f"{_HERE}.ddgan:DdganSteps"),
    },
)
