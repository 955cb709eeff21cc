"""Folders in which diffusers stores a model: `config.json` and `diffusion_pytorch_model.safetensors`.

This package's U-Nets can be written to such a folder, too, with diffusers' names and the config of the equivalent
UNet2DModel.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from typing import Any, cast

import numpy as np
from numpy.typing import NDArray
from safetensors.torch import save_file

from dxmi.errors import UserError
from dxmi.networks.base import Denoiser
from dxmi.networks.configs import DiffusersConfig
from dxmi.networks.diffusers_unet import DiffusersDenoiser
from dxmi.networks.pretrained.layouts import DIFFUSERS_WEIGHTS, to_public
from dxmi.networks.unet import Unet

Array = NDArray[np.float64]

_CONFIG = "config.json"


def config_of_folder(folder: Path) -> DiffusersConfig:
    """Read the config of the model in a folder.

    Raises:
        UserError: the folder holds no model, or one that `DiffusersConfig` cannot describe.
    """
    tree = _tree_of_folder(folder)
    known = {field.name for field in fields(DiffusersConfig)} - {"kind"}
    tree["classes"] = tree.pop("num_class_embeds", None) or 0
    values = {key: tuple(value) if isinstance(value, list) else value for key, value in tree.items() if key in known}
    try:
        return DiffusersConfig(**{**_DEFAULTS, **values})
    except (TypeError, ValueError) as error:
        raise UserError(f"{folder / _CONFIG}: {error}.") from error


def _tree_of_folder(folder: Path) -> dict[str, Any]:
    """Read config.json and check that it describes a model that can be a denoiser.

    Raises:
        UserError: the file is missing, or describes another kind of model.
    """
    path = folder / _CONFIG
    tree = _json(path, f"{folder} does not hold a diffusers model: ")
    if tree.get("_class_name") != "UNet2DModel":
        raise UserError(f"{folder} holds a {tree.get('_class_name')}: a denoiser must be a UNet2DModel.")
    for key, value in _FIXED.items():
        if tree.get(key, value) != value:
            raise UserError(f"{path} has {key}={tree[key]!r}: a denoiser needs {value!r}.")
    return tree


def _json(path: Path, prefix: str = "") -> dict[str, Any]:
    """Read a JSON object.

    Raises:
        UserError: the file cannot be read, or holds something else.
    """
    try:
        tree = json.loads(path.read_text())
    except (OSError, ValueError, RecursionError) as error:
        raise UserError(f"{prefix}{path.name} cannot be read ({type(error).__name__}: {error}).") from error
    if not isinstance(tree, dict):
        raise UserError(f"{path} holds no settings: it must be a JSON object.")
    return tree


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
"""The defaults of UNet2DModel that differ from those of `DiffusersConfig`; a config.json may omit them."""


# ----------------------------------------------------------------------------
# Check that the model in a folder is the network of a config: equal names and shapes do not imply equal functions.


def require_same_model(folder: Path, network: Denoiser, event: tuple[int, ...]) -> None:
    """Compare the config.json of a folder with the network that is to load its weights.

    Raises:
        UserError: they differ in a setting that changes what the network computes; the message names the first one.
    """
    theirs = _effect(_tree_of_folder(folder), folder / _CONFIG)
    if isinstance(network, DiffusersDenoiser):
        ours = _effect(dict(cast("Any", network.model).config), None)
    elif isinstance(network, Unet) and network.config.patch == 1:
        ours = _effect(_tree_of_unet(network, event[0]), None)
    else:
        raise UserError(f"{folder} holds a UNet2DModel: network.denoiser.kind must be unet, edm_unet or diffusers.")
    for key, value in ours.items():
        if theirs[key] != value and not (key == "sample_size" and theirs[key] is None):
            raise UserError(
                f"{folder / _CONFIG} describes another network: {key} is {theirs[key]} there, and {value} in this run."
            )


_EFFECT_DEFAULTS: dict[str, Any] = {
    "sample_size": None,
    "in_channels": 3,
    "out_channels": 3,
    "layers_per_block": 2,
    "act_fn": "silu",
    "norm_num_groups": 32,
    "attn_norm_num_groups": None,
    "resnet_time_scale_shift": "default",
    "num_class_embeds": None,
    "downsample_type": "conv",
    "upsample_type": "conv",
    **_DEFAULTS,
}
_ACTIVATIONS = {"swish": "silu", "SiLU": "silu"}


def _effect(tree: Mapping[str, Any], path: Path | None) -> dict[str, Any]:
    """The canonical form of a config, which is equal for two configs that describe the same function.

    Raises:
        UserError: the values are not valid for a UNet2DModel.
    """
    values = {key: tree.get(key, default) for key, default in _EFFECT_DEFAULTS.items()}
    try:
        return _described(values)
    except (TypeError, ValueError, AttributeError, IndexError, ZeroDivisionError) as error:
        raise UserError(f"{path} does not describe a UNet2DModel ({type(error).__name__}: {error}).") from error


def _described(values: Mapping[str, Any]) -> dict[str, Any]:
    channels, same = list(values["block_out_channels"]), {}
    for key in ("in_channels", "out_channels", "layers_per_block", "norm_num_groups", "resnet_time_scale_shift"):
        same[key] = values[key]
    down = _levels(values, "down", channels)
    up = _levels(values, "up", channels[::-1])
    scale_shift = values["resnet_time_scale_shift"] != "default"
    own_groups = None if scale_shift else values["norm_num_groups"]
    return {
        **same,
        "block_out_channels": channels,
        "down_block_types": [kind for kind, _ in down],
        "up_block_types": [kind for kind, _ in up],
        "attention heads": [heads for _, heads in (*down, *up)] + [_heads(channels[-1], values["attention_head_dim"])],
        "attn_norm_num_groups": values["attn_norm_num_groups"] or own_groups,
        "downsample_padding": values["downsample_padding"] if any("conv" in kind for kind, _ in down) else None,
        "act_fn": _ACTIVATIONS.get(values["act_fn"], values["act_fn"]),
        "norm_eps": float(values["norm_eps"]),
        "freq_shift": float(values["freq_shift"]),
        "flip_sin_to_cos": bool(values["flip_sin_to_cos"]),
        "num_class_embeds": values["num_class_embeds"] or 0,
        "sample_size": _side(values["sample_size"]),
    }


def _levels(values: Mapping[str, Any], way: str, channels: Sequence[int]) -> list[tuple[str, int]]:
    """The kind of the blocks and of the resampling of each level, and its number of heads (0 without attention)."""
    kinds, levels = values[f"{way}_block_types"], []
    for number, (kind, width) in enumerate(zip(kinds, channels, strict=True)):
        attends, plain = kind.startswith("Attn"), f"{way.capitalize()}Block2D"
        resample = values[f"{way}sample_type"] if attends else "conv"
        resnet = kind == f"Resnet{way.capitalize()}sampleBlock2D"
        end = "" if number == len(kinds) - 1 else f" with {'resnet' if resnet else resample}"
        levels.append(
            (f"{plain if resnet else kind}{end}", _heads(width, values["attention_head_dim"]) if attends else 0)
        )
    return levels


def _heads(width: int, head_channels: int | None) -> int:
    return 1 if head_channels is None else max(1, width // head_channels)


def _side(size: Any) -> int | None:
    """The height of the images, which must be square."""
    return int(size[0]) if isinstance(size, list | tuple) else None if size is None else int(size)


# ----------------------------------------------------------------------------
# The scheduler of a folder: the quantity that the model predicts, and the noise on which it was trained.

_SCHEDULER = "scheduler_config.json"
_EDM_SCHEDULERS = ("EDM", "CMStochasticIterative")
_OTHER_SCHEDULERS = ("FlowMatch", "ScoreSde", "KarrasVe", "VQDiffusion", "Amused")


def scheduler_of_folder(folder: Path) -> Path | None:
    """Find scheduler_config.json in the folder of a model or of its pipeline, or in a folder `scheduler` of either."""
    places = (folder, folder / "scheduler", folder.parent / "scheduler", folder.parent)
    return next((place / _SCHEDULER for place in places if (place / _SCHEDULER).is_file()), None)


def require_same_noise(path: Path, family: str, betas: Array) -> None:
    """Check that a scheduler_config.json belongs to the family of models that a run's schedule shortens.

    Args:
        path: path of the file.
        family: family of models, see `ScheduleConfig.family`.
        betas: betas of the forward process of DDPM, [K].

    Raises:
        UserError: the model was trained on other noise or predicts another quantity.
    """
    tree = _json(path)
    name = str(tree.get("_class_name", ""))
    edm = name.startswith(_EDM_SCHEDULERS)
    if name.startswith(_OTHER_SCHEDULERS) or edm != (family == "edm") or family not in ("ddpm", "edm"):
        raise UserError(f"{path} describes {name or 'a DDPM scheduler'}: schedule.kind does not support its models.")
    wanted: dict[str, Any] = {"prediction_type": "epsilon", "thresholding": False, "rescale_betas_zero_snr": False}
    if edm:
        wanted = {"sigma_data": 0.5, "prediction_type": "epsilon"}
    for key, value in wanted.items():
        if tree.get(key, value) != value:
            raise UserError(f"{path} has {key}={tree[key]!r}: a run needs a model with {key}={value!r}.")
    if not edm:
        _require_betas(path, tree, betas)


def _require_betas(path: Path, tree: Mapping[str, Any], betas: Array) -> None:
    given = tree.get("trained_betas")
    if given is not None:
        try:
            theirs = np.asarray(given, dtype=np.float64)
        except (TypeError, ValueError):
            theirs = np.empty(0)
        if theirs.shape != betas.shape or not np.allclose(theirs, betas, rtol=1e-4):
            raise UserError(f"{path} has trained_betas other than DDPM's, from {betas[0]:g} to {betas[-1]:g}.")
        return
    wanted = {"num_train_timesteps": len(betas), "beta_schedule": "linear"}
    wanted |= {"beta_start": float(betas[0]), "beta_end": float(betas[-1])}
    for key, value in wanted.items():
        if tree.get(key, value) != value:
            raise UserError(f"{path} has {key}={tree[key]!r}: a run needs a model with {key}={value!r}.")


def write_folder(network: Denoiser, event: tuple[int, ...], folder: Path) -> None:
    """Write a denoiser to a folder that `UNet2DModel.from_pretrained` can read.

    Raises:
        UserError: the denoiser is not a U-Net, or has no equivalent in diffusers.
    """
    if isinstance(network, DiffusersDenoiser):
        tree, weights = dict(cast("Any", network.model).config), network.model.state_dict()
    elif isinstance(network, Unet) and network.config.patch > 1:
        raise UserError(f"The U-Net has patches of {network.config.patch} pixels: diffusers has no such model.")
    elif isinstance(network, Unet):
        tree, weights = _tree_of_unet(network, event[0]), to_public(network, "diffusers")
    else:
        raise UserError(f"{type(network).__name__} is not a U-Net: diffusers has no such model.")
    folder.mkdir(parents=True, exist_ok=True)
    tree = {key: value for key, value in tree.items() if not key.startswith("_")}
    (folder / _CONFIG).write_text(json.dumps({"_class_name": "UNet2DModel", **tree}, indent=2, sort_keys=True) + "\n")
    cpu = {name: tensor.detach().cpu().contiguous() for name, tensor in weights.items()}
    save_file(cpu, folder / DIFFUSERS_WEIGHTS, metadata={"format": "pt"})


def _tree_of_unet(network: Unet, in_channels: int) -> dict[str, Any]:
    """The config of the UNet2DModel that is equivalent to `network` if steps are multiplied by its step_scale."""
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
        "in_channels": in_channels,
        "out_channels": in_channels,
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
