"""IDX files, the format of MNIST and Fashion-MNIST: a big-endian header and raw bytes."""

import gzip
import math
import struct
import zlib
from pathlib import Path

import numpy as np
from numpy.typing import NDArray

from dxmi.errors import UserError

_UINT8, _MAX_RANK = 0x08, 3


def idx_content(path: Path) -> bytes:
    """Read the content of an IDX file, decompressed if it is gzipped.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return gzip.decompress(path.read_bytes()) if path.suffix == ".gz" else path.read_bytes()
    except (OSError, EOFError, zlib.error) as error:
        raise UserError(f"{path} cannot be read: {error}. Fetch it again.") from error


def read_idx(path: Path) -> NDArray[np.uint8]:
    """Read the array in an IDX file of bytes, plain or gzipped.

    Raises:
        UserError: the file is not an IDX file of bytes, or is truncated.
    """
    return parsed_idx(path, idx_content(path))


def parsed_idx(path: Path, raw: bytes) -> NDArray[np.uint8]:
    """Parse the content of an IDX file.

    Args:
        path: Path of the file, for messages.
        raw: Content of the file, see `idx_content`.

    Raises:
        UserError: the content is not an IDX file of bytes, or is truncated.
    """
    if len(raw) < 4 or raw[:2] != b"\x00\x00" or raw[2] != _UINT8:
        raise UserError(f"{path} is not an IDX file of bytes. Fetch it again.")
    rank = raw[3]
    if not 1 <= rank <= _MAX_RANK:
        raise UserError(f"{path} is an IDX file of {rank} dimensions: images have 3 and labels 1. Fetch it again.")
    if len(raw) < 4 + 4 * rank:
        raise UserError(f"{path} is cut short: its header is incomplete. Fetch it again.")
    shape = struct.unpack(f">{rank}I", raw[4 : 4 + 4 * rank])
    size, found = math.prod(shape), len(raw) - 4 - 4 * rank
    if found != size:
        raise UserError(f"{path} holds {found} bytes where its header announces {size}. Fetch it again.")
    return np.frombuffer(raw, dtype=np.uint8, offset=4 + 4 * rank).reshape(shape)
