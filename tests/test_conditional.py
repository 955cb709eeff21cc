"""Labels and latents, from the data to the policy, the energy and the value; and weights from public checkpoints."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dxmi.data import Images
from dxmi.errors import UserError
from dxmi.experiment import Experiment, NetworksConfig
from dxmi.networks import Given, IgebmConfig, UnetConfig
from dxmi.networks.layouts import to_public
from support import changed
from tune.configs import compose_experiment

SMALL = [
    "experiment=digits",
    "pretrain.batch_size=8",
    "train.batch_size=8",
    "schedule.num_steps=3",
    "algorithm.critic.weight_decay=0",
]
MLP = [
    "network=mlp_small",
    "network.denoiser.hidden=16",
    "network.energy.hidden=12",
    "network.value.hidden=12",
]
CLASSES = [f"network.{role}.classes=10" for role in ("denoiser", "energy", "value")]
UNET = ["network=unet_small", "network.denoiser.channels=16", "network.energy.channels=4", "network.value.channels=4"]
GAN = ["network=ddgan_small", "network.denoiser.channels=8", "network.denoiser.latent=5", "schedule=ddgan"]


def experiment(*settings: str) -> Experiment:
    """On random pixels; the label of an image is its first pixel's remainder by 10."""
    networks = [] if any(setting.startswith("network=") for setting in settings) else MLP
    made = Experiment(compose_experiment([*changed(SMALL, *settings), *networks]).experiment)
    pixels = torch.randint(0, 256, (40, 1, 8, 8), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    made.__dict__["data"] = Images("digits", pixels, pixels[:, 0, 0, 0].long() % 10, "random", num_classes=10)
    return made


def iterations(made: Experiment, num: int = 2) -> list[dict[str, Tensor]]:
    ddpm, pretraining = made.build_pretraining()
    stream = pretraining.stream
    rows = [ddpm.update(stream.next(), i, pretraining.generators["noise"], labels=stream.labels) for i in range(num)]
    dxmi, state = made.build_finetuning(ddpm.network)
    stream, generators = state.stream, state.generators.values()
    return rows + [dxmi.update(stream.next(), i, *generators, labels=stream.labels) for i in range(num)]


# ----------------------------------------------------------------------------
# Labels.


def test_a_batch_comes_with_its_labels():
    stream = experiment(*CLASSES).build_pretraining()[1].stream
    assert stream.labels is None
    for _ in range(7):  # over the end of an epoch
        pixels = ((stream.next() + 1.0) * 127.5).round().long()
        assert torch.equal(stream.labels, pixels[:, 0, 0, 0] % 10)
    assert experiment().build_pretraining()[1].stream.labels is None


@pytest.mark.parametrize("value", ["shared", "separate"])
@pytest.mark.parametrize("option", ["algorithm.resample_next=true", "algorithm.all_states=true"])
def test_every_network_learns_its_classes(value, option):
    made = experiment(*CLASSES, f"algorithm.value={value}", option, "algorithm.preset=objective")
    dxmi, state = made.build_finetuning(made.build_denoiser())
    named = {name: p for name, p in dxmi.named_parameters() if name.endswith("labels.weight") and "average" not in name}
    assert len(named) == (2 if value == "shared" else 3)
    before = {name: p.detach().clone() for name, p in named.items()}
    stream = state.stream
    dxmi.update(stream.next(), 0, *state.generators.values(), labels=stream.labels)
    seen = stream.labels.unique()
    for name, p in named.items():
        rows = (p.detach() - before[name]).abs().sum(1) > 0.0
        assert set(rows.nonzero()[:, 0].tolist()) <= set(seen.tolist()), name
        assert rows.any(), name


def test_a_sample_is_made_with_its_label():
    """Two rollouts from the same noise differ exactly where their labels do; so do energies."""
    dxmi = experiment(*CLASSES).build_finetuning(experiment(*CLASSES).build_denoiser())[0]
    policy, energy = dxmi.policy, dxmi.value.energy
    noise = policy.noise(4, torch.Generator().manual_seed(0))
    a, b = torch.tensor([0, 1, 2, 3]), torch.tensor([0, 9, 2, 8])
    first, second = policy.rollout(noise, a).sample, policy.rollout(noise, b).sample
    same = torch.isclose(first, second, rtol=1e-5, atol=1e-6).flatten(1).all(1)
    assert same.tolist() == [True, False, True, False]
    assert torch.isclose(energy(first, a), energy(first, b)).tolist() == [True, False, True, False]
    given = Given(labels=a)
    torch.testing.assert_close(policy.step(noise[0], 0, noise[1], given), policy.rollout(noise, a).x[1])


def test_labels_are_drawn_evenly_where_none_are_asked_for():
    policy = experiment(*CLASSES).build_finetuning(experiment(*CLASSES).build_denoiser())[0].policy
    seen = []

    def guide(x: Tensor, t: int, labels: Tensor | None) -> Tensor:
        seen.append(labels)
        return torch.zeros_like(x)

    policy.sample(2000, torch.Generator().manual_seed(0), guide, 1.0)
    counts = torch.bincount(seen[0], minlength=10)
    assert counts.sum() == 2000
    assert (counts - 200).abs().max() < 4.5 * (2000 * 0.1 * 0.9) ** 0.5
    asked = torch.zeros(5, dtype=torch.int64)
    x = policy.sample(5, torch.Generator().manual_seed(0), labels=asked)
    assert torch.equal(x, policy.sample(5, torch.Generator().manual_seed(0), labels=asked))


def test_an_unconditional_energy_judges_conditional_samples():
    """As in the published ImageNet experiment."""
    rows = iterations(experiment(CLASSES[0]))
    assert all(torch.isfinite(value) for row in rows for value in row.values())


def test_classes_that_do_not_fit_are_refused():
    with pytest.raises(
        UserError, match=r"network\.energy\.classes is 10: it must be 0, or as many as the denoiser's 0"
    ):
        experiment(CLASSES[1])
    with pytest.raises(UserError, match=r"network\.denoiser\.classes is 9, but digits has labels up to 9: make it 10"):
        experiment("network.denoiser.classes=9").build_pretraining()
    plain = experiment(*CLASSES)
    plain.__dict__["data"] = replace(plain.data, num_classes=0)  # as a folder of images of one kind is
    with pytest.raises(UserError, match=r"network\.denoiser\.classes is 10, but digits has no classes: make it 0"):
        plain.build_pretraining()
    made = experiment(*CLASSES)
    dxmi, state = made.build_finetuning(made.build_denoiser())
    with pytest.raises(UserError, match="it must be given labels and no latent"):
        dxmi.update(state.stream.next(), 0, *state.generators.values())


def test_a_role_is_played_by_a_network_that_can():
    with pytest.raises(ValueError, match=r"^energy\.kind is 'unet': it must be one of mlp, igebm, wide_resnet"):
        NetworksConfig(energy=UnetConfig())
    with pytest.raises(ValueError, match=r"^denoiser\.kind is 'igebm': it must be one of mlp, unet, edm_unet"):
        NetworksConfig(denoiser=IgebmConfig())


# ----------------------------------------------------------------------------
# Latents.


def test_a_generator_is_pretrained_and_fine_tuned():
    rows = iterations(experiment(*GAN, "network.energy.channels=4", "network.value.channels=4"))
    assert all(torch.isfinite(value) for row in rows for value in row.values())


def test_a_rollout_has_a_latent_a_step():
    made = experiment(*GAN, "network.energy.channels=4", "network.value.channels=4")
    policy = made.build_dxmi(made.build_denoiser()).policy
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.network.parameters():  # a branch that ends in zeros hides what is in it
            if not parameter.any():
                parameter.normal_(0.0, 0.1, generator=generator)
    noise, latents = policy.noise(3, generator), policy.latents(3, generator)
    assert latents.shape == (3, 3, 5)
    x = policy.rollout(noise, latents=latents).x
    for t in range(3):
        step = policy.step(x[t], t, noise[t + 1], Given(latent=latents[t]))
        torch.testing.assert_close(step, x[t + 1])
    latents[1, 1] = -latents[1, 1]
    other = ~torch.isclose(policy.rollout(noise, latents=latents).x, x, rtol=1e-4, atol=1e-4).flatten(2).all(2)
    assert other.tolist() == [[False] * 3] * 2 + [[False, True, False]] * 2
    with pytest.raises(UserError, match="no labels and a latent"):
        policy.step(x[0], 0, noise[0])


# ----------------------------------------------------------------------------
# Public checkpoints.


def test_a_run_starts_from_a_public_checkpoint(tmp_path: Path):
    """A policy of the DxMI release: its weights, and its sigmas but for the last, which is the schedule's."""
    source = experiment(*UNET, "seed=5").build_denoiser()
    log_betas = torch.tensor([-0.5, -1.5, -9.0])
    torch.save({"state_dict": {**to_public(source, "ddpm"), "log_betas": log_betas}}, tmp_path / "sampler.pth")
    made = experiment(*UNET, f"pretrain.weights={tmp_path / 'sampler.pth'}", "pretrain.iterations=0")
    ddpm, _ = made.build_pretraining()
    for mine, theirs in zip(ddpm.average.parameters(), source.parameters(), strict=True):
        assert torch.equal(mine, theirs)
    dxmi, _ = made.build_finetuning(ddpm.network)
    for policy in (dxmi.policy, dxmi.evaluated):
        torch.testing.assert_close(policy.log_sigma.detach(), torch.tensor([-0.5, -1.5, -6.907755]))
    other = experiment(*UNET, "schedule.num_steps=4", f"pretrain.weights={tmp_path / 'sampler.pth'}")
    with pytest.raises(UserError, match=r"a policy of 3 steps, but schedule\.num_steps is 4"):
        other.build_finetuning(ddpm.network)


def test_a_checkpoint_is_looked_for_beside_the_data(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DXMI_DATA", str(tmp_path))
    (tmp_path / "weights").mkdir()
    named = "pretrain.weights=weights/ddpm.pt"
    with pytest.raises(
        UserError, match=r"pretrain\.weights is weights/ddpm\.pt, but there is no weights/ddpm\.pt and no"
    ):
        experiment(*UNET, named).build_pretraining()
    torch.save(to_public(experiment(*UNET).build_denoiser(), "ddpm"), tmp_path / "weights" / "ddpm.pt")
    experiment(*UNET, named).build_pretraining()


def test_what_a_checkpoint_holds_decides_what_is_pretrained(tmp_path: Path):
    """Not where it lies: the pretraining's signature has its content."""
    signatures = []
    for seed, name in ((5, "a"), (5, "b"), (6, "c")):
        weights = to_public(experiment(*UNET, f"seed={seed}").build_denoiser(), "ddpm")
        torch.save(weights, tmp_path / name)
        signatures.append(experiment(*UNET, f"pretrain.weights={tmp_path / name}").pretraining_signature)
    assert signatures[0] == signatures[1] != signatures[2]
