"""Every YAML composes, builds and takes a step; whatever is wrong with a config is a sentence."""

import json
import shlex
import shutil
from pathlib import Path
from shutil import copytree

import pytest
import torch
import yaml

from dxmi.algorithms.registry import ALGORITHMS
from dxmi.compat import declare_torchvision_operators
from dxmi.config import build, delta, differences, leaves_of, places, to_tree
from dxmi.data.images import Images
from dxmi.errors import UserError
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from support import LARGE, NARROW, missing, stating, step
from tune.config import files
from tune.config.compose import compose_ablation, compose_experiment, compose_sweep, overridden
from tune.config.files import config_folder, groups
from tune.config.sweep import TrackingConfig
from tune.execution.jobs import entrypoint

EXPERIMENTS = groups()["experiment"]
EVENTS = {
    **dict.fromkeys(("mnist", "fashion_mnist"), (1, 28, 28)),
    "cifar10": (3, 32, 32),
    "image_folder": (3, 64, 64),
}
"""Shapes of images that are not 8x8."""
OPTIONS = [(group, name) for group, names in groups().items() for name in names]


def with_fake_images(config: ExperimentConfig) -> Experiment:
    """The experiment on random pixels of the right shape, as files of real data need not be there; points are drawn."""
    experiment = Experiment(config)
    if config.data.is_planar:
        return experiment
    event = EVENTS.get(config.data.kind, (1, 8, 8))
    pixels = torch.randint(0, 256, (64, *event), dtype=torch.uint8, generator=torch.Generator().manual_seed(0))
    experiment.__dict__["data"] = Images(
        config.data.kind, pixels, torch.zeros(64, dtype=torch.int64), "random", num_classes=10
    )
    return experiment


def needs_reward(algorithm: str) -> bool:
    tree = yaml.safe_load((config_folder() / "algorithm" / f"{algorithm}.yaml").read_text())
    return ALGORITHMS.config_class(tree["kind"]).needs_reward


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_every_yaml_composes_builds_and_steps(group, name):
    if name == "diffusers":
        declare_torchvision_operators()
        pytest.importorskip("diffusers", reason="the optional package diffusers is not installed")
    small = ["train.batch_size=2", "pretrain.batch_size=2", "pretrain.weights=null"]
    narrow = NARROW.get(LARGE.get(name, name), []) if group in ("network", "experiment") else []
    rewarded = ["reward=quadratic"] if group == "algorithm" and needs_reward(name) else []
    experiment = with_fake_images(compose_experiment([f"{group}={name}", *rewarded, *small, *narrow]).experiment)
    ddpm, pretraining = experiment.build_pretraining()
    step(ddpm, pretraining, 0)
    dxmi, state = experiment.build_finetuning(ddpm.network)
    metrics = step(dxmi, state, 0)
    assert all(torch.isfinite(value) for value in metrics.values())


OPTIONS = [(group, name) for group, names in groups().items() if group not in ("experiment", "debug") for name in names]


@pytest.mark.parametrize(("group", "name"), OPTIONS)
def test_a_file_of_a_group_holds_only_what_differs_from_the_defaults(group, name):
    """And the kinds that it chooses."""
    tree = yaml.safe_load((config_folder() / group / f"{name}.yaml").read_text())
    rewarded = {"reward": {"kind": "quadratic"}} if group == "algorithm" and needs_reward(name) else {}
    config = build(ExperimentConfig, {**rewarded, group: tree})
    differs = with_kinds_named(delta(config).get(group, {}), tree)
    assert {path for path, _ in leaves_of(tree)} == {path for path, _ in leaves_of(differs)}


def with_kinds_named(changes: dict, tree: dict) -> dict:
    """The changes, and every `kind` that the tree names."""
    inner = {key: with_kinds_named(changes.get(key, {}), own) for key, own in tree.items() if isinstance(own, dict)}
    return {**changes, **inner, **({"kind": tree["kind"]} if "kind" in tree else {})}


@pytest.mark.parametrize("name", EXPERIMENTS)
def test_a_config_survives_the_way_to_yaml_and_back(name):
    config = compose_experiment([f"experiment={name}"]).experiment
    assert build(ExperimentConfig, yaml.safe_load(yaml.safe_dump(to_tree(config)))) == config


def test_resources_do_not_enter_the_signature_and_everything_else_does():
    base = compose_experiment([]).experiment
    assert compose_experiment(["resources.threads=1", "out=x"]).experiment.signature == base.signature
    changed = ["seed=1", "algorithm.entropy_coef=0.2", "evaluate.seed=1", "data.label=3", "network=mlp", "name=other"]
    signatures = {compose_experiment([override]).experiment.signature for override in changed}
    assert len(signatures | {base.signature}) == len(changed) + 1


def test_pretraining_signature_ignores_what_pretraining_does_not_depend_on():
    def of(*overrides: str) -> str:
        return with_fake_images(compose_experiment(overrides).experiment).pretraining_signature

    assert of() == of(
        "algorithm.policy.lr=1e-3", "schedule.num_steps=10", "evaluate.every=7", "network.energy.hidden=8"
    )
    assert len({of(), of("seed=1"), of("network.denoiser.hidden=8"), of("pretrain.ema=0.9")}) == 4
    assert of("seed=1") == of("pretrain.seed=1") == of("seed=2", "pretrain.seed=1")


def test_single_class_experiment_differs_from_its_parent_only_in_name_and_label():
    one, all_classes = (to_tree(compose_experiment([f"experiment={n}"]).experiment) for n in ("mnist8_one", "mnist8"))
    changed = {line.split(":")[0] for line in differences(all_classes, one)}
    assert changed == {"name", "data.label"}


def test_published_reproduction_is_as_design_lists_it():
    config = compose_experiment(["experiment=mnist8_published"]).experiment
    epoch = -(-20_000 // 128)
    denoiser = config.network.denoiser
    assert config.seed == 42
    assert (denoiser.embedding, denoiser.hidden, denoiser.layers) == (100, 512, 5)
    assert (config.pretrain.iterations, config.train.iterations) == (500 * epoch, 1000 * epoch)
    assert (config.pretrain.optimizer.lr, config.algorithm.policy.lr, config.algorithm.critic.lr) == (1e-3, 1e-7, 1e-6)
    assert (config.algorithm.entropy_coef, config.algorithm.cost_coef, config.algorithm.energy_l2) == (0.0, 0.1, 0.0)
    assert config.algorithm.policy.sigma_lr == 0.0
    assert config.algorithm.policy.max_grad_norm is None
    assert config.algorithm.target_ema is None
    assert (config.schedule.num_steps, config.schedule.kind, config.schedule.shape) == (5, "var", "quadratic")


@pytest.mark.parametrize(
    ("override", "sentence"),
    [
        ("algorithm.entropy_coeff=1", "algorithm.entropy_coeff … entropy_coef"),
        ("algoritm.entropy_coef=1", "algoritm.entropy_coef … algorithm.entropy_coef"),
        ("experimnt=digits", "experimnt … experiment"),
        ("experiment=digts", "digits"),
        ("network.denoiser.hiden=3", "network.denoiser.hiden … hidden"),
        ("+algorithm.entropy=1", "algorithm.entropy … entropy_coef"),
        ("seed.x=1", "seed.x"),
        ("algorithm.entropy_coef=abc", "algorithm.entropy_coef is 'abc'"),
        ("algorithm.entropy_coef=true", "algorithm.entropy_coef is True"),
        ("seed=1.5", "seed is 1.5"),
        ("algorithm.all_states=1", "algorithm.all_states is 1"),
        ("algorithm.policy=3", "algorithm.policy is 3"),
        ("algorithm.policy_mask=1", "algorithm.policy_mask is 1"),
        ("network.denoiser.kind=transformer", "network.denoiser.kind is 'transformer' … mlp"),
        ("algorithm.policy.lr=-1e-5", "algorithm.policy.lr is -1e-05 … 0"),
        ("algorithm.critic.lr=nan", "algorithm.critic.lr is nan"),
        ("algorithm.critic.lr=inf", "algorithm.critic.lr is inf"),
        ("algorithm.critic.lr=1e999", "algorithm.critic.lr is inf"),
        ("algorithm.policy.max_grad_norm=0", "algorithm.policy.max_grad_norm is 0.0 … 0"),
        ("algorithm.preset=objektive", "algorithm.preset is 'objektive' … as_released … objective"),
        ("algorithm.reference_var=[0]", "algorithm.reference_var is 0.0 … 0"),
        ("algorithm.value_mask=[1,0]", "algorithm.value_mask … 5"),
        ("algorithm.target_ema=1", "algorithm.target_ema is 1.0 … [0, 1)"),
        ("schedule.num_steps=0", "schedule.num_steps is 0 … 1..1000"),
        ("schedule.num_steps=-3", "schedule.num_steps is -3 … 1..1000"),
        ("schedule.kappa=2", "schedule.kappa is 2.0 … [0, 1]"),
        ("schedule.kappa=0", "schedule.kappa is 0 … noise"),
        ("schedule.final_sigma=0", "schedule.final_sigma is 0 … noise"),
        ("data.label=10", "data.label is 10 … 0..9"),
        ("data.num_points=0", "data.num_points … digits"),
        ("schedule.rho=4", "schedule.rho … var"),
        ("schedule.kind=kras", "schedule.kind is 'kras' … karras"),
        ("train.batch_size=0", "train.batch_size is 0 … 1"),
        ("evaluate.num_samples=1", "evaluate.num_samples is 1 … 4"),
        ("seed=-1", "seed is -1"),
        ("resources.device=gpu", "resources.device is 'gpu'"),
        ("algorithm.entropy_coef=0.1,0.2", "algorithm.entropy_coef=0.1,0.2 … several"),
        ("algorithm", "algorithm"),
        ("algorithm.entropy_coef=[", "algorithm.entropy_coef=["),
        ("out=", "out is ''"),
        ("out=~nobody-here/run", "out is ~nobody-here/run"),
        ("name=../x", "name is '../x'"),
        ("name=''", "name is ''"),
        ("evaluate.seed=-1", "evaluate.seed is -1"),
        ("evaluate.kid_subset_size=1", "evaluate.kid_subset_size is 1 … 2"),
        ("evaluate.reference_steps=[5,5]", "evaluate.reference_steps is (5 … twice"),
        ("evaluate.reference_images=3", "evaluate.reference_images is 3 … 4"),
        ("evaluate.reference_steps=[]", "evaluate.reference_steps is []"),
        ("resources.device='cuda:²'", "resources.device is 'cuda:²'"),
        ("resources.threads=3000000000", "resources.threads is 3000000000"),
        ("network.denoiser.kind=[a]", "network.denoiser.kind is ['a'] … mlp"),
        ("network.denoiser.hidden=100000000", "network.denoiser.hidden is 100000000"),
        ("algorithm.policy.lr=1" + 400 * "0", "too large a number"),
        ("seed=" + 5000 * "1", "seed=1111111111111111111111111111111111111111111111111111111..."),
    ],
)
def test_a_bad_override_is_refused_in_a_sentence(override, sentence):
    with pytest.raises(UserError) as refused:
        compose_experiment([override])
    assert missing(sentence, str(refused.value)) == []
    assert "\n" not in str(refused.value)


def test_out_takes_any_path_as_it_is_written():
    for path in ("runs/ünï", "a=b", "(x)", "with space", "{y}"):
        assert compose_experiment([f"out={path}"]).out == Path(path)
    with pytest.raises(UserError, match=stating("out … twice")):
        compose_experiment(["out=a", "out=b"])


def test_an_override_given_twice_is_refused():
    with pytest.raises(UserError, match=stating("seed … twice")):
        compose_experiment(["seed=1", "seed=2"])


def test_a_reference_variance_that_would_do_nothing_is_refused():
    with pytest.raises(UserError, match=stating("algorithm.reference_var … running_cost=noise")):
        compose_experiment(["algorithm.running_cost=noise", "algorithm.reference_var=[1.0]"])


def test_a_config_file_that_is_no_yaml_is_a_sentence(tmp_path, monkeypatch):
    copytree(config_folder(), tmp_path / "configs")
    (tmp_path / "configs" / "data" / "digits.yaml").write_text("kind: digits\nkind: mnist\n")
    monkeypatch.setattr(files, "config_folder", lambda: tmp_path / "configs")
    with pytest.raises(UserError, match=stating("digits.yaml … duplicate … kind")):
        compose_experiment([])


@pytest.mark.parametrize("first", ["algorithm.policy=null", "~algorithm.policy", "~algorithm.policy.lr"])
@pytest.mark.parametrize("last", ["~algorithm.policy.lr", "~algorithm.policy.lr=1"])
def test_leaving_out_what_is_gone_already_is_refused(first, last):
    with pytest.raises(UserError, match=r"~?algorithm\.policy"):
        compose_experiment([first, last])


def test_an_editors_lock_among_the_configs_does_no_harm(tmp_path, monkeypatch):
    shutil.copytree(config_folder(), tmp_path / "configs")
    (tmp_path / "configs" / "data" / ".#digits.yaml").symlink_to("somebody@host.1234")
    monkeypatch.setattr(files, "config_folder", lambda: tmp_path / "configs")
    assert compose_experiment([]).experiment.data.kind == "digits"


def test_points_are_not_mirrored():
    with pytest.raises(UserError, match=stating("data.flip … moons")):
        compose_experiment(["data=moons", "data.flip=true"])
    with pytest.raises(UserError, match=stating("data.num_points is 0")):
        compose_experiment(["data=moons", "data.num_points=0"])


def test_config_folder_is_the_one_of_this_checkout():
    assert config_folder() == Path(__file__).resolve().parent.parent / "configs"


# ----------------------------------------------------------------------------
# Paths and addresses are taken as they are written

ODD = [
    "/data/a=b", "/data/a,b", "/data/größe", "/with space/x", "/it's \"q\"", "/a[1]/{b}(c)", "/a$b/${HOME}/${oc.env:X}",
    "/a#b", "~/x", "a:b", "-x", "/trailing/", "/100%", "/back\\slash", "!x", "*", "&x", "'quoted'", "[a, b]", "1e5",
]  # fmt: skip
PLACES = [
    *("data.folder", "prompts.file", "pretrain.weights", "pretrain.teacher"),
    *("reward.file", "reward.run", "resources.storage_path"),
]
TOGETHER = ["data.folder", "pretrain.weights", "resources.storage_path"]
"""Those that one config can have."""


def value_of(tree: dict, path: str):
    for name in path.split("."):
        tree = tree[name]
    return tree


@pytest.mark.parametrize("text", ODD)
def test_a_path_is_taken_as_it_is_written_and_survives_every_file_of_ours(text):
    overrides = ["data=imagenet64", *(f"{place}={text}" for place in TOGETHER)]
    config = compose_experiment(overrides).experiment
    files = yaml.safe_load(yaml.safe_dump(json.loads(json.dumps(to_tree(config))), sort_keys=False))
    later = build(ExperimentConfig, files)
    assert later == config
    again = overridden({"resources": files["resources"]}, ["resources.threads=1"])  # as a resume does
    for place in TOGETHER:
        assert value_of(to_tree(later), place) == text
    assert again["resources"] == {**files["resources"], "threads": 1}


def test_which_settings_are_paths_is_said_where_they_are_declared():
    assert [place for place in places(ExperimentConfig) if not place.startswith("reward.parts.")] == PLACES
    assert places(TrackingConfig) == ["uri"]


def test_null_is_no_path_and_an_empty_one_or_one_given_twice_is_refused():
    assert compose_experiment(["pretrain.weights=null"]).experiment.pretrain.weights is None
    for overrides in (["pretrain.weights="], ["pretrain.weights=a", "pretrain.weights=b"], ["data.folder=a\nb"]):
        with pytest.raises(UserError, match=overrides[0].partition("=")[0]):
            compose_experiment(overrides)
    with pytest.raises(UserError, match="UTF-8"):
        compose_experiment(["pretrain.weights=/gr\udcf6sse"])


@pytest.mark.parametrize("text", ["/a=b,c ${x}/ö#", "~/x[1]", "'q'"])
def test_a_study_takes_paths_as_they_are_written_too(text, tmp_path):
    given = ["experiment=digits", f"pretrain.weights={text}", f"resources.storage_path={text}"]
    sweep = compose_sweep(["sweep=demo", *given])
    assert sweep.experiment.pretrain.weights == sweep.experiment.resources.storage_path == text
    arm = "ablation.variants.no_l2"
    ablation = compose_ablation(["ablation=dxmi_terms", *given, f"+{arm}.pretrain.weights={text}"])
    assert ablation.experiment.pretrain.weights == text
    assert ablation.ablation["variants"]["no_l2"]["pretrain"] == {"weights": text}
    file = tmp_path / "with=equals, ö.yaml"
    file.write_text((config_folder() / "sweep" / "demo.yaml").read_text())
    assert compose_sweep([f"sweep={file}", "experiment=digits"]).source == "with=equals, ö"
    line = entrypoint(["train", *given])
    assert shlex.split(line)[-2:] == given[-2:]


def test_a_path_that_is_no_setting_of_the_tree_is_refused():
    with pytest.raises(UserError, match="tracking"):
        overridden({"resources": {}}, ["tracking.uri=x"])


@pytest.mark.parametrize("algorithm", ["ppo", "trpo", "grpo", "sac", "draft", "sft_pg"])
def test_a_debug_option_goes_with_every_algorithm(algorithm):
    """Its settings of the experiment's own kind do not apply to another one, whose block has been reset."""
    reward = [] if algorithm == "sft_pg" else ["reward=classifier", "reward.label=3"]
    for name in ("digits", "digits_reward"):
        made = compose_experiment([f"experiment={name}", f"algorithm={algorithm}", *reward, "debug=smoke"]).experiment
        assert made.algorithm.kind == algorithm
