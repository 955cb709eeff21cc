"""dxmi/README.md and dxmi/algorithms/README.md name what exists, and all of it.

Code is referred to as `dxmi/file.py: Class.method`, settings as `algorithm.name`, and every algorithm has a section.
"""

import ast
import functools
import importlib
import re
import textwrap
from dataclasses import fields, is_dataclass
from pathlib import Path
from typing import Any, get_type_hints

import pytest

from dxmi.algorithms.configs import DDPMConfig
from dxmi.algorithms.registry import ALGORITHMS
from dxmi.config import build
from dxmi.optim.config import PolicyOptimizerConfig
from dxmi.registry import registry_of
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig

ROOT = Path(__file__).resolve().parent.parent
METHOD, PAGE = (ROOT / "dxmi" / name for name in ("README.md", "algorithms/README.md"))
PAGES = {"method": METHOD.read_text(), "algorithms": PAGE.read_text()}
CONFIGS = {**{kind: ALGORITHMS.config_class(kind) for kind in ALGORITHMS.kinds()}, "ddpm": DDPMConfig}
MODULES = {**{kind: ALGORITHMS.implementation(kind).__module__ for kind in ALGORITHMS.kinds()}}
MODULES["ddpm"] = "dxmi.algorithms.ddpm"


def references(page: str) -> list[tuple[str, str]]:
    """(file, name) of every reference to code; the name is empty where only the file is named."""
    return re.findall(r"`((?:dxmi|tests)/[\w/]+\.py)(?:: ([\w.]+))?`", page)


@functools.cache
def defined_in(file: str) -> frozenset[str]:
    """Names of functions, classes, methods, fields and constants, with that of their class in front."""
    return frozenset(_defined(ast.parse((ROOT / file).read_text()).body, ""))


def _defined(body: list[ast.stmt], prefix: str) -> list[str]:
    found: list[str] = []
    for node in body:
        if isinstance(node, ast.FunctionDef | ast.ClassDef):
            found.append(prefix + node.name)
        if isinstance(node, ast.ClassDef):
            found += _defined(node.body, f"{prefix}{node.name}.")
        if isinstance(node, ast.Assign | ast.AnnAssign):
            targets = node.targets if isinstance(node, ast.Assign) else [node.target]
            found += [prefix + target.id for target in targets if isinstance(target, ast.Name)]
    return found


def code_blocks(page: str) -> list[str]:
    return [
        textwrap.dedent(block) for block in re.findall(r"^ *```python\n(.*?)^ *```", page, re.DOTALL | re.MULTILINE)
    ]


def sections(page: str) -> dict[str, str]:
    """The text under each heading of the second level."""
    parts = re.split(r"^## (.+)\n", page, flags=re.MULTILINE)
    return {heading.strip("`"): text for heading, text in zip(parts[1::2], parts[2::2], strict=True)}


@pytest.mark.parametrize("page", PAGES)
def test_every_place_in_the_code_exists(page):
    found = references(PAGES[page])
    assert len([name for _, name in found if name]) >= 15
    missing = [f"{file}: {name}" for file, name in found if not (ROOT / file).is_file()]
    missing += [f"{file}: {name}" for file, name in found if name and name not in defined_in(file)]
    assert missing == []


def test_every_loss_and_cost_is_on_the_page_of_the_method():
    named = {name for _, name in references(PAGES["method"])}
    for file in ("losses", "costs"):
        public = {
            name
            for name in defined_in(f"dxmi/algorithms/{file}.py")
            if "." not in name and not name.startswith("_") and name != "per_step_table"
        }
        assert public <= {name.partition(".")[0] for name in named}


@pytest.mark.parametrize("page", PAGES)
def test_every_setting_exists(page):
    """`algorithm.name` is a setting of some algorithm; `policy.name` and the like are those of its groups."""
    paths = re.findall(r"`((?:algorithm|schedule|pretrain|train|evaluate|resources|data)\.[a-z_.0-9]+)", PAGES[page])
    assert paths
    assert [path for path in paths if not is_setting(ExperimentConfig, path.rstrip(".").split("."))] == []


def is_setting(cls: Any, names: list[str]) -> bool:
    """Whether the path leads to a setting of `cls`, in a block of any kind."""
    own = {field.name: field for field in fields(cls)}.get(names[0]) if is_dataclass(cls) else None
    if own is None or not names[1:]:
        return own is not None
    registry = registry_of(own.metadata)
    groups = [get_type_hints(cls)[own.name]] if registry is None else map(registry.config_class, registry.kinds())
    return any(is_setting(group, names[1:]) for group in groups)


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_algorithm_has_a_section_with_all_of_its_settings(kind):
    section = sections(PAGES["algorithms"])[kind]
    rows = [row.split("|")[1] for row in section.splitlines() if row.startswith("| `")]
    named = {name for row in rows for name in re.findall(r"`([a-z_0-9]+)`", row)}
    assert {field.name for field in fields(CONFIGS[kind])} - {"kind"} == named


@pytest.mark.parametrize("kind", CONFIGS)
def test_every_algorithm_has_a_section_with_all_of_its_metrics(kind):
    documentation = importlib.import_module(MODULES[kind]).__doc__ or ""
    logged = set(re.findall(r"^    ([a-z]+/[a-z_]+)  ", documentation, flags=re.MULTILINE))
    assert logged
    assert set(re.findall(r"^\| `([a-z]+/[a-z_]+)` \|", sections(PAGES["algorithms"])[kind], re.MULTILINE)) == logged


@pytest.mark.parametrize("kind", CONFIGS)
def test_the_defaults_in_the_tables_are_the_defaults(kind):
    checked = 0
    for row in sections(PAGES["algorithms"])[kind].splitlines():
        cells = [cell.strip() for cell in row.strip("|").split(" | ")]
        names = re.findall(r"`([a-z_0-9]+)`", cells[0])
        told = cells[1].split(", ") if len(cells) == 3 and names and row.startswith("| `") else []
        if len(told) != len(names):
            continue
        default = build(CONFIGS[kind], {})
        for name, text in zip(names, told, strict=True):
            if not is_dataclass(getattr(default, name)):
                assert as_text(getattr(default, name)) == text, name
                checked += 1
    assert checked >= 4


def as_text(value: Any) -> str:
    """A default as the tables write it."""
    if value is None or isinstance(value, bool):
        return {None: "null", True: "true", False: "false"}[value]
    if isinstance(value, tuple):
        return f"[{', '.join(as_text(item) for item in value)}]"
    return f"{value:g}" if isinstance(value, float) else str(value)


def test_every_setting_of_an_optimizer_is_named():
    text = PAGES["algorithms"].partition("## `dxmi`")[0]
    assert [f.name for f in fields(PolicyOptimizerConfig) if f"`{f.name}`" not in text] == []


def test_the_exact_solution_is_what_the_page_says():
    (block,) = code_blocks(PAGES["method"])
    names: dict[str, Any] = {}
    exec(compile(block, str(METHOD), "exec"), names)  # it ends with an assertion
    assert names["value"] == pytest.approx(1.00965, abs=5e-6)


def test_the_example_of_an_algorithm_runs():
    """Its two classes, with no more than they import, do an update on the digits."""
    names: dict[str, Any] = {}
    for block in code_blocks(PAGES["algorithms"]):
        exec(compile(block, str(PAGE), "exec", dont_inherit=True), names)
    network = {"hidden": 8, "layers": 2, "embedding": 4}
    tree = {
        "network": dict.fromkeys(("denoiser", "energy", "value"), network),
        "algorithm": {"kind": "reinforce"},
        "reward": {"kind": "classifier", "label": 3},
        "train": {"batch_size": 8},
    }
    experiment = Experiment(build(ExperimentConfig, tree))
    _, state = experiment.build_finetuning(experiment.build_denoiser())
    algorithm = names["Awr"](names["AwrConfig"](), experiment.parts(experiment.build_denoiser()))
    metrics = algorithm.update(state.stream.next(), 0, names["Streams"]([state.generators]))
    assert {"reward/mean", "value/error", "policy/grad_norm"} <= metrics.keys()
    assert set(algorithm.panels) <= metrics.keys()
    assert all(value.shape == (1,) and value.isfinite() for value in metrics.values())
