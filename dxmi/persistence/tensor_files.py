"""Third-party tensor files (PyTorch and safetensors), read without executing any code in them.

Reading returns the content of the file, or raises an error with a sentence that states what is wrong with it.
"""

import argparse
import pickle
import struct
import warnings
import zipfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors.torch import load_file
from torch import Tensor

from dxmi.errors import UserError

_ZIP = b"PK\x03\x04"
_HEAD_BYTES = 512
_MAX_HEADER_BYTES = 100_000_000
"""Maximum size of a header in the safetensors format."""
_TEXT_BYTES = frozenset(range(0x20, 0x7F)) | {0x09, 0x0A, 0x0D}
_OTHER_FORMATS = {
    b"version https://git-lfs": "is a Git LFS pointer and not the file: run `git lfs pull` in the clone",
    b"\x1f\x8b": "is compressed with gzip: unpack it",
    b"\xfd7zXZ\x00": "is compressed with xz: unpack it",
    b"BZh": "is compressed with bzip2: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed with Zstandard: unpack it",
    b"7z\xbc\xaf\x27\x1c": "is a 7-Zip archive: unpack it",
    b"\x89HDF\r\n": "is an HDF5 or Keras file: convert it to PyTorch first",
    b"GGUF": "is a llama.cpp file (GGUF): convert it to safetensors first",
    b"\x93NUMPY": "is a NumPy array: save the state_dict of a network",
    b"\x89PNG": "is an image",
    b"\xff\xd8\xff": "is an image",
    b"%PDF": "is a PDF",
}
"""Descriptions of files that are not checkpoints, by their first bytes."""


def read_tensor_file(path: Path) -> object:
    """Read a file written by safetensors or `torch.save`, which contains tensors, numbers and containers of them.

    Raises:
        UserError: the file is missing or damaged, has another format, or could only be loaded by executing code.
    """
    if not path.is_file():
        raise UserError(f"Checkpoint {path} {_what_is_there(path)}.")
    try:
        with path.open("rb") as file:
            head = file.read(_HEAD_BYTES)
        _require_checkpoint(path, head)
        content = _read(path, head)
    except OSError as error:
        raise UserError(f"Checkpoint {path} cannot be read: {error.strerror or error}.") from error
    return content


def _what_is_there(path: Path) -> str:
    if path.is_symlink() and not path.exists():
        return f"is a link to {path.readlink()}, which does not exist"
    if path.is_dir():
        return "is a folder: name a file in it, or a diffusers folder"
    return "is not a regular file" if path.exists() else "does not exist"


def _require_checkpoint(path: Path, head: bytes) -> None:
    """Check the first bytes of a file.

    Raises:
        UserError: they show that the file is not a checkpoint.
    """
    for start, what in _OTHER_FORMATS.items():
        if head.startswith(start):
            raise UserError(f"Checkpoint {path} {what}.")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        what = "is empty: download it again"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        what = "is a web page and not the file itself: download it again from its direct address"
    elif head[257:262] == b"ustar":
        what = "is a tar archive: unpack it"
    elif set(head) <= _TEXT_BYTES:
        what = "is a text file without tensors"
    else:
        return
    raise UserError(f"Checkpoint {path} {what}.")


def _read(path: Path, head: bytes) -> object:
    """Read the content of a file.

    Raises:
        UserError: the file is damaged, or could only be loaded by executing code.
    """
    read: Callable[[Path], object]
    if _is_safetensors(head):
        read, damaged = load_file, "is a damaged safetensors file"
    elif head.startswith(_ZIP):
        _require_whole_archive(path)
        read, damaged = _unpickled, "holds objects other than tensors, and code in a file is never executed"
    else:
        read, damaged = (
            _unpickled,
            "is damaged, or holds objects other than tensors, and code in a file is never executed",
        )
    try:
        return read(path)
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"Checkpoint {path} {damaged}{_reason(error)}. {_CURE}") from error


_CURE = (
    "Download it again; if it is intact, load it with the code that wrote it, and save its state_dict with "
    "safetensors.torch.save_file."
)


def _reason(error: Exception) -> str:
    """The name of the rejected object, or the first line of the reader's message."""
    lines = [printable(line.strip()) for line in str(error).splitlines() if line.strip()]
    if isinstance(error, pickle.UnpicklingError):
        lines = [line for line in lines if "GLOBAL" in line]
        return f" ({lines[0].split('. ')[0].removeprefix('WeightsUnpickler error: ')[:_REASON]})" if lines else ""
    return f" ({lines[0][:_REASON]})" if lines else ""


_REASON = 160


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a JSON header and a brace."""
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= _MAX_HEADER_BYTES


def _require_whole_archive(path: Path) -> None:
    """Verify the checksums of an archive written by `torch.save`, which PyTorch does not verify itself.

    Raises:
        UserError: the archive is truncated, altered, or was not written by `torch.save`.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names, damaged = archive.namelist(), archive.testzip()
    except Exception as error:
        raise UserError(f"Checkpoint {path} is damaged or truncated{_reason(error)}: download it again.") from error
    if damaged is not None:
        raise UserError(
            f"Checkpoint {path} is damaged: {printable(damaged)} in it does not match its checksum. Download it again."
        )
    if any("constants.pkl" in name for name in names):
        raise UserError(f"Checkpoint {path} is a TorchScript program: save its state_dict instead.")
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        raise UserError(f"Checkpoint {path} is a zip archive that torch.save did not write: unpack it.")


def _unpickled(path: Path) -> object:
    """Load a PyTorch file of tensors, containers, numbers, and the metadata types that public training codes save."""
    make_number: Any = np.float64(0.0).__reduce__()[0]
    safe: list[Any] = [make_number, (make_number, "numpy.core.multiarray.scalar"), np.dtype, argparse.Namespace]
    safe += [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64, np.int32, np.bool_)]
    with torch.serialization.safe_globals(safe), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # the error message covers unusual files
        return torch.load(path, map_location="cpu", weights_only=True)


def printable(name: object) -> str:
    """Replace the characters of a name or path that are not printable by `?`."""
    return "".join(character if character.isprintable() else "?" for character in str(name))


def require_dense(tensor: Tensor, name: str, path: Path) -> Tensor:
    """Check that a tensor can be a weight (dense, on the host, backed by enough memory), and return it detached.

    Raises:
        UserError: the tensor is sparse, quantized, not on the host, or larger than its storage.
    """
    name = printable(name)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UserError(f"Checkpoint {path}: {name} is not a plain tensor ({tensor.layout}, {tensor.dtype}).")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(
            f"Checkpoint {path}: {name} of shape {tuple(tensor.shape)} is larger than its data in the file."
        )
    return tensor.detach().resolve_conj().resolve_neg()
