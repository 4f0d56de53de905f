"""Which features and outputs of wide layers are read, where all of them would be too many.

Second moments are of a random part, the same each time. So are the sums of λ by group where no more
than that part is asked for: those of all of λ would need several times the room of the pins.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Sequence

import torch
from torch import Tensor

MOST = 256
"""Features and outputs of which A and G are kept; of more a random part."""


@functools.cache
def indices(size: int, device: torch.device) -> Tensor | None:
    """The same random part each time, in order; None for all."""
    if size <= MOST:
        return None
    with torch.inference_mode(False):  # as it is kept
        order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
        return order[:MOST].sort().values.to(device)


def narrowed(values: Tensor, dim: int) -> Tensor:
    """That part of a dimension."""
    some = indices(values.shape[dim], values.device)
    return values if some is None else values.index_select(dim, some)


def narrowed_shape(shape: Sequence[int]) -> tuple[int, ...]:
    """The shape of `narrowed_pin` a pin: the same for vectors, and where both sides are narrow."""
    out, inner = shape[0] if shape else 1, math.prod(shape[1:])
    if min(out, inner) == 1 or max(out, inner) <= MOST:
        return tuple(shape)
    return min(out, MOST), min(inner, MOST)


def narrowed_pin(values: Tensor, shape: Sequence[int]) -> Tensor:
    """Of tensors (…, *shape of a pin) the rows and columns that moments are of."""
    if narrowed_shape(shape) == tuple(shape):
        return values
    leading = values.shape[: values.dim() - len(shape)]
    return narrowed(narrowed(values.reshape(*leading, shape[0], -1), -2), -1)
