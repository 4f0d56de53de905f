"""One inserted layer: what a record says of it, its form, and its place in the model."""

from __future__ import annotations

import itertools
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Literal

from torch import Tensor, nn

from constrained_growth._sites.context import takes_context
from constrained_growth._sites.model import list_of, owners_of
from constrained_growth._sites.wrapper import (
    WithInsertedLayer,
    add_layer,
    take_hooks,
    user_module,
)
from constrained_growth.errors import RecordError

Placement = Literal["wrapped", "joined", "sibling"]


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


def wrapper_for(model: nn.Module, site: nn.Module) -> WithInsertedLayer | None:
    """The wrapper that holds a site, or is the site; None where a new one is needed."""
    if isinstance(site, WithInsertedLayer):
        return site
    owners = [owner for owner, _ in owners_of(model, site)]
    return owners[0] if len(owners) == 1 and isinstance(owners[0], WithInsertedLayer) else None


def can_join(model: nn.Module, site: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer in the wrapper that holds its site gets what it would get around the site."""
    wrapper = wrapper_for(model, site)
    if wrapper is None:
        return False
    if getattr(wrapper.forward, "__func__", None) is not WithInsertedLayer.forward:
        return False  # another one was set, which may not run the layer
    if wrapper is site:  # no hooks may come between the site and the layer, or its arguments
        changes = takes_context(layer) and user_module(wrapper)._forward_pre_hooks
        return not (wrapper._forward_hooks or changes)
    is_base = site is user_module(wrapper)
    return is_base or takes_context(site) or not takes_context(layer)


def first_parameter(site: nn.Module, model: nn.Module) -> Tensor | None:
    """The first parameter of a module, or else of the model; None if there is none."""
    return next(itertools.chain(site.parameters(), model.parameters()), None)


def put_into(
    model: nn.Module, site: nn.Module, layer: nn.Module, record: InsertedLayer
) -> nn.Module:
    """Insert a layer after a site as its record says; returns the module now at its place."""
    if record.placement == "sibling":
        owner = list_of(model, site)
        if owner is None:
            raise RecordError(
                f'model: "{record.after}", the site of the layer "{record.name}" in the record, is '
                "no element of an nn.ModuleList or nn.Sequential."
            )
        place = next(i for i, element in enumerate(owner) if element is site)
        owner.insert(place + 1, layer)
        return layer
    if record.placement == "joined":
        wrapper = wrapper_for(model, site)
        if wrapper is None:
            raise RecordError(
                f'model: at "{record.after}", the site of the layer "{record.name}" in the record, '
                "joined others that are not there; replay the records of all rounds in their order."
            )
        add_layer(wrapper, site, layer, record.output, record.overwritten)
        return site if site is wrapper else layer
    wrapper = WithInsertedLayer(site)
    take_hooks(wrapper)
    add_layer(wrapper, wrapper, layer, record.output, record.overwritten)
    for owner, key in owners_of(model, site):  # under every name that it has
        owner._modules[key] = wrapper
    return wrapper
