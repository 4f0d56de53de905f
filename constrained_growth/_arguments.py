"""Checks of arguments that several parts of the library share."""

from __future__ import annotations

from constrained_growth.errors import GrowthError


def positive_int(name: str, value: int, error: type[GrowthError]) -> int:
    """Return the value, which must be a whole number above 0.

    Raises:
        GrowthError: It is not; of the class `error`.
    """
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise error(f"{name}={value!r} is not a positive whole number.")
    return value
