"""In which order batches are read, and how many of them."""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch.utils.data import DataLoader, SequentialSampler

from constrained_growth.errors import DataError


def has_fixed_order(data: Iterable[Any]) -> bool:
    """Whether it is a DataLoader that does not shuffle."""
    if not isinstance(data, DataLoader):
        return False
    return isinstance(getattr(data.batch_sampler, "sampler", data.sampler), SequentialSampler)


def in_random_order(data: Iterable[Any], seed: int) -> Iterable[Any]:
    """The batches of a sequence in a random permutation; anything else as it is.

    Raises:
        DataError: A DataLoader reads in a fixed order.
    """
    if has_fixed_order(data):
        raise DataError(
            "data=DataLoader reads in a fixed order, and sampling needs batches in random "
            "order; make it with shuffle=True, or call solve without sampling."
        )
    if isinstance(data, Sequence):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        return (data[index] for index in order.tolist())
    return data


def length_of(data: Iterable[Any]) -> int | None:
    """How many batches there are, or None where the data do not say."""
    try:
        return len(data)  # type: ignore[arg-type]
    except TypeError:  # also a DataLoader of a stream
        return None


@dataclass(frozen=True)
class Part:
    """Some batches of the data, the same every time where these come in the same order.

    Attributes:
        data: All of them.
        count: How many are read, from a random permutation of a list.
        share: Of all batches.
    """

    data: Iterable[Any]
    count: int
    share: float

    def __iter__(self) -> Iterator[Any]:
        return itertools.islice(in_random_order(self.data, 0), self.count)


def part_of(data: Iterable[Any], fraction: float) -> Part | None:
    """About a fraction of the batches, at least one.

    Args:
        data: Batches.
        fraction: How many of them, up to 1.

    Returns:
        The part, or None where all are to be read: for a fraction of 1, where their number is not
        known, and of a DataLoader in a fixed order, the first of which may be all of one kind.

    Example:
        >>> part_of([1, 2, 3, 4, 5], 0.25).count, part_of([1], 0.25)
        (2, None)
    """
    total = length_of(data)
    if total is None or has_fixed_order(data):
        return None
    count = max(1, math.ceil(fraction * total))
    return Part(data, count, count / total) if count < total else None
