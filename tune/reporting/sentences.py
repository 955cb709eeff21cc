"""The sentences of a report: what came out, how the study went, and what to keep in mind."""

from collections import Counter
from collections.abc import Sequence

from dxmi.evaluation.references import DATA, highlights, scored_references
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
    summary_of,
)
from tune.studies.ranking import pareto_front
from tune.studies.records import TrialRecord, TrialState
from tune.studies.study import Study

_EDGE = 0.05
FEW = 6
"""As many settings fit into a sentence."""
_TOLD = (
    TrialState.COMPLETE,
    TrialState.PRUNED,
    TrialState.STOPPED,
    TrialState.DIVERGED,
    TrialState.FAILED,
    TrialState.RUNNING,
)


def result_sentences(plan: Plan, records: Sequence[TrialRecord]) -> list[str]:
    """What came out: the best trial, and the references beside it."""
    best = best_of(plan, records)
    if best is None:
        return ["No trial is complete, so there is no result yet." if records else "No trial has begun."]
    objective, has_front = plan.objectives[0], len(plan.objectives) > 1
    label, value = metric_label(plan, objective), number(best.outcome.objectives[0], objective.metric)
    claim = f"has the best {label}, {value}" if has_front else f"is the best, with {label} {value}"
    words = settings(plan, best)
    where = f" at {listed(words)}" if len(words) <= FEW else "; its settings are below"
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
    shown = highlights(scored_references(summary), summary["num_steps"], plan.direction)
    parts = [f"{reference.label}: {number(reference.score)}" for reference in shown]
    if DATA in summary["reference"]:
        parts.append(f"the data itself: {number(summary['reference'][DATA])}")
    is_score = plan.objectives[0].metric in ("score", plan.metric)
    label = "" if is_score else f"Its {plan.metric.removeprefix('eval/')} is {number(score_of(best))}. "
    return [f"{label}References, each on {summary['num_samples']:,} samples: {'; '.join(parts)}."] if parts else []


def _front_sentence(plan: Plan, records: Sequence[TrialRecord]) -> str:
    front = pareto_front(plan, records)

    def point(record: TrialRecord) -> str:
        pairs = zip(plan.objectives, record.outcome.objectives, strict=True)
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


def score_of(record: TrialRecord) -> float:
    """The score of a complete trial."""
    assert record.outcome.score is not None  # a complete trial has one
    return record.outcome.score


def report_notes(plan: Plan, records: Sequence[TrialRecord]) -> list[str]:
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
