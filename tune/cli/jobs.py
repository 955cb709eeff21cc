"""`dxmi submit | fetch`: jobs on a cluster, and their results in object storage."""

import argparse
import os

from dxmi.errors import UserError
from tune.cli.exit_codes import OK, STOPPED
from tune.execution.jobs import DEFAULT_ADDRESS, Jobs, entrypoint, environment, follow, new_id, patiently, survey
from tune.integrations import object_store as storage
from tune.messages import complain
from tune.reporting.terminal import Terminal


def submit(args: argparse.Namespace) -> int:
    """Submit a job to a cluster and follow it, or follow or cancel an earlier one."""
    if (args.attach or args.cancel) and args.command:
        raise UserError("--attach and --cancel refer to an existing job: leave out the command after --.")
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
    complain(f"submitted {job} (uploaded {tree.bytes / 1e6:.1f} MB from {tree.folder.resolve()}): {line}")
    return OK if args.no_follow else _follow(jobs, job, args)


def _jobs(args: argparse.Namespace) -> Jobs:
    address = args.address or os.environ.get("RAY_API_SERVER_ADDRESS") or DEFAULT_ADDRESS
    return Jobs(address, no_token=args.no_token)


def _cancel(jobs: Jobs, job: str) -> int:
    said = f"cancellation of {job} requested." if jobs.stop(job) else f"{job} had already ended."
    complain(said)
    return OK


def _follow(jobs: Jobs, job: str, args: argparse.Namespace) -> int:
    console = Terminal()
    try:
        return follow(jobs, job, lambda text: console.out(text, end="", highlight=False), args.patience)
    except KeyboardInterrupt:
        again = f"dxmi submit --address {jobs.address}"
        complain(f"the job continues. To follow it: {again} --attach {job}. To cancel it: {again} --cancel {job}")
        return STOPPED


def fetch(args: argparse.Namespace) -> int:
    """Copy a study or a run from shared storage to this machine."""
    folder = storage.fetch(args.address, args.into, storage.light if args.without_checkpoints else storage.whole)
    Terminal().out(f"Fetched: {folder}", highlight=False)
    return OK
