"""The complete training state of a run, as tensors for a checkpoint."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dxmi.data.dataset import BatchStream
from dxmi.distributed import ProcessGroup
from dxmi.optim.optimizer import Optimizer
from dxmi.persistence import checkpoint
from dxmi.persistence.checkpoint import Checkpoint, DamagedCheckpointError
from dxmi.seeds import continue_stream

ALGORITHM, STATE = "algorithm", "state"


@dataclass(frozen=True)
class TrainingState:
    """The state that a run must restore to continue bitwise as if it had never been interrupted.

    Attributes:
        module: networks, averages and other buffers.
        optimizers: optimizers by name.
        generators: random generators by name.
        stream: stream of batches, including the data order.
    """

    module: nn.Module
    optimizers: Mapping[str, Optimizer]
    generators: Mapping[str, torch.Generator]
    stream: BatchStream

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """The groups of tensors for `checkpoint.save`."""
        state = {f"stream.{key}": value for key, value in self.stream.state().items()}
        state |= {f"generator.{name}": generator.get_state() for name, generator in self.generators.items()}
        for name, optimizer in self.optimizers.items():
            state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state().items()}
        return {ALGORITHM: dict(self.module.state_dict()), STATE: state}

    def restore(self, saved: Checkpoint) -> bool:
        """Restore the state from the groups of a checkpoint.

        Returns:
            Whether the run continues bitwise; on another kind of device it does not, since its noise differs.

        Raises:
            DamagedCheckpointError: a tensor is missing or invalid.
        """
        checkpoint.restore(self.module, saved, ALGORITHM)
        try:
            return self._restore_rest(saved.groups[STATE])
        except KeyError as error:
            raise DamagedCheckpointError(f"Checkpoint {saved.path} is damaged: it lacks {error.args[0]}.") from error
        except torch.OutOfMemoryError:  # a RuntimeError that the checkpoint did not cause
            raise
        except (RuntimeError, TypeError, ValueError) as error:
            raise DamagedCheckpointError(f"Checkpoint {saved.path} is damaged: {error}.") from error

    def _restore_rest(self, state: Mapping[str, Tensor]) -> bool:
        self.stream.load_state(_under("stream", state))
        exact = [continue_stream(own, state[f"generator.{name}"]) for name, own in self.generators.items()]
        for name, optimizer in self.optimizers.items():
            optimizer.load_state(_under(f"optimizer.{name}", state))
        return all(exact)


def _under(prefix: str, tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The tensors whose names start with `prefix.`, by their names without the prefix."""
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def newest_checkpoint(folder: Path, workers: ProcessGroup) -> tuple[Checkpoint | None, list[str]]:
    """Load the newest intact checkpoint on rank 0, and broadcast it to all workers.

    Returns:
        The checkpoint, if there is one; and, on rank 0 only, a message about each damaged checkpoint.
    """
    found, complaints = checkpoint.newest(folder) if workers.is_rank_zero else (None, [])
    if workers.size == 1:
        return found, complaints
    about = workers.on_rank_zero(lambda: None if found is None else [found.step, found.meta])
    if about is None:
        return None, complaints
    own = {} if found is None else found.groups
    flat = {f"{group}/{key}": value for group, tensors in own.items() for key, value in tensors.items()}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in workers.broadcast(flat).items():
        group, _, key = name.partition("/")
        groups.setdefault(group, {})[key] = value
    return Checkpoint(checkpoint.path_of(folder, about[0]), about[0], groups, about[1]), complaints
