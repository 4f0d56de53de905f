"""Small instances solved by SciPy, from values of the loss alone wherever λ is at stake."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
from scipy.optimize import BFGS, LinearConstraint, OptimizeResult, minimize

from constrained_growth._arguments import instance, number, positive_int
from constrained_growth.errors import DataError
from constrained_growth.problem import GrowthProblem
from constrained_growth.verification.extended import ExtendedProblem, Vector
from constrained_growth.verification.reports import (
    Slope,
    VerificationReport,
    answer_of,
    report_of,
)

_MOST_VARIABLES = 500
"""Of SLSQP, whose steps cost their number cubed, and gradients from differences twice as many
passes."""

_NEWTON = 300
"""Up to so many parameters have a Hessian, from as many double backward passes."""

_STEP = 1e-5
"""Of difference quotients: their errors, of the orders h² and ε/h, are below 1e-9."""

_OFF_THE_PINS = 0.03
"""Standard deviation of v where the solvers start."""


def check_with_scipy(
    problem: GrowthProblem, *, gtol: float = 1e-8, maxiter: int = 1000
) -> VerificationReport:
    """Solve a small instance by two solvers of SciPy, and compare their multipliers with λ.

    1. θ is moved to a local minimum of L(·, 0) nearby, by BFGS and trust-exact.
    2. SLSQP and trust-constr solve the constrained problem from a point off the pins, v ≠ 0, with
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
        gtol: Largest entry of ∇_θ L at the local minimum.
        maxiter: Maximal number of iterations of each solver.

    Returns:
        The report. `report.passed` says whether everything agrees, `report.checks` what was
        compared; the first answer is that of trust-constr, if it has one.

    Raises:
        DataError: The instance is too large, L differs between two passes or reads the model by
            closure, there is no minimum to `gtol` nearby, or both solvers fail.

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
    count = extended.sizes[0]
    pinned = np.zeros(sum(extended.sizes[1:]))
    theta = _minimum(extended, np.zeros(count), pinned, gtol, maxiter)
    kinks = _Quotients(extended).kinks(np.concatenate([theta, pinned]))
    quotients = _Quotients(extended, kinks)
    found = _solved(quotients, theta, maxiter)
    answers = [answer_of(extended, *one) for one in found]
    best = np.concatenate([found[0][3][:count], pinned])
    _, gradient = extended.loss_and_gradient(best)
    mistake = np.abs(gradient - quotients.gradient(best))
    slopes = [
        _slope(extended, best, begin, begin + size, bool(kinks[begin : begin + size].any()), gtol)
        for begin, size in zip(np.cumsum(extended.sizes[:-1]), extended.sizes[1:], strict=True)
    ]
    return report_of(
        answers,
        gradient_error=float(np.linalg.norm(mistake)),
        slopes=dict(zip(problem.constraints, slopes, strict=True)),
        kinks=int(kinks.sum()),
    )


def _minimum(
    extended: ExtendedProblem, start: Vector, v: Vector, gtol: float, maxiter: int
) -> Vector:
    """θ of a local minimum of L(·, v) near another one."""
    if not start.size:
        return start
    loss, hessian = extended.of_theta(v)
    result = minimize(
        loss, start, jac=True, method="BFGS", options={"gtol": gtol, "maxiter": maxiter}
    )
    if np.abs(result.jac).max() > gtol and start.size <= _NEWTON:
        result = _newton(loss, hessian, result.x, gtol, maxiter)
    size = np.abs(result.jac).max()
    if not size <= gtol:
        raise DataError(
            f"{result.nit} iterations, of at most maxiter={maxiter}, end with a gradient of "
            f"{size:.1e} in θ, above gtol={gtol:g} ({result.message}); train the model further, raise "
            "maxiter, or use an instance that has a minimum."
        )
    return result.x


def _newton(loss: Any, hessian: Any, start: Vector, gtol: float, maxiter: int) -> OptimizeResult:
    options = {"gtol": gtol, "maxiter": maxiter}
    return minimize(loss, start, jac=True, hess=hessian, method="trust-exact", options=options)


class _Quotients:
    """Difference quotients of L: central ones, and to the left in the variables at `kinks`."""

    def __init__(self, extended: ExtendedProblem, kinks: Vector | None = None) -> None:
        self.extended = extended
        self.at_kinks = np.zeros(extended.zero.numel(), bool) if kinks is None else kinks

    def gradient(self, z: Vector) -> Vector:
        """∇L at z."""
        here = self.extended.value(z) if self.at_kinks.any() else 0.0
        return np.array([self._entry(z, i, here) for i in range(len(z))])

    def _entry(self, z: Vector, i: int, here: float) -> float:
        step = np.zeros_like(z)
        step[i] = _STEP
        value = self.extended.value
        if self.at_kinks[i]:  # to second order
            return (3 * here - 4 * value(z - step) + value(z - 2 * step)) / (2 * _STEP)
        return (value(z + step) - value(z - step)) / (2 * _STEP)

    def kinks(self, z: Vector) -> Vector:
        """In which pins the slopes to both sides differ by more than their errors, shape of z."""
        found, value, here = np.zeros(len(z), bool), self.extended.value, self.extended.value(z)
        for i in range(self.extended.sizes[0], len(z)):
            bends = []
            for step in (_STEP, 2 * _STEP):  # of a smooth L they grow by 4, at a kink by 2
                moved = np.zeros_like(z)
                moved[i] = step
                bends.append(abs(value(z + moved) - 2 * here + value(z - moved)))
            noise = 1e-13 * abs(here)  # of the loss itself
            found[i] = bends[1] > noise and bends[1] < 3 * bends[0]
        return found


def _solved(
    quotients: _Quotients, theta: Vector, maxiter: int
) -> list[tuple[str, str, float, Vector, Vector]]:
    """Name, message, L, z and multipliers of each solver that gets to the pins."""
    extended, count = quotients.extended, len(theta)
    off = np.random.default_rng(0).normal(scale=_OFF_THE_PINS, size=sum(extended.sizes[1:]))
    start = np.concatenate([theta, off])
    pins = np.eye(len(start))[count:]

    def slsqp() -> tuple[OptimizeResult, Vector]:
        constraint = {"type": "eq", "fun": lambda z: z[count:], "jac": lambda z: pins}
        result = minimize(
            extended.value,
            start,
            jac=quotients.gradient,
            method="SLSQP",
            constraints=[constraint],
            options={"ftol": 1e-14, "maxiter": maxiter},
        )
        return result, -result.multipliers  # of the opposite sign

    def trust_constr() -> tuple[OptimizeResult, Vector]:
        result = minimize(
            extended.value,
            start,
            jac=quotients.gradient,
            hess=extended.hessian if len(start) <= _NEWTON else BFGS(),
            method="trust-constr",
            constraints=[LinearConstraint(pins, 0.0, 0.0)],
            options={"gtol": 1e-8, "xtol": 1e-14, "maxiter": maxiter},
        )
        return result, result.v[0]

    found, failed = [], []
    solvers: dict[str, Callable[[], tuple[OptimizeResult, Vector]]] = {
        "SciPy, trust-constr": trust_constr,
        "SciPy, SLSQP": slsqp,
    }
    for name, solver in solvers.items():
        result, multipliers = solver()
        if result.success and np.abs(result.x[count:]).max() <= 1e-8:
            found.append((name, result.message, float(result.fun), result.x, multipliers))
        else:
            failed.append(f"{name}: {result.message}")
    if not found:
        raise DataError(
            f"both solvers fail ({'; '.join(failed)}); train the model further, raise "
            f"maxiter={maxiter}, or use an instance that has a minimum."
        )
    return found


def _slope(
    extended: ExtendedProblem, z: Vector, begin: int, end: int, kinked: bool, gtol: float
) -> Slope:
    """The slope of the local value function along λ of one pin, from solving at several ε.

    Along −|λ|, and to that side only, where the pin is at a kink.
    """
    count = extended.sizes[0]
    _, gradient = extended.loss_and_gradient(z)
    direction = np.zeros(len(z) - count)
    own = -gradient[begin:end]
    own = -np.abs(own) if kinked else own
    size = np.linalg.norm(own)
    own = own / size if size else np.full(len(own), len(own) ** -0.5)
    direction[begin - count : end - count] = own
    found, theta = [], z[:count]
    loss_at_pins = extended.value(z)

    def value(step: float) -> float:
        near = _minimum(extended, theta, step * direction, gtol, 1000)
        return extended.value(np.concatenate([near, step * direction]))

    for h in (0.02, 0.005, 0.00125):
        if kinked:
            pair = [(4 * value(t / 2) - 3 * loss_at_pins - value(t)) / t for t in (h, h / 2)]
        else:
            pair = [(value(t) - value(-t)) / (2 * t) for t in (h, h / 2)]
        found.append((4 * pair[1] - pair[0]) / 3)  # extrapolated to h = 0
        if abs(pair[1] - pair[0]) <= 1e-3 * abs(found[-1]):
            break
    return Slope(torch.from_numpy(own), found[-1])
