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
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor, nn

from constrained_growth._multipliers.closed_form import by_sample, differentiated
from constrained_growth._multipliers.factors import FactorsOf
from constrained_growth._multipliers.groups import ALL, Span, add_products, add_sums
from constrained_growth._sites.collector import Use
from constrained_growth.blocks import AffineFactors, pinned_parameters
from constrained_growth.blocks.protocol import change, moves
from constrained_growth.norms import SecondMoments


@dataclass(frozen=True)
class Wanted:
    """What is summed up beside λ: second `moments`; and in how many `groups` of samples.

    About so many `batches` are to come.
    """

    moments: bool = False
    groups: int = 1
    batches: int = 1


NOTHING_MORE = Wanted()


@dataclass(frozen=True)
class Parts:
    """What each group adds to the moments of an affine map; perhaps of G only the trace."""

    features: Tensor | None
    cotangents: Tensor | None
    mean: Tensor
    shift: Tensor
    traces: Tensor
    scales: tuple[float, float, float]  # of what is of φ, of G, of λ


@dataclass(frozen=True)
class Estimate:
    """What is known of the multiplier of one candidate.

    `variance` is an unbiased tr Cov(λ); NaN from a single sample or batch, or where some batches
    came by samples and some as a whole. `moments` are there where asked for. `moved` is by how
    much the block moved x at most, in units of what rounding may do.

    Of the groups on this process: `sums` S_g of W λ by pin, `parts` of the second moments, and
    `weights` W_g/W, W being `weight`. `site` has E x² and E δ² of each unit, "whole" and what the
    "groups" add.
    """

    multiplier: dict[str, Tensor]
    variance: float
    moments: dict[str, SecondMoments]
    moved: float
    sums: dict[str, Tensor]
    parts: dict[str, Parts]
    weights: Tensor
    weight: float
    site: dict[str, Tensor]


@dataclass(frozen=True)
class MapKind:
    """What kind of affine map a pinned weight belongs to."""

    bias: str | None
    elementwise: bool
    transposed: bool
    same_units: bool  # whether φ is x, and ψ in the units of δ


@dataclass
class Counts:
    """How much was taken in."""

    samples: int = 0
    weight: float = 0.0
    by_sample: int = 0  # samples that came one by one
    batches: int = 0  # batches that came as a whole
    units: int = 0  # at the site
    rows: dict[str, int] = field(default_factory=dict)  # of each map, over samples and positions
    read: dict[str, int] = field(default_factory=dict)  # of them in the second moments
    maps: dict[str, MapKind] = field(default_factory=dict)
    mapped: bool = True  # whether all pins so far were in affine maps


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
        self._sizes = first.new_zeros((wanted.groups, 2, 0), dtype=torch.float64)  # of x and δ
        self._weights = torch.zeros(wanted.groups, dtype=torch.float64)
        self._squares = first.new_zeros((), dtype=torch.float64)
        self._moved = torch.zeros_like(self._squares)
        self._factors = FactorsOf(block, self._dtype)
        self._together = 1  # batches that come as one
        self._features: dict[str, Tensor] = {}
        self._cotangents: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}
        self._shifts: dict[str, Tensor] = {}
        self._traces: dict[str, Tensor] = {}
        self._joined: dict[str, Tensor] | None = None  # λ of all processes
        self._joined_moments: list[dict[str, Tensor]] | None = None
        self._joined_sizes: Tensor | None = None
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
        found = self._factors(uses, size) if self.counts.mapped else None
        if self._conditional and found is not None:
            self._note_moved(uses, found.outputs)
        if found is not None and found.by_sample:
            self._together = batches
            self._add_factors(found.maps, self._sums, size, weight, span, told_apart=True)
            self._add_sizes(uses, size, weight, span)
            self.counts.by_sample += size
            self._count(size, weight * batches, span)
        elif found is not None:
            total = {name: torch.zeros_like(t[:1]) for name, t in self._sums.items()}
            whole = Span(span.first, size)
            self._add_factors(found.maps, total, size, weight, whole, told_apart=False)
            self._add_whole({name: t[0] for name, t in total.items()}, uses, size, weight, span)
        else:
            self.counts.mapped = False
            self._add_differentiated(uses, size, weight, span)
        if before is not None:
            kept, self._weights = before
            mine = self.counts
            more = {name: getattr(mine, name) for name in ("rows", "read", "maps", "mapped")}
            self.counts = replace(kept, **more)

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
            found = self._factors(uses, size) if self.counts.mapped else None
            self.counts.mapped = found is not None
            for factor in found.maps if found is not None else ():
                self._add_moments(factor, size, weight, Span(span.first, size))
        self._add_whole(multiplier, uses, size, weight, span)

    def _note_moved(self, uses: Sequence[Use], outputs: Sequence[Tensor]) -> None:
        """By how much the block moves x: seen at its outputs, where it ran, or tried."""
        for use, y in itertools.zip_longest(uses, outputs):
            x = use.x.to(self._dtype)
            here = moves(self._block, x, use.context) if y is None else change(x.to(y), y)
            self._moved = torch.maximum(self._moved, here.to(self._moved))

    def _add_differentiated(
        self, uses: Sequence[Use], size: int, weight: float, span: Span
    ) -> None:
        """Take in −∇_v of one batch by autograd through the block, a few samples at a time."""
        whole = len(self._weights) == 1 or not by_sample(uses, size)
        each = size if whole else max(span.each, math.ceil(size / _MOST_PARTS))
        span = Span(span.first, each)
        cast = [replace(u, x=u.x.to(self._dtype), delta=u.delta.to(self._dtype)) for u in uses]
        every: list[list[dict[str, Tensor]]] = []
        for use in cast:
            y, parts = differentiated(self._block, use, [use.delta] if whole else _parts(use, each))
            if self._conditional:
                self._note_moved([use], [y])
            every.append(parts)
        total = [
            {name: torch.stack([one[name] for one in some]).sum(0) for name in self._sums}
            for some in zip(*every, strict=True)
        ]
        self._add_sizes(uses, size, weight, span)
        square = torch.zeros_like(self._squares)
        for (group, _), part in zip(span.shares(size), total, strict=True):
            for name, value in part.items():
                self._sums[name][group if len(self._weights) > 1 else 0].add_(value, alpha=weight)
        for name in self._sums:
            value = torch.stack([part[name] for part in total]).sum(0)
            square += torch.linalg.vector_norm(value, dtype=torch.float64).square()
        self._squares.add_(square, alpha=weight**2 / size)
        self.counts.batches += 1
        self._count(size, weight, span)

    def _add_whole(
        self,
        multiplier: Mapping[str, Tensor],
        uses: Sequence[Use],
        size: int,
        weight: float,
        span: Span,
    ) -> None:
        self._add_sizes(uses, size, weight, Span(span.first, size))
        for name, value in multiplier.items():
            square = torch.linalg.vector_norm(value, dtype=torch.float64).square()
            self._squares.add_(square, alpha=weight**2 / size)
            self._sums[name][span.first].add_(value, alpha=weight)
        span = Span(span.first, size)
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

    def _add_sizes(self, uses: Sequence[Use], size: int, weight: float, span: Span) -> None:
        """Σ x² and Σ (w_b δ)² of each unit; over all samples, where they cannot be told apart."""
        if not self._wanted.moments:
            return
        n = size if by_sample(uses, size) else 1
        for use in uses:
            for place, (t, scale) in enumerate([(use.x, 1.0), (use.delta, weight**2)]):
                t = t if t.dim() < 4 else t.movedim(1, -1)  # the channels of images
                t = t.reshape(n, -1, t.shape[-1])
                squares = torch.linalg.vector_norm(t, dim=1, dtype=torch.float64).square_()
                if self._sizes.shape[-1] == 0:
                    self._sizes = squares.new_zeros((*self._sizes.shape[:2], squares.shape[-1]))
                if self._sizes.shape[-1] != squares.shape[-1]:  # as of signals of unequal lengths
                    self._sizes, squares = (v.sum(-1, keepdim=True) for v in (self._sizes, squares))
                add_sums(self._sizes[:, place], squares, scale, span)
            self.counts.units = self._sizes.shape[-1]

    def _add_factors(
        self,
        factors: Iterable[AffineFactors],
        sums: Mapping[str, Tensor],
        size: int,
        weight: float,
        span: Span,
        *,
        told_apart: bool,
    ) -> None:
        """Add to sums of W λ, or of λ of this batch where its samples are not told apart."""
        scale = -weight if told_apart else -1.0
        offsets: dict[str, int] = {}
        for factor in factors:
            total = sums[factor.weight]
            psi, phi = factor.cotangent.to(total.dtype), factor.features.to(total.dtype)
            offset = offsets.get(factor.weight, 0)
            offsets[factor.weight] = offset + len(psi)
            shifts = None if factor.bias is None else _over_positions(psi)
            if factor.elementwise:
                products = _over_positions(psi * phi)
                add_sums(total.view(len(total), -1), products, scale, span, offset)
                squares = products.square().sum(dtype=torch.float64)
                if shifts is not None:
                    squares += shifts.square().sum(dtype=torch.float64)
            else:
                matrix = total.flatten(2)
                matrix = matrix.mT if factor.transposed else matrix
                add_products(matrix, psi, phi, scale, span, offset)
                squares = squared_sizes(psi, phi, shifts) if told_apart else self._squares
            if factor.bias is not None and shifts is not None:
                add_sums(sums[factor.bias].view(len(total), -1), shifts, scale, span, offset)
            if told_apart:
                self._squares.add_(squares, alpha=weight**2)
            if self._wanted.moments:
                self._add_moments(factor, size, weight, span, offset)

    def _add_moments(
        self, factor: AffineFactors, size: int, weight: float, span: Span, offset: int = 0
    ) -> None:
        """Σ φ̃φ̃ᵀ and Σ w² ψψᵀ over samples and positions; φ̃ = (φ, 1) where there is a bias."""
        counts, name = self.counts, factor.weight
        kind = MapKind(factor.bias, factor.elementwise, factor.transposed, factor.same_units)
        self._make_moments(name, counts.maps.setdefault(name, kind))
        features, cotangents, means = (
            t[name] for t in (self._features, self._cotangents, self._means)
        )
        samples, positions = factor.features.shape[:2]
        before = counts.rows.get(name, 0)
        counts.rows[name] = before + samples * positions
        shifts = _over_positions(factor.cotangent.to(features.dtype))
        shifts = shifts if factor.elementwise else _some(shifts, 1)
        add_sums(self._shifts[name], shifts, -weight, span, offset)
        # a moment of so many numbers needs no more rows than this, of all batches
        most = max(_ROWS, 2 * max(features.shape[-1], cotangents.shape[-1]))
        stride = size * positions * self._wanted.batches / (self._together * most)
        phi, psi = factor.features, factor.cotangent
        if stride >= 2 and positions > 1:  # an odd one does not keep to columns of an image
            step = min(int(stride), positions) | 1
            first = torch.arange(samples, device=phi.device)[:, None]
            # of each sample others, so that all positions have their turn
            places = torch.arange(0, positions, step, device=phi.device) + before // positions
            chosen = (first + places) % positions
            phi, psi = phi[first, chosen], psi[first, chosen]
        elif stride >= 2:
            each = min(span.each, size)
            step = max(d for d in range(1, int(stride) + 1) if each % d == 0 or each == size)
            phi, psi = phi[::step], psi[::step]
            span, offset = Span(span.first, math.ceil(each / step)), offset // step
        phi, psi = phi.to(features.dtype), psi.to(features.dtype)
        counts.read[name] = counts.read.get(name, 0) + math.prod(phi.shape[:2])
        if factor.elementwise:
            add_sums(features, phi.square().sum(1)[..., None, None], 1.0, span, offset)
            add_sums(cotangents, psi.square().sum(1)[..., None, None], weight**2, span, offset)
        else:
            phi, psi = _some(phi, 2), _some(psi, 2)
            add_products(features, phi, phi, 1.0, span, offset)
            add_products(cotangents, psi, psi, weight**2, span, offset)
        add_sums(means, _over_positions(phi), 1.0, span, offset)
        if len(features) == 1:
            sizes = torch.linalg.vector_norm(psi.reshape(len(psi), -1), dim=1).square()
            add_sums(self._traces[name], sizes, weight**2, span, offset)

    def _make_moments(self, name: str, kind: MapKind) -> None:
        if name in self._features:
            return
        out, inner = _sizes(self._sums[name][0], kind)
        lead = (out,) if kind.elementwise else ()
        zero, groups = self._sums[name].new_zeros(()), self._wanted.groups
        if kind.elementwise:
            shapes = (1, 1), (1, 1)
        else:
            out, inner = min(out, _MOST), min(inner, _MOST)
            shapes = (inner, inner), (out, out)
        most = sum(math.prod((*lead, *shape)) for shape in shapes)
        kept = groups if groups * most * zero.itemsize <= _ROOM else 1
        self._features[name] = zero.expand(kept, *lead, *shapes[0]).clone()
        self._cotangents[name] = zero.expand(kept, *lead, *shapes[1]).clone()
        self._means[name] = zero.expand(groups, inner).clone()
        self._shifts[name] = zero.expand(groups, out).clone()
        self._traces[name] = zero.expand(groups).clone()

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
            units=max(c.units for c in counts),
            rows=added([c.rows for c in counts]),
            read=added([c.read for c in counts]),
            maps=maps,
            mapped=all(c.mapped for c in counts),
        )
        self._joined = {name: total.sum(0) for name, total in self._sums.items()}
        units = max((c.units for c in counts), default=0)
        self._joined_sizes = self._sizes.sum(0)
        if self._joined_sizes.shape[-1] != units:  # nothing came here, or of unequal lengths
            self._joined_sizes = self._joined_sizes.sum(-1, keepdim=True).expand(2, units) / units
        self._joined_moments = [
            {name: t[name].sum(0) for name in sorted(t)} for t in self._kept_moments()
        ]
        moments = [t for some in self._joined_moments for t in some.values()]
        return [*self._joined.values(), *moments, self._joined_sizes, self._squares]

    def _kept_moments(self) -> list[dict[str, Tensor]]:
        return [self._features, self._cotangents, self._means, self._shifts]

    def estimate(self) -> Estimate:
        """What is known so far."""
        counts, samples, weight = self.counts, self.counts.samples, self.counts.weight
        sums = self._joined or {name: total.sum(0) for name, total in self._sums.items()}
        norms = [torch.linalg.vector_norm(s, dtype=torch.float64) for s in sums.values()]
        spread = float(self._squares - torch.stack(norms).square().sum() / samples)
        variance, units = math.nan, samples if counts.by_sample else counts.batches
        if units > 1 and not (counts.by_sample and counts.batches):
            variance = max(spread, 0.0) / (units - 1) * samples / weight**2
        found = Estimate(
            multiplier={name: total / weight for name, total in sums.items()},
            variance=variance,
            moments={},
            moved=float(self._moved),
            sums=self._sums,
            parts={},
            weights=self._weights / weight,
            weight=weight,
            site={},
        )
        if not self._wanted.moments:
            return found
        found.site.update(self._site())
        if not self.counts.mapped:
            moments = moments_of_groups(found, samples)
        else:
            moments, parts = self._moments()
            found = replace(found, parts=parts)
        elasticity = found.site["whole"].prod(0).sqrt().sum()
        moments = {name: replace(m, elasticity=elasticity) for name, m in moments.items()}
        return replace(found, moments=moments)

    def _site(self) -> dict[str, Tensor]:
        """E x² and E δ² of each unit, over all samples and as the sums over groups."""
        samples, weight = self.counts.samples, self.counts.weight
        scale = self._sizes.new_tensor([[1 / samples], [samples / weight**2]])
        whole = self._sizes.sum(0) if self._joined_sizes is None else self._joined_sizes
        return {"whole": whole * scale, "groups": self._sizes * scale}

    def _moments(self) -> tuple[dict[str, SecondMoments], dict[str, Parts]]:
        counts = self.counts
        moments, parts = {}, {}
        features, cotangents, means, shifts = self._joined_moments or [
            {name: t.sum(0) for name, t in some.items()} for some in self._kept_moments()
        ]
        for name, kind in counts.maps.items():
            read, weight = counts.read[name], counts.weight
            # what was not read counts as much as what was
            scale = counts.samples / weight**2 * counts.rows[name] / read
            out, inner = _sizes(self._sums[name][0], kind)
            moments[name] = SecondMoments(
                features[name] / read,
                cotangents[name] * scale,
                kind.bias,
                kind.transposed,
                kind.same_units,
                means[name] / read,
                shifts[name] / weight,
                counts.rows[name] / counts.samples,
                rows=None if kind.elementwise else _chosen(out, means[name].device),
                columns=None if kind.elementwise else _chosen(inner, means[name].device),
            )
            grouped = len(self._features[name]) > 1
            parts[name] = Parts(
                self._features[name] if grouped else None,
                self._cotangents[name] if grouped else None,
                self._means[name],
                self._shifts[name],
                self._traces[name],
                (1 / read, scale, 1 / weight),
            )
        return moments, parts


def _sizes(pin: Tensor, kind: MapKind) -> tuple[int, int]:
    """Outputs and features of the affine map of a pinned weight."""
    if kind.elementwise:
        return pin.numel(), pin.numel()
    out, inner = pin.shape[0], math.prod(pin.shape[1:])
    return (inner, out) if kind.transposed else (out, inner)


_MOST_PARTS = 8
"""Of a batch that a block is differentiated for, one by one."""

_MOST = 512
"""Features and outputs of which second moments are kept; of more a random part."""

_ROWS = 1024
"""Rows that are read for second moments, if not twice their size."""

_ROOM = 2**21
"""Bytes up to which those of each group are kept."""


def _chosen(size: int, device: torch.device) -> Tensor | None:
    """The same random part each time, in order; None for all."""
    if size <= _MOST:
        return None
    order = torch.randperm(size, generator=torch.Generator().manual_seed(size))
    return order[:_MOST].sort().values.to(device)


def _some(values: Tensor, dim: int) -> Tensor:
    chosen = _chosen(values.shape[dim], values.device)
    return values if chosen is None else values.index_select(dim, chosen)


def moments_of_groups(estimate: Estimate, samples: int) -> dict[str, SecondMoments]:
    """Second moments of a sample's gradient g, from the sums of the groups.

    E[g gᵀ] = Cov(g) + λλᵀ, where Cov(g) is N times the covariance of λ. Of several processes each
    has groups with a part of all samples.
    """
    here = estimate.weights > 0
    weights = estimate.weights[here]
    groups, local = max(1, len(weights)), float(weights.sum()) or 1.0
    found = {}
    for name, mean in estimate.multiplier.items():
        shares = weights.to(mean).view(-1, *[1] * mean.dim())
        g = estimate.sums[name][here.to(mean.device)] / estimate.weight - shares * mean
        g = g * math.sqrt(samples / local * groups / max(1, groups - 1))
        g = torch.cat([g, mean[None]])
        if mean.dim() < 2:
            square = g.square().sum(0).reshape(-1, 1, 1)
            found[name] = SecondMoments(torch.ones_like(square), square)
            continue
        matrix = _some(_some(g.flatten(2), 1), 2)
        features = (matrix.mT @ matrix).sum(0)
        trace = features.diagonal().sum()
        found[name] = SecondMoments(
            features,
            (matrix @ matrix.mT).sum(0) / torch.where(trace > 0, trace, 1.0),
            rows=_chosen(mean.shape[0], mean.device),
            columns=_chosen(math.prod(mean.shape[1:]), mean.device),
        )
    return found


def _parts(use: Use, each: int) -> Iterator[Tensor]:
    """δ of so many samples, and zero at the others."""
    for start in range(0, len(use.delta), each):
        part = torch.zeros_like(use.delta)
        part[start : start + each] = use.delta[start : start + each]
        yield part


def _zeros(groups: int, pin: Tensor) -> Tensor:
    dtype = accumulation_dtype(pin.dtype)
    return torch.zeros((groups, *pin.shape), dtype=dtype, device=pin.device)


def _over_positions(values: Tensor) -> Tensor:
    """The sum over the positions of each sample."""
    return values.squeeze(1) if values.shape[1] == 1 else values.sum(1)


def squared_sizes(psi: Tensor, phi: Tensor, shifts: Tensor | None) -> Tensor:
    """Σ_n ‖ψ_nᵀ φ_n‖² over the samples, and ‖Σ_t ψ_nt‖² with a bias.

    ψ has the shape (samples, positions, out), φ (samples, positions, in). Products are formed only
    where that is cheaper.
    """
    positions, out, width = psi.shape[1], psi.shape[2], phi.shape[2]
    has_bias = shifts is not None
    if positions == 1:  # ‖ψ_n‖² (‖φ_n‖² + 1)
        rows, columns = (
            torch.linalg.vector_norm(t.squeeze(1), dim=1).double().square_() for t in (psi, phi)
        )
        return torch.dot(rows, columns.add_(1.0) if has_bias else columns)
    if positions * (out + width) <= out * width:  # Σ_st (ψ_s·ψ_t)(φ_s·φ_t + 1)
        return ((psi @ psi.mT) * (phi @ phi.mT + float(has_bias))).sum(dtype=torch.float64)
    squares = (psi.mT @ phi).square().sum(dtype=torch.float64)
    return squares if shifts is None else squares + shifts.square().sum(dtype=torch.float64)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: at least single precision, and complex where the summands are."""
    return torch.promote_types(dtype, torch.float32)
