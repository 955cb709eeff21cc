"""A summary of the content of a data set, for `dxmi data`."""

from dataclasses import dataclass

import torch
from torch import Tensor

from dxmi.data.dataset import Dataset
from dxmi.data.images import Images
from dxmi.data.planar import SQUARE, Points
from dxmi.seeds import generator

_CHUNK = 1_024
"""Number of images whose values are counted at a time, since a memory map may be larger than the memory."""
_COLORS = {1: ("gray",), 3: ("red", "green", "blue")}


@dataclass(frozen=True)
class ClassCount:
    """The size of a class.

    Attributes:
        number: Label of the class.
        name: Name of its folder, or the name given by the authors of the data set.
        count: Number of its samples.
    """

    number: int
    name: str
    count: int


@dataclass(frozen=True)
class Description:
    """A description of a data set as text.

    Attributes:
        facts: Values by title, in the order of display.
        classes: Sizes of the classes; empty if there are no classes.
        notes: What was left out or changed when the samples were read.
    """

    facts: dict[str, str]
    classes: tuple[ClassCount, ...]
    notes: tuple[str, ...]


def describe(data: Dataset) -> Description:
    """Describe the number, size, values, identity and classes of the samples; all samples are read."""
    facts = _image_facts(data) if isinstance(data, Images) else _point_facts(data)
    identity = "samples, labels and names of the classes" if data.num_classes else "samples"
    facts["identity"] = f"{data.signature} (hash of {identity})"
    return Description(facts, class_counts(data), data.notes)


def class_counts(data: Dataset) -> tuple[ClassCount, ...]:
    """The size of every class."""
    if data.class_counts is None:
        return ()
    names = data.class_names if isinstance(data, Images) else ()
    counts = enumerate(data.class_counts.tolist())
    return tuple(ClassCount(number, names[number] if names else str(number), count) for number, count in counts)


def some_of(data: Dataset, num: int) -> tuple[Tensor, Tensor | None]:
    """A fixed random selection of `num` samples [num, *event] and their classes [num], sorted by class."""
    rows = torch.randperm(len(data), generator=generator(0, "data/shown"))[:num].sort().values
    if data.classes is None:
        return data.stored[rows], None
    rows = rows[data.classes[rows].argsort(stable=True)]
    return data.stored[rows], data.classes[rows]


# ----------------------------------------------------------------------------
# Values.


def _image_facts(images: Images) -> dict[str, str]:
    channels, height, width = images.event
    facts = {
        "data": images.name,
        "read from": images.source or "memory",
        "images": f"{len(images):,}",
        "size": f"{height} x {width} pixels, {channels} channel{'s' * (channels > 1)}",
    }
    for name, counts in zip(_COLORS.get(channels, map(str, range(channels))), histograms(images.pixels), strict=True):
        facts[name] = _values_text(counts)
    return facts


def histograms(pixels: Tensor) -> Tensor:
    """Count the values in each channel of uint8 images [N, C, H, W]: int64 [C, 256]."""
    counts = torch.zeros(pixels.shape[1], 256, dtype=torch.int64)
    for block in torch.split(pixels, _CHUNK):
        for channel in range(pixels.shape[1]):
            counts[channel] += torch.bincount(block[:, channel].flatten().int(), minlength=256)
    return counts


def _values_text(counts: Tensor) -> str:
    """Range, mean and standard deviation of pixels, given the counts of their values [256]."""
    values, share = torch.arange(256).double(), counts.double() / counts.sum()
    mean = float((values * share).sum())
    std = float(((values - mean).square() * share).sum().sqrt())
    found = counts.nonzero()[:, 0]
    return (
        f"{int(found[0])} to {int(found[-1])}, {len(found)} values, mean {mean:.1f}, standard deviation {std:.1f}; "
        f"{float(share[0]):.1%} are 0 and {float(share[255]):.1%} are 255"
    )


def _point_facts(data: Dataset) -> dict[str, str]:
    assert isinstance(data, Points)
    facts = {"data": data.name, "read from": "generated, independent of the seed of a run", "points": f"{len(data):,}"}
    facts["size"] = f"{data.points.shape[1]} coordinates"
    for name, column in zip(("x", "y"), data.points.double().unbind(1), strict=True):
        facts[name] = (
            f"{column.min():.2f} to {column.max():.2f}, mean {column.mean():.3f}, standard deviation {column.std():.3f}"
        )
    outside = int((data.points.abs() > SQUARE).any(dim=1).sum())
    facts["outside"] = f"{outside:,} points; densities are compared in [-{SQUARE:g}, {SQUARE:g}]^2"
    return facts
