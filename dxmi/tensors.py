"""Shapes and layouts, tensors as bytes, and the two places where pixels change type.

Axis letters: B batch, C channels, H height, W width; *event is everything after the batch axis.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import pairwise
from typing import Any, TypeVar

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from dxmi.errors import DivergedError

Item = TypeVar("Item")
_IMAGE_RANK = 4
"""B, C, H, W."""


def per_sample(scalar: Tensor, like: Tensor) -> Tensor:
    """`scalar` [B] or [1], reshaped to [B, 1, ...] so that it multiplies `like` [B, *event]."""
    return scalar.view(-1, *[1] * (like.dim() - 1))


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Tensors as safetensors, whatever their layout and device."""
    return save_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unpack(content: bytes) -> dict[str, Tensor]:
    """The inverse of `pack`: row-major, on the host, in the order of their names.

    A product with a transposed matrix takes another path through BLAS than one with the same matrix stored row by row,
    and may differ in its last bits. Where a result may be computed or read, both ways therefore have to end here.
    """
    return dict(sorted(load_safetensors(content).items()))


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """A copy of `x` with the strides and on the device of `like`, or `x` itself if it has them."""
    if x.stride() == like.stride() and x.device == like.device:
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def event_sum(x: Tensor) -> Tensor:
    """Sum over the event of `x` [B, *event]: [B]."""
    return x.flatten(1).sum(1)


def event_mean(x: Tensor) -> Tensor:
    """Mean over the event of `x` [B, *event]: [B]."""
    return x.flatten(1).mean(1)


def from_uint8(images: Tensor) -> Tensor:
    """Pixels 0..255 as floats in [-1, 1]."""
    return images.to(torch.float32).mul_(2.0 / 255.0).sub_(1.0)


def to_uint8(x: Tensor) -> Tensor:
    """Floats as pixels 0..255: the inverse of `from_uint8`, with values outside [-1, 1] clipped.

    NaN has no pixel: whoever calls this has made sure that `x` is finite, as `dxmi.evaluation.sampling` does.
    """
    return x.clamp(-1.0, 1.0).add(1.0).mul(255.0 / 2.0).round_().to(torch.uint8)


def decode(stored: Tensor) -> Tensor:
    """Stored samples as floats: uint8 pixels in [-1, 1], the coordinates of points as they are."""
    return from_uint8(stored) if stored.dtype == torch.uint8 else stored


def encode(x: Tensor) -> Tensor:
    """Samples [N, *event] as they are stored: images (events [C, H, W]) as pixels 0..255, points as they are."""
    return to_uint8(x) if x.dim() == _IMAGE_RANK else x


def num_beyond(x: Tensor, bound: float) -> Tensor:
    """How many samples of `x` [B, *event] hold NaN or what is larger than `bound`: one reduction on the device, []."""
    return (~(x.abs() <= bound).flatten(1).all(dim=1)).sum()


def require_finite(x: Tensor, what: str, step: int = 0) -> Tensor:
    """`x` itself.

    Raises:
        DivergedError: it holds NaN or infinity; `what` names it in the sentence.
    """
    bad = ~x.isfinite()
    if bad.any():
        value = float(x[bad][0])
        sentence = (
            f"{what} cannot be used: {int(bad.sum())} of {x.numel()} numbers are not finite, the first is {value}."
        )
        raise DivergedError(step, what, value, sentence)
    return x


def require_finite_state(state: Mapping[str, Tensor], what: str, step: int) -> None:
    """Check the weights of iteration `step`, whose sentence names `what` and the first tensor that is not finite.

    Raises:
        DivergedError: one of them is not finite.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            sentence = f"{what} of iteration {step} holds weights that are not finite, in {name}: training diverged."
            raise DivergedError(step, name, math.nan, sentence)


def require_finite_metrics(metrics: dict[str, float], step: int) -> dict[str, float]:
    """The metrics themselves.

    Raises:
        DivergedError: one of them is not finite.
    """
    for key, value in metrics.items():
        if not math.isfinite(value):
            raise DivergedError(step, key, value)
    return metrics


def calling(items: Iterable[Item], on_step: Callable[[], None] | None) -> Iterator[Item]:
    """The items, one after the other; `on_step`, if there is one, is called after each."""
    for item in items:
        yield item
        if on_step is not None:
            on_step()


def map_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """Nested tuples, named tuples and dicts with every tensor changed; whatever else they hold stays as it is."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(change, value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        items = [map_tensors(change, value) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return tree


def tensors_of(tree: Any) -> list[Tensor]:
    """The tensors of nested tuples and dicts, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def with_tensors(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """The inverse of `tensors_of`: the nested tuples and dicts with these tensors in the places of their own."""
    return map_tensors(lambda _: next(tensors), tree)


def chunks(num: int, pieces: int) -> list[slice]:
    """`num` rows cut into `pieces` slices that differ by one row at most; empty ones are left out, but for the last."""
    edges = [piece * num // pieces for piece in range(pieces + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a] or [slice(0, 0)]
