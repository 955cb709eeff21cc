"""A Ray of our own on this machine, as quiet as it can be, and gone when it is no longer needed."""

import gc
import logging
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager

import ray
from ray._private import ray_logging

from dxmi.errors import UserError

_OBJECT_STORE_BYTES = 100_000_000
_ENVIRONMENT = {
    "RAY_USAGE_STATS_ENABLED": "0",
    "RAY_CHDIR_TO_TRIAL_DIR": "0",
    "RAY_ACCEL_ENV_VAR_OVERRIDE_ON_ZERO": "0",
    "RAY_TRAIN_HEALTH_CHECK_INTERVAL_S": "0.2",
    "RAY_TRAIN_METRICS_ENABLED": "0",
    "RAY_TRAIN_WORKER_GROUP_START_TIMEOUT_S": "120",
}


def set_environment() -> None:
    """What Ray, Tune and Train need of the process that starts them, and so of all others, to be quick and quiet."""
    os.environ.update({key: value for key, value in _ENVIRONMENT.items() if key not in os.environ})


@contextmanager
def local_ray(cpus: int, gpus: int) -> Iterator[None]:
    """A Ray with these devices while it lasts.

    Raises:
        UserError: there is one in this process already.
    """
    if ray.is_initialized():
        raise UserError("Ray runs in this process already: end it with ray.shutdown() first.")
    set_environment()
    for name in ("ray", "ray.tune", "ray.train"):  # what matters of it, the caller says
        logging.getLogger(name).setLevel(logging.CRITICAL)
    ray_logging.stdout_deduplicator.skip_re = re.compile("worker died or was killed|lost objects")
    ray.init(
        address="local",
        num_cpus=cpus,
        num_gpus=gpus,
        include_dashboard=False,
        log_to_driver=False,
        logging_level=logging.ERROR,
        object_store_memory=_OBJECT_STORE_BYTES,
    )
    try:
        yield
    finally:
        _shut_down()


def _shut_down() -> None:
    """End Ray while no thread collects garbage: a handle that one frees meanwhile makes Ray end the whole process."""
    gc.collect()
    gc.disable()
    try:
        ray.shutdown()
    finally:
        gc.enable()
