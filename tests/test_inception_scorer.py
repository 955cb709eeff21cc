"""Scores by InceptionV3 in a run, with a small linear network in its place."""

import hashlib
import json
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from dxmi.data.images import Images
from dxmi.data.loading import load
from dxmi.data.registry import DATA_SETS
from dxmi.distributed import ProcessGroup
from dxmi.errors import UserError
from dxmi.evaluation import scorers
from dxmi.evaluation.config import EvaluateConfig
from dxmi.evaluation.sampling import Sampling, generate, measure
from dxmi.evaluation.scorers import ImageScorer, InceptionScorer, build_scorer
from dxmi.metrics.fidelity import frechet_distance, inception_score, kernel_distance, precision_recall
from dxmi.metrics.inception import Features
from dxmi.metrics.keys import count_name, inception_keys, primary_key
from dxmi.seeds import generator
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.progress import Phase
from dxmi.training.run import train
from support import TINY, changed, stating
from tune.config.compose import compose_experiment
from tune.plans.sweep import metrics_of
from tune.reporting.console import result_table

CPU = torch.device("cpu")
DIMS, CLASSES = 6, 3


class Linear:
    """Stands in for InceptionV3: random projections of the pixels."""

    def __init__(self, classes: int = CLASSES) -> None:
        self.classes = classes
        self.seen = 0

    def __call__(self, pixels: Tensor, on_piece: Callable[[], None] | None = None) -> Features:
        self.seen += len(pixels)
        if on_piece is not None:
            on_piece()
        flat = pixels.flatten(1).float() / 255.0
        matrix = torch.randn(flat.shape[1], DIMS + self.classes, generator=torch.Generator().manual_seed(0))
        outputs = flat @ matrix
        return Features(outputs[:, :DIMS], outputs[:, DIMS:])

    def num_pieces(self, num: int) -> int:
        return int(num > 0)


@pytest.fixture
def network(tmp_path, monkeypatch) -> Linear:
    """The stand-in, wherever the real network is asked for."""
    weights, network = tmp_path / "inception.pth", Linear()
    weights.write_bytes(b"weights")
    monkeypatch.setenv("DXMI_INCEPTION", str(weights))
    monkeypatch.setattr(scorers, "load_inception", lambda path, device: network)
    monkeypatch.setattr(scorers, "NUM_FEATURES", DIMS)
    return network


def images(num: int = 40, channels: int = 1, name: str = "digits") -> Images:
    pixels = torch.randint(0, 256, (num, channels, 4, 4), dtype=torch.uint8, generator=generator(0, "pixels"))
    return Images(name, pixels, torch.zeros(num, dtype=torch.int64), f"random{num}")


CONFIG = EvaluateConfig(num_samples=20, batch_size=8, kid_subsets=3, kid_subset_size=10, features="inception")


class StopError(Exception):
    """A stop was asked for."""


@pytest.mark.parametrize("after", [1, 41])
def test_what_a_step_raises_ends_the_features_of_the_data_and_of_the_samples(network, tmp_path, make_policy, after):
    scorer = InceptionScorer(images(), CONFIG, tmp_path, CPU)

    def stop() -> None:
        if network.seen >= after:
            raise StopError

    with pytest.raises(StopError):
        scorer.score(Sampling(make_policy(event=(1, 4, 4)), "report", on_step=stop))
    assert network.seen == {1: 40, 41: 48}[after]  # all of the data are one piece, a batch of samples another
    assert (len(list((tmp_path / "features").glob("*.cached"))) == 0) == (after == 1)


class Rank(ProcessGroup):
    """One of several workers that are threads of this process."""

    def __init__(self, rank: int, size: int, shared: list[Any], barrier: threading.Barrier) -> None:
        self.rank, self.size, self._shared, self._barrier = rank, size, shared, barrier

    def sum(self, tensors):
        raise NotImplementedError

    def _exchanged(self, item: Any) -> list[Any]:
        self._shared[self.rank] = item
        self._barrier.wait(10.0)
        items = list(self._shared)
        self._barrier.wait(10.0)
        return items

    def gather(self, block: Tensor) -> list[Tensor]:
        blocks = self._exchanged(block)
        assert len({one.shape for one in blocks}) == 1
        return blocks

    def _broadcast_bytes(self, content: bytes) -> bytes:
        return self._exchanged(content)[0]


def together(size: int, work: Callable[[ProcessGroup], Any]) -> list[Any]:
    """What each of several workers makes of the same work."""
    shared, barrier, results = [None] * size, threading.Barrier(size), [None] * size

    def run(rank: int) -> None:
        try:
            results[rank] = work(Rank(rank, size, shared, barrier))
        except Exception as error:  # noqa: BLE001
            results[rank] = error
            barrier.abort()

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    errors = [result for result in results if isinstance(result, Exception)]
    for error in sorted(errors, key=lambda error: isinstance(error, threading.BrokenBarrierError)):
        raise error
    return results


# ----------------------------------------------------------------------------
# Scores.


def test_every_score_is_that_of_its_definition(network, make_policy, tmp_path):
    data = images()
    scorer, sampling = InceptionScorer(data, CONFIG, tmp_path, CPU), Sampling(make_policy(event=(1, 4, 4)), "report")
    values = scorer.full_evaluation(sampling).values
    fake, real = network(generate(sampling, 20, CONFIG)), network(data.pixels)

    def drawn(what: str) -> int:
        return int(torch.randint(2**31, (), generator=generator(0, f"report/{what}")))

    neighbors = scorers.some_rows(real.pool, 20, generator(0, "report/neighbours"))
    precision, recall = precision_recall(fake.pool, neighbors)
    expected = {
        "eval/fid_20": frechet_distance(fake.pool.double(), real.pool.double()),
        "eval/kid": kernel_distance(
            fake.pool.double(), real.pool.double(), subsets=3, subset_size=10, seed=drawn("kid")
        ),
        "eval/precision_20": precision,
        "eval/recall_20": recall,
        "eval/inception_score_20": inception_score(fake.logits, drawn("inception_score")),
        "eval/num_samples": 20.0,
    }
    assert {key: values[key] for key in expected} == pytest.approx(expected, rel=1e-6)
    assert values.keys() - expected.keys() == {"eval/fid_infinity"}
    assert values["eval/fid_infinity"] < values["eval/fid_20"]
    assert scorer.score(sampling).values == {key: values[key] for key in ("eval/fid_20", "eval/num_samples")}


def test_weights_without_classes_give_no_inception_score(network, make_policy, tmp_path):
    network.classes = 0
    scorer = InceptionScorer(images(), CONFIG, tmp_path, CPU)
    values = scorer.full_evaluation(Sampling(make_policy(event=(1, 4, 4)), "report")).values
    assert set(values) == {*(key.name for key in inception_keys(CONFIG.num_samples)), "eval/num_samples"}


def test_the_data_is_looked_at_once_for_all_runs(network, make_policy, tmp_path):
    sampling = Sampling(make_policy(event=(1, 4, 4)), "report")
    first = InceptionScorer(images(), CONFIG, tmp_path, CPU).score(sampling)
    assert network.seen == 40 + 20
    second = InceptionScorer(images(), CONFIG, tmp_path, CPU).score(sampling)
    assert network.seen == 40 + 20 + 20
    assert second.values == first.values
    InceptionScorer(images(50), CONFIG, tmp_path, CPU).score(sampling)
    assert network.seen == 80 + 50 + 20


def test_other_weights_are_another_network(network, make_policy, tmp_path, monkeypatch):
    first = InceptionScorer(images(), CONFIG, tmp_path, CPU)
    Path(first.weights).write_bytes(b"other weights")
    second = InceptionScorer(images(), CONFIG, tmp_path, CPU)
    assert first.identity != second.identity
    assert first.about["weights"] != second.about["weights"]
    assert first.about["reference"] == second.about["reference"] == "random40"


def test_of_much_data_moments_count_all_and_some_features_are_kept(network, make_policy, tmp_path, monkeypatch):
    monkeypatch.setattr(scorers, "_KEPT", 15)
    monkeypatch.setattr(scorers, "_REFERENCE_BATCH", 7)
    data, sampling = images(), Sampling(make_policy(event=(1, 4, 4)), "report")
    scorer = InceptionScorer(data, CONFIG, tmp_path, CPU)
    fake, real = network(generate(sampling, 20, CONFIG)).pool.double(), network(data.pixels).pool
    assert scorer.score(sampling).values["eval/fid_20"] == pytest.approx(
        frechet_distance(fake, real.double()), rel=1e-6
    )
    kept = scorer.reference().features
    assert len(kept) == 15
    # Each is that of one image and of no other; batches of another size may round differently.
    gaps = (kept[:, None] - real).abs().amax(dim=2)
    assert gaps.amin(dim=1).max() < 1e-5 < 1e-2 < gaps.sort(dim=1).values[:, 1].min()
    assert len(set(gaps.argmin(dim=1).tolist())) == 15


@pytest.mark.parametrize("size", [2, 3])
@pytest.mark.parametrize("num", [3, 20])
def test_workers_share_samples_and_features(network, make_policy, tmp_path, monkeypatch, size, num):
    monkeypatch.setattr(scorers, "_REFERENCE_BATCH", 7)
    config = EvaluateConfig(num_samples=20, batch_size=8, kid_subsets=3, kid_subset_size=10, features="inception")
    sampling = Sampling(make_policy(event=(1, 4, 4)), "report")

    def scored(workers: ProcessGroup) -> dict[str, float]:
        return InceptionScorer(images(), config, tmp_path / "group", CPU, workers).full_evaluation(sampling).values

    values = together(size, scored)
    alone = InceptionScorer(images(), config, tmp_path / "alone", CPU).full_evaluation(sampling).values
    assert all(one == pytest.approx(alone, rel=1e-6) for one in values)

    def measured(workers: ProcessGroup) -> Tensor:
        shared = Sampling(sampling.policy, "report", workers=workers)
        return measure(shared, num, config, lambda pixels, _: network(pixels).pool if len(pixels) else pixels).features

    one, *others = together(size, measured)
    torch.testing.assert_close(one, network(generate(sampling, num, config)).pool, rtol=1e-5, atol=1e-5)
    assert all(torch.equal(one, other) for other in others)


# ----------------------------------------------------------------------------
# Which scorer.


@pytest.mark.parametrize(
    ("num", "name"), [(5_000, "5k"), (10_000, "10k"), (50_000, "50k"), (64, "64"), (1_500, "1500")]
)
def test_the_number_of_samples_is_in_the_key(num, name):
    assert count_name(num) == name
    assert (
        primary_key(
            ExperimentConfig(data=DATA_SETS.config("cifar10"), evaluate=EvaluateConfig(num_samples=num)).score_keys()
        ).name
        == f"eval/fid_{name}"
    )


def test_the_data_set_chooses_unless_the_config_does(network, tmp_path):
    plain, inception = EvaluateConfig(num_samples=20), EvaluateConfig(num_samples=20, features="inception")
    cifar = images(channels=3, name="cifar10")
    digits = load(DATA_SETS.config("digits"))
    assert isinstance(build_scorer(digits, plain, tmp_path, CPU), ImageScorer)
    assert isinstance(build_scorer(images(), inception, tmp_path, CPU), InceptionScorer)
    assert isinstance(build_scorer(cifar, plain, tmp_path, CPU), InceptionScorer)
    with pytest.raises(UserError, match=stating("evaluate.features is classifier … cifar10")):
        build_scorer(cifar, EvaluateConfig(num_samples=20, features="classifier"), tmp_path, CPU)


def test_some_of_the_images_are_drawn_once(network, tmp_path):
    whole = images()
    some = EvaluateConfig(num_samples=20, reference_images=15, features="inception")
    scorers_of = [build_scorer(whole, some, tmp_path, CPU) for _ in range(2)]
    first, second = (scorer.images for scorer in scorers_of)
    assert len(first) == 15
    assert torch.equal(first.pixels, second.pixels)
    assert {row.numpy().tobytes() for row in first.pixels} <= {row.numpy().tobytes() for row in whole.pixels}
    assert scorers_of[0].about["reference"] == f"{whole.signature}-15"
    assert network.seen == 0  # until somebody asks
    assert scorers_of[0].reference() is not None
    assert network.seen == 15
    more = EvaluateConfig(num_samples=20, reference_images=41, features="inception")
    assert build_scorer(whole, more, tmp_path, CPU).images is whole


def test_what_cannot_be_scored_is_refused(network, tmp_path):
    with pytest.raises(UserError, match=stating("3 images")):
        InceptionScorer(images(3), CONFIG, tmp_path, CPU)
    with pytest.raises(UserError, match=stating("4 channels")):
        InceptionScorer(images(channels=4), CONFIG, tmp_path, CPU)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [({"features": "vgg"}, "features is 'vgg'"), ({"reference_steps": (5, 0)}, r"each must be in 1\.\.1000")],
)
def test_settings_are_refused_in_a_sentence(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        EvaluateConfig(**settings)


# ----------------------------------------------------------------------------
# A run.


def test_a_run_is_scored_and_compared_with_deterministic_references(network, tmp_path):
    overrides = [*TINY, "evaluate.features=inception", "evaluate.reference_steps=[2,3]", "evaluate.kid_subset_size=20"]
    experiment = Experiment(compose_experiment(overrides).experiment)
    told = []
    summary = train(experiment, out=tmp_path / "run", report=lambda progress: told.append(progress) and None)
    assert summary.metric == "eval/fid_64"
    trailing = ("ddim_{}_trailing", "dpm_solver_{}_trailing", "ddpm_{}_trailing", "ddpm_{}_trailing_large")
    by_log_snr = ("ddim_{}_log_snr", "dpm_solver_{}_log_snr")
    names = {"shortened", *(sampler.format(steps) for sampler in trailing for steps in (2, 3, 5, 50))}
    names |= {sampler.format(steps) for sampler in by_log_snr for steps in (2, 3, 5)}
    names |= {"ddim_2_log_snr_clipped", "dpm_solver_3_log_snr_clipped", "dpm_solver_5_log_snr_clipped"}
    names -= {"dpm_solver_2_trailing", "dpm_solver_2_log_snr"}  # they are DDIM
    assert summary.reference.keys() == names
    assert len(set(summary.reference.values())) == len(names)
    keys = experiment.config.score_keys()
    assert {key.name for key in keys} < summary.scores["best"].keys()
    written = json.loads((tmp_path / "run" / "summary.json").read_text())
    assert written["scored_with"] == {
        "features": "inception-v3-compat",
        "weights": hashlib.sha256(b"weights").hexdigest(),
        "reference": experiment.data.signature,
    }
    steps = [progress.step for progress in told if progress.phase is Phase.REFERENCES]
    assert steps == sorted(steps)
    assert (
        max(steps)
        == next(p.total for p in told if p.phase is Phase.REFERENCES)
        == 64 * (5 + 5 * 2 + 7 * (3 + 5) + 4 * 50)
    )
    assert train(experiment, out=tmp_path / "run") == summary
    labels = list(map(str, result_table(summary).columns[0].cells))
    assert labels[0] == "50 steps (DDIM, trailing)"
    assert labels[4:6] == ["2 steps (DDIM, trailing)", "2 steps (DDPM, trailing, small variance)"]
    assert len(labels) == len(names) + 1


def test_a_summary_of_before_there_was_a_field_is_read(network, tmp_path):
    experiment = Experiment(compose_experiment(changed(TINY, "train.iterations=0")).experiment)
    summary = train(experiment, out=tmp_path / "run")
    path = tmp_path / "run" / "summary.json"
    tree = json.loads(path.read_text())
    path.write_text(json.dumps({key: value for key, value in tree.items() if key != "scored_with"}))
    assert train(experiment, out=tmp_path / "run").best == summary.best


def test_objectives_may_name_its_scores():
    config = compose_experiment(["experiment=digits", "evaluate.features=inception"]).experiment
    assert {"eval/fid_5k", "eval/fid_infinity", "eval/kid"} < set(metrics_of(config))
