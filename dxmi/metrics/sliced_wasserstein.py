"""Sliced Wasserstein distance (Bonneel et al., 2015): the mean of one-dimensional distances over random directions.

Axis letters: N, M points, D dimensions, P projections, U steps of the merged quantile functions.
"""

import torch
from torch import Tensor

from dxmi.tensors import require_finite


def wasserstein_1d(a: Tensor, b: Tensor, order: int) -> Tensor:
    """The exact integral of |F_a^-1(u) - F_b^-1(u)|^order du over the empirical quantile functions of each column: [P].

    Args:
        a: first sample of each column, [N, P].
        b: second sample of each column, [M, P].
        order: 1 or 2; the root is not taken.
    """
    a, b = a.sort(dim=0).values, b.sort(dim=0).values
    n, m = len(a), len(b)
    # Both quantile functions are constant between consecutive elements of {i / n} and {j / m} together. In units of
    # 1 / (n m) these are integers, so there is no rounding error.
    breaks = torch.cat((torch.arange(n + 1) * m, torch.arange(m + 1) * n)).unique()  # type: ignore[no-untyped-call]
    left = breaks[:-1]
    widths = breaks.diff().to(a.dtype).to(a.device) / (n * m)
    gaps = a[(left // m).to(a.device)] - b[(left // n).to(a.device)]
    distance: Tensor = (widths[:, None] * gaps.abs().pow(order)).sum(0)
    return distance


def sliced_wasserstein(x: Tensor, y: Tensor, *, projections: int, generator: torch.Generator, order: int = 2) -> float:
    """(mean over directions of W_order^order)^(1/order) between two sets of points.

    Args:
        x: first set, [N, *event].
        y: second set, [M, *event].
        projections: number of directions, which are uniform on the sphere.
        generator: draws the directions, on the host.
        order: 1 or 2.

    Raises:
        DivergedError: a point is not finite.
    """
    x, y = require_finite(x, "the samples"), require_finite(y, "the points of the data")
    x, y = x.flatten(1).double(), y.flatten(1).double()
    directions = torch.randn(x.shape[1], projections, generator=generator, dtype=torch.float64).to(x.device)
    directions = directions / directions.norm(dim=0)
    return float(wasserstein_1d(x @ directions, y @ directions, order).mean() ** (1.0 / order))
