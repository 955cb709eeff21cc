"""Scores against the divergence from the pretrained policy, which show where a reward is over-optimized."""

from collections.abc import Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter, MaxNLocator

from dxmi.formatting import score_text

Rows = Sequence[Mapping[str, Any]]
_WIDTH, _PANEL, _MARGIN = 6.4, 1.35, 0.75
"""Width of the figure, height of a panel and of what surrounds the panels, in inches."""
_FAR = 1000.0
"""Divergence in nats above which the axis is logarithmic."""


def divergence_figure(rows: Rows, divergence: str, scores: Sequence[str]) -> Figure:
    """Plot scores at every evaluation against the divergence from the pretrained policy, one panel each.

    Where the reward still improves and the held-out scores get worse, the reward is over-optimized.

    Args:
        rows: Scores of each evaluation, in order; the first is that before fine-tuning.
        divergence: Key of the divergence.
        scores: Keys of the scores, one panel each.
    """
    height = _MARGIN + _PANEL * len(scores)
    figure = Figure(figsize=(_WIDTH, height))
    edges = {"left": 0.13, "right": 0.97, "bottom": 0.5 / height, "top": 1.0 - 0.25 / height}
    panels = figure.subplots(len(scores), 1, sharex=True, squeeze=False, gridspec_kw={**edges, "hspace": 0.4})[:, 0]
    x = [float(row[divergence]) for row in rows]
    for axes, key in zip(panels, scores, strict=True):
        _draw(axes, x, [float(row[key]) for row in rows], key.removeprefix("eval/"))
    if max(x) > _FAR:
        panels[-1].set_xscale("symlog", linthresh=_FAR / 10.0)
    panels[-1].set_xlabel("KL divergence from the pretrained policy, nats per trajectory")
    return figure


def _draw(axes: Axes, x: Sequence[float], y: Sequence[float], title: str) -> None:
    """Draw one score; its value before fine-tuning is a dashed line."""
    axes.axhline(y[0], color="0.6", linestyle="--", linewidth=1)
    axes.plot(x, y, marker="o", markersize=3, color="C0")
    axes.set_title(f"{title}: {score_text(y[0])} to {score_text(y[-1])}", loc="left", fontsize=9)
    axes.yaxis.set_major_locator(MaxNLocator(4))
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))
    axes.grid(axis="y", color="0.92")
    axes.tick_params(labelsize=8)
