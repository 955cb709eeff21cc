"""Figures of the samples of a run: grids of images, or plots of points in the plane."""

from abc import ABC, abstractmethod
from pathlib import Path

import torch
from torch import Tensor

from dxmi.critics.value import Value
from dxmi.data.planar import DISTRIBUTIONS, SQUARE, Distribution
from dxmi.metrics.density import calibrated_kl, grid_log_density, square_grid
from dxmi.tensors import require_finite
from dxmi.visualization.pictures import save_figure, save_grid, save_steps_grid
from dxmi.visualization.planar import energy_figure, samples_figure, shown_times, steps_figure, values_figure

_CELLS = 120
"""Cells per side of a map."""


class Visualizer(ABC):
    """Draws the samples of a run.

    Attributes:
        num_rows: number of samples in a figure of all steps.
    """

    num_rows: int

    @abstractmethod
    def draw_samples(self, path: Path, samples: Tensor) -> None:
        """Draw samples in the format of a data set, [N, *event]."""

    @abstractmethod
    def draw_steps(self, path: Path, states: Tensor) -> None:
        """Draw all states of samples, [T+1, N, *event]."""

    @abstractmethod
    def draw_value(self, folder: Path, value: Value, num_steps: int) -> None:
        """Draw maps of the value and the energy, if the data are in the plane; `num_steps` is T."""


class ImageVisualizer(Visualizer):
    """Draws images in grids."""

    num_rows = 8

    def draw_samples(self, path: Path, samples: Tensor) -> None:
        """Draw a nearly square grid."""
        save_grid(path, samples)

    def draw_steps(self, path: Path, states: Tensor) -> None:
        """Draw a grid with one row per sample and one column per step."""
        save_steps_grid(path, states)

    def draw_value(self, folder: Path, value: Value, num_steps: int) -> None:
        """Do nothing, since values of images are not drawn."""


class PlanarVisualizer(Visualizer):
    """Plots points in the plane.

    Args:
        distribution: distribution of the data, whose density is drawn behind the samples.
    """

    num_rows = 2_000

    def __init__(self, distribution: Distribution) -> None:
        self.cells = square_grid(SQUARE, _CELLS)
        self.log_density = _map(grid_log_density(distribution, _CELLS))

    def draw_samples(self, path: Path, samples: Tensor) -> None:
        """Draw the samples as dots over the density of the data."""
        save_figure(path, samples_figure(samples.cpu(), self.log_density.exp()))

    def draw_steps(self, path: Path, states: Tensor) -> None:
        """Draw one panel per step, and some of the paths."""
        save_figure(path, steps_figure(states.cpu(), self.log_density.exp()))

    @torch.no_grad()
    def draw_value(self, folder: Path, value: Value, num_steps: int) -> None:
        """Write values.png and energy.png.

        Raises:
            DivergedError: a value is not finite.
        """
        device = next(value.parameters()).device
        heights = {t: value(self.cells.to(device), t).cpu() for t in shown_times(num_steps)}
        maps = {t: _map(require_finite(heights[t], f"the value of step {t} on the plane")) for t in heights}
        save_figure(folder / "values.png", values_figure(maps))
        energy = maps[num_steps]
        beta = calibrated_kl(energy.flatten(), self.log_density.flatten()).beta
        save_figure(folder / "energy.png", energy_figure(energy, self.log_density, beta))


def _map(heights: Tensor) -> Tensor:
    """Reshape values in the cells of `square_grid` to an image, indexed [y, x]."""
    return heights.view(_CELLS, _CELLS).T


def build_visualizer(name: str) -> Visualizer:
    """Build the visualizer for samples of the data set `name`, without reading its files."""
    return PlanarVisualizer(DISTRIBUTIONS[name]) if name in DISTRIBUTIONS else ImageVisualizer()
