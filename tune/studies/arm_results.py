"""Results of an ablation: scores by arm and seed, comparisons with the baseline, effects, and output files.

A run that diverges, crashes or is stopped has no score, and such runs are not a random sample: if the worst runs of an
arm diverge, the mean of its other runs looks too good. An arm is therefore tested only if all of its runs, and the
baseline's at the same seeds, are complete. Otherwise its verdict states what is missing (`failed at 3 of 9 seeds`,
`2 of 9 running`), and it has no p-value. The difference is still shown, at the seeds that have both scores.
"""

import itertools
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from dxmi.errors import UserError
from dxmi.evaluation.scored_references import ScoredReference, best_reference, scored_references
from dxmi.metrics.keys import Direction
from dxmi.persistence.files import write_atomic
from tune.plans.ablation import ARM, SEED, AblationPlan
from tune.plans.arms import BASELINE, two_level_design
from tune.search.space import show
from tune.stats.comparison import Comparison, Verdict, compare
from tune.stats.effects import Effect, level_effects
from tune.stats.intervals import Bootstrap, Interval, Method
from tune.stats.multiple_testing import Array
from tune.stats.power import Correction, SeedRange, correction_of
from tune.stats.sequential import review
from tune.stats.summary import ArmSummary, Variances, summarize, variance_components
from tune.stats.tests import p_text
from tune.studies.folder import StudyFolder
from tune.studies.leaderboard import NOT_COMPUTED, metric_label, number, summary_of
from tune.studies.outdone import outdone, outdone_sentences
from tune.studies.records import TrialRecord, TrialState
from tune.studies.study import Study

if TYPE_CHECKING:
    import pandas as pd

_TESTS = {
    Correction.NONE: (
        "p: sign-flip test of the paired differences, exact if arm and baseline are exchangeable at each seed."
    ),
    Correction.CLOSED: (
        "p: closed testing over all sets of arms, by permutation of arms and baseline within seeds; exact if an arm "
        "without effect is exchangeable with the baseline at each seed."
    ),
    Correction.HOLM: (
        "p: sign-flip tests of the paired differences with Holm's correction, exact if an arm without effect is "
        "exchangeable with the baseline at each seed."
    ),
}
TUNING = "tuning"
"""Subfolder of a study that holds one study for the tuning of each arm."""
_LOST = {
    "failed": (TrialState.DIVERGED, TrialState.FAILED),
    "pruned": (TrialState.PRUNED,),
    "stopped": (TrialState.STOPPED,),
}
"""States of runs that ended without a score, by the word that describes them."""


@dataclass(frozen=True)
class Runs:
    """Numbers of an arm's runs by state.

    Attributes:
        planned: Number of runs planned for the arm so far.
        states: Number of started runs in each state.
    """

    planned: int
    states: Mapping[TrialState, int]

    @property
    def not_begun(self) -> int:
        """Number of runs that have not started."""
        return self.planned - sum(self.states.values())

    @property
    def unfinished(self) -> int:
        """Number of runs that may still get a score."""
        return self.states.get(TrialState.RUNNING, 0) + self.not_begun

    @property
    def missing(self) -> int:
        """Number of runs without a score."""
        return self.planned - self.states.get(TrialState.COMPLETE, 0)

    @property
    def lost(self) -> int:
        """Number of runs that ended without a score."""
        return self.missing - self.unfinished

    def __str__(self) -> str:
        """Numbers of missing runs by state, like `2 diverged, 1 running`; empty if none is missing."""
        counts = {state.value: self.states.get(state, 0) for state in TrialState if state is not TrialState.COMPLETE}
        return _counted({**counts, "not started": self.not_begun})

    @property
    def gaps(self) -> str:
        """Verdict about missing runs: `failed at 3 of 9 seeds`, `2 of 9 running`; empty if none is missing."""
        lost = {word: sum(self.states.get(state, 0) for state in states) for word, states in _LOST.items()}
        still = _counted({"running": self.states.get(TrialState.RUNNING, 0), "not started": self.not_begun})
        if not self.lost:
            return still.replace(" ", f" of {self.planned} ", 1)
        ended = ", ".join(f"{word} at {count}" for word, count in lost.items() if count)
        return f"{ended} of {self.planned} seeds" + (f", {still}" if still else "")


def _counted(counts: Mapping[str, int]) -> str:
    return ", ".join(f"{count} {word}" for word, count in counts.items() if count)


@dataclass(frozen=True)
class Results:
    """Results of an ablation so far.

    Attributes:
        plan: Plan of the study.
        folder: Folder of the study.
        records: Trial records by arm and seed.
        seeds: Seeds that any arm has been run with, in order.
    """

    plan: AblationPlan
    folder: Path
    records: Mapping[tuple[str, int], TrialRecord]
    seeds: tuple[int, ...]

    @cached_property
    def scores(self) -> dict[str, Array]:
        """Objective values [seeds] of each arm, NaN where there is no score (yet)."""
        return {arm.name: np.array([self._score(arm.name, seed) for seed in self.seeds]) for arm in self.plan.arms}

    def _score(self, arm: str, seed: int) -> float:
        record = self.records.get((arm, seed))
        if record is None or record.state is not TrialState.COMPLETE:
            return math.nan
        return record.outcome.objectives[0]

    # ------------------------------------------------------------------------
    # Missing runs

    @cached_property
    def runs(self) -> dict[str, Runs]:
        """Numbers of runs by state, for each arm."""
        return {arm.name: self._runs(arm.name, self._planned(arm.name)) for arm in self.plan.arms}

    def _planned(self, arm: str) -> int:
        """Number of runs planned so far: all seeds, or in a sequential study the first ones and those added since."""
        begun = sum(name == arm for name, _ in self.records)
        return max(begun, self.plan.ablation.seeds.first)

    def _runs(self, arm: str, planned: int) -> Runs:
        """Numbers of an arm's runs at the first `planned` seeds."""
        records = (self.records.get((arm, seed)) for seed in self.plan.seeds[:planned])
        return Runs(planned, Counter(record.state for record in records if record is not None))

    @cached_property
    def gaps(self) -> dict[str, str]:
        """Text about the missing runs, its own and the baseline's, of each arm that lacks any for its verdict."""
        found = {arm: self._gaps(arm) for arm in self.runs}
        return {arm: text for arm, text in found.items() if text}

    def _gaps(self, arm: str) -> str:
        own, baseline = self.runs[arm], self._runs(BASELINE, self.runs[arm].planned)
        others = f"baseline {baseline.gaps}" if arm != BASELINE and baseline.gaps else ""
        return ", ".join(text for text in (own.gaps, others) if text)

    @property
    def unfinished(self) -> str:
        """Sentence about the runs that may still get a score; empty if there are none."""
        running = sum(runs.states.get(TrialState.RUNNING, 0) for runs in self.runs.values())
        counts = {"running": running, "not started": sum(runs.not_begun for runs in self.runs.values())}
        total = sum(runs.planned for runs in self.runs.values())
        if not any(counts.values()):
            return ""
        until = "" if self.plan.seed_plan else " Until then, p-values have Holm's correction for all arms."
        return f"The study is not finished: of {total} runs, {_counted(counts)}.{until}"

    # ------------------------------------------------------------------------
    # Comparisons

    @cached_property
    def comparisons(self) -> tuple[Comparison, ...]:
        """Comparison of every arm with the baseline; empty while the baseline has no score."""
        if np.isnan(self.scores[BASELINE]).all() or len(self.plan.arms) < 2:
            return ()
        return tuple(
            self._untested(comparison.arm) if comparison.arm in self.gaps else comparison
            for comparison in self._tested()
        )

    def _tested(self) -> tuple[Comparison, ...]:
        """Joint tests of all arms, with the scores of arms with missing runs left out."""
        if self.plan.seed_plan is None:
            scores = {name: self._complete_only(name, own) for name, own in self.scores.items()}
            is_final = not self.unfinished
            found = compare(scores, BASELINE, direction=self._direction, bootstrap=self._bootstrap, is_final=is_final)
            return found if is_final else tuple(map(self._so_far_open, found))
        so_far = {
            name: own if not self._is_lost(name) else self._complete_only(name, own)
            for name, own in self._so_far().items()
        }
        return review(so_far, BASELINE, self.plan.seed_plan, direction=self._direction)

    def _so_far_open(self, comparison: Comparison) -> Comparison:
        """Set an arm's verdict to unfinished while other arms run, unless it is significant with Holm's correction."""
        if comparison.p_adjusted <= self._bootstrap.error_rate:
            return comparison
        reason = "Runs of other arms have not ended, and p-values are for all arms together."
        return replace(comparison, verdict=Verdict.UNFINISHED, reason=reason, gaps="other arms have not ended")

    def _is_lost(self, arm: str) -> bool:
        """Whether a run that the arm's verdict depends on ended without a score."""
        return bool(self.runs[arm].lost or self._runs(BASELINE, self.runs[arm].planned).lost)

    def _complete_only(self, arm: str, scores: Array) -> Array:
        return np.full_like(scores, math.nan) if arm in self.gaps and arm != BASELINE else scores

    def _untested(self, arm: str) -> Comparison:
        """Comparison without a test: the difference at seeds with both scores, and the missing runs as verdict."""
        pair = {BASELINE: self.scores[BASELINE], arm: self.scores[arm]}
        (found,) = compare(pair, BASELINE, direction=self._direction, bootstrap=self._bootstrap)
        baseline = self._runs(BASELINE, self.runs[arm].planned)
        is_lost = self._is_lost(arm)
        return replace(
            found,
            left_out=self.runs[arm].planned - found.seeds,
            improvement=Interval(math.nan, 0.0, 1.0, self._bootstrap.level, Method.NONE),
            p=math.nan,
            p_adjusted=math.nan,
            seeds_needed=SeedRange(math.nan, math.nan),
            verdict=Verdict.FAILED if is_lost else Verdict.UNFINISHED,
            reason=_why_untested(self.runs[arm], baseline, is_lost),
            gaps=self.gaps[arm],
        )

    @property
    def _direction(self) -> Direction:
        return "minimize" if self.plan.objectives[0].sign > 0 else "maximize"

    @property
    def _bootstrap(self) -> Bootstrap:
        return Bootstrap(1.0 - self.plan.ablation.level)

    def _so_far(self) -> dict[str, Array]:
        """Each arm's scores at the leading seeds whose runs have ended for both the arm and the baseline."""
        paired = self._ended(BASELINE)
        return {name: scores[: min(self._ended(name), paired)] for name, scores in self.scores.items()}

    def _ended(self, arm: str) -> int:
        count = 0
        for seed in self.seeds:
            record = self.records.get((arm, seed))
            if record is None or record.state is TrialState.RUNNING:
                break
            count += 1
        return count

    @cached_property
    def summaries(self) -> dict[str, ArmSummary]:
        """Summary statistics of each arm."""
        return {name: summarize(name, scores, self._bootstrap) for name, scores in self.scores.items()}

    @cached_property
    def others(self) -> dict[str, dict[str, ArmSummary]]:
        """Summary statistics of the scores that are shown in addition to the objective, by metric and arm."""
        return {metric: self._other(metric) for metric in self.plan.also}

    def _other(self, metric: str) -> dict[str, ArmSummary]:
        scores = {
            arm.name: np.array([self._best_score(arm.name, seed, metric) for seed in self.seeds])
            for arm in self.plan.arms
        }
        return {name: summarize(name, values, self._bootstrap) for name, values in scores.items()}

    def _best_score(self, arm: str, seed: int, metric: str) -> float:
        """Score of the best checkpoint; NaN if it does not exist, like scores of an energy that was not trained."""
        record = self.records.get((arm, seed))
        if record is None or record.state is not TrialState.COMPLETE:
            return math.nan
        return float(summary_of(record).get("scores", {}).get("best", {}).get(metric, math.nan))

    @cached_property
    def outdone(self) -> list[str]:
        """Sentences about arms whose mean is worse than a training-free sampler with at most as many evaluations."""
        found = []
        for arm in self.plan.arms:
            scored = self._scored_summaries(arm.name)
            if scored:
                score, summaries = float(np.mean([score for score, _ in scored])), [summary for _, summary in scored]
                evaluations, direction = summaries[0]["num_steps"], self.plan.direction
                found.append(outdone(arm.name, score, _mean_references(summaries), evaluations, direction))
        return outdone_sentences(self.plan.metric, found)

    @cached_property
    def against_free(self) -> tuple[ScoredReference, Comparison] | None:
        """The baseline compared with the best training-free sampler, paired by seed, since seeds have their own models.

        The sampler is the one with the best mean over the seeds among those with at most as many network evaluations
        as the baseline. This choice favors the samplers. The comparison is a single test, whatever arms the study has.
        None unless the objective is the score and all seeds of the baseline have ended with one.
        """
        scored = self._scored_summaries(BASELINE)
        if self.plan.ablation.objective.metric != "score" or len(scored) < self.runs[BASELINE].planned:
            return None
        summaries = [summary for _, summary in scored]
        best = best_reference(_mean_references(summaries), summaries[0]["num_steps"], self._direction)
        if best is None:
            return None
        scores = {
            best.key: np.array([float(summary["reference"][best.key]) for summary in summaries]),
            BASELINE: np.array([score for score, _ in scored]),
        }
        (found,) = compare(scores, best.key, direction=self._direction, bootstrap=self._bootstrap)
        return best, found

    def _scored_summaries(self, arm: str) -> list[tuple[float, Mapping[str, Any]]]:
        """Score and summary of each complete run of an arm."""
        records = [self.records.get((arm, seed)) for seed in self.seeds]
        complete = [record for record in records if record is not None and record.state is TrialState.COMPLETE]
        pairs = [(record.outcome.score, summary_of(record)) for record in complete]
        return [(score, summary) for score, summary in pairs if score is not None and summary]

    @cached_property
    def variances(self) -> dict[str, Variances]:
        """Variance components of each arm with at least two seeds and two draws of the evaluation's noise."""
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
        """Main effects and two-factor interactions of a factorial design with at least two complete seeds.

        They are computed at the seeds at which every run is complete. They are not tested if a run is missing or in a
        sequential study, since the tests are not corrected for interim analyses.
        """
        if not self.plan.ablation.factors or self.complete.sum() < 2:
            return ()
        scores = np.array([self.scores[arm.name] for arm in self.plan.arms])  # [arms, seeds]
        to_come = max(runs.planned for runs in self.runs.values()) - len(self.seeds)
        scores = np.pad(scores, ((0, 0), (0, to_come)), constant_values=math.nan)
        levels = {name: [arm.levels[name] for arm in self.plan.arms] for name in self.plan.ablation.factors}
        found = level_effects(levels, _terms(self.plan), scores, self._bootstrap)
        if self.plan.seed_plan is None:
            return found
        return tuple(replace(effect, left_out=0, p=math.nan, p_holm=math.nan) for effect in found)

    @cached_property
    def complete(self) -> NDArray[np.bool_]:
        """Whether every arm has a score, by seed [seeds]."""
        complete: NDArray[np.bool_] = (~np.isnan(np.array([*self.scores.values()]))).all(axis=0)
        return complete

    @property
    def no_effects(self) -> str:
        """Sentence that explains why there are no effects; empty if there are, or if the design has no factors."""
        if not self.plan.ablation.factors or self.effects:
            return ""
        return (
            "Effects require two seeds at which every run of the design is complete; "
            f"so far there {'is 1' if self.complete.sum() == 1 else 'are none'}."
        )

    @cached_property
    def tuning(self) -> dict[str, Runs]:
        """Numbers of tuning trials by state, for each arm; empty without tuning."""
        if self.plan.ablation.tuning is None:
            return {}
        return {arm.name: self._tuning(arm.name) for arm in self.plan.arms}

    def _tuning(self, arm: str) -> Runs:
        planned = self.plan.ablation.tuning.trials if self.plan.ablation.tuning is not None else 0
        try:
            records = Study.read(StudyFolder(self.folder / TUNING / f"{self.plan.name}-{arm}")).records()
        except UserError:  # tuning has not started, or only the study itself was copied
            return Runs(planned, {})
        return Runs(planned, Counter(record.state for record in records))


def _why_untested(own: Runs, baseline: Runs, is_lost: bool) -> str:
    whose = {"the arm": own, "the baseline": baseline}
    missing = " and ".join(
        f"{runs.missing} of {runs.planned} runs of {name} ({runs})" for name, runs in whose.items() if runs.missing
    )
    if is_lost:
        return (
            f"Without a score: {missing}. They are not missing at random, so the other scores do not represent the "
            "arm, and no test is made; the difference is the mean over the seeds that have both scores."
        )
    return f"Without a score yet: {missing}. The test is made when all runs have ended."


def _mean_references(summaries: Sequence[Mapping[str, Any]]) -> list[ScoredReference]:
    """The references that all summaries contain, with their mean scores."""
    scores = [{r.key: r.score for r in scored_references(summary)} for summary in summaries]
    return [
        replace(reference, score=float(np.mean([of_seed[reference.key] for of_seed in scores])))
        for reference in scored_references(summaries[0])
        if all(reference.key in of_seed for of_seed in scores)
    ]


def _terms(plan: AblationPlan) -> list[tuple[str, ...]]:
    """All main effects, and all two-factor interactions that are not confounded with an earlier term."""
    factors = list(plan.ablation.factors)
    terms: list[tuple[str, ...]] = [(name,) for name in factors]
    design = two_level_design(plan.ablation)
    aliases = {} if design is None else design.aliases()
    for pair in itertools.combinations(factors, 2):
        if not any(other in terms for other in aliases.get(pair, ())):
            terms.append(pair)
    return terms


def results_of(plan: AblationPlan, folder: StudyFolder, records: Sequence[TrialRecord]) -> Results:
    """Collect the results of an ablation."""
    by_cell = {(str(record.values[ARM]), int(record.values[SEED])): record for record in records}
    begun = {seed for _, seed in by_cell}
    return Results(plan, folder.path, by_cell, tuple(seed for seed in plan.seeds if seed in begun))


# ----------------------------------------------------------------------------
# Tables


def arms_frame(results: Results) -> "pd.DataFrame":
    """Results with one row per arm, the baseline first.

    Returns:
        Data frame with the columns arm, changes, seeds (number with a score), missing (number without), the numbers of
        missing runs that are diverged, failed, pruned, stopped, running and not_begun, mean, mean_low, mean_high, iqm,
        std, difference, difference_low, difference_high, p (uncorrected), p_adjusted (corrected for all arms),
        correction (its method), improvement (probability of beating the baseline), verdict (or the missing runs),
        seeds_needed_low, seeds_needed_high, the standard deviations std_training and std_generation if the evaluation's
        noise was drawn more than once, X, X_low and X_high for each further score X, and with tuning inside arms
        tuning_trials and tuning_missing (the number of tuning trials that are not complete).
    """
    import pandas as pd  # noqa: PLC0415

    compared = {comparison.arm: comparison for comparison in results.comparisons}
    return pd.DataFrame([_row(results, arm.name, arm.changes, compared.get(arm.name)) for arm in results.plan.arms])


def _row(results: Results, arm: str, changes: Mapping[str, Any], comparison: Comparison | None) -> dict[str, Any]:
    summary, variances, runs = results.summaries[arm], results.variances.get(arm), results.runs[arm]
    states = (state for state in TrialState if state is not TrialState.COMPLETE)
    row = {
        "arm": arm,
        "changes": changes_text(changes),
        "seeds": summary.seeds,
        "missing": runs.missing,
        **{state.value: runs.states.get(state, 0) for state in states},
        "not_begun": runs.not_begun,
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
        "p_adjusted": math.nan if comparison is None else comparison.p_adjusted,
        "correction": "" if comparison is None else str(comparison.correction),
        "improvement": math.nan if comparison is None else comparison.improvement.estimate,
        "verdict": verdict_text(results, arm, comparison),
        "seeds_needed_low": math.nan if comparison is None else comparison.seeds_needed.low,
        "seeds_needed_high": math.nan if comparison is None else comparison.seeds_needed.high,
    }
    spreads = {
        "std_training": math.nan if variances is None else math.sqrt(variances.training),
        "std_generation": math.nan if variances is None else math.sqrt(variances.generation),
    }
    tuned = results.tuning.get(arm)
    tuning = {} if tuned is None else {"tuning_trials": tuned.planned, "tuning_missing": tuned.missing}
    return {**row, **compared, **spreads, **_other_columns(results, arm), **tuning}


def _other_columns(results: Results, arm: str) -> dict[str, float]:
    """Columns with mean and interval of each further score."""
    columns: dict[str, float] = {}
    for metric, summaries in results.others.items():
        mean, name = summaries[arm].mean, metric.removeprefix("eval/")
        ends = (mean.low, mean.high) if summaries[arm].seeds else (math.nan, math.nan)
        columns |= {name: mean.estimate, f"{name}_low": ends[0], f"{name}_high": ends[1]}
    return columns


def changes_text(changes: Mapping[str, Any]) -> str:
    """An arm's changes as text."""
    return ", ".join(f"{path}={show(value)}" for path, value in changes.items())


def notes(results: Results) -> list[str]:
    """Notes to be shown under every table of arms."""
    generations = results.plan.ablation.generations
    found = [f"Intervals have a level of {100.0 * (1.0 - results.plan.ablation.level):g} %.", p_note(results)]
    if generations > 1:
        found.append(f"The score of a run is its mean over {generations} draws of the evaluation's noise.")
    if results.gaps:
        found.append("Where runs are missing, means and differences are over the other runs, and no test is made.")
    if any(NOT_COMPUTED in other_cells(results, arm.name) for arm in results.plan.arms):
        found.append(f"{NOT_COMPUTED}: not computed.")
    found += [
        f"{arm} was tuned with {runs.states.get(TrialState.COMPLETE, 0)} of {runs.planned} trials ({runs})."
        for arm, runs in results.tuning.items()
        if runs.missing and runs.states
    ]
    return [*found, *([results.unfinished] if results.unfinished else [])]


def verdict_text(results: Results, arm: str, comparison: Comparison | None) -> str:
    """The verdict on an arm for a table; for the baseline, its missing runs."""
    return results.gaps.get(arm, "") if comparison is None else comparison.verdict_text


def p_cell(comparison: Comparison) -> str:
    """The adjusted p-value for a table; empty where no test was taken."""
    return "" if math.isnan(comparison.p_adjusted) else p_text(comparison.p_adjusted).removeprefix("p = ")


def p_label(results: Results) -> str:
    """Heading of the column of adjusted p-values: `p (closed)`, `p (Holm)` or, for a single arm, `p`."""
    correction = _correction(results)
    return "p" if correction is Correction.NONE else f"p ({correction})"


def p_note(results: Results) -> str:
    """Note on the test that the p-values belong to, and its hypothesis."""
    return _TESTS[_correction(results)]


def _correction(results: Results) -> Correction:
    return correction_of(max(1, len(results.plan.arms) - 1), results.plan.ablation.level)


def other_labels(results: Results) -> list[str]:
    """Headings of the further scores."""
    return [metric.removeprefix("eval/") for metric in results.others]


def other_cells(results: Results, arm: str) -> list[str]:
    """An arm's further scores as text."""
    return [mean_text(summaries[arm]) or NOT_COMPUTED for summaries in results.others.values()]


def mean_text(summary: ArmSummary) -> str:
    """A mean with its interval, or without one for a single seed; empty if there is no score."""
    if summary.seeds > 1:
        return str(summary.mean)
    return "" if math.isnan(summary.mean.estimate) else number(summary.mean.estimate)


def latex(results: Results) -> str:
    """The table in LaTeX, for the booktabs package."""
    objective = results.plan.objectives[0]
    compared = {comparison.arm: comparison for comparison in results.comparisons}
    others = other_labels(results)
    labels = [_escaped(label) for label in (metric_label(results.plan, objective), *others)]
    p_heading = p_label(results).replace("p", "$p$", 1)
    lines = [
        f"% {_escaped(results.plan.name)}: {_escaped(' '.join(results.plan.ablation.hypothesis.split()))}",
        *(f"% {_escaped(sentence)}" for sentence in notes(results)),
        rf"\begin{{tabular}}{{lrll{'l' * len(others)}lll}}",
        r"\toprule",
        rf"arm & seeds & missing & {' & '.join(labels)} & difference & {p_heading} & verdict \\",
        r"\midrule",
    ]
    for arm in results.plan.arms:
        summary, comparison = results.summaries[arm.name], compared.get(arm.name)
        counts = str(summary.seeds), str(results.runs[arm.name])
        cells = [_escaped(arm.name), *counts, mean_text(summary), *other_cells(results, arm.name)]
        verdict = _escaped(verdict_text(results, arm.name, comparison))
        if comparison is None:
            cells += ["", "", verdict]
        else:
            cells += [str(comparison.difference), p_cell(comparison).replace("p < ", "$<$ "), verdict]
        lines.append(" & ".join(cells) + r" \\")
    return "\n".join([*lines, r"\bottomrule", r"\end{tabular}", ""])


def _escaped(text: str) -> str:
    """Escape plain text for LaTeX."""
    special = {"\\": r"\textbackslash{}", "~": r"\textasciitilde{}", "^": r"\textasciicircum{}"}
    special |= {character: f"\\{character}" for character in "&%$#_{}"}
    return "".join(special.get(character, character) for character in text)


def write_tables(results: Results) -> tuple[Path, Path]:
    """Write ablation.csv and ablation.tex into the study's folder and return their paths."""
    folder = results.folder
    csv, tex = folder / "ablation.csv", folder / "ablation.tex"
    write_atomic(csv, arms_frame(results).to_csv(index=False))
    write_atomic(tex, latex(results))
    return csv, tex
