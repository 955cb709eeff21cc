"""Named random streams: every consumer of randomness has its own generator, derived from a seed and a name.

Adding a stream, or drawing more often from one, never changes another. Distinct pairs of seed and name have distinct
streams. PyTorch's CPU generator, a Mersenne twister, uses only 32 bits of the argument of `manual_seed`, so that among
100,000 streams a collision would be more likely than not. Its whole state is therefore filled from a hash of the seed
and the name. GPU generators are counter-based and use all 64 bits.
"""

import functools
import hashlib

import numpy as np
import torch
from torch import Tensor

from dxmi.errors import UserError

_WORDS = 624
"""Number of 32-bit words in the state of a Mersenne twister."""
_FIRST_BYTE = 24
"""Offset of the first word, each stored in 64 bits, in PyTorch's `mt19937` state, after the seed and the position."""
_STATE_BYTES = {16, len(torch.Generator().get_state())}
"""Sizes in bytes of the states of a GPU generator (seed and offset) and of the CPU generator."""
_INIT_FACTOR, _SHIFT, _WORD = 1_812_433_253, 30, 2**32
"""Constants of the recurrence that initializes the state from a 32-bit seed.

See Matsumoto and Nishimura, 1998, with the seeding of 2002.
"""


def generator(seed: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """Create a generator on `device` whose numbers are determined by `seed` and `stream`."""
    return _seeded(torch.Generator(device), f"{seed}/{stream}".encode())


def continue_stream(own: torch.Generator, state: Tensor) -> bool:
    """Restore a generator from a saved state.

    A state that was saved on another kind of device cannot be restored. The generator then starts a new stream that is
    derived from the state, so that resuming twice gives the same numbers.

    Returns:
        Whether the generator continues exactly like the saved one.

    Raises:
        ValueError: `state` is not the state of a generator.
    """
    if state.dtype != torch.uint8 or state.numel() not in _STATE_BYTES:
        raise ValueError(f"{state.numel()} numbers of {state.dtype} are not the state of a random generator")
    if state.shape == own.get_state().shape:
        own.set_state(state)
        return True
    _seeded(own, state.numpy().tobytes())
    return False


def _seeded(own: torch.Generator, name: bytes) -> torch.Generator:
    """Set a generator to the start of the stream `name`, and return it."""
    own.manual_seed(int.from_bytes(hashlib.sha256(name).digest()[:8], "little", signed=True))
    if own.device.type == "cpu":
        _fill(own, hashlib.shake_256(name).digest(4 * _WORDS))
    return own


def _fill(twister: torch.Generator, content: bytes) -> None:
    """Replace all words of the state of a newly seeded generator with `content`, little-endian."""
    _check_layout()
    state = twister.get_state()
    _words(state).copy_(torch.from_numpy(np.frombuffer(content, dtype="<u4").astype(np.int64)))
    twister.set_state(state)


def _words(state: Tensor) -> Tensor:
    """A view of the words in a generator's state, int64 [624]."""
    return state[_FIRST_BYTE : _FIRST_BYTE + 8 * _WORDS].view(torch.int64)


@functools.cache
def _check_layout() -> None:
    """Check that the state of PyTorch's generator has the expected layout.

    Raises:
        UserError: it does not.
    """
    first = 1
    second = (_INIT_FACTOR * (first ^ (first >> _SHIFT)) + 1) % _WORD
    state = torch.Generator().manual_seed(first).get_state()
    if len(state) < _FIRST_BYTE + 8 * _WORDS or _words(state)[:2].tolist() != [first, second]:
        raise UserError(
            f"PyTorch {torch.__version__} stores the state of its random generator in another layout than versions up "
            "to 2.13, so seeds cannot be derived: install one of those versions."
        )
