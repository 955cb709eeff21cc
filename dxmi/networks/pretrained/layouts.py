"""Public checkpoints: conversion between the names and shapes of their `state_dict` and ours.

    ddpm       pesser/pytorch_diffusion, FastDPM, and the DxMI release for CIFAR-10
    adm        openai/guided-diffusion, openai/consistency_models, and the DxMI release for ImageNet-64 and LSUN
    edm        the ADM networks of NVlabs/edm
    diffusers  diffusers' UNet2DModel
    ddgan      NVlabs/denoising-diffusion-gan
    igebm      the energies of the DxMI release

A layout is a table of rows. A row states which of their tensors make up one of ours, and converts in both directions.
"""

import hashlib
import itertools
from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor, nn

from dxmi.errors import UserError
from dxmi.networks.diffusers_unet import DiffusersDenoiser
from dxmi.networks.igebm import IgebmCritic
from dxmi.networks.layers import Attention, SpectralConv
from dxmi.networks.ncsnpp import NcsnppGan
from dxmi.networks.unet import ResidualBlock, Stage, Unet
from dxmi.persistence.tensor_files import printable

State = Mapping[str, Tensor]

DIFFUSERS_WEIGHTS = "diffusion_pytorch_model.safetensors"
DIFFUSERS_MARK = "time_embedding.linear_1.weight"
"""A tensor name that every UNet2DModel has."""
SIGMAS = ("log_betas", "std")
"""Tensors that the DxMI release stores next to the weights of a policy."""


# ----------------------------------------------------------------------------
# Rows.


class Row(NamedTuple):
    """One of our tensors, and the tensors that it consists of in a public layout.

    Attributes:
        ours: name of our tensor.
        theirs: names of their tensors, which are concatenated along the first axis.
        ones: number of trailing axes of size 1 that only theirs has, since their 1x1 convolution is our linear layer.
        transposed: whether theirs is [inputs, outputs].
        order: order of the rows of their stacked q, k and v, a permutation of `thd`: three, head, head dimension.
        heads: number of heads G, for `order`.
    """

    ours: str
    theirs: tuple[str, ...]
    ones: int = 0
    transposed: bool = False
    order: str = "thd"
    heads: int = 1

    def read(self, state: State, like: Tensor) -> Tensor:
        """Convert their tensors to ours, which has the shape of `like`.

        Raises:
            UserError: the shapes do not match, or a tensor holds values that are not finite floating-point numbers.
        """
        parts = [_floats(name, state[name]) for name in self.theirs]
        parts = [self._without_ones(part) for part in parts]
        parts = [part.T if self.transposed and part.dim() == 2 else part for part in parts]
        if len({part.shape[1:] for part in parts}) > 1 or not all(part.dim() for part in parts):
            shapes = ", ".join(str(tuple(part.shape)) for part in parts)
            raise UserError(
                f"{' and '.join(self.theirs)} of the checkpoint cannot be concatenated, their shapes are {shapes}."
            )
        whole = torch.cat(parts)
        if whole.shape != like.shape:
            raise UserError(
                f"{' and '.join(self.theirs)} of the checkpoint make a tensor of shape {tuple(whole.shape)}, but the "
                f"network's {self.ours} has {tuple(like.shape)}: the config describes another network."
            )
        return _reordered(whole, self.order, "thd", self.heads).contiguous()

    def _without_ones(self, part: Tensor) -> Tensor:
        """Drop the trailing axes of size 1, if there are any."""
        kept = part.dim() - self.ones
        return part.reshape(part.shape[:kept]) if kept > 0 and set(part.shape[kept:]) <= {1} else part

    def write(self, ours: Tensor) -> dict[str, Tensor]:
        """Convert our tensor to theirs."""
        parts = _reordered(ours.detach(), "thd", self.order, self.heads).chunk(len(self.theirs))
        parts = tuple(part.T if self.transposed and part.dim() > 1 else part for part in parts)
        ones = (1,) * self.ones
        parts = tuple(part.reshape(*part.shape, *ones) if part.dim() > 1 else part for part in parts)
        return {name: part.contiguous() for name, part in zip(self.theirs, parts, strict=True)}


def _floats(name: str, tensor: Tensor) -> Tensor:
    """Convert one of their tensors to float32.

    Raises:
        UserError: the dtype is not a floating-point type, or a number is not finite in float32.
    """
    if tensor.dtype not in _FLOATS:
        kinds = ", ".join(str(kind).removeprefix("torch.") for kind in _FLOATS)
        raise UserError(f"{name} of the checkpoint has dtype {tensor.dtype}: weights must be one of {kinds}.")
    single = tensor.detach().float()
    bad = single.numel() - int(single.isfinite().sum())
    if bad:
        raise UserError(
            f"{name} of the checkpoint has {bad} of {single.numel()} numbers that are not finite in float32: "
            "training had diverged when it was written, or the file is damaged."
        )
    return single


_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)


def _reordered(rows: Tensor, source: str, target: str, heads: int) -> Tensor:
    """Permute the three factors of the first axis [3 G D] from the order `source` to the order `target`."""
    if source == target:
        return rows
    sizes = {"t": 3, "h": heads, "d": len(rows) // (3 * heads)}
    apart = rows.reshape(*(sizes[axis] for axis in source), *rows.shape[1:])
    rest = range(3, apart.dim())
    return apart.permute(*(source.index(axis) for axis in target), *rest).reshape(rows.shape)


def _pairs(ours: str, theirs: str) -> list[Row]:
    """The rows of the weight and the bias of a layer."""
    return [Row(f"{ours}.{name}", (f"{theirs}.{name}",)) for name in ("weight", "bias")]


# ----------------------------------------------------------------------------
# The parts of the U-Net, and their names in each layout.


class Place(NamedTuple):
    """A part of our U-Net.

    Attributes:
        ours: our name for it.
        way: down, middle or up.
        level: 0 at the highest resolution.
        stage: index of the stage in its level; for a resample, the number of stages of the level.
        part: block, attention or resample.
    """

    ours: str
    way: str
    level: int
    stage: int
    part: str


def _places(network: Unet) -> Iterator[Place]:
    last = len(network.down) - 1
    for way, levels in (("down", network.down), ("up", network.up)):
        for number, level in enumerate(levels):
            depth = number if way == "down" else last - number
            for index, stage in enumerate(level.stages):
                yield from _stage(f"{way}.{number}.stages.{index}", stage, way, depth, index)
            if level.resample is not None:
                yield Place(f"{way}.{number}.resample", way, depth, len(level.stages), "resample")
    yield from _stage("middle_in", network.middle_in, "middle", last, 0)
    yield from _stage("middle_out", network.middle_out, "middle", last, 1)


def _stage(ours: str, stage: Stage, way: str, level: int, index: int) -> Iterator[Place]:
    yield Place(f"{ours}.block", way, level, index, "block")
    if isinstance(stage.attention, Attention):
        yield Place(f"{ours}.attention", way, level, index, "attention")


@dataclass(frozen=True)
class UnetLayout:
    """How a public repository names the tensors of a U-Net.

    Attributes:
        ends: maps our names of the layers outside the levels to theirs.
        labels: their name for the class embedding table.
        block: their names for norm_in, conv_in, embedding, norm_out, conv_out and skip of a block.
        attention: their names for norm, q k v (one or three), and out.
        where: returns their name for a place.
        order: see `Row`.
        ones: see `Row`; applies to the layers of the attention.
        labels_transposed: whether their class table is [E, classes].
        ignored: suffixes of the names of tensors that are not weights.
    """

    ends: Mapping[str, str]
    labels: str
    block: tuple[str, str, str, str, str, str]
    attention: tuple[str, tuple[str, ...], str]
    where: Callable[[Place, Unet], str]
    order: str = "thd"
    ones: int = 0
    labels_transposed: bool = False
    ignored: tuple[str, ...] = ()

    def rows(self, network: Unet) -> list[Row]:
        """All rows of a network."""
        rows = [row for ours, theirs in self.ends.items() for row in _pairs(ours, theirs)]
        if network.labels is not None:
            rows.append(Row("labels.weight", (self.labels,), transposed=self.labels_transposed))
        for place in _places(network):
            module, theirs = network.get_submodule(place.ours), self.where(place, network)
            if isinstance(module, Attention):
                rows += self._attention_rows(place.ours, theirs, module.heads)
            elif isinstance(module, ResidualBlock):
                rows += self._block_rows(place.ours, theirs, module)
            else:
                rows += _pairs(f"{place.ours}.conv", theirs)
        return rows

    def _block_rows(self, ours: str, theirs: str, block: ResidualBlock) -> list[Row]:
        names = ("norm_in", "conv_in", "embedding", "norm_out", "conv_out", "skip")
        rows = []
        for mine, name in zip(names, self.block, strict=True):
            if not isinstance(block.get_submodule(mine), nn.Identity):
                rows += _pairs(f"{ours}.{mine}", f"{theirs}.{name}")
        return rows

    def _attention_rows(self, ours: str, theirs: str, heads: int) -> list[Row]:
        norm, qkv, out = self.attention
        rows = _pairs(f"{ours}.norm", f"{theirs}.{norm}")
        for name in ("weight", "bias"):
            stacked = tuple(f"{theirs}.{part}.{name}" for part in qkv)
            rows.append(Row(f"{ours}.qkv.{name}", stacked, ones=self.ones, order=self.order, heads=heads))
            rows.append(Row(f"{ours}.out.{name}", (f"{theirs}.{out}.{name}",), ones=self.ones))
        return rows


def _in_ddpm(place: Place, network: Unet) -> str:  # noqa: ARG001
    if place.way == "middle":
        return "mid.attn_1" if place.part == "attention" else f"mid.block_{place.stage + 1}"
    if place.part == "resample":
        return f"{place.way}.{place.level}.{place.way}sample.conv"
    return f"{place.way}.{place.level}.{'attn' if place.part == 'attention' else 'block'}.{place.stage}"


def _in_diffusers(place: Place, network: Unet) -> str:
    part = "attentions" if place.part == "attention" else "resnets"
    if place.way == "middle":
        return f"mid_block.{part}.{place.stage}"
    number = place.level if place.way == "down" else len(network.down) - 1 - place.level
    if place.part == "resample":
        end = "" if network.style.resample_in_blocks else ".conv"
        return f"{place.way}_blocks.{number}.{place.way}samplers.0{end}"
    return f"{place.way}_blocks.{number}.{part}.{place.stage}"


def _in_adm(place: Place, network: Unet) -> str:
    blocks = network.config.blocks
    if place.way == "middle":
        return f"middle_block.{2 * place.stage + (place.part == 'attention')}"
    if place.way == "down":  # input block 0 is the input convolution
        number = 1 + place.level * (blocks + 1) + place.stage
        end = ("" if network.style.resample_in_blocks else ".op") if place.part == "resample" else ""
        return f"input_blocks.{number}.{int(place.part == 'attention')}{end}"
    number = (len(network.down) - 1 - place.level) * (blocks + 1) + place.stage
    if place.part != "resample":
        return f"output_blocks.{number}.{int(place.part == 'attention')}"
    attends = isinstance(network.up[len(network.down) - 1 - place.level].stages[0].attention, Attention)
    end = "" if network.style.resample_in_blocks else ".conv"
    return f"output_blocks.{number - 1}.{1 + attends}{end}"


def _in_edm(place: Place, network: Unet) -> str:
    def at(level: int) -> str:
        size = network.size >> level
        return f"{size}x{size}"

    if place.way == "middle":
        return f"dec.{at(place.level)}_in{place.stage}"
    if place.part == "resample":
        return f"enc.{at(place.level + 1)}_down" if place.way == "down" else f"dec.{at(place.level - 1)}_up"
    return f"{'enc' if place.way == 'down' else 'dec'}.{at(place.level)}_block{place.stage}"


_DDPM = UnetLayout(
    ends={
        "embed_in": "temb.dense.0",
        "embed_out": "temb.dense.1",
        "conv_in": "conv_in",
        "norm_out": "norm_out",
        "conv_out": "conv_out",
    },
    labels="label_emb.weight",
    block=("norm1", "conv1", "temb_proj", "norm2", "conv2", "nin_shortcut"),
    attention=("norm", ("q", "k", "v"), "proj_out"),
    where=_in_ddpm,
    ones=2,
)
_DIFFUSERS = UnetLayout(
    ends={
        "embed_in": "time_embedding.linear_1",
        "embed_out": "time_embedding.linear_2",
        "conv_in": "conv_in",
        "norm_out": "conv_norm_out",
        "conv_out": "conv_out",
    },
    labels="class_embedding.weight",
    block=("norm1", "conv1", "time_emb_proj", "norm2", "conv2", "conv_shortcut"),
    attention=("group_norm", ("to_q", "to_k", "to_v"), "to_out.0"),
    where=_in_diffusers,
)
_ADM = UnetLayout(
    ends={
        "embed_in": "time_embed.0",
        "embed_out": "time_embed.2",
        "conv_in": "input_blocks.0.0",
        "norm_out": "out.0",
        "conv_out": "out.2",
    },
    labels="label_emb.weight",
    block=("in_layers.0", "in_layers.2", "emb_layers.1", "out_layers.0", "out_layers.3", "skip_connection"),
    attention=("norm", ("qkv",), "proj_out"),
    where=_in_adm,
    ones=2,
)
_EDM = UnetLayout(
    ends={
        "embed_in": "map_layer0",
        "embed_out": "map_layer1",
        "norm_out": "out_norm",
        "conv_out": "out_conv",
    },
    labels="map_label.weight",
    block=("norm0", "conv0", "affine", "norm1", "conv1", "skip"),
    attention=("norm2", ("qkv",), "proj"),
    where=_in_edm,
    order="hdt",
    ones=2,
    labels_transposed=True,
    ignored=(".resample_filter",),
)


# ----------------------------------------------------------------------------
# The generators of denoising-diffusion GANs: one list of modules in the order in which they are used.


def _ddgan_rows(network: NcsnppGan) -> list[Row]:
    rows: list[Row] = []
    numbers = itertools.count()

    def add(ours: str, theirs: str | None = None) -> None:
        rows.extend(_pairs(ours, theirs or f"all_modules.{next(numbers)}"))

    def add_block(ours: str) -> None:
        theirs = f"all_modules.{next(numbers)}"
        for mine, name in _DDGAN_BLOCK.items():
            if not isinstance(network.get_submodule(f"{ours}.{mine}"), nn.Identity):
                add(f"{ours}.{mine}", f"{theirs}.{name}")

    def add_attention(ours: str) -> None:
        theirs = f"all_modules.{next(numbers)}"
        add(f"{ours}.norm", f"{theirs}.GroupNorm_0")
        for mine, name in (("weight", "W"), ("bias", "b")):
            stacked = tuple(f"{theirs}.NIN_{number}.{name}" for number in range(3))
            rows.append(Row(f"{ours}.qkv.{mine}", stacked, transposed=True))
            rows.append(Row(f"{ours}.out.{mine}", (f"{theirs}.NIN_3.{name}",), transposed=True))

    for ours in ("embed_in", "embed_out", "conv_in"):
        add(ours)
    for number, level in enumerate(network.down):
        for index in range(len(level.blocks)):
            add_block(f"down.{number}.blocks.{index}")
            if level.attention:
                add_attention(f"down.{number}.attention.{index}")
        if level.resample is not None:
            add_block(f"down.{number}.resample")
            add(f"down.{number}.pyramid.conv", f"all_modules.{next(numbers)}.Conv2d_0")
    add_block("middle_in")
    add_attention("middle_attention")
    add_block("middle_out")
    for number, level in enumerate(network.up):
        for index in range(len(level.blocks)):
            add_block(f"up.{number}.blocks.{index}")
        if level.attention:
            add_attention(f"up.{number}.attention.0")
        if level.resample is not None:
            add_block(f"up.{number}.resample")
    for ours in ("norm_out", "conv_out"):
        add(ours)
    for number in range(len(network.latent_layers)):  # the even numbers are activations, which have no weights
        add(f"latent_layers.{number}", f"z_transform.{2 * number + 1}")
    return rows


_DDGAN_BLOCK = {
    "norm_in.style": "GroupNorm_0.style",
    "conv_in": "Conv_0",
    "step": "Dense_0",
    "norm_out.style": "GroupNorm_1.style",
    "conv_out": "Conv_1",
    "skip": "Conv_2",
}


# ----------------------------------------------------------------------------
# The energies of the DxMI release.


def _igebm_rows(network: IgebmCritic) -> list[Row]:
    body, rows = network.body, []

    def add(ours: str, theirs: str) -> None:
        layer = body.get_submodule(ours)
        if isinstance(layer, SpectralConv):
            rows.append(Row(f"body.{ours}.conv.weight", (f"{theirs}.parametrizations.weight.original",)))
            rows.append(Row(f"body.{ours}.start", (f"{theirs}.parametrizations.weight.0._u",)))
            layer, ours = layer.conv, f"{ours}.conv"
        elif not isinstance(layer, nn.Identity):
            rows.append(Row(f"body.{ours}.weight", (f"{theirs}.weight",)))
        if getattr(layer, "bias", None) is not None:
            rows.append(Row(f"body.{ours}.bias", (f"{theirs}.bias",)))

    add("conv_in", "conv1")
    for number in range(len(body.blocks)):
        for mine, name in (("conv_in", "conv1"), ("conv_out", "conv2"), ("skip", "skip.0")):
            add(f"blocks.{number}.{mine}", f"blocks.{number}.{name}")
        if network.classes:
            rows.append(Row(f"body.blocks.{number}.labels.weight", (f"blocks.{number}.class_embed.weight",)))
    add("linear", "linear")
    add("output_scale", "out_scale")
    return rows


# ----------------------------------------------------------------------------
# Reading and writing.


def _layout_of(network: nn.Module, state: State) -> tuple[str, list[Row], tuple[str, ...]]:
    """The name, rows and ignored suffixes of the layout of `state`."""
    if isinstance(network, IgebmCritic):
        return "igebm", _igebm_rows(network), (".parametrizations.weight.0._v",)
    if isinstance(network, NcsnppGan):
        return "ddgan", _ddgan_rows(network), ()
    if isinstance(network, DiffusersDenoiser):
        return "diffusers", [Row(f"model.{name}", (name,)) for name in network.model.state_dict()], ()
    if isinstance(network, Unet):
        for mark, (name, layout_of) in _UNETS.items():
            if mark in state:
                layout = layout_of(network, state) if callable(layout_of) else layout_of
                return name, layout.rows(network), layout.ignored
    raise UserError(
        f"The layout of the checkpoint is not one that {type(network).__name__} can be read from (see "
        f"configs/README.md): its first names are {', '.join(map(printable, list(state)[:3]))}."
    )


def _adm(network: Unet, state: State) -> UnetLayout:  # noqa: ARG001
    """The layout of guided-diffusion, or that of the EDM teachers of openai/consistency_models.

    The attention of guided-diffusion has 1-D convolutions and stacks q, k and v head by head. That of the teachers has
    2-D convolutions and stacks all heads of q, then of k, then of v.
    """
    if any(name.endswith(".qkv.weight") and tensor.dim() == 3 for name, tensor in state.items()):
        return replace(_ADM, ones=1, order="htd")
    return _ADM


def _edm(network: Unet, state: State) -> UnetLayout:  # noqa: ARG001
    """The layout of EDM, whose input convolution is named after its resolution."""
    return replace(_EDM, ends={**_EDM.ends, "conv_in": f"enc.{network.size}x{network.size}_conv"})


_UNETS: dict[str, tuple[str, UnetLayout | Callable[[Unet, State], UnetLayout]]] = {
    "temb.dense.0.weight": ("ddpm", _DDPM),
    "time_embed.0.weight": ("adm", _adm),
    "map_layer0.weight": ("edm", _edm),
    DIFFUSERS_MARK: ("diffusers", _DIFFUSERS),
}
"""Layouts by a tensor name that occurs only in that layout."""


def is_known(names: Iterable[str]) -> bool:
    """Whether the names contain one that identifies a known layout."""
    names = set(names)
    return bool(names & (_UNETS.keys() | {"all_modules.0.weight"})) or (
        "linear.weight" in names and any(name.startswith("blocks.0.conv1.") for name in names)
    )


def load_public(network: nn.Module, state: State) -> str:
    """Load the weights of a public checkpoint into `network`; sigmas in the checkpoint are ignored.

    Args:
        network: a U-Net, a generator or an IGEBM energy, changed in place.
        state: tensors by name, as returned by `read_public`.

    Returns:
        The name of the layout, as in the module's docstring.

    Raises:
        UserError: the layout is unknown, the checkpoint is of a network other than the one that the config describes,
            or its weights are not finite numbers.
    """
    state = {name: tensor for name, tensor in state.items() if name not in SIGMAS}
    name, rows, ignored = _layout_of(network, state)
    _require_same_names(rows, {key for key in state if not key.endswith(ignored)})
    ours = network.state_dict()
    network.load_state_dict({row.ours: row.read(state, ours[row.ours]) for row in rows})
    return name


def _require_same_names(rows: list[Row], names: set[str]) -> None:
    wanted = {name for row in rows for name in row.theirs}
    for kind, odd in (("lacks", wanted - names), ("has no place for", names - wanted)):
        if odd:
            subject, rest = ("checkpoint", "") if kind == "lacks" else ("network", " of the checkpoint")
            names_shown = ", ".join(map(printable, sorted(odd)[:3])) + " and others" * (len(odd) > 3)
            raise UserError(f"The {subject} {kind} {names_shown}{rest}: the config describes another network.")


def public_log_sigma(state: State) -> Tensor | None:
    """Log sigma_t of each step of a fine-tuned policy of the DxMI release, [T]; None for other checkpoints.

    These are the values of `log_betas`, except that `std`, if present, gives the last one.

    Raises:
        UserError: they are not finite numbers, one per step.
    """
    if "log_betas" not in state:
        return None
    log_sigma = _floats("log_betas", state["log_betas"]).clone()
    std = _floats("std", state["std"]) if "std" in state else None
    if log_sigma.dim() != 1 or len(log_sigma) == 0 or (std is not None and std.shape != log_sigma.shape):
        raise UserError("log_betas and std of the checkpoint must hold one number per step of the policy.")
    if std is not None:
        if std[-1] <= 0.0:
            raise UserError(
                f"The last std of the checkpoint is {float(std[-1])}: it must be positive, since the last step needs "
                "noise."
            )
        log_sigma[-1] = std[-1].log()
    return log_sigma


def digest(state: State) -> str:
    """The sha256 of a checkpoint's names and tensors."""
    sha = hashlib.sha256()
    for name in sorted(state):
        tensor = state[name].detach().cpu().contiguous()
        sha.update(f"{name} {tensor.dtype} {tuple(tensor.shape)}".encode(errors="surrogateescape"))
        sha.update(tensor.reshape(-1).view(torch.uint8).numpy().tobytes())
    return sha.hexdigest()


def to_public(network: Unet, layout: str) -> dict[str, Tensor]:
    """The weights of a U-Net in the layout `ddpm`, `adm` (that of the EDM teachers) or `diffusers`."""
    rows = {"ddpm": _DDPM, "adm": _ADM, "diffusers": _DIFFUSERS}[layout].rows(network)
    ours = network.state_dict()
    return {name: tensor for row in rows for name, tensor in row.write(ours[row.ours]).items()}
