"""The trust-region subproblem: minimise −⟨λ, s⟩ + ½⟨s, B s⟩ over ‖s‖ ≤ Δ.

B is symmetric, possibly indefinite, and known by its products with vectors. Both solvers spend all
products at once, for the largest radius; steps for smaller ones come at no further cost.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # s ↦ B s


class Step(NamedTuple):
    """A step, and what the quadratic model predicts for it."""

    vector: Tensor  # s, in float64
    predicted: float  # ⟨λ, s⟩ − ½⟨s, B s⟩, never negative
    at_boundary: bool  # whether ‖s‖ = Δ


Steps = Callable[[float], Step]
"""Δ ↦ the step for this radius."""


def trust_region_steps(
    multiplier: Tensor, product: Product, radius: float, *, max_products: int, tolerance: float
) -> Steps:
    """The exact steps if `max_products` are enough for them, else those of Steihaug–Toint.

    λ is flat and in float64, and `radius` the largest Δ for which a step will be needed.
    """
    if multiplier.numel() <= max_products:
        return _exact(multiplier, product)
    return _steihaug(multiplier, product, radius, max_products=max_products, tolerance=tolerance)


def _exact(multiplier: Tensor, product: Product) -> Steps:
    """The global minimum, from the eigenvalues of B; one product for each entry of λ.

    s = (B + μI)⁻¹ λ with the μ ≥ max(0, −smallest eigenvalue) for which ‖s‖ = Δ, or μ = 0 if that
    step is shorter. In the hard case no such μ exists, and a multiple of an eigenvector for the
    smallest eigenvalue is added. Moré and Sorensen, *Computing a trust region step*, 1983;
    Nocedal and Wright, *Numerical Optimization*, 2nd ed. 2006, section 4.3.
    """
    from scipy.optimize import root_scalar  # seconds to import

    eye = torch.eye(multiplier.numel(), dtype=multiplier.dtype, device=multiplier.device)
    matrix = torch.stack([product(column) for column in eye])
    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    slope, lowest = vectors.mT @ multiplier, float(values[0])

    def at(shift: float) -> Tensor:
        return slope / (values + shift)

    def solved(radius: float) -> tuple[Tensor, bool]:
        """The step in the basis of the eigenvectors, and whether it is at the boundary."""
        # a divisor below this is 0 up to rounding
        tiny = 1e-14 * max(float(values.abs().max()), float(slope.norm()) / radius)
        if lowest > tiny and float(at(0.0).norm()) <= radius:
            return at(0.0), False
        least = max(0.0, -lowest)
        if float(at(least + tiny).norm()) >= radius:
            most = least + tiny + float(slope.norm()) / radius
            root = root_scalar(
                lambda mu: 1 / radius - 1 / float(at(mu).norm()),
                bracket=(least + tiny, most),
                method="brentq",
                rtol=1e-14,
            ).root
            y = at(float(root))
            return y * (radius / y.norm()), True
        flat = values + least <= tiny
        y = torch.where(flat, 0.0, slope / torch.where(flat, 1.0, values + least))
        if lowest >= -tiny:  # flat there, without slope: a longer step gains nothing
            return y, False
        y[0] += math.sqrt(max(radius**2 - float(y.square().sum()), 0.0))
        return y, True

    def step(radius: float) -> Step:
        y, at_boundary = solved(radius)
        predicted = float(slope @ y - (values * y.square()).sum() / 2)
        return Step(vectors @ y, max(predicted, 0.0), at_boundary)

    return step


class _Segment(NamedTuple):
    """One iteration of conjugate gradients: from `start`, `length` times along `direction`."""

    start: Tensor
    direction: Tensor
    decrease: float  # ⟨λ, s⟩ − ½⟨s, B s⟩ at the start
    slope: float  # ⟨λ − B s, p⟩ at the start, p being the direction
    curvature: float  # ⟨p, B p⟩
    length: float  # infinite if the curvature is not positive


def _steihaug(
    multiplier: Tensor, product: Product, radius: float, *, max_products: int, tolerance: float
) -> Steps:
    """The path of conjugate gradients until it leaves the ball, or follows a negative curvature.

    It stops where ‖λ − B s‖ is at most `tolerance` times ‖λ‖. Both ‖s‖ and the decrease grow along
    it, so the step for a smaller radius is the same path, cut earlier. If B is positive
    semidefinite, the decrease is at least half the best one (Yuan, *On the truncated conjugate
    gradient method*, 2000). Steihaug, *The conjugate gradient method and trust regions in large
    scale optimization*, 1983; Nocedal and Wright, *Numerical Optimization*, algorithm 7.2.
    """
    s, residual, p, decrease = torch.zeros_like(multiplier), multiplier, multiplier, 0.0
    square = float(residual @ residual)
    stop = tolerance**2 * square
    path: list[_Segment] = []
    while square > stop and len(path) < max_products:
        bp = product(p)
        curvature, slope = float(p @ bp), float(residual @ p)
        length = slope / curvature if curvature > 0 else math.inf
        path.append(_Segment(s, p, decrease, slope, curvature, length))
        if not math.isfinite(length) or float((s + length * p).norm()) >= radius:
            break
        s = s + length * p
        decrease += length * slope - length**2 * curvature / 2
        residual = residual - length * bp
        before, square = square, float(residual @ residual)
        p = residual + (square / before) * p

    def step(radius: float) -> Step:
        for at in path:
            # the t ≥ 0 for which ‖start + t direction‖ is the radius
            a, b = float(at.direction @ at.direction), float(at.start @ at.direction)
            c = max(radius**2 - float(at.start @ at.start), 0.0)
            root = b + math.sqrt(b**2 + a * c)
            room = c / root if root > 0 else 0.0
            if room <= at.length or at is path[-1]:
                length = min(room, at.length)
                gained = length * at.slope - length**2 * at.curvature / 2
                vector = at.start + length * at.direction
                return Step(vector, at.decrease + gained, room <= at.length)
        return Step(torch.zeros_like(multiplier), 0.0, False)

    return step
