"""The Ray that a command uses: its own on this machine, or the cluster that RAY_ADDRESS names, as in a Ray job."""

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
"""Ray waits 30 s for its processes each time, and finds their files in memory the next time."""
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
    "TORCH_PROCESS_GROUP_SHUTDOWN_TIMEOUT_S": "5",  # in vain if a worker hangs
}
"""What Ray, Tune and Train need of every process to be quick and quiet."""


def cluster_nodes() -> list[tuple[int, int]]:
    """(CPUs, GPUs) of each node that is alive.

    Raises:
        UserError: RAY_ADDRESS does not answer.
    """
    _connect()
    nodes: list[dict[str, Any]] = ray.nodes()  # type: ignore[no-untyped-call]
    alive = [node["Resources"] for node in nodes if node["Alive"]]
    return [(int(resources.get("CPU", 0)), int(resources.get("GPU", 0))) for resources in alive]


def actor_here(kind: type) -> Any:
    """An actor of this class on this very node, without a CPU: it is lost only with whoever made it."""
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
            f"The Ray at RAY_ADDRESS={os.environ['RAY_ADDRESS']} cannot be used ({reason}): start it, or unset "
            "RAY_ADDRESS to run on this machine alone."
        ) from error


def _quiet() -> None:
    spare_loopback()
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})
    for name in ("ray", "ray.tune", "ray.train"):  # what matters of it, the caller says
        logging.getLogger(name).setLevel(logging.CRITICAL)
    quiet_worker_deaths("worker died or was killed|lost objects")


def _require_token() -> None:
    """Refuse to start a Ray without its token, since its ports listen on every interface whatever its options say."""
    mode = os.environ.get("RAY_AUTH_MODE", "token")
    if mode.lower() != "token":
        raise UserError(
            f"RAY_AUTH_MODE is {mode}: Ray would listen on all of this machine's addresses, and whoever reaches them "
            "would run code here. Unset it, or set it to token."
        )


def _start(cpus: int, gpus: int, groups: bool, before_try: Callable[[], None]) -> None:
    """Start a Ray of our own, again if the machine is so busy that Ray gives up waiting for its own processes."""
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
        except Exception as error:  # Ray's own, of no class of its own
            if "timed out during startup" not in str(error):
                raise
            _shut_down()
        else:
            return
    raise UserError(
        "Ray did not start in time: this machine is busy with other work. Nothing is lost; try again when it has a "
        "core to spare."
    )


@contextmanager
def ray_session(
    cpus: int, gpus: int, *, groups: bool = False, before_try: Callable[[], None] = lambda: None
) -> Iterator[None]:
    """The cluster, or a Ray of our own with these devices, while it lasts.

    Args:
        cpus: of our own Ray.
        gpus: of our own Ray.
        groups: whether Ray Train is to run on it.
        before_try: called before each try to start one, which may take half a minute; may raise to give up.

    Raises:
        UserError: there is another Ray in this process, it would have no token, or the cluster does not answer.
    """
    if on_cluster():
        _connect()
    else:
        if ray.is_initialized():
            raise UserError("Ray runs in this process already: end it with ray.shutdown() first.")
        _require_token()
        _quiet()
        _start(cpus, gpus, groups, before_try)
    try:
        yield
    finally:
        _shut_down()


def _shut_down() -> None:
    """End or leave Ray while no thread collects garbage: a handle that one frees then makes Ray end the process."""
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()
