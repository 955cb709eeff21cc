"""The search space: what a sweep file may say, what its lines mean, and what becomes of the values."""

import datetime
import itertools
import json
import math
import random

import pytest
import yaml
from optuna.distributions import distribution_to_json, json_to_distribution
from scipy.stats import loguniform, uniform

from dxmi.config import build, differences, to_tree
from dxmi.errors import UserError
from dxmi.training.config import ExperimentConfig
from support import missing, stating
from tune.search.space import Axis, configured, flat, grid_points, parse_space, show, value_at

EXPERIMENT = ExperimentConfig()
LR, STEPS, PRESET, MASK = "algorithm.policy.lr", "schedule.num_steps", "algorithm.preset", "algorithm.policy_mask"
ALMOST_ONE = 1.0 - 2.0**-53


def axis(path: str, kind: str, body: list, **more) -> Axis:
    return parse_space({path: {kind: body, **more}}, EXPERIMENT)[0]


def refusal(tree) -> str:
    """The sentence by which a space is refused."""
    with pytest.raises(UserError) as refused:
        parse_space(tree, EXPERIMENT)
    sentence = str(refused.value)
    assert sentence.startswith("sweep.space")
    assert sentence[-1] in ".?"
    assert "\n" not in sentence
    return sentence


def random_ranges(number: int, low: float, high: float) -> list[tuple[float, float]]:
    rng = random.Random(0)
    return [tuple(sorted((rng.uniform(low, high), rng.uniform(low, high)))) for _ in range(number)]


# ----------------------------------------------------------------------------
# What a file may say


def test_every_kind_is_read_in_the_order_of_the_file():
    text = """
    schedule.num_steps: {integer: [3, 8]}
    algorithm.policy.lr: {log_uniform: [1.0e-6, 1.0e-4], points: 5}
    algorithm.entropy_coef: {uniform: [0, 1]}
    algorithm.preset: {choice: [objective, as_released]}
    """
    assert parse_space(yaml.safe_load(text), EXPERIMENT) == (
        Axis(STEPS, "integer", 3, 8),
        Axis(LR, "log_uniform", 1e-6, 1e-4, points=5),
        Axis("algorithm.entropy_coef", "uniform", 0.0, 1.0),
        Axis(PRESET, "choice", choices=("objective", "as_released")),
    )


@pytest.mark.parametrize(
    "tree",
    [
        {"algorithm": {"policy": {"lr": {"uniform": [0, 1]}}, "preset": {"choice": ["objective"]}}},
        {"algorithm.policy": {"lr": {"uniform": [0, 1]}}, "algorithm": {"preset": {"choice": ["objective"]}}},
        {"algorithm": {"policy.lr": {"uniform": [0, 1]}, "preset": {"choice": ["objective"]}}},
    ],
)
def test_groups_may_be_nested_or_written_with_dots(tree):
    dotted = {LR: {"uniform": [0, 1]}, PRESET: {"choice": ["objective"]}}
    assert parse_space(tree, EXPERIMENT) == parse_space(dotted, EXPERIMENT)


EXAMPLE = "{log_uniform: [1.0e-6, 1.0e-4]} … {uniform: [0, 1]} … {integer: [3, 8]} … {choice: [a, b]}"


@pytest.mark.parametrize(
    ("tree", "sentence"),
    [
        (None, f"sweep.space is None … {EXAMPLE}"),
        ([1], f"sweep.space is [1] … {EXAMPLE}"),
        ({}, f"sweep.space … empty … {EXAMPLE}"),
        ({LR: 3}, f"sweep.space.{LR} is 3 … {EXAMPLE}"),
        ({LR: [1, 2]}, f"sweep.space.{LR} is [1, 2] … {EXAMPLE}"),
        ({LR: {"loguniform": [1, 2]}}, f"sweep.space.{LR}.loguniform is [1, 2] … {EXAMPLE}"),
        ({LR: {"uniform": [0, 1], "choice": [1]}}, f"sweep.space.{LR} … {EXAMPLE}"),
        ({LR: {"uniform": [0, 1], "step": 0.1}}, f"sweep.space.{LR} … {EXAMPLE}"),
        ({"uniform": [0, 1]}, "sweep.space. … setting"),
    ],
)
def test_what_is_no_space_is_refused_with_an_example(tree, sentence):
    assert missing(sentence, refusal(tree)) == []


@pytest.mark.parametrize(
    ("path", "words"),
    [
        ("algorithm.policy.lrr", "algorithm.policy.lr"),
        ("algorithm.entropy_coeff", "algorithm.entropy_coef"),
        ("policy.lr", "algorithm.policy.lr"),
        ("seed.x", "seed"),
        ("zzz", "seed … data … network … pretrain … schedule … algorithm … train"),
        ("", "seed … data … network … pretrain … schedule … algorithm … train"),
    ],
)
def test_an_unknown_setting_is_refused_and_the_nearest_is_named(path, words):
    assert missing(f"sweep.space.{path} … {words}", refusal({path: {"uniform": [0, 1]}})) == []


@pytest.mark.parametrize("path", ["algorithm", "algorithm.policy", "network", "schedule"])
def test_a_group_is_refused_and_one_of_its_settings_is_named(path):
    sentence = refusal({path: {"choice": [1]}})
    assert missing(f"sweep.space.{path} … group", sentence) == []
    named = [word.rstrip(".") for word in sentence.split() if word.startswith(f"{path}.")]
    assert named
    settings = flat(to_tree(EXPERIMENT))
    assert all(any(setting == name or setting.startswith(f"{name}.") for setting in settings) for name in named)


@pytest.mark.parametrize(
    ("path", "why"),
    [
        ("resources.threads", "result"),
        ("resources.device", "result"),
        ("name", "result"),
        ("evaluate.seed", "measured"),
        ("evaluate.num_samples", "measured"),
        ("evaluate", "measured"),
    ],
)
def test_what_changes_no_result_or_only_its_measurement_cannot_vary(path, why):
    assert missing(f"sweep.space.{path} … vary … {why}", refusal({path: {"choice": [1, 2]}})) == []


NUMBERS = "[low, high] … finite"


@pytest.mark.parametrize(
    ("kind", "body", "words"),
    [
        ("uniform", [1, 0], "is [1, 0] … low … high"),
        ("log_uniform", [1e-3, 1e-4], "is [0.001, 0.0001] … low … high"),
        ("integer", [8, 3], "is [8, 3] … low … high"),
        ("uniform", [1, 1], "is [1, 1]"),
        ("integer", [3, 3.0], "is [3, 3.0]"),
        ("log_uniform", [0, 1], "is [0, 1] … log … 0"),
        ("log_uniform", [0.0, 1], "is [0.0, 1] … log … 0"),
        ("log_uniform", [-1e-9, 1], "is [-1e-09, 1] … log … 0"),
        ("integer", [0.5, 2], "is [0.5, 2] … whole"),
        ("integer", [1, 2.5], "is [1, 2.5] … whole"),
        ("uniform", [math.nan, 1], NUMBERS),
        ("uniform", [0, math.nan], NUMBERS),
        ("uniform", [0, math.inf], NUMBERS),
        ("log_uniform", [1, math.inf], NUMBERS),
        ("integer", [-math.inf, 1], NUMBERS),
        ("uniform", [0, 10**400], NUMBERS),
        ("integer", [0, 10**400], NUMBERS),
        ("uniform", [True, 2], NUMBERS),
        ("uniform", [None, 2], NUMBERS),
        ("uniform", [[0], 2], NUMBERS),
        ("uniform", [], NUMBERS),
        ("uniform", [1], NUMBERS),
        ("uniform", [0, 1, 2], NUMBERS),
        ("uniform", ["1e-6", "1e-4"], "YAML … 1e-6 … 1.0e-6"),
        ("uniform", "01", "is '01' … list"),
        ("integer", {0: 1}, "is {0: 1} … list"),
        ("log_uniform", None, "is None … list"),
        ("uniform", 3, "is 3 … list"),
    ],
)
def test_a_range_that_is_none_is_refused(kind, body, words):
    sentence = refusal({LR: {kind: body}})
    assert sentence.startswith(f"sweep.space.{LR}.{kind} ")
    assert missing(words, sentence) == []


def test_yaml_takes_a_rate_without_a_dot_for_text_and_the_sentence_says_so():
    assert missing("1e-6 … 1.0e-6", refusal(yaml.safe_load(f"{LR}: {{log_uniform: [1e-6, 1e-4]}}"))) == []


@pytest.mark.parametrize(
    ("body", "words"),
    [
        ([], f"sweep.space.{LR}.choice … empty"),
        ([1, 2, 1], f"sweep.space.{LR}.choice … 1 … twice"),
        ([1, 1.0], f"sweep.space.{LR}.choice … 1.0 … twice"),
        ("abc", f"sweep.space.{LR}.choice is 'abc' … list"),
        (None, f"sweep.space.{LR}.choice is None … list"),
        ({"a": 1}, f"sweep.space.{LR}.choice.a is 1 … group"),
        ({"a": {"b": 1}}, f"sweep.space.{LR} … list"),
        ({1, 2}, f"sweep.space.{LR}.choice is {{1, 2}} … list"),
        (["fast"], f"sweep.space.{LR} … {LR} is 'fast' … number"),
        ([1e-5, None], f"sweep.space.{LR} … {LR} is None … number"),
        ([True], f"sweep.space.{LR} … {LR} is True … number"),
        ([[1e-5]], f"{LR} is [1e-05] … number"),
        ([{"a": 1}], f"sweep.space.{LR} … {LR}.a … a value"),
        ([datetime.date(2020, 1, 1)], f"{LR} … number"),
        ([b"hi"], f"{LR} is b'hi' … number"),
        ([math.nan], f"{LR} is nan … finite"),
        ([-1e-5], f"{LR} is -1e-05 … finite … 0"),
    ],
)
def test_a_choice_that_is_none_is_refused(body, words):
    assert missing(words, refusal({LR: {"choice": body}})) == []


@pytest.mark.parametrize(
    ("path", "spec", "words"),
    [
        (LR, {"uniform": [-1e-5, 1]}, f"-1e-05 … {LR} is -1e-05 … finite … 0"),
        (STEPS, {"integer": [0, 8]}, "0 … schedule.num_steps is 0 … 1..1000"),
        (STEPS, {"integer": [3, 1001]}, "1001 … schedule.num_steps is 1001 … 1..1000"),
        (STEPS, {"uniform": [3, 8]}, "schedule.num_steps is 3.0 … whole"),
        (PRESET, {"choice": ["objective", "objektive"]}, "objektive … algorithm.preset is 'objektive'"),
        (PRESET, {"uniform": [0, 1]}, "algorithm.preset is 0.0 … text"),
        ("algorithm.all_states", {"choice": [True, 1]}, "1 … algorithm.all_states is 1"),
        ("data.label", {"integer": [0, 10]}, "10 … data.label is 10 … 0..9"),
        ("schedule.kappa", {"uniform": [0, 1]}, "schedule.kappa is 0 … noise"),
        (MASK, {"choice": [[1], [1, 0]]}, "[1, 0] … algorithm.policy_mask … 2 entries"),
    ],
)
def test_a_bound_or_a_choice_that_the_experiment_refuses_is_refused(path, spec, words):
    sentence = refusal({path: spec})
    assert sentence.startswith(f"sweep.space.{path} ")
    assert missing(words, sentence) == []


@pytest.mark.parametrize("points", [0, -1, 2.0, 1.5, True, "3", None, [3]])
def test_points_must_be_a_count(points):
    words = f"sweep.space.{LR}.points is {points!r} … whole … 1"
    assert missing(words, refusal({LR: {"uniform": [0, 1], "points": points}})) == []


def test_a_choice_takes_no_points():
    assert missing(f"sweep.space.{LR}.points … choice", refusal({LR: {"choice": [1], "points": 1}})) == []


def test_a_setting_that_is_given_twice_is_refused():
    twice = {LR: {"uniform": [0, 1]}, "algorithm": {"policy": {"lr": {"uniform": [0, 2]}}}}
    assert refusal(twice) == f"sweep.space.{LR} is given twice: keep one."


# ----------------------------------------------------------------------------
# What a line means


PLACES = [0.0, 0.1, 0.25, 0.5, 2 / 3, 0.999, ALMOST_ONE]


@pytest.mark.parametrize("unit", PLACES)
def test_uniform_places_give_the_quantiles_of_the_range(unit):
    # scipy's own quantile functions
    linear, log = axis("algorithm.entropy_coef", "uniform", [0.2, 3.0]), axis(LR, "log_uniform", [1e-6, 1e-2])
    assert linear.at(unit) == pytest.approx(uniform(0.2, 2.8).ppf(unit), rel=1e-12)
    assert log.at(unit) == pytest.approx(loguniform(1e-6, 1e-2).ppf(unit), rel=1e-12)


def test_the_middle_of_a_log_range_is_the_geometric_mean():
    assert axis(LR, "log_uniform", [1e-6, 1e-2]).at(0.5) == pytest.approx(1e-4, rel=1e-12)
    assert Axis("x", "log_uniform", 1e-300, 1e300).at(0.5) == pytest.approx(1.0, rel=1e-12)


@pytest.mark.parametrize(("low", "high"), [(3, 8), (1, 2), (4, 10), (1, 1000)])
def test_every_integer_has_an_equal_part_of_the_unit_interval(low, high):
    integers, each = axis(STEPS, "integer", [low, high]), 20
    places = [(index + 0.5) / (each * (high - low + 1)) for index in range(each * (high - low + 1))]
    assert [integers.at(unit) for unit in places] == [n for n in range(low, high + 1) for _ in range(each)]


def test_every_choice_has_an_equal_part_of_the_unit_interval():
    choices = axis("algorithm.step_cost", "choice", ["none", "linear", "sigmoid"])
    assert [choices.at((index + 0.5) / 9) for index in range(9)] == 3 * ["none"] + 3 * ["linear"] + 3 * ["sigmoid"]


@pytest.mark.parametrize("kind", ["uniform", "log_uniform", "integer"])
def test_no_place_is_outside_a_range_and_0_is_its_low_end(kind):
    for low, high in random_ranges(500, 1e-6, 900.0):
        bounds = [math.floor(low) + 1, math.floor(high) + 2] if kind == "integer" else [low, high]
        this = Axis("x", kind, *bounds)
        assert this.at(0.0) == bounds[0]
        assert type(this.at(0.3)) is (int if kind == "integer" else float)
        for unit in (0.0, 1e-300, 0.5, ALMOST_ONE):
            assert bounds[0] <= this.at(unit) <= bounds[1]
            assert this.contains(this.at(unit))
            assert this.distribution._contains(this.distribution.to_internal_repr(this.at(unit)))


def test_the_last_place_of_a_count_is_its_high_end():
    assert axis(STEPS, "integer", [3, 8]).at(ALMOST_ONE) == 8
    assert axis("algorithm.all_states", "choice", [True, False]).at(ALMOST_ONE) is False


@pytest.mark.parametrize(
    ("spec", "values"),
    [
        ({"log_uniform": [1e-6, 1e-2], "points": 5}, [1e-6, 1e-5, 1e-4, 1e-3, 1e-2]),
        ({"log_uniform": [1e-6, 1e-2], "points": 1}, [1e-4]),
        ({"uniform": [0, 2], "points": 5}, [0.0, 0.5, 1.0, 1.5, 2.0]),
        ({"uniform": [0, 2], "points": 1}, [1.0]),
        ({"integer": [3, 8]}, [3, 4, 5, 6, 7, 8]),
        ({"integer": [0, 10], "points": 3}, [0, 5, 10]),
        ({"integer": [3, 5], "points": 50}, [3, 4, 5]),
        ({"choice": [3.0, 1.0, 2.0]}, [3.0, 1.0, 2.0]),
    ],
)
def test_a_grid_takes_these_values(spec, values):
    assert parse_space({LR: spec}, EXPERIMENT)[0].grid() == pytest.approx(values, rel=1e-12)


@pytest.mark.parametrize("kind", ["uniform", "log_uniform"])
def test_a_grid_ends_exactly_at_the_bounds(kind):
    for low, high in random_ranges(1000, 0.01, 10.0):
        values = Axis("x", kind, low, high, points=3).grid()
        assert (values[0], values[-1]) == (low, high)


@pytest.mark.parametrize("kind", ["uniform", "log_uniform"])
def test_a_grid_of_infinitely_many_values_is_refused_with_the_line_to_write(kind):
    with pytest.raises(UserError) as refused:
        grid_points([axis(LR, kind, [0.5, 1])])
    assert str(refused.value) == (
        f"sweep.space.{LR} has infinitely many values: for a grid, give their number as points, "
        f"like {{{kind}: [0.5, 1], points: 5}}."
    )


@pytest.mark.parametrize(
    "axes",
    [
        [Axis("seed", "integer", 0, 2**62)],
        [Axis("x", "uniform", 0.0, 1.0, points=2**62)],
        [Axis("x", "uniform", 0.0, 1.0, points=1000), Axis("seed", "integer", 0, 999)],
        7 * [Axis("x", "integer", 0, 9)],
    ],
)
def test_a_grid_that_is_too_large_is_refused_before_it_is_listed(axes):
    with pytest.raises(UserError, match=stating("100,000")):
        grid_points(axes)


def test_a_grid_may_have_100_000_points():
    one, two = Axis("x", "integer", 1, 100_000), Axis("y", "integer", 1, 250)
    assert len(grid_points([one])) == 100_000
    assert len(grid_points([two, Axis("z", "uniform", 0.0, 1.0, points=400)])) == 100_000
    for axes in ([Axis("x", "integer", 0, 100_000)], [two, Axis("z", "uniform", 0.0, 1.0, points=401)]):
        with pytest.raises(UserError, match=stating("100,000")):
            grid_points(axes)


def test_a_grid_holds_every_combination_with_the_last_axis_fastest():
    axes = parse_space(
        {STEPS: {"integer": [3, 4]}, PRESET: {"choice": ["objective", "as_released"]}, LR: {"choice": [1, 2, 3]}},
        EXPERIMENT,
    )
    combinations = itertools.product([3, 4], ["objective", "as_released"], [1, 2, 3])
    assert [tuple(point.values()) for point in grid_points(axes)] == list(combinations)
    assert {tuple(point) for point in grid_points(axes)} == {(STEPS, PRESET, LR)}


# ----------------------------------------------------------------------------
# Values


@pytest.mark.parametrize(
    ("this", "inside", "outside"),
    [
        (Axis("x", "uniform", 0.0, 1.0), [0, 0.0, 0.5, 1, 1.0], [-1e-9, 1.1, math.nan, math.inf, True, "0.5", None]),
        (Axis("x", "log_uniform", 0.1, 1.0), [0.1, 1], [0.0, 2, False, [0.5]]),
        (Axis("x", "integer", 0, 3), [0, 3, 2.0], [0.1, 2.5, -1, 4, True, math.nan, math.inf, "1", None]),
        (Axis("x", "choice", choices=(0, None, "a", [1, 0])), [0, 0.0, None, "a", [1, 0]], [False, 1, "b", [0, 1]]),
        (Axis("x", "choice", choices=(True, 2)), [True, 2], [1, 1.0, False]),
    ],
)
def test_a_space_contains_these_values_and_not_those(this, inside, outside):
    assert [value for value in inside if not this.contains(value)] == []
    assert [value for value in outside if this.contains(value)] == []


@pytest.mark.parametrize(
    ("path", "values"),
    [
        ("data.label", [None, 0, 3]),
        ("algorithm.all_states", [True, False]),
        ("algorithm.value_updates", [1, 2]),
        ("algorithm.policy_ema", [None, 0, 0.5]),
        (PRESET, ["objective", "as_released"]),
        (MASK, [[1], [1, 1, 1, 0, 0], [0.5]]),
        ("algorithm.value_mask", [None, [1.0], [1, 0, 0, 0, 0]]),
    ],
)
def test_a_choice_survives_the_way_through_optuna_and_its_journal(path, values):
    this = axis(path, "choice", values)
    stored = json_to_distribution(distribution_to_json(this.distribution))
    for value in values:
        assert this.param(value) is None or isinstance(this.param(value), (str, int, float, bool))
        param = stored.to_external_repr(stored.to_internal_repr(json.loads(json.dumps(this.param(value)))))
        assert repr(this.value(param)) == repr(value)  # repr: True is not 1


@pytest.mark.parametrize("kind", ["uniform", "log_uniform", "integer"])
def test_a_range_survives_the_way_through_optuna_and_its_journal(kind):
    this = Axis("x", kind, *((1, 9) if kind == "integer" else (0.1, 9.0)))
    stored = json_to_distribution(distribution_to_json(this.distribution))
    assert stored == this.distribution
    for unit in PLACES:
        value = this.at(unit)
        assert repr(this.value(stored.to_external_repr(stored.to_internal_repr(this.param(value))))) == repr(value)


def test_true_is_not_1_on_the_way_back():
    this = Axis("x", "choice", choices=(1, True, 0, False))
    assert [repr(this.value(param)) for param in (True, 1, False, 0)] == ["True", "1", "False", "0"]


@pytest.mark.parametrize(
    ("path", "value", "stored"),
    [
        (LR, 3e-5, 3e-5),
        (STEPS, 7, 7),
        (PRESET, "objective", "objective"),
        ("data.label", None, None),
        (MASK, [0.5], (0.5,)),
    ],
)
def test_a_configured_experiment_differs_in_that_value_alone(path, value, stored):
    changed = configured(EXPERIMENT, {path: value})
    assert flat(to_tree(changed))[path] == value
    lines = differences(to_tree(EXPERIMENT), to_tree(changed))
    assert [line.partition(":")[0] for line in lines] == ([path] if value_at(EXPERIMENT, path) != value else [])
    *groups, last = path.split(".")
    owner = changed
    for group in groups:
        owner = getattr(owner, group)
    assert getattr(owner, last) == stored
    assert ExperimentConfig() == EXPERIMENT


def test_values_that_are_only_refused_together_are_refused_when_configured():
    values = {STEPS: 3, MASK: [1, 0, 0, 0, 0]}
    assert configured(EXPERIMENT, {MASK: values[MASK]})
    with pytest.raises(UserError, match=stating("algorithm.policy_mask … 5 entries")):
        configured(EXPERIMENT, values)


def test_settings_by_their_dotted_paths_are_all_there_are():
    settings = flat(to_tree(EXPERIMENT))
    assert settings["algorithm.policy.lr"] == EXPERIMENT.algorithm.policy.lr
    assert not any(isinstance(value, dict) for value in settings.values())
    tree: dict = {}
    for path, value in settings.items():
        *groups, last = path.split(".")
        group = tree
        for name in groups:
            group = group.setdefault(name, {})
        group[last] = value
    assert build(ExperimentConfig, tree) == EXPERIMENT


@pytest.mark.parametrize(
    ("value", "text"),
    [
        *((1.23456e-5, "1.23e-05"), (0.5, "0.5"), (0.9995, "0.9995"), (0.996543, "0.99654"), (0.987654, "0.988")),
        *((3, "3"), (True, "true"), (None, "null"), ("a b", "a b"), ([1], "[1]")),
    ],
)
def test_a_value_is_shown_short(value, text):
    assert show(value) == text


@pytest.mark.parametrize(
    ("this", "text"),
    [
        (Axis("x", "log_uniform", 1e-6, 1e-4), "log-uniform in [1e-06, 0.0001]"),
        (Axis("x", "integer", 3, 8), "integer in [3, 8]"),
        (Axis("x", "choice", choices=("a", None, [1])), "one of a, null, [1]"),
    ],
)
def test_an_axis_is_shown_in_words(this, text):
    assert str(this) == text
