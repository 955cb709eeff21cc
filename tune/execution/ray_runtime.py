"""The Ray instance that a command uses: a local one, or the cluster at RAY_ADDRESS (which is set in a Ray job)."""

import gc
import logging
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import ray
from ray.util.scheduling_strategies import NodeAffinitySchedulingStrategy

from dxmi.errors import UserError
from tune.compat import lean_ray, quiet_worker_deaths
from tune.machine import made, on_cluster, ray_folder, spare_loopback

_OBJECT_STORE_BYTES = 100_000_000
_TRIES = 3
"""Attempts to start Ray. It waits 30 s for its processes, whose files are in the page cache at the next attempt."""
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # never succeeds if a worker hangs
}
"""Settings with which Ray, Tune and Train start quickly and print little, in every process."""


def cluster_nodes() -> list[tuple[int, int]]:
    """Return (CPUs, GPUs) of each node that is alive.

    Raises:
        UserError: the cluster at RAY_ADDRESS does not respond.
    """
    _connect()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return [(int(resources.get("CPU", 0)), int(resources.get("GPU", 0))) for resources in alive]


def actor_here(kind: type) -> Any:
    """Create an actor of this class on the current node, without a CPU, so that it shares the fate of its creator."""
    node = ray.get_runtime_context().get_node_id()
    options: dict[str, Any] = {
        "num_cpus": 0,
        "scheduling_strategy": NodeAffinitySchedulingStrategy(node, soft=False),
    }
    return ray.remote(**options)(kind).remote()


def _connect() -> None:
    if ray.is_initialized():
        return
    _quiet()
    try:
        ray.init(
            address=os.environ["RAY_ADDRESS"],
            log_to_driver=False,
            logging_level=logging.ERROR,
            runtime_env={"env_vars": {key: os.environ[key] for key in _ENVIRONMENT}},
        )
    except (ConnectionError, RuntimeError, ValueError, AssertionError) as error:
        reason = str(error).strip().partition("\n")[0]
        raise UserError(
            f"The Ray cluster at RAY_ADDRESS={os.environ['RAY_ADDRESS']} cannot be used ({reason}): start it, or unset "
            "RAY_ADDRESS to use only this machine."
        ) from error


def _quiet() -> None:
    spare_loopback()
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    for name in ("ray", "ray.tune", "ray.train"):  # the caller reports what matters
        logging.getLogger(name).setLevel(logging.CRITICAL)
    quiet_worker_deaths("worker died or was killed|lost objects")


def _require_token() -> None:
    """Refuse to start Ray without token authentication: its ports listen on all interfaces regardless of options."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise UserError(
            f"RAY_AUTH_MODE is {mode}: Ray would listen on all addresses of this machine, and anyone who can reach "
            "them could run code here. Unset it, or set it to token."
        )


def _start(cpus: int, gpus: int, groups: bool, before_try: Callable[[], None]) -> None:
    """Start a local Ray instance, and retry if its processes do not start in time on a busy machine."""
    for _ in range(_TRIES):
        before_try()
        try:
            with lean_ray(state_api=groups):
                ray.init(
                    address="local",
                    num_cpus=cpus,
                    num_gpus=gpus,
                    include_dashboard=False,
                    log_to_driver=False,
                    logging_level=logging.ERROR,
                    object_store_memory=_OBJECT_STORE_BYTES,
                    _temp_dir=str(made(ray_folder())),
                )
        except Exception as error:  # Ray raises a plain Exception
            if "timed out during startup" not in str(error):
                raise
            _shut_down()
        else:
            return
    raise UserError(
        "Ray did not start in time, probably because this machine is busy. Nothing is lost: try again when it is less "
        "loaded."
    )


@contextmanager
def ray_session(
    cpus: int, gpus: int, *, groups: bool = False, before_try: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """Connect to the cluster, or start a local Ray instance with these devices, for the duration of the context.

    Args:
        cpus: CPUs of a local instance.
        gpus: GPUs of a local instance.
        groups: whether Ray Train will run on it.
        before_try: called before each attempt to start Ray, which may take half a minute; may raise to give up.

    Raises:
        UserError: Ray is already running in this process, has no token authentication, or the cluster does not respond.
    """
    if on_cluster():
        _connect()
    else:
        if ray.is_initialized():
            raise UserError("Ray is already running in this process: call ray.shutdown() first.")
        _require_token()
        _quiet()
        _start(cpus, gpus, groups, before_try)
    try:
        yield
    finally:
        _shut_down()


def _shut_down() -> None:
    """Shut Ray down with garbage collection disabled: freeing a handle during shutdown makes Ray exit the process."""
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()
