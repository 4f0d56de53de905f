"""One run of the module at a site: (x, δ), and what a block standing there would make of it."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from constrained_growth._sites.context import NO_CONTEXT, Context, arguments
from constrained_growth.blocks import AffineFactors, pinned_parameters


@dataclass(frozen=True)
class Use:
    """What one run of the module at a site brings.

    Attributes:
        x: The tensor at the site.
        delta: δ = ∂L/∂x of the mean loss of the batch, same shape.
        context: What else the module was called with.
    """

    x: Tensor
    delta: Tensor
    context: Context = NO_CONTEXT


def block_multipliers(
    block: nn.Module, x: Tensor, delta: Tensor, context: Context = NO_CONTEXT
) -> dict[str, Tensor]:
    """−∇_v of one batch by differentiating the block alone at its pins; for blocks of any kind.

    Args:
        block: The block; neither its parameters nor its buffers are touched.
        x: The tensor at the site.
        delta: ∂L/∂x, same shape.
        context: What else the module at the site was called with, for a block that takes it.

    Returns:
        Pinned parameter → −gradient.
    """
    return differentiated(block, x, delta, context)[1]


def differentiated(
    block: nn.Module, x: Tensor, delta: Tensor, context: Context = NO_CONTEXT
) -> tuple[Tensor, dict[str, Tensor]]:
    """What a block makes of x at its pins, and its multipliers as in `block_multipliers`.

    The random numbers that it draws (Dropout) are not missing in the model, which gets its own.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in pinned_parameters(block).items()}
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    cuda = [x.device] if x.device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(cuda, enabled=block.training):
        args, kwargs = arguments(block, x, context)
        y = torch.func.functional_call(block, {**buffers, **leaves}, args, kwargs)
    if not y.requires_grad:
        return y, {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(
        y, list(leaves.values()), delta.to(y.dtype), allow_unused=True, materialize_grads=True
    )
    return y.detach(), {name: -grad for name, grad in zip(leaves, grads, strict=True)}


def over_uses(uses: Iterable[Iterable[AffineFactors]]) -> list[AffineFactors]:
    """The factors of several uses of a block as those of one with as many more positions.

    Args:
        uses: The factors at each use, of the same samples, shape (samples, ..., width).

    Returns:
        Factors of shape (samples, positions, width).
    """

    def joined(tensors: Sequence[Tensor]) -> Tensor:
        return torch.cat([t.reshape(len(t), -1, t.shape[-1]) for t in tensors], dim=1)

    return [
        replace(
            same[0],
            cotangent=joined([factor.cotangent for factor in same]),
            features=joined([factor.features for factor in same]),
        )
        for same in zip(*(_of_all_samples(factors) for factors in uses), strict=True)
    ]


def _of_all_samples(factors: Iterable[AffineFactors]) -> list[AffineFactors]:
    """One for each affine map, of factors that may come for some samples after others."""
    parts: dict[str, list[AffineFactors]] = {}
    for factor in factors:
        parts.setdefault(factor.weight, []).append(factor)
    return [
        replace(
            some[0],
            cotangent=torch.cat([factor.cotangent for factor in some]),
            features=torch.cat([factor.features for factor in some]),
        )
        for some in parts.values()
    ]
