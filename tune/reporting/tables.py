"""Tables of the HTML report: trials, arms, samplers, the search space, the Pareto front, and failures."""

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from markupsafe import Markup, escape

from dxmi.evaluation.scored_references import DATA, best_reference, data_label, scored_references
from dxmi.metrics.keys import is_better
from tune.plans.arms import Arm, two_level_design
from tune.plans.sweep import Plan, fidelity_keys
from tune.reporting.figures import StudyReference, references
from tune.reporting.sentences import FEW, score_of
from tune.reporting.study_tables import fresh_columns
from tune.search.space import Axis, show
from tune.stats.comparison import Comparison
from tune.stats.summary import ArmSummary
from tune.studies.arm_results import (
    Results,
    changes_text,
    mean_text,
    notes,
    other_labels,
    p_cell,
    p_label,
    p_note,
    verdict_text,
)
from tune.studies.leaderboard import (
    FRESH,
    NOT_COMPARABLE,
    NOT_COMPUTED,
    SPREAD,
    best_of,
    better,
    fidelity_columns,
    leaderboard,
    metric_label,
    number,
    objective_columns,
    settings,
    short_names,
    summary_of,
)
from tune.studies.ranking import pareto_front
from tune.studies.records import TrialRecord, TrialState
from tune.studies.study import Study

_SCROLLING_ROWS = 40
"""Tables with more rows scroll in a frame."""
_MANY_COLUMNS = 7
"""Tables with more columns use a smaller font."""


_WHOLE = re.compile(r"(?P<interval>\[[^][<]*\])|(?P<numeral>\b\d[\d.]*e-\d+\b)")
"""What stays on one line: an interval if there is room for it, and a number with a hyphen."""


def breakable(text: str) -> Markup:
    """Escape text; lines may break in long names after dots, dashes, slashes and underscores, but not in numbers."""
    broken = re.sub(r"(?<=[A-Za-z0-9][._/-])(?=[A-Za-z])", "<wbr>", str(escape(text)))
    return Markup(_WHOLE.sub(lambda m: f'<span class="{m.lastgroup}">{m[0]}</span>', broken))  # noqa: S704  (escaped)


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: its text.
        key: its sort key; empty keys come last.
        style: CSS classes.
    """

    text: str
    key: str = ""
    style: str = ""


@dataclass(frozen=True)
class HtmlTable:
    """A table.

    Attributes:
        headings: text, tooltip and CSS classes of each column.
        rows: CSS classes and cells of each row.
    """

    headings: list[tuple[str, str, str]]
    rows: list[tuple[str, list[Cell]]]

    @property
    def is_long(self) -> bool:
        """Whether it scrolls in a frame."""
        return len(self.rows) > _SCROLLING_ROWS

    @property
    def is_wide(self) -> bool:
        """Whether it uses a smaller font so that all columns fit on a page."""
        return len(self.headings) > _MANY_COLUMNS


def _number_cell(value: Any, text: str, style: str = "number") -> Cell:
    """Return the cell of a number, empty if the value is missing."""
    return Cell("", "", style) if pd.isna(value) else Cell(text, repr(float(value)), style)


def _count_cell(value: Any) -> Cell:
    return _number_cell(value, str(value))


def _metric_cell(value: Any, metric: str) -> Cell:
    return _number_cell(value, "" if pd.isna(value) else number(float(value), metric))


def _value_cell(axis: Axis, value: Any) -> Cell:
    """Return the cell of a setting's value."""
    return Cell(show(value), show(value)) if axis.kind == "choice" else _number_cell(value, show(value))


def _value_heading(plan: Plan, axis: Axis) -> tuple[str, str, str]:
    return short_names(plan)[axis.path], axis.path, "" if axis.kind == "choice" else "number"


def _settings_fit(plan: Plan) -> bool:
    """Whether an 800-pixel page has room for one column per setting in addition to precision and recall."""
    return len(plan.axes) + len(fidelity_columns(plan)) < FEW


def _setting_headings(plan: Plan) -> list[tuple[str, str, str]]:
    """Return one heading per setting, or a single one if there are too many for a page."""
    if not _settings_fit(plan):
        return [("settings", "settings that vary", "")]
    return [_value_heading(plan, axis) for axis in plan.axes]


def _setting_cells(plan: Plan, values: Mapping[Any, Any]) -> list[Cell]:
    """Return the cells below `_setting_headings`."""
    if _settings_fit(plan):
        return [_value_cell(axis, values[axis.path]) for axis in plan.axes]
    names = short_names(plan)
    return [Cell(", ".join(f"{names[axis.path]} {show(values[axis.path])}" for axis in plan.axes), "", "wrap")]


def board_table(plan: Plan, records: Sequence[TrialRecord]) -> HtmlTable:
    """Build the leaderboard."""
    frame = leaderboard(plan, records)
    objectives = [name for name in objective_columns(plan) if name != "score"]
    listed = frame.to_dict("records")
    fidelity, fresh = fidelity_columns(plan), fresh_columns(listed)
    spread = [SPREAD] if SPREAD in frame.columns else []
    headings = [
        ("#", "rank", "number"),
        ("trial", "trial", "number"),
        ("state", "state", ""),
        *((name.removeprefix("eval/"), name, "number") for name in objectives),
        ("score", plan.metric, "number"),
        *((SPREAD, f"standard deviation over the {len(plan.trial_seeds)} seeds", "number") for _ in spread),
        *((name.removeprefix("eval/"), f"{name} of the best checkpoint", "number") for name in fidelity),
        *((name.replace("_", " ", 1), "on noise that was not used to select the trial", "number") for name in fresh),
        ("step", "iteration of the best checkpoint", "number"),
        *_setting_headings(plan),
        ("seconds", "wall time of the trial", "number"),
        ("checkpoint, or reason", "checkpoints are relative to the study's folder", ""),
    ]
    rows = [_board_row(plan, row, objectives, [*spread, *fidelity, *fresh]) for row in listed]
    return HtmlTable(headings, rows)


def _board_row(
    plan: Plan, row: Mapping[Any, Any], objectives: Sequence[str], beside: Sequence[str]
) -> tuple[str, list[Cell]]:
    is_complete = row["state"] == TrialState.COMPLETE
    score = "" if pd.isna(row["score"]) else number(float(row["score"])) + ("" if is_complete else NOT_COMPARABLE)
    cells = [
        _count_cell(row["rank"]),
        _count_cell(row["trial"]),
        Cell(row["state"], row["state"], "state"),
        *(_metric_cell(row[name], name) for name in objectives),
        _number_cell(row["score"], score, "number score"),
        *(_beside_cell(row[name], name) for name in beside),
        _count_cell(row["step"]),
        *_setting_cells(plan, row),
        _number_cell(row["seconds"], "" if pd.isna(row["seconds"]) else f"{row['seconds']:,.0f}"),
        _ending_cell(row["checkpoint"] if is_complete else "", row["reason"]),
    ]
    best = " best" if not pd.isna(row["rank"]) and row["rank"] == 1 else ""
    return row["state"] + best, cells


def _beside_cell(value: Any, name: str) -> Cell:
    """Return the cell of an additional score; missing precision and recall are marked as not computed."""
    if pd.isna(value):
        return Cell("" if name == SPREAD or name.startswith(FRESH) else NOT_COMPUTED, "", "number")
    return _metric_cell(value, name)


def _ending_cell(checkpoint: str, reason: str) -> Cell:
    return Cell(checkpoint, checkpoint, "path") if checkpoint else Cell(reason, reason, "reason")


@dataclass(frozen=True)
class _Ablation:
    """The part of a report that is specific to ablations.

    Attributes:
        hypothesis: hypothesis of the ablation.
        arms: table with one row per arm.
        reasons: the reason for each verdict, by arm.
        effects: effects of factors, one line each.
        no_effects: why a factorial design has no effects; empty otherwise.
        notes: sentences about the table.
        design: description of a factorial design; empty for other designs.
        spreads: sources of the variance of the scores, one line per arm.
    """

    hypothesis: str
    arms: HtmlTable
    reasons: list[tuple[str, str]]
    effects: list[str]
    no_effects: str
    notes: list[str]
    design: str
    spreads: list[str]


def ablation_tables(results: Results) -> _Ablation:
    """Collect the contents of the report that are specific to ablations."""
    design = two_level_design(results.plan.ablation)
    return _Ablation(
        hypothesis=results.plan.ablation.hypothesis.strip(),
        arms=_arms(results),
        reasons=[(comparison.arm, comparison.reason) for comparison in results.comparisons],
        effects=[str(effect) for effect in results.effects],
        no_effects=results.no_effects,
        notes=notes(results),
        design="" if design is None else design.describe(),
        spreads=[
            f"{arm}: {v.training**0.5:.3g} between training seeds, {v.generation**0.5:.3g} between draws of the "
            f"evaluation's noise ({v.training_seeds} x {v.generation_seeds} scores)"
            for arm, v in results.variances.items()
        ],
    )


def _arms(results: Results) -> HtmlTable:
    label = metric_label(results.plan, results.plan.objectives[0])
    headings = [
        ("arm", "name of the arm", ""),
        ("changes to the baseline", "settings that differ from the baseline", ""),
        ("seeds", "number of seeds with a score", "number"),
        ("missing", "runs without a score", ""),
        (label, "mean over the seeds, with its interval", "number"),
        *((name, "mean over the seeds, with its interval", "number") for name in other_labels(results)),
        ("minus baseline", "mean difference at the same seed, with its interval", "number"),
        (p_label(results), p_note(results), "number"),
        ("P(beats baseline)", "probability that a run of the arm is better than a run of the baseline", "number"),
        ("verdict", "", ""),
    ]
    compared = {comparison.arm: comparison for comparison in results.comparisons}
    return HtmlTable(headings, [("", _arm_row(results, arm, compared.get(arm.name))) for arm in results.plan.arms])


def _arm_row(results: Results, arm: Arm, comparison: Comparison | None) -> list[Cell]:
    summary = results.summaries[arm.name]
    mean = str(summary.mean) if summary.seeds > 1 else ""
    cells = [
        Cell(arm.name, arm.name),
        Cell(changes_text(arm.changes), "", "wrap"),
        _count_cell(summary.seeds),
        Cell(str(results.runs[arm.name]), str(results.runs[arm.name])),
        _number_cell(summary.mean.estimate, mean, "number"),
        *(_other_cell(summaries[arm.name]) for summaries in results.others.values()),
    ]
    verdict = verdict_text(results, arm.name, comparison)
    if comparison is None:
        return [*cells, *(Cell("", "") for _ in range(3)), Cell(verdict, verdict, "state")]
    return [
        *cells,
        _number_cell(comparison.difference.estimate, str(comparison.difference), "number"),
        _number_cell(comparison.p_adjusted, p_cell(comparison), "number"),
        _number_cell(comparison.improvement.estimate, f"{comparison.improvement.estimate:.0%}", "number"),
        Cell(verdict, verdict, "state"),
    ]


def _other_cell(summary: ArmSummary) -> Cell:
    """Return the cell of a further score of an arm, marked if it was not computed."""
    is_missing = math.isnan(summary.mean.estimate)
    return Cell(NOT_COMPUTED, "", "number") if is_missing else _number_cell(summary.mean.estimate, mean_text(summary))


@dataclass(frozen=True)
class _Sampler:
    """A row of the table of samplers, as text.

    Attributes:
        name: human-readable name.
        evaluations: network evaluations per sample.
        score: its score, or the range over the trials.
        is_best: whether it has the best score among samplers with at most as many evaluations as the best trial.
        fidelity: precision and recall in the best trial's run.
    """

    name: str
    evaluations: str
    score: str
    is_best: bool
    fidelity: list[str]


def sampler_rows(plan: Plan, records: Sequence[TrialRecord]) -> list[_Sampler]:
    """Return a row for every reference and for the best trial."""
    best, found = best_of(plan, records), references(records)
    summary = {} if best is None else summary_of(best)
    if best is None or not found or not summary:
        return []
    scored = scored_references(summary)

    def fidelity(name: str) -> list[str]:
        own = summary["scores"].get(name, {})
        return [number(own[key]) if key in own else NOT_COMPUTED for key in fidelity_keys(plan.experiment)]

    by_label = {reference.label: reference.key for reference in scored} | {data_label(summary): DATA}
    cheap = best_reference(scored, summary["num_steps"], plan.direction)
    beaten = cheap is not None and is_better(cheap.score, score_of(best), plan.direction)
    rows = [
        _Sampler(
            _sampler_name(reference),
            _evaluations(reference),
            _span(reference),
            is_best=beaten and cheap is not None and reference.label == cheap.label,
            fidelity=fidelity(by_label.get(reference.label, "")),
        )
        for reference in found
    ]
    own = f"{summary['num_steps']}"
    return [*rows, _Sampler(f"trial {best.number}", own, number(score_of(best)), not beaten, fidelity("best"))]


def _sampler_name(reference: StudyReference) -> str:
    return reference.label + ("" if reference.is_shared else " (depends on the trial)")


def _evaluations(reference: StudyReference) -> str:
    if reference.evaluations is None:
        return ""
    low, high = reference.evaluations
    return f"{low}" if low == high else f"{low} to {high}"


def _span(reference: StudyReference) -> str:
    low, high = number(reference.low), number(reference.high)
    return low if low == high else f"{low} to {high}"


def space_rows(plan: Plan, records: Sequence[TrialRecord]) -> list[tuple[str, str, str, str]]:
    """Return path, range, the experiment's value and the best trial's value of each setting that varies."""
    best = best_of(plan, records)
    return [
        (
            axis.path,
            str(axis),
            show(axis.own(plan.experiment)),
            "" if best is None else show(best.values[axis.path]),
        )
        for axis in plan.axes
    ]


def front_table(plan: Plan, records: Sequence[TrialRecord]) -> HtmlTable | None:
    """Build the table of the Pareto front, or return None without two objectives and a complete trial."""
    front = pareto_front(plan, records)
    if len(plan.objectives) < 2 or not front:
        return None
    labels = [metric_label(plan, objective) for objective in plan.objectives]
    headings = [
        ("trial", "trial", "number"),
        *((label, better(o), "number") for label, o in zip(labels, plan.objectives, strict=True)),
        *_setting_headings(plan),
    ]
    rows = [
        (
            "",
            [
                _count_cell(record.number),
                *map(_metric_cell, record.outcome.objectives, objective_columns(plan)),
                *_setting_cells(plan, record.values),
            ],
        )
        for record in front
    ]
    return HtmlTable(headings, rows)


@dataclass(frozen=True)
class _Failure:
    """A trial that failed or diverged, as text."""

    number: int
    state: str
    reason: str
    settings: str
    traceback: str


def failure_rows(study: Study, records: Sequence[TrialRecord]) -> list[_Failure]:
    """Return a row for every trial that failed or diverged."""
    frame = leaderboard(study.plan, records)
    reasons = dict(zip(frame["trial"], frame["reason"], strict=True))
    return [
        _Failure(
            record.number,
            record.state.value,
            reasons[record.number],
            ", ".join(settings(study.plan, record)),
            f"trials/{record.number:04d}/error.txt" if study.folder.error(record.number).exists() else "",
        )
        for record in records
        if record.state.is_failure
    ]
