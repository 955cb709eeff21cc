"""What a run draws of its samples: grids of images, or figures in the plane."""

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
"""A side of a map."""


class Gallery(ABC):
    """Draws one kind of samples.

    Attributes:
        num_rows: samples that a picture of all steps shows.
    """

    num_rows: int

    @abstractmethod
    def draw_samples(self, path: Path, samples: Tensor) -> None:
        """Samples as a data set stores them, [N, *event]."""

    @abstractmethod
    def draw_steps(self, path: Path, states: Tensor) -> None:
        """The whole way of samples, [T+1, N, *event]."""

    @abstractmethod
    def draw_value(self, folder: Path, value: Value, num_steps: int) -> None:
        """Maps of the value and the energy where the plane has them; `num_steps` is T."""


class ImageGallery(Gallery):
    """Grids of images."""

    num_rows = 8

    def draw_samples(self, path: Path, samples: Tensor) -> None:
        """A nearly square grid."""
        save_grid(path, samples)

    def draw_steps(self, path: Path, states: Tensor) -> None:
        """One row a sample, one column a step."""
        save_steps_grid(path, states)

    def draw_value(self, folder: Path, value: Value, num_steps: int) -> None:
        """A value of images has no picture."""


class PlanarGallery(Gallery):
    """Figures in the plane.

    Args:
        distribution: of the data; its density is drawn behind samples.
    """

    num_rows = 2_000

    def __init__(self, distribution: Distribution) -> None:
        self.cells = square_grid(SQUARE, _CELLS)
        self.log_density = _map(grid_log_density(distribution, _CELLS))

    def draw_samples(self, path: Path, samples: Tensor) -> None:
        """Dots over the data's density."""
        save_figure(path, samples_figure(samples.cpu(), self.log_density.exp()))

    def draw_steps(self, path: Path, states: Tensor) -> None:
        """One panel a step, and some ways."""
        save_figure(path, steps_figure(states.cpu(), self.log_density.exp()))

    @torch.no_grad()
    def draw_value(self, folder: Path, value: Value, num_steps: int) -> None:
        """values.png and energy.png.

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
    """Heights over the cells of `square_grid` as pictures have them: [y, x]."""
    return heights.view(_CELLS, _CELLS).T


def build_gallery(name: str) -> Gallery:
    """The gallery for samples like those of the data set `name`, which need not be there."""
    return PlanarGallery(DISTRIBUTIONS[name]) if name in DISTRIBUTIONS else ImageGallery()
