"""The doctor finds what is wrong with a machine, says what to do about it, and changes nothing."""

import os
import shutil
import socket
import sqlite3
from collections import namedtuple
from contextlib import closing
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import pytest
import torch

from dxmi.errors import UserError
from support import missing, stating
from tune.cli import doctor, ui
from tune.cli.doctor import Check, Status, run_checks


def checks(studies) -> dict[str, Check]:
    found = run_checks(studies)
    assert len({check.subject for check in found}) == len(found)
    return {check.subject: check for check in found}


@pytest.fixture(autouse=True)
def _in_an_empty_folder(tmp_path_factory, monkeypatch):
    """What would be uploaded is what is in the working folder."""
    monkeypatch.chdir(tmp_path_factory.mktemp("project"))


@pytest.fixture
def database(tmp_path):
    """A tracking store with three runs, as far as the doctor looks."""
    with closing(sqlite3.connect(tmp_path / "mlflow.db")) as connection, connection:
        connection.execute("CREATE TABLE runs (run_uuid TEXT)")
        connection.executemany("INSERT INTO runs VALUES (?)", [("a",), ("b",), ("c",)])
    return tmp_path / "mlflow.db"


@pytest.fixture
def taken():
    """A port that somebody listens on."""
    with socket.socket() as listener:
        listener.bind((ui.HOST, 0))
        listener.listen()
        yield listener.getsockname()[1]


def free() -> int:
    """A port that nobody has, at this moment."""
    with socket.socket() as probe:
        probe.bind((ui.HOST, 0))
        return probe.getsockname()[1]


def test_it_looks_at_everything_starts_nothing_and_writes_nothing(tmp_path):
    found = checks(tmp_path / "studies")
    expected = {"versions", "devices", "memory", "disk for studies", "disk for Ray", "cache", "data", "tracking store"}
    assert {*expected, "MLflow UI", "upload"} <= set(found)
    assert list(tmp_path.iterdir()) == []
    assert all(check.text for check in found.values())
    assert all(check.advice for check in found.values() if check.status is not Status.GOOD)


# ----------------------------------------------------------------------------
# Packages and devices


def test_versions_are_those_that_are_installed():
    text = checks(Path("studies"))["versions"].text
    for package in ("torch", "ray", "optuna", "mlflow"):
        assert f"{package} {version(package)}" in text


@pytest.mark.parametrize(
    ("package", "installed", "is_good"),
    [
        ("ray", "2.53.9", False),
        ("ray", "2.54.0", True),
        ("ray", "3.0.0", True),
        ("mlflow", "3.9.1", False),
        ("mlflow", "3.11", True),
        ("torch", "2.9.1+cu128", False),
        ("torch", "2.10.0+cpu", True),
        ("hydra-core", "1.3.5", False),
        ("hydra-core", "1.3.6", True),
        ("hydra-core", "1.4.0.dev1", True),
        ("optuna", None, False),
    ],
)
def test_a_package_that_is_missing_or_too_old_is_bad(monkeypatch, tmp_path, package, installed, is_good):
    def faked(name: str) -> str:
        if name != package:
            return "99.0"
        if installed is None:
            raise PackageNotFoundError(name)
        return installed

    monkeypatch.setattr(doctor, "version", faked)
    check = checks(tmp_path)["versions"]
    assert check.status is (Status.GOOD if is_good else Status.BAD)
    assert (package in check.advice) is not is_good
    assert ("make setup" in check.advice) is not is_good


def test_devices_are_said_with_how_trials_share_them(monkeypatch, tmp_path):
    monkeypatch.setattr(os, "sched_getaffinity", lambda _: set(range(6)))
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    text = checks(tmp_path)["devices"].text
    assert missing("no GPU … 6 at once … 1 of 6 CPU threads", text) == []
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 2)
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: f"GPU {index}")
    text = checks(tmp_path)["devices"].text
    assert missing("GPU 0 … GPU 1 … 2 at once … 3 of 6 CPU threads … 1 of 2 GPUs", text) == []


@pytest.mark.parametrize(("gigabytes", "status"), [(3.9, Status.WARNING), (4.1, Status.GOOD)])
def test_little_memory_is_noticed(monkeypatch, tmp_path, gigabytes, status):
    monkeypatch.setattr(doctor, "_meminfo", lambda: {"MemAvailable": gigabytes * 1e9, "MemTotal": 64e9})
    check = checks(tmp_path)["memory"]
    assert check.status is status
    assert missing(f"{gigabytes} … 64.0 GB", check.text) == []
    assert bool(check.advice) is (status is Status.WARNING)


Usage = namedtuple("Usage", ["total", "used", "free"])


def test_little_disk_is_noticed_and_little_shared_memory_is_bad(monkeypatch, tmp_path):
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(1e12, 1e12, 0.1e9))
    found = checks(tmp_path)
    assert found["disk for studies"].status is Status.WARNING
    assert missing(f"0.1 GB … {tmp_path}", found["disk for studies"].text) == []
    assert found["disk for Ray"].status is Status.WARNING
    assert found["shared memory"].status is Status.BAD
    assert "--shm-size" in found["shared memory"].advice


def test_a_folder_that_cannot_be_written_is_bad(monkeypatch, tmp_path):
    writable = os.access
    monkeypatch.setattr(os, "access", lambda path, mode: writable(path, mode) and path != tmp_path)
    check = checks(tmp_path / "not" / "there" / "yet")["disk for studies"]
    assert check.status is Status.BAD
    assert missing(f"{tmp_path} … written", check.text) == []
    assert "--studies" in check.advice


# ----------------------------------------------------------------------------
# The tracking store and the studies


def test_a_store_that_is_not_there_yet_is_good(tmp_path):
    check = checks(tmp_path)["tracking store"]
    assert check.status is Status.GOOD
    assert "none yet" in check.text
    assert not (tmp_path / "mlflow.db").exists()


def test_a_whole_store_is_good_and_its_runs_are_counted(tmp_path, database):
    before = database.read_bytes()
    check = checks(tmp_path)["tracking store"]
    assert check.status is Status.GOOD
    assert missing(f"{database} … 3 runs … dxmi ui", check.text) == []
    assert database.read_bytes() == before
    assert list(tmp_path.iterdir()) == [database]


@pytest.mark.parametrize(
    "content", [b"this is no database, however long it is" * 100, b"SQLite format 3\x00" + 5000 * b"x"]
)
def test_a_broken_store_is_bad_with_what_to_do(tmp_path, content):
    (tmp_path / "mlflow.db").write_bytes(content)
    check = checks(tmp_path)["tracking store"]
    assert check.status is Status.BAD
    assert str(tmp_path / "mlflow.db") in check.text
    assert missing("move … away", check.advice) == []


def test_a_store_of_something_else_or_cut_short_is_bad(tmp_path, database):
    database.write_bytes(database.read_bytes()[:4500])
    assert checks(tmp_path)["tracking store"].status is Status.BAD
    database.unlink()
    with closing(sqlite3.connect(database)) as connection, connection:
        connection.execute("CREATE TABLE other (x TEXT)")
    assert "no such table" in checks(tmp_path)["tracking store"].text


@pytest.mark.parametrize("name", ["run #3", "50%25", "a?b", "ünï", "a b"])
def test_a_store_in_a_folder_with_an_odd_name_is_found(tmp_path, database, name):
    folder = tmp_path / name
    folder.mkdir()
    database.rename(folder / "mlflow.db")
    check = checks(folder)["tracking store"]
    assert check.status is Status.GOOD
    assert missing(f"{folder / 'mlflow.db'} … 3 runs", check.text) == []


def test_studies_are_counted(tmp_path):
    assert "studies" not in checks(tmp_path)
    for name in ("a", "b"):
        (tmp_path / name).mkdir()
        (tmp_path / name / "study.yaml").write_text("")
    (tmp_path / "c").mkdir()
    assert checks(tmp_path)["studies"].text.startswith(f"2 in {tmp_path};")


def test_the_cache_and_the_data_are_where_the_variables_say(tmp_path, monkeypatch):
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))
    monkeypatch.setenv("DXMI_DATA", str(tmp_path / "data"))
    found = checks(tmp_path)
    assert missing(f"0 results … 0.00 GB … {tmp_path / 'cache'} … DXMI_CACHE", found["cache"].text) == []
    assert missing(f"no files … {tmp_path / 'data'}", found["data"].text) == []
    (tmp_path / "cache" / "references").mkdir(parents=True)
    for name in ("x.cached", "y.cached", "z.lock"):
        (tmp_path / "cache" / "references" / name).write_bytes(b"x")
    with (tmp_path / "cache" / "large").open("wb") as file:
        file.truncate(2_500_000_000)  # sparse
    (tmp_path / "data" / "mnist").mkdir(parents=True)
    found = checks(tmp_path)
    assert missing("2 results … 2.50 GB", found["cache"].text) == []
    assert missing(f"mnist … {tmp_path / 'data'}", found["data"].text) == []


# ----------------------------------------------------------------------------
# The upload


def sparse(path, size: int) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    with path.open("wb") as file:
        file.truncate(size)


def test_a_small_folder_can_be_uploaded(tmp_path):
    here = Path.cwd()
    sparse(here / "a", 99_000_000)
    check = checks(tmp_path)["upload"]
    assert check.status is Status.GOOD
    assert missing(f"99.0 MB … {here}", check.text) == []


def test_an_upload_that_is_too_big_names_its_biggest_folders(tmp_path):
    here = Path.cwd()
    for name, size in (("small", 1), ("weights/a", 60), ("weights/b", 70), ("pictures/x/y", 50), ("notes", 10)):
        sparse(here / name, size * 1_000_000)
    check = checks(tmp_path)["upload"]
    assert check.status is Status.WARNING
    assert missing(f"191.0 MB … {here}", check.text) == []
    biggest = "weights 130 MB, pictures 50 MB, notes 10 MB, small 1 MB"
    assert missing(f"dxmi submit … 100 MB … .gitignore … {biggest}", check.advice) == []


def test_what_is_not_uploaded_does_not_count(tmp_path):
    here = Path.cwd()
    for name in (".git", ".venv", "runs", "studies", "package/__pycache__"):
        sparse(here / name / "x", 500_000_000)
    sparse(tmp_path / "elsewhere" / "x", 500_000_000)
    (here / "link").symlink_to(tmp_path / "elsewhere")
    assert checks(tmp_path)["upload"].status is Status.GOOD


# ----------------------------------------------------------------------------
# Ports and addresses


def test_a_taken_port_is_noticed(monkeypatch, tmp_path, taken):
    monkeypatch.setattr(doctor, "DEFAULT_PORT", taken)
    check = checks(tmp_path)["MLflow UI"]
    assert check.status is Status.WARNING
    assert missing(f"127.0.0.1:{taken} … taken", check.text) == []
    assert missing("dxmi ui … next free", check.advice) == []


def test_a_free_port_is_good(monkeypatch, tmp_path):
    monkeypatch.setattr(doctor, "DEFAULT_PORT", port := free())
    check = checks(tmp_path)["MLflow UI"]
    assert check == Check("MLflow UI", Status.GOOD, check.text)
    assert missing(f"127.0.0.1:{port} … free", check.text) == []


def test_a_cluster_in_the_environment_is_noticed(monkeypatch, tmp_path):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    assert "Ray" not in checks(tmp_path)
    monkeypatch.setenv("RAY_ADDRESS", "http://10.0.0.1:8265")
    check = checks(tmp_path)["Ray"]
    assert check.status is Status.WARNING
    assert "http://10.0.0.1:8265" in check.text


def test_a_host_name_that_does_not_resolve_is_noticed(monkeypatch, tmp_path):
    def fails(*_):
        raise socket.gaierror

    monkeypatch.setattr(socket, "getaddrinfo", fails)
    check = checks(tmp_path)["host name"]
    assert check.status is Status.WARNING
    assert f"add {socket.gethostname()} to /etc/hosts" in check.advice


def test_a_wanted_port_is_taken_if_it_is_free():
    port = free()
    assert ui.is_free(port)
    assert ui.free_port(port) == port


def test_a_wanted_port_that_is_taken_is_refused(taken):
    assert not ui.is_free(taken)
    with pytest.raises(UserError) as refused:
        ui.free_port(taken)
    assert missing(f"Port {taken} … 127.0.0.1 … --port", str(refused.value)) == []


@pytest.mark.parametrize("port", [0, -1, 65536, 10**6, 10**30])
def test_a_port_that_is_none_is_refused(port):
    with pytest.raises(UserError, match=stating(f"--port is {port} … 1..65535")):
        ui.free_port(port)


def test_without_a_wish_the_first_free_port_is_taken(monkeypatch):
    monkeypatch.setattr(ui, "is_free", lambda port: port >= ui.DEFAULT_PORT + 3)
    assert ui.free_port(None) == ui.DEFAULT_PORT + 3


def test_when_every_port_is_taken_it_says_so(monkeypatch):
    asked = []
    monkeypatch.setattr(ui, "is_free", asked.append)
    with pytest.raises(UserError, match=stating("5000 … 5049 … --port")):
        ui.free_port(None)
    assert asked == [*range(5000, 5050)]
