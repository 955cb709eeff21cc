"""Addresses in MLflow's page: a study's curves in one chart, and its best checkpoint.

MLflow 3 keeps the state of a page behind the # of its address, as JSON that must be percent-encoded: only then does a
terminal recognise the whole of it as a link.
"""

import json
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from urllib.parse import quote, urlencode

from dxmi.checkpoint import path_of
from tune.ablation_plan import ARM, AblationPlan
from tune.leaderboard import best_of
from tune.plans import Plan
from tune.store import Ledger, Run
from tune.study import TrialRecord, TrialState, ranked

_MOST_CURVES = 100
"""In one chart, which MLflow draws in seconds; the address has 40 characters for each."""
_MACHINE_LEARNING = {"workflowType": "machine_learning"}
"""MLflow's page keeps what it shows, generative AI at first, in the browser: this comes before it."""


@dataclass(frozen=True)
class StudyPages:
    """Where MLflow shows a study.

    Attributes:
        runs: address of the table of the experiment's runs.
        curves: address of the chart in which the trials' curves lie on one another; empty without any curve.
        about: what the chart shows.
        best: address of the best trial's checkpoint; empty if no trial is complete.
    """

    runs: str
    curves: str = ""
    about: str = ""
    best: str = ""

    def lines(self) -> list[str]:
        """For people, a line each."""
        found = {self.about: self.curves, "best checkpoint": self.best}
        return [f"{label}: {address}" for label, address in found.items() if address] or [f"runs: {self.runs}"]


def study_pages(server: str, ledger: Ledger, plan: Plan, records: Sequence[TrialRecord]) -> StudyPages | None:
    """Where a server shows a study.

    Args:
        server: http://host:port of MLflow, which need not run.
        ledger: of the experiment that the study is recorded in.
        plan: of the study.
        records: its trials.

    Returns:
        The addresses, or None if MLflow has no record of the study.
    """
    runs = _runs_by_trial(ledger, plan)
    if runs is None:
        return None
    with_curve = [record for record in records if plan.metric in runs.get(_trial(plan, record), _NO_RUN).keys]
    chosen = _chosen(plan, with_curve)
    shown = [runs[_trial(plan, record)].id for record in chosen]
    return StudyPages(
        runs=runs_page(server, ledger.experiment),
        curves=curves_page(server, ledger.experiment, shown, plan.metric) if shown else "",
        about=_about(plan, len(chosen), len(with_curve)),
        best=_best_page(server, ledger.experiment, plan, records, runs),
    )


_NO_RUN = Run("", "", {}, "", frozenset(), frozenset())


def _trial(plan: Plan, record: TrialRecord) -> str:
    return f"{plan.name}/{record.number:04d}"


def _runs_by_trial(ledger: Ledger, plan: Plan) -> dict[str, Run] | None:
    """The study's runs by trial_id; None if MLflow has no run of the study."""
    every = ledger.find({"study": plan.name})
    parents = [run.id for run in every if run.tags.get("signature") == plan.signature and _parent(run) is None]
    if not parents:
        return None
    arms = [run.id for run in every if "trial_id" not in run.tags and _parent(run) == parents[0]]
    above = {parents[0], *arms}
    return {run.tags["trial_id"]: run for run in every if "trial_id" in run.tags and _parent(run) in above}


def _parent(run: Run) -> str | None:
    return run.tags.get("mlflow.parentRunId")


def _chosen(plan: Plan, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Those whose curves fit into a chart: the best trials, or of an ablation as many seeds of every arm."""
    if not isinstance(plan, AblationPlan):
        return ranked(plan, records)[:_MOST_CURVES]
    order = {arm.name: place for place, arm in enumerate(plan.arms)}
    by_arm = sorted(records, key=lambda record: (order[str(record.values[ARM])], record.number))
    each = max(1, _MOST_CURVES // len(order))
    arms = [list(group) for _, group in groupby(by_arm, key=lambda record: record.values[ARM])]
    most = each if len(by_arm) > _MOST_CURVES else len(by_arm)
    return [record for arm in arms for record in arm[:most]][:_MOST_CURVES]


def _about(plan: Plan, shown: int, found: int) -> str:
    name = plan.metric.removeprefix("eval/")
    if isinstance(plan, AblationPlan):
        some = "every arm and seed" if shown == found else f"the first seeds of the arms ({shown} runs of {found})"
    else:
        some = f"all {found} trials" if shown == found else f"the best {shown} of {found} trials"
    return f"{name} of {some}"


def _best_page(
    server: str, experiment: str, plan: Plan, records: Sequence[TrialRecord], runs: Mapping[str, Run]
) -> str:
    best = best_of(plan, records)
    run = None if best is None else runs.get(_trial(plan, best))
    if best is None or run is None or best.outcome.step is None:
        return ""
    return artifact_page(server, experiment, run.id, f"checkpoints/{path_of(Path(), best.outcome.step).name}")


# ----------------------------------------------------------------------------
# Addresses


def runs_page(server: str, experiment: str) -> str:
    """The table of an experiment's runs."""
    return f"{server.rstrip('/')}/#/experiments/{quote(experiment, safe='')}/runs?{urlencode(_MACHINE_LEARNING)}"


def curves_page(server: str, experiment: str, runs: Sequence[str], metric: str) -> str:
    """The chart of a metric of several runs, by step."""
    state = {
        "runs": _json(runs),
        "metric": _json(metric),
        "experiments": _json([experiment]),
        "plot_metric_keys": _json([metric]),
        "plot_layout": _json({"autosize": True}),
        "x_axis": "step",
        "y_axis_scale": "linear",
        "line_smoothness": "1",
        "show_point": "false",
        "deselected_curves": "[]",
        "last_linear_y_axis_range": "[]",
        **_MACHINE_LEARNING,
    }
    return f"{server.rstrip('/')}/#/metric?{urlencode(state, quote_via=quote, safe='')}"


def artifact_page(server: str, experiment: str, run: str, path: str) -> str:
    """A file or folder among a run's artifacts."""
    place = f"{quote(experiment, safe='')}/runs/{quote(run, safe='')}/artifacts/{quote(path)}"
    return f"{server.rstrip('/')}/#/experiments/{place}?{urlencode(_MACHINE_LEARNING)}"


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
