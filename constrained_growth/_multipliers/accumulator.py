"""Sums over batches, and what they say of λ: its mean, its variance, its second moments.

With weight w_b of batch b (the number n_b of its samples, unless the user says otherwise), mean
loss L_b, N = Σ n_b and W = Σ w_b,

    λ = −(1/W) Σ_b w_b ∇_v L_b.

A sample n of batch b adds u_n = −w_b ψ_n φ_nᵀ to W λ where the block has factors. Its squared norm
comes from those of ψ_n and φ_n, and

    tr Cov(λ) = (Σ_n ‖u_n‖² − ‖W λ‖²/N) · N / ((N − 1) W²).

Any other block gives u_b = −w_b ∇_v L_b as a whole; then Σ_b ‖u_b‖²/n_b stands in for the sum over
samples, and the number B of batches for N in N − 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from constrained_growth._multipliers.closed_form import by_sample, differentiated, factors_of
from constrained_growth._sites.collector import Use
from constrained_growth.blocks import AffineFactors, has_factors, pinned_parameters
from constrained_growth.blocks.protocol import change, moves
from constrained_growth.norms import SecondMoments


@dataclass(frozen=True)
class Estimate:
    """What is known of the multiplier of one candidate.

    `variance` is an unbiased tr Cov(λ); NaN from a single sample or batch, or where some batches
    came by samples and some as a whole. `moments`, by pinned weight, are there where asked for
    and the block has `factors`. `moved` is by how much the block moved x at most, in units of
    what rounding may do.
    """

    multiplier: dict[str, Tensor]
    variance: float
    moments: dict[str, SecondMoments]
    moved: float


@dataclass
class Counts:
    """How much was taken in."""

    samples: int
    weight: float
    by_sample: int  # samples that came one by one
    batches: int  # batches that came as a whole
    rows: dict[str, int]  # of each pinned weight's moments, over samples and positions
    biases: dict[str, str | None]  # of the affine map of a pinned weight


class Accumulator:
    """The sums of one candidate. To be used without autocast, which would multiply roughly.

    `moments`: collect second moments too. `conditional`: try on every batch that the block is
    the identity.
    """

    def __init__(self, block: nn.Module, *, moments: bool, conditional: bool) -> None:
        self._block = block
        pins = pinned_parameters(block)
        self._dtype = next(iter(pins.values())).dtype
        self._sums = {
            name: torch.zeros_like(p, dtype=accumulation_dtype(p.dtype), requires_grad=False)
            for name, p in pins.items()
        }
        device = next(iter(pins.values())).device
        self._squares = torch.zeros((), dtype=torch.float64, device=device)
        self._moved = torch.zeros_like(self._squares)
        self._conditional = conditional
        self._has_factors = has_factors(block)
        self._with_moments = moments
        self._features: dict[str, Tensor] = {}
        self._cotangents: dict[str, Tensor] = {}
        self.counts = Counts(0, 0.0, 0, 0, {}, {})

    def add(
        self, uses: Sequence[Use], size: int, weight: float, batches: int = 1, again: bool = False
    ) -> None:
        """Take in one batch of `size` samples: what it brought to the site, at each use.

        Several `batches` of this weight may come as one, of all their samples. A batch that
        comes `again` (a second backward pass through its graph) adds and does not count twice.
        """
        before = replace(self.counts) if again else None
        if self._has_factors and by_sample(uses, size):
            if self._conditional:
                for use in uses:
                    self._note_moved(moves(self._block, use.x.to(self._dtype)))
            self._add_factors(factors_of(self._block, uses, self._dtype), weight)
            self.counts.by_sample += size
            self._count(size, weight * batches)
        else:
            self.add_whole(*self._differentiate(uses), size, weight)
        if before is not None:
            self.counts = replace(before, rows=self.counts.rows, biases=self.counts.biases)

    def _differentiate(self, uses: Sequence[Use]) -> tuple[dict[str, Tensor], Tensor | None]:
        """−∇_v of one batch, and by how much the block moves x if that is to be seen."""
        total: dict[str, Tensor] = {}
        moved: Tensor | None = None
        for use in uses:
            use = Use(use.x.to(self._dtype), use.delta.to(self._dtype), use.context)
            y, part = differentiated(self._block, use)
            total = {name: total[name] + p if total else p for name, p in part.items()}
            if self._conditional:
                here = change(use.x.to(y.dtype), y)
                moved = here if moved is None else torch.maximum(moved, here)
        return total, moved

    @property
    def nbytes(self) -> int:
        """The size of λ."""
        return sum(total.nbytes for total in self._sums.values())

    def add_whole(
        self, multiplier: Mapping[str, Tensor], moved: Tensor | None, size: int, weight: float
    ) -> None:
        """Take in one batch whose −∇_v L_b is known as a whole; and how far the block moved x."""
        if moved is not None:
            self._note_moved(moved)
        for name, value in multiplier.items():
            square = torch.linalg.vector_norm(value, dtype=torch.float64).square()
            self._squares.add_(square, alpha=weight**2 / size)
            self._sums[name].add_(value, alpha=weight)
        self.counts.batches += 1
        self._count(size, weight)

    def _count(self, size: int, weight: float) -> None:
        self.counts.samples += size
        self.counts.weight += weight

    def _note_moved(self, moved: Tensor) -> None:
        self._moved = torch.maximum(self._moved, moved.to(self._moved))

    def _add_factors(self, factors: Iterable[AffineFactors], weight: float) -> None:
        for factor in factors:
            total = self._sums[factor.weight]
            matrix = total.flatten(1)  # a kernel as a matrix
            psi, phi = factor.cotangent.to(total.dtype), factor.features.to(total.dtype)
            has_bias = factor.bias is not None
            self._squares.add_(squared_sizes(psi, phi, has_bias), alpha=weight**2)
            psi, phi = psi.flatten(0, -2), phi.flatten(0, -2)
            matrix.addmm_(psi.T, phi, alpha=-weight)
            if factor.bias is not None:
                self._sums[factor.bias].sub_(psi.sum(0), alpha=weight)
            if self._with_moments:
                self._add_moments(factor, psi, phi, weight)

    def _add_moments(self, factor: AffineFactors, psi: Tensor, phi: Tensor, weight: float) -> None:
        """Σ φ̃φ̃ᵀ and Σ w² ψψᵀ over samples and positions; φ̃ = (φ, 1) where there is a bias."""
        name = factor.weight
        if factor.bias is not None:
            phi = torch.cat([phi, phi.new_ones(len(phi), 1)], 1)
        if name not in self._features:
            self._make_moments(name, factor.bias)
        self._features[name].addmm_(phi.T, phi)
        self._cotangents[name].addmm_(psi.T, psi, alpha=weight**2)
        self.counts.rows[name] = self.counts.rows.get(name, 0) + len(phi)

    def _make_moments(self, name: str, bias: str | None) -> None:
        matrix = self._sums[name].flatten(1)
        out, width = matrix.shape
        width += bias is not None
        self._features[name] = matrix.new_zeros(width, width)
        self._cotangents[name] = matrix.new_zeros(out, out)
        self.counts.biases[name] = bias

    def count_all(self, samples: int, weight: float, batches: int) -> None:
        """Count the batches too that did not pass the site, where λ is zero."""
        whole = batches if self.counts.batches else 0
        self.counts = replace(self.counts, samples=samples, weight=weight, batches=whole)

    def join(self, counts: Sequence[Counts]) -> list[Tensor]:
        """Count what all processes have taken in; the caller adds up the sums returned."""
        biases = {name: bias for c in counts for name, bias in c.biases.items()}
        for name in biases.keys() - self._features.keys():
            self._make_moments(name, biases[name])
        self.counts = Counts(
            samples=sum(c.samples for c in counts),
            weight=sum(c.weight for c in counts),
            by_sample=sum(c.by_sample for c in counts),
            batches=sum(c.batches for c in counts),
            rows={name: sum(c.rows.get(name, 0) for c in counts) for name in biases},
            biases=biases,
        )
        moments = [t for name in biases for t in (self._features[name], self._cotangents[name])]
        return [*self._sums.values(), *moments, self._squares]

    def estimate(self, *, last: bool = False) -> Estimate:
        """What is known so far; with `last` the sums are no longer needed and become the means."""
        counts, samples, weight = self.counts, self.counts.samples, self.counts.weight
        norms = [torch.linalg.vector_norm(s, dtype=torch.float64) for s in self._sums.values()]
        spread = float(self._squares - torch.stack(norms).square().sum() / samples)
        means = {
            name: total.div_(weight) if last else total / weight
            for name, total in self._sums.items()
        }
        moments = {
            name: SecondMoments(
                self._features[name] / counts.rows[name],
                self._cotangents[name] * (samples / weight**2),
                counts.biases[name],
            )
            for name in self._features
        }
        variance, units = math.nan, samples if counts.by_sample else counts.batches
        if units > 1 and not (counts.by_sample and counts.batches):
            variance = max(spread, 0.0) / (units - 1) * samples / weight**2
        return Estimate(means, variance, moments, float(self._moved))


def squared_sizes(psi: Tensor, phi: Tensor, has_bias: bool) -> Tensor:
    """Σ_n ‖ψ_n φ_nᵀ‖² over the samples (with the bias ‖ψ_n‖² more), no product being formed.

    ψ has the shape (samples, ..., out), φ (samples, ..., in).
    """
    if psi.dim() == 2:  # ‖ψ_n‖² (‖φ_n‖² + 1)
        rows, columns = (torch.linalg.vector_norm(t, dim=1).double().square_() for t in (psi, phi))
        return torch.dot(rows, columns.add_(1.0) if has_bias else columns)
    psi, phi = psi.flatten(1, -2), phi.flatten(1, -2)
    positions, out, width = psi.shape[1], psi.shape[2], phi.shape[2]
    if positions * (out + width) <= out * width:  # Σ_st (ψ_s·ψ_t)(φ_s·φ_t + 1), which is cheaper
        squares = (psi @ psi.mT) * (phi @ phi.mT + float(has_bias))
        return squares.sum(dtype=torch.float64)
    squares = (psi.mT @ phi).square().sum(dtype=torch.float64)
    return squares + psi.sum(1).square().sum(dtype=torch.float64) if has_bias else squares


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: at least single precision, and complex where the summands are."""
    return torch.promote_types(dtype, torch.float32)
