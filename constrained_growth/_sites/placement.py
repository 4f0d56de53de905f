"""Where in a model a layer goes: around its site, or as the next element of a list."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from typing import Any, Literal

from torch import nn

from constrained_growth._sites.context import takes_context
from constrained_growth._sites.model import list_of, owners_of
from constrained_growth._sites.outputs import Which
from constrained_growth._sites.wrapper import (
    WithInsertedLayer,
    add_layer,
    take_hooks,
    user_module,
)

Placement = Literal["wrapped", "joined", "sibling"]
"""Around the module, in the wrapper that stands there already, or the next element of its list."""


def wrapper_for(model: nn.Module, site: nn.Module) -> WithInsertedLayer | None:
    """The wrapper that holds a site, or is the site; None where a new one is needed."""
    if isinstance(site, WithInsertedLayer):
        return site
    owners = [owner for owner, _ in owners_of(model, site)]
    return owners[0] if len(owners) == 1 and isinstance(owners[0], WithInsertedLayer) else None


def placement_around(model: nn.Module, site: nn.Module, layer: nn.Module) -> Placement:
    """How a layer goes around its site.

    It joins the wrapper that holds the site if it gets there what it would get around the site.
    """
    wrapper = wrapper_for(model, site)
    if wrapper is None:
        return "wrapped"
    if getattr(wrapper.forward, "__func__", None) is not WithInsertedLayer.forward:
        return "wrapped"  # another one was set, which may not run the layer
    if wrapper is site:  # no hooks may come between the site and the layer, or its arguments
        changes = takes_context(layer) and user_module(wrapper)._forward_pre_hooks
        joins = not (wrapper._forward_hooks or changes)
    else:
        is_base = site is user_module(wrapper)
        joins = is_base or takes_context(site) or not takes_context(layer)
    return "joined" if joins else "wrapped"


def place(
    model: nn.Module,
    site: nn.Module,
    layer: nn.Module,
    placement: Placement,
    output: Which,
    overwritten: bool,
) -> nn.Module:
    """Insert a layer after a site; returns the module now at its place.

    The site of a sibling is in a list (`list_of`), that of one that joins in a wrapper.
    """
    if placement == "sibling":
        owner = list_of(model, site)
        assert owner is not None
        owner.insert(next(i for i, element in enumerate(owner) if element is site) + 1, layer)
        return layer
    if placement == "joined":
        wrapper = wrapper_for(model, site)
        assert wrapper is not None
        add_layer(wrapper, site, layer, output, overwritten)
        return site if site is wrapper else layer
    wrapper = WithInsertedLayer(site)
    take_hooks(wrapper)
    add_layer(wrapper, wrapper, layer, output, overwritten)
    for owner, key in owners_of(model, site):  # under every name that it has
        owner._modules[key] = wrapper
    return wrapper


@contextmanager
def undoing(models: Iterable[nn.Module], *others: Any, always: bool = False) -> Iterator[None]:
    """After an error, or always, put submodules, attributes and pre-hooks back, and `others`."""
    containers: list[Any] = [*others]
    # pre-hooks too: those that prune weights are moved to the wrapper
    for module in (module for model in models for module in model.modules()):
        containers += [vars(module), module._modules, module._forward_pre_hooks]
    # the modules of a ScriptModule are in neither, and stay
    kept = [(one, one.copy()) for one in containers if isinstance(one, dict | list)]
    stays = False
    try:
        yield
        stays = not always
    finally:
        for container, before in kept if not stays else ():
            container.clear()
            (container.extend if isinstance(container, list) else container.update)(before)
