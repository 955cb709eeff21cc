"""`dxmi submit`: runs a `dxmi` command as a job on an existing Ray cluster.

The working tree is uploaded without data, runs and virtual environments, and the job's output is printed until it ends.
If the connection drops or this process exits, the job continues, and `--attach` follows it again.
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
"""Patterns in gitignore syntax; the last two lines are files that could hold secrets."""
PASSED_ON = ("DXMI_CACHE", "DXMI_DATA")
"""Environment variables passed to a job if they are set here."""
UPLOAD_MEGABYTES = 100
"""Default upload limit."""
_CREDENTIALS = re.compile(
    r"(?<!abfs:)(?<!abfss:)//[^/\s]*@|tracking\.uri.*[@?#]|storage_path.*[?&][^=&]*(key|secret|token|password|sig)[^=&]*=",
    re.IGNORECASE,
)
"""Matches credentials in an address, with or without scheme; in abfs addresses the container precedes the @."""
_SECRET_WORDS = ("TOKEN", "SECRET", "PASSWORD", "PASSWD", "CREDENTIAL", "KEY", "COOKIE")
_COMMANDS = ("train", "sweep", "report", "studies", "doctor", "config")
_BIGGEST = 5
_POLL_SECONDS = 1.0
_SAVING_SECONDS = "120"
"""Time for a cancelled job to save; Ray's default is 3 s."""
_LONGEST_WAIT = 15.0
_ANSWER_SECONDS, _UPLOADED_SECONDS = 10.0, 120.0
"""Timeouts for connecting to a cluster, and for its response after an upload."""
_ENDED = ("SUCCEEDED", "FAILED", "STOPPED")
OK, FAILED, STOPPED = 0, 1, 130
T = TypeVar("T")


@dataclass(frozen=True)
class Tree:
    """A working tree to be uploaded.

    Attributes:
        folder: its root.
        sizes: bytes to upload by entry of the root, largest first.
        left_out: patterns of files that are not uploaded.
    """

    folder: Path
    sizes: dict[str, int]
    left_out: tuple[str, ...]

    @property
    def bytes(self) -> int:
        """Total size."""
        return sum(self.sizes.values())

    @property
    def biggest(self) -> str:
        """Its largest entries, as text."""
        return ", ".join(f"{name} {size / 1e6:.0f} MB" for name, size in list(self.sizes.items())[:_BIGGEST])

    def require_ours(self) -> None:
        """Check that the tree is a checkout of this project.

        Raises:
            UserError: it is not.
        """
        if not {"dxmi", "tune"} <= set(self.sizes):
            raise UserError(
                f"{self.folder.resolve()} does not contain the packages dxmi and tune, which the job needs: change to "
                "the root of the checkout, or give it with --working-dir."
            )

    def require_small(self, limit: int) -> None:
        """Check that the tree does not exceed a size limit.

        Raises:
            UserError: it does; the message names the largest entries.
        """
        if self.bytes > limit:
            raise UserError(
                f"{self.folder} has {self.bytes / 1e6:.0f} MB to upload, and the limit is {limit / 1e6:.0f} MB: move "
                f"the largest entries away ({self.biggest}), list them in .gitignore, or raise --max-upload-mb."
            )


def survey(folder: Path) -> Tree:
    """Measure what of a working tree would be uploaded: all files except `LEFT_OUT` and those in .gitignore.

    Raises:
        UserError: the folder does not exist.
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
    except OSError:  # unreadable files are not uploaded
        return 0


def environment(names: Sequence[str]) -> dict[str, str]:
    """Return the environment variables to pass to a job: `PASSED_ON` and `names`.

    Raises:
        UserError: a variable is not set, or looks like a secret, which Ray's dashboard would show.
    """
    for name in names:
        if any(word in name.upper() for word in _SECRET_WORDS):
            raise UserError(
                f"--env {name} looks like a secret, and Ray's dashboard shows a job's variables: set it on the "
                "cluster's nodes before Ray starts there."
            )
        if name not in os.environ:
            raise UserError(f"--env {name} is not set here: set it, or leave it out.")
    return {name: os.environ[name] for name in (*PASSED_ON, *names) if name in os.environ}


def entrypoint(arguments: Sequence[str]) -> str:
    """Build the job's command line from a `dxmi` command and its arguments.

    Raises:
        UserError: the command cannot run on a cluster, or an argument contains credentials, which Ray would show.
    """
    if not arguments or arguments[0] not in _COMMANDS:
        given = arguments[0] if arguments else "nothing"
        raise UserError(
            f"The command after -- is {given}: it must be one of {', '.join(_COMMANDS)}, with its arguments."
        )
    if any(_CREDENTIALS.search(unquote(argument)) for argument in arguments):
        raise UserError(
            "An address after -- contains a user name, a password or a query, and Ray's dashboard shows a job's "
            "command: set MLFLOW_TRACKING_USERNAME and MLFLOW_TRACKING_PASSWORD on the cluster's nodes instead."
        )
    return shlex.join(["python", "-m", "tune.cli.main", *arguments])


def new_id() -> str:
    """Return a unique job ID."""
    return f"dxmi-{secrets.token_hex(6)}"


class Jobs:
    """A client of a Ray cluster's job server.

    Args:
        address: http://host:port.
        no_token: whether to accept a server without token authentication.

    Raises:
        UserError: the server does not respond, is not a job server, requires a token that is missing or wrong, or
            does not require one although it can be reached from other machines.
    """

    def __init__(self, address: str, *, no_token: bool = False) -> None:
        if not address.startswith(("http://", "https://")):
            raise UserError(f"--address is {address!r}: it must be http://HOST:PORT of the cluster's dashboard.")
        self.address = address
        self._client = self._asked(lambda: _client(address))
        if not no_token and not is_loopback(address) and _lets_everybody_in(address):
            raise UserError(
                f"The cluster at {address} requires no token, so anyone who can reach it can run code there: start it "
                "with RAY_AUTH_MODE=token, or pass --no-token if its network is otherwise protected."
            )

    def submit(self, job: str, command: str, tree: Tree, variables: dict[str, str]) -> None:
        """Upload the tree and start a job under the given ID; does nothing if that job already exists."""
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
            if "already exists" not in str(error):  # an earlier attempt succeeded but its response was lost
                raise

    def stop(self, job: str) -> bool:
        """Request cancellation of a job; returns whether it was running."""
        return bool(self._asked(lambda: self._client.stop_job(job), job))

    def details(self, job: str) -> Any:
        """Return Ray's record of a job."""
        return self._asked(lambda: self._client.get_job_info(job), job)

    def logs(self, job: str) -> str:
        """Return the complete output of a job so far."""
        return str(self._asked(lambda: self._client.get_job_logs(job), job))

    def _asked(self, question: Callable[[], Any], job: str = "") -> Any:
        try:
            return question()
        except (ConnectionError, OSError) as error:
            raise UnreachableError(
                f"No Ray cluster responds at {self.address} ({_short(error)}): check that this is the address of its "
                "dashboard and that it is running."
            ) from error
        except AuthenticationError as error:
            raise UserError(
                f"The cluster at {self.address} requires a token, which is missing or wrong: save the cluster's token "
                "as ~/.ray/auth_token, or set RAY_AUTH_TOKEN_PATH to its file, and set RAY_AUTH_MODE=token."
            ) from error
        except RuntimeError as error:
            text = str(error)
            if "404" in text or "does not exist" in text:
                raise UserError(f"The cluster at {self.address} has no job {job}.") from error
            raise UnreachableError(f"The cluster at {self.address} responded: {_short(error)}") from error


class UnreachableError(UserError):
    """The cluster does not respond; the error may be temporary."""


def _lets_everybody_in(address: str) -> bool:
    """Whether a job server lists its jobs without a token."""
    try:
        with asked(f"{address.rstrip('/')}/api/jobs/", _ANSWER_SECONDS) as answer:
            return bool(answer.status == HTTPStatus.OK)
    except OSError:  # includes HTTPError
        return False


def _short(error: Exception) -> str:
    return " ".join(str(error).split()).rstrip(".")[:200]


def _client(address: str) -> Any:
    use_ray_token()
    spare_loopback()
    client = impatient_job_client(address, (_ANSWER_SECONDS, _UPLOADED_SECONDS))
    for name in [name for name in logging.root.manager.loggerDict if name.split(".")[0] == "ray"]:
        logging.getLogger(name).setLevel(logging.ERROR)  # it logs every uploaded file
    return client


def patiently(action: Callable[[], T], patience: float) -> T:
    """Return the result of `action`, retried while the cluster does not respond.

    Args:
        action: a function that is safe to repeat.
        patience: seconds to keep retrying.

    Raises:
        UnreachableError: the cluster did not respond within that time.
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
    """Print a job's output until it ends; returns its exit code.

    Args:
        jobs: client of the cluster's job server.
        job: ID of the job.
        write: called with each piece of output.
        patience: seconds to keep retrying while the cluster does not respond.

    Raises:
        UnreachableError: the cluster did not respond within that time.
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
    """Return the exit code of the job's command."""
    if str(details.status) == "SUCCEEDED":
        return OK
    if str(details.status) == "STOPPED":
        return STOPPED
    return int(details.driver_exit_code or FAILED)
