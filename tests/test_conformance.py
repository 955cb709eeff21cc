"""What every entry of every registry has to do; a new one is picked up by its line.

Algorithms have more to do: see test_algorithms.
"""

import ast
import importlib
import inspect
import subprocess
import sys
from collections.abc import Iterator
from dataclasses import MISSING, fields, is_dataclass, replace
from typing import Any

import pytest
import torch
from torch import Tensor

from dxmi.algorithms.registry import ALGORITHMS
from dxmi.config import block_delta, build, completed, default_of, delta, groups_of, to_tree
from dxmi.data.batch import Condition
from dxmi.data.registry import DATA_SETS
from dxmi.diffusion.schedules.registry import SCHEDULES
from dxmi.errors import UserError
from dxmi.metrics.registry import METRICS
from dxmi.networks.base import conditioned
from dxmi.networks.registry import CRITICS, DENOISERS, TIMED_CRITICS
from dxmi.registry import Registry, registry_of
from dxmi.rewards.registry import REWARDS
from dxmi.training.config import ExperimentConfig
from support import stating

REGISTRIES: dict[str, Registry[Any]] = {
    "algorithm": ALGORITHMS,
    "critic": CRITICS,
    "data": DATA_SETS,
    "denoiser": DENOISERS,
    "metric": METRICS,
    "reward": REWARDS,
    "schedule": SCHEDULES,
    "timed_critic": TIMED_CRITICS,
}
ENTRIES = [(name, kind) for name, registry in REGISTRIES.items() for kind in registry.kinds()]
NEEDED: dict[tuple[str, str], dict[str, Any]] = {("data", "image_folder"): {"folder": "pictures", "size": 8}}
"""Settings that have no default."""
each_entry = pytest.mark.parametrize(("name", "kind"), ENTRIES, ids=["-".join(entry) for entry in ENTRIES])


def made(name: str, kind: str) -> Any:
    """The config of a kind with its defaults."""
    return REGISTRIES[name].config(kind, **NEEDED.get((name, kind), {}))


def blocks(cls: type = ExperimentConfig, path: str = "") -> Iterator[tuple[str, type, Any]]:
    """(path, class, field) of everything in a config that names a registry."""
    for own in fields(cls):
        where = f"{path}.{own.name}" if path else own.name
        if registry_of(own.metadata) is not None:
            yield where, cls, own
        if where != "reward.parts":  # rewards again
            for group in groups_of(cls, own):
                yield from blocks(group, where)


def test_every_registry_is_reached_from_the_config_of_a_run():
    found = {id(registry_of(own.metadata)) for _, _, own in blocks()}
    assert found == {id(registry) for registry in REGISTRIES.values()}


# ----------------------------------------------------------------------------
# Configs


@each_entry
def test_the_config_is_frozen_and_knows_its_kind(name, kind):
    config = made(name, kind)
    assert config.kind == kind
    assert is_dataclass(config)
    with pytest.raises(AttributeError):
        config.kind = "other"
    assert all(own.kw_only for own in fields(config))


@each_entry
def test_the_config_makes_the_round_trip(name, kind):
    config, cls = made(name, kind), REGISTRIES[name].config_class(kind)
    assert build(cls, to_tree(config)) == config
    assert build(cls, block_delta(config)) == config
    assert completed(cls, block_delta(config)) == to_tree(config)
    needed = NEEDED.get((name, kind), {})
    assert delta(config) == needed
    assert {own.name for own in fields(config) if default_of(own) is MISSING} == set(needed)


@each_entry
def test_every_setting_is_documented_where_it_is_declared(name, kind):
    cls = REGISTRIES[name].config_class(kind)
    documented = {found for base in cls.__mro__ if is_dataclass(base) for found in documented_fields(base)}
    assert {own.name for own in fields(cls)} <= documented | {"kind"}
    assert cls.__doc__
    assert not cls.__doc__.startswith(f"{cls.__name__}(")  # which dataclasses write of themselves


def documented_fields(cls: type) -> set[str]:
    """Fields of a class that are followed by a string."""
    (node,) = ast.parse(inspect.getsource(cls)).body
    assert isinstance(node, ast.ClassDef)
    found = set()
    for one, following in zip(node.body, [*node.body[1:], None], strict=True):
        is_text = isinstance(following, ast.Expr) and isinstance(following.value, ast.Constant)
        if isinstance(one, ast.AnnAssign) and isinstance(one.target, ast.Name) and is_text:
            found.add(one.target.id)
    return found


@each_entry
def test_an_unknown_setting_and_an_unknown_kind_are_named(name, kind):
    tree = {**to_tree(made(name, kind)), "no_such_setting": 1}
    with pytest.raises(UserError, match=stating(f"here.no_such_setting … {kind}")):
        build(REGISTRIES[name].config_class(kind), tree, "here")
    assert kind in REGISTRIES[name].refusal("here.kind", f"{kind}_")


def test_the_default_of_a_block_is_its_kind_with_that_kinds_defaults():
    """So that a tree that leaves the block out, and one that names only its kind, mean the same."""
    for path, _, own in blocks():
        default = default_of(own)
        assert default is None or default == type(default)(), path


def test_configs_are_imported_without_what_they_describe():
    paths = [REGISTRIES[name].config_class(kind).__module__ for name, kind in ENTRIES]
    imports = "; ".join(f"import {module}" for module in sorted(set(paths)))
    code = f"import sys; {imports}; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


# ----------------------------------------------------------------------------
# Implementations


@each_entry
def test_the_implementation_is_there_and_documented(name, kind):
    implementation = REGISTRIES[name].implementation(kind)
    assert callable(implementation)
    assert implementation.__doc__
    assert importlib.import_module(implementation.__module__).__doc__


EVENTS = {"mlp": (2,), "diffusers": (3, 32, 32)}


@pytest.mark.parametrize("name", ["denoiser", "critic", "timed_critic"])
@pytest.mark.parametrize("kind", sorted({kind for role, kind in ENTRIES if "denoiser" in role or "critic" in role}))
def test_a_network_builds_from_its_defaults(name, kind):
    """On no device: the published networks have hundreds of millions of weights."""
    if kind not in REGISTRIES[name].kinds():
        pytest.skip(f"{kind} is no {name}")
    if kind == "diffusers":
        pytest.importorskip("diffusers")
    config, generator = made(name, kind), torch.Generator().manual_seed(0)
    narrow = {own.name: 64 for own in fields(config) if own.name in ("channels", "hidden")}
    network = REGISTRIES[name].build(replace(config, **narrow), EVENTS.get(kind, (3, 32, 32)), generator)
    assert sum(parameter.numel() for parameter in network.parameters()) > 0


# No dead field: each is changed in a small network, which then has other weights or another output.

_UNET = {"channels": 32, "multipliers": (1, 2), "blocks": 1, "attention": (8,)}
SMALL: dict[str, dict[str, Any]] = {
    "mlp": {"hidden": 16, "layers": 3, "embedding": 8},
    "unet": {**_UNET, "groups": 8},
    "edm_unet": {**_UNET, "groups": 8, "head_channels": 32},
    "ncsnpp_gan": {**_UNET, "latent": 4, "latent_embedding": 8, "latent_layers": 1},
    "igebm": {"channels": 16, "embedding": 8},
    "wide_resnet": {"depth": 10, "width": 1, "embedding": 8},
}
CHANGED: dict[str, Any] = {
    "hidden": 24,
    "layers": 4,
    "embedding": 12,
    "first_gain": 2.0,
    "classes": 3,
    "channels": 64,
    "blocks": 2,
    "multipliers": (1, 1),
    "attention": (16,),
    "head_channels": 16,
    "groups": 2,
    "dropout": 0.5,
    "patch": 2,
    "scale_shift": False,
    "resample_in_blocks": False,
    "step_scale": 2.0,
    "latent": 6,
    "latent_embedding": 12,
    "latent_layers": 2,
    "spectral_norm": True,
    "output_scale": False,
    "depth": 16,
    "width": 2,
}
ONLY_MEMORY = {"kind", "channels_last", "recompute"}
"""Settings that change how a network is computed, not what."""
NETWORKS = [
    (name, kind, own.name)
    for name in ("denoiser", "critic", "timed_critic")
    for kind in REGISTRIES[name].kinds()
    if kind in SMALL
    for own in fields(REGISTRIES[name].config_class(kind))
    if own.name not in ONLY_MEMORY
    and not (name == "critic" and own.name == "embedding")  # an energy knows no time
    and not (kind == "ncsnpp_gan" and own.name == "classes")  # which it refuses
]


@pytest.mark.parametrize(("name", "kind", "field"), NETWORKS)
def test_no_setting_of_a_network_is_dead(name, kind, field):
    config = REGISTRIES[name].config(kind, **SMALL[kind])
    before, after = (behavior(name, one) for one in (config, replace(config, **{field: CHANGED[field]})))
    assert before.keys() != after.keys() or any(
        value.shape != after[key].shape or not torch.equal(value, after[key]) for key, value in before.items()
    )


def behavior(name: str, config: Any) -> dict[str, Tensor]:
    """The weights of a network, and what it computes of two samples."""
    torch.set_num_threads(1)
    generator = torch.Generator().manual_seed(0)
    event = (2,) if config.kind == "mlp" else (3, 16, 16)
    network = REGISTRIES[name].build(config, event, generator)
    for parameter in network.parameters():  # some begin at 0, and hide what is before them
        parameter.data += 0.1 * torch.randn(parameter.shape, generator=generator)
    x, labels = torch.randn(2, *event, generator=generator), torch.tensor([0, 1]) if config.classes else None
    if name == "critic":
        output = network(x, labels)
    elif name == "timed_critic":
        output = network(x, network.embed(torch.tensor([1.0])), labels)
    else:
        latent = torch.ones(2, network.latent) if network.latent else None
        embedding = conditioned(network, network.embed(torch.tensor([5.0])), Condition(labels), latent)
        output = network(x, embedding, torch.tensor([1, 2]))
    return {**network.state_dict(), "output": output.detach()}


@pytest.mark.parametrize("kind", SCHEDULES.kinds())
def test_a_schedule_builds_from_its_defaults(kind):
    config = made("schedule", kind)
    schedule = SCHEDULES.build(config)
    assert schedule.steps().num_steps == config.num_steps
    assert len(schedule.forward_process().timestep) > 0
    assert isinstance(config.family, str)


@pytest.mark.parametrize(
    "kind", [kind for kind in DATA_SETS.kinds() if made("data", kind).is_planar or kind == "digits"]
)
def test_data_that_need_no_files_build_from_their_defaults(kind):
    data = DATA_SETS.build(made("data", kind))
    assert data.name == kind
    assert len(data) > 0


def test_a_kind_of_one_role_is_refused_in_another():
    with pytest.raises(UserError, match=stating("kind is 'unet' … igebm")):
        CRITICS.build(made("denoiser", "unet"), (3, 32, 32), torch.Generator())
