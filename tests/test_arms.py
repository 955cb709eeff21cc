"""From tables to arms: what each design makes of its entries, and what is refused before anything runs."""

import itertools
from collections import defaultdict
from typing import Any

import numpy as np
import pytest

import tune.plans.inert_settings
from dxmi.config import build, differences, to_tree
from dxmi.errors import UserError
from dxmi.networks.configs import UnetConfig
from dxmi.training.config import ExperimentConfig
from support import missing, stating
from tune.config.ablation import parse_ablation
from tune.plans.arms import MAX_ARMS, Arm, arms, tuning_axes, two_level_design

SMALL = {"kind": "mlp", "hidden": 8, "layers": 3, "embedding": 4}
EXPERIMENT = build(
    ExperimentConfig,
    {
        "network": {"denoiser": SMALL, "energy": SMALL, "value": SMALL},
        "pretrain": {"iterations": 20},
        "schedule": {"num_steps": 3},
        "train": {"iterations": 50},
    },
)
TAU, COST, L2 = "algorithm.entropy_coef", "algorithm.cost_coef", "algorithm.energy_l2"
STEP_COST, SCALE = "algorithm.step_cost", "algorithm.step_cost_scale"
ON_OFF = {"with": {}, "without": {TAU: 0}}
look_at_effects = tune.plans.inert_settings.digests


@pytest.fixture(autouse=True)
def _no_effect_is_looked_at(monkeypatch):
    """Tests of tables need no updates of networks."""
    monkeypatch.setattr("tune.plans.inert_settings.digests", lambda configs: defaultdict(lambda: None))


@pytest.fixture
def effects(monkeypatch, _no_effect_is_looked_at):
    """Whether a setting does anything is looked at after all."""
    monkeypatch.setattr("tune.plans.inert_settings.digests", look_at_effects)


def arms_of(experiment: ExperimentConfig = EXPERIMENT, **ablation: Any) -> list[Arm]:
    return arms(parse_ablation({"hypothesis": "It helps.", **ablation}), experiment)


def refusal(**ablation: Any) -> str:
    """The sentence by which arms are refused."""
    with pytest.raises(UserError) as refused:
        arms_of(**ablation)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert sentence.endswith((".", "?"))
    return sentence


def factors(**named: Any) -> dict[str, Any]:
    return {"design": "factorial", "factors": named}


# ----------------------------------------------------------------------------
# One change an arm


@pytest.mark.parametrize("design", ["one_factor", "list"])
def test_a_variant_is_an_arm_after_the_baseline(design):
    found = arms_of(design=design, variants={"b": {TAU: 0}, "a": {TAU: 0.5, COST: 0}})
    assert found == [Arm("baseline"), Arm("b", {TAU: 0.0}), Arm("a", {TAU: 0.5, COST: 0.0})]
    assert found[0].config(EXPERIMENT) == EXPERIMENT
    changed = differences(to_tree(EXPERIMENT), to_tree(found[2].config(EXPERIMENT)))
    assert changed == [f"{COST}: 0.01 -> 0.0", f"{TAU}: 0.1 -> 0.5"]


def test_settings_may_be_nested_and_a_group_keeps_what_is_not_named():
    nested = {"algorithm": {"policy": {"sigma_lr": 0}, "policy_mask": [1, 0.5, 0]}, "schedule": {"kind": "step"}}
    (_, arm) = arms_of(variants={"x": nested})
    expected = {"algorithm.policy.sigma_lr": 0.0, "algorithm.policy_mask": [1.0, 0.5, 0.0], "schedule.kind": "step"}
    assert arm.changes == expected
    assert arm.config(EXPERIMENT).schedule.num_steps == EXPERIMENT.schedule.num_steps == 3


def test_what_the_baseline_has_already_is_no_change_of_a_bundle():
    (_, arm) = arms_of(variants={"x": {TAU: 0, COST: 0.01, "algorithm.preset": "as_released"}})
    assert arm.changes == {TAU: 0.0}


def test_a_network_of_another_kind_is_changed_as_a_whole():
    given = {"network": {"denoiser": {"kind": "unet", "channels": 32, "multipliers": [1, 2]}}, TAU: 0}
    (_, arm) = arms_of(variants={"x": given})
    of_unet = {"network.denoiser.kind": "unet", "network.denoiser.channels": 32, "network.denoiser.multipliers": [1, 2]}
    assert arm.changes == {TAU: 0.0, **of_unet}
    assert arm.config(EXPERIMENT).network.denoiser == UnetConfig(channels=32, multipliers=(1, 2))


def test_leaving_one_out_switches_each_component_off_alone_and_all_together_if_asked():
    components = {"entropy": {TAU: 0}, "costs": {COST: 0, L2: 0}}
    each = [Arm("baseline"), Arm("without_entropy", {TAU: 0.0}), Arm("without_costs", {COST: 0.0, L2: 0.0})]
    assert arms_of(design="leave_one_out", components=components) == each
    whole = arms_of(design="leave_one_out", components=components, all_off=True)
    assert whole == [*each, Arm("without_all", {TAU: 0.0, COST: 0.0, L2: 0.0})]


# ----------------------------------------------------------------------------
# Combinations


def test_a_factorial_has_every_combination_once_and_the_baseline_is_one_of_them():
    tau = {"own": {}, "none": {TAU: 0}, "much": {TAU: 1}}
    found = arms_of(**factors(tau=tau, cost={"own": {COST: 0.01}, "none": {COST: 0}}))
    assert [arm.levels for arm in found] == [
        {"tau": a, "cost": b} for a, b in itertools.product(("own", "none", "much"), ("own", "none"))
    ]
    assert [arm.name for arm in found] == [
        *("baseline", "cost-none", "tau-none", "tau-none.cost-none", "tau-much", "tau-much.cost-none")
    ]
    assert found[0].changes == {}
    assert found[5].changes == {TAU: 1.0, COST: 0.0}
    assert two_level_design(parse_ablation({"hypothesis": "x", **factors(tau=tau)})) is None


@pytest.mark.parametrize("design", ["factorial", "fractional"])
@pytest.mark.parametrize("resolution", [3, 4])
def test_the_rows_of_the_coded_matrix_are_the_arms(design, resolution):
    paths = [TAU, COST, L2, "algorithm.policy.lr", "algorithm.critic.lr"]
    given = {
        "hypothesis": "x",
        "design": design,
        "factors": {f"f{i}": {"own": {}, "other": {path: 0.7}} for i, path in enumerate(paths)},
        "resolution": resolution if design == "fractional" else None,
    }
    ablation = parse_ablation(given)
    found, coded = arms(ablation, EXPERIMENT), two_level_design(ablation)
    assert len(found) == {"factorial": 32, "fractional": 8 if resolution == 3 else 16}[design]
    assert coded.factors == tuple(ablation.factors)
    levels = [[1 if arm.levels[factor] == "own" else -1 for factor in coded.factors] for arm in found]
    np.testing.assert_array_equal(coded.matrix, levels)
    for arm in found:
        assert arm.changes == {paths[int(f[1])]: 0.7 for f, level in arm.levels.items() if level == "other"}


def test_a_fraction_is_of_resolution_four_unless_it_says_otherwise():
    given = {"design": "fractional", "factors": dict.fromkeys("abcd", ON_OFF)}
    assert two_level_design(parse_ablation({"hypothesis": "x", **given})).resolution == 4
    assert two_level_design(parse_ablation({"hypothesis": "x", "variants": {}})) is None


@pytest.mark.parametrize(
    ("named", "words"),
    [
        ({}, "ablation.factors … empty … {method: {var: {}, step"),
        ({"a": 3}, "ablation.factors.a is 3 … levels"),
        ({"a": {"own": {}}}, "ablation.factors.a … two levels … baseline"),
        ({"a": {"own": {}, "same": {}}}, "ablation.factors.a.same … baseline … nothing"),
        (
            {"a": {"off": {TAU: 0}, "on": {}}},
            f"ablation.factors.a.off … first … baseline's … {TAU} … 0.1 … 0",
        ),
        ({"a": {"own": {}, "x y": {TAU: 0}}}, "ablation.factors.a.x y … name"),
        ({"a b": ON_OFF}, "ablation.factors.a b … name"),
        ({"a": ON_OFF, "b": ON_OFF}, f"ablation.factors.b.without … {TAU} … another"),
        ({"a": {"own": {}, "one": {TAU: 0}, "two": {TAU: 0.0}}}, "a-one … a-two … equal"),
    ],
)
def test_factors_that_make_no_factorial_are_refused(named, words):
    assert missing(words, refusal(**factors(**named))) == []


def test_a_combination_that_the_experiment_refuses_is_named():
    steps, mask = (
        {"own": {}, "two": {"schedule.num_steps": 2}},
        {"own": {}, "last": {"algorithm.policy_mask": [0, 0, 1]}},
    )
    sentence = refusal(**factors(steps=steps, mask=mask))
    assert missing("steps-two.mask-last … algorithm.policy_mask … 3", sentence) == []


def test_a_fraction_takes_two_levels_and_at_most_ten_factors():
    three = {"own": {}, "none": {TAU: 0}, "much": {TAU: 1}}
    assert missing("ablation.factors.a … 3 levels … two", refusal(design="fractional", factors={"a": three})) == []
    many = {f"f{i}": ON_OFF for i in range(11)}
    assert missing("ablation.factors … 11 … 10", refusal(design="fractional", factors=many)) == []


@pytest.mark.parametrize(("num", "resolution"), [(2, 3), (2, 4), (3, 4)])
def test_a_fraction_that_would_be_the_whole_is_refused(num, resolution):
    """The smallest fractions are 2^(3-1) of resolution III and 2^(4-1) of resolution IV."""
    given = {"design": "fractional", "resolution": resolution, "factors": dict.fromkeys("abcd"[:num], ON_OFF)}
    facts = f"ablation.factors … {num} … resolution {resolution} … design=factorial"
    assert missing(facts, refusal(**given)) == []


def test_names_that_differ_in_case_alone_are_refused():
    sentence = refusal(variants={"fast": {TAU: 1.5}, "Fast": {TAU: 2.5}})
    assert missing("fast … Fast … case", sentence) == []


def test_too_many_arms_are_refused_before_any_is_built():
    values = {f"v{i}": {TAU: 1.0 + i} for i in range(MAX_ARMS)}
    assert missing("65 arms … 64", refusal(variants=values)) == []
    del values["v0"]
    assert len(arms_of(variants=values)) == MAX_ARMS
    many = {f"f{i}": ON_OFF for i in range(40)}
    assert missing(f"{2**40} arms … 64", refusal(**factors(**many))) == []


# ----------------------------------------------------------------------------
# Entries that are refused


@pytest.mark.parametrize(
    ("variant", "words"),
    [
        ({}, "ablation.variants.x … baseline … nothing"),
        ({TAU: 0.1}, f"ablation.variants.x … baseline … {TAU} is 0.1"),
        ({"algorithm": {"policy_mask": [1]}}, "ablation.variants.x … baseline … algorithm.policy_mask is [1]"),
        (3, "ablation.variants.x is 3 … group … {algorithm.entropy_coef: 0}"),
        (None, "ablation.variants.x is None … group"),
        (
            {"algorithm.entropy_coeff": 0},
            f"ablation.variants.x.algorithm.entropy_coeff … {TAU}",
        ),
        ({"zzz": 0}, "ablation.variants.x.zzz … network … pretrain … schedule"),
        ({1: 2}, "ablation.variants.x.1 … setting"),
        ({"algorithm": 3}, "ablation.variants.x.algorithm … group"),
        ({"algorithm": {}}, "ablation.variants.x.algorithm … group"),
        ({f"{TAU}.x": 3}, f"ablation.variants.x.{TAU}.x … setting"),
        ({TAU: "much"}, f"ablation.variants.x … {TAU} is 'much' … number"),
        ({TAU: True}, f"ablation.variants.x … {TAU} is True … number"),
        ({TAU: -1}, f"ablation.variants.x … {TAU} is -1.0 … finite … 0"),
        ({TAU: [1]}, f"ablation.variants.x … {TAU} is [1] … number"),
        ({"schedule.num_steps": 2.5}, "ablation.variants.x … schedule.num_steps is 2.5 … whole"),
        ({"algorithm.policy_mask": [1, 0]}, "ablation.variants.x … algorithm.policy_mask … 2 … 3 steps"),
        ({"network.denoiser": {"kind": "cnn"}}, "ablation.variants.x … network.denoiser.kind is 'cnn' … mlp"),
        ({TAU: 0, "algorithm": {"entropy_coef": 0}}, f"ablation.variants.x … {TAU} … twice"),
        ({"resources.threads": 1}, "ablation.variants.x.resources.threads … vary … result"),
        ({"evaluate": {"every": 3}}, "ablation.variants.x.evaluate.every … vary … measured"),
        ({"name": "y"}, "ablation.variants.x.name … vary … result"),
        ({"seed": 1}, "ablation.variants.x.seed … vary … seeds"),
        ({"data.label": 3}, "ablation.variants.x.data.label … vary … data"),
        ({"data": {"kind": "mnist"}}, "ablation.variants.x.data.kind … vary … data"),
    ],
)
@pytest.mark.parametrize("table", ["variants", "components"])
def test_an_entry_that_is_no_change_of_this_baseline_is_refused(table, variant, words):
    design = "one_factor" if table == "variants" else "leave_one_out"
    sentence = refusal(design=design, **{table: {"x": variant}})
    assert missing(words.replace("ablation.variants", f"ablation.{table}"), sentence) == []


@pytest.mark.parametrize("name", ["", "a b", "a/b", "-x", ".x", "ä", "a\nb", "x" * 41, "x" * 900, 3, None])
def test_a_name_that_is_no_plain_word_is_refused(name):
    assert (
        missing(
            "ablation.variants … name … 1 … 40", refusal(variants={name: {TAU: 0}}).replace("variants.", "variants ")
        )
        == []
    )


@pytest.mark.parametrize("name", ["a", "tau_0.03", "T-5", "x" * 40, "0"])
def test_a_plain_word_is_a_name(name):
    assert arms_of(variants={name: {TAU: 0}})[1].name == name


def test_the_baselines_name_and_names_given_twice_are_refused():
    assert missing("ablation.variants.baseline … name", refusal(variants={"baseline": {TAU: 0}})) == []
    twice = {"all": {TAU: 0}, "other": {COST: 0}}
    sentence = refusal(design="leave_one_out", components=twice, all_off=True)
    assert missing("Two … without_all", sentence) == []


def test_equal_arms_are_refused():
    equal = {"a": {TAU: 0}, "b": {"algorithm": {"entropy_coef": 0.0}}}
    assert missing("a … b … equal", refusal(variants=equal)) == []
    alone = refusal(design="leave_one_out", components={"a": {TAU: 0}}, all_off=True)
    assert missing("without_a … without_all … equal", alone) == []


def test_components_that_change_the_same_setting_cannot_be_off_together():
    components = {"a": {TAU: 0}, "b": {TAU: 0.5}}
    assert len(arms_of(design="leave_one_out", components=components)) == 3
    sentence = refusal(design="leave_one_out", components=components, all_off=True)
    assert missing(f"ablation.components.b … {TAU} … another", sentence) == []


@pytest.mark.parametrize("design", ["one_factor", "leave_one_out", "factorial", "fractional", "list"])
def test_an_empty_design_is_refused_with_an_example(design):
    sentence = refusal(design=design)
    table = {"leave_one_out": "components", "factorial": "factors", "fractional": "factors"}.get(design, "variants")
    assert missing(f"ablation.{table} … empty … {{", sentence) == []


# ----------------------------------------------------------------------------
# Settings that do nothing


def test_a_change_that_does_nothing_under_this_baseline_is_refused(effects):
    sentence = refusal(variants={"tau": {TAU: 0}, "x": {SCALE: 2.0}})
    assert missing(f"ablation.variants.x … no effect … {SCALE}", sentence) == []
    both = refusal(design="leave_one_out", components={"x": {SCALE: 0, "algorithm.energy.lr": 0}})
    assert missing(f"ablation.components.x … no effect … {SCALE} … algorithm.energy.lr", both) == []


def test_the_same_change_is_accepted_where_it_does_something(effects):
    with_cost = build(ExperimentConfig, to_tree(EXPERIMENT) | {"algorithm": {"step_cost": "linear"}})
    assert len(arms_of(with_cost, variants={"x": {SCALE: 2.0}})) == 2
    bundle = {STEP_COST: "linear", SCALE: 2.0}
    assert arms_of(variants={"x": bundle})[1].changes == bundle


def test_a_part_of_a_change_that_does_nothing_beside_the_rest_is_refused(effects):
    sentence = refusal(variants={"x": {TAU: 0, SCALE: 2.0}})
    assert missing(f"ablation.variants.x.{SCALE} … no effect", sentence) == []
    level = {"own": {}, "other": {TAU: 0, "network.value.hidden": 9}}
    assert missing("ablation.factors.a.other.network.value.hidden … no effect", refusal(**factors(a=level))) == []


def test_arms_that_come_to_the_same_are_refused(effects):
    same = {
        "a": {TAU: 0, "algorithm.preset": "objective", COST: 0.5},
        "b": {TAU: 0, COST: 0.5, "algorithm.value_mask": [1]},
    }
    sentence = refusal(variants=same)
    assert missing("arms a and b … identically", sentence) == []


def test_a_factor_that_another_switches_off_is_refused(effects):
    """Without a step cost its height does nothing, so two cells of the factorial are one."""
    with_cost = build(ExperimentConfig, to_tree(EXPERIMENT) | {"algorithm": {"step_cost": "linear"}})
    named = {"kind": {"own": {}, "none": {STEP_COST: "none"}}, "height": {"own": {}, "double": {SCALE: 2.0}}}
    with pytest.raises(UserError, match=stating("kind-none … kind-none.height-double … identically")):
        arms_of(with_cost, **factors(**named))


# ----------------------------------------------------------------------------
# Tuning inside each arm


def tuned(space: dict[str, Any], **more: Any) -> dict[str, Any]:
    return {"variants": {"tau": {TAU: 0}}, "tuning": {"space": space, "trials": 4, **more}}


LR = {"algorithm.policy.lr": {"log_uniform": [1e-6, 1e-4]}}


def test_nuisance_settings_are_tuned_over_the_same_space_in_each_arm():
    ablation = parse_ablation({"hypothesis": "x", **tuned(LR)})
    spaces = [tuning_axes(ablation, arm.config(EXPERIMENT)) for arm in arms(ablation, EXPERIMENT)]
    assert [axis.path for axis in spaces[0]] == list(LR)
    assert spaces[0] == spaces[1]
    assert tuning_axes(parse_ablation({"hypothesis": "x"}), EXPERIMENT) == ()


@pytest.mark.parametrize(
    ("tuning", "words"),
    [
        (tuned({}), "ablation.tuning.space … empty"),
        (
            tuned({"algorithm.policy.lrr": {"uniform": [0, 1]}}),
            "ablation.tuning.space.algorithm.policy.lrr … algorithm.policy.lr",
        ),
        (tuned({TAU: {"uniform": [0, 1]}}), f"ablation.tuning.space.{TAU} … arm tau"),
        (
            tuned({"seed": {"integer": [0, 9]}}),
            "ablation.tuning.space.seed … vary … seeds",
        ),
        (tuned({"data.label": {"integer": [0, 9]}}), "ablation.tuning.space.data.label … vary"),
        (tuned({"evaluate.every": {"integer": [1, 9]}}), "ablation.tuning.space.evaluate.every … vary"),
        (tuned(LR, seed=5), "ablation.tuning.seed is 5 … seeds"),
    ],
)
def test_tuning_that_would_spoil_the_comparison_is_refused(tuning, words):
    assert missing(words, refusal(**tuning)) == []


def test_a_space_that_one_arm_cannot_take_is_refused():
    variants = {"mask": {"algorithm.policy_mask": [1, 1, 0]}}
    space = {"schedule.num_steps": {"integer": [2, 5]}}
    sentence = refusal(variants=variants, tuning={"space": space})
    assert missing("arm mask … ablation.tuning.space.schedule.num_steps", sentence) == []
