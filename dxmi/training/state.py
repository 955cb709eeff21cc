"""Everything that changes while an algorithm trains, as tensors that a checkpoint can hold."""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor, nn

from dxmi.data.dataset import BatchStream
from dxmi.distributed import Workers
from dxmi.optim.optimizer import Optimizer
from dxmi.persistence import checkpoint
from dxmi.persistence.checkpoint import Checkpoint, DamagedCheckpointError
from dxmi.seeds import continue_stream

ALGORITHM, STATE = "algorithm", "state"


@dataclass(frozen=True)
class TrainingState:
    """What a run has to restore to go on bitwise as if it had never stopped.

    Attributes:
        module: networks, averages and other buffers.
        optimizers: by name.
        generators: by name.
        stream: the data order.
    """

    module: nn.Module
    optimizers: Mapping[str, Optimizer]
    generators: Mapping[str, torch.Generator]
    stream: BatchStream

    def groups(self) -> dict[str, dict[str, Tensor]]:
        """Tensors for `checkpoint.save`."""
        state = {f"stream.{key}": value for key, value in self.stream.state().items()}
        state |= {f"generator.{name}": generator.get_state() for name, generator in self.generators.items()}
        for name, optimizer in self.optimizers.items():
            state |= {f"optimizer.{name}.{key}": value for key, value in optimizer.state().items()}
        return {ALGORITHM: dict(self.module.state_dict()), STATE: state}

    def restore(self, saved: Checkpoint) -> bool:
        """The inverse of `groups`.

        Returns:
            Whether the run goes on bitwise as it would have; it does not on another kind of device, with other noise.

        Raises:
            DamagedCheckpointError: something is missing, or is not what it should be.
        """
        checkpoint.restore(self.module, saved, ALGORITHM)
        try:
            return self._restore_rest(saved.groups[STATE])
        except KeyError as error:
            raise DamagedCheckpointError(f"Checkpoint {saved.path} is damaged: it lacks {error.args[0]}.") from error
        except torch.OutOfMemoryError:  # a RuntimeError too, but no fault of the checkpoint
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
    """The tensors whose names begin with `prefix.`, by the rest of their names."""
    return {key[len(prefix) + 1 :]: value for key, value in tensors.items() if key.startswith(f"{prefix}.")}


def newest_checkpoint(folder: Path, workers: Workers) -> tuple[Checkpoint | None, list[str]]:
    """The first worker's newest whole checkpoint, and a sentence about each damaged one, on all workers."""
    found, complaints = checkpoint.newest(folder) if workers.is_first else (None, [])
    if workers.size == 1:
        return found, complaints
    about = workers.on_first(lambda: None if found is None else [found.step, found.meta])
    if about is None:
        return None, complaints
    own = {} if found is None else found.groups
    flat = {f"{group}/{key}": value for group, tensors in own.items() for key, value in tensors.items()}
    groups: dict[str, dict[str, Tensor]] = {}
    for name, value in workers.agree(flat).items():
        group, _, key = name.partition("/")
        groups.setdefault(group, {})[key] = value
    return Checkpoint(checkpoint.path_of(folder, about[0]), about[0], groups, about[1]), complaints
