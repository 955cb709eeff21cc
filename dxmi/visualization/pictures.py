"""Grids of images, and figures of score curves."""

import io
import math
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator
from PIL import Image
from torch import Tensor

from dxmi.formatting import score_text
from dxmi.persistence.files import write_atomic

_MIN_SIDE = 32
"""Smaller images are enlarged until their sides have at least this many pixels."""
_GAP = 2
_PAPER = 255
_CURVES, _ENTRY = (11.0, 5.2), 0.19
"""Size in inches of the figure of curves, and height in inches of an entry of its legend."""
_TILE, _LINE, _LABEL = 0.9, 0.2, 16
"""Height in inches of a labeled image and of the label below it, and the maximum length of a label."""


def grid(pixels: Tensor, columns: int) -> Tensor:
    """Arrange images uint8 [N, C, H, W] in rows of `columns`, enlarged if they are small: uint8 [C, H', W']."""
    scale = max(1, -(-_MIN_SIDE // pixels.shape[-1]))
    pixels = pixels.cpu().repeat_interleave(scale, 2).repeat_interleave(scale, 3)
    n, c, h, w = pixels.shape
    rows = -(-n // columns)
    canvas = torch.full((c, rows * (h + _GAP) + _GAP, columns * (w + _GAP) + _GAP), _PAPER, dtype=torch.uint8)
    for index, image in enumerate(pixels):
        top, left = _GAP + index // columns * (h + _GAP), _GAP + index % columns * (w + _GAP)
        canvas[:, top : top + h, left : left + w] = image
    return canvas


def save_png(path: Path, picture: Tensor) -> None:
    """Write an image uint8 [C, H, W], C 1 or 3, as PNG."""
    array = picture[0].numpy() if len(picture) == 1 else picture.permute(1, 2, 0).numpy()
    buffer = io.BytesIO()
    Image.fromarray(array).save(buffer, format="png")
    write_atomic(path, buffer.getvalue())


def save_grid(path: Path, pixels: Tensor) -> None:
    """Write a nearly square grid of images uint8 [N, C, H, W]."""
    save_png(path, grid(pixels, columns=max(1, round(len(pixels) ** 0.5))))


def save_labeled_grid(path: Path, pixels: Tensor, labels: Sequence[str]) -> None:
    """Write a nearly square grid of images uint8 [N, C, H, W], each with its label below it."""
    columns = max(1, math.ceil(len(pixels) ** 0.5))
    rows = math.ceil(len(pixels) / columns)
    figure = Figure(figsize=(_TILE * columns, (_TILE + _LINE) * rows))
    for index, (image, label) in enumerate(zip(pixels.cpu(), labels, strict=True)):
        left, top = index % columns / columns, 1.0 - index // columns / rows
        width, height = 0.94 / columns, 0.94 * _TILE / ((_TILE + _LINE) * rows)
        axes = figure.add_axes((left + 0.03 / columns, top - height, width, height))
        shown = image[0].numpy() if len(image) == 1 else image.permute(1, 2, 0).numpy()
        axes.imshow(shown, cmap="gray", vmin=0, vmax=255, interpolation="nearest")
        axes.set_axis_off()
        short = label if len(label) <= _LABEL else label[: _LABEL - 1] + "\N{HORIZONTAL ELLIPSIS}"
        axes.text(0.5, -0.04, short, transform=axes.transAxes, ha="center", va="top", fontsize=7, parse_math=False)
    save_figure(path, figure)


def save_steps_grid(path: Path, states: Tensor) -> None:
    """Write a grid of states uint8 [T+1, N, C, H, W], one row per sample and one column per step."""
    save_png(path, grid(states.transpose(0, 1).flatten(0, 1), columns=len(states)))


Curve = Sequence[tuple[float, float]]


def curves_figure(
    metric: str, curve: Curve, references: Mapping[str, float], best: tuple[float, float], others: Mapping[str, Curve]
) -> Figure:
    """Plot the score by iteration with the references as lines, and small panels of logged metrics.

    Args:
        metric: key of the score.
        curve: (iteration, score) on the selection noise, which is used to choose the best checkpoint.
        references: scores on the report noise by name, drawn as horizontal lines.
        best: iteration of the best checkpoint and its score on the report noise, drawn as a star.
        others: logged metrics by key, as (iteration, value).
    """
    figure = Figure(figsize=_CURVES)
    lines = len(references) + 2
    axes = _placed(figure, 1, left=0.75, right=6.35, top=_CURVES[1] - 0.1 - _ENTRY * math.ceil(lines / 2))[0]
    axes.plot(*_columns(curve), marker="o", markersize=3, color="C0", label="fine-tuned (selection noise)")
    label = f"best  {score_text(best[1])} (report noise, like the lines)"
    axes.plot(*best, marker="*", markersize=13, color="C0", linestyle="none", label=label)
    for index, (name, value) in enumerate(references.items(), start=1):
        axes.axhline(value, color=f"C{index}", linestyle="--", linewidth=1, label=f"{name}  {score_text(value)}")
    shown = [value for _, value in (*curve, best)] + list(references.values())
    yscale = "log" if min(shown) > 0.0 else "linear"
    axes.set(xlabel="iteration", ylabel=metric.removeprefix("eval/"), yscale=yscale)
    for which in ("major", "minor"):
        getattr(axes.yaxis, f"set_{which}_formatter")(FormatStrFormatter("%g"))
    axes.tick_params(axis="y", which="minor", labelsize=8)
    axes.grid(axis="y", which="both", color="0.92")
    # Above the axes, no curve hides the legend, and Matplotlib does not search for the best location, which is slow.
    axes.legend(loc="lower left", bbox_to_anchor=(0.0, 1.0), ncols=2, frameon=False, fontsize=8, borderaxespad=0.2)
    _draw_others(figure, others)
    return figure


def _placed(figure: Figure, rows: int, *, left: float, right: float, top: float) -> list[Axes]:
    """Create a column of axes between edges in inches, without a layout engine, which would draw the figure twice."""
    width, height = figure.get_size_inches()
    edges = {"left": left / width, "right": right / width, "bottom": 0.5 / height, "top": top / height}
    return list(figure.subplots(rows, 1, sharex=True, squeeze=False, gridspec_kw={**edges, "hspace": 0.45})[:, 0])


def _columns(curve: Curve) -> tuple[list[float], list[float]]:
    return [x for x, _ in curve], [y for _, y in curve]


def _draw_others(figure: Figure, others: Mapping[str, Curve]) -> None:
    shown = {key: curve for key, curve in others.items() if curve}
    if not shown:
        return
    panels = _placed(figure, len(shown), left=7.2, right=_CURVES[0] - 0.15, top=_CURVES[1] - 0.25)
    for axes, (key, curve) in zip(panels, shown.items(), strict=True):
        axes.plot(*_columns(curve), linewidth=1, color="0.3")
        axes.yaxis.set_major_locator(MaxNLocator(3))
        axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
        axes.set_title(key, loc="left", fontsize=8, y=1.0)
        axes.tick_params(labelsize=7)


def save_figure(path: Path, figure: Figure) -> None:
    """Write a figure as PNG."""
    buffer = io.BytesIO()
    figure.savefig(buffer, format="png", dpi=110)
    write_atomic(path, buffer.getvalue())
