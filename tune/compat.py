"""All uses of private APIs of Ray, Optuna and MLflow, which may change in any version.

Everything is imported only when it is used. If an API is missing, the error message names the versions that have it;
if only the appearance of the output depends on it, it is skipped.
"""

import re
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from importlib import metadata
from typing import TYPE_CHECKING, Any

from dxmi.errors import UserError

if TYPE_CHECKING:
    from optuna import Study
    from optuna.trial import FrozenTrial

_TESTED = {"ray": "2.54 to 2.60", "optuna": "5.0", "mlflow": "3.11 to 3.17"}
"""Versions in which everything here is known to exist."""


@contextmanager
def _part(package: str, what: str) -> Iterator[None]:
    """Turn a missing private API into an error message.

    Raises:
        UserError: the block raised an ImportError or AttributeError.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{package} {metadata.version(package)} lacks the {what} that dxmi uses ({error}): install a tested "
            f"version, {package} {_TESTED[package]}."
        ) from error


def quiet_worker_deaths(pattern: str) -> None:
    """Suppress messages of Ray's workers that match `pattern`, if this version supports it."""
    with suppress(ImportError, AttributeError):
        from ray._private import ray_logging  # noqa: PLC0415

        ray_logging.stdout_deduplicator.skip_re = re.compile(pattern)


@contextmanager
def lean_ray(*, state_api: bool) -> Iterator[None]:
    """Context in which Ray starts without processes that no trial needs, if this version supports it.

    These are three Python processes per command: the autoscaler; the log monitor, which `log_to_driver=False` only
    silences; and the dashboard, whose process `include_dashboard=False` starts anyway, without a web page.

    Args:
        state_api: Keep the dashboard process, which serves the state API. Ray Train queries it to find out whether the
            controller of a group is alive; without an answer it waits and does not free a dead group's devices.
    """
    try:
        from ray._private.node import Node  # noqa: PLC0415
    except ImportError:
        yield
        return
    names = ["start_monitor", "start_log_monitor", *([] if state_api else ["start_api_server"])]
    methods = {name: getattr(Node, name) for name in names if hasattr(Node, name)}
    try:
        for name in methods:
            setattr(Node, name, _started)
        yield
    finally:
        for name, method in methods.items():
            setattr(Node, name, method)


def _started(*_: Any, **__: Any) -> None:
    """Replacement for the methods that start a process."""


def impatient_job_client(address: str, seconds: tuple[float, float]) -> Any:
    """Ray's job submission client with timeouts; by default its requests wait indefinitely.

    Args:
        address: Address of the cluster's dashboard.
        seconds: Timeouts for connecting and for reading.

    Raises:
        UserError: this version of Ray sends requests differently.
    """
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415

    with _part("ray", "requests of the job client"):
        send = JobSubmissionClient._do_request

    class Client(JobSubmissionClient):
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return send(self, *args, **{"timeout": seconds, **kwargs})

    return Client(address)


def use_ray_token() -> None:
    """Send Ray's authentication token, if there is one, with each request of this process.

    Raises:
        UserError: this version of Ray does not support tokens.
    """
    with _part("ray", "token authentication"):
        from ray._private.authentication.authentication_token_setup import (  # noqa: PLC0415
            maybe_enable_token_auth_if_token_available,
        )
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def set_intermediate_value(study: "Study", trial: "FrozenTrial", step: int, value: float) -> None:
    """Set an intermediate value of a trial that another process runs, for which Optuna has no public API.

    Raises:
        UserError: this version of Optuna does not support it.
    """
    with _part("optuna", "storage of a study"):
        set_value, number = study._storage.set_trial_intermediate_value, trial._trial_id
    set_value(number, step, value)


def set_user_attribute(study: "Study", trial: "FrozenTrial", key: str, value: object) -> None:
    """Set a user attribute of a trial that another process runs, like `set_intermediate_value`.

    Raises:
        UserError: this version of Optuna does not support it.
    """
    with _part("optuna", "storage of a study"):
        set_attribute, number = study._storage.set_trial_user_attr, trial._trial_id
    set_attribute(number, key, value)


def mlflow_tables(database: str, artifacts: str) -> None:
    """Create MLflow's tables in an empty database.

    Args:
        database: URI of the database.
        artifacts: URI of the artifact folder.

    Raises:
        UserError: this version of MLflow does not have this store.
    """
    with _part("mlflow", "SQLAlchemy store"):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # noqa: PLC0415
    store: Any = SqlAlchemyStore(database, artifacts)  # type: ignore[no-untyped-call]
    with _part("mlflow", "engine of its SQLAlchemy store"):
        store.engine.dispose()
