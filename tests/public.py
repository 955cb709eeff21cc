"""A second implementation of the public networks, written from their names alone.

`Public` is a `state_dict` that comes into being as a reference asks for it: each tensor is made, with the documented
name and shape, when the computation first needs it. The computation is plain functions; nothing of it is the package's.
"""

import math

import torch
from torch import Tensor
from torch.nn import functional as F


class Public:
    """Names and random tensors of a public checkpoint, in float64."""

    def __init__(self, seed: int = 0) -> None:
        self.state: dict[str, Tensor] = {}
        self.generator = torch.Generator().manual_seed(seed)

    def get(self, name: str, *shape: int, scale: float | None = None, shift: float = 0.0) -> Tensor:
        if name not in self.state:
            fan_in = math.prod(shape[1:]) if len(shape) > 1 else 100
            deviation = scale if scale is not None else 1.0 / math.sqrt(fan_in)
            noise = torch.randn(shape, generator=self.generator, dtype=torch.float64)
            self.state[name] = shift + deviation * noise
        assert self.state[name].shape == shape, name
        return self.state[name]

    def floats(self) -> dict[str, Tensor]:
        return {name: tensor.float() for name, tensor in self.state.items()}

    # Layers. Each asks for its weight and its bias.

    def conv(self, name: str, x: Tensor, outputs: int, size: int = 3, stride: int = 1, *, bias: bool = True) -> Tensor:
        weight = self.get(f"{name}.weight", outputs, x.shape[1], size, size)
        shift = self.get(f"{name}.bias", outputs) if bias else None
        return F.conv2d(x, weight, shift, stride=stride, padding=size // 2)

    def linear(self, name: str, x: Tensor, outputs: int) -> Tensor:
        return F.linear(x, self.get(f"{name}.weight", outputs, x.shape[1]), self.get(f"{name}.bias", outputs))

    def norm(self, name: str, x: Tensor, groups: int, eps: float) -> Tensor:
        """GroupNorm by its definition."""
        grouped = x.reshape(len(x), groups, -1)
        mean, variance = grouped.mean(2, keepdim=True), grouped.var(2, keepdim=True, unbiased=False)
        h = ((grouped - mean) / (variance + eps).sqrt()).reshape(x.shape)
        weight, bias = self.get(f"{name}.weight", x.shape[1], shift=1.0), self.get(f"{name}.bias", x.shape[1])
        return h * weight[:, None, None] + bias[:, None, None]


def silu(x: Tensor) -> Tensor:
    return x / (1.0 + (-x).exp())


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Each [B, G, D, N]: every pixel takes a mean of v weighted by softmax(q . k / sqrt(D))."""
    weights = (torch.einsum("bgdn,bgdm->bgnm", q, k) / math.sqrt(q.shape[2])).softmax(dim=3)
    return torch.einsum("bgnm,bgdm->bgdn", weights, v)


def halved(x: Tensor) -> Tensor:
    return (x[:, :, ::2, ::2] + x[:, :, 1::2, ::2] + x[:, :, ::2, 1::2] + x[:, :, 1::2, 1::2]) / 4.0


def doubled(x: Tensor) -> Tensor:
    return x.repeat_interleave(2, dim=2).repeat_interleave(2, dim=3)


# ----------------------------------------------------------------------------
# pesser/pytorch_diffusion's names: DDPM on CIFAR-10.


def ddpm(
    p: Public,
    x: Tensor,
    steps: Tensor,
    *,
    channels: int,
    multipliers: tuple[int, ...],
    blocks: int,
    attention: tuple[int, ...],
    groups: int,
) -> Tensor:
    """The noise in `x` [B, C, H, H] at `steps` [B]."""
    hidden, half_dim, colors = 4 * channels, channels // 2, x.shape[1]
    frequency = torch.tensor([10_000.0 ** (-i / (half_dim - 1)) for i in range(half_dim)], dtype=torch.float64)
    angle = steps.double()[:, None] * frequency
    temb = p.linear("temb.dense.0", torch.cat((angle.sin(), angle.cos()), dim=1), hidden)
    temb = p.linear("temb.dense.1", silu(temb), hidden)

    def block(name: str, h: Tensor, outputs: int) -> Tensor:
        x = h
        h = p.conv(f"{name}.conv1", silu(p.norm(f"{name}.norm1", h, groups, 1e-6)), outputs)
        h = h + p.linear(f"{name}.temb_proj", silu(temb), outputs)[:, :, None, None]
        h = p.conv(f"{name}.conv2", silu(p.norm(f"{name}.norm2", h, groups, 1e-6)), outputs)
        return h + (x if x.shape[1] == outputs else p.conv(f"{name}.nin_shortcut", x, outputs, size=1))

    def attn(name: str, h: Tensor) -> Tensor:
        n = p.norm(f"{name}.norm", h, groups, 1e-6)
        q, k, v = (p.conv(f"{name}.{part}", n, h.shape[1], size=1).flatten(2)[:, None] for part in "qkv")
        return h + p.conv(f"{name}.proj_out", attend(q, k, v).reshape(h.shape), h.shape[1], size=1)

    hs = [p.conv("conv_in", x, channels)]
    last = len(multipliers) - 1
    for level, multiplier in enumerate(multipliers):
        for i in range(blocks):
            h = block(f"down.{level}.block.{i}", hs[-1], channels * multiplier)
            if h.shape[2] in attention:
                h = attn(f"down.{level}.attn.{i}", h)
            hs.append(h)
        if level < last:
            padded = F.pad(hs[-1], (0, 1, 0, 1))
            # A convolution without padding: what `conv` pads is cut away again.
            hs.append(p.conv(f"down.{level}.downsample.conv", padded, h.shape[1])[:, :, 1:-1:2, 1:-1:2])
    h = block("mid.block_1", hs[-1], channels * multipliers[-1])
    h = block("mid.block_2", attn("mid.attn_1", h), channels * multipliers[-1])
    for level in range(last, -1, -1):
        for i in range(blocks + 1):
            h = block(f"up.{level}.block.{i}", torch.cat((h, hs.pop()), dim=1), channels * multipliers[level])
            if h.shape[2] in attention:
                h = attn(f"up.{level}.attn.{i}", h)
        if level:
            h = p.conv(f"up.{level}.upsample.conv", doubled(h), h.shape[1])
    return p.conv("conv_out", silu(p.norm("norm_out", h, groups, 1e-6)), colors)


# ----------------------------------------------------------------------------
# openai/guided-diffusion's names, which openai/consistency_models shares but for the attention's layers.


def adm(
    p: Public,
    x: Tensor,
    steps: Tensor,
    labels: Tensor | None,
    *,
    channels: int,
    multipliers: tuple[int, ...],
    blocks: int,
    attention: tuple[int, ...],
    groups: int,
    head_channels: int,
    classes: int,
    scale_shift: bool,
    resample_in_blocks: bool,
    guided: bool = False,
) -> Tensor:
    """The network's output at `x` [B, C, H, H], `steps` [B] and `labels` [B].

    With `guided`, attention is guided-diffusion's: 1-D convolutions whose outputs are [head, (q, k, v), dimension].
    Without, it is that of the EDM teachers: 2-D ones with [(q, k, v), head, dimension].
    """
    hidden, colors = 4 * channels, x.shape[1]
    half_dim = channels // 2
    frequency = torch.tensor([10_000.0 ** (-i / half_dim) for i in range(half_dim)], dtype=torch.float64)
    angle = steps.double()[:, None] * frequency
    emb = p.linear("time_embed.0", torch.cat((angle.cos(), angle.sin()), dim=1), hidden)
    emb = p.linear("time_embed.2", silu(emb), hidden)
    if labels is not None:
        emb = emb + p.get("label_emb.weight", classes, hidden, scale=1.0)[labels]

    def block(name: str, h: Tensor, outputs: int, resample=None) -> Tensor:
        x = h
        h = silu(p.norm(f"{name}.in_layers.0", h, groups, 1e-5))
        if resample is not None:
            h, x = resample(h), resample(x)
        h = p.conv(f"{name}.in_layers.2", h, outputs)
        e = p.linear(f"{name}.emb_layers.1", silu(emb), outputs * (2 if scale_shift else 1))[:, :, None, None]
        if scale_shift:
            h = p.norm(f"{name}.out_layers.0", h, groups, 1e-5) * (1.0 + e[:, :outputs]) + e[:, outputs:]
        else:
            h = p.norm(f"{name}.out_layers.0", h + e, groups, 1e-5)
        h = p.conv(f"{name}.out_layers.3", silu(h), outputs)
        return h + (x if x.shape[1] == outputs else p.conv(f"{name}.skip_connection", x, outputs, size=1))

    def attn(name: str, h: Tensor) -> Tensor:
        c, ones = h.shape[1], (1,) if guided else (1, 1)
        heads = c // head_channels
        n = p.norm(f"{name}.norm", h, groups, 1e-5).flatten(2)
        qkv = torch.einsum("oi,bin->bon", p.get(f"{name}.qkv.weight", 3 * c, c, *ones).flatten(1), n)
        qkv = qkv + p.get(f"{name}.qkv.bias", 3 * c)[:, None]
        if guided:
            q, k, v = qkv.reshape(len(h), heads, 3, head_channels, -1).unbind(2)
        else:
            q, k, v = qkv.reshape(len(h), 3, heads, head_channels, -1).unbind(1)
        mixed = attend(q, k, v).reshape(len(h), c, -1)
        out = torch.einsum("oi,bin->bon", p.get(f"{name}.proj_out.weight", c, c, *ones).flatten(1), mixed)
        return h + (out + p.get(f"{name}.proj_out.bias", c)[:, None]).reshape(h.shape)

    h = p.conv("input_blocks.0.0", x, channels * multipliers[0])
    hs, number, last = [h], 1, len(multipliers) - 1
    for level, multiplier in enumerate(multipliers):
        for _ in range(blocks):
            h = block(f"input_blocks.{number}.0", h, channels * multiplier)
            if h.shape[2] in attention:
                h = attn(f"input_blocks.{number}.1", h)
            hs.append(h)
            number += 1
        if level < last:
            name = f"input_blocks.{number}.0"
            if resample_in_blocks:
                h = block(name, h, h.shape[1], halved)
            else:
                h = p.conv(f"{name}.op", h, h.shape[1], stride=2)
            hs.append(h)
            number += 1
    h = attn("middle_block.1", block("middle_block.0", h, h.shape[1]))
    h = block("middle_block.2", h, h.shape[1])
    number = 0
    for level in range(last, -1, -1):
        for i in range(blocks + 1):
            h = block(f"output_blocks.{number}.0", torch.cat((h, hs.pop()), dim=1), channels * multipliers[level])
            attends = h.shape[2] in attention
            if attends:
                h = attn(f"output_blocks.{number}.1", h)
            if level and i == blocks:
                name = f"output_blocks.{number}.{1 + attends}"
                if resample_in_blocks:
                    h = block(name, h, h.shape[1], doubled)
                else:
                    h = p.conv(f"{name}.conv", doubled(h), h.shape[1])
            number += 1
    return p.conv("out.2", silu(p.norm("out.0", h, groups, 1e-5)), colors)


# ----------------------------------------------------------------------------
# NVlabs/edm's names of the ADM network.


def edm(
    p: Public,
    x: Tensor,
    steps: Tensor,
    labels: Tensor,
    *,
    channels: int,
    multipliers: tuple[int, ...],
    blocks: int,
    attention: tuple[int, ...],
    groups: int,
    head_channels: int,
    classes: int,
) -> Tensor:
    """The network's output at `x` [B, C, H, H], c_noise = log(sigma) / 4 in `steps` [B], and `labels` [B]."""
    hidden, colors, half_dim = 4 * channels, x.shape[1], channels // 2
    frequency = torch.tensor([10_000.0 ** (-i / half_dim) for i in range(half_dim)], dtype=torch.float64)
    angle = steps.double()[:, None] * frequency
    emb = silu(p.linear("map_layer0", torch.cat((angle.cos(), angle.sin()), dim=1), hidden))
    one_hot = F.one_hot(labels, classes).double()
    emb = p.linear("map_layer1", emb, hidden) + one_hot @ p.get("map_label.weight", hidden, classes, scale=1.0).T
    emb = silu(emb)

    def block(name: str, h: Tensor, outputs: int, *, resample=None, attends: bool = False) -> Tensor:
        x = h
        h = silu(p.norm(f"{name}.norm0", h, groups, 1e-5))
        if resample is not None:
            for layer in ("conv0", "skip"):  # a buffer, which holds the box filter
                p.state[f"{name}.{layer}.resample_filter"] = torch.full((1, 1, 2, 2), 0.25)
            h, x = resample(h), resample(x)
        h = p.conv(f"{name}.conv0", h, outputs)
        scale, shift = p.linear(f"{name}.affine", emb, 2 * outputs)[:, :, None, None].chunk(2, dim=1)
        h = silu(shift + p.norm(f"{name}.norm1", h, groups, 1e-5) * (scale + 1.0))
        h = p.conv(f"{name}.conv1", h, outputs)
        h = h + (x if x.shape[1] == outputs else p.conv(f"{name}.skip", x, outputs, size=1))
        if not attends:
            return h
        heads = outputs // head_channels
        qkv = p.conv(f"{name}.qkv", p.norm(f"{name}.norm2", h, groups, 1e-5), 3 * outputs, size=1)
        q, k, v = qkv.reshape(len(h), heads, head_channels, 3, -1).unbind(3)
        return h + p.conv(f"{name}.proj", attend(q, k, v).reshape(h.shape), outputs, size=1)

    def at(level: int) -> str:
        size = x.shape[2] // 2**level
        return f"{size}x{size}"

    h = p.conv(f"enc.{at(0)}_conv", x, channels * multipliers[0])
    hs, last = [h], len(multipliers) - 1
    for level, multiplier in enumerate(multipliers):
        if level:
            h = block(f"enc.{at(level)}_down", h, h.shape[1], resample=halved)
            hs.append(h)
        for i in range(blocks):
            h = block(f"enc.{at(level)}_block{i}", h, channels * multiplier, attends=h.shape[2] in attention)
            hs.append(h)
    h = block(f"dec.{at(last)}_in0", h, h.shape[1], attends=True)
    h = block(f"dec.{at(last)}_in1", h, h.shape[1])
    for level in range(last, -1, -1):
        if level < last:
            h = block(f"dec.{at(level)}_up", h, h.shape[1], resample=doubled)
        for i in range(blocks + 1):
            joined, outputs = torch.cat((h, hs.pop()), dim=1), channels * multipliers[level]
            h = block(f"dec.{at(level)}_block{i}", joined, outputs, attends=h.shape[2] in attention)
    return p.conv("out_conv", silu(p.norm("out_norm", h, groups, 1e-5)), colors)


# ----------------------------------------------------------------------------
# NVlabs/denoising-diffusion-gan's names: NCSN++ with a latent.


def _upfirdn(x: Tensor, kernel: list[float], up: int, down: int, before: int, after: int) -> Tensor:
    """Zeros between pixels, zeros around, the 2-D filter, every `down`-th pixel: written out for each axis."""
    filters = torch.tensor(kernel, dtype=x.dtype)
    for axis in (2, 3):
        x = x.movedim(axis, -1)
        spread = torch.zeros(*x.shape[:-1], x.shape[-1] * up, dtype=x.dtype)
        spread[..., ::up] = x
        padded = F.pad(spread, (before, after))
        length = padded.shape[-1] - len(kernel) + 1
        x = sum(filters[i] * padded[..., i : i + length] for i in range(len(kernel)))[..., ::down]
        x = x.movedim(-1, axis)
    return x


def ddgan(
    p: Public,
    x: Tensor,
    steps: Tensor,
    z: Tensor,
    *,
    channels: int,
    multipliers: tuple[int, ...],
    blocks: int,
    attention: tuple[int, ...],
    latent: int,
    latent_embedding: int,
    latent_layers: int,
) -> Tensor:
    """The image in `x` [B, C, H, H] at `steps` [B] with the latent `z` [B, Z]."""
    colors, half_dim, root = x.shape[1], channels // 2, math.sqrt(2.0)
    taps = [1 / 8, 3 / 8, 3 / 8, 1 / 8]
    number = -1

    def module() -> str:
        nonlocal number
        number += 1
        return f"all_modules.{number}"

    zemb = z.double() / (z.double().square().mean(1, keepdim=True) + 1e-8).sqrt()
    for i in range(latent_layers + 1):
        zemb = silu(p.linear(f"z_transform.{2 * i + 1}", zemb, latent_embedding))
    frequency = torch.tensor([10_000.0 ** (-i / (half_dim - 1)) for i in range(half_dim)], dtype=torch.float64)
    angle = steps.double()[:, None] * frequency
    temb = p.linear(module(), torch.cat((angle.sin(), angle.cos()), dim=1), 4 * channels)
    temb = p.linear(module(), silu(temb), 4 * channels)

    def adaptive(name: str, h: Tensor) -> Tensor:
        style = p.linear(f"{name}.style", zemb, 2 * h.shape[1])[:, :, None, None]
        normed = F.group_norm(h, min(h.shape[1] // 4, 32), eps=1e-6)
        return style[:, : h.shape[1]] * normed + style[:, h.shape[1] :]

    def block(h: Tensor, outputs: int, way: str = "") -> Tensor:
        name, x = module(), h
        h = silu(adaptive(f"{name}.GroupNorm_0", h))
        if way == "down":
            h, x = (_upfirdn(a, taps, 1, 2, 1, 1) for a in (h, x))
        if way == "up":
            h, x = (_upfirdn(a, [2 * tap for tap in taps], 2, 1, 2, 1) for a in (h, x))
        h = p.conv(f"{name}.Conv_0", h, outputs) + p.linear(f"{name}.Dense_0", silu(temb), outputs)[:, :, None, None]
        h = p.conv(f"{name}.Conv_1", silu(adaptive(f"{name}.GroupNorm_1", h)), outputs)
        if x.shape[1] != outputs or way:
            x = p.conv(f"{name}.Conv_2", x, outputs, size=1)
        return (x + h) / root

    def attn(h: Tensor) -> Tensor:
        name, c = module(), h.shape[1]
        n = p.norm(f"{name}.GroupNorm_0", h, min(c // 4, 32), 1e-6).flatten(2)

        def nin(i: int, a: Tensor) -> Tensor:
            return (
                torch.einsum("io,bin->bon", p.get(f"{name}.NIN_{i}.W", c, c), a)
                + p.get(f"{name}.NIN_{i}.b", c)[:, None]
            )

        q, k, v = (nin(i, n)[:, None] for i in range(3))
        return (h + nin(3, attend(q, k, v)[:, 0]).reshape(h.shape)) / root

    h = p.conv(module(), x, channels)
    hs, image, last = [h], x, len(multipliers) - 1
    for level, multiplier in enumerate(multipliers):
        for _ in range(blocks):
            h = block(h, channels * multiplier)
            if h.shape[2] in attention:
                h = attn(h)
            hs.append(h)
        if level < last:
            h = block(h, h.shape[1], "down")
            name, smooth = f"{module()}.Conv2d_0", _upfirdn(image, taps, 1, 1, 2, 2)
            weight = p.get(f"{name}.weight", h.shape[1], image.shape[1], 3, 3)
            image = F.conv2d(smooth, weight, stride=2) + p.get(f"{name}.bias", h.shape[1])[:, None, None]
            h = image = (image + h) / root
            hs.append(h)
    h = block(attn(block(h, h.shape[1])), h.shape[1])
    for level in range(last, -1, -1):
        for _ in range(blocks + 1):
            h = block(torch.cat((h, hs.pop()), dim=1), channels * multipliers[level])
        if h.shape[2] in attention:
            h = attn(h)
        if level:
            h = block(h, h.shape[1], "up")
    h = silu(p.norm(module(), h, min(h.shape[1] // 4, 32), 1e-6))
    return torch.tanh(p.conv(module(), h, colors))
