"""Conformance checks for a user's own block."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterator
from typing import Any

from torch import Tensor, nn

from constrained_growth._sites.context import Context
from constrained_growth._sites.untouched import differentiable, untouched
from constrained_growth.blocks import pinned_parameters
from constrained_growth.errors import BlockError
from constrained_growth.testing.case import Case, said
from constrained_growth.testing.copies import (
    can_be_built_from_its_config,
    can_be_moved,
    can_be_pickled,
    survives,
)
from constrained_growth.testing.gradients import (
    can_be_loosened,
    has_the_factors_it_says,
    has_the_joint_factors_it_says,
)
from constrained_growth.testing.models import works_in_a_model
from constrained_growth.testing.values import (
    gives_the_same_twice,
    is_the_identity,
    keeps_shape,
    leaves_things_alone,
    says_where_it_is_exact,
    takes_any_number_of_samples,
)


def check_block(block: nn.Module, x: Tensor, *args: Any, **kwargs: Any) -> None:
    """Try all that the library relies on in a block, on an example of what arrives at its site.

    That it names its pins, and is the identity there in train and eval mode, for any number of
    samples, without writing to x, to its parameters or, in eval mode, to its buffers; that the
    gradient passes, and no pin is dead; that it gives the same twice in eval mode; that
    `factors` and `joint_factors`, where there are any, are the gradients of the whole and of
    every single sample; that it can be copied, pickled, restored from its state dict, built again
    from its `config()` where it has one, and moved to other precisions and devices; and that in a
    model `solve` gives the λ that autograd gives, `insert` keeps the function, and the record can
    be replayed.

    Args:
        block: The block, with its pins where they have to be. It is left as it is.
        x: What arrives at a site, shape (samples, ...) with at least two samples, on the block's
            device and in its precision. For a block that is the identity only on certain values
            (after a ReLU, say) an example of these, for any other random numbers.
        *args: What else the module at the site is called with, for a block that
            `takes_context`.
        **kwargs: The same, by name.

    Raises:
        BlockError: Says all that is wrong with the block, and what to do about it.

    Example:
        >>> import torch
        >>> from constrained_growth.blocks import ResidualMLP
        >>> check_block(ResidualMLP(4, 8, nn.GELU()), torch.randn(5, 4))
    """
    pinned_parameters(block)
    _check_example(x)
    with untouched(block), differentiable():
        try:
            case = Case(copy.deepcopy(block), x.detach().clone(), Context(args, kwargs))
        except Exception as error:
            raise BlockError(
                f"block={type(block).__name__} cannot be copied ({said(error)}); what is "
                "inserted is a copy, so copy.deepcopy(block) has to work."
            ) from error
        problems = list(_tried(keeps_shape, case))
        if not problems:
            problems = [problem for check in _CHECKS for problem in _tried(check, case)]
    if problems:
        found = "".join(f"\n  * {problem}" for problem in problems)
        raise BlockError(f"block={type(block).__name__} does not do what is relied on:{found}")


def _check_example(x: object) -> None:
    if not isinstance(x, Tensor) or not x.is_floating_point() or x.dim() < 2 or len(x) < 2:
        shown = f"shape {tuple(x.shape)}, {x.dtype}" if isinstance(x, Tensor) else repr(x)
        raise BlockError(
            f"x: {shown} is no example of what arrives at a site; give a floating-point tensor of "
            "shape (samples, ...) with at least two samples."
        )


def _tried(check: Callable[[Case], Iterator[str]], case: Case) -> Iterator[str]:
    try:
        yield from check(case)
    except Exception as error:
        what = (check.__doc__ or "").rstrip(".")
        yield f"it fails where this is tried: {what} ({said(error)})."


_CHECKS = (
    is_the_identity,
    says_where_it_is_exact,
    takes_any_number_of_samples,
    leaves_things_alone,
    gives_the_same_twice,
    can_be_loosened,
    has_the_factors_it_says,
    has_the_joint_factors_it_says,
    survives,
    can_be_pickled,
    can_be_built_from_its_config,
    can_be_moved,
    works_in_a_model,
)
