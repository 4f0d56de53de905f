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

import itertools
import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor, nn

from constrained_growth._multipliers.closed_form import by_sample, differentiated
from constrained_growth._multipliers.factors import FactorsOf
from constrained_growth._multipliers.groups import (
    ALL,
    PinSums,
    Span,
    accumulation_dtype,
    add_convolved,
    add_factor,
    gives_products,
    of_groups,
)
from constrained_growth._multipliers.moments import (
    Found,
    MomentCounts,
    MomentSums,
    moments_of_gradients,
)
from constrained_growth._multipliers.wide import narrowed_shape
from constrained_growth._sites.collector import Use
from constrained_growth.blocks import AffineFactors, pinned_parameters
from constrained_growth.blocks.convolved import Convolved
from constrained_growth.blocks.protocol import change, moves
from constrained_growth.norms import SecondMoments


@dataclass(frozen=True)
class Wanted:
    """What is summed up beside λ: second `moments`; and in how many `groups` of samples.

    About so many `batches` are to come. Where `narrow`, groups have the part of wide pins alone
    that moments are of; and where not `whole`, that is all.
    """

    moments: bool = False
    groups: int = 1
    batches: int = 1
    narrow: bool = False
    whole: bool = True


NOTHING_MORE = Wanted()


@dataclass(frozen=True)
class Estimate:
    """What is known of the multiplier of one candidate.

    The `multiplier` is that of the pins, of these `shapes`, or the part that `sums` have.

    `variance` is an unbiased tr Cov(λ); NaN from a single sample or batch, where some batches
    came by samples and some as a whole, or where not all of λ is there. `moments` are there where
    asked for. `moved` is by how much the block moved x at most, in units of what rounding may do.

    Of the groups on this process: `sums` S_g of W λ by pin, perhaps of a part of a wide one
    (`narrowed_pin`), and `weights` W_g/W, W being `weight` of all `samples`.
    `found` is where the moments come from, if pins are in affine maps.
    """

    multiplier: dict[str, Tensor]
    variance: float
    moments: dict[str, SecondMoments]
    moved: float
    sums: dict[str, Tensor]
    weights: Tensor
    weight: float
    samples: int
    found: Found | None
    shapes: dict[str, tuple[int, ...]]

    def kept(self) -> Estimate:
        """The same, with copies of the sums, to which more may be added."""
        sums = {name: t.clone() for name, t in self.sums.items()}
        return replace(self, sums=sums, found=self.found and self.found.kept())


@dataclass
class Counts:
    """How much was taken in."""

    samples: int = 0
    weight: float = 0.0
    by_sample: int = 0  # samples that came one by one
    batches: int = 0  # batches that came as a whole
    mapped: bool = True  # whether all pins so far were in affine maps
    again: bool = False  # whether a batch came in parts, of which squares do not add up
    moments: MomentCounts | None = None


class Accumulator:
    """The sums of one candidate. To be used without autocast, which would multiply roughly.

    `conditional`: try on every batch that the block is the identity.
    """

    def __init__(self, block: nn.Module, wanted: Wanted, *, conditional: bool) -> None:
        self._block, self._wanted, self._conditional = block, wanted, conditional
        pins = pinned_parameters(block)
        first = next(iter(pins.values())).detach()
        self._dtype = first.dtype
        # the shape, dtype and device of the sums of each pin, without their memory
        self._like = {name: _zero(p).expand(p.shape) for name, p in pins.items()}
        self._sums: dict[str, PinSums] = {}  # made when something comes
        self._weights = torch.zeros(wanted.groups, dtype=torch.float64)
        self._squares = first.new_zeros((), dtype=torch.float64)
        self._moved = torch.zeros_like(self._squares)
        self._factors = FactorsOf(block, self._dtype)
        self._moments: MomentSums | None = None
        if wanted.moments:
            self._moments = MomentSums(self._like, wanted.groups, wanted.batches)
        self._joined: dict[str, Tensor] | None = None  # λ of all processes
        self.counts = Counts(moments=self._moments and self._moments.counts)

    @property
    def nbytes(self) -> int:
        """The size of λ."""
        return sum(total.nbytes for total in self._like.values())

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
        found = self._factors(uses, size) if self.counts.mapped else None
        self.counts.mapped = found is not None
        if self._conditional and found is not None:
            self._note_moved(uses, found.outputs)
        if found is not None and found.by_sample:
            self._add_factors(found.maps, size, weight, span, batches)
            self.counts.by_sample += size
            self._count(size, weight * batches, span)
        elif found is not None:
            self._add_parts(
                [self._multiplied(found.maps, size, weight, span)], uses, size, weight, span
            )
        else:
            span, parts = self._differentiated(uses, size, span)
            self._add_parts(parts, uses, size, weight, span)
        if before is not None:
            kept, self._weights = before
            self.counts = replace(kept, mapped=self.counts.mapped, again=True)

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
        if self._moments is not None and uses and self.counts.mapped:
            found = self._factors(uses, size)
            self.counts.mapped = found is not None
            for factor in found.maps if found is not None else ():
                some = size if found is not None and found.by_sample else 1
                self._make(factor)
                self._moments.add(factor, some, weight, Span(span.first, size))
        self._add_parts([multiplier], uses, size, weight, span)

    def _note_moved(self, uses: Sequence[Use], outputs: Sequence[Tensor]) -> None:
        """By how much the block moves x: seen at its outputs, where it ran, or tried."""
        for use, y in itertools.zip_longest(uses, outputs):
            x = use.x.to(self._dtype)
            here = moves(self._block, x, use.context) if y is None else change(x.to(y), y)
            self._moved = torch.maximum(self._moved, here.to(self._moved))

    def _differentiated(
        self, uses: Sequence[Use], size: int, span: Span
    ) -> tuple[Span, list[dict[str, Tensor]]]:
        """−∇_v of one batch by autograd through the block, in parts of a few samples."""
        whole = len(self._weights) == 1 or not by_sample(uses, size)
        each = size if whole else max(span.each, math.ceil(size / _MOST_PARTS))
        every: list[list[dict[str, Tensor]]] = []
        for use in uses:
            use = replace(use, x=use.x.to(self._dtype), delta=use.delta.to(self._dtype))
            y, parts = differentiated(self._block, use, [use.delta] if whole else _parts(use, each))
            if self._conditional:
                self._note_moved([use], [y])
            every.append(parts)
        return Span(span.first, each), [
            {name: torch.stack([one[name] for one in some]).sum(0) for name in self._like}
            for some in zip(*every, strict=True)
        ]

    def _multiplied(
        self, factors: Iterable[AffineFactors], size: int, weight: float, span: Span
    ) -> dict[str, Tensor]:
        """−∇_v of one batch, whose samples are not told apart."""
        total = {name: PinSums(like, 1) for name, like in self._like.items()}
        for factor in factors:
            self._make(factor)
            add_factor(factor, total, -1.0, ALL)
            if self._moments is not None:
                self._moments.add(factor, 1, weight, Span(span.first, size))
        return {name: sums.total() for name, sums in total.items()}

    def _add_parts(
        self,
        parts: Sequence[Mapping[str, Tensor]],
        uses: Sequence[Use],
        size: int,
        weight: float,
        span: Span,
    ) -> None:
        """Take in −∇_v of one batch, the sum of some parts, each of the samples of a group."""
        span = span if len(parts) > 1 else Span(span.first, size)
        for name in self._like:
            sums = self._sums_of(name)
            for (group, _), part in zip(span.shares(size), parts, strict=True):
                sums.add(part[name], weight, group)
            whole = (
                torch.stack([part[name] for part in parts]).sum(0) if parts[1:] else parts[0][name]
            )
            square = torch.linalg.vector_norm(whole, dtype=torch.float64).square()
            self._squares.add_(square, alpha=weight**2 / size)
        self.counts.batches += 1
        self._count(size, weight, span)

    def _count(self, size: int, weight: float, span: Span) -> None:
        self.counts.samples += size
        self.counts.weight += weight
        shares = [weight]
        if len(self._weights) > 1:
            shares = [weight * share / size for _, share in span.shares(size)]
        first = span.first if len(self._weights) > 1 else 0
        self._weights[first : first + len(shares)] += torch.tensor(shares, dtype=torch.float64)

    def _add_factors(
        self,
        factors: Iterable[AffineFactors],
        size: int,
        weight: float,
        span: Span,
        together: int,
    ) -> None:
        """Take in the factors of samples that are told apart."""
        if isinstance(factors, Convolved) and gives_products(factors):
            self._make(factors)
            add_convolved(factors, self._sums, -weight, span, self._squares)
            if self._moments is not None:
                self._moments.add(factors, size, weight, span, together=together)
            return
        offsets: dict[str, int] = {}
        for factor in factors:
            offset = offsets.get(factor.weight, 0)
            offsets[factor.weight] = offset + len(factor.cotangent)
            self._make(factor)
            add_factor(factor, self._sums, -weight, span, offset, self._squares)
            if self._moments is not None:
                self._moments.add(factor, size, weight, span, offset, together)

    def _make(self, factor: AffineFactors | Convolved) -> None:
        """The sums of a map, all of it where it is elementwise."""
        narrow = self._wanted.narrow and not factor.elementwise
        if isinstance(factor, Convolved) and self._wanted.whole:
            # taking a part out of each product costs more than room for all, if that is little
            shape = self._like[factor.weight].shape
            narrow = narrow and 4 * math.prod(narrowed_shape(shape)) <= math.prod(shape)
        if factor.bias is not None:
            self._sums_of(factor.bias, narrow=narrow)
        self._sums_of(factor.weight, narrow=narrow)

    def _sums_of(self, name: str, *, narrow: bool | None = None) -> PinSums:
        if name not in self._sums:
            narrow = self._wanted.narrow if narrow is None else narrow
            like, wanted = self._like[name], self._wanted
            self._sums[name] = PinSums(like, wanted.groups, narrow=narrow, whole=wanted.whole)
        return self._sums[name]

    def _totals(self) -> dict[str, Tensor]:
        return {name: self._sums_of(name).total() for name in self._like}

    def count_all(self, samples: int, weight: float, batches: int) -> None:
        """Count the batches too that did not pass the site, where λ is zero."""
        if self._moments is not None:
            self._moments.close()
        used = self._weights > 0
        if used.any():
            self._weights[used] += (weight - self.counts.weight) / used.sum()
        whole = batches if self.counts.batches else 0
        self.counts = replace(self.counts, samples=samples, weight=weight, batches=whole)

    def join(self, counts: Sequence[Counts]) -> list[Tensor]:
        """Count what all processes have taken in; the caller adds up the sums returned."""
        self.counts = Counts(
            samples=sum(c.samples for c in counts),
            weight=sum(c.weight for c in counts),
            by_sample=sum(c.by_sample for c in counts),
            batches=sum(c.batches for c in counts),
            mapped=all(c.mapped for c in counts),
            again=any(c.again for c in counts),
        )
        maps = {n: kind for c in counts if c.moments for n, kind in c.moments.maps.items()}
        for name, kind in maps.items():  # in the same shapes, where nothing came too
            self._sums_of(name, narrow=self._wanted.narrow and not kind.elementwise)
        self._joined = self._totals()
        more = []
        if self._moments is not None:
            more = self._moments.join([c.moments for c in counts if c.moments is not None])
        return [*self._joined.values(), *more, self._squares]

    def estimate(self) -> Estimate:
        """What is known so far."""
        counts, samples, weight = self.counts, self.counts.samples, self.counts.weight
        sums = self._joined or self._totals()
        norms = [torch.linalg.vector_norm(s, dtype=torch.float64) for s in sums.values()]
        spread = float(self._squares - torch.stack(norms).square().sum() / samples)
        variance, units = math.nan, samples if counts.by_sample else counts.batches
        whole = all(self._sums_of(name).whole is not None for name in self._like)
        mixed = counts.again or (counts.by_sample and counts.batches)
        if units > 1 and whole and not mixed:
            variance = max(spread, 0.0) / (units - 1) * samples / weight**2
        found = Estimate(
            multiplier={name: total / weight for name, total in sums.items()},
            variance=variance,
            moments={},
            moved=float(self._moved),
            sums={name: self._sums_of(name).by_group for name in self._like},
            weights=self._weights / weight,
            weight=weight,
            samples=samples,
            found=None,
            shapes={name: tuple(like.shape) for name, like in self._like.items()},
        )
        if self._moments is None:
            return found
        more = self._moments.found(samples, weight)
        moments = (
            more.moments
            if counts.mapped
            else moments_of_gradients(_gradients(found, samples), found.shapes)
        )
        return replace(found, moments=moments, found=more)


_MOST_PARTS = 8
"""Of a batch that a block is differentiated for, one by one."""


def _gradients(estimate: Estimate, samples: int) -> dict[str, Tensor]:
    """Of each pin some gradients g whose sum of g gᵀ is E[g gᵀ] of a sample's, from the groups.

    E[g gᵀ] = Cov(g) + λλᵀ, where Cov(g) is N times the covariance of λ. Of several processes each
    has groups with a part of all samples.
    """
    here = estimate.weights > 0
    weights = estimate.weights[here]
    groups, local = max(1, len(weights)), float(weights.sum()) or 1.0
    scale = math.sqrt(samples / local * groups / max(1, groups - 1))
    found = {}
    for name, sums in estimate.sums.items():
        mean = of_groups(estimate.multiplier[name], sums)
        shares = weights.to(mean).view(-1, *[1] * mean.dim())
        g = sums[here.to(mean.device)] / estimate.weight - shares * mean
        found[name] = torch.cat([g * scale, mean[None]])
    return found


def _parts(use: Use, each: int) -> Iterator[Tensor]:
    """δ of so many samples, and zero at the others."""
    for start in range(0, len(use.delta), each):
        part = torch.zeros_like(use.delta)
        part[start : start + each] = use.delta[start : start + each]
        yield part


def _zero(pin: Tensor) -> Tensor:
    return torch.zeros((), dtype=accumulation_dtype(pin.dtype), device=pin.device)
