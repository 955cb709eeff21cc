"""The official files of CIFAR-10 (Krizhevsky, 2009): binary batches, and Python batches, which are pickles.

A binary batch consists of rows of 3,073 bytes: the label, then 1,024 red, 1,024 green and 1,024 blue pixels. A Python
batch is a pickled dictionary with the pixels as an array [N, 3072] under `data` and a list of labels under `labels`.
"""

import io
import pickle
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from dxmi.errors import UserError

NUM_CLASSES = 10
SHAPE = (3, 32, 32)
BINARY, PYTHON = "cifar-10-batches-bin", "cifar-10-batches-py"
"""The folders that the official archives contain."""
_PIXELS = 3 * 32 * 32
_FAILURES = (
    *(pickle.UnpicklingError, EOFError, ImportError, MemoryError),
    *(AttributeError, IndexError, KeyError, OverflowError, TypeError, ValueError),
)
"""Exceptions that a damaged pickle may raise."""

Batch = tuple[NDArray[np.uint8], NDArray[np.int64]]
"""Pixels [N, 3, 32, 32] and labels [N]."""


def read_binary_batch(path: Path) -> Batch:
    """Read the images and labels of a binary batch.

    Raises:
        UserError: the file cannot be read, or is not a binary batch.
    """
    raw = np.frombuffer(_content(path), dtype=np.uint8)
    if raw.size == 0 or raw.size % (1 + _PIXELS):
        raise UserError(f"{path} holds {raw.size} bytes, which is not a multiple of {1 + _PIXELS}. Fetch it again.")
    rows = raw.reshape(-1, 1 + _PIXELS)
    return _checked(path, rows[:, 1:], rows[:, 0].astype(np.int64))


def read_python_batch(path: Path) -> Batch:
    """Read the images and labels of a Python batch without executing code from the pickle.

    Raises:
        UserError: the file cannot be read, is not a Python batch, or refers to a name that is not permitted.
    """
    try:
        tree = _BatchUnpickler(_content(path), str(path)).load()
        pixels, labels = tree["data"], np.array(tree["labels"])
    except _FAILURES as error:
        why = " ".join(str(error).split()).rstrip(".")
        raise UserError(f"{path} is not a CIFAR-10 batch ({why}). Fetch it again.") from error
    shaped = isinstance(pixels, np.ndarray) and pixels.dtype == np.uint8 and pixels.shape == (len(labels), _PIXELS)
    if not shaped or labels.dtype.kind != "i" or len(labels) == 0:
        raise UserError(f"{path} does not hold uint8 images [N, {_PIXELS}] with a label for each. Fetch it again.")
    return _checked(path, pixels, labels.astype(np.int64))


def binary_rows(batch: Batch) -> bytes:
    """Serialize a batch in the format of a binary batch."""
    pixels, labels = batch
    return np.concatenate((labels.astype(np.uint8)[:, None], pixels.reshape(-1, _PIXELS)), axis=1).tobytes()


def _content(path: Path) -> bytes:
    try:
        return path.read_bytes()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


def _checked(path: Path, pixels: NDArray[np.uint8], labels: NDArray[np.int64]) -> Batch:
    if labels.min() < 0 or labels.max() >= NUM_CLASSES:
        raise UserError(f"{path} has a label outside 0..{NUM_CLASSES - 1}: it is not CIFAR-10. Fetch it again.")
    return pixels.reshape(-1, *SHAPE), labels


class _BatchUnpickler(pickle.Unpickler):
    """Loads dictionaries, lists, numbers, text and uint8 arrays; all other global names in a pickle are refused.

    The permitted names are mapped to functions of this module, so a pickle can call nothing else.
    """

    def __init__(self, content: bytes, name: str) -> None:
        super().__init__(io.BytesIO(content), encoding="latin1")
        self._name = name

    def find_class(self, module: str, name: str) -> Any:
        """Return the replacement of a global name in the pickle."""
        stand_in = _STAND_INS.get((module, name))
        if stand_in is None:
            raise UserError(f"{self._name} loads {module}.{name}, which no CIFAR-10 batch needs: do not trust it.")
        # A pickle may set attributes of the returned object, which must therefore be a copy.
        return partial(stand_in) if callable(stand_in) else stand_in


def _empty_array(*_: Any) -> NDArray[np.uint8]:
    """An empty array, which the pickle then fills."""
    return np.empty(0, dtype=np.uint8)


def _byte_type(code: str, *_: Any) -> np.dtype[np.uint8]:
    """The only permitted element type, uint8."""
    if code not in ("u1", "|u1"):
        raise ValueError(f"the element type is {code}")
    return np.dtype(np.uint8)


def _bytes_of(text: str, encoding: str = "latin1") -> bytes:
    """Encode bytes, which pickle protocols before 3 represent as text."""
    if encoding != "latin1":
        raise ValueError(f"bytes are encoded as {encoding}")
    return text.encode(encoding)


_STAND_INS: dict[tuple[str, str], Any] = {
    ("numpy.core.multiarray", "_reconstruct"): _empty_array,
    ("numpy._core.multiarray", "_reconstruct"): _empty_array,
    ("numpy", "ndarray"): "ndarray",  # an argument of the above, never called
    ("numpy", "dtype"): _byte_type,
    ("_codecs", "encode"): _bytes_of,
}
