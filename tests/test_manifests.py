"""What Kubernetes is given: cluster/rayjob.yaml field by field, cluster/Dockerfile step by step, and .dockerignore."""

import json
import os
import re
import secrets
import shlex
import shutil
import signal
import socket
import subprocess
import sys
import time
import tomllib
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import yaml
from pathspec import PathSpec
from ray.autoscaler._private.kuberay.autoscaling_config import _derive_autoscaling_config_from_ray_cr

from dxmi.config import to_tree
from dxmi.errors import UserError
from support import missing, stating
from tune.api.sweep import Sweep
from tune.cli.main import main
from tune.config.compose import compose_experiment
from tune.execution.jobs import LEFT_OUT
from tune.execution.ray_tune import _GRACE
from tune.execution.resources import share_cluster
from tune.studies.folder import StudyFolder
from tune.studies.records import TrialState
from tune.studies.study import Study

ROOT = Path(__file__).resolve().parents[1]
MANIFEST = ROOT / "cluster" / "rayjob.yaml"
TINY = [
    "pretrain.iterations=100", "train.iterations=40", "train.batch_size=64", "train.log_every=5", "evaluate.every=10",
    "evaluate.num_samples=200", "evaluate.batch_size=50", "evaluate.kid_subset_size=50", "evaluate.grid=16",
]  # fmt: skip

# ----------------------------------------------------------------------------
# A strict reading: every field by name and type, as the API server reads it


@dataclass(frozen=True)
class Leaf:
    """A value that meets a condition."""

    name: str
    holds: Callable[[Any], bool]

    def problems(self, value: Any, path: str) -> Iterator[str]:
        if not self.holds(value):
            yield f"{path}: {value!r} is no {self.name}"


@dataclass(frozen=True)
class Each:
    """A list of one kind."""

    of: Any

    def problems(self, value: Any, path: str) -> Iterator[str]:
        if not isinstance(value, list):
            yield f"{path}: {value!r} is no list"
            return
        for index, inner in enumerate(value):
            yield from self.of.problems(inner, f"{path}[{index}]")


@dataclass(frozen=True)
class Named:
    """A mapping whose keys are free."""

    of: Any
    key: Any

    def problems(self, value: Any, path: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{path}: {value!r} is no mapping"
            return
        for name, inner in value.items():
            yield from self.key.problems(name, path)
            yield from self.of.problems(inner, f"{path}.{name}")


@dataclass(frozen=True)
class Record:
    """A mapping with these fields and no others."""

    fields: dict[str, Any]
    required: tuple[str, ...] = ()

    def problems(self, value: Any, path: str) -> Iterator[str]:
        if not isinstance(value, dict):
            yield f"{path}: {value!r} is no mapping"
            return
        yield from (f"{path}.{name} is missing" for name in self.required if name not in value)
        for name, inner in value.items():
            if name in self.fields:
                yield from self.fields[name].problems(inner, f"{path}.{name}")
            else:
                yield f"{path}.{name}: there is no such field"


def problems(tree: Any, kind: Record) -> list[str]:
    """What the API server would refuse, one sentence each."""
    return list(kind.problems(tree, ""))


def matching(name: str, pattern: str, longest: int = 253) -> Leaf:
    return Leaf(name, lambda v: isinstance(v, str) and len(v) <= longest and re.fullmatch(pattern, v) is not None)


def one_of(*values: str) -> Leaf:
    return Leaf(f"one of {', '.join(values)}", lambda value: value in values)


def is_count(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < 2**31


def holds_numbers(value: Any) -> bool:
    """JSON like {"driver": 1}."""
    try:
        tree = json.loads(value)
    except (TypeError, ValueError):
        return False
    return isinstance(tree, dict) and all(isinstance(amount, int | float) for amount in tree.values())


def holds_variables(value: Any) -> bool:
    """YAML of a Ray runtime environment of nothing but variables, all of them text."""
    return isinstance(value, str) and not problems(yaml.safe_load(value), Record({"env_vars": Named(TEXT, TEXT)}))


_PART, _WORD = "[a-z0-9]([-a-z0-9]{0,61}[a-z0-9])?", "[A-Za-z0-9]([-A-Za-z0-9_.]{0,61}[A-Za-z0-9])?"
TEXT = Leaf("text", lambda value: isinstance(value, str))
BOOLEAN = Leaf("true or false", lambda value: isinstance(value, bool))
COUNT = Leaf("int32 from 0", is_count)
NUMBER = Leaf("number", lambda value: isinstance(value, int | float) and not isinstance(value, bool))
LABEL = matching("DNS label", _PART)
NAME = matching("DNS name", rf"{_PART}(\.{_PART})*")
KEY = matching("qualified name", rf"({_PART}(\.{_PART})*/)?{_WORD}")
LABEL_VALUE = matching("label's value", rf"({_WORD})?")
AMOUNT_TEXT = matching("quantity", r"\d+(\.\d*)?([numkMGTPE]|[KMGTPE]i|[eE]\d+)?")
AMOUNT = Leaf("quantity", lambda value: is_count(value) or AMOUNT_TEXT.holds(value))
IMAGE = matching("image with a tag", r"[a-z0-9.-]+(:\d+)?(/[a-z0-9._-]+)+:(?!latest$)[\w][\w.-]{0,127}")
PATH = matching("absolute path", "/[^:]*")

# core/v1, meta/v1 and networking/v1 of Kubernetes, of 1.28 to which KubeRay's reference points: what is used here, and
# what stands near to it.
LABELS = Named(LABEL_VALUE, KEY)
METADATA = Record({"name": NAME, "namespace": LABEL, "labels": LABELS, "annotations": Named(TEXT, KEY)})
SELECTOR = Record({"matchLabels": LABELS})
AMOUNTS = Named(AMOUNT, KEY)
RESOURCES = Record({"requests": AMOUNTS, "limits": AMOUNTS})
SECRET_KEY = Record({"name": NAME, "key": TEXT, "optional": BOOLEAN}, ("name", "key"))
VARIABLE = Record({"name": TEXT, "value": TEXT, "valueFrom": Record({"secretKeyRef": SECRET_KEY})}, ("name",))
VARIABLES_OF = Record({"prefix": TEXT, "secretRef": Record({"name": NAME, "optional": BOOLEAN}, ("name",))})
SECCOMP = Record({"type": one_of("RuntimeDefault", "Localhost", "Unconfined"), "localhostProfile": TEXT}, ("type",))
CONTAINER_SECURITY = Record(
    {
        "allowPrivilegeEscalation": BOOLEAN, "capabilities": Record({"add": Each(TEXT), "drop": Each(TEXT)}),
        "privileged": BOOLEAN, "readOnlyRootFilesystem": BOOLEAN, "runAsNonRoot": BOOLEAN, "runAsUser": COUNT,
        "runAsGroup": COUNT, "seccompProfile": SECCOMP,
    }
)  # fmt: skip
POD_SECURITY = Record(
    {
        "runAsNonRoot": BOOLEAN, "runAsUser": COUNT, "runAsGroup": COUNT, "fsGroup": COUNT,
        "fsGroupChangePolicy": one_of("OnRootMismatch", "Always"), "supplementalGroups": Each(COUNT),
        "seccompProfile": SECCOMP,
    }
)  # fmt: skip
HANDLER = Record({"exec": Record({"command": Each(TEXT)})})
CONTAINER = Record(
    {
        "name": LABEL, "image": IMAGE, "imagePullPolicy": one_of("Always", "IfNotPresent", "Never"),
        "command": Each(TEXT), "args": Each(TEXT), "env": Each(VARIABLE), "envFrom": Each(VARIABLES_OF),
        "resources": RESOURCES, "lifecycle": Record({"postStart": HANDLER, "preStop": HANDLER}),
        "securityContext": CONTAINER_SECURITY,
        "volumeMounts": Each(
            Record(
                {"name": LABEL, "mountPath": PATH, "subPath": TEXT, "readOnly": BOOLEAN},
                ("name", "mountPath"),
            )
        ),
    },
    ("name", "image"),
)  # fmt: skip
TOLERATION = Record(
    {
        "key": KEY, "operator": one_of("Exists", "Equal"), "value": LABEL_VALUE, "tolerationSeconds": COUNT,
        "effect": one_of("NoSchedule", "PreferNoSchedule", "NoExecute"),
    }
)  # fmt: skip
VOLUME = Record(
    {
        "name": LABEL,
        "persistentVolumeClaim": Record({"claimName": NAME, "readOnly": BOOLEAN}, ("claimName",)),
    },
    ("name",),
)
POD = Record(
    {
        "containers": Each(CONTAINER), "volumes": Each(VOLUME), "nodeSelector": LABELS, "tolerations": Each(TOLERATION),
        "serviceAccountName": NAME, "automountServiceAccountToken": BOOLEAN, "securityContext": POD_SECURITY,
        "restartPolicy": one_of("Always", "OnFailure", "Never"), "terminationGracePeriodSeconds": COUNT,
        "hostNetwork": BOOLEAN, "hostPID": BOOLEAN, "priorityClassName": NAME,
        "imagePullSecrets": Each(Record({"name": NAME}, ("name",))),
    },
    ("containers",),
)  # fmt: skip
TEMPLATE = Record({"metadata": METADATA, "spec": POD}, ("spec",))
PORT = Record({"protocol": one_of("TCP", "UDP", "SCTP"), "port": COUNT})
PEER = Record({"podSelector": SELECTOR, "namespaceSelector": SELECTOR})
NETWORK_POLICY = Record(
    {
        "apiVersion": one_of("networking.k8s.io/v1"), "kind": one_of("NetworkPolicy"), "metadata": METADATA,
        "spec": Record(
            {
                "podSelector": SELECTOR, "policyTypes": Each(one_of("Ingress", "Egress")),
                "ingress": Each(Record({"from": Each(PEER), "ports": Each(PORT)})),
                "egress": Each(Record({"to": Each(PEER), "ports": Each(PORT)})),
            },
            ("podSelector",),
        ),
    },
    ("apiVersion", "kind", "metadata", "spec"),
)  # fmt: skip

# ray.io/v1 of KubeRay 1.6.2: docs/reference/api.md of ray-project/kuberay at 0a9eabde561ab59ab4bbe626072c359da9214484,
# which its CI compares with ray-operator/apis/ray/v1/{rayjob,raycluster}_types.go. Less what this file has no use for:
# deletionStrategy, gcsFaultToleranceOptions, headService, scaleStrategy, suspend, managedBy, upgradeStrategy.
GROUP = {
    "resources": Named(AMOUNT_TEXT, TEXT),
    "labels": LABELS,
    "rayStartParams": Named(TEXT, TEXT),
    "template": TEMPLATE,
}
HEAD_GROUP = Record(
    {**GROUP, "enableIngress": BOOLEAN, "serviceType": one_of("ClusterIP", "NodePort", "LoadBalancer")},
    ("template", "rayStartParams"),
)
WORKER_GROUP = Record(
    {
        **GROUP, "groupName": LABEL, "replicas": COUNT, "minReplicas": COUNT, "maxReplicas": COUNT,
        "numOfHosts": COUNT, "idleTimeoutSeconds": COUNT,
    },
    ("groupName", "minReplicas", "maxReplicas", "template", "rayStartParams"),
)  # fmt: skip
RAY_CLUSTER = Record(
    {
        "rayVersion": TEXT, "headGroupSpec": HEAD_GROUP, "workerGroupSpecs": Each(WORKER_GROUP),
        "authOptions": Record(
            {"mode": one_of("disabled", "token"), "secretName": NAME, "enableK8sTokenAuth": BOOLEAN}
        ),
        "enableInTreeAutoscaling": BOOLEAN,
        "autoscalerOptions": Record(
            {
                "resources": RESOURCES, "image": IMAGE, "securityContext": CONTAINER_SECURITY,
                "imagePullPolicy": one_of("Always", "IfNotPresent", "Never"), "idleTimeoutSeconds": COUNT,
                "upscalingMode": one_of("Default", "Aggressive", "Conservative"), "version": one_of("v1", "v2"),
                "env": Each(VARIABLE), "envFrom": Each(VARIABLES_OF),
            }
        ),
        "headServiceAnnotations": Named(TEXT, KEY),
    },
    ("headGroupSpec",),
)  # fmt: skip
RAY_JOB = Record(
    {
        "apiVersion": one_of("ray.io/v1"), "kind": one_of("RayJob"), "metadata": METADATA,
        "spec": Record(
            {
                "activeDeadlineSeconds": COUNT, "preRunningDeadlineSeconds": COUNT, "backoffLimit": COUNT,
                "rayClusterSpec": RAY_CLUSTER, "submitterPodTemplate": TEMPLATE, "metadata": Named(TEXT, TEXT),
                "clusterSelector": LABELS, "submitterConfig": Record({"backoffLimit": COUNT}), "entrypoint": TEXT,
                "runtimeEnvYAML": Leaf("YAML of variables", holds_variables), "jobId": TEXT,
                "entrypointResources": Leaf("JSON of numbers", holds_numbers),
                "submissionMode": one_of("K8sJobMode", "HTTPMode", "InteractiveMode", "SidecarMode"),
                "entrypointNumCpus": NUMBER, "entrypointNumGpus": NUMBER, "ttlSecondsAfterFinished": COUNT,
                "shutdownAfterJobFinishes": BOOLEAN,
            }
        ),
    },
    ("apiVersion", "kind", "metadata", "spec"),
)  # fmt: skip


class Strict(yaml.SafeLoader):
    """YAML in which no key stands twice, of which PyYAML would take the last and kubectl none."""

    def construct_mapping(self, node: yaml.MappingNode, deep: bool = False) -> dict[Any, Any]:
        keys = [self.construct_object(key) for key, _ in node.value]
        assert len(keys) == len(set(keys)), f"line {node.start_mark.line + 1}: a key stands twice"
        return super().construct_mapping(node, deep)


POLICY, JOB = yaml.load_all(MANIFEST.read_text(), Strict)
SPEC = JOB["spec"]
CLUSTER = SPEC["rayClusterSpec"]
HEAD, (WORKERS,) = CLUSTER["headGroupSpec"], CLUSTER["workerGroupSpecs"]
PODS = {"head": HEAD["template"], "workers": WORKERS["template"], "submitter": SPEC["submitterPodTemplate"]}
ARGUMENTS = shlex.split(SPEC["entrypoint"])[1:]


def test_every_field_is_one_of_the_api_and_has_its_type():
    assert not problems(POLICY, NETWORK_POLICY)
    assert not problems(JOB, RAY_JOB)


HEAD_PATH = "spec.rayClusterSpec.headGroupSpec"
POD_PATH = f"{HEAD_PATH}.template.spec"


@pytest.mark.parametrize(
    ("path", "value", "complaint"),
    [
        ("spec.entryPoint", "dxmi", "no such field"),
        ("spec.rayClusterSpec.headGroupSpecs", {}, "no such field"),
        ("spec.rayClusterSpec.authOptions.secret", "dxmi-ray", "no such field"),
        (f"{POD_PATH}.containers.0.securityContext.allowPrivilegeEscalations", False, "no such field"),
        (f"{POD_PATH}.containers.0.volumeMounts.0.path", "/x", "no such field"),
        (f"{POD_PATH}.container", [], "no such field"),
        ("spec.backoffLimit", "3", "no int32"),
        ("spec.shutdownAfterJobFinishes", "true", "no true or false"),
        (f"{HEAD_PATH}.rayStartParams.num-cpus", 0, "no text"),
        (f"{HEAD_PATH}.resources.driver", "one", "no quantity"),
        (f"{HEAD_PATH}.resources.driver", 1, "no quantity"),
        (f"{POD_PATH}.containers.0.resources.limits.memory", "8 GB", "no quantity"),
        (f"{POD_PATH}.containers.0.name", "Ray_Head", "no DNS label"),
        (f"{POD_PATH}.containers.0.image", "registry.example.org/dxmi", "no image with a tag"),
        (f"{POD_PATH}.containers.0.image", "registry.example.org/dxmi:latest", "no image with a tag"),
        (f"{POD_PATH}.nodeSelector", ["on-demand"], "no mapping"),
        (f"{POD_PATH}.volumes", {}, "no list"),
        ("spec.entrypointResources", "driver=1", "no JSON of numbers"),
        ("spec.runtimeEnvYAML", "env_vars: {DXMI_CACHE: 1}", "no YAML of variables"),
        ("spec.submissionMode", "K8SJobMode", "no one of"),
        ("spec.rayClusterSpec.authOptions.mode", "tokens", "no one of"),
        ("metadata.labels.a b", "x", "no qualified name"),
        (f"{HEAD_PATH}.template.spec", None, "is missing"),
        ("spec.rayClusterSpec.workerGroupSpecs.0.maxReplicas", None, "is missing"),
    ],
)  # fmt: skip
def test_a_slip_is_refused(path, value, complaint):
    found = problems(changed(JOB, path, value), RAY_JOB)
    assert len(found) == 1, found
    assert complaint in found[0]


def changed(tree: Any, path: str, value: Any) -> Any:
    """A copy with one value set, or removed if it is None. Numbers in the path are places in a list."""
    inner = tree = json.loads(json.dumps(tree))  # in which YAML's aliases are copies of their own
    *parents, last = path.split(".")
    for name in parents:
        inner = inner[int(name) if name.isdigit() else name]
    if value is None:
        del inner[last]
    else:
        inner[last] = value
    return tree


def test_a_key_that_stands_twice_is_refused():
    with pytest.raises(AssertionError, match="line 1: a key stands twice"):
        yaml.load("a: 1\nb: 2\na: 3\n", Strict)


# ----------------------------------------------------------------------------
# What KubeRay and Ray make of it


def test_kuberay_would_take_the_job():
    """Its own rules: ray-operator/controllers/ray/utils/validation.go."""
    assert re.fullmatch(r"[a-z]([-a-z0-9]*[a-z0-9])?", JOB["metadata"]["name"])
    assert len(JOB["metadata"]["name"]) <= 47
    assert SPEC["shutdownAfterJobFinishes"]  # without it there may be no ttlSecondsAfterFinished
    for group in (HEAD, WORKERS):
        in_two_places = {"num-cpus", "num-gpus", "memory", "resources"} & set(group["rayStartParams"])
        assert not (in_two_places and group.get("resources"))
        assert "labels" not in group["rayStartParams"]
    for group in ("head", "workers"):
        assert "restartPolicy" not in PODS[group]["spec"]  # the autoscaler wants its own
    assert PODS["submitter"]["spec"]["restartPolicy"] in ("Never", "OnFailure")  # a Kubernetes Job knows no other
    assert tuple(int(part) for part in CLUSTER["rayVersion"].split(".")) >= (2, 52, 0)  # for token authentication


def test_the_ray_version_is_the_pinned_one():
    assert f"ray=={CLUSTER['rayVersion']}" in (ROOT / "constraints.txt").read_text().splitlines()


def test_rays_autoscaler_finds_a_driver_on_the_head_and_gpus_from_none_up():
    cluster = {"metadata": {"name": "raycluster", "namespace": "default"}, "spec": CLUSTER}
    config = _derive_autoscaling_config_from_ray_cr(cluster)
    head, gpu = config["available_node_types"]["headgroup"], config["available_node_types"]["gpu"]
    assert head["resources"] == {"CPU": 0, "driver": 1, "memory": 8 * 2**30}
    assert gpu["resources"] == {"CPU": 4, "GPU": 1, "memory": 16 * 2**30}
    assert (gpu["min_workers"], gpu["max_workers"]) == (0, 8)
    assert config["idle_timeout_minutes"] == 5.0
    assert CLUSTER["enableInTreeAutoscaling"] is True


def test_only_the_head_has_what_the_command_asks_for():
    wanted = json.loads(SPEC["entrypointResources"])
    assert all(float(HEAD["resources"].get(name, 0)) >= amount for name, amount in wanted.items())
    assert not set(wanted) & set(WORKERS.get("resources", {}))
    assert "tolerations" not in PODS["head"]["spec"]
    assert PODS["head"]["spec"]["nodeSelector"] == PODS["submitter"]["spec"]["nodeSelector"]


def test_one_image_and_one_volume_are_the_same_everywhere():
    containers = [container for pod in PODS.values() for container in pod["spec"]["containers"]]
    assert len({container["image"] for container in containers}) == 1
    for pod in PODS.values():
        volumes = {volume["name"] for volume in pod["spec"].get("volumes", [])}
        mounts = {
            mount["name"] for container in pod["spec"]["containers"] for mount in container.get("volumeMounts", [])
        }
        assert mounts == volumes
    assert HEAD["template"]["spec"]["volumes"] == WORKERS["template"]["spec"]["volumes"]
    (mount,) = HEAD["template"]["spec"]["containers"][0]["volumeMounts"]
    shared = [ARGUMENTS[ARGUMENTS.index("--studies") + 1], *variables().values()]
    assert all(path.startswith(mount["mountPath"] + "/") for path in shared if path.startswith("/"))


def variables() -> dict[str, str]:
    return dict(yaml.safe_load(SPEC["runtimeEnvYAML"])["env_vars"])


def test_pods_outlive_a_sweep_that_is_told_to_end():
    """It has the seconds of `tune.execution.ray_tune`, and Ray's job server waits as long as the variable says."""
    waits = {}
    for name in ("head", "workers"):
        spec = PODS[name]["spec"]
        program, seconds = spec["containers"][0]["lifecycle"]["preStop"]["exec"]["command"]
        assert program == "sleep"
        waits[name] = int(seconds)
        assert waits[name] < spec["terminationGracePeriodSeconds"]
    assert 0 < _GRACE < 10 < waits["workers"]
    assert _GRACE < int(variables()["RAY_JOB_STOP_WAIT_TIME_S"]) < waits["head"]


# ----------------------------------------------------------------------------
# Who gets in


def is_open(job: Any) -> bool:
    """Whether Ray would listen to everybody without asking for a token."""
    cluster = job["spec"]["rayClusterSpec"]
    # KubeRay's own default is 0.0.0.0, and Ray's other ports listen everywhere whatever one says.
    modes = [cluster.get("authOptions", {}).get("mode", "token" if "authOptions" in cluster else "disabled")]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        for container in group["template"]["spec"]["containers"]:
            modes += [each["value"] for each in container.get("env", []) if each["name"] == "RAY_AUTH_MODE"]
    return any(mode != "token" for mode in modes)


def test_ray_listens_only_with_a_token():
    assert HEAD["rayStartParams"]["dashboard-host"] == "0.0.0.0"
    assert not is_open(JOB)
    assert is_open(changed(JOB, "spec.rayClusterSpec.authOptions", None))
    assert is_open(changed(JOB, "spec.rayClusterSpec.authOptions.mode", "disabled"))
    off = [{"name": "RAY_AUTH_MODE", "value": "disabled"}]
    assert is_open(changed(JOB, f"{POD_PATH}.containers.0.env", off))


SECRET_NAME = re.compile("TOKEN|SECRET|PASSWORD|CREDENTIAL|KEY", re.IGNORECASE)
SECRET_VALUE = re.compile(r"[0-9a-fA-F]{24}|[A-Za-z0-9+=]{32}|://[^/\s]*:[^/\s]*@")


def leaks(job: Any) -> list[str]:
    """Secrets that are written down instead of named: by the name of a variable, or by their looks."""
    given = yaml.safe_load(job["spec"]["runtimeEnvYAML"])["env_vars"]
    cluster = job["spec"]["rayClusterSpec"]
    templates = [group["template"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for template in (*templates, job["spec"]["submitterPodTemplate"]):
        for container in template["spec"]["containers"]:
            given |= {each["name"]: each["value"] for each in container.get("env", []) if "value" in each}
    return [name for name in given if SECRET_NAME.search(name)] + SECRET_VALUE.findall(json.dumps(job))


def test_the_token_comes_from_a_secret_and_is_written_nowhere():
    assert CLUSTER["authOptions"]["secretName"] == "dxmi-ray"
    assert not leaks(JOB)
    assert not SECRET_VALUE.search(MANIFEST.read_text())
    env = f"{POD_PATH}.containers.0.env"
    named = {"name": "RAY_AUTH_TOKEN", "valueFrom": {"secretKeyRef": {"name": "dxmi-ray", "key": "auth_token"}}}
    assert not leaks(changed(JOB, env, [named]))
    assert leaks(changed(JOB, env, [{"name": "RAY_AUTH_TOKEN", "value": "short"}]))
    assert leaks(changed(JOB, env, [{"name": "OTHER", "value": secrets.token_hex(32)}]))
    assert leaks(changed(JOB, "spec.runtimeEnvYAML", "env_vars: {MLFLOW_TRACKING_PASSWORD: x}"))
    assert leaks(changed(JOB, "spec.entrypoint", "dxmi sweep tracking.uri=http://me:word@mlflow:5000"))


def test_pods_meet_the_restricted_pod_security_standard():
    for pod in PODS.values():
        spec = pod["spec"]
        assert not {"hostNetwork", "hostPID", "hostIPC"} & set(spec)
        assert spec["securityContext"]["runAsNonRoot"] is True
        assert spec["securityContext"]["runAsUser"] == spec["securityContext"]["fsGroup"] == 1000
        assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
        contexts = [container["securityContext"] for container in spec["containers"]]
        for context in [*contexts, CLUSTER["autoscalerOptions"]["securityContext"]]:
            assert context == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    # The head's is KubeRay's, whose autoscaler adds pods.
    assert [PODS[name]["spec"].get("automountServiceAccountToken") for name in PODS] == [None, False, False]


def test_only_the_jobs_own_pods_and_the_operator_reach_them():
    ours = POLICY["spec"]["podSelector"]["matchLabels"]
    for pod in PODS.values():
        assert ours.items() <= pod["metadata"]["labels"].items()
    own, operator = POLICY["spec"]["ingress"]
    assert own == {"from": [{"podSelector": {"matchLabels": ours}}]}
    assert operator["ports"] == [{"protocol": "TCP", "port": 8265}]
    assert all({"namespaceSelector", "podSelector"} <= set(peer) for peer in operator["from"])
    assert POLICY["spec"]["policyTypes"] == ["Ingress"]


# ----------------------------------------------------------------------------
# The command


@pytest.fixture
def on_the_head(tmp_path, monkeypatch):
    """The job's command as it would be on a head, before there is any other node."""
    monkeypatch.setenv("RAY_ADDRESS", "auto")
    monkeypatch.setattr("tune.execution.resources.cluster_nodes", lambda: [(0, 0)])
    monkeypatch.setattr("torch.cuda.is_available", lambda: False)
    monkeypatch.setattr("tune.execution.estimate._REPEATS", 1)
    monkeypatch.setattr("tune.execution.preflight.file_system", lambda _: "nfs4")
    return [argument.replace("/shared", str(tmp_path)) for argument in ARGUMENTS]


def overrides(arguments: list[str]) -> list[str]:
    return [argument for argument in arguments[1:] if "=" in argument]


def test_the_command_composes_and_waits_for_nodes(on_the_head, capsys):
    assert SPEC["entrypoint"].splitlines() == [SPEC["entrypoint"]]
    assert not set(SPEC["entrypoint"]) & set(";&|<>$`\\\"'*?~#(){}!")  # the submitter's shell reads it
    assert shlex.split(SPEC["entrypoint"])[0] == "dxmi"
    assert main([*on_the_head, *TINY, "--dry-run"]) == 0
    said = capsys.readouterr().out
    assert missing("lr-1 … 8 at once", said) == []
    assert missing("CPU … measured … Nothing … started", said) == []  # the GPUs are to come


def test_the_same_command_goes_on_with_the_study_and_another_does_not(on_the_head):
    assert "--resume" not in on_the_head
    studies = Path(on_the_head[on_the_head.index("--studies") + 1])
    same = Sweep(*overrides(on_the_head), studies=studies)
    same.folder.path.mkdir(parents=True)
    same.folder.begin(same.plan)
    same.check()
    other = Sweep(*overrides(on_the_head), "train.iterations=999", studies=studies)
    with pytest.raises(UserError, match=stating("lr-1 … other settings")):
        other.check()


def test_as_many_trials_run_at_once_as_the_largest_cluster_holds(on_the_head):
    plan = Sweep(*overrides(on_the_head)).plan
    nodes = [(0, 0), *[(4, 1)] * WORKERS["maxReplicas"]]
    whole = share_cluster(plan.experiment.resources, None, nodes)
    assert whole.concurrent == plan.sweep.max_concurrent
    assert whole.gpu_share == 1.0


# ----------------------------------------------------------------------------
# The image

INSTRUCTIONS = ("FROM", "RUN", "WORKDIR", "COPY", "ENV", "USER")


def instructions() -> list[tuple[str, str]]:
    """The Dockerfile's (instruction, rest), lines that are continued joined."""
    lines = (ROOT / "cluster" / "Dockerfile").read_text().splitlines()
    joined = "\n".join(line for line in lines if not line.startswith("#")).replace("\\\n", " ")
    return [(line.split(maxsplit=1)[0], line.split(maxsplit=1)[1]) for line in joined.splitlines() if line.strip()]


def sources(rest: str) -> list[str]:
    return rest.split()[:-1]


def ignored() -> PathSpec[Any]:
    """.dockerignore as a matcher: a pattern of Docker's is anchored, as one of Git's with a leading slash is."""
    lines = (ROOT / ".dockerignore").read_text().splitlines()
    return PathSpec.from_lines("gitignore", [f"/{line}" for line in lines if line and not line.startswith("#")])


def test_the_dockerfile_has_known_instructions_and_ends_as_a_user_who_is_not_root():
    steps = instructions()
    assert {name for name, _ in steps} == set(INSTRUCTIONS)
    assert steps[0] == ("FROM", "python:3.11-slim-bookworm")
    user = [rest for name, rest in steps if name == "USER"][-1]
    assert user == str(PODS["head"]["spec"]["securityContext"]["runAsUser"])  # a number, see runAsNonRoot
    (made,) = re.findall(r"useradd .*--uid (\d+)", next(rest for name, rest in steps if "useradd" in rest))
    assert made == user


def test_the_base_image_has_a_python_that_the_project_takes():
    (version,) = re.findall(r"^python:(\d+\.\d+)-", instructions()[0][1])
    wanted = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["requires-python"]
    (least,) = re.findall(r"^>=(\d+\.\d+)$", wanted)
    assert tuple(map(int, version.split("."))) >= tuple(map(int, least.split(".")))


def test_no_ray_starts_in_the_image_without_a_token():
    variables = dict(pair.split("=") for name, rest in instructions() if name == "ENV" for pair in rest.split())
    assert variables["RAY_AUTH_MODE"] == "token"
    assert "RAY_AUTH_TOKEN" not in variables


def test_what_is_copied_is_there_and_not_ignored():
    copied = [source for name, rest in instructions() if name == "COPY" for source in sources(rest)]
    spec = ignored()
    for source in copied:
        assert (ROOT / source).exists()
        assert not spec.match_file(source), source
    files = [file for source in copied for file in (ROOT / source).rglob("*") if "__pycache__" not in file.parts]
    assert not [file for file in files if file.is_file() and spec.match_file(file.relative_to(ROOT).as_posix())]


def test_all_that_the_package_is_built_from_is_copied():
    tree = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wheel = tree["tool"]["hatch"]["build"]["targets"]["wheel"]
    needed = {*wheel["packages"], *wheel["force-include"], tree["project"]["readme"], *tree["project"]["license-files"]}
    copied = {source for name, rest in instructions() if name == "COPY" for source in sources(rest)}
    assert needed | {"pyproject.toml", "constraints.txt"} == copied


def as_dockers(pattern: str) -> str:
    """A pattern of .gitignore's kind as .dockerignore writes it."""
    pattern = pattern.rstrip("/")
    return pattern[1:] if pattern.startswith("/") else f"**/{pattern}"


def test_what_stays_at_home_stays_out_of_the_image():
    lines = [line for line in (ROOT / ".dockerignore").read_text().splitlines() if not line.startswith("#")]
    first = lines[: lines.index("")]
    assert first == [as_dockers(pattern) for pattern in LEFT_OUT]


@pytest.mark.parametrize(
    "path",
    [
        ".git/config", ".venv/bin/python", "runs/x/checkpoints/1", "studies/lr-1/study.yaml", "data/MNIST/raw/x",
        ".env", "configs/.env.local", ".netrc", "dxmi/server.pem", "a/b.key", "auth_token", "tune/auth_token",
        ".ray-token-41234", "credentials.json", "kubeconfig.yaml", "dxmi/__pycache__/x.pyc", ".ssh/id", ".aws/config",
    ],
)  # fmt: skip
def test_no_data_and_no_secret_gets_into_the_image(path):
    assert ignored().match_file(path)


def test_the_token_file_of_a_slurm_job_is_left_out_too():
    (name,) = re.findall(
        r'^token="\$checkout/(.+?)-\$SLURM_JOB_ID"', (ROOT / "cluster" / "slurm.sbatch").read_text(), re.M
    )
    assert ignored().match_file(f"{name}-1")
    assert PathSpec.from_lines("gitignore", LEFT_OUT).match_file(f"{name}-1")


# ----------------------------------------------------------------------------
# Run for real, as far as that goes without Kubernetes: the job on a head like the manifest's, the image's steps


def free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


def wait(condition: Callable[[], bool], seconds: float) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.2)


class Pods:
    """The head pod's Ray with the manifest's resources, and workers to add: processes on this machine's loopback."""

    def __init__(self, folder: Path) -> None:
        dashboard, self.port, self.folder = free_port(), free_port(), folder
        self.address = f"http://127.0.0.1:{dashboard}"
        token = {"RAY_AUTH_MODE": "token", "RAY_AUTH_TOKEN": secrets.token_hex(32), "RAY_USAGE_STATS_ENABLED": "0"}
        kept = {key: value for key, value in os.environ.items() if not key.startswith("RAY_")}
        path = f"{Path(sys.executable).parent}:{os.environ['PATH']}"
        self.environment = {**kept, **token, "PYTHONPATH": str(ROOT), "PATH": path}
        self.processes: list[subprocess.Popen[bytes]] = []
        amounts = {name: float(amount) for name, amount in HEAD["resources"].items()}
        cpus = int(amounts.pop("CPU"))
        self._start(
            "--head", f"--port={self.port}", f"--dashboard-port={dashboard}", "--dashboard-host=127.0.0.1",
            f"--num-cpus={cpus}", f"--resources={json.dumps(amounts)}",
        )  # fmt: skip
        wait(lambda: "Traceback" not in self.ray("job", "list"), 90)

    def add_worker(self) -> None:
        self._start(f"--address=127.0.0.1:{self.port}", "--num-cpus=2")

    def ray(self, *arguments: str) -> str:
        return self.shell(shlex.join(["ray", *arguments]))

    def shell(self, command: str) -> str:
        """What a command said, from wherever the submitter's pod is."""
        return subprocess.run(
            ["bash", "-ec", command], env={**self.environment, "RAY_ADDRESS": self.address}, cwd=self.folder,
            stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, check=False, timeout=600,
        ).stdout  # fmt: skip

    def _start(self, *arguments: str) -> None:
        ports = [f"--{name}={free_port()}" for name in ("dashboard-agent-listen-port", "dashboard-agent-grpc-port")]
        command = [str(Path(sys.executable).parent / "ray"), "start", "--block", *arguments, *ports]
        log = (self.folder / f"node-{len(self.processes)}.log").open("wb")
        self.processes.append(
            subprocess.Popen(
                command, env=self.environment, stdin=subprocess.DEVNULL, stdout=log, stderr=log, start_new_session=True
            )
        )

    def close(self) -> None:
        for process in reversed(self.processes):
            process.terminate()
            try:
                process.wait(timeout=20)
            except subprocess.TimeoutExpired:
                os.killpg(process.pid, signal.SIGKILL)


@pytest.fixture
def pods(tmp_path):
    made = Pods(tmp_path)
    try:
        yield made
    finally:
        made.close()


def submitter_command(address: str, job: str, shared: Path) -> str:
    """What KubeRay's submitter runs, of the manifest's fields, for two CPUs instead of eight GPUs."""
    smaller = {
        "/shared": str(shared), "device=cuda": "device=cpu", "threads=4": "threads=1", "concurrent=8": "concurrent=1",
        "tracking.uri=http://mlflow.mlflow.svc:5000": "tracking.uri=none",
    }  # fmt: skip
    entrypoint, runtime = SPEC["entrypoint"], json.dumps(yaml.safe_load(SPEC["runtimeEnvYAML"]))
    for old, new in smaller.items():
        assert old in entrypoint
        entrypoint, runtime = entrypoint.replace(old, new), runtime.replace(old, new)
    entrypoint += f" {' '.join(TINY)} sweep.budget.trials=2 sweep.stopping.rule=none"
    return (
        f"ray job submit --address {address} --no-wait --runtime-env-json {json.dumps(runtime)} --submission-id {job} "
        f"--entrypoint-resources {json.dumps(SPEC['entrypointResources'])} -- {entrypoint}; "
        f"ray job logs --address {address} --follow {job}"
    )


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_the_job_waits_for_a_worker_is_stopped_and_a_second_one_goes_on(pods, tmp_path):
    study = tmp_path / "shared" / "studies" / "lr-1"
    with ThreadPoolExecutor(1) as pool:
        first = pool.submit(pods.shell, submitter_command(pods.address, "first", tmp_path / "shared"))
        wait((study / "study.yaml").exists, 200)  # with no node but the head
        pods.add_worker()
        wait(lambda: any(study.glob("trials/0000/metrics.jsonl")), 200)
        pods.ray("job", "stop", "first")
        said = first.result(timeout=120)
    assert missing("lr-1 … 2 trials … 1 at once", said) == []
    assert "stopped by SIGTERM" in said
    assert "was stopped" in pods.ray("job", "status", "first")
    done = pods.shell(submitter_command(pods.address, "second", tmp_path / "shared"))
    assert missing("Resuming … lr-1", done) == [], done
    assert "succeeded" in pods.ray("job", "status", "second")
    records = Study.read(StudyFolder(study)).records()
    assert [record.state for record in records] == [TrialState.COMPLETE] * 2
    assert pods.environment["RAY_AUTH_TOKEN"] not in said + done
    pods.environment |= {"RAY_AUTH_TOKEN": secrets.token_hex(32)}
    assert "AuthenticationError" in pods.ray("job", "list")


@pytest.mark.slow
@pytest.mark.timeout(1800)
def test_the_images_steps_work_in_a_fresh_environment(tmp_path):
    """COPY and RUN in the Dockerfile's order, less the one that installs Debian's packages and makes the user."""
    image, elsewhere = tmp_path / "image", tmp_path / "elsewhere"
    elsewhere.mkdir()
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "venv"], check=True)
    programs = tmp_path / "venv" / "bin"
    kept = {key: value for key, value in os.environ.items() if not key.startswith(("RAY_", "PYTHON", "VIRTUAL_ENV"))}
    environment = {**kept, "PATH": f"{programs}:/usr/bin:/bin", "DXMI_CACHE": str(tmp_path / "cache")}
    folder, skipped, out = image, [], ignored()
    for name, rest in instructions():
        if name == "WORKDIR":
            folder = image / rest.lstrip("/")
            folder.mkdir(parents=True)
        elif name == "COPY":
            for source in sources(rest):
                copy_as_docker(source, folder / rest.split()[-1], out)
        elif name == "RUN" and "apt-get" in rest:
            skipped.append(rest)
        elif name == "RUN":
            subprocess.run(["sh", "-c", rest], cwd=folder, env=environment, check=True, timeout=1500)
    assert len(skipped) == 1

    def say(*command: str) -> str:
        return subprocess.run(
            command, cwd=elsewhere, env=environment, check=True, capture_output=True, text=True, timeout=200
        ).stdout

    assert "dxmi sweep" in say("dxmi", "--help")
    configured = yaml.safe_load(say("dxmi", "config", "experiment=digits"))
    assert configured == json.loads(json.dumps(to_tree(compose_experiment(["experiment=digits"]).experiment)))
    assert say("python", "-c", "import tune; print(tune.__file__)").startswith(str(tmp_path / "venv"))
    assert CLUSTER["rayVersion"] in say("ray", "--version")
    for command in ("start", "health-check", "kuberay-autoscaler"):  # what KubeRay runs in its containers
        say("ray", command, "--help")


def copy_as_docker(source: str, target: Path, left_out: PathSpec[Any]) -> None:
    """A file or a folder of the checkout without what .dockerignore names."""
    files = [ROOT / source] if (ROOT / source).is_file() else (ROOT / source).rglob("*")
    for file in files:
        relative = file.relative_to(ROOT)
        if file.is_file() and not left_out.match_file(relative.as_posix()):
            inside = Path(file.name) if file == ROOT / source else file.relative_to(ROOT / source)
            (target / inside).parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(file, target / inside)


@pytest.mark.slow
def test_ray_in_token_mode_does_not_start_without_a_token(tmp_path):
    environment = {"PATH": f"{Path(sys.executable).parent}:/usr/bin:/bin", "HOME": str(tmp_path)}
    for name, rest in instructions():
        if name == "ENV":
            environment |= dict(pair.split("=") for pair in rest.split())
    done = subprocess.run(
        ["ray", "start", "--head", "--num-cpus=0", f"--port={free_port()}"],
        env=environment, check=False, capture_output=True, text=True, timeout=120,
    )  # fmt: skip
    assert done.returncode != 0
    assert "no authentication token was found" in done.stderr
