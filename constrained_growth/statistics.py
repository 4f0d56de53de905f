"""What a sample says of the size of a multiplier on all data: debiased squares, intervals.

λ̂, a mean over samples, is unbiased for λ; its norm is not: E‖λ̂‖²_F = ‖λ‖²_F + tr Cov(λ̂). Two
intervals follow. One needs tr Cov(λ̂) alone, which every solve has, and holds whatever the
covariance is. The other is narrower by about the root of how many directions the noise has, and
needs ⟨R, λ_b⟩ of each batch b for one direction R, which adaptive sampling notes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

import numpy as np
import torch
from numpy.typing import ArrayLike
from scipy import stats
from torch import Tensor

from constrained_growth.errors import RuleError
from constrained_growth.solution import Sensitivity

__all__ = [
    "Slope",
    "debiased_square",
    "interval",
    "limits",
    "slope_of",
    "squared_norm",
    "squared_norm_interval",
]

MIN_CONFIDENCE = 0.79
"""Below it `interval` has no proof: Székely and Bakirov's bound holds for z² ≥ 1.54."""


def squared_norm(tensors: Iterable[Tensor]) -> float:
    """‖·‖²_F of several tensors together, summed in float64."""
    return sum(float(tensor.square().sum(dtype=torch.float64)) for tensor in tensors)


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


@dataclass(frozen=True)
class Slope:
    """The affine function ⟨R, λ⟩ + c below a convex function f of λ that touches it at λ₀.

    R = ∇f(λ₀) and c = f(λ₀) − ⟨R, λ₀⟩, which is 0 for a norm: R is then the element of the dual
    norm's unit ball with ⟨R, λ₀⟩ = ‖λ₀‖.

    Attributes:
        direction: R.
        offset: c, a tensor without dimensions.
    """

    direction: Mapping[str, Tensor]
    offset: Tensor

    def __call__(self, multiplier: Mapping[str, Tensor], weight: float = 1.0) -> Tensor:
        """⟨R, λ⟩ + c of a multiplier, or of one that was multiplied by a weight: ⟨R, wλ⟩ + wc."""
        products = [
            torch.dot(direction.flatten(), multiplier[name].flatten().to(direction.dtype))
            for name, direction in self.direction.items()
        ]
        return torch.stack(products).sum() + weight * self.offset


def slope_of(
    function: Callable[[Mapping[str, Tensor]], Tensor | float], multiplier: Mapping[str, Tensor]
) -> Slope | None:
    """The slope of a norm, or another convex function, at a multiplier.

    Args:
        function: From pinned parameter → λ to a tensor, differentiable by autograd.
        multiplier: λ₀.

    Returns:
        The slope, or None where there is none of use: all zero, or not finite.

    Raises:
        RuleError: The function cannot be differentiated.
    """
    leaves = {name: value.detach().clone().requires_grad_() for name, value in multiplier.items()}
    value = function(leaves)
    if not isinstance(value, Tensor) or not value.requires_grad:
        raise RuleError(
            f"norm={function!r} returns {value!r}, which autograd cannot differentiate; compute it "
            "from the multiplier by operations on tensors and return a tensor."
        )
    grads = torch.autograd.grad(
        value, list(leaves.values()), allow_unused=True, materialize_grads=True
    )
    slope = Slope(dict(zip(leaves, grads, strict=True)), torch.zeros_like(value.detach()))
    at_zero = slope(multiplier)
    usable = any(bool(g.any()) for g in grads) and bool(at_zero.isfinite())
    return Slope(slope.direction, value.detach() - at_zero) if usable else None


def limits(
    value: float,
    projections: ArrayLike,
    sizes: ArrayLike,
    num_samples: int,
    level: float,
    fraction: float = 0.0,
) -> tuple[float, float]:
    """One-sided limits for f(λ), f a norm or another convex function of the mean λ of all data.

    Each unit u (a batch, or several) was projected on a slope of f that was known before it was
    read: q_u = ⟨R, λ_u⟩ + c ≤ f(λ) on average, by convexity. And f(λ̂) ≥ f(λ) on average. So

        lower = q̄ − t σ √(1/m − 1/N),    upper = f(λ̂) + t σ √(1/n − 1/N),

    with q̄ and σ² = Σ n_u (q_u − q̄)²/(U − 1) weighted by the sizes n_u of the U units, m = Σ n_u,
    n the samples of λ̂ and N those of all data. σ² is uᵀCov(λ_n)u for u the direction of λ, and
    more than that while R is still noisy: that part stands for the second-order term of the
    variance of ‖λ̂‖. t is a quantile of Student's distribution.

    Units may consist of samples that depend on each other, as long as units are exchangeable.

    Args:
        value: f(λ̂).
        projections: q_u, shape (units,).
        sizes: n_u, how many samples the units have.
        num_samples: n.
        level: How often each of the two limits may be wrong.
        fraction: n/N; 0 for data without end.

    Returns:
        Lower limit (not below 0) and upper limit; (0, inf) from less than `MIN_UNITS` units.
    """
    q, weights = np.asarray(projections, dtype=float), np.asarray(sizes, dtype=float)
    if len(q) < MIN_UNITS:
        return 0.0, math.inf
    total = weights.sum()
    mean = weights @ q / total
    spread = math.sqrt(weights @ (q - mean) ** 2 / (len(q) - 1))
    t = float(stats.t.isf(level, len(q) - 1))
    of_all = fraction / num_samples  # 1/N
    lower = mean - t * spread * math.sqrt(max(0.0, 1 / total - of_all))
    upper = value + t * spread * math.sqrt(max(0.0, 1 / num_samples - of_all))
    return max(0.0, lower), upper


MIN_UNITS = 4
"""From fewer units no variance is estimated."""
