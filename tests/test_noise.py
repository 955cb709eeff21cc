"""The noise of an evaluation: each run's own, shared by the arms of a seed, and part of the spread between seeds."""

import math
from collections.abc import Iterator

import numpy as np
import pytest
import torch
from torch import Tensor

from dxmi.critics.energy import Energy
from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.data.configs import DigitsConfig
from dxmi.data.loading import load
from dxmi.data.registry import DATA_SETS
from dxmi.evaluation.config import CONFIRMATION, PICTURES, REPORT, SELECTION, EvaluateConfig
from dxmi.evaluation.sampling import Sampling, generate, stream_of
from dxmi.evaluation.scorers import ImageScorer, PlanarScorer, Score, Scores
from dxmi.metrics.fidelity import classifier_features, precision_recall
from dxmi.seeds import generator

CONFIG = EvaluateConfig(num_samples=50, batch_size=20, kid_subsets=2, kid_subset_size=20, projections=4)


class Normal:
    """A policy whose samples are standard normal: every run of it is trained equally well."""

    event = (2,)
    start_sigma = 1.0
    timestep = torch.zeros(1)

    def draw_condition(self, num: int, noise: torch.Generator) -> Condition:
        return UNCONDITIONAL

    def sample_states(self, num: int, noise: torch.Generator, *_: object, **__: object) -> Iterator[Tensor]:
        yield torch.randn((num, *self.event), generator=noise)


class MeanScorer(PlanarScorer):
    """Scores samples by their mean."""

    def score(self, sampling: Sampling, energy: Energy | None = None) -> Scores:
        mean: Score = lambda samples: {"eval/mean": float(samples.mean())}  # noqa: E731
        return self._scores(sampling, energy, mean)


@pytest.fixture(scope="module")
def points():
    return load(DATA_SETS.config("gaussians8", num_points=100))


def test_each_kind_of_noise_of_each_run_is_a_stream_of_its_own():
    kinds = (SELECTION, REPORT, CONFIRMATION)
    streams = {stream_of(kind, seed) for kind in kinds for seed in range(5)} | {PICTURES}
    first = {float(torch.randn((), generator=generator(0, f"{stream}/0"))) for stream in streams}
    assert len(first) == len(streams) == 16


def test_the_effect_of_the_noise_is_in_the_spread_over_the_seeds(points):
    """The mean of n samples of two normal coordinates has variance 1 / (2n); with one draw for all seeds it had 0."""
    scorer = MeanScorer(points, CONFIG)
    scores = np.array([scorer.score(Sampling(Normal(), stream_of(REPORT, s))).values["eval/mean"] for s in range(400)])
    expected = 1.0 / (2 * CONFIG.num_samples)
    spread = expected * math.sqrt(2.0 / (len(scores) - 1))  # of the variance of as many normal scores
    assert abs(scores.var(ddof=1) - expected) < 3.0 * spread
    assert abs(scores.mean()) < 3.0 * math.sqrt(expected / len(scores))
    paired = [scorer.score(Sampling(Normal(), stream_of(REPORT, 7))).values["eval/mean"] for _ in range(2)]
    assert paired[0] == paired[1] == scores[7]


def test_everything_that_a_score_of_points_draws_is_of_its_stream(points):
    scorer = PlanarScorer(points, CONFIG)
    one, other = (stream_of(REPORT, seed) for seed in (0, 1))
    assert not torch.equal(scorer.reference(one), scorer.reference(other))
    assert not torch.equal(scorer._uniform(one), scorer._uniform(other))
    assert scorer.of_data(one).values[scorer.metric] != scorer.of_data(other).values[scorer.metric]
    samples, data = torch.randn(50, 2), scorer.reference(one)
    distances = {stream: scorer._sliced_wasserstein(samples, data, stream) for stream in (one, other)}
    assert distances[one] != distances[other]
    assert distances[one] == PlanarScorer(points, CONFIG)._sliced_wasserstein(samples, data, one)


def test_everything_that_a_score_of_images_draws_is_of_its_stream(tmp_path):
    """Of the same samples FID is one number; the scores that look at random parts of them are as many as streams."""
    digits = load(DigitsConfig())
    scorer = ImageScorer(digits, CONFIG, tmp_path, torch.device("cpu"))
    samples = digits.pixels[::30][:50]
    found = [scorer._distances(samples, stream_of(REPORT, seed)) for seed in (0, 1, 0)]
    assert found[0] == found[2]
    assert found[0]["eval/fid_digits"] == found[1]["eval/fid_digits"]
    for key in ("eval/kid_digits", "eval/recall_digits", "eval/sliced_wasserstein"):
        assert found[0][key] != found[1][key], key
    rows = torch.randperm(len(scorer.reference), generator=generator(0, "report/seed_0/neighbours"))[:50]
    features = classifier_features("digits", samples)
    expected = precision_recall(features, scorer.reference[rows])
    assert (found[0]["eval/precision_digits"], found[0]["eval/recall_digits"]) == pytest.approx(expected)


def test_pictures_are_of_one_noise_whatever_the_runs_seed(make_policy):
    policy = make_policy(event=(2,))
    samples = generate(Sampling(policy, PICTURES), 8, CONFIG)
    assert torch.equal(samples, policy.sample(CONFIG.batch_size, generator(CONFIG.seed, f"{PICTURES}/0"))[:8])
