"""What a sample says of the size of a multiplier on all data: debiased squares, intervals.

λ̂, a mean over samples, is unbiased for λ; its norm is not: E‖λ̂‖²_F = ‖λ‖²_F + tr Cov(λ̂). Two
kinds of intervals follow. One needs tr Cov(λ̂) alone, which every solve has, and holds whatever
the covariance is. The other is narrower by about the root of how many directions the noise has,
and needs ⟨R, λ_u⟩ of parts u of the data on one direction R, which adaptive sampling notes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import stats
from torch import Tensor

from constrained_growth._sharding import whole
from constrained_growth.errors import RuleError
from constrained_growth.solution import Sensitivity

__all__ = [
    "SquaredSizes",
    "debiased_square",
    "interval",
    "slope_of_square",
    "square_on_all",
    "squared_norm",
    "squared_norm_interval",
]

MIN_CONFIDENCE = 0.79
"""Below it `interval` has no proof: Székely and Bakirov's bound holds for z² ≥ 1.54."""


def squared_norm(tensors: Iterable[Tensor]) -> float:
    """‖·‖²_F of several tensors together, summed in float64."""
    return sum(float(whole(tensor.square().sum(dtype=torch.float64))) for tensor in tensors)


def debiased_square(multiplier: Iterable[Tensor], variance: float) -> float:
    """‖λ̂‖²_F − tr Cov(λ̂), unbiased for ‖λ‖²_F; it may be negative.

    Args:
        multiplier: The tensors of λ̂.
        variance: An unbiased estimate of tr Cov(λ̂).

    Example:
        >>> debiased_square([torch.tensor([3.0, 4.0])], 1.0)
        24.0
    """
    return squared_norm(multiplier) - variance


def interval(sensitivity: Sensitivity, confidence: float = 0.95) -> tuple[float, float]:
    """Between which limits ‖λ‖ lies, in any norm, given λ̂ from a sample.

        ‖λ̂‖ ± z s,   s = L √tr Cov(λ̂),   z the two-sided normal quantile; cut off at 0

    It holds with at least this confidence for normal λ̂ of any covariance, since
    |‖λ̂‖ − ‖λ‖| ≤ L ‖λ̂ − λ‖_F, and among all quadratic forms of mean tr Cov the heaviest tail
    belongs to that with one direction only. It is as wide as it has to be when there is one, and
    too wide by a factor of about √d when the noise is spread over d directions.

    Args:
        sensitivity: Of a solution.
        confidence: At least 0.79 and below 1.

    Returns:
        Lower and upper limit; (0, inf) when the standard error is not known.

    Raises:
        RuleError: The confidence is out of range.

    Source:
        Székely and Bakirov, *Extremal probabilities for Gaussian quadratic forms*, Probability
        Theory and Related Fields 126, 2003.

    Example:
        >>> low, high = interval(Sensitivity(value=1.0, standard_error=0.1))
        >>> round(low, 3), round(high, 3)
        (0.804, 1.196)
    """
    return _around(sensitivity.value, sensitivity.standard_error, confidence)


def squared_norm_interval(
    sensitivity: Sensitivity, confidence: float = 0.95
) -> tuple[float, float]:
    """Between which limits ‖λ‖²_F lies: the squares of those of ‖λ‖_F, around `debiased_square`.

    Args:
        sensitivity: Of a solution, in whatever norm.
        confidence: At least 0.79 and below 1.

    Returns:
        Lower and upper limit; (0, inf) when the variance is not known.

    Raises:
        RuleError: The confidence is out of range.

    Example:
        >>> squared_norm_interval(Sensitivity(2.0, variance=1.0, debiased_square=3.0))[0]
        0.0016...
    """
    square = sensitivity.debiased_square + sensitivity.variance
    low, high = _around(math.sqrt(square), math.sqrt(sensitivity.variance), confidence)
    return low**2, high**2


def _around(value: float, error: float, confidence: float) -> tuple[float, float]:
    if not MIN_CONFIDENCE <= confidence < 1:
        raise RuleError(
            f"confidence={confidence!r} of an interval must be at least {MIN_CONFIDENCE} and below "
            "1, such as 0.95."
        )
    if not math.isfinite(error):
        return 0.0, math.inf
    half = float(stats.norm.isf((1 - confidence) / 2)) * error
    return max(0.0, value - half), value + half


def slope_of_square(
    norm: Callable[[Mapping[str, Tensor]], Tensor | float], multiplier: Mapping[str, Tensor]
) -> dict[str, Tensor]:
    """∇‖λ‖², which is 2λ for the Frobenius norm; 0 at 0.

    Args:
        norm: From pinned parameter → λ to a tensor, differentiable by autograd.
        multiplier: λ.

    Raises:
        RuleError: The norm cannot be differentiated.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in multiplier.items()}
    value = norm(leaves)
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise RuleError(
            f"norm={norm!r} returns {value!r}, which autograd cannot differentiate; compute it "
            "from the multiplier by operations on tensors and return a tensor."
        )
    grads = torch.autograd.grad(
        value.square(), list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    return {name: grad.nan_to_num(0.0) for name, grad in zip(leaves, grads, strict=True)}


def square_on_all(
    whole: float, first: float, second: float, *, sizes: tuple[int, int], fraction: float
) -> float:
    """‖λ‖² of all data, estimated from ‖λ̂‖² of a sample and of two parts of it.

        D + (n/N)(‖λ̂‖² − D),   D = (n²‖λ̂‖² − n₁²‖λ̂₁‖² − n₂²‖λ̂₂‖²)/(2 n₁ n₂)

    For the Frobenius norm D = ⟨λ̂₁, λ̂₂⟩, without bias for what the data were drawn from, and the
    second term is the share of the bias that all N data have too. For other norms the bias left
    is of higher order. No variance is needed, and samples may depend on each other within a part.

    Args:
        whole: ‖λ̂‖² of all n = n₁ + n₂ samples.
        first: ‖λ̂₁‖² of the first n₁.
        second: ‖λ̂₂‖² of the other n₂.
        sizes: n₁ and n₂.
        fraction: n/N; 0 for data without end.

    Example:
        >>> square_on_all(4.0, 9.0, 1.0, sizes=(10, 10), fraction=0)  # λ̂₁ = 3, λ̂₂ = 1
        3.0
    """
    n1, n2 = sizes
    debiased = ((n1 + n2) ** 2 * whole - n1**2 * first - n2**2 * second) / (2 * n1 * n2)
    return debiased + fraction * (whole - debiased)


_CORNERS = 16
"""So many corners has the polygon around an ellipse; it is 2 % larger."""

_ROUNDING = 1e-12
"""Variances below this part of the largest are rounding."""


@dataclass(frozen=True)
class SquaredSizes:
    """Estimates of ‖λ_i‖² on all data, and how they vary together.

    Attributes:
        values: `square_on_all` of each, shape (quantities,); may be negative.
        covariance: Cov(values), shape (quantities, quantities).
        degrees: Its degrees of freedom.
    """

    values: NDArray[np.float64]
    covariance: NDArray[np.float64]
    degrees: int

    @classmethod
    def of(
        cls,
        values: Sequence[float],
        projections: Sequence[NDArray[np.float64]],
        sizes: Sequence[NDArray[np.float64]],
        of_mean: float,
    ) -> SquaredSizes:
        """From projections q_ui = ⟨∇‖λ̂_i‖², λ_ui⟩ of units u, on slopes known before.

            Cov(values) = of_mean · Σ n_u (q_u − q̄)(q_u − q̄)ᵀ/(U − groups)

        To first order that is their covariance. Since λ̂ of the slope is a sample's itself, it is
        larger on average, by what the second order needs: for Frobenius norms
        4 λᵀΣλ/n + 4 tr Σ²/(n n₁), where ⟨λ̂₁, λ̂₂⟩ has 4 λᵀΣλ/n + 4 tr Σ²/n² with two halves.

        Args:
            values: The estimates.
            projections: q of some groups of units, each shape (units, quantities); the units of
                a group have the slope in common.
            sizes: n_u of the same, each shape (units,).
            of_mean: The variance of a mean per variance of a sample: 1/n − 1/N or more.
        """
        total = np.zeros((len(values), len(values)))
        degrees = 0
        for q, weights in zip(projections, sizes, strict=True):
            rest = q - weights @ q / weights.sum()
            total += (weights[:, None] * rest).T @ rest
            degrees += len(q) - 1
        covariance = total * of_mean / max(degrees, 1)
        return cls(np.asarray(values, dtype=float), covariance, degrees)

    def limits(self, index: int, level: float) -> tuple[float, float]:
        """Lower and upper limit of ‖λ_i‖, not below 0.

        Args:
            index: Which.
            level: How often each of the two limits may be wrong.
        """
        half = self._quantile(level) * math.sqrt(self.covariance[index, index])
        low, high = self.values[index] - half, self.values[index] + half
        return math.sqrt(max(0.0, low)), math.sqrt(max(0.0, high))

    def extremes(self, indices: Sequence[int], level: float) -> NDArray[np.float64]:
        """Where all ‖λ_i‖ may be when one of them, or two taken together, are far off.

        In squares they are the ends of an interval, or the corners of a polygon around an
        ellipse, and the others follow by what they have in common with them (by regression). A
        linear comparison of the one or two, such as α‖λ_i‖² ≥ β‖λ_j‖² + γ, that holds in all of
        them is wrong at most so often; and one of any others that holds at this level by itself
        holds in them too, since they lie on the ellipsoid that all have together.

        Args:
            indices: Which one or two.
            level: How often a comparison that holds may be wrong.

        Returns:
            None below 0, shape (2 or 16, quantities).
        """
        if len(indices) == 1:
            around = np.array([[-1.0, 1.0]])
        else:
            angles = 2 * math.pi * (np.arange(_CORNERS) + 0.5) / _CORNERS
            around = np.stack([np.cos(angles), np.sin(angles)]) / math.cos(math.pi / _CORNERS)
        roots, vectors = np.linalg.eigh(self.covariance[np.ix_(indices, indices)])
        alive = roots > _ROUNDING * roots.max()
        inverse_root = vectors[:, alive] / np.sqrt(roots[alive])
        moved = self.covariance[:, indices] @ inverse_root @ around[alive] * self._quantile(level)
        return np.sqrt(np.maximum(0.0, self.values + moved.T))

    def _quantile(self, level: float) -> float:
        return float(stats.t.isf(level, self.degrees))
