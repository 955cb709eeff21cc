"""MLflow: a local store that survives crashes of its writers, and a writer of runs whose calls can be repeated.

    studies/
        mlflow.db       all runs; derived from the study folders, which are the source of truth
        mlartifacts/    files of the runs, hard links into the study folders
        .mlflow.lock    held while the store is created or relocated

MLflow is imported inside functions, since the import takes seconds; the caller chooses the thread.
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
    "MLFLOW_HTTP_REQUEST_MAX_RETRIES": "0",  # a retry could write twice: `MlflowWriter` checks first
    "MLFLOW_HTTP_REQUEST_TIMEOUT": "20",
    "MLFLOW_DISABLE_TELEMETRY": "true",
    "MLFLOW_ENABLE_ARTIFACTS_PROGRESS_BAR": "false",
    "MLFLOW_SUPPRESS_PRINTING_URL_TO_STDOUT": "true",
}
_LOGGERS = ("mlflow", "alembic", "urllib3.connectionpool")
_LOCK_SECONDS = 120.0
_BUSY_SECONDS = 60.0
"""Seconds to wait for an SQLite lock that another process holds while the store is opened."""
KIND_TAG, TRAINING_KIND = "mlflow.experimentKind", "custom_model_development"
"""Tag that makes MLflow's UI show an experiment as model training instead of as a generative AI app. In 3.17, a choice
stored in the browser overrides the tag, and a choice in the URL (see `tune.reporting.pages`) overrides both."""
_GUESSED_KINDS = ("", "no_inferred_type")
"""Kinds that no user has chosen; kinds that end in _inferred are not user choices either."""
_METRICS_A_CALL = 1_000
_PARAMS_A_CALL = 100
_RUNS_A_PAGE = 500
_MAX_TEXT = 5_000
"""Characters of a parameter or a tag; MLflow rejects more than 6,000."""


def import_quietly() -> None:
    """Import MLflow with its messages and progress bars turned off."""
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
    """Create the local store and an experiment in it, unless they exist.

    Several processes may call this at the same time, and one that is killed does not leave a broken store behind. If
    the folder has been moved, the paths in the store are updated.

    Args:
        root: Folder of the studies.
        experiment: Name of the MLflow experiment.

    Returns:
        Tracking URI of the store and id of the experiment.

    Raises:
        UserError: the folder is not writable, the file in it is not an MLflow store, or another program keeps it
            locked.
    """
    root = root.resolve()
    if "?" in str(root):
        raise UserError(f"{root} has a question mark in its name, which SQLite's URIs do not allow: rename it.")
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
    """The id of an experiment, which is created if it does not exist.

    Args:
        client: Client of the store.
        name: Name of the experiment.
        location: Artifact location of a new experiment; None leaves the choice to the server.

    Raises:
        UserError: the experiment was deleted.
    """
    found = client.get_experiment_by_name(name)
    if found is None:
        experiment = str(client.create_experiment(name, artifact_location=location))
        _show_as_training(client, experiment, {})
        return experiment
    if found.lifecycle_stage == "deleted":
        raise UserError(
            f"MLflow's experiment {name} was deleted: restore it with "
            f"`mlflow experiments restore -x {found.experiment_id}`, or choose another with tracking.experiment=NAME."
        )
    _show_as_training(client, str(found.experiment_id), found.tags)
    return str(found.experiment_id)


def _show_as_training(client: "MlflowClient", experiment: str, tags: Mapping[str, str]) -> None:
    """Tag the experiment as model training, unless a user chose another kind; a server may reject the tag."""
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
        raise UserError(
            f"Another process has locked MLflow's store in {root} for minutes: end that process."
        ) from error


def _exists(root: Path) -> bool:
    """Whether there is a store; an empty file, as a killed sqlite3 leaves behind, does not count.

    Raises:
        UserError: the file is locked, damaged, or not an MLflow store.
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
            f"{database} is damaged or not an MLflow store ({error}). Move it away: studies are "
            "recorded again when they are resumed."
        ) from error
    return True


def _build(root: Path) -> None:
    """Create the store in a temporary folder and rename it, since creating MLflow's tables takes dozens of steps."""
    for stale in root.glob(".mlflow.*.part"):
        shutil.rmtree(stale, ignore_errors=True)
    part = Path(mkdtemp(prefix=".mlflow.", suffix=".part", dir=root))
    try:
        database = part / "mlflow.db"
        mlflow_tables(f"sqlite:///{database}", _artifacts(root).as_uri())
        with closing(sqlite3.connect(database)) as connection:
            connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
            connection.execute("PRAGMA journal_mode=DELETE")  # so that the database is a single file
        with database.open("rb") as file:
            os.fsync(file.fileno())
        database.replace(_database(root))
        sync_folder(root)
    finally:
        shutil.rmtree(part, ignore_errors=True)


_RELOCATED = (("experiments", "artifact_location"), ("runs", "artifact_uri"))


def _relocate(root: Path) -> None:
    """Update the artifact paths in the store if its folder was moved or copied.

    The old location is that of experiment 0, which `_build` created; paths outside of it are left unchanged.
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
        key: Key of the metric.
        value: Finite value.
        step: Step of the run.
        time: Time of the measurement, in milliseconds since the epoch.
    """

    key: str
    value: float
    step: int
    time: int


@dataclass
class TrackedRun:
    """Local copy of what MLflow holds of a run. It is unreliable after an error: find the run again.

    Attributes:
        id: Id of the MLflow run.
        status: Status of the MLflow run.
        tags: All tags.
        artifact_uri: Location of the artifacts.
        params: Keys of the parameters that it has.
        keys: Keys of the metrics that it had when it was found.
        steps: Newest step of each metric; None until it has been queried.
        files: Artifacts that it has; None until they have been queried.
        is_described: Whether it has all parameters.
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
    """Writer of MLflow runs. Each method sends only what the run lacks, so that every call can be repeated.

    Args:
        client: MLflow client.
        experiment: Id of the experiment that holds the runs.
        is_local: Whether the store is the local one, where artifacts are linked instead of copied.

    Attributes:
        experiment: Id of the experiment.
    """

    def __init__(self, client: "MlflowClient", experiment: str, is_local: bool) -> None:
        self._client = client
        self.experiment = experiment
        self._is_local = is_local

    def find(self, tags: Mapping[str, str]) -> list[TrackedRun]:
        """The runs with these tags, oldest first."""
        condition = " and ".join(f"tags.{key} = '{value}'" for key, value in tags.items())
        found: list[TrackedRun] = []
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

    def create(self, tags: Mapping[str, str], began: int) -> TrackedRun:
        """Create a run that started at `began`, in milliseconds since the epoch."""
        short = {key: value[:_MAX_TEXT] for key, value in tags.items()}
        run = _known(self._client.create_run(self.experiment, start_time=began, tags=short))
        run.steps, run.files = {}, set()
        return run

    def describe(self, run: TrackedRun, params: Mapping[str, str]) -> None:
        """Log the parameters of a run, which must not change later."""
        from mlflow.entities import Param  # noqa: PLC0415

        new = [Param(key, value[:_MAX_TEXT]) for key, value in params.items() if key not in run.params]
        for some in _batches(new, _PARAMS_A_CALL):
            self._client.log_batch(run.id, params=some)
        run.is_described = True

    def log(self, run: TrackedRun, points: Iterable[Point]) -> None:
        """Log the points that a run does not have yet. The steps of each metric must be ascending."""
        from mlflow.entities import Metric  # noqa: PLC0415

        if run.steps is None:
            run.steps = {key: self._newest_step(run, key) for key in run.keys}
        for some in _batches(missing(run, points), _METRICS_A_CALL):
            self._client.log_batch(run.id, metrics=[Metric(p.key, p.value, p.time, p.step) for p in some])
            run.steps.update((point.key, point.step) for point in some)

    def _newest_step(self, run: TrackedRun, key: str) -> int:
        return max((point.step for point in self._client.get_metric_history(run.id, key)), default=-1)

    def mark(self, run: TrackedRun, tags: Mapping[str, str]) -> bool:
        """Set the tags that differ, and return whether there were any."""
        from mlflow.entities import RunTag  # noqa: PLC0415

        changed = {key: value[:_MAX_TEXT] for key, value in tags.items() if run.tags.get(key) != value[:_MAX_TEXT]}
        if changed:
            self._client.log_batch(run.id, tags=[RunTag(key, value) for key, value in changed.items()])
            run.tags |= changed
        return bool(changed)

    def begin(self, run: TrackedRun, tags: Mapping[str, str]) -> None:
        """Set the tags and mark a run as running."""
        self.mark(run, tags)
        if run.status != "RUNNING":
            self._client.update_run(run.id, status="RUNNING")
            run.status = "RUNNING"

    def end(self, run: TrackedRun, status: str, tags: Mapping[str, str], ended: int) -> None:
        """Set the tags and mark a run as ended at `ended`, in milliseconds since the epoch."""
        if self.mark(run, tags) or run.status != status:
            self._client.set_terminated(run.id, status, ended)
            run.status = status

    def upload(self, run: TrackedRun, files: Iterable[tuple[Path, str]], *, again: bool = False) -> None:
        """Add files to a run; files that no longer exist are skipped.

        Args:
            run: The run.
            files: Pairs of a file and its folder among the artifacts.
            again: Whether to upload files again that the run has already, since they may have changed.
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

    def _listed(self, run: TrackedRun) -> set[str]:
        return {file.path for folder in (None, "samples") for file in self._client.list_artifacts(run.id, folder)}


def open_writer(root: Path, uri: str, name: str) -> MlflowWriter:
    """Open a writer for the runs of an experiment.

    Args:
        root: Folder of the studies.
        uri: `local`, or the URL of a server (http(s)://...).
        name: Name of the MLflow experiment, which is created if it does not exist.

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


def _known(run: "MlflowRun") -> TrackedRun:
    data, info = run.data, run.info
    return TrackedRun(
        info.run_id, info.status, dict(data.tags), info.artifact_uri, frozenset(data.params), frozenset(data.metrics)
    )


def missing(run: TrackedRun, points: Iterable[Point]) -> list[Point]:
    """The points that a run does not have yet.

    The points of a metric are sent in the order of their steps, so a point is missing if it is after the newest step.
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
    """Atomically make `target` a hard link to `source`, or a copy where links are not supported."""
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
