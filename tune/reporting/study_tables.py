"""Tables of a study for a terminal: the leaderboard of a sweep, the arms of an ablation."""

import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import pandas as pd
from rich.box import SIMPLE_HEAD
from rich.text import Text

from dxmi.formatting import score_text
from tune.plans.ablation import AblationPlan
from tune.plans.sweep import Plan
from tune.reporting.text_tables import TextTable
from tune.search.space import show
from tune.stats.comparison import Comparison, Verdict
from tune.studies.arm_results import Results, mean_text, notes, other_labels, p_cell, p_label, verdict_text
from tune.studies.leaderboard import (
    FRESH,
    NOT_COMPARABLE,
    NOT_COMPUTED,
    SPREAD,
    better,
    fidelity_columns,
    fresh_sentence,
    leaderboard,
    metric_label,
    number,
    objective_columns,
    short_names,
)
from tune.studies.records import TrialRecord, TrialState

_WIDTH, _GAP, _NARROWEST = 100, 2, 24
"""Width of a terminal, gap between columns, and minimum width of the last column, which is half a checkpoint's path."""


def leaderboard_table(plan: Plan, records: Sequence[TrialRecord], *, limit: int | None = None) -> TextTable:
    """Build the leaderboard for a terminal.

    Args:
        plan: plan of the study.
        records: its trials.
        limit: maximum number of rows; failed and diverged trials are always listed.
    """
    rows = leaderboard(plan, records).to_dict("records")
    shown = [row for place, row in enumerate(rows) if limit is None or place < limit or _state(row).is_failure]
    columns = _columns(plan, shown)
    table = TextTable(
        box=SIMPLE_HEAD,
        padding=(0, 1, 0, 0),
        pad_edge=False,
        caption=_caption(plan, rows, shown, fresh_sentence(plan, records)),
        caption_justify="left",
        caption_style="dim",
    )
    for column in columns:
        table.add_column(column.heading, justify="left" if column.wraps else "right")
    for index, row in enumerate(shown):
        table.add_row(*(column.cells[index] for column in columns), style=_row_style(row))
    return table


LeaderboardRow = Mapping[Any, Any]


@dataclass(frozen=True)
class _Column:
    """A column of text.

    Attributes:
        heading: text above the column.
        cells: text of each row.
        wraps: whether its text may be wrapped.
    """

    heading: str
    cells: list[str]
    wraps: bool = False

    @property
    def width(self) -> int:
        return max(map(len, (self.heading, *self.cells)))


def _columns(plan: Plan, rows: Sequence[LeaderboardRow]) -> list[_Column]:
    """Build the columns, with one column per setting or a single one if there are too many for a terminal."""
    names = short_names(plan)
    left = [
        _Column("#", [_optional(row["rank"], "{:d}") for row in rows]),
        _Column("trial", [str(row["trial"]) for row in rows]),
        *(
            _Column(name.removeprefix("eval/"), [_optional_number(row, name) for row in rows])
            for name in objective_columns(plan)
            if name != "score"
        ),
        _Column("score ", [_marked_score(row) for row in rows]),
        *([_Column(SPREAD, [_optional_number(row, SPREAD) for row in rows])] if rows and SPREAD in rows[0] else []),
        *(_Column(_heading(name), [fidelity_text(row[name]) for row in rows]) for name in fidelity_columns(plan)),
        *(_Column(_heading(name), [_optional_number(row, name) for row in rows]) for name in fresh_columns(rows)),
        _Column("step", [_optional(row["step"], "{:d}") for row in rows]),
    ]
    middle = [_Column(name, [show(row[path]) for row in rows]) for path, name in names.items()]
    right = [
        _Column("seconds", [_optional(row["seconds"], "{:,.0f}") for row in rows]),
        _Column("checkpoint, or reason", [_ending(row) for row in rows], wraps=True),
    ]
    if sum(column.width + _GAP for column in (*left, *middle, right[0])) + _NARROWEST > _WIDTH:
        lines = [", ".join(f"{name} {show(row[path])}" for path, name in names.items()) for row in rows]
        middle = [_Column("settings", lines, wraps=True)]
    return [*left, *middle, *right]


def fresh_columns(rows: Sequence[LeaderboardRow]) -> list[str]:
    """Return the columns of a leaderboard that hold scores on fresh noise."""
    return [str(name) for name in (rows[0] if rows else ()) if str(name).startswith(FRESH)]


def _heading(name: str) -> str:
    """Return a short column name, so that all columns fit into a terminal."""
    if name.startswith(FRESH):
        return "fresh" if name == f"{FRESH}score" else name.replace("_", " ", 1)
    return "prec." if name.startswith("eval/precision_") else "recall"


def fidelity_text(value: Any) -> str:
    """Format precision or recall, or return a mark if it was not computed."""
    return NOT_COMPUTED if pd.isna(value) else score_text(float(value))


def _state(row: LeaderboardRow) -> TrialState:
    return TrialState(row["state"])


def _optional(value: Any, form: str) -> str:
    return "" if pd.isna(value) else form.format(value)


def _optional_number(row: LeaderboardRow, metric: str) -> str:
    return "" if pd.isna(row[metric]) else number(float(row[metric]), metric)


def _marked_score(row: LeaderboardRow) -> str:
    """Format the score, followed by a mark or a space so that digits are aligned."""
    text = _optional_number(row, "score")
    return text and text + (" " if _state(row) is TrialState.COMPLETE else NOT_COMPARABLE)


def _ending(row: LeaderboardRow) -> str:
    if _state(row) is TrialState.COMPLETE:
        return row["checkpoint"] or TrialState.COMPLETE.value
    return f"{row['state']}: {row['reason']}" if row["reason"] else str(row["state"])


def _row_style(row: LeaderboardRow) -> str:
    state = _state(row)
    if state.is_failure:
        return "red"
    if state is not TrialState.COMPLETE:
        return "dim"
    return "bold" if row["rank"] == 1 else ""


def _is_missing(row: LeaderboardRow, plan: Plan) -> bool:
    return any(pd.isna(row[name]) for name in fidelity_columns(plan))


def _caption(plan: Plan, rows: Sequence[LeaderboardRow], shown: Sequence[LeaderboardRow], fresh: str) -> str:
    sentences = [f"{', '.join(f'{metric_label(plan, o)}: {better(o)}' for o in plan.objectives)}."]
    if any(_marked_score(row).endswith(NOT_COMPARABLE) for row in shown):
        sentences.append(f"{NOT_COMPARABLE} on the noise used to select the checkpoint: not comparable.")
    if any(_is_missing(row, plan) for row in shown):
        sentences.append(f"{NOT_COMPUTED}: not computed.")
    counts = Counter(str(row["state"]) for row in rows)
    if counts[TrialState.COMPLETE.value] < plan.num_trials and not isinstance(plan, AblationPlan):
        ways = [f"{counts[state.value]} {state.value}" for state in TrialState if counts[state.value]]
        to_come = [f"{plan.num_trials - len(rows)} not started"] if len(rows) < plan.num_trials else []
        sentences.append(f"{plan.num_trials} trials: {', '.join([*ways, *to_come])}.")
    if fresh:
        sentences.append(fresh)
    if len(shown) < len(rows):
        sentences.append(f"{len(rows) - len(shown)} more trials are in leaderboard.csv.")
    return " ".join(sentences)


_STYLES = {
    Verdict.BETTER: "green",
    Verdict.WORSE: "red",
    Verdict.NO_DIFFERENCE: "",
    Verdict.TOO_FEW_SEEDS: "yellow",
    Verdict.FAILED: "red",
    Verdict.UNFINISHED: "yellow",
}


def arms_table(results: Results) -> TextTable:
    """Build the table of an ablation for a terminal: one row per arm, with its verdict."""
    objective = results.plan.objectives[0]
    table = TextTable(
        "arm", "seeds", "missing", f"{metric_label(results.plan, objective)}, mean", *other_labels(results),
        "minus baseline", p_label(results), "verdict",
        caption=" ".join([f"{better(objective).capitalize()}.", *notes(results)]),
        caption_justify="left",
    )  # fmt: skip
    compared = {comparison.arm: comparison for comparison in results.comparisons}
    for arm in results.plan.arms:
        summary, comparison = results.summaries[arm.name], compared.get(arm.name)
        cells = ["", "", Text(verdict_text(results, arm.name, None))]
        if comparison is not None:
            verdict = Text(_verdict(comparison), style=_STYLES[comparison.verdict])
            cells = [str(comparison.difference), p_cell(comparison), verdict]
        counts = str(summary.seeds), str(results.runs[arm.name])
        table.add_row(arm.name, *counts, mean_text(summary), *_brief_cells(results, arm.name), *cells)
    return table


def _brief_cells(results: Results, arm: str) -> list[str]:
    """Return an arm's further scores, without intervals to save space."""
    means = (summaries[arm].mean.estimate for summaries in results.others.values())
    return [NOT_COMPUTED if math.isnan(mean) else number(mean) for mean in means]


def _verdict(comparison: Comparison) -> str:
    if comparison.verdict is not Verdict.TOO_FEW_SEEDS or math.isinf(comparison.seeds_needed.low):
        return comparison.verdict_text
    return f"{comparison.verdict}, {comparison.enough}"
