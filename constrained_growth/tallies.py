"""Running sums over samples: from (x, δ) at a site to λ and its variance."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth.blocks import AffineFactors, pinned_parameters
from constrained_growth.norms import SecondMoments


@dataclass(frozen=True)
class Estimate:
    """What a pass over the data says of one candidate.

    Attributes:
        multiplier: Pinned parameter → λ, the mean over the samples.
        variance: tr Cov(λ), unbiased. NaN where it cannot be known: from a single sample or
            batch, or where some batches came by samples and some as a whole.
        moments: Pinned weight → second moments of its features and cotangents, where asked for
            and the block has `factors`.
    """

    multiplier: dict[str, Tensor]
    variance: float
    moments: dict[str, SecondMoments]


@dataclass
class _MomentSums:
    """Σ φ̃φ̃ᵀ and Σ ψψᵀ of one affine map (or of several), and over how many rows."""

    features: Tensor
    cotangents: Tensor
    bias: str | None
    rows: int = 0

    def means(self, index: int | None, num_samples: int) -> SecondMoments:
        here = ... if index is None else index
        return SecondMoments(
            self.features[here] / self.rows, self.cotangents[here] / num_samples, self.bias
        )


class Tally:
    """Σ n_b λ_b and Σ ‖·‖² for one candidate, or for several of one kind worked off together.

    Args:
        blocks: The blocks of the candidates; more than one only if their `joint_kind()` is equal.
        moments: Whether to collect second moments too, for norms that need them.
    """

    def __init__(self, blocks: Sequence[nn.Module], *, moments: bool = False) -> None:
        self._blocks = tuple(blocks)
        self._joint = len(blocks) > 1
        several = (len(blocks),) if self._joint else ()
        self._sums = {
            name: torch.zeros(
                (*several, *p.shape), dtype=accumulation_dtype(p.dtype), device=p.device
            )
            for name, p in pinned_parameters(blocks[0]).items()
        }
        device = next(iter(self._sums.values())).device
        self._squares = torch.zeros(several, dtype=torch.float64, device=device)
        self._rows: list[tuple[Tensor, Tensor]] = []
        self._rows_of = (0, False)
        self._moments: dict[str, _MomentSums] | None = {} if moments else None
        self._samples = 0
        self._batches = [0] * len(blocks)

    def add_samples(self, x: Tensor, delta: Tensor, size: int) -> None:
        """Take in batches of `size` samples each by closed forms, for all candidates at once.

        Args:
            x: The tensor at the site, shape (samples, ..., width); for several candidates the
                tensors at their sites, shape (candidates, samples, ..., width).
            delta: ∂L/∂x of the mean loss of each batch, same shape.
            size: How many samples each of the batches had; λ_n = −size · ψ_n φ_nᵀ.
        """
        first: Any = self._blocks[0]
        joint = int(self._joint)
        factors = first.joint_factors(self._blocks, x, delta) if joint else first.factors(x, delta)
        for factor in factors:
            weight = self._sums[factor.weight]
            psi, phi = factor.cotangent, factor.features
            if psi.dtype != weight.dtype or phi.dtype != weight.dtype:
                psi, phi = psi.to(weight.dtype), phi.to(weight.dtype)
            if psi.dim() > 2 + joint:
                psi, phi = psi.flatten(1 + joint, -2), phi.flatten(1 + joint, -2)
                sizes = sample_sizes(psi, phi, factor.bias is not None)
                self._squares.add_(sizes.sum(-1, dtype=torch.float64), alpha=size**2)
                psi, phi = psi.flatten(joint, -2), phi.flatten(joint, -2)
            else:
                self._add_rows(psi, phi, size, factor.bias is not None)
            if self._moments is not None:
                self._add_moments(factor, psi, phi, size)
            if joint:
                weight.baddbmm_(psi.mT, phi, alpha=-size)
            else:
                weight.addmm_(psi.T, phi, alpha=-size)
            if factor.bias is not None:
                self._sums[factor.bias].sub_(psi.sum(-2), alpha=size)
        self._samples += x.shape[joint]

    def add_batch(self, index: int, x: Tensor, delta: Tensor, size: int) -> None:
        """Take in one batch of one candidate as a whole, by differentiating its block alone.

        Args:
            index: Which of the blocks.
            x: The tensor at its site, shape of the site.
            delta: ∂L/∂x, same shape.
            size: How many samples the batch had.
        """
        here = index if self._joint else ...
        for name, value in block_multipliers(self._blocks[index], x, delta).items():
            self._squares[here].add_(value.square().sum(dtype=torch.float64), alpha=size)
            self._sums[name][here].add_(value, alpha=size)
        self._batches[index] += 1

    def _add_rows(self, psi: Tensor, phi: Tensor, size: int, has_bias: bool) -> None:
        """Note ‖ψ_n‖ and ‖φ_n‖; ‖λ_n‖² = ‖ψ_n‖²(‖φ_n‖² + 1), the 1 for the bias, can wait."""
        if (size, has_bias) != self._rows_of or len(self._rows) == _MOST_ROWS:
            self._settle()
            self._rows_of = (size, has_bias)
        norm = torch.linalg.vector_norm
        self._rows.append((norm(psi, dim=-1), norm(phi, dim=-1)))

    def _settle(self) -> None:
        if self._rows:
            size, has_bias = self._rows_of
            psi, phi = (torch.cat(rows, -1).square_() for rows in zip(*self._rows, strict=True))
            squares = torch.linalg.vecdot(psi, phi.add_(float(has_bias)))
            self._squares.add_(squares, alpha=size**2)
            self._rows.clear()

    def _add_moments(self, factor: AffineFactors, psi: Tensor, phi: Tensor, size: int) -> None:
        """Add Σ φ̃φ̃ᵀ and Σ ψψᵀ over samples and positions, φ̃ = (φ, 1) where there is a bias."""
        assert self._moments is not None
        if factor.bias is not None:
            phi = torch.cat([phi, phi.new_ones(*phi.shape[:-1], 1)], -1)
        features, cotangents = phi.mT @ phi, psi.mT @ psi * size**2
        sums = self._moments.get(factor.weight)
        if sums is None:
            sums = _MomentSums(features, cotangents, factor.bias)
            self._moments[factor.weight] = sums
        else:
            sums.features.add_(features)
            sums.cotangents.add_(cotangents)
        sums.rows += phi.shape[-2]

    def estimates(self, num_samples: int) -> list[Estimate]:
        """What is known of each candidate, from `num_samples` samples."""
        self._settle()
        count = len(self._blocks)
        means = {
            name: (total / num_samples).view(count, *total.shape[self._joint :])
            for name, total in self._sums.items()
        }
        squares = [
            m.reshape(count, -1).square().sum(1, dtype=torch.float64) for m in means.values()
        ]
        spreads = (self._squares.view(count) - num_samples * sum(squares)).tolist()
        return [
            Estimate(
                multiplier={name: mean[index] for name, mean in means.items()},
                variance=self._variance(spread, batches, num_samples),
                moments={
                    name: sums.means(index if self._joint else None, num_samples)
                    for name, sums in (self._moments or {}).items()
                },
            )
            for index, (spread, batches) in enumerate(zip(spreads, self._batches, strict=True))
        ]

    def _variance(self, spread: float, batches: int, num_samples: int) -> float:
        units = self._samples or batches
        mixed = self._samples > 0 and batches > 0
        return math.nan if mixed or units < 2 else max(spread, 0.0) / (units - 1) / num_samples


_MOST_ROWS = 64
"""How many batches the norms of their rows may wait, which saves small operations."""


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


def sample_sizes(psi: Tensor, phi: Tensor, has_bias: bool) -> Tensor:
    """‖λ_n‖² of samples with several positions, without forming λ_n where that is dearer.

    With T positions ‖λ_n‖² = Σ_st (ψ_s·ψ_t)(φ_s·φ_t + 1), the 1 for the bias, or the square of
    the product itself where that is smaller.

    Args:
        psi: Cotangents, shape (..., samples, positions, out).
        phi: Features, shape (..., samples, positions, in).
        has_bias: Whether a bias is pinned too.

    Returns:
        Shape (..., samples).
    """
    positions, out, width = psi.shape[-2], psi.shape[-1], phi.shape[-1]
    if positions * (out + width) <= out * width:
        return ((psi @ psi.mT) * (phi @ phi.mT + float(has_bias))).sum((-2, -1))
    squares = (psi.mT @ phi).square().sum((-2, -1))
    return squares + psi.sum(-2).square().sum(-1) if has_bias else squares


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: at least float32."""
    return dtype if dtype in (torch.float32, torch.float64) else torch.float32
