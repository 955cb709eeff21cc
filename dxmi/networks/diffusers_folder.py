"""Folders in which diffusers keeps a model: `config.json` and `diffusion_pytorch_model.safetensors`.

Our own U-Nets are written to such a folder too, under diffusers' names and with the config of the UNet2DModel that
computes the same.
"""

import json
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

from safetensors.torch import save_file

from dxmi.errors import UserError
from dxmi.networks.base import Denoiser
from dxmi.networks.diffusers_unet import DiffusersConfig, DiffusersDenoiser
from dxmi.networks.layouts import DIFFUSERS_WEIGHTS, to_public
from dxmi.networks.unet import Unet

_CONFIG = "config.json"


def config_of_folder(folder: Path) -> DiffusersConfig:
    """The config of the model that a folder holds.

    Raises:
        UserError: it holds none, or one that `DiffusersConfig` cannot describe.
    """
    try:
        tree: dict[str, Any] = json.loads((folder / _CONFIG).read_text())
    except (OSError, ValueError) as error:
        raise UserError(f"{folder} holds no model of diffusers: {_CONFIG} cannot be read ({error}).") from error
    if tree.get("_class_name") != "UNet2DModel":
        raise UserError(f"{folder} holds a {tree.get('_class_name')}: a denoiser is a UNet2DModel.")
    for key, value in _FIXED.items():
        if tree.get(key, value) != value:
            raise UserError(f"{folder / _CONFIG} has {key}={tree[key]!r}: a denoiser needs {value!r}.")
    known = {field.name for field in fields(DiffusersConfig)} - {"kind"}
    tree["classes"] = tree.pop("num_class_embeds", None) or 0
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items() if key in known}
    try:
        return DiffusersConfig(**{**_DEFAULTS, **values})
    except ValueError as error:
        raise UserError(f"{folder / _CONFIG}: {error}.") from error


_FIXED = {
    "center_input_sample": False,
    "time_embedding_type": "positional",
    "mid_block_type": "UNetMidBlock2D",
    "mid_block_scale_factor": 1,
    "add_attention": True,
    "class_embed_type": None,
}
_DEFAULTS: dict[str, Any] = {
    "block_out_channels": (224, 448, 672, 896),
    "down_block_types": ("DownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D", "AttnDownBlock2D"),
    "up_block_types": ("AttnUpBlock2D", "AttnUpBlock2D", "AttnUpBlock2D", "UpBlock2D"),
    "downsample_padding": 1,
    "attention_head_dim": 8,
    "norm_eps": 1e-5,
    "freq_shift": 0,
    "flip_sin_to_cos": True,
}
"""UNet2DModel's own, which a config.json may leave out, where they are not ours."""


def write_folder(network: Denoiser, event: tuple[int, ...], folder: Path) -> None:
    """Write a denoiser as a folder that `UNet2DModel.from_pretrained` reads.

    Raises:
        UserError: it is not a U-Net.
    """
    if isinstance(network, DiffusersDenoiser):
        tree, weights = dict(cast("Any", network.model).config), network.model.state_dict()
    elif isinstance(network, Unet) and network.config.patch > 1:
        raise UserError(f"The U-Net takes patches of {network.config.patch} pixels: diffusers has no model for it.")
    elif isinstance(network, Unet):
        tree, weights = _tree_of_unet(network, event[0]), to_public(network, "diffusers")
    else:
        raise UserError(f"{type(network).__name__} is no U-Net: diffusers has no model for it.")
    folder.mkdir(parents=True, exist_ok=True)
    tree = {key: value for key, value in tree.items() if not key.startswith("_")}
    (folder / _CONFIG).write_text(json.dumps({"_class_name": "UNet2DModel", **tree}, indent=2, sort_keys=True) + "\n")
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(cpu, folder / DIFFUSERS_WEIGHTS, metadata={"format": "pt"})


def _tree_of_unet(network: Unet, colours: int) -> dict[str, Any]:
    """The config of the UNet2DModel that computes what `network` does, on steps times its step_scale."""
    config, style = network.config, network.style
    resample = "resnet" if style.resample_in_blocks else "conv"
    last = len(config.multipliers) - 1

    def kind(level: int, way: str) -> str:
        attends = network.size >> level in (config.attention or ())
        ends = level == (last if way == "Down" else 0)
        plain = f"{way}Block2D" if ends or not style.resample_in_blocks else f"Resnet{way}sampleBlock2D"
        return f"Attn{way}Block2D" if attends else plain

    return {
        "sample_size": network.size,
        "in_channels": colours,
        "out_channels": colours,
        "block_out_channels": [config.channels * multiplier for multiplier in config.multipliers],
        "down_block_types": [kind(level, "Down") for level in range(last + 1)],
        "up_block_types": [kind(level, "Up") for level in range(last, -1, -1)],
        "layers_per_block": config.blocks,
        "downsample_padding": 1 if style.adm else 0,
        "downsample_type": resample,
        "upsample_type": resample,
        "act_fn": "silu",
        "attention_head_dim": config.head_channels,
        "norm_num_groups": config.groups,
        "attn_norm_num_groups": config.groups,
        "norm_eps": style.eps,
        "resnet_time_scale_shift": "scale_shift" if style.scale_shift else "default",
        "freq_shift": 0 if style.adm else 1,
        "flip_sin_to_cos": style.adm,
        "num_class_embeds": config.classes or None,
        "dropout": config.dropout,
        **_FIXED,
    }
