"""Sentences of a report: results, progress of the study, and notes."""

from collections import Counter
from collections.abc import Sequence

from dxmi.evaluation.scored_references import DATA, data_label, highlights, scored_references
from tune.messages import duration, listed
from tune.plans.ablation import AblationPlan
from tune.plans.arms import BASELINE
from tune.plans.sweep import Plan
from tune.reporting.figures import unit
from tune.search.space import show
from tune.stats.comparison import Verdict
from tune.studies.arm_results import Results
from tune.studies.leaderboard import (
    best_of,
    better,
    free_sampler_sentences,
    fresh_sentence,
    metric_label,
    number,
    settings,
    short_names,
    spread_of,
    summary_of,
)
from tune.studies.ranking import pareto_front
from tune.studies.records import TrialRecord, TrialState
from tune.studies.study import Study

_EDGE = 0.05
FEW = 6
"""Maximum number of settings in a sentence."""
_TOLD = (
    TrialState.COMPLETE,
    TrialState.PRUNED,
    TrialState.STOPPED,
    TrialState.DIVERGED,
    TrialState.FAILED,
    TrialState.RUNNING,
)


def result_sentences(plan: Plan, records: Sequence[TrialRecord]) -> list[str]:
    """Describe the result of a sweep: the best trial compared with the references."""
    best = best_of(plan, records)
    if best is None:
        return ["No trial is complete, so there is no result yet." if records else "No trial has started."]
    objective, has_front = plan.objectives[0], len(plan.objectives) > 1
    label, value = metric_label(plan, objective), number(best.outcome.objectives[0], objective.metric)
    claim = f"has the best {label}, {value}" if has_front else f"is the best, with {label} {value}"
    words = settings(plan, best)
    where = f" at {listed(words)}" if len(words) <= FEW else "; its settings are below"
    after = "" if plan.is_of_parents else f" after {best.outcome.step} iterations"
    first = f"Trial {best.number} {claim} ({better(objective)}){_of_seeds(best)}{after}{where}."
    fresh = fresh_sentence(plan, records)
    front = [_front_sentence(plan, records)] if has_front else []
    free = free_sampler_sentences(plan, records)
    return [first, *([fresh] if fresh else []), *free, *_references_sentences(plan, best), *front]


def _of_seeds(record: TrialRecord) -> str:
    """Say over how many seeds a trial's value is the mean, and their spread; empty with one seed."""
    spread = spread_of(record)
    if spread is None:
        return ""
    values = record.outcome.by_seed
    shown = f"{number(min(values))} to {number(max(values))}, standard deviation {number(spread)}"
    return f", the mean over {len(values)} seeds ({shown}),"


def _references_sentences(plan: Plan, best: TrialRecord) -> list[str]:
    """Describe the scores of the main references and of the data; all references are in the table."""
    summary = summary_of(best)
    if not summary:
        return []
    shown = highlights(scored_references(summary), summary["num_steps"], plan.direction)
    parts = [f"{reference.label}: {number(reference.score)}" for reference in shown]
    if DATA in summary["reference"]:
        parts.append(f"{data_label(summary)}: {number(summary['reference'][DATA])}")
    is_score = plan.objectives[0].metric in ("score", plan.metric)
    label = "" if is_score else f"Its {plan.metric.removeprefix('eval/')} is {number(score_of(best))}. "
    return [f"{label}References, each on {summary['num_samples']:,} samples: {'; '.join(parts)}."] if parts else []


def _front_sentence(plan: Plan, records: Sequence[TrialRecord]) -> str:
    front = pareto_front(plan, records)

    def point(record: TrialRecord) -> str:
        pairs = zip(plan.objectives, record.outcome.objectives, strict=True)
        return " with ".join(f"{metric_label(plan, o)} {number(value, o.metric)}" for o, value in pairs)

    if len(front) == 1:
        return f"No other trial is better in either objective ({point(front[0])})."
    return f"{len(front)} trials are on the Pareto front, from {point(front[0])} to {point(front[-1])}."


def verdict_sentences(results: Results) -> list[str]:
    """Describe the verdicts of an ablation, most certain first."""
    if not results.comparisons:
        missing = results.gaps.get(BASELINE, "no other arm")
        return [f"Nothing can be compared yet: no run of the baseline is complete ({missing})."]
    by_verdict: dict[Verdict, list[str]] = {verdict: [] for verdict in Verdict}
    for comparison in results.comparisons:
        gaps = f"{comparison.gaps}; " if comparison.gaps else ""
        by_verdict[comparison.verdict].append(f"{comparison.arm} ({gaps}{comparison.difference})")
    baseline = [f"The baseline {results.gaps[BASELINE]}."] if results.runs[BASELINE].lost else []
    unfinished = [results.unfinished] if results.unfinished else []
    verdicts = [f"{str(verdict).capitalize()}: {', '.join(arms)}." for verdict, arms in by_verdict.items() if arms]
    return [*verdicts, *free_verdict(results), *baseline, *unfinished, *results.outdone]


def free_verdict(results: Results) -> list[str]:
    """Describe the comparison of the baseline with the best training-free sampler, if there is one."""
    if results.against_free is None:
        return []
    sampler, comparison = results.against_free
    return [f"The baseline against {sampler.label} without fine-tuning (mean {number(sampler.score)}): {comparison}."]


def course_sentences(study: Study, records: Sequence[TrialRecord]) -> list[str]:
    """Describe how the trials ended and how much of the budget was used."""
    planned = study.plan.num_trials
    if not records:
        return [f"{planned} trial{'s are' if planned > 1 else ' is'} planned."]
    counts = Counter(record.state for record in records)
    ways = ", ".join(f"{counts[state]} {state.value}" for state in _TOLD if counts[state])
    sentences = [f"{len(records)} of {planned} planned trial{'s' if planned > 1 else ''} started: {ways}."]
    progress, minutes = study.folder.read_progress(), study.plan.sweep.budget.wall_minutes
    seconds = float(progress.get("seconds") or 0.0)
    if seconds:
        limit = f" of its budget of {duration(60.0 * minutes)}" if minutes else ""
        sentences.append(f"The study has used {duration(seconds)}{limit}.")
    if progress.get("ended"):
        sentences.append(f"Reason for the end of its last session: {progress['ended']}.")
    if isinstance(study.plan, AblationPlan) and (study.plan.stacked or 1) > 1:
        stacked = study.plan.stacked
        sentences.append(
            f"{stacked} seeds of each arm were trained in one program; set resources.stack_seeds={stacked} to do the "
            "same on another machine."
        )
    return sentences


def score_of(record: TrialRecord) -> float:
    """Return the score of a complete trial."""
    assert record.outcome.score is not None  # set for every complete trial
    return record.outcome.score


def report_notes(plan: Plan, records: Sequence[TrialRecord]) -> list[str]:
    """Describe settings whose best value is at the edge of the searched range."""
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
                f"The best {names[axis.path]} ({show(best.values[axis.path])}) is at the {end} end of its range "
                f"[{axis.low:g}, {axis.high:g}]: a wider range may contain a better value."
            )
    return notes
