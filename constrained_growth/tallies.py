"""Running sums over samples: from (x, δ) at a site to λ and its variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth.blocks import AffineFactors, pinned_parameters


class Tally:
    """Σ n_b λ_b and Σ ‖·‖² for one candidate, or for several of one kind worked off together.

    Args:
        blocks: The blocks of the candidates; more than one only if their `joint_kind()` is equal.
    """

    def __init__(self, blocks: Sequence[nn.Module]) -> None:
        self._blocks = tuple(blocks)
        self._sums = {
            name: torch.zeros(
                (len(blocks), *p.shape), dtype=accumulation_dtype(p.dtype), device=p.device
            )
            for name, p in pinned_parameters(blocks[0]).items()
        }
        device = next(iter(self._sums.values())).device
        self._squares = torch.zeros(len(blocks), dtype=torch.float64, device=device)
        self._samples = [0] * len(blocks)
        self._batches = [0] * len(blocks)

    @property
    def bytes(self) -> int:
        """Size of the sums, which is the size of the multipliers."""
        return sum(total.nbytes for total in self._sums.values())

    def add_samples(self, x: Tensor, delta: Tensor, size: int) -> None:
        """Take in batches of `size` samples each, for all candidates at once, by closed forms.

        Args:
            x: The tensors at the sites, shape (candidates, samples, ..., width).
            delta: ∂L/∂x of the mean loss of each batch, same shape.
            size: How many samples each of the batches had; λ_n = −size · ψ_n φ_nᵀ.
        """
        for factor in _factors(self._blocks, x, delta):
            weight = self._sums[factor.weight]
            psi, phi = factor.cotangent.to(weight.dtype), factor.features.to(weight.dtype)
            self._squares.add_(sums_of_squares(psi, phi, factor.bias is not None), alpha=size**2)
            if psi.dim() > 3:
                psi, phi = psi.flatten(1, -2), phi.flatten(1, -2)
            if len(self._blocks) == 1:
                weight[0].addmm_(psi[0].T, phi[0], alpha=-size)
            else:
                weight.baddbmm_(psi.mT, phi, alpha=-size)
            if factor.bias is not None:
                self._sums[factor.bias].sub_(psi.sum(1), alpha=size)
        self._samples = [count + x.shape[1] for count in self._samples]

    def add_batch(self, index: int, x: Tensor, delta: Tensor, size: int) -> None:
        """Take in one batch of one candidate as a whole, by differentiating its block alone.

        Args:
            index: Which of the blocks.
            x: The tensor at its site, shape of the site.
            delta: ∂L/∂x, same shape.
            size: How many samples the batch had.
        """
        for name, value in block_multipliers(self._blocks[index], x, delta).items():
            self._squares[index].add_(value.square().sum(dtype=torch.float64), alpha=size)
            self._sums[name][index].add_(value, alpha=size)
        self._batches[index] += 1

    def results(self, num_samples: int) -> list[tuple[dict[str, Tensor], float]]:
        """λ, the mean over the samples, and tr Cov(λ) of each candidate.

        The variance is unbiased, and NaN where it cannot be known: from a single sample or
        batch, or where some batches came by samples and some as a whole.
        """
        means = {name: total / num_samples for name, total in self._sums.items()}
        sizes = sum(m.flatten(1).square().sum(1, dtype=torch.float64) for m in means.values())
        spreads = (self._squares - num_samples * sizes).tolist()
        multipliers = zip(*(mean.unbind() for mean in means.values()), strict=True)
        counts = zip(self._samples, self._batches, strict=True)
        units = [
            samples or batches if not (samples and batches) else 0 for samples, batches in counts
        ]
        return [
            (
                dict(zip(means, values, strict=True)),
                max(spread, 0.0) / (count - 1) / num_samples if count > 1 else math.nan,
            )
            for values, spread, count in zip(multipliers, spreads, units, strict=True)
        ]


def block_multipliers(block: nn.Module, x: Tensor, delta: Tensor) -> dict[str, Tensor]:
    """−∇_v of one batch by differentiating the block alone at its pins; for blocks of any kind.

    Args:
        block: The block; neither its parameters nor its buffers are touched.
        x: The tensor at the site.
        delta: ∂L/∂x, same shape.

    Returns:
        Pinned parameter → −gradient.
    """
    leaves = {name: p.detach().requires_grad_() for name, p in pinned_parameters(block).items()}
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    with torch.enable_grad():
        y = torch.func.functional_call(block, {**buffers, **leaves}, (x,))
    if not y.requires_grad:
        return {name: torch.zeros_like(leaf) for name, leaf in leaves.items()}
    grads = torch.autograd.grad(
        y, list(leaves.values()), delta.to(y.dtype), allow_unused=True, materialize_grads=True
    )
    return {name: -grad for name, grad in zip(leaves, grads, strict=True)}


def sums_of_squares(psi: Tensor, phi: Tensor, has_bias: bool) -> Tensor:
    """Σ_n ‖λ_n‖² over the samples n, without forming λ_n where that is dearer.

    At a site without further dimensions ‖λ_n‖² = ‖ψ_n‖²(‖φ_n‖² + 1), the 1 for the bias. With T
    positions per sample it is Σ_st (ψ_s·ψ_t)(φ_s·φ_t + 1), or the square of the product itself
    where that is smaller.

    Args:
        psi: Cotangents, shape (candidates, samples, ..., out).
        phi: Features, shape (candidates, samples, ..., in).
        has_bias: Whether a bias is pinned too.

    Returns:
        Shape (candidates,).
    """
    if psi.dim() == 3:
        sizes = torch.linalg.vector_norm(psi, dim=-1)
        both = sizes * torch.linalg.vector_norm(phi, dim=-1)
        total = torch.linalg.vecdot(both, both)
        return total + torch.linalg.vecdot(sizes, sizes) if has_bias else total
    psi, phi = psi.flatten(2, -2), phi.flatten(2, -2)
    positions, out, width = psi.shape[2], psi.shape[3], phi.shape[3]
    if positions * (out + width) <= out * width:
        return ((psi @ psi.mT) * (phi @ phi.mT + float(has_bias))).sum((1, 2, 3))
    squares = (psi.mT @ phi).square().sum((1, 2, 3))
    return squares + psi.sum(2).square().sum((1, 2)) if has_bias else squares


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: at least float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32


def _factors(blocks: Sequence[nn.Module], x: Tensor, delta: Tensor) -> Sequence[AffineFactors]:
    """The factors of all blocks, their first dimension counting the blocks."""
    first: Any = blocks[0]
    if len(blocks) > 1:
        return first.joint_factors(blocks, x, delta)
    return [
        AffineFactors(f.weight, f.bias, f.cotangent.unsqueeze(0), f.features.unsqueeze(0))
        for f in first.factors(x[0], delta[0])
    ]
