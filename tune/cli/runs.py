"""`dxmi train | distill | sample | evaluate | export | data`."""

import argparse
import importlib
import io
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path

import numpy as np
from torch import Tensor
from tqdm import tqdm

from dxmi.config import build, to_tree
from dxmi.data.configs import DataConfig
from dxmi.data.dataset import Dataset
from dxmi.data.description import describe, some_of
from dxmi.data.images import Images
from dxmi.errors import UserError, WorkersLostError
from dxmi.persistence.checkpoint import steps_in
from dxmi.persistence.files import write_atomic, write_json
from dxmi.persistence.provenance import device_name
from dxmi.persistence.run_directory import RunDirectory, read_yaml
from dxmi.training.build import Experiment
from dxmi.training.config import ExperimentConfig, ResourcesConfig
from dxmi.training.export import export_diffusers
from dxmi.training.loading import LoadedRun, load_run
from dxmi.training.run import labels_text
from dxmi.training.run import train as train_experiment
from dxmi.training.schema import read_config
from dxmi.training.student import student_config
from dxmi.training.summary import Summary
from dxmi.visualization.pictures import save_labeled_grid
from dxmi.visualization.visualizers import build_visualizer
from tune.cli.exit_codes import OK, STOPPED
from tune.cli.memory import memory_text
from tune.cli.parser import PICTURED
from tune.config.compose import compose_experiment, out_folder, overridden, require_no_stack
from tune.execution.signals import gentle_stop
from tune.messages import complain
from tune.reporting.console import ProgressReporter, show_data, show_result
from tune.reporting.terminal import Terminal
from tune.reporting.text_tables import TextTable

# ----------------------------------------------------------------------------
# train


def train(args: argparse.Namespace) -> int:
    """Run an experiment to its summary, resume one, or describe it with --dry-run."""
    config, out = _resumed(args) if args.resume else _read(args) if args.config else _composed(args)
    if args.dry_run:
        _describe(config, out)
        return OK
    return _train(config, out, "dxmi train")


def _describe(config: ExperimentConfig, out: Path) -> None:
    """Print what a run is and needs."""
    console, table = Terminal(), TextTable(show_header=False)
    require_no_stack(config, "dxmi train")
    experiment = Experiment(config)
    rows = {
        "experiment": f"{config.name}, seed {config.seed} (signature {config.signature})",
        "folder": str(out),
        "device": device_name(experiment.device),
        **_beginning(experiment),
        "fine-tuning": f"{config.train.iterations} iterations of {config.algorithm.kind}, batch of "
        f"{config.train.batch_size}, {config.schedule.num_steps} steps",
        "memory": memory_text(config, is_pretrained=_is_pretrained(experiment)),
    }
    if RunDirectory(out).read_summary() is not None:
        rows["state"] = "finished: nothing would be recomputed"
    for name, value in rows.items():
        table.add_row(name, value)
    console.print(table)
    console.out("Nothing was started and nothing was written.", highlight=False)


def _beginning(experiment: Experiment) -> dict[str, str]:
    """The rows about data and pretraining."""
    try:
        return {"data": experiment.data.name, "pretraining": _pretraining_text(experiment)}
    except UserError as error:
        return {"data": str(error)}


def _is_pretrained(experiment: Experiment) -> bool:
    """Whether the cache or the package holds the pretrained model; not known without the data."""
    try:
        return experiment.pretraining_path.exists() or experiment.shipped is not None
    except UserError:
        return False


def _pretraining_text(experiment: Experiment) -> str:
    pretrain = experiment.config.pretrain
    if experiment.pretraining_path.exists():
        return "none, the cache holds its result"
    if experiment.shipped is not None:
        return f"none, {experiment.shipped.name} ships with the package"
    return f"{pretrain.iterations} iterations, batch of {pretrain.batch_size}"


def distill(args: argparse.Namespace) -> int:
    """Distill the policy of a run into fewer steps, and fine-tune these."""
    stored = read_config(RunDirectory(args.run_dir).read_config())
    student = student_config(stored.config, args.run_dir, args.steps)
    out, others = _split_out(args.overrides)
    config = build(ExperimentConfig, overridden(to_tree(student), others))
    return _train(config, out or _default_out(config), "dxmi distill")


def _train(config: ExperimentConfig, out: Path, command: str) -> int:
    run = RunDirectory(out)
    console = Terminal()
    address, keep = _kept(config, out)
    finished = run.read_summary()
    if finished is None and steps_in(run.checkpoints):
        console.out(f"Resuming the run in {out}.", highlight=False)
    require_no_stack(config, command)
    experiment = Experiment(config)
    if finished is None:
        _ = experiment.data  # indexing a folder takes minutes; Ctrl-C exits at once since there is nothing to save yet
    with ProgressReporter(console) as reporter, gentle_stop(reporter.ask_to_stop):
        if config.resources.num_workers > 1:
            keep()
            summary = _on_workers(experiment, out, reporter, address)
        else:
            try:
                summary = train_experiment(experiment, out=out, report=reporter, saved=lambda _: keep())
            finally:
                keep()
    if summary is None:
        complain(f"stopped and saved. To resume: dxmi train --resume {out}")
        return STOPPED
    if finished is not None:
        console.out(f"The run in {out} is already finished; nothing was recomputed.", highlight=False)
    show_result(console, run, summary)
    return OK


def _kept(config: ExperimentConfig, out: Path) -> tuple[str | None, Callable[[], None]]:
    """Return the address of the run's copy in shared storage, if any, and the function that updates that copy."""
    storage_path = config.resources.storage_path
    if storage_path is None:
        return None, lambda: None
    storage = importlib.import_module("tune.integrations.object_store")  # pyarrow is slow to import
    address = str(storage.join(storage_path, out.resolve().name))
    storage.Remote(address).require_reachable()
    return address, storage.copied(address, out)


def _on_workers(experiment: Experiment, out: Path, reporter: ProgressReporter, address: str | None) -> Summary | None:
    """Run `train` on several workers of a local Ray instance or of the cluster."""
    _ = experiment.data  # errors in the data are reported before Ray starts
    parallel = importlib.import_module("tune.execution.ray_train")  # Ray takes seconds to import
    with parallel.ray_for(experiment.config), gentle_stop(reporter.ask_to_stop):  # ray.init replaces SIGTERM's handler
        try:
            summary: Summary | None = parallel.train_on_workers(
                experiment.config, out=out, report=reporter, address=address
            )
        except WorkersLostError as error:
            write_atomic(out / "error.txt", error.details)
            complain(f"see {out / 'error.txt'} for the tracebacks. To resume: dxmi train --resume {out}")
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
    """Read a complete config from a file; only resources.* and out= may be overridden."""
    out, others = _split_out(args.overrides)
    other = [override for override in others if not override.startswith("resources.")]
    if other:
        raise UserError(f"--config uses the settings of {args.config}: edit it, or leave out {' '.join(other)}.")
    tree = read_yaml(args.config, f"The config {args.config} cannot be read.")
    config = _with_resources(read_config(tree).config, others)
    return config, out or _default_out(config)


def _split_out(overrides: Sequence[str]) -> tuple[Path | None, list[str]]:
    """Return the folder given by out=DIR, if any, and the other overrides."""
    out = [override for override in overrides if override.startswith("out=")]
    return out_folder(out), [override for override in overrides if override not in out]


def _default_out(config: ExperimentConfig) -> Path:
    return Path("runs") / f"{config.name}-{config.signature}"


def _with_resources(config: ExperimentConfig, overrides: Sequence[str]) -> ExperimentConfig:
    tree = to_tree(config)
    return build(ExperimentConfig, {**tree, **overridden({"resources": tree["resources"]}, overrides)})


def _resumed(args: argparse.Namespace) -> tuple[ExperimentConfig, Path]:
    other = [override for override in args.overrides if not override.startswith("resources.")]
    if other:
        raise UserError(f"--resume uses the run's own config: leave out {' '.join(other)}.")
    stored = read_config(RunDirectory(args.resume).read_config())
    stored.require_present(f"The run in {args.resume}")
    return _with_resources(stored.config, args.overrides), args.resume


# ----------------------------------------------------------------------------
# sample, evaluate, data, config


def _loaded_run(args: argparse.Namespace) -> LoadedRun:
    run = RunDirectory(args.run_dir)
    tree = run.read_config()
    if args.device is not None:
        tree["resources"] = {"device": args.device}
    stored = read_config(tree)
    if getattr(args, "allow_code", False):
        stored = stored.permitting_code()
    loaded = load_run(run, stored, args.checkpoint)
    for sentence in loaded.complaints:
        complain(sentence)
    return loaded


def sample(args: argparse.Namespace) -> int:
    """Draw samples from a run's policy and write them to a file."""
    if args.out.suffix not in (".png", ".npz"):
        raise UserError(f"--out is {args.out}: it must end in .png or .npz.")
    _require_folder(args.out)
    loaded = _loaded_run(args)
    states = loaded.states(args.num, args.seed, args.guidance, args.label)
    if args.out.suffix == ".png":
        visualizer = build_visualizer(loaded.experiment.config.data.kind)
        if args.steps_grid:
            visualizer.draw_steps(args.out, states)
        else:
            visualizer.draw_samples(args.out, states[-1])
    else:
        _save_arrays(args.out, states if args.steps_grid else states[-1], loaded.experiment.config.data)
    Terminal().out(f"{args.num} samples of iteration {loaded.step}: {args.out}", highlight=False)
    return OK


def _save_arrays(path: Path, samples: Tensor, data: DataConfig) -> None:
    """Write images as uint8 [..., H, W, C] or points as float32 [..., 2]."""
    buffer = io.BytesIO()
    if data.is_planar:
        np.savez_compressed(buffer, points=samples.cpu().numpy())
    else:
        np.savez_compressed(buffer, images=samples.movedim(-3, -1).cpu().numpy())
    write_atomic(path, buffer.getvalue())


def _require_folder(out: Path, option: str = "--out") -> None:
    if not out.resolve().parent.is_dir():
        raise UserError(f"{option} is {out}: the folder {out.resolve().parent} does not exist.")


def evaluate(args: argparse.Namespace) -> int:
    """Score a run's policy."""
    if args.out is not None:
        _require_folder(args.out)
    loaded = _loaded_run(args)
    num = args.num_samples or loaded.experiment.config.evaluate.num_samples
    with tqdm(total=num, unit="samples", desc="sampling", leave=False, disable=None) as bar:

        def on_batch(samples: int) -> None:
            bar.update(samples - bar.n)

        scores = loaded.scores(args.num_samples, args.seed, args.guidance, on_batch=on_batch)
    table = TextTable("score", title=f"iteration {loaded.step}")
    table.add_column("value", justify="right")
    for key, value in scores.values.items():
        table.add_row(key, f"{value:,.4f}" if value % 1 else f"{value:,.0f}")
    table.add_row("seconds per 1,000 samples", f"{scores.seconds_per_1000:.3f}")
    Terminal().print(table)
    if args.out:
        write_json(args.out, scores.values)
    return OK


def export(args: argparse.Namespace) -> int:
    """Export a run's policy to another library's format."""
    _require_folder(args.out)
    loaded = _loaded_run(args)
    export_diffusers(loaded, args.out)
    Terminal().out(f"Exported the policy of iteration {loaded.step}: {args.out}", highlight=False)
    return OK


def data(args: argparse.Namespace) -> int:
    """Describe the data set of an experiment."""
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
    """Describe how the experiment uses the labels of its data."""
    try:
        used = labels_text(experiment.class_counts, experiment.label_source)
    except UserError as error:
        return str(error)
    if used:
        return f"those of the data for training, {used} for sampling"
    return "not used by any network (network.denoiser.classes is 0)" if experiment.data.num_classes else ""


def _draw_data(path: Path, data: Dataset) -> None:
    """Draw images with their labels, or points over their density."""
    if isinstance(data, Images):
        pixels, labels = some_of(data, PICTURED)
        names = data.class_names
        save_labeled_grid(path, pixels, [""] * len(pixels) if labels is None else [names[label] for label in labels])
    else:
        visualizer = build_visualizer(data.name)
        visualizer.draw_samples(path, some_of(data, visualizer.num_rows)[0])
