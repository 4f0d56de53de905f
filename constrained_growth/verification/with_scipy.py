"""Small instances solved by SciPy, from values of the loss alone wherever λ is at stake."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from scipy.optimize import LinearConstraint, OptimizeResult, minimize
from torch import Tensor

from constrained_growth._arguments import instance, number, positive_int
from constrained_growth.errors import DataError
from constrained_growth.problem import GrowthProblem
from constrained_growth.verification.extended import (
    ExtendedProblem,
    Vector,
    hessian,
    with_gradient,
)
from constrained_growth.verification.reports import (
    Slope,
    VerificationReport,
    answer_of,
    report_of,
)

_MOST_VARIABLES = 300
"""A Hessian takes as many backward passes, a gradient from differences twice as many passes."""

_STEP = 1e-5
"""Of difference quotients: their errors, of the orders h² and ε/h, are below 1e-9."""

_OFF_THE_PINS = 0.03
"""Standard deviation of v where the solvers start."""

_NEARBY = 10.0
"""How far an entry of θ may move to a local minimum."""

_FLAT = 1e-3
"""Least curvature in θ, over the largest, with which p(ε) is smooth over the ε that are tried."""


def check_with_scipy(
    problem: GrowthProblem, *, gtol: float = 1e-8, maxiter: int = 1000
) -> VerificationReport:
    """Solve a small instance by two solvers of SciPy, and compare their multipliers with λ.

    1. θ moves to a local minimum θ* of L(·, 0), by L-BFGS and some Newton steps. In a valley, where
       ∇²_θθ L is singular or not even stationary points are near, L + μ‖θ − c‖²/2 takes the place
       of L from here on, with the c that makes θ* its minimiser: its multipliers are those of L.
    2. trust-constr and SLSQP solve the constrained problem from a point off the pins, v ≠ 0, with
       gradients in (θ, v) from difference quotients of L, so that their multipliers know nothing
       of any backward pass. One of them may fail; its answer is left out.
    3. There, the gradient of autograd is compared with difference quotients: a block with a wrong
       backward is found.
    4. What decides is the local value function p(ε) = min L(θ, ε) over θ near θ*: it is solved
       anew at several ε along λ of each pin, and its slope compared with −‖λ‖.

    The network may be nonconvex. At a kink (inactive units of a ReLU identity layer) λ is the
    derivative to the left in each entry of the pins, and differences are taken there to that side;
    the value function is followed in the direction −|λ|.

    Args:
        problem: The problem, left unchanged.
        gtol: What is asked of ‖∇_θ L‖ at the local minimum, and of trust-constr.
        maxiter: Maximal number of iterations of each solver.

    Returns:
        The report. `report.passed` says whether everything agrees, `report.checks` what was
        compared, `report.proximal` is μ; the first answer is that of trust-constr, if it has one.

    Raises:
        DataError: The instance is too large, L differs between two passes or reads the model by
            closure, or both solvers fail.

    Source:
        Nocedal and Wright, *Numerical Optimization*, 2nd ed. 2006, algorithms 18.3 and 18.4;
        sensitivity: Fiacco, *Introduction to Sensitivity and Stability Analysis*, 1983, ch. 3.

    Example:
        >>> import constrained_growth as cg
        >>> from torch import nn
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).double()
        >>> _ = net[2].requires_grad_(False)
        >>> x = torch.linspace(-2, 2, 12).double()[:, None]
        >>> data = [(x, 0.3 * x.sin())]
        >>> candidate = cg.Candidate(after="1", block=cg.blocks.ResidualMLP(2, 2, torch.tanh))
        >>> report = check_with_scipy(cg.GrowthProblem(net, nn.MSELoss(), data, [candidate]))
        >>> report.passed, report.dual_error < 1e-5
        (True, True)
    """
    instance("problem", problem, GrowthProblem, DataError, "a cg.GrowthProblem")
    number("gtol", gtol, DataError, "(0, inf)")
    positive_int("maxiter", maxiter, DataError)
    extended = ExtendedProblem(problem)
    extended.refuse_large(_MOST_VARIABLES)
    objective = _Objective(extended, gtol, maxiter)
    start = np.concatenate([objective.theta, np.zeros(sum(extended.sizes[1:]))])
    quotients = _Quotients(objective, _Quotients(objective).kinks(start))
    found = _solved(quotients, gtol, maxiter)
    answers = [answer_of(extended, *one) for one in found]
    best = found[0][3].copy()
    best[extended.sizes[0] :] = 0.0
    gradient = with_gradient(objective.loss, best)[1]
    slopes = [
        _slope(quotients, best, -gradient, begin, begin + size)
        for begin, size in zip(np.cumsum(extended.sizes[:-1]), extended.sizes[1:], strict=True)
    ]
    return report_of(
        answers,
        gradient_error=float(np.linalg.norm(gradient - quotients.gradient(best))),
        slopes=dict(zip(problem.constraints, slopes, strict=True)),
        kinks=int(quotients.at_kinks.sum()),
        proximal=objective.weight,
    )


class _Objective:
    """L(θ, v) + μ‖θ − c‖²/2, at v = 0 with a minimum over θ at `theta`.

    μ = 0 where L itself has a strict minimum there.
    """

    def __init__(self, extended: ExtendedProblem, gtol: float, maxiter: int) -> None:
        self.extended, self.count = extended, extended.sizes[0]
        self.weight, self.centre = 0.0, torch.zeros(self.count, dtype=torch.float64)
        self.theta = self._near(gtol, maxiter)
        if self.count:
            # ∇L + μ(θ − c) = 0 at θ, and ∇² + μI is positive definite: θ is made the minimiser, and
            # as the penalty does not read v, ∇_v stays what it is
            loss = self._of_theta()
            gradient = with_gradient(loss, self.theta)[1]
            lowest, highest = np.linalg.eigvalsh(hessian(loss, self.theta))[[0, -1]]
            if lowest < _FLAT * highest or np.linalg.norm(gradient) > gtol:
                weight = _FLAT * abs(highest) + max(0.0, -lowest)
                weight = float(weight or 1.0)  # 1 for a loss that does not depend on θ
                self.weight, self.centre = weight, torch.from_numpy(self.theta + gradient / weight)

    def loss(self, z: Tensor) -> Tensor:
        """At one point."""
        return self.extended.loss(z) + self._penalty(z)

    def values(self, points: Vector) -> Vector:
        """At several points (points, variables), from values alone."""
        every = torch.from_numpy(points)
        return (self.extended.losses_at(every) + self._penalty(every)).numpy()

    def value(self, z: Vector) -> float:
        """At one point, from values alone."""
        return self.loss(torch.from_numpy(z)).item()

    def _penalty(self, z: Tensor) -> Tensor:
        return self.weight * (z[..., : self.count] - self.centre).square().sum(-1) / 2

    def _of_theta(self, v: Vector | None = None) -> Callable[[Tensor], Tensor]:
        """The function of θ alone, at v = 0 or another v."""
        pins = self.extended.zero[self.count :] if v is None else torch.from_numpy(v)
        return lambda theta: self.loss(torch.cat([theta, pins]))

    def _minimum(self, start: Vector, v: Vector | None = None, **options: Any) -> OptimizeResult:
        """A minimum over θ near `start`, by Newton steps in a trust region."""
        loss = self._of_theta(v)
        return minimize(
            partial(with_gradient, loss),
            start,
            jac=True,
            hess=partial(hessian, loss),
            method="trust-exact",
            options=options,
        )

    def _near(self, gtol: float, maxiter: int) -> Vector:
        """θ of a local minimum of L(·, 0), or where L-BFGS and Newton steps have come to."""
        start, loss = self.centre.numpy(), self._of_theta()
        if not self.count:
            return start
        # not far along a valley, at whose end there are no digits left
        first = minimize(
            partial(with_gradient, loss),
            start,
            jac=True,
            method="L-BFGS-B",
            bounds=[(-_NEARBY, _NEARBY)] * self.count,
            options={"gtol": 1e-6, "ftol": 0.0, "maxiter": maxiter},
        )
        if not np.isfinite(first.fun):
            return start
        lowest, highest = np.linalg.eigvalsh(hessian(loss, first.x))[[0, -1]]
        if lowest < 1e-6 * highest:  # in a valley Newton steps lead far away, and not to a minimum
            return first.x
        more = self._minimum(
            first.x,
            gtol=gtol,
            maxiter=min(maxiter, 100),
            initial_trust_radius=0.1,
            max_trust_radius=1.0,
        )
        return min(first, more, key=lambda found: np.linalg.norm(found.jac)).x

    def smallest(self, v: Vector) -> float:
        """p(v), its minimum over θ near that at v = 0."""
        if not self.count:
            return self.value(v)
        return float(self._minimum(self.theta, v, gtol=1e-9, maxiter=50).fun)


class _Quotients:
    """Difference quotients: central ones, and to the left in the variables at `kinks`."""

    def __init__(self, objective: _Objective, kinks: Vector | None = None) -> None:
        self.objective = objective
        size = len(objective.extended.zero)
        self.at_kinks = np.zeros(size, bool) if kinks is None else kinks

    def gradient(self, z: Vector) -> Vector:
        """∇ at z."""
        steps = _STEP * np.eye(len(z))
        one, other = np.where(self.at_kinks, -1, 1), np.where(self.at_kinks, -2, -1)
        ahead, behind = (self.objective.values(z + side[:, None] * steps) for side in (one, other))
        central = ahead - behind
        if not self.at_kinks.any():
            return central / (2 * _STEP)
        to_left = 3 * self.objective.value(z) - 4 * ahead + behind  # to second order
        return np.where(self.at_kinks, to_left, central) / (2 * _STEP)

    def kinks(self, z: Vector) -> Vector:
        """In which pins the slopes to both sides differ by more than their errors, shape of z."""
        here = self.objective.value(z)
        pins = np.eye(len(z))[self.objective.count :]
        small, large = (  # of a smooth function they grow by 4, at a kink by 2
            np.abs(
                self.objective.values(z + h * pins) - 2 * here + self.objective.values(z - h * pins)
            )
            for h in (_STEP, 2 * _STEP)
        )
        found, noise = np.zeros(len(z), bool), 1e-12 * abs(here)  # of the values themselves
        found[self.objective.count :] = (large > noise) & (large < 3 * small)
        return found


def _solved(
    quotients: _Quotients, gtol: float, maxiter: int
) -> list[tuple[str, str, float, Vector, Vector]]:
    """Name, message, L, z and multipliers of each solver that gets to the pins."""
    objective = quotients.objective
    extended, count = objective.extended, objective.count
    # started at the pins, a solver could stop where it starts and report any multiplier
    off = np.random.default_rng(0).normal(scale=_OFF_THE_PINS, size=sum(extended.sizes[1:]))
    start = np.concatenate([objective.theta, off])
    solvers: dict[str, dict[str, Any]] = {
        "trust-constr": {
            "hess": partial(hessian, objective.loss),
            "options": {"gtol": gtol, "xtol": 1e-14, "maxiter": maxiter},
        },
        "SLSQP": {"options": {"ftol": 1e-15, "maxiter": maxiter}},
    }
    pins = LinearConstraint(np.eye(len(start))[count:], 0.0, 0.0)
    found, failed = [], []
    for method, options in solvers.items():
        result = minimize(
            objective.value,
            start,
            jac=quotients.gradient,
            method=method,
            constraints=[pins],
            **options,
        )
        name = f"SciPy, {method}"
        if result.success and np.abs(result.x[count:]).max() <= 1e-8:
            value = extended.loss(torch.from_numpy(result.x)).item()
            # those of SLSQP are of the opposite sign
            duals = result.v[0] if method == "trust-constr" else -result.multipliers
            found.append((name, result.message, value, result.x, duals))
        else:
            failed.append(f"{name}: {result.message}")
    if not found:
        raise DataError(
            f"both solvers fail ({'; '.join(failed)}); train the model further, raise "
            f"maxiter={maxiter}, or use an instance that has a minimum."
        )
    return found


def _slope(quotients: _Quotients, z: Vector, steepest: Vector, begin: int, end: int) -> Slope:
    """The slope of the local value function along λ of one pin, from solving at several ε.

    Along −|λ|, and to that side only, where the pin is at a kink.
    """
    objective = quotients.objective
    kinked = bool(quotients.at_kinks[begin:end].any())
    own = -np.abs(steepest[begin:end]) if kinked else steepest[begin:end]
    size = np.linalg.norm(own)
    own = own / size if size else np.full(len(own), len(own) ** -0.5)
    direction = np.zeros(len(z))
    direction[begin:end] = own
    direction = direction[objective.count :]

    def value(step: float) -> float:
        return objective.smallest(step * direction)

    # ever smaller, until two steps agree: p bends, and has errors of the solves in it
    slope, here = np.nan, value(0.0)
    for h in (0.02, 0.005, 0.00125):
        if kinked:
            pair = [(4 * value(t / 2) - 3 * here - value(t)) / t for t in (h, h / 2)]
        else:
            pair = [(value(t) - value(-t)) / (2 * t) for t in (h, h / 2)]
        slope = (4 * pair[1] - pair[0]) / 3  # extrapolated to h = 0
        if abs(pair[1] - pair[0]) <= 1e-3 * abs(slope):
            break
    return Slope(torch.from_numpy(own), float(slope))
