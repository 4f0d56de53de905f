"""The trust-region subproblem: minimise −⟨λ, s⟩ + ½⟨s, B s⟩ over ‖s‖ ≤ Δ.

B is symmetric, maybe indefinite, and known by its products with vectors. Both ways of solving it
spend their products once, for the largest radius; a smaller one afterwards is free.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol

import torch
from scipy.optimize import root_scalar
from torch import Tensor

Product = Callable[[Tensor], Tensor]
"""B s."""


@dataclass(frozen=True)
class Step:
    """A step and what the model says of it.

    Attributes:
        vector: s, in float64.
        predicted: ⟨λ, s⟩ − ½⟨s, B s⟩, never negative.
        at_boundary: Whether ‖s‖ = Δ.
    """

    vector: Tensor
    predicted: float
    at_boundary: bool


class QuadraticModel(Protocol):
    """What gives a step for each radius."""

    def step(self, radius: float) -> Step:
        """The step for a radius up to the one it was made for."""
        ...


def quadratic_model(
    multiplier: Tensor, product: Product, radius: float, *, max_products: int, tolerance: float
) -> QuadraticModel:
    """The dense model where it takes no more products than are allowed, else Steihaug–Toint.

    Args:
        multiplier: λ, flat, in float64.
        product: s ↦ B s.
        radius: The largest Δ that will be asked for.
        max_products: How many products may be spent.
        tolerance: As in `ConjugateGradients`.
    """
    if multiplier.numel() <= max_products:
        return Dense.of(multiplier, product)
    return ConjugateGradients.of(
        multiplier, product, radius, max_products=max_products, tolerance=tolerance
    )


@dataclass(frozen=True)
class Dense:
    """The subproblem solved to rounding, by the eigenvalues of B.

    s = (B + μI)⁻¹ λ with the μ ≥ max(0, −smallest eigenvalue) for which ‖s‖ = Δ, or μ = 0 if that
    is shorter; in the hard case, where no such μ exists, an eigenvector of the smallest eigenvalue
    is added.

    Attributes:
        vectors: Eigenvectors of B, as columns.
        values: Its eigenvalues, ascending.
        slope: λ in the basis of the eigenvectors.

    Source:
        Moré and Sorensen, *Computing a trust region step*, 1983; Nocedal and Wright, *Numerical
        Optimization*, 2nd ed. 2006, section 4.3.
    """

    vectors: Tensor
    values: Tensor
    slope: Tensor

    @classmethod
    def of(cls, multiplier: Tensor, product: Product) -> Dense:
        """One product for each entry of λ."""
        eye = torch.eye(multiplier.numel(), dtype=multiplier.dtype, device=multiplier.device)
        matrix = torch.stack([product(column) for column in eye])
        values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
        return cls(vectors, values, vectors.mT @ multiplier)

    def step(self, radius: float) -> Step:
        """The best step, for any radius."""
        if not bool(self.slope.any()) and float(self.values[0]) >= 0:
            return Step(torch.zeros_like(self.slope), 0.0, False)
        y, at_boundary = self._solved(radius)
        predicted = float(self.slope @ y - (self.values * y.square()).sum() / 2)
        return Step(self.vectors @ y, max(predicted, 0.0), at_boundary)

    def _solved(self, radius: float) -> tuple[Tensor, bool]:
        lowest = float(self.values[0])
        # below it, a divisor is 0 but for rounding
        tiny = 1e-14 * max(float(self.values.abs().max()), float(self.slope.norm()) / radius)
        if lowest > tiny:
            newton = self._at(0.0)
            if float(newton.norm()) <= radius:
                return newton, False
        least = max(0.0, -lowest)
        if float(self._at(least + tiny).norm()) >= radius:
            most = least + tiny + float(self.slope.norm()) / radius
            root = root_scalar(
                lambda mu: 1 / radius - 1 / float(self._at(mu).norm()),
                bracket=(least + tiny, most),
                method="brentq",
                rtol=1e-14,
            ).root
            y = self._at(float(root))
            return y * (radius / y.norm()), True
        flat = self.values + least <= tiny
        y = torch.where(flat, 0.0, self.slope / torch.where(flat, 1.0, self.values + least))
        if lowest >= -tiny:  # flat there, and no slope: nothing to be had by going further
            return y, False
        y = y.clone()
        y[0] += math.sqrt(max(radius**2 - float(y.square().sum()), 0.0))
        return y, True

    def _at(self, shift: float) -> Tensor:
        return self.slope / (self.values + shift)


@dataclass(frozen=True)
class Segment:
    """One step of conjugate gradients: from `start` along `direction`.

    Attributes:
        start: s at its beginning.
        direction: p.
        decrease: ⟨λ, s⟩ − ½⟨s, B s⟩ at the beginning.
        slope: ⟨λ − B s, p⟩ there.
        curvature: ⟨p, B p⟩.
        length: How far along p conjugate gradients go; infinite where p bends downwards.
    """

    start: Tensor
    direction: Tensor
    decrease: float
    slope: float
    curvature: float
    length: float


@dataclass(frozen=True)
class ConjugateGradients:
    """The path of conjugate gradients, followed until it leaves the ball (Steihaug–Toint).

    Its length grows along the path and its decrease too, so that the step for a smaller radius is
    the same path cut shorter. A path that reaches a direction of negative curvature follows it to
    the boundary. Where B is positive semidefinite the decrease is at least half the best one.

    Attributes:
        start: s = 0.
        segments: The path; empty where λ = 0.

    Source:
        Steihaug, *The conjugate gradient method and trust regions in large scale optimization*,
        1983; Toint, 1981; Nocedal and Wright, *Numerical Optimization*, 2nd ed. 2006, algorithm
        7.2; the half: Yuan, *On the truncated conjugate gradient method*, 2000.
    """

    start: Tensor
    segments: tuple[Segment, ...]

    @classmethod
    def of(
        cls,
        multiplier: Tensor,
        product: Product,
        radius: float,
        *,
        max_products: int,
        tolerance: float,
    ) -> ConjugateGradients:
        """Follow the path.

        Args:
            multiplier: λ.
            product: s ↦ B s.
            radius: Where to stop; steps for smaller radii can be had afterwards.
            max_products: The path is cut after so many products.
            tolerance: The path ends where ‖λ − B s‖ is at most this times ‖λ‖.
        """
        s, residual = torch.zeros_like(multiplier), multiplier
        p = residual
        square = float(residual @ residual)
        stop = tolerance**2 * square
        decrease = 0.0
        segments: list[Segment] = []
        while square > stop and len(segments) < max_products:
            bp = product(p)
            curvature = float(p @ bp)
            slope = float(residual @ p)
            length = slope / curvature if curvature > 0 else math.inf
            segments.append(Segment(s, p, decrease, slope, curvature, length))
            if not math.isfinite(length) or float((s + length * p).norm()) >= radius:
                break
            s = s + length * p
            decrease += length * slope - length**2 * curvature / 2
            residual = residual - length * bp
            before, square = square, float(residual @ residual)
            p = residual + (square / before) * p
        return cls(torch.zeros_like(multiplier), tuple(segments))

    def step(self, radius: float) -> Step:
        """The path cut at a radius up to the one it was made for."""
        if not self.segments:
            return Step(self.start, 0.0, False)
        for segment in self.segments:
            room = _to_boundary(segment.start, segment.direction, radius)
            if room <= segment.length:
                return _along(segment, room, True)
        return _along(self.segments[-1], self.segments[-1].length, False)


def _along(segment: Segment, length: float, at_boundary: bool) -> Step:
    gained = length * segment.slope - length**2 * segment.curvature / 2
    vector = segment.start + length * segment.direction
    return Step(vector, segment.decrease + gained, at_boundary)


def _to_boundary(start: Tensor, direction: Tensor, radius: float) -> float:
    """The t ≥ 0 for which ‖start + t direction‖ = radius."""
    a, b = float(direction @ direction), float(start @ direction)
    c = max(radius**2 - float(start @ start), 0.0)
    root = math.sqrt(b**2 + a * c)
    return c / (b + root) if b + root > 0 else 0.0
