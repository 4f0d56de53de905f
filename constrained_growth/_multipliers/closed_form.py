"""λ from two tensors at a site, the block standing nowhere: x, what is there, and δ = ∂L/∂x.

At its pins a block y = b(x, v) is the identity, so that the chain rule leaves

    λ = −∇_v L = −(∂b/∂v)ᵀ δ.

Blocks with a pinned affine map W φ + b offer `factors(x, delta)`: the features φ and cotangents
ψ = ∂L/∂(Wφ + b), with λ_W = −Σ ψφᵀ and λ_b = −Σ ψ, sample by sample. Any other block is
differentiated alone, batch by batch. Both are right wherever the loss sees the layer through the
*value* of its output only; see `in_graph` for the rest.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import torch
from torch import Tensor, nn

from constrained_growth._sites.collector import Use
from constrained_growth._sites.context import NO_CONTEXT, Context, arguments
from constrained_growth.blocks import pinned_parameters
from constrained_growth.blocks.protocol import called_with


def by_sample(uses: Sequence[Use], size: int) -> bool:
    """Whether the first dimension of x counts the `size` samples of the batch, at every use."""
    return all(use.x.dim() > 1 and use.x.shape[0] == size for use in uses)


def differentiated(
    block: nn.Module, use: Use, deltas: Iterable[Tensor]
) -> tuple[Tensor, list[dict[str, Tensor]]]:
    """What a block makes of x at its pins, and −(∂b/∂v)ᵀ δ by autograd, for each δ.

    Neither its parameters nor its buffers are touched. The random numbers that it draws (Dropout)
    are not missing in the model, which gets its own.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in pinned_parameters(block).items()}
    pins = list(leaves.values())
    y = at_pins(block, leaves, use.x, use.context)
    if not y.requires_grad:  # no pin is used, as by a mixture whose expert is idle
        return y, [{name: torch.zeros_like(leaf) for name, leaf in leaves.items()} for _ in deltas]
    found = []
    for delta in deltas:
        grads = torch.autograd.grad(
            y,
            pins,
            delta.to(y.dtype),
            retain_graph=True,
            allow_unused=True,
            materialize_grads=True,
        )
        found.append({name: -grad for name, grad in zip(leaves, grads, strict=True)})
    return y.detach(), found


def at_pins(
    block: nn.Module, pinned: dict[str, Tensor], x: Tensor, context: Context = NO_CONTEXT
) -> Tensor:
    """`block(x)` with other tensors in the place of its pinned parameters, all else untouched."""
    free = {name: p.detach() for name, p in block.named_parameters() if name not in pinned}
    cuda = [x.device] if x.device.type == "cuda" else []
    with torch.enable_grad(), torch.random.fork_rng(cuda, enabled=block.training):
        return called_with(block, free | pinned, *arguments(block, x, context))
