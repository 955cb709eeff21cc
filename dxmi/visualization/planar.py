"""Figures in the plane: samples over the data, the way to them, and maps of the energy and of the value.

Axis letters: N points, T policy steps, S cells a side of a map, which is indexed [y, x].
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
"""Half the side of what is shown: a little more than the square, for samples that stray."""
_EXTENT = (-SQUARE, SQUARE, -SQUARE, SQUARE)
_PANEL, _GAP = 2.2, 0.1
_SIDE = _PANEL - _GAP
_TITLE, _BAR = 0.25, 0.8
"""Inches of a panel's place and of the gap between two, of a side of a panel, of its title, and of a colour bar with
its numbers.
"""
_COLUMNS = (4, 3)
"""Of panels: the number that leaves fewer places empty."""
_MOST_TIMES = 11
"""Panels of a figure that has one for each t."""
_PATHS = 60
"""Ways of single samples that a panel shows; more of them hide one another."""
_ANGLES = ListedColormap(0.85 * hsv_to_rgb([(hue, 0.85, 1.0) for hue in np.linspace(0.0, 1.0, 256)]))
"""Colours around a circle, dark enough for dots on white."""
_LEVELS = 12
"""Lines of equal height in a map."""
_DEPTH = 20.0
"""Nats below its maximum at which the data's density is shown as nothing."""


def samples_figure(samples: Tensor, density: Tensor) -> Figure:
    """Samples as dots over the data's density in grey.

    Args:
        samples: [N, 2].
        density: of the data, as a map [S, S].
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
    """The t = 0 .. T that figures have panels for: all of them if they are few, else some, evenly, with both ends."""
    panels = min(num_steps + 1, _MOST_TIMES)
    return [round(index * num_steps / (panels - 1)) for index in range(panels)]


def steps_figure(states: Tensor, density: Tensor) -> Figure:
    """Where the samples are at each t, coloured by the angle at which they end; and some of the ways they took.

    Args:
        states: x_0 .. x_T, [T+1, N, 2].
        density: of the data, as a map [S, S].
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
    """V(x, t) on one scale; the last is the energy.

    Args:
        maps: by t, ascending up to T, [S, S] each.
    """
    *times, last = maps
    titles = [f"$V(x, {t})$" for t in times] + [f"$V(x, {last}) = E(x)$"]
    panels = _panels(titles, margin=_BAR + _TITLE)
    heights = np.stack([one.numpy() for one in maps.values()])
    low, high = float(heights.min()), float(heights.max())
    images = [_heights(axes, one, low, high) for axes, one in zip(panels.panels, maps.values(), strict=True)]
    width, height = panels.figure.get_size_inches()
    bar = _place(panels.figure, width - _BAR - _TITLE, 0.1 * height, _GAP, 0.8 * height)
    panels.figure.colorbar(images[0], cax=bar, label="V: low is good")
    return panels.figure


def energy_figure(energy: Tensor, log_density: Tensor, beta: float) -> Figure:
    """The energy and its density exp(-beta E) / Z beside the data's -log p and p.

    Args:
        energy: a map [S, S].
        log_density: of the data, a map [S, S].
        beta: the inverse temperature at which the energy fits best.
    """
    of_energy, of_data = rf"$\exp(-\beta E(x)) / Z$, $\beta$ = {beta:.3g}", "data: $p(x)$"
    panels = _panels(["energy $E(x)$", r"data: $-\log p(x)$", of_energy, of_data], columns=2, bar=_BAR)
    surprise = -log_density
    surprise = surprise.clamp(max=float(surprise.min()) + _DEPTH)
    cell = (2.0 * SQUARE) ** 2 / energy.numel()
    densities = [_normalised(-beta * energy) / cell, _normalised(log_density) / cell]
    top = float(densities[1].max())
    images = [_heights(axes, one) for axes, one in zip(panels.panels[:2], (energy, surprise), strict=True)]
    images += [_image(axes, one, "magma", 0.0, top) for axes, one in zip(panels.panels[2:], densities, strict=True)]
    for axes, image in zip(panels.panels, images, strict=True):
        panels.figure.colorbar(image, cax=axes.inset_axes((1.0 + _GAP / _SIDE, 0.05, _GAP / _SIDE, 0.9)))
    return panels.figure


def _normalised(log_density: Tensor) -> Tensor:
    """Probabilities of the cells of a map."""
    return log_density.double().flatten().softmax(0).view_as(log_density)


class _Panels(NamedTuple):
    """A figure of small square panels, row by row."""

    figure: Figure
    panels: list[Axes]


def _panels(titles: Sequence[str], columns: int | None = None, *, bar: float = 0.0, margin: float = 0.0) -> _Panels:
    """One panel a title; the places that are left over stay empty.

    A layout engine would draw the figure twice more to find these places.

    Args:
        titles: of the panels.
        columns: of panels.
        bar: inches that are left free beside each panel.
        margin: inches that are left free beside all.
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
    """Axes at a place in inches, square unless a height is given."""
    across, up = figure.get_size_inches()
    return figure.add_axes((left / across, bottom / up, width / across, (width if height is None else height) / up))


def _image(axes: Axes, heights: Tensor, colours: str, low: float, high: float) -> AxesImage:
    """A map in colours."""
    return axes.imshow(heights.numpy(), extent=_EXTENT, origin="lower", cmap=colours, vmin=low, vmax=high)


def _heights(axes: Axes, heights: Tensor, low: float | None = None, high: float | None = None) -> AxesImage:
    """A map with lines of equal height, from its lowest to its highest unless a range is given."""
    low = float(heights.min()) if low is None else low
    high = float(heights.max()) if high is None else high
    if high > low:
        levels = np.linspace(low, high, _LEVELS + 2)[1:-1]
        axes.contour(heights.numpy(), levels, extent=_EXTENT, origin="lower", colors="white", linewidths=0.4, alpha=0.6)
    return _image(axes, heights, "viridis", low, high)


def _shade(axes: Axes, density: Tensor) -> None:
    """The data's density in light grey."""
    _image(axes, density, "Greys", 0.0, 2.5 * float(density.max()))  # the darkest is light: dots stand out on it


def _dots(axes: Axes, points: Tensor, *, color: str, size: float = 3.0) -> None:
    axes.scatter(*_columns(points), s=size, color=color, alpha=0.6, linewidths=0)


def _columns(points: Tensor) -> tuple[Any, Any]:
    """Points [N, 2] as x [N] and y [N]."""
    x, y = points.numpy().T
    return x, y


def _frame(axes: Axes) -> None:
    axes.set(xlim=(-_VIEW, _VIEW), ylim=(-_VIEW, _VIEW), aspect="equal", xticks=(), yticks=())
