"""A real cluster on this machine: a head and nodes that are processes of their own, and jobs that are sent to it."""

import json
import os
import secrets
import signal
import socket
import subprocess
import sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path
from threading import Thread

import pytest
import ray

from dxmi.errors import UserError
from dxmi.training.config import ResourcesConfig
from support import SLOWER, changed, free_port, missing, stating, wait_until
from tune.config.sweep import TrackingConfig
from tune.execution.jobs import Jobs, entrypoint, environment, survey
from tune.execution.preflight import file_system, is_network, require_fit
from tune.execution.ray_runtime import ray_session
from tune.execution.resources import share_cluster
from tune.machine import is_loopback
from tune.studies.folder import StudyFolder
from tune.studies.records import TrialState
from tune.studies.study import Study

ROOT = Path(__file__).resolve().parents[1]
TINY = changed(SLOWER, "train.iterations=40", "evaluate.every=10")

# ----------------------------------------------------------------------------
# What is refused, and what is left at home


@pytest.mark.parametrize(
    ("uri", "expected"),
    [
        ("http://127.0.0.1:5000", True), ("http://localhost:5000", True), ("http://[::1]:5000", True),
        ("http://127.8.9.1", True), ("http://mlflow.example.org:5000", False), ("http://10.0.0.7:5000", False),
        ("local", False), ("none", False),
    ],
)  # fmt: skip
def test_loopback_addresses(uri, expected):
    assert is_loopback(uri) == expected


def test_the_kind_of_file_system_is_that_of_the_deepest_mount(tmp_path):
    shared = tmp_path / "sh ared"
    mounts = tmp_path / "mounts"
    escaped = str(shared).replace(" ", "\\040")
    mounts.write_text(f"/dev/a / ext4 rw 0 0\nhost:/x {escaped} nfs4 rw 0 0\nbroken\n/dev/b {escaped}/in xfs rw 0 0\n")
    assert file_system(tmp_path, mounts) == "ext4"
    assert file_system(shared / "study", mounts) == "nfs4"
    assert file_system(shared / "in" / "study", mounts) == "xfs"
    assert file_system(tmp_path, tmp_path / "none") == ""
    assert [is_network(kind) for kind in ("nfs4", "fuse.sshfs", "ext4", "overlay", "")] == [
        True,
        True,
        False,
        False,
        False,
    ]


def test_on_a_cluster_folders_are_absolute_and_servers_have_names(tmp_path, monkeypatch):
    require_fit(Path("studies/x"), TrackingConfig(uri="http://127.0.0.1:5000"))
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    require_fit(tmp_path, TrackingConfig())
    with pytest.raises(UserError, match=stating("studies/x … absolute … every node")):
        require_fit(Path("studies/x"), TrackingConfig())
    with pytest.raises(UserError, match=stating("tracking.uri is http://127.0.0.1:5000")):
        require_fit(tmp_path, TrackingConfig(uri="http://127.0.0.1:5000"))


def test_sqlite_on_a_network_file_system_is_refused(tmp_path, monkeypatch):
    monkeypatch.setattr("tune.execution.preflight.file_system", lambda _: "nfs4")
    with pytest.raises(UserError, match=r"tracking\.uri=http"):
        require_fit(tmp_path, TrackingConfig())
    require_fit(tmp_path, TrackingConfig(uri="none"))


def test_slots_of_a_cluster_do_not_spread_a_worker_over_nodes():
    nodes = [(3, 0), (3, 0), (1, 0)]
    assert share_cluster(ResourcesConfig(threads=2), None, nodes).concurrent == 2
    assert share_cluster(ResourcesConfig(threads=1, num_workers=3), None, nodes).concurrent == 2
    assert share_cluster(ResourcesConfig(num_workers=8), None, [(32, 8)] * 8).concurrent == 8
    assert share_cluster(ResourcesConfig(gpus=0.25), None, [(8, 1), (1, 1)]).concurrent == 5
    with pytest.raises(UserError, match=r"sweep.max_concurrent"):
        share_cluster(ResourcesConfig(device="cuda"), None, [(4, 0)])
    assert share_cluster(ResourcesConfig(device="cuda"), 8, [(4, 0)]).concurrent == 8  # nodes will be added


def made_tree(folder: Path) -> Path:
    for name in ("dxmi", "tune", "runs/x", ".git", ".venv/lib", "own"):
        (folder / name).mkdir(parents=True)
        (folder / name / "file").write_bytes(b"x" * 1000)
    for name in (".env", "server.pem", "auth_token", ".ray-token-41234", "credentials.json", ".pgpass", ".gitignore"):
        (folder / name).write_bytes(b"own/\n")
    (folder / "cluster" / "credentials").mkdir(parents=True)  # where cluster/mlflow.compose.yaml has its password
    (folder / "cluster" / "credentials" / "database").write_bytes(b"hunter2")
    return folder


def test_data_runs_secrets_and_what_git_ignores_stay_at_home(tmp_path):
    tree = survey(made_tree(tmp_path))
    assert tree.sizes == {"dxmi": 1000, "tune": 1000, ".gitignore": 5}
    with pytest.raises(UserError, match=stating("dxmi 0 MB … --max-upload-mb")):
        tree.require_small(2000)
    tree.require_small(2005)


def test_only_a_checkout_is_sent(tmp_path):
    survey(made_tree(tmp_path)).require_ours()
    with pytest.raises(UserError, match=stating(f"{tmp_path / 'own'} … dxmi … tune")):
        survey(tmp_path / "own").require_ours()
    with pytest.raises(UserError, match=stating(f"{tmp_path / 'none'} … no such")):
        survey(tmp_path / "none")


class OpenServer(BaseHTTPRequestHandler):
    """A job server that answers everybody."""

    def do_GET(self):
        self.send_response(200)
        self.end_headers()
        self.wfile.write(json.dumps({"version": "1", "ray_version": ray.__version__, "session_name": "x"}).encode())

    def log_message(self, *_):
        pass


def test_a_cluster_that_strangers_can_use_is_refused_unless_it_is_asked_for(monkeypatch):
    server = HTTPServer(("127.0.0.1", 0), OpenServer)
    Thread(target=server.serve_forever, daemon=True).start()
    address = f"http://127.0.0.1:{server.server_port}"
    Jobs(address)  # nobody else reaches it
    monkeypatch.setattr("tune.execution.jobs.is_loopback", lambda _: False)
    with pytest.raises(UserError, match=stating(f"{address} … no token … --no-token")):
        Jobs(address)
    Jobs(address, no_token=True)
    server.shutdown()


def test_a_ray_of_our_own_never_starts_without_its_token(monkeypatch):
    monkeypatch.delenv("RAY_ADDRESS", raising=False)
    monkeypatch.setenv("RAY_AUTH_MODE", "disabled")
    with pytest.raises(UserError, match=stating("RAY_AUTH_MODE")), ray_session(1, 0):
        raise AssertionError


def test_a_machine_that_is_too_busy_for_ray_is_said(monkeypatch):
    """What Ray 2.60 raises then is a plain Exception; other faults keep their traceback."""
    monkeypatch.delenv("RAY_ADDRESS", raising=False)

    def fails(said):
        def init(**_):
            raise Exception(said)  # noqa: TRY002

        return init

    monkeypatch.setattr("ray.init", fails("The current node timed out during startup. This could happen because"))
    with pytest.raises(UserError, match=stating("Ray … busy")), ray_session(1, 0):
        raise AssertionError
    monkeypatch.setattr("ray.init", fails("something else"))
    with pytest.raises(Exception, match="something else"), ray_session(1, 0):
        raise AssertionError


def test_only_named_variables_go_along_and_no_secret(monkeypatch):
    monkeypatch.delenv("DXMI_DATA", raising=False)
    monkeypatch.setenv("DXMI_CACHE", "/shared/cache")
    monkeypatch.setenv("MINE", "1")
    assert environment(["MINE"]) == {"DXMI_CACHE": "/shared/cache", "MINE": "1"}
    for name, sentence in (
        ("MLFLOW_TRACKING_TOKEN", "secret"),
        ("AWS_SECRET_ACCESS_KEY", "secret"),
        ("NONE", "not set"),
    ):
        with pytest.raises(UserError, match=stating(f"{name} … {sentence}")):
            environment([name])


def test_a_jobs_command_is_ours_and_quoted():
    assert entrypoint(["sweep", "name=a b", "x=$(id)"]) == "python -m tune.cli.main sweep 'name=a b' 'x=$(id)'"
    for arguments in ([], ["rm"], ["ui"]):
        with pytest.raises(UserError, match=stating("-- … train … sweep … report … studies … doctor … config")):
            entrypoint(arguments)


@pytest.mark.parametrize(
    "argument",
    [
        "tracking.uri=http://olga:hunter2@host", "tracking.uri=olga:hunter2@host", "tracking.uri='https://hunter2@host'",
        "tracking.uri=https://host?token=hunter2", "tracking.uri=http://olga:hunter2%40host",
        "++tracking={uri:'http://olga:hunter2@host'}",
    ],
)  # fmt: skip
def test_no_credentials_reach_a_jobs_command(argument):
    with pytest.raises(UserError, match=stating("MLFLOW_TRACKING_PASSWORD … nodes")) as refused:
        entrypoint(["sweep", argument])
    assert "hunter2" not in str(refused.value)
    assert entrypoint(["sweep", "tracking.uri=http://host:5000"]).endswith(" tracking.uri=http://host:5000")


# ----------------------------------------------------------------------------
# A head, and nodes


class Cluster:
    """A head without devices, and nodes of two CPUs each."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        token = folder / "token"
        token.write_text(secrets.token_hex(32))
        bin_folder = str(Path(sys.executable).parent)
        self.environment = {
            **{key: value for key, value in os.environ.items() if not key.startswith("RAY_")},
            "RAY_AUTH_MODE": "token",
            "RAY_AUTH_TOKEN_PATH": str(token),
            "RAY_USAGE_STATS_ENABLED": "0",
            "DXMI_CACHE": str(folder / "cache"),
            "PATH": f"{bin_folder}:{os.environ['PATH']}",
        }
        self.port, self.dashboard = free_port(), free_port()
        self.processes: list[subprocess.Popen[bytes]] = []
        self._start(
            "--head", f"--port={self.port}", "--dashboard-host=127.0.0.1", f"--dashboard-port={self.dashboard}",
            "--num-cpus=0", "--include-dashboard=true",
        )  # fmt: skip
        self.address = f"http://127.0.0.1:{self.dashboard}"
        wait_until(lambda: _listens(self.dashboard), 90)

    def add_node(self) -> subprocess.Popen[bytes]:
        return self._start(f"--address=127.0.0.1:{self.port}", "--num-cpus=2")

    def _start(self, *arguments: str) -> subprocess.Popen[bytes]:
        # Another Ray on this machine may have the agents' default ports, and a job waits for an agent.
        ports = [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")]
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", *arguments, *ports]
        log = (self.folder / f"node-{len(self.processes)}.log").open("wb")
        process = subprocess.Popen(
            command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
        )
        self.processes.append(process)
        return process

    def close(self) -> None:
        for process in reversed(self.processes):
            if process.poll() is None:
                process.terminate()
                try:
                    process.wait(timeout=20)
                except subprocess.TimeoutExpired:
                    os.killpg(process.pid, signal.SIGKILL)

    def start(self, *arguments: str, **changes: str) -> subprocess.Popen[str]:
        command = [sys.executable, "-m", "tune.cli.main", "submit", "--address", self.address, *arguments]
        return subprocess.Popen(
            command,
            env=self.environment | changes,
            cwd=ROOT,
            stdin=subprocess.DEVNULL,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
            preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),  # noqa: PLW1509
        )

    def submit(self, *arguments: str, code: int = 0, seconds: float = 300, **changes: str) -> str:
        process = self.start(*arguments, **changes)
        said, _ = process.communicate(timeout=seconds)
        assert process.returncode == code, said
        assert "Traceback" not in said
        return said


def _listens(port: int) -> bool:
    with socket.socket() as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


@pytest.fixture(scope="module")
def cluster(tmp_path_factory):
    made = Cluster(tmp_path_factory.mktemp("cluster"))
    made.add_node()
    try:
        yield made
    finally:
        made.close()


@pytest.mark.slow
def test_a_jobs_output_and_exit_code_come_back(cluster):
    said = cluster.submit("--", "config", "experiment=digits", "algorithm.entropy_coef=0.07")
    assert "entropy_coef: 0.07" in said
    assert missing("'nothing'", cluster.submit("--", "train", "experiment=nothing", code=2)) == []


@pytest.mark.slow
def test_a_sweep_is_sent_left_followed_again_and_ended(cluster):
    studies = cluster.folder / "studies"
    long = [*changed(TINY, "train.iterations=100000"), "sweep=demo", "sweep.stopping.rule=none", "name=long"]
    process = cluster.start("--", "sweep", *long, "--studies", str(studies))
    wait_until(lambda: any((studies / "long").glob("trials/0000/metrics.jsonl")), 200)
    process.send_signal(signal.SIGINT)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    job = said.rpartition("--cancel ")[2].strip()
    assert f"--attach {job}" in said
    attached = cluster.start("--attach", job)
    cluster.submit("--cancel", job)
    said, _ = attached.communicate(timeout=200)
    assert attached.returncode == 130, said
    assert "trial 0: started" in said
    assert "stopped by SIGTERM" in said
    wait_until((studies / "long" / "report.html").exists, 40)
    assert missing("already ended", cluster.submit("--cancel", job)) == []


@pytest.mark.slow
def test_what_a_cluster_cannot_take_is_refused_with_a_sentence(cluster, tmp_path):
    assert missing("absolute", cluster.submit("--", "sweep", *TINY, "sweep=demo", code=2)) == []
    assert missing("no job nothing", cluster.submit("--attach", "nothing", code=2)) == []
    wrong = tmp_path / "wrong"
    wrong.write_text(secrets.token_hex(32))
    assert missing("token", cluster.submit("--", "config", code=2, RAY_AUTH_TOKEN_PATH=str(wrong))) == []
    command = [sys.executable, "-m", "tune.cli.main", "submit", "--address", "http://127.0.0.1:9", "--", "config"]
    done = subprocess.run(
        command, check=False, capture_output=True, text=True, cwd=ROOT, env=cluster.environment, timeout=60
    )
    assert done.returncode == 2
    assert missing("Ray … http://127.0.0.1:9", done.stderr) == []


@pytest.mark.slow
def test_a_sweep_of_groups_survives_the_loss_of_a_node(cluster):
    second = cluster.add_node()
    studies, name = cluster.folder / "studies", "lossy"
    process = cluster.start(
        "--", "sweep", *TINY, "sweep=demo", "sweep.budget.trials=4", "sweep.stopping.rule=none", "sweep.max_failures=3",
        "sweep.max_concurrent=2", "resources.num_workers=2", f"name={name}", "--studies", str(studies),
    )  # fmt: skip
    wait_until(lambda: any((studies / name).glob("trials/0001/metrics.jsonl")), 300)
    os.killpg(second.pid, signal.SIGKILL)
    said, _ = process.communicate(timeout=600)
    assert process.returncode == 0, said
    records = Study.read(StudyFolder(studies / name)).records()
    assert [record.state for record in records] == [TrialState.COMPLETE] * 4
    for record in records:
        rows = [json.loads(line)["step"] for line in record.run.metrics.read_text().splitlines()]
        assert rows[-1] == 40
        assert rows == sorted(rows)


# ----------------------------------------------------------------------------
# Slurm


def stand_in(folder: Path, name: str, body: str) -> None:
    path = folder / name
    path.write_text(f"#!/usr/bin/env bash\n{body}\n")
    path.chmod(0o755)


def slurm(tmp_path: Path, *arguments: str, **changes: str) -> subprocess.Popen[str]:
    """The batch script as Slurm would run it, with stand-ins for Slurm, Ray and us that write down what they were."""
    programs = tmp_path / ".venv" / "bin"
    programs.mkdir(parents=True)
    stand_in(programs, "scontrol", 'printf "node1\\nnode2\\nnode3\\n"')
    stand_in(
        programs, "srun", 'while [[ "$1" == --* ]]; do options="${options:-} $1"; shift; done\n'
        f'echo "srun$options: $*" >>"{tmp_path}/log"\nexec "$@"',
    )  # fmt: skip
    stand_in(programs, "hostname", "echo 10.0.0.1 fe80::1")
    note = f'stat -c "token %a" "$RAY_AUTH_TOKEN_PATH" >>"{tmp_path}/log"'
    stand_in(programs, "ray", f"{note}\nexec sleep 60 >/dev/null 2>&1")
    stand_in(programs, "python", f'[[ "$1" == - ]] && {{ sleep 1; exit 0; }}; exec {sys.executable} "$@"')
    stand_in(
        programs, "dxmi",
        f'echo "dxmi $* at $RAY_ADDRESS" >>"{tmp_path}/log"\n'
        f'trap \'sleep 1; echo saved >>"{tmp_path}/log"; exit 130\' TERM\n'
        '[[ "$1" == wait ]] && { sleep 30 >/dev/null 2>&1 & wait; }; exit 3',
    )  # fmt: skip
    environment = {
        "PATH": os.environ["PATH"], "SLURM_SUBMIT_DIR": str(tmp_path), "SLURM_JOB_ID": "41234",
        "SLURM_JOB_NODELIST": "node[1-3]", "SLURM_JOB_NUM_NODES": "3", "SLURM_CPUS_PER_TASK": "8", **changes,
    }  # fmt: skip
    command = ["bash", str(ROOT / "cluster" / "slurm.sbatch"), *arguments]
    return subprocess.Popen(command, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True)


def test_the_slurm_script_starts_a_head_and_nodes_and_passes_the_exit_code_on(tmp_path):
    process = slurm(tmp_path, "sweep", "name=a b", SLURM_GPUS_ON_NODE="4")
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 3, said
    log = (tmp_path / "log").read_text()
    assert (
        "srun --nodes=1 --ntasks=1 --nodelist=node1: ray start --head --block --node-ip-address=10.0.0.1 --port=21234"
        in log
    )
    assert "--num-cpus=8 --num-gpus=4" in log
    assert "srun --nodes=2 --ntasks=2 --exclude=node1: ray start --block --address=10.0.0.1:21234" in log
    assert "dxmi sweep name=a b at 10.0.0.1:21234" in log
    assert log.count("token 600") == 2
    assert not list(tmp_path.glob(".ray-token*"))


def test_the_slurm_script_lets_a_sweep_save_when_time_is_up(tmp_path):
    process = slurm(tmp_path, "wait")
    wait_until(lambda: (tmp_path / "log").exists() and "dxmi wait" in (tmp_path / "log").read_text(), 30)
    process.send_signal(signal.SIGTERM)
    said, _ = process.communicate(timeout=60)
    assert process.returncode == 130, said
    assert "saved" in (tmp_path / "log").read_text()


def test_the_slurm_script_without_a_command_says_how_it_is_used(tmp_path):
    process = slurm(tmp_path)
    said, _ = process.communicate(timeout=30)
    assert process.returncode == 2
    assert "usage: sbatch" in said
