"""Symmetric matrices known by their products: Lanczos' method, and the trust-region subproblem."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator
from typing import NamedTuple

import torch
from torch import Tensor

Product = Callable[[Tensor], Tensor]  # s ↦ B s


def lanczos(product: Product, start: Tensor) -> Iterator[tuple[Tensor, Tensor, float]]:
    """After each product with B: orthonormal rows Q, Q B Qᵀ, and how far B Qᵀ is from their span.

    The rows span start, B start, B² start, …; the iteration ends where these do, or when a product
    is not finite. Golub and Van Loan, *Matrix Computations*, 4th ed. 2013, section 10.1.
    """
    # scipy.sparse.linalg would copy vectors as long as (θ, v) to the CPU
    basis, diagonal, beside = start.new_zeros(0, len(start)), [], []
    vector = start / start.norm()
    while len(basis) < len(start):
        basis = torch.cat([basis, vector[None]])
        image = product(vector)
        diagonal.append(vector @ image)
        for _ in range(2):  # once is not enough: the rounding errors would grow
            image = image - basis.mT @ (basis @ image)
        below = torch.stack(beside) if beside else start.new_zeros(0)
        beside.append(image.norm())
        matrix = torch.stack(diagonal).diag() + below.diag(1) + below.diag(-1)
        yield basis, matrix, float(beside[-1])
        if not beside[-1] > 1e-12 * max(map(abs, diagonal)):
            return
        vector = image / beside[-1]


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
    """Minimise −⟨λ, s⟩ + ½⟨s, B s⟩ over ‖s‖ ≤ Δ; B is symmetric, possibly indefinite.

    Exactly, with one product for each entry of λ, if `max_products` are enough for that. Otherwise
    over the span of λ, B λ, B² λ, …, until the gradient of the model and the constraint is at most
    `tolerance` times ‖λ‖ for the largest `radius` that will be needed (Gould, Lucidi, Roma and
    Toint, *Solving the trust-region subproblem using the Lanczos method*, 1999). All products are
    spent at once; steps for smaller radii come at no further cost. λ is flat and in float64.
    """

    def nothing(_: float) -> Step:
        return Step(torch.zeros_like(multiplier), 0.0, False)

    steps: Steps = nothing
    if multiplier.numel() <= max_products:
        eye = torch.eye(multiplier.numel(), dtype=multiplier.dtype, device=multiplier.device)
        spans = iter([(eye, torch.stack([product(column) for column in eye]), 0.0)])
    else:  # where λ = 0, some direction may bend downwards
        spans = lanczos(product, multiplier if multiplier.any() else torch.ones_like(multiplier))
    for basis, matrix, beside in spans:
        if not bool(matrix.isfinite().all()):
            break
        steps = _exact(multiplier, basis, matrix)
        residual = beside * abs(float(basis[-1] @ steps(radius).vector))
        if len(basis) == max_products or residual <= tolerance * float(multiplier.norm()):
            break
    return steps


def _exact(multiplier: Tensor, basis: Tensor, matrix: Tensor) -> Steps:
    """The minimum over the span of orthonormal rows, in which B is a small matrix.

    s = (B + μI)⁻¹ λ with the μ ≥ max(0, −smallest eigenvalue) for which ‖s‖ = Δ, or μ = 0 if that
    step is shorter. In the hard case no such μ exists, and a multiple of an eigenvector for the
    smallest eigenvalue is added. Moré and Sorensen, *Computing a trust region step*, 1983;
    Nocedal and Wright, *Numerical Optimization*, 2nd ed. 2006, section 4.3.
    """
    from scipy.optimize import root_scalar  # seconds to import

    values, vectors = torch.linalg.eigh((matrix + matrix.mT) / 2)
    slope, lowest = vectors.mT @ (basis @ multiplier), float(values[0])

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
        return Step(basis.mT @ (vectors @ y), max(predicted, 0.0), at_boundary)

    return step
