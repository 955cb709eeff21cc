"""Rewards against values computed by hand, and a server that misbehaves."""

import base64
import io
import json
import sys
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch import Tensor

from dxmi.config import build
from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.errors import UserError
from dxmi.persistence.run_directory import RunDirectory
from dxmi.rewards.base import Reward, differentiable
from dxmi.rewards.files import reward_signature
from dxmi.rewards.registry import REWARDS
from dxmi.tensors import decode
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.loading import load_run
from dxmi.training.run import train
from dxmi.training.schema import config_tree, read_config
from support import stating


def reward(kind: str, **settings: Any) -> Reward:
    return REWARDS.build(REWARDS.config(kind, **settings))


def drawing(*rows: str) -> Tensor:
    """An image of one channel in [-1, 1]: # is bright."""
    return torch.tensor([[[[1.0 if mark == "#" else -1.0 for mark in row] for row in rows]]])


def test_ink_is_the_mean_brightness():
    images = torch.cat(
        (
            drawing("....", "...."),
            drawing("##..", "...."),
            drawing("####", "####"),
            3.0 * drawing("#.", "#.").repeat(1, 1, 1, 2),
        )
    )
    torch.testing.assert_close(reward("ink")(images, UNCONDITIONAL), torch.tensor([0.0, 0.25, 1.0, 0.5]))


def test_symmetry_compares_an_image_with_its_mirror_image():
    images = torch.cat((drawing("#..#", ".##."), drawing("##..", "....")))
    torch.testing.assert_close(reward("symmetry")(images, UNCONDITIONAL), torch.tensor([0.0, -0.5]))
    found = reward("symmetry", axis="horizontal")(images, UNCONDITIONAL)
    torch.testing.assert_close(found, torch.tensor([-1.0, -0.5]))


def test_the_width_of_a_long_stroke_is_its_width():
    for width in (1, 3):
        image = torch.full((1, 1, 40, 200), -1.0)
        image[0, 0, 10 : 10 + width] = 1.0
        exact = 2 * 200 * width / (2 * 200 + 2 * width)
        assert float(reward("stroke_width")(image, UNCONDITIONAL)) == pytest.approx(exact)
    assert float(reward("stroke_width")(drawing("...", "..."), UNCONDITIONAL)) == 0.0


@pytest.mark.parametrize("channels", [1, 3])
def test_the_size_as_jpeg_is_that_of_pillow(channels):
    draws = torch.Generator().manual_seed(0)
    noise = torch.randint(256, (2, channels, 32, 32), generator=draws, dtype=torch.uint8)
    images = torch.cat((noise.float() / 127.5 - 1.0, torch.full((1, channels, 32, 32), -1.0)))

    def size(image: Tensor) -> int:
        buffer = io.BytesIO()
        array = image.permute(1, 2, 0).numpy() if channels == 3 else image[0].numpy()
        Image.fromarray(array).save(buffer, "JPEG", quality=95)
        return len(buffer.getvalue())

    blank = size(torch.zeros(channels, 32, 32, dtype=torch.uint8))
    expected = torch.tensor([*((size(image) - blank) / 1000.0 for image in noise), 0.0])
    torch.testing.assert_close(reward("jpeg")(images, UNCONDITIONAL), -expected)
    torch.testing.assert_close(reward("jpeg", goal="incompressible")(images, UNCONDITIONAL), expected)


def test_the_differentiable_classifier_agrees_with_the_one_on_rounded_pixels():
    """On whole pixels both are the same, and the gradient is that of finite differences."""
    images = torch.randint(256, (8, 1, 8, 8), generator=torch.Generator().manual_seed(1)).float() / 127.5 - 1.0
    labels = Condition(torch.arange(8))
    classifier = reward("classifier")
    smooth = differentiable(classifier)
    torch.testing.assert_close(smooth(images, labels), classifier(images, labels), rtol=1e-4, atol=1e-4)
    x = (0.9 * images).requires_grad_()
    (gradient,) = torch.autograd.grad(smooth(x, labels).sum(), x)
    direction = torch.randn(x.shape, generator=torch.Generator().manual_seed(2))
    ends = [smooth(x.detach() + step * direction, labels) for step in (-1e-3, 1e-3)]
    slope = (ends[1] - ends[0]) / 2e-3
    torch.testing.assert_close((gradient * direction).sum((1, 2, 3)), slope, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("kind", ["ink", "symmetry", "stroke_width", "jpeg"])
def test_rewards_of_images_refuse_points(kind):
    with pytest.raises(UserError, match=kind):
        reward(kind)(torch.zeros(3, 2), UNCONDITIONAL)


@pytest.mark.parametrize(
    ("settings", "path"),
    [
        ({"kind": "symmetry", "axis": "diagonal"}, "reward.axis"),
        ({"kind": "stroke_width", "threshold": 1.0}, "reward.threshold"),
        ({"kind": "jpeg", "quality": 0}, "reward.quality"),
        ({"kind": "jpeg", "goal": "pretty"}, "reward.goal"),
        ({"kind": "http", "url": "http://example.org/rewards"}, "reward.url"),
        ({"kind": "energy", "run": ""}, "reward.run"),
        ({"kind": "function", "function": "os.system"}, "reward.function"),
        ({"kind": "sum", "parts": ["sum"]}, "reward.parts"),
        ({"kind": "sum", "parts": ["ink", "symmetry"], "weights": [1.0]}, "reward.weights"),
        ({"kind": "http", "url": "http://127.0.0.1:port/"}, "reward.url"),
        ({"kind": "http", "url": "http://[::1/"}, "reward.url"),
        ({"kind": "http", "url": "http://127.0.0.1:1/", "timeout": 0.0}, "reward.timeout"),
        ({"kind": "function", "function": "a.:b"}, "reward.function"),
    ],
)
def test_wrong_settings_are_named(settings, path):
    with pytest.raises(UserError, match=path):
        build(ExperimentConfig, {"reward": settings})


class Server(HTTPServer):
    """Answers each request with the next of `answers`: a status and a body, or the mean of each sample."""

    answers: list[tuple[int, bytes]]
    requests: list[dict[str, Any]]


class Handler(BaseHTTPRequestHandler):
    server: Server

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        self.server.requests.append(body)
        samples = np.frombuffer(base64.b64decode(body["samples"]), "<f4").reshape(body["shape"])
        means = samples.reshape(len(samples), -1).mean(1).tolist()
        status, answer = (
            self.server.answers.pop(0) if self.server.answers else (200, json.dumps({"rewards": means}).encode())
        )
        self.send_response(status)
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None:
        """Nothing is printed."""


@pytest.fixture
def server(monkeypatch: pytest.MonkeyPatch) -> Iterator[Server]:
    monkeypatch.setattr("dxmi.rewards.http._PAUSE", 0.0)
    made = Server(("127.0.0.1", 0), Handler)
    made.answers, made.requests = [], []
    thread = threading.Thread(target=made.serve_forever)
    thread.start()
    yield made
    made.shutdown()
    thread.join()
    made.server_close()


def over_http(server: Server, **settings: Any) -> Reward:
    return reward("http", url=f"http://127.0.0.1:{server.server_port}/r", **settings)


def test_rewards_over_http_come_in_batches_and_in_order(server):
    x = torch.randn(10, 1, 2, 2, generator=torch.Generator().manual_seed(0))
    labels = Condition(torch.arange(10))
    torch.testing.assert_close(over_http(server, batch_size=4)(x, labels), x.mean((1, 2, 3)))
    assert [request["labels"] for request in server.requests] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9]]


def test_failed_requests_are_repeated(server):
    server.answers = [(500, b""), (503, b"")]
    found = over_http(server, retries=2)(torch.zeros(2, 3), UNCONDITIONAL)
    torch.testing.assert_close(found, torch.zeros(2))
    assert len(server.requests) == 3
    server.answers = [(404, b"")]
    with pytest.raises(UserError, match="status 404"):
        over_http(server)(torch.zeros(2, 3), UNCONDITIONAL)
    server.answers = [(500, b"")] * 2
    with pytest.raises(UserError, match="did not answer"):
        over_http(server, retries=1)(torch.zeros(2, 3), UNCONDITIONAL)


@pytest.mark.parametrize(
    "body", [b"<html>", b"{}", b'{"rewards": [1.0]}', b'{"rewards": [1.0, NaN]}', b'{"rewards": "ab"}']
)
def test_an_invalid_answer_is_refused(server, body):
    server.answers = [(200, body)]
    with pytest.raises(UserError, match="answered"):
        over_http(server)(torch.zeros(2, 3), UNCONDITIONAL)


def test_a_server_that_is_not_there_is_named():
    with pytest.raises(UserError, match=r"127\.0\.0\.1:9"):
        reward("http", url="http://127.0.0.1:9/", retries=0, timeout=2.0)(torch.zeros(1, 2), UNCONDITIONAL)


# ----------------------------------------------------------------------------
# Rewards that need more than their settings.


def experiment(**reward_settings: Any) -> Experiment:
    tree = {"network": {"denoiser": {"classes": 10}}, "algorithm": {"kind": "ppo"}, "reward": reward_settings}
    return Experiment(build(ExperimentConfig, tree))


def test_a_sum_adds_parts_that_are_standardized_on_the_training_data():
    made = experiment(kind="sum", parts=["ink", {"kind": "classifier"}], weights=[2.0, -0.5])
    x, labels = decode(made.data.stored[:1000]), Condition(made.data.classes[:1000])
    parts = [reward("ink")(x, labels).double(), reward("classifier")(x, labels).double()]
    samples, condition = decode(made.data.stored[1000:1040]), Condition(made.data.classes[1000:1040])
    own = [reward(kind)(samples, condition).double() for kind in ("ink", "classifier")]
    expected = sum(w * (r - p.mean()) / p.std(correction=0) for w, r, p in zip((2.0, -0.5), own, parts, strict=True))
    found = made.build_reward()(samples, condition)
    torch.testing.assert_close(found.double(), expected, rtol=1e-4, atol=1e-4)
    smooth = differentiable(made.build_reward())(samples, condition)
    torch.testing.assert_close(smooth, found, rtol=1e-3, atol=1e-3)


def test_a_sum_needs_parts():
    with pytest.raises(UserError, match=r"reward\.parts"):
        experiment(kind="sum").build_reward()


def test_a_part_that_is_the_same_for_all_data_is_refused():
    with pytest.raises(UserError, match="cannot be standardized"):
        experiment(kind="sum", parts=[{"kind": "quadratic", "scale": 1e30}]).build_reward()


def test_a_redirect_is_not_followed(server):
    server.answers = [(302, b"")]
    with pytest.raises(UserError, match="status 302"):
        over_http(server)(torch.zeros(2, 3), UNCONDITIONAL)


def test_no_file_gives_the_permission_to_execute_code(tmp_path):
    tree = {"algorithm": {"kind": "ppo"}, "reward": {"kind": "ink"}, "resources": {"allow_code": True}}
    config = build(ExperimentConfig, tree)
    assert "allow_code" not in config_tree(config)["resources"]
    assert not read_config({**config_tree(config), "resources": {"allow_code": True}}).config.resources.allow_code


FUNCTION = """
import torch

def brightest(x, labels):
    return x.flatten(1).amax(1) + labels

def wrong(x, labels):
    return x

value = 3
"""


def test_a_function_is_executed_only_if_that_is_allowed(tmp_path, monkeypatch):
    (tmp_path / "my_rewards_of_this_test.py").write_text(FUNCTION)
    monkeypatch.chdir(tmp_path)
    settings = {"kind": "function", "function": "my_rewards_of_this_test:brightest"}
    with pytest.raises(UserError, match=r"resources\.allow_code"):
        experiment(**settings).build_reward()
    assert "my_rewards_of_this_test" not in sys.modules
    found = allowed(**settings)(torch.zeros(3, 1, 8, 8), Condition(torch.arange(3)))
    torch.testing.assert_close(found, torch.tensor([0.0, 1.0, 2.0]))
    with pytest.raises(UserError, match="must return a tensor"):
        allowed(kind="function", function="my_rewards_of_this_test:wrong")(torch.zeros(3, 1, 8, 8), UNCONDITIONAL)
    for name in ("missing", "value"):
        with pytest.raises(UserError, match=f"no function {name}"):
            allowed(kind="function", function=f"my_rewards_of_this_test:{name}")
    for module in ("os", "not_there"):
        with pytest.raises(UserError, match="there is no file"):
            allowed(kind="function", function=f"{module}:system")


def allowed(**settings: Any) -> Reward:
    tree = {"algorithm": {"kind": "ppo"}, "reward": settings, "resources": {"allow_code": True}}
    return Experiment(build(ExperimentConfig, tree)).build_reward()


def test_an_energy_that_is_not_there_is_named(tmp_path):
    with pytest.raises(UserError, match="is not a run folder"):
        experiment(kind="energy", run=str(tmp_path / "nothing")).build_reward()


def test_the_energy_of_a_finished_run_is_a_reward(tmp_path):
    small = {"kind": "mlp", "hidden": 16, "layers": 3, "embedding": 8}
    tree = {
        "network": {"denoiser": small, "energy": small, "value": small},
        "pretrain": {"iterations": 0},
        "schedule": {"num_steps": 2},
        "train": {"iterations": 2, "batch_size": 8},
        "evaluate": {"num_samples": 8, "batch_size": 8, "full_reference": False, "grid": 4},
    }
    train(Experiment(build(ExperimentConfig, tree)), out=tmp_path / "run")
    made = experiment(kind="energy", run=str(tmp_path / "run")).build_reward()
    x = torch.randn(5, 1, 8, 8, generator=torch.Generator().manual_seed(0)).requires_grad_()
    loaded = load_run(
        RunDirectory(tmp_path / "run"), read_config((RunDirectory(tmp_path / "run")).read_config()), "best"
    )
    assert loaded.algorithm.energy is not None
    torch.testing.assert_close(made(x, UNCONDITIONAL), -loaded.algorithm.energy(x).detach())
    (gradient,) = torch.autograd.grad(differentiable(made)(x, UNCONDITIONAL).sum(), x)
    assert float(gradient.abs().sum()) > 0.0


@pytest.mark.parametrize(
    ("code", "facts"),
    [
        ("def reward(x):\n    return x", "mine.py:4 … TypeError"),
        ("def reward(x, labels):\n    return x.nothing", "mine.py:2 … AttributeError"),
        ("def reward(x, labels)\n    return x", "mine.py:1 … SyntaxError"),
        ("import nothing_at_all", "mine.py:1 … ModuleNotFoundError"),
        ("def reward(x, labels):\n    return x.flatten(1).mean(1) * float('nan')", "first training sample is nan"),
    ],
)
def test_an_error_in_a_function_is_named_with_its_line(tmp_path, monkeypatch, code, facts):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "mine.py").write_text(code)
    tree = {
        "algorithm": "ppo",
        "reward": {"kind": "function", "function": "mine:reward"},
        "resources": {"allow_code": True, "device": "cpu"},
    }
    with pytest.raises(UserError, match=stating(facts.replace("mine.py:4 … ", ""))):
        Experiment(build(ExperimentConfig, tree)).check()


def random_resnet(blocks: int) -> dict[str, Tensor]:
    """Tensors of a ResNet for CIFAR-10 under the names of public files, with statistics that matter."""
    generator = torch.Generator().manual_seed(0)
    state: dict[str, Tensor] = {}

    def conv(name: str, outputs: int, inputs: int, size: int) -> None:
        state[f"{name}.weight"] = torch.randn(outputs, inputs, size, size, generator=generator) / (3 * inputs**0.5)

    def norm(name: str, width: int) -> None:
        for part in ("weight", "bias", "running_mean"):
            state[f"{name}.{part}"] = torch.randn(width, generator=generator)
        state[f"{name}.running_var"] = torch.rand(width, generator=generator) + 0.5
        state[f"{name}.num_batches_tracked"] = torch.tensor(7)

    conv("conv1", 16, 3, 3)
    norm("bn1", 16)
    for stage, (inputs, width) in enumerate(((16, 16), (16, 32), (32, 64)), start=1):
        for block in range(blocks):
            name, seen = f"layer{stage}.{block}", width if block else inputs
            conv(f"{name}.conv1", width, seen, 3)
            conv(f"{name}.conv2", width, width, 3)
            for number in (1, 2):
                norm(f"{name}.bn{number}", width)
            if seen != width:
                conv(f"{name}.shortcut.0", width, seen, 1)
                norm(f"{name}.shortcut.1", width)
    state["linear.weight"] = torch.randn(10, 64, generator=generator)
    state["linear.bias"] = torch.randn(10, generator=generator)
    return state


def resnet_logits(state: dict[str, Tensor], pixels: Tensor, blocks: int) -> Tensor:
    """The network by the formulas of arXiv 1512.03385, in float64."""
    state = {name: value.double() for name, value in state.items()}

    def conv(name: str, x: Tensor, stride: int = 1) -> Tensor:
        weight = state[f"{name}.weight"]
        return torch.nn.functional.conv2d(x, weight, stride=stride, padding=weight.shape[-1] // 2)

    def norm(name: str, x: Tensor) -> Tensor:
        mean, var, scale, shift = (
            state[f"{name}.{part}"][:, None, None] for part in ("running_mean", "running_var", "weight", "bias")
        )
        return (x - mean) / (var + 1e-5).sqrt() * scale + shift

    h = norm("bn1", conv("conv1", pixels.double() / 255.0)).relu()
    for stage in (1, 2, 3):
        for block in range(blocks):
            name, stride = f"layer{stage}.{block}", 2 if stage > 1 and block == 0 else 1
            skip = norm(f"{name}.shortcut.1", conv(f"{name}.shortcut.0", h, stride)) if stride == 2 else h
            h = norm(f"{name}.bn1", conv(f"{name}.conv1", h, stride)).relu()
            h = (norm(f"{name}.bn2", conv(f"{name}.conv2", h)) + skip).relu()
    return h.mean((2, 3)) @ state["linear.weight"].T + state["linear.bias"]


@pytest.mark.parametrize("blocks", [1, 2])
def test_a_resnet_for_cifar_is_that_of_its_paper(tmp_path, blocks):
    state, labels = random_resnet(blocks), torch.tensor([3, 0, 9])
    torch.save(state, tmp_path / "resnet.pth")
    pixels = torch.randint(256, (3, 3, 32, 32), generator=torch.Generator().manual_seed(1))
    expected = resnet_logits(state, pixels, blocks).log_softmax(1).gather(1, labels[:, None])[:, 0]
    found = reward("cifar_resnet", file=str(tmp_path / "resnet.pth"))
    x = decode(pixels.to(torch.uint8))
    torch.testing.assert_close(found(x, Condition(labels)).double(), expected, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close(differentiable(found)(x, Condition(labels)).double(), expected, rtol=1e-4, atol=1e-4)


def test_the_file_of_a_resnet_is_named_if_it_cannot_be_used(tmp_path):
    with pytest.raises(UserError, match=stating("reward.file … nothing.pth … no file")):
        reward("cifar_resnet", file=str(tmp_path / "nothing.pth"))
    torch.save({"weight": torch.zeros(3)}, tmp_path / "other.pth")
    with pytest.raises(UserError, match=stating("other.pth … ResNet … layer1")):
        reward("cifar_resnet", file=str(tmp_path / "other.pth"))
    torch.save({**random_resnet(1), "linear.weight": torch.zeros(2, 64)}, tmp_path / "small.pth")
    with pytest.raises(UserError, match=stating("small.pth … ResNet")):
        reward("cifar_resnet", file=str(tmp_path / "small.pth"))


def test_the_signature_of_a_reward_is_that_of_its_files(tmp_path, monkeypatch):
    """So that a finished run says that its reward has changed."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("DXMI_DATA", str(tmp_path / "data"))
    (tmp_path / "data").mkdir()
    torch.save(random_resnet(1), tmp_path / "data" / "net.pth")
    (tmp_path / "mine.py").write_text("def reward(x, labels):\n    return x.flatten(1).mean(1)\n")
    function = REWARDS.config("function", function="mine:reward")
    network = REWARDS.config("cifar_resnet", file="net.pth")
    together = REWARDS.config("sum", parts=(function, network, REWARDS.config("ink")))
    before = [reward_signature(config) for config in (function, network, together)]
    assert len(set(before)) == 3
    assert reward_signature(REWARDS.config("ink")) is None
    (tmp_path / "mine.py").write_text("def reward(x, labels):\n    return x.flatten(1).mean(1) + 1.0\n")
    after = [reward_signature(config) for config in (function, network, together)]
    assert [one == other for one, other in zip(before, after, strict=True)] == [False, True, False]
    with pytest.raises(UserError, match=stating("reward.function is other:reward … other.py")):
        reward_signature(REWARDS.config("function", function="other:reward"))
