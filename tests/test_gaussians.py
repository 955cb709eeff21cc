"""The Frechet distance from moments: closed forms, torch-fidelity's own cases, and the limit of many samples."""

import math

import numpy as np
import pytest
import scipy.linalg
import torch
from torch import Tensor

from dxmi.compat import torch_fidelity
from dxmi.metrics.gaussians import Gaussian, Moments, intercept, set_sizes
from dxmi.seeds import generator


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


def with_moments(n: int, mean: list[float], stds: list[float], seed: int) -> Tensor:
    """n points whose sample mean is `mean` and whose sample covariance is diagonal, up to rounding."""
    points = normal(n, len(mean), seed=seed)
    points = points - points.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(points.T.cov()), points.T, upper=False).T
    return whitened * torch.tensor(stds, dtype=torch.float64) + torch.tensor(mean, dtype=torch.float64)


def by_scipy(x: np.ndarray, y: np.ndarray) -> float:
    """The formula with scipy's matrix root, as torch-fidelity computed it up to version 0.3."""
    covariances = np.atleast_2d(np.cov(x, rowvar=False)), np.atleast_2d(np.cov(y, rowvar=False))
    root = scipy.linalg.sqrtm(covariances[0] @ covariances[1])
    gap = x.mean(0) - y.mean(0)
    return float(gap @ gap + np.trace(covariances[0]) + np.trace(covariances[1]) - 2.0 * np.trace(root).real)


def by_torch_fidelity(x: Tensor, y: Tensor) -> float:
    metric_fid = torch_fidelity("metric_fid")
    statistics = metric_fid.fid_features_to_statistics(x), metric_fid.fid_features_to_statistics(y)
    return float(metric_fid.fid_statistics_to_metric(*statistics, verbose=False)["frechet_inception_distance"])


def test_commuting_covariances_give_bures_on_paper():
    """Standard deviations (1, 2) and (3, 4): 2^2 + 2^2 = 8; means differ by (1, 2): 5 more."""
    reference = Gaussian.of(with_moments(60, [1.0, 2.0], [3.0, 4.0], 1))
    assert reference.distance(with_moments(40, [0.0, 0.0], [1.0, 2.0], 2)) == pytest.approx(13.0, abs=1e-10)


@pytest.mark.parametrize("dims", [2, 8, 64, 256])
@pytest.mark.parametrize("num", [512, 2048])
def test_torch_fidelitys_own_cases_of_full_rank(num, dims):
    """tests/torch_pure/misc/test_fid_stats_fn.py in its repository: normals of RandomState(2023), to 5 places."""
    rng = np.random.RandomState(2023)
    x, y = rng.randn(num, dims), rng.randn(num, dims)
    distance = Gaussian.of(torch.from_numpy(y)).distance(torch.from_numpy(x))
    assert distance == pytest.approx(by_scipy(x, y), abs=1e-7)
    assert distance == pytest.approx(by_torch_fidelity(torch.from_numpy(x), torch.from_numpy(y)), abs=1e-7)


@pytest.mark.parametrize("num", [2, 4, 8, 32])
@pytest.mark.parametrize("dims", [2, 4, 16, 64])
def test_torch_fidelitys_own_cases_with_few_samples(num, dims):
    """Where features outnumber samples, the root of a rounding error counts: torch-fidelity asks for 5 places."""
    rng = np.random.RandomState(2023)
    x, y = rng.randn(num, dims), rng.randn(num, dims)
    distance = Gaussian.of(torch.from_numpy(y)).distance(torch.from_numpy(x))
    theirs = by_torch_fidelity(torch.from_numpy(x), torch.from_numpy(y))
    assert distance == pytest.approx(theirs, abs=1e-5)


def test_the_case_that_was_nan_in_torch_fidelity_for_a_while():
    """make_stat(4, 4, seed=1): a product of covariances with tiny negative eigenvalues."""
    rng = np.random.RandomState(1)
    x, y = torch.from_numpy(rng.randn(4, 4)), torch.from_numpy(rng.randn(4, 4))
    assert Gaussian.of(y).distance(x) == pytest.approx(by_torch_fidelity(x, y), abs=1e-6)


@pytest.mark.parametrize("num", [5, 30, 90])
def test_a_set_is_at_distance_zero_from_itself(num):
    """Whether it has more points than dimensions or fewer; the root of 1e-16 is 1e-8, once a dimension."""
    points = normal(num, 20, seed=3)
    assert Gaussian.of(points).distance(points) == pytest.approx(0.0, abs=1e-6)


def test_features_that_never_differ_do_no_harm():
    x, y = normal(50, 6), normal(50, 6, seed=1)
    dead = torch.full((50, 1), 3.0, dtype=torch.float64)
    alive = Gaussian.of(y).distance(x)
    assert Gaussian.of(torch.cat((y, dead), 1)).distance(torch.cat((x, dead), 1)) == pytest.approx(alive, abs=1e-6)


@pytest.mark.parametrize("cuts", [(1,), (7, 8), (10, 30, 49)])
def test_merged_moments_are_those_of_all(cuts):
    points = normal(50, 5) * 0.01 + 1000.0  # a large mean is where sums of squares would fail
    parts = [Moments.of(part) for part in torch.tensor_split(points, cuts)]
    merged = parts[0]
    for part in parts[1:]:
        merged = merged.merged(part)
    assert merged.count == 50
    torch.testing.assert_close(merged.mean, points.mean(0), rtol=1e-14, atol=0)
    torch.testing.assert_close(merged.covariance, points.T.cov(), rtol=1e-8, atol=1e-12)


# ----------------------------------------------------------------------------
# The limit.


def test_the_intercept_of_points_on_a_line_is_exact():
    x = torch.tensor([0.1, 0.2, 0.5], dtype=torch.float64)
    assert intercept(x, 3.0 + 4.0 * x) == pytest.approx(3.0, abs=1e-14)


def test_sets_are_as_in_the_paper():
    """15 from 5,000 to 50,000; of fewer samples, from half of them."""
    assert set_sizes(50_000)[:2] == [5_000, 8_214]
    assert (len(set_sizes(50_000)), set_sizes(50_000)[-1]) == (15, 50_000)
    assert (set_sizes(5_000)[0], set_sizes(5_000)[-1]) == (2_500, 5_000)
    assert set_sizes(4) == [2, 3, 4]


def test_the_bias_of_one_dimension_is_one_and_a_half_over_n_and_the_limit_has_none():
    """x ~ N(0, 1) against N(0, 1) itself: E[mean^2] = 1/N and E[(s - 1)^2] = 1/(2N) to first order."""
    reference = Gaussian(torch.zeros(1, dtype=torch.float64), torch.ones(1, 1, dtype=torch.float64))
    num, draws = 400, 400
    sets = [normal(num, 1, seed=seed) for seed in range(draws)]
    biased = np.array([reference.distance(x) for x in sets])
    assert biased.mean() == pytest.approx(1.5 / num, abs=4.0 * biased.std() / math.sqrt(draws))
    limit = np.array([reference.distance_at_infinity(x, generator(0, "sets")) for x in sets[:100]])
    assert abs(limit.mean()) < 4.0 * limit.std(ddof=1) / math.sqrt(100)
    assert abs(limit.mean()) < biased.mean() / 2


def test_the_limit_of_a_shift_is_its_square():
    """N(0, I) against N(mu, I) in 16 dimensions, |mu|^2 = 4: FID of 1,000 is too large by about 0.14."""
    mean = torch.full((16,), 0.5, dtype=torch.float64)
    reference = Gaussian(mean, torch.eye(16, dtype=torch.float64))
    sets = [normal(1_000, 16, seed=seed) for seed in range(20)]
    plain = np.array([reference.distance(x) for x in sets])
    limit = np.array([reference.distance_at_infinity(x, generator(seed, "sets")) for seed, x in enumerate(sets)])
    error = limit.std(ddof=1) / math.sqrt(20)
    assert abs(limit.mean() - 4.0) < 4.0 * error
    assert abs(limit.mean() - 4.0) < abs(plain.mean() - 4.0)
