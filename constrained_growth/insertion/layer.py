"""One inserted layer: what a record says of it, its form, and its place in the model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor, nn

from constrained_growth._sites.placement import Placement


@dataclass(frozen=True)
class InsertedLayer:
    """One inserted layer.

    Attributes:
        name: Name of its candidate.
        after: Qualified name of the module it follows, at the moment of its insertion.
        block: How to rebuild the block: its `type`, and `arguments` that JSON can hold; for a copy
            also `of` which module, and the `settings` that it had. Where `arguments` is None, for
            the `reason` given, pass the block to `replay`.
        parameters: Name → shape of the block's parameters.
        overwritten: Whether the model changes the output in place afterwards.
        output: Which tensor of the module's output the layer works on, as in `Candidate`.
        placement: "wrapped" around the module, "joined" to the wrapper that stood there already,
            or "sibling", the next element of its list.
        pristine: A copy of the block as inserted; not part of the JSON text.
    """

    name: str
    after: str
    block: Mapping[str, Any]
    parameters: Mapping[str, tuple[int, ...]]
    overwritten: bool = False
    output: int | str | None = None
    placement: Placement = "wrapped"
    pristine: nn.Module | None = field(default=None, repr=False, compare=False)


def first_parameter(site: nn.Module, model: nn.Module) -> Tensor | None:
    """The first parameter of a module, or else of the model; None if there is none."""
    return next(itertools.chain(site.parameters(), model.parameters()), None)
