"""What else a model changes when it gains a layer: counts in a config, numbers of layers, hooks.

A kind of model that keeps such books says so once, and every insertion keeps them:

    @register(TheirModel)
    def bookkeeping(model: TheirModel) -> Bookkeeping | None: ...
"""

from __future__ import annotations

import functools
import importlib
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import nn

from constrained_growth._sites.model import list_of
from constrained_growth._sites.outputs import Which
from constrained_growth.errors import RecordError

__all__ = ["Bookkeeping", "register"]


class Bookkeeping(Protocol):
    """The books of one model, opened before it changes.

    Names are those of `model.named_modules()` before the change.
    """

    def counts(self, after: str) -> bool:
        """Whether this module is an element of a list whose length the books know.

        After any other module a copied block is wrapped around its site, and not made the next
        element of the list, of which the books would not know.
        """
        ...

    def refusal(self, after: str, layer: nn.Module) -> str | None:
        """Why the list of this module cannot hold `layer` next; None if it can, or is not counted.

        Asked before anything is trained, run or changed.
        """
        ...

    def update(self, around: Sequence[nn.Module]) -> None:
        """Fit the books to the layers as they are now.

        It sets attributes of modules, and changes no other object in place: setting the attributes
        back undoes it.

        Args:
            around: The modules that the model is inside of, outermost first.

        Raises:
            CandidateError: The layers cannot be kept.
        """
        ...


Opener = Callable[[Any], Bookkeeping | None]
"""Opens the books of a model, or returns None if that one keeps none."""


def register(kind: type[nn.Module]) -> Callable[[Opener], Opener]:
    """A decorator for the function that opens the books of a kind of model, subclasses included.

    Where it returns None, the books of models inside that one are opened.

    Example:
        >>> class Counted(nn.Sequential):
        ...     pass
        >>> @register(Counted)
        ... def no_books(model: Counted) -> None:
        ...     return None
    """
    if not (isinstance(kind, type) and issubclass(kind, nn.Module)):
        raise RecordError(f"kind={kind!r:.80} is no class of nn.Modules; give that of a model.")
    return _open.register(kind)


@functools.singledispatch
def _open(model: nn.Module) -> Bookkeeping | None:
    return None


@dataclass(frozen=True)
class Books:
    """The books of all models inside a module; those that keep none are free to change."""

    model: nn.Module
    inside: Mapping[str, Bookkeeping]  # by the prefix of the names in the model that keeps them

    def counts(self, after: str) -> bool | None:
        """Whether the books about the module count it; None if there are none."""
        about = self._about(after)
        return None if about is None else about[0].counts(about[1])

    def refusal(self, after: str, layer: nn.Module) -> str | None:
        """As for `Bookkeeping`."""
        about = self._about(after)
        return None if about is None else about[0].refusal(about[1], layer)

    def can_list(self, after: str, block: nn.Module, output: Which, *, wrapped: bool) -> bool:
        """Whether the block could become the next element of the list that the module is in."""
        first = output in (None, 0)  # what the next element of a list is called with
        if wrapped or not first or not callable(getattr(block, "standalone", None)):
            return False
        is_element = list_of(self.model, self.model.get_submodule(after)) is not None
        return is_element and self.counts(after) is not False

    def loads(self, after: str, block: nn.Module) -> bool:
        """Whether the class of the model makes such a layer from its books, if it keeps any."""
        return self.counts(after) is None or self.can_list(after, block, None, wrapped=False)

    def uncounted(self, names: Collection[str]) -> list[str]:
        """Those after which no books count a layer, in models where they do after others."""
        found = []
        for owner in self.inside:
            here = [name for name in names if name.startswith(owner)]
            rest = [name for name in here if not self.counts(name)]
            found += rest if len(rest) < len(here) else []
        return found

    def update(self) -> None:
        """As for `Bookkeeping`."""
        for owner, books in self.inside.items():
            parts = owner.split(".")[:-1]
            around = [".".join(parts[:count]) for count in range(len(parts))]
            books.update([self.model.get_submodule(name) for name in around])

    def _about(self, after: str) -> tuple[Bookkeeping, str] | None:
        inside = self.inside.items()
        return next(((one, after[len(o) :]) for o, one in inside if after.startswith(o)), None)


def open_books(model: nn.Module) -> Books:
    """Open the books of a model, or of the models inside it, before it changes."""
    # importing Transformers takes seconds; where one of its models is here, it has been
    kinds = {cls for module in model.modules() for cls in type(module).__mro__}
    for library in {cls.__module__.partition(".")[0] for cls in kinds} & _INTEGRATIONS.keys():
        importlib.import_module(_INTEGRATIONS[library])
    found: dict[str, Bookkeeping] = {}
    for name, module in model.named_modules():
        books = None if name.startswith((*found,)) else _open(module)
        if books is not None:
            found[f"{name}." if name else ""] = books
    return Books(model, found)


_INTEGRATIONS = {"transformers": "constrained_growth.integrations.transformers"}
"""Library → the module of ours that knows its books, imported with the first of its models."""
