"""The step that some data propose, −λ being their gradient, judged by other data."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from constrained_growth._distributed import everywhere, several
from constrained_growth._multipliers.accumulator import Estimate
from constrained_growth._sharding import whole
from constrained_growth.solution import HeldOut

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


def held_out(
    proposed: Mapping[str, Estimate], judging: Mapping[str, Estimate], group: ProcessGroup | None
) -> dict[str, HeldOut]:
    """Candidate → slope of the judging data's loss along λ/‖λ‖ of the proposing ones.

    The groups g of the judging samples have slopes s_g with weights w_g, Σ w_g = 1. With the mean
    s = Σ w_g s_g, the variance of s is Σ w_g² (s_g − s)² · G/(G − 1).
    """

    def parts() -> dict[str, list[tuple[float, float]]]:
        return {name: _slopes(proposed[name], judging[name]) for name in proposed}

    every = everywhere(parts, group) if several(group) else [parts()]
    return {name: _tested([pair for some in every for pair in some[name]]) for name in proposed}


def _slopes(proposed: Estimate, judging: Estimate) -> list[tuple[float, float]]:
    """Of each group of this process that has samples: w_g s_g, and w_g."""
    size, slopes = 0.0, torch.zeros_like(judging.weights)
    for name, direction in proposed.multiplier.items():
        direction = _real(direction[None])[0]
        size = math.hypot(size, float(torch.linalg.vector_norm(direction)))
        sums = _real(judging.sums[name])
        slopes -= (sums @ direction).cpu() / judging.weight
    slopes = slopes / size if size else slopes
    here = judging.weights > 0
    return [*zip(slopes[here].tolist(), judging.weights[here].tolist(), strict=True)]


def _real(tensors: Tensor) -> Tensor:
    """Each as a real vector in double precision."""
    tensors = whole(tensors)
    parts = torch.view_as_real(tensors) if tensors.is_complex() else tensors
    return parts.double().reshape(len(parts), -1)


def _tested(groups: list[tuple[float, float]]) -> HeldOut:
    from scipy import stats

    slope, count = math.fsum(part for part, _ in groups), len(groups)
    if count < 2:
        return HeldOut(slope, math.nan, math.nan)
    deviations = math.fsum((part - weight * slope) ** 2 for part, weight in groups)
    error = math.sqrt(deviations * count / (count - 1))
    if error == 0.0:
        return HeldOut(slope, 0.0, 0.0 if slope < 0 else 1.0)
    return HeldOut(slope, error, float(stats.t.cdf(slope / error, count - 1)))
