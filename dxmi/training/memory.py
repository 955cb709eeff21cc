"""What a run does if its device runs out of memory."""

import gc
from dataclasses import replace

import torch

from dxmi.errors import UserError
from dxmi.training.build import Experiment


def in_smaller_pieces(experiment: Experiment) -> Experiment | None:
    """The experiment with twice as many micro-batches, which changes its results by rounding only.

    None if its batches cannot be divided: several workers would have to agree, and a micro-batch has at least one row.
    """
    config = experiment.config
    pieces = 2 * config.resources.accumulate
    if experiment.workers.size > 1 or pieces > min(config.train.batch_size, config.pretrain.batch_size):
        return None
    return experiment.with_config(replace(config, resources=replace(config.resources, accumulate=pieces)))


def release_memory() -> None:
    """Return the memory of objects that are no longer used to the device."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def iteration_too_large(experiment: Experiment, num_seeds: int) -> UserError:
    """The error of an iteration that does not fit in the memory of the device."""
    config = experiment.config
    if num_seeds > 1:
        advice = f"train fewer seeds together: set resources.stack_seeds to {num_seeds // 2}"
    else:
        advice = (
            f"divide each batch into more than {config.resources.accumulate} pieces with resources.accumulate, or "
            f"lower train.batch_size ({config.train.batch_size}) or pretrain.batch_size ({config.pretrain.batch_size})"
        )
    return UserError(f"{_where(experiment)} ran out of memory in an iteration: {advice}.")


def evaluation_too_large(experiment: Experiment) -> UserError:
    """The error of an evaluation that does not fit in the memory of the device."""
    size = experiment.config.evaluate.batch_size
    return UserError(f"{_where(experiment)} ran out of memory in an evaluation: lower evaluate.batch_size ({size}).")


def _where(experiment: Experiment) -> str:
    """The device, with the memory that PyTorch has reserved on it."""
    if experiment.device.type != "cuda":
        return "The machine"
    reserved = torch.cuda.memory_reserved(experiment.device) / 1e9
    total = torch.cuda.get_device_properties(experiment.device).total_memory / 1e9
    return f"{torch.cuda.get_device_name(experiment.device)} ({reserved:.1f} of {total:.1f} GB held by this process)"
