"""Private parts of Ray, Optuna and MLflow, and what a system may lack: a sentence or a substitute."""

import ast
import os
import sys
from pathlib import Path

import optuna
import pytest
import ray
from ray._private import ray_logging
from ray._private.node import Node
from ray.dashboard.modules.dashboard_sdk import SubmissionClient

from dxmi.errors import UserError
from dxmi.machine import available_cpus
from support import stating
from tune import compat
from tune.execution.ray_runtime import ray_session
from tune.execution.ray_tune import StoppedAtOnceError

PACKAGES = Path(__file__).parent.parent
TOKEN = "ray._private.authentication.authentication_token_setup"


def test_a_ray_without_its_token_setup_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, TOKEN, None)
    with pytest.raises(UserError, match=stating("ray … token … ray 2.54 … 2.60")):
        compat.use_ray_token()


def test_an_optuna_without_a_studys_storage_is_a_sentence():
    study = optuna.create_study()
    trial = study.ask()
    compat.set_user_attribute(study, study.trials[0], "note", 3)
    compat.set_intermediate_value(study, study.trials[0], 5, 0.25)
    study.tell(trial, 1.0)
    assert study.trials[0].user_attrs == {"note": 3}
    assert study.trials[0].intermediate_values == {5: 0.25}
    del study._storage
    with pytest.raises(UserError, match=stating("optuna … storage … optuna 5.0")):
        compat.set_user_attribute(study, trial, "note", 3)  # type: ignore[arg-type]
    with pytest.raises(UserError, match=stating("optuna … storage … optuna 5.0")):
        compat.set_intermediate_value(study, trial, 5, 0.25)  # type: ignore[arg-type]


def test_a_value_that_optuna_refuses_is_no_question_of_versions():
    study = optuna.create_study()
    study.ask()
    with pytest.raises(TypeError):
        compat.set_user_attribute(study, study.trials[0], "note")  # type: ignore[call-arg]


def test_an_mlflow_without_its_store_is_a_sentence(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlflow.store.tracking.sqlalchemy_store", None)
    with pytest.raises(UserError, match=stating("mlflow … SQLAlchemy … mlflow 3.11 … 3.17")):
        compat.mlflow_tables("sqlite://", "file:///nowhere")


def test_a_lean_ray_starts_no_processes_that_trials_do_not_need():
    """`tune.execution.ray_runtime` starts Ray like this; the names must still exist and come back."""
    before = {name: getattr(Node, name) for name in ("start_monitor", "start_api_server", "start_log_monitor")}
    with compat.lean_ray(state_api=False):
        assert all(getattr(Node, name)() is None for name in before)
        assert all(getattr(Node, name) is not method for name, method in before.items())
    with compat.lean_ray(state_api=True):
        assert Node.start_api_server is before["start_api_server"]
        assert Node.start_monitor is not before["start_monitor"]
    assert all(getattr(Node, name) is method for name, method in before.items())


def test_a_ray_of_another_make_starts_as_it_does(monkeypatch):
    monkeypatch.delattr(Node, "start_monitor")
    with compat.lean_ray(state_api=False):
        assert not hasattr(Node, "start_monitor")
    assert not hasattr(Node, "start_monitor")
    monkeypatch.setitem(sys.modules, "ray._private.node", None)
    with compat.lean_ray(state_api=False):
        pass


def test_a_ray_that_gives_up_waiting_for_itself_is_started_again(monkeypatch):
    starts = []

    def init(**_):
        starts.append(1)
        if len(starts) < answers:
            raise RuntimeError("The current node timed out during startup. This could happen because ...")

    monkeypatch.setattr(ray, "init", init)
    answers = 3
    with ray_session(1, 0):
        assert len(starts) == 3
    starts.clear()
    answers = 4
    with pytest.raises(UserError, match=stating("Ray … in time")), ray_session(1, 0):
        pass
    assert len(starts) == 3


def test_a_stop_is_heard_between_two_starts_of_a_ray(monkeypatch):
    starts = []

    def init(**_):
        starts.append(1)
        raise RuntimeError("The current node timed out during startup. This could happen because ...")

    def stop_after_the_first():
        if starts:
            raise StoppedAtOnceError

    monkeypatch.setattr(ray, "init", init)
    with pytest.raises(StoppedAtOnceError), ray_session(1, 0, before_try=stop_after_the_first):
        pass
    assert len(starts) == 1


def test_a_ray_without_its_filter_of_messages_only_prints_more(monkeypatch):
    monkeypatch.setattr(ray_logging.stdout_deduplicator, "skip_re", None)
    compat.quiet_worker_deaths("lost objects")
    assert ray_logging.stdout_deduplicator.skip_re.search("some lost objects")
    monkeypatch.delattr(ray_logging, "stdout_deduplicator")
    compat.quiet_worker_deaths("lost objects")


def test_a_ray_whose_job_client_sends_requests_in_another_way_is_named(monkeypatch):
    monkeypatch.delattr(SubmissionClient, "_do_request")
    with pytest.raises(UserError, match=stating("ray … job client … install")):
        compat.impatient_job_client("http://127.0.0.1:9", (1.0, 1.0))


def _private_parts(path: Path) -> set[str]:
    """Names with an underscore that a module takes from elsewhere, or asks of something that is not its own."""
    found = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.ImportFrom) and node.module and node.module != "__future__":
            parts = [*node.module.split("."), *(alias.name for alias in node.names)]
        elif isinstance(node, ast.Import):
            parts = [part for alias in node.names for part in alias.name.split(".")]
        elif isinstance(node, ast.Attribute) and node.attr in ("_storage", "_trial_id", "_do_request"):
            if isinstance(node.value, ast.Name) and node.value.id == "self":
                continue
            parts = [node.attr]
        else:
            continue
        found |= {part for part in parts if part.startswith("_") and not part.startswith("__")}
    return found


@pytest.mark.parametrize("package", ["dxmi", "tune"])
def test_nothing_private_of_another_package_is_used_elsewhere(package):
    files = [path for path in (PACKAGES / package).rglob("*.py") if path.name != "compat.py"]
    assert len(files) > 30
    assert {path.name: parts for path in files if (parts := _private_parts(path))} == {}
    assert _private_parts(PACKAGES / "tune" / "compat.py") == {"_private", "_storage", "_trial_id", "_do_request"}


@pytest.mark.parametrize("package", ["dxmi", "tune"])
def test_no_module_asks_the_system_for_its_affinity_by_itself(package):
    """os.sched_getaffinity is missing on macOS."""
    users = {path.name for path in (PACKAGES / package).rglob("*.py") if "sched_getaffinity" in path.read_text()}
    assert users <= {"machine.py"}


def test_cpus_are_those_of_the_affinity_mask_or_all_where_there_is_none(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: {0, 3, 5}, raising=False)
    assert available_cpus() == 3
    monkeypatch.delattr(os, "sched_getaffinity")
    monkeypatch.setattr(os, "cpu_count", lambda: 7)
    assert available_cpus() == 7
    monkeypatch.setattr(os, "cpu_count", lambda: None)
    assert available_cpus() == 1
