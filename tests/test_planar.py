"""Distributions in the plane and what is measured there, against closed forms, SciPy and scikit-learn."""

import math
from dataclasses import replace

import numpy as np
import pytest
import torch
from scipy.integrate import quad
from scipy.stats import chi2, norm
from sklearn.metrics import roc_auc_score
from torch import Tensor

from dxmi.config import build
from dxmi.critics.energy import Energy
from dxmi.data.configs import DigitsConfig
from dxmi.data.dataset import BatchStream
from dxmi.data.loading import load
from dxmi.data.planar import DISTRIBUTIONS, SQUARE, Points
from dxmi.data.registry import DATA_SETS
from dxmi.errors import UserError
from dxmi.evaluation.config import NUM_SAMPLES_KEY, REPORT, EvaluateConfig
from dxmi.evaluation.sampling import Sampling, generate
from dxmi.evaluation.scorers import ImageScorer, PlanarScorer, build_scorer
from dxmi.metrics.density import calibrated_kl, roc_auc, square_grid
from dxmi.networks.base import Critic
from dxmi.seeds import generator
from dxmi.tensors import decode, encode
from dxmi.training.config import ExperimentConfig
from support import stating

NAMES = list(DISTRIBUTIONS)
R, S = 4.0 / 1.414, 0.5 / 1.414
"""Radius and standard deviation of the eight Gaussians."""


def drawn(name: str, num: int, seed: int = 0) -> Tensor:
    return DISTRIBUTIONS[name].sample(num, torch.Generator().manual_seed(seed))


def cell_area(half_side: float, cells: int) -> float:
    return (2.0 * half_side / cells) ** 2


# ----------------------------------------------------------------------------
# Densities.


@pytest.mark.parametrize("name", NAMES)
def test_a_density_integrates_to_one(name):
    """The midpoint rule is exact for fields that the grid lines follow, and as good as exact for normal noise."""
    density = DISTRIBUTIONS[name].log_density(square_grid(6.0, 144)).exp()
    assert float(density.sum()) * cell_area(6.0, 144) == pytest.approx(1.0, abs=1e-5)


def normal_density(distance: float, std: float) -> float:
    return math.exp(-(distance**2) / (2.0 * std**2)) / (2.0 * math.pi * std**2)


def test_density_of_the_eight_gaussians_is_the_mixture():
    points = drawn("gaussians8", 20)
    found = DISTRIBUTIONS["gaussians8"].log_density(points).exp().tolist()
    for (x, y), density in zip(points.tolist(), found, strict=True):
        centers = [(R * math.cos(k * math.pi / 4), R * math.sin(k * math.pi / 4)) for k in range(8)]
        by_hand = np.mean([norm.pdf(x, a, S) * norm.pdf(y, b, S) for a, b in centers])
        assert density == pytest.approx(by_hand, rel=1e-6)


def spiral_density(x: float, y: float) -> float:
    """By adaptive quadrature: theta has the density 2 theta / (9 pi^2) on 0..3 pi."""

    def integrand(theta: float, sign: float) -> float:
        a, b = sign * theta / 3.0 * math.cos(theta), sign * theta / 3.0 * math.sin(theta)
        return normal_density(math.hypot(x - a, y - b), 0.1) * 2.0 * theta / (9.0 * math.pi**2)

    end = 3.0 * math.pi
    return 0.5 * sum(quad(integrand, 0.0, end, args=(s,), limit=500, points=np.arange(1, 9))[0] for s in (1.0, -1.0))


def moon_density(x: float, y: float) -> float:
    """By adaptive quadrature: half circles of radius 2, angles uniform on 0..pi."""

    def integrand(angle: float, sign: float) -> float:
        a, b = sign * (2.0 * math.cos(angle) - 1.0), sign * (2.0 * math.sin(angle) - 0.5)
        return normal_density(math.hypot(x - a, y - b), 0.2) / math.pi

    return 0.5 * sum(quad(integrand, 0.0, math.pi, args=(s,), limit=500, points=(1, 2))[0] for s in (1.0, -1.0))


@pytest.mark.parametrize(
    ("name", "density", "ends"),
    [
        ("two_spirals", spiral_density, [(0.0, 0.0), (-math.pi, 0.0), (math.pi, 0.0), (-math.pi, -0.15)]),
        ("moons", moon_density, [(1.0, -0.5), (-3.0, -0.5), (3.0, 0.5), (-3.1, -0.7)]),
    ],
)
def test_density_around_a_curve_is_the_line_integral_also_at_its_ends(name, density, ends):
    points = torch.cat((drawn(name, 20), torch.tensor(ends)))
    found = DISTRIBUTIONS[name].log_density(points).exp().tolist()
    by_hand = [density(x, y) for x, y in points.tolist()]
    assert found == pytest.approx(by_hand, rel=1e-5)


def test_checkerboard_is_uniform_on_eight_fields_and_nothing_elsewhere():
    fields = square_grid(SQUARE, 4)
    density = DISTRIBUTIONS["checkerboard"].log_density(fields).exp().view(4, 4)
    dark = (torch.arange(4)[:, None] + torch.arange(4)) % 2 == 0
    assert density[dark].tolist() == pytest.approx([1 / 32] * 8)
    assert density[~dark].tolist() == [0.0] * 8
    outside = torch.tensor([[4.5, 0.0], [0.0, -4.5], [-5.0, -5.0]])
    assert DISTRIBUTIONS["checkerboard"].log_density(outside).tolist() == [-math.inf] * 3


@pytest.mark.parametrize("name", NAMES)
def test_a_log_density_of_many_points_is_that_of_each(name):
    points = drawn(name, 5_000)  # more than are taken at a time
    density = DISTRIBUTIONS[name].log_density(points)
    assert density.dtype == torch.float64
    torch.testing.assert_close(density[4_990:], DISTRIBUTIONS[name].log_density(points[4_990:]))


# ----------------------------------------------------------------------------
# Samples.


@pytest.mark.parametrize("name", NAMES)
def test_samples_follow_the_density_by_a_chi_square_test(name):
    """Counts in fields of side 1/2 against the density integrated over each; those that expect few are put together."""
    num, fields, fine = 20_000, 16, 8
    density = DISTRIBUTIONS[name].log_density(square_grid(SQUARE, fields * fine)).exp()
    blocks = density.view(fields, fine, fields, fine).sum(dim=(1, 3)).flatten() * cell_area(SQUARE, fields * fine)
    points = drawn(name, num, seed=1)
    place = ((points + SQUARE) * (fields / (2.0 * SQUARE))).floor().long()
    inside = ((place >= 0) & (place < fields)).all(dim=1)
    counts = (place[inside, 0] * fields + place[inside, 1]).bincount(minlength=fields**2).double()
    enough = blocks * num >= 10.0
    expected = torch.cat((blocks[enough], 1.0 - blocks[enough].sum(0, keepdim=True))) * num
    found = torch.cat((counts[enough], num - counts[enough].sum(0, keepdim=True)))
    if float(expected[-1]) < 1e-6:  # no remainder
        expected, found = expected[:-1], found[:-1]
    statistic = float(((found - expected).square() / expected).sum())
    assert chi2.sf(statistic, len(expected) - 1) > 1e-3


SQUARES = {
    "gaussians8": R**2 + 2 * S**2,
    "two_spirals": math.pi**2 / 2 + 2 * 0.1**2,  # theta^2 is uniform on 0..9 pi^2
    "checkerboard": 2 * 16 / 3,  # each coordinate is uniform on -4..4
    "moons": 4 + 1.25 - 2 * 2 * 0.5 * 2 / math.pi + 2 * 0.2**2,  # |2 (cos, sin) - (1, 1/2)|^2, mean sine 2 / pi
}


@pytest.mark.parametrize("name", NAMES)
def test_samples_have_the_mean_and_mean_square_on_paper(name):
    points = drawn(name, 20_000, seed=2).double()
    squares = points.square().sum(1)
    assert points.mean(0).norm() < 4.0 * math.sqrt(SQUARES[name] / 20_000)  # all four are symmetric in the origin
    assert float(squares.mean()) == pytest.approx(SQUARES[name], abs=4.0 * float(squares.std()) / math.sqrt(20_000))


# ----------------------------------------------------------------------------
# The data set.


def test_a_planar_data_set_is_the_same_every_time_and_held_out_points_are_others():
    config = DATA_SETS.config("moons", num_points=300)
    points, again = load(config), load(config)
    assert isinstance(points, Points)
    assert torch.equal(points.stored, again.stored)
    assert points.stored.dtype == torch.float32
    assert (len(points), points.event) == (300, (2,))
    test, other = points.held_out(200), points.held_out(200, "floor/0")
    assert torch.equal(test, points.held_out(200))
    sets = [{tuple(point) for point in some.tolist()} for some in (points.stored, test, other)]
    assert len(set.union(*sets)) == 700


def test_the_signature_of_points_is_that_of_their_content():
    signatures = {load(DATA_SETS.config(name, num_points=num)).signature for name in NAMES for num in (10, 20)}
    assert len(signatures) == 2 * len(NAMES)


def test_points_have_no_classes():
    with pytest.raises(UserError, match=stating("data.label … moons")):
        build(ExperimentConfig, {"data": {"kind": "moons", "label": 3}})


def test_points_are_batched_stored_and_sampled_as_they_are(make_policy):
    """Images become pixels; coordinates stay what they are, outside [-1, 1] too."""
    points = 3.0 * drawn("moons", 6)
    assert torch.equal(encode(points), points)
    assert torch.equal(decode(points), points)
    batch = BatchStream(points, 6, generator(0, "order")).next()
    assert torch.equal(batch.x[0].sort(dim=0).values, points.sort(dim=0).values)
    policy = make_policy(event=(2,))
    config = EvaluateConfig(num_samples=8, batch_size=8)
    samples = generate(Sampling(policy, REPORT), 8, config)
    assert torch.equal(samples, policy.sample(8, generator(config.seed, f"{REPORT}/0")))


# ----------------------------------------------------------------------------
# The area under the curve.


@pytest.mark.parametrize("decimals", [0, 1, 9])
def test_roc_auc_is_scikit_learns_also_with_ties(decimals):
    rng = np.random.default_rng(0)
    positive, negative = rng.normal(0.5, 1.0, 300).round(decimals), rng.normal(0.0, 1.0, 500).round(decimals)
    labels = np.repeat([1, 0], [300, 500])
    expected = roc_auc_score(labels, np.concatenate((positive, negative)))
    assert roc_auc(torch.from_numpy(positive), torch.from_numpy(negative)) == pytest.approx(expected, rel=1e-12)


def auc_by_integration(name: str) -> float:
    """P(p(X) > p(U)) + P(=) / 2 with X from the density and U uniform, over the cells of a grid."""
    log_density = DISTRIBUTIONS[name].log_density(square_grid(SQUARE, 160))
    values, cell = log_density.exp().unique(return_inverse=True)
    weights = torch.zeros(len(values), dtype=torch.float64).index_add(0, cell, log_density.exp())
    uniform = cell.bincount(minlength=len(values)).double()
    weights, uniform = weights / weights.sum(), uniform / uniform.sum()
    return float(weights @ (uniform.cumsum(0) - 0.5 * uniform))


@pytest.mark.parametrize("name", NAMES)
def test_the_exact_density_tells_data_from_noise_as_integration_says(name):
    num = 20_000
    positive = DISTRIBUTIONS[name].log_density(drawn(name, num, seed=3)).exp()
    noise = (2.0 * torch.rand((num, 2), generator=torch.Generator().manual_seed(4)) - 1.0) * SQUARE
    found, exact = roc_auc(positive, DISTRIBUTIONS[name].log_density(noise).exp()), auc_by_integration(name)
    assert found == pytest.approx(exact, abs=4.0 * math.sqrt(exact * (1.0 - exact) / num))


def test_what_the_exact_density_can_reach():
    """The eight Gaussians .90; on the checkerboard half of the noise ties with the data: 1/2 + 1/2 1/2."""
    assert auc_by_integration("gaussians8") == pytest.approx(0.90, abs=0.005)
    assert auc_by_integration("checkerboard") == pytest.approx(0.75, abs=1e-9)


# ----------------------------------------------------------------------------
# The normalized energy.

WIDE = square_grid(8.0, 200)


def gaussian(mean: float, std: float) -> Tensor:
    """Log density of N((mean, 0), std^2 I) up to a constant, on the wide grid."""
    return -((WIDE.double() - torch.tensor([mean, 0.0])).square().sum(1)) / (2.0 * std**2)


@pytest.mark.parametrize(("scale", "offset"), [(1.0, 0.0), (0.05, 3.0), (40.0, -100.0)])
def test_an_energy_that_is_the_log_density_at_some_temperature_has_no_distance(scale, offset):
    fit = calibrated_kl(offset - scale * gaussian(0.7, 0.9), gaussian(0.7, 0.9))
    assert fit.kl == pytest.approx(0.0, abs=1e-9)
    assert fit.beta == pytest.approx(1.0 / scale, rel=1e-6)


def test_distance_between_two_gaussians_is_the_closed_form():
    """E = |x|^2 / 2 makes q_beta = N(0, I / beta); against N(mu, s^2 I) in the plane KL is least at 1 / beta =
    s^2 + |mu|^2 / 2, and is then log((s^2 + |mu|^2 / 2) / s^2).
    """
    fit = calibrated_kl(-gaussian(0.0, 1.0), gaussian(1.2, 0.8))
    variance = 0.8**2 + 1.2**2 / 2.0
    assert fit.beta == pytest.approx(1.0 / variance, rel=1e-6)
    assert fit.kl == pytest.approx(math.log(variance / 0.8**2), rel=1e-6)


@pytest.mark.parametrize("energy", [torch.zeros(len(WIDE)), gaussian(0.0, 1.0)], ids=["flat", "upside down"])
def test_an_energy_that_knows_nothing_is_as_far_as_the_uniform_density(energy):
    """Entropy of N(0, I) in the plane: log(2 pi e); of the uniform density: log of the area, 256."""
    fit = calibrated_kl(energy, gaussian(0.0, 1.0))
    assert fit.beta == 0.0
    assert fit.kl == pytest.approx(math.log(256.0) - math.log(2.0 * math.pi * math.e), rel=1e-6)


def test_a_density_that_is_zero_somewhere_is_compared_where_it_is_not():
    """Uniform on half of the cells against uniform on all: log 2."""
    log_density = torch.where(WIDE[:, 0] > 0.0, 0.0, -math.inf)
    assert calibrated_kl(torch.zeros(len(WIDE)), log_density).kl == pytest.approx(math.log(2.0), rel=1e-12)


# ----------------------------------------------------------------------------
# The scorer.


class ExactCritic(Critic):
    """-log p / 3 of the data: the energy that a run should find, at temperature 1/3."""

    def __init__(self, name: str) -> None:
        super().__init__()
        self.name = name

    def forward(self, x: Tensor) -> Tensor:
        return -DISTRIBUTIONS[self.name].log_density(x) / 3.0


@pytest.fixture
def scorer() -> PlanarScorer:
    points = load(DATA_SETS.config("gaussians8", num_points=100))
    return PlanarScorer(points, EvaluateConfig(num_samples=2_000, projections=32))


def test_the_exact_energy_has_the_scores_of_the_data(scorer, make_policy):
    values = scorer.full_evaluation(Sampling(make_policy(event=(2,)), REPORT), Energy(ExactCritic("gaussians8"))).values
    data = scorer.of_data().values
    assert values["eval/energy_kl"] == pytest.approx(0.0, abs=1e-9)
    assert values["eval/energy_beta"] == pytest.approx(3.0, rel=1e-5)
    # In float32 a few more energies are equal.
    assert values["eval/energy_auc"] == pytest.approx(data["eval/energy_auc"], abs=1e-5)
    assert values[NUM_SAMPLES_KEY] == data[NUM_SAMPLES_KEY] == 2_000


def test_the_floor_is_the_mean_distance_of_independent_sets_of_data(scorer):
    """It shrinks with the square root of the number of points, and a policy of pure noise is far above it."""
    small = scorer.of_data().values[scorer.metric]
    large = PlanarScorer(scorer.points, replace(scorer.config, num_samples=8_000)).of_data().values[scorer.metric]
    assert 0.0 < large < small < 0.2
    assert small / large == pytest.approx(2.0, rel=0.5)


def test_without_an_energy_the_samples_alone_are_scored(scorer, make_policy):
    values = scorer.score(Sampling(make_policy(event=(2,)), REPORT)).values
    assert set(values) == {scorer.metric, NUM_SAMPLES_KEY}
    assert values[scorer.metric] > 5.0 * scorer.of_data().values[scorer.metric]


def test_the_kind_of_data_chooses_the_scorer(tmp_path, scorer):
    built = build_scorer(scorer.points, scorer.config, tmp_path, torch.device("cpu"))
    assert isinstance(built, PlanarScorer)
    images = build_scorer(load(DigitsConfig()), scorer.config, tmp_path, torch.device("cpu"))
    assert isinstance(images, ImageScorer)
