"""MLflow as this project uses it: a local store that nothing can break, and runs that nothing is written to twice.

    studies/
        mlflow.db       every run; made from the study folders, which are the truth
        mlartifacts/    files of the runs, hard links into the study folders
        .mlflow.lock    held while the store is made or moved

MLflow is imported inside functions, since that takes seconds; the caller chooses the thread.
"""

import logging
import os
import shutil
import sqlite3
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import closing, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from tempfile import mkdtemp
from typing import TYPE_CHECKING, TypeVar
from urllib.parse import unquote, urlsplit

from filelock import FileLock, Timeout

from dxmi.errors import UserError
from dxmi.persistence.files import sync_folder
from tune.compat import mlflow_tables
from tune.machine import spare_loopback

if TYPE_CHECKING:
    from mlflow import MlflowClient
    from mlflow.entities import Run as MlflowRun

T = TypeVar("T")

_ENVIRONMENT = {
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a repeated request could write twice: `MlflowWriter` looks first
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_LOGGERS = ("mlflow", "alembic", "urllib3.connectionpool")
_LOCK_SECONDS = 120.0
_BUSY_SECONDS = 60.0
"""How long an SQLite lock that somebody else holds is waited for while the store is opened."""
KIND_TAG, TRAINING_KIND = "mlflow.experimentKind", "custom_model_development"
"""What makes MLflow's page open an experiment as model training; without it as an app of generative AI. In 3.17 what a
browser remembers comes before the tag, and what an address says (see `tune.reporting.pages`) before both."""
_GUESSED_KINDS = ("", "no_inferred_type")
"""Kinds that nobody has chosen; so are those that end in _inferred."""
_METRICS_A_CALL = 1_000
_PARAMS_A_CALL = 100
_RUNS_A_PAGE = 500
_MAX_TEXT = 5_000
"""Characters of a parameter or a tag; MLflow refuses more than 6,000."""


def import_quietly() -> None:
    """Import MLflow, the first time with defaults for a program that shows its own messages."""
    spare_loopback()
    for name, value in _ENVIRONMENT.items():
        os.environ.setdefault(name, value)
    import mlflow  # noqa: F401, PLC0415

    for name in _LOGGERS:
        logging.getLogger(name).setLevel(logging.CRITICAL)


# ----------------------------------------------------------------------------
# The local store


def store_address(root: Path) -> str:
    """The tracking URI of the local store in a folder of studies, which need not exist yet."""
    return f"sqlite:///{_database(root.resolve())}"


def open_store(root: Path, experiment: str) -> tuple[str, str]:
    """Make the local store and the experiment in it, unless they are there.

    Any number of processes may do so at once, and one that is killed meanwhile leaves nothing behind that the next
    would stumble over. A store whose folder has been moved is told so.

    Args:
        root: the folder of the studies.
        experiment: MLflow's experiment.

    Returns:
        Its tracking URI and the experiment's id.

    Raises:
        UserError: the folder cannot be written, what is there is no MLflow store, or another program keeps it locked.
    """
    root = root.resolve()
    if "?" in str(root):
        raise UserError(f"{root} has a question mark in its name, which SQLite's addresses cannot: rename it.")
    import_quietly()  # before the lock, since it takes seconds
    try:
        root.mkdir(parents=True, exist_ok=True)
        with _locked(root):
            if not _exists(root):
                _build(root)
            _relocate(root)
            return store_address(root), _open_experiment(root, experiment)
    except OSError as error:
        raise UserError(f"MLflow's store in {root} cannot be written: {error.strerror or error}.") from error
    except sqlite3.Error as error:
        raise UserError(f"MLflow's store in {root} cannot be opened: {error}.") from error


def _open_experiment(root: Path, name: str) -> str:
    from mlflow import MlflowClient  # noqa: PLC0415
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    try:
        return experiment_id(MlflowClient(store_address(root)), name, _artifacts(root).as_uri())
    except MlflowException as error:
        if "out-of-date database schema" not in str(error):
            raise
        raise UserError(
            f"{_database(root)} was written by an older MLflow. Make a copy of it, then run: "
            f"mlflow db upgrade '{store_address(root)}'"
        ) from error


def experiment_id(client: "MlflowClient", name: str, location: str | None = None) -> str:
    """The id of an experiment, which is made if there is none.

    Args:
        client: of the store.
        name: of the experiment.
        location: of the artifacts of a new one; None leaves it to the server.

    Raises:
        UserError: it was deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        experiment = str(client.create_experiment(name, artifact_location=location))
        _show_as_training(client, experiment, {})
        return experiment
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow's experiment {name} was deleted: restore it by "
            f"`mlflow experiments restore -x {found.experiment_id}`, or choose another by tracking.experiment=NAME."
        )
    _show_as_training(client, str(found.experiment_id), found.tags)
    return str(found.experiment_id)


def _show_as_training(client: "MlflowClient", experiment: str, tags: Mapping[str, str]) -> None:
    """Let MLflow's page show model training, unless somebody has chosen otherwise; a server may refuse the tag."""
    from mlflow.exceptions import MlflowException  # noqa: PLC0415

    kind = tags.get(KIND_TAG, "")
    if kind in _GUESSED_KINDS or kind.endswith("_inferred"):
        with suppress(MlflowException):
            client.set_experiment_tag(experiment, KIND_TAG, TRAINING_KIND)


def _database(root: Path) -> Path:
    return root / "mlflow.db"


def _artifacts(root: Path) -> Path:
    return root / "mlartifacts"


@contextmanager
def _locked(root: Path) -> Iterator[None]:
    try:
        with FileLock(root / ".mlflow.lock", timeout=_LOCK_SECONDS):
            yield
    except Timeout as error:
        raise UserError(f"Another process has been opening MLflow's store in {root} for minutes: end it.") from error


def _exists(root: Path) -> bool:
    """Whether there is a store; a file without a byte, as a killed sqlite3 leaves it, is none.

    Raises:
        UserError: there is something else.
    """
    database = _database(root)
    if not database.exists() or database.stat().st_size == 0:
        return False
    try:
        with closing(sqlite3.connect(database, timeout=_BUSY_SECONDS)) as connection:
            connection.execute("SELECT version_num FROM alembic_version").fetchone()
    except sqlite3.Error as error:
        if "locked" in str(error):
            raise UserError(f"{database} is locked by another program: end it, or wait.") from error
        raise UserError(
            f"{database} is damaged or is no MLflow store ({error}). Move it away: a resumed study is recorded anew."
        ) from error
    return True


def _build(root: Path) -> None:
    """MLflow makes its tables in dozens of steps, any of which a kill may be the last: so it does it elsewhere."""
    for stale in root.glob(".mlflow.*.part"):
        shutil.rmtree(stale, ignore_errors=True)
    part = Path(mkdtemp(prefix=".mlflow.", suffix=".part", dir=root))
    try:
        database = part / "mlflow.db"
        mlflow_tables(f"sqlite:///{database}", _artifacts(root).as_uri())
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.execute("PRAGMA journal_mode=DELETE")  # so that one file is all there is
        with database.open("rb") as file:
            os.fsync(file.fileno())
        database.replace(_database(root))
        sync_folder(root)
    finally:
        shutil.rmtree(part, ignore_errors=True)


_RELOCATED = (("experiments", "artifact_location"), ("runs", "artifact_uri"))


def _relocate(root: Path) -> None:
    """Tell the store where it is, if its folder was moved or copied. `_build` gave experiment 0 its artifacts' place,
    from which all others are told apart that are not ours to change.
    """
    here = _artifacts(root).as_uri()
    with closing(sqlite3.connect(_database(root), timeout=_BUSY_SECONDS)) as connection, connection:
        row = connection.execute("SELECT artifact_location FROM experiments WHERE experiment_id = 0").fetchone()
        there = str(row[0]).removesuffix("/0") if row else here
        if there == here or not there.startswith("file:") or not there.endswith("/mlartifacts"):
            return
        for table, column in _RELOCATED:
            connection.execute(
                f"UPDATE {table} SET {column} = ? || substr({column}, ?) "  # noqa: S608  (names from above)
                f"WHERE {column} = ? OR substr({column}, 1, ?) = ?",
                (here, len(there) + 1, there, len(there) + 1, there + "/"),
            )


# ----------------------------------------------------------------------------
# Runs


@dataclass(frozen=True)
class Point:
    """One value of a metric.

    Attributes:
        key: of the metric.
        value: finite.
        step: on the run's own axis.
        time: when it was measured, milliseconds since 1970.
    """

    key: str
    value: float
    step: int
    time: int


@dataclass
class Run:
    """What MLflow has of a run, as far as is known. After an error it is not: find the run again.

    Attributes:
        id: MLflow's.
        status: MLflow's.
        tags: all of them.
        artifact_uri: where its files go.
        params: those it has.
        keys: metrics it had when it was found.
        steps: the newest step it has of each metric; None until MLflow was asked.
        files: artifacts it has; None until MLflow was asked.
        is_described: whether it has all parameters.
    """

    id: str
    status: str
    tags: dict[str, str]
    artifact_uri: str
    params: frozenset[str]
    keys: frozenset[str]
    steps: dict[str, int] | None = None
    files: set[str] | None = None
    is_described: bool = False


class MlflowWriter:
    """Writes runs. Each method looks at what the run has and sends what it lacks, so that any may be called again.

    Args:
        client: MLflow's.
        experiment: id of the experiment that holds the runs.
        is_local: whether it is the local store, in which a link does instead of a copy.

    Attributes:
        experiment: its id.
    """

    def __init__(self, client: "MlflowClient", experiment: str, is_local: bool) -> None:
        self._client = client
        self.experiment = experiment
        self._is_local = is_local

    def find(self, tags: Mapping[str, str]) -> list[Run]:
        """The runs with these tags, oldest first."""
        condition = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
        found: list[Run] = []
        token: str | None = None
        while True:
            page = self._client.search_runs(
                [self.experiment],
                condition,
                max_results=_RUNS_A_PAGE,
                order_by=["attributes.start_time ASC"],
                page_token=token,
            )
            found += [_known(run) for run in page]
            token = page.token
            if not token:
                return found

    def create(self, tags: Mapping[str, str], began: int) -> Run:
        """A new run that began at `began`, in milliseconds."""
        short = {key: value[:_MAX_TEXT] for key, value in tags.items()}
        run = _known(self._client.create_run(self.experiment, start_time=began, tags=short))
        run.steps, run.files = {}, set()
        return run

    def describe(self, run: Run, params: Mapping[str, str]) -> None:
        """Give a run its parameters, which never change."""
        from mlflow.entities import Param  # noqa: PLC0415

        new = [Param(key, value[:_MAX_TEXT]) for key, value in params.items() if key not in run.params]
        for some in _batches(new, _PARAMS_A_CALL):
            self._client.log_batch(run.id, params=some)
        run.is_described = True

    def log(self, run: Run, points: Iterable[Point]) -> None:
        """Send those points that a run does not have. Each metric's steps must ascend."""
        from mlflow.entities import Metric  # noqa: PLC0415

        if run.steps is None:
            run.steps = {key: self._newest_step(run, key) for key in run.keys}
        for some in _batches(missing(run, points), _METRICS_A_CALL):
            self._client.log_batch(run.id, metrics=[Metric(p.key, p.value, p.time, p.step) for p in some])
            run.steps.update((point.key, point.step) for point in some)

    def _newest_step(self, run: Run, key: str) -> int:
        return max((point.step for point in self._client.get_metric_history(run.id, key)), default=-1)

    def mark(self, run: Run, tags: Mapping[str, str]) -> bool:
        """Set those tags that differ; returns whether any did."""
        from mlflow.entities import RunTag  # noqa: PLC0415

        changed = {key: value[:_MAX_TEXT] for key, value in tags.items() if run.tags.get(key) != value[:_MAX_TEXT]}
        if changed:
            self._client.log_batch(run.id, tags=[RunTag(key, value) for key, value in changed.items()])
            run.tags |= changed
        return bool(changed)

    def begin(self, run: Run, tags: Mapping[str, str]) -> None:
        """Let a run be running."""
        self.mark(run, tags)
        if run.status != "RUNNING":
            self._client.update_run(run.id, status="RUNNING")
            run.status = "RUNNING"

    def end(self, run: Run, status: str, tags: Mapping[str, str], ended: int) -> None:
        """Let a run have ended at `ended`, in milliseconds."""
        if self.mark(run, tags) or run.status != status:
            self._client.set_terminated(run.id, status, ended)
            run.status = status

    def upload(self, run: Run, files: Iterable[tuple[Path, str]], *, again: bool = False) -> None:
        """Add files to a run; one that has vanished meanwhile is left out.

        Args:
            run: whose.
            files: (file, folder among the artifacts).
            again: also those that it has, since they may have changed.
        """
        links = self._is_local and run.artifact_uri.startswith("file:")
        if run.files is None:
            run.files = set() if links else self._listed(run)
        for path, folder in files:
            name = f"{folder}/{path.name}" if folder else path.name
            if (again or name not in run.files) and path.is_file() and not path.is_symlink():
                with suppress(FileNotFoundError):
                    if links:
                        link(path, Path(unquote(urlsplit(run.artifact_uri).path)) / name)
                    else:
                        self._client.log_artifact(run.id, str(path), folder or None)
                run.files.add(name)

    def _listed(self, run: Run) -> set[str]:
        return {file.path for folder in (None, "samples") for file in self._client.list_artifacts(run.id, folder)}


def open_writer(root: Path, uri: str, name: str) -> MlflowWriter:
    """What writes and finds the runs of an experiment.

    Args:
        root: the folder of the studies.
        uri: local, or http(s)://... of a server.
        name: of MLflow's experiment, which is made if there is none.

    Raises:
        UserError: as `open_store`, or the experiment was deleted.
    """
    import_quietly()
    from mlflow import MlflowClient  # noqa: PLC0415

    if uri == "local":
        address, experiment = open_store(root, name)
        return MlflowWriter(MlflowClient(address), experiment, is_local=True)
    client = MlflowClient(uri)
    return MlflowWriter(client, experiment_id(client, name), is_local=False)


def _known(run: "MlflowRun") -> Run:
    data, info = run.data, run.info
    return Run(
        info.run_id, info.status, dict(data.tags), info.artifact_uri, frozenset(data.params), frozenset(data.metrics)
    )


def missing(run: Run, points: Iterable[Point]) -> list[Point]:
    """Those points that a run does not have. Whatever is sent of a metric is sent in the order of its steps, so that
    the newest step tells which.
    """
    reached = dict(run.steps or {})
    found = []
    for point in points:
        if point.step > reached.get(point.key, -1):
            reached[point.key] = point.step
            found.append(point)
    return found


def _batches(items: Sequence[T], size: int) -> Iterator[Sequence[T]]:
    return (items[start : start + size] for start in range(0, len(items), size))


def link(source: Path, target: Path) -> None:
    """Make `target` the same file as `source`, or a copy where links cannot be; whole at every moment."""
    target.parent.mkdir(parents=True, exist_ok=True)
    if target.exists() and target.samefile(source):
        return
    part = target.with_name(f".{target.name}.{os.getpid()}.part")
    part.unlink(missing_ok=True)
    try:
        try:
            os.link(source, part)
        except FileNotFoundError:
            raise
        except OSError:  # another file system, or one without links
            shutil.copyfile(source, part)
        part.replace(target)
    finally:
        part.unlink(missing_ok=True)
