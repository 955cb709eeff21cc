"""The InceptionV3 network of the original FID (the TensorFlow graph of 2015-12-05), from torch-fidelity.

torch-fidelity unpickles weights without restrictions, which may execute code. Here the tensors of a file are read
safely and written to a copy in memory, which torch-fidelity then loads.
"""

import hashlib
import io
import math
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import Tensor

from dxmi.compat import torch_fidelity
from dxmi.data.images import data_root
from dxmi.errors import UserError
from dxmi.persistence.files import require_target, user_path
from dxmi.persistence.tensor_files import read_tensor_file

NETWORK = "inception-v3-compat"
"""The name of the network in torch-fidelity."""
_MODULE = "feature_extractor_inceptionv3"
VARIABLE = "DXMI_INCEPTION"
POOL, LOGITS = "2048", "logits_unbiased"
NUM_FEATURES = 2048
_PIECE = {"cuda": 250, "cpu": 25}
"""Images per batch by kind of device; the network resizes them to 299 x 299."""


class Features(NamedTuple):
    """The outputs of the network.

    Attributes:
        pool: features of the last pooling layer, float32, [N, 2048].
        logits: logits of the classes, without bias, float32, [N, 1008]; [N, 0] if the weights have no classes.
    """

    pool: Tensor
    logits: Tensor


def hub_path() -> Path:
    """The path at which PyTorch Hub, and therefore torch-fidelity, stores the weights."""
    name = _url().rsplit("/", 1)[-1]
    return Path(torch.hub.get_dir()) / "checkpoints" / name


def _url() -> str:
    return str(torch_fidelity(_MODULE).URL_INCEPTION_V3)


def find_weights() -> Path:
    """Find the file of weights: $DXMI_INCEPTION, or the data folder, or PyTorch Hub's cache, to which it is downloaded.

    Raises:
        UserError: $DXMI_INCEPTION is not a file, or no file was found and the download failed.
    """
    named = os.environ.get(VARIABLE)
    if named:
        path = require_target(user_path(named, VARIABLE), VARIABLE)
        if not path.is_file():
            raise UserError(f"{VARIABLE} is {named}: there is no such file.")
        return path
    below = data_root() / "weights" / "inception-2015-12-05.pth"
    return next((path for path in (below, hub_path()) if path.is_file()), None) or _fetch(below)


def _fetch(below: Path) -> Path:
    path, url = hub_path(), _url()
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.hub.download_url_to_file(url, str(path), path.stem.rsplit("-", 1)[-1], progress=False)
    except (OSError, RuntimeError) as error:
        raise UserError(
            f"InceptionV3's weights are neither in {below} nor in {path}, and {url} cannot be fetched ({error}). Fetch "
            f"it on another machine and put it in one of the two places, or set {VARIABLE} to its path."
        ) from error
    return path


@dataclass(frozen=True)
class Inception:
    """The network on a device.

    Attributes:
        device: device of the network.
    """

    device: torch.device
    _extractor: Any

    @torch.no_grad()
    def __call__(self, pixels: Tensor, on_piece: Callable[[], None] | None = None) -> Features:
        """Features of uint8 images [N, C, H, W], C 1 or 3, on the device; `on_piece` is called after each batch."""
        outputs = []
        for piece in torch.split(pixels.to(self.device), self._piece):
            outputs.append(self._extractor(piece.expand(-1, 3, -1, -1)))
            if on_piece is not None:
                on_piece()
        pool, *logits = (torch.cat(columns) for columns in zip(*outputs, strict=True))
        return Features(pool, logits[0] if logits else pool.new_empty(len(pool), 0))

    def num_pieces(self, num: int) -> int:
        """The number of batches, and of calls of `on_piece`, for `num` images."""
        return math.ceil(num / self._piece)

    @property
    def _piece(self) -> int:
        return _PIECE.get(self.device.type, _PIECE["cpu"])


def file_digest(path: Path) -> str:
    """The sha256 of a file.

    Raises:
        UserError: the file cannot be read.
    """
    try:
        return hashlib.sha256(path.read_bytes()).hexdigest()
    except OSError as error:
        raise UserError(f"{path} cannot be read: {error.strerror}.") from error


@lru_cache(maxsize=1)
def load_inception(path: Path, device: torch.device) -> Inception:
    """Load the network with the weights in `path`; it has no logits if the last layer is zero, as in some files.

    Raises:
        UserError: the weights are not those of InceptionV3, or reading the file would execute code.
    """
    state: Any = read_tensor_file(path)
    try:
        copy = _rewritten(state)
        layers = [POOL, LOGITS] if state["fc.weight"].any() else [POOL]
        network = torch_fidelity(_MODULE).FeatureExtractorInceptionV3
        extractor = network(NETWORK, layers, feature_extractor_weights_path=copy)
    except (RuntimeError, TypeError, KeyError) as error:
        raise UserError(f"{path} does not hold InceptionV3's weights in torch-fidelity's layout: {error}.") from error
    return Inception(device, extractor.to(device, memory_format=torch.channels_last))


def _rewritten(state: object) -> io.BytesIO:
    """Write the tensors to a new file in memory, which torch-fidelity can unpickle safely."""
    if not isinstance(state, Mapping) or not all(isinstance(value, Tensor) for value in state.values()):
        raise TypeError("it is not a dictionary of tensors")
    bad = [str(key) for key, value in state.items() if value.is_floating_point() and not value.isfinite().all()]
    if bad:
        raise TypeError(f"{bad[0]} has numbers that are not finite")
    buffer = io.BytesIO()
    torch.save({str(key): value.clone() for key, value in state.items()}, buffer)
    buffer.seek(0)
    return buffer
