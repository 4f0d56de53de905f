"""By how much an error of a multiplier moves its norm."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from constrained_growth.norms.moments import MomentNorm, needs_moments
from constrained_growth.solution import Norm


def lipschitz(norm: Norm | MomentNorm, multiplier: Mapping[str, Tensor]) -> float:
    """By how much an error of λ moves its norm: an error of size ε in ‖·‖_F by at most L ε.

    Args:
        norm: Of this module, or a user's own. One that has a method `lipschitz(multiplier)` is
            asked for L, the least number with ‖·‖ ≤ L ‖·‖_F. For another function L is the
            Frobenius norm of its gradient at λ, by autograd, which holds to first order.
        multiplier: Pinned parameter → λ.

    Returns:
        L, or NaN where it is not known: for a function that autograd cannot follow, and for
        `KroneckerFisher`, which changes with the sample itself.

    Example:
        >>> from constrained_growth.norms import Entrywise1
        >>> lipschitz(Entrywise1(), {"weight": torch.zeros(2, 8)})
        4.0
    """
    constant: Any = getattr(norm, "lipschitz", None)
    if constant is not None:
        return float(constant(multiplier))
    return math.nan if needs_moments(norm) else _slope(norm, multiplier)


def _slope(function: Norm, multiplier: Mapping[str, Tensor]) -> float:
    """‖∇ function(λ)‖_F, or NaN for a function that does not return a tensor with a graph."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in multiplier.items()}
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a function may well turn its result into a float
        value = function(leaves)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return math.nan
    slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return math.sqrt(sum(float(s.square().sum()) for s in slopes if s is not None))
