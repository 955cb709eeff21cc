"""Choosing another kind brings its whole block: on the command line, in sweeps and in ablations."""

import pytest

from dxmi.config import build, completed, delta, settings_between, to_tree, value_of, with_settings
from dxmi.errors import UserError
from dxmi.networks.configs import IgebmConfig, MlpConfig, UnetConfig, WideResNetConfig
from dxmi.training.config import ExperimentConfig
from support import stating
from tune.config.ablation import parse_ablation
from tune.config.compose import compose_ablation, compose_experiment, compose_sweep
from tune.config.sweep import SweepConfig
from tune.plans.arms import arms
from tune.plans.sweep import Plan


def experiment(*overrides: str) -> ExperimentConfig:
    return compose_experiment(overrides).experiment


def test_a_kind_on_the_command_line_replaces_the_block_by_its_defaults():
    assert experiment("network.denoiser.kind=unet").network.denoiser == UnetConfig()
    small = experiment("network.denoiser.kind=unet", "network.denoiser.channels=32", "network.energy.kind=igebm")
    assert small.network.denoiser == UnetConfig(channels=32)
    assert small.network.energy == IgebmConfig()
    assert small.network.value == experiment().network.value


def test_a_group_of_settings_on_the_command_line_may_name_another_kind():
    given = "network.denoiser={kind: unet, channels: 64}"
    assert experiment(given).network.denoiser == UnetConfig(channels=64)


def test_the_kind_that_is_there_already_changes_nothing():
    assert experiment("network.energy.kind=mlp") == experiment()
    assert experiment("experiment=lsun_t4", "schedule.kind=karras") == experiment("experiment=lsun_t4")


def test_what_all_kinds_share_keeps_its_value():
    """T and the number of classes belong to the run, not to the kind."""
    schedule = experiment("experiment=fashion_mnist", "schedule.kind=karras").schedule
    assert (schedule.kind, schedule.num_steps, schedule.final_sigma) == ("karras", 10, 1e-3)
    energy = experiment("experiment=imagenet64_t10", "network.energy.kind=wide_resnet").network.energy
    assert energy == WideResNetConfig(classes=1000)


def test_a_groups_option_of_another_kind_drops_what_the_experiment_says_of_its_own():
    """Rather than being refused for a setting that it does not know."""
    config = experiment("experiment=cifar10_small", "network=mlp")
    assert config.network.denoiser == MlpConfig()
    config = experiment("experiment=lsun_t4", "schedule=step_linear")
    assert to_tree(config)["schedule"] == {
        "kind": "step",
        "num_steps": 4,
        "kappa": 1.0,
        "final_sigma": 0.002,
        "shape": "linear",
    }


def test_a_groups_option_of_the_same_kind_comes_below_the_experiment():
    assert experiment("experiment=lsun_t4", "schedule=karras") == experiment("experiment=lsun_t4")
    assert experiment("experiment=mnist8", "network=mlp").network.value.hidden == 256


@pytest.mark.parametrize(
    ("overrides", "words"),
    [
        (["network.denoiser.kind=unett"], "network.denoiser.kind is 'unett' … unet"),
        (["network.energy.kind=unet"], "network.energy.kind is 'unet' … mlp … igebm … wide_resnet"),
        (["network.denoiser.kind=unet", "network.denoiser.hidden=8"], "network.denoiser.hidden … unet"),
        (["network.denoiser.channels=8"], "network.denoiser.channels … mlp"),
        (["network.denoiser.kind=null"], "network.denoiser.kind is None"),
        (["data.kind=image_folder"], "data.folder is missing"),
    ],
)
def test_what_is_wrong_with_a_kind_is_a_sentence(overrides, words):
    with pytest.raises(UserError, match=stating(words)):
        experiment(*overrides)


# ----------------------------------------------------------------------------
# Sweeps


@pytest.fixture
def plan(tmp_path):
    """The plan of a sweep over a space, written as in its file."""

    def made(space: str) -> Plan:
        file = tmp_path / "own.yaml"
        file.write_text(f"space: {space}\n")
        composed = compose_sweep([f"sweep={file}", "experiment=fashion_mnist"])
        sweep = {key: value for key, value in composed.sweep.items() if key != "space"}
        return Plan("study", composed.experiment, build(SweepConfig, sweep), composed.sweep["space"])

    return made


def test_a_sweep_over_a_kind_gives_each_trial_the_whole_block(plan):
    made = plan("{schedule.kind: {choice: [var, karras]}, schedule.final_sigma: {uniform: [0.001, 0.1]}}")
    schedule = made.config_of({"schedule.kind": "karras", "schedule.final_sigma": 0.05}).schedule
    assert to_tree(schedule) == {
        **to_tree(schedule),
        "kind": "karras",
        "rho": 7.0,
        "num_steps": 10,
        "final_sigma": 0.05,
    }
    with pytest.raises(UserError, match=stating("schedule.kind is 'kras' … karras")):
        _ = plan("{schedule.kind: {choice: [var, kras]}}").axes


def test_a_sweep_over_the_options_of_a_group_names_them_and_holds_their_content(plan):
    made = plan("{schedule: {choice: [var_linear, karras]}}")
    assert made.axes[0].choices == ("var_linear", "karras")
    assert made.axes[0].groups == {"var_linear": {"shape": "linear"}, "karras": {"kind": "karras"}}
    assert (
        made.config_of({"schedule": "karras"}).schedule
        == experiment("experiment=fashion_mnist", "schedule=karras").schedule
    )
    linear = made.config_of({"schedule": "var_linear"})
    assert linear == experiment("experiment=fashion_mnist", "schedule=var_linear")
    with pytest.raises(UserError, match=stating("schedule 'karas' … karras")):
        plan("{schedule: {choice: [var_linear, karas]}}")


def test_a_sweep_may_choose_between_groups_of_settings_by_name(plan):
    made = plan("{schedule: {choice: {few: {num_steps: 3}, own: {}}}}")
    assert [made.config_of({"schedule": name}).schedule.num_steps for name in ("few", "own")] == [3, 10]
    assert made.axes[0].own(made.experiment) == "own"
    with pytest.raises(UserError, match=stating("sweep.space.schedule … schedule.numsteps … num_steps")):
        _ = plan("{schedule: {choice: {few: {numsteps: 3}}}}").axes


# ----------------------------------------------------------------------------
# Ablations


def arm_configs(text: str, tmp_path, *overrides: str) -> dict[str, ExperimentConfig]:
    file = tmp_path / "own.yaml"
    file.write_text(f"hypothesis: something\ndesign: one_factor\nvariants: {text}\nseeds: 6\n")
    composed = compose_ablation([f"ablation={file}", "experiment=digits", *overrides])
    return {
        arm.name: arm.config(composed.experiment)
        for arm in arms(parse_ablation(composed.ablation), composed.experiment)
    }


def test_a_variant_of_another_kind_has_its_whole_block(tmp_path):
    found = arm_configs("{edm: {schedule.kind: karras, schedule.rho: 4}}", tmp_path, "schedule.num_steps=3")
    assert (found["edm"].schedule.rho, found["edm"].schedule.num_steps) == (4.0, 3)


def test_a_variant_that_names_a_groups_option_is_the_run_with_that_option(tmp_path):
    text = "{edm: {schedule: karras}, linear: {schedule: step_linear}, objective: {algorithm: objective}}"
    given = ["schedule.shape=linear", "algorithm.entropy_coef=0.3", "schedule.num_steps=3"]
    found = arm_configs(text, tmp_path, *given)
    kept = ["algorithm.entropy_coef=0.3", "schedule.num_steps=3"]
    assert found["edm"] == experiment("experiment=digits", "schedule=karras", *kept)
    assert found["linear"] == experiment("experiment=digits", "schedule=step_linear", *kept)
    assert found["objective"] == experiment("experiment=digits", "algorithm=objective", *given)


def test_a_variant_that_names_the_baselines_own_option_is_refused(tmp_path):
    with pytest.raises(UserError, match=stating("ablation.variants.same … baseline")):
        arm_configs("{same: {schedule: var_quadratic}}", tmp_path)


# ----------------------------------------------------------------------------
# Trees


@pytest.mark.parametrize("name", ["digits", "fashion_mnist", "gaussians8", "imagenet64_t4", "cifar10_t4"])
def test_a_delta_makes_the_config_again_and_names_nothing_that_has_its_default(name):
    config = experiment(f"experiment={name}")
    changes = delta(config)
    assert build(ExperimentConfig, changes) == config
    assert completed(ExperimentConfig, changes) == to_tree(config)
    assert delta(ExperimentConfig()) == {}


def test_the_settings_between_two_configs_make_one_of_the_other():
    names = ("digits", "gaussians8", "imagenet64_t4", "cifar10_t4")
    trees = {name: to_tree(experiment(f"experiment={name}")) for name in names}
    for old in trees.values():
        for new in trees.values():
            settings = settings_between(ExperimentConfig, old, new)
            assert with_settings(ExperimentConfig, old, settings) == new
            assert bool(settings) == (old != new)
            assert all(value_of(new, path) == value for path, value in settings.items())
