"""Nested tuples, lists, mappings and dataclasses: what they hold, and the same with other items."""

from __future__ import annotations

import copy
import dataclasses
from collections.abc import Callable, Iterator, Mapping, MutableMapping
from typing import Any

from torch import Tensor
from torch.nn.utils.rnn import PackedSequence


def entries(value: object) -> Iterator[tuple[Any, Any]]:
    """What a structure holds by index, key or name of a field, in its order."""
    if isinstance(value, Mapping):
        yield from value.items()
    elif isinstance(value, tuple | list):
        yield from enumerate(value)
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        yield from ((field.name, getattr(value, field.name)) for field in dataclasses.fields(value))


def with_entries(value: Any, changed: Mapping[Any, Any]) -> Any:
    """A structure of the same type with some items exchanged; the given one is not changed."""
    if isinstance(value, tuple):
        items = [changed.get(index, item) for index, item in enumerate(value)]
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    frozen = isinstance(value, Mapping) and not isinstance(value, MutableMapping)
    rebuilt: Any = dict(value) if frozen else copy.copy(value)
    for key, item in changed.items():
        if isinstance(value, list) or (isinstance(value, Mapping) and key in value):
            rebuilt[key] = item
        else:
            object.__setattr__(rebuilt, str(key), item)  # which a frozen dataclass allows
    return rebuilt


def mapped(
    value: Any,
    change: Callable[[Tensor], Tensor],
    other: Callable[[Any], Any] = lambda item: item,
) -> Any:
    """The structure with `change` of its tensors and `other` of what else is no structure.

    Types stay as they are, and what does not change is handed on itself.

    Example:
        >>> import torch
        >>> mapped((torch.zeros(2), ["a", torch.ones(1)]), torch.neg)
        (tensor([-0., -0.]), ['a', tensor([-1.])])
    """
    if isinstance(value, Tensor):
        return change(value)
    found = dict(entries(value))
    if isinstance(value, PackedSequence):
        del found[1]  # batch_sizes, which stay on the CPU
    if not found:
        return other(value)
    new = {key: mapped(item, change, other) for key, item in found.items()}
    changed = {key: item for key, item in new.items() if item is not found[key]}
    return with_entries(value, changed) if changed else value


def tensors_in(value: Any) -> list[Tensor]:
    """All tensors of a structure, in its order."""
    found: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        found.append(tensor)
        return tensor

    mapped(value, note)
    return found
