"""Figures of the plane: samples over the density of the data, their paths, and maps of the energy and the value.

Axis letters: N points, T policy steps, S cells per side of a map, which is indexed [y, x].
"""

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.colors import ListedColormap, hsv_to_rgb
from matplotlib.figure import Figure
from matplotlib.image import AxesImage
from torch import Tensor

from dxmi.data.planar import SQUARE

_VIEW = 1.15 * SQUARE
"""Half the side of the visible region, which is slightly larger than the square, to show samples outside it."""
_EXTENT = (-SQUARE, SQUARE, -SQUARE, SQUARE)
_PANEL, _GAP = 2.2, 0.1
_SIDE = _PANEL - _GAP
_TITLE, _BAR = 0.25, 0.8
"""Sizes in inches: spacing of panels, gap between panels, side of a panel, height of its title, and width of a color
bar with its numbers.
"""
_COLUMNS = (4, 3)
"""Candidate numbers of columns; the one that leaves fewer empty places is used."""
_MOST_TIMES = 11
"""Maximum number of values of t that a figure shows."""
_PATHS = 60
"""Number of sample paths that a panel shows; more would overlap too much."""
_ANGLES = ListedColormap(0.85 * hsv_to_rgb([(hue, 0.85, 1.0) for hue in np.linspace(0.0, 1.0, 256)]))
"""A cyclic colormap, dark enough for dots on white."""
_LEVELS = 12
"""Number of contour lines in a map."""
_DEPTH = 20.0
"""Range in nats of the map of the data's -log p, beyond which it is clipped."""


def samples_figure(samples: Tensor, density: Tensor) -> Figure:
    """Plot samples as dots over the density of the data in gray.

    Args:
        samples: [N, 2].
        density: density of the data as a map [S, S].
    """
    figure = Figure(figsize=(4.2, 4.4))
    axes = _place(figure, 0.1, 0.3, 4.0)
    _shade(axes, density)
    _dots(axes, samples, color="C0")
    _frame(axes)
    outside = int((samples.abs() > _VIEW).any(dim=1).sum())
    axes.set_xlabel(f"{len(samples):,} samples over the data's density" + (f", {outside} out of view" * bool(outside)))
    return figure


def shown_times(num_steps: int) -> list[int]:
    """The values of t that figures show: all of 0 .. T if there are few, else evenly spaced ones with both ends."""
    panels = min(num_steps + 1, _MOST_TIMES)
    return [round(index * num_steps / (panels - 1)) for index in range(panels)]


def steps_figure(states: Tensor, density: Tensor) -> Figure:
    """Plot the samples at each t, colored by the angle of their final position, and some of their paths.

    Args:
        states: x_0 .. x_T, [T+1, N, 2].
        density: density of the data as a map [S, S].
    """
    last = len(states) - 1
    times = shown_times(last)
    panels = _panels([*(f"$x_{{{t}}}$" for t in times), f"from $x_0$ to $x_{{{last}}}$"])
    *points, ways = panels.panels
    angle = np.arctan2(states[-1, :, 1].numpy(), states[-1, :, 0].numpy())
    for axes, x in zip(points, states[times], strict=True):
        axes.scatter(*_columns(x), c=angle, cmap=_ANGLES, vmin=-math.pi, vmax=math.pi, s=2.0, linewidths=0)
    _shade(ways, density)
    paths = states[times, :_PATHS].transpose(0, 1).numpy()
    ways.add_collection(LineCollection(list(paths), colors="0.35", linewidths=0.5, alpha=0.6))
    _dots(ways, states[-1, :_PATHS], color="C0", size=6.0)
    for axes in panels.panels:
        _frame(axes)
    return panels.figure


def values_figure(maps: Mapping[int, Tensor]) -> Figure:
    """Plot maps of V(x, t) on a common scale; the last one is the energy.

    Args:
        maps: maps [S, S] by t, in ascending order up to T.
    """
    *times, last = maps
    titles = [f"$V(x, {t})$" for t in times] + [f"$V(x, {last}) = E(x)$"]
    panels = _panels(titles, margin=_BAR + _TITLE)
    heights = np.stack([one.numpy() for one in maps.values()])
    low, high = float(heights.min()), float(heights.max())
    images = [_heights(axes, one, low, high) for axes, one in zip(panels.panels, maps.values(), strict=True)]
    width, height = panels.figure.get_size_inches()
    bar = _place(panels.figure, width - _BAR - _TITLE, 0.1 * height, _GAP, 0.8 * height)
    panels.figure.colorbar(images[0], cax=bar, label="V (lower is better)")
    return panels.figure


def energy_figure(energy: Tensor, log_density: Tensor, beta: float) -> Figure:
    """Plot the energy and its density exp(-beta E) / Z next to -log p and p of the data.

    Args:
        energy: energy as a map [S, S].
        log_density: log density of the data as a map [S, S].
        beta: the inverse temperature at which the energy fits best.
    """
    of_energy, of_data = rf"$\exp(-\beta E(x)) / Z$, $\beta$ = {beta:.3g}", "data: $p(x)$"
    panels = _panels(["energy $E(x)$", r"data: $-\log p(x)$", of_energy, of_data], columns=2, bar=_BAR)
    surprise = -log_density
    surprise = surprise.clamp(max=float(surprise.min()) + _DEPTH)
    cell = (2.0 * SQUARE) ** 2 / energy.numel()
    densities = [_normalized(-beta * energy) / cell, _normalized(log_density) / cell]
    top = float(densities[1].max())
    images = [_heights(axes, one) for axes, one in zip(panels.panels[:2], (energy, surprise), strict=True)]
    images += [_image(axes, one, "magma", 0.0, top) for axes, one in zip(panels.panels[2:], densities, strict=True)]
    for axes, image in zip(panels.panels, images, strict=True):
        panels.figure.colorbar(image, cax=axes.inset_axes((1.0 + _GAP / _SIDE, 0.05, _GAP / _SIDE, 0.9)))
    return panels.figure


def _normalized(log_density: Tensor) -> Tensor:
    """The probability of each cell of a map."""
    return log_density.double().flatten().softmax(0).view_as(log_density)


class _Panels(NamedTuple):
    """A figure with its square panels, in row-major order."""

    figure: Figure
    panels: list[Axes]


def _panels(titles: Sequence[str], columns: int | None = None, *, bar: float = 0.0, margin: float = 0.0) -> _Panels:
    """Create one panel per title.

    The positions are computed here, since a layout engine would have to draw the figure twice more.

    Args:
        titles: titles of the panels.
        columns: number of columns; chosen by the number of panels if None.
        bar: free space in inches to the right of each panel.
        margin: free space in inches to the right of all panels.
    """
    columns = columns or min(_COLUMNS, key=lambda number: -len(titles) % number)
    rows = -(-len(titles) // columns)
    cell, height = _PANEL + bar, rows * (_PANEL + _TITLE)
    figure = Figure(figsize=(columns * cell + margin + _GAP, height + _GAP))
    panels = []
    for index, title in enumerate(titles):
        row, column = divmod(index, columns)
        axes = _place(figure, column * cell + _GAP, height - (row + 1) * (_PANEL + _TITLE) + _GAP, _SIDE)
        axes.set_title(title, fontsize=9, y=1.0, pad=4)
        axes.set(xticks=(), yticks=(), aspect="equal")
        panels.append(axes)
    return _Panels(figure, panels)


def _place(figure: Figure, left: float, bottom: float, width: float, height: float | None = None) -> Axes:
    """Add axes at a position in inches, square unless a height is given."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, (width if height is None else height) / up))


def _image(axes: Axes, heights: Tensor, cmap: str, low: float, high: float) -> AxesImage:
    """Draw a map in colors."""
    return axes.imshow(heights.numpy(), extent=_EXTENT, origin="lower", cmap=cmap, vmin=low, vmax=high)


def _heights(axes: Axes, heights: Tensor, low: float | None = None, high: float | None = None) -> AxesImage:
    """Draw a map with contour lines; its range is that of the values unless it is given."""
    low = float(heights.min()) if low is None else low
    high = float(heights.max()) if high is None else high
    if high > low:
        levels = np.linspace(low, high, _LEVELS + 2)[1:-1]
        axes.contour(heights.numpy(), levels, extent=_EXTENT, origin="lower", colors="white", linewidths=0.4, alpha=0.6)
    return _image(axes, heights, "viridis", low, high)


def _shade(axes: Axes, density: Tensor) -> None:
    """Draw the density of the data in light gray."""
    _image(axes, density, "Greys", 0.0, 2.5 * float(density.max()))  # light even at the maximum, so that dots stand out


def _dots(axes: Axes, points: Tensor, *, color: str, size: float = 3.0) -> None:
    axes.scatter(*_columns(points), s=size, color=color, alpha=0.6, linewidths=0)


def _columns(points: Tensor) -> tuple[Any, Any]:
    """Split points [N, 2] into x [N] and y [N]."""
    x, y = points.numpy().T
    return x, y


def _frame(axes: Axes) -> None:
    axes.set(xlim=(-_VIEW, _VIEW), ylim=(-_VIEW, _VIEW), aspect="equal", xticks=(), yticks=())
