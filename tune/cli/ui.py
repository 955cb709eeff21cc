"""`dxmi ui`: serve the MLflow UI for the local studies, reachable only from this machine."""

import argparse
import itertools
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from http.client import HTTPException
from pathlib import Path

from dxmi.errors import UserError
from tune.cli.exit_codes import OK
from tune.cli.studies import place
from tune.integrations.mlflow_store import open_store
from tune.machine import asked
from tune.plans.sweep import require_name
from tune.reporting.pages import experiment_page, newest_pages, study_pages
from tune.reporting.terminal import Terminal
from tune.studies.folder import StudyFolder
from tune.studies.study import Study

HOST = "127.0.0.1"
DEFAULT_PORT = 5000
_PORTS_TRIED = 50
_LAST_PORT = 65535
_START_SECONDS = 120.0
_ENVIRONMENT = {
    "MLFLOW_SERVER_ENABLE_JOB_EXECUTION": "false",  # otherwise it starts ten processes
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "DO_NOT_TRACK": "true",
}


def free_port(wanted: int | None) -> int:
    """Return the requested port, or the first free one starting at DEFAULT_PORT.

    Raises:
        UserError: the requested port is invalid or in use, or no port is free.
    """
    if wanted is not None:
        if not 1 <= wanted <= _LAST_PORT:
            raise UserError(f"--port is {wanted}: it must be in 1..{_LAST_PORT}.")
        if not is_free(wanted):
            raise UserError(f"Port {wanted} of {HOST} is taken: choose another with --port, or leave --port out.")
        return wanted
    for port in range(DEFAULT_PORT, DEFAULT_PORT + _PORTS_TRIED):
        if is_free(port):
            return port
    raise UserError(f"Ports {DEFAULT_PORT} to {DEFAULT_PORT + _PORTS_TRIED - 1} are taken: choose one with --port.")


def is_free(port: int) -> bool:
    """Whether a server can listen on a port of this machine."""
    with socket.socket() as probe:
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind((HOST, port))
        except OSError:
            return False
    return True


def address_of(port: int) -> str:
    """Return the address of the MLflow UI at a port."""
    return f"http://{HOST}:{port}"


def serve(store: str, root: Path, port: int, say: Callable[[str], None], pages: Iterable[str]) -> int:
    """Run MLflow's server until it is stopped, and print its addresses once it responds. Returns its exit code.

    Args:
        store: SQLite URI of the tracking store.
        root: the folder that holds the studies.
        port: the port to listen on.
        say: prints a line.
        pages: lines about the pages of the UI, printed once the server responds.
    """
    arguments = ["--backend-store-uri", store, "--artifacts-destination", str(root.resolve() / "mlartifacts")]
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the server would outlive this process
    server = subprocess.Popen(  # noqa: S603  (no shell; every argument is ours)
        [sys.executable, "-m", "mlflow", "server", *arguments, "--host", HOST, "--port", str(port), "--workers", "1"],
        env={**_ENVIRONMENT, **os.environ},
        stdout=subprocess.DEVNULL,
        stderr=subprocess.PIPE,
        text=True,
    )
    try:
        if answers(server, port):
            say(f"MLflow UI: {address_of(port)}  (press Ctrl-C to stop)")
            for line in pages:
                say(line)
        elif server.poll() is None:
            raise UserError(
                f"MLflow did not respond at {address_of(port)} within {_START_SECONDS:.0f} s: this machine may be "
                "busy. Try again when it is less loaded, or choose another --port."
            )
        _, errors = server.communicate()
    except KeyboardInterrupt:
        return 0
    finally:
        _end(server)
        signal.signal(signal.SIGTERM, before)
    if server.returncode <= 0:
        return 0
    say((errors or "").strip()[-2000:])
    return 1


def answers(server: "subprocess.Popen[str]", port: int) -> bool:
    """Wait until the server responds; returns False if it exits or takes too long."""
    deadline = time.monotonic() + _START_SECONDS
    while time.monotonic() < deadline and server.poll() is None:
        with suppress(OSError, HTTPException), asked(f"http://{HOST}:{port}/health", 1.0):
            return True
        time.sleep(0.2)
    return False


def _end(server: "subprocess.Popen[str]") -> None:
    server.terminate()
    try:
        server.wait(10.0)
    except subprocess.TimeoutExpired:
        server.kill()
        server.wait()


def ui(args: argparse.Namespace) -> int:
    """Serve the MLflow UI for the local store until Ctrl-C."""
    name, root = (None, args.studies) if args.study is None else place(args.study, args.studies)
    if not root.is_dir():
        raise UserError(f"The folder {root} does not exist: run a sweep first, or give another folder with --studies.")
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
    """Read a study that is recorded in MLflow.

    Raises:
        UserError: there is no study of this name, or it is not recorded in MLflow.
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
            f"MLflow has no record of the study {study.plan.name}. To create it: "
            f"{study.plan.resume_line(study.folder.path)}"
        )
    return pages.lines()
