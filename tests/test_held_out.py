"""What judges a run that maximizes a reward: held-out accuracy, diversity, divergence from the pretrained policy."""

import math

import pytest
import torch
from linear_chain import Chain

from dxmi.config import build
from dxmi.data.batch import UNCONDITIONAL, Condition
from dxmi.data.configs import DigitsConfig
from dxmi.data.dataset import Dataset, Split
from dxmi.data.loading import load
from dxmi.errors import UserError
from dxmi.evaluation.divergence import policy_divergence
from dxmi.metrics.base import Evidence, Metric
from dxmi.metrics.configs import DiversityConfig, HeldOutConfig
from dxmi.metrics.diversity import Diversity, within_distance
from dxmi.metrics.held_out import HeldOut
from dxmi.persistence import checkpoint
from dxmi.persistence.run_directory import RunDirectory
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from dxmi.training.loading import load_run
from dxmi.training.run import train
from dxmi.training.schema import read_config
from dxmi.training.state import ALGORITHM


@pytest.fixture(scope="module")
def digits() -> Dataset:
    return load(DigitsConfig())


def score(metric: Metric, x: torch.Tensor, condition: Condition, train: Split) -> float:
    rows = metric.observe(x, condition)
    (value,) = metric.scores(Evidence(rows, None, None, train)).values()
    return value


def half(digits: Dataset, start: int) -> Split:
    """Every second digit."""
    assert digits.classes is not None
    return Split(digits.stored[start::2], UNCONDITIONAL, digits.classes[start::2])


def test_the_held_out_classifier_knows_digits_it_was_not_fitted_to(digits):
    train, test = half(digits, 0), half(digits, 1)
    assert test.targets is not None
    metric = HeldOut(HeldOutConfig())
    assert score(metric, test.x, Condition(test.targets), train) > 0.98
    assert score(metric, test.x, Condition((test.targets + 1) % 10), train) < 0.01
    threes = float((test.targets == 3).double().mean())
    assert score(HeldOut(HeldOutConfig(label=3)), test.x, UNCONDITIONAL, train) == pytest.approx(threes, abs=0.01)


def test_held_out_accuracy_needs_classes(digits):
    with pytest.raises(UserError, match="held_out"):
        HeldOut(HeldOutConfig()).observe(digits.stored[:3], UNCONDITIONAL)
    with pytest.raises(UserError, match="no classes"):
        score(HeldOut(HeldOutConfig(label=1)), digits.stored[:3], UNCONDITIONAL, Split(digits.stored))


def test_diversity_is_one_for_the_data_and_falls_with_the_spread(digits):
    train, test = half(digits, 0), half(digits, 1)
    assert test.targets is not None
    metric = Diversity(DiversityConfig())
    condition = Condition(test.targets)
    assert score(metric, test.x, condition, train) == pytest.approx(1.0, abs=0.02)
    x = test.x.float()
    means = torch.stack([x[test.targets == label].mean(0) for label in range(10)])[test.targets]
    assert score(metric, means + 0.5 * (x - means), condition, train) == pytest.approx(0.5, abs=0.01)
    assert score(metric, means, condition, train) == pytest.approx(0.0, abs=1e-3)


def test_distances_are_within_a_label():
    x = torch.tensor([[0.0], [1.0], [100.0], [103.0], [7.0]])
    assert within_distance(x, torch.tensor([0, 0, 1, 1, 2])) == pytest.approx((1.0 + 3.0) / 2.0)
    assert within_distance(x[:1], torch.tensor([0])) == 0.0


def test_the_divergence_is_that_of_the_chain():
    """All means shifted by .1, and the first sigma doubled: the sum over all steps but the last, in closed form."""
    chain = Chain()
    policy, reference = chain.policy(), chain.policy()
    with torch.no_grad():
        policy.network.shift.add_(0.1)
        policy.free_log_sigma[0] += math.log(2.0)
    expected = sum(0.1**2 / (2.0 * s**2) for s in chain.s[:-1]) + 0.5 * (4.0 - 1.0 - math.log(4.0))
    found = policy_divergence(policy, reference, 50, torch.Generator().manual_seed(0), 20)
    assert found == pytest.approx(expected, rel=1e-5)
    assert policy_divergence(reference, reference, 50, torch.Generator().manual_seed(0), 20) == 0.0


@pytest.mark.parametrize(
    ("constraint", "steps"), [(None, {40}), ("eval/reward", {40}), ("eval/fid_digits", {10, 20, 30})]
)
def test_the_best_checkpoint_meets_the_constraint(tmp_path, constraint, steps):
    """The reward rises, which is allowed for a score that is maximized; the FID may not rise by a tenth."""
    small = {"kind": "mlp", "hidden": 16, "layers": 3, "embedding": 8}
    tree = {
        "network": {"denoiser": small},
        "pretrain": {"iterations": 200},
        "schedule": {"num_steps": 3},
        "algorithm": {"kind": "draft", "policy_ema": None, "policy": {"lr": 2e-3, "max_grad_norm": None}},
        "reward": {"kind": "ink"},
        "train": {"iterations": 40, "batch_size": 16, "log_every": 10},
        "evaluate": {
            "num_samples": 64,
            "every": 10,
            "full_reference": False,
            "grid": 4,
            "constraint": constraint,
            "constraint_factor": 1.1,
        },
    }
    summary = train(Experiment(build(ExperimentConfig, tree)), out=tmp_path)
    assert summary.metric == "eval/reward"
    assert summary.best["step"] in steps
    assert summary.scores["last"]["eval/kl_reference"] > 0.0
    assert summary.scores["last"]["eval/reward"] > summary.reference["shortened"] + 0.1


def test_a_constraint_must_be_a_score_of_the_run():
    for name in ("eval/fid_mnist", "eval/precision_digits", "eval/kl_reference"):
        with pytest.raises(UserError, match=r"evaluate\.constraint"):
            build(ExperimentConfig, {"evaluate": {"constraint": name}})
    with pytest.raises(UserError, match=r"evaluate\.constraint_factor"):
        build(ExperimentConfig, {"evaluate": {"constraint_factor": 0.5}})


def test_a_run_that_did_not_keep_its_pretrained_policy_can_be_loaded(tmp_path):
    small = {"kind": "mlp", "hidden": 16, "layers": 3, "embedding": 8}
    tree = {
        "network": {"denoiser": small, "value": small},
        "pretrain": {"iterations": 0},
        "schedule": {"num_steps": 3},
        "algorithm": {"kind": "reinforce"},
        "reward": {"kind": "ink"},
        "train": {"iterations": 2, "batch_size": 8},
        "evaluate": {"num_samples": 8, "batch_size": 8, "full_reference": False, "grid": 4},
    }
    train(Experiment(build(ExperimentConfig, tree)), out=tmp_path)
    run = RunDirectory(tmp_path)
    stored = read_config(run.read_config())
    kept = load_run(run, stored, "last").scores(None, None, None).values
    assert kept["eval/kl_reference"] > 0.0
    newest, _ = checkpoint.newest(run.checkpoints)
    assert newest is not None
    own = {name: value for name, value in newest.groups[ALGORITHM].items() if not name.startswith("reference.")}
    checkpoint.save(run.checkpoints, newest.step, {**newest.groups, ALGORITHM: own}, newest.meta)
    loaded = load_run(run, stored, "last").scores(None, None, None).values
    assert "eval/kl_reference" not in loaded
    assert loaded["eval/reward"] == kept["eval/reward"]
