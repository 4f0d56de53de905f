"""What a candidate offers beyond what the parameters of the model could do anyway."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from constrained_growth.curvature import VirtualLoss, gauss_newton
from constrained_growth.problem import GrowthProblem
from constrained_growth.solution import Planned


def gains_beyond_old(
    problem: GrowthProblem,
    candidates: Mapping[str, Planned],
    *,
    damping: float = 1e-2,
    max_products: int = 20,
    tolerance: float = 1e-3,
) -> tuple[dict[str, float], float]:
    """The predicted decrease in (θ, v) together, less that in θ alone, for each candidate.

    With the Gauss–Newton matrix B and g = (∇_θ L, −λ) it is

        ½⟨g, (B + μI)⁻¹ g⟩ − ½⟨g_θ, (B_θθ + μI)⁻¹ g_θ⟩ = ½⟨λ̃, S⁻¹ λ̃⟩ ≥ 0,

        λ̃ = λ + B_vθ (B_θθ + μI)⁻¹ g_θ,   S = B_vv + μI − B_vθ (B_θθ + μI)⁻¹ B_θv,

    the best that the Schur complement S of the old parameters promises. Solved by conjugate
    gradients, for all candidates from the solution in θ alone.

    Args:
        problem: The problem.
        candidates: From `solution.candidates`.
        damping: μ, relative to the curvature of B along ∇_θ L (along g, where that is zero).
        max_products: At most so many products with B for each candidate, and five times as many
            for θ alone.
        tolerance: Conjugate gradients stop when the residual has fallen by this factor; in θ
            alone by its square, since what is left undone there is counted as a gain.

    Returns:
        Candidate → gain, and what that has cost in gradient passes.

    Source:
        Nocedal and Wright, *Numerical Optimization*, 2nd ed. 2006, sections 10.3 and 5.1; the
        products: Schraudolph, *Fast curvature matrix-vector products*, 2002.
    """
    losses = {name: VirtualLoss(problem, one, joint=True) for name, one in candidates.items()}
    gains: dict[str, float] = {}
    start: Tensor | None = None
    shift = 0.0
    for name, loss in losses.items():
        gradient = loss.gradient()
        old = loss.num_old
        if start is None:
            shift = damping * _curvature_along(loss, gradient)
            alone, _ = conjugate_gradients(
                _on_old(loss, shift),
                -gradient[:old],
                torch.zeros_like(gradient[:old]),
                max_products=5 * max_products,
                tolerance=tolerance**2,
            )
            start = alone
        begin = torch.cat([start, torch.zeros_like(gradient[old:])])
        _, gains[name] = conjugate_gradients(
            _shifted(loss, shift),
            -gradient,
            begin,
            max_products=max_products,
            tolerance=tolerance,
        )
    return gains, sum(loss.passes for loss in losses.values())


def conjugate_gradients(
    product: Callable[[Tensor], Tensor],
    rhs: Tensor,
    start: Tensor,
    *,
    max_products: int,
    tolerance: float,
) -> tuple[Tensor, float]:
    """Solve B z = b, B positive definite, from a start; and by how much ½⟨z, B z⟩ − ⟨b, z⟩ falls.

    Args:
        product: z ↦ B z.
        rhs: b.
        start: Where to begin.
        max_products: At most so many products, after the one at the start.
        tolerance: Stops when ‖b − B z‖ is at most this times what it was at the start.

    Example:
        >>> conjugate_gradients(
        ...     lambda z: 2 * z,
        ...     torch.tensor([4.0]),
        ...     torch.tensor([0.0]),
        ...     max_products=3,
        ...     tolerance=1e-6,
        ... )
        (tensor([2.]), 4.0)
    """
    z, fall = start, 0.0
    residual = rhs - product(start) if bool(start.any()) else rhs
    p, square = residual, float(residual @ residual)
    stop = tolerance**2 * square
    for _ in range(max_products):
        if square <= stop:
            break
        bp = product(p)
        curvature = float(p @ bp)
        if not curvature > 0:
            break
        length = square / curvature
        z = z + length * p
        fall += length * square / 2
        residual = residual - length * bp
        before, square = square, float(residual @ residual)
        p = residual + (square / before) * p
    return z, fall


def _shifted(loss: VirtualLoss, shift: float) -> Callable[[Tensor], Tensor]:
    """The product z ↦ (B + μI) z."""
    return lambda z: gauss_newton(loss, z) + shift * z


def _on_old(loss: VirtualLoss, shift: float) -> Callable[[Tensor], Tensor]:
    """The product t ↦ (B_θθ + μI) t."""

    def product(t: Tensor) -> Tensor:
        padded = torch.cat([t, t.new_zeros(loss.size)])
        return gauss_newton(loss, padded)[: loss.num_old] + shift * t

    return product


def _curvature_along(loss: VirtualLoss, gradient: Tensor) -> float:
    """⟨u, B u⟩/⟨u, u⟩ for u = ∇_θ L, or for the whole gradient; 1 where that is no scale."""
    old = loss.num_old
    u = torch.cat([gradient[:old], torch.zeros_like(gradient[old:])])
    u = u if bool(u.any()) else gradient
    square = float(u @ u)
    found = float(u @ gauss_newton(loss, u)) / square if square > 0 else 0.0
    return found if found > 0 else 1.0
