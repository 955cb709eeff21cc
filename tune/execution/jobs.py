"""`dxmi submit`: a command of ours on an existing Ray cluster, as a Ray job.

The working tree goes along, without data, runs and virtual environments; the job's output comes back until it ends. The
connection may drop meanwhile, and so may we: the job goes on, and `--attach` follows it again.
"""

import logging
import os
import re
import secrets
import shlex
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from http import HTTPStatus
from pathlib import Path
from typing import Any, TypeVar
from urllib.parse import unquote

from pathspec import PathSpec
from ray.exceptions import AuthenticationError

from dxmi.errors import UserError
from tune.compat import impatient_job_client, use_ray_token
from tune.machine import asked, is_loopback, spare_loopback

DEFAULT_ADDRESS = "http://127.0.0.1:8265"
LEFT_OUT = (
    ".git", ".venv", "venv", "env", "node_modules", "__pycache__", "*.pyc", "*.egg-info", ".mypy_cache", ".ruff_cache",
    ".pytest_cache", ".import_linter_cache", "/runs", "/studies", "/data", "/dist", "/build", "mlruns", "*.part",
    ".env", ".env.*", ".netrc", ".pgpass", ".ssh", ".aws", "*.pem", "*.key", "auth_token", ".ray-token*",
    "credentials*", "kubeconfig*",
)  # fmt: skip
"""Patterns of gitignore's kind; the last two lines are what could hold a secret."""
PASSED_ON = ("DXMI_CACHE", "DXMI_DATA")
"""Variables that a job gets if they are set here."""
UPLOAD_MEGABYTES = 100
"""What is sent unless more is allowed."""
_CREDENTIALS = re.compile(
    r"(?<!abfs:)(?<!abfss:)//[^/\s]*@|tracking\.uri.*[@?#]|storage_path.*[?&][^=&]*(key|secret|token|password|sig)[^=&]*=",
    re.IGNORECASE,
)
"""In an argument: those of an address, with its scheme or without; an abfs address names its container before the @."""
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "KEY", "COOKIE")
_COMMANDS = ("train", "sweep", "report", "studies", "doctor", "config")
_BIGGEST = 5
_POLL_SECONDS = 1.0
_SAVING_SECONDS = "120"
"""That a job which is told to end has for saving, of Ray's 3."""
_LONGEST_WAIT = 15.0
_ANSWER_SECONDS, _UPLOADED_SECONDS = 10.0, 120.0
"""To be connected to a cluster, and to be answered once everything is sent."""
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
OK, FAILED, STOPPED = 0, 1, 130
T = TypeVar("T")


@dataclass(frozen=True)
class Tree:
    """A working tree as it would be uploaded.

    Attributes:
        folder: its root.
        sizes: bytes by entry of the root, largest first.
        left_out: patterns that stay here.
    """

    folder: Path
    sizes: dict[str, int]
    left_out: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """In all."""
        return sum(self.sizes.values())

    @property
    def biggest(self) -> str:
        """Its largest entries, in words."""
        return ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in list(self.sizes.items())[:_BIGGEST])

    def require_ours(self) -> None:
        """Refuse a tree that is no checkout of this project.

        Raises:
            UserError: it is none.
        """
        if not {"dxmi", "tune"} <= set(self.sizes):
            raise UserError(
                f"{self.folder.resolve()} does not hold the packages dxmi and tune, which the cluster runs: go to the "
                "checkout's root, or name it by --working-dir."
            )

    def require_small(self, limit: int) -> None:
        """Refuse a tree that is too large.

        Raises:
            UserError: it is; the sentence names the biggest entries.
        """
        if self.bytes > limit:
            raise UserError(
                f"{self.folder} has {self.bytes / 1e6:.0f} MB to upload, and the limit is {limit / 1e6:.0f} MB: move "
                f"the biggest away ({self.biggest}), list them in .gitignore, or raise --max-upload-mb."
            )


def survey(folder: Path) -> Tree:
    """Look at what of a working tree would be uploaded: neither `LEFT_OUT` nor what .gitignore names.

    Raises:
        UserError: there is no such folder.
    """
    if not folder.is_dir():
        raise UserError(f"--working-dir is {folder}: there is no such folder.")
    ignored = folder / ".gitignore"
    own = ignored.read_text().splitlines() if ignored.is_file() else []
    left_out = (*LEFT_OUT, *(line for line in own if line.strip() and not line.startswith(("#", "!"))))
    spec = PathSpec.from_lines("gitignore", left_out)
    sizes = {entry.name: _size(entry, folder, spec) for entry in folder.iterdir()}
    largest_first = sorted(((size, name) for name, size in sizes.items() if size), reverse=True)
    return Tree(folder, {name: size for size, name in largest_first}, left_out)


def _size(entry: Path, root: Path, spec: PathSpec[Any]) -> int:
    name = str(entry.relative_to(root))
    if spec.match_file(name) or spec.match_file(name + "/") or entry.is_symlink():
        return 0
    try:
        if entry.is_dir():
            return sum(_size(inner, root, spec) for inner in entry.iterdir())
        return entry.stat().st_size if entry.is_file() else 0
    except OSError:  # what cannot be read is not sent either
        return 0


def environment(names: Sequence[str]) -> dict[str, str]:
    """The variables that go with a job: `PASSED_ON`, and those that `names` adds.

    Raises:
        UserError: one is not set, or looks like a secret, which Ray would show to everybody who sees the job.
    """
    for name in names:
        if any(word in name.upper() for word in _SECRET_WORDS):
            raise UserError(
                f"--env {name} looks like a secret, and a job's variables are shown on Ray's dashboard: set it "
                "where the cluster's nodes start instead."
            )
        if name not in os.environ:
            raise UserError(f"--env {name} is not set here: set it, or leave it out.")
    return {name: os.environ[name] for name in (*PASSED_ON, *names) if name in os.environ}


def entrypoint(arguments: Sequence[str]) -> str:
    """The job's command line, of a command of `dxmi` and its arguments.

    Raises:
        UserError: it is no command for a cluster, or holds an address with credentials, which Ray would show.
    """
    if not arguments or arguments[0] not in _COMMANDS:
        given = arguments[0] if arguments else "nothing"
        raise UserError(f"After -- comes a command, one of {', '.join(_COMMANDS)}, and its arguments; not {given}.")
    if any(_CREDENTIALS.search(unquote(argument)) for argument in arguments):
        raise UserError(
            "An address after -- holds a user name, a password or a query, and Ray's dashboard shows a job's command: "
            "set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD where the cluster's nodes start instead."
        )
    return shlex.join(["python", "-m", "tune.cli.main", *arguments])


def new_id() -> str:
    """A job's id that no other has."""
    return f"dxmi-{secrets.token_hex(6)}"


class Jobs:
    """The job server of a Ray cluster.

    Args:
        address: http://host:port.
        no_token: whether it may let everybody in who reaches it.

    Raises:
        UserError: it does not answer, is no job server, wants a token that we have not got, or wants none though
            others reach it.
    """

    def __init__(self, address: str, *, no_token: bool = False) -> None:
        if not address.startswith(("http://", "https://")):
            raise UserError(f"--address is {address!r}: it must be http://HOST:PORT of the cluster's dashboard.")
        self.address = address
        self._client = self._asked(lambda: _client(address))
        if not no_token and not is_loopback(address) and _lets_everybody_in(address):
            raise UserError(
                f"The cluster at {address} asks for no token, so whoever reaches it runs code there: start it with "
                "RAY_AUTH_MODE=token, or pass --no-token if something else keeps strangers out."
            )

    def submit(self, job: str, command: str, tree: Tree, variables: dict[str, str]) -> None:
        """Upload the tree and start a job under an id of ours; one that runs under it already is left alone."""
        runtime_env = {
            "working_dir": str(tree.folder.resolve()),
            "excludes": list(tree.left_out),
            "env_vars": {**variables, "RAY_JOB_STOP_WAIT_TIME_S": _SAVING_SECONDS},
        }
        try:
            self._asked(
                lambda: self._client.submit_job(entrypoint=command, submission_id=job, runtime_env=runtime_env), job
            )
        except UnreachableError as error:
            if "already exists" not in str(error):  # the answer to an earlier try was lost, not the try
                raise

    def stop(self, job: str) -> bool:
        """Ask a job to end; returns whether it was running."""
        return bool(self._asked(lambda: self._client.stop_job(job), job))

    def details(self, job: str) -> Any:
        """Ray's record of a job."""
        return self._asked(lambda: self._client.get_job_info(job), job)

    def logs(self, job: str) -> str:
        """All that a job has printed so far."""
        return str(self._asked(lambda: self._client.get_job_logs(job), job))

    def _asked(self, question: Callable[[], Any], job: str = "") -> Any:
        try:
            return question()
        except (ConnectionError, OSError) as error:
            raise UnreachableError(
                f"No Ray cluster answers at {self.address} ({_short(error)}): is that its dashboard, and does it run?"
            ) from error
        except AuthenticationError as error:
            raise UserError(
                f"The cluster at {self.address} wants a token, and has got none or a wrong one: put the cluster's own "
                "into ~/.ray/auth_token, or its path into RAY_AUTH_TOKEN_PATH, and set RAY_AUTH_MODE=token."
            ) from error
        except RuntimeError as error:
            text = str(error)
            if "404" in text or "does not exist" in text:
                raise UserError(f"The cluster at {self.address} has no job {job}.") from error
            raise UnreachableError(f"The cluster at {self.address} answered: {_short(error)}") from error


class UnreachableError(UserError):
    """The cluster does not answer now; it may later."""


def _lets_everybody_in(address: str) -> bool:
    """Whether a job server lists its jobs for somebody without a token."""
    try:
        with asked(f"{address.rstrip('/')}/api/jobs/", _ANSWER_SECONDS) as answer:
            return bool(answer.status == HTTPStatus.OK)
    except OSError:  # an HTTPError is one too
        return False


def _short(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]


def _client(address: str) -> Any:
    use_ray_token()
    spare_loopback()
    client = impatient_job_client(address, (_ANSWER_SECONDS, _UPLOADED_SECONDS))
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "ray"]:
        logging.getLogger(name).setLevel(logging.ERROR)  # what it packs, it says at length
    return client


def patiently(action: Callable[[], T], patience: float) -> T:
    """What `action` gives, asked again and again while the cluster does not answer.

    Args:
        action: may be done more than once.
        patience: seconds.

    Raises:
        UnreachableError: it did not answer for so long.
    """
    deadline, wait = time.monotonic() + patience, _POLL_SECONDS
    while True:
        try:
            return action()
        except UnreachableError:
            if time.monotonic() + wait > deadline:
                raise
        time.sleep(wait)
        wait = min(2.0 * wait, _LONGEST_WAIT)


def follow(jobs: Jobs, job: str, write: Callable[[str], None], patience: float) -> int:
    """Write what a job prints until it ends; returns its exit code.

    Args:
        jobs: the cluster's.
        job: its id.
        write: takes the text.
        patience: seconds for which a cluster that does not answer is asked again.

    Raises:
        UnreachableError: it did not answer for so long.
    """
    written = 0
    while True:
        details, text = patiently(lambda: (jobs.details(job), jobs.logs(job)), patience)
        write(text[written:])
        written = len(text)
        if str(details.status) in _ENDED:
            return exit_code(details)
        time.sleep(_POLL_SECONDS)


def exit_code(details: Any) -> int:
    """What the job's command ended with."""
    if str(details.status) == "SUCCEEDED":
        return OK
    if str(details.status) == "STOPPED":
        return STOPPED
    return int(details.driver_exit_code or FAILED)
