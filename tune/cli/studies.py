"""The commands around studies: sweeps, ablations, reports, MLflow's page, jobs on a cluster. Imported on use."""

import argparse
import itertools
import os
import shlex
import warnings
from collections import Counter
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from filelock import FileLock, Timeout
from rich.text import Text

from dxmi.errors import UserError
from dxmi.formatting import score_text
from dxmi.persistence.files import require_target
from tune.api.ablation import Ablation, TuningInterruptedError
from tune.api.sweep import Sweep, SweepResult, write_results
from tune.cli.doctor import Verdict, examine
from tune.cli.ui import DEFAULT_PORT, address_of, free_port, serve
from tune.execution.estimate import Estimate
from tune.execution.jobs import DEFAULT_ADDRESS, Jobs, entrypoint, environment, follow, new_id, patiently, survey
from tune.execution.seed_batching import known_stack
from tune.integrations import object_store as storage
from tune.integrations.mlflow_store import open_store
from tune.integrations.mlflow_tracker import reason_of
from tune.machine import on_cluster
from tune.messages import complain, duration
from tune.plans.ablation import AblationPlan
from tune.plans.arms import two_level_design
from tune.plans.sweep import Plan, require_name
from tune.reporting.console import Terminal
from tune.reporting.pages import experiment_page, newest_pages, study_pages
from tune.reporting.study_tables import arms_table, leaderboard_table
from tune.reporting.text_tables import TextTable
from tune.search.space import show, value_at
from tune.studies.arm_results import changes_text, results_of
from tune.studies.folder import StudyFolder, studies_in
from tune.studies.leaderboard import changed_inputs, free_sampler_sentences
from tune.studies.records import TrialRecord, TrialState
from tune.studies.study import Study

OK, FAILED, STOPPED = 0, 1, 130
_TIMED_ELSEWHERE = ", and much less on GPUs: this machine has none, so its CPU was timed"

# ----------------------------------------------------------------------------
# dxmi sweep


def sweep(args: argparse.Namespace) -> int:
    """Run a sweep, go on with one, or say what it would do."""
    warnings.simplefilter("ignore", FutureWarning)  # of Ray, at import, about its own next version
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
    """Ray may replace a job's folder while it runs, and nothing works in a folder that is gone."""
    chosen.folder = StudyFolder(chosen.folder.path.absolute())
    os.chdir("/")


def _chosen(args: argparse.Namespace) -> Sweep:
    if args.resume is None:
        return Sweep(*args.overrides, studies=args.studies)
    name, studies = _place(args.resume, args.studies)
    found = Sweep.resume(name, *args.overrides, studies=studies)
    if isinstance(found.plan, AblationPlan):
        raise UserError(
            f"{found.folder.path} is an ablation. To go on with it: {found.plan.resume_line(found.folder.path)}"
        )
    return found


def _place(study: str, studies: Path) -> tuple[str, Path]:
    """A study's name and the folder it is in; it may be given as a path, too."""
    path = Path(study)
    require_target(path if len(path.parts) > 1 else studies / path, "The study")
    return (path.name, path.parent) if len(path.parts) > 1 else (study, studies)


def _announce(console: Terminal, chosen: Sweep) -> None:
    cost = chosen.estimate()
    chosen.check_room(cost)
    again = "Going on with" if chosen.folder.exists else "Study"
    console.out(
        f"{again} {chosen.plan.name}: {cost.trials} trials, {chosen.slots}; "
        f"about {duration(cost.seconds)} and {cost.bytes / 1e9:.1f} GB in all, less where trials are stopped early"
        f"{_TIMED_ELSEWHERE if cost.elsewhere else ''}.",
        highlight=False,
    )


def _plan(console: Terminal, chosen: Sweep, cost: Estimate) -> None:
    """What --dry-run prints."""
    plan, sweep = chosen.plan, chosen.plan.sweep
    console.out(f"Study {plan.name} (signature {plan.signature}) in {chosen.folder.path}", highlight=False)
    space = TextTable("setting", "values", "default", title="space", title_justify="left")
    for axis in plan.axes:
        space.add_row(axis.path, str(axis), show(value_at(plan.experiment, axis.path)))
    console.print(space)
    objectives = ", ".join(f"{objective.direction} {objective.metric}" for objective in sweep.objectives)
    stopping = "no early stopping" if sweep.stopping.rule == "none" else f"early stopping by {sweep.stopping.rule}"
    rows = {
        "trials": f"{plan.num_trials} by {sweep.sampler.kind} (seed {sweep.sampler.seed}), {stopping}",
        "objective": objectives,
        "concurrency": str(chosen.slots),
        "time": _time(cost),
        "disk": f"{cost.bytes / 1e9:.2f} GB ({cost.trial_bytes / 1e6:.0f} MB a trial)",
        "tracking": plan.tracking.uri,
    }
    table = TextTable(show_header=False)
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.out("Nothing was started and nothing was written.", highlight=False)
    chosen.check_room(cost)


def _time(cost: Estimate) -> str:
    shared = f"{duration(cost.shared_seconds)} of pretraining and references, once; " if cost.shared_seconds else ""
    each = f"{duration(cost.trial_seconds)} a trial that runs to its end"
    return f"about {duration(cost.seconds)}: {shared}{each}{_TIMED_ELSEWHERE if cost.elsewhere else ''}"


def _close(console: Terminal, chosen: Sweep, result: SweepResult) -> int:
    """The end table, where everything is, and the exit code."""
    _show_results(console, result.folder, chosen.plan, result.records)
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
    for line in _in_mlflow(chosen.plan, result):
        console.out(line, highlight=False)
    warning = changed_inputs(chosen.plan, result.records)
    for sentence in (warning, *result.outdated):
        if sentence:
            complain(sentence)
    resume = chosen.plan.resume_line(result.folder.path)
    if result.undelivered:
        complain(f"the tracking server has not got {result.undelivered} records yet. To deliver them: {resume}")
    if result.interrupted:
        complain(f"{result.ended or 'interrupted'}. Everything is saved; go on with: {resume}")
        return STOPPED
    if result.all_failed:
        complain("every trial failed; the table says why.")
        return FAILED
    return OK


def _in_mlflow(plan: Plan, result: SweepResult) -> list[str]:
    """What shows a study in MLflow: a command or a server, and the addresses of its pages there."""
    uri = plan.tracking.uri
    if uri == "none":
        return []
    heading = f"{'MLflow:':<13}{f'{_ui_command(result.folder)} serves these pages' if uri == 'local' else uri}"
    if uri != "local" and (result.undelivered or result.interrupted):  # nobody is to wait for a server then
        return [heading]
    try:
        pages = study_pages(result.folder, plan, result.records, address_of(DEFAULT_PORT))
    except Exception as error:  # noqa: BLE001  (MLflow raises anything, and the study is whole without its addresses)
        complain(f"the addresses of the study's pages in MLflow could not be read: {reason_of(error)}.")
        return [heading]
    return [heading, *(f"{'':<13}{line}" for line in (pages.lines() if pages else ()))]


def _ui_command(folder: StudyFolder) -> str:
    root = folder.path.parent
    where = [] if root == Path("studies") else ["--studies", str(root)]
    return shlex.join(["dxmi", "ui", folder.path.name, *where])


def _show_results(console: Terminal, folder: StudyFolder, plan: Plan, records: Sequence[TrialRecord]) -> None:
    """The table, and which of it a training-free sampler beats."""
    if isinstance(plan, AblationPlan):
        results = results_of(plan, folder, records)
        table, sentences = arms_table(results), results.outdone
    else:
        table, sentences = leaderboard_table(plan, records), free_sampler_sentences(plan, records)
    console.print(table)
    for sentence in sentences:
        console.print(Text(sentence), highlight=False)


# ----------------------------------------------------------------------------
# dxmi ablate


def ablate(args: argparse.Namespace) -> int:
    """Run an ablation, go on with one, or say what it would do."""
    warnings.simplefilter("ignore", FutureWarning)  # of Ray, at import, about its own next version
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
        complain(f"{error}. Everything is saved; the same command goes on.")
        return STOPPED
    return _close(console, chosen, result)


def _chosen_ablation(args: argparse.Namespace) -> Ablation:
    if args.resume is None:
        return Ablation(*args.overrides, studies=args.studies)
    name, studies = _place(args.resume, args.studies)
    return Ablation.resume(name, *args.overrides, studies=studies)


def _show_arms(console: Terminal, chosen: Ablation) -> None:
    """What --dry-run prints."""
    plan, ablation = chosen.plan, chosen.plan.ablation
    console.out(f"Ablation {plan.name} (signature {plan.signature}) in {chosen.folder.path}", highlight=False)
    console.out(f"Hypothesis: {' '.join(ablation.hypothesis.split())}", highlight=False)
    table = TextTable("arm", "changes of the baseline")
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
        "tracking": plan.tracking.uri,
    }
    if plan.seed_plan is not None:
        first = ablation.seeds.first
        rows["seeds"] = f"{first}, then more where the verdict is open, {ablation.seeds.cap} at most"
        rows["trials"] = f"{len(plan.arms) * first}, then up to {plan.num_trials}"
        rows["time"] += ", with every seed"
    if plan.seeds_at_once > 1:
        rows["in one program"] = _stack_text(chosen)
    if ablation.tuning is not None:
        rows["tuning"] = f"{ablation.tuning.trials} trials in each arm, before"
    summary = TextTable(show_header=False)
    for name, value in rows.items():
        summary.add_row(name, value)
    console.print(summary)
    console.out("Nothing was started and nothing was written.", highlight=False)


def _stack_text(chosen: Ablation) -> str:
    """How many seeds of an arm are trained together."""
    begun = chosen.folder.read_plan() if chosen.folder.exists else None
    recorded = begun.stacked if isinstance(begun, AblationPlan) else None
    known = known_stack(replace(chosen.plan, stacked=recorded))
    if known is None:
        return "as many seeds of an arm as a measurement at the start finds fastest; recorded in study.yaml"
    again = ", as this study began" if known == recorded else ""
    return f"{known} seed{'s' if known > 1 else ''} of an arm{again}"


# ----------------------------------------------------------------------------
# dxmi studies, report


def studies(args: argparse.Namespace) -> int:
    """List the studies there are."""
    found = studies_in(args.studies)
    console = Terminal()
    if not found:
        console.out(f"There are no studies in {args.studies} yet: dxmi sweep begins one.", highlight=False)
        return OK
    table = TextTable("study", "state", "trials", "best", "wall time")
    for folder in found:
        table.add_row(folder.path.name, *_row(folder))
    console.print(table)
    return OK


def _row(folder: StudyFolder) -> tuple[str, ...]:
    try:
        plan = folder.read_plan()
        seconds = duration(float(folder.read_progress()["seconds"]))
        if not folder.journal.exists():
            return _state(folder, is_done=False), f"0/{plan.num_trials}", "", seconds
        study = Study.read(folder)
        records = study.records()
    except UserError as error:
        return "damaged", str(error), "", ""
    counts = Counter(record.state for record in records)
    ended = len(records) - counts[TrialState.RUNNING]
    words = ", ".join(f"{counts[state]} {state.value}" for state in TrialState if counts[state])
    complete = [r.outcome.score for r in records if r.state is TrialState.COMPLETE and r.outcome.score is not None]
    best = score_text(min(complete)) if complete else ""
    is_done = study.is_done and ended == len(records)
    return _state(folder, is_done), f"{ended}/{plan.num_trials} ({words})", best, seconds


def _state(folder: StudyFolder, is_done: bool) -> str:
    """running, finished, or interrupted."""
    lock = FileLock(folder.path / ".lock")
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return "running"
    lock.release()
    if is_done or "budget" in str(folder.read_progress()["ended"]):
        return "finished"
    return "interrupted"


def report(args: argparse.Namespace) -> int:
    """Write a study's tables and report anew, and say where they are."""
    name, root = _place(args.study, args.studies)
    require_name(name)
    study = Study.read(StudyFolder(root / name))
    records = study.records()
    console = Terminal()
    _show_results(console, study.folder, study.plan, records)
    warning = changed_inputs(study.plan, records)
    if warning:
        complain(warning)
    write_results(study, records)
    console.out(f"report: {study.folder.report}", highlight=False)
    return OK


# ----------------------------------------------------------------------------
# dxmi ui, doctor


def ui(args: argparse.Namespace) -> int:
    """MLflow's page on the local store, until Ctrl-C."""
    name, root = (None, args.studies) if args.study is None else _place(args.study, args.studies)
    if not root.is_dir():
        raise UserError(f"There is no folder {root}: run a sweep first, or name the folder by --studies.")
    console = Terminal()
    study = None if name is None else _tracked(name, root)
    if study is not None and study.plan.tracking.uri != "local":
        console.out("\n".join(_pages(study, "")), highlight=False)
        return OK
    port = free_port(args.port)
    store, experiment = open_store(root, "dxmi")
    console.out("MLflow is starting ...", highlight=False)
    server = address_of(port)
    pages = newest_pages(root, server) if study is None else _pages(study, server)
    lines = itertools.chain([f"runs: {experiment_page(server, experiment)}"], pages)
    return serve(store, root, port, lambda line: console.out(line, highlight=False), lines)


def _tracked(name: str, root: Path) -> Study:
    """A study that MLflow records.

    Raises:
        UserError: there is none of this name, or MLflow does not record it.
    """
    require_name(name)
    study = Study.read(StudyFolder(root / name))
    if study.plan.tracking.uri == "none":
        raise UserError(f"The study {name} is not recorded in MLflow: its tracking.uri is none. See its report.html.")
    return study


def _pages(study: Study, server: str) -> list[str]:
    pages = study_pages(study.folder, study.plan, study.records(), server)
    if pages is None:
        raise UserError(
            f"MLflow has no record of the study {study.plan.name}. To make it: "
            f"{study.plan.resume_line(study.folder.path)}"
        )
    return pages.lines()


_STYLES = {Verdict.GOOD: "green", Verdict.WARNING: "yellow", Verdict.BAD: "red"}


def doctor(args: argparse.Namespace) -> int:
    """Say whether this machine is ready; exit code 1 if something has to be done first."""
    findings = examine(args.studies)
    table = TextTable("", "what", "found", "what to do")
    for finding in findings:
        style = _STYLES[finding.verdict]
        table.add_row(Text(finding.verdict.value, style=style), finding.subject, finding.text, finding.advice)
    Terminal().print(table)
    return FAILED if any(finding.verdict is Verdict.BAD for finding in findings) else OK


# ----------------------------------------------------------------------------
# dxmi submit


def submit(args: argparse.Namespace) -> int:
    """Start a job on a cluster and follow it, or follow or end one that was started before."""
    if (args.attach or args.cancel) and args.command:
        raise UserError("--attach and --cancel are about a job that there is: leave out the command after --.")
    if args.attach or args.cancel:
        jobs = _jobs(args)
        return _cancel(jobs, args.cancel) if args.cancel else _follow(jobs, args.attach, args)
    line, variables = entrypoint(args.command), environment(args.env)
    tree = survey(args.working_dir)
    tree.require_ours()
    tree.require_small(args.max_upload_mb * 1_000_000)
    jobs = _jobs(args)
    job = new_id()
    patiently(lambda: jobs.submit(job, line, tree, variables), args.patience)
    complain(f"submitted {job} with {tree.bytes / 1e6:.1f} MB of {tree.folder.resolve()}: {line}")
    return OK if args.no_follow else _follow(jobs, job, args)


def _jobs(args: argparse.Namespace) -> Jobs:
    address = args.address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    return Jobs(address, no_token=args.no_token)


def _cancel(jobs: Jobs, job: str) -> int:
    said = f"{job} has been asked to end." if jobs.stop(job) else f"{job} had ended before."
    complain(said)
    return OK


def _follow(jobs: Jobs, job: str, args: argparse.Namespace) -> int:
    console = Terminal()
    try:
        return follow(jobs, job, lambda text: console.out(text, end="", highlight=False), args.patience)
    except KeyboardInterrupt:
        again = f"dxmi submit --address {jobs.address}"
        complain(f"the job goes on. Follow it again: {again} --attach {job}. End it: {again} --cancel {job}")
        return STOPPED


# ----------------------------------------------------------------------------
# dxmi fetch


def fetch(args: argparse.Namespace) -> int:
    """Copy a study or a run from where all nodes keep theirs."""
    folder = storage.fetch(args.address, args.into, storage.light if args.without_checkpoints else storage.whole)
    Terminal().out(f"Fetched: {folder}", highlight=False)
    return OK
