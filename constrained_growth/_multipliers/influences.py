"""How a number that is made of λ varies with the samples: its value and its influences."""

from __future__ import annotations

import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from constrained_growth._multipliers.accumulator import Estimate
from constrained_growth.norms import MomentNorm, SecondMoments, needs_moments
from constrained_growth.solution import Norm


def value_of(norm: Norm | MomentNorm, estimate: Estimate) -> tuple[float, tuple[float, ...]]:
    """The norm of λ, and the influences on it of the groups here; see `groups`.

    The second moments count as known.
    """
    here = estimate.weights > 0
    if int(here.sum()) == 0 or len(estimate.weights) == 1:
        with torch.no_grad():
            return float(_applied(norm, estimate.multiplier, estimate.moments)), ()
    leaves = {key: t.detach().clone().requires_grad_() for key, t in estimate.multiplier.items()}
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a function may turn its result into a float
        value: Any = _applied(norm, leaves, estimate.moments)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return float(value), _by_deletion(norm, estimate, float(value))
    slopes = torch.autograd.grad(
        value, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    weights = estimate.weights
    found = torch.zeros_like(weights)
    for (key, total), slope in zip(estimate.sums.items(), slopes, strict=True):
        along = torch.mv(total.reshape(len(total), -1), slope.flatten()) / estimate.weight
        mean = torch.dot(estimate.multiplier[key].flatten(), slope.flatten())
        found += along.double().cpu() - weights * float(mean)
    return float(value.detach()), tuple(found[here].tolist())


def _applied(
    norm: Any, multiplier: Mapping[str, Tensor], moments: Mapping[str, SecondMoments]
) -> Tensor | float:
    return norm(multiplier, moments) if needs_moments(norm) else norm(multiplier)


def _by_deletion(norm: Norm | MomentNorm, estimate: Estimate, value: float) -> tuple[float, ...]:
    """By leaving out each group in turn, for a function that autograd cannot follow."""
    found = []
    for group, share in enumerate(estimate.weights.tolist()):
        if 0 < share < 1:
            without = {
                key: (t - estimate.sums[key][group] / estimate.weight) / (1 - share)
                for key, t in estimate.multiplier.items()
            }
            other = float(_applied(norm, without, estimate.moments))
            found.append((value - other) * (1 - share))
    return tuple(found)
