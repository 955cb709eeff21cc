"""Figures of an ablation: a forest plot, score curves by arm, interactions, and reward against divergence.

Colors have the same meaning as in `tune.reporting.figures`; the baseline is gray, and an arm has the color of its
verdict.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import FormatStrFormatter

from dxmi.metrics.keys import KL_KEY
from dxmi.persistence.run_directory import RunDirectory
from tune.plans.arms import BASELINE
from tune.reporting.figures import ASIDE, BEST, COMPLETE, INK, MUTED, NORMAL, SMALL, WIDTH, score_label, styled
from tune.stats.comparison import Comparison, Verdict
from tune.stats.intervals import Interval, mean_interval
from tune.stats.tests import p_text
from tune.studies.arm_results import Results

_COLORS = {
    Verdict.BETTER: COMPLETE,
    Verdict.WORSE: BEST,
    Verdict.NO_DIFFERENCE: MUTED,
    Verdict.TOO_FEW_SEEDS: "#b08800",
    Verdict.FAILED: BEST,
    Verdict.UNFINISHED: "#b08800",
}
_COLUMNS = 3
_PATHS = (COMPLETE, BEST, "#009e73", "#cc79a7", "#b08800", "#0072b2", "#56b4e9", MUTED)
_FAR = 1_000.0
"""Divergence in nats above which its axis is logarithmic."""
Curve = Mapping[int, float]


def ablation_figures(results: Results, curves: Mapping[int, Curve]) -> dict[str, Figure]:
    """Draw those figures of an ablation for which there are data: forest, arms, interactions, frontier."""
    figures = {}
    if results.comparisons:
        figures["forest"] = forest(results)
    if any(curves.values()):
        figures["arms"] = arm_curves(results, curves)
    if results.effects:
        figures["interactions"] = interactions(results)
    paths = frontier_paths(results)
    if paths:
        figures["frontier"] = frontier(results, paths)
    return figures


# ----------------------------------------------------------------------------
# Differences


def forest(results: Results) -> Figure:
    """Draw each arm's difference from the baseline with its interval and verdict."""
    found = results.comparisons
    figure = Figure(figsize=(WIDTH, 1.3 + 0.36 * len(found)), layout="constrained")
    axes = styled(figure.subplots(), grid="x")
    for row, comparison in enumerate(found):
        _draw_difference(axes, row, comparison)
    axes.axvline(0.0, color=INK, linewidth=0.9, zorder=2)
    axes.set_yticks(range(len(found)), [comparison.arm for comparison in found])
    axes.tick_params(axis="y", labelsize=NORMAL, labelcolor=INK, length=0)
    axes.set_ylim(len(found) - 0.4, -0.6)
    objective = results.plan.objectives[0]
    axes.set_xlabel(
        f"{score_label(results.plan, objective)}: arm minus baseline, with {_percent(found[0].difference)} interval"
    )
    figure.set_label("; ".join(f"{comparison.arm}: {comparison}" for comparison in found))
    return figure


def _draw_difference(axes: Axes, row: int, comparison: Comparison) -> None:
    interval, color = comparison.difference, _COLORS[comparison.verdict]
    if math.isfinite(interval.low) and math.isfinite(interval.high):
        axes.plot(
            [interval.low, interval.high], [row, row], color=color, linewidth=2.2, solid_capstyle="butt", zorder=3
        )
    if math.isfinite(interval.estimate):
        axes.plot(interval.estimate, row, "o", color=color, markersize=6, zorder=4)
    tested = "" if comparison.gaps else f" ({p_text(comparison.p_adjusted)}, {comparison.seeds} seeds)"
    text = f"{comparison.verdict_text}{tested}"
    axes.text(1.01, row, text, transform=axes.get_yaxis_transform(), va="center", fontsize=SMALL, color=color)


def _percent(interval: Interval) -> str:
    return f"{100.0 * interval.level:g} %"


# ----------------------------------------------------------------------------
# Curves


def arm_curves(results: Results, curves: Mapping[int, Curve]) -> Figure:
    """Draw one panel per arm: mean score over the seeds against iterations with its interval, and the baseline's."""
    arms = [arm.name for arm in results.plan.arms if arm.name != BASELINE]
    columns = min(_COLUMNS, max(1, len(arms)))
    rows = math.ceil(max(1, len(arms)) / columns)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.1 * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, sharex=True, sharey=True)).ravel()
    colors = {comparison.arm: _COLORS[comparison.verdict] for comparison in results.comparisons}
    baseline = _of_arm(results, curves, BASELINE)
    for panel, name in itertools.zip_longest(panels, arms):
        if name is None:
            panel.set_visible(False)
            continue
        styled(panel)
        _draw_band(panel, baseline, ASIDE)
        _draw_band(panel, _of_arm(results, curves, name), colors.get(name, COMPLETE))
        gaps = results.gaps.get(name, "")
        panel.set_title(f"{name}\n{gaps}" if gaps else name, fontsize=NORMAL, color=INK, loc="left")
    scores = [score for curve in curves.values() for score in curve.values()]
    if scores and min(scores) > 0.0 and max(scores) > 2.0 * min(scores):
        panels[0].set_yscale("log")
        panels[0].yaxis.set_major_formatter(FormatStrFormatter("%g"))
    figure.supxlabel("iteration", fontsize=NORMAL, color=INK)
    figure.supylabel(results.plan.metric.removeprefix("eval/"), fontsize=NORMAL, color=INK)
    figure.set_label(
        f"mean {results.plan.metric.removeprefix('eval/')} over the seeds against iterations, {len(arms)} arms"
    )
    return figure


def _of_arm(results: Results, curves: Mapping[int, Curve], arm: str) -> list[Curve]:
    """Return the score curves of an arm, one per seed."""
    records = (results.records.get((arm, seed)) for seed in results.seeds)
    return [curves[record.number] for record in records if record is not None and curves.get(record.number)]


def _draw_band(axes: Axes, curves: Sequence[Curve], color: str) -> None:
    """Draw the mean at the iterations that all curves share, with its interval if there are at least two curves."""
    if not curves:
        return
    steps = sorted(set.intersection(*(set(curve) for curve in curves)))
    values = np.array([[curve[step] for step in steps] for curve in curves])  # [seeds, steps]
    axes.plot(steps, values.mean(axis=0), color=color, linewidth=1.6, zorder=4)
    if len(curves) > 1:
        intervals = [mean_interval(values[:, index]) for index in range(len(steps))]
        low = [max(interval.low, 0.2 * interval.estimate) for interval in intervals]  # 0 cannot be shown on a log axis
        axes.fill_between(steps, low, [interval.high for interval in intervals], color=color, alpha=0.2, linewidth=0)


# ----------------------------------------------------------------------------
# Reward against divergence


@dataclass(frozen=True)
class FrontierPath:
    """The mean course of an arm, one entry per evaluated iteration.

    Attributes:
        divergence: KL divergence from the pretrained policy in nats, mean over the seeds.
        score: Primary score, mean over the seeds.
        low: Lower end of the score's interval.
        high: Upper end of it.
    """

    divergence: list[float]
    score: list[float]
    low: list[float]
    high: list[float]


def frontier_paths(results: Results) -> dict[str, FrontierPath]:
    """The course of every arm whose runs log their divergence from the pretrained policy, by name."""
    found = {}
    for arm in results.plan.arms:
        records = (results.records.get((arm.name, seed)) for seed in results.seeds)
        runs = [_divergences(record.run, results.plan.metric) for record in records if record is not None]
        path = _mean_path([run for run in runs if run])
        if path is not None:
            found[arm.name] = path
    return found


def _divergences(run: RunDirectory, metric: str) -> dict[int, tuple[float, float]]:
    """Divergence and score by iteration; empty if the run logs no divergence."""
    rows = [row for row in run.rows() if KL_KEY.name in row and metric in row]
    return {int(row["step"]): (float(row[KL_KEY.name]), float(row[metric])) for row in rows}


def _mean_path(runs: Sequence[Mapping[int, tuple[float, float]]]) -> FrontierPath | None:
    """The means at the iterations that all runs share."""
    if not runs:
        return None
    steps = sorted(set.intersection(*(set(run) for run in runs)))
    values = np.array([[run[step] for step in steps] for run in runs])  # [seeds, steps, 2]
    intervals = [mean_interval(values[:, index, 1]) for index in range(len(steps))] if len(runs) > 1 else []
    means = values.mean(axis=0)
    score = means[:, 1].tolist()
    low = [interval.low for interval in intervals] or score
    high = [interval.high for interval in intervals] or score
    return FrontierPath(means[:, 0].tolist(), score, low, high)


def frontier(results: Results, paths: Mapping[str, FrontierPath]) -> Figure:
    """Draw the score of every arm against its divergence from the pretrained policy, at equal iterations.

    Algorithms are compared at equal divergence: the upper left is better if the score is maximized.
    """
    figure = Figure(figsize=(WIDTH, 4.2), layout="constrained")
    axes = styled(figure.subplots())
    for index, (name, path) in enumerate(paths.items()):
        again, number = divmod(index, len(_PATHS))  # further arms have the same colors with other lines
        color = INK if name == BASELINE else _PATHS[number]
        style = ("o-", "s--", "^:")[again % 3]
        axes.plot(path.divergence, path.score, style, color=color, linewidth=1.4, markersize=3, label=name)
        axes.fill_between(path.divergence, path.low, path.high, color=color, alpha=0.15, linewidth=0)
    if max(max(path.divergence) for path in paths.values()) > _FAR:
        axes.set_xscale("symlog", linthresh=_FAR / 10.0)
    axes.set_xlabel("KL divergence from the pretrained policy, nats per trajectory")
    axes.set_ylabel(results.plan.metric.removeprefix("eval/"))
    axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK, loc="center left", bbox_to_anchor=(1.0, 0.5))
    ends = (f"{name}: {path.score[-1]:.3g} at {path.divergence[-1]:.3g} nats" for name, path in paths.items())
    figure.set_label("; ".join(ends))
    return figure


# ----------------------------------------------------------------------------
# Interactions


def interactions(results: Results) -> Figure:
    """Draw a panel for each pair of factors: mean scores by the levels of one, with a line per level of the other."""
    factors = list(results.plan.ablation.factors)
    pairs = list(itertools.combinations(factors, 2)) or [(factors[0], factors[0])]
    columns = min(_COLUMNS, len(pairs))
    rows = math.ceil(len(pairs) / columns)
    figure = Figure(figsize=(WIDTH, 0.5 + 2.4 * rows), layout="constrained")
    panels = np.atleast_1d(figure.subplots(rows, columns, sharey=True)).ravel()
    for panel, pair in itertools.zip_longest(panels, pairs):
        if pair is None:
            panel.set_visible(False)
        else:
            _draw_interaction(styled(panel), results, *pair)
    figure.supylabel(score_label(results.plan, results.plan.objectives[0]), fontsize=NORMAL, color=INK)
    effect = results.effects[0]
    if effect.left_out:
        missing = f"means over the {effect.seeds} of {effect.seeds + effect.left_out} seeds without missing runs"
        figure.supxlabel(missing, fontsize=SMALL, color=INK)
    figure.set_label("; ".join(str(effect) for effect in results.effects))
    return figure


def _draw_interaction(axes: Axes, results: Results, across: str, lines: str) -> None:
    factors = results.plan.ablation.factors
    levels = list(factors[across])
    for index, level in enumerate(factors[lines]):
        means = [_mean(results, {across: other, lines: level}) for other in levels]
        color = (COMPLETE, BEST, MUTED, "#009e73", "#cc79a7")[index % 5]
        axes.plot(range(len(levels)), means, "o-", color=color, linewidth=1.4, markersize=4, label=f"{lines} {level}")
    axes.set_xticks(range(len(levels)), levels)
    axes.set_xlabel(across)
    axes.legend(frameon=False, fontsize=SMALL, labelcolor=INK)


def _mean(results: Results, levels: Mapping[str, str]) -> float:
    """Return the mean score of the runs at some levels, over the seeds without missing runs."""
    chosen = [arm.name for arm in results.plan.arms if levels.items() <= arm.levels.items()]
    scores = [results.scores[name][results.complete] for name in chosen]
    return float(np.mean(scores)) if chosen and results.complete.any() else math.nan
