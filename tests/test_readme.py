"""What the README and the pages that it leads to tell a newcomer to type works, made small.

A command behind a `$` is run. Of the others, which need a cluster, a server, other data or more time, the arguments are
read and the config is composed.
"""

import ast
import re
import shlex
from pathlib import Path

import numpy as np
import pytest
import yaml

from dxmi.metrics.classifier import CLASSIFIERS
from support import idx_bytes
from tune.cli.main import main
from tune.cli.parser import parse
from tune.config.compose import compose_ablation, compose_experiment, compose_sweep
from tune.config.files import ablations, groups, sweeps

ROOT = Path(__file__).resolve().parent.parent
RUN_PAGES = ("README.md", "tune/README.md", "configs/README.md", "CONTRIBUTING.md")
PAGES = {name: (ROOT / name).read_text() for name in (*RUN_PAGES, "cluster/README.md")}
README, TUNE, CONFIGS = (PAGES[name] for name in RUN_PAGES[:3])
COMMANDS = list(dict.fromkeys(re.findall(r"^\$ (.+)$", "\n".join(map(PAGES.get, RUN_PAGES)), flags=re.MULTILINE)))
TINY = [
    "network.denoiser.hidden=16",
    "network.energy.hidden=16",
    "network.value.hidden=16",
    "pretrain.iterations=20",
    "train.iterations=4",
    "evaluate.every=2",
    "evaluate.num_samples=100",
    "evaluate.batch_size=100",
    "evaluate.kid_subset_size=50",
    "evaluate.grid=16",
    "resources.threads=1",
]


def made_by(command: str) -> str | None:
    """The folder of a run or the name of a study that a command makes for later ones."""
    given = (word.partition("=") for word in shlex.split(command) if "--dry-run" not in command)
    return next((value for key, _, value in given if key in ("out", "name")), None)


def small(command: str) -> list[str]:
    """The arguments of a command, made small."""
    program, *arguments = shlex.split(command)
    assert program == "dxmi"
    if arguments[0] in ("train", "sweep", "ablate") and not {"--resume", "--config"} & set(arguments):
        given = {argument.partition("=")[0] for argument in arguments}
        arguments += [setting for setting in TINY if setting.partition("=")[0] not in given]
    if any("mnist" in argument for argument in arguments):  # the newcomer's files are small ones
        arguments += ["data.accept_unknown_files=true"]
    if arguments[0] == "ablate" and "--dry-run" not in arguments:
        arguments += ["--dry-run"]  # dozens of runs: tests/test_seed_batching.py runs some
    if arguments[0] == "sweep" and "--resume" not in arguments:
        arguments += ["sweep.budget.trials=2", "sweep.max_concurrent=1"]
    return arguments


class Newcomer:
    """Somebody who types commands of the pages in a folder of their own.

    Args:
        home: that folder.
    """

    def __init__(self, home: Path) -> None:
        self.home = home
        self._codes: dict[str, int] = {}

    def types(self, command: str) -> int:
        """The exit code of a command, which is run once, after those that make what it names."""
        if command not in self._codes:
            words = command.split()
            for earlier in COMMANDS:
                made = made_by(earlier)
                if made and earlier != command and (made in words or f"studies/{made}/" in command):
                    assert self.types(earlier) == 0
            self._codes[command] = main(small(command))
        return self._codes[command]


@pytest.fixture(scope="module")
def newcomer(tmp_path_factory):
    """One for all tests, with files in MNIST's layout."""
    home = tmp_path_factory.mktemp("newcomer")
    raw = home / "data" / "MNIST" / "raw"
    raw.mkdir(parents=True)
    rng = np.random.default_rng(0)
    images = rng.integers(0, 256, (200, 28, 28), dtype=np.uint8)
    (raw / "train-images-idx3-ubyte").write_bytes(idx_bytes(images))
    labels = (np.arange(200) % 10).astype(np.uint8)
    (raw / "train-labels-idx1-ubyte").write_bytes(idx_bytes(labels))
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(home)
        patch.setenv("DXMI_DATA", str(home / "data"))
        yield Newcomer(home)


def marks_of(command: str) -> list[pytest.MarkDecorator]:
    """Marks of a command: those that need a whole sweep are slow, as test_sweep.py has one."""
    needs_sweep = "lr-1" in command and "--dry-run" not in command
    return [pytest.mark.slow] if needs_sweep else []


@pytest.mark.parametrize("command", [pytest.param(c, marks=marks_of(c)) for c in COMMANDS if c.startswith("dxmi ")])
def test_a_command_of_the_pages_works(newcomer, command):
    """Alone, too: what it uses is made first."""
    assert newcomer.types(command) == 0


def first_column(table: str) -> list[str]:
    """The files that the first column of a table names."""
    rows = [line.split(" | ")[0] for line in table.splitlines() if line.startswith("| `")]
    return re.findall(r"`([\w./]+)`", " ".join(rows))


def test_files_that_the_readme_promises_are_there_afterwards(newcomer):
    for command in COMMANDS:
        if command.startswith("dxmi sample runs/low-entropy "):
            assert newcomer.types(command) == 0
    assert {"grid.png", "samples.npz"} <= {entry.name for entry in newcomer.home.iterdir()}
    promised = first_column(section(README, "### Look at a run"))
    assert len(promised) == 6
    for name in promised:
        assert (newcomer.home / "runs" / "low-entropy" / name).exists()


@pytest.mark.slow  # as is the sweep
def test_files_that_the_readme_promises_of_a_study_are_there_afterwards(newcomer):
    (command,) = (command for command in COMMANDS if made_by(command) == "lr-1")
    assert newcomer.types(command) == 0
    promised = first_column(section(README, "## Sweep", block=2)) + first_column(section(TUNE, "## What is on disk\n"))
    assert len(promised) == 15
    for name in promised:
        assert (newcomer.home / "studies" / "lr-1" / name.replace("0007", "0001")).exists()


def section(page: str, heading: str, block: int = 0) -> str:
    """A page from a heading to the next block of commands, or to a later one."""
    return page.split(heading)[1].split("```")[block]


PYTHON = [block for page in (README, TUNE) for block in re.findall(r"```python\n(.+?)```", page, flags=re.DOTALL)]


@pytest.mark.parametrize(
    ("block", "word", "left"),
    [
        (PYTHON[0], "seed=1", "runs/from-python/summary.json"),
        pytest.param(*(PYTHON[1], "sweep.budget.trials=2", "studies/notebook/report.html"), marks=pytest.mark.slow),
    ],
)
def test_the_python_of_the_pages_works(newcomer, block, word, left):
    tiny = block.replace(f'"{word}"', ", ".join(repr(setting) for setting in [word, *TINY]))
    assert tiny != block
    exec(compile(ast.parse(tiny), "README.md", "exec"), {})
    assert (newcomer.home / left).exists()


def test_the_floor_of_the_digits_is_what_the_readme_says():
    (block,) = re.findall(r"```python\n(.+?)```", CONFIGS, flags=re.DOTALL)
    names: dict[str, float] = {}
    exec(compile(block, "configs/README.md", "exec"), names)
    (stated,) = re.findall(r"one half of the\s+data\s+scored\s+against\s+the\s+other\s+([\d.]+\d)", README)
    assert names["floor"] == pytest.approx(float(stated), abs=0.01)


BLOCKS = re.findall(r"```yaml\n(.+?)```", TUNE, flags=re.DOTALL)
SWEEP_FILE, ABLATION_FILE = BLOCKS[0], next(block for block in BLOCKS if "hypothesis" in block)


def test_the_sweep_file_of_the_page_plans_a_study(newcomer):
    (newcomer.home / "my.yaml").write_text(SWEEP_FILE)
    assert main(["sweep", "sweep=my.yaml", "--dry-run"]) == 0


def test_the_ablation_file_of_the_page_plans_a_study(newcomer):
    (newcomer.home / "mine.yaml").write_text(ABLATION_FILE)
    arguments = ["ablate", "experiment=digits", *TINY, "ablation=mine.yaml", "name=planned", "--dry-run"]
    assert main(arguments) == 0
    assert not (newcomer.home / "studies" / "planned").exists()


# ----------------------------------------------------------------------------
# Commands that are not run


def printed_commands() -> list[str]:
    """Every command of ours in a block of commands that is not behind a `$`, without what is said about it."""
    blocks = "\n".join(
        block for page in PAGES.values() for block in re.findall(r"```console\n(.+?)```", page, re.DOTALL)
    )
    lines = blocks.replace("\\\n", "").splitlines()
    commands = [re.sub(r" +", " ", re.split(r"(?<=\S)   +|  # ", line)[0]) for line in lines]
    return list(dict.fromkeys(command for command in commands if command.startswith("dxmi ")))


def accept(words: list[str]) -> None:
    """Read the arguments of a command and compose its config."""
    args = parse(words)
    command, overrides = words[0], getattr(args, "overrides", [])
    if command == "submit":
        accept(args.command)
    elif command in ("sweep", "ablate") and args.resume is None:
        {"sweep": compose_sweep, "ablate": compose_ablation}[command](overrides)
    elif overrides:
        compose_experiment(overrides)


@pytest.mark.parametrize("command", printed_commands())
def test_a_command_that_is_not_run_is_accepted(command):
    accept(shlex.split(command)[1:])


def test_other_commands_of_the_pages_exist():
    makefile = (ROOT / "Makefile").read_text()
    others = [command for command in COMMANDS if not command.startswith("dxmi ")]
    assert others
    for command in others:
        program, target, *_ = command.split()
        if program == "make":
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
        else:
            assert (ROOT / target).exists()


# ----------------------------------------------------------------------------
# What the pages say of the rest of the repository


def test_the_readme_can_be_read_in_one_sitting():
    assert len(README.splitlines()) <= 250


def test_every_config_file_is_on_a_page():
    options = {**groups(), "sweep": sweeps(), "ablation": ablations()}
    assert len(options) > 8
    missing = [f"{group}/{name}" for group, names in options.items() for name in names]
    assert [path for path in missing if f"`{path.split('/')[1]}`" not in CONFIGS + TUNE] == []


def test_every_shipped_sweep_is_on_the_page_with_its_sampler_and_trials():
    names = {"tpe": "TPE", "nsga2": "NSGA-II", "grid": "grid"}
    for name in sweeps():
        tree = yaml.safe_load((ROOT / "configs" / "sweep" / f"{name}.yaml").read_text())
        (by,) = re.findall(rf"^\| `{name}` \| .+ \| (.+) \|$", TUNE, flags=re.MULTILINE)
        assert by.startswith(f"{names[tree['sampler']['kind']]}, {tree['budget']['trials']} trials")


def test_every_package_of_the_platform_is_on_its_page():
    packages = {path.parent.name for path in (ROOT / "tune").glob("*/__init__.py")}
    assert set(re.findall(r"^\| `(\w+)/` \|", TUNE, flags=re.MULTILINE)) == packages


def test_the_table_of_fault_tolerance_names_existing_tests():
    rows = [row for row in section(TUNE, "## Fault tolerance\n").splitlines() if row.startswith("| ")][1:]
    named = re.findall(r"`(\w+)`", " ".join(row.split("|")[-2] for row in rows))
    defined = re.findall(r"^def test_(\w+)", "\n".join(map(Path.read_text, (ROOT / "tests").glob("test_*.py"))), re.M)
    assert len(named) >= len(rows) > 12
    assert [name for name in named if name not in defined] == []


def test_the_accuracies_of_the_page_are_those_of_the_shipped_classifiers():
    for name, shipped in CLASSIFIERS.items():
        (stated,) = re.findall(rf"^\| {name} \| ([\d.]+) %", CONFIGS, flags=re.MULTILINE)
        assert float(stated) == pytest.approx(100 * shipped.accuracy, abs=0.05)


def test_every_table_of_scores_shows_precision_and_recall():
    """An FID alone hid that precision fell while recall rose."""
    lines = (README + CONFIGS).splitlines()
    headings = [line for line in lines if re.match(r"\| .*\| fid_", line)]
    assert len(headings) == 14
    assert [line for line in headings if "precision" not in line or "recall" not in line] == []


LINKED = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *ROOT.glob("*/README.md"), *ROOT.glob("*/*/README.md")]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_to_headings_and_files(page):
    for target in re.findall(r"\]\((?!https?:)([^)]+)\)", page.read_text()):
        file, _, anchor = target.partition("#")
        linked = (page.parent / file).resolve() if file else page
        assert linked.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.+)$", linked.read_text(), flags=re.MULTILINE)
            assert anchor in {re.sub(r"[^\w\- ]", "", heading.lower()).replace(" ", "-") for heading in headings}


@pytest.mark.parametrize("page", RUN_PAGES)
def test_files_that_a_page_names_exist(page):
    named = re.findall(r"`((?:dxmi|tune|configs|cluster|tests)/[\w/]+\.\w+)`", PAGES[page])
    assert [file for file in named if "NAME" not in file and not (ROOT / file).exists()] == []


def test_every_picture_is_on_a_page():
    text = "".join(page.read_text() for page in LINKED)
    assert [path.name for path in (ROOT / ".readme").iterdir() if f".readme/{path.name})" not in text] == []
