"""Addresses in the MLflow UI: a study's curves in one chart, and its best checkpoint.

MLflow 3 keeps the state of a page in the fragment of its URL as JSON. It is percent-encoded so that terminals recognize
the whole address as a link.
"""

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path
from urllib.parse import quote, urlencode

from dxmi.errors import UserError
from dxmi.metrics.keys import MINIMIZE, Direction
from dxmi.persistence.checkpoint import path_of
from tune.integrations.mlflow_store import MlflowWriter, TrackedRun, open_writer
from tune.integrations.mlflow_tracker import reason_of
from tune.plans.ablation import ARM, AblationPlan
from tune.plans.sweep import Plan
from tune.studies.folder import StudyFolder, studies_in
from tune.studies.leaderboard import best_of
from tune.studies.ranking import ranked
from tune.studies.records import TrialRecord
from tune.studies.study import Study

_MOST_CURVES = 100
"""Maximum number of curves in a chart, which MLflow draws in seconds; each takes 40 characters of the address."""
_MOST_STUDIES = 5
"""Number of studies listed when no study is given."""
_MODEL_TRAINING = {"workflowType": "machine_learning"}
"""Selects MLflow's pages for model training; otherwise a new browser shows those for generative AI."""


@dataclass(frozen=True)
class StudyPages:
    """Addresses of a study's pages in the MLflow UI.

    Attributes:
        trials: address of the table of its trials with charts of all their metrics.
        curves: address of the chart of all trials' score curves; empty if there are none.
        about: what the chart shows.
        best: address of the best trial's checkpoint; empty if no trial is complete.
    """

    trials: str
    curves: str = ""
    about: str = ""
    best: str = ""

    def lines(self) -> list[str]:
        """Return one line of text per address."""
        found = {self.about: self.curves, "best checkpoint": self.best, "all metrics": self.trials}
        return [f"{label}: {address}" for label, address in found.items() if address]


def study_pages(folder: StudyFolder, plan: Plan, records: Sequence[TrialRecord], server: str) -> StudyPages | None:
    """Find the addresses of a study's pages in the MLflow UI.

    Args:
        folder: folder of the study.
        plan: plan of the study, which is recorded in MLflow.
        records: its trials.
        server: http://host:port of the server of the local store; not used for a study recorded on another server.

    Returns:
        The addresses, or None if MLflow has no record of the study.

    Raises:
        UserError: the store cannot be opened or read, or the server is unreachable.
    """
    uri = plan.tracking.uri
    try:
        writer = open_writer(folder.path.parent, uri, plan.tracking.experiment)
        return pages_on(server if uri == "local" else uri, writer, plan, records)
    except UserError:
        raise
    except Exception as error:  # MLflow raises many types
        what = "MLflow's record" if uri == "local" else f"the MLflow server {uri}"
        raise UserError(
            f"The pages of the study {plan.name} cannot be read from {what}: {reason_of(error)}."
        ) from error


def pages_on(server: str, writer: MlflowWriter, plan: Plan, records: Sequence[TrialRecord]) -> StudyPages | None:
    """`study_pages` with an open writer."""
    runs = _runs_by_trial(writer, plan)
    if runs is None:
        return None
    with_curve = [record for record in records if plan.metric in runs.get(_trial(plan, record), _NO_RUN).keys]
    chosen = _chosen(plan, with_curve)
    shown = [runs[_trial(plan, record)].id for record in chosen]
    return StudyPages(
        trials=trials_page(server, writer.experiment, plan.name, plan.metric, plan.direction),
        curves=curves_page(server, writer.experiment, shown, plan.metric) if shown else "",
        about=_about(plan, len(chosen), len(with_curve)),
        best=_best_page(server, writer.experiment, plan, records, runs),
    )


def newest_pages(root: Path, server: str) -> Iterator[str]:
    """Yield lines about the most recent studies in a folder, newest first, and how to open the others."""
    folders = sorted(studies_in(root), key=lambda folder: folder.changed, reverse=True)
    for folder in folders[:_MOST_STUDIES]:
        yield f"{folder.path.name}:"
        yield from (f"  {line}" for line in _lines_about(folder, server))
    if len(folders) > _MOST_STUDIES:
        yield f"and {len(folders) - _MOST_STUDIES} older studies: dxmi ui STUDY"


def _lines_about(folder: StudyFolder, server: str) -> list[str]:
    try:
        study = Study.read(folder)
        if study.plan.tracking.uri == "none":
            return ["not recorded in MLflow"]
        if study.plan.tracking.uri != "local":  # the server may be unreachable: it is contacted only on request
            return [f"recorded at {study.plan.tracking.uri}: dxmi ui {folder.path.name} prints its addresses there"]
        pages = study_pages(folder, study.plan, study.records(), server)
    except UserError as error:
        return [str(error)]
    return ["nothing recorded yet"] if pages is None else pages.lines()


_NO_RUN = TrackedRun("", "", {}, "", frozenset(), frozenset())


def _trial(plan: Plan, record: TrialRecord) -> str:
    return f"{plan.name}/{record.number:04d}"


def _runs_by_trial(writer: MlflowWriter, plan: Plan) -> dict[str, TrackedRun] | None:
    """Return the study's runs by trial_id, or None if MLflow has no run of the study."""
    every = writer.find({"study": plan.name})
    parents = [run.id for run in every if run.tags.get("signature") == plan.signature and _parent(run) is None]
    if not parents:
        return None
    arms = [run.id for run in every if "trial_id" not in run.tags and _parent(run) == parents[0]]
    above = {parents[0], *arms}
    return {run.tags["trial_id"]: run for run in every if "trial_id" in run.tags and _parent(run) in above}


def _parent(run: TrackedRun) -> str | None:
    return run.tags.get("mlflow.parentRunId")


def _chosen(plan: Plan, records: Sequence[TrialRecord]) -> list[TrialRecord]:
    """Select trials whose curves fit into a chart: the best ones, or equally many seeds of every arm of an ablation."""
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
    server: str, experiment: str, plan: Plan, records: Sequence[TrialRecord], runs: Mapping[str, TrackedRun]
) -> str:
    best = best_of(plan, records)
    run = None if best is None else runs.get(_trial(plan, best))
    if best is None or run is None or best.outcome.step is None:
        return ""
    return artifact_page(server, experiment, run.id, f"checkpoints/{path_of(Path(), best.outcome.step).name}")


# ----------------------------------------------------------------------------
# Addresses


def experiment_page(server: str, experiment: str) -> str:
    """Return the address of the table of an experiment's runs."""
    return f"{_experiment(server, experiment)}/runs?{_encoded(_MODEL_TRAINING)}"


def trials_page(server: str, experiment: str, study: str, metric: str, direction: Direction) -> str:
    """Return the address of a study's trials, best first, with charts of all their metrics.

    Sorted by start time, MLflow would fold them under the study's run, which has no curves.
    """
    state = {
        "searchFilter": f"tags.study = '{study}' AND tags.trial_id LIKE '%/%'",
        "orderByKey": f"metrics.`best/{metric.removeprefix('eval/')}`",
        "orderByAsc": "true" if direction == MINIMIZE else "false",
        "compareRunsMode": "CHART",
        **_MODEL_TRAINING,
    }
    return f"{_experiment(server, experiment)}/runs?{_encoded(state)}"


def curves_page(server: str, experiment: str, runs: Sequence[str], metric: str) -> str:
    """Return the address of the chart of a metric of several runs by step."""
    state = {
        "runs": _json(runs),
        "metric": _json(metric),
        "experiments": _json([experiment]),
        "plot_metric_keys": _json([metric]),
        "x_axis": "step",
        "line_smoothness": "1",
        **_MODEL_TRAINING,
    }
    return f"{server.rstrip('/')}/#/metric?{_encoded(state)}"


def artifact_page(server: str, experiment: str, run: str, path: str) -> str:
    """Return the address of a file or folder among a run's artifacts."""
    place = f"runs/{quote(run, safe='')}/artifacts/{quote(path)}"
    return f"{_experiment(server, experiment)}/{place}?{_encoded(_MODEL_TRAINING)}"


def _experiment(server: str, experiment: str) -> str:
    return f"{server.rstrip('/')}/#/experiments/{quote(experiment, safe='')}"


def _encoded(state: Mapping[str, str]) -> str:
    return urlencode(state, quote_via=quote, safe="")


def _json(value: object) -> str:
    return json.dumps(value, separators=(",", ":"))
