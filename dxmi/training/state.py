"""Everything that changes while an algorithm trains, as tensors that a checkpoint can hold."""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from dxmi.data.dataset import BatchStream
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
