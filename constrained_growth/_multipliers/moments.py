"""Second moments of what goes with λ, summed over batches and in groups of samples.

For each pinned affine map Wφ + b of a candidate A = E[φφᵀ], G = E[ψψᵀ] and the mean of φ. Not
all rows of long data are read, nor all features of wide layers: they are metrics, of which a part
of the samples tells enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from constrained_growth._multipliers.groups import Span, add_products, add_sums, over_positions
from constrained_growth._multipliers.wide import MOST, indices, narrowed
from constrained_growth.blocks import AffineFactors
from constrained_growth.blocks.convolved import Convolved
from constrained_growth.norms import SecondMoments

_ROWS = 1024
"""Rows that are read for A and G, of all batches: several times their size."""

_TOGETHER = 256
"""Rows that are summed up at once."""

_ROOM = 2**21
"""Bytes up to which A and G of each group are kept."""


@dataclass(frozen=True)
class MapKind:
    """What kind of affine map a pinned weight belongs to; see `AffineFactors`."""

    bias: str | None
    elementwise: bool
    transposed: bool
    same_units: bool

    def sizes(self, shape: torch.Size) -> tuple[int, int]:
        """Outputs and features, of a weight of this shape."""
        if self.elementwise:
            return shape.numel(), shape.numel()
        out, inner = shape[0], math.prod(shape[1:])
        return (inner, out) if self.transposed else (out, inner)


@dataclass
class MomentCounts:
    """How much was taken in."""

    maps: dict[str, MapKind] = field(default_factory=dict)
    samples: dict[str, int] = field(default_factory=dict)  # of each map
    read_samples: dict[str, int] = field(default_factory=dict)  # of which some rows are read
    read: dict[str, int] = field(default_factory=dict)  # rows of φ, over samples and positions


@dataclass(frozen=True)
class Parts:
    """What each group adds to the moments of an affine map; perhaps of G only the trace."""

    features: Tensor | None
    cotangents: Tensor | None
    mean: Tensor
    traces: Tensor
    scales: tuple[float, float]  # of what is of φ, of G

    def kept(self) -> Parts:
        """The same, with copies of the sums."""
        own = {
            name: value.clone() for name, value in vars(self).items() if isinstance(value, Tensor)
        }
        return replace(self, **own)


@dataclass(frozen=True)
class Found:
    """The moments of all maps, and what the groups add."""

    moments: dict[str, SecondMoments]
    parts: dict[str, Parts]

    def kept(self) -> Found:
        """The same, with copies of the sums, to which more may be added."""
        return replace(self, parts={name: part.kept() for name, part in self.parts.items()})


@dataclass
class _Rows:
    """Rows (samples, positions, channels) of φ and ψ that belong one after the other."""

    phi: list[Tensor]
    psi: list[Tensor]
    weight: float
    span: Span
    offset: int

    def __len__(self) -> int:
        return sum(math.prod(t.shape[:2]) for t in self.phi)

    def joins(self, other: _Rows) -> bool:
        """Whether the other rows are the next ones."""
        samples = sum(map(len, self.phi))
        ends = self.span.first * self.span.each + self.offset + samples
        return (
            (self.weight, self.span.each) == (other.weight, other.span.each)
            and ends == other.span.first * other.span.each + other.offset
            and self.phi[0].shape[1:] == other.phi[0].shape[1:]
        )


class MomentSums:
    """The sums of one candidate.

    `like` has tensors of the shapes, dtypes and devices of the pins; about so many `batches` will
    come.
    """

    def __init__(self, like: Mapping[str, Tensor], groups: int, batches: int) -> None:
        self._like, self._groups, self._batches = like, groups, batches
        self._features: dict[str, Tensor] = {}
        self._cotangents: dict[str, Tensor] = {}
        self._means: dict[str, Tensor] = {}
        self._traces: dict[str, Tensor] = {}
        self._waiting: dict[str, _Rows] = {}
        self._joined: list[dict[str, Tensor]] | None = None  # of all processes
        self.counts = MomentCounts()

    def add(
        self,
        factor: AffineFactors | Convolved,
        size: int,
        weight: float,
        span: Span,
        offset: int = 0,
        together: int = 1,
    ) -> None:
        """Take in some of `size` samples, after `offset` others; they are so many batches."""
        counts, name = self.counts, factor.weight
        shape = factor.shape if isinstance(factor, Convolved) else factor.features.shape
        samples, positions = shape[:2]
        step = size * positions / together * self._batches / _ROWS
        if isinstance(factor, Convolved) and step < 2:
            for part in factor:
                self.add(part, size, weight, span, offset, together)
                offset += len(part.cotangent)
            return
        kind = MapKind(factor.bias, factor.elementwise, factor.transposed, factor.same_units)
        self._make(name, counts.maps.setdefault(name, kind))
        dtype, before = self._features[name].dtype, counts.samples.get(name, 0)
        counts.samples[name] = before + samples
        # squares of ψ in half precision would overflow, or vanish
        psi = factor.cotangent.to(dtype)
        chosen = _evenly(samples, before, positions, step, psi.device)
        if isinstance(factor, Convolved):
            phi = factor.rows(chosen, indices(shape[3], psi.device))
            psi = _by_size(psi.flatten(2).mT, before, chosen.shape[1])
        elif positions > 1 and step >= 2:
            phi = _rows_at(factor.features, chosen)
            psi = _by_size(psi, before, chosen.shape[1])
        else:
            phi, psi, span, offset = _thinned(factor, step, size, span, offset)
        if not kind.elementwise:  # of which all channels are kept
            phi, psi = narrowed(phi, 2), narrowed(psi, 2)
        counts.read[name] = counts.read.get(name, 0) + math.prod(phi.shape[:2])
        counts.read_samples[name] = counts.read_samples.get(name, 0) + len(psi)
        self._wait(name, _Rows([phi.to(dtype)], [psi.to(dtype)], weight, span, offset))

    def _wait(self, name: str, rows: _Rows) -> None:
        """Sum up later, as products of few rows are slow; they are kept without their batch."""
        waiting = self._waiting.get(name)
        if waiting is not None and not waiting.joins(rows):
            self._take_in(name)
            waiting = None
        if len(rows) < _TOGETHER:
            rows.phi, rows.psi = ([t.clone() for t in some] for some in (rows.phi, rows.psi))
        if waiting is None:
            self._waiting[name] = waiting = rows
        else:
            waiting.phi += rows.phi
            waiting.psi += rows.psi
        if len(waiting) >= _TOGETHER:
            self._take_in(name)

    def _take_in(self, name: str) -> None:
        rows = self._waiting.pop(name)
        phi, psi = (t[0] if len(t) == 1 else torch.cat(t) for t in (rows.phi, rows.psi))
        weight, span, offset = rows.weight, rows.span, rows.offset
        features, cotangents = self._features[name], self._cotangents[name]
        if self.counts.maps[name].elementwise:
            add_sums(features, phi.square().sum(1)[..., None, None], 1.0, span, offset)
            add_sums(cotangents, psi.square().sum(1)[..., None, None], weight**2, span, offset)
        else:
            add_products(features, phi, phi, 1.0, span, offset)
            add_products(cotangents, psi, psi, weight**2, span, offset)
        add_sums(self._means[name], over_positions(phi), 1.0, span, offset)
        if len(features) == 1:
            sizes = torch.linalg.vector_norm(psi, dim=(1, 2)).square()
            add_sums(self._traces[name], sizes, weight**2, span, offset)

    def close(self) -> None:
        """Sum up what waits."""
        with torch.inference_mode(False), torch.no_grad():  # to which more is added later
            for name in [*self._waiting]:
                self._take_in(name)

    def _make(self, name: str, kind: MapKind) -> None:
        if name in self._features:
            return
        pin, groups = self._like[name], self._groups
        out, inner = kind.sizes(pin.shape)
        if kind.elementwise:
            shapes = (out, 1, 1), (out, 1, 1)
        else:
            out, inner = min(out, MOST), min(inner, MOST)
            shapes = (inner, inner), (out, out)
        room = groups * sum(map(math.prod, shapes)) * pin.itemsize
        kept = groups if room <= _ROOM else 1
        self._features[name] = pin.new_zeros((kept, *shapes[0]))
        self._cotangents[name] = pin.new_zeros((kept, *shapes[1]))
        self._means[name] = pin.new_zeros((groups, inner))
        self._traces[name] = pin.new_zeros(groups)

    def _totals(self) -> list[dict[str, Tensor]]:
        every = self._features, self._cotangents, self._means
        return [{name: some[name].sum(0) for name in sorted(some)} for some in every]

    def join(self, counts: Sequence[MomentCounts]) -> list[Tensor]:
        """Count what all processes have taken in; the caller adds up the sums returned.

        All processes have called `close` before.
        """

        def added(values: Sequence[Mapping[str, int]]) -> dict[str, int]:
            return {key: sum(v.get(key, 0) for v in values) for v in values for key in v}

        maps = {name: kind for c in reversed(counts) for name, kind in c.maps.items()}
        for name, kind in maps.items():
            self._make(name, kind)
        every = ([getattr(c, key) for c in counts] for key in ("samples", "read_samples", "read"))
        self.counts = MomentCounts(maps, *map(added, every))
        self._joined = self._totals()
        return [t for some in self._joined for t in some.values()]

    def found(self, samples: int, weight: float) -> Found:
        """The means over so many samples, of this weight together."""
        self.close()
        moments, parts = {}, {}
        features, cotangents, means = self._joined or self._totals()
        for name, kind in self.counts.maps.items():
            read, counts = self.counts.read[name], self.counts
            # what was not read counts too
            scale = samples / weight**2 * counts.samples[name] / counts.read_samples[name]
            sizes = kind.sizes(self._like[name].shape)
            chosen = [None if kind.elementwise else indices(n, means[name].device) for n in sizes]
            moments[name] = SecondMoments(
                features[name] / read,
                cotangents[name] * scale,
                kind.bias,
                kind.transposed,
                kind.same_units,
                means[name] / read,
                rows=chosen[0],
                columns=chosen[1],
            )
            grouped = len(self._features[name]) > 1
            parts[name] = Parts(
                self._features[name] if grouped else None,
                self._cotangents[name] if grouped else None,
                self._means[name],
                self._traces[name],
                (1 / read, scale),
            )
        return Found(moments, parts)


def moments_of_gradients(
    gradients: Mapping[str, Tensor], shapes: Mapping[str, Sequence[int]]
) -> dict[str, SecondMoments]:
    """Those of pins in no affine map: Σ g gᵀ and Σ gᵀg over gradients g (number, ...) of each.

    Of pins of these `shapes`; of wide ones some entries of g are enough.
    """
    found = {}
    for name, g in gradients.items():
        if g.dim() < 3:
            square = g.square().sum(0).reshape(-1, 1, 1)
            found[name] = SecondMoments(torch.ones_like(square), square)
            continue
        out, inner = shapes[name][0], math.prod(shapes[name][1:])
        matrix = narrowed(narrowed(g.flatten(2), 1), 2)
        features = (matrix.mT @ matrix).sum(0)
        trace = features.diagonal().sum()
        found[name] = SecondMoments(
            features,
            (matrix @ matrix.mT).sum(0) / torch.where(trace > 0, trace, 1.0),
            rows=indices(out, g.device),
            columns=indices(inner, g.device),
        )
    return found


def _thinned(
    factor: AffineFactors, step: float, size: int, span: Span, offset: int
) -> tuple[Tensor, Tensor, Span, int]:
    """About every `step`-th sample of φ and ψ, and the groups that they belong to."""
    if step < 2:
        return factor.features, factor.cotangent, span, offset
    each = min(span.each, size)
    every = max(d for d in range(1, int(step) + 1) if each % d == 0 or each == size)
    span = Span(span.first, math.ceil(each / every))
    return factor.features[::every], factor.cotangent[::every], span, offset // every


_GOLDEN = (math.sqrt(5) - 1) / 2
"""Its multiples, less whole numbers, are spread evenly over [0, 1), however many there are."""


def _spread(samples: int, before: int, device: torch.device) -> Tensor:
    """A number in [0, 1) for each of some samples, after others."""
    number = torch.arange(before, before + samples, dtype=torch.float64, device=device)
    return (number * _GOLDEN % 1.0)[:, None]


def _evenly(samples: int, before: int, positions: int, step: float, device: torch.device) -> Tensor:
    """About every `step`-th position of each sample, all equally often; shape (samples, some)."""
    odd = min(int(step) | 1, (positions - 1) | 1)  # an odd step keeps to no column of an image
    along = odd * torch.arange(max(1, positions // odd), device=device)
    return ((_spread(samples, before, device) * positions).long() + along) % positions


def _by_size(psi: Tensor, before: int, count: int) -> Tensor:
    """So many rows of each sample's ψ, of shape (samples, positions, channels): Σ ψψᵀ in the mean.

    A row is drawn in proportion to ‖ψ‖², and divided by the root of how often: where the loss
    reaches few positions, as of a last token, others say nothing. tr Σ ψψᵀ is exact.
    """
    sizes = psi.square().sum(2).double()  # ten times as fast as norms
    ends = sizes.cumsum(1)
    total, along = ends[:, -1:], torch.arange(count, dtype=torch.float64, device=psi.device)
    at = (_spread(len(psi), before, psi.device) + along) / count * total
    drawn = torch.searchsorted(ends, at, right=True).clamp_(max=psi.shape[1] - 1)
    rows = _rows_at(psi, drawn)
    own = sizes.gather(1, drawn)
    return rows * torch.where(own > 0, total / (count * own), 0.0).sqrt().to(rows)[..., None]


def _rows_at(t: Tensor, chosen: Tensor) -> Tensor:
    """The rows of t (samples, positions, channels) at the positions chosen of each sample."""
    return t[torch.arange(len(t), device=t.device)[:, None], chosen]
