"""The batches of a user's data: what is in them, how much they count, in which order they come."""

from __future__ import annotations

import copy
import math
import random
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, TypeVar

import torch
from torch import Tensor
from torch.nn.utils.rnn import PackedSequence
from torch.utils._pytree import tree_map
from torch.utils.data import DataLoader

from constrained_growth._arguments import data_again, positive_int
from constrained_growth._structure import entries, mapped
from constrained_growth.errors import DataError

T = TypeVar("T")


def moved(value: Any, device: torch.device | None) -> Any:
    """A batch of the same type on the model's device; what cannot be moved is as it is."""

    def by_itself(item: Any) -> Any:
        # the `to` of some types of batches moves them in place, and the loader may yield them again
        return copy.copy(item).to(device) if callable(getattr(item, "to", None)) else item

    if device is None:
        return value
    # which from pinned memory need not be waited for, and from other memory is waited for anyway
    return mapped(value, lambda tensor: tensor.to(device, non_blocking=True), by_itself)


def copied(value: Any) -> Any:
    """A batch with tensors of its own, to be held while a loader may write to its own again."""

    def own(tensor: Tensor) -> Tensor:
        return tensor.detach().clone().requires_grad_(tensor.requires_grad)

    return mapped(value, own, copy.deepcopy)


def batches(data: Iterable[Any], device: torch.device | None) -> Iterator[tuple[Any, Any]]:
    """The `(input, target)` pairs of the data, on the model's device."""
    for index, batch in enumerate(undisturbed(data)):
        check_pair(batch, index)
        yield moved(batch[0], device), moved(batch[1], device)


def check_pair(batch: object, index: int) -> None:
    """Refuse a batch that is no `(input, target)` pair."""
    if isinstance(batch, tuple | list) and len(batch) == 2:
        return
    fault, fix = type(batch).__name__, "such as a DataLoader over a TensorDataset(x, y)"
    if isinstance(batch, tuple | list):
        fault += f" of {len(batch)}"
        fix = "and make one of (x, y, w) into (x, (y, w)), which loss_fn takes apart"
    elif isinstance(batch, Mapping):
        fix = "such as [(batch, None) for batch in loader] where the model returns its loss"
    raise DataError(
        f"data: batch {index} is a {fault}, not an (input, target) pair; give an iterable of "
        f"pairs, {fix}."
    )


def undisturbed(data: Iterable[T]) -> Iterable[T]:
    """The data, to be iterated while its user may be in the middle of them.

    A DataLoader with persistent workers has one iterator, which a second `iter(loader)` resets. It
    may be an attribute of an object that makes pairs of what it yields.
    """
    if isinstance(data, DataLoader):
        changed = {"persistent_workers": False, "_iterator": None}
        changed = changed if data.persistent_workers else {}
    else:
        inside = {
            k: v for k, v in getattr(data, "__dict__", {}).items() if isinstance(v, DataLoader)
        }
        new = {name: undisturbed(loader) for name, loader in inside.items()}
        changed = {name: loader for name, loader in new.items() if loader is not inside[name]}
    if not changed:
        return data
    other = copy.copy(data)
    vars(other).update(changed)  # a loader refuses to be assigned to
    return other


def batch_size(input: object, target: object) -> int:
    """How many samples a batch has: the first dimension of its first tensor.

    A `PackedSequence` has as many as sequences.
    """
    for size in (*_sizes(input), *_sizes(target)):
        if size == 0:
            raise DataError("data: a batch has no samples (a tensor of first dimension 0).")
        return size
    raise DataError(
        "data: a batch holds no tensor with a batch dimension; inputs are a tensor, a tuple or a "
        "dict of tensors whose first dimension counts the samples."
    )


Weight = Callable[[Any, Any], float | Tensor] | None
"""`(input, target) -> number`: how much a batch counts; None for its number of samples."""


def counted(
    data: Iterable[Any], device: torch.device | None, weight: Weight
) -> Iterator[tuple[Any, Any, float]]:
    """The batches that count, each `(input, target)` with how much: a mean over nothing is NaN."""
    for input, target in batches(data, device):
        size = batch_size(input, target)
        count = given = size if weight is None else weight(input, target)
        try:
            count = float(given)
        except (TypeError, ValueError, RuntimeError):
            count = math.nan
        if not 0 <= count < math.inf:
            raise DataError(
                f"weight={weight!r} gives {given!r:.80} for a batch of {size} samples; let it say "
                "over how many items, 0 or more, the loss of that batch is the mean."
            )
        if count > 0:
            yield input, target, count


def _sizes(value: object) -> Iterator[int]:
    if isinstance(value, PackedSequence):
        yield int(value.batch_sizes[0])
    elif isinstance(value, Tensor):
        if value.dim() > 0:
            yield value.size(0)
    else:
        for _, item in entries(value):
            yield from _sizes(item)


def some_of(
    items: Iterable[T], count: int, *, keep: Callable[[T], T] = lambda item: item
) -> tuple[list[T], bool]:
    """At most `count` items, all equally likely, and whether there were no others.

    At most `count` are held at a time, each as `keep(item)`, such as a copy. Source: Vitter,
    *Random sampling with a reservoir*, 1985, algorithm R.

    Example:
        >>> some_of("abcdef", 3), some_of("ab", 3)
        ((['f', 'b', 'c'], False), (['a', 'b'], True))
    """
    draw, taken, seen = random.Random(0), list[T](), 0
    for item in items:
        seen += 1
        if len(taken) < count:
            taken.append(keep(item))
        elif (place := draw.randrange(seen)) < count:
            taken[place] = keep(item)
    return taken, seen <= count


def rebatch(data: Iterable[Any], size: int) -> Iterable[tuple[Any, Any]]:
    """The same samples in batches of another size, for a faster measurement.

    Batches are joined along their first dimension, and the last one may be smaller. The mean loss
    over all samples stays the same where each sample's output and loss depend on that sample
    alone: not with BatchNorm in train mode, nor where the loss of a batch is no mean over its
    samples (give the problem the `weight=` that says over how many items it is).

    Args:
        data: `(input, target)` batches of tensors of one shape but for the number of samples; or
            tuples, lists and dicts of such tensors.
        size: How many samples a batch has.

    Returns:
        The batches, to be iterated as often as `data` can.

    Raises:
        DataError: `size` is not a positive whole number, or (while iterating) batches cannot be
            joined.

    Example:
        >>> data = [(torch.zeros(3, 2), torch.zeros(3)) for _ in range(4)]
        >>> [len(target) for _, target in rebatch(data, 5)]
        [5, 5, 2]
    """
    data_again("data", data)
    return _Rebatched(data, positive_int("size", size, DataError))


@dataclass(frozen=True)
class _Rebatched:
    data: Iterable[Any]
    size: int

    def __iter__(self) -> Iterator[tuple[Any, Any]]:
        held: list[Any] = []
        count = 0
        for batch in batches(self.data, None):
            held.append(batch)
            count += batch_size(*batch)
            if count >= self.size:
                whole = _joined(held)
                parts = [_samples(whole, i, i + self.size) for i in range(0, count, self.size)]
                count %= self.size
                held = [parts.pop()] if count else []
                yield from parts
        if count:
            yield _joined(held)


def _joined(pairs: Sequence[Any]) -> Any:
    if len(pairs) == 1:
        return pairs[0]
    try:
        return tree_map(lambda *tensors: torch.cat(tensors), *pairs)
    except (TypeError, ValueError, RuntimeError) as error:
        raise DataError(
            f"data: its batches cannot be joined ({error}); rebatch takes tensors of one shape "
            "but for their first dimension. Solve with the batches as they are."
        ) from error


def _samples(pair: Any, start: int, stop: int) -> Any:
    def some(tensor: object) -> Tensor:
        if isinstance(tensor, Tensor) and tensor.dim() > 0:
            return tensor[start:stop]
        raise DataError(
            f"data: a batch holds {tensor!r:.40}, which is no tensor of samples; rebatch takes "
            "tensors alone. Solve with the batches as they are."
        )

    return tree_map(some, pair)
