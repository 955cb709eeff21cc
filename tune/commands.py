"""The commands: `dxmi train | sample | evaluate | config`."""

import argparse
import io
import logging
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import FrameType

import numpy as np
import yaml
from rich.table import Table

from dxmi import __version__
from dxmi.checkpoint import steps_in
from dxmi.config import build, to_tree
from dxmi.errors import DivergedError, UserError
from dxmi.experiment import Experiment, ExperimentConfig
from dxmi.files import write_atomic, write_json
from dxmi.pictures import save_grid, save_steps_grid
from dxmi.run_directory import RunDirectory
from dxmi.train import train
from dxmi.trained import CHECKPOINTS, Trained, load_trained
from tune.configs import compose_experiment, groups
from tune.console import ProgressReporter, Terminal, complain, discard_output, show_result

OK, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130

_INTRO = """\
Cut a diffusion model to a few steps and fine-tune those with DxMI (arXiv 2407.00626).

  dxmi train experiment=digits                     pretrain, shorten, fine-tune, score (3 minutes on a laptop)
  dxmi train experiment=digits algorithm.entropy_coef=0.03 out=runs/low-entropy
  dxmi train --resume runs/low-entropy             go on after an interruption
  dxmi sample runs/low-entropy --num 64 --out grid.png
  dxmi evaluate runs/low-entropy
  dxmi config experiment=digits                    every setting and its value
"""


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 bad input, 130 stopped by a signal."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    args = _parser().parse_args(arguments)
    try:
        return int(args.run(args))
    except UserError as error:
        complain(str(error))
        return BAD_INPUT
    except DivergedError as error:
        complain(str(error))
        return FAILED
    except BrokenPipeError:  # the reader of our output has left, as in `dxmi config | head`
        discard_output()
        return FAILED
    except OSError as error:
        complain(f"{error.filename or 'A file'} could not be read or written: {error.strerror or error}.")
        return FAILED


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        prog="dxmi", description=_INTRO, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--version", action="version", version=f"dxmi {__version__}")
    commands = parser.add_subparsers(title="commands", required=True, metavar="COMMAND")
    options = "\n".join(f"  {group}={' | '.join(names)}" for group, names in groups().items())
    overrides = f"overrides are key=value in Hydra's grammar; see `dxmi config` for every key. Groups:\n\n{options}\n"

    def command(name: str, run: Callable[[argparse.Namespace], int], text: str, epilog: str) -> argparse.ArgumentParser:
        sub = commands.add_parser(
            name, help=text, description=text, epilog=epilog, formatter_class=argparse.RawDescriptionHelpFormatter
        )
        sub.set_defaults(run=run)
        return sub

    sub = command("train", _train, "run an experiment from pretraining to its summary", overrides)
    sub.add_argument(
        "overrides",
        nargs="*",
        metavar="key=value",
        help="settings; out=DIR chooses the run folder; with --resume only resources.*",
    )
    sub.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with an interrupted run")

    sub = command("sample", _sample, "draw images from a run's policy", "")
    _run_arguments(sub)
    sub.add_argument("--num", type=_positive, default=64, help="how many images (default 64)")
    sub.add_argument("--steps-grid", action="store_true", help="every step of each sample, noise first")
    sub.add_argument("--out", type=Path, default=Path("samples.png"), help="a .png grid or an .npz of uint8 NHWC")

    sub = command("evaluate", _evaluate, "score a run's policy", "")
    _run_arguments(sub)
    sub.add_argument("--num-samples", type=_positive, help="samples to score (default: as the run did)")
    sub.add_argument("--out", type=Path, help="write the scores to this .json too")

    sub = command("config", _config, "print what would run", overrides)
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    return parser


def _run_arguments(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run")
    sub.add_argument("--checkpoint", choices=CHECKPOINTS, default="best", help="which policy (default best)")
    sub.add_argument(
        "--guidance", type=_finite, default=0.0, metavar="S", help="value guidance: after each step descend the value"
    )
    sub.add_argument("--seed", type=int, help="of the noise (default: the run's evaluation seed)")
    sub.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: as the run)")


def _positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"{number} is not at least 1")
    return number


def _finite(text: str) -> float:
    number = float(text)
    if not np.isfinite(number):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number")
    return number


# ----------------------------------------------------------------------------
# train


def _train(args: argparse.Namespace) -> int:
    config, out = _resumed(args) if args.resume else _composed(args)
    run = RunDirectory(out)
    console = Terminal()
    finished = run.read_summary()
    if finished is None and steps_in(run.checkpoints):
        console.out(f"Going on with the run in {out}.", highlight=False)
    experiment = Experiment(config)
    with ProgressReporter(console) as reporter, _stops_gently(reporter):
        summary = train(experiment, out=out, report=reporter)
    if summary is None:
        complain(f"stopped and saved. Go on with: dxmi train --resume {out}")
        return STOPPED
    if finished is not None:
        console.out(f"This run has finished before; nothing was done again. Its folder is {out}.", highlight=False)
    show_result(console, run, summary)
    return OK


def _composed(args: argparse.Namespace) -> tuple[ExperimentConfig, Path]:
    composed = compose_experiment(args.overrides)
    config = composed.experiment
    return config, composed.out or Path("runs") / f"{config.name}-{config.signature}"


def _resumed(args: argparse.Namespace) -> tuple[ExperimentConfig, Path]:
    other = [override for override in args.overrides if not override.startswith("resources.")]
    if other:
        raise UserError(f"--resume goes on with the run's own config: leave out {' '.join(other)}.")
    tree = RunDirectory(args.resume).read_config()
    resources = {}
    for override in args.overrides:
        key, _, value = override.removeprefix("resources.").partition("=")
        resources[key] = yaml.safe_load(value)
    return build(ExperimentConfig, {**tree, "resources": {**tree.get("resources", {}), **resources}}), args.resume


@contextmanager
def _stops_gently(reporter: ProgressReporter) -> Iterator[None]:
    """The first Ctrl-C or SIGTERM asks the run to save and return; the second stops at once."""

    def handle(_signal: int, _frame: FrameType | None) -> None:
        if reporter.stop:
            raise KeyboardInterrupt
        reporter.stop = True
        complain("saving, then stopping; once more to stop at once.")

    before = {number: signal.signal(number, handle) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


# ----------------------------------------------------------------------------
# sample, evaluate, config


def _trained(args: argparse.Namespace) -> Trained:
    run = RunDirectory(args.run_dir)
    tree = run.read_config()
    if args.device is not None:
        tree["resources"] = {"device": args.device}
    trained = load_trained(run, build(ExperimentConfig, tree), args.checkpoint)
    for sentence in trained.complaints:
        complain(sentence)
    return trained


def _sample(args: argparse.Namespace) -> int:
    if args.out.suffix not in (".png", ".npz"):
        raise UserError(f"--out is {args.out}: it must end in .png or .npz.")
    _require_folder(args.out)
    trained = _trained(args)
    states = trained.states(args.num, args.seed, args.guidance)
    pixels = states if args.steps_grid else states[-1]
    if args.out.suffix == ".png":
        (save_steps_grid if args.steps_grid else save_grid)(args.out, pixels)
    else:
        buffer = io.BytesIO()
        np.savez_compressed(buffer, images=pixels.movedim(-3, -1).cpu().numpy())
        write_atomic(args.out, buffer.getvalue())
    Terminal().out(f"{args.num} samples of iteration {trained.step}: {args.out}", highlight=False)
    return OK


def _require_folder(out: Path) -> None:
    if not out.resolve().parent.is_dir():
        raise UserError(f"--out is {out}: the folder {out.resolve().parent} does not exist.")


def _evaluate(args: argparse.Namespace) -> int:
    if args.out is not None:
        _require_folder(args.out)
    trained = _trained(args)
    scores = trained.scores(args.num_samples, args.seed, args.guidance)
    table = Table("score", "value", title=f"iteration {trained.step}")
    for key, value in scores.values.items():
        table.add_row(key, f"{value:,.4f}" if value % 1 else f"{value:,.0f}")
    table.add_row("seconds for 1,000 images", f"{scores.seconds_per_1000:.3f}")
    Terminal().print(table)
    if args.out:
        write_json(args.out, scores.values)
    return OK


def _config(args: argparse.Namespace) -> int:
    composed = compose_experiment(args.overrides)
    print(f"# signature {composed.experiment.signature}")
    print(yaml.safe_dump(to_tree(composed.experiment), sort_keys=False), end="")
    return OK
