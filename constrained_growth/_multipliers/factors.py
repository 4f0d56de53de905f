"""The factors of a block at its pins, sample by sample: its own closed form, or recorded."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._multipliers.closed_form import by_sample
from constrained_growth._multipliers.recorded import recorded_factors, zeros_of
from constrained_growth._sites.collector import Use
from constrained_growth.blocks import AffineFactors, has_factors
from constrained_growth.blocks.convolved import Convolved

Layout = Callable[[Tensor, int], Tensor]
"""`layout(t, n)`: t as (n samples, positions, channels)."""


@dataclass(frozen=True)
class Factors:
    """What some uses of a site bring to the pins of a block.

    Attributes:
        maps: The affine maps of all pins, of shape (samples, positions, channels); a map may come
            several times, each time with the next samples. All as one sample where they cannot
            be told apart.
        by_sample: Whether they can.
        outputs: What the block made of x at each use; empty if it did not run.
    """

    maps: Iterable[AffineFactors]
    by_sample: bool
    outputs: Sequence[Tensor] = ()


class FactorsOf:
    """The factors of one block, batch by batch."""

    def __init__(self, block: nn.Module, dtype: torch.dtype) -> None:
        self._block: Any = block
        self._dtype = dtype
        self._own = has_factors(block)
        self._layouts: list[Layout | None] | None = None  # of recorded maps
        # asked now, as the loop over the data must not make a GPU wait
        self._zeros = frozenset() if self._own else zeros_of(block)

    def __call__(self, uses: Sequence[Use], size: int) -> Factors | None:
        """The factors of a batch of `size` samples; None if a pin is in no affine map."""
        cast = [replace(u, x=u.x.to(self._dtype), delta=u.delta.to(self._dtype)) for u in uses]
        in_front = by_sample(uses, size)
        return self._own_factors(cast, in_front) if self._own else self._recorded(cast, in_front)

    def _own_factors(self, uses: Sequence[Use], in_front: bool) -> Factors:
        found = [self._block.factors(use.x, use.delta) for use in uses]
        if in_front and len(found) == 1 and isinstance(found[0], Convolved):
            return Factors(found[0], True)
        layout = _in_front if in_front else _as_one
        # neither layout asks for the number of samples
        shaped = [(_shaped(factor, layout, 0) for factor in some) for some in found]
        if len(shaped) == 1:
            return Factors(shaped[0], in_front)
        # of each use one for each map, whose samples may come a few at a time
        whole = [_merged(some, 0 if in_front else 1) for some in shaped]
        return Factors(_side_by_side(whole), in_front)

    def _recorded(self, uses: Sequence[Use], in_front: bool) -> Factors | None:
        outputs, every = [], []
        for use in uses:
            # how the samples lie in ψ is found once, from a δ of the first sample alone, at all its
            # positions: that of the loss may be at one of them
            first = self._layouts is None
            more = (_at_first_sample(use.delta),) if first else ()
            found = recorded_factors(self._block, use, use.delta, *more, zeros=self._zeros)
            if found is None:
                return None
            y, (factors, *others) = found
            if first:
                size = len(use.x) if in_front else 0
                self._layouts = [_layout_of(f.cotangent, size) for f in others[0]]
            outputs.append(y)
            every.append(factors)
        layouts = self._layouts or []
        by_sample = in_front and None not in layouts
        shaped = [
            _merged(
                _shaped(f, layout if by_sample and layout else _as_one, len(use.x))
                for f, layout in zip(factors, layouts, strict=True)
            )
            for factors, use in zip(every, uses, strict=True)
        ]
        return Factors(shaped[0] if len(uses) == 1 else _side_by_side(shaped), by_sample, outputs)


def _shaped(factor: AffineFactors, layout: Layout, n: int) -> AffineFactors:
    cotangent, features = (layout(t, n) for t in (factor.cotangent, factor.features))
    return replace(factor, cotangent=cotangent, features=features)


def _joined(factors: Sequence[AffineFactors], dim: int) -> AffineFactors:
    cotangent, features = (
        torch.cat([getattr(factor, name) for factor in factors], dim)
        for name in ("cotangent", "features")
    )
    return replace(factors[0], cotangent=cotangent, features=features)


def _merged(factors: Iterable[AffineFactors], dim: int = 1) -> list[AffineFactors]:
    """One for each map; one that is used several times has as many more positions."""
    parts: dict[str, list[AffineFactors]] = {}
    for factor in factors:
        parts.setdefault(factor.weight, []).append(factor)
    return [_joined(same, dim) for same in parts.values()]


def _side_by_side(uses: Sequence[Sequence[AffineFactors]]) -> Iterator[AffineFactors]:
    """Several uses are as many more positions of each sample."""
    return (_joined(same, 1) for same in zip(*uses, strict=True))


def _at_first_sample(like: Tensor) -> Tensor:
    delta = torch.zeros_like(like)
    numbers = torch.randn(like[:1].shape, generator=torch.Generator().manual_seed(0))
    delta[:1] = numbers.to(delta)
    return delta


def _in_front(t: Tensor, n: int) -> Tensor:
    return t.reshape(len(t), -1, t.shape[-1])


def _as_one(t: Tensor, n: int) -> Tensor:
    return t.reshape(1, -1, t.shape[-1])


def _second(t: Tensor, n: int) -> Tensor:
    """(positions, samples, …), as of attention that has its sequence in front."""
    return t.transpose(0, 1).reshape(n, -1, t.shape[-1])


def _rows(t: Tensor, n: int) -> Tensor:
    """Positions and samples in one dimension, those of a sample together."""
    return t.reshape(n, -1, t.shape[-1])


def _rows_across(t: Tensor, n: int) -> Tensor:
    """The same with the samples of a position together."""
    return t.reshape(-1, n, *t.shape[1:]).transpose(0, 1).reshape(n, -1, t.shape[-1])


def _layout_of(alone: Tensor, n: int) -> Layout | None:
    """Where the n samples of ψ are, seen at ψ of a δ that is zero but for the first sample."""
    # shapes alone do not tell: 8 rows may be 2 samples × 4 positions, or the other way round
    for layout in (_in_front, _second, _rows, _rows_across):
        if n == 0 or (layout is _in_front and len(alone) != n):
            continue
        if layout is _second and not (alone.dim() > 2 and alone.shape[1] == n):
            continue
        if len(alone) % n and layout in (_rows, _rows_across):
            continue
        shaped = layout(alone, n)
        if not bool(shaped[1:].any()) and bool(shaped[:1].any()):
            return layout
    return None
