"""`dxmi report`: rebuild a study's tables and HTML report from its records."""

import argparse
from collections.abc import Sequence

from rich.text import Text

from tune.api.sweep import write_results
from tune.cli.exit_codes import OK
from tune.cli.studies import place
from tune.messages import complain
from tune.plans.ablation import AblationPlan
from tune.plans.sweep import Plan, require_name
from tune.reporting.sentences import free_verdict
from tune.reporting.study_tables import arms_table, leaderboard_table
from tune.reporting.terminal import Terminal
from tune.studies.arm_results import results_of
from tune.studies.folder import StudyFolder
from tune.studies.leaderboard import changed_inputs, free_sampler_sentences
from tune.studies.records import TrialRecord
from tune.studies.study import Study


def show_results(console: Terminal, folder: StudyFolder, plan: Plan, records: Sequence[TrialRecord]) -> None:
    """Print a study's result table and name the entries that a training-free sampler beats."""
    if isinstance(plan, AblationPlan):
        results = results_of(plan, folder, records)
        table, sentences = arms_table(results), [*free_verdict(results), *results.outdone]
    else:
        table, sentences = leaderboard_table(plan, records), free_sampler_sentences(plan, records)
    console.print(table)
    for sentence in sentences:
        console.print(Text(sentence), highlight=False)


def report(args: argparse.Namespace) -> int:
    """Rewrite a study's tables and report, and print the path of the report."""
    name, root = place(args.study, args.studies)
    require_name(name)
    study = Study.read(StudyFolder(root / name))
    records = study.records()
    console = Terminal()
    show_results(console, study.folder, study.plan, records)
    warning = changed_inputs(study.plan, records)
    if warning:
        complain(warning)
    write_results(study, records)
    console.out(f"report: {study.folder.report}", highlight=False)
    return OK
