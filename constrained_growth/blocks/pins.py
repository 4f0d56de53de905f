"""Which parameters of a block are pinned, and whether it does nothing at its pins."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn

from constrained_growth._sites.context import NO_CONTEXT, Context, arguments
from constrained_growth.errors import BlockError


def pinned_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """The pinned parameters of a block, by name.

    Raises:
        BlockError: `block` declares no pins, or names a parameter it does not have.
    """
    names = getattr(block, "pinned", None)
    if not isinstance(block, nn.Module) or not isinstance(names, Sequence) or not names:
        raise BlockError(
            f"block={block!r} does not say which of its parameters are pinned; a block is an "
            "nn.Module with an attribute pinned = ('name of a parameter', ...) that is the "
            "identity at the values they have."
        )
    try:
        if isinstance(names, str):
            raise TypeError(names)
        return {name: block.get_parameter(name) for name in names}
    except (AttributeError, TypeError) as error:
        known = tuple(name for name, _ in block.named_parameters())
        raise BlockError(
            f"pinned={names!r} of {type(block).__name__} is not a tuple of names of its "
            f"parameters; it has {known}."
        ) from error


def moves(block: nn.Module, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
    """How much a block changes x at its pins, as `change` says it.

    Raises:
        BlockError: The block does not keep the shape of x.
    """
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    args, kwargs = arguments(block, x.clone(), context)
    y = torch.func.functional_call(block, buffers, args, kwargs)
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise BlockError(
            f"block={type(block).__name__} turns the shape {tuple(x.shape)} at its site into "
            f"{got}; the width must match."
        )
    return change(x, y)


def change(x: Tensor, y: Tensor) -> Tensor:
    """Largest difference of an entry, over what rounding may do: at most 1 where y is x."""
    if x.numel() == 0:
        return x.new_zeros(())
    allowed = 1e3 * torch.finfo(x.dtype).eps * x.abs().max().clamp(min=1.0)
    return (y - x).abs().max() / allowed
