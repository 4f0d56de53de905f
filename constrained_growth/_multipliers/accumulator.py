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

import functools
import itertools
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from constrained_growth._multipliers.closed_form import differentiated, gauss_newton_product
from constrained_growth._multipliers.factors import FactorsOf
from constrained_growth._multipliers.groups import ALL, Span, add_products, add_sums
from constrained_growth._sites.collector import Use
from constrained_growth.blocks import AffineFactors, pinned_parameters
from constrained_growth.blocks.protocol import change, moves
from constrained_growth.norms import Moments, SecondMoments


@dataclass(frozen=True)
class Wanted:
    """What is summed up beside λ: `moments`, with those of `cotangents`; in how many `groups`.

    About so many `batches` are to come.
    """

    moments: bool = False
    cotangents: bool = False
    groups: int = 1
    batches: int = 1


@dataclass(frozen=True)
class Estimate:
    """What is known of the multiplier of one candidate.

    `variance` is an unbiased tr Cov(λ); NaN from a single sample or batch, or where some batches
    came by samples and some as a whole. `moments` are there where asked for. `moved` is by how
    much the block moved x at most, in units of what rounding may do.

    Of the groups on this process: `sums` S_g of W λ by pin, `sizes` of E‖x‖² and E‖δ‖², and
    `weights` W_g/W, W being `weight`.
    """

    multiplier: dict[str, Tensor]
    variance: float
    moments: Moments | None
    moved: float
    sums: dict[str, Tensor]
    sizes: Tensor
    weights: Tensor
    weight: float


@dataclass(frozen=True)
class MapKind:
    """What kind of affine map a pinned weight belongs to."""

    bias: str | None
    elementwise: bool
    transposed: bool
    gain: float


@dataclass
class Counts:
    """How much was taken in."""

    samples: int = 0
    weight: float = 0.0
    by_sample: int = 0  # samples that came one by one
    batches: int = 0  # batches that came as a whole
    rows: dict[str, int] = field(default_factory=dict)  # of each map, over samples and positions
    read: dict[str, int] = field(default_factory=dict)  # of them in the second moments
    maps: dict[str, MapKind] = field(default_factory=dict)


class Accumulator:
    """The sums of one candidate. To be used without autocast, which would multiply roughly.

    `conditional`: try on every batch that the block is the identity.
    """

    def __init__(self, block: nn.Module, wanted: Wanted, *, conditional: bool) -> None:
        self._block, self._wanted, self._conditional = block, wanted, conditional
        pins = pinned_parameters(block)
        first = next(iter(pins.values())).detach()
        self._dtype = first.dtype
        self._sums = {name: _zeros(wanted.groups, p) for name, p in pins.items()}
        self._sizes = first.new_zeros((wanted.groups, 2), dtype=torch.float64)
        self._weights = torch.zeros(wanted.groups, dtype=torch.float64)
        self._squares = first.new_zeros((), dtype=torch.float64)
        self._moved = torch.zeros_like(self._squares)
        self._factors = FactorsOf(block, self._dtype)
        self._mapped = True  # whether all pins so far were in affine maps
        self._features: dict[str, Tensor] = {}
        self._cotangents: dict[str, Tensor] = {}
        self._example: Use | None = None
        self._joined: dict[str, Tensor] | None = None  # λ of all processes
        self.counts = Counts()

    @property
    def nbytes(self) -> int:
        """The size of λ."""
        return sum(total[0].nbytes for total in self._sums.values())

    def add(
        self,
        uses: Sequence[Use],
        size: int,
        weight: float,
        *,
        batches: int = 1,
        again: bool = False,
        span: Span = ALL,
    ) -> None:
        """Take in one batch of `size` samples: what it brought to the site, at each use.

        Several `batches` of this weight may come as one, of all their samples. A batch that
        comes `again` (a second backward pass through its graph) adds and does not count twice.
        """
        before = (replace(self.counts), self._weights.clone()) if again else None
        found = self._factors(uses, size) if self._mapped else None
        if self._conditional and found is not None:
            self._note_moved(uses, found.outputs)
        if found is not None and found.by_sample:
            self._add_factors(found.maps, self._sums, size, weight, span, by_sample=True)
            self._add_sizes(uses, size, weight, span)
            self.counts.by_sample += size
            self._count(size, weight * batches, span)
        elif found is not None:
            total = {name: torch.zeros_like(t[:1]) for name, t in self._sums.items()}
            self._add_factors(found.maps, total, size, weight, ALL, by_sample=False)
            self._add_whole({name: t[0] for name, t in total.items()}, uses, size, weight, span)
        else:
            self._unmapped(uses)
            self._add_whole(self._differentiated(uses), uses, size, weight, span)
        if before is not None:
            kept, self._weights = before
            mine = self.counts
            self.counts = replace(kept, rows=mine.rows, read=mine.read, maps=mine.maps)

    def add_in_graph(
        self,
        multiplier: Mapping[str, Tensor],
        moved: Tensor | None,
        uses: Sequence[Use],
        size: int,
        weight: float,
        span: Span = ALL,
    ) -> None:
        """Take in one batch whose −∇_v L_b is known; and how far the block moved x."""
        if moved is not None:
            self._moved = torch.maximum(self._moved, moved.to(self._moved))
        if self._wanted.moments and uses:
            found = self._factors(uses, size) if self._mapped else None
            if found is None:
                self._unmapped(uses)
            else:
                for factor in found.maps:
                    self._add_moments(factor, size, weight)
        self._add_whole(multiplier, uses, size, weight, span)

    def _note_moved(self, uses: Sequence[Use], outputs: Sequence[Tensor]) -> None:
        """By how much the block moves x: seen at its outputs, where it ran, or tried."""
        for use, y in itertools.zip_longest(uses, outputs):
            x = use.x.to(self._dtype)
            here = moves(self._block, x, use.context) if y is None else change(x.to(y), y)
            self._moved = torch.maximum(self._moved, here.to(self._moved))

    def _unmapped(self, uses: Sequence[Use]) -> None:
        """Some pin is in no affine map: its second moments are known by products alone."""
        self._mapped = False
        if self._wanted.moments and self._example is None and uses:
            self._example = replace(uses[0], x=uses[0].x.to(self._dtype))

    def _differentiated(self, uses: Sequence[Use]) -> dict[str, Tensor]:
        """−∇_v of one batch by autograd through the block."""
        total: dict[str, Tensor] = {}
        for use in uses:
            use = Use(use.x.to(self._dtype), use.delta.to(self._dtype), use.context)
            y, part = differentiated(self._block, use)
            if self._conditional:
                self._note_moved([use], [y])
            total = {name: total[name] + p if total else p for name, p in part.items()}
        return total
    def _add_whole(
        self,
        multiplier: Mapping[str, Tensor],
        uses: Sequence[Use],
        size: int,
        weight: float,
        span: Span,
    ) -> None:
        for name, value in multiplier.items():
            square = torch.linalg.vector_norm(value, dtype=torch.float64).square()
            self._squares.add_(square, alpha=weight**2 / size)
            self._sums[name][span.first].add_(value, alpha=weight)
        span = Span(span.first, size)
        self._add_sizes(uses, size, weight, span)
        self.counts.batches += 1
        self._count(size, weight, span)

    def _count(self, size: int, weight: float, span: Span) -> None:
        self.counts.samples += size
        self.counts.weight += weight
        if len(self._weights) > 1:
            for group, share in span.shares(size):
                self._weights[group] += weight * share / size
        else:
            self._weights += weight

    def _add_sizes(self, uses: Sequence[Use], size: int, weight: float, span: Span) -> None:
        """Σ ‖x_n‖² and Σ ‖w_b δ_n‖² of the samples."""
        if not self._wanted.moments:
            return
        n = size if all(use.x.dim() > 1 and len(use.x) == size for use in uses) else 1
        for use in uses:
            both = [
                torch.linalg.vector_norm(t.reshape(n, -1), dim=1, dtype=torch.float64).square()
                for t in (use.x, use.delta)
            ]
            squares = torch.stack([both[0], both[1] * weight**2], 1)
            add_sums(self._sizes, squares, 1.0, span)

    def _add_factors(
        self,
        factors: Iterable[AffineFactors],
        sums: Mapping[str, Tensor],
        size: int,
        weight: float,
        span: Span,
        *,
        by_sample: bool,
    ) -> None:
        """Add to some sums, which are of λ itself and not of W λ where samples are not told apart."""
        scale = -weight if by_sample else -1.0
        offsets: dict[str, int] = {}
        for factor in factors:
            total = sums[factor.weight]
            psi, phi = factor.cotangent.to(total.dtype), factor.features.to(total.dtype)
            offset = offsets.get(factor.weight, 0)
            offsets[factor.weight] = offset + len(psi)
            if factor.elementwise:
                products = (psi * phi).sum(1)
                flat = total.flatten(1)
                add_sums(flat, products, scale, span, offset)
                if by_sample:
                    self._squares.add_(products.square().sum(dtype=torch.float64), alpha=weight**2)
            else:
                matrix = total.flatten(2)
                matrix = matrix.mT if factor.transposed else matrix
                add_products(matrix, psi, phi, scale, span, offset)
                if by_sample:
                    self._squares.add_(squared_sizes(psi, phi), alpha=weight**2)
            if factor.bias is not None:
                shifts = psi.sum(1)
                add_sums(sums[factor.bias].flatten(1), shifts, scale, span, offset)
                if by_sample:
                    self._squares.add_(shifts.square().sum(dtype=torch.float64), alpha=weight**2)
            if self._wanted.moments:
                self._add_moments(factor, size, weight)

    def _add_moments(self, factor: AffineFactors, size: int, weight: float) -> None:
        """Σ φ̃φ̃ᵀ and Σ w² ψψᵀ over samples and positions; φ̃ = (φ, 1) where there is a bias."""
        counts, name = self.counts, factor.weight
        kind = MapKind(
            factor.bias, factor.elementwise, factor.transposed, self._factors.gains.get(name, 1.0)
        )
        self._make_moments(name, counts.maps.setdefault(name, kind))
        total = self._features[name]
        positions, width = factor.features.shape[-2:]
        rows = factor.features.shape[0] * positions
        counts.rows[name] = counts.rows.get(name, 0) + rows
        # so many rows are enough for so many numbers, and are taken from all batches; an odd
        # stride does not keep to some columns of an image
        enough = max(_ROWS, 2 * total.shape[-1]) / self._wanted.batches
        stride = max(1, int(size * positions / enough)) | 1 if size * positions > enough else 1
        phi = factor.features.reshape(rows, width)[::stride].to(total.dtype)
        psi = factor.cotangent.reshape(rows, -1)[::stride]
        if factor.elementwise:
            phi = phi.unsqueeze(-1)
        if factor.bias is not None:
            phi = torch.cat([phi, torch.ones_like(phi[..., :1])], -1)
        counts.read[name] = counts.read.get(name, 0) + len(phi)
        if factor.elementwise:
            total.add_(torch.einsum("rci,rcj->cij", phi, phi))
        else:
            total.addmm_(phi.T, phi)
        if self._wanted.cotangents:
            other = self._cotangents[name]
            psi = psi.to(other.dtype)
            if factor.elementwise:
                other.add_(psi.square().sum(0)[:, None, None], alpha=weight**2)
            else:
                other.addmm_(psi.T, psi, alpha=weight**2)

    def _make_moments(self, name: str, kind: MapKind) -> None:
        if name in self._features:
            return
        shape = self._sums[name].shape[1:]
        matrix = self._sums[name].new_zeros(())
        if kind.elementwise:
            out, inner, lead = 1, 1, (math.prod(shape),)
        else:
            out, inner, lead = shape[0], math.prod(shape[1:]), ()
            out, inner = (inner, out) if kind.transposed else (out, inner)
        inner += kind.bias is not None
        self._features[name] = matrix.new_zeros((*lead, inner, inner))
        if self._wanted.cotangents:
            self._cotangents[name] = matrix.new_zeros((*lead, out, out))

    def count_all(self, samples: int, weight: float, batches: int) -> None:
        """Count the batches too that did not pass the site, where λ is zero."""
        used = self._weights > 0
        if used.any():
            self._weights[used] += (weight - self.counts.weight) / used.sum()
        whole = batches if self.counts.batches else 0
        self.counts = replace(self.counts, samples=samples, weight=weight, batches=whole)

    def join(self, counts: Sequence[Counts]) -> list[Tensor]:
        """Count what all processes have taken in; the caller adds up the sums returned."""

        def added(values: Sequence[Mapping[str, int]]) -> dict[str, int]:
            return {key: sum(v.get(key, 0) for v in values) for v in values for key in v}

        maps = {name: kind for c in reversed(counts) for name, kind in c.maps.items()}
        for name, kind in maps.items():
            self._make_moments(name, kind)
        self.counts = Counts(
            samples=sum(c.samples for c in counts),
            weight=sum(c.weight for c in counts),
            by_sample=sum(c.by_sample for c in counts),
            batches=sum(c.batches for c in counts),
            rows=added([c.rows for c in counts]),
            read=added([c.read for c in counts]),
            maps=maps,
        )
        self._joined = {name: total.sum(0) for name, total in self._sums.items()}
        self._joined_sizes = self._sizes.sum(0)
        moments = [t[key] for t in (self._features, self._cotangents) for key in sorted(t)]
        return [*self._joined.values(), self._joined_sizes, *moments, self._squares]

    def estimate(self) -> Estimate:
        """What is known so far."""
        counts, samples, weight = self.counts, self.counts.samples, self.counts.weight
        sums = self._joined or {name: total.sum(0) for name, total in self._sums.items()}
        norms = [torch.linalg.vector_norm(s, dtype=torch.float64) for s in sums.values()]
        spread = float(self._squares - torch.stack(norms).square().sum() / samples)
        variance, units = math.nan, samples if counts.by_sample else counts.batches
        if units > 1 and not (counts.by_sample and counts.batches):
            variance = max(spread, 0.0) / (units - 1) * samples / weight**2
        # Σ ‖x_n‖²/N and Σ ‖w δ_n‖² N/W²
        scale = torch.tensor([1 / samples, samples / weight**2], dtype=torch.float64)
        scale = scale.to(self._sizes.device)
        sizes = self._sizes.sum(0) if self._joined is None else self._joined_sizes
        return Estimate(
            multiplier={name: total / weight for name, total in sums.items()},
            variance=variance,
            moments=self._moments(sizes * scale) if self._wanted.moments else None,
            moved=float(self._moved),
            sums=self._sums,
            sizes=self._sizes * scale,
            weights=self._weights / weight,
            weight=weight,
        )

    def _moments(self, sizes: Tensor) -> Moments:
        counts = self.counts
        scale = counts.samples / counts.weight**2
        maps = {
            name: SecondMoments(
                self._features[name] / counts.read[name],
                # what was not read counts as much as what was
                self._cotangents[name] * (scale * counts.rows[name] / counts.read[name])
                if self._wanted.cotangents
                else None,
                bias=kind.bias,
                gain=kind.gain,
                positions=counts.rows[name] / counts.samples,
                transposed=kind.transposed,
            )
            for name, kind in counts.maps.items()
        }
        product = None
        if self._example is not None:
            maps = {}
            product = functools.partial(gauss_newton_product, self._block, self._example)
        return Moments(maps, sizes[0], sizes[1], product)


_ROWS = 1024


def _zeros(groups: int, pin: Tensor) -> Tensor:
    dtype = accumulation_dtype(pin.dtype)
    return torch.zeros((groups, *pin.shape), dtype=dtype, device=pin.device)


def squared_sizes(psi: Tensor, phi: Tensor) -> Tensor:
    """Σ_n ‖ψ_nᵀ φ_n‖² over the samples, no product being formed where that is dearer.

    ψ has the shape (samples, positions, out), φ (samples, positions, in).
    """
    positions, out, width = psi.shape[1], psi.shape[2], phi.shape[2]
    if positions == 1:  # ‖ψ_n‖² ‖φ_n‖²
        rows, columns = (
            torch.linalg.vector_norm(t.squeeze(1), dim=1).double().square_() for t in (psi, phi)
        )
        return torch.dot(rows, columns)
    if positions * (out + width) <= out * width:  # Σ_st (ψ_s·ψ_t)(φ_s·φ_t), which is cheaper
        return ((psi @ psi.mT) * (phi @ phi.mT)).sum(dtype=torch.float64)
    return (psi.mT @ phi).square().sum(dtype=torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: at least single precision, and complex where the summands are."""
    return torch.promote_types(dtype, torch.float32)
