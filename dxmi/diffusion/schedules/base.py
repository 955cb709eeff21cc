"""The two tables of a schedule: the steps of a sampler, and the forward process of pretraining."""

from abc import ABC, abstractmethod
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

Array = NDArray[np.float64]


@dataclass(frozen=True)
class StepSchedule:
    """The tables of a T-step sampler in float64, in generation order: step t = 0 acts on noise.

    x_{t+1} = signal_scale_t x_t + output_scale_t eps(input_scale_t x_t, timestep_t) + sigma_t z

    Attributes:
        level: signal level before each step and after the last, with level[T] = 1; noise level for karras, [T+1].
        timestep: diffusion step that the network is given, which may be fractional, [T].
        signal_scale: factor of the state, [T].
        output_scale: factor of the network's output, which for karras and ddgan is not the noise, [T].
        sigma: initial standard deviation of each step; the last is `final_sigma`, [T].
        eta: variance that the corresponding forward step adds; the initial reference variance of the running cost, [T].
        input_scale: factor of the network's input, [T]; None for 1.
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
        if self.input_scale is not None:  # EDM does not scale the data
            return np.ones_like(self.level), self.level
        return np.sqrt(self.level), np.sqrt(np.maximum(1.0 - self.level, 0.0))

    def tree(self) -> dict[str, Any]:
        """Every table as a plain list, for a signature; `start_sigma` is included only if it is not 1."""
        tables = {name: table.tolist() for name, table in asdict(self).items() if isinstance(table, np.ndarray)}
        return tables if self.start_sigma == 1.0 else {**tables, "start_sigma": self.start_sigma}


@dataclass(frozen=True)
class ForwardProcess:
    """The noise levels on which a family of models is pretrained: float64 tables whose rows are drawn uniformly.

    The network is given signal_scale x + noise_scale eps and the timestep, and regresses
    data_target x + noise_target eps.

    Attributes:
        timestep: diffusion step that the network is given, [K].
        signal_scale: factor of the data in the input, [K].
        noise_scale: factor of the noise in the input, [K].
        data_target: factor of the data in the target, [K].
        noise_target: factor of the noise in the target, [K].
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
    """The variance-preserving process with these signal levels [K], with the noise as the target."""
    step = np.arange(len(level), dtype=np.float64)
    return ForwardProcess(step, np.sqrt(level), np.sqrt(1.0 - level), np.zeros_like(level), np.ones_like(level))


class Schedule(ABC):
    """Builds the tables that a schedule's config describes. The constructor takes that config."""

    @abstractmethod
    def steps(self) -> StepSchedule:
        """The tables of the T policy steps."""

    @abstractmethod
    def forward_process(self) -> ForwardProcess:
        """The forward process on which the models that the schedule shortens are pretrained."""
