"""What holds on the CPU holds on a GPU: `make test-gpu` on a machine that has one. Elsewhere all of it is skipped."""

import math
from pathlib import Path

import pytest
import torch

from dxmi.algorithms.dxmi import DxMI
from dxmi.config import build
from dxmi.data.batch import Batch
from dxmi.data.images import Images
from dxmi.diffusion.cuda_graphs import GraphedRollout
from dxmi.errors import DivergedError
from dxmi.evaluation.config import REPORT, EvaluateConfig
from dxmi.evaluation.sampling import Sampling, generate
from dxmi.metrics.gaussians import Gaussian
from dxmi.persistence import checkpoint
from dxmi.persistence.run_directory import RunDirectory
from dxmi.seeds import generator
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.progress import Phase
from dxmi.training.recording import RecordedUpdate
from dxmi.training.run import train
from support import NARROW, NETWORK_OF, TINY, changed, stacked_step, stating, step
from tune.config.compose import compose_experiment

pytestmark = pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU: make test-gpu")

NETWORK = {"kind": "mlp", "hidden": 32, "layers": 3, "embedding": 16}
SEEDS = (0, 3, 7)


def tiny(*overrides: str) -> Experiment:
    return Experiment(compose_experiment(changed([*TINY, "resources.device=cuda"], *overrides)).experiment)


def small(seed: int = 0, **resources: object) -> Experiment:
    """Networks so small that twenty iterations are told from rounding."""
    tree = {
        "seed": seed,
        "network": {"denoiser": NETWORK, "energy": NETWORK, "value": NETWORK},
        "train": {"iterations": 60, "batch_size": 24},
        "resources": {"device": "cuda", **resources},
    }
    return Experiment(build(ExperimentConfig, tree))


def on_random_pixels(event: tuple[int, ...], *overrides: str) -> Experiment:
    experiment = Experiment(
        compose_experiment(["resources.device=cuda", "pretrain.weights=null", *overrides]).experiment
    )
    pixels = torch.randint(0, 256, (64, *event), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    experiment.__dict__["data"] = Images("random", pixels, torch.zeros(64, dtype=torch.int64), "random", num_classes=10)
    return experiment


def after_iterations(made: Experiment, number: int) -> dict[str, torch.Tensor]:
    made.choose_kernels()
    dxmi, state = made.build_finetuning(made.build_denoiser())
    recorded = RecordedUpdate(dxmi, [state.generators], made.precision) if made.records(dxmi) else None
    for i in range(number):
        if recorded is not None:
            recorded(state.stream.next(), i)
        else:
            with made.precision():
                step(dxmi, state, i)
    return dict(dxmi.state_dict())


def require_close(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor], atol: float) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        torch.testing.assert_close(tensor, other[name], rtol=0.0, atol=atol, msg=lambda text, n=name: f"{n}: {text}")


def outcome(out: Path) -> tuple[bytes, bytes, str]:
    last = checkpoint.path_of(out / "checkpoints", 40)
    files = [(last / name).read_bytes() for name in ("algorithm.safetensors", "state.safetensors")]
    return files[0], files[1], (out / "metrics.jsonl").read_text()


@pytest.fixture(scope="module")
def undisturbed(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "undisturbed"
    summary = train(tiny(), out=out)
    assert summary is not None
    return out, summary


def test_the_gpus_name_stands_in_the_summary_and_every_score_is_finite(undisturbed):
    _, summary = undisturbed
    assert summary.device == torch.cuda.get_device_name()
    assert all(math.isfinite(value) for scores in summary.scores.values() for value in scores.values())


@pytest.mark.parametrize("cached", [True, False])
def test_a_run_again_is_equal_to_the_bit(undisturbed, tmp_path, monkeypatch, cached):
    """With pretraining and references read from the cache, and computed anew."""
    if not cached:
        monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))
    train(tiny(), out=tmp_path / "again")
    assert outcome(tmp_path / "again") == outcome(undisturbed[0])


@pytest.mark.parametrize("stop_at", [0, 5, 35])
def test_a_stopped_run_goes_on_to_the_same_end(undisturbed, tmp_path, stop_at):
    out = tmp_path / "run"
    assert train(tiny(), out=out, report=lambda p: p.phase is Phase.FINETUNE and p.step >= stop_at) is None
    train(tiny(), out=out)
    assert outcome(out) == outcome(undisturbed[0])


def test_stopped_pretraining_goes_on_to_the_same_end(undisturbed, tmp_path, monkeypatch):
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))
    assert train(tiny(), out=tmp_path / "run", report=lambda p: p.phase is Phase.PRETRAIN and p.step >= 30) is None
    train(tiny(), out=tmp_path / "run")
    assert outcome(tmp_path / "run") == outcome(undisturbed[0])


@pytest.mark.parametrize("name", ["unet", "ddgan", "edm_unet"])
def test_networks_of_images_take_the_same_steps_again(name):
    """Checkpoints promise the same end, which convolutions on a GPU do not unless they are told to."""
    event = (3, 64, 64) if name == "edm_unet" else (3, 32, 32)
    settings = [f"network={name}", "train.batch_size=8", *NARROW[name]]
    one, other = (after_iterations(on_random_pixels(event, *settings), 5) for _ in range(2))
    assert one.keys() == other.keys()
    assert [key for key, tensor in one.items() if not torch.equal(tensor, other[key])] == []


def test_other_kernels_may_be_asked_for():
    on_random_pixels((3, 32, 32), "network=unet", "resources.deterministic=false").choose_kernels()
    assert not torch.are_deterministic_algorithms_enabled()
    tiny().choose_kernels()
    assert torch.are_deterministic_algorithms_enabled()


@pytest.mark.parametrize("name", NETWORK_OF)
def test_every_published_experiment_takes_a_step(name):
    overrides = [f"experiment={name}", "train.batch_size=4", *NARROW[NETWORK_OF[name]]]
    made = compose_experiment(overrides).experiment
    event = {"imagenet64": (3, 64, 64), "lsun_t": (3, 256, 256)}.get(made.name[:10] if "64" in name else name[:6])
    experiment = on_random_pixels(event or (3, 32, 32), *overrides)
    experiment.choose_kernels()
    dxmi, state = experiment.build_finetuning(experiment.build_denoiser())
    with experiment.precision():
        metrics = step(dxmi, state, 0)
    assert all(torch.isfinite(value) for value in metrics.values())


def test_bfloat16_with_channels_last_goes_the_way_of_float32():
    """Five iterations: the loss of the critic within a tenth of its size, weights within the steps of Adam."""
    layout = [f"network.{part}.channels_last=true" for part in ("denoiser", "energy", "value")]
    settings = ["experiment=cifar10_small", "train.batch_size=16", "train.precision=float32"]
    plain = after_iterations(on_random_pixels((3, 32, 32), *settings), 5)
    settings[-1] = "train.precision=bfloat16"
    fast = after_iterations(on_random_pixels((3, 32, 32), *settings, *layout), 5)
    assert all(tensor.dtype == plain[name].dtype for name, tensor in fast.items())
    moved = [float((fast[name] - plain[name]).abs().max()) for name in plain if plain[name].is_floating_point()]
    assert max(moved) <= 1e-2
    assert all(bool(torch.isfinite(tensor).all()) for tensor in fast.values())


def test_a_network_that_is_not_finite_ends_the_drawing(make_policy):
    policy = make_policy(event=(1, 8, 8)).to("cuda")
    with torch.no_grad():
        next(policy.network.parameters()).flatten()[0] = math.nan
    with pytest.raises(DivergedError, match=stating("samples … iteration 7 … not finite")):
        generate(Sampling(policy, REPORT, step=7), 8, EvaluateConfig(num_samples=8, batch_size=4))


def test_a_run_whose_weights_become_infinite_is_diverged(tmp_path):
    with pytest.raises(DivergedError):
        train(tiny("algorithm.policy.lr=1e30", "algorithm.critic.lr=1e30"), out=tmp_path / "run")
    assert RunDirectory(tmp_path / "run").rows()
    assert not (tmp_path / "run" / "summary.json").exists()


def test_the_frechet_distance_is_the_same_on_both_devices():
    features = torch.randn(900, 64, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    halves = features[:600], 1.5 * features[600:] + 1.0
    found = [Gaussian.of(halves[0].to(device)).distance(halves[1].to(device)) for device in ("cuda", "cpu")]
    assert found[0] == pytest.approx(found[1], rel=1e-9)


@pytest.mark.parametrize("devices", [("cuda", "cpu"), ("cpu", "cuda")])
def test_a_run_goes_on_on_the_other_kind_of_device(tmp_path, devices):
    """What a cluster has begun, a laptop may continue: with other noise, which is said, and to the end."""
    first, second = (tiny(f"resources.device={device}", "seed=11") for device in devices)
    out, notes = tmp_path / "run", []
    assert train(first, out=out, report=lambda p: p.phase is Phase.FINETUNE and p.step >= 20) is None
    summary = train(second, out=out, report=lambda p: notes.append(p.note))
    assert summary is not None
    assert summary.last["step"] == 40
    assert any("another kind of device" in note for note in notes)


def test_streams_are_their_own_and_the_same_again():
    names = [f"stream {number}" for number in range(200)]
    draws = [torch.randn(4, device="cuda", generator=generator(0, name, "cuda")).tolist() for name in names]
    assert len({tuple(draw) for draw in draws}) == 200
    assert draws[7] == torch.randn(4, device="cuda", generator=generator(0, names[7], "cuda")).tolist()


def test_a_member_of_a_stack_equals_the_solo_run():
    members, states = zip(*(made.build_finetuning(made.build_denoiser()) for made in map(small, SEEDS)), strict=True)
    stack = DxMI.stacked(list(members))
    for i in range(20):
        stacked_step(stack, list(states), i)
    for member, seed in zip(members, SEEDS, strict=True):
        require_close(after_iterations(small(seed), 20), dict(member.state_dict()), atol=1e-4)


HORIZONS = (["algorithm.policy_horizon=1", "algorithm.value_updates=1"], ["algorithm.policy_horizon=null"])


@pytest.mark.parametrize("horizon", HORIZONS)
@pytest.mark.parametrize("precision", ["float32", "bfloat16"])
def test_recorded_iterations_of_images_are_the_iterations(horizon, precision):
    """Up to rounding, since a recording computes all states in one batch; a step of Adam is at most its rate."""
    settings = ["experiment=cifar10_small", "train.batch_size=16", f"train.precision={precision}", *horizon]
    plain = after_iterations(on_random_pixels((3, 32, 32), *settings), 8)
    fast = after_iterations(on_random_pixels((3, 32, 32), *settings, "resources.cuda_graphs=true"), 8)
    require_close(fast, plain, atol=2e-3)


def test_recorded_iterations_are_the_same_again_and_from_a_checkpoint_on(tmp_path, monkeypatch):
    """Also if the recording starts at another iteration."""
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "cache"))
    train(tiny("resources.cuda_graphs=true"), out=tmp_path / "whole")
    monkeypatch.setenv("DXMI_CACHE", str(tmp_path / "another cache"))
    out = tmp_path / "stopped"
    for phase, stop_at in ((Phase.PRETRAIN, 30), (Phase.FINETUNE, 20)):
        assert train(tiny("resources.cuda_graphs=true"), out=out, report=stop_in(phase, stop_at)) is None
    train(tiny("resources.cuda_graphs=true"), out=out)
    assert outcome(out) == outcome(tmp_path / "whole")


def stop_in(phase, step_number):
    return lambda progress: progress.phase is phase and progress.step >= step_number


def test_recorded_stacked_seeds_are_the_solo_runs():
    made = [small(seed, cuda_graphs=True) for seed in SEEDS]
    members, states = zip(*(one.build_finetuning(one.build_denoiser()) for one in made), strict=True)
    stack = DxMI.stacked(list(members))
    recorded = RecordedUpdate(stack, [state.generators for state in states], made[0].precision)
    for i in range(20):
        recorded(Batch.stacked([state.stream.next() for state in states]), i)
    for member, seed in zip(members, SEEDS, strict=True):
        require_close(after_iterations(small(seed), 20), dict(member.state_dict()), atol=1e-4)


def test_a_recorded_rollout_is_the_rollout_with_the_present_weights():
    made = small()
    dxmi, state = made.build_finetuning(made.build_denoiser())
    recorded = GraphedRollout(dxmi.policy)
    for i in range(3):
        noise = dxmi.policy.noise(24, state.generators["noise"])
        expected, replayed = dxmi.policy.rollout(noise), recorded(noise)
        for name in ("x", "mean", "sigma"):
            torch.testing.assert_close(getattr(replayed, name), getattr(expected, name))
        step(dxmi, state, i)


@pytest.mark.parametrize("fast", [{"cuda_graphs": True}, {"compile": True}])
def test_a_run_made_faster_is_the_same_run(fast):
    require_close(after_iterations(small(**fast), 20), after_iterations(small(), 20), atol=1e-5)
