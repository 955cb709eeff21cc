"""Named random streams: every consumer of randomness has its own generator, derived from a seed and a name.

A stream added or drawn from more often never shifts another, and distinct pairs of seed and name have distinct streams.
PyTorch's generator for the CPU, a Mersenne twister, keeps only 32 bits of the number given to `manual_seed`: two of
100,000 streams would more likely than not be the same one. Its whole state is therefore filled from a hash of the name.
The generators of GPUs are counter-based and keep all 64 bits.
"""

import functools
import hashlib

import numpy as np
import torch
from torch import Tensor

from dxmi.errors import UserError

_WORDS = 624
"""32-bit words of a Mersenne twister's state."""
_FIRST_BYTE = 24
"""Where PyTorch's `mt19937` state holds the first of them, each in 64 bits, after its seed and its position."""
_STATE_BYTES = {16, len(torch.Generator().get_state())}
"""Of a GPU's generator, its seed and its offset, and of the CPU's."""
_INIT_FACTOR, _SHIFT, _WORD = 1_812_433_253, 30, 2**32
"""Of the recurrence that fills the state from a 32-bit seed (Matsumoto and Nishimura, 1998, with the 2002 seeding)."""


def generator(seed: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device`, the same for the same `seed` and `stream`."""
    return _seeded(torch.Generator(device), f"{seed}/{stream}".encode())


def continue_stream(own: torch.Generator, state: Tensor) -> bool:
    """Let a generator go on from a saved state; returns whether it draws what the saved one would have drawn.

    A state that was saved on another kind of device cannot be set. The generator then begins a stream that is derived
    from that state, so that going on from it twice gives the same numbers.

    Raises:
        ValueError: it is the state of no generator.
    """
    if state.dtype != torch.uint8 or state.numel() not in _STATE_BYTES:
        raise ValueError(f"{state.numel()} numbers of {state.dtype} are the state of no random generator")
    if state.shape == own.get_state().shape:
        own.set_state(state)
        return True
    _seeded(own, state.numpy().tobytes())
    return False


def _seeded(own: torch.Generator, name: bytes) -> torch.Generator:
    """The generator at the start of the stream of that name."""
    own.manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8], "little", signed=True))
    if own.device.type == "cpu":
        _fill(own, hashlib.shake_256(name).digest(4 * _WORDS))
    return own


def _fill(twister: torch.Generator, content: bytes) -> None:
    """Replace all words of a freshly seeded generator's state by `content`, little-endian."""
    _check_layout()
    state = twister.get_state()
    _words(state).copy_(torch.from_numpy(np.frombuffer(content, dtype="<u4").astype(np.int64)))
    twister.set_state(state)


def _words(state: Tensor) -> Tensor:
    """A view of the words in a generator's state, int64 [624]."""
    return state[_FIRST_BYTE : _FIRST_BYTE + 8 * _WORDS].view(torch.int64)


@functools.cache
def _check_layout() -> None:
    """Raise a UserError unless the state of PyTorch's generator holds its words where they are expected."""
    first = 1
    second = (_INIT_FACTOR * (first ^ (first >> _SHIFT)) + 1) % _WORD
    state = torch.Generator().manual_seed(first).get_state()
    if len(state) < _FIRST_BYTE + 8 * _WORDS or _words(state)[:2].tolist() != [first, second]:
        raise UserError(
            f"PyTorch {torch.__version__} keeps the state of its random generator in another layout than versions up "
            "to 2.13, so that seeds cannot be derived: install one of those."
        )
