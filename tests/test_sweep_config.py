"""What a sweep is: every shipped file builds, every override lands, and whatever is wrong is a sentence."""

import functools
import json
from collections.abc import Iterator
from typing import Any

import pytest
import yaml

from dxmi.config import build, to_tree
from dxmi.errors import UserError
from dxmi.training.config import SCHEMA
from support import missing
from tune.config.compose import ComposedSweep, compose_experiment, compose_sweep
from tune.config.files import config_folder, sweeps
from tune.config.sweep import BudgetConfig, ObjectiveConfig, SamplerConfig, StoppingConfig, SweepConfig, TrackingConfig
from tune.plans.sweep import Plan, plan_from
from tune.search.space import flat

SPACE = "space: {algorithm.policy.lr: {log_uniform: [1.0e-6, 1.0e-4]}}\n"


@pytest.fixture(autouse=True, scope="module")
def _each_experiment_is_composed_once() -> Iterator[None]:
    """Its composing is a pure function that takes half a second, and is tested elsewhere."""
    once = functools.cache(compose_experiment)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("tune.config.compose.compose_experiment", lambda overrides: once(tuple(overrides)))
        yield


def plan_of(composed: ComposedSweep) -> Plan:
    return plan_from(
        {
            "schema": SCHEMA,
            "name": "study" if composed.name is None else composed.name,
            "experiment": to_tree(composed.experiment),
            "sweep": composed.sweep,
            "tracking": composed.tracking,
        }
    )


def planned(*overrides: str) -> Plan:
    return plan_of(compose_sweep(overrides))


def refusal(*overrides: str) -> str:
    """The sentence by which a sweep is refused, on the way to its plan."""
    with pytest.raises(UserError) as refused:
        planned(*overrides)
    assert "\n" not in str(refused.value)
    assert len(str(refused.value)) < 500
    return str(refused.value)


@pytest.fixture
def file(tmp_path):
    """`file(text)`: the override that names a sweep file of the user's own."""

    def written(text: str) -> str:
        path = tmp_path / "mine.yaml"
        path.write_text(text)
        return f"sweep={path}"

    return written


# ----------------------------------------------------------------------------
# Shipped sweeps


def test_sweeps_are_shipped():
    assert {"demo", "learning_rates", "coefficients"} <= set(sweeps())


NEEDED = {
    "planar": ["experiment=gaussians8"],
    "ppo": ["experiment=digits_reward"],
    "trpo": ["experiment=digits_reward", "algorithm=trpo"],
}
"""What the sweeps need that are not for the default experiment."""


@pytest.mark.parametrize("name", sweeps())
def test_every_shipped_sweep_builds_a_plan_of_what_its_file_says(name):
    written = yaml.safe_load((config_folder() / "sweep" / f"{name}.yaml").read_text())
    plan = planned(f"sweep={name}", *NEEDED.get(name, []))
    assert [axis.path for axis in plan.axes] == list(written["space"])
    assert plan.num_trials == written["budget"]["trials"]
    assert plan.sweep == build(SweepConfig, {key: value for key, value in written.items() if key != "space"})
    assert plan_from(yaml.safe_load(yaml.safe_dump(plan.tree()))) == plan


def test_a_sweep_file_may_be_the_users_own(file):
    composed = compose_sweep([file(SPACE)])
    assert composed.source == "mine"
    assert plan_of(composed).sweep == SweepConfig()
    assert plan_of(composed).experiment == compose_sweep(["sweep=demo"]).experiment


# ----------------------------------------------------------------------------
# Overrides


@pytest.mark.parametrize(
    ("override", "keys", "value"),
    [
        ("sweep.budget.trials=7", ("budget", "trials"), 7),
        ("sweep.budget.wall_minutes=2.5", ("budget", "wall_minutes"), 2.5),
        ("sweep.budget.wall_minutes=null", ("budget", "wall_minutes"), None),
        ("sweep.sampler.kind=sobol", ("sampler", "kind"), "sobol"),
        ("sweep.sampler.start_with_defaults=false", ("sampler", "start_with_defaults"), False),
        ("sweep.sampler={kind:random,seed:3}", ("sampler", "seed"), 3),
        ("sweep.stopping.rule=none", ("stopping", "rule"), "none"),
        ("sweep.max_concurrent=1", ("max_concurrent",), 1),
        ("sweep.max_failures=0", ("max_failures",), 0),
        ("++sweep.max_failures=0", ("max_failures",), 0),
        ("+sweep.budget.failed_trials=3", ("budget", "failed_trials"), 3),
        ("~sweep.budget.trials", ("budget", "trials"), BudgetConfig().trials),
        (
            "sweep.objectives=[{metric:score,direction:maximize}]",
            ("objectives",),
            [{"metric": "score", "direction": "maximize"}],
        ),
    ],
)
def test_an_override_in_hydras_grammar_lands_where_it_should(override, keys, value):
    others = [] if "stopping" in override else ["sweep.stopping.rule=none"]
    found: Any = to_tree(planned("sweep=demo", override, *others).sweep)
    for key in keys:
        found = found[key]
    assert found == value


def test_overrides_of_the_experiment_of_tracking_and_the_name_land_too():
    plan = planned("sweep=demo", "experiment=mnist8", "train.iterations=7", "tracking.uri=none", "name=lr-1")
    assert (plan.name, plan.tracking.uri) == ("lr-1", "none")
    assert (plan.experiment.data.kind, plan.experiment.train.iterations) == ("mnist8", 7)


def test_a_setting_can_be_added_to_the_space():
    plan = planned("sweep=demo", "+sweep.space.algorithm.energy_l2={uniform:[0,1]}")
    assert [axis.path for axis in plan.axes] == ["algorithm.policy.lr", "algorithm.entropy_coef", "algorithm.energy_l2"]


@pytest.mark.parametrize(
    ("override", "bounds"),
    [
        ("sweep.space.algorithm.policy.lr.log_uniform=[1e-6,2e-6]", (1e-6, 2e-6)),
        ("sweep.space.algorithm.policy.lr={log_uniform:[1e-6,2e-6]}", (1e-6, 2e-6)),
        ("~sweep.space.algorithm.policy.lr", None),
    ],
)
def test_a_range_of_a_shipped_space_can_be_overridden_or_dropped(override, bounds):
    axes = {axis.path: axis for axis in planned("sweep=demo", override).axes}
    assert list(axes) == ["algorithm.policy.lr", "algorithm.entropy_coef"][(0 if bounds else 1) :]
    if bounds:
        assert (axes["algorithm.policy.lr"].low, axes["algorithm.policy.lr"].high) == bounds


@pytest.mark.parametrize(
    ("override", "words"),
    [
        ("sweep.budget.trails=3", "sweep.budget.trails … trials"),
        ("sweep.samplr.seed=3", "sweep.samplr.seed … sweep.sampler.seed"),
        ("sweep.sampler.knd=tpe", "sweep.sampler.knd … kind"),
        ("+sweep.smapler=3", "sweep.smapler … sampler"),
        ("tracking.url=x", "tracking.url … uri"),
        ("trackin.uri=none", "trackin.uri"),
        ("algorithm.entropy_coeff=1", "algorithm.entropy_coeff … entropy_coef"),
        ("experiment=digts", "digits"),
        ("sweep.budget.trials.x=1", "sweep.budget.trials.x"),
        ("sweep.objectives.0.metric=score", "sweep.objectives.0.metric"),
        ("sweep.budget.trials=0", "sweep.budget.trials is 0 … 1"),
        ("sweep.budget.trials=many", "sweep.budget.trials is 'many'"),
        ("sweep.budget.trials=1.5", "sweep.budget.trials is 1.5"),
        ("sweep.budget.trials=true", "sweep.budget.trials is True"),
        ("sweep.budget=3", "sweep.budget is 3"),
        ("sweep.budget.wall_minutes=0", "sweep.budget.wall_minutes is 0.0 … 0"),
        ("sweep.budget.device_hours=-1", "sweep.budget.device_hours is -1.0 … 0"),
        ("sweep.budget.trial_minutes=nan", "sweep.budget.trial_minutes is nan … 0"),
        ("sweep.budget.disk_gb=inf", "sweep.budget.disk_gb is inf … 0"),
        ("sweep.budget.failed_trials=0", "sweep.budget.failed_trials is 0 … 1"),
        (
            "sweep.sampler.kind=magic",
            "sweep.sampler.kind is 'magic' … tpe … sobol … random … grid … nsga2",
        ),
        ("sweep.sampler.seed=-1", "sweep.sampler.seed is -1 … 0..2^32 - 1"),
        ("sweep.sampler.seed=4294967296", "sweep.sampler.seed is 4294967296 … 0..2^32 - 1"),
        ("sweep.sampler.startup_trials=0", "sweep.sampler.startup_trials is 0 … 1"),
        ("sweep.stopping.rule=asha2", "sweep.stopping.rule is 'asha2' … none … asha … median"),
        ("sweep.stopping.factor=1", "sweep.stopping.factor is 1 … 2"),
        ("sweep.stopping.first_step=0", "sweep.stopping.first_step is 0 … 1"),
        ("sweep.stopping.min_trials=0", "sweep.stopping.min_trials is 0 … 1"),
        ("sweep.max_failures=-1", "sweep.max_failures is -1 … 0"),
        ("sweep.max_concurrent=0", "sweep.max_concurrent is 0 … 1"),
        ("sweep.objectives=[]", "sweep.objectives is []"),
        ("sweep.objectives=[{metrc:score}]", "sweep.objectives[0].metrc … metric"),
        ("sweep.objectives=[{direction:up}]", "sweep.objectives[0].direction is 'up' … minimize … maximize"),
        ("sweep.objectives=[{metric:loss}]", "sweep.objectives[0].metric is 'loss'"),
        ("~sweep.space", "sweep.space … empty"),
        ("+sweep.space.algorithm.cost_coef={uniform:[1,0]}", "sweep.space.algorithm.cost_coef.uniform is [1, 0]"),
        ("+sweep.space.algorithm.cost_coeff={uniform:[0,1]}", "sweep.space.algorithm.cost_coeff … algorithm.cost_coef"),
        ("sweep.sampler.seed=1,2", "sweep.sampler.seed=1,2 … several"),
        ("sweep.budget.trials=[", "sweep.budget.trials=["),
        ("sweep.budget.trials", "sweep.budget.trials"),
        ("out=x", "name="),
        ("name=../x", "name is '../x' … 1 … 100"),
        ("name=", "name is ''"),
        ("name=" + 300 * "x", "name is 'xxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxxx...' … 1 … 100"),
        ("tracking.experiment=' '", "tracking.experiment is ' '"),
        ("tracking.experiment='a\tb'", "tracking.experiment is 'a\\tb'"),
        ("tracking.patience_seconds=-1", "tracking.patience_seconds is -1.0 … 0"),
        ("tracking.patience_seconds=nan", "tracking.patience_seconds is nan … 0"),
    ],
)
def test_a_bad_override_is_refused_in_a_sentence(override, words):
    assert missing(words, refusal("sweep=demo", override)) == []


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["sweep.sampler.seed=1", "sweep.sampler.seed=2"], "sweep.sampler.seed … twice"),
        (["name=a", "name=b"], "name … twice"),
        (["sweep=demo"], "sweep … twice"),
        (["seed=1", "seed=2"], "seed … twice"),
        (["tracking.uri=none", "tracking.uri=local"], "tracking.uri … twice"),
    ],
)
def test_an_override_given_twice_is_refused(overrides, words):
    assert missing(words, refusal("sweep=demo", *overrides)) == []


@pytest.mark.parametrize("override", ["+name=x", "name", "name.x=y", "~name", "++name=x"])
def test_an_odd_override_of_the_name_is_refused_and_not_ignored(override):
    assert "name" in refusal("sweep=demo", override)


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        ([], "coefficients … demo … sweep=NAME"),
        (["sweep"], "coefficients … demo … sweep=NAME … sweep=FILE.yaml"),
        (["sweep=dmo"], "demo … 'dmo' … .yaml"),
        (["sweep="], "''"),
        (["sweep=../sweep/demo"], "'../sweep/demo'"),
        (["sweep=nowhere.yaml"], "nowhere.yaml"),
        (["sweep=~nobody-here/x.yaml"], "sweep is ~nobody-here/x.yaml"),
    ],
)
def test_a_sweep_that_is_none_is_refused(overrides, words):
    assert missing(words, refusal(*overrides)) == []


# ----------------------------------------------------------------------------
# Files


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "it holds no settings, which are lines of key: value."),
        ("- a\n", "it holds no settings, which are lines of key: value."),
        ("just text\n", "it holds no settings, which are lines of key: value."),
        ("a: [\n", "YAML"),
        ("\x00", "YAML"),
        ("space: !!python/object/apply:os.system [echo hi]\n", "YAML"),
        ("space: !!python/name:os.system ''\n", "YAML"),
        (SPACE + "x: !include other.yaml\n", "YAML"),
        (SPACE + "_target_: os.system\n", "_target_"),
        ("space: {algorithm.policy.lr: {choice: [{_target_: os.system, command: echo}]}}\n", "_target_"),
        ("a: &a [x, x]\nb: &b [*a, *a]\nc: &c [*b, *b]\n", "YAML … aliases"),
        ("space: &s {seed: {choice: [1]}}\nbudget: *s\n", "YAML … aliases"),
        (SPACE + "# " + 1_000_001 * "x", "bytes … 1000000"),
        (900 * "[", "YAML"),
        (900 * "{", "YAML"),
        ("space: 3\n", "sweep.space is 3 … {log_uniform"),
        ("budget: {trials: 3}\n", "sweep.space … empty"),
        (SPACE + "smapler: {}\n", "sweep.smapler … sampler"),
        (SPACE + "1: 3\n", "sweep.1"),
        (SPACE + "name: x\n", "sweep.name"),
        (SPACE + "tracking: {uri: none}\n", "sweep.tracking"),
        (SPACE + "budget: 3\n", "sweep.budget is 3"),
        (SPACE + "sampler:\n", "sweep.sampler is None"),
        (SPACE + "sampler: {sead: 1}\n", "sweep.sampler.sead … seed"),
        (SPACE + "objectives: {metric: score}\n", "sweep.objectives is {'metric': 'score'}"),
        (SPACE + "budget: {wall_minutes: .nan}\n", "sweep.budget.wall_minutes is nan … 0"),
        (
            "space: {algorithm.policy.lr: {log_uniform: [1e-6, 1e-4]}}\n",
            "sweep.space.algorithm.policy.lr.log_uniform is ['1e-6', '1e-4'] … YAML … 1e-6 … 1.0e-6",
        ),
        ("space: {algorithm.preset: {choice: ['${missing}']}}\n", "write the value out"),
    ],
)
def test_a_file_that_is_no_sweep_is_refused_in_a_sentence(file, text, words):
    assert missing(words, refusal(file(text))) == []


@pytest.mark.parametrize(
    "text",
    [
        SPACE + "null: 3\n",
        "space: {null: {uniform: [0, 1]}}\n",
        "space: {algorithm.preset: {choice: ['${']}}\n",
        "space: {algorithm.policy.lr: {choice: [2020-01-01]}}\n",
        "space: {algorithm.policy.lr: {choice: !!set {a, b}}}\n",
        "space: {algorithm.policy.lr: {choice: [!!binary aGk=]}}\n",
        "space: " + 90 * "{a: " + "1" + 90 * "}" + "\n",
        "space: " + 300 * "{a: " + "1" + 300 * "}" + "\n",
    ],
)
def test_a_file_with_values_that_hydra_cannot_hold_is_refused_in_a_sentence(file, text):
    refusal(file(text))


def test_a_file_that_is_no_text_is_refused(tmp_path):
    path = tmp_path / "x.yaml"
    path.write_bytes(b"\xff\xfe\x00")
    assert missing(f"{path} … UTF-8", refusal(f"sweep={path}")) == []
    assert missing("folder.yaml … read", refusal(f"sweep={tmp_path / 'folder.yaml'}")) == []
    (tmp_path / "folder.yaml").mkdir()
    assert missing("folder.yaml … read", refusal(f"sweep={tmp_path / 'folder.yaml'}")) == []


# ----------------------------------------------------------------------------
# Objectives and samplers


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"objectives": ["score", "num_steps", "seconds"]}, "sweep.objectives … 3"),
        ({"objectives": ["score", "score"]}, "sweep.objectives … twice"),
        ({"objectives": ["score", "num_steps"]}, "sweep.sampler.kind is 'tpe' … nsga2"),
        ({"objectives": ["score"], "sampler": {"kind": "nsga2"}}, "sweep.sampler.kind is 'nsga2' … nsga2"),
        (
            {"objectives": ["score", "seconds"], "sampler": {"kind": "nsga2"}, "stopping": {"rule": "median"}},
            "sweep.stopping.rule is 'median'",
        ),
        ({"sampler": {"kind": "nsga2", "startup_trials": 1}}, "sweep.sampler.startup_trials is 1 … 2"),
    ],
)
def test_objectives_and_a_sampler_that_do_not_go_together_are_refused(config, words):
    objectives = [{"metric": metric} for metric in config.get("objectives", ["score"])]
    with pytest.raises(UserError) as refused:
        build(SweepConfig, {**config, "objectives": objectives}, "sweep")
    assert missing(words, str(refused.value)) == []


@pytest.mark.parametrize(
    ("number", "kind"),
    [(1, "tpe"), (2, "nsga2"), *((n, kind) for n in (1, 2) for kind in ("sobol", "random", "grid"))],
)
def test_objectives_and_a_sampler_that_go_together_are_taken(number, kind):
    two = (ObjectiveConfig(), ObjectiveConfig(metric="num_steps"))
    SweepConfig(objectives=two[:number], sampler=SamplerConfig(kind=kind))


def test_the_sign_of_an_objective_makes_lower_better():
    assert (ObjectiveConfig().sign, ObjectiveConfig(direction="maximize").sign) == (1.0, -1.0)


# ----------------------------------------------------------------------------
# Tracking


@pytest.mark.parametrize(
    "uri", ["local", "none", "http://host", "http://127.0.0.1:5000", "https://a.b/c", "http://[::1]:80"]
)
def test_a_place_to_track_is_taken(uri):
    assert TrackingConfig(uri=uri).uri == uri


@pytest.mark.parametrize(
    "uri",
    ["", "Local", "mlflow", "http://", "http:host", "file:///tmp/x", "sqlite:///x.db", "ftp://host", "databricks",
     "http://[bad", "http://host:port", "http://host:99999", "//host", "/tmp/x"],
)  # fmt: skip
def test_a_place_to_track_that_is_none_is_refused(uri):
    with pytest.raises(UserError) as refused:
        build(TrackingConfig, {"uri": uri}, "tracking")
    assert missing(f"tracking.uri is {uri!r} … local … none … http://host:port", str(refused.value)) == []


@pytest.mark.parametrize(
    "uri",
    [
        "http://user:hunter2@host",
        "https://hunter2@host:5000",
        "http://:hunter2@host",
        "ftp://user:hunter2@host",
        "https://user:hunter2@",
        "user:hunter2@host",
        "//user:hunter2@host",
        "http://user:hunter2@[bad",
        "http://user:hunter2@host:port",
        "http://user:hunter2%40host",
        "https://host/?token=hunter2",
        "https://host#hunter2",
    ],
)
def test_credentials_in_an_address_are_refused_and_not_repeated(uri):
    for attempt in (
        lambda: build(TrackingConfig, {"uri": uri}, "tracking"),
        lambda: planned("sweep=demo", quoted(uri)),
    ):
        with pytest.raises(UserError) as refused:
            attempt()
        assert missing("MLFLOW_TRACKING_USERNAME … MLFLOW_TRACKING_PASSWORD", str(refused.value)) == []
        assert "hunter2" not in str(refused.value)


def quoted(uri: str) -> str:
    return f"tracking.uri='{uri}'"


# ----------------------------------------------------------------------------
# The signature

CHANGED = {
    "objectives": [{"metric": "seconds", "direction": "minimize"}],
    "sampler.kind": "sobol",
    "sampler.seed": 1,
    "sampler.startup_trials": 11,
    "sampler.start_with_defaults": False,
    "stopping.rule": "asha",
    "stopping.first_step": 101,
    "stopping.factor": 4,
    "stopping.min_trials": 4,
    "stopping.spare_first": True,
    "budget.trials": 21,
    "budget.wall_minutes": 1.0,
    "budget.device_hours": 1.0,
    "budget.failed_trials": 1,
    "budget.trial_minutes": 1.0,
    "budget.disk_gb": 1.0,
    "max_failures": 1,
    "max_concurrent": 1,
    "seeds": 3,
}
"""Another value of every field of a sweep."""


def changed(tree: dict[str, Any], path: str, value: Any) -> Plan:
    tree = json.loads(json.dumps(tree))
    *groups, last = path.split(".")
    group = tree
    for name in groups:
        group = group[name]
    group[last] = value
    return plan_from(tree)


def test_every_field_of_a_sweep_but_its_budget_and_its_crowd_enters_the_signature(file):
    plan = planned(file(SPACE))
    assert set(CHANGED) == set(flat(to_tree(plan.sweep)))
    same = {
        path
        for path, value in CHANGED.items()
        if changed(plan.tree(), f"sweep.{path}", value).signature == plan.signature
    }
    free = {path for path in CHANGED if path.startswith("budget.")}
    assert same == {*free, "max_failures", "max_concurrent"}


@pytest.mark.parametrize(
    ("path", "value", "is_free"),
    [
        ("name", "another", True),
        ("tracking.uri", "none", True),
        ("tracking.experiment", "other", True),
        ("experiment.resources.threads", 2, True),
        ("experiment.resources.device", "cpu", True),
        ("experiment.seed", 1, False),
        ("experiment.algorithm.entropy_coef", 0.2, False),
        ("experiment.evaluate.num_samples", 64, False),
        ("experiment.train.iterations", 7, False),
        ("sweep.space", {"algorithm.policy.lr": {"log_uniform": [1e-6, 2e-4]}}, False),
        ("sweep.space", {"algorithm.policy.lr": {"uniform": [1e-6, 1e-4]}}, False),
        ("sweep.space", {"algorithm.critic.lr": {"log_uniform": [1e-6, 1e-4]}}, False),
    ],
)
def test_what_decides_a_studys_trials_enters_the_signature_and_nothing_else_does(file, path, value, is_free):
    plan = planned(file(SPACE))
    assert (changed(plan.tree(), path, value).signature == plan.signature) is is_free


def test_the_parts_of_a_sweep_have_sensible_defaults():
    assert SweepConfig() == SweepConfig(
        objectives=(ObjectiveConfig(),), sampler=SamplerConfig(), stopping=StoppingConfig(), budget=BudgetConfig()
    )
    assert build(SweepConfig, {}) == SweepConfig()
    assert build(SweepConfig, to_tree(SweepConfig())) == SweepConfig()
