"""The energies of images: against a second implementation, and what their options promise."""

import dataclasses

import pytest
import torch
from public import Public
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap
from torch.nn import functional as F

from dxmi.errors import UserError
from dxmi.networks.configs import IgebmConfig, MlpConfig, NetworkConfig, WideResNetConfig
from dxmi.networks.layers import spectral
from dxmi.networks.pretrained.layouts import load_public
from dxmi.networks.registry import build_critic, build_timed_critic
from support import stating

EVENT = (3, 16, 16)
SMALL: list[NetworkConfig] = [IgebmConfig(channels=8, embedding=6), WideResNetConfig(depth=10, width=1, embedding=6)]
LABELS = torch.tensor([3, 0, 3])


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def critic(config: NetworkConfig, event: tuple[int, ...] = EVENT, seed: int = 0) -> nn.Module:
    return build_critic(config, event, torch.Generator().manual_seed(seed))


def timed(config: NetworkConfig) -> nn.Module:
    return build_timed_critic(config, EVENT, torch.Generator().manual_seed(0))


OFFSETS = [
    (MlpConfig(hidden=8, layers=2), {"body.layers.1.bias"}),
    (MlpConfig(hidden=8, layers=3, classes=5), {"body.layers.2.bias"}),
    (IgebmConfig(channels=8, output_scale=False), {"body.linear.bias"}),
    (IgebmConfig(channels=8, output_scale=True), {"body.linear.bias", "body.output_scale.bias"}),
    (IgebmConfig(channels=8, output_scale=True, classes=5), {"body.linear.bias", "body.output_scale.bias"}),
    (WideResNetConfig(depth=10, width=1, groups=4), {"body.linear.bias"}),
]


@pytest.mark.parametrize(("config", "names"), OFFSETS)
def test_offsets_are_the_parameters_that_cancel_in_a_difference_of_scores(config, names):
    """Exactly those whose gradient of mean score(x) - mean score(y) is 0, but for rounding."""
    network = critic(config).double()
    given = (LABELS,) if config.classes else ()
    x, y = random(3, *EVENT).double(), random(3, *EVENT, seed=2).double()
    named = dict(network.named_parameters())
    gradients = torch.autograd.grad(network(x, *given).mean() - network(y, *given).mean(), [*named.values()])
    idle = {name for name, grad in zip(named, gradients, strict=True) if grad.abs().max() < 1e-12}
    assert idle == names == {name for name, p in named.items() if any(p is offset for offset in network.offsets)}


# ----------------------------------------------------------------------------
# IGEBM, under the names of the DxMI release.


def igebm(p: Public, x: Tensor, labels: Tensor | None, channels: int, classes: int, *, scale: bool = True) -> Tensor:
    """The score of `x` [B, C, H, H]: [B]."""

    def leaky(h: Tensor) -> Tensor:
        return torch.where(h > 0, h, 0.2 * h)

    h = leaky(p.conv("net.conv1", x, channels))
    for i, (width, down) in enumerate(zip((1, 1, 2, 2, 2, 2), (True, False) * 3, strict=True)):
        name, outputs, before = f"net.blocks.{i}", width * channels, h
        straight = h.shape[1] == outputs and not down
        h = p.conv(f"{name}.conv1", h, outputs, bias=labels is None)
        if labels is not None:
            table = p.get(f"{name}.class_embed.weight", classes, 4 * outputs, scale=0.3, shift=1.0)
            scale_1, scale_2, shift_1, shift_2 = table[labels].view(len(x), 4, outputs, 1, 1).unbind(1)
            h = scale_1 * h + shift_1
        h = p.conv(f"{name}.conv2", leaky(h), outputs, bias=labels is None)
        if labels is not None:
            h = scale_2 * h + shift_2
        h = h + (before if straight else p.conv(f"{name}.skip.0", before, outputs, size=1, bias=False))
        h = leaky(F.avg_pool2d(h, 2) if down else h)
    energy = p.linear("net.linear", h.clamp(min=0.0).sum((2, 3)), 1)
    return (p.linear("net.out_scale", energy, 1) if scale else energy)[:, 0]


def bare(public: Public) -> dict[str, Tensor]:
    return {name.removeprefix("net."): tensor for name, tensor in public.floats().items()}


@pytest.mark.parametrize("event", [EVENT, (1, 28, 28), (1, 8, 8)], ids=str)
@pytest.mark.parametrize("classes", [0, 4])
@pytest.mark.parametrize("scale", [True, False])
def test_igebm_equals_a_second_implementation(event, classes, scale):
    public, x = Public(), random(3, *event)
    labels = LABELS if classes else None
    expected = igebm(public, x.double(), labels, 8, classes, scale=scale)
    network = critic(IgebmConfig(channels=8, classes=classes, output_scale=scale), event)
    assert load_public(network, bare(public)) == "igebm"
    with torch.no_grad():
        torch.testing.assert_close(network(x, labels).double(), expected, rtol=1e-5, atol=1e-5)


def test_the_published_energy_has_the_size_that_its_shapes_say():
    """Convolutions of 3x3 with biases, six blocks, four 1x1 skips without, a linear map and a scale with a shift."""
    nh = 128
    blocks = [(nh, nh), (nh, nh), (nh, 2 * nh), (2 * nh, 2 * nh), (2 * nh, 2 * nh), (2 * nh, 2 * nh)]
    size = 27 * nh + nh + sum(9 * a * b + b + 9 * b * b + b for a, b in blocks)
    size += nh * nh + nh * 2 * nh + 2 * nh * 2 * nh  # skips of the 1st, 3rd and 5th
    size += 2 * nh + 1 + 2
    assert sum(p.numel() for p in critic(IgebmConfig(), (3, 32, 32)).parameters()) == size


def test_a_class_starts_as_no_class_at_all():
    """Scales of 1 and shifts of 0, so that untrained the label does not matter."""
    network, x = critic(IgebmConfig(channels=8, classes=4)), random(3, *EVENT)
    assert torch.equal(network(x, LABELS), network(x, torch.zeros(3, dtype=torch.int64)))


# ----------------------------------------------------------------------------
# Spectral normalisation.


@pytest.mark.parametrize("shape", [(8, 3, 3, 3), (16, 8, 1, 1), (6, 20)], ids=str)
def test_a_spectral_weight_has_norm_one(shape):
    """The power iteration's value is below the largest singular value, by less the further the second one is off."""
    generator = torch.Generator().manual_seed(0)
    weight, start = torch.randn(shape, generator=generator), torch.randn(shape[0], generator=generator)
    assert float(torch.linalg.matrix_norm(spectral(weight, start).flatten(1), 2)) == pytest.approx(1.0, abs=0.05)
    spiked = weight + 20.0 * torch.ones(shape) / weight.numel() ** 0.5
    assert float(torch.linalg.matrix_norm(spectral(spiked, start).flatten(1), 2)) == pytest.approx(1.0, abs=1e-6)


def test_the_gradient_of_a_spectral_weight_is_that_of_weight_over_norm():
    """d(W / s) with ds = u v^T, against automatic differentiation of the exact singular value."""
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(4, 3, generator=generator, dtype=torch.float64) + 5.0
    weight.requires_grad_()
    start, direction = torch.ones(4, dtype=torch.float64), torch.randn(4, 3, generator=generator, dtype=torch.float64)
    (ours,) = torch.autograd.grad((spectral(weight, start) * direction).sum(), weight)
    exact = weight / torch.linalg.matrix_norm(weight, 2)
    (theirs,) = torch.autograd.grad((exact * direction).sum(), weight)
    torch.testing.assert_close(ours, theirs)


def test_a_spectral_energy_reads_the_names_of_pytorchs_parametrisation():
    network = critic(IgebmConfig(channels=8, spectral_norm=True))
    public = Public()
    igebm(public, torch.zeros(1, *EVENT, dtype=torch.float64), None, 8, 0)
    state = {}
    for name, tensor in bare(public).items():
        if tensor.dim() == 4:
            layer = name.removesuffix(".weight")
            state[f"{layer}.parametrizations.weight.original"] = tensor
            state[f"{layer}.parametrizations.weight.0._u"] = F.normalize(torch.ones(len(tensor)), dim=0)
            state[f"{layer}.parametrizations.weight.0._v"] = torch.ones(tensor[0].numel())
        else:
            state[name] = tensor
    load_public(network, state)
    assert torch.equal(
        network.body.blocks[0].skip.conv.weight, state["blocks.0.skip.0.parametrizations.weight.original"]
    )
    x, e = random(3, *EVENT), 1e-3
    assert torch.equal(network(x), network(x))  # using it changes nothing in it
    slope = (network(x + e) - network(x)).abs().max() / (e * (3 * 16 * 16) ** 0.5)
    plain = critic(IgebmConfig(channels=8))
    load_public(plain, bare(public))
    assert slope < (plain(x + e) - plain(x)).abs().max() / (e * (3 * 16 * 16) ** 0.5)


# ----------------------------------------------------------------------------
# The wide residual network.


def wide(network: nn.Module, x: Tensor, depth: int, width: int, groups: int) -> Tensor:
    """The score by the paper's figure, with our names; the kind has no public checkpoint."""
    p = {name: value.double() for name, value in network.state_dict().items()}

    def norm(name: str, h: Tensor) -> Tensor:
        h = F.group_norm(h, groups, p[f"{name}.weight"], p[f"{name}.bias"]) if groups else h
        return torch.where(h > 0, h, 0.2 * h)

    def conv(name: str, h: Tensor, stride: int = 1) -> Tensor:
        weight = p[f"{name}.weight"]
        return F.conv2d(h, weight, p[f"{name}.bias"], stride=stride, padding=weight.shape[2] // 2)

    h, number = conv("body.conv_in", x.double()), 0
    for group, channels in enumerate((16 * width, 32 * width, 64 * width)):
        for i in range((depth - 4) // 6):
            stride, name = 2 if group > 0 and i == 0 else 1, f"body.blocks.{number}"
            skip = conv(f"{name}.skip", h, stride) if stride == 2 or h.shape[1] != channels else h
            h = conv(f"{name}.conv_in", norm(f"{name}.norm_in", h))
            h = skip + conv(f"{name}.conv_out", norm(f"{name}.norm_out", h), stride)
            number += 1
    h = norm("body.norm_out", h).mean((2, 3))
    return F.linear(h, p["body.linear.weight"], p["body.linear.bias"])[:, 0]


@pytest.mark.parametrize(("depth", "width", "groups"), [(10, 1, 4), (16, 2, 0), (10, 2, 16)])
def test_the_wide_resnet_equals_a_second_implementation(depth, width, groups):
    network, x = critic(WideResNetConfig(depth=depth, width=width, groups=groups)), random(3, *EVENT)
    with torch.no_grad():
        expected = wide(network, x, depth, width, groups)
        torch.testing.assert_close(network(x).double(), expected, rtol=1e-5, atol=1e-5)


def test_depth_counts_the_convolutions_those_of_the_skips_included():
    for depth in (10, 16, 22):
        network = critic(WideResNetConfig(depth=depth, width=2))
        assert sum(isinstance(module, nn.Conv2d) for module in network.modules()) == depth


# ----------------------------------------------------------------------------
# What both promise.


@pytest.mark.parametrize("config", SMALL, ids=str)
def test_a_value_sees_its_step_and_one_embedding_serves_a_batch(config):
    network, x = timed(config).double(), random(3, *EVENT).double()
    one, two = network.embed(torch.tensor([1])), network.embed(torch.tensor([2]))
    torch.testing.assert_close(network(x, one), network(x, one.expand(3, -1)))
    assert network(x, one).shape == (3,)
    assert not torch.isclose(network(x, one), network(x, two), rtol=1e-6, atol=0.0).any()


@pytest.mark.parametrize("config", SMALL, ids=str)
def test_labels_are_required_exactly_where_there_are_classes(config):
    plain, conditional, x = critic(config), critic(dataclasses.replace(config, classes=4)), random(3, *EVENT)
    assert conditional(x, LABELS).shape == (3,)
    with pytest.raises(UserError, match=stating("classes=4 … no labels")):
        conditional(x)
    with pytest.raises(UserError, match=stating("classes=0 … labels")):
        plain(x, LABELS)
    value = timed(dataclasses.replace(config, classes=4))
    assert value(x, value.embed(torch.tensor([1])), LABELS).shape == (3,)


def test_the_label_of_a_wide_resnet_matters():
    network, x = critic(dataclasses.replace(SMALL[1], classes=4)), random(3, *EVENT)
    same = network(x, LABELS).isclose(network(x, torch.zeros(3, dtype=torch.int64)))
    assert same.tolist() == [False, True, False]


@pytest.mark.parametrize("config", SMALL, ids=str)
def test_channels_last_changes_rounding_alone(config):
    plain, last = (critic(dataclasses.replace(config, channels_last=layout)).double() for layout in (False, True))
    last.load_state_dict(plain.state_dict())
    x = random(3, *EVENT).double()
    torch.testing.assert_close(plain(x), last(x))


@pytest.mark.parametrize("config", [*SMALL, IgebmConfig(channels=8, spectral_norm=True)], ids=str)
def test_critics_of_two_seeds_run_stacked(config):
    networks = [critic(config, seed=seed).double() for seed in range(2)]
    x = random(2, 3, *EVENT).double()
    parameters, buffers = stack_module_state(networks)
    scores = vmap(lambda weights, state, x: functional_call(networks[0], (weights, state), (x,)))(
        parameters, buffers, x
    )
    for i, network in enumerate(networks):
        torch.testing.assert_close(scores[i], network(x[i]))


@pytest.mark.parametrize("config", SMALL, ids=str)
def test_initial_weights_come_from_the_generator_alone(config):
    state = torch.get_rng_state()
    first, second, other = (critic(config, seed=seed) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        constant = bool((a == 0.0).all() or (a == 1.0).all())  # biases and norms
        assert constant == torch.equal(a, c)


@pytest.mark.parametrize("config", SMALL, ids=str)
def test_an_event_that_is_no_image_is_refused(config):
    for event in ((3,), (1, 2, 2), (3, 16, 8)):
        with pytest.raises(UserError, match=r"needs square images of \d pixels or more"):
            critic(config, event)


@pytest.mark.parametrize(
    ("kind", "setting"),
    [
        (IgebmConfig, {"channels": 0}),
        (IgebmConfig, {"classes": -1}),
        (IgebmConfig, {"embedding": 3}),
        (WideResNetConfig, {"depth": 12}),
        (WideResNetConfig, {"width": 0}),
        (WideResNetConfig, {"groups": 3}),
        (WideResNetConfig, {"classes": -1}),
        (WideResNetConfig, {"embedding": 0}),
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_by_name(kind, setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name} is "):
        kind(**setting)
