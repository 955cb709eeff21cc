"""Pretrained models that ship with the package, so that a first run need not wait for its pretraining.

Each is the exact result of a pretraining, rounded to float16, as a safetensors file whose metadata hold the recipe:
everything that determines the pretraining, except for the version of PyTorch, which changes it only by rounding.
`SHIPPED` has the sha256 of each file, which is verified at every load. A file is written by

    python -m dxmi.training.shipped NAME RUN

where RUN is the folder of a run whose pretraining is in the cache.
"""

import functools
import hashlib
import json
import sys
from collections.abc import Mapping
from dataclasses import dataclass
from importlib.resources import files
from pathlib import Path
from typing import Any

from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from dxmi.config import signature
from dxmi.errors import UserError

SHIPPED: Mapping[str, str] = {"digits": "8ccce57cbb07763a2510cdb30114c1ed9fae2b1c2209ae22a59f2b869204e40e"}
"""The sha256 of each file, by its name."""
_RECIPE = "recipe"


@dataclass(frozen=True)
class ShippedParent:
    """A pretrained model that ships with the package.

    Attributes:
        name: name of the file.
        sha256: checksum of the file.
        tensors: weights of the denoiser, float32.
    """

    name: str
    sha256: str
    tensors: Mapping[str, Tensor]


def find_shipped(recipe: Mapping[str, Any]) -> ShippedParent | None:
    """The shipped model with this recipe; None if there is none.

    Raises:
        UserError: a file is not the one that was shipped.
    """
    name = _names_by_recipe().get(signature(recipe))
    return None if name is None else _load(name)


@functools.cache
def _names_by_recipe() -> dict[str, str]:
    return {signature(_recipe_of(_content(name))): name for name in SHIPPED}


def _content(name: str) -> bytes:
    content = (files("dxmi.training") / "parents" / f"{name}.safetensors").read_bytes()
    if hashlib.sha256(content).hexdigest() != SHIPPED[name]:
        raise UserError(f"The shipped model {name} has been altered: install dxmi again, or use --from-scratch.")
    return content


def _recipe_of(content: bytes) -> Any:
    """The recipe in the header of a safetensors file, whose first 8 bytes are the header's length."""
    header = json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])
    return json.loads(header["__metadata__"][_RECIPE])


def _load(name: str) -> ShippedParent:
    tensors = {key: tensor.float() for key, tensor in load_safetensors(_content(name)).items()}
    return ShippedParent(name, SHIPPED[name], tensors)


def main(name: str, run: Path) -> None:
    """Write the shipped file of a run's pretraining, and print its sha256."""
    from dxmi.persistence.cache import cached  # noqa: PLC0415  (the imports of this command only)
    from dxmi.persistence.run_directory import RunDirectory  # noqa: PLC0415
    from dxmi.training.build import Experiment  # noqa: PLC0415
    from dxmi.training.schema import read_config  # noqa: PLC0415

    experiment = Experiment(read_config(RunDirectory(run).read_config()).config)

    def missing() -> dict[str, Tensor]:
        raise UserError(f"The pretraining of {run} is not in the cache.")

    tensors = {key: tensor.half().contiguous() for key, tensor in cached(experiment.pretraining_path, missing).items()}
    content = save_safetensors(tensors, {_RECIPE: json.dumps(experiment.pretraining_recipe, sort_keys=True)})
    (Path(__file__).parent / "parents" / f"{name}.safetensors").write_bytes(content)
    sys.stdout.write(f"{hashlib.sha256(content).hexdigest()}\n")


if __name__ == "__main__":
    main(sys.argv[1], Path(sys.argv[2]))
