"""Second moments of what goes with λ, summed over batches and in groups of samples.

For each pinned affine map Wφ + b of a candidate A = E[φφᵀ], G = E[ψψᵀ] and the mean of φ. Not
all rows of long data are read, nor all features of wide layers: they are metrics, of which a part
of the samples tells enough.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

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
    rows: dict[str, int] = field(default_factory=dict)  # of each map, over samples and positions
    read: dict[str, int] = field(default_factory=dict)  # of them for A and G


@dataclass(frozen=True)
class Parts:
    """What each group adds to the moments of an affine map; perhaps of G only the trace."""

    features: Tensor | None
    cotangents: Tensor | None
    mean: Tensor
    traces: Tensor
    scales: tuple[float, float]  # of what is of φ, of G


@dataclass(frozen=True)
class Found:
    """The moments of all maps, and what the groups add."""

    moments: dict[str, SecondMoments]
    parts: dict[str, Parts]


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
        convolved = isinstance(factor, Convolved)
        samples, positions = factor.shape[:2] if convolved else factor.features.shape[:2]
        step = size * positions / together * self._batches / _ROWS
        if convolved and step < 2:
            for part in factor:
                self.add(part, size, weight, span, offset, together)
                offset += len(part.cotangent)
            return
        kind = MapKind(factor.bias, factor.elementwise, factor.transposed, factor.same_units)
        self._make(name, counts.maps.setdefault(name, kind))
        dtype = self._features[name].dtype
        before = counts.rows.get(name, 0)
        counts.rows[name] = before + samples * positions
        if convolved:
            phi, psi = _some_patches(factor, before, step)
        else:
            every, wide = (factor.features, factor.cotangent), not kind.elementwise
            (phi, psi), span, offset = _thinned(every, before, step, size, span, offset, wide)
        counts.read[name] = counts.read.get(name, 0) + math.prod(phi.shape[:2])
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
        rows, read = added([c.rows for c in counts]), added([c.read for c in counts])
        self.counts = MomentCounts(maps, rows, read)
        self._joined = self._totals()
        return [t for some in self._joined for t in some.values()]

    def found(self, samples: int, weight: float) -> Found:
        """The means over so many samples, of this weight together."""
        self.close()
        moments, parts = {}, {}
        features, cotangents, means = self._joined or self._totals()
        for name, kind in self.counts.maps.items():
            read, rows = self.counts.read[name], self.counts.rows[name]
            scale = samples / weight**2 * rows / read  # what was not read counts too
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
    tensors: Sequence[Tensor],
    before: int,
    step: float,
    size: int,
    span: Span,
    offset: int,
    wide: bool,
) -> tuple[Sequence[Tensor], Span, int]:
    """About every `step`-th row of tensors (samples, positions, channels), and where they belong.

    They are some of `size` samples, after `offset` others; `before` them came so many rows. If
    there may be too many channels (`wide`), it is some of those.
    """
    positions = tensors[0].shape[1]
    if step < 2:
        return [narrowed(t, 2) if wide else t for t in tensors], span, offset
    if positions > 1:
        odd = _odd(step, positions)
        return [_some_positions(t, before // positions, odd, wide) for t in tensors], span, offset
    each = min(span.each, size)
    every = max(d for d in range(1, int(step) + 1) if each % d == 0 or each == size)
    some = [narrowed(t[::every], 2) if wide else t[::every] for t in tensors]
    return some, Span(span.first, math.ceil(each / every)), offset // every


def _odd(step: float, positions: int) -> int:
    """An odd step does not keep to columns of an image."""
    return min(int(step) | 1, (positions - 1) | 1)


def _some_patches(factor: Convolved, before: int, step: float) -> tuple[Tensor, Tensor]:
    """φ and ψ of a convolution at the positions of `_some_positions`, no other patches made."""
    samples, positions, _, width = factor.shape
    step, psi = _odd(step, positions), factor.cotangent.flatten(2).mT
    count = positions // step
    number = torch.arange(before // positions, before // positions + samples, device=psi.device)
    first = number % step + number // step % (positions - count * step + 1)
    chosen = first[:, None] + step * torch.arange(count, device=psi.device)
    phi = factor.rows(chosen, indices(width, psi.device))
    return phi, _some_positions(psi, before // positions, step, wide=True)


def _some_positions(t: Tensor, before: int, step: int, wide: bool) -> Tensor:
    """Every `step`-th position of each sample: of each others, so that all have their turn.

    From one sample to the next the first one moves on by one. Of channels that are `wide` only some
    are read. Many samples are one view of `t`, copied with the positions at the end as in an image:
    an index for each row costs eight times as much.
    """
    chosen = indices(t.shape[2], t.device) if wide else None
    samples, positions, channels = t.shape
    count = positions // step
    over = positions - count * step + 1  # first positions, beside the `step` ones, that leave room
    of_sample, of_position, of_channel = t.stride()
    strides = (of_sample + of_position, of_channel, step * of_position)
    found = []
    done = 0
    while done < samples:
        turn, first = divmod(before + done, step)
        many = min(step - first, samples - done)
        begin = t.storage_offset() + done * of_sample + (first + turn % over) * of_position
        rows = t.as_strided((many, channels, count), strides, begin)
        found.append(rows if chosen is None else rows[:, chosen])
        done += many
    return torch.cat(found).mT
