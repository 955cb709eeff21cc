"""`dxmi sweep | ablate`."""

import argparse
import os
import shlex
import warnings
from dataclasses import replace
from pathlib import Path

from dxmi.errors import UserError
from tune.api.ablation import Ablation, TuningInterruptedError
from tune.api.sweep import Sweep, SweepResult
from tune.cli.exit_codes import FAILED, OK, STOPPED
from tune.cli.memory import memory_text
from tune.cli.report import show_results
from tune.cli.studies import place
from tune.cli.ui import DEFAULT_PORT, address_of
from tune.execution.estimate import Estimate
from tune.execution.seed_batching import known_stack
from tune.integrations.mlflow_tracker import reason_of
from tune.machine import on_cluster
from tune.messages import complain, duration
from tune.plans.ablation import AblationPlan
from tune.plans.arms import two_level_design
from tune.plans.sweep import Plan
from tune.reporting.pages import study_pages
from tune.reporting.terminal import Terminal
from tune.reporting.text_tables import TextTable
from tune.search.space import show
from tune.studies.arm_results import changes_text
from tune.studies.folder import StudyFolder
from tune.studies.leaderboard import changed_inputs

_LONGEST_LINE = 1_000
"""Maximum length of a printed address; that of a comparison contains the identifiers of all trials."""
_TIMED_ELSEWHERE = ", measured on the CPU of this machine, which has no GPU; it is much shorter on GPUs"


def sweep(args: argparse.Namespace) -> int:
    """Run or resume a sweep, or describe it with --dry-run."""
    warnings.simplefilter("ignore", FutureWarning)  # raised by Ray on import about its own next version
    chosen = _chosen(args)
    console = Terminal()
    chosen.check()
    if args.dry_run:
        _plan(console, chosen, chosen.estimate())
        return OK
    _announce(console, chosen)
    if on_cluster():
        _leave_working_folder(chosen)
    result = chosen.run(console=console)
    return _close(console, chosen, result)


def _leave_working_folder(chosen: Sweep) -> None:
    """Leave the job's working folder, which Ray may delete while the job runs."""
    chosen.folder = StudyFolder(chosen.folder.path.absolute())
    os.chdir("/")


def _chosen(args: argparse.Namespace) -> Sweep:
    if args.resume is None:
        return Sweep(*args.overrides, studies=args.studies)
    name, studies = place(args.resume, args.studies)
    found = Sweep.resume(name, *args.overrides, studies=studies)
    if isinstance(found.plan, AblationPlan):
        raise UserError(
            f"{found.folder.path} is an ablation. To resume it: {found.plan.resume_line(found.folder.path)}"
        )
    return found


def _announce(console: Terminal, chosen: Sweep) -> None:
    cost = chosen.estimate()
    chosen.check_room(cost)
    again = "Resuming study" if chosen.folder.exists else "Study"
    console.out(
        f"{again} {chosen.plan.name}: {cost.trials} trials{_of_seeds(chosen.plan)}, {chosen.slots}; "
        f"about {duration(cost.seconds)} and {cost.bytes / 1e9:.1f} GB in total, less if trials are stopped early"
        f"{_TIMED_ELSEWHERE if cost.elsewhere else ''}.",
        highlight=False,
    )


def _plan(console: Terminal, chosen: Sweep, cost: Estimate) -> None:
    """Print the plan of a sweep for --dry-run."""
    plan, sweep = chosen.plan, chosen.plan.sweep
    console.out(f"Study {plan.name} (signature {plan.signature}) in {chosen.folder.path}", highlight=False)
    space = TextTable("setting", "values", "default", title="search space", title_justify="left")
    for axis in plan.axes:
        space.add_row(axis.path, str(axis), show(axis.own(plan.experiment)))
    console.print(space)
    objectives = ", ".join(f"{objective.direction} {objective.metric}" for objective in plan.objectives)
    stopping = "no early stopping" if sweep.stopping.rule == "none" else f"early stopping by {sweep.stopping.rule}"
    rows = {
        "trials": f"{plan.num_trials}{_of_seeds(plan)}, proposed by {sweep.sampler.kind} (seed {sweep.sampler.seed}), "
        f"{stopping}",
        "objective": objectives,
        "concurrency": str(chosen.slots),
        "time": _time(cost),
        "memory": f"{memory_text(plan.experiment)}, with the experiment's own settings",
        "disk": f"{cost.bytes / 1e9:.2f} GB ({cost.trial_bytes / 1e6:.0f} MB per trial)",
        "tracking": plan.tracking.uri,
    }
    table = TextTable(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.out("Nothing was started and nothing was written.", highlight=False)
    chosen.check_room(cost)


def _of_seeds(plan: Plan) -> str:
    """Say how many seeds each trial has, if it has several."""
    return f" of {len(plan.trial_seeds)} seeds each" if len(plan.trial_seeds) > 1 else ""


def _time(cost: Estimate) -> str:
    models = f"{cost.models} pretrained models and their" if cost.models > 1 else "pretraining and"
    shared = f"{duration(cost.shared_seconds)} for {models} references, " if cost.shared_seconds else ""
    each = f"{duration(cost.trial_seconds)} for each trial that is not stopped early"
    return f"about {duration(cost.seconds)}: {shared}{each}{_TIMED_ELSEWHERE if cost.elsewhere else ''}"


def _close(console: Terminal, chosen: Sweep, result: SweepResult) -> int:
    """Print the result table and the paths of the outputs; returns the exit code."""
    show_results(console, result.folder, chosen.plan, result.records)
    places = {"report": result.folder.report, "best config": result.folder.best, "table": result.folder.leaderboard}
    if isinstance(chosen.plan, AblationPlan):
        own = {name: result.folder.path / f"ablation.{name}" for name in ("csv", "tex")}
        places = {
            "report": result.folder.report,
            "arms": own["csv"],
            "for LaTeX": own["tex"],
            "trials": places["table"],
        }
    for label, path in places.items():
        if path.exists():
            console.out(f"{label + ':':<13}{path}", highlight=False)
    for line in in_mlflow(chosen.plan, result):
        console.out(line, highlight=False)
    warning = changed_inputs(chosen.plan, result.records)
    for sentence in (warning, *result.outdated):
        if sentence:
            complain(sentence)
    resume = chosen.plan.resume_line(result.folder.path)
    if result.undelivered:
        complain(f"{result.undelivered} records have not reached the tracking server. To deliver them: {resume}")
    if result.interrupted:
        complain(f"{result.ended or 'interrupted'}. Everything is saved. To resume: {resume}")
        return STOPPED
    if result.all_failed:
        complain("every trial failed; the table shows the reasons.")
        return FAILED
    return OK


def in_mlflow(plan: Plan, result: SweepResult) -> list[str]:
    """Lines that state how to open a study in MLflow (a command or a server) and the addresses of its pages."""
    uri = plan.tracking.uri
    if uri == "none":
        return []
    heading = f"{'MLflow:':<13}{f'to open these pages, run {_ui_command(result.folder)}' if uri == 'local' else uri}"
    if uri != "local" and (result.undelivered or result.interrupted):  # do not wait for the server
        return [heading]
    try:
        pages = study_pages(result.folder, plan, result.records, address_of(DEFAULT_PORT))
    except Exception as error:  # noqa: BLE001  (MLflow raises many types, and the addresses are optional)
        complain(f"the addresses of the study's pages in MLflow could not be read: {reason_of(error)}.")
        return [heading]
    lines = pages.lines() if pages else []
    return [heading, *(f"{'':<13}{line}" for line in lines if len(line) <= _LONGEST_LINE)]


def _ui_command(folder: StudyFolder) -> str:
    root = folder.path.parent
    where = [] if root == Path("studies") else ["--studies", str(root)]
    return shlex.join(["dxmi", "ui", folder.path.name, *where])


def ablate(args: argparse.Namespace) -> int:
    """Run or resume an ablation, or describe it with --dry-run."""
    warnings.simplefilter("ignore", FutureWarning)  # raised by Ray on import about its own next version
    chosen = _chosen_ablation(args)
    console = Terminal()
    chosen.check()
    if args.dry_run:
        _show_arms(console, chosen)
        return OK
    console.out(f"Hypothesis: {' '.join(chosen.plan.ablation.hypothesis.split())}", highlight=False)
    _announce(console, chosen)
    if on_cluster():
        _leave_working_folder(chosen)
    try:
        result = chosen.run(console=console)
    except TuningInterruptedError as error:
        complain(f"{error}. Everything is saved; run the same command again to continue.")
        return STOPPED
    return _close(console, chosen, result)


def _chosen_ablation(args: argparse.Namespace) -> Ablation:
    if args.resume is None:
        return Ablation(*args.overrides, studies=args.studies)
    name, studies = place(args.resume, args.studies)
    return Ablation.resume(name, *args.overrides, studies=studies)


def _show_arms(console: Terminal, chosen: Ablation) -> None:
    """Print the plan of an ablation for --dry-run."""
    plan, ablation = chosen.plan, chosen.plan.ablation
    console.out(f"Ablation {plan.name} (signature {plan.signature}) in {chosen.folder.path}", highlight=False)
    console.out(f"Hypothesis: {' '.join(ablation.hypothesis.split())}", highlight=False)
    table = TextTable("arm", "changes to the baseline")
    for arm in plan.arms:
        table.add_row(arm.name, changes_text(arm.changes))
    console.print(table)
    design = two_level_design(ablation)
    if design is not None:
        console.out(design.describe(), highlight=False)
    cost = chosen.estimate()
    rows = {
        "design": ablation.design,
        "seeds": ", ".join(map(str, plan.seeds)),
        "trials": str(plan.num_trials),
        "concurrency": str(chosen.slots),
        "time": _time(cost),
        "memory": f"{memory_text(plan.experiment)}, for each seed of the baseline; other arms may need more",
        "tracking": plan.tracking.uri,
    }
    if plan.seed_plan is not None:
        first = ablation.seeds.first
        rows["seeds"] = f"{first} at first, then more for arms without a verdict, at most {ablation.seeds.cap}"
        rows["trials"] = f"{len(plan.arms) * first} at first, up to {plan.num_trials}"
        rows["time"] += f". The total is for {ablation.seeds.cap} seeds in each arm."
    if plan.seeds_at_once > 1:
        rows["trained together"] = _stack_text(chosen)
    if ablation.tuning is not None:
        rows["tuning"] = f"{ablation.tuning.trials} trials in each arm, before the comparison"
    summary = TextTable(show_header=False)
    for name, value in rows.items():
        summary.add_row(name, value)
    console.print(summary)
    console.out("Nothing was started and nothing was written.", highlight=False)


def _stack_text(chosen: Ablation) -> str:
    """Describe how many seeds of an arm are trained together."""
    begun = chosen.folder.read_plan() if chosen.folder.exists else None
    recorded = begun.stacked if isinstance(begun, AblationPlan) else None
    known = known_stack(replace(chosen.plan, stacked=recorded))
    if known is None:
        return "the fastest number of seeds per arm, measured at the start and recorded in study.yaml"
    again = ", as recorded for this study" if known == recorded else ""
    return f"{known} seed{'s' if known > 1 else ''} per arm{again}"
