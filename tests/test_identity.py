"""A config's identity is what differs from the defaults: a new field with a default changes no existing identity."""

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from types import SimpleNamespace
from typing import Any

import pytest

import dxmi.algorithms.configs
import dxmi.data.configs
import dxmi.diffusion.schedules.configs
import dxmi.networks.configs
from dxmi.config import (
    NO_RESULT,
    NO_SCORE,
    RESULT,
    SCORES,
    block_delta,
    build,
    delta,
    differences,
    identity_tree,
    signature,
)
from dxmi.data.configs import MnistConfig
from dxmi.evaluation.config import EvaluateConfig
from dxmi.evaluation.references import references
from dxmi.networks.configs import UnetConfig
from dxmi.training.build import Experiment
from dxmi.training.config import SCHEMA, ExperimentConfig, ResourcesConfig
from dxmi.training.references import References
from tune.config.ablation import AblationConfig
from tune.config.sweep import BudgetConfig, SweepConfig, TrackingConfig
from tune.plans.ablation import ablation_plan
from tune.plans.arms import Arm
from tune.plans.sweep import Plan

TREE: dict[str, Any] = {
    "seed": 3,
    "network": {"denoiser": {"hidden": 16}, "energy": {"kind": "igebm", "channels": 32}},
    "schedule": {"kind": "karras", "rho": 5.0},
    "algorithm": {"entropy_coef": 0.2, "policy": {"decay": "cosine"}},
    "evaluate": {"num_samples": 100, "projections": 16},
}
"""Differs from the defaults in plain settings, in groups, and in blocks of the default's kind and of another."""
PATCHED = {
    dxmi.networks.configs: ("MlpConfig", "IgebmConfig"),
    dxmi.diffusion.schedules.configs: ("VarScheduleConfig", "KarrasScheduleConfig"),
    dxmi.algorithms.configs: ("DxMIConfig",),
    dxmi.data.configs: ("DigitsConfig",),
}


def grown(cls: type) -> type:
    """A config class with one more field, as the next version might have it."""

    @dataclass(frozen=True, kw_only=True)
    class Grown(cls):  # type: ignore[misc,valid-type]
        added: int = 7

    return Grown


@pytest.fixture
def next_version(monkeypatch) -> Iterator[Any]:
    """`next_version()` gives every kind in question a further field."""

    def begin() -> None:
        for module, names in PATCHED.items():
            for name in names:
                monkeypatch.setattr(module, name, grown(getattr(module, name)))

    return begin


def identities() -> dict[str, str]:
    """Everything by which results are found again."""
    config = build(ExperimentConfig, TREE)
    experiment = Experiment(config, event=(1, 8, 8))
    scorer = SimpleNamespace(identity="features", metric="eval/x", direction="minimize")
    of_references = References(experiment, scorer, SimpleNamespace())
    reference = references(config.schedule)[0]
    sweep = Plan("study", config, SweepConfig(), {"algorithm": {"cost_coef": {"uniform": [0, 1]}}})
    arms = [Arm("baseline"), Arm("none", {"algorithm.entropy_coef": 0.0})]
    ablated = AblationConfig(hypothesis="it matters", variants={"none": {"algorithm.entropy_coef": 0}})
    ablation = ablation_plan("study", config, ablated, arms, tracking=TrackingConfig())
    return {
        "run": config.signature,
        "pretraining": experiment.pretraining_signature,
        "reference": of_references.path(reference).name,
        "sweep": sweep.signature,
        "ablation": ablation.signature,
        "arm": ablation.config_of({"arm": "none", "seed": 5}).signature,
    }


def test_a_new_field_with_a_default_changes_no_identity(next_version):
    before = identities()
    assert len(set(before.values())) == len(before)
    next_version()
    config = build(ExperimentConfig, TREE)
    blocks = (config.network.denoiser, config.network.energy, config.schedule, config.algorithm)
    assert [block.added for block in blocks] == [7, 7, 7, 7]
    assert identities() == before


def test_a_new_field_that_is_set_changes_the_identity(next_version):
    next_version()
    before = build(ExperimentConfig, TREE)
    changed = {**TREE, "schedule": {**TREE["schedule"], "added": 8}}
    assert build(ExperimentConfig, changed).signature != before.signature
    assert build(ExperimentConfig, {**TREE, "schedule": {**TREE["schedule"], "added": 7}}).signature == before.signature


@pytest.mark.parametrize(
    ("name", "change"),
    [
        ("run", {"algorithm": {"entropy_coef": 0.3}}),
        ("pretraining", {"network": {"denoiser": {"hidden": 17}}}),
        ("pretraining", {"pretrain": {"ema": 0.9}}),
        ("pretraining", {"train": {"precision": "bfloat16"}}),
        ("pretraining", {"schedule": {"kind": "var"}}),
        ("pretraining", {"data": {"flip": True}}),
        ("reference", {"evaluate": {"projections": 17}}),
        ("reference", {"evaluate": {"seed": 1}}),
        ("sweep", {"evaluate": {"grid": 5}}),
        ("arm", {"algorithm": {"cost_coef": 0.5}}),
    ],
)
def test_what_a_result_depends_on_is_in_its_identity(name, change, monkeypatch):
    before = identities()[name]
    for group, settings in change.items():
        monkeypatch.setitem(TREE, group, settings if "kind" in settings else {**TREE.get(group, {}), **settings})
    assert identities()[name] != before


def test_a_result_does_not_depend_on_what_comes_after_it(monkeypatch):
    before = identities()
    monkeypatch.setitem(TREE, "algorithm", {"entropy_coef": 0.3})
    monkeypatch.setitem(
        TREE, "evaluate", {**TREE["evaluate"], "every": 7, "generations": 2, "grid": 3, "result": "last"}
    )
    now = identities()
    assert (now["pretraining"], now["reference"]) == (before["pretraining"], before["reference"])
    assert now["run"] != before["run"]


# ----------------------------------------------------------------------------
# What takes no part


def test_the_identity_of_the_defaults_is_the_schema():
    assert ExperimentConfig().identity == {"schema": SCHEMA}
    assert ExperimentConfig(resources=ResourcesConfig(threads=3)).identity == {"schema": SCHEMA}


def test_resources_and_permissions_take_no_part():
    config = replace(ExperimentConfig(), data=MnistConfig(accept_unknown_files=True))
    assert config.identity == {"schema": SCHEMA, "data": {"kind": "mnist"}}
    assert delta(config)["data"] == {"kind": "mnist", "accept_unknown_files": True}


def test_limits_of_a_study_take_no_part():
    def plan(**settings: Any) -> Plan:
        return Plan("study", ExperimentConfig(), SweepConfig(**settings), {"seed": {"integer": [1, 9]}})

    same = plan(budget=BudgetConfig(trials=3), max_failures=5, max_concurrent=1)
    assert same.signature == plan().signature
    assert differences(same.settings, plan().settings) == []
    ablated = AblationConfig(hypothesis="x", variants={"a": {}})
    changed = replace(ablated, also=("eval/x",), max_failures=9)
    assert delta(ablated, RESULT) == delta(changed, RESULT)
    assert "resources" not in plan().settings["experiment"]


def test_what_changes_no_score_of_given_weights_takes_no_part_in_theirs():
    free = {"every": 7, "grid": 3, "generations": 2, "result": "last", "features": "inception", "reference_images": 9}
    config = EvaluateConfig(**free, full_reference=False, reference_steps=(3,), seed=4)
    assert delta(config, SCORES) == {"seed": 4}
    assert set(delta(config, RESULT)) == {*free, "full_reference", "reference_steps", "seed"}


# ----------------------------------------------------------------------------
# Deltas


@dataclass(frozen=True, kw_only=True)
class Inner:
    a: int = 1
    b: tuple[int, ...] | None = None


@dataclass(frozen=True, kw_only=True)
class Outer:
    inner: Inner = field(default_factory=lambda: Inner(a=5))
    maybe: Inner | None = None
    several: tuple[Inner, ...] = (Inner(),)
    free: int = field(default=0, metadata=NO_RESULT)
    unscored: int = field(default=0, metadata=NO_SCORE)
    needed: str


def test_a_group_is_compared_with_the_default_of_its_field_not_of_its_class():
    outer = Outer(needed="x", inner=Inner(a=1))
    assert delta(outer) == {"inner": {"a": 1}, "needed": "x"}
    assert delta(Outer(needed="x", inner=Inner(a=5, b=(2,)))) == {"inner": {"b": [2]}, "needed": "x"}
    assert build(Outer, {"needed": "x", "inner": {"b": [2]}}) == Outer(needed="x", inner=Inner(a=5, b=(2,)))


def test_nothing_and_a_group_of_defaults_differ():
    assert delta(Outer(needed="x")) == {"needed": "x"}
    assert delta(Outer(needed="x", maybe=Inner())) == {"needed": "x", "maybe": {}}
    assert build(Outer, delta(Outer(needed="x", maybe=Inner()))).maybe == Inner()


def test_several_of_a_kind_are_listed_whole():
    two = Outer(needed="x", several=(Inner(), Inner(a=2)))
    assert delta(two) == {"needed": "x", "several": [{}, {"a": 2}]}
    assert build(Outer, delta(two)) == two


def test_fields_are_left_out_of_the_identities_that_their_metadata_name():
    outer = Outer(needed="x", free=1, unscored=1)
    assert delta(outer) == {"needed": "x", "free": 1, "unscored": 1}
    assert delta(outer, RESULT) == {"needed": "x", "unscored": 1}
    assert delta(outer, SCORES) == {"needed": "x"}
    whole = {"inner": {"a": 5, "b": None}, "maybe": None, "several": [{"a": 1, "b": None}], "needed": "x"}
    assert identity_tree(outer, SCORES) == whole


def test_a_block_tells_its_kind():
    assert block_delta(UnetConfig(channels=64)) == {"kind": "unet", "channels": 64}
    assert block_delta(Inner()) == {}


def test_a_signature_goes_by_content_not_by_order():
    assert signature({"a": 1, "b": [2, {"c": 3}]}) == signature({"b": [2, {"c": 3}], "a": 1})
    assert signature({"a": 1}) != signature({"a": 1.5})
