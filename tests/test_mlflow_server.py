"""MLflow on PostgreSQL, started for real: a record survives kills, and only those who may get at it."""

import base64
import importlib.util
import os
import pwd
import re
import shutil
import signal
import socket
import subprocess
import sys
import tempfile
import threading
import time
import urllib.request
from contextlib import suppress
from http.client import HTTPConnection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from urllib.error import HTTPError

import pytest
import yaml
from pathspec import PathSpec

import tune.integrations.mlflow_tracker
from dxmi.persistence.files import write_atomic
from dxmi.training.schema import config_tree
from tune.config.compose import compose_experiment
from tune.config.sweep import SweepConfig, TrackingConfig
from tune.execution.jobs import LEFT_OUT
from tune.integrations.mlflow_tracker import Tracker
from tune.plans.sweep import Plan
from tune.search.space import configured
from tune.studies.folder import StudyFolder
from tune.studies.records import Outcome, TrialRecord, TrialState

ROOT = Path(__file__).resolve().parents[1]
SCRIPT = ROOT / "cluster" / "mlflow.sh"
USER, PASSWORD = "olga.researcher", "hunter22"
"""Those that the proxy in front of the server wants."""


def until(condition, seconds: float = 100.0) -> None:
    """Wait until it holds."""
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "it never happened"
        time.sleep(0.05)


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# ----------------------------------------------------------------------------
# The server


def as_nobody_special() -> list[str]:
    """What goes before a command that root may not run, as PostgreSQL is one; skips where there is nothing."""
    if os.geteuid() != 0:
        return []
    account = next(account for account in pwd.getpwall() if account.pw_name in ("postgres", "nobody"))
    drop = ["setpriv", f"--reuid={account.pw_uid}", f"--regid={account.pw_gid}", "--clear-groups"]
    # Root's own Python may lie where nobody else can read.
    for rights in ([], ["--inh-caps=+dac_read_search", "--ambient-caps=+dac_read_search"]):
        probe = [*drop, *rights, "bash", "-c", 'exec "$0" -c "import psycopg2"', sys.executable]
        if subprocess.run(probe, check=False, capture_output=True, cwd="/").returncode == 0:
            return [*drop, *rights]
    pytest.skip(f"only root can run {sys.executable}, and PostgreSQL does not run as root")


class Server:
    """cluster/mlflow.sh on a folder of its own, whose processes are known by the folder they are in."""

    def __init__(self, folder: Path, before: list[str]) -> None:
        self.folder = folder
        self.before = before
        self.port = free_port()
        self.uri = f"http://127.0.0.1:{self.port}"
        self.output = b""
        self.process: subprocess.Popen[bytes] | None = None

    def command(self, *arguments: str) -> list[str]:
        return [*self.before, "bash", str(SCRIPT), *arguments]

    @property
    def environment(self) -> dict[str, str]:
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        misleading = {"MLFLOW_HOST": "0.0.0.0", "UVICORN_HOST": "0.0.0.0", "PGPORT": "1", "PGPASSWORD": "wrong"}
        return {"PATH": path, "HOME": str(self.folder), "LANG": "C.UTF-8", "MLFLOW_WORKERS": "1", **misleading}

    def launch(self) -> None:
        """Begin to start."""
        self.process = subprocess.Popen(
            self.command(str(self.folder), str(self.port)),
            env=self.environment,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
        )

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.launch()
        self.output = self.process.stdout.readline()
        assert self.output == f"tracking.uri={self.uri}\n".encode(), self.output + self.process.stdout.read()

    def processes(self) -> dict[int, str]:
        """Command lines by process."""
        found = {}
        for entry in Path("/proc").glob("[0-9]*"):
            with suppress(OSError):
                if (entry / "cwd").resolve().is_relative_to(self.folder):
                    found[int(entry.name)] = (entry / "cmdline").read_bytes().replace(b"\0", b" ").decode()
        return found

    def has(self, program: str) -> bool:
        return any(program in command for command in self.processes().values())

    def kill(self) -> None:
        """All of it, at once."""
        for pid in self.processes():
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        if self.process is not None:
            self.process.wait()
        until(lambda: not self.processes())

    def stop(self) -> int:
        self.process.send_signal(signal.SIGTERM)
        return self.process.wait(timeout=30)

    def refuses(self, *arguments: str) -> str:
        """What it says to these arguments."""
        command = self.command(*arguments)
        done = subprocess.run(
            command, check=False, env=self.environment, capture_output=True, text=True, timeout=30, cwd="/"
        )
        assert done.returncode == 2, done
        assert done.stderr.startswith("dxmi: ")
        return done.stderr

    @property
    def password(self) -> str:
        return (self.folder / "credentials").read_text().strip().rpartition(":")[2]


@pytest.fixture(scope="module")
def place():
    """A server that is not started yet."""
    if not shutil.which("initdb") and not [*Path("/usr/lib/postgresql").glob("*/bin/initdb")]:
        pytest.skip("PostgreSQL is not installed")
    if importlib.util.find_spec("psycopg2") is None:
        pytest.skip("psycopg2 is not installed: pip install 'dxmi[server]'")
    before = as_nobody_special()
    folder = Path(tempfile.mkdtemp(prefix="dxmi 50% #1 "))
    if before:
        uid, gid = (int(argument.partition("=")[2]) for argument in before[1:3])
        os.chown(folder, uid, gid)
    made = Server(folder, before)
    try:
        yield made
    finally:
        made.kill()
        shutil.rmtree(folder)


@pytest.fixture
def server(place):
    """One that runs."""
    place.start()
    return place


class Proxy(BaseHTTPRequestHandler):
    """A reverse proxy that wants a password, as there is to be one in front of the server."""

    protocol_version = "HTTP/1.1"
    port = 0

    def answer(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        wanted = "Basic " + base64.b64encode(f"{USER}:{PASSWORD}".encode()).decode()
        is_known = self.headers.get("Authorization") == wanted
        status, kind, data = self.passed_on(body) if is_known else (401, "text/plain", b"who are you?")
        self.send_response(status)
        self.send_header("Content-Type", kind)
        self.send_header("Content-Length", str(len(data)))
        self.end_headers()
        self.wfile.write(data)

    def passed_on(self, body: bytes) -> tuple[int, str, bytes]:
        connection = HTTPConnection("127.0.0.1", self.port, timeout=30)
        try:
            connection.request(self.command, self.path, body, dict(self.headers))
            answer = connection.getresponse()
            return answer.status, answer.getheader("Content-Type", ""), answer.read()
        except OSError:
            return 502, "text/plain", b"it is away"
        finally:
            connection.close()

    def log_message(self, *_: object) -> None:
        pass

    do_GET = do_POST = do_PUT = do_PATCH = answer


@pytest.fixture
def proxy(place):
    """Its address."""
    made = ThreadingHTTPServer(("127.0.0.1", 0), type("Handler", (Proxy,), {"port": place.port}))
    made.daemon_threads = True
    threading.Thread(target=made.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{made.server_address[1]}"
    made.shutdown()
    made.server_close()


# ----------------------------------------------------------------------------
# A record


class Made:
    """A study of one trial, which writes by hand what `dxmi train` would."""

    def __init__(self, root: Path, uri: str) -> None:
        experiment = compose_experiment(["train.iterations=40", "evaluate.every=10"]).experiment
        values = {"algorithm.policy.lr": 1e-5}
        space = {"algorithm.policy.lr": {"log_uniform": [1e-6, 1e-4]}}
        self.plan = Plan("demo", experiment, SweepConfig(), space, TrackingConfig(uri=uri, patience_seconds=60.0))
        self.folder = StudyFolder(root / "demo")
        self.folder.trials.mkdir(parents=True)
        self.folder.begin(self.plan)
        self.run = self.folder.run(0)
        self.run.create()
        config = configured(experiment, values)
        self.run.write_config(config_tree(config))
        self.record = TrialRecord(0, values, config.signature, 0, self.run, Outcome(TrialState.RUNNING))
        self.said: list[str] = []
        self.go_on(0)

    def go_on(self, step: int) -> None:
        self.run.append([{"step": step, "eval/fid_digits": 10.0 - step / 100}])
        write_atomic(self.run.samples / f"step_{step:06d}.png", b"png %d" % step)

    def tracker(self) -> Tracker:
        tracker = Tracker(self.folder, self.plan, self.said.append)
        tracker.start()
        return tracker


def seen(server: Server):
    """MLflow's client, the study's run and its trial's."""
    from mlflow import MlflowClient  # noqa: PLC0415  (it takes a second)

    client = MlflowClient(server.uri)
    experiment = client.get_experiment_by_name("dxmi")
    runs = client.search_runs([experiment.experiment_id]) if experiment else []
    parents = [run for run in runs if "mlflow.parentRunId" not in run.data.tags]
    trials = [run for run in runs if "mlflow.parentRunId" in run.data.tags]
    assert len(parents) <= 1
    assert len(trials) <= 1
    return client, *parents, *trials


def steps(server: Server) -> list[int]:
    """Those of the trial's scores, in the order in which they arrived."""
    client, *runs = seen(server)
    if len(runs) < 2:
        return []
    return [point.step for point in client.get_metric_history(runs[1].info.run_id, "eval/fid_digits")]


def test_a_record_survives_a_kill_of_everything_and_goes_on(server, proxy, tmp_path, monkeypatch):
    monkeypatch.setattr(tune.integrations.mlflow_tracker, "_PAUSE", 0.05)
    monkeypatch.setattr(tune.integrations.mlflow_tracker, "_LONGEST_DELAY", 0.5)
    made = Made(tmp_path, proxy)
    tracker = made.tracker()
    tracker.update([made.record], running={0})
    until(lambda: made.said)
    assert "401" in made.said[0]
    assert seen(server)[1:] == ()
    monkeypatch.setenv("MLFLOW_TRACKING_USERNAME", USER)
    monkeypatch.setenv("MLFLOW_TRACKING_PASSWORD", PASSWORD)
    made.go_on(10)
    tracker.update([made.record], running={0})
    until(lambda: steps(server) == [0, 10])

    server.kill()
    made.go_on(20)
    tracker.update([made.record], running={0})
    until(lambda: len(made.said) == 2)
    server.start()
    until(lambda: steps(server) == [0, 10, 20])
    made.go_on(30)
    made.record = TrialRecord(
        0, made.record.values, made.record.signature, 0, made.run, Outcome(TrialState.PRUNED, "it fell behind", 9.7, 30)
    )
    tracker.update([made.record], running=())
    assert tracker.finish("") == 0

    client, parent, trial = seen(server)
    assert steps(server) == [0, 10, 20, 30]
    assert parent.info.status == "FINISHED"
    assert trial.info.status == "KILLED"
    assert trial.data.tags["state"] == "pruned"
    assert trial.data.params["algorithm.policy.lr"] == "1e-05"
    assert trial.data.metrics["eval/fid_digits"] == pytest.approx(9.7, abs=1e-12)
    for name in ("config.yaml", "samples/step_000000.png", "samples/step_000030.png"):
        local = client.download_artifacts(trial.info.run_id, name, str(tmp_path))
        assert Path(local).read_bytes() == (made.run.path / name).read_bytes()
    kept = "".join([*made.said, str(parent.to_dictionary()), str(trial.to_dictionary()), made.folder.plan.read_text()])
    for secret in (USER, PASSWORD, server.password):
        assert secret not in kept


# ----------------------------------------------------------------------------
# Who gets at it


def listening(pids) -> set[tuple[str, int]]:
    """(address, port) of each TCP socket on which one of these processes listens."""
    sockets = set()
    for pid in pids:
        for descriptor in Path(f"/proc/{pid}/fd").iterdir():
            with suppress(OSError):
                sockets.add(str(descriptor.readlink()))
    found = set()
    for table in ("tcp", "tcp6"):
        for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
            fields = line.split()
            address, port = fields[1].split(":")
            if fields[3] == "0A" and f"socket:[{fields[9]}]" in sockets:
                readable = socket.inet_ntoa(bytes.fromhex(address)[::-1]) if table == "tcp" else address
                found.add((readable, int(port, 16)))
    return found


def test_nothing_listens_but_mlflow_on_loopback(server):
    assert server.has("postgres: checkpointer")
    assert server.has("uvicorn")
    assert listening(server.processes()) == {("127.0.0.1", server.port)}


def test_the_databases_password_is_nowhere_but_in_its_file(server):
    password = server.password.encode()
    assert len(password) == 64
    assert (server.folder / "credentials").stat().st_mode & 0o777 == 0o600
    assert password not in server.output
    assert password.decode() not in "".join(server.processes().values())
    for pid in server.processes():
        assert password not in Path(f"/proc/{pid}/environ").read_bytes()
    files = [path for path in server.folder.rglob("*") if path.is_file() and path.name != "credentials"]
    assert {"mlflow.log", "postgresql.log", "PG_VERSION"} <= {path.name for path in files}
    assert [path for path in files if password in path.read_bytes()] == []


def test_the_database_opens_to_its_role_and_password_alone(server):
    import psycopg2  # noqa: PLC0415  (where there is PostgreSQL)

    def ask(user: str, password: str, database: str = "mlflow") -> str:
        connection = psycopg2.connect(host=str(server.folder), port=5432, user=user, password=password, dbname=database)
        with connection, connection.cursor() as cursor:
            cursor.execute("SELECT rolsuper OR rolcreatedb OR rolcreaterole FROM pg_roles WHERE rolname = current_user")
            return str(cursor.fetchone()[0])

    assert ask("mlflow", server.password) == "False"
    for attempt in (("mlflow", "wrong"), ("postgres", server.password), ("mlflow", server.password, "postgres")):
        with pytest.raises(psycopg2.OperationalError, match=r"password authentication failed|no pg_hba\.conf entry"):
            ask(*attempt)


def test_a_request_under_another_name_is_refused(server):
    """As a web page would make it whose name has been turned to 127.0.0.1."""
    address = f"{server.uri}/api/2.0/mlflow/experiments/get?experiment_id=0"
    assert urllib.request.urlopen(address, timeout=30).status == 200
    with pytest.raises(HTTPError, match="403"):
        urllib.request.urlopen(urllib.request.Request(address, headers={"Host": "evil.example.org"}), timeout=30)


# ----------------------------------------------------------------------------
# Starting and ending


def test_what_cannot_be_started_is_refused_with_a_sentence(server, tmp_path):
    folder = str(server.folder)
    assert "usage: " in server.refuses()
    assert "The port is 70000" in server.refuses(folder, "70000")
    assert "dxmi submit uploads" in server.refuses(str(ROOT / "cluster"))
    assert "uses" in server.refuses(folder, str(free_port()))
    assert "90 bytes" in server.refuses(f"{folder}/{'x' * 90}")
    assert "comma" in server.refuses(f"{folder}/a,b")
    assert not [*server.folder.glob("[xa][x,]*")], "what is refused is not made"
    assert "is not yours" in server.refuses("/usr")
    assert f"Port {server.port} of 127.0.0.1 is taken" in server.refuses(f"{folder}/other", str(server.port))
    if server.before:
        server.before, before = [], server.before
        try:
            assert "PostgreSQL does not run as root" in server.refuses(folder)
        finally:
            server.before = before


def test_it_ends_on_sigterm_within_seconds_and_leaves_nothing_behind(server):
    began = time.monotonic()
    assert server.stop() == 0
    assert time.monotonic() - began < 20
    assert server.processes() == {}
    assert "database system is shut down" in (server.folder / "postgresql.log").read_text().splitlines()[-1]


def test_if_the_script_alone_is_killed_both_end_and_a_start_right_after_waits_for_them(place):
    place.kill()
    for _ in range(2):
        place.launch()
        until(lambda: place.has("mlflow server"))
        place.process.kill()
        place.process.wait()
    until(lambda: not place.processes())
    place.launch()
    until(lambda: place.has("mlflow server"))
    assert place.stop() == 0
    assert place.processes() == {}


@pytest.mark.slow
def test_dxmi_ui_listens_on_loopback_whatever_the_environment_says(tmp_path):
    port = free_port()
    command = [sys.executable, "-m", "tune.cli.main", "ui", "--studies", str(tmp_path), "--port", str(port)]
    everywhere = {"MLFLOW_HOST": "0.0.0.0", "UVICORN_HOST": "0.0.0.0", "MLFLOW_UVICORN_OPTS": "--host 0.0.0.0"}
    process = subprocess.Popen(
        command, env=os.environ | everywhere, cwd=ROOT, stdout=subprocess.PIPE, start_new_session=True
    )
    try:
        while not (line := process.stdout.readline()).startswith(b"MLflow UI"):
            assert line
        session = [int(entry.name) for entry in Path("/proc").glob("[0-9]*") if session_of(entry) == process.pid]
        assert listening(session) == {("127.0.0.1", port)}
    finally:
        process.send_signal(signal.SIGINT)
        process.wait(timeout=30)


def session_of(process: Path) -> int:
    try:
        return int((process / "stat").read_text().rpartition(")")[2].split()[3])
    except OSError:
        return 0


# ----------------------------------------------------------------------------
# The containers

COMPOSE = ROOT / "cluster" / "mlflow.compose.yaml"
STACK = yaml.safe_load(COMPOSE.read_text())


def test_containers_are_published_on_loopback_alone_and_the_database_not_at_all():
    ports = {name: service.get("ports", []) for name, service in STACK["services"].items()}
    assert ports["database"] == []
    assert len(ports["server"]) == 1
    assert all(port.startswith("127.0.0.1:") for port in ports["server"])
    assert STACK["services"]["database"]["networks"] == ["inner"]
    assert STACK["networks"]["inner"] == {"internal": True}
    assert not [
        service for service in STACK["services"].values() if "network_mode" in service or "privileged" in service
    ]


def test_containers_get_their_password_from_a_file_that_nobody_sends_on():
    assert not re.search(r"//[^/\s]*:[^/\s]*@", COMPOSE.read_text())
    mounted = {f"/run/secrets/{name}" for name in STACK["secrets"]}
    for service in STACK["services"].values():
        assert set(service["secrets"]) <= set(STACK["secrets"])
        for name, value in service["environment"].items():
            assert "PASSWORD" not in name or (name.endswith("_FILE") and value in mounted)
    (secret,) = STACK["secrets"].values()
    path = os.path.normpath(f"cluster/{secret['file']}")
    for patterns in (LEFT_OUT, (ROOT / ".gitignore").read_text().splitlines()):
        assert PathSpec.from_lines("gitignore", patterns).match_file(path)


def test_containers_are_pinned_looked_after_and_name_what_exists():
    for service in STACK["services"].values():
        image = service.get("image") or service["build"]["dockerfile_inline"].split()[1]
        assert re.fullmatch(r"(postgres:\d+\.\d+|python:\d+\.\d+\.\d+-slim)-bookworm", image)
        assert service["healthcheck"]["test"][0] == "CMD"
        assert service["restart"] == "unless-stopped"
        assert {volume.partition(":")[0] for volume in service["volumes"]} <= set(STACK["volumes"])
        assert set(service["networks"]) <= set(STACK["networks"])
    assert STACK["services"]["server"]["environment"]["MLFLOW_SERVER_ENABLE_JOB_EXECUTION"] == "false"
    pinned = {line.partition("==")[0] for line in (ROOT / "constraints.txt").read_text().splitlines()}
    assert {"mlflow", "psycopg2-binary"} <= pinned
