"""Fields that are made when they are first read."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, TypeVar


class ReadLater:
    """A field may hold a `Later`, which makes its value when the field is first read."""

    def __getattribute__(self, name: str) -> Any:
        found = object.__getattribute__(self, name)
        if isinstance(found, Later):
            found = found.function(self)
            object.__setattr__(self, name, found)
        return found

    def __getstate__(self) -> dict[str, Any]:
        return {name: getattr(self, name) for name in vars(self)}


@dataclass(frozen=True)
class Later:
    """What a field is to be when it is first read: a function of its owner."""

    function: Callable[[Any], Any]


Kept = TypeVar("Kept", bound=ReadLater)


def with_fields(kept: Kept, **fields: Any) -> Kept:
    """As `dataclasses.replace`, but what is read later is still not read."""
    return type(kept)(**{**vars(kept), **fields})
