"""InceptionV3: where its weights are found, how they are read, and that its scores are torch-fidelity's own.

Real weights are 91 MB and are not needed here: random ones under the same names do.
"""

import io
import pickle
from collections.abc import Iterator
from functools import cache
from pathlib import Path
from urllib.error import URLError

import numpy as np
import pytest
import torch
from scipy.stats import entropy
from torch import Tensor

from dxmi.compat import torch_fidelity
from dxmi.errors import UserError
from dxmi.metrics import inception
from dxmi.metrics.fidelity import inception_score, kernel_distance, precision_recall
from dxmi.metrics.gaussians import Gaussian
from dxmi.metrics.inception import file_digest, find_weights, hub_path, load_inception
from support import Pixels, stating

CPU = torch.device("cpu")


@cache
def theirs():
    """torch-fidelity's module, imported only where these tests run: it takes seconds."""
    return torch_fidelity("feature_extractor_inceptionv3")


@pytest.fixture(scope="module")
def weights(tmp_path_factory) -> Path:
    """Random weights under the published names and shapes; means and variances far from their initial 0 and 1."""

    class Untrained(theirs().FeatureExtractorInceptionV3):
        """Keeps its initial weights whatever it is given."""

        def load_state_dict(self, state_dict, *args, **kwargs):
            return None

    nothing = io.BytesIO()
    torch.save({}, nothing)
    nothing.seek(0)
    torch.manual_seed(0)
    state = Untrained("inception-v3-compat", ["2048"], feature_extractor_weights_path=nothing).state_dict()
    for key, value in state.items():
        if key.endswith("running_var"):
            value.uniform_(0.05, 0.2)  # so that the signal does not fade from layer to layer
        elif key.endswith("running_mean"):
            value.normal_(0.0, 0.05)
    state["fc.weight"] *= 0.01
    path = tmp_path_factory.mktemp("weights") / "inception.pth"
    torch.save(state, path)
    return path


@pytest.fixture(autouse=True)
def _nothing_cached() -> Iterator[None]:
    load_inception.cache_clear()
    yield
    load_inception.cache_clear()


def pixels(num: int, channels: int = 3, seed: int = 0) -> Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, 256, (num, channels, 8, 8), dtype=torch.uint8, generator=generator)


# ----------------------------------------------------------------------------
# Scores.


FAKE, REAL = pixels(5, seed=1), pixels(6, seed=2) // 2


def front_door(weights: Path, **metrics: bool) -> dict[str, float]:
    """torch-fidelity's own scores of the same images."""
    return torch_fidelity("metrics").calculate_metrics(
        input1=Pixels(FAKE),
        input2=Pixels(REAL),
        feature_extractor="inception-v3-compat",
        feature_extractor_weights_path=str(weights),
        isc_splits=5,
        kid_subsets=3,
        kid_subset_size=4,
        rng_seed=7,
        cuda=False,
        cache=False,
        save_cpu_ram=True,
        verbose=False,
        **metrics,
    )


@pytest.mark.slow
def test_fid_is_that_of_torch_fidelitys_front_door(weights):
    """Slow are the eigenvalues of a general matrix of 2048 x 2048, which torch-fidelity computes."""
    network = load_inception(weights, CPU)
    distance = Gaussian.of(network(REAL).pool).distance(network(FAKE).pool)
    assert distance == pytest.approx(front_door(weights, fid=True)["frechet_inception_distance"], rel=1e-4)


def test_other_scores_are_those_of_torch_fidelitys_front_door(weights):
    theirs = front_door(weights, isc=True, kid=True, prc=True)
    network = load_inception(weights, CPU)
    ours, reference = network(FAKE), network(REAL).pool
    kernel = kernel_distance(ours.pool.double(), reference.double(), subsets=3, subset_size=4, seed=7)
    # The network's float32 sums are taken in another order, which is worth some 1e-6 of a feature.
    assert kernel == pytest.approx(theirs["kernel_inception_distance_mean"], rel=1e-3)
    assert precision_recall(ours.pool, reference) == (theirs["precision"], theirs["recall"])
    assert inception_score(ours.logits, 7) == pytest.approx(theirs["inception_score_mean"], rel=1e-4)


def test_features_do_not_depend_on_their_batch_and_gray_is_three_equal_channels(weights, monkeypatch):
    network = load_inception(weights, CPU)
    gray = pixels(3, channels=1)
    whole = network(gray)
    monkeypatch.setitem(inception._PIECE, "cpu", 2)
    split = network(gray.expand(-1, 3, -1, -1))
    torch.testing.assert_close(split.pool, whole.pool, rtol=1e-4, atol=1e-6)
    assert (whole.pool.shape, whole.logits.shape) == ((3, 2048), (3, 1008))


def test_weights_without_classes_give_features_and_no_logits(weights, tmp_path):
    state = torch.load(weights, weights_only=True)
    state["fc.weight"].zero_()
    torch.save(state, tmp_path / "headless.pth")
    assert load_inception(tmp_path / "headless.pth", CPU)(pixels(1)).logits.shape == (1, 0)


def by_hand(logits: Tensor, seed: int) -> float:
    """exp(H(y) - H(y | x)) of each of ten splits; their mean."""
    p = logits.double().softmax(1).numpy()[np.random.RandomState(seed).permutation(len(logits))]
    return float(np.mean([np.exp(entropy(part.mean(0)) - entropy(part, axis=1).mean()) for part in np.split(p, 10)]))


def test_inception_score_on_paper():
    """Sure of one of two classes each: exp(log 2) = 2 in a split that sees both equally. Never sure: 1."""
    sure = torch.tensor([[100.0, 0.0], [0.0, 100.0]]).repeat(50, 1)
    shuffled = [inception_score(sure, seed) for seed in range(3)]
    assert shuffled == [pytest.approx(by_hand(sure, seed), rel=1e-12) for seed in range(3)]
    assert all(1.5 < score < 2.0 for score in shuffled)  # not all of the ten splits see both equally
    assert inception_score(torch.zeros(100, 7), 0) == pytest.approx(1.0, abs=1e-12)
    assert inception_score(torch.zeros(3, 7), 0) == pytest.approx(1.0, abs=1e-12)


# ----------------------------------------------------------------------------
# The file.


@pytest.fixture
def places(tmp_path, monkeypatch) -> Path:
    """No weights anywhere, and no network."""
    monkeypatch.delenv(inception.VARIABLE, raising=False)
    monkeypatch.setenv("DXMI_DATA", str(tmp_path / "data"))
    monkeypatch.setenv("TORCH_HOME", str(tmp_path / "torch"))

    def unreachable(*_: object, **__: object) -> None:
        raise URLError("no route")

    monkeypatch.setattr(torch.hub, "download_url_to_file", unreachable)
    return tmp_path


def put(path: Path) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(b"x")
    return path


def test_weights_are_looked_for_where_they_are_named_then_below_the_data_then_in_the_hub(places, monkeypatch):
    hub = put(places / "torch/hub/checkpoints/weights-inception-2015-12-05-6726825d.pth")
    assert find_weights() == hub == hub_path()
    below = put(places / "data/weights/inception-2015-12-05.pth")
    assert find_weights() == below
    monkeypatch.setenv(inception.VARIABLE, str(put(places / "mine.pth")))
    assert find_weights() == places / "mine.pth"


def test_they_are_fetched_once_under_the_name_and_hash_that_torch_fidelity_uses(places, monkeypatch):
    asked = []

    def fetch(url: str, path: str, hash_prefix: str, progress: bool) -> None:
        asked.append((url, hash_prefix))
        put(Path(path))

    monkeypatch.setattr(torch.hub, "download_url_to_file", fetch)
    assert find_weights() == find_weights() == hub_path()
    assert asked == [(theirs().URL_INCEPTION_V3, "6726825d")]


def test_without_weights_a_sentence_says_where_they_may_be_put(places):
    with pytest.raises(UserError) as missing:
        find_weights()
    sentence = str(missing.value)
    for part in ("inception-2015-12-05.pth", str(hub_path()), "https://", "no route", inception.VARIABLE):
        assert part in sentence


def test_a_named_file_has_to_be_there(places, monkeypatch):
    monkeypatch.setenv(inception.VARIABLE, str(places / "nowhere.pth"))
    with pytest.raises(UserError, match=stating(f"{places / 'nowhere.pth'} … no such file")):
        find_weights()


class Attack:
    """Makes a file when it is unpickled."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self):
        return Path.touch, (self.path,)


@pytest.mark.parametrize("legacy", [False, True])
def test_a_file_that_asks_for_code_is_refused_and_runs_nothing(tmp_path, legacy):
    path, made = tmp_path / "weights.pth", tmp_path / "made"
    if legacy:
        path.write_bytes(pickle.dumps(Attack(made)))
    else:
        torch.save({"fc.weight": Attack(made)}, path)
    with pytest.raises(UserError, match=stating("weights.pth … other than tensors … executed")):
        load_inception(path, CPU)
    assert not made.exists()


@pytest.mark.parametrize(
    "content", [{"fc.weight": torch.zeros(2, 2)}, [torch.zeros(2)], {"fc.weight": "text"}, torch.zeros(3)]
)
def test_other_weights_are_refused_in_a_sentence(tmp_path, content):
    torch.save(content, tmp_path / "weights.pth")
    with pytest.raises(UserError, match=stating("InceptionV3's weights")):
        load_inception(tmp_path / "weights.pth", CPU)


@pytest.mark.parametrize("raw", [b"", b"PK\x03\x04", b"garbage"])
def test_a_damaged_file_is_refused_in_a_sentence(tmp_path, raw):
    (tmp_path / "weights.pth").write_bytes(raw)
    with pytest.raises(UserError, match=r"weights\.pth .*(empty|text|damaged)"):
        load_inception(tmp_path / "weights.pth", CPU)


def test_the_digest_is_the_sha256(tmp_path):
    (tmp_path / "a").write_bytes(b"abc")
    assert file_digest(tmp_path / "a") == "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"
    with pytest.raises(UserError, match=stating(f"{tmp_path / 'b'} … read")):
        file_digest(tmp_path / "b")
