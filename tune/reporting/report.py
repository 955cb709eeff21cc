"""The report of a study: one HTML file that says what came out, and opens anywhere without a network.

Everything is inside it: figures as SVG, samples as PNG, the style, and the few lines of script that sort a table. It is
all made from the records and the run folders, so that it can be written again at any time.
"""

import base64
import functools
import hashlib
import io
import math
import re
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import pandas as pd
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup, escape
from matplotlib.figure import Figure
from PIL import Image

from dxmi import __version__
from dxmi.config import to_tree
from dxmi.evaluation.references import (
    DATA,
    best_reference,
    full_reference,
    highlights,
    scored_references,
)
from dxmi.persistence.files import write_atomic
from dxmi.persistence.provenance import git_revision
from tune.messages import duration, listed, timestamp
from tune.plans.ablation import AblationPlan
from tune.plans.arms import BASELINE, Arm, two_level_design
from tune.plans.sweep import Plan, fidelity_keys
from tune.reporting.ablation_figures import ablation_figures
from tune.reporting.figures import Reference, importance_obstacle, references, study_figures, unit
from tune.reporting.maps import arm_maps, trial_maps
from tune.reporting.study_tables import fresh_columns
from tune.search.space import Axis, show, value_at
from tune.stats.statistics import Comparison, Summary, Verdict
from tune.studies.arm_results import (
    Results,
    changes_text,
    mean_text,
    notes,
    other_labels,
    p_cell,
    p_label,
    p_note,
    results_of,
    verdict_text,
)
from tune.studies.leaderboard import (
    FRESH,
    NOT_COMPARABLE,
    NOT_COMPUTED,
    best_of,
    better,
    changed_inputs,
    fidelity_columns,
    free_sampler_sentences,
    fresh_sentence,
    leaderboard,
    metric_label,
    number,
    objective_columns,
    settings,
    short_names,
    summary_of,
)
from tune.studies.ranking import pareto_front, ranked
from tune.studies.records import TrialRecord, TrialState
from tune.studies.study import Study

_TEMPLATES = Path(__file__).resolve().parent / "templates"
_MATRIX_TRIALS, _MATRIX_STEPS = 8, 6
_ARM_SIDE = 2
"""Samples a side in a picture of an ablation's run."""
_SAMPLES_A_SIDE = (4, 3, 2, 1)
"""Of each grid, so many samples a side are shown: the first number with which the report stays small."""
_FIGURE_PIXELS = 60
"""A side of a figure is so many times that number."""
_MAX_SAMPLE_BYTES = 3_000_000
_SCROLLING_ROWS = 40
"""A longer table scrolls in its own frame."""
_MANY_COLUMNS = 7
"""A table with more of them is set smaller."""
_EDGE = 0.05
_FEW = 6
"""As many settings fit into a sentence."""
_TOLD = (
    TrialState.COMPLETE,
    TrialState.PRUNED,
    TrialState.STOPPED,
    TrialState.DIVERGED,
    TrialState.FAILED,
    TrialState.RUNNING,
)


def write_report(study: Study, records: Sequence[TrialRecord]) -> Path:
    """Write report.html, for a study in any state; returns where it is."""
    write_atomic(study.folder.report, _html(study, records, timestamp()))
    return study.folder.report


def _html(study: Study, records: Sequence[TrialRecord], written: str) -> str:
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True,
        lstrip_blocks=True, keep_trailing_newline=True,
    )  # fmt: skip
    environment.filters["breakable"] = breakable
    script = (_TEMPLATES / "report.js").read_text()
    compared = results_of(study.plan, study.folder, records) if isinstance(study.plan, AblationPlan) else None
    changed = changed_inputs(study.plan, records)
    warnings = [changed] if changed else []
    drawn = study_figures(study, records) if compared is None else ablation_figures(compared, study.curves())
    figures = {name: _drawn(name, figure) for name, figure in drawn.items()}
    return environment.get_template("report.html.j2").render(
        about=_about(study, records, written),
        ablation=None if compared is None else _ablation(compared),
        result=result_sentences(study.plan, records) if compared is None else [*verdict_sentences(compared), *warnings],
        course=course_sentences(study, records),
        samplers=_samplers(study.plan, records),
        fidelity=fidelity_keys(study.plan.experiment),
        board=_board(study.plan, records),
        plan=study.plan,
        has_marked=any(r.outcome.score is not None and r.state is not TrialState.COMPLETE for r in records),
        notes=[*warnings, *_notes(study.plan, records)],
        figures=figures,
        no_importances=importance_obstacle(study.plan, records),
        space=_space(study.plan, records) if compared is None else [],
        front=_front(study.plan, records),
        matrix=sample_matrix(study.plan, records) if compared is None else arm_matrix(compared),
        maps=trial_maps(study.plan, records) if compared is None else arm_maps(compared),
        failures=_failures(study, records),
        commands=_commands(study, records),
        shared=_shared_config(study.plan),
        sweep=_yaml(study.plan.tree()["sweep" if compared is None else "ablation"]),
        style=Markup((_TEMPLATES / "report.css").read_text()),  # noqa: S704  (ours)
        script=Markup(script),  # noqa: S704  (ours)
        script_hash=sha256_base64(script),
    )


def sha256_base64(text: str) -> str:
    """As a content security policy names a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


def breakable(text: str) -> Markup:
    """Text in which a long name may go on in the next line after its dots, dashes, slashes and underscores."""
    broken = re.sub(r"(?<=[A-Za-z0-9][._/-])(?=[A-Za-z])", "<wbr>", str(escape(text)))
    return Markup(re.sub(r"\[[^][<]*\]", r'<span class="interval">\g<0></span>', broken))  # noqa: S704  (escaped)


# ----------------------------------------------------------------------------
# Words


def result_sentences(plan: Plan, records: Sequence[TrialRecord]) -> list[str]:
    """What came out: the best trial, and the references beside it."""
    best = best_of(plan, records)
    if best is None:
        return ["No trial is complete, so there is no result yet." if records else "No trial has begun."]
    objective, has_front = plan.sweep.objectives[0], len(plan.sweep.objectives) > 1
    label, value = metric_label(plan, objective), number(best.outcome.objectives[0], objective.metric)
    claim = f"has the best {label}, {value}" if has_front else f"is the best, with {label} {value}"
    words = settings(plan, best)
    where = f" at {listed(words)}" if len(words) <= _FEW else "; its settings are below"
    first = f"Trial {best.number} {claim} ({better(objective)}) after {best.outcome.step} iterations{where}."
    fresh = fresh_sentence(plan, records)
    front = [_front_sentence(plan, records)] if has_front else []
    free = free_sampler_sentences(plan, records)
    return [first, *([fresh] if fresh else []), *free, *_references_sentences(plan, best), *front]


def _references_sentences(plan: Plan, best: TrialRecord) -> list[str]:
    """The scores of the references that are worth a line, and of the data; the others are in the table."""
    summary = summary_of(best)
    if not summary:
        return []
    shown = highlights(scored_references(summary), summary["num_steps"])
    parts = [f"{reference.label}: {number(reference.score)}" for reference in shown]
    if DATA in summary["reference"]:
        parts.append(f"the data itself: {number(summary['reference'][DATA])}")
    is_score = plan.sweep.objectives[0].metric in ("score", plan.metric)
    label = "" if is_score else f"Its {plan.metric.removeprefix('eval/')} is {number(_score(best))}. "
    return [f"{label}References, each on {summary['num_samples']:,} samples: {'; '.join(parts)}."] if parts else []


def _front_sentence(plan: Plan, records: Sequence[TrialRecord]) -> str:
    front = pareto_front(plan, records)

    def point(record: TrialRecord) -> str:
        pairs = zip(plan.sweep.objectives, record.outcome.objectives, strict=True)
        return " with ".join(f"{metric_label(plan, o)} {number(value, o.metric)}" for o, value in pairs)

    if len(front) == 1:
        return f"It is better than, or equal to, every other in both objectives ({point(front[0])})."
    return f"{len(front)} trials are on the Pareto front, from {point(front[0])} to {point(front[-1])}."


def verdict_sentences(results: Results) -> list[str]:
    """What an ablation says about its arms, most certain first."""
    if not results.comparisons:
        missing = results.gaps.get(BASELINE, "no other arm")
        return [f"There is nothing to compare with: no run of the baseline is complete ({missing})."]
    by_verdict: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
    for comparison in results.comparisons:
        gaps = f"{comparison.gaps}; " if comparison.gaps else ""
        by_verdict[comparison.verdict].append(f"{comparison.arm} ({gaps}{comparison.difference})")
    baseline = [f"The baseline {results.gaps[BASELINE]}."] if results.runs[BASELINE].lost else []
    unfinished = [results.unfinished] if results.unfinished else []
    verdicts = [f"{str(verdict).capitalize()}: {', '.join(arms)}." for verdict, arms in by_verdict.items() if arms]
    return [*verdicts, *baseline, *unfinished, *results.outdone]


def course_sentences(study: Study, records: Sequence[TrialRecord]) -> list[str]:
    """How the trials ended, and what of the budget was used."""
    planned = study.plan.num_trials
    if not records:
        return [f"{planned} trial{'s are' if planned > 1 else ' is'} planned."]
    counts = Counter(record.state for record in records)
    ways = ", ".join(f"{counts[state]} {state.value}" for state in _TOLD if counts[state])
    sentences = [f"{len(records)} of {planned} planned trial{'s' if planned > 1 else ''}: {ways}."]
    progress, minutes = study.folder.read_progress(), study.plan.sweep.budget.wall_minutes
    seconds = float(progress.get("seconds") or 0.0)
    if seconds:
        limit = f" of {duration(60.0 * minutes)}" if minutes else ""
        sentences.append(f"The sweep has taken {duration(seconds)}{limit}.")
    if progress.get("ended"):
        sentences.append(f"Its last session ended: {progress['ended']}.")
    if isinstance(study.plan, AblationPlan) and (study.plan.stacked or 1) > 1:
        stacked = study.plan.stacked
        sentences.append(
            f"{stacked} seeds of an arm were trained in one program; with resources.stack_seeds={stacked} a repetition "
            "elsewhere does so too."
        )
    return sentences


def _score(record: TrialRecord) -> float:
    assert record.outcome.score is not None  # a complete trial has one
    return record.outcome.score


def _notes(plan: Plan, records: Sequence[TrialRecord]) -> list[str]:
    """Settings whose best value is at the edge of what was searched."""
    notes: list[str] = []
    best = best_of(plan, records)
    if best is None:
        return notes
    names = short_names(plan)
    for axis in plan.axes:
        place = unit(axis, best.values[axis.path])
        if axis.kind in ("log_uniform", "uniform") and not _EDGE < place < 1.0 - _EDGE:
            end = "lower" if place <= _EDGE else "upper"
            notes.append(
                f"The best {names[axis.path]} ({show(best.values[axis.path])}) lies at the {end} end of its range "
                f"[{axis.low:g}, {axis.high:g}]: a wider one may hold a better value."
            )
    return notes


# ----------------------------------------------------------------------------
# Head and foot


@dataclass(frozen=True)
class _About:
    """The head of the report, as text."""

    study: str
    experiment: str
    signature: str
    begun: str
    written: str
    revisions: list[str]
    machine: str
    version: str


def _about(study: Study, records: Sequence[TrialRecord], written: str) -> _About:
    best = best_of(study.plan, records)
    summary = {} if best is None else summary_of(best)
    return _About(
        study=study.plan.name,
        experiment=study.plan.experiment.name,
        signature=study.plan.signature,
        begun=_begun(study),
        written=written,
        revisions=revisions(records),
        machine=_machine(summary) if summary else "",
        version=__version__,
    )


def _machine(summary: Mapping[str, Any]) -> str:
    threads = f"{summary['threads']} thread{'s' if summary['threads'] > 1 else ''}"
    return f"{summary['device']}, {threads}, torch {summary['versions'].get('torch', '?')}"


def _begun(study: Study) -> str:
    starts = [trial.datetime_start for trial in study.optuna.get_trials(deepcopy=False)[:1]]
    if starts and starts[0] is not None:
        moment = starts[0].astimezone(UTC)
    else:
        moment = datetime.fromtimestamp(study.folder.plan.stat().st_mtime, UTC)
    return f"{moment:%Y-%m-%d %H:%M:%S} UTC"


def revisions(records: Sequence[TrialRecord]) -> list[str]:
    """The revisions of the code that complete trials ended with; the present one if none is complete."""
    summaries = (summary_of(record) for record in records if record.state is TrialState.COMPLETE)
    found = dict.fromkeys(summary.get("git_revision") or "unknown" for summary in summaries if summary)
    return [*found] or [git_revision() or "unknown"]


def _commands(study: Study, records: Sequence[TrialRecord]) -> list[tuple[str, str]]:
    """What to do, and the command that does it, from the folder that holds the studies'."""
    folder = f"{study.folder.path.resolve().parent.name}/{study.plan.name}"
    best, found, commands = best_of(study.plan, records), revisions(records), []
    if found != ["unknown"] and len(found) == 1:
        changed = " (with changes that were not committed)" if found[0].endswith("-dirty") else ""
        commands.append((f"The code{changed}", f"git checkout {found[0].removesuffix('-dirty')}"))
    is_ablation = isinstance(study.plan, AblationPlan)
    if best is not None:
        run = f"{folder}/trials/{best.number:04d}"
        if not is_ablation:
            commands.append(("The best trial again, with the same numbers", f"dxmi train --config {folder}/best.yaml"))
        commands += [
            (
                "Any trial again" if is_ablation else "Any other trial again",
                f"dxmi train --config {folder}/trials/NUMBER/config.yaml",
            ),
            ("Samples of the best", f"dxmi sample {run} --num 64 --out samples.png"),
            ("More scores of the best", f"dxmi evaluate {run}"),
        ]
    again = study.plan.resume_line(folder)
    return [*commands, ("Go on with the study, if it has not ended", again)]


def _shared_config(plan: Plan) -> str:
    """The experiment without what varies, and without resources, which change no result."""
    tree = to_tree(plan.experiment)
    del tree["resources"]
    for axis in plan.axes:
        *groups, last = axis.path.split(".")
        group = tree
        for name in groups:
            group = group[name]
        group.pop(last, None)  # the arm of an ablation is no setting
    return _yaml(tree)


def _yaml(tree: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)


# ----------------------------------------------------------------------------
# Tables


@dataclass(frozen=True)
class Cell:
    """A cell of a table.

    Attributes:
        text: what stands in it.
        key: what it is sorted by; empty comes last.
        style: classes.
    """

    text: str
    key: str = ""
    style: str = ""


@dataclass(frozen=True)
class HtmlTable:
    """A table.

    Attributes:
        headings: text, longer text for the pointer, classes.
        rows: classes and cells.
    """

    headings: list[tuple[str, str, str]]
    rows: list[tuple[str, list[Cell]]]

    @property
    def is_long(self) -> bool:
        """Whether it scrolls in a frame of its own."""
        return len(self.rows) > _SCROLLING_ROWS

    @property
    def is_wide(self) -> bool:
        """Whether its text is small, so that all columns fit into a page."""
        return len(self.headings) > _MANY_COLUMNS


def _number_cell(value: Any, text: str, style: str = "number") -> Cell:
    """Empty for a missing value."""
    return Cell("", "", style) if pd.isna(value) else Cell(text, repr(float(value)), style)


def _count_cell(value: Any) -> Cell:
    return _number_cell(value, str(value))


def _metric_cell(value: Any, metric: str) -> Cell:
    return _number_cell(value, "" if pd.isna(value) else number(float(value), metric))


def _value_cell(axis: Axis, value: Any) -> Cell:
    """A setting's value."""
    return Cell(show(value), show(value)) if axis.kind == "choice" else _number_cell(value, show(value))


def _value_heading(plan: Plan, axis: Axis) -> tuple[str, str, str]:
    return short_names(plan)[axis.path], axis.path, "" if axis.kind == "choice" else "number"


def _settings_fit(plan: Plan) -> bool:
    """Whether a page of 800 pixels has room for a column a setting, beside those of precision and recall."""
    return len(plan.axes) + len(fidelity_columns(plan)) < _FEW


def _setting_headings(plan: Plan) -> list[tuple[str, str, str]]:
    """A column a setting, or one for all if they are too many for a page."""
    if not _settings_fit(plan):
        return [("settings", "what varies", "")]
    return [_value_heading(plan, axis) for axis in plan.axes]


def _setting_cells(plan: Plan, values: Mapping[Any, Any]) -> list[Cell]:
    """The cells below `_setting_headings`."""
    if _settings_fit(plan):
        return [_value_cell(axis, values[axis.path]) for axis in plan.axes]
    names = short_names(plan)
    return [Cell(", ".join(f"{names[axis.path]} {show(values[axis.path])}" for axis in plan.axes), "", "wrap")]


def _board(plan: Plan, records: Sequence[TrialRecord]) -> HtmlTable:
    frame = leaderboard(plan, records)
    objectives = [name for name in objective_columns(plan) if name != "score"]
    listed = frame.to_dict("records")
    fidelity, fresh = fidelity_columns(plan), fresh_columns(listed)
    headings = [
        ("#", "rank", "number"),
        ("trial", "trial", "number"),
        ("state", "state", ""),
        *((name.removeprefix("eval/"), name, "number") for name in objectives),
        ("score", plan.metric, "number"),
        *((name.removeprefix("eval/"), f"{name} of the best checkpoint", "number") for name in fidelity),
        *((name.replace("_", " ", 1), "on noise that took no part in choosing the trial", "number") for name in fresh),
        ("step", "iteration of the best checkpoint", "number"),
        *_setting_headings(plan),
        ("seconds", "wall time of the trial", "number"),
        ("checkpoint, or why not complete", "checkpoints are relative to the study's folder", ""),
    ]
    rows = [_board_row(plan, row, objectives, [*fidelity, *fresh]) for row in listed]
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
    """A score beside the one that trials are ranked by; of precision and recall, a mark where there is none."""
    if pd.isna(value):
        return Cell("" if name.startswith(FRESH) else NOT_COMPUTED, "", "number")
    return _metric_cell(value, name)


def _ending_cell(checkpoint: str, reason: str) -> Cell:
    return Cell(checkpoint, checkpoint, "path") if checkpoint else Cell(reason, reason, "reason")


@dataclass(frozen=True)
class _Ablation:
    """The part of a report that only an ablation has.

    Attributes:
        hypothesis: the file's.
        arms: a table with a row an arm.
        reasons: why each verdict is what it is.
        effects: of factors, a line each.
        no_effects: why there are none, if there should be.
        notes: sentences under the table.
        design: a factorial design in words; empty for others.
        spreads: where the spread of the scores comes from, a line an arm.
    """

    hypothesis: str
    arms: HtmlTable
    reasons: list[tuple[str, str]]
    effects: list[str]
    no_effects: str
    notes: list[str]
    design: str
    spreads: list[str]


def _ablation(results: Results) -> _Ablation:
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
    label = metric_label(results.plan, results.plan.sweep.objectives[0])
    headings = [
        ("arm", "what is compared", ""),
        ("changes of the baseline", "settings", ""),
        ("seeds", "with a score", "number"),
        ("missing", "runs without a score", ""),
        (label, "mean over the seeds, with its interval", "number"),
        *((name, "mean over the seeds, with its interval", "number") for name in other_labels(results)),
        ("minus baseline", "mean difference at the same seed, with its interval", "number"),
        (p_label(results), p_note(results), "number"),
        ("beats it", "chance that a run of the arm beats a run of the baseline", "number"),
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


def _other_cell(summary: Summary) -> Cell:
    """A further score of an arm, or a mark where it was not computed."""
    is_missing = math.isnan(summary.mean.estimate)
    return Cell(NOT_COMPUTED, "", "number") if is_missing else _number_cell(summary.mean.estimate, mean_text(summary))


@dataclass(frozen=True)
class _Sampler:
    """A row of the table of samplers, as text.

    Attributes:
        name: in words.
        evaluations: of the network, a sample.
        score: or its range over the trials.
        is_best: whether nothing with as few evaluations as the best trial has a better score.
        fidelity: precision and recall in the best trial's run.
    """

    name: str
    evaluations: str
    score: str
    is_best: bool
    fidelity: list[str]


def _samplers(plan: Plan, records: Sequence[TrialRecord]) -> list[_Sampler]:
    """Every reference, and the best trial."""
    best, found = best_of(plan, records), references(records)
    summary = {} if best is None else summary_of(best)
    if best is None or not found or not summary:
        return []
    scored = scored_references(summary)

    def fidelity(name: str) -> list[str]:
        own = summary["scores"].get(name, {})
        return [number(own[key]) if key in own else NOT_COMPUTED for key in fidelity_keys(plan.experiment)]

    by_label = {reference.label: reference.key for reference in scored}
    cheap = best_reference(scored, summary["num_steps"])
    beaten = cheap is not None and cheap.score < _score(best)
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
    return [*rows, _Sampler(f"trial {best.number}", own, number(_score(best)), not beaten, fidelity("best"))]


def _sampler_name(reference: Reference) -> str:
    return reference.label + ("" if reference.is_shared else " (depends on the trial)")


def _evaluations(reference: Reference) -> str:
    if reference.evaluations is None:
        return ""
    low, high = reference.evaluations
    return f"{low}" if low == high else f"{low} to {high}"


def _span(reference: Reference) -> str:
    low, high = number(reference.low), number(reference.high)
    return low if low == high else f"{low} to {high}"


def _space(plan: Plan, records: Sequence[TrialRecord]) -> list[tuple[str, str, str, str]]:
    """Path, range, the experiment's own value and the best trial's of each setting that varies."""
    best = best_of(plan, records)
    return [
        (
            axis.path,
            str(axis),
            show(value_at(plan.experiment, axis.path)),
            "" if best is None else show(best.values[axis.path]),
        )
        for axis in plan.axes
    ]


def _front(plan: Plan, records: Sequence[TrialRecord]) -> HtmlTable | None:
    """The Pareto front, if there are two objectives and a complete trial."""
    front = pareto_front(plan, records)
    if len(plan.sweep.objectives) < 2 or not front:
        return None
    labels = [metric_label(plan, objective) for objective in plan.sweep.objectives]
    headings = [
        ("trial", "trial", "number"),
        *((label, better(o), "number") for label, o in zip(labels, plan.sweep.objectives, strict=True)),
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


def _failures(study: Study, records: Sequence[TrialRecord]) -> list[_Failure]:
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


# ----------------------------------------------------------------------------
# Figures


@dataclass(frozen=True)
class _Drawing:
    """A figure as SVG, and in words."""

    svg: Markup
    label: str


def _drawn(name: str, figure: Figure) -> _Drawing:
    """As SVG for the inside of a page: its text stays text, and the same figure gives the same bytes."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _Drawing(Markup(_inline(buffer.getvalue(), name)), str(figure.get_label()))  # noqa: S704  (escaped by Matplotlib)


def _inline(svg: str, name: str) -> str:
    """Without what only a file of its own needs, and with coordinates to a hundredth of a point."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # every figure has an axes_1
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r'(?<= d=")[^"]*', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), body)
    width, height = (float(re.findall(rf'{side}="([\d.]+)pt"', body)[0]) for side in ("width", "height"))
    head = f'<svg class="{name}" viewBox="0 0 {width:g} {height:g}" style="--natural: {width:g}" aria-hidden="true">'
    return head + body[body.index(">") + 1 :].strip()


# ----------------------------------------------------------------------------
# Samples


@dataclass(frozen=True)
class MatrixRow:
    """A trial's samples.

    Attributes:
        trial: which.
        note: how good it is.
        pictures: data URIs, one a step; empty where a picture is damaged.
    """

    trial: str
    note: str
    pictures: list[str]


@dataclass(frozen=True)
class Strip:
    """Real data, or samples of a reference, above the trials' samples.

    Attributes:
        name: what it shows.
        note: its score, and whose run drew it.
        picture: a data URI.
        cells: how many times as wide it is as a trial's picture.
    """

    name: str
    note: str
    picture: str
    cells: float


@dataclass(frozen=True)
class Matrix:
    """Pictures of samples, all from the same noise: one row a trial, one column an iteration.

    Attributes:
        steps: iterations.
        rows: of pictures.
        are_figures: whether they are figures and no grids of images, whose pixels are worth seeing.
        strips: what to compare them with; empty for a study that was run before these were drawn.
    """

    steps: list[int]
    rows: list[MatrixRow]
    are_figures: bool
    strips: list[Strip]


def sample_matrix(plan: Plan, records: Sequence[TrialRecord]) -> Matrix | None:
    """Grids of the best trials and the last one, at iterations that all of them have; None if there are none."""
    chosen = _shown(plan, records)
    if not chosen:
        return None
    steps = _thinned(sorted(set.intersection(*(_sampled(record) for record in chosen))), _MATRIX_STEPS)
    if not steps:
        return None
    places = {record.number: place for place, record in enumerate(ranked(plan, records), start=1)}
    for side in _SAMPLES_A_SIDE:
        part = functools.partial(_part, plan, side)
        pictures = [[_picture(record, step, part) for step in steps] for record in chosen]
        if sum(len(picture) for row in pictures for picture in row) <= _MAX_SAMPLE_BYTES:
            break
    rows = [
        MatrixRow(f"trial {record.number}", _matrix_note(record, places[record.number]), row)
        for record, row in zip(chosen, pictures, strict=True)
    ]
    strips = reference_strips(plan, chosen, side, len(steps))
    return Matrix(steps, rows, are_figures=plan.experiment.data.is_planar, strips=strips)


def arm_matrix(results: Results) -> Matrix | None:
    """The best checkpoints' grids: one row an arm, one column a seed; None if there are none."""
    part = functools.partial(_part, results.plan, _ARM_SIDE)
    seeds = results.seeds[:_MATRIX_STEPS]
    rows = []
    for arm in results.plan.arms:
        records = [results.records.get((arm.name, seed)) for seed in seeds]
        pictures = [
            "" if record is None or record.outcome.step is None else _picture(record, record.outcome.step, part)
            for record in records
        ]
        if any(pictures):
            summary = results.summaries[arm.name]
            note = "" if math.isnan(summary.mean.estimate) else number(summary.mean.estimate)
            rows.append(MatrixRow(arm.name, note, pictures))
    if not rows:
        return None
    runs = [results.records.get((arm.name, seed)) for arm in results.plan.arms for seed in seeds]
    strips = reference_strips(results.plan, [run for run in runs if run is not None], _ARM_SIDE, len(seeds))
    return Matrix([*seeds], rows, results.plan.experiment.data.is_planar, strips)


def reference_strips(plan: Plan, runs: Sequence[TrialRecord], side: int, columns: int) -> list[Strip]:
    """Real data, the model with all of its steps, and the best training-free sampler, from the first run that has them.

    Args:
        plan: of the study.
        runs: the best first, or the baseline's.
        side: samples in the height of a strip, as in a trial's picture.
        columns: a strip is at most as wide as so many of these.
    """
    complete = [run for run in runs if run.state is TrialState.COMPLETE and run.run.reference_picture("data").exists()]
    summary = summary_of(complete[0]) if complete else {}
    if not summary:
        return []
    run, in_grid = complete[0].run, _columns(plan)
    height = min(side, in_grid)
    width = height if plan.experiment.data.is_planar else min(in_grid, columns * height)
    part = functools.partial(_part, plan, side, width=width)
    drawn = [
        Strip(label, note, _embedded(run.reference_picture(name), part), width / height)
        for name, label, note in _strip_words(summary)
    ]
    return [strip for strip in drawn if strip.picture]


def _strip_words(summary: Mapping[str, Any]) -> list[tuple[str, str, str]]:
    """File, name and note of each picture of references."""
    scored, floor = scored_references(summary), summary["reference"].get(DATA)
    full, few = full_reference(scored), best_reference(scored, summary["num_steps"])
    references = [("full", full), ("few", few)]
    return [
        ("data", "real data", "" if floor is None else number(floor)),
        *((name, found.label, f"{number(found.score)}, no fine-tuning") for name, found in references if found),
    ]


def _shown(plan: Plan, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Complete trials if there are any, by rank: the first ones and the last."""
    sampled = [record for record in ranked(plan, records) if record.same_as is None and _sampled(record)]
    complete = [record for record in sampled if record.state is TrialState.COMPLETE] or sampled
    return complete if len(complete) <= _MATRIX_TRIALS else [*complete[: _MATRIX_TRIALS - 1], complete[-1]]


def _sampled(record: TrialRecord) -> set[int]:
    """Iterations of which there is a grid."""
    found = (re.fullmatch(r"step_(\d+)\.png", path.name) for path in record.run.samples.glob("step_*.png"))
    return {int(match[1]) for match in found if match}


def _thinned(steps: Sequence[int], most: int) -> list[int]:
    """At most so many, evenly, with the first and the last."""
    if len(steps) <= most:
        return [*steps]
    return [steps[round(index * (len(steps) - 1) / (most - 1))] for index in range(most)]


def _matrix_note(record: TrialRecord, place: int) -> str:
    if record.state is not TrialState.COMPLETE:
        return record.state.value
    return f"#{place}, {number(_score(record))} at {record.outcome.step}"


def _columns(plan: Plan) -> int:
    """Of a grid of images, see `dxmi.visualization.pictures.save_grid`."""
    return max(1, round(math.sqrt(plan.experiment.evaluate.grid)))


def _part(plan: Plan, side: int, picture: Image.Image, width: int | None = None) -> Image.Image:
    """The upper left corner of a grid of images, `side` samples wide and high; all of a figure, made small.

    Args:
        plan: of the study.
        side: samples.
        picture: a grid or a figure.
        width: samples in a row, if more than `side` are wanted.
    """
    if plan.experiment.data.is_planar:
        return picture.convert("RGB").resize((_FIGURE_PIXELS * side, _FIGURE_PIXELS * side), Image.Resampling.LANCZOS)
    columns, gap = _columns(plan), 2  # see dxmi.visualization.pictures.grid
    cell = (picture.width - gap) // columns
    size = (gap + min(width or side, columns) * cell, gap + min(side, columns) * cell)
    return picture.crop((0, 0, min(size[0], picture.width), min(size[1], picture.height)))


def _picture(record: TrialRecord, step: int, part: Callable[[Image.Image], Image.Image]) -> str:
    """A part of what was drawn at a step, as a data URI."""
    return _embedded(record.run.samples / f"step_{step:06d}.png", part)


def _embedded(path: Path, part: Callable[[Image.Image], Image.Image]) -> str:
    """A part of a picture as a data URI; empty if it cannot be read."""
    buffer = io.BytesIO()
    try:
        with Image.open(path) as picture:
            part(picture).save(buffer, format="png", optimize=True)
    except (OSError, SyntaxError, ValueError):
        return ""
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()
