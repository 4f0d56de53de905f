"""What a block makes of x."""

from __future__ import annotations

import copy
from collections.abc import Iterator

import torch
from torch import Tensor, nn

from constrained_growth._sites.context import arguments
from constrained_growth.blocks import change, pinned_parameters
from constrained_growth.testing.case import Case, autograd_multipliers, cotangent, has_context, mode


def keeps_shape(case: Case) -> Iterator[str]:
    """The shape and dtype stay."""
    for training in (True, False):
        y = case.call(case.fresh(training=training))
        got = (tuple(y.shape), y.dtype) if isinstance(y, Tensor) else type(y).__name__
        if got != (tuple(case.x.shape), case.x.dtype):
            yield (
                f"{mode(training)} it turns {tuple(case.x.shape)}, {case.x.dtype} into {got}; "
                "what it returns has to be a tensor like x."
            )


def is_the_identity(case: Case) -> Iterator[str]:
    """The identity at the pins."""
    for training in (True, False):
        moved = float(change(case.x, case.call(case.fresh(training=training)).detach()))
        if not moved <= 1:
            yield (
                f"{mode(training)} it is not the identity at its pins: it moves x by {moved:.2g} "
                "times what rounding may do. The pinned parameters have to be at the values where "
                "it does nothing when the block is made."
            )


def says_where_it_is_exact(case: Case) -> Iterator[str]:
    """`exact_after` says no more than is true."""
    exact_after = getattr(case.block, "exact_after", None)
    if not callable(exact_after) or exact_after(nn.Identity()) is not True or has_context(case):
        return
    x = 3 * torch.randn_like(case.x)
    if not float(change(x, case.call(case.fresh(), x).detach())) <= 1:
        yield (
            "exact_after says that it is the identity on all that an nn.Identity gives, and it "
            "moves random numbers; let exact_after return True only for modules after which the "
            "block does nothing, or leave it out."
        )


def takes_any_number_of_samples(case: Case) -> Iterator[str]:
    """One sample alone."""
    if has_context(case):
        return
    x = case.x[:1]
    y = case.call(case.fresh(), x)
    if y.shape != x.shape:
        yield f"of one sample alone it makes the shape {tuple(y.shape)}, not {tuple(x.shape)}."


def leaves_things_alone(case: Case) -> Iterator[str]:
    """A forward pass writes to nothing."""
    for training in (True, False):
        block, x = case.fresh(training=training), case.x.clone()
        before = copy.deepcopy(block.state_dict())
        version = x._version
        with torch.no_grad():
            case.call(block, x)
        if x._version != version:
            yield f"{mode(training)} it changes x in place; write y = x + ..., not x += ..."
        parameters = dict(block.named_parameters())
        written = [
            name
            for name, value in block.state_dict().items()
            if (name in parameters or not training)
            and not torch.allclose(value, before[name], rtol=0, atol=0, equal_nan=True)
        ]
        if written:
            yield f"{mode(training)} a forward pass changes {tuple(written)}."


def gives_the_same_twice(case: Case) -> Iterator[str]:
    """The same twice in eval mode."""
    block, delta = case.fresh(), cotangent(case)
    one = autograd_multipliers(case, block, delta)
    torch.rand(1)
    args, kwargs = arguments(block, case.x, case.context)
    pins = list(pinned_parameters(block).values())
    torch.manual_seed(1)
    again = torch.autograd.grad(block(*args, **kwargs), pins, delta, allow_unused=True)
    for (name, first), second in zip(one.items(), again, strict=True):
        if first is not None and second is not None and not torch.equal(first, -second):
            yield (
                f"in eval mode two passes give different multipliers of {name!r}: it draws random "
                "numbers, or keeps something between calls."
            )
