"""Shapes and memory layouts, serialization, conversion between pixels and floats, and checks for finite numbers.

Axis letters: B batch, C channels, H height, W width; *event stands for all axes after the batch axis.
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from itertools import pairwise
from typing import Any, TypeVar

import torch
from safetensors.torch import load as load_safetensors
from safetensors.torch import save as save_safetensors
from torch import Tensor

from dxmi.errors import DivergedError

Item = TypeVar("Item")
_IMAGE_RANK = 4
"""Number of axes of a batch of images, [B, C, H, W]."""


def per_sample(scalar: Tensor, like: Tensor) -> Tensor:
    """Reshape `scalar` [B] or [1] to [B, 1, ...], which broadcasts over `like` [B, *event]."""
    return scalar.view(-1, *[1] * (like.dim() - 1))


def pack(tensors: Mapping[str, Tensor]) -> bytes:
    """Serialize tensors of any layout and device as safetensors."""
    return save_safetensors({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()})


def unpack(content: bytes) -> dict[str, Tensor]:
    """Deserialize tensors packed by `pack`: row-major tensors on the host, sorted by name.

    Matrix products with a transposed and with a row-major matrix use different BLAS routines, and may differ in the
    last bits. Results that are either computed or read from a file must therefore both be passed through this function.
    """
    return dict(sorted(load_safetensors(content).items()))


def laid_out_as(x: Tensor, like: Tensor) -> Tensor:
    """Copy `x` to the strides and the device of `like`; returns `x` if they are already equal."""
    if x.stride() == like.stride() and x.device == like.device:
        return x
    return torch.empty_like(like, dtype=x.dtype).copy_(x)


def event_sum(x: Tensor) -> Tensor:
    """Sum `x` [B, *event] over the event: [B]."""
    return x.flatten(1).sum(1)


def event_mean(x: Tensor) -> Tensor:
    """Average `x` [B, *event] over the event: [B]."""
    return x.flatten(1).mean(1)


def from_uint8(images: Tensor) -> Tensor:
    """Convert pixels 0..255 to floats in [-1, 1]."""
    return images.to(torch.float32).mul_(2.0 / 255.0).sub_(1.0)


def to_uint8(x: Tensor) -> Tensor:
    """Convert floats to pixels 0..255: the inverse of `from_uint8`, with values outside [-1, 1] clipped.

    `x` must be finite, since NaN has no equivalent; `dxmi.evaluation.sampling` checks this.
    """
    return x.clamp(-1.0, 1.0).add(1.0).mul(255.0 / 2.0).round_().to(torch.uint8)


def decode(stored: Tensor) -> Tensor:
    """Convert stored samples to floats: uint8 pixels to [-1, 1]; coordinates of points are unchanged."""
    return from_uint8(stored) if stored.dtype == torch.uint8 else stored


def encode(x: Tensor) -> Tensor:
    """Convert samples [N, *event] for storage: images (events [C, H, W]) to pixels 0..255; points are unchanged."""
    return to_uint8(x) if x.dim() == _IMAGE_RANK else x


def num_beyond(x: Tensor, bound: float) -> Tensor:
    """Count the samples of `x` [B, *event] with NaN or a magnitude above `bound`: a scalar tensor on the device."""
    return (~(x.abs() <= bound).flatten(1).all(dim=1)).sum()


def require_finite(x: Tensor, what: str, step: int = 0) -> Tensor:
    """Return `x` after checking that it is finite.

    Raises:
        DivergedError: `x` contains NaN or infinity; the message calls it `what`.
    """
    good = x.isfinite()
    if good.all():
        return x
    bad = x[~good]
    value = float(bad[0])
    sentence = f"{what} cannot be used: {len(bad)} of {x.numel()} numbers are not finite, the first is {value}."
    raise DivergedError(step, what, value, sentence)


def require_finite_state(state: Mapping[str, Tensor], what: str, step: int) -> None:
    """Check that the weights of iteration `step` are finite.

    Raises:
        DivergedError: a tensor is not finite; the message contains `what` and the name of the tensor.
    """
    for name, tensor in state.items():
        if tensor.is_floating_point() and not tensor.isfinite().all():
            sentence = f"{what} of iteration {step} holds weights that are not finite, in {name}: training diverged."
            raise DivergedError(step, name, math.nan, sentence)


def require_finite_metrics(metrics: dict[str, float], step: int) -> dict[str, float]:
    """Return the metrics after checking that they are finite.

    Raises:
        DivergedError: a metric is not finite.
    """
    for key, value in metrics.items():
        if not math.isfinite(value):
            raise DivergedError(step, key, value)
    return metrics


def calling(items: Iterable[Item], on_step: Callable[[], None] | None) -> Iterator[Item]:
    """Yield the items, and call `on_step`, if given, after each."""
    for item in items:
        yield item
        if on_step is not None:
            on_step()


def map_tensors(change: Callable[[Tensor], Any], tree: Any) -> Any:
    """Apply `change` to every tensor in nested tuples, named tuples and dicts; other values are unchanged."""
    if isinstance(tree, Tensor):
        return change(tree)
    if isinstance(tree, dict):
        return {key: map_tensors(change, value) for key, value in tree.items()}
    if isinstance(tree, tuple):
        items = [map_tensors(change, value) for value in tree]
        return type(tree)(*items) if hasattr(tree, "_fields") else tuple(items)
    return tree


def batch_rows(tree: Item, rows: slice) -> Item:
    """Select rows of all tensors [K, b, ...] in nested tuples and dicts."""
    return map_tensors(lambda x: x[:, rows], tree)  # type: ignore[no-any-return]


def joined_rows(trees: Sequence[Item]) -> Item:
    """Concatenate the tensors [K, b, ...] of equally nested tuples and dicts along their rows."""
    if len(trees) == 1:
        return trees[0]
    columns = zip(*(tensors_of(tree) for tree in trees), strict=True)
    return with_tensors(trees[0], (torch.cat(parts, dim=1) for parts in columns))  # type: ignore[no-any-return]


def tensors_of(tree: Any) -> list[Tensor]:
    """List the tensors in nested tuples and dicts, in order."""
    found: list[Tensor] = []
    map_tensors(found.append, tree)
    return found


def with_tensors(tree: Any, tensors: Iterator[Tensor]) -> Any:
    """Replace the tensors in nested tuples and dicts with these, in order: the inverse of `tensors_of`."""
    return map_tensors(lambda _: next(tensors), tree)


def chunks(num: int, pieces: int) -> list[slice]:
    """Split `num` rows into `pieces` slices whose sizes differ by at most one.

    Empty slices are omitted; if there are no rows, one empty slice is returned.
    """
    edges = [piece * num // pieces for piece in range(pieces + 1)]
    return [slice(a, b) for a, b in pairwise(edges) if b > a] or [slice(0, 0)]
