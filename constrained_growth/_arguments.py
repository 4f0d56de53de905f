"""Checks of arguments that several parts of the library share.

Each raises the error class given, with the name of the argument, the value and what to give
instead, and returns nothing but the value. None passes where it is `optional`.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral, Real
from typing import Any, TypeVar

from torch import Tensor

from constrained_growth.errors import DataError, GrowthError

T = TypeVar("T")


def integer(
    name: str, value: Any, error: type[GrowthError], least: int, *, optional: bool = False
) -> Any:
    """A whole number of at least `least`, of Python or NumPy."""
    if isinstance(value, Integral) and not isinstance(value, bool) and int(value) >= least:
        return int(value)
    if optional and value is None:
        return value
    wanted = "positive whole number" if least == 1 else f"whole number of at least {least}"
    raise error(f"{name}={value!r:.80} is not a {wanted}{' or None' * optional}.")


def positive_int(name: str, value: Any, error: type[GrowthError], *, optional: bool = False) -> int:
    """A whole number above 0."""
    return integer(name, value, error, 1, optional=optional)


def number(
    name: str, value: Any, error: type[GrowthError], interval: str, *, optional: bool = False
) -> Any:
    """A real number in an interval, such as "(0, 1]" or "[0, inf)"; never NaN."""
    low, high = (float(end) for end in interval[1:-1].split(","))
    if optional and value is None:
        return value
    if isinstance(value, Real) and not isinstance(value, bool) and not math.isnan(value):
        given = float(value)
        above = given > low or (interval[0] == "[" and given == low)
        below = given < high or (interval[-1] == "]" and given == high)
        if above and below:
            return given
    raise error(f"{name}={value!r:.80} is not a number in {interval}{' or None' * optional}.")


def flag(name: str, value: Any, error: type[GrowthError], *, optional: bool = False) -> None:
    """True or False."""
    if not (value is None and optional) and not any(value is one for one in (True, False)):
        raise error(f"{name}={value!r:.80} is not True or False{' or None' * optional}.")


def function(
    name: str,
    value: Any,
    error: type[GrowthError],
    example: str = "",
    *,
    optional: bool = False,
    or_class: bool = False,
) -> None:
    """Something that can be called; no class, unless making an object is what it is called for."""
    refused = isinstance(value, type) and not or_class
    if (not callable(value) or refused) and not (optional and value is None):
        fault = "is a class" if refused else "cannot be called"
        instead = f", such as {example}" if example else ""
        raise error(f"{name}={value!r:.80} {fault}; give a function{instead}.")


def functions(name: str, values: Any, error: type[GrowthError], example: str) -> None:
    """A dict of names and functions."""
    instance(name, values, Mapping, error, f"a dict of functions, such as {example}")
    for key, value in values.items():
        function(f"{name}: {key!r}", value, error)


def instance(
    name: str,
    value: Any,
    kind: type[T] | tuple[type, ...],
    error: type[GrowthError],
    fix: str,
    *,
    optional: bool = False,
) -> T:
    """An object of a class, or of one of several; `fix` says what to give instead."""
    if not isinstance(value, kind) and not (value is None and optional):
        kinds = getattr(kind, "__name__", kind)
        raise error(f"{name}={value!r:.80} is no {kinds}; give {fix}.")
    return value  # type: ignore[return-value]


def several(
    name: str, value: Any, kind: type[T], error: type[GrowthError], fix: str
) -> tuple[T, ...]:
    """A tuple of one object of a class, of several, or of none for None."""
    given = () if value is None else (value,) if isinstance(value, kind) else value
    if not isinstance(given, Sequence) or not all(isinstance(one, kind) for one in given):
        raise error(f"{name}={value!r:.80} is no {kind.__name__}, nor several; give {fix}.")
    return tuple(given)


def tensors(name: str, value: Any, error: type[GrowthError], fix: str) -> list[Tensor]:
    """The tensors of a dict of them, at least one."""
    instance(name, value, Mapping, error, f"a dict, {fix}")
    if not value or not all(isinstance(one, Tensor) for one in value.values()):
        raise error(f"{name}={value!r:.80} is no dict of tensors; give {fix}.")
    return list(value.values())


def data_again(name: str, data: object) -> None:
    """Batches that can be read more than once."""
    if not isinstance(data, Iterable):
        fault = "is not iterable"
    elif isinstance(data, Iterator):
        fault = "is a one-shot iterator, and data are read more than once"
    elif isinstance(data, Tensor | Mapping | str):
        fault = "is not an iterable of batches"
    else:
        return
    raise DataError(
        f"{name}={type(data).__name__} {fault}; give batches (input, target), such as a DataLoader "
        "or list(data)."
    )
