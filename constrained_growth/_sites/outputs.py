"""Which tensor of a module's output is the site, and another tensor put in its place."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from torch import Tensor

from constrained_growth._structure import entries, with_entries
from constrained_growth.errors import CandidateError

Which = int | str | None
"""An index, a key or the name of an attribute; None for the first floating-point tensor."""


def tensor_in(output: object, which: Which = None) -> Tensor:
    """The tensor of a module's output that is the site; a CandidateError if there is none.

    The output may be a tensor, or a tuple, list, mapping, dataclass or other object that holds
    one; nested structures are only searched where `which` is None. An index of a mapping or
    dataclass is in the order of its values.

    Example:
        >>> import torch
        >>> hidden, state = torch.zeros(2), torch.ones(3)
        >>> tensor_in((None, {"hidden": hidden, "state": state})) is hidden
        True
        >>> tensor_in({"hidden": hidden, "state": state}, "state") is state
        True
    """
    value: Any = output
    for key in _path(output, which):
        value = _entry(value, key)
    return value


def tensor_at(after: str, output: object, which: Which = None) -> Tensor:
    """`tensor_in`, with the name of the site in the error."""
    try:
        return tensor_in(output, which)
    except CandidateError as error:
        raise CandidateError(f'after="{after}": {error}') from None


def with_tensor(output: Any, which: Which, tensor: Tensor) -> Any:
    """A structure like `output`, which is not changed, with `tensor` as `tensor_in` of it.

    Example:
        >>> import torch
        >>> with_tensor((torch.zeros(2), "state"), None, torch.ones(2))
        (tensor([1., 1.]), 'state')
    """
    return _rebuilt(output, _path(output, which), tensor)


def _path(output: object, which: Which) -> tuple[int | str, ...]:
    """The keys that lead to the site, from the outside in."""
    if which is None:
        found = () if isinstance(output, Tensor) else _first(output)
        if found is None:
            raise CandidateError(
                f"the output is a {type(output).__name__} without a floating-point tensor in it, "
                "and a site is one; choose another submodule, or say which tensor is meant by "
                "cg.Candidate(..., output=...)."
            )
        return found
    if isinstance(output, Tensor):
        raise CandidateError(f"output={which!r}: the output is a tensor itself; leave output= out.")
    key = _key(output, which)
    value = None if key is None else _entry(output, key)
    if key is None or not isinstance(value, Tensor):
        what = "nothing" if key is None else f"a {type(value).__name__}"
        known = [name for name, _ in entries(output)]
        raise CandidateError(
            f"output={which!r} is {what} in the {type(output).__name__} that comes out; a site is "
            f"a tensor. It has {known}."
        )
    return (key,)


def _first(value: object) -> tuple[int | str, ...] | None:
    """The path to the first floating-point tensor, depth first."""
    if isinstance(value, Tensor):
        return () if value.is_floating_point() else None
    for key, item in entries(value):
        found = _first(item)
        if found is not None:
            return key, *found
    return None


def _key(output: object, which: int | str) -> int | str | None:
    """`which` as a key of this structure; None if there is none."""
    if isinstance(output, Mapping) and which in output:
        return which
    if isinstance(output, tuple) and isinstance(which, str):
        # torch.return_types (of torch.max, say) have no `_fields`, but `__match_args__`
        names = tuple(getattr(output, "_fields", getattr(output, "__match_args__", ())))
        return names.index(which) if which in names else None
    if isinstance(which, str):
        return which if hasattr(output, which) else None
    keys = [key for key, _ in entries(output)]
    return keys[which] if -len(keys) <= which < len(keys) else None


def _entry(value: Any, key: Any) -> Any:
    indexed = isinstance(value, tuple | list) or (isinstance(value, Mapping) and key in value)
    return value[key] if indexed else getattr(value, str(key))


def _rebuilt(value: Any, path: tuple[int | str, ...], tensor: Tensor) -> Any:
    if not path:
        return tensor
    key, *rest = path
    item = _rebuilt(_entry(value, key), tuple(rest), tensor)
    try:
        return with_entries(value, {key: item})
    except Exception as error:
        raise CandidateError(
            f"a {type(value).__name__}, which comes out here, cannot be made again with another "
            f"tensor in it ({error}); choose a submodule that returns a tensor, a tuple, a dict or "
            "a dataclass."
        ) from error
