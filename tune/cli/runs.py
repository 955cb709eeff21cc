"""The commands: `dxmi train | sample | evaluate | export | data | config`, and those of `tune.cli.studies`."""

import argparse
import errno
import importlib
import io
import logging
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
import yaml
from torch import Tensor
from tqdm import tqdm

from dxmi import __version__
from dxmi.config import build, to_tree
from dxmi.data.configs import DataConfig
from dxmi.data.dataset import Dataset
from dxmi.data.description import describe, some_of
from dxmi.data.images import Images
from dxmi.errors import DivergedError, UserError, WorkersLostError
from dxmi.persistence.checkpoint import steps_in
from dxmi.persistence.files import require_target, write_atomic, write_json
from dxmi.persistence.run_directory import RunDirectory, read_yaml
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig, ResourcesConfig
from dxmi.training.export import FORMATS, export_diffusers
from dxmi.training.loading import CHECKPOINTS, Trained, load_trained
from dxmi.training.run import Summary, labels_text, train
from dxmi.visualization.galleries import build_gallery
from dxmi.visualization.pictures import save_labelled_grid
from tune.config.compose import ablations, compose_experiment, groups, out_folder, overridden, require_no_stack, sweeps
from tune.execution.signals import gentle_stop
from tune.messages import complain, discard_output
from tune.reporting.console import ProgressReporter, Terminal, show_data, show_result
from tune.reporting.text_tables import TextTable

OK, FAILED, BAD_INPUT, STOPPED = 0, 1, 2, 130
_SHOWN = 64
"""Images in a picture of the data."""

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


def run(arguments: Sequence[str] | None = None) -> int:
    """Run one command; returns its exit code: 0 done, 1 failed, 2 bad input, 130 stopped by a signal."""
    logging.getLogger("matplotlib").setLevel(logging.WARNING)
    args = _parse(arguments)
    try:
        for option, value in vars(args).items():
            if isinstance(value, Path):
                require_target(value, option if option == "run_dir" else f"--{option.replace('_', '-')}")
        return int(args.run(args))
    except UserError as error:
        complain(str(error))
        return BAD_INPUT
    except (DivergedError, WorkersLostError) as error:
        complain(str(error))
        return FAILED
    except BrokenPipeError:  # the reader of our output has left, as in `dxmi config | head`
        discard_output()
        return FAILED
    except OSError as error:
        if error.filename is None:  # no file of the user's
            raise
        complain(f"{error.filename} could not be read or written: {error.strerror or error}.{_advice(error)}")
        return FAILED


def _advice(error: OSError) -> str:
    full = error.errno in (errno.ENOSPC, errno.EDQUOT)
    return " What was saved before is whole: free some space and go on with --resume." if full else ""


def _parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    """The parsed command line; settings may stand before and after options, which argparse alone would refuse."""
    parser = _parser()
    args, rest = parser.parse_known_args(arguments)
    unknown = [word for word in rest if word.startswith("-") or not hasattr(args, "overrides")]
    if unknown:
        parser.error(f"unrecognized arguments: {' '.join(unknown)}")
    if rest:
        args.overrides = [*args.overrides, *rest]
    return args


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
    source = sub.add_mutually_exclusive_group()
    source.add_argument("--resume", type=Path, metavar="RUN_DIR", help="go on with an interrupted run")
    source.add_argument("--config", type=Path, metavar="FILE", help="a whole config, like a study's best.yaml")

    sub = command("sample", _sample, "draw samples from a run's policy", "")
    _run_arguments(sub)
    sub.add_argument("--num", type=_positive, default=64, help="how many (default 64)")
    sub.add_argument("--label", type=int, metavar="N", help="of this class alone (default: as often as in the data)")
    sub.add_argument("--steps-grid", action="store_true", help="every step of each sample, noise first")
    sub.add_argument(
        "--out", type=Path, default=Path("samples.png"), help="a .png, or an .npz of uint8 NHWC or of points"
    )

    sub = command("evaluate", _evaluate, "score a run's policy", "")
    _run_arguments(sub)
    sub.add_argument("--num-samples", type=_positive, help="samples to score (default: as the run did)")
    sub.add_argument("--out", type=Path, help="write the scores to this .json too")

    sub = command("export", _export, "write a run's policy for use elsewhere", "")
    sub.add_argument("run_dir", type=Path, metavar="RUN_DIR", help="folder of a run")
    sub.add_argument(
        "--format", choices=FORMATS, default="diffusers", help="diffusers: a UNet2DModel and its few steps"
    )
    sub.add_argument("--checkpoint", choices=CHECKPOINTS, default="best", help="which policy (default best)")
    sub.add_argument("--device", help="auto, cpu, cuda or cuda:N (default: as the run)")
    sub.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that is not there yet")

    sub = command("data", _data, "read the data of an experiment and print what was found", overrides)
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="settings, as for train")
    sub.add_argument(
        "--grid", type=Path, metavar="FILE.png", help=f"draw {_SHOWN} samples with their labels, or points"
    )

    sub = command("config", _config, "print what would run", overrides)
    sub.add_argument("overrides", nargs="*", metavar="key=value")
    _study_commands(command)
    return parser


def _study_commands(command: Callable[..., argparse.ArgumentParser]) -> None:
    """The commands around studies."""
    names = ", ".join(sweeps())
    sub = command(
        "sweep",
        _later("sweep"),
        "run a study of many trials",
        f"sweep=NAME is one of {names}, or FILE.yaml; name=STUDY names the study; sweep.budget.trials=8,\n"
        "sweep.sampler.kind=sobol, tracking.uri=http://... and the like change one setting; the rest as for train.\n",
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="sweep=NAME, experiment=NAME, any setting")
    sub.add_argument("--resume", metavar="STUDY", help="go on with a study; only budgets and resources may change")
    sub.add_argument("--dry-run", action="store_true", help="print trials, space, time and disk, and start nothing")
    _studies_argument(sub)

    sub = command(
        "ablate",
        _later("ablate"),
        "compare arms with a baseline, seed by seed, and say how sure it is",
        f"ablation=NAME is one of {', '.join(ablations())}, or FILE.yaml; name=STUDY names the study;\n"
        "ablation.seeds=6, ablation.generations=3 and the like change one setting; the rest as for train.\n",
    )
    sub.add_argument("overrides", nargs="*", metavar="key=value", help="ablation=NAME, experiment=NAME, any setting")
    sub.add_argument("--resume", metavar="STUDY", help="go on with a study; only budgets and resources may change")
    sub.add_argument("--dry-run", action="store_true", help="print arms, design, seeds and time, and start nothing")
    _studies_argument(sub)

    _studies_argument(command("studies", _later("studies"), "list studies and their states", ""))

    sub = command("report", _later("report"), "write a study's tables and report.html anew", "")
    sub.add_argument("study", metavar="STUDY", help="name or folder of a study")
    _studies_argument(sub)

    sub = command(
        "ui",
        _later("ui"),
        "open MLflow's page on the studies here, on this machine only",
        "It prints the addresses of each study's curves in one chart, of its best checkpoint and of all its metrics.\n",
    )
    sub.add_argument("study", nargs="?", metavar="STUDY", help="name or folder of a study (default: the newest ones)")
    sub.add_argument("--port", type=_positive, help="to listen on (default: the first free one from 5000 on)")
    _studies_argument(sub)

    sub = command(
        "submit",
        _later("submit"),
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

    sub = command("fetch", _later("fetch"), "copy a study or a run from resources.storage_path to this machine", "")
    sub.add_argument("address", metavar="ADDRESS", help="of the study or run, like s3://bucket/studies/lr-1")
    sub.add_argument("--into", type=Path, default=Path("studies"), metavar="DIR", help="where to (./studies)")
    sub.add_argument("--without-checkpoints", action="store_true", help="records and pictures alone")

    _studies_argument(command("doctor", _later("doctor"), "is this machine ready for a sweep?", ""))


def _studies_argument(sub: argparse.ArgumentParser) -> None:
    sub.add_argument("--studies", type=Path, default=Path("studies"), metavar="DIR", help="their folder (./studies)")


def _later(name: str) -> Callable[[argparse.Namespace], int]:
    """A command of `tune.cli.studies`, imported when it runs: Ray, Optuna and MLflow take seconds."""

    def run(args: argparse.Namespace) -> int:
        return int(getattr(importlib.import_module("tune.cli.studies"), name)(args))

    return run


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
    if not abs(number) <= float(np.finfo(np.float32).max):
        raise argparse.ArgumentTypeError(f"{text} is not a finite number of single precision")
    return number


# ----------------------------------------------------------------------------
# train


def _train(args: argparse.Namespace) -> int:
    config, out = _resumed(args) if args.resume else _read(args) if args.config else _composed(args)
    run = RunDirectory(out)
    console = Terminal()
    address, keep = _kept(config, out)
    finished = run.read_summary()
    if finished is None and steps_in(run.checkpoints):
        console.out(f"Going on with the run in {out}.", highlight=False)
    require_no_stack(config, "dxmi train")
    experiment = Experiment(config)
    if finished is None:
        _ = experiment.data  # the map of a folder takes minutes, in which Ctrl-C ends at once: there is nothing to save
    with ProgressReporter(console) as reporter, gentle_stop(reporter.ask_to_stop):
        if config.resources.num_workers > 1:
            keep()
            summary = _on_workers(experiment, out, reporter, address)
        else:
            try:
                summary = train(experiment, out=out, report=reporter, saved=lambda _: keep())
            finally:
                keep()
    if summary is None:
        complain(f"stopped and saved. Go on with: dxmi train --resume {out}")
        return STOPPED
    if finished is not None:
        console.out(f"This run has finished before; nothing was done again. Its folder is {out}.", highlight=False)
    show_result(console, run, summary)
    return OK


def _kept(config: ExperimentConfig, out: Path) -> tuple[str | None, Callable[[], None]]:
    """Where the run is kept beside its folder, and what copies it there."""
    storage_path = config.resources.storage_path
    if storage_path is None:
        return None, lambda: None
    storage = importlib.import_module("tune.integrations.object_store")  # pyarrow takes a while
    address = str(storage.join(storage_path, out.resolve().name))
    storage.Remote(address).require_reachable()
    return address, storage.copied(address, out)


def _on_workers(experiment: Experiment, out: Path, reporter: ProgressReporter, address: str | None) -> Summary | None:
    """`train` on several processes of a Ray of its own, or on the cluster's."""
    _ = experiment.data  # what is wrong with the data is said before anything starts
    parallel = importlib.import_module("tune.execution.ray_train")  # Ray takes seconds
    with parallel.ray_for(experiment.config), gentle_stop(reporter.ask_to_stop):  # Ray's start takes SIGTERM for itself
        try:
            summary: Summary | None = parallel.train_on_workers(
                experiment.config, out=out, report=reporter, address=address
            )
        except WorkersLostError as error:
            write_atomic(out / "error.txt", error.details)
            complain(f"tracebacks are in {out / 'error.txt'}. Go on with: dxmi train --resume {out}")
            raise
        finally:
            if address is not None:
                importlib.import_module("tune.integrations.object_store").Remote(address).pull(out)
    return summary


def _composed(args: argparse.Namespace) -> tuple[ExperimentConfig, Path]:
    composed = compose_experiment(args.overrides)
    config = composed.experiment
    return config, composed.out or _default_out(config)


def _read(args: argparse.Namespace) -> tuple[ExperimentConfig, Path]:
    """A whole config from a file; only resources.* and out= may be added."""
    out = [override for override in args.overrides if override.startswith("out=")]
    other = [o for o in args.overrides if not o.startswith(("resources.", "out="))]
    if other:
        raise UserError(f"--config runs the config in {args.config}: change it there, or leave out {' '.join(other)}.")
    tree = read_yaml(args.config, f"The config {args.config} cannot be read.")
    config = _with_resources(build(ExperimentConfig, tree), [o for o in args.overrides if o not in out])
    return config, out_folder(out) or _default_out(config)


def _default_out(config: ExperimentConfig) -> Path:
    return Path("runs") / f"{config.name}-{config.signature}"


def _with_resources(config: ExperimentConfig, overrides: Sequence[str]) -> ExperimentConfig:
    tree = to_tree(config)
    return build(ExperimentConfig, {**tree, **overridden({"resources": tree["resources"]}, overrides)})


def _resumed(args: argparse.Namespace) -> tuple[ExperimentConfig, Path]:
    other = [override for override in args.overrides if not override.startswith("resources.")]
    if other:
        raise UserError(f"--resume goes on with the run's own config: leave out {' '.join(other)}.")
    config = build(ExperimentConfig, RunDirectory(args.resume).read_config())
    return _with_resources(config, args.overrides), args.resume


# ----------------------------------------------------------------------------
# sample, evaluate, data, config


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
    states = trained.states(args.num, args.seed, args.guidance, args.label)
    if args.out.suffix == ".png":
        gallery = build_gallery(trained.experiment.config.data.name)
        if args.steps_grid:
            gallery.draw_steps(args.out, states)
        else:
            gallery.draw_samples(args.out, states[-1])
    else:
        _save_arrays(args.out, states if args.steps_grid else states[-1], trained.experiment.config.data)
    Terminal().out(f"{args.num} samples of iteration {trained.step}: {args.out}", highlight=False)
    return OK


def _save_arrays(path: Path, samples: Tensor, data: DataConfig) -> None:
    """Images as uint8 [..., H, W, C], points as float32 [..., 2]."""
    buffer = io.BytesIO()
    if data.is_planar:
        np.savez_compressed(buffer, points=samples.cpu().numpy())
    else:
        np.savez_compressed(buffer, images=samples.movedim(-3, -1).cpu().numpy())
    write_atomic(path, buffer.getvalue())


def _require_folder(out: Path, option: str = "--out") -> None:
    if not out.resolve().parent.is_dir():
        raise UserError(f"{option} is {out}: the folder {out.resolve().parent} does not exist.")


def _evaluate(args: argparse.Namespace) -> int:
    if args.out is not None:
        _require_folder(args.out)
    trained = _trained(args)
    num = args.num_samples or trained.experiment.config.evaluate.num_samples
    with tqdm(total=num, unit="samples", desc="sampling", leave=False, disable=None) as bar:

        def on_batch(samples: int) -> None:
            bar.update(samples - bar.n)

        scores = trained.scores(args.num_samples, args.seed, args.guidance, on_batch=on_batch)
    table = TextTable("score", title=f"iteration {trained.step}")
    table.add_column("value", justify="right")
    for key, value in scores.values.items():
        table.add_row(key, f"{value:,.4f}" if value % 1 else f"{value:,.0f}")
    table.add_row("seconds for 1,000 samples", f"{scores.seconds_per_1000:.3f}")
    Terminal().print(table)
    if args.out:
        write_json(args.out, scores.values)
    return OK


def _export(args: argparse.Namespace) -> int:
    _require_folder(args.out)
    trained = _trained(args)
    export_diffusers(trained, args.out)
    Terminal().out(f"The policy that counts as the best, of iteration {trained.step}: {args.out}", highlight=False)
    return OK


def _data(args: argparse.Namespace) -> int:
    config = compose_experiment(args.overrides).experiment
    if args.grid is not None:
        if args.grid.suffix != ".png":
            raise UserError(f"--grid is {args.grid}: it must end in .png.")
        _require_folder(args.grid, "--grid")
    experiment = Experiment(replace(config, resources=ResourcesConfig(device="cpu")))
    show_data(Terminal(), describe(experiment.data), _labels_of(experiment))
    if args.grid is not None:
        _draw_data(args.grid, experiment.data)
        Terminal().out(f"picture:    {args.grid}", highlight=False)
    return OK


def _labels_of(experiment: Experiment) -> str:
    """What becomes of the labels in this experiment."""
    try:
        used = labels_text(experiment.class_counts)
    except UserError as error:
        return str(error)
    if used:
        return f"those of training are the data's, those of samples are {used}"
    return "given to no network (network.denoiser.classes is 0)" if experiment.data.num_classes else ""


def _draw_data(path: Path, data: Dataset) -> None:
    """Images with their labels, or points over their density."""
    if isinstance(data, Images):
        pixels, labels = some_of(data, _SHOWN)
        names = data.class_names
        save_labelled_grid(path, pixels, [""] * len(pixels) if labels is None else [names[label] for label in labels])
    else:
        gallery = build_gallery(data.name)
        gallery.draw_samples(path, some_of(data, gallery.num_ways)[0])


def _config(args: argparse.Namespace) -> int:
    composed = compose_experiment(args.overrides)
    print(f"# signature {composed.experiment.signature}")
    print(yaml.safe_dump(to_tree(composed.experiment), sort_keys=False), end="")
    return OK
