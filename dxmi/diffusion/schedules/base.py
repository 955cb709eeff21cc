"""The tables that every schedule consists of: the steps of a sampler, and the forward process of pretraining."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class StepSchedule:
    """The tables of a T-step sampler, in generation order (index t = 0 acts on noise); float64.

    x_{t+1} = signal_scale_t x_t + output_scale_t eps(input_scale_t x_t, timestep_t) + sigma_t z

    Attributes:
        level: signal level before each step and after the last, [T+1], level[T] = 1; karras: noise level.
        timestep: what the network is told, may be fractional, [T].
        signal_scale: [T].
        output_scale: of the network's output, which for karras and ddgan is not the noise, [T].
        sigma: initial standard deviation of each step, [T]; the last is `final_sigma`.
        eta: variance that the matching forward step adds, the first reference variance of the running cost, [T].
        input_scale: of the network's input, [T]; None for 1.
        start_sigma: standard deviation of x_0.
    """

    level: Array
    timestep: Array
    signal_scale: Array
    output_scale: Array
    sigma: Array
    eta: Array
    input_scale: Array | None = None
    start_sigma: float = 1.0

    @property
    def num_steps(self) -> int:
        """T."""
        return len(self.sigma)

    @property
    def signal_and_noise(self) -> tuple[Array, Array]:
        """Scale of the data and standard deviation of the noise in x_0 .. x_T, each [T+1]."""
        if self.input_scale is not None:  # EDM: the data keep their scale
            return np.ones_like(self.level), self.level
        return np.sqrt(self.level), np.sqrt(np.maximum(1.0 - self.level, 0.0))

    def tree(self) -> dict[str, Any]:
        """Every table as a plain list, for a signature; those that are as DDPM's are left out."""
        tables = {name: table.tolist() for name, table in asdict(self).items() if isinstance(table, np.ndarray)}
        return tables if self.start_sigma == 1.0 else {**tables, "start_sigma": self.start_sigma}


@dataclass(frozen=True)
class ForwardProcess:
    """How a family of models is pretrained: a table whose rows are drawn uniformly; float64.

    The network sees signal_scale x + noise_scale eps, is told the timestep, and regresses
    data_target x + noise_target eps.

    Attributes:
        timestep: [K].
        signal_scale: [K].
        noise_scale: [K].
        data_target: [K].
        noise_target: [K].
    """

    timestep: Array
    signal_scale: Array
    noise_scale: Array
    data_target: Array
    noise_target: Array

    @property
    def regresses_noise(self) -> bool:
        """Whether the network predicts the noise itself."""
        return not self.data_target.any() and bool((self.noise_target == 1.0).all())


def noised(level: Array) -> ForwardProcess:
    """Variance-preserving noise of these signal levels, which is what the network regresses."""
    step = np.arange(len(level), dtype=np.float64)
    return ForwardProcess(step, np.sqrt(level), np.sqrt(1.0 - level), np.zeros_like(level), np.ones_like(level))


class Schedule(ABC):
    """What a schedule's config describes. The constructor takes that config."""

    @abstractmethod
    def steps(self) -> StepSchedule:
        """The tables of the T policy steps."""

    @abstractmethod
    def forward_process(self) -> ForwardProcess:
        """How the models are pretrained that the schedule cuts."""
