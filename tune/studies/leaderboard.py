"""The leaderboard of a study: a data frame, leaderboard.csv, and best.yaml.

Only complete trials have a rank. Other trials are scored on the noise that selected their checkpoint, so their scores
are biased towards better values.
"""

import csv
import io
import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import stdev
from typing import TYPE_CHECKING, Any

import yaml

from dxmi.config import to_tree
from dxmi.errors import UserError
from dxmi.evaluation.scored_references import scored_references
from dxmi.formatting import score_text
from dxmi.metrics.keys import MINIMIZE, better_text
from dxmi.persistence.files import write_atomic
from dxmi.training.schema import config_tree
from tune.config.sweep import ObjectiveConfig
from tune.plans.ablation import AblationPlan
from tune.plans.sweep import Plan, fidelity_keys
from tune.search.space import flat, show
from tune.studies.confirmation import Confirmation, confirmations, obstacle
from tune.studies.folder import StudyFolder
from tune.studies.outdone import Outdone, outdone, outdone_sentences
from tune.studies.ranking import pareto_front, ranked
from tune.studies.records import TrialRecord, TrialState
from tune.studies.study import Study

if TYPE_CHECKING:
    import pandas as pd

NOT_COMPARABLE = "*"
"""Mark after a score on the noise that selected the checkpoint."""
NOT_COMPUTED = "-"
"""Table cell of a score that was not computed."""
FRESH = "fresh_"
"""Prefix of columns with scores on fresh noise, which was not used to select the trial."""
SPREAD = "sd"
"""Column with the standard deviation of the first objective over a trial's seeds."""
_OWN_COLUMNS = ("rank", "trial", "state", "score", "step", "seconds", "checkpoint", "reason")
_LONGEST_REASON = 400
_NEEDED = {"reference", "num_steps", "num_samples", "device", "threads", "versions"}
"""Keys of a summary that a report needs."""
_FORMULA = ("=", "+", "-", "@", "\t", "\r")


# ----------------------------------------------------------------------------
# Text


def short_names(plan: Plan) -> dict[str, str]:
    """Map each varying path to its shortest unambiguous suffix, like policy.lr, that is not the name of a column."""
    known = [*flat(to_tree(plan.experiment))]
    taken = {*_OWN_COLUMNS, *objective_columns(plan)}

    def shortest(path: str) -> str:
        parts = path.split(".")
        ends = [".".join(parts[start:]) for start in reversed(range(len(parts)))]
        clear = (end for end in ends if end not in taken and not any(_ends_so(p, end) for p in known if p != path))
        return next(clear, path)

    return {axis.path: shortest(axis.path) for axis in plan.axes}


def _ends_so(path: str, end: str) -> bool:
    return path == end or path.endswith(f".{end}")


def objective_columns(plan: Plan) -> list[str]:
    """One column name per objective; `seconds` is renamed, since the column `seconds` holds the time of the trial."""
    return ["finetune_seconds" if objective.metric == "seconds" else objective.metric for objective in plan.objectives]


def fidelity_columns(plan: Plan) -> list[str]:
    """Columns of precision and recall, except for those that are objectives."""
    return [key for key in fidelity_keys(plan.experiment) if key not in objective_columns(plan)]


def metric_label(plan: Plan, objective: ObjectiveConfig) -> str:
    """Human-readable label of an objective."""
    if objective.metric == "score":
        return plan.metric.removeprefix("eval/")
    metric = plan.metric.removeprefix("eval/")
    own = {
        "seconds": "seconds of fine-tuning",
        "pretrained": f"{metric} of the pretrained model",
        "last": f"{metric} of the last checkpoint",
    }
    return own.get(objective.metric, objective.metric.removeprefix("eval/"))


def better(objective: ObjectiveConfig) -> str:
    """Text that states the direction of an objective."""
    return better_text(objective.direction or MINIMIZE)


def number(value: float, metric: str = "score") -> str:
    """Format a measured number: a count as it is, otherwise two decimals, or three digits if it is small."""
    if metric == "num_steps":
        return f"{value:g}"
    return score_text(value)


def settings(plan: Plan, record: TrialRecord) -> list[str]:
    """The varying settings of a trial as text."""
    return [f"{name} {show(record.values[path])}" for path, name in short_names(plan).items()]


def summary_of(record: TrialRecord) -> Mapping[str, Any]:
    """The run's summary; empty if it is missing or damaged, since a report uses whatever is available."""
    try:
        summary = record.summary() or {}
    except UserError:
        return {}
    return summary if summary.keys() >= _NEEDED else {}


def best_of(plan: Plan, records: Sequence[TrialRecord]) -> TrialRecord | None:
    """The first trial of the leaderboard, or None if no trial is complete."""
    first = next(iter(ranked(plan, records)), None)
    return first if first is not None and first.state is TrialState.COMPLETE else None


def fresh_scores_of(records: Sequence[TrialRecord]) -> dict[int, Confirmation]:
    """Scores of trials on fresh noise, which was not used to select them, by trial number."""
    return confirmations(StudyFolder(records[0].run.path.parent.parent), records) if records else {}


def fresh_sentence(plan: Plan, records: Sequence[TrialRecord]) -> str:
    """Sentence with the best trial's scores on fresh noise; empty if no trial is complete."""
    best = best_of(plan, records)
    if best is None or isinstance(plan, AblationPlan) or plan.is_of_parents:
        return ""
    fresh = fresh_scores_of(records).get(best.number)
    if fresh is None or not fresh.scores:
        why = obstacle(StudyFolder(best.run.path.parent.parent), best, records).rstrip(".")
        return (
            f"Trial {best.number} has no score on fresh noise ({why}): as the best of many, its score may be too good."
        )
    values = (
        f"{metric_label(plan, o)} {number(value, o.metric)}"
        for o in plan.objectives
        if (value := fresh.value(plan, o)) is not None
    )
    text = ", ".join(values) or f"{plan.metric.removeprefix('eval/')} {number(fresh.scores[plan.metric])}"
    return f"On fresh noise, which was not used for the selection, trial {best.number} has {text}."


def free_sampler_sentences(plan: Plan, records: Sequence[TrialRecord]) -> list[str]:
    """Sentences about training-free samplers that are better than the best trial or trials on the Pareto front."""
    if plan.is_of_parents:
        return []
    best = best_of(plan, records)
    results = pareto_front(plan, records) if len(plan.objectives) > 1 else [best]
    return outdone_sentences(plan.metric, [_outdone(plan, record) for record in results if record is not None])


def _outdone(plan: Plan, record: TrialRecord) -> Outdone | None:
    summary, score = summary_of(record), record.outcome.score
    if not summary or score is None:
        return None
    return outdone(f"trial {record.number}", score, scored_references(summary), summary["num_steps"], plan.direction)


# ----------------------------------------------------------------------------
# The data frame


def leaderboard(plan: Plan, records: Sequence[TrialRecord]) -> "pd.DataFrame":
    """The leaderboard with one row per trial, in rank order.

    Returns:
        Data frame with the columns rank (of complete trials), trial, state, each objective other than the score, score,
        sd and seed_K (standard deviation over the seeds, and value for seed K, of the first objective; only if trials
        have several seeds), precision and recall where the data has them, fresh_X for each objective X that has scores
        on fresh noise (see `tune.studies.confirmation`), step (of the best checkpoint), each parameter by its path,
        seconds, signature, checkpoint (relative to the study, empty if it was deleted) and reason (one line).
    """
    import pandas as pd  # noqa: PLC0415

    rows = ranked(plan, records)
    ranks = [place if record.state is TrialState.COMPLETE else None for place, record in enumerate(rows, start=1)]
    columns: dict[str, Any] = {
        "rank": pd.array(ranks, dtype="Int64"),
        "trial": [record.number for record in rows],
        "state": [record.state.value for record in rows],
    }
    for index, name in enumerate(objective_columns(plan)):
        columns[name] = pd.array([_objective(record, index) for record in rows], dtype="Float64")
    columns.pop("score", None)
    columns["score"] = pd.array([record.outcome.score for record in rows], dtype="Float64")
    columns |= {name: pd.array(values, dtype="Float64") for name, values in _seed_columns(plan, rows).items()}
    for name in fidelity_columns(plan):
        columns[name] = pd.array([_fidelity(record, name) for record in rows], dtype="Float64")
    fresh = fresh_scores_of(rows)
    for objective, name in zip(plan.objectives, objective_columns(plan), strict=True):
        values = [fresh[r.number].value(plan, objective) if r.number in fresh else None for r in rows]
        if any(value is not None for value in values):
            columns[f"{FRESH}{name.removeprefix('eval/')}"] = pd.array(values, dtype="Float64")
    columns["step"] = pd.array([record.outcome.step for record in rows], dtype="Int64")
    for axis in plan.axes:
        values = [record.values[axis.path] for record in rows]
        columns[axis.path] = pd.Series(values, dtype=object) if axis.kind == "choice" else values
    columns["seconds"] = pd.array([_seconds(record) for record in rows], dtype="Float64")
    columns["signature"] = [record.signature for record in rows]
    columns["checkpoint"] = [_checkpoint(record) for record in rows]
    columns["reason"] = [_reason(record) for record in rows]
    return pd.DataFrame(columns)


def _seed_columns(plan: Plan, rows: Sequence[TrialRecord]) -> dict[str, list[float | None]]:
    """The first objective of each seed, and the spread of the seeds; empty if trials have one seed."""
    if len(plan.trial_seeds) == 1:
        return {}
    columns: dict[str, list[float | None]] = {SPREAD: [spread_of(record) for record in rows]}
    for k, seed in enumerate(plan.trial_seeds):
        columns[f"seed_{seed}"] = [record.outcome.by_seed[k] if record.outcome.by_seed else None for record in rows]
    return columns


def spread_of(record: TrialRecord) -> float | None:
    """The standard deviation of the first objective over a trial's seeds; None with one seed, or if not complete."""
    return stdev(record.outcome.by_seed) if len(record.outcome.by_seed) > 1 else None


def _objective(record: TrialRecord, index: int) -> float | None:
    return record.outcome.objectives[index] if record.state is TrialState.COMPLETE else None


def _fidelity(record: TrialRecord, key: str) -> float | None:
    if record.state is not TrialState.COMPLETE:
        return None
    value = summary_of(record).get("scores", {}).get("best", {}).get(key)
    return None if value is None else float(value)


def _seconds(record: TrialRecord) -> float | None:
    return None if record.state is TrialState.RUNNING else record.outcome.seconds


def _checkpoint(record: TrialRecord) -> str:
    from dxmi.persistence.checkpoint import path_of  # noqa: PLC0415  (it imports PyTorch)

    if record.outcome.step is None:
        return ""
    path = path_of(record.run.checkpoints, record.outcome.step)
    return path.relative_to(record.run.path.parent.parent).as_posix() if path.is_dir() else ""


def _reason(record: TrialRecord) -> str:
    """The reason as a single printable line, since it may be the end of an arbitrary traceback."""
    if record.same_as is not None and not record.outcome.reason:
        return f"same config as trial {record.same_as}"
    text = "".join(character if character.isprintable() else " " for character in record.outcome.reason)
    line = " ".join(text.split())
    return line if len(line) <= _LONGEST_REASON else line[: _LONGEST_REASON - 1] + "…"


# ----------------------------------------------------------------------------
# The terminal


def changed_inputs(plan: Plan, records: Sequence[TrialRecord]) -> str:
    """Sentences about data or public weights that changed while the study ran; empty if none did.

    A resumed trial detects such a change itself; a trial that starts afterwards uses the changed files.
    """
    summaries = {record.number: summary for record in records if (summary := summary_of(record))}
    configs = {record.number: plan.tree_of(record.values) for record in records if record.number in summaries}
    data = {number: (_scored_with(summary), configs[number]["data"]) for number, summary in summaries.items()}
    weights = {
        number: (dict(summary.get("inputs") or {}).get("weights"), configs[number]["pretrain"]["weights"])
        for number, summary in summaries.items()
    }
    found = {"The data": _course(data), "The files of pretrain.weights": _course(weights)}
    return " ".join(
        f"{what} changed while this study ran ({course}): scores from before and after the change are not comparable."
        for what, course in found.items()
        if course
    )


def _course(seen: Mapping[int, tuple[str | None, Any]]) -> str:
    """Text that lists the signatures and from which trial on each was used; empty if none changed.

    Args:
        seen: For each trial, the signature of the files it read and the setting that names them.
    """
    found: dict[str, dict[str, int]] = {}
    for number, (signature, setting) in seen.items():
        if signature is not None:
            found.setdefault(json.dumps(setting, sort_keys=True), {}).setdefault(signature, number)
    changed = next((same for same in found.values() if len(same) > 1), {})
    return ", ".join(f"{signature[:12]} from trial {number} on" for signature, number in changed.items())


def _scored_with(summary: Mapping[str, Any]) -> str | None:
    """The signature of the data that a trial was scored with, or None if it is not recorded."""
    about = summary.get("scored_with")
    reference = about.get("reference") if isinstance(about, dict) else None
    return reference if isinstance(reference, str) else None


# ----------------------------------------------------------------------------
# Files


def write_leaderboard(study: Study, records: Sequence[TrialRecord]) -> None:
    """Write leaderboard.csv: one line per trial, numbers with full precision."""
    frame = leaderboard(study.plan, records)
    buffer = io.StringIO()
    writer = csv.writer(buffer, lineterminator="\n")
    writer.writerow(frame.columns)
    writer.writerows(map(_cell, row) for row in zip(*(frame[name].tolist() for name in frame), strict=True))
    write_atomic(study.folder.leaderboard, buffer.getvalue())


def _cell(value: Any) -> str:
    """Value as CSV text; text that a spreadsheet would evaluate as a formula is prefixed with an apostrophe."""
    import pandas as pd  # noqa: PLC0415

    if isinstance(value, str):
        return "'" + value if value.startswith(_FORMULA) else value
    if value is pd.NA:
        return ""
    return repr(value) if isinstance(value, float) else json.dumps(value)


def write_best(study: Study, records: Sequence[TrialRecord]) -> Path | None:
    """Write best.yaml: the full config of the best complete trial, for `dxmi train --config best.yaml`.

    Returns:
        Path of the file, or None if no trial is complete.
    """
    best = best_of(study.plan, records)
    if best is None:
        return None
    tree = config_tree(study.config(best))
    tree["resources"] = _resources(best, tree["resources"])
    objective = study.plan.objectives[0]
    header = [
        f"study {study.plan.name}, trial {best.number}",
        f"{objective.metric} {best.outcome.objectives[0]:.6g} ({metric_label(study.plan, objective)}, "
        f"{better(objective)}), best checkpoint at iteration {best.outcome.step}",
        f"signature {best.signature}",
        *([fresh] if (fresh := fresh_sentence(study.plan, records)) else []),
        "to repeat: dxmi train --config best.yaml",
    ]
    text = "".join(f"# {line}\n" for line in header) + yaml.safe_dump(tree, sort_keys=False, allow_unicode=True)
    write_atomic(study.folder.best, text)
    return study.folder.best


def _resources(record: TrialRecord, planned: dict[str, Any]) -> dict[str, Any]:
    """The resources that the run used, since bitwise results depend on the number of threads."""
    if not record.run.config.exists():
        return planned
    resources: dict[str, Any] = record.run.read_config().get("resources", planned)
    return resources
