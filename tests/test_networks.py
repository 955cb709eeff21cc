"""The networks against a second implementation in NumPy, their initialisation, and pixels as numbers."""

import math
from collections.abc import Callable
from dataclasses import replace

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from dxmi.networks.base import SinusoidalEmbedding
from dxmi.networks.configs import MlpConfig
from dxmi.networks.registry import build_critic, build_denoiser, build_timed_critic
from dxmi.tensors import event_mean, event_sum, from_uint8, per_sample, to_uint8

CONFIG = MlpConfig(hidden=24, layers=4, embedding=10)
EVENT = (1, 2, 3)
BUILDERS: dict[str, Callable[..., nn.Module]] = {
    "denoiser": build_denoiser,
    "critic": build_critic,
    "timed critic": build_timed_critic,
}


def normal(*shape: int) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(1))


def build(kind: str, config: MlpConfig = CONFIG, seed: int = 0) -> nn.Module:
    return BUILDERS[kind](config, EVENT, torch.Generator().manual_seed(seed))


# ----------------------------------------------------------------------------
# A second implementation.


def sinusoids(steps: np.ndarray, dim: int) -> np.ndarray:
    """sin and cos of k / 10000^(2i / dim), sines first."""
    angle = np.array([[k / 10_000 ** (2 * i / dim) for i in range(dim // 2)] for k in steps])
    return np.concatenate([np.sin(angle), np.cos(angle)], axis=1)


def numpy_mlp(network: nn.Module, x: np.ndarray, steps: np.ndarray | None) -> np.ndarray:
    """Linear layers and SiLU in float64, the embedding *concatenated* to the input of the first."""
    weights = {name: p.detach().double().numpy() for name, p in network.named_parameters()}
    h, first = x.reshape(len(x), -1), weights["body.layers.0.weight"]
    if steps is not None:
        h = np.concatenate([h, sinusoids(steps, CONFIG.embedding)], axis=1)
        first = np.concatenate([first, weights["steps.linear.weight"]], axis=1)
    h = h @ first.T + weights["body.layers.0.bias"]
    for layer in range(1, CONFIG.layers):
        h = h / (1.0 + np.exp(-h))
        h = h @ weights[f"body.layers.{layer}.weight"].T + weights[f"body.layers.{layer}.bias"]
    return h


@pytest.mark.parametrize("batch_size", [1, 5])
def test_networks_equal_numpy_with_a_concatenated_embedding(batch_size):
    """A projected embedding that is added equals one that is concatenated, with the weight matrix split in two."""
    x, steps = normal(batch_size, *EVENT), torch.tensor([0.0, 3.0, 120.5, 640.0, 999.0][:batch_size])
    x64, steps64 = x.double().numpy(), steps.double().numpy()
    denoiser, critic, timed = (build(kind) for kind in BUILDERS)
    with torch.no_grad():
        noise, score = denoiser(x, denoiser.embed(steps)), critic(x)
        timed_score = timed(x, timed.embed(steps))
    assert (noise.shape, score.shape, timed_score.shape) == (x.shape, (batch_size,), (batch_size,))
    np.testing.assert_allclose(noise.numpy(), numpy_mlp(denoiser, x64, steps64).reshape(x.shape), atol=1e-6)
    np.testing.assert_allclose(score.numpy(), numpy_mlp(critic, x64, None)[:, 0], atol=1e-6)
    np.testing.assert_allclose(timed_score.numpy(), numpy_mlp(timed, x64, steps64)[:, 0], atol=1e-6)


@pytest.mark.parametrize("kind", ["denoiser", "timed critic"])
def test_one_embedding_serves_a_batch(kind):
    network, x = build(kind), normal(5, *EVENT)
    one = network.embed(torch.tensor([7.0]))
    torch.testing.assert_close(network(x, one), network(x, one.expand(5, -1)), rtol=1e-6, atol=1e-6)


@pytest.mark.parametrize("kind", ["denoiser", "timed critic"])
def test_the_step_matters(kind):
    network, x = build(kind), normal(5, *EVENT)
    early, late = (network(x, network.embed(torch.tensor([k]))) for k in (1, 2))
    assert not torch.isclose(early, late, rtol=1e-4, atol=1e-4).all()


def test_sinusoids_have_frequencies_from_one_down_to_a_ten_thousandth():
    steps = torch.tensor([0.0, 1.0, 2.5, 10.0])
    values = SinusoidalEmbedding(8)(steps)
    np.testing.assert_allclose(values.numpy(), sinusoids(steps.numpy().astype(float), 8), atol=1e-6)
    assert values[0].tolist() == [0.0] * 4 + [1.0] * 4
    # Frequencies 1, 1/10, 1/100, 1/1000.
    by_hand = [math.sin(1.0), math.sin(0.1), math.sin(0.01), math.sin(0.001)]
    assert values[1, :4].tolist() == pytest.approx(by_hand, rel=1e-6)


def test_whole_and_fractional_steps_are_embedded_alike():
    embedding = SinusoidalEmbedding(8)
    assert torch.equal(embedding(torch.tensor([3, 999])), embedding(torch.tensor([3.0, 999.0])))
    half = embedding(torch.tensor([3.0, 3.5, 4.0]))[:, -1]
    assert half[0] > half[1] > half[2]


# ----------------------------------------------------------------------------
# Initialisation.


@pytest.mark.parametrize("kind", BUILDERS)
def test_initial_weights_come_from_the_generator_alone(kind):
    before = torch.get_rng_state()
    torch.manual_seed(1)
    first = build(kind)
    torch.manual_seed(2)
    global_state = torch.get_rng_state()
    second, other = build(kind), build(kind, seed=3)
    assert torch.equal(torch.get_rng_state(), global_state)
    torch.set_rng_state(before)
    pairs = list(zip(first.parameters(), second.parameters(), other.parameters(), strict=True))
    assert all(torch.equal(a, b) and not torch.equal(a, c) for a, b, c in pairs)


@pytest.mark.parametrize("kind", BUILDERS)
def test_initial_weights_are_uniform_within_one_over_root_inputs(kind):
    network = build(kind, MlpConfig(hidden=300, layers=3, embedding=10))
    for layer in network.modules():
        if isinstance(layer, nn.Linear):
            bound = 1.0 / math.sqrt(layer.in_features)
            assert all(p.abs().max().item() <= bound for p in layer.parameters())
            n = layer.weight.numel()  # variance of a uniform square: bound^4 (1/5 - 1/9)
            variance, error = bound**2 / 3.0, 4.0 * bound**2 * math.sqrt((1 / 5 - 1 / 9) / n)
            assert layer.weight.square().mean().item() == pytest.approx(variance, abs=error)


@pytest.mark.parametrize("kind", BUILDERS)
def test_first_gain_multiplies_the_first_layers_initial_weights_alone(kind):
    base = MlpConfig(hidden=9, layers=4, embedding=6)
    plain, gained = (dict(build(kind, config).named_parameters()) for config in (base, replace(base, first_gain=4.0)))
    factors = {"body.layers.0.weight": 4.0, "body.layers.0.bias": 4.0}
    for name, parameter in plain.items():
        assert torch.equal(gained[name], factors.get(name, 1.0) * parameter)  # 4 is exact in binary


@pytest.mark.parametrize("layers", [2, 3, 6])
def test_layers_counts_the_output_layer(layers):
    network = build("critic", MlpConfig(hidden=7, layers=layers, embedding=4))
    shapes = [tuple(layer.weight.shape) for layer in network.modules() if isinstance(layer, nn.Linear)]
    assert shapes == [(7, 6), *[(7, 7)] * (layers - 2), (1, 7)]


@pytest.mark.parametrize(
    "setting", [{"hidden": 0}, {"layers": 1}, {"embedding": 0}, {"embedding": 7}, {"first_gain": 0.0}], ids=str
)
def test_a_bad_setting_is_refused_by_name(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name} is "):
        MlpConfig(**setting)


# ----------------------------------------------------------------------------
# Tensors.


def test_all_256_pixel_values_survive_the_way_to_floats_and_back():
    pixels = torch.arange(256).to(torch.uint8).view(4, 1, 8, 8)
    x = from_uint8(pixels)
    assert x.dtype == torch.float32
    np.testing.assert_allclose(x.double().numpy(), pixels.double().numpy() / 127.5 - 1.0, atol=1e-7)
    assert (float(x.min()), float(x.max())) == (-1.0, 1.0)
    assert torch.equal(to_uint8(x), pixels)


def test_floats_beyond_black_and_white_are_clipped():
    x = torch.tensor([-float("inf"), -7.0, -1.001, 1.001, 7.0, float("inf")])
    assert to_uint8(x).tolist() == [0, 0, 0, 255, 255, 255]


def test_floats_between_two_pixels_go_to_the_nearest():
    x = torch.tensor([100.4, 100.6]) / 127.5 - 1.0
    assert to_uint8(x).tolist() == [100, 101]


def test_conversion_leaves_its_input_alone():
    pixels, x = torch.tensor([0, 255], dtype=torch.uint8), torch.tensor([-2.0, 0.3])
    from_uint8(pixels), to_uint8(x)
    assert pixels.tolist() == [0, 255]
    assert x.tolist() == pytest.approx([-2.0, 0.3])


def test_event_sums_and_means_keep_the_batch():
    x = normal(2, 3, 4)
    torch.testing.assert_close(event_sum(x), torch.stack([x[0].sum(), x[1].sum()]))
    torch.testing.assert_close(event_mean(x), torch.stack([x[0].sum(), x[1].sum()]) / 12)
    scaled = per_sample(torch.tensor([2.0, 3.0]), x) * x
    torch.testing.assert_close(scaled, torch.stack([2.0 * x[0], 3.0 * x[1]]))
