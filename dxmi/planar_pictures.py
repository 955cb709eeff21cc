"""Figures in the plane: samples over the data, the way to them, and maps of the energy and of the value.

Axis letters: N points, T policy steps, S cells a side of a map, which is indexed [y, x].
"""

import math
from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from torch import Tensor

from dxmi.data import SQUARE

_VIEW = 1.15 * SQUARE
"""Half the side of what is shown: a little more than the square, for samples that stray."""
_EXTENT = (-SQUARE, SQUARE, -SQUARE, SQUARE)
_PANEL = 2.2
"""Inches a side of a small panel."""
_MOST_COLUMNS = 4
_PATHS = 60
"""Ways of single samples that a panel shows; more of them hide one another."""
_LEVELS = 12
"""Lines of equal height in a map."""


def samples_figure(samples: Tensor, density: Tensor) -> Figure:
    """Samples as dots over the data's density in grey.

    Args:
        samples: [N, 2].
        density: of the data, as a map [S, S].
    """
    figure = Figure(figsize=(4.2, 4.2), layout="constrained")
    axes = figure.subplots()
    _shade(axes, density)
    _dots(axes, samples, color="C0")
    _frame(axes)
    outside = int((samples.abs() > _VIEW).any(dim=1).sum())
    axes.set_xlabel(f"{len(samples):,} samples over the data's density" + (f", {outside} out of view" * bool(outside)))
    return figure


def steps_figure(states: Tensor, density: Tensor) -> Figure:
    """Where the samples are at each t, coloured by the angle at which they end; and some of the ways they took.

    Args:
        states: x_0 .. x_T, [T+1, N, 2].
        density: of the data, as a map [S, S].
    """
    last = len(states) - 1
    panels = _panels([*(f"$x_{{{t}}}$" for t in range(last + 1)), f"from $x_0$ to $x_{{{last}}}$"])
    *points, ways = panels.panels
    angle = np.arctan2(states[-1, :, 1].numpy(), states[-1, :, 0].numpy())
    for axes, x in zip(points, states, strict=True):
        axes.scatter(x[:, 0], x[:, 1], c=angle, cmap="twilight", vmin=-math.pi, vmax=math.pi, s=2.0, linewidths=0)
    _shade(ways, density)
    paths = states[:, :_PATHS].transpose(0, 1).numpy()
    ways.add_collection(LineCollection(list(paths), colors="0.35", linewidths=0.5, alpha=0.6))
    _dots(ways, states[-1, :_PATHS], color="C0", size=6.0)
    for axes in panels.panels:
        _frame(axes)
    return panels.figure


def values_figure(maps: Sequence[Tensor]) -> Figure:
    """V(x, t) for t = 0 .. T on one scale; the last is the energy.

    Args:
        maps: [S, S] each.
    """
    last = len(maps) - 1
    titles = [f"$V(x, {t})$" for t in range(last)] + [f"$V(x, {last}) = E(x)$"]
    panels = _panels(titles)
    heights = np.stack([one.numpy() for one in maps])
    low, high = float(heights.min()), float(heights.max())
    for axes, one in zip(panels.panels, maps, strict=True):
        image = _heights(axes, one, low, high)
    panels.figure.colorbar(image, ax=list(panels.panels), shrink=0.9, label="V: low is good")
    return panels.figure


def energy_figure(energy: Tensor, log_density: Tensor, beta: float) -> Figure:
    """The energy and its density exp(-beta E) / Z beside the data's -log p and p.

    Args:
        energy: a map [S, S].
        log_density: of the data, a map [S, S].
        beta: the inverse temperature at which the energy fits best.
    """
    panels = _panels(
        [
            "energy $E(x)$",
            r"data: $-\log p(x)$",
            r"$\exp(-\beta E(x)) / Z$" + f", $\\beta$ = {beta:.3g}",
            "data: $p(x)$",
        ],
        columns=2,
    )
    surprise = -log_density
    deep = float(surprise[surprise.isfinite()].max())
    ceiling = min(deep, float(surprise.min()) + _DEPTH)
    maps: Mapping[int, tuple[Tensor, float, float]] = {
        0: (energy, float(energy.min()), float(energy.max())),
        1: (surprise.clamp(max=ceiling), float(surprise.min()), ceiling),
    }
    for index, (heights, low, high) in maps.items():
        image = _heights(panels.panels[index], heights, low, high)
        panels.figure.colorbar(image, ax=panels.panels[index], shrink=0.9)
    area = (2.0 * SQUARE) ** 2 / energy.numel()
    densities = [_normalised(-beta * energy) / area, _normalised(log_density) / area]
    top = float(densities[1].max())
    for axes, density in zip(panels.panels[2:], densities, strict=True):
        image = axes.imshow(density, extent=_EXTENT, origin="lower", cmap="magma", vmin=0.0, vmax=top)
        panels.figure.colorbar(image, ax=axes, shrink=0.9)
    return panels.figure


_DEPTH = 20.0
"""Nats below its maximum at which the data's density is shown as nothing."""


def _normalised(log_density: Tensor) -> Tensor:
    """Probabilities of the cells of a map."""
    return log_density.double().flatten().softmax(0).view_as(log_density)


class _Panels:
    """A figure of small square panels, row by row.

    Attributes:
        figure: the whole.
        panels: as many as there are titles.
    """

    def __init__(self, titles: Sequence[str], columns: int) -> None:
        rows = -(-len(titles) // columns)
        self.figure = Figure(figsize=(columns * _PANEL + 0.6, rows * (_PANEL + 0.25)), layout="constrained")
        cells = self.figure.subplots(rows, columns, squeeze=False).flatten()
        self.panels: list[Axes] = list(cells[: len(titles)])
        for axes in cells[len(titles) :]:
            axes.set_axis_off()
        for axes, title in zip(self.panels, titles, strict=True):
            axes.set_title(title, fontsize=9)
            axes.set(xticks=(), yticks=(), aspect="equal")


def _panels(titles: Sequence[str], columns: int | None = None) -> _Panels:
    return _Panels(titles, columns or min(_MOST_COLUMNS, len(titles)))


def _heights(axes: Axes, heights: Tensor, low: float, high: float):  # type: ignore[no-untyped-def]
    """A map in colours with lines of equal height; returns what a colour bar needs."""
    image = axes.imshow(heights, extent=_EXTENT, origin="lower", cmap="viridis", vmin=low, vmax=high)
    if high > low:
        levels = np.linspace(low, high, _LEVELS + 2)[1:-1]
        axes.contour(heights, levels, extent=_EXTENT, origin="lower", colors="white", linewidths=0.4, alpha=0.6)
    return image


def _shade(axes: Axes, density: Tensor) -> None:
    """The data's density in light grey."""
    top = 2.5 * float(density.max())  # the darkest grey stays light, for dots to stand out on it
    axes.imshow(density, extent=_EXTENT, origin="lower", cmap="Greys", vmin=0.0, vmax=top)


def _dots(axes: Axes, points: Tensor, *, color: str, size: float = 3.0) -> None:
    axes.scatter(points[:, 0], points[:, 1], s=size, color=color, alpha=0.6, linewidths=0)


def _frame(axes: Axes) -> None:
    axes.set(xlim=(-_VIEW, _VIEW), ylim=(-_VIEW, _VIEW), aspect="equal", xticks=(), yticks=())
