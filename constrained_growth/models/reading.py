"""In which order batches are read, and how many of them."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterable, Iterator, Sequence, Sized
from typing import Any, TypeVar

import torch
from torch.utils.data import DataLoader, DistributedSampler, SequentialSampler

from constrained_growth.errors import DataError

T = TypeVar("T")


def samplers_of(data: object) -> Iterator[object]:
    """The samplers of a data loader and those within them, as in a BatchSampler."""
    for name in ("batch_sampler", "sampler"):
        sampler = getattr(data, name, None)
        if sampler is not None:
            yield sampler
            yield from samplers_of(sampler)


def in_random_order(data: Iterable[Any], seed: int) -> Iterable[Any]:
    """The batches of a sequence in a random permutation; anything else as it is.

    Raises:
        DataError: A DataLoader reads in a fixed order.
    """
    if isinstance(data, DataLoader) and _is_fixed(data):
        raise DataError(
            "data=DataLoader reads in a fixed order, and sampling needs batches in random "
            "order; make it with shuffle=True, or call solve without sampling."
        )
    if isinstance(data, Sequence):
        order = torch.randperm(len(data), generator=torch.Generator().manual_seed(seed))
        return (data[index] for index in order.tolist())
    return data


def some_of(
    items: Iterable[T], count: int, seed: int = 0, *, keep: Callable[[T], T] = lambda item: item
) -> tuple[list[T], bool]:
    """Some items, each as likely to be among them as any other, whatever their order is.

    All are looked at and at most `count` are held at a time.

    Args:
        items: As many as there are.
        count: How many are taken, 1 or more.
        seed: Of a generator of its own.
        keep: What is held of an item that is taken, such as a copy.

    Returns:
        The items, and whether they are all that there were.

    Source:
        Vitter, *Random sampling with a reservoir*, 1985, algorithm R.

    Example:
        >>> some_of("abcdef", 3), some_of("ab", 3)
        ((['f', 'b', 'c'], False), (['a', 'b'], True))
    """
    draw, taken, seen = random.Random(seed), list[T](), 0
    for item in items:
        seen += 1
        if len(taken) < count:
            taken.append(keep(item))
        elif (place := draw.randrange(seen)) < count:
            taken[place] = keep(item)
    return taken, seen <= count


def length_of(data: Iterable[Any]) -> int | None:
    """How many batches there are, or None where the data do not say."""
    try:
        return len(data) if isinstance(data, Sized) else None
    except TypeError:  # a DataLoader of a stream
        return None


def _is_fixed(loader: DataLoader[Any]) -> bool:
    """Whether the innermost sampler has one order only; a batch sampler without one is taken to."""
    sampler: Any = getattr(loader.batch_sampler, "sampler", loader.sampler)
    while (inner := getattr(sampler, "sampler", None)) is not None:
        sampler = inner
    unshuffled = isinstance(sampler, DistributedSampler) and not sampler.shuffle
    return unshuffled or isinstance(sampler, SequentialSampler)
