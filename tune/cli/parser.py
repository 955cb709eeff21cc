"""The command line: its commands and their options.

A command is named here by its module and function, which `implementation` imports when it is run: help needs neither
PyTorch nor Ray.
"""

import argparse
import importlib
from collections.abc import Callable, Sequence
from pathlib import Path

from dxmi import __version__
from dxmi.training.config import CHECKPOINTS, EXPORT_FORMATS
from tune.config.files import ablations, groups, sweeps

PICTURED = 64
"""Images in a picture of the data."""
_LARGEST = float.fromhex("0x1.fffffep+127")
"""Of single precision."""
_INTRO = """\
Cut a diffusion model to a few steps and fine-tune those with DxMI (arXiv 2407.00626).

  dxmi train experiment=digits                     pretrain, shorten, fine-tune, score (3 minutes on a laptop)
  dxmi train experiment=digits algorithm.entropy_coef=0.03 out=runs/low-entropy
  dxmi train --resume runs/low-entropy             go on after an interruption
  dxmi sample runs/low-entropy --num 64 --out grid.png
  dxmi evaluate runs/low-entropy
  dxmi export runs/my-unet --format diffusers --out my-unet
  dxmi config experiment=digits                    every setting and its value
  dxmi data experiment=digits --grid digits.png    what the data hold, and how they look

  dxmi sweep experiment=digits sweep=demo          eight trials, a leaderboard and a report (minutes on a laptop)
  dxmi sweep experiment=digits sweep=learning_rates name=lr-1 --dry-run
  dxmi sweep --resume lr-1                         go on after an interruption
  dxmi studies | dxmi report lr-1 | dxmi ui lr-1   what there is, its report, its curves in MLflow
  dxmi doctor                                      is this machine ready?
"""

Command = Callable[[argparse.Namespace], int]
"""What runs a command; it returns the exit code."""


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; settings may stand before and after options, which argparse alone would refuse."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


def implementation(args: argparse.Namespace) -> Command:
    """What runs the command that was parsed, imported here."""
    module, function = args.implementation
    found: Command = getattr(importlib.import_module(f"tune.cli.{module}"), function)
    return found


class _Commands:
    """The commands of a parser, to which each function below adds one."""

    def __init__(self, parser: argparse.ArgumentParser) -> None:
        self._commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")

    def add(self, name: str, module: str, text: str, epilog: str = "") -> argparse.ArgumentParser:
        """A command, which the function of its name in a module of `tune.cli` runs."""
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
    sub = commands.add("train", "runs", "run an experiment from pretraining to its summary", _about_overrides())
    _overrides(sub, "settings; out=DIR chooses the run folder; with --resume only resources.*")
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with an interrupted run")
    source.add_argument("--config", type=Path, metavar="FILE", help="a whole config, like a study's best.yaml")


def _sample(commands: _Commands) -> None:
    sub = commands.add("sample", "runs", "draw samples from a run's policy")
    _run_arguments(sub)
    sub.add_argument("--num", type=_positive, default=64, help="how many (default 64)")
    sub.add_argument("--label", type=int, metavar="N", help="of this class alone (default: as often as in the data)")
    sub.add_argument("--steps-grid", action="store_true", help="every step of each sample, noise first")
    sub.add_argument(
        "--out", type=Path, default=Path("samples.png"), help="a .png, or an .npz of uint8 NHWC or of points"
    )


def _evaluate(commands: _Commands) -> None:
    sub = commands.add("evaluate", "runs", "score a run's policy")
    _run_arguments(sub)
    sub.add_argument("--num-samples", type=_positive, help="samples to score (default: as the run did)")
    sub.add_argument("--out", type=Path, help="write the scores to this .json too")


def _export(commands: _Commands) -> None:
    sub = commands.add("export", "runs", "write a run's policy for use elsewhere")
    sub.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run")
    sub.add_argument(
        "--format", choices=EXPORT_FORMATS, default="diffusers", help="diffusers: a UNet2DModel and its few steps"
    )
    _checkpoint_and_device(sub)
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")


def _data(commands: _Commands) -> None:
    text = "read the data of an experiment and print what was found"
    sub = commands.add("data", "runs", text, _about_overrides())
    _overrides(sub, "settings, as for train")
    sub.add_argument(
        "--grid", type=Path, metavar="FILE.png", help=f"draw {PICTURED} samples with their labels, or points"
    )


def _config(commands: _Commands) -> None:
    _overrides(commands.add("config", "config", "print what would run", _about_overrides()), None)


def _about_overrides() -> str:
    options = "\n".join(f"  {group}={' | '.join(names)}" for group, names in groups().items())
    return f"overrides are key=value in Hydra's grammar; see `dxmi config` for every key. Groups:\n\n{options}\n"


def _overrides(sub: argparse.ArgumentParser, text: str | None) -> None:
    sub.add_argument("overrides", nargs="*", metavar="key=value", help=text)


def _run_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run")
    sub.add_argument(
        "--guidance", type=_finite, default=0.0, metavar="S", help="value guidance: after each step descend the value"
    )
    sub.add_argument("--seed", type=int, help="of the noise (default: the run's evaluation seed)")
    _checkpoint_and_device(sub)


def _checkpoint_and_device(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--checkpoint", choices=CHECKPOINTS, default="best", help="which policy (default best)")
    sub.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: as the run)")


# ----------------------------------------------------------------------------
# Commands about studies


def _sweep(commands: _Commands) -> None:
    sub = commands.add(
        "sweep",
        "sweeps",
        "run a study of many trials",
        f"sweep=NAME is one of {', '.join(sweeps())}, or FILE.yaml; name=STUDY names the study;\n"
        "sweep.budget.trials=8, sweep.sampler.kind=sobol, tracking.uri=http://... and the like change one setting;\n"
        "the rest as for train.\n",
    )
    _overrides(sub, "sweep=NAME, experiment=NAME, any setting")
    _study_options(sub, "print trials, space, time and disk, and start nothing")


def _ablate(commands: _Commands) -> None:
    sub = commands.add(
        "ablate",
        "sweeps",
        "compare arms with a baseline, seed by seed, and say how sure it is",
        f"ablation=NAME is one of {', '.join(ablations())}, or FILE.yaml; name=STUDY names the study;\n"
        "ablation.seeds=6, ablation.generations=3 and the like change one setting; the rest as for train.\n",
    )
    _overrides(sub, "ablation=NAME, experiment=NAME, any setting")
    _study_options(sub, "print arms, design, seeds and time, and start nothing")


def _study_options(sub: argparse.ArgumentParser, dry_run: str) -> None:
    sub.add_argument("--resume", metavar="STUDY", help="go on with a study; only budgets and resources may change")
    sub.add_argument("--dry-run", action="store_true", help=dry_run)
    _studies_argument(sub)


def _studies(commands: _Commands) -> None:
    _studies_argument(commands.add("studies", "studies", "list studies and their states"))


def _report(commands: _Commands) -> None:
    sub = commands.add("report", "report", "write a study's tables and report.html anew")
    sub.add_argument("study", metavar="STUDY", help="name or folder of a study")
    _studies_argument(sub)


def _ui(commands: _Commands) -> None:
    sub = commands.add(
        "ui",
        "ui",
        "open MLflow's page on the studies here, on this machine only",
        "It prints the addresses of each study's curves in one chart, of its best checkpoint and of all its metrics.\n",
    )
    sub.add_argument("study", nargs="?", metavar="STUDY", help="name or folder of a study (default: the newest ones)")
    sub.add_argument("--port", type=_positive, help="to listen on (default: the first free one from 5000 on)")
    _studies_argument(sub)


def _submit(commands: _Commands) -> None:
    sub = commands.add(
        "submit",
        "jobs",
        "run a command on a Ray cluster, as a job that outlives this terminal",
        "dxmi submit --address http://head:8265 -- sweep experiment=digits sweep=demo --studies /shared/studies\n",
    )
    sub.add_argument("command", nargs="*", metavar="COMMAND", help="after --: a command of dxmi with its arguments")
    sub.add_argument("--address", help="of the cluster's dashboard (default: RAY_API_SERVER_ADDRESS or this machine's)")
    again = sub.add_mutually_exclusive_group()
    again.add_argument("--attach", metavar="ID", help="follow a job that was submitted before")
    again.add_argument("--cancel", metavar="ID", help="end a job; a sweep saves first and can be resumed")
    sub.add_argument("--no-follow", action="store_true", help="submit, print the id, and return")
    sub.add_argument("--env", action="append", default=[], metavar="NAME", help="pass this variable on; repeatable")
    sub.add_argument("--working-dir", type=Path, default=Path(), metavar="DIR", help="the checkout (.)")
    sub.add_argument("--max-upload-mb", type=_positive, default=100, metavar="N", help="refuse a larger tree (100)")
    sub.add_argument("--no-token", action="store_true", help="the cluster wants no token, and is protected otherwise")
    sub.add_argument("--patience", type=_positive, default=300, metavar="S", help="wait for a silent cluster (300 s)")


def _fetch(commands: _Commands) -> None:
    sub = commands.add("fetch", "jobs", "copy a study or a run from resources.storage_path to this machine")
    sub.add_argument("address", metavar="ADDRESS", help="of the study or run, like s3://bucket/studies/lr-1")
    sub.add_argument("--into", type=Path, default=Path("studies"), metavar="DIR", help="where to (./studies)")
    sub.add_argument("--without-checkpoints", action="store_true", help="records and pictures alone")


def _doctor(commands: _Commands) -> None:
    _studies_argument(commands.add("doctor", "doctor", "is this machine ready for a sweep?"))


def _studies_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--studies", type=Path, default=Path("studies"), metavar="DIR", help="their folder (./studies)")


# ----------------------------------------------------------------------------
# Types of arguments


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not abs(number) <= _LARGEST:
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of single precision")
    return number
