"""What an ablation is: every shipped file's arms are accepted, overrides land, and whatever is wrong is a sentence."""

import functools
from collections import defaultdict
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import pytest
import yaml

import tune.plans.inert_settings
from dxmi.config import to_tree
from dxmi.errors import UserError
from support import missing, stating
from tune.config.ablation import AblationConfig, SeedsConfig, parse_ablation
from tune.config.compose import ComposedAblation, compose_ablation, compose_experiment
from tune.config.files import ablations, config_folder, groups
from tune.config.sweep import LimitsConfig, ObjectiveConfig, SamplerConfig, StoppingConfig
from tune.plans.arms import Arm, arms, two_level_design

HYPOTHESIS = "hypothesis: More entropy is better.\n"
VARIANTS = "variants: {none: {algorithm.entropy_coef: 0}}\n"
FILE = HYPOTHESIS + VARIANTS
TAU = "algorithm.entropy_coef"
look_at_effects = tune.plans.inert_settings.digests


@pytest.fixture(autouse=True, scope="module")
def _each_experiment_is_composed_once() -> Iterator[None]:
    """Its composing is a pure function that takes half a second, and is tested elsewhere; so are effects."""
    once = functools.cache(compose_experiment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune.config.compose.compose_experiment", lambda overrides: once(tuple(overrides)))
        patch.setattr("tune.plans.inert_settings.digests", lambda configs: defaultdict(lambda: None))
        yield


def read(*overrides: str) -> tuple[AblationConfig, list[Arm], ComposedAblation]:
    """All the way from overrides to arms."""
    composed = compose_ablation(overrides)
    ablation = parse_ablation(composed.ablation)
    return ablation, arms(ablation, composed.experiment), composed


def refusal(*overrides: str) -> str:
    """The sentence by which an ablation is refused."""
    with pytest.raises(UserError) as refused:
        read(*overrides)
    sentence = str(refused.value)
    assert "\n" not in sentence
    assert len(sentence) < 500
    return sentence


@pytest.fixture
def file(tmp_path):
    """`file(text)`: the override that names an ablation file of the user's own."""

    def written(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return f"ablation={path}"

    return written


# ----------------------------------------------------------------------------
# Shipped ablations


def test_ablations_are_shipped_and_are_no_group_of_an_experiment():
    plane = {"algorithms_2d", "paper_2d", "steps_2d", "rl_algorithms"}
    image = {"algorithms", "dxmi_terms", "entropy", "guidance", "horizon", "steps", "pretraining", "shortening"}
    assert image | plane == set(ablations())
    assert "ablation" not in groups()
    assert "sweep" not in groups()


@pytest.mark.parametrize("name", ablations())
def test_every_shipped_ablation_has_a_hypothesis_and_arms_that_its_experiment_accepts(name, monkeypatch):
    monkeypatch.setattr("tune.plans.inert_settings.digests", look_at_effects)
    written = yaml.safe_load((config_folder() / "ablation" / f"{name}.yaml").read_text())
    ablation, found, composed = read(f"ablation={name}")
    assert len(ablation.hypothesis.split()) > 10
    assert ablation.hypothesis == written["hypothesis"]
    assert composed.experiment.data.kind == ("gaussians8" if name.endswith("_2d") else "digits")
    assert (composed.source, composed.name) == (name, None)
    assert parse_ablation(yaml.safe_load(yaml.safe_dump(to_tree(ablation)))) == ablation
    assert len(found) == (4 if name == "shortening" else 1 + len(written["variants"]))


def values(name: str, path: str) -> list[Any]:
    """Of one setting in the arms of a shipped ablation."""
    _, found, composed = read(f"ablation={name}")
    tree = [to_tree(arm.config(composed.experiment)) for arm in found]
    return [functools.reduce(lambda group, key: group[key], path.split("."), whole) for whole in tree]


@pytest.mark.parametrize("name", ["algorithms", "algorithms_2d"])
def test_algorithms_are_compared_with_equal_network_evaluations(name):
    _, (baseline, sft_pg), composed = read(f"ablation={name}")
    dxmi, other = (arm.config(composed.experiment) for arm in (baseline, sft_pg))
    assert (dxmi.algorithm.kind, other.algorithm.kind) == ("dxmi", "sft_pg")
    assert dxmi.algorithm.policy_updates == other.algorithm.policy_updates == 1
    assert replace(other, algorithm=dxmi.algorithm) == dxmi


def test_shipped_ablations_compare_what_they_say():
    assert sorted(values("entropy", TAU)) == [0.0, 0.01, 0.03, 0.1, 0.3, 1.0]
    assert sorted(values("steps", "schedule.num_steps")) == [1, 2, 3, 5, 10]
    assert values("horizon", "algorithm.policy_horizon") == [1, 2, None]
    assert sorted(values("pretraining", "pretrain.iterations")) == [0, 6000, 60_000]
    methods, shapes = values("shortening", "schedule.kind"), values("shortening", "schedule.shape")
    assert list(zip(methods, shapes, strict=True)) == [
        *(("var", "quadratic"), ("var", "linear"), ("step", "quadratic"), ("step", "linear"))
    ]


def test_the_2d_study_has_the_arms_of_the_papers_table():
    arms = ("pretrain.iterations", "train.iterations", "schedule.num_steps", TAU, "algorithm.cost_coef")
    pretrained, trained, steps, tau, cost = (values("paper_2d", path) for path in arms)
    rows = list(zip(map(bool, pretrained), map(bool, trained), steps, tau, strict=True))
    ddpm = {(True, False, steps, 0.1) for steps in (5, 10, 100, 1000)}
    dxmi = {(is_pretrained, True, 5, tau) for is_pretrained in (True, False) for tau in (0.0, 0.01, 0.1, 1.0)}
    assert rows[0] == (True, True, 5, 0.1)
    assert set(rows) == ddpm | dxmi
    assert len(rows) == len(ddpm | dxmi)
    assert cost == tau
    methods = values("paper_2d", "schedule.kind")
    assert [method == "var" for method in methods] == [not iterations for iterations in pretrained]


def test_a_shared_value_is_the_only_thing_that_its_arm_changes():
    """It keeps the optimizer that the separate energy has in experiment=digits."""
    _, found, composed = read("ablation=dxmi_terms", "experiment=digits")
    algorithm = next(arm for arm in found if arm.name == "shared_value").config(composed.experiment).algorithm
    assert algorithm.critic == algorithm.energy == composed.experiment.algorithm.energy


def test_the_shortening_is_a_two_level_design():
    coded = two_level_design(read("ablation=shortening")[0])
    assert coded.factors == ("method", "shape")
    assert coded.matrix.tolist() == [[1, 1], [1, -1], [-1, 1], [-1, -1]]


# ----------------------------------------------------------------------------
# Files and their defaults


def test_a_file_may_be_the_users_own_and_leave_the_rest_to_defaults(file):
    ablation, found, composed = read(file(FILE), "name=mine-1", "tracking.uri=none")
    assert ablation == AblationConfig(
        hypothesis="More entropy is better.", variants={"none": {"algorithm": {"entropy_coef": 0}}}
    )
    assert found == [Arm("baseline"), Arm("none", {TAU: 0.0})]
    assert (composed.name, composed.source, composed.tracking["uri"]) == ("mine-1", "mine", "none")


def test_every_key_of_a_file_is_read(file):
    text = """
    seeds: {first: 4, cap: 8}
    generations: 3
    level: 0.1
    objective: {metric: num_steps, direction: maximize}
    budget: {wall_minutes: 5, disk_gb: 2}
    max_failures: 0
    max_concurrent: 2
    tuning:
      space: {algorithm.policy.lr: {log_uniform: [1.0e-6, 1.0e-4]}}
      trials: 5
      seed: 77
      sampler: {kind: sobol}
      stopping: {rule: asha}
    """
    ablation = read(file(FILE + text.replace("\n    ", "\n")))[0]
    assert ablation.seeds == SeedsConfig(first=4, cap=8)
    assert (ablation.generations, ablation.level, ablation.max_failures, ablation.max_concurrent) == (3, 0.1, 0, 2)
    assert ablation.objective == ObjectiveConfig(metric="num_steps", direction="maximize")
    assert ablation.budget == LimitsConfig(wall_minutes=5.0, disk_gb=2.0)
    assert (ablation.tuning.trials, ablation.tuning.seed) == (5, 77)
    assert (ablation.tuning.sampler, ablation.tuning.stopping) == (
        SamplerConfig(kind="sobol"),
        StoppingConfig(rule="asha"),
    )
    assert parse_ablation(to_tree(ablation)) == ablation


@pytest.mark.parametrize(
    ("written", "seeds"),
    [
        ("6", (5, 6, 7, 8, 9, 10)),
        ("[3, 1, 2]", (3, 1, 2)),
        ("auto", tuple(range(5, 17))),
        ("{first: 2, cap: 4}", (5, 6, 7, 8)),
    ],
)
def test_seeds_are_counted_from_the_experiments_own_or_listed(file, written, seeds):
    config = read(file(FILE + f"seeds: {written}\n"))[0].seeds
    assert config.numbers(5) == seeds
    assert config.first == {"auto": 3, "{first: 2, cap: 4}": 2}.get(written, len(seeds))


def test_a_file_without_seeds_has_auto(file):
    assert read(file(FILE))[0].seeds == read(file(FILE + "seeds: auto\n"))[0].seeds == SeedsConfig(first=3, cap=12)


def test_numbers_are_names_too(file):
    text = "variants: {0: {algorithm.entropy_coef: 0}, 0.5: {algorithm.entropy_coef: 0.5}}\n"
    assert [arm.name for arm in read(file(HYPOTHESIS + text))[1]] == ["baseline", "0", "0.5"]


def test_the_option_of_a_config_group_stands_for_its_settings(file):
    text = "variants: {step: {schedule: step_linear}, wide: {network: mlp}, objective: {algorithm: objective}}\n"
    _, (_, step, wide, objective), composed = read(file(HYPOTHESIS + text), "schedule.num_steps=7")
    assert step.changes == {"schedule.kind": "step", "schedule.shape": "linear"}
    assert step.config(composed.experiment).schedule.num_steps == 7
    expected = compose_experiment(["network=mlp", "schedule.num_steps=7"]).experiment
    assert wide.config(composed.experiment) == expected
    assert objective.changes == {"algorithm.preset": "objective"}


# ----------------------------------------------------------------------------
# The baseline


def test_a_file_may_change_the_experiment_that_is_its_baseline(file):
    text = FILE + "baseline: [algorithm.entropy_coef=0.7, schedule=step_linear, experiment=mnist8]\n"
    experiment = read(file(text))[2].experiment
    assert (experiment.algorithm.entropy_coef, experiment.schedule.kind, experiment.data.kind) == (
        0.7,
        "step",
        "mnist8",
    )


def test_the_command_line_wins_over_a_files_baseline(file):
    text = FILE + "baseline: [algorithm.entropy_coef=0.7, experiment=mnist8]\n"
    experiment = read(file(text), "algorithm.entropy_coef=0.3", "experiment=digits")[2].experiment
    assert (experiment.algorithm.entropy_coef, experiment.data.kind) == (0.3, "digits")
    changed = read(file(text), "ablation.baseline=['algorithm.entropy_coef=0.9']")[2].experiment
    assert changed.algorithm.entropy_coef == 0.9


def test_a_variant_that_the_command_line_makes_the_baseline_is_refused(file):
    assert missing(f"ablation.variants.none … baseline … {TAU}", refusal(file(FILE), f"{TAU}=0")) == []


@pytest.mark.parametrize(
    ("baseline", "words"),
    [
        (
            "{algorithm.entropy_coef: 1}",
            "ablation.baseline is {'algorithm.entropy_coef': 1}",
        ),
        ("algorithm.entropy_coef=1", "ablation.baseline is 'algorithm.entropy_coef=1' … [algorithm.entropy_coef=1.0]"),
        ("[1]", "ablation.baseline is [1]"),
        ("[algorithm.entropy_coeff=1]", "algorithm.entropy_coeff … entropy_coef"),
        ("['x=[']", "x=["),
        ("[sweep=demo]", "sweep"),
    ],
)
def test_a_baseline_that_is_no_list_of_overrides_is_refused(file, baseline, words):
    assert missing(words, refusal(file(FILE + f"baseline: {baseline}\n"))) == []


# ----------------------------------------------------------------------------
# Overrides


@pytest.mark.parametrize(
    ("override", "names"),
    [
        ("ablation.variants.tau_0.algorithm.entropy_coef=0.001", ["tau_0", "tau_0.01", "tau_0.03"]),
        ("+ablation.variants.much={algorithm.entropy_coef:9}", ["tau_0", "tau_0.01", "tau_0.03"]),
        ("~ablation.variants.tau_0", ["tau_0.01", "tau_0.03", "tau_0.1"]),
        ("ablation.design=list", ["tau_0", "tau_0.01", "tau_0.03"]),
    ],
)
def test_the_table_can_be_overridden(override, names):
    assert [arm.name for arm in read("ablation=entropy", override)[1]][1:4] == names


@pytest.mark.parametrize(
    ("override", "key", "value"),
    [
        ("ablation.seeds=4", "seeds", SeedsConfig(first=4, cap=4)),
        ("ablation.seeds=[7,8]", "seeds", SeedsConfig(first=2, cap=2, values=(7, 8))),
        ("ablation.generations=5", "generations", 5),
        ("ablation.level=0.01", "level", 0.01),
        ("ablation.budget.wall_minutes=9", "budget", LimitsConfig(wall_minutes=9.0)),
        ("ablation.objective.metric=seconds", "objective", ObjectiveConfig(metric="seconds")),
        ("ablation.max_concurrent=1", "max_concurrent", 1),
        ("ablation.hypothesis='It helps.'", "hypothesis", "It helps."),
    ],
)
def test_an_override_lands_where_it_should(override, key, value):
    assert getattr(read("ablation=entropy", override)[0], key) == value


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("ablation.seed=3", "ablation.seed … seeds"),
        ("ablation.budget.trials=3", "ablation.budget.trials"),
        ("ablation.variants.tau_0.algorithm.entropy=3", "ablation.variants.tau_0.algorithm.entropy … entropy_coef"),
        ("ablation.seeds=1", "ablation.seeds is 1 … 2..1000"),
        (
            "ablation.seeds=1.5",
            "ablation.seeds is 1.5 … 6 … [0, 1, 2] … {first … 3 … 12}",
        ),
        ("ablation.seeds=true", "ablation.seeds is True … 6"),
        ("ablation.seeds=three", "ablation.seeds is 'three' … 6"),
        ("ablation.seeds=[1]", "ablation.seeds is [1] … 6"),
        ("ablation.seeds=[1,1]", "ablation.seeds.values … twice"),
        ("ablation.seeds=[1,-1]", "0..2^63 - 1 … ablation.seeds.values … -1"),
        ("ablation.seeds=[1,x]", "ablation.seeds.values[1] is 'x'"),
        ("ablation.seeds={first:1}", "ablation.seeds.first is 1 … 2..1000"),
        ("ablation.seeds={first:5,cap:4}", "ablation.seeds.cap is 4 … 5 … 1000"),
        ("ablation.seeds={frist:5}", "ablation.seeds.frist … first"),
        ("ablation.seeds={values:[1,2]}", "ablation.seeds.values … 2 … 12"),
        ("ablation.generations=0", "ablation.generations is 0 … 1..100"),
        ("ablation.level=1", "ablation.level is 1.0 … 0 … 1"),
        ("ablation.level=nan", "ablation.level is nan … 0 … 1"),
        (
            "ablation.design=factoral",
            "ablation.design is 'factoral' … one_factor … list … leave_one_out",
        ),
        ("ablation.design=factorial", "ablation.variants … design=factorial"),
        ("ablation.resolution=4", "ablation.resolution … design=one_factor"),
        ("ablation.all_off=true", "ablation.all_off … design=one_factor"),
        ("ablation.hypothesis=' '", "ablation.hypothesis … missing"),
        ("ablation.hypothesis=3", "ablation.hypothesis is 3"),
        ("~ablation.hypothesis", "ablation.hypothesis … missing"),
        ("~ablation.variants", "ablation.variants … empty"),
        ("ablation.variants=3", "ablation.variants is 3"),
        ("ablation.max_failures=-1", "ablation.max_failures is -1 … 0"),
        ("ablation.max_concurrent=0", "ablation.max_concurrent is 0 … 1"),
        ("ablation.budget.disk_gb=0", "ablation.budget.disk_gb is 0.0 … 0"),
        (
            "ablation.objective.direction=up",
            "ablation.objective.direction is 'up' … minimize … maximize",
        ),
        ("ablation.tuning={trials:0}", "ablation.tuning.trials is 0 … 1"),
        ("ablation.tuning={seed:-1}", "ablation.tuning.seed is -1 … 0..2^63 - 1"),
        (
            "ablation.tuning={sampler:{kind:nsga2}}",
            "ablation.tuning.sampler.kind is 'nsga2'",
        ),
        ("ablation.tuning={space:3}", "ablation.tuning.space is 3"),
        ("ablation.tuning={trails:3}", "ablation.tuning.trails … trials"),
        ("ablation.tuning=3", "ablation.tuning is 3"),
        ("tracking.url=x", "tracking.url … uri"),
        ("algorithm.entropy_coeff=1", "algorithm.entropy_coeff … entropy_coef"),
        ("out=x", "name="),
        ("+name=x", "'+name=x' … name=STUDY"),
    ],
)
def test_a_bad_override_is_refused_in_a_sentence(override, words):
    assert missing(words, refusal("ablation=entropy", override)) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "dxmi_terms … entropy … ablation=NAME"),
        (["ablation=entrpy"], "entropy … 'entrpy' … .yaml"),
        (["ablation=nowhere.yaml"], "nowhere.yaml"),
        (["ablation=entropy", "ablation=steps"], "ablation … twice"),
    ],
)
def test_an_ablation_that_is_none_is_refused(overrides, words):
    assert missing(words, refusal(*overrides)) == []


# ----------------------------------------------------------------------------
# Files that are refused


@pytest.mark.parametrize(
    ("text", "words"),
    [
        (VARIANTS, "ablation.hypothesis … missing"),
        ("hypothesis:\n" + VARIANTS, "ablation.hypothesis is None"),
        (HYPOTHESIS, "ablation.variants … empty … {no_entropy"),
        (HYPOTHESIS + "variants:\n", "ablation.variants is None"),
        (FILE + "varants: {}\n", "ablation.varants … variants"),
        (FILE + "name: x\n", "ablation.name"),
        (FILE + VARIANTS, "twice"),
        (
            HYPOTHESIS + "variants:\n  a: {algorithm.cost_coef: 0}\n  a: {algorithm.cost_coef: 1}\n",
            "twice",
        ),
        (HYPOTHESIS + "variants: {1: {}, '1': {}}\n", "ablation.variants … 1 … twice"),
        (HYPOTHESIS + "variants: {1: {}, yes: {}}\n", "twice … YAML"),
        (
            "hypothesis: Entropy: it matters\n" + VARIANTS,
            "1 … 20",
        ),
        (
            HYPOTHESIS + "variants: {a: {algorithm.preset: x, algorithm: {preset: y}}}\n",
            "ablation.variants.a",
        ),
        (
            HYPOTHESIS + "design: factorial\nfactors: {a: {on: {}, off: {algorithm.entropy_coef: 0}}}\n",
            "ablation.factors.a … YAML",
        ),
        (
            HYPOTHESIS + "variants: {no: {algorithm.entropy_coef: 0}}\n",
            "ablation.variants … YAML",
        ),
        (
            HYPOTHESIS + "variants: {a: {schedule: step_lnear}}\n",
            "step_linear … 'step_lnear'",
        ),
        (
            HYPOTHESIS + "variants: {a: {data: mnist}}\n",
            "ablation.variants.a.data.kind",
        ),
        (HYPOTHESIS + "variants: {a: {experiment: mnist8}}\n", "ablation.variants.a.experiment"),
        (HYPOTHESIS + "variants: {a: {algorithm.preset: '${x}'}}\n", "write the value out"),
        (FILE + "_target_: os.system\n", "_target_"),
        (FILE + "x: !!python/name:os.system ''\n", "YAML"),
        (FILE + "budget: 3\n", "ablation.budget is 3"),
        (
            FILE + "tuning: {space: {algorithm.policy.lr: 3}}\n",
            "ablation.tuning.space.algorithm.policy.lr is 3",
        ),
        (
            FILE + "tuning: {space: {seed: {choice: [1, 2]}, seed.x: {choice: [1]}}}\n",
            "ablation.tuning.space … seed.x … twice",
        ),
        (FILE + "tuning: {sampler: 3}\n", "ablation.tuning.sampler is 3"),
    ],
)
def test_a_file_that_is_no_ablation_is_refused_in_a_sentence(file, text, words):
    assert missing(words, refusal(file(text))) == []


def test_levels_may_be_called_on_and_off_in_quotes(file):
    text = "design: factorial\nfactors: {entropy: {'on': {}, 'off': {algorithm.entropy_coef: 0}}}\n"
    found = read(file(HYPOTHESIS + text))[1]
    assert [arm.levels for arm in found] == [{"entropy": "on"}, {"entropy": "off"}]


def test_what_is_no_tree_is_no_ablation():
    with pytest.raises(UserError, match=stating("ablation is 3 … group")):
        parse_ablation(3)
