"""A number that is made of λ, and what it is on bootstrap samples.

In a bootstrap sample each group of samples counts as often as it is drawn from all of them. The
draws are the same for all candidates, so that replicates can be compared one by one. Source: Efron
and Tibshirani, *An Introduction to the Bootstrap*, 1993, chapter 6.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from constrained_growth._multipliers.accumulator import Estimate
from constrained_growth._multipliers.groups import of_groups
from constrained_growth._multipliers.moments import Parts
from constrained_growth.errors import RuleError
from constrained_growth.norms import MomentNorm, SecondMoments, needs_moments
from constrained_growth.norms.moments import are_aligned
from constrained_growth.solution import Norm

_MANY, _SMALL, _FEW = 200, 2**12, 50
"""How many, for λ of up to so many entries, or else: a standard error from 50 is itself known to
10 %."""

_TOGETHER = 10
"""Draws whose λ are made in one product."""


def value_of(norm: Norm | MomentNorm, estimate: Estimate) -> float:
    """The norm of λ; a RuleError where it is no number, or negative."""
    with torch.no_grad():
        value = _applied(norm, *_of_parts(estimate, estimate.multiplier))
    try:
        size = float(value)
    except (TypeError, ValueError, RuntimeError):
        size = -1.0
    if size < 0:
        raise RuleError(
            f"norm={norm!r:.80} returned {value!r:.80}; a norm returns one number, 0 or more."
        )
    return size


def replicates_of(
    norm: Norm | MomentNorm, estimate: Estimate, *, few: bool = False
) -> tuple[float, ...]:
    """The norm of λ on bootstrap samples, perhaps on `few`; none from a single group.

    Of several processes, each has its own groups: the deviations among its samples, scaled to
    those among all.
    """
    here = estimate.weights > 0
    weights = estimate.weights[here]
    count, local = len(weights), float(weights.sum())
    if count < 2:
        return ()
    size = sum(t.numel() for t in estimate.multiplier.values())
    number = _FEW if few or size > _SMALL else _MANY
    # one seed for all candidates: comparisons are between replicates of the same sample
    drawn = np.random.default_rng(0).multinomial(count, np.full(count, 1 / count), number)
    shares = torch.from_numpy(drawn).double()
    shares = shares / (shares @ weights)[:, None] - 1 / local
    shares *= math.sqrt(local)  # a deviation among a part of the samples is larger by 1/√part
    found = []
    parts = {} if estimate.found is None else estimate.found.parts
    with torch.no_grad():
        for some in shares.split(_TOGETHER):
            moved = {
                key: of_groups(estimate.multiplier[key], sums)
                + _combined(some, sums, here) / estimate.weight
                for key, sums in estimate.sums.items()
            }
            moved, moments = _of_parts(estimate, moved, 1)
            moments = {key: _moved(m, parts.get(key), some, here) for key, m in moments.items()}
            for draw in range(len(some)):
                multiplier = {key: t[draw] for key, t in moved.items()}
                mine = {key: of_draws[draw] for key, of_draws in moments.items()}
                found.append(float(_applied(norm, multiplier, mine)))
    return tuple(found)


def _of_parts(
    estimate: Estimate, multiplier: Mapping[str, Tensor], leading: int = 0
) -> tuple[dict[str, Tensor], dict[str, SecondMoments]]:
    """λ, after so many leading dimensions, and the moments: of the same parts of the pins.

    Where λ has nothing else than the part that moments are of, they are of all of it.
    """
    multiplier, moments = dict(multiplier), dict(estimate.moments)
    for key, m in estimate.moments.items():
        if multiplier[key].shape[leading:] == estimate.shapes[key]:
            continue
        if m.bias is not None and m.rows is not None:
            multiplier[m.bias] = multiplier[m.bias].flatten(leading)[..., m.rows]
        same_units = m.same_units and are_aligned(m)
        moments[key] = replace(m, rows=None, columns=None, same_units=same_units)
    return multiplier, moments


def _combined(shares: Tensor, sums: Tensor, here: Tensor) -> Tensor:
    """Σ_g share_g sum_g, for each draw."""
    sums = sums[here.to(sums.device)]
    return (shares.to(sums) @ sums.reshape(len(sums), -1)).view(-1, *sums.shape[1:])


def _moved(
    moments: SecondMoments, parts: Parts | None, shares: Tensor, here: Tensor
) -> list[SecondMoments]:
    """The second moments of each draw; only their sizes vary where no more is kept."""
    if parts is None or moments.mean is None:
        return [moments] * len(shares)
    of_features, of_cotangents = parts.scales
    if parts.features is not None and parts.cotangents is not None:
        features = moments.features + _combined(shares, parts.features, here) * of_features
        mean = moments.mean + _combined(shares, parts.mean, here) * of_features
        more = _combined(shares, parts.cotangents, here) * of_cotangents
        cotangents = moments.cotangents + more
    else:
        mean = moments.mean.expand(len(shares), *moments.mean.shape)
        traces = _combined(shares, parts.traces, here)
        sizes = 1 + traces * of_cotangents / _trace(moments.cotangents)
        shape = (-1, *[1] * moments.cotangents.dim())
        cotangents = moments.cotangents * sizes.clamp(min=0).view(shape)
        features = moments.features.expand(len(shares), *moments.features.shape)
    return [
        replace(moments, features=a, cotangents=g, mean=m)
        for a, g, m in zip(features, cotangents, mean, strict=True)
    ]


def _trace(moment: Tensor) -> Tensor:
    total = moment.diagonal(dim1=-2, dim2=-1).sum()
    return torch.where(total > 0, total, 1.0)


def _applied(
    norm: Any, multiplier: Mapping[str, Tensor], moments: Mapping[str, SecondMoments]
) -> Tensor | float:
    return norm(multiplier, moments) if needs_moments(norm) else norm(multiplier)
