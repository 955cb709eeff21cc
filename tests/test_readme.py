"""What the README tells a newcomer to type works, made small."""

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
from tune.config.files import sweeps

ROOT = Path(__file__).resolve().parent.parent
README = (ROOT / "README.md").read_text()
COMMANDS = re.findall(r"^\$ (.+)$", README, flags=re.MULTILINE)
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
        arguments += TINY
    if any("mnist" in argument for argument in arguments):  # the newcomer's files are small ones
        arguments += ["data.accept_unknown_files=true"]
    if (
        arguments[0] == "ablate" and "--dry-run" not in arguments
    ):  # dozens of runs: tests/test_seed_batching.py runs some
        arguments += ["--dry-run"]
    if arguments[0] == "sweep" and "--resume" not in arguments:
        arguments += ["sweep.budget.trials=2", "sweep.max_concurrent=1"]
    return arguments


class Newcomer:
    """Somebody who types commands of the README in a folder of their own.

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


@pytest.mark.parametrize("command", [c for c in COMMANDS if c.startswith("dxmi ")])
def test_a_dxmi_command_of_the_readme_works(newcomer, command):
    """Alone, too: what it uses is made first."""
    assert newcomer.types(command) == 0


def test_files_that_the_readme_promises_are_there_afterwards(newcomer):
    for command in COMMANDS:
        if command.startswith("dxmi sample runs/low-entropy "):
            assert newcomer.types(command) == 0
    assert {"grid.png", "steps.png", "samples.npz", "guided.png"} <= {entry.name for entry in newcomer.home.iterdir()}
    promised = re.findall(r"^\| `([\w.]+/?)` \| ", section("## Look at a run"), re.MULTILINE)
    assert len(promised) == 6
    for name in promised:
        assert (newcomer.home / "runs" / "low-entropy" / name).exists()


def test_files_that_the_readme_promises_of_a_study_are_there_afterwards(newcomer):
    (command,) = (command for command in COMMANDS if made_by(command) == "lr-1")
    assert newcomer.types(command) == 0
    promised = re.findall(r"^\| `([\w./]+)` \| ", section("### What comes out"), re.MULTILINE)
    assert len(promised) == 7
    for name in promised:
        assert (newcomer.home / "studies" / "lr-1" / name.replace("0007", "0001")).exists()


def section(heading: str) -> str:
    """The README from a heading to the next block of commands."""
    return README.split(heading)[1].split("```")[0]


PYTHON = re.findall(r"```python\n(.+?)```", README, flags=re.DOTALL)


@pytest.mark.parametrize(
    ("block", "word", "left"),
    [
        pytest.param(*(PYTHON[0], "sweep.budget.trials=2", "studies/notebook/report.html"), marks=pytest.mark.slow),
        (PYTHON[1], "seed=1", "runs/from-python/summary.json"),
    ],
)
def test_the_python_of_the_readme_works(newcomer, block, word, left):
    tiny = block.replace(f'"{word}"', ", ".join(repr(setting) for setting in [word, *TINY]))
    assert tiny != block
    exec(compile(ast.parse(tiny), "README.md", "exec"), {})
    assert (newcomer.home / left).exists()


def test_the_sweep_file_of_the_readme_plans_a_study(newcomer):
    text, _ = re.findall(r"```yaml\n(.+?)```", README, flags=re.DOTALL)
    (newcomer.home / "my.yaml").write_text(text)
    assert main(["sweep", "sweep=my.yaml", "--dry-run"]) == 0


def test_every_shipped_sweep_is_in_the_readme_with_its_sampler_and_trials():
    names = {"tpe": "TPE", "nsga2": "NSGA-II"}
    for name in sweeps():
        tree = yaml.safe_load((ROOT / "configs" / "sweep" / f"{name}.yaml").read_text())
        (by,) = re.findall(rf"^\| `{name}` \| .+ \| (.+) \|$", README, flags=re.MULTILINE)
        assert by.startswith(f"{names[tree['sampler']['kind']]}, {tree['budget']['trials']} trials")


def test_other_commands_of_the_readme_exist():
    makefile = (ROOT / "Makefile").read_text()
    others = [command for command in COMMANDS if not command.startswith("dxmi ")]
    assert others
    for command in others:
        program, target, *_ = command.split()
        if program == "make":
            assert re.search(rf"^{target}:", makefile, flags=re.MULTILINE)
        else:
            assert (ROOT / target).exists()


def test_the_accuracies_of_the_readme_are_those_of_the_shipped_classifiers():
    for name, shipped in CLASSIFIERS.items():
        (stated,) = re.findall(rf"^\| {name} \| ([\d.]+) %", README, flags=re.MULTILINE)
        assert float(stated) == pytest.approx(100 * shipped.accuracy, abs=0.05)


def test_every_metric_that_is_logged_is_explained():
    documented = set(re.findall(r"`((?:energy|value|policy)/\w+)`", README))
    source = (ROOT / "dxmi" / "algorithms" / "dxmi.py").read_text().split('"""', 2)
    logged = set(re.findall(r'"((?:energy|value|policy)/\w+)"', source[2]))
    assert documented == logged
    assert set(re.findall(r"^    ((?:energy|value|policy)/\w+) ", source[1], flags=re.MULTILINE)) == logged


def test_the_ablation_file_of_the_readme_plans_a_study(newcomer):
    _, text = re.findall(r"```yaml\n(.+?)```", README, flags=re.DOTALL)
    (newcomer.home / "mine.yaml").write_text(text)
    arguments = ["ablate", "experiment=digits", *TINY, "ablation=mine.yaml", "name=planned", "--dry-run"]
    assert main(arguments) == 0
    assert not (newcomer.home / "studies" / "planned").exists()


def test_every_table_of_scores_shows_precision_and_recall():
    """An FID alone hid that precision fell while recall rose."""
    headings = [line for line in README.splitlines() if re.match(r"\| (sampler|arm) \|", line) and "fid" in line]
    assert len(headings) == 2
    assert [line for line in headings if "precision" not in line or "recall" not in line] == []
