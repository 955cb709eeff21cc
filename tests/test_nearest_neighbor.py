"""The check against memorizing, on points whose distances are known."""

import pytest
import torch

from dxmi.data.batch import UNCONDITIONAL
from dxmi.data.dataset import Split
from dxmi.metrics.base import Evidence
from dxmi.metrics.nearest_neighbor import NearestNeighbor, nearest_distances
from dxmi.metrics.registry import METRICS


def scores(samples: torch.Tensor, train: torch.Tensor, test: torch.Tensor | None = None) -> dict:
    metric = METRICS.build(METRICS.config("nearest_neighbor"))
    assert isinstance(metric, NearestNeighbor)
    rows = metric.observe(samples, UNCONDITIONAL)
    return dict(metric.scores(Evidence(rows, None, None if test is None else Split(test), Split(train))))


def test_distances_equal_those_by_differences():
    noise = torch.Generator().manual_seed(0)
    x, train = (torch.randint(256, (num, 49), generator=noise).float() for num in (700, 300))
    expected = (x[:, None] - train).square().sum(2).sqrt().min(1).values
    torch.testing.assert_close(nearest_distances(x, train), expected)
    others = (train[:, None] - train).square().sum(2).sqrt()
    others.fill_diagonal_(torch.inf)
    torch.testing.assert_close(nearest_distances(train, train, skip=1), others.min(1).values)


def test_copies_have_ratio_0_and_all_of_them_are_counted():
    train = torch.randint(256, (200, 1, 6, 6), generator=torch.Generator().manual_seed(0)).to(torch.uint8)
    assert scores(train[:50], train) == {"eval/nearest_ratio": 0.0, "eval/copies": 1.0}


def test_fresh_data_have_ratio_1_and_one_in_a_hundred_counts():
    """Whether unseen data are a test split or training data without their own copy."""
    draw = torch.Generator().manual_seed(0)
    train, test, samples = (torch.randn((2000, 2), generator=draw) for _ in range(3))
    for unseen in (test, None):
        found = scores(samples, train, unseen)
        assert found["eval/nearest_ratio"] == pytest.approx(1.0, abs=0.06)
        assert found["eval/copies"] == pytest.approx(0.01, abs=0.01)


def test_samples_at_twice_the_distance_of_unseen_data_have_ratio_2():
    """Training data at 0 and far away; unseen data at distance 1 and samples at distance 2 from 0."""
    train = torch.tensor([[0.0, 0.0], [99.0, 99.0]])
    turns = torch.linspace(0.0, 6.0, 8)
    circle = torch.stack((turns.cos(), turns.sin()), dim=1)
    found = scores(2.0 * circle, train, circle)
    assert found == {"eval/nearest_ratio": pytest.approx(2.0), "eval/copies": 0.0}
