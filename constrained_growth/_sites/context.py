"""What a module is called with besides the tensor, for blocks that ask for it."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten

from constrained_growth._structure import mapped


@dataclass(frozen=True)
class Context:
    """The arguments after the first one, of one call of a module."""

    args: tuple[Any, ...] = ()
    kwargs: Mapping[str, Any] = field(default_factory=dict)


NO_CONTEXT = Context()


def takes_context(block: object) -> bool:
    """Whether a block is to be called with what the module at its site was called with.

    Such a block has a true attribute `takes_context`, and is called as
    `block(x, *args[1:], **kwargs)`: x, the tensor at the site, takes the place of the first
    argument. Any other block is called as `block(x)`.
    """
    return bool(getattr(block, "takes_context", False))


def context_of(module: nn.Module, args: tuple[Any, ...], kwargs: Mapping[str, Any]) -> Context:
    """The context of a call `module(*args, **kwargs)`.

    Where the first argument came by keyword, it is the one that the signature of `forward` has
    first (of a module that hands on whatever it gets: that of the module inside), or else the
    first that was given.
    """
    if args or not kwargs:
        return Context(args[1:], kwargs)
    first = _first_parameter(module)
    first = first if first in kwargs else next(iter(kwargs))
    return Context((), {name: value for name, value in kwargs.items() if name != first})


def _first_parameter(module: nn.Module) -> str:
    for inside in module.modules():
        for name, parameter in inspect.signature(inside.forward).parameters.items():
            if parameter.kind not in (parameter.VAR_POSITIONAL, parameter.VAR_KEYWORD):
                return name
    return ""


def arguments(
    block: nn.Module, x: Tensor, context: Context
) -> tuple[tuple[Any, ...], dict[str, Any]]:
    """What a block is called with at a site: `block(*args, **kwargs)`."""
    if takes_context(block):
        return (x, *context.args), dict(context.kwargs)
    return (x,), {}


def alike(one: Context, other: Context) -> bool:
    """Whether two modules were called with the same tensors, and other things of the same types."""

    def is_same(a: Any, b: Any) -> bool:
        tensors = isinstance(a, Tensor) and isinstance(b, Tensor)
        return a is b or (torch.equal(a, b) if tensors else type(a) is type(b))

    (a, a_tree), (b, b_tree) = (tree_flatten((c.args, dict(c.kwargs))) for c in (one, other))
    return a_tree == b_tree and all(map(is_same, a, b))


def detached(context: Context) -> Context:
    """The same context without the graph its tensors belong to."""
    # it waits for δ beside x: with its graph it would hold the activations of all layers before
    args, kwargs = mapped((context.args, dict(context.kwargs)), Tensor.detach)
    return Context(args, kwargs)
