"""The generator of denoising-diffusion GANs: against a second implementation under the official names."""

import dataclasses
import warnings

import pytest
import torch
from public import Public, ddgan
from torch import Tensor, nn
from torch.func import functional_call, stack_module_state, vmap

from dxmi.errors import UserError
from dxmi.networks.configs import NcsnppGanConfig
from dxmi.networks.ncsnpp import NcsnppGan, fir_double, fir_half
from dxmi.networks.pretrained.layouts import load_public
from dxmi.networks.registry import build_denoiser
from support import stating

SHAPE = {"channels": 8, "multipliers": (1, 2, 2), "blocks": 2, "attention": (4,)}
LATENT = {"latent": 5, "latent_embedding": 12, "latent_layers": 2}
SMALL = NcsnppGanConfig(**{**SHAPE, "multipliers": (1, 2), "blocks": 1}, **LATENT)
EVENT = (3, 8, 8)


def random(*shape: int, seed: int = 1) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def make(config: NcsnppGanConfig, event: tuple[int, ...] = EVENT, seed: int = 0) -> NcsnppGan:
    """A generator whose zero layers are not zero."""
    generator = torch.Generator().manual_seed(seed)
    network = build_denoiser(config, event, generator)
    with torch.no_grad():
        for parameter in network.parameters():
            if not parameter.any():
                parameter.normal_(0.0, 0.1, generator=generator)
    return network


@pytest.mark.parametrize(("attention", "event"), [((4,), EVENT), ((8, 2), EVENT), ((14,), (1, 28, 28))], ids=str)
def test_the_generator_equals_a_second_implementation(attention, event):
    shape = {**SHAPE, "attention": attention, **LATENT}
    public, x, steps, z = Public(), random(2, *event), torch.tensor([3.0, 0.0]), random(2, 5)
    expected = ddgan(public, x.double(), steps, z, **shape)
    network = make(NcsnppGanConfig(**shape), event)
    state = {f"module.{name}": tensor for name, tensor in public.floats().items()}
    assert load_public(network, {name.removeprefix("module."): t for name, t in state.items()}) == "ddgan"
    with torch.no_grad():
        image = network(x, network.embed(steps) + network.embed_latent(z))
    torch.testing.assert_close(image.double(), expected, rtol=1e-4, atol=1e-5)


def test_a_constant_keeps_its_value_inside_when_the_resolution_changes():
    """The filter's weights sum to one; beyond the edge there are zeros."""
    x = torch.full((1, 2, 8, 8), 3.0)
    for changed in (fir_half(x), fir_double(x)):
        torch.testing.assert_close(changed[:, :, 1:-1, 1:-1], torch.full_like(changed[:, :, 1:-1, 1:-1], 3.0))
    assert fir_half(x).shape[2:] == (4, 4)
    assert fir_double(x).shape[2:] == (16, 16)


def test_halving_and_doubling_are_each_others_transpose():
    """<half(x), y> = <x, double(y)> / 4."""
    x, y = random(1, 2, 8, 8).double(), random(1, 2, 4, 4).double()
    torch.testing.assert_close((fir_half(x) * y).sum(), (x * fir_double(y)).sum() / 4.0)


def test_the_cifar_generator_has_the_size_of_its_shapes():
    """Every tensor of the second implementation at the published settings, at 32 pixels."""
    network = make(NcsnppGanConfig(channels=16, latent=100, latent_embedding=256), (3, 32, 32))
    public = Public()
    shape = {"channels": 16, "multipliers": (1, 2, 2, 2), "blocks": 2, "attention": (16,)}
    latent = {"latent": 100, "latent_embedding": 256, "latent_layers": 4}
    ddgan(public, torch.zeros(1, 3, 32, 32, dtype=torch.float64), torch.zeros(1), torch.ones(1, 100), **shape, **latent)
    assert sum(p.numel() for p in network.parameters()) == sum(t.numel() for t in public.state.values())


def test_the_latent_matters_and_its_length_does_not():
    """It is normalized first."""
    network, x, z = make(SMALL).double(), random(2, *EVENT).double(), random(2, 5).double()
    step = network.embed(torch.tensor([3.0]))
    one, twice, other = (network(x, step + network.embed_latent(a)) for a in (z, 2.0 * z, -z))
    torch.testing.assert_close(one, twice)
    assert not torch.isclose(one, other, rtol=1e-3, atol=1e-3).all()
    assert float(one.detach().abs().max()) < 1.0


@pytest.mark.parametrize("option", ["recompute", "channels_last"])
def test_options_change_rounding_alone(option):
    plain, changed = make(SMALL).double(), make(dataclasses.replace(SMALL, **{option: True})).double()
    changed.load_state_dict(plain.state_dict())
    x, z = random(2, *EVENT).double(), random(2, 5).double()
    results = []
    for network in (plain, changed):
        image = network(x, network.embed(torch.tensor([3.0])) + network.embed_latent(z))
        results.append([image, *torch.autograd.grad(image.square().sum(), list(network.parameters()))])
    for a, b in zip(*results, strict=True):
        torch.testing.assert_close(a, b)


def test_generators_of_two_seeds_run_stacked():
    networks = [make(SMALL, seed=seed).double() for seed in range(2)]
    x, z = random(2, 3, *EVENT).double(), random(2, 3, 5).double()
    parameters, buffers = stack_module_state(list[nn.Module](networks))
    embeddings = torch.stack([n.embed(torch.tensor([2.0])) + n.embed_latent(z[i]) for i, n in enumerate(networks)])
    with warnings.catch_warnings():  # attention on a CPU has no stacked kernel: it is done one after the other
        warnings.simplefilter("ignore", UserWarning)
        stacked = vmap(lambda w, s, *args: functional_call(networks[0], (w, s), args))(
            parameters, buffers, x, embeddings
        )
    for i, network in enumerate(networks):
        torch.testing.assert_close(stacked[i], network(x[i], embeddings[i]))


def test_initial_weights_come_from_the_generator_alone_and_scales_start_near_one():
    state = torch.get_rng_state()
    first, second, other = (build_denoiser(SMALL, EVENT, torch.Generator().manual_seed(seed)) for seed in (0, 0, 1))
    assert torch.equal(torch.get_rng_state(), state)
    for a, b in zip(first.parameters(), second.parameters(), strict=True):
        assert torch.equal(a, b)
    assert not torch.equal(first.conv_in.weight, other.conv_in.weight)
    assert first.middle_in.norm_in.style.bias.tolist() == [1.0] * 16 + [0.0] * 16


def test_a_bad_event_or_setting_is_refused():
    with pytest.raises(UserError, match=stating("28 pixels")):
        build_denoiser(NcsnppGanConfig(), (1, 28, 28), torch.Generator())
    for setting in ({"channels": 6}, {"multipliers": (0,)}, {"blocks": 0}, {"latent": 0}, {"latent_layers": -1}):
        (name,) = setting
        with pytest.raises(ValueError, match=f"^{name} is "):
            NcsnppGanConfig(**setting)
