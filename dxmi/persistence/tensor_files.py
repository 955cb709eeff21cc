"""Files of tensors that others wrote: PyTorch's and safetensors', read without executing anything in them.

Whatever the file is, reading ends in its content or in one sentence that says what is wrong with it.
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
"""Of safetensors, by its format."""
_TEXT_BYTES = frozenset(range(0x20, 0x7F)) | {0x09, 0x0A, 0x0D}
_OTHER_FORMATS = {
    b"version https://git-lfs": "is a pointer of Git LFS and not the file: run `git lfs pull` where it was cloned",
    b"\x1f\x8b": "is compressed by gzip: unpack it",
    b"\xfd7zXZ\x00": "is compressed by xz: unpack it",
    b"BZh": "is compressed by bzip2: unpack it",
    b"\x28\xb5\x2f\xfd": "is compressed by Zstandard: unpack it",
    b"7z\xbc\xaf\x27\x1c": "is an archive of 7-Zip: unpack it",
    b"\x89HDF\r\n": "is a file of HDF5 or Keras: convert it to PyTorch first",
    b"GGUF": "is a file of llama.cpp (GGUF): convert it to safetensors first",
    b"\x93NUMPY": "is a NumPy array: save a network's state_dict",
    b"\x89PNG": "is a picture",
    b"\xff\xd8\xff": "is a picture",
    b"%PDF": "is a PDF",
}
"""What a file that is no checkpoint is, by its first bytes."""


def read_tensor_file(path: Path) -> object:
    """The content of a file of safetensors or of PyTorch's `torch.save`: tensors in containers, and numbers.

    Raises:
        UserError: it is not there, is damaged, is something else, or asks for code to be run.
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
        return "is a folder: name a file in it, or a folder of diffusers"
    return "is not a regular file" if path.exists() else "does not exist"


def _require_checkpoint(path: Path, head: bytes) -> None:
    """Refuse what the first bytes show to be something else.

    Raises:
        UserError: they do.
    """
    for start, what in _OTHER_FORMATS.items():
        if head.startswith(start):
            raise UserError(f"Checkpoint {path} {what}.")
    text = head.removeprefix(b"\xef\xbb\xbf").lstrip().lower()
    if not head:
        what = "is empty: fetch it again"
    elif text.startswith((b"<!doctype", b"<html", b"<?xml", b"<head", b"<!--")):
        what = "is a web page and not the file itself: fetch it again, by the address of the download"
    elif head[257:262] == b"ustar":
        what = "is a tar archive: unpack it"
    elif set(head) <= _TEXT_BYTES:
        what = "is text and holds no tensors"
    else:
        return
    raise UserError(f"Checkpoint {path} {what}.")


def _read(path: Path, head: bytes) -> object:
    """The content.

    Raises:
        UserError: it cannot be had.
    """
    read: Callable[[Path], object]
    if _is_safetensors(head):
        read, damaged = load_file, "is a damaged file of safetensors"
    elif head.startswith(_ZIP):
        _require_whole_archive(path)
        read, damaged = _unpickled, "cannot be read as tensors alone, and nothing else in it is executed"
    else:
        read, damaged = _unpickled, "is damaged, or cannot be read as tensors alone, and nothing else in it is executed"
    try:
        return read(path)
    except OSError:
        raise
    except Exception as error:
        raise UserError(f"Checkpoint {path} {damaged}{_reason(error)}. {_CURE}") from error


_CURE = (
    "Fetch it again; if it is whole, load it where it comes from, and save its state_dict by "
    "safetensors.torch.save_file."
)


def _reason(error: Exception) -> str:
    """The name of what it asked for, or the first line of what the reader said."""
    lines = [printable(line.strip()) for line in str(error).splitlines() if line.strip()]
    if isinstance(error, pickle.UnpicklingError):
        lines = [line for line in lines if "GLOBAL" in line]
        return f" ({lines[0].split('. ')[0].removeprefix('WeightsUnpickler error: ')[:_REASON]})" if lines else ""
    return f" ({lines[0][:_REASON]})" if lines else ""


_REASON = 160


def _is_safetensors(head: bytes) -> bool:
    """Whether a file begins with the length of a JSON header, and with a brace."""
    return len(head) > 8 and head[8:9] == b"{" and struct.unpack("<Q", head[:8])[0] <= _MAX_HEADER_BYTES


def _require_whole_archive(path: Path) -> None:
    """Check the archive that `torch.save` writes, whose sums PyTorch itself does not look at.

    Raises:
        UserError: it is cut short, altered, or not one of PyTorch's.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            names, damaged = archive.namelist(), archive.testzip()
    except Exception as error:
        raise UserError(f"Checkpoint {path} is damaged or cut short{_reason(error)}: fetch it again.") from error
    if damaged is not None:
        raise UserError(
            f"Checkpoint {path} is damaged: {printable(damaged)} in it does not match its checksum. Fetch it again."
        )
    if any("constants.pkl" in name for name in names):
        raise UserError(f"Checkpoint {path} is a TorchScript program: save its state_dict instead.")
    if not any(name.rpartition("/")[2] == "data.pkl" for name in names):
        raise UserError(f"Checkpoint {path} is a zip archive that torch.save did not write: unpack it.")


def _unpickled(path: Path) -> object:
    """A PyTorch file of tensors, containers and numbers, and what public trainers put beside them."""
    make_number: Any = np.float64(0.0).__reduce__()[0]
    safe: list[Any] = [make_number, (make_number, "numpy.core.multiarray.scalar"), np.dtype, argparse.Namespace]
    safe += [type(np.dtype(kind)) for kind in (np.float32, np.float64, np.int64, np.int32, np.bool_)]
    with torch.serialization.safe_globals(safe), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # what it has to say of odd files, the error says better
        return torch.load(path, map_location="cpu", weights_only=True)


def printable(name: object) -> str:
    """A name or a path as any terminal and file can take it: what is no UTF-8 or cannot be printed becomes `?`."""
    return "".join(character if character.isprintable() else "?" for character in str(name))


def require_dense(tensor: Tensor, name: str, path: Path) -> Tensor:
    """A tensor that can be a weight, on the host and without tricks of memory.

    Raises:
        UserError: it is not a plain floating-point tensor, or larger than the memory behind it.
    """
    name = printable(name)
    if tensor.layout != torch.strided or tensor.is_quantized or tensor.device.type != "cpu":
        raise UserError(f"Checkpoint {path}: {name} is not a plain tensor ({tensor.layout}, {tensor.dtype}).")
    if tensor.numel() * tensor.element_size() > tensor.untyped_storage().nbytes():
        raise UserError(f"Checkpoint {path}: {name} of shape {tuple(tensor.shape)} is larger than what the file holds.")
    return tensor.detach().resolve_conj().resolve_neg()
