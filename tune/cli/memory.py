"""How much memory training takes, for the dry runs of the command line."""

import torch

from dxmi.training.config import ExperimentConfig
from dxmi.training.footprint import footprint

_SPARE = 0.95
"""Share of a GPU's memory that the tensors of an iteration may fill."""


def memory_text(config: ExperimentConfig, *, is_pretrained: bool = False) -> str:
    """Describe the memory that each worker of a run needs, with advice if its GPU does not have it.

    Args:
        config: Config of the run.
        is_pretrained: Whether the pretrained model exists already.
    """
    need = footprint(config)
    parts = {"pretraining": need.pretraining, "fine-tuning": need.finetuning}
    if is_pretrained:
        del parts["pretraining"]
    known = {phase: size for phase, size in parts.items() if size is not None}
    if need.finetuning is None:
        return "not estimated: an operation of an iteration depends on values"
    each = " of each worker" if config.resources.num_workers > 1 else ""
    sizes = " and ".join(f"{_text(size)} in {phase}" for phase, size in known.items())
    return f"about {sizes}{each}, for the tensors of an iteration{_advice(max(known.values()), config)}"


def _text(size: int) -> str:
    if size < 1e9:
        return f"{size / 1e6:.0f} MB"
    return f"{size / 1e9:.1f} GB"


def _advice(size: int, config: ExperimentConfig) -> str:
    """What to do if so many bytes do not fit on this machine's GPU; empty if they do, or if there is none."""
    resources = config.resources
    if not torch.cuda.is_available() or resources.device == "cpu":
        return ""
    room = torch.cuda.get_device_properties(0).total_memory * min(resources.gpus, 1.0)
    if size <= _SPARE * room:
        return ""
    return f"; that is more than the {_text(int(room))} of GPU memory that it has: raise resources.accumulate"
