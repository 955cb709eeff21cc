"""The report of a study: a single self-contained HTML file with its results.

It embeds figures as SVG, samples as PNG, its style, and a small script that sorts tables, and needs no network. It is
generated from the records and the run folders, so it can be rewritten at any time.
"""

import base64
import hashlib
import io
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import matplotlib as mpl
import yaml
from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from matplotlib.figure import Figure

from dxmi import __version__
from dxmi.config import to_tree
from dxmi.metrics.keys import better_text
from dxmi.persistence.files import write_atomic
from dxmi.persistence.provenance import git_revision
from tune.messages import timestamp
from tune.plans.ablation import AblationPlan
from tune.plans.sweep import Plan, fidelity_keys
from tune.reporting.ablation_figures import ablation_figures
from tune.reporting.figures import importance_obstacle, study_figures
from tune.reporting.maps import arm_maps, trial_maps
from tune.reporting.samples import arm_matrix, sample_matrix
from tune.reporting.sentences import course_sentences, report_notes, result_sentences, verdict_sentences
from tune.reporting.tables import (
    ablation_tables,
    board_table,
    breakable,
    failure_rows,
    front_table,
    sampler_rows,
    space_rows,
)
from tune.studies.arm_results import (
    results_of,
)
from tune.studies.leaderboard import (
    best_of,
    changed_inputs,
    summary_of,
)
from tune.studies.records import TrialRecord, TrialState
from tune.studies.study import Study

_TEMPLATES = Path(__file__).resolve().parent / "templates"


def write_report(study: Study, records: Sequence[TrialRecord]) -> Path:
    """Write report.html for a study in any state; returns its path."""
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
        ablation=None if compared is None else ablation_tables(compared),
        result=result_sentences(study.plan, records) if compared is None else [*verdict_sentences(compared), *warnings],
        course=course_sentences(study, records),
        samplers=sampler_rows(study.plan, records),
        fidelity=fidelity_keys(study.plan.experiment),
        better=better_text(study.plan.direction),
        board=board_table(study.plan, records),
        plan=study.plan,
        has_marked=any(r.outcome.score is not None and r.state is not TrialState.COMPLETE for r in records),
        notes=[*warnings, *report_notes(study.plan, records)],
        figures=figures,
        no_importances=importance_obstacle(study.plan, records),
        space=space_rows(study.plan, records) if compared is None else [],
        front=front_table(study.plan, records),
        matrix=sample_matrix(study.plan, records) if compared is None else arm_matrix(compared),
        maps=trial_maps(study.plan, records) if compared is None else arm_maps(compared),
        failures=failure_rows(study, records),
        commands=_commands(study, records),
        shared=_shared_config(study.plan),
        sweep=_yaml(study.plan.tree()["sweep" if compared is None else "ablation"]),
        style=Markup((_TEMPLATES / "report.css").read_text()),  # noqa: S704  (ours)
        script=Markup(script),  # noqa: S704  (ours)
        script_hash=sha256_base64(script),
    )


def sha256_base64(text: str) -> str:
    """Return the hash by which a content security policy identifies a script."""
    return base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()


# ----------------------------------------------------------------------------
# Head and foot


@dataclass(frozen=True)
class _About:
    """The header of the report, as text."""

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
    """Return the Git revisions at which complete trials ended, or the current one if no trial is complete."""
    summaries = (summary_of(record) for record in records if record.state is TrialState.COMPLETE)
    found = dict.fromkeys(summary.get("git_revision") or "unknown" for summary in summaries if summary)
    return [*found] or [git_revision() or "unknown"]


def _commands(study: Study, records: Sequence[TrialRecord]) -> list[tuple[str, str]]:
    """Return descriptions and commands to reproduce the study, to be run from the parent of the studies' folder."""
    folder = f"{study.folder.path.resolve().parent.name}/{study.plan.name}"
    best, found, commands = best_of(study.plan, records), revisions(records), []
    if found != ["unknown"] and len(found) == 1:
        changed = " (with uncommitted changes)" if found[0].endswith("-dirty") else ""
        commands.append((f"Check out the code{changed}", f"git checkout {found[0].removesuffix('-dirty')}"))
    is_ablation = isinstance(study.plan, AblationPlan)
    if best is not None:
        run = f"{folder}/trials/{best.number:04d}"
        if not is_ablation:
            commands.append(("Repeat the best trial with the same results", f"dxmi train --config {folder}/best.yaml"))
        commands += [
            (
                "Repeat any trial" if is_ablation else "Repeat any other trial",
                f"dxmi train --config {folder}/trials/NUMBER/config.yaml",
            ),
            ("Draw samples from the best trial", f"dxmi sample {run} --num 64 --out samples.png"),
            ("Score the best trial again", f"dxmi evaluate {run}"),
        ]
    again = study.plan.resume_line(folder)
    return [*commands, ("Resume the study if it has not ended", again)]


def _shared_config(plan: Plan) -> str:
    """Return the experiment as YAML, without the settings that vary and without resources."""
    tree = to_tree(plan.experiment)
    del tree["resources"]
    for axis in plan.axes:
        *groups, last = axis.path.split(".")
        group = tree
        for name in groups:
            group = group[name]
        group.pop(last, None)  # the arm of an ablation is not a setting
    return _yaml(tree)


def _yaml(tree: Mapping[str, Any]) -> str:
    return yaml.safe_dump(dict(tree), sort_keys=False, allow_unicode=True)


# ----------------------------------------------------------------------------
# Figures


@dataclass(frozen=True)
class _Drawing:
    """A figure as SVG, with its description."""

    svg: Markup
    label: str


def _drawn(name: str, figure: Figure) -> _Drawing:
    """Render a figure as SVG for embedding in a page, with text kept as text and reproducible bytes."""
    buffer = io.StringIO()
    nothing = dict.fromkeys(("Creator", "Date", "Format", "Type"))
    with mpl.rc_context({"svg.fonttype": "none", "svg.hashsalt": name}):
        figure.savefig(buffer, format="svg", transparent=True, metadata=nothing)
    return _Drawing(Markup(_inline(buffer.getvalue(), name)), str(figure.get_label()))  # noqa: S704  (escaped by Matplotlib)


def _inline(svg: str, name: str) -> str:
    """Remove what only a standalone SVG file needs, and round coordinates to a hundredth of a point."""
    body = svg[svg.index("<svg") :]
    body = re.sub(r"<metadata>.*?</metadata>", "", body, flags=re.DOTALL)
    body = re.sub(r"<!--.*?-->", "", body, flags=re.DOTALL)
    body = re.sub(r'<g id="[^"]*"', "<g", body)  # every figure has an axes_1
    body = body.replace("xlink:href=", "href=")
    body = re.sub(r'(?<= d=")[^"]*', lambda found: re.sub(r"(\.\d\d)\d+", r"\1", found[0]), body)
    width, height = (float(re.findall(rf'{side}="([\d.]+)pt"', body)[0]) for side in ("width", "height"))
    head = f'<svg class="{name}" viewBox="0 0 {width:g} {height:g}" style="--natural: {width:g}" aria-hidden="true">'
    return head + body[body.index(">") + 1 :].strip()
