"""Named random streams: every consumer of randomness has its own generator, derived from a seed and a name.

A stream added or drawn from more often never shifts another.
"""

import hashlib

import torch


def generator(seed: int, stream: str, device: torch.device | str = "cpu") -> torch.Generator:
    """A generator on `device`, the same for the same `seed` and `stream`."""
    digest = hashlib.sha256(f"{seed}/{stream}".encode()).digest()
    return torch.Generator(device).manual_seed(int.from_bytes(digest[:8], "little", signed=True))
