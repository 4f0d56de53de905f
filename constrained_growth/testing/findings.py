"""Run a check, and put what it finds into words."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterator
from typing import TypeVar

T = TypeVar("T")


def tried(
    check: Callable[[T], Iterator[str]],
    case: T,
    shown: str = "",
    clear: tuple[type[Exception], ...] = (),
) -> Iterator[str]:
    """What a check finds; an error inside it is a finding too, a clear one in its own words."""
    try:
        yield from check(case)
    except clear as error:
        yield str(error)
    except Exception as error:
        what = (check.__doc__ or "").rstrip(".")
        yield f"it fails where this is tried: {what}{shown} ({said(error)})."


def listed(problems: Collection[str]) -> str:
    """One line each, without repetitions."""
    return "".join(f"\n  * {problem}" for problem in dict.fromkeys(problems))


def said(error: Exception) -> str:
    """An error in one line."""
    return f"{type(error).__name__}: {error}"
