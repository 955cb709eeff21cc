"""The argument parser: all commands and their options.

A command is registered by the name of its module and function, which `implementation` imports only when the command
runs, so that `--help` needs neither PyTorch nor Ray.
"""

import argparse
import importlib
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path

from dxmi import __version__
from dxmi.training.config import CHECKPOINTS, EXPORT_FORMATS
from tune.config.files import ablations, groups, sweeps

PICTURED = 64
"""Number of images in a picture of the data."""
_LARGEST = float.fromhex("0x1.fffffep+127")
"""The largest finite number in single precision."""
_INTRO = """\
Shorten a diffusion model to a few sampling steps and fine-tune them with DxMI (arXiv 2407.00626).

Train a model:
  dxmi train experiment=digits                     pretrain, shorten, fine-tune and score (3 minutes on a laptop)
  dxmi train experiment=digits algorithm.entropy_coef=0.03 out=runs/low-entropy
  dxmi train --resume runs/low-entropy             resume an interrupted run
  dxmi sample runs/low-entropy --num 64 --out grid.png
  dxmi evaluate runs/low-entropy
  dxmi export runs/my-unet --format diffusers --out my-unet
  dxmi config experiment=digits                    print every setting with its value
  dxmi data experiment=digits --grid digits.png    describe the data and draw examples

Run a study of many trials:
  dxmi sweep experiment=digits sweep=demo          8 trials, a leaderboard and a report (minutes on a laptop)
  dxmi sweep experiment=digits sweep=learning_rates name=lr-1 --dry-run
  dxmi sweep --resume lr-1                         resume an interrupted study
  dxmi studies                                     list the studies
  dxmi report lr-1                                 rebuild the tables and report.html of a study
  dxmi ui lr-1                                     open a study in the MLflow UI
  dxmi doctor                                      check whether this machine is ready

`dxmi COMMAND --help` describes the options of a command.
"""
_WIDTH = 110
"""Characters in a line of the list of config groups."""

Command = Callable[[argparse.Namespace], int]
"""The implementation of a command; returns the exit code."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """Parse the command line; unlike plain argparse, settings are accepted both before and after options."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    if getattr(args, "from_scratch", False):
        args.overrides = [*args.overrides, "pretrain.shipped=false"]
    return args


def implementation(args: argparse.Namespace) -> Command:
    """Import and return the implementation of the parsed command."""
    module, function = args.implementation
    found: Command = getattr(importlib.import_module(f"tune.cli.{module}"), function)
    return found


class _Commands:
    """The subcommands of a parser; each function below adds one."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(self, name: str, module: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        """Add a command that is implemented by the function of the same name in a module of `tune.cli`."""
        sub = self._commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(implementation=(module, name))
        return sub


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dxmi", description=_INTRO, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"dxmi {__version__}")
    commands = _Commands(parser)
    for add in (
        *(
            _train,
            _sample,
            _evaluate,
            _distill,
            _export,
            _data,
            _config,
            _sweep,
            _ablate,
            _studies,
            _report,
            _ui,
            _submit,
            _fetch,
        ),
        _doctor,
    ):
        add(commands)
    return parser


# ----------------------------------------------------------------------------
# Commands about one run


def _train(commands: _Commands) -> None:
    text = "Run an experiment: pretraining, shortening, fine-tuning and evaluation."
    sub = commands.add("train", "runs", text, _about_overrides())
    _overrides(sub, "Settings to override. out=DIR sets the run folder. With --resume, only resources.* is allowed.")
    _from_scratch(sub)
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--resume", type=Path, metavar="RUN_DIR", help="Resume the interrupted run in this folder.")
    source.add_argument(
        "--config", type=Path, metavar="FILE", help="Read a complete config from a file, such as a study's best.yaml."
    )
    sub.add_argument("--dry-run", action="store_true", help="Print what the run is and how much memory it needs.")


def _distill(commands: _Commands) -> None:
    text = "Distill the policy of a run into fewer steps, and fine-tune these with the run's algorithm."
    sub = commands.add("distill", "runs", text)
    sub.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="Folder of the finished run.")
    sub.add_argument("--steps", type=_positive, default=1, metavar="N", help="Steps of the student (default: 1).")
    _overrides(sub, "Settings of the new run to override. out=DIR sets its folder.")


def _sample(commands: _Commands) -> None:
    sub = commands.add("sample", "runs", "Draw samples from the policy of a run.")
    _run_arguments(sub)
    sub.add_argument("--num", type=_positive, default=64, metavar="N", help="Number of samples (default: 64).")
    sub.add_argument(
        "--label", type=int, metavar="N", help="Sample only this class (default: the class frequencies of the data)."
    )
    sub.add_argument("--steps-grid", action="store_true", help="Save every step of each sample, starting from noise.")
    sub.add_argument(
        "--out",
        type=Path,
        default=Path("samples.png"),
        metavar="FILE",
        help="Output file: a .png grid, or an .npz of uint8 NHWC images or of points (default: samples.png).",
    )


def _evaluate(commands: _Commands) -> None:
    sub = commands.add("evaluate", "runs", "Score the policy of a run.")
    _run_arguments(sub)
    sub.add_argument(
        "--num-samples", type=_positive, metavar="N", help="Number of samples to score (default: as in the run)."
    )
    sub.add_argument("--out", type=Path, metavar="FILE", help="Also write the scores to this JSON file.")
    sub.add_argument(
        "--allow-code", action="store_true", help="Execute the Python file that the run's reward=function names."
    )


def _export(commands: _Commands) -> None:
    sub = commands.add("export", "runs", "Export the policy of a run for use with another library.")
    sub.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="Folder of the run.")
    sub.add_argument(
        "--format",
        choices=EXPORT_FORMATS,
        default="diffusers",
        help="Output format; diffusers: a UNet2DModel and its sampling steps (default: diffusers).",
    )
    _checkpoint_and_device(sub)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="Output folder; it must not exist yet.")


def _data(commands: _Commands) -> None:
    text = "Load the data of an experiment and describe them."
    sub = commands.add("data", "runs", text, _about_overrides())
    _overrides(sub, "Settings to override, as for train.")
    sub.add_argument(
        "--grid",
        type=Path,
        metavar="FILE.png",
        help=f"Draw {PICTURED} labeled images, or points of planar data, to this file.",
    )


def _config(commands: _Commands) -> None:
    text = "Print the resolved config of an experiment as YAML, without running it."
    _overrides(commands.add("config", "config", text, _about_overrides()), "Settings to override, as for train.")


def _about_overrides() -> str:
    options = "\n".join(_option_line(group, names) for group, names in groups().items())
    return (
        "Settings use Hydra's override syntax, key=value. `dxmi config` prints every key with its value.\n"
        f"Config groups and their options:\n\n{options}\n"
    )


def _option_line(group: str, names: Sequence[str]) -> str:
    return textwrap.fill(
        f"{group}={' | '.join(names)}", _WIDTH, initial_indent="  ", subsequent_indent=" " * (len(group) + 3)
    )


def _overrides(sub: argparse.ArgumentParser, text: str) -> None:
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def _from_scratch(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--from-scratch",
        action="store_true",
        help="Pretrain the model here, also if the result of that pretraining ships with the package.",
    )


def _run_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="Folder of the run.")
    sub.add_argument(
        "--guidance",
        type=_finite,
        metavar="S",
        help="Scale of value guidance, a gradient step down the value after each sampling step (default: as in the "
        "run).",
    )
    sub.add_argument(
        "--seed", type=int, metavar="N", help="Seed of the sampling noise (default: the run's evaluation seed)."
    )
    _checkpoint_and_device(sub)


def _checkpoint_and_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--checkpoint", choices=CHECKPOINTS, default="best", help="Checkpoint to load (default: best).")
    sub.add_argument("--device", help="Device: auto, cpu, cuda or cuda:N (default: as in the run).")


# ----------------------------------------------------------------------------
# Commands about studies


def _sweep(commands: _Commands) -> None:
    sub = commands.add(
        "sweep",
        "sweeps",
        "Search hyperparameters in a study of many trials.",
        f"sweep=NAME selects a sweep: {', '.join(sweeps())}, or a path FILE.yaml.\n"
        "name=STUDY names the study. Settings of the sweep are overridden in the same way, for example\n"
        "sweep.budget.trials=8, sweep.sampler.kind=sobol or tracking.uri=http://... All other settings are\n"
        "those of train.\n",
    )
    _overrides(sub, "sweep=NAME, experiment=NAME and any setting to override.")
    _study_options(sub, "Print the trials, search space and estimated time and disk usage, then exit.")


def _ablate(commands: _Commands) -> None:
    sub = commands.add(
        "ablate",
        "sweeps",
        "Compare variants with a baseline over paired seeds, with significance tests.",
        f"ablation=NAME selects an ablation: {', '.join(ablations())}, or a path FILE.yaml.\n"
        "name=STUDY names the study. Settings of the ablation are overridden in the same way, for example\n"
        "ablation.seeds=6 or ablation.generations=3. All other settings are those of train.\n",
    )
    _overrides(sub, "ablation=NAME, experiment=NAME and any setting to override.")
    _study_options(sub, "Print the arms, design, seeds and estimated time, then exit.")


def _study_options(sub: argparse.ArgumentParser, dry_run: str) -> None:
    sub.add_argument(
        "--resume",
        metavar="STUDY",
        help="Resume a study, given by name or folder. Only resources, budgets and tracking may change.",
    )
    sub.add_argument("--dry-run", action="store_true", help=dry_run)
    _from_scratch(sub)
    _studies_argument(sub)


def _studies(commands: _Commands) -> None:
    _studies_argument(commands.add("studies", "studies", "List studies with their states and best scores."))


def _report(commands: _Commands) -> None:
    sub = commands.add("report", "report", "Rebuild the tables and report.html of a study.")
    sub.add_argument("study", metavar="STUDY", help="Name or folder of the study.")
    _studies_argument(sub)


def _ui(commands: _Commands) -> None:
    sub = commands.add(
        "ui",
        "ui",
        "Start the MLflow UI for the local studies.",
        "The server is reachable only from this machine. For each study, the command prints the addresses of the\n"
        "chart of all training curves, of the best checkpoint and of all metrics.\n",
    )
    sub.add_argument(
        "study", nargs="?", metavar="STUDY", help="Name or folder of a study (default: the most recent studies)."
    )
    sub.add_argument(
        "--port", type=_positive, metavar="PORT", help="Port to listen on (default: the first free one from 5000)."
    )
    _studies_argument(sub)


def _submit(commands: _Commands) -> None:
    sub = commands.add(
        "submit",
        "jobs",
        "Run a dxmi command as a job on a Ray cluster; the job does not depend on this terminal.",
        "Example:\n"
        "  dxmi submit --address http://head:8265 -- sweep experiment=digits sweep=demo --studies /shared/studies\n",
    )
    sub.add_argument(
        "command", nargs="*", metavar="COMMAND", help="The dxmi command to run and its arguments, after --."
    )
    sub.add_argument(
        "--address",
        metavar="URL",
        help="Address of the cluster's dashboard (default: $RAY_API_SERVER_ADDRESS, or else this machine's).",
    )
    again = sub.add_mutually_exclusive_group()
    again.add_argument("--attach", metavar="ID", help="Follow the output of a job that was submitted earlier.")
    again.add_argument("--cancel", metavar="ID", help="Cancel a job; a sweep saves its state and can be resumed.")
    sub.add_argument("--no-follow", action="store_true", help="Submit the job, print its ID and exit.")
    sub.add_argument(
        "--env",
        action="append",
        default=[],
        metavar="NAME",
        help="Pass this environment variable to the job; may be given several times.",
    )
    sub.add_argument(
        "--working-dir",
        type=Path,
        default=Path(),
        metavar="DIR",
        help="Checkout to upload (default: the current folder).",
    )
    sub.add_argument(
        "--max-upload-mb",
        type=_positive,
        default=100,
        metavar="N",
        help="Refuse to upload more than this many megabytes (default: 100).",
    )
    sub.add_argument(
        "--no-token",
        action="store_true",
        help="Allow a cluster without token authentication, if its network is otherwise protected.",
    )
    sub.add_argument(
        "--patience",
        type=_positive,
        default=300,
        metavar="S",
        help="Seconds to wait for an unresponsive cluster (default: 300).",
    )


def _fetch(commands: _Commands) -> None:
    sub = commands.add("fetch", "jobs", "Copy a study or a run from resources.storage_path to this machine.")
    sub.add_argument(
        "address", metavar="ADDRESS", help="Address of the study or run, for example s3://bucket/studies/lr-1."
    )
    sub.add_argument(
        "--into", type=Path, default=Path("studies"), metavar="DIR", help="Destination folder (default: ./studies)."
    )
    sub.add_argument("--without-checkpoints", action="store_true", help="Copy only records and images.")


def _doctor(commands: _Commands) -> None:
    _studies_argument(commands.add("doctor", "doctor", "Check whether this machine is ready for a sweep."))


def _studies_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument(
        "--studies",
        type=Path,
        default=Path("studies"),
        metavar="DIR",
        help="Folder that holds the studies (default: ./studies).",
    )


# ----------------------------------------------------------------------------
# Types of arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is less than 1")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not abs(number) <= _LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number in single precision")
    return number
