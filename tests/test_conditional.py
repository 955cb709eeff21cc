"""Labels and latents, from the data to the policy, the energy and the value; and weights from public checkpoints."""

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor

from dxmi.algorithms.configs import DxMIConfig
from dxmi.data.batch import UNCONDITIONAL, Condition, Streams
from dxmi.data.images import LOADERS, Images
from dxmi.data.loading import load
from dxmi.data.registry import DATA_SETS
from dxmi.diffusion.policy import Policy
from dxmi.diffusion.schedules.build import shorten
from dxmi.diffusion.trajectory import GaussianStep
from dxmi.errors import UserError
from dxmi.evaluation.config import EvaluateConfig
from dxmi.evaluation.sampling import Sampling
from dxmi.evaluation.scorers import ImageScorer
from dxmi.networks.configs import IgebmConfig, UnetConfig
from dxmi.networks.pretrained.layouts import to_public
from dxmi.tensors import decode
from dxmi.training.build import Experiment
from dxmi.training.config import NetworksConfig
from dxmi.training.loading import LoadedRun
from dxmi.training.run import labels_text
from support import TINY, changed, stating, step
from tune.cli.main import main
from tune.config.compose import compose_experiment

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
    rows = [step(ddpm, pretraining, i) for i in range(num)]
    dxmi, state = made.build_finetuning(ddpm.network)
    return rows + [step(dxmi, state, i) for i in range(num)]


# ----------------------------------------------------------------------------
# Labels.


def test_a_batch_comes_with_its_labels():
    stream = experiment(*CLASSES).build_pretraining()[1].stream
    for _ in range(7):  # over the end of an epoch
        batch = stream.next()
        pixels = ((batch.x + 1.0) * 127.5).round().long()
        assert torch.equal(batch.condition.labels, pixels[:, :, 0, 0, 0] % 10)
    assert experiment().build_pretraining()[1].stream.next().condition == UNCONDITIONAL


PLAIN = ["algorithm.energy.weight_decay=0", "algorithm.critic.weight_decay=0"]
"""Weight decay would change the rows of classes that are not in the batch."""


@pytest.mark.parametrize("value", ["shared", "separate"])
@pytest.mark.parametrize("option", ["algorithm.resample_next=true", "algorithm.all_states=true"])
def test_every_network_learns_its_classes(value, option):
    made = experiment(*CLASSES, f"algorithm.value={value}", option, "algorithm.preset=objective", *PLAIN)
    dxmi, state = made.build_finetuning(made.build_denoiser())
    named = {
        name: p for name, p in dxmi.named_parameters() if name.endswith("labels.weight") and "ema_policy" not in name
    }
    assert len(named) == (2 if value == "shared" else 3)
    before = {name: p.detach().clone() for name, p in named.items()}
    batch = state.stream.next()
    dxmi.update(batch, 0, Streams([state.generators]))
    seen = batch.condition.labels.unique()
    for name, p in named.items():
        rows = (p.detach() - before[name]).abs().sum(1) > 0.0
        assert set(rows.nonzero()[:, 0].tolist()) <= set(seen.tolist()), name
        assert rows.any(), name


def test_a_sample_is_made_with_its_label():
    """Two rollouts from the same noise differ exactly where their labels do; so do energies."""
    dxmi = experiment(*CLASSES).build_finetuning(experiment(*CLASSES).build_denoiser())[0]
    policy, energy = dxmi.policy, dxmi.value.energy
    noise = policy.noise(4, torch.Generator().manual_seed(0))
    a, b = Condition(torch.tensor([0, 1, 2, 3])), Condition(torch.tensor([0, 9, 2, 8]))
    first, second = policy.rollout(noise, a).sample, policy.rollout(noise, b).sample
    same = torch.isclose(first, second, rtol=1e-5, atol=1e-6).flatten(1).all(1)
    assert same.tolist() == [True, False, True, False]
    assert torch.isclose(energy(first, a), energy(first, b)).tolist() == [True, False, True, False]
    torch.testing.assert_close(policy.step(noise[0], 0, noise[1], a), policy.rollout(noise, a).x[1])


def drawn_labels(policy: Policy, num: int) -> Tensor:
    seen = []

    def guide(x: Tensor, t: int, condition: Condition) -> Tensor:
        seen.append(condition.labels)
        return torch.zeros_like(x)

    policy.sample(num, torch.Generator().manual_seed(0), guide, 1.0)
    assert all(torch.equal(labels, seen[0]) for labels in seen)
    return seen[0]


def with_labels(made: Experiment, labels: Tensor, num_classes: int = 10) -> Experiment:
    made.__dict__["data"] = replace(made.data, labels=labels, num_classes=num_classes)
    return made


@pytest.mark.parametrize(
    "counts",
    [[4] * 10, [36, 4] + [0] * 8, [0, 0, 0, 40] + [0] * 6, [1, 2, 3, 4, 5, 6, 7, 8, 4, 0]],
    ids=["even", "nine to one", "one class", "each another"],
)
def test_labels_are_drawn_with_the_frequencies_of_the_data_where_none_are_asked_for(counts):
    made = with_labels(experiment(*CLASSES), torch.repeat_interleave(torch.arange(10), torch.tensor(counts)))
    dxmi = made.build_finetuning(made.build_denoiser())[0]
    share = torch.tensor(counts) / 40
    for policy in (dxmi.policy, dxmi.eval_policy):
        found = torch.bincount(drawn_labels(policy, 2000), minlength=10)
        assert found[share == 0].sum() == 0
        assert ((found - 2000 * share).abs() <= 4.5 * (2000 * share * (1 - share)).sqrt()).all()
    assert torch.equal(drawn_labels(dxmi.policy, 50), drawn_labels(dxmi.policy, 50))


def test_labels_may_be_asked_for():
    policy = experiment(*CLASSES).build_finetuning(experiment(*CLASSES).build_denoiser())[0].policy
    asked = Condition(torch.zeros(5, dtype=torch.int64))
    x = policy.sample(5, torch.Generator().manual_seed(0), condition=asked)
    assert torch.equal(x, policy.sample(5, torch.Generator().manual_seed(0), condition=asked))


def test_a_policy_that_knows_no_frequencies_guesses_none():
    policy = experiment(*CLASSES).build_algorithm(experiment(*CLASSES).build_denoiser()).policy
    policy.draw_classes(None)
    with pytest.raises(UserError, match=stating("10 classes")):
        policy.sample(5, torch.Generator().manual_seed(0))


def test_a_label_of_the_data_alone_is_drawn_by_a_network_of_ten_classes():
    """`data.label=3 network.denoiser.classes=10`: nine of the ten were never trained."""
    made = Experiment(compose_experiment([*SMALL, *MLP, *CLASSES, "data.label=3"]).experiment)
    policy = made.build_policy(made.build_denoiser(), shorten(made.config.schedule))
    assert drawn_labels(policy, 100).unique().tolist() == [3]
    assert (
        labels_text(made.class_counts) == "drawn with the frequencies of the data: 1 of 10 classes, each equally often"
    )


class Perfect(Policy):
    """Whose samples are images of the data of the class that is asked for."""

    def of(self, images: Images) -> "Perfect":
        self.images = images
        return self

    def transition(self, x, t, embeddings=None, log_sigma=None, condition=UNCONDITIONAL, latent=None):
        place = torch.rand(len(x), generator=torch.Generator().manual_seed(1))
        rows = [(self.images.labels == label).nonzero()[:, 0] for label in range(2)]
        chosen = [rows[label][int(at * len(rows[label]))] for label, at in zip(condition.labels, place, strict=True)]
        return GaussianStep(decode(self.images.pixels[torch.stack(chosen)]), torch.zeros(len(x)))


def test_perfect_samples_of_nine_to_one_data_score_next_to_nothing(tmp_path):
    """The features' Frechet distance is 0 for the data's own frequencies, and large for even ones."""
    digits = load(DATA_SETS.config("digits"))
    rows = torch.cat([(digits.labels == 0).nonzero()[:162, 0], (digits.labels == 1).nonzero()[:18, 0]])
    images = Images("digits", digits.pixels[rows], digits.labels[rows], "nine-to-one", 2)
    made = experiment(*CLASSES)
    perfect = Perfect(made.build_denoiser(), shorten(made.config.schedule), (1, 8, 8)).of(images)
    scorer = ImageScorer(images, EvaluateConfig(num_samples=2000), tmp_path, torch.device("cpu"))

    def score(counts: list[int]) -> float:
        perfect.draw_classes(torch.tensor(counts))
        return scorer.score(Sampling(perfect, "report")).values[scorer.metric]

    own, even = score([162, 18]), score([1, 1])
    assert own < 1.0
    assert even > 20.0 * own


def test_scores_do_not_depend_on_who_reads_the_classes(tmp_path):
    """A run that is sampled where its data are not draws the classes that its checkpoint tells of."""
    made = with_labels(experiment(*CLASSES), torch.tensor([0] * 36 + [5] * 4))
    config, counts = made.config, made.class_counts.tolist()
    elsewhere = Experiment(config, event=(1, 8, 8), class_counts=counts)
    one, two = (e.build_policy(e.build_denoiser(), shorten(config.schedule)) for e in (made, elsewhere))
    assert torch.equal(drawn_labels(one, 100), drawn_labels(two, 100))


@pytest.mark.parametrize(
    ("counts", "text"),
    [
        (None, ""),
        ([9, 1], "2 of 2 classes, 10.000% to 90.000% each"),
        ([5, 5], "2 of 2 classes, each equally often"),
        ([0, 3, 1], "2 of 3 classes, 25.000% to 75.000% each"),
    ],
)
def test_the_summary_says_how_often_each_class_was_drawn(counts, text):
    said = labels_text(None if counts is None else torch.tensor(counts))
    assert said.removeprefix("drawn with the frequencies of the data: ") == text


def test_a_run_states_its_labels_and_keeps_to_them(tmp_path, capsys, monkeypatch):
    """From end to end on the digits, of which one in ten is now called 0 and the others 3."""
    pixels, _ = LOADERS["digits"](train=True)
    labels = torch.where(torch.arange(len(pixels)) % 10 == 0, 0, 3)
    monkeypatch.setitem(LOADERS, "digits", lambda **_: (pixels, labels))
    out, settings = tmp_path / "run", ["network.denoiser.classes=10", "evaluate.full_reference=false"]
    settings = changed(TINY, *settings, "pretrain.iterations=2", "train.iterations=2")
    assert main(["train", *settings, f"out={out}"]) == 0
    said = "drawn with the frequencies of the data: 2 of 10 classes, 10.017% to 89.983% each"
    assert f"labels: {said}" in capsys.readouterr().out
    assert json.loads((out / "summary.json").read_text())["labels"] == said
    path = tmp_path / "samples.npz"
    with monkeypatch.context() as away:
        away.setattr("dxmi.training.build.load", lambda config: pytest.fail("the data are not needed"))
        found = []
        for options in ([], ["--label", "3"], ["--label", "0"]):
            assert main(["sample", str(out), "--num", "9", "--out", str(path), *options]) == 0
            found.append(np.load(path)["images"].tobytes())
        assert len(set(found)) == 3
        for label in ("4", "10", "-1"):
            assert main(["sample", str(out), "--out", str(path), f"--label={label}"]) == 2
            assert (
                f"is {label}, but the data of this run have no samples of it: choose one of 0, 3."
                in capsys.readouterr().err
            )
    assert main(["evaluate", str(out)]) == 0
    _ = capsys.readouterr()
    monkeypatch.setitem(LOADERS, "digits", lambda **_: (pixels, labels.roll(1)))  # the same pixels
    assert main(["evaluate", str(out)]) == 2
    assert "trained on other data" in capsys.readouterr().err
    (out / "summary.json").unlink()
    assert main(["train", "--resume", str(out)]) == 2
    assert "begun with other data" in capsys.readouterr().err


def test_a_label_is_refused_where_the_network_knows_none(make_dxmi):
    trained = LoadedRun(experiment(), make_dxmi(DxMIConfig()), 0, [])
    with pytest.raises(UserError, match=stating("is 3 … no classes")):
        trained.states(1, None, 0.0, 3)


def test_an_unconditional_energy_judges_conditional_samples():
    """As in the published ImageNet experiment."""
    rows = iterations(experiment(CLASSES[0]))
    assert all(torch.isfinite(value) for row in rows for value in row.values())


def test_classes_that_do_not_fit_are_refused():
    with pytest.raises(UserError, match=stating("network.energy.classes is 10 … 0")):
        experiment(CLASSES[1])
    with pytest.raises(UserError, match=stating("network.denoiser.classes is 9 … digits … 10")):
        experiment("network.denoiser.classes=9").build_pretraining()
    plain = experiment(*CLASSES)
    plain.__dict__["data"] = replace(plain.data, num_classes=0)  # as a folder of images of one kind is
    with pytest.raises(UserError, match=stating("network.denoiser.classes is 10 … digits … no classes … 0")):
        plain.build_pretraining()
    made = experiment(*CLASSES)
    dxmi, state = made.build_finetuning(made.build_denoiser())
    with pytest.raises(UserError, match=stating("given … labels and no latent")):
        dxmi.update(state.stream.next()._replace(condition=UNCONDITIONAL), 0, Streams([state.generators]))


def test_a_role_is_played_by_a_network_that_can():
    with pytest.raises(ValueError, match=stating("energy.kind is 'unet' … mlp … igebm … wide_resnet")):
        NetworksConfig(energy=UnetConfig())
    with pytest.raises(ValueError, match=stating("denoiser.kind is 'igebm' … mlp … unet … edm_unet")):
        NetworksConfig(denoiser=IgebmConfig())


# ----------------------------------------------------------------------------
# Latents.


def test_a_generator_is_pretrained_and_fine_tuned():
    rows = iterations(experiment(*GAN, "network.energy.channels=4", "network.value.channels=4"))
    assert all(torch.isfinite(value) for row in rows for value in row.values())


def test_a_rollout_has_a_latent_a_step():
    made = experiment(*GAN, "network.energy.channels=4", "network.value.channels=4")
    policy = made.build_algorithm(made.build_denoiser()).policy
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in policy.network.parameters():  # a branch that ends in zeros hides what is in it
            if not parameter.any():
                parameter.normal_(0.0, 0.1, generator=generator)
    noise, latents = policy.noise(3, generator), policy.latents(3, generator)
    assert latents.shape == (3, 3, 5)
    x = policy.rollout(noise, latents=latents).x
    for t in range(3):
        x_next = policy.step(x[t], t, noise[t + 1], latent=latents[t])
        torch.testing.assert_close(x_next, x[t + 1])
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
    for policy in (dxmi.policy, dxmi.eval_policy):
        torch.testing.assert_close(policy.log_sigma.detach(), torch.tensor([-0.5, -1.5, -6.907755]))
    other = experiment(*UNET, "schedule.num_steps=4", f"pretrain.weights={tmp_path / 'sampler.pth'}")
    with pytest.raises(UserError, match=stating("3 steps … schedule.num_steps is 4")):
        other.build_finetuning(ddpm.network)


def test_a_checkpoint_is_looked_for_beside_the_data(tmp_path: Path, monkeypatch):
    monkeypatch.setenv("DXMI_DATA", str(tmp_path))
    (tmp_path / "weights").mkdir()
    named = "pretrain.weights=weights/ddpm.pt"
    with pytest.raises(UserError, match=stating("pretrain.weights is weights/ddpm.pt … no weights/ddpm.pt")):
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
