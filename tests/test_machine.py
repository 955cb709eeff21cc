"""Odd surroundings: long temporary folders, users without a home, proxies before a machine's own addresses."""

import os
import shutil
import socket
import subprocess
import sys
import threading
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from urllib.request import proxy_bypass_environment

import pytest
import requests

from dxmi.data.images import data_root
from dxmi.errors import UserError
from dxmi.persistence.cache import cache_root
from tune import machine
from tune.cli import doctor, ui
from tune.cli.doctor import Status
from tune.execution import jobs as submit


@pytest.fixture
def own(tmp_path_factory, monkeypatch):
    """A short folder of this user alone, as the only one there may be."""
    place = Path(f"/tmp/dt-{os.getpid()}")
    monkeypatch.setattr(machine, "_own_places", lambda: [p for p in (place,) if machine.is_own(p)])
    yield place
    for path in sorted(place.rglob("*"), reverse=True):
        path.rmdir()
    if place.is_symlink():
        place.unlink()
    elif place.exists():
        place.rmdir()


# ----------------------------------------------------------------------------
# Ray's folder


@pytest.mark.parametrize("variable", ["TMPDIR", "RAY_TMPDIR"])
@pytest.mark.parametrize(
    "name", ["slurm-job-" + 40 * "1", "größe" * 8, "var/folders/zz/zyxvpxvq6csfxvn_n0000000000000/T"]
)
def test_a_long_temporary_folder_is_left_for_a_short_one_of_ours(variable, name, own, tmp_path, monkeypatch):
    (tmp_path / name).mkdir(parents=True)
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv(variable, str(tmp_path / name))
    folder = machine.made(machine.ray_folder())
    assert folder == own / "ray"
    assert own.stat().st_mode & 0o777 == 0o700
    with socket.socket(socket.AF_UNIX) as listener:  # as long as Ray's get
        path = str(folder) + machine._LONGEST_SOCKET
        Path(path).parent.mkdir(parents=True)
        listener.bind(path)
        Path(path).unlink()


def test_the_limit_is_the_systems_own(monkeypatch):
    longest = "/tmp/" + "x" * (107 - len("/tmp/" + "/ray" + machine._LONGEST_SOCKET))
    monkeypatch.setattr(machine, "_SOCKET_BYTES", 107)
    assert machine.fits(Path(longest) / "ray")
    assert not machine.fits(Path(longest + "x") / "ray")


def test_a_short_temporary_folder_is_used_as_ray_would(monkeypatch):
    monkeypatch.delenv("RAY_TMPDIR", raising=False)
    monkeypatch.setenv("TMPDIR", "/tmp")
    assert machine.ray_folder() == Path("/tmp/ray")


@pytest.mark.parametrize("trap", ["link", "open", "file", "dangling"])
def test_a_folder_that_others_could_have_made_is_not_ours(trap, tmp_path):
    place, elsewhere = tmp_path / "dxmi-0", tmp_path / "elsewhere"
    elsewhere.mkdir(mode=0o700)
    if trap == "link":
        place.symlink_to(elsewhere)
    elif trap == "dangling":
        place.symlink_to(tmp_path / "nowhere")
    elif trap == "file":
        place.touch()
    else:
        place.mkdir()
        place.chmod(0o755)
    assert not machine.is_own(place)


def test_a_folder_of_another_user_is_not_ours(tmp_path, monkeypatch):
    place = tmp_path / "dxmi-0"
    place.mkdir(mode=0o700)
    assert machine.is_own(place)
    monkeypatch.setattr(os, "getuid", lambda: 4_000_000)
    assert not machine.is_own(place)


def test_without_a_short_folder_it_is_said_and_the_doctor_says_it_too(monkeypatch, tmp_path):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    monkeypatch.setattr(machine, "_own_places", list)
    with pytest.raises(UserError, match="RAY_TMPDIR"):
        machine.ray_folder()
    (found,) = [f for f in doctor.run_checks(tmp_path) if f.subject == "disk for Ray"]
    assert found.status is Status.BAD
    assert "RAY_TMPDIR" in found.advice


def test_the_doctor_looks_at_the_folder_that_is_used(monkeypatch, tmp_path, own):
    monkeypatch.setenv("RAY_TMPDIR", str(tmp_path / ("x" * 60)))
    (found,) = [f for f in doctor.run_checks(tmp_path) if f.subject == "disk for Ray"]
    assert str(own / "ray") in found.text
    assert not own.exists()  # it only looked


# ----------------------------------------------------------------------------
# A user without a home


@pytest.fixture
def nobody(monkeypatch):
    """As a user whom the system does not know."""
    for name in ("HOME", "LOGNAME", "USER", "LNAME", "USERNAME", "DXMI_CACHE", "DXMI_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setattr(machine, "_is_known", lambda: False)


def test_a_user_without_a_home_gets_one_and_a_name(nobody, own, monkeypatch):
    monkeypatch.setenv("USER", "")  # given back after the test
    monkeypatch.setenv("HOME", "")
    said = machine.give_home()
    assert os.environ["HOME"] == str(own / "home")
    assert str(own / "home") in said
    assert os.environ["USER"] == str(os.getuid())
    assert machine.give_home() == ""


def test_a_home_that_is_set_is_left_alone(nobody, monkeypatch):
    monkeypatch.setenv("HOME", "/somewhere")
    monkeypatch.setenv("USER", "me")
    assert machine.give_home() == ""
    assert os.environ["HOME"] == "/somewhere"


@pytest.mark.parametrize(("root", "variable"), [(cache_root, "DXMI_CACHE"), (data_root, "DXMI_DATA")])
def test_a_folder_in_no_home_blames_no_variable_that_was_not_set(root, variable, nobody, monkeypatch):
    def no_home(self):
        raise RuntimeError("Could not determine home directory.")

    monkeypatch.setattr(Path, "expanduser", no_home)
    with pytest.raises(UserError, match="HOME") as refused:
        root()
    assert f"{variable} is" not in str(refused.value)


UNKNOWN = """
import os, pwd, sys
def unknown(uid):
    raise KeyError(f"getpwuid(): uid not found: {uid}")
pwd.getpwuid = unknown
os.getuid = lambda: 54321
from tune.cli.main import main
sys.exit(main(sys.argv[1:]))
"""
"""The command line as the system would answer a user whom it does not know."""


@pytest.mark.slow
@pytest.mark.parametrize("arguments", [["config"], ["doctor"], ["train", "experiment=digits", "out=/dev/null/x"]])
def test_every_command_runs_for_an_unknown_user(arguments, tmp_path):
    place = Path("/tmp/dxmi-54321")
    environment = {key: value for key, value in os.environ.items() if key not in ("HOME", "USER", "LOGNAME")}
    environment["PYTHONPATH"] = str(Path(__file__).parent.parent)
    command = [sys.executable, "-c", UNKNOWN, *arguments]
    ended = subprocess.run(command, check=False, env=environment, cwd=tmp_path, capture_output=True, text=True)
    shutil.rmtree(place, ignore_errors=True)
    assert ended.returncode in (0, 1, 2)
    assert "Traceback" not in ended.stderr
    assert str(place) in ended.stderr


# ----------------------------------------------------------------------------
# Proxies


@pytest.fixture
def proxied(monkeypatch):
    """An environment in which every request would go to a proxy that is not there."""
    for name in ("http_proxy", "https_proxy", "all_proxy", "no_proxy"):
        monkeypatch.delenv(name, raising=False)
        monkeypatch.delenv(name.upper(), raising=False)
    monkeypatch.setenv("no_proxy", "")  # given back after the test
    monkeypatch.setenv("NO_PROXY", "")
    return monkeypatch


@pytest.fixture
def answering():
    """The address of a server of this machine that answers every GET."""

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            self.send_response(200)
            self.end_headers()
            self.wfile.write(b'{"ray_version": "2.60.0", "version": "4"}')

        def log_message(self, *_):
            pass

    server = HTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{server.server_port}"
    server.shutdown()
    server.server_close()


@pytest.mark.parametrize("name", ["http_proxy", "HTTP_PROXY", "ALL_PROXY", "all_proxy"])
def test_loopback_never_goes_through_a_proxy(name, proxied, answering):
    proxied.setenv(name, "http://127.0.0.1:9")
    assert machine.asked(f"{answering}/health", 5.0).status == 200
    machine.spare_loopback()
    assert requests.get(answering, timeout=5.0).status_code == 200  # as MLflow's client and Ray's do


@pytest.mark.parametrize("host", ["127.0.0.1", "localhost", "[::1]", "x.localhost", "127.0.0.1:8265"])
def test_every_name_of_this_machine_is_spared(host, proxied):
    proxied.setenv("HTTPS_PROXY", "http://proxy:1")
    proxied.setenv("no_proxy", "intern.example")
    machine.spare_loopback()
    assert proxy_bypass_environment(host)
    assert proxy_bypass_environment("a.intern.example")
    assert not proxy_bypass_environment("example.org")


def test_a_proxy_is_left_in_force_for_others_and_none_is_invented(proxied):
    machine.spare_loopback()
    assert os.environ["no_proxy"] == ""
    proxied.setenv("http_proxy", "http://127.0.0.1:9")
    with pytest.raises(OSError):
        machine.asked("http://example.invalid/", 5.0)
    proxied.setenv("no_proxy", "*")
    machine.spare_loopback()
    assert os.environ["no_proxy"] == "*"


def test_the_clients_of_ui_and_submit_ask_directly(proxied, answering):
    class Alive:
        def poll(self):
            return None

    proxied.setenv("http_proxy", "http://127.0.0.1:9")
    assert ui.answers(Alive(), int(answering.rpartition(":")[2]))
    client = submit._client(answering)
    assert client._do_request("GET", "/api/version").status_code == 200


def test_a_cluster_that_accepts_and_never_answers_is_given_up(proxied, monkeypatch):
    monkeypatch.setattr(submit, "_ANSWER_SECONDS", 0.2)
    monkeypatch.setattr(submit, "_UPLOADED_SECONDS", 0.2)
    with socket.socket() as silent:
        silent.bind(("127.0.0.1", 0))
        silent.listen()
        with pytest.raises(submit.UnreachableError):
            submit.Jobs(f"http://127.0.0.1:{silent.getsockname()[1]}")
