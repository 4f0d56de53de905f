"""Nested plain data with tensors in it, as JSON text beside a flat table of tensors."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from constrained_growth.errors import CheckpointError


def flattened(tree: object, path: str = "") -> tuple[Any, dict[str, Tensor]]:
    """Data that JSON can hold, and the tensors that were in it under names of their own.

    Numbers, text, None, lists, tuples, dicts with any plain keys, counters, arrays and tensors
    can be kept; what is the same tensor twice is kept once. Nothing else can, so that nothing
    has to be executed to read it again.

    Args:
        tree: The nested data.
        path: What to call it in names and messages.

    Returns:
        The data with `{"$tensor": name}` in the place of tensors, and name → tensor, on the CPU.

    Raises:
        CheckpointError: There is something else in it; the message says where.

    Example:
        >>> flattened({"rate": 0.1, "moment": torch.zeros(2)}, "optimizer")[0]
        {'rate': 0.1, 'moment': {'$tensor': 'optimizer/moment'}}
    """
    tensors: dict[str, Tensor] = {}
    return _flattened(tree, path, tensors, {}), tensors


def unflattened(data: Any, tensors: Mapping[str, Tensor]) -> Any:
    """The nested data again.

    Raises:
        KeyError, TypeError, ValueError: The data were not written by `flattened`.
    """
    if isinstance(data, list):
        return [unflattened(item, tensors) for item in data]
    if not isinstance(data, dict):
        return data
    if len(data) == 1:
        ((tag, content),) = data.items()
        if tag == "$tensor":
            return tensors[content]
        if tag == "$array":
            return tensors[content].numpy()
        if tag == "$tuple":
            return tuple(unflattened(content, tensors))
        if tag in ("$dict", "$counter"):
            pairs = {unflattened(k, tensors): unflattened(v, tensors) for k, v in content}
            return Counter(pairs) if tag == "$counter" else pairs
    return {key: unflattened(item, tensors) for key, item in data.items()}


def _flattened(tree: object, path: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> Any:
    if tree is None or isinstance(tree, bool | int | float | str):
        return _plain(tree)
    if isinstance(tree, np.generic):
        return tree.item()
    if isinstance(tree, Tensor):
        return {"$tensor": _kept(tree.detach(), path, tensors, seen)}
    if isinstance(tree, np.ndarray):
        try:
            return {"$array": _kept(torch.from_numpy(tree.copy()), path, tensors, {})}
        except TypeError as error:
            raise CheckpointError(f"{path} is an array of {tree.dtype}: {error}.") from error
    if isinstance(tree, list):
        return [_flattened(x, f"{path}/{i}", tensors, seen) for i, x in enumerate(tree)]
    if isinstance(tree, tuple):
        return {"$tuple": _flattened(list(tree), path, tensors, seen)}
    if isinstance(tree, Mapping):
        items = [(key, _flattened(x, f"{path}/{key}", tensors, seen)) for key, x in tree.items()]
        if isinstance(tree, Counter):
            return {"$counter": [[_flattened(k, path, tensors, seen), x] for k, x in items]}
        if all(isinstance(key, str) and not key.startswith("$") for key in tree):
            return dict(items)
        return {"$dict": [[_flattened(k, path, tensors, seen), x] for k, x in items]}
    raise CheckpointError(
        f"{path} is a {type(tree).__qualname__}, which cannot be kept without executing code when "
        "it is read; a state_dict() for a checkpoint holds numbers, text, lists, dicts and tensors."
    )


def _plain(value: Any) -> Any:
    """Without the classes that derive from Python's own, which JSON would write otherwise."""
    for kind in (bool, int, float, str):
        if isinstance(value, kind):
            return kind(value)
    return value


def _kept(tensor: Tensor, path: str, tensors: dict[str, Tensor], seen: dict[Any, str]) -> str:
    """Put a tensor into the table, once for each place in memory; returns its name there."""
    place = (tensor.data_ptr(), tensor.dtype, tensor.shape, tensor.stride(), tensor.device)
    if tensor.numel() and place in seen:
        return seen[place]
    name, number = path, 1
    while name in tensors:
        name, number = f"{path}#{number}", number + 1
    storage = tensor.untyped_storage().data_ptr()
    own = tensor.is_contiguous() and storage not in seen
    tensors[name] = (tensor if own else tensor.clone(memory_format=torch.contiguous_format)).cpu()
    seen[place] = seen[storage] = name
    return name
