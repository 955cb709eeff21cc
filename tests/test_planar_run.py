"""A run in the plane from end to end: what it writes, that it resumes bitwise, and the commands that use it."""

import json
import math

import numpy as np
import pytest
import torch
from matplotlib.collections import LineCollection
from PIL import Image

from dxmi.critics.energy import Energy
from dxmi.critics.value import SharedValue
from dxmi.data.planar import DISTRIBUTIONS, SQUARE
from dxmi.metrics.density import square_grid
from dxmi.networks.configs import MlpConfig
from dxmi.networks.registry import build_critic
from dxmi.persistence import checkpoint
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.build import Experiment
from dxmi.training.progress import Phase
from dxmi.training.run import train
from dxmi.visualization.planar import energy_figure, samples_figure, shown_times, steps_figure, values_figure
from dxmi.visualization.visualizers import ImageVisualizer, PlanarVisualizer, build_visualizer
from support import drawn_figures
from tune.cli.main import main
from tune.config.compose import compose_experiment

TINY = [
    "experiment=moons",
    "data.num_points=500",
    "network.denoiser.hidden=16",
    "network.energy.hidden=16",
    "network.value.hidden=16",
    "pretrain.iterations=40",
    "pretrain.batch_size=64",
    "train.iterations=20",
    "train.batch_size=16",
    "train.log_every=5",
    "evaluate.every=10",
    "evaluate.num_samples=64",
    "evaluate.batch_size=64",
    "evaluate.projections=8",
    "evaluate.grid=20",
    "resources.threads=1",
]
POINT_SCORES = {"eval/sliced_wasserstein", "eval/num_samples"}
ENERGY_SCORES = {"eval/energy_auc", "eval/energy_kl", "eval/energy_beta"}


def tiny(*overrides: str) -> Experiment:
    changed = {override.split("=")[0] for override in overrides}
    kept = [override for override in TINY if override.split("=")[0] not in changed]
    return Experiment(compose_experiment([*kept, *overrides]).experiment)


def outcome(out) -> tuple[bytes, bytes, str, dict]:
    last = checkpoint.path_of(out / "checkpoints", 20)
    summary = json.loads((out / "summary.json").read_text())
    scores = {key: summary[key] for key in ("reference", "best", "last", "scores", "signature")}
    files = [(last / name).read_bytes() for name in ("algorithm.safetensors", "state.safetensors")]
    return files[0], files[1], (out / "metrics.jsonl").read_text(), scores


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    out = tmp_path_factory.mktemp("runs") / "run"
    with drawn_figures():
        assert train(tiny(), out=out) is not None
    return out


# ----------------------------------------------------------------------------
# The run.


def test_a_planar_run_draws_samples_steps_energy_and_values(run):
    names = {entry.name for entry in (run / "samples").iterdir()}
    pictures = {f"reference_{name}.png" for name in ("data", "full", "few")}
    steps = {f"step_{step:06d}.png" for step in (0, 10, 20)}
    others = {name for name in names if "_5_" in name}
    assert len(others) >= 5  # the samplers with as many evaluations, of which one may be the best, named few
    assert names - others == {*pictures, *steps, "steps.png", "energy.png", "values.png"}
    for path in [*(run / "samples").iterdir(), run / "curves.png"]:
        with Image.open(path) as picture:
            picture.verify()


def test_the_samples_are_scored_everywhere_and_the_energy_where_there_is_one(run):
    summary = json.loads((run / "summary.json").read_text())
    assert summary["metric"] == "eval/sliced_wasserstein"
    trailing = ("ddim_{}_trailing", "dpm_solver_{}_trailing", "ddpm_{}_trailing", "ddpm_{}_trailing_large")
    samplers = {name.format(steps) for name in trailing for steps in (5, 50, 250)}
    samplers |= {name.format(1000).replace("_trailing", "") for name in trailing}
    samplers |= {"shortened", "ddim_5_log_snr", "dpm_solver_5_log_snr"}
    assert set(summary["reference"]) == {*samplers, "data"}
    assert set(summary["samplers"]) == samplers
    scored = {name: set(values) for name, values in summary["scores"].items()}
    assert scored == {
        **dict.fromkeys(samplers, POINT_SCORES),
        "data": POINT_SCORES | {"eval/energy_auc"},
        **dict.fromkeys(("best", "last"), POINT_SCORES | ENERGY_SCORES),
    }
    rows = [row for row in RunDirectory(run).rows() if "eval/sliced_wasserstein" in row]
    assert [row["step"] for row in rows] == [0, 10, 20]
    assert all(set(row) >= POINT_SCORES | ENERGY_SCORES for row in rows)


def test_the_last_checkpoint_counts_in_the_plane_and_the_best_if_asked_for(run, tmp_path):
    """The rates are so large that the samples of the last are the worst."""
    rates = ("algorithm.policy.lr=0.3", "algorithm.policy.decay=constant", "algorithm.policy.max_grad_norm=null")
    parent = "pretrain.iterations=500"  # whose samples are better than those of any later iteration
    for result, step in (("last", 20), ("best", 0)):
        summary = train(tiny(*rates, parent, f"evaluate.result={result}"), out=tmp_path / result)
        scores = {
            row["step"]: row[summary.metric] for row in RunDirectory(tmp_path / result).rows() if summary.metric in row
        }
        assert min(scores, key=scores.get) == 0
        assert summary.best["step"] == step
        assert summary.best["selection_value"] == scores[step]
        assert (summary.scores["best"] == summary.scores["last"]) == (result == "last")


def test_a_run_that_trains_no_energy_neither_scores_nor_draws_one(tmp_path):
    out = tmp_path / "run"
    summary = train(tiny("train.iterations=0", "schedule.num_steps=30"), out=out)
    assert set(summary.scores["best"]) == POINT_SCORES
    assert summary.scores["best"] == summary.scores["shortened"]
    assert {path.name for path in (out / "samples").glob("step*")} == {"step_000000.png", "steps.png"}
    path = tmp_path / "scores.json"
    assert main(["evaluate", str(out), "--out", str(path)]) == 0
    assert json.loads(path.read_text()) == summary.scores["best"]


def test_a_reward_has_a_floor_in_the_plane_too(tmp_path):
    """Which is that of the data itself: what a policy that has learned the data gets."""
    rewarded = tiny("algorithm=reinforce", "reward=log_density", "reward.distribution=moons")
    summary = train(rewarded, out=tmp_path / "run")
    assert summary.metric == "eval/reward"
    points = rewarded.data.held_out(20_000, "another")
    assert summary.reference["data"] == pytest.approx(float(DISTRIBUTIONS["moons"].log_density(points).mean()), abs=0.1)
    assert summary.reference["data"] > summary.best["value"]


@pytest.mark.parametrize("stop_at", [0, 15])
def test_a_stopped_planar_run_goes_on_to_the_same_end(run, tmp_path, stop_at):
    out = tmp_path / "run"
    assert train(tiny(), out=out, report=lambda p: p.phase is Phase.FINETUNE and p.step >= stop_at) is None
    train(tiny(), out=out)
    assert outcome(out) == outcome(run)


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_every_distribution_runs_also_from_a_random_network_with_a_shared_value(tmp_path, name):
    overrides = [f"data.kind={name}", "pretrain.iterations=0", "algorithm.value=shared", "train.iterations=2"]
    summary = train(tiny(*overrides), out=tmp_path / "run")
    assert summary is not None
    assert all(math.isfinite(value) for values in summary.scores.values() for value in values.values())


@pytest.mark.draws
def test_runs_of_other_seeds_have_noise_of_their_own_and_arms_of_one_seed_share_it(run, tmp_path):
    """References are those of a run's own noise; an arm that does not touch the pretraining finds them as they are."""
    summary = json.loads((run / "summary.json").read_text())
    other = train(tiny("seed=1", "train.iterations=1"), out=tmp_path / "seed")
    arm = train(tiny("algorithm.entropy_coef=0.5", "train.iterations=1"), out=tmp_path / "arm")
    assert other.reference.keys() == summary["reference"].keys()
    assert all(other.reference[name] != value for name, value in summary["reference"].items())
    assert arm.reference == summary["reference"]
    own, arms = ((path / "samples" / "step_000000.png").read_bytes() for path in (run, tmp_path / "arm"))
    assert own == arms


# ----------------------------------------------------------------------------
# The commands.


def test_sample_writes_points_as_they_are(run, tmp_path):
    def draw(name: str, *options: str) -> np.ndarray:
        path = tmp_path / name
        assert main(["sample", str(run), "--num", "5", "--out", str(path), *options]) == 0
        return np.load(path)["points"]

    points, steps = draw("a.npz"), draw("b.npz", "--steps-grid")
    assert (points.shape, points.dtype) == ((5, 2), np.float32)
    assert steps.shape == (6, 5, 2)
    assert np.array_equal(steps[-1], points)
    assert not np.array_equal(points, draw("c.npz", "--guidance", "5"))


@pytest.mark.draws
@pytest.mark.parametrize("options", [[], ["--steps-grid"]])
def test_sample_draws_figures(run, tmp_path, options):
    path = tmp_path / "figure.png"
    assert main(["sample", str(run), "--num", "100", "--out", str(path), *options]) == 0
    with Image.open(path) as picture:
        assert min(picture.size) > 200


def test_evaluate_repeats_the_numbers_of_a_planar_run(run, tmp_path, capsys):
    path = tmp_path / "scores.json"
    assert main(["evaluate", str(run), "--out", str(path)]) == 0
    assert json.loads(path.read_text()) == json.loads((run / "summary.json").read_text())["scores"]["best"]
    assert "eval/energy_auc" in capsys.readouterr().out


def test_train_ends_with_the_floor_and_the_area_under_the_curve_in_the_table(run, capsys, monkeypatch):
    monkeypatch.setenv("COLUMNS", "200")  # in a narrow terminal words are wrapped
    assert main(["train", "--resume", str(run)]) == 0
    printed = capsys.readouterr().out
    for words in ("the data itself", "energy_auc", "sliced_wasserstein of 64 samples each"):
        assert words in printed


# ----------------------------------------------------------------------------
# Figures.

CELLS = 24


def log_density(name: str) -> torch.Tensor:
    return DISTRIBUTIONS[name].log_density(square_grid(SQUARE, CELLS)).view(CELLS, CELLS).T


def test_the_name_of_the_data_chooses_the_visualizer():
    assert isinstance(build_visualizer("digits"), ImageVisualizer)
    assert isinstance(build_visualizer("checkerboard"), PlanarVisualizer)


def test_samples_out_of_view_are_counted():
    samples = torch.tensor([[0.0, 0.0], [100.0, 0.0], [0.0, -5.0]])
    figure = samples_figure(samples, log_density("moons").exp())
    assert figure.axes[0].get_xlabel() == "3 samples over the data's density, 2 out of view"


def test_maps_have_x_to_the_right_and_y_upwards():
    """The energy x - 100 y is lowest in the upper left corner of what is drawn."""
    cells = square_grid(SQUARE, CELLS)
    heights = (cells[:, 0] - 100.0 * cells[:, 1]).view(CELLS, CELLS).T
    image = values_figure({5: heights}).axes[0].images[0]
    assert image.origin == "lower"
    drawn = np.asarray(image.get_array())
    assert np.unravel_index(drawn.argmin(), drawn.shape) == (CELLS - 1, 0)


def test_there_is_a_panel_for_every_step_and_one_for_the_ways():
    states = torch.randn(7, 30, 2, generator=torch.Generator().manual_seed(0))
    titles = [axes.get_title() for axes in steps_figure(states, log_density("moons").exp()).axes]
    assert [title for title in titles if title] == [*(f"$x_{{{t}}}$" for t in range(7)), "from $x_0$ to $x_{6}$"]


@pytest.mark.parametrize(
    ("num_steps", "times"),
    [
        (1, [0, 1]),
        (5, list(range(6))),
        (10, list(range(11))),
        (100, list(range(0, 101, 10))),
        (12, [0, 1, 2, 4, 5, 6, 7, 8, 10, 11, 12]),
    ],
)
def test_of_many_steps_some_are_drawn_with_both_ends(num_steps, times):
    assert shown_times(num_steps) == times


def test_the_panels_of_many_steps_are_of_those_steps():
    states = torch.zeros(101, 3, 2) + torch.arange(101.0)[:, None, None] / 100.0
    axes = steps_figure(states, log_density("moons").exp()).axes
    assert [panel.get_title() for panel in axes][:3] == ["$x_{0}$", "$x_{10}$", "$x_{20}$"]
    drawn = axes[3].collections[0].get_offsets()
    assert np.asarray(drawn).tolist() == pytest.approx(np.full((3, 2), 0.3))
    (ways,) = [lines for lines in axes[11].collections if isinstance(lines, LineCollection)]
    assert [len(way) for way in ways.get_segments()] == [11, 11, 11]


@pytest.mark.parametrize("name", DISTRIBUTIONS)
def test_an_energy_is_drawn_beside_the_exact_one_even_if_it_is_flat(name):
    for energy in (torch.zeros(CELLS, CELLS), torch.randn(CELLS, CELLS, generator=torch.Generator().manual_seed(0))):
        figure = energy_figure(energy, log_density(name), 1.0)
        images = [image.get_array() for axes in figure.axes for image in axes.images]
        assert len(images) >= 4
        assert all(np.isfinite(np.asarray(image)).all() for image in images)
        figure.canvas.draw()


def test_the_value_of_every_step_is_drawn(tmp_path):
    critic = build_critic(MlpConfig(hidden=8, layers=2, embedding=4), (2,), torch.Generator().manual_seed(0))
    PlanarVisualizer(DISTRIBUTIONS["moons"]).draw_value(tmp_path, SharedValue(Energy(critic)), 3)
    assert {path.name for path in tmp_path.iterdir()} == {"values.png", "energy.png"}
