"""No sample, feature, energy, score or weight that is not finite becomes an image, a rank or a result."""

import json
import math
import pickle
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from torch import Tensor

from dxmi.critics.energy import Energy
from dxmi.data.configs import Gaussians8Config
from dxmi.data.planar import Points, load_points
from dxmi.distributed import ProcessGroup, SingleProcess
from dxmi.errors import DivergedError, UserError
from dxmi.evaluation.config import REPORT, EvaluateConfig
from dxmi.evaluation.sampling import Sampling, generate, generate_states, measure
from dxmi.evaluation.scorers import PlanarScorer
from dxmi.metrics.density import calibrated_kl, roc_auc
from dxmi.metrics.fidelity import frechet_distance, inception_score, kernel_distance, precision_recall
from dxmi.metrics.gaussians import Gaussian
from dxmi.metrics.sliced_wasserstein import sliced_wasserstein
from dxmi.networks.base import Critic
from dxmi.networks.pretrained.layouts import to_public
from dxmi.persistence import checkpoint
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.build import Experiment
from dxmi.training.loading import load_run
from dxmi.training.progress import Progress
from dxmi.training.run import train
from dxmi.training.schema import config_tree, read_config
from support import TINY, changed, stating
from tune.config.compose import compose_experiment

CONFIG = EvaluateConfig(num_samples=8, batch_size=4)
EVENTS = [(1, 8, 8), (2,)]
NUMBERS = [math.nan, math.inf, -math.inf]


def broken(policy, number: float):
    """A policy with one weight that is not finite."""
    with torch.no_grad():
        next(policy.network.parameters()).flatten()[0] = number
    return policy


DRAW = {
    "generate": lambda sampling: generate(sampling, 8, CONFIG),
    "states": lambda sampling: generate_states(sampling, 8, CONFIG),
    "measure": lambda sampling: measure(sampling, 8, CONFIG, lambda x: x.float().flatten(1)),
}


@pytest.mark.parametrize("draw", DRAW)
@pytest.mark.parametrize("event", EVENTS)
@pytest.mark.parametrize("number", NUMBERS)
def test_samples_that_are_not_finite_end_the_drawing(draw, event, number, make_policy):
    policy = broken(make_policy(event=event), number)
    with pytest.raises(
        DivergedError, match=stating("4 samples … iteration 7 … not finite … learning rates")
    ) as diverged:
        DRAW[draw](Sampling(policy, REPORT, step=7))
    assert (diverged.value.step, diverged.value.metric) == (7, "samples")


@pytest.mark.parametrize("draw", DRAW)
@pytest.mark.parametrize("slope", [1e20, 1e-2])
def test_guidance_that_leads_beyond_all_numbers_is_named(draw, slope, make_policy):
    """Samples of 1e28 are finite, but as pixels they would look like an image."""

    def guide(x: Tensor, t: int, labels: Tensor | None) -> Tensor:
        return slope * x.sign()

    sampling = Sampling(make_policy(event=(1, 8, 8)), REPORT, guide, guidance=1e30)
    with pytest.raises(DivergedError, match=stating("guidance 1e+30 … weaker guidance")):
        DRAW[draw](sampling)


def test_a_model_that_was_never_fine_tuned_points_at_pretraining(make_policy):
    policy = broken(make_policy(event=(2,)), math.nan)
    with pytest.raises(DivergedError, match=stating("5-step reference … not finite … pretrain.optimizer.lr")):
        generate(Sampling(policy, REPORT, source="the 5-step reference"), 8, CONFIG)


class _SecondIsBroken(SingleProcess):
    """One of two workers, whose neighbor has drawn samples that are not finite."""

    size = 2

    def gather(self, block: Tensor) -> list[Tensor]:
        return [block, torch.full_like(block, 3)]


def test_all_workers_hear_of_another_ones_samples(make_policy):
    for draw in ("generate", "measure"):
        with pytest.raises(DivergedError, match="3 of 8 samples"):
            DRAW[draw](Sampling(make_policy(event=(2,)), REPORT, workers=_SecondIsBroken(), step=1))


class _Pair(ProcessGroup):
    """Two workers of which the first is here."""

    rank, size = 0, 2

    def sum(self, tensors):
        return list(tensors)

    def gather(self, block):
        return [block, block]

    def _broadcast_bytes(self, content: bytes) -> bytes:
        return content


def test_what_diverges_on_the_first_worker_diverges_on_all():
    def action() -> None:
        raise DivergedError(3, "eval/fid_x", math.nan, "a sentence")

    with pytest.raises(DivergedError, match="a sentence") as diverged:
        _Pair().on_rank_zero(action)
    again = pickle.loads(pickle.dumps(diverged.value))
    assert (again.step, again.metric, str(again)) == (3, "eval/fid_x", "a sentence")


# ----------------------------------------------------------------------------
# Metrics.


def bad(rows: int, columns: int, number: float) -> tuple[Tensor, Tensor]:
    good = torch.randn(rows, columns, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    spoilt = good.clone()
    spoilt[1, 0] = number
    return spoilt, good


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "metric",
    [
        precision_recall,
        frechet_distance,
        lambda a, b: kernel_distance(a, b, subsets=2, subset_size=4, seed=0),
        lambda a, b: Gaussian.of(b).distance(a),
        lambda a, b: sliced_wasserstein(a, b, projections=2, generator=torch.Generator()),
        lambda a, b: roc_auc(a[:, 0], b[:, 0]),
        lambda a, b: roc_auc(b[:, 0], a[:, 0]),
        lambda a, b: calibrated_kl(a[:, 0], b[:, 0]),
        lambda a, b: inception_score(a, 0),
    ],
    ids=["pr", "fid", "kid", "gaussian", "sliced", "auc", "auc of noise", "kl", "inception score"],
)
def test_no_metric_ranks_what_is_not_finite(metric, number):
    with pytest.raises(DivergedError, match=r"1 of \d+ numbers are not finite"):
        metric(*bad(12, 4, number))


class _BrokenCritic(Critic):
    def forward(self, x: Tensor, labels: Tensor | None = None) -> Tensor:
        return torch.full((len(x),), math.nan)


def test_an_energy_that_is_not_finite_has_no_scores(make_policy):
    points = load_points(Gaussians8Config(num_points=100))
    assert isinstance(points, Points)
    scorer = PlanarScorer(points, EvaluateConfig(num_samples=64, batch_size=64, projections=4))
    with pytest.raises(DivergedError, match="the energy of iteration 5"):
        scorer.full_evaluation(Sampling(make_policy(event=(2,)), REPORT, step=5), Energy(_BrokenCritic()))


# ----------------------------------------------------------------------------
# Runs.

SHORT = changed(TINY, "train.iterations=0", "pretrain.iterations=0", "evaluate.full_reference=false")
UNET = [
    *("network=unet_small", "network.denoiser.channels=8", "network.denoiser.groups=4"),
    *("network.denoiser.multipliers=[1,2]", "network.denoiser.attention=null"),
    *("network.energy.channels=4", "network.value.channels=4", "evaluate.num_samples=16", "evaluate.batch_size=16"),
]


def short(*overrides: str) -> Experiment:
    settings = [s for s in SHORT if not s.startswith("network.")] if "network=unet_small" in overrides else SHORT
    return Experiment(compose_experiment(changed(settings, *overrides)).experiment)


@pytest.fixture(scope="module")
def finished(tmp_path_factory) -> Path:
    out = tmp_path_factory.mktemp("runs") / "run"
    assert train(short(), out=out) is not None
    return out


def test_a_run_without_fine_tuning_diverges_too(tmp_path):
    with pytest.raises(DivergedError):
        train(short("pretrain.iterations=2", "pretrain.optimizer.lr=1e38", "seed=3"), out=tmp_path / "run")
    assert not (tmp_path / "run/summary.json").exists()
    assert not list((tmp_path / "run/samples").glob("*.png"))


def test_weights_of_a_checkpoint_that_are_not_finite_are_never_sampled_from(finished, tmp_path):
    whole = checkpoint.newest(finished / "checkpoints")[0]
    assert whole is not None
    name = next(name for name in whole.groups["algorithm"] if name.startswith("policy."))
    algorithm = {**whole.groups["algorithm"], name: torch.full_like(whole.groups["algorithm"][name], math.nan)}
    checkpoint.save(tmp_path / "checkpoints", 0, {**whole.groups, "algorithm": algorithm}, whole.meta)
    with pytest.raises(DivergedError, match=f"in {name}"):
        load_run(RunDirectory(tmp_path), read_config(config_tree(short().config)), "best")


def test_a_finished_run_says_that_its_data_have_changed(finished, monkeypatch):
    before, notes = json.loads((finished / "summary.json").read_text()), []
    again = short()
    again.__dict__["data"] = replace(again.data, signature="0123456789ab")

    def report(progress: Progress) -> None:
        notes.append(progress.note)

    summary = train(again, out=finished, report=report)
    assert summary is not None
    assert summary.best == before["best"]
    assert before["inputs"]["data"] in notes[0]
    assert "0123456789ab" in notes[0]
    notes.clear()
    train(short(), out=finished, report=report)
    assert notes == []
    trained = load_run(RunDirectory(finished), read_config(config_tree(short().config)), "best")
    trained.experiment.__dict__["data"] = again.data
    with pytest.raises(UserError, match="0123456789ab"):
        trained.scores(None, None, 0.0)


def test_a_run_of_an_older_version_says_so_by_its_checkpoint(finished, tmp_path):
    notes: list[str] = []
    summary = json.loads((finished / "summary.json").read_text())
    for name in ("config.yaml", "checkpoints"):
        (tmp_path / name).symlink_to(finished / name)
    (tmp_path / "summary.json").write_text(json.dumps({k: v for k, v in summary.items() if k != "inputs"}))
    again = short()
    again.__dict__["data"] = replace(again.data, signature="0123456789ab")
    train(again, out=tmp_path, report=lambda progress: notes.append(progress.note))
    assert "trained on other data" in notes[0]


def test_a_run_from_public_weights_says_what_was_taken_and_what_has_changed_since(tmp_path):
    path, out, notes = tmp_path / "a.pt", tmp_path / "run", []
    settings = [*UNET, f"pretrain.weights={path}"]

    def report(progress: Progress) -> None:
        if progress.note:
            notes.append(progress.note)

    def write(seed: int) -> dict[str, Tensor]:
        network = short(*UNET, f"seed={seed}").build_denoiser()
        state = to_public(network, "ddpm")  # type: ignore[arg-type]
        torch.save({"model": {k: v + 1.0 for k, v in state.items()}, "ema": state, "optimizer": {}}, path)
        return state

    write(1)
    first = train(short(*settings), out=out, report=report)
    assert first is not None
    assert "ema was taken, an average of the weights; left aside: model, optimizer" in notes[0]
    notes.clear()
    write(2)
    again = train(short(*settings), out=out, report=report)
    assert again == first
    assert "other pretrain.weights" in notes[0]
    notes.clear()
    path.unlink()
    assert train(short(*settings), out=out, report=report) == first
    assert "can no longer be read" in notes[0]
