"""Groups of samples: λ is the mean of theirs, which says how sure it is.

λ is a mean over the samples n, W λ = Σ_n u_n. The samples are gathered in G groups of about one
size, with sums S_g = Σ_{n ∈ g} u_n and weights W_g, the same groups at all sites. A bootstrap over
them serves every number that is made of λ.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from operator import length_hint
from typing import Any

import torch
from torch import Tensor

from constrained_growth._multipliers.wide import narrowed, narrowed_pin, narrowed_shape
from constrained_growth.blocks import AffineFactors
from constrained_growth.blocks.convolved import Convolved

MOST = 128
"""Groups: a standard error from G of them is itself known to about 1/√(2 G), here 6 %."""

FEWEST, FEWEST_OF_PARTS = 4, 8
"""At least so many where they have all of λ, which is dear, or the part that a norm reads."""

_UNKNOWN = 16
"""Batches that are expected where it is not known; after more the groups have further turns."""

ROOM = 2**24
"""Bytes that the sums of all groups may take, if there are more groups than the fewest."""

_SMALL, _EACH, _ENOUGH = 2**14, 64, 32
"""Where λ has more bytes, a group has so many samples, as reading and writing its sum costs time;
unless that would be fewer groups than these."""


@dataclass(frozen=True)
class Span:
    """Samples go in order into the groups from `first` on, `each` into one."""

    first: int
    each: int

    def shares(self, samples: int) -> list[tuple[int, int]]:
        """Groups, and how many of so many samples go into each."""
        starts = range(0, samples, self.each)
        return [(self.first + i, min(self.each, samples - s)) for i, s in enumerate(starts)]


ALL = Span(0, 2**62)
"""All samples into the first group."""


class Groups:
    """Hands out the groups of a pass over data, batch by batch."""

    def __init__(
        self, data: Iterable[Any] | None, batch: int, pins: Sequence[int], fewest: int
    ) -> None:
        """For data (None: of unknown length) in batches of a size, and bytes of each λ."""
        batches = length_hint(() if data is None else data) or None
        count = min(MOST, max(fewest, ROOM // max(1, sum(pins))))
        if batches is not None and max(pins) > _SMALL:
            count = min(count, max(_ENOUGH, batches * batch // _EACH))
        self.count, self._batches = count, batches or _UNKNOWN
        self.known_batches = batches or 1
        self._next = 0

    def span(self, samples: int, batches: int = 1) -> Span:
        """The groups of so many batches that come as one."""
        share = math.ceil(self.count * batches / self._batches)
        each = math.ceil(samples / max(1, min(share, self.count, samples)))
        needed = math.ceil(samples / each)
        return Span(self._next if self._next + needed <= self.count else 0, each)

    def advance(self, span: Span, samples: int) -> None:
        """These groups have had their turn."""
        self._next = (span.first + math.ceil(samples / span.each)) % self.count


class PinSums:
    """Σ u_n of one pin: by group, and in all.

    Where the groups have a part of it alone (`narrow`), all of it is summed up beside them, or
    is not (`whole`).
    """

    def __init__(
        self, like: Tensor, groups: int, *, narrow: bool = False, whole: bool = True
    ) -> None:
        """Zeros, for a pin of this shape, dtype and device."""
        shape = narrowed_shape(like.shape) if narrow else tuple(like.shape)
        self.by_group = like.new_zeros((groups, *shape))
        self.is_narrow = shape != tuple(like.shape)
        self.whole: Tensor | None = self.by_group
        if self.is_narrow:
            self.whole = like.new_zeros((1, *like.shape)) if whole else None

    def add(self, values: Tensor, factor: float, group: int) -> None:
        """Take in factor times a tensor of the pin's shape."""
        if self.is_narrow:
            if self.whole is not None:
                self.whole[0].add_(values, alpha=factor)
            values = narrowed_pin(values, values.shape)
        self.by_group[group if len(self.by_group) > 1 else 0].add_(values, alpha=factor)

    def total(self) -> Tensor:
        """Of all groups: all of the pin, if it was summed up."""
        return (self.by_group if self.whole is None else self.whole).sum(0)


def of_groups(values: Tensor, sums: Tensor) -> Tensor:
    """Of a tensor of a pin's shape what sums (groups, ...) have; perhaps a part of it."""
    return values if values.shape == sums.shape[1:] else narrowed_pin(values, values.shape)


def accumulation_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype to sum in: at least single precision, and complex where the summands are."""
    return torch.promote_types(dtype, torch.float32)


def add_products(
    total: Tensor, left: Tensor, right: Tensor, factor: float, span: Span, offset: int = 0
) -> None:
    """total[g] += factor Σ_n left_nᵀ right_n over the samples n of each group g.

    `total` has the shape (groups, out, in), the others (samples, positions, out or in); before
    them came `offset` samples.
    """
    span = span if len(total) > 1 else ALL
    for group, start, stop, many in _runs(len(left), span, offset):
        a, b = left[start:stop], right[start:stop]
        if many > 1:
            a, b = (t.reshape(many, -1, t.shape[-1]) for t in (a, b))
            total[group : group + many].baddbmm_(a.mT, b, alpha=factor)
        else:
            total[group].addmm_(a.flatten(0, 1).T, b.flatten(0, 1), alpha=factor)


def add_sums(total: Tensor, values: Tensor, factor: float, span: Span, offset: int = 0) -> None:
    """total[g] += factor Σ_n values_n; `total` of shape (groups, ...), values (samples, ...)."""
    span = span if len(total) > 1 else ALL
    for group, start, stop, many in _runs(len(values), span, offset):
        if many > 1:
            some = values[start:stop].reshape(many, -1, *values.shape[1:]).sum(1)
            total[group : group + many].add_(some, alpha=factor)
        else:
            total[group].add_(values[start:stop].sum(0), alpha=factor)


def add_factor(
    factor: AffineFactors,
    sums: Mapping[str, PinSums],
    scale: float,
    span: Span,
    offset: int = 0,
    squares: Tensor | None = None,
) -> None:
    """Add `scale` times what a map brings to sums by group, and Σ_n ‖that of sample n‖²."""
    # the squares are those of all of λ, and nothing where it is not summed up
    mine = sums[factor.weight]
    total, dtype = mine.whole, mine.by_group.dtype
    psi, phi = factor.cotangent.to(dtype), factor.features.to(dtype)
    shifts = None if factor.bias is None else over_positions(psi)
    if factor.bias is not None and shifts is not None:
        bias = sums[factor.bias].by_group
        add_sums(bias.view(len(bias), -1), shifts, scale, span, offset)
    found: Tensor | float = 0.0
    if factor.elementwise:
        products = over_positions(psi * phi)
        add_sums(mine.by_group.view(len(mine.by_group), -1), products, scale, span, offset)
        found = _squares(products) + (0.0 if shifts is None else _squares(shifts))
    elif squares is not None and _forms_products(psi.shape[1], psi.shape[2], phi.shape[2]):
        products = psi.mT @ phi  # they serve all sums
        if total is not None:
            add_sums(as_matrices(total, factor), products, scale, span, offset)
        if mine.is_narrow:
            part = narrowed_pin(products, products.shape[1:])
            add_sums(as_matrices(mine.by_group, factor), part, scale, span, offset)
        found = _squares(products) + (0.0 if shifts is None else _squares(shifts))
    else:
        if total is not None:
            add_products(as_matrices(total, factor), psi, phi, scale, span, offset)
            found = _squared_sizes(psi, phi, shifts) if squares is not None else 0.0
        if mine.is_narrow:
            part = narrowed(psi, 2), narrowed(phi, 2)
            add_products(as_matrices(mine.by_group, factor), *part, scale, span, offset)
    if squares is not None:
        squares.add_(found, alpha=scale**2)


def as_matrices(sums: Tensor, factor: AffineFactors) -> Tensor:
    """Sums (groups, *shape of a pin) as (groups, out, in)."""
    return sums.flatten(2).mT if factor.transposed else sums.flatten(2)


def gives_products(factors: Convolved) -> bool:
    """Whether `add_convolved` is cheaper than `add_factor` with patches."""
    _, positions, out, width = factors.shape
    return factors.is_grouped and _forms_products(positions, out, width)


def add_convolved(
    factors: Convolved, sums: Mapping[str, PinSums], scale: float, span: Span, squares: Tensor
) -> None:
    """Add `scale` times what a convolution brings to sums by group, and Σ_n ‖that of sample n‖²."""
    found, done, mine = torch.zeros_like(squares), 0, sums[factors.weight]
    for products in factors.products():
        if mine.whole is not None:
            add_sums(mine.whole.flatten(2), products, scale, span, done)
        if mine.is_narrow:
            add_sums(mine.by_group, narrowed_pin(products, products.shape[1:]), scale, span, done)
        found += _squares(products)
        done += len(products)
    if factors.bias is not None:
        shifts = factors.cotangent.sum((2, 3))
        add_sums(sums[factors.bias].by_group, shifts, scale, span)
        found += _squares(shifts)
    squares.add_(found, alpha=scale**2)


def _squared_sizes(psi: Tensor, phi: Tensor, shifts: Tensor | None) -> Tensor:
    """Σ_n ‖ψ_nᵀ φ_n‖² over the samples, and ‖Σ_t ψ_nt‖² with a bias.

    ψ has the shape (samples, positions, out), φ (samples, positions, in). No product is formed.
    """
    has_bias = shifts is not None
    if psi.shape[1] == 1:  # ‖ψ_n‖² (‖φ_n‖² + 1)
        rows, columns = (
            torch.linalg.vector_norm(t.squeeze(1), dim=1).double().square_() for t in (psi, phi)
        )
        return torch.dot(rows, columns.add_(1.0) if has_bias else columns)
    return ((psi @ psi.mT) * (phi @ phi.mT + float(has_bias))).sum(dtype=torch.float64)


def _forms_products(positions: int, out: int, width: int) -> bool:
    """Whether ‖ψ_nᵀ φ_n‖² is cheaper from the product than as Σ_st (ψ_s·ψ_t)(φ_s·φ_t)."""
    return positions > 1 and positions * (out + width) > out * width


def _squares(values: Tensor) -> Tensor:
    """The sum of the squares of all entries, those of each sample added up apart."""
    return torch.linalg.vector_norm(values.flatten(1), dim=1).double().square_().sum()


def over_positions(values: Tensor) -> Tensor:
    """The sum over the positions of each sample."""
    return values.squeeze(1) if values.shape[1] == 1 else values.sum(1)


def _runs(samples: int, span: Span, offset: int) -> Iterator[tuple[int, int, int, int]]:
    """A first group, from which to which sample, and in how many groups these are."""
    start = 0
    while start < samples:
        group, within = divmod(offset + start, span.each)
        many = max(1, (samples - start) // span.each) if within == 0 else 1
        stop = min(samples, start + many * span.each - within)
        yield span.first + group, start, stop, many
        start = stop
