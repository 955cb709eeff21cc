"""The U-Nets: against a second implementation under each public layout's names, and what else they promise."""

import dataclasses
import warnings

import pytest
import torch
from public import Public, adm, ddpm, edm
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from dxmi.errors import UserError
from dxmi.networks.configs import EdmUnetConfig, UnetConfig
from dxmi.networks.layers import GroupNorm, dropout_mask
from dxmi.networks.pretrained.layouts import load_public
from dxmi.networks.registry import build_denoiser
from dxmi.networks.unet import Unet
from support import stating

SMALL = {"channels": 16, "multipliers": (1, 2), "blocks": 1, "attention": (4,), "groups": 8}
LEVELS = {"channels": 16, "multipliers": (1, 2, 2), "blocks": 2, "attention": (8, 4), "groups": 8}
EVENT = (3, 8, 8)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(config: UnetConfig, event: tuple[int, ...] = EVENT, seed: int = 0) -> Unet:
    """A U-Net whose zero layers are not zero."""
    generator = torch.Generator().manual_seed(seed)
    network = build_denoiser(config, event, generator)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.1, generator=generator)
    return network


def compare(network: Unet, public: Public, expected: Tensor, x: Tensor, steps: Tensor, labels: Tensor | None = None):
    load_public(network, public.floats())
    embedding = network.embed(steps)
    if labels is not None:
        embedding = embedding + network.embed_labels(labels)
    with torch.no_grad():
        torch.testing.assert_close(network(x, embedding).double(), expected, rtol=1e-4, atol=1e-5)


# ----------------------------------------------------------------------------
# Numbers.


@pytest.mark.parametrize(("shape", "event"), [(SMALL, EVENT), (LEVELS, EVENT), (LEVELS, (1, 28, 28))], ids=str)
def test_the_ddpm_unet_equals_a_second_implementation(shape, event):
    public, x, steps = Public(), random(2, *event), torch.tensor([3.0, 17.5])
    expected = ddpm(public, x.double(), steps, **shape)
    compare(make(UnetConfig(**shape), event), public, expected, x, steps)


@pytest.mark.parametrize("guided", [True, False])
@pytest.mark.parametrize("scale_shift", [True, False])
@pytest.mark.parametrize("resample_in_blocks", [True, False])
@pytest.mark.parametrize("classes", [0, 5])
def test_the_adm_unet_equals_a_second_implementation(guided, scale_shift, resample_in_blocks, classes):
    shape = {**LEVELS, "head_channels": 8, "classes": classes}
    style = {"scale_shift": scale_shift, "resample_in_blocks": resample_in_blocks}
    public, x, steps = Public(), random(2, *EVENT), torch.tensor([3.0, -17.5])
    labels = torch.tensor([4, 0]) if classes else None
    expected = adm(public, x.double(), steps, labels, **shape, **style, guided=guided)
    compare(make(EdmUnetConfig(**shape, **style)), public, expected, x, steps, labels)


def test_the_adm_unet_under_the_names_of_edm_equals_a_second_implementation():
    """EDM tells its network log(sigma) / 4, a thousandth of 250 log(sigma)."""
    shape = {**LEVELS, "head_channels": 8, "classes": 5}
    public, x, sigma = Public(), random(2, *EVENT), torch.tensor([80.0, 0.3])
    labels = torch.tensor([4, 0])
    expected = edm(public, x.double(), sigma.log() / 4.0, labels, **shape)
    network = make(EdmUnetConfig(**shape, step_scale=1e-3))
    compare(network, public, expected, x, 250.0 * sigma.log(), labels)


def test_the_cifar_network_has_the_published_number_of_parameters():
    """35,746,307: what FastDPM prints for it."""
    network = build_denoiser(UnetConfig(), (3, 32, 32), torch.Generator().manual_seed(0))
    assert sum(p.numel() for p in network.parameters()) == 35_746_307


def test_an_untrained_network_predicts_no_noise():
    network = build_denoiser(UnetConfig(**SMALL), EVENT, torch.Generator().manual_seed(0))
    assert not network(random(2, *EVENT), network.embed(torch.tensor([3.0]))).any()


def test_patches_are_channels():
    config = UnetConfig(**SMALL)
    patched, plain = make(dataclasses.replace(config, patch=2), (3, 16, 16)), make(config, (12, 8, 8))
    plain.load_state_dict(patched.state_dict())
    x, embedding = random(2, 3, 16, 16), plain.embed(torch.tensor([7.0]))
    squares = x.reshape(2, 3, 8, 2, 8, 2).permute(0, 1, 3, 5, 2, 4).reshape(2, 12, 8, 8)
    expected = plain(squares, embedding).reshape(2, 3, 2, 2, 8, 8).permute(0, 1, 4, 2, 5, 3).reshape(2, 3, 16, 16)
    torch.testing.assert_close(patched(x, embedding), expected)
    assert make(dataclasses.replace(config, patch=2, attention=None), (1, 28, 28)).size == 14
    with pytest.raises(UserError, match=stating("network.denoiser.patch is 3 … 28 pixels … 1, 2, 4, 7, 14")):
        make(dataclasses.replace(config, patch=3), (1, 28, 28))


def test_one_embedding_serves_a_batch():
    network, x = make(UnetConfig(**SMALL)).double(), random(3, *EVENT).double()
    one = network.embed(torch.tensor([7.0]))
    torch.testing.assert_close(network(x, one), network(x, one.expand(3, -1)))


def test_samples_do_not_see_each_other():
    network, x = make(EdmUnetConfig(**SMALL, head_channels=8)).double(), random(3, *EVENT).double()
    embedding = network.embed(torch.tensor([7.0]))
    torch.testing.assert_close(network(x, embedding)[1:2], network(x[1:2], embedding))


# ----------------------------------------------------------------------------
# Dropout.


@pytest.mark.parametrize("rate", [0.1, 0.5])
def test_a_dropout_mask_keeps_what_it_should(rate):
    """Each of 2 x 10^6 entries is Bernoulli(1 - rate), in every sample, at every position, in every layer."""
    seed = torch.randint(2**62, (200,), generator=torch.Generator().manual_seed(0))
    kept = torch.stack([dropout_mask(seed, layer, (10, 10, 10), rate) for layer in range(10)]).double()
    deviation = (rate * (1.0 - rate)) ** 0.5
    assert float(kept.mean()) == pytest.approx(1.0 - rate, abs=4.0 * deviation / kept.numel() ** 0.5)
    for axes in ((0, 1), (0, 2, 3, 4), (1, 2, 3, 4)):  # what is left varies as a mean of independent entries does
        means = kept.mean(axes).flatten()
        one = deviation / (kept.numel() / len(means)) ** 0.5
        assert float((means - (1.0 - rate)).abs().max()) < 5.0 * one
        if len(means) > 100:
            assert float(means.std()) == pytest.approx(one, rel=4.0 / (2.0 * len(means)) ** 0.5)


def test_dropout_masks_of_neighboring_positions_layers_and_seeds_are_independent():
    seed = torch.arange(200)
    a = dropout_mask(seed, 0, (5000,), 0.5).double() - 0.5
    b = dropout_mask(seed, 1, (5000,), 0.5).double() - 0.5
    c = dropout_mask(seed + 2**31, 0, (5000,), 0.5).double() - 0.5
    error = 4.0 * 0.25 / a.numel() ** 0.5
    for first, second in ((a[:, 1:], a[:, :-1]), (a[1:], a[:-1]), (a, b), (a, c)):
        assert abs(float((first * second).mean())) < error


def test_a_samples_dropout_is_its_seeds_alone():
    """Cutting a batch in pieces, as workers and accumulation do, changes no mask."""
    network, x = make(UnetConfig(**SMALL, dropout=0.3)).double(), random(4, *EVENT).double()
    embedding, seed = network.embed(torch.tensor([7.0])), torch.tensor([5, 2**61, 7, 0])
    whole = network(x, embedding, seed)
    torch.testing.assert_close(whole[2:], network(x[2:], embedding, seed[2:]))
    assert torch.equal(whole, network(x, embedding, seed))
    assert not torch.isclose(whole, network(x, embedding), rtol=1e-2, atol=1e-2).all()


def test_dropout_draws_from_no_global_stream():
    network, x = make(UnetConfig(**SMALL, dropout=0.3)), random(4, *EVENT)
    before = torch.get_rng_state()
    network(x, network.embed(torch.tensor([7.0])), torch.arange(4))
    assert torch.equal(torch.get_rng_state(), before)


# ----------------------------------------------------------------------------
# Options that change no number.


def gradients(network: Unet, x: Tensor, seed: Tensor) -> list[Tensor]:
    output = network(x, network.embed(torch.tensor([7.0])), seed)
    return list(torch.autograd.grad(output.square().sum(), list(network.parameters())))


@pytest.mark.parametrize("config", [UnetConfig(**SMALL), EdmUnetConfig(**SMALL, head_channels=8, dropout=0.2)], ids=str)
def test_recomputed_activations_give_the_same_gradients_to_the_bit(config):
    x, seed = random(2, *EVENT), torch.tensor([1, 2])
    kept = gradients(make(config), x, seed)
    recomputed = gradients(make(dataclasses.replace(config, recompute=True)), x, seed)
    assert all(torch.equal(a, b) for a, b in zip(kept, recomputed, strict=True))


@pytest.mark.parametrize("kind", [UnetConfig, EdmUnetConfig])
def test_channels_last_changes_rounding_alone(kind):
    config = kind(**LEVELS, head_channels=8)
    plain, last = (make(dataclasses.replace(config, channels_last=layout)).double() for layout in (False, True))
    last.load_state_dict(plain.state_dict())
    x, embedding = random(2, *EVENT).double(), plain.embed(torch.tensor([7.0]))
    torch.testing.assert_close(plain(x, embedding), last(x, embedding))
    assert last.conv_in.weight.is_contiguous(memory_format=torch.channels_last)


def test_networks_of_two_seeds_run_stacked():
    networks = [make(UnetConfig(**SMALL), seed=seed).double() for seed in range(2)]
    x, steps = random(2, 3, *EVENT).double(), torch.tensor([7.0])
    parameters, buffers = stack_module_state(list[nn.Module](networks))

    def run(weights: dict[str, Tensor], state: dict[str, Tensor], x: Tensor, embedding: Tensor, seed: Tensor) -> Tensor:
        return functional_call(networks[0], (weights, state), (x, embedding, seed))

    embeddings, seeds = torch.stack([n.embed(steps) for n in networks]), torch.arange(6).view(2, 3)
    with warnings.catch_warnings():  # attention on a CPU has no stacked kernel: it is done one after the other
        warnings.simplefilter("ignore", UserWarning)
        stacked = vmap(run)(parameters, buffers, x, embeddings, seeds)
    for i, network in enumerate(networks):
        torch.testing.assert_close(stacked[i], network(x[i], embeddings[i], seeds[i]))


# ----------------------------------------------------------------------------
# Building.


@pytest.mark.parametrize("config", [UnetConfig(**SMALL), EdmUnetConfig(**SMALL, head_channels=8, classes=3)], ids=str)
def test_initial_weights_come_from_the_generator_alone(config):
    torch.manual_seed(1)
    state = torch.get_rng_state()
    first, second, other = (build_denoiser(config, EVENT, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b, c in zip(first.parameters(), second.parameters(), other.parameters(), strict=True):
        assert torch.equal(a, b)
        constant = bool((a == a.flatten()[0]).all())  # norms start at 1 and 0, biases and last layers at 0
        assert constant == torch.equal(a, c)


def test_initial_convolutions_have_variance_two_over_the_sum_of_the_fans():
    network = build_denoiser(UnetConfig(**{**SMALL, "channels": 64}), EVENT, torch.Generator().manual_seed(0))
    weight = network.middle_in.block.conv_in.weight
    variance, n = 2.0 / (2 * 9 * 128), weight.numel()
    assert float(weight.detach().square().mean()) == pytest.approx(variance, rel=4.0 * (4.0 / 5.0 / n) ** 0.5)


def test_an_image_that_cannot_be_halved_is_refused():
    with pytest.raises(UserError, match=stating("28 pixels … fewer multipliers")):
        build_denoiser(UnetConfig(), (1, 28, 28), torch.Generator())
    with pytest.raises(UserError, match="square images"):
        build_denoiser(UnetConfig(), (1, 32, 16), torch.Generator())


def test_labels_for_a_network_without_classes_are_refused():
    with pytest.raises(UserError, match=stating("not class-conditional")):
        make(UnetConfig(**SMALL)).embed_labels(torch.tensor([1]))


@pytest.mark.parametrize(
    "setting",
    [
        {"channels": 15},
        {"multipliers": (0,)},
        {"blocks": 0},
        {"groups": 7},
        {"head_channels": 5},
        {"dropout": 1.0},
        {"patch": 0},
        {"classes": -1},
    ],
    ids=str,
)
def test_a_bad_setting_is_refused_by_name(setting):
    (name,) = setting
    with pytest.raises(ValueError, match=f"^{name} is "):
        UnetConfig(**setting)


@pytest.mark.parametrize(("channels", "groups", "mean"), [(64, 32, 0.0), (24, 8, 30.0), (8, 8, -5.0)])
def test_group_norm_by_channel_is_group_norm(channels, groups, mean):
    """In value and gradients, also where the mean is many times the spread."""
    x = (torch.randn(3, channels, 6, 5, generator=torch.Generator().manual_seed(0)) + mean).requires_grad_()
    norm = GroupNorm(groups, channels, eps=1e-6)
    with torch.no_grad():
        norm.weight.normal_(generator=torch.Generator().manual_seed(1))
        norm.bias.normal_(generator=torch.Generator().manual_seed(2))
    weight = torch.randn(x.shape, generator=torch.Generator().manual_seed(3))
    found = []
    for function in (norm.by_channel, norm):
        y = function(x)
        found.append((y, *torch.autograd.grad((y * weight).sum(), (x, norm.weight, norm.bias))))
    for one, other in zip(*found, strict=True):
        torch.testing.assert_close(one, other, rtol=1e-4, atol=1e-3)
