"""Parts of Ray, Optuna and MLflow that are not public and may go with any version, all of them in one place.

Nothing here is imported before it is used. Where a part is missing, a sentence names the versions that have it; where
only the looks of the output depend on it, the work continues without it.
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
    """Turn the absence of a private part into a sentence.

    Raises:
        UserError: the block found that a module or an attribute does not exist.
    """
    try:
        yield
    except (ImportError, AttributeError) as error:
        raise UserError(
            f"{package} {metadata.version(package)} has no {what} as dxmi uses it ({error}): install a version that "
            f"has, {package} {_TESTED[package]}."
        ) from error


def quiet_worker_deaths(pattern: str) -> None:
    """Keep Ray from printing messages of its workers that match `pattern`, where this version can."""
    with suppress(ImportError, AttributeError):
        from ray._private import ray_logging  # noqa: PLC0415

        ray_logging.stdout_deduplicator.skip_re = re.compile(pattern)


@contextmanager
def lean_ray(*, state_api: bool) -> Iterator[None]:
    """While it lasts, a Ray that is started here leaves out what no trial needs, where this version can.

    These are the autoscaler, the reader of workers' logs, which `log_to_driver=False` only silences, and the dashboard,
    of which `include_dashboard=False` leaves a process without a page: three Python processes for every command.

    Args:
        state_api: keep the last one, which answers questions about actors: Ray Train asks it whether the controller of
            a group is alive, and without an answer waits and leaves a dead group's devices taken.
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
    """What takes the place of a process's start."""


def impatient_job_client(address: str, seconds: tuple[float, float]) -> Any:
    """Ray's client of jobs, whose requests otherwise wait for ever.

    Args:
        address: of the cluster's dashboard.
        seconds: to connect, and between two bytes of an answer.

    Raises:
        UserError: this version of Ray sends requests in another way.
    """
    from ray.job_submission import JobSubmissionClient  # noqa: PLC0415

    with _part("ray", "requests of the job client"):
        send = JobSubmissionClient._do_request

    class Client(JobSubmissionClient):
        def _do_request(self, *args: Any, **kwargs: Any) -> Any:
            return send(self, *args, **{"timeout": seconds, **kwargs})

    return Client(address)


def use_ray_token() -> None:
    """Let this process send Ray's token, if there is one, with each request.

    Raises:
        UserError: this version of Ray has no such thing.
    """
    with _part("ray", "token authentication"):
        from ray._private.authentication.authentication_token_setup import (  # noqa: PLC0415
            maybe_enable_token_auth_if_token_available,
        )
    maybe_enable_token_auth_if_token_available(warn_if_disabled=False)


def set_intermediate_value(study: "Study", trial: "FrozenTrial", step: int, value: float) -> None:
    """Record a value of a trial that another process runs, for which Optuna has no public call.

    Raises:
        UserError: this version of Optuna cannot.
    """
    with _part("optuna", "storage of a study"):
        set_value, number = study._storage.set_trial_intermediate_value, trial._trial_id
    set_value(number, step, value)


def set_user_attribute(study: "Study", trial: "FrozenTrial", key: str, value: object) -> None:
    """As `set_intermediate_value`, for what is noted of a trial.

    Raises:
        UserError: this version of Optuna cannot.
    """
    with _part("optuna", "storage of a study"):
        set_attribute, number = study._storage.set_trial_user_attr, trial._trial_id
    set_attribute(number, key, value)


def mlflow_tables(database: str, artifacts: str) -> None:
    """Make MLflow's tables in an empty database.

    Args:
        database: its address.
        artifacts: the address of the folder of artifacts.

    Raises:
        UserError: this version of MLflow has no such store.
    """
    with _part("mlflow", "SQLAlchemy store"):
        from mlflow.store.tracking.sqlalchemy_store import SqlAlchemyStore  # noqa: PLC0415
    store: Any = SqlAlchemyStore(database, artifacts)  # type: ignore[no-untyped-call]
    with _part("mlflow", "engine of its SQLAlchemy store"):
        store.engine.dispose()
