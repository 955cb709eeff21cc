"""What an ablation came to: scores by arm and seed, comparisons with the baseline, effects, and its tables."""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
from rich.table import Table

from dxmi.files import write_atomic
from dxmi.references import ScoredReference, scored_references
from tune.ablation_plan import ARM, SEED, AblationPlan
from tune.console import outdone, outdone_sentences
from tune.designs import BASELINE, two_level_design
from tune.effects import Effect, level_effects
from tune.leaderboard import better, metric_label, number, summary_of
from tune.seed_plan import review
from tune.space import show
from tune.statistics import (
    Array,
    Bootstrap,
    Comparison,
    Direction,
    Summary,
    Variances,
    Verdict,
    compare,
    p_text,
    summarize,
    variance_components,
)
from tune.study import StudyFolder, TrialRecord, TrialState

_STYLES = {Verdict.BETTER: "green", Verdict.WORSE: "red", Verdict.NO_DIFFERENCE: "", Verdict.TOO_FEW_SEEDS: "yellow"}


@dataclass(frozen=True)
class Results:
    """An ablation's results so far.

    Attributes:
        plan: of the study.
        folder: of the study.
        records: its trials by arm and seed.
        seeds: those that any arm has been given, in order.
    """

    plan: AblationPlan
    folder: Path
    records: Mapping[tuple[str, int], TrialRecord]
    seeds: tuple[int, ...]

    @cached_property
    def scores(self) -> dict[str, Array]:
        """Of each arm the objective [seeds], NaN where there is none (yet)."""
        return {arm.name: np.array([self._score(arm.name, seed) for seed in self.seeds]) for arm in self.plan.arms}

    def _score(self, arm: str, seed: int) -> float:
        record = self.records.get((arm, seed))
        if record is None or record.state is not TrialState.COMPLETE:
            return math.nan
        return record.outcome.objectives[0]

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Every arm beside the baseline; nothing as long as the baseline has no score."""
        if np.isnan(self.scores[BASELINE]).all() or len(self.plan.arms) < 2:
            return ()
        direction: Direction = "minimize" if self.plan.ablation.objective.sign > 0 else "maximize"
        if self.plan.seed_plan is None:
            return compare(self.scores, BASELINE, direction=direction, bootstrap=self._bootstrap)
        return review(self._so_far(), BASELINE, self.plan.seed_plan, direction=direction)

    @property
    def _bootstrap(self) -> Bootstrap:
        return Bootstrap(1.0 - self.plan.ablation.level)

    def _so_far(self) -> dict[str, Array]:
        """Each arm's scores at the seeds that it has been given and that have ended, which are the first ones."""
        return {name: scores[: self._ended(name)] for name, scores in self.scores.items()}

    def _ended(self, arm: str) -> int:
        count = 0
        for seed in self.seeds:
            record = self.records.get((arm, seed))
            if record is None or record.state is TrialState.RUNNING:
                break
            count += 1
        return count

    @cached_property
    def summaries(self) -> dict[str, Summary]:
        """Level and spread of each arm."""
        return {name: summarize(name, scores, self._bootstrap) for name, scores in self.scores.items()}

    @cached_property
    def others(self) -> dict[str, dict[str, Summary]]:
        """Level and spread of each arm in each score that is shown beside the objective: by metric, then by arm."""
        return {metric: self._other(metric) for metric in self.plan.ablation.also or ()}

    def _other(self, metric: str) -> dict[str, Summary]:
        scores = {
            arm.name: np.array([self._best_score(arm.name, seed, metric) for seed in self.seeds])
            for arm in self.plan.arms
        }
        return {name: summarize(name, values, self._bootstrap) for name, values in scores.items()}

    def _best_score(self, arm: str, seed: int, metric: str) -> float:
        """Of the best checkpoint; NaN where there is none, as of the energy where none was trained."""
        record = self.records.get((arm, seed))
        if record is None or record.state is not TrialState.COMPLETE:
            return math.nan
        return float(summary_of(record).get("scores", {}).get("best", {}).get(metric, math.nan))

    @cached_property
    def outdone(self) -> list[str]:
        """Sentences about the arms whose mean a training-free sampler beats with no more network evaluations."""
        found = []
        for arm in self.plan.arms:
            scored = self._scored_summaries(arm.name)
            if scored:
                score, summaries = float(np.mean([score for score, _ in scored])), [summary for _, summary in scored]
                found.append(outdone(arm.name, score, _mean_references(summaries), summaries[0]["num_steps"]))
        return outdone_sentences(self.plan.metric, found)

    def _scored_summaries(self, arm: str) -> list[tuple[float, Mapping[str, Any]]]:
        """Score and summary of each complete run of an arm."""
        records = [self.records.get((arm, seed)) for seed in self.seeds]
        complete = [record for record in records if record is not None and record.state is TrialState.COMPLETE]
        pairs = [(record.outcome.score, summary_of(record)) for record in complete]
        return [(score, summary) for score, summary in pairs if score is not None and summary]

    @cached_property
    def variances(self) -> dict[str, Variances]:
        """Of each arm with at least two seeds and two draws of the evaluation's noise, where its spread comes from."""
        found = {}
        for arm in self.plan.arms:
            draws = [draw for draw in (self._generations(arm.name, seed) for seed in self.seeds) if len(draw) > 1]
            if len(draws) > 1:
                found[arm.name] = variance_components(draws)
        return found

    def _generations(self, arm: str, seed: int) -> list[float]:
        record = self.records.get((arm, seed))
        if record is None or record.state is not TrialState.COMPLETE:
            return []
        metric = self.plan.ablation.objective.metric
        key = self.plan.metric if metric == "score" else metric
        return [float(draw[key]) for draw in summary_of(record).get("generations", ()) if key in draw]

    @cached_property
    def effects(self) -> tuple[Effect, ...]:
        """Main effects and interactions of two, of a factorial design with at least two complete seeds."""
        scores = np.array([self.scores[arm.name] for arm in self.plan.arms])  # [arms, seeds]
        if not self.plan.ablation.factors or (~np.isnan(scores)).all(axis=0).sum() < 2:
            return ()
        levels = {name: [arm.levels[name] for arm in self.plan.arms] for name in self.plan.ablation.factors}
        return level_effects(levels, _terms(self.plan), scores, self._bootstrap)


def _mean_references(summaries: Sequence[Mapping[str, Any]]) -> list[ScoredReference]:
    """The references that all summaries have, with their mean scores."""
    scores = [{r.key: r.score for r in scored_references(summary)} for summary in summaries]
    return [
        replace(reference, score=float(np.mean([of_seed[reference.key] for of_seed in scores])))
        for reference in scored_references(summaries[0])
        if all(reference.key in of_seed for of_seed in scores)
    ]


def _terms(plan: AblationPlan) -> list[tuple[str, ...]]:
    """Every main effect, and every interaction of two that is not confounded with one that is there already."""
    factors = list(plan.ablation.factors)
    terms: list[tuple[str, ...]] = [(name,) for name in factors]
    design = two_level_design(plan.ablation)
    aliases = {} if design is None else design.aliases()
    for pair in itertools.combinations(factors, 2):
        if not any(other in terms for other in aliases.get(pair, ())):
            terms.append(pair)
    return terms


def results_of(plan: AblationPlan, folder: StudyFolder, records: Sequence[TrialRecord]) -> Results:
    """The results of an ablation's study."""
    by_cell = {(str(record.values[ARM]), int(record.values[SEED])): record for record in records}
    begun = {seed for _, seed in by_cell}
    return Results(plan, folder.path, by_cell, tuple(seed for seed in plan.seeds if seed in begun))


# ----------------------------------------------------------------------------
# Tables


def arms_frame(results: Results) -> pd.DataFrame:
    """One row an arm, the baseline first.

    Returns:
        Columns arm, changes, seeds, missing, mean, mean_low, mean_high, iqm, std, difference, difference_low,
        difference_high, p, p_holm, improvement (the chance of beating the baseline), verdict, seeds_needed, the
        standard deviations std_training and std_generation where the evaluation's noise was drawn more than once, and
        of each further score X: X, X_low, X_high.
    """
    compared = {comparison.arm: comparison for comparison in results.comparisons}
    return pd.DataFrame([_row(results, arm.name, arm.changes, compared.get(arm.name)) for arm in results.plan.arms])


def _row(results: Results, arm: str, changes: Mapping[str, Any], comparison: Comparison | None) -> dict[str, Any]:
    summary, variances = results.summaries[arm], results.variances.get(arm)
    row = {
        "arm": arm,
        "changes": changes_text(changes),
        "seeds": summary.seeds,
        "missing": summary.missing,
        "mean": summary.mean.estimate,
        "mean_low": summary.mean.low,
        "mean_high": summary.mean.high,
        "iqm": summary.iqm.estimate,
        "std": summary.spread,
    }
    compared = {
        "difference": math.nan if comparison is None else comparison.difference.estimate,
        "difference_low": math.nan if comparison is None else comparison.difference.low,
        "difference_high": math.nan if comparison is None else comparison.difference.high,
        "p": math.nan if comparison is None else comparison.p,
        "p_holm": math.nan if comparison is None else comparison.p_holm,
        "improvement": math.nan if comparison is None else comparison.improvement.estimate,
        "verdict": "" if comparison is None else str(comparison.verdict),
        "seeds_needed": math.nan if comparison is None else comparison.seeds_needed,
    }
    spreads = {
        "std_training": math.nan if variances is None else math.sqrt(variances.training),
        "std_generation": math.nan if variances is None else math.sqrt(variances.generation),
    }
    return {**row, **compared, **spreads, **_other_columns(results, arm)}


def _other_columns(results: Results, arm: str) -> dict[str, float]:
    """Mean and interval of each further score."""
    columns: dict[str, float] = {}
    for metric, summaries in results.others.items():
        mean, name = summaries[arm].mean, metric.removeprefix("eval/")
        ends = (mean.low, mean.high) if summaries[arm].seeds else (math.nan, math.nan)
        columns |= {name: mean.estimate, f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return columns


def changes_text(changes: Mapping[str, Any]) -> str:
    """What an arm changes, in words."""
    return ", ".join(f"{path}={show(value)}" for path, value in changes.items())


def arms_table(results: Results) -> Table:
    """The terminal's table: one row an arm, with its verdict."""
    objective = results.plan.sweep.objectives[0]
    table = Table(
        "arm", "seeds", f"{metric_label(results.plan, objective)}, mean", *other_labels(results),
        "minus baseline", "p (Holm)", "verdict",
        caption=f"{better(objective)}; intervals of {100.0 * (1.0 - results.plan.ablation.level):g} %.",
        caption_justify="left",
    )  # fmt: skip
    compared = {comparison.arm: comparison for comparison in results.comparisons}
    for arm in results.plan.arms:
        summary, comparison = results.summaries[arm.name], compared.get(arm.name)
        cells = ["", "", ""]
        if comparison is not None:
            style = _STYLES[comparison.verdict]
            verdict = f"[{style}]{_verdict(comparison)}[/]" if style else _verdict(comparison)
            cells = [str(comparison.difference), p_text(comparison.p_holm).removeprefix("p = "), verdict]
        table.add_row(arm.name, str(summary.seeds), mean_text(summary), *other_cells(results, arm.name), *cells)
    return table


def other_labels(results: Results) -> list[str]:
    """Headings of the further scores."""
    return [metric.removeprefix("eval/") for metric in results.others]


def other_cells(results: Results, arm: str) -> list[str]:
    """An arm's further scores as text."""
    return [mean_text(summaries[arm]) for summaries in results.others.values()]


def _verdict(comparison: Comparison) -> str:
    needed = comparison.seeds_needed
    if comparison.verdict is not Verdict.TOO_FEW_SEEDS or math.isinf(needed):
        return str(comparison.verdict)
    return f"{comparison.verdict}, {needed:.0f} would do"


def mean_text(summary: Summary) -> str:
    """A mean with its interval, which one seed does not have; nothing where there is no score."""
    if summary.seeds > 1:
        return str(summary.mean)
    return "" if math.isnan(summary.mean.estimate) else number(summary.mean.estimate)


def latex(results: Results) -> str:
    """The table for a paper, in the form of the booktabs package."""
    objective = results.plan.sweep.objectives[0]
    compared = {comparison.arm: comparison for comparison in results.comparisons}
    others = other_labels(results)
    labels = [_escaped(label) for label in (metric_label(results.plan, objective), *others)]
    lines = [
        f"% {_escaped(results.plan.name)}: {_escaped(' '.join(results.plan.ablation.hypothesis.split()))}",
        rf"\begin{{tabular}}{{lrl{'l' * len(others)}lll}}",
        r"\toprule",
        rf"arm & seeds & {' & '.join(labels)} & difference & $p$ (Holm) & verdict \\",
        r"\midrule",
    ]
    for arm in results.plan.arms:
        summary, comparison = results.summaries[arm.name], compared.get(arm.name)
        cells = [_escaped(arm.name), str(summary.seeds), mean_text(summary), *other_cells(results, arm.name)]
        if comparison is None:
            cells += ["", "", ""]
        else:
            p = p_text(comparison.p_holm).removeprefix("p = ").replace("p < ", "$<$ ")
            cells += [str(comparison.difference), p, _escaped(str(comparison.verdict))]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    """Plain text as LaTeX takes it."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)


def write_tables(results: Results) -> tuple[Path, Path]:
    """Write ablation.csv and ablation.tex into the study's folder; returns where they are."""
    folder = results.folder
    csv, tex = folder / "ablation.csv", folder / "ablation.tex"
    write_atomic(csv, arms_frame(results).to_csv(index=False))
    write_atomic(tex, latex(results))
    return csv, tex
