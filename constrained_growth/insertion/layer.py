"""Where an inserted layer can go, and in which form."""

from __future__ import annotations

import itertools
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

from constrained_growth._sites.context import takes_context
from constrained_growth._sites.wrapper import WithInsertedLayer, user_module
from constrained_growth.blocks import pinned_parameters
from constrained_growth.errors import BlockError


def wrapper_for(model: nn.Module, site: nn.Module) -> WithInsertedLayer | None:
    """The wrapper that holds a site, or is the site; None where a new one is needed."""
    if isinstance(site, WithInsertedLayer):
        return site
    owners = [o for o in model.modules() for child in o._modules.values() if child is site]
    (owner,) = owners if len(owners) == 1 else (None,)
    return owner if isinstance(owner, WithInsertedLayer) else None


def can_join(model: nn.Module, site: nn.Module, layer: nn.Module) -> bool:
    """Whether a layer in the wrapper that holds its site gets what it would get around the site."""
    wrapper = wrapper_for(model, site)
    if wrapper is None:
        return False
    if getattr(wrapper.forward, "__func__", None) is not WithInsertedLayer.forward:
        return False  # another one was set, which may not run the layer
    if wrapper is site:
        return not wrapper._forward_hooks  # which come between the site and the layer
    is_base = site is user_module(wrapper)
    return is_base or takes_context(site) or not takes_context(layer)


def standalone_form(block: nn.Module) -> nn.Module:
    """The module `block.standalone()`, made without drawing random numbers."""
    with torch.random.fork_rng(devices=[]):
        layer = block.standalone()  # type: ignore[operator]
    pins = {id(p) for p in pinned_parameters(block).values()}
    if not isinstance(layer, nn.Module) or not pins <= {id(p) for p in layer.parameters()}:
        raise BlockError(
            f"block={type(block).__name__}: standalone() returned a {type(layer).__name__} that "
            "does not hold the pinned parameters of the block themselves."
        )
    return layer


def first_parameter(site: nn.Module, model: nn.Module) -> Tensor | None:
    """The first parameter of a module, or else of the model; None if there is none."""
    return next(itertools.chain(site.parameters(), model.parameters()), None)


@contextmanager
def structure_kept_on_error(model: nn.Module) -> Iterator[None]:
    """After an error, restore the submodules and attributes of every module."""
    kept = [(module, dict(vars(module)), dict(module._modules)) for module in model.modules()]
    try:
        yield
    except BaseException:
        for module, attributes, children in kept:
            vars(module).clear()
            vars(module).update(attributes)
            module._modules.clear()
            module._modules.update(children)
        raise
