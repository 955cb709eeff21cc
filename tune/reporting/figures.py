"""Figures of a study: score curves, parallel coordinates, slices, importances, the Pareto front.

Each figure's label (`figure.get_label()`) describes it as text. The colors are from the color-blind-safe palette of
Okabe and Ito and have the same meaning in all figures: for example, the best trial is vermilion.
"""

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import optuna
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.collections import LineCollection
from matplotlib.figure import Figure
from matplotlib.lines import Line2D
from matplotlib.ticker import FixedLocator, FormatStrFormatter, MaxNLocator, NullLocator
from optuna.distributions import BaseDistribution, CategoricalDistribution, FloatDistribution, IntDistribution
from optuna.importance import FanovaImportanceEvaluator, get_param_importances
from optuna.trial import create_trial

from dxmi.evaluation.scored_references import DATA, Role, ScoredReference, data_label, scored_references
from dxmi.metrics.keys import sign_of
from tune.config.sweep import ObjectiveConfig
from tune.plans.sweep import Plan
from tune.search.space import Axis, Param, Value, show
from tune.studies.leaderboard import best_of, better, metric_label, number, short_names, summary_of
from tune.studies.ranking import pareto_front, ranked
from tune.studies.records import TrialRecord, TrialState
from tune.studies.study import Study

INK, MUTED, FAINT = "#24292f", "#656d76", "#d0d7de"
BEST, COMPLETE, FAILURE, ASIDE = "#d55e00", "#0072b2", "#cc79a7", "#8c959f"
_SCORES = colormaps["viridis"]
WIDTH = 9.5
SMALL, NORMAL = 8, 9
_MAX_LABEL = 16
_MIN_IMPORTANCE_TRIALS = 6
_CROWD = 20
"""If there are more trials than this, they are drawn paler."""

Curves = Mapping[int, Mapping[int, float]]


def study_figures(study: Study, records: Sequence[TrialRecord]) -> dict[str, Figure]:
    """Draw those figures of a study for which there are data: curves, pareto, parallel, slices, importances."""
    plan, figures = study.plan, {}
    complete = _complete(records)
    numbers = {record.number for record in records}
    curves = {n: curve for n, curve in study.curves().items() if n in numbers and curve}
    if curves:
        figures["curves"] = score_curves(plan, records, curves)
    if len(plan.objectives) > 1 and complete:
        figures["pareto"] = pareto(plan, records)
    if len(plan.axes) > 1 and len(complete) > 1:
        figures["parallel"] = parallel_coordinates(plan, records)
    if complete:
        figures["slices"] = slices(plan, records)
    if not importance_obstacle(plan, records):
        figures["importances"] = importance_bars(plan, importances(plan, records), len(complete))
    return figures


def _complete(records: Iterable[TrialRecord]) -> list[TrialRecord]:
    return [record for record in records if record.state is TrialState.COMPLETE]


def _first(record: TrialRecord) -> float:
    return record.outcome.objectives[0]


# ----------------------------------------------------------------------------
# References


@dataclass(frozen=True)
class StudyReference:
    """A sampler without fine-tuning, or the data itself, scored like the trials.

    Attributes:
        label: human-readable name.
        low: lowest score over the trials.
        high: highest score over the trials.
        is_shared: whether it is the same for all trials, up to rounding on different machines.
        role: its role in the comparison; None for the data.
        evaluations: minimum and maximum number of network evaluations per sample over the trials; None for the data.
    """

    label: str
    low: float
    high: float
    is_shared: bool
    role: Role | None = None
    evaluations: tuple[int, int] | None = None


def references(records: Iterable[TrialRecord]) -> list[StudyReference]:
    """Collect all references from the summaries of the complete trials.

    If a searched setting affects a reference (such as the number of steps or the seed), its scores differ by trial.
    """
    found: dict[tuple[str, str], list[ScoredReference]] = {}
    data: list[float] = []
    for summary in map(summary_of, _complete(records)):
        for reference in scored_references(summary) if summary else ():
            found.setdefault(reference.kind, []).append(reference)
        if summary and DATA in summary["reference"]:
            data.append(float(summary["reference"][DATA]))
            label = data_label(summary)
    floor = [StudyReference(label, min(data), max(data), _is_one(data))] if data else []
    return [*(_reference(scored) for scored in found.values()), *floor]


def _is_one(scores: Sequence[float]) -> bool:
    return math.isclose(min(scores), max(scores), rel_tol=1e-3)


def _reference(scored: Sequence[ScoredReference]) -> StudyReference:
    first, scores = scored[0], [reference.score for reference in scored]
    evaluations = [reference.evaluations for reference in scored]
    is_same = len({reference.label for reference in scored}) == 1
    label = first.label if is_same else f"T steps{first.label.partition(' steps')[2]}"
    return StudyReference(
        label, min(scores), max(scores), is_same and _is_one(scores), first.role, (min(evaluations), max(evaluations))
    )


def shared_highlights(plan: Plan, records: Sequence[TrialRecord]) -> list[StudyReference]:
    """Select the references to draw as lines: those that all trials share; of many and of few steps, only the best."""
    shared = [reference for reference in references(records) if reference.is_shared]
    sign = sign_of(plan.direction)

    def best(role: Role) -> StudyReference | None:
        return min((r for r in shared if r.role is role), key=lambda r: sign * r.low, default=None)

    chosen = (best(Role.FULL), best(Role.FEW))
    return [r for r in shared if r.role in (Role.SHORTENED, None) or r in chosen]


# ----------------------------------------------------------------------------
# Axes and scales


def styled(axes: Axes, *, grid: str = "y") -> Axes:
    """Apply the report's style to axes and return them."""
    axes.set_facecolor("none")
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    for side in ("left", "bottom"):
        axes.spines[side].set_color(FAINT)
    axes.tick_params(colors=MUTED, labelsize=SMALL, length=3)
    axes.xaxis.label.set(color=INK, fontsize=NORMAL)
    axes.yaxis.label.set(color=INK, fontsize=NORMAL)
    axes.grid(axis=grid, color=FAINT, linewidth=0.5)  # type: ignore[arg-type]
    axes.set_axisbelow(True)
    return axes


def _plain(text: str) -> str:
    """Truncate long text and escape dollar signs, which Matplotlib would parse as math."""
    short = text if len(text) <= _MAX_LABEL else text[: _MAX_LABEL - 1] + "…"
    return short.replace("$", r"\$")


def _is_log(values: Iterable[float]) -> bool:
    """Whether scores need a log axis to show differences between the good ones."""
    values = list(values)
    return min(values) > 0.0 and max(values) > 2.0 * min(values)


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    """Return round numbers in [low, high], at most `most`."""
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    best: list[float] = []
    for digits in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), (1, 1.2, 1.5, 2, 2.5, 3, 4, 5, 6, 8)):
        ticks = [float(f"{digit}e{decade}") for decade in decades for digit in digits]
        inside = [tick for tick in ticks if low * 0.999 <= tick <= high * 1.001]
        best = inside if len(inside) <= most else best
    if len(best) < 3:
        best = [tick for tick in MaxNLocator(most - 1).tick_values(low, high) if low <= tick <= high]
    while len(best) > most:
        best = best[::2]
    return best


def _scale_scores(axes: Axes, low: float, high: float, *, log: bool) -> None:
    """Set the y axis to [low, high] with a margin, and readable ticks."""
    if log:
        room = (high / low) ** 0.05
        axes.set_yscale("log")
        axes.set_ylim(low / room, high * room)
        axes.yaxis.set_major_locator(FixedLocator(_log_ticks(low / room, high * room, 8)))
        axes.yaxis.set_minor_locator(NullLocator())
    else:
        room = 0.05 * ((high - low) or abs(high) or 1.0)
        axes.set_ylim(low - room, high + room)
    axes.yaxis.set_major_formatter(FormatStrFormatter("%g"))


def unit(axis: Axis, value: Value) -> float:
    """Return the position of a value on its axis, in 0..1."""
    if axis.kind == "choice":
        place = [json.dumps(choice) for choice in axis.choices].index(json.dumps(value))  # True is not 1
        return place / (len(axis.choices) - 1) if len(axis.choices) > 1 else 0.5
    return _between(axis.low, axis.high, value, log=axis.kind == "log_uniform")


def _between(low: float, high: float, value: float, *, log: bool) -> float:
    if log:
        low, high, value = math.log(low), math.log(high), math.log(value)
    return (value - low) / (high - low) if high > low else 0.5


def _axis_ticks(axis: Axis, most: int) -> list[tuple[float, str]]:
    """Return tick positions in 0..1 with their labels."""
    if axis.kind == "choice":
        return [(unit(axis, choice), _plain(show(choice))) for choice in axis.choices]
    if axis.kind == "log_uniform":
        values = _log_ticks(axis.low, axis.high, most)
    else:
        locator = MaxNLocator(most, integer=axis.kind == "integer")
        values = [tick for tick in locator.tick_values(axis.low, axis.high) if axis.low <= tick <= axis.high]
    return [(unit(axis, value), f"{value:g}") for value in values]


def score_label(plan: Plan, objective: ObjectiveConfig) -> str:
    """Return the label of a score axis: the metric and which direction is better."""
    return f"{metric_label(plan, objective)} ({better(objective)})"


def _is_score(plan: Plan, objective: ObjectiveConfig) -> bool:
    """Whether incomplete trials have this objective too, although on other noise."""
    return objective.metric in ("score", plan.metric)


# ----------------------------------------------------------------------------
# Score curves


def score_curves(plan: Plan, records: Sequence[TrialRecord], curves: Curves) -> Figure:
    """Draw every trial's score against iterations, and the shared references as lines."""
    figure = Figure(figsize=(WIDTH, 4.8), layout="constrained")
    axes = styled(figure.subplots())
    best = best_of(plan, records)
    shown = [record for record in records if record.number in curves]
    for record in shown:
        _draw_curve(axes, record, curves[record.number], best, pale=len(shown) > _CROWD)
    lines = shared_highlights(plan, records)
    low, high = _view([curves[record.number] for record in shown], [line.low for line in lines], plan.direction)
    _scale_scores(axes, low, high, log=_is_log([low, high]))
    axes.set_xlim(left=0)
    axes.set(xlabel="iteration", ylabel=plan.metric.removeprefix("eval/"))
    _draw_references(axes, lines)
    _legend(axes, shown, best)
    figure.set_label(
        f"{plan.metric.removeprefix('eval/')} of {len(shown)} trials against iterations"
        + (f"; trial {best.number} is the best" if best else "")
        + "".join(f"; {line.label}: {number(line.low)}" for line in lines)
    )
    return figure


def _draw_curve(
    axes: Axes, record: TrialRecord, curve: Mapping[int, float], best: TrialRecord | None, *, pale: bool
) -> None:
    steps = sorted(curve)
    scores = [curve[step] for step in steps]
    if best is not None and record.number == best.number:
        axes.plot(steps, scores, color=BEST, linewidth=2.0, zorder=6)
        if record.outcome.step is not None and record.outcome.score is not None:
            axes.plot(record.outcome.step, record.outcome.score, "*", color=BEST, markersize=12, zorder=7)
        return
    color, end, order = _look(record.state)
    alpha = (0.35 if pale else 0.75) if record.state is TrialState.COMPLETE else (0.4 if pale else 0.7)
    axes.plot(steps, scores, color=color, linewidth=1.0, alpha=alpha, zorder=order)
    axes.plot(steps[-1], scores[-1], end, color=color, markersize=4, alpha=min(1.0, 2 * alpha), zorder=order)


def _look(state: TrialState) -> tuple[str, str, float]:
    """Return color, end marker and z-order for a trial's state."""
    if state.is_failure:
        return FAILURE, "x", 4
    if state is TrialState.COMPLETE:
        return COMPLETE, "", 5
    return ASIDE, ">" if state is TrialState.RUNNING else "|", 3


def _view(curves: Sequence[Mapping[int, float]], lines: Sequence[float], direction: str) -> tuple[float, float]:
    """Return the range of the y axis, without extreme scores of trials that blow up."""
    sign = sign_of(direction)
    scores = sorted(sign * score for curve in curves for score in curve.values())
    signed = [sign * line for line in lines]
    limit = max([10.0 * abs(scores[len(scores) // 2]), *signed])
    ends = min([*scores, *signed]), max([*(score for score in scores if score <= limit), *signed])
    return (ends[0], ends[1]) if sign > 0 else (-ends[1], -ends[0])


def _draw_references(axes: Axes, lines: Sequence[StudyReference]) -> None:
    """Draw dashed lines with their names at the right end."""
    low, high = axes.get_ylim()
    log = axes.get_yscale() == "log"
    places = _spread([_between(low, high, line.low, log=log) for line in lines], 0.055)
    for line, place in zip(lines, places, strict=True):
        axes.axhline(line.low, color=INK, linestyle=(0, (4, 3)), linewidth=0.9, zorder=2)
        text = f"{line.label}: {number(line.low)}"
        axes.text(1.01, place, text, transform=axes.transAxes, va="center", fontsize=SMALL, color=INK)


def _spread(places: Sequence[float], gap: float) -> list[float]:
    """Return the positions, moved up where two are closer than the gap."""
    moved: dict[int, float] = {}
    last = -math.inf
    for index in sorted(range(len(places)), key=lambda i: places[i]):
        last = moved[index] = max(places[index], last + gap)
    return [moved[index] for index in range(len(places))]


def _legend(axes: Axes, shown: Sequence[TrialRecord], best: TrialRecord | None) -> None:
    handles = []
    if best is not None:
        label = f"best: trial {best.number}"
        handles.append(Line2D([], [], color=BEST, linewidth=2, marker="*", markersize=9, label=label))
    kinds = {
        "complete": [r for r in shown if r.state is TrialState.COMPLETE and (best is None or r.number != best.number)],
        "stopped early": [r for r in shown if r.state in (TrialState.PRUNED, TrialState.STOPPED)],
        "diverged or failed": [r for r in shown if r.state.is_failure],
        "still running": [r for r in shown if r.state is TrialState.RUNNING],
    }
    for label, of_kind in kinds.items():
        if of_kind:
            color, end, _ = _look(of_kind[0].state)
            handles.append(Line2D([], [], color=color, marker=end, markersize=5, label=f"{label} ({len(of_kind)})"))
    axes.legend(
        handles=handles, loc="lower left", bbox_to_anchor=(0, 1.0), ncols=5, frameon=False, fontsize=SMALL,
        labelcolor=INK, borderaxespad=0.2, handlelength=1.6, columnspacing=1.4,
    )  # fmt: skip


# ----------------------------------------------------------------------------
# Parallel coordinates


def parallel_coordinates(plan: Plan, records: Sequence[TrialRecord]) -> Figure:
    """Draw one line per complete trial through its settings to its first objective, which determines its color."""
    complete = sorted(_complete(records), key=lambda r: -plan.objectives[0].sign * _first(r))
    scores = [_first(record) for record in complete]
    log = _is_log(scores)
    figure = Figure(figsize=(max(WIDTH, len(plan.axes) + 1.5), 4.4), layout="constrained")
    axes = figure.subplots()
    axes.set_axis_off()
    crowded = len(plan.axes) > 5
    axes.set(xlim=(-0.35, len(plan.axes) + 0.35), ylim=(-0.06, 1.2 if crowded else 1.12))
    for index, axis in enumerate(plan.axes):
        height = 1.12 if crowded and index % 2 else 1.05  # long names alternate
        ticks = [(_inset(axis, place), label) for place, label in _axis_ticks(axis, 5)]
        _vertical(axes, index, height, short_names(plan)[axis.path], ticks)
    _draw_lines(axes, plan, complete, log=log)
    _score_axis(axes, plan, scores, log=log)
    objective = plan.objectives[0]
    figure.set_label(
        f"Parallel coordinates of {len(complete)} complete trials: {', '.join(short_names(plan).values())}, "
        f"and {score_label(plan, objective)}"
    )
    return figure


def _vertical(axes: Axes, x: float, height: float, name: str, ticks: Iterable[tuple[float, str]]) -> None:
    axes.plot([x, x], [0, 1], color=MUTED, linewidth=1.0, zorder=4)
    axes.text(x, height, name, ha="center", fontsize=NORMAL, color=INK)
    for place, label in ticks:
        axes.plot([x - 0.03, x], [place, place], color=MUTED, linewidth=0.8, zorder=4)
        axes.text(x - 0.05, place, label, ha="right", va="center", fontsize=SMALL, color=INK, zorder=8, bbox=_halo())


def _inset(axis: Axis, place: float) -> float:
    """Return a position with margins at both ends of a choice axis, so that lines of one choice can be spread."""
    return 0.1 + 0.8 * place if axis.kind == "choice" else place


def _height(axis: Axis, record: TrialRecord) -> float:
    """Return the height at which a trial's line crosses a setting's axis."""
    return _inset(axis, unit(axis, record.values[axis.path]) + 0.2 * _jitter(axis, record))


def _halo() -> dict[str, object]:
    """Return the style of the box behind a label that lines cross."""
    return {"facecolor": "white", "alpha": 0.8, "edgecolor": "none", "pad": 0.8}


def _draw_lines(axes: Axes, plan: Plan, complete: Sequence[TrialRecord], *, log: bool) -> None:
    """Draw the lines from the worst to the best trial, so that the best is on top."""
    scores = [_first(record) for record in complete]
    low, high = min(scores), max(scores)
    paths = [
        [
            *((index, _height(axis, record)) for index, axis in enumerate(plan.axes)),
            (len(plan.axes), _between(low, high, _first(record), log=log)),
        ]
        for record in complete
    ]
    colors = [_score_color(plan, path[-1][1]) for path in paths]
    width = 0.9 if len(complete) > _CROWD else 1.4
    axes.add_collection(LineCollection(paths[:-1], colors=colors[:-1], linewidths=width, alpha=0.75, zorder=3))
    axes.add_collection(LineCollection(paths[-1:], colors=BEST, linewidths=2.4, zorder=5))


def _score_color(plan: Plan, place: float) -> tuple[float, float, float, float]:
    """Return the color of a score, darker for better; `place` is its position on the axis, 0 at the bottom."""
    badness = place if plan.objectives[0].direction == "minimize" else 1.0 - place
    red, green, blue, _ = _SCORES(0.92 * badness)
    return red, green, blue, 1.0


def _score_axis(axes: Axes, plan: Plan, scores: Sequence[float], *, log: bool) -> None:
    """Draw the last axis: the first objective, in the colors of the lines."""
    x, low, high = len(plan.axes), min(scores), max(scores)
    bits = [[(x, step / 32), (x, 1.0)] for step in range(32)]  # overlapping, to avoid seams
    colors = [_score_color(plan, (step + 0.5) / 32) for step in range(32)]
    axes.add_collection(LineCollection(bits, colors=colors, linewidths=6, zorder=4, capstyle="butt"))
    objective = plan.objectives[0]
    name = metric_label(plan, objective)
    axes.text(x, 1.05, name, ha="center", fontsize=NORMAL, color=INK, fontweight="bold")
    ticks = _log_ticks(low, high, 6) if log else [t for t in MaxNLocator(5).tick_values(low, high) if low <= t <= high]
    for tick in ticks:
        place = _between(low, high, tick, log=log)
        axes.text(x + 0.08, place, f"{tick:g}", va="center", fontsize=SMALL, color=INK)


# ----------------------------------------------------------------------------
# Slices


def slices(plan: Plan, records: Sequence[TrialRecord]) -> Figure:
    """Draw the first objective against each setting; trials that were stopped early are hollow."""
    objective = plan.objectives[0]
    best, *others = [record for record in ranked(plan, records) if record.state is TrialState.COMPLETE]
    hollow = _stopped_early(records) if _is_score(plan, objective) else []
    low, high = _slices_view([_first(record) for record in (best, *others)], [value for _, value in hollow])
    columns = min(len(plan.axes), 3)
    rows = -(-len(plan.axes) // columns)
    figure = Figure(figsize=(WIDTH, 2.7 * rows + 0.2), layout="constrained")
    panels = figure.subplots(rows, columns, sharey=True, squeeze=False, gridspec_kw={"wspace": 0.08}).flatten()
    for panel, axis in zip(panels, plan.axes, strict=False):
        styled(panel, grid="both")
        _dots(panel, axis, hollow, hollow=True)
        _dots(panel, axis, [(record, _first(record)) for record in others], hollow=False)
        panel.plot(_sideways(axis, best), _first(best), "*", color=BEST, markersize=12, markeredgewidth=0, zorder=5)
        _label_slice(panel, axis, short_names(plan)[axis.path])
    for panel in panels[len(plan.axes) :]:
        panel.set_axis_off()
    _scale_scores(panels[0], low, high, log=_is_log([low, high]))
    for panel in panels[::columns]:
        panel.set_ylabel(metric_label(plan, objective))
    figure.set_label(
        f"{score_label(plan, objective)} of {1 + len(others)} complete trials against each of "
        f"{', '.join(short_names(plan).values())}" + (f"; {len(hollow)} stopped early are hollow" if hollow else "")
    )
    return figure


def _stopped_early(records: Iterable[TrialRecord]) -> list[tuple[TrialRecord, float]]:
    """Return trials that were stopped early with their best score, on the noise used to select the checkpoint."""
    stopped = (record for record in records if record.state in (TrialState.PRUNED, TrialState.STOPPED))
    return [(record, record.outcome.score) for record in stopped if record.outcome.score is not None]


def _slices_view(complete: Sequence[float], aside: Sequence[float]) -> tuple[float, float]:
    limit = 10.0 * max(abs(value) for value in complete)
    values = [*complete, *(value for value in aside if abs(value) <= limit)]
    return min(values), max(values)


def _dots(axes: Axes, axis: Axis, points: Sequence[tuple[TrialRecord, float]], *, hollow: bool) -> None:
    axes.plot(
        [_sideways(axis, record) for record, _ in points],
        [value for _, value in points],
        linestyle="none", marker="o", markersize=4.5, zorder=3,
        alpha=0.55 if len(points) > _CROWD else 0.85,
        color=ASIDE if hollow else COMPLETE,
        markerfacecolor="none" if hollow else COMPLETE,
        markeredgewidth=0.9 if hollow else 0.0,
    )  # fmt: skip


def _sideways(axis: Axis, record: TrialRecord) -> float:
    """Return the horizontal position of a trial on a setting's axis.

    Trials with the same choice are spread by multiples of the golden ratio, so that they do not hide each other.
    """
    return unit(axis, record.values[axis.path]) + 0.35 * _jitter(axis, record)


def _jitter(axis: Axis, record: TrialRecord) -> float:
    """Return an offset of at most half the distance between two choices; 0 for other axes."""
    return ((record.number * 0.618034) % 1.0 - 0.5) / max(1, len(axis.choices) - 1) if axis.kind == "choice" else 0.0


def _label_slice(axes: Axes, axis: Axis, name: str) -> None:
    ticks = _axis_ticks(axis, 5)
    turned = axis.kind == "choice" and sum(len(label) for _, label in ticks) > 26
    margin = 0.5 / max(1, len(axis.choices) - 1) if axis.kind == "choice" else 0.04
    axes.set_xlim(-margin, 1 + margin)
    axes.set_xticks([place for place, _ in ticks], [label for _, label in ticks])
    if turned:
        axes.tick_params(axis="x", rotation=25)
    axes.set_xlabel(f"{name} (log)" if axis.kind == "log_uniform" else name)


# ----------------------------------------------------------------------------
# Importances


def importance_obstacle(plan: Plan, records: Sequence[TrialRecord]) -> str:
    """Explain why importances cannot be estimated; empty if they can."""
    scores = [_first(record) for record in _complete(records)]
    if len(plan.axes) < 2:
        return "Only one setting varies, so there are no importances to compare."
    if len(scores) < _MIN_IMPORTANCE_TRIALS:
        return (
            f"Importances are estimated from at least {_MIN_IMPORTANCE_TRIALS} complete trials; there are "
            f"{len(scores)}."
        )
    if len(set(scores)) == 1:
        return "All complete trials have the same result, so importances are undefined."
    return ""


def importances(plan: Plan, records: Sequence[TrialRecord]) -> dict[str, float]:
    """Return the share of the first objective's variance explained by each setting by itself, largest first.

    Uses functional ANOVA over a random forest (Hutter et al. 2014) with a fixed seed, on complete trials only, since
    these have the same number of iterations. Values are scaled as they were searched: log-uniform ones by logarithm.
    """
    study = optuna.create_study()
    distributions = {axis.path: _as_searched(axis) for axis in plan.axes}
    for record in _complete(records):
        params = {axis.path: _searched_value(axis, record.values[axis.path]) for axis in plan.axes}
        study.add_trial(create_trial(params=params, distributions=distributions, value=_first(record)))
    return get_param_importances(study, evaluator=FanovaImportanceEvaluator(seed=0))


def _as_searched(axis: Axis) -> BaseDistribution:
    """Return an axis as a distribution; log ranges are rescaled since Optuna's evaluator treats them as linear."""
    if axis.kind == "choice":
        return CategoricalDistribution([axis.param(choice) for choice in axis.choices])
    if axis.kind == "integer":
        return IntDistribution(int(axis.low), int(axis.high))
    return FloatDistribution(0.0, 1.0)


def _searched_value(axis: Axis, value: Value) -> Param:
    if axis.kind in ("choice", "integer"):
        return axis.param(value)
    return min(1.0, max(0.0, unit(axis, value)))


def importance_bars(plan: Plan, shares: Mapping[str, float], num_trials: int) -> Figure:
    """Draw importances as bars, the largest on top."""
    names = short_names(plan)
    figure = Figure(figsize=(WIDTH, 0.3 * len(shares) + 0.75), layout="constrained")
    axes = styled(figure.subplots(), grid="x")
    places = range(len(shares), 0, -1)
    axes.barh(list(places), list(shares.values()), height=0.62, color=COMPLETE)
    for place, share in zip(places, shares.values(), strict=True):
        axes.text(share + 0.008, place, f"{share:.0%}", va="center", fontsize=SMALL, color=INK)
    axes.set_yticks(list(places), [names[path] for path in shares])
    axes.tick_params(axis="y", labelsize=NORMAL, labelcolor=INK, length=0)
    axes.set_xlim(0, max(shares.values()) * 1.12)
    axes.xaxis.set_major_formatter(lambda share, _: f"{share:.0%}")
    axes.set_xlabel(f"share of the variance of {metric_label(plan, plan.objectives[0])} over {num_trials} trials")
    axes.spines["left"].set_visible(False)
    figure.set_label("Importance: " + ", ".join(f"{names[path]} {share:.0%}" for path, share in shares.items()))
    return figure


# ----------------------------------------------------------------------------
# The Pareto front


def pareto(plan: Plan, records: Sequence[TrialRecord]) -> Figure:
    """Draw the first objective against the second, with the Pareto front."""
    first, second = plan.objectives
    complete, front = _complete(records), pareto_front(plan, records)
    on_front = {record.number for record in front}
    figure = Figure(figsize=(WIDTH, 4.6), layout="constrained")
    axes = styled(figure.subplots(), grid="both")
    beaten = [record.outcome.objectives for record in complete if record.number not in on_front]
    axes.plot([p[1] for p in beaten], [p[0] for p in beaten], "o", color=ASIDE, markersize=4.5, alpha=0.6)
    points = sorted((record.outcome.objectives[1], record.outcome.objectives[0]) for record in front)
    axes.plot(*zip(*points, strict=True), color=BEST, linewidth=1.2, drawstyle=_steps(second))
    axes.plot(*zip(*points, strict=True), "o", color=BEST, markersize=7)
    for record in front:
        y, x = record.outcome.objectives
        axes.annotate(f"{record.number}", (x, y), (6, 6), textcoords="offset points", fontsize=SMALL, color=INK)
    scores = [_first(record) for record in complete]
    _scale_scores(axes, min(scores), max(scores), log=_is_log(scores))
    axes.xaxis.set_major_locator(MaxNLocator(8, integer=second.metric == "num_steps"))
    axes.set(xlabel=score_label(plan, second), ylabel=score_label(plan, first))
    figure.set_label(
        f"{len(complete)} complete trials by {metric_label(plan, first)} and {metric_label(plan, second)}; the front "
        f"consists of trials {', '.join(str(record.number) for record in front)}"
    )
    return figure


def _steps(second: ObjectiveConfig) -> str:
    """Return the draw style of the front: a staircase, since points between two trials are not attained."""
    return "steps-post" if second.direction == "minimize" else "steps-pre"
