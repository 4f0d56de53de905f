"""The step along λ, −λ being a gradient, that some samples propose, judged by others."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from constrained_growth._distributed import everywhere
from constrained_growth._multipliers.accumulator import Estimate
from constrained_growth._multipliers.groups import of_groups
from constrained_growth._sharding import whole
from constrained_growth.solution import HeldOut

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


Pairs = list[tuple[float, float]]
"""Of each group of samples: its share w_g of all weight times the slope of its loss, and w_g."""


def held_out(
    proposed: Mapping[str, Estimate], judging: Mapping[str, Estimate], group: ProcessGroup | None
) -> dict[str, HeldOut]:
    """Candidate → slope of the judging data's loss along λ/‖λ‖ of the proposing ones.

    The groups g of the judging samples have slopes s_g with weights w_g, Σ w_g = 1. With the mean
    s = Σ w_g s_g, the variance of s is Σ w_g² (s_g − s)² · G/(G − 1).
    """
    return _tested(lambda name: _slopes(proposed[name], judging[name]), judging, group)


def cross_fitted(
    estimates: Mapping[str, Estimate], group: ProcessGroup | None
) -> dict[str, HeldOut]:
    """Candidate → slope of the loss of each group of samples along λ/‖λ‖ of all the others."""
    return _tested(lambda name: _left_out(estimates[name]), estimates, group)


def _left_out(estimate: Estimate) -> Pairs:
    """With S_g the sum of group g and T that of all: −⟨S_g, T − S_g⟩/‖T − S_g‖."""
    along = torch.zeros_like(estimate.weights)  # ⟨S_g, T⟩
    squares, whole_square = torch.zeros_like(along), 0.0
    for name, multiplier in estimate.multiplier.items():
        sums = estimate.sums[name]
        rows, total = _real(sums), _real(of_groups(multiplier, sums)[None])[0] * estimate.weight
        along += (rows @ total).cpu()
        squares += rows.square().sum(1).cpu()
        whole_square += float(total.square().sum())
    # ‖T − S_g‖², below zero at most by rounding
    others = (whole_square - 2 * along + squares).clamp(min=0.0).sqrt()
    slopes = torch.where(others > 0, (squares - along) / others, 0.0) / estimate.weight
    return _pairs(slopes, estimate)


def _pairs(slopes: Tensor, judging: Estimate) -> Pairs:
    here = judging.weights > 0
    return [*zip(slopes[here].tolist(), judging.weights[here].tolist(), strict=True)]


def _slopes(proposed: Estimate, judging: Estimate) -> Pairs:
    size, slopes = 0.0, torch.zeros_like(judging.weights)
    for name, direction in proposed.multiplier.items():
        direction = _real(direction[None])[0]
        size = math.hypot(size, float(torch.linalg.vector_norm(direction)))
        sums = _real(judging.sums[name])
        slopes -= (sums @ direction).cpu() / judging.weight
    return _pairs(slopes / size if size else slopes, judging)


def _real(tensors: Tensor) -> Tensor:
    """Each as a real vector in double precision."""
    # Re⟨a, b⟩ of complex parameters is the product of their real and imaginary parts
    tensors = whole(tensors)
    parts = torch.view_as_real(tensors) if tensors.is_complex() else tensors
    return parts.double().reshape(len(parts), -1)


def _tested(
    pairs: Callable[[str], Pairs], judging: Mapping[str, Estimate], group: ProcessGroup | None
) -> dict[str, HeldOut]:
    def here() -> dict[str, Pairs]:
        return {name: pairs(name) for name in judging}

    every = everywhere(here, group)
    return {
        name: _test([pair for some in every for pair in some[name]], one.samples)
        for name, one in judging.items()
    }


def _test(groups: Pairs, samples: int) -> HeldOut:
    from scipy import stats  # takes half a second, and most solves are not asked this

    slope, count = math.fsum(part for part, _ in groups), len(groups)
    if count < 2:
        return HeldOut(slope, math.nan, math.nan, math.nan)
    deviations = math.fsum((part - weight * slope) ** 2 for part, weight in groups)
    error = math.sqrt(deviations * count / (count - 1))
    if error == 0.0:  # as where the same batch comes again and again
        return HeldOut(slope, 0.0, 0.0 if slope < 0 else 1.0, -math.copysign(math.inf, slope))
    pvalue = float(stats.t.cdf(slope / error, count - 1))
    return HeldOut(slope, error, pvalue, -slope / (error * math.sqrt(samples)))
