"""The scores against closed forms, brute force and torch-fidelity's own front door; the classifiers they rest on."""

import hashlib
import math
import subprocess
import sys
from importlib.resources import files
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from scipy.stats import wasserstein_distance
from torch import Tensor

from dxmi.compat import torch_fidelity
from dxmi.data.images import data_root
from dxmi.errors import UserError
from dxmi.evaluation.config import EvaluateConfig
from dxmi.metrics import classifier
from dxmi.metrics.classifier import CLASSIFIERS, load_classifier
from dxmi.metrics.fidelity import classifier_features, frechet_distance, kernel_distance, precision_recall
from dxmi.metrics.gaussians import Gaussian
from dxmi.metrics.sliced_wasserstein import sliced_wasserstein, wasserstein_1d
from dxmi.metrics.train_classifier import accuracy, split
from support import Pixels, stating

WEIGHTS = files("dxmi.metrics") / "weights"


def normal(*shape: int, seed: int = 0) -> Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)


# ----------------------------------------------------------------------------
# Frechet distance.


def exactly(n: int, mean: Tensor, covariance: Tensor, seed: int) -> Tensor:
    """n points whose sample mean and (n - 1) covariance are the given ones up to rounding."""
    points = normal(n, len(mean), seed=seed)
    points = points - points.mean(0)
    whitened = torch.linalg.solve_triangular(torch.linalg.cholesky(points.T.cov()), points.T, upper=False).T
    return whitened @ torch.linalg.cholesky(covariance).T + mean


def symmetric_root(matrix: Tensor) -> Tensor:
    values, vectors = torch.linalg.eigh(matrix)
    return vectors @ torch.diag(values.clamp_min(0.0).sqrt()) @ vectors.T


def closed_frechet(mean: Tensor, covariance: Tensor, mean2: Tensor, covariance2: Tensor) -> float:
    """|mu - mu'|^2 + tr S + tr S' - 2 tr (S^(1/2) S' S^(1/2))^(1/2)."""
    root = symmetric_root(covariance)
    cross = symmetric_root(root @ covariance2 @ root)
    traces = torch.trace(covariance) + torch.trace(covariance2) - 2.0 * torch.trace(cross)
    return float((mean - mean2).square().sum() + traces)


def covariances() -> tuple[Tensor, Tensor]:
    """Two that do not commute."""
    a, b = normal(4, 4, seed=1), normal(4, 4, seed=2)
    return a @ a.T + 0.1 * torch.eye(4, dtype=torch.float64), b @ b.T + 0.1 * torch.eye(4, dtype=torch.float64)


def test_frechet_distance_of_points_with_exact_moments_is_the_closed_form():
    (s1, s2), m1, m2 = covariances(), normal(4, seed=3), normal(4, seed=4)
    distance = frechet_distance(exactly(500, m1, s1, 5), exactly(300, m2, s2, 6))
    assert distance == pytest.approx(closed_frechet(m1, s1, m2, s2), abs=1e-8)


def test_frechet_distance_of_commuting_covariances_is_bures_on_paper():
    """Diagonal 1, 4 and 9, 16: (3 - 1)^2 + (4 - 2)^2 = 8; means differ by (1, 2): 5 more."""
    zero, mean = torch.zeros(2, dtype=torch.float64), torch.tensor([1.0, 2.0], dtype=torch.float64)
    narrow, wide = (torch.diag(torch.tensor(d, dtype=torch.float64)) for d in ([1.0, 4.0], [9.0, 16.0]))
    assert frechet_distance(exactly(100, zero, narrow, 1), exactly(100, mean, wide, 2)) == pytest.approx(13.0, abs=1e-8)


def test_frechet_distance_of_a_set_to_itself_is_zero():
    points = exactly(100, normal(4, seed=3), covariances()[0], 5)
    assert frechet_distance(points, points) == pytest.approx(0.0, abs=1e-8)


def test_frechet_distance_of_samples_approaches_the_closed_form():
    """N(0, I) against N(mu, 4 I) in 3 dimensions: |mu|^2 + 3; the error of n samples is a few / sqrt(n)."""
    n, mean = 20_000, torch.tensor([1.0, 0.0, 0.0], dtype=torch.float64)
    distance = frechet_distance(normal(n, 3, seed=1), 2.0 * normal(n, 3, seed=2) + mean)
    # Standard error: means 2 |mu| sqrt((1 + 4) / n), stds sqrt(3) * 2 * (2 - 1) * sqrt((1 + 4) / (2 n)).
    error = math.hypot(2.0 * math.sqrt(5.0 / n), 2.0 * math.sqrt(3.0) * math.sqrt(2.5 / n))
    assert distance == pytest.approx(4.0, abs=4.0 * error)


# ----------------------------------------------------------------------------
# Kernel distance.


def cubic_mmd(x: np.ndarray, y: np.ndarray) -> float:
    """Unbiased squared MMD with k(a, b) = (a.b / D + 1)^3, by loops over pairs."""

    def k(a: np.ndarray, b: np.ndarray) -> float:
        return (float(a @ b) / len(a) + 1.0) ** 3

    n, m = len(x), len(y)
    within_x = sum(k(x[i], x[j]) for i in range(n) for j in range(n) if i != j) / (n * (n - 1))
    within_y = sum(k(y[i], y[j]) for i in range(m) for j in range(m) if i != j) / (m * (m - 1))
    return within_x + within_y - 2.0 * sum(k(a, b) for a in x for b in y) / (n * m)


def test_kernel_distance_of_whole_sets_is_the_unbiased_cubic_mmd():
    x, y = normal(40, 5, seed=1), normal(40, 5, seed=2) + 0.5
    by_hand = cubic_mmd(x.numpy(), y.numpy())
    for subset_size in (40, 1000):  # a subset is never larger than a set
        distance = kernel_distance(x, y, subsets=2, subset_size=subset_size, seed=0)
        assert distance == pytest.approx(by_hand, rel=1e-10)


def test_kernel_distance_of_unequal_sets_uses_subsets_of_the_smaller():
    """The mean over subsets of 30 of 60: unbiased, so near the mean over all pairs of the two sets."""
    x, y = normal(30, 5, seed=1), normal(60, 5, seed=2) + 0.5
    distances = [kernel_distance(x, y, subsets=200, subset_size=1000, seed=seed) for seed in (0, 1)]
    assert distances[0] != distances[1]
    assert np.mean(distances) == pytest.approx(cubic_mmd(x.numpy(), y.numpy()), rel=0.05)


def test_kernel_distance_of_equal_distributions_is_zero_on_average():
    """Unbiased: 50 independent pairs of sets average to 0 within 4 standard errors, and some are negative."""
    pairs = [(normal(50, 3, seed=2 * i), normal(50, 3, seed=2 * i + 1)) for i in range(50)]
    distances = np.array([kernel_distance(x, y, subsets=1, subset_size=50, seed=0) for x, y in pairs])
    assert abs(distances.mean()) < 4.0 * distances.std(ddof=1) / math.sqrt(50)
    assert (distances < 0.0).any()


# ----------------------------------------------------------------------------
# Precision and recall.


def brute_force(generated: np.ndarray, reference: np.ndarray) -> tuple[float, float]:
    """Fractions within the other set's balls, whose radius is the distance to the third neighbor."""

    def covered(points: np.ndarray, centers: np.ndarray) -> float:
        radii = []
        for i, center in enumerate(centers):
            others = np.delete(centers, i, axis=0)
            radii.append(sorted(np.linalg.norm(others - center, axis=1))[2])
        inside = [
            any(np.linalg.norm(p - c) <= radius for c, radius in zip(centers, radii, strict=True)) for p in points
        ]
        return float(np.mean(inside))

    return covered(generated, reference), covered(reference, generated)


@pytest.mark.parametrize("seed", range(3))
def test_precision_and_recall_equal_brute_force_on_unequal_sets(seed):
    generated, reference = 0.5 * normal(23, 2, seed=seed), normal(37, 2, seed=100 + seed) + 0.3
    expected = brute_force(generated.numpy(), reference.numpy())
    assert precision_recall(generated, reference) == pytest.approx(expected, abs=1e-6)
    assert expected[0] > expected[1]  # a narrow set is precise and recalls little: the two are not swapped


def test_too_few_samples_to_have_a_third_neighbor_are_refused():
    """Precision and recall need three neighbors besides the sample itself."""
    scores = precision_recall(normal(4, 2), normal(4, 2, seed=1))
    assert all(0.0 <= score <= 1.0 for score in scores)
    with pytest.raises(ValueError, match="num_samples is 3"):
        EvaluateConfig(num_samples=3)


# ----------------------------------------------------------------------------
# torch-fidelity's own front door.


def register_digits() -> None:
    """Register the digits' classifier with torch-fidelity as the feature extractor `dxmi-digits`."""

    class Extractor(torch_fidelity("feature_extractor_base").FeatureExtractorBase):
        get_provided_features_list = staticmethod(lambda: ("features",))
        get_default_feature_layer_for_metric = staticmethod(lambda metric: "features")
        can_be_compiled = staticmethod(lambda: False)
        get_dummy_input_for_compile = staticmethod(lambda: None)

        def __init__(self, name, features_list, **_):
            super().__init__(name, features_list)
            self.classifier = load_classifier("digits")

        def forward(self, pixels):
            return (self.classifier.features(pixels),)

    torch_fidelity("registry").register_feature_extractor("dxmi-digits", Extractor)


def test_torch_fidelity_gives_the_same_scores_on_our_features():
    register_digits()
    real = split("digits")[0]
    noise = torch.randint(-120, 121, real.shape, generator=torch.Generator().manual_seed(0))
    fake = (real.int() + noise).clamp(0, 255).to(torch.uint8)[:600]
    theirs = torch_fidelity("metrics").calculate_metrics(
        input1=Pixels(fake),
        input2=Pixels(real),
        feature_extractor="dxmi-digits",
        fid=True,
        kid=True,
        prc=True,
        kid_subsets=5,
        kid_subset_size=300,
        rng_seed=7,
        cuda=False,
        verbose=False,
        batch_size=200,
        cache=False,
        save_cpu_ram=True,
    )
    features, reference = classifier_features("digits", fake), classifier_features("digits", real)
    kernel = kernel_distance(features, reference, subsets=5, subset_size=300, seed=7)
    precision, recall = precision_recall(features, reference)
    # Theirs are computed on float32 features, ours on the same in float64.
    assert frechet_distance(features, reference) == pytest.approx(theirs["frechet_inception_distance"], rel=1e-6)
    assert kernel == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-5)
    assert precision == pytest.approx(theirs["precision"], abs=1.5 / 600)
    assert recall == pytest.approx(theirs["recall"], abs=1.5 / len(real))
    assert 0.0 < precision < 1.0
    assert 0.0 < recall < 1.0


# ----------------------------------------------------------------------------
# Sliced Wasserstein distance.


def line(*points: float) -> Tensor:
    return torch.tensor(points, dtype=torch.float64)[:, None]


def test_wasserstein_of_small_sets_on_the_line_by_hand():
    """{0, 1} against {0, 0, 3}: the quantile functions differ by 1 on (1/2, 2/3) and by 2 on (2/3, 1)."""
    a, b = line(1.0, 0.0), line(0.0, 3.0, 0.0)
    assert wasserstein_1d(a, b, 1).tolist() == pytest.approx([1 / 6 + 2 / 3], rel=1e-14)
    assert wasserstein_1d(a, b, 2).tolist() == pytest.approx([1 / 6 + 4 / 3], rel=1e-14)
    assert wasserstein_1d(line(2.0), line(5.0), 2).tolist() == [9.0]


@pytest.mark.parametrize(("n", "m"), [(1, 7), (50, 50), (31, 64), (64, 31), (60, 90)])
def test_wasserstein_of_order_one_equals_scipy(n, m):
    a, b = normal(n, 3, seed=1), 2.0 * normal(m, 3, seed=2) + 0.5
    expected = [wasserstein_distance(a[:, i].numpy(), b[:, i].numpy()) for i in range(3)]
    assert wasserstein_1d(a, b, 1).tolist() == pytest.approx(expected, rel=1e-12)


def test_wasserstein_is_symmetric_and_zero_between_a_set_and_its_copies():
    a, b = normal(6, 2, seed=1), normal(9, 2, seed=2)
    torch.testing.assert_close(wasserstein_1d(a, b, 2), wasserstein_1d(b, a, 2), rtol=1e-13, atol=0)
    assert wasserstein_1d(a, a.repeat(3, 1), 2).tolist() == [0.0, 0.0]


def directions(dims: int, projections: int, seed: int) -> Tensor:
    """Unit vectors as the function draws them."""
    raw = torch.randn(dims, projections, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    return raw / raw.norm(dim=0)


def test_sliced_wasserstein_of_a_shift_is_the_mean_square_of_its_projections():
    """And for many directions that is |shift|^2 / D."""
    x, shift = normal(40, 1, 2, 2), normal(1, 1, 2, 2, seed=1)
    drawn = directions(4, 4000, 9)
    by_hand = float((shift.flatten() @ drawn).square().mean().sqrt())
    distance = sliced_wasserstein(x, x + shift, projections=4000, generator=torch.Generator().manual_seed(9))
    assert distance == pytest.approx(by_hand, rel=1e-12)
    # The square of one coordinate of a unit vector in 4 dimensions: mean 1/4, variance 1/16.
    square = float(shift.square().sum())
    assert distance**2 == pytest.approx(square / 4, abs=4.0 * square / 4 / math.sqrt(4000))


def test_sliced_wasserstein_of_order_one_is_the_mean_of_scipys():
    x, y = normal(40, 2, 3), normal(55, 2, 3, seed=1) + 0.2
    drawn = directions(6, 20, 9)
    projected = [(x.flatten(1) @ drawn)[:, i].numpy() for i in range(20)]
    projected_y = [(y.flatten(1) @ drawn)[:, i].numpy() for i in range(20)]
    by_hand = np.mean([wasserstein_distance(a, b) for a, b in zip(projected, projected_y, strict=True)])
    generator = torch.Generator().manual_seed(9)
    assert sliced_wasserstein(x, y, projections=20, generator=generator, order=1) == pytest.approx(by_hand, rel=1e-12)


def test_sliced_wasserstein_in_one_dimension_is_the_wasserstein_distance():
    generator = torch.Generator().manual_seed(0)
    distance = sliced_wasserstein(line(0.0, 1.0), line(0.0, 0.0, 3.0), projections=3, generator=generator)
    assert distance == pytest.approx(math.sqrt(1.5), rel=1e-12)


# ----------------------------------------------------------------------------
# The shipped classifiers.


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_shipped_weights_are_the_ones_that_the_table_names(name):
    path = WEIGHTS / f"{name}.safetensors"
    assert hashlib.sha256(path.read_bytes()).hexdigest() == CLASSIFIERS[name].sha256
    with safe_open(str(path), "pt") as file:
        assert file.metadata()["held_out_accuracy"] == f"{CLASSIFIERS[name].accuracy:.4f}"


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_held_out_accuracy_is_the_stated_one(name):
    if name != "digits" and not (data_root() / ("FashionMNIST" if name == "fashion_mnist" else "MNIST")).is_dir():
        pytest.skip(f"{name} is not on this machine")
    pixels, labels = split(name)[2:]
    assert f"{accuracy(load_classifier(name), pixels, labels):.4f}" == f"{CLASSIFIERS[name].accuracy:.4f}"


def test_held_out_digits_are_a_fifth_that_training_does_not_see():
    train, train_labels, held_out, labels = split("digits")
    assert len(train) == len(train_labels)
    assert len(held_out) == len(labels) == 360
    assert len(train) + len(held_out) == 1797


@pytest.mark.parametrize("name", CLASSIFIERS)
def test_features_are_64_and_the_head_reads_them(name):
    small, size = load_classifier(name), CLASSIFIERS[name].size
    pixels = torch.randint(0, 256, (5, 1, size, size), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    features = small.features(pixels)
    assert features.shape == (5, 64)
    torch.testing.assert_close(small(pixels), small.head(features))
    torch.testing.assert_close(classifier_features(name, pixels), features.double(), rtol=1e-5, atol=1e-5)


def test_features_do_not_depend_on_the_batch_they_come_in():
    pixels = split("digits")[0][:1100]  # more than one batch of the extractor
    whole = classifier_features("digits", pixels)
    assert whole.dtype == torch.float64
    torch.testing.assert_close(whole[1000:], classifier_features("digits", pixels[1000:]), rtol=1e-5, atol=1e-5)


def test_altered_weights_are_refused(tmp_path: Path, monkeypatch):
    raw = bytearray((WEIGHTS / "digits.safetensors").read_bytes())
    raw[-1] ^= 1
    (tmp_path / "weights").mkdir()
    (tmp_path / "weights" / "digits.safetensors").write_bytes(raw)
    monkeypatch.setattr(classifier, "files", lambda _package: tmp_path)
    with pytest.raises(UserError, match=stating("digits classifier … altered")):
        load_classifier("digits")


START = """
import sys
import torch
import dxmi.training.run
from dxmi.training.build import ExperimentConfig
from dxmi.optim.optimizer import Optimizer, OptimizerConfig
ExperimentConfig()
weight = torch.nn.Parameter(torch.ones(3))
for kind in ("adam", "adamw", "radam"):
    optimizer = Optimizer(OptimizerConfig(kind=kind), [([weight], 0.1)], 1)
    optimizer.minimize(lambda x: {"loss": x * weight.square().sum()}, torch.ones(1, 1), num=1)
    optimizer.torch.load_state_dict(optimizer.torch.state_dict())
assert (weight < 1.0).all()
print({"torchvision", "torch_fidelity", "torch._dynamo", "sklearn", "scipy.optimize", "scipy.stats"} & set(sys.modules))
"""


def test_a_run_starts_without_torchvision_and_torchs_compiler():
    """They take seconds, in each of the processes of a sweep; InceptionV3 brings them when it is loaded."""
    found = subprocess.run([sys.executable, "-c", START], capture_output=True, check=True)
    assert found.stdout.decode() == "set()\n"


LONG = {
    "infinity": lambda x, y, on_step: Gaussian.of(y).distance_at_infinity(x, torch.Generator().manual_seed(0), on_step),
    "precision": precision_recall,
    "kid": lambda x, y, on_step: kernel_distance(x, y, subsets=5, subset_size=40, seed=0, on_step=on_step),
}


@pytest.mark.parametrize(("name", "calls"), [("infinity", 15), ("precision", 4), ("kid", 5)])
def test_scores_that_take_long_may_be_stopped_and_are_the_same(name, calls):
    x, y = (torch.randn(60, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(k)) for k in range(2))
    heard = []
    assert LONG[name](x, y, lambda: heard.append(1)) == LONG[name](x, y, None)
    assert len(heard) == calls

    def stop() -> None:
        raise InterruptedError

    with pytest.raises(InterruptedError):
        LONG[name](x, y, stop)
