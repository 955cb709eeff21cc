"""What a setting does is seen, where it does anything; and what is said to do nothing does nothing in a whole run."""

from typing import Any

import pytest
import torch
from torch import Tensor

from dxmi.algorithms.ddpm import DDPM
from dxmi.config import build, to_tree
from dxmi.seeds import generator
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig
from support import update
from tune.plans.inert_settings import digests
from tune.search.space import FIXED, configured, flat

Settings = dict[str, Any]
KARRAS = (("rho", 5.0), ("sigma_min", 0.01), ("sigma_max", 70.0), ("noisy_end", True))
SIZES = (("hidden", 7), ("layers", 4), ("first_gain", 2.0))
SMALL = {"kind": "mlp", "hidden": 6, "layers": 3, "embedding": 4}
BASE = build(
    ExperimentConfig,
    {
        "network": {"denoiser": SMALL, "energy": SMALL, "value": SMALL},
        "pretrain": {"iterations": 400, "batch_size": 4},
        "schedule": {"num_steps": 2},
        "train": {"iterations": 1000, "batch_size": 4},
    },
)
SEPARATE = {"algorithm.value": "separate"}
REWARDED = {"algorithm": {"kind": "reinforce"}, "reward": {"kind": "quadratic"}}
NO_CONTROL = {"algorithm.entropy_coef": 0.0, "algorithm.cost_coef": 0.0}


def of_optimizer(group: str, context: Settings) -> list[tuple[Settings, str, Any]]:
    """Changes of an optimizer's settings that do something; among them those that act late or only sometimes."""
    late = {**context, f"{group}.warmup": 380 if group == "pretrain.optimizer" else 900}
    settled = {**context, f"{group}.decay": "linear"}
    radam = {**context, f"{group}.kind": "radam"}
    decoupled = {**context, f"{group}.kind": "adamw"}
    changes = [
        (context, "kind", "radam"),
        (context, "lr", 1.01e-4),
        (context, "beta1", 0.91),
        (context, "beta2", 0.99),
        (context, "weight_decay", 1e-3),
        (context, "max_grad_norm", 1e3),
        (context, "warmup", 2),
        (context, "decay", "linear"),
    ]
    special = [
        ({f"{group}.lr": 1e-8}, "lr", 1.01e-8),
        ({}, "lr", 0.0),
        (radam, "beta2", 0.99),
        (decoupled, "weight_decay", 0.1),
        ({f"{group}.max_grad_norm": 1e3}, "max_grad_norm", None),
        ({f"{group}.max_grad_norm": 1e3}, "max_grad_norm", 1e4),
        ({f"{group}.warmup": 300}, "warmup", 301),
        (settled, "decay", "cosine"),
        (late, "decay", "linear"),
    ]
    all_of_them = changes + (special if group in ("algorithm.policy", "pretrain.optimizer") else [])
    return [(given, f"{group}.{name}", value) for given, name, value in all_of_them]


ALIVE: list[tuple[Settings, str, Any]] = [
    ({}, "algorithm.preset", "objective"),
    ({}, "algorithm.entropy_coef", 0.2),
    ({"algorithm.policy.lr": 1e-8}, "algorithm.entropy_coef", 0.11),
    ({}, "algorithm.cost_coef", 0.0),
    ({}, "algorithm.energy_l2", 0.99),
    ({}, "algorithm.energy_noise", 0.01),
    ({}, "algorithm.guidance", 0.1),
    ({}, "algorithm.energy_gradient_penalty", 0.01),
    ({}, "algorithm.running_cost", "noise"),
    ({}, "algorithm.step_cost", "linear"),
    ({}, "algorithm.step_cost", "sigmoid"),
    ({"algorithm.step_cost": "linear"}, "algorithm.step_cost_scale", 2.0),
    ({}, "algorithm.reference_var", [0.5]),
    ({}, "algorithm.reference_var_ema", 1.0),
    ({}, "algorithm.value_mask", [1.0, 0.0]),
    ({}, "algorithm.policy_mask", [1.0, 0.0]),
    ({"schedule.num_steps": 30}, "algorithm.policy_mask", [1.0] * 29 + [0.5]),
    ({}, "algorithm.value", "separate"),
    ({}, "algorithm.energy_updates", 2),
    ({}, "algorithm.value_updates", 2),
    ({"algorithm.policy_horizon": None}, "algorithm.value_updates", 0),
    ({}, "algorithm.policy_updates", 2),
    ({}, "algorithm.policy_start", 1),
    ({}, "algorithm.policy_horizon", 2),
    ({}, "algorithm.policy_horizon", None),
    ({}, "algorithm.all_states", True),
    ({}, "algorithm.resample_next", True),
    ({}, "algorithm.target_ema", 0.995),
    ({"algorithm.target_ema": 0.9}, "algorithm.target_ema", 0.95),
    ({"algorithm.target_ema": 0.99}, "algorithm.target_ema", 0.9905),
    ({}, "algorithm.policy_ema", None),
    ({"algorithm.policy_ema": 0.99}, "algorithm.policy_ema", 0.991),
    *of_optimizer("algorithm.policy", {}),
    *of_optimizer("algorithm.critic", {}),
    *of_optimizer("algorithm.energy", SEPARATE),
    ({}, "algorithm.policy.sigma_lr", 0.0),
    ({}, "algorithm.policy.sigma_lr", 2e-4),
    *of_optimizer("pretrain.optimizer", {}),
    ({}, "pretrain.iterations", 0),
    ({}, "pretrain.iterations", 401),
    ({}, "pretrain.batch_size", 5),
    ({}, "pretrain.seed", 1),
    ({}, "pretrain.ema", 0.9),
    ({"pretrain.ema": 0.97}, "pretrain.ema", 0.975),
    ({}, "schedule.num_steps", 3),
    ({}, "schedule.kind", "step"),
    ({}, "schedule.shape", "linear"),
    ({}, "schedule.last_level", 0.9),
    ({}, "schedule.kappa", 0.9),
    ({}, "schedule.final_sigma", 2e-3),
    *(({"schedule.kind": "karras", "schedule.num_steps": 3}, f"schedule.{name}", value) for name, value in KARRAS),
    ({}, "network.denoiser.classes", 3),
    ({"network.denoiser.classes": 3}, "network.energy.classes", 3),
    ({"network.denoiser.classes": 3, **SEPARATE}, "network.value.classes", 3),
    ({}, "train.iterations", 1001),
    ({}, "train.iterations", 0),
    ({}, "train.batch_size", 5),
    ({}, "train.precision", "bfloat16"),
    *(({}, f"network.denoiser.{name}", value) for name, value in (*SIZES, ("embedding", 6))),
    *(({}, f"network.energy.{name}", value) for name, value in SIZES),
    *((SEPARATE, f"network.value.{name}", value) for name, value in (*SIZES, ("embedding", 6))),
    (
        {"algorithm": {"kind": "reinforce"}, "reward": {"kind": "quadratic"}},
        "reward",
        {"kind": "quadratic", "scale": 2.0},
    ),
]

# No effect by what the setting is documented to be, or by its formula.
DEAD: list[tuple[Settings, str, Any]] = [
    ({}, "train.log_every", 7),
    ({}, "reward", {"kind": "quadratic"}),  # DxMI maximizes none: it is only a score
    ({}, "network.energy.embedding", 6),
    ({}, "network.value.hidden", 7),
    ({}, "algorithm.energy.lr", 1e-2),
    ({}, "algorithm.energy.max_grad_norm", 0.1),
    ({}, "algorithm.step_cost_scale", 2.0),
    ({}, "algorithm.policy_mask", [1.0, 1.0]),
    ({}, "algorithm.value_mask", [0.0]),
    (NO_CONTROL, "algorithm.preset", "objective"),
    (NO_CONTROL, "algorithm.policy_mask", [0.5]),
    ({"algorithm.cost_coef": 0.0}, "algorithm.reference_var_ema", 1.0),
    ({"algorithm.cost_coef": 0.0}, "algorithm.reference_var", [0.1]),
    ({"algorithm.running_cost": "noise"}, "algorithm.reference_var_ema", 1.0),
    ({"schedule.num_steps": 1}, "schedule.shape", "linear"),  # both are the one level that reaches the target
    ({"schedule.num_steps": 1}, "algorithm.policy.sigma_lr", 0.5),  # the only sigma is fixed
    ({"schedule.num_steps": 1}, "algorithm.all_states", True),
    ({"train.iterations": 12}, "algorithm.policy_ema", 0.9),  # (1 + 11) / (10 + 11) stays below both
    ({"train.iterations": 12, "algorithm.policy.warmup": 12}, "algorithm.policy.decay", "linear"),
    ({"train.iterations": 12, "algorithm.policy.warmup": 11}, "algorithm.policy.decay", "cosine"),
    ({"train.iterations": 5, "algorithm.policy.kind": "radam"}, "algorithm.policy.beta2", 0.99),
    ({"train.iterations": 0}, "algorithm.entropy_coef", 0.2),
    ({"train.iterations": 0}, "train.batch_size", 5),
    ({"pretrain.iterations": 0}, "pretrain.optimizer.lr", 1e-2),
    ({"pretrain.iterations": 0}, "pretrain.ema", 0.5),
    ({"pretrain.iterations": 0}, "pretrain.batch_size", 5),
]


def pair(case: tuple[Settings, str, Any]) -> tuple[ExperimentConfig, ExperimentConfig]:
    """The config of a context, and with the change."""
    context, path, value = case
    return configured(BASE, context), configured(BASE, {**context, path: value})


def name(case: tuple[Settings, str, Any]) -> str:
    return "-".join([case[1], str(case[2]), *map(str, case[0].values())])


@pytest.fixture(scope="module")
def told() -> dict[str, str | None]:
    """Digests of every config in this file."""
    torch.set_num_threads(1)
    return digests([config for case in (*ALIVE, *DEAD) for config in pair(case)])


def test_every_setting_that_may_vary_is_tried():
    """A new setting fails here until a case above has it."""
    free = {path for path in flat(to_tree(BASE)) if path.partition(".")[0] not in (*FIXED, "seed", "data")}
    free |= {f"schedule.{name}" for name, _ in KARRAS}
    free -= {f"network.{network}.kind" for network in ("denoiser", "energy", "value")}  # only MLPs are tried
    free -= {"algorithm.kind"}  # the settings of DxMI are tried
    # Nothing is claimed of a run that starts from a file or another run, or whose classes are those of prompts.
    free -= {"pretrain.weights", "pretrain.teacher", "algorithm.teacher_energy", "pretrain.shipped"}
    free -= {path for path in free if path.startswith("prompts.")}
    dead = {"train.log_every", "network.energy.embedding"}
    assert {path for _, path, _ in ALIVE} == free - dead


@pytest.mark.parametrize("case", ALIVE, ids=name)
def test_a_setting_that_does_something_is_seen_to(told, case):
    before, after = pair(case)
    assert told[before.signature] is not None
    assert told[before.signature] != told[after.signature]


@pytest.mark.parametrize("case", DEAD, ids=name)
def test_a_setting_that_does_nothing_is_seen_to(told, case):
    before, after = pair(case)
    assert before != after
    assert told[before.signature] is not None
    assert told[before.signature] == told[after.signature]


def whole_run(config: ExperimentConfig, total: int = 12) -> list[Tensor]:
    """All iterations of a short run at its own rates, on random data: the policy that is evaluated."""
    experiment = Experiment(config, event=(3,))
    data = torch.randn((total, config.train.batch_size, 3), generator=torch.Generator().manual_seed(0))
    denoiser = experiment.build_denoiser()
    ddpm = DDPM(config.pretrain, denoiser)
    noise, states = generator(1, "noise"), generator(1, "states")
    for i in range(min(config.pretrain.iterations, total)):
        update(ddpm, data[i], i, noise)
    denoiser.load_state_dict(ddpm.average.state_dict())
    dxmi = experiment.build_algorithm(denoiser)
    for i in range(min(config.train.iterations, total)):
        update(dxmi, data[i], i, noise, states)
    return [*dxmi.eval_policy.state_dict().values(), *dxmi.value.state_dict().values()]


@pytest.mark.parametrize("case", [case for case in DEAD if case[1] != "train.batch_size"], ids=name)
def test_what_is_said_to_do_nothing_does_nothing_in_a_run(case):
    runs = [whole_run(config) for config in pair(case)]
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))


def test_equal_configs_share_a_digest_whatever_their_resources_and_others_do_not_change_it():
    one, other = BASE, configured(BASE, {"resources.threads": 3})
    alone = digests([one])
    assert alone == digests([other]) == digests([one, other])


def test_nothing_is_claimed_about_many_steps_or_numbers_that_are_none():
    many = configured(BASE, {"schedule.num_steps": 51})
    infinite = configured(BASE, {"algorithm.entropy_coef": 1e39})
    assert list(digests([many, infinite]).values()) == [None, None]


def test_the_global_random_state_and_the_threads_are_left_alone():
    before, threads = torch.get_rng_state(), torch.get_num_threads()
    digests([BASE])
    assert torch.equal(torch.get_rng_state(), before)
    assert torch.get_num_threads() == threads
