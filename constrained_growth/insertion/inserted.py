"""A module with a layer after it, in the place of the module."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor, nn

from constrained_growth._sites.context import context_of, takes_context
from constrained_growth._sites.outputs import tensor_in, with_tensor


class Inserted(nn.Module):
    """A module with a layer after it: x ↦ inserted(base(x)).

    A layer with a true attribute `takes_context` is called with what the module is called with,
    its own tensor in the place of the first argument.

    Stands in the model under the name of `base`, so every other name in the model stays what it
    was, `"3"` still means "the output of this place", and attributes not found here are looked up
    in `base` (`model.fc.in_features` goes on working). Keys in the state dict change from
    `3.weight` to `3.base.weight`, and `3.inserted.…` is new. Hooks on `base` stay there: they
    fire once in each pass, with the output as it was before there was a layer after it.

    Args:
        base: The module that stood here.
        inserted: The layer after it.
        overwritten: Whether the model changes the output in place afterwards: then it gets a
            copy, as the layer may need its own output to go backward.
        output: Which tensor of the output of `base` the layer works on, as in `Candidate`.
    """

    def __init__(
        self,
        base: nn.Module,
        inserted: nn.Module,
        *,
        overwritten: bool = False,
        output: int | str | None = None,
    ) -> None:
        super().__init__()
        self.base = base
        self.inserted = inserted
        self.overwritten = overwritten
        self.output = output
        self.training = base.training

    def forward(self, *args: Any, **kwargs: Any) -> Any:
        """The inserted layer applied to the output of the base."""
        output = self.base(*args, **kwargs)
        x = output if isinstance(output, Tensor) else tensor_in(output, self.output)
        if takes_context(self.inserted):
            context = context_of(self.base, args, kwargs)
            y = self.inserted(x, *context.args, **context.kwargs)
        else:
            y = self.inserted(x)
        y = y.clone() if self.overwritten else y
        return y if x is output else with_tensor(output, self.output, y)

    def __len__(self) -> int:
        return len(self.base)  # type: ignore[arg-type]

    def __getitem__(self, key: Any) -> Any:
        return self.base[key]  # type: ignore[index]

    def __iter__(self) -> Iterator[Any]:
        return iter(self.base)  # type: ignore[call-overload]

    def __bool__(self) -> bool:
        return True

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            base = self.__dict__.get("_modules", {}).get("base")
            if base is None:
                raise
            return getattr(base, name)
