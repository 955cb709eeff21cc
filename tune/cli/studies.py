"""`dxmi studies`: list the studies in a folder."""

import argparse
from collections import Counter
from pathlib import Path

from filelock import FileLock, Timeout

from dxmi.errors import UserError
from dxmi.formatting import score_text
from dxmi.metrics.keys import best_score
from dxmi.persistence.files import require_target
from tune.cli.exit_codes import OK
from tune.messages import duration
from tune.reporting.terminal import Terminal
from tune.reporting.text_tables import TextTable
from tune.studies.folder import StudyFolder, studies_in
from tune.studies.records import TrialState
from tune.studies.study import Study


def place(study: str, studies: Path) -> tuple[str, Path]:
    """Split a study, given by name or by path, into its name and the folder that contains it."""
    path = Path(study)
    require_target(path if len(path.parts) > 1 else studies / path, "The study")
    return (path.name, path.parent) if len(path.parts) > 1 else (study, studies)


def studies(args: argparse.Namespace) -> int:
    """List the studies with their states and best scores."""
    found = studies_in(args.studies)
    console = Terminal()
    if not found:
        console.out(f"There are no studies in {args.studies} yet: start one with dxmi sweep.", highlight=False)
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
    best = score_text(best_score(complete, plan.direction)) if complete else ""
    is_done = study.is_done and ended == len(records)
    return _state(folder, is_done), f"{ended}/{plan.num_trials} ({words})", best, seconds


def _state(folder: StudyFolder, is_done: bool) -> str:
    """Return "running", "finished" or "interrupted"."""
    lock = FileLock(folder.path / ".lock")
    try:
        lock.acquire(timeout=0)
    except (Timeout, OSError):
        return "running"
    lock.release()
    if is_done or "budget" in str(folder.read_progress()["ended"]):
        return "finished"
    return "interrupted"
