"""Does a block fit its site? Tried on the tensor that is there."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._multipliers.closed_form import differentiated
from constrained_growth._sites.collector import Use
from constrained_growth._sites.context import Context
from constrained_growth._sites.untouched import full_precision, untouched
from constrained_growth.blocks import has_factors, pinned_parameters
from constrained_growth.blocks.protocol import moves
from constrained_growth.errors import BlockError

_MOST_UNITS = 2**20
"""Of a batch, of which the share at a kink is found."""


def check_fit(name: str, block: nn.Module, x: Tensor, context: Context) -> None:
    """Try a candidate's block on the tensor at its site, in the block's own precision."""
    x = x.to(next(block.parameters()).dtype)  # under autocast x is in a lower one
    where = f'block={type(block).__name__} of candidate "{name}"'
    with full_precision(x.device), torch.no_grad():
        try:
            moved = float(moves(block, x, context))
        except BlockError:  # says it better
            raise
        except Exception as error:
            raise BlockError(
                f"{where} fails on the tensor of shape {tuple(x.shape)} at its site: {error}; the "
                f"width there is {x.shape[-1]}, so make the block with width={x.shape[-1]}."
            ) from error
        if not moved <= 1:  # nor may it be NaN
            raise BlockError(
                f"{where} is not the identity at its pins on the data: it moves the tensor at its "
                f"site by {moved:.2g} times what rounding may do. An identity layer stands right "
                "after its own activation; elsewhere use ResidualMLP(width, hidden, activation)."
            )
        if has_factors(block):
            some = x[:2] if x.dim() > 1 else x  # which have the shapes of all
            with untouched(block):
                _check_factors(block, some, some, where)


def refuse_dead(name: str, block: nn.Module, x: Tensor, context: Context) -> None:
    """Refuse a candidate's block whose multipliers are 0 whatever arrives."""
    x = x.to(next(block.parameters()).dtype)
    # not the data's own x and δ, which are zero where units are dead or the loss is stationary
    generator = torch.Generator().manual_seed(0)
    x, delta = torch.randn(2, *x.shape, generator=generator, dtype=torch.float64).to(x)
    with full_precision(x.device), torch.no_grad(), untouched(block):
        _, (multipliers,) = differentiated(block, Use(x, delta, context), [delta])
    if not any(bool(value.any()) for value in multipliers.values()):
        where = f'block={type(block).__name__} of candidate "{name}"'
        raise BlockError(
            f"{where} has multipliers that vanish identically (both factors of a product are zero, "
            "or σ′(0) = 0 by autograd's convention): it could never be chosen. Give its free "
            'factor a non-zero value, or use ResidualMLP(width, hidden, activation, "outer").'
        )


def _check_factors(block: Any, x: Tensor, delta: Tensor, where: str) -> None:
    """Refuse a closed form of other parameters than the pinned ones, or of other shapes."""
    pinned = {name: tuple(p.shape) for name, p in pinned_parameters(block).items()}
    given: dict[str, tuple[int, ...]] = {}
    for factor in block.factors(x, delta):
        out, width = factor.cotangent.shape[-1], factor.features.shape[-1]
        if factor.elementwise:
            given[factor.weight] = (out,)
        else:
            given[factor.weight] = (width, out) if factor.transposed else (out, width)
        given |= {factor.bias: (out,)} if factor.bias is not None else {}
    fits = given.keys() == pinned.keys() and all(
        (shape[0], math.prod(shape[1:])) == (given[name][0], math.prod(given[name][1:]))
        for name, shape in pinned.items()
    )
    if not fits:
        raise BlockError(
            f"{where}: factors(x, delta) gives multipliers of the shapes {given}, and the pinned "
            f"parameters are {pinned}; it has to give each of them, with cotangents in the first "
            "dimension and features in the second (or transposed=True, elementwise=True), or "
            "leave factors out."
        )


def share_at_kinks(block: nn.Module, seen: Sequence[Use]) -> float:
    """Share of the units, on the first batch, where the block's activation has a kink."""
    kinks: Any = getattr(block, "kinks", None)
    if not callable(kinks) or not seen:
        return 0.0
    with torch.no_grad():
        some = [use.x[: max(1, _MOST_UNITS // max(1, use.x[0].numel()))] for use in seen]
        masks = torch.cat([torch.as_tensor(kinks(x)).flatten() for x in some])
    return float(masks.double().mean())
