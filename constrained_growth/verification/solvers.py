"""Small instances solved by CVXPY (convex ones) and by SciPy's trust-constr (smooth ones)."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
import torch
import torch.nn.functional as F
from scipy.optimize import LinearConstraint, minimize
from torch import Tensor, nn

from constrained_growth._arguments import function, instance, number, positive_int
from constrained_growth.errors import DataError
from constrained_growth.problem import GrowthProblem
from constrained_growth.verification.extended import ExtendedProblem
from constrained_growth.verification.reports import VerificationReport, report_of

Scalar = cp.Expression | float
CvxpyLoss = Callable[[cp.Expression, Tensor], Scalar]
"""`(output, target) -> scalar convex expression`, the mean over the samples of a batch."""

# With default settings except the tolerances Clarabel gives up early on some logistic instances (3
# of 50 random ones, duals off by 1e-4). With refined linear systems and shorter steps it finished
# all of them, with duals off by at most 2e-7.
_CLARABEL: dict[str, Any] = {
    "tol_gap_abs": 1e-12,
    "tol_gap_rel": 1e-12,
    "tol_feas": 1e-12,
    "iterative_refinement_reltol": 1e-15,
    "iterative_refinement_abstol": 1e-15,
    "iterative_refinement_max_iter": 50,
    "static_regularization_constant": 1e-10,
    "max_step_fraction": 0.8,
}


def check_with_cvxpy(
    problem: GrowthProblem,
    *,
    cvxpy_loss: CvxpyLoss | None = None,
    solver: str = cp.CLARABEL,
    options: Mapping[str, Any] | None = None,
) -> VerificationReport:
    """Solve a convex instance with CVXPY and compare its dual values with λ at its optimum.

    An instance is convex if the network output is affine in (θ, v_c) jointly for each candidate
    c, which is checked, and the loss is convex in the output. So nonlinear layers, and every layer
    that multiplies a pinned layer, must be frozen (`requires_grad_(False)`). Products of the v of
    several candidates on one path do not affect any multiplier and are left out.

    Args:
        problem: The problem, left unchanged. The trainable parameters may have any values.
        cvxpy_loss: `cvxpy_loss(output, target)`, the `loss_fn` of the problem for a CVXPY
            expression of the shape of the output. None (default) knows the mean forms of
            `MSELoss`, `CrossEntropyLoss` and `BCEWithLogitsLoss`, as modules and as functions.
        solver: One of `cvxpy.installed_solvers()`.
        options: Its options; None (default) asks Clarabel for tolerances of 1e-12.

    Raises:
        DataError: The output is not affine in (θ, v), or not a tensor of one or two dimensions;
            the loss has no known CVXPY form, or another value there; or there is no optimum.

    Source:
        Boyd and Vandenberghe, *Convex Optimization*, 2004, sections 5.5.3 and 5.6.

    Example:
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        >>> for parameter in (*net[0].parameters(), net[2].weight):
        ...     _ = parameter.requires_grad_(False)
        >>> data = [(torch.randn(8, 2).double(), torch.randn(8, 1).double())]
        >>> candidate = cg.Candidate(after="1", block=cg.blocks.ResidualMLP(3, 2, torch.tanh))
        >>> report = check_with_cvxpy(cg.GrowthProblem(net, nn.MSELoss(), data, [candidate]))
        >>> report.status, report.dual_error < 1e-6
        ('optimal', True)
    """
    instance("problem", problem, GrowthProblem, DataError, "a cg.GrowthProblem")
    if cvxpy_loss is not None:
        function("cvxpy_loss", cvxpy_loss, DataError, "a function of CVXPY expressions")
    if options is not None:
        instance("options", options, Mapping, DataError, "a dict")
    if solver not in cp.installed_solvers():
        raise DataError(
            f"solver={solver!r} is not installed; give one of {cp.installed_solvers()}."
        )
    extended = ExtendedProblem(problem)
    pieces = _affine_outputs(extended)
    loss = cvxpy_loss or _known_loss(problem.loss_fn)
    _check_loss(extended, loss, pieces)
    _, *pins = variables = [cp.Variable(size) for size in extended.sizes]
    z = cp.hstack(variables)
    terms = []
    if options is None:
        options = _CLARABEL if solver == cp.CLARABEL else {}
    for (offset, matrix), (_, target, weight) in zip(pieces, extended.batches, strict=True):
        flat = offset.flatten().numpy() + matrix.numpy() @ z
        output = cp.reshape(flat, tuple(offset.shape), order="C")
        terms.append((weight / extended.total_weight) * loss(output, target))
    constraints: list[cp.Constraint] = [pin == 0 for pin in pins]
    objective = cp.sum(cp.hstack(terms))
    convex = cp.Problem(cp.Minimize(objective), constraints)
    try:
        convex.solve(solver=solver, **options)
    except cp.SolverError as error:
        raise DataError(
            f"solver={solver!r} fails: {error} Try other options=, or {cp.installed_solvers()}."
        ) from error
    if convex.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        raise DataError(
            f"solver={solver!r} returns {convex.status!r}: it finds no minimum; use more data, or "
            "a loss that is bounded below and attains its minimum."
        )
    return report_of(
        extended,
        f"CVXPY, {solver}",
        convex.status,
        float(np.asarray(convex.value)),
        np.asarray(z.value),
        [np.asarray(constraint.dual_value) for constraint in constraints],
    )


def check_with_scipy(
    problem: GrowthProblem, *, gtol: float = 1e-8, maxiter: int = 1000
) -> VerificationReport:
    """Solve a small instance with SciPy's trust-constr and compare its multipliers with λ there.

    The network may be nonconvex: trust-constr moves from the current θ to a stationary point
    nearby, with gradients and Hessians in (θ, v) from autograd and one `LinearConstraint` v_c = 0
    for each pin. It computes its multipliers from the gradients of its last iterate, so their
    agreement with λ does not depend on `gtol`; that they are KKT multipliers does.

    At a kink (inactive units of a ReLU identity layer) the comparison is meaningful only if
    `report.primal` is 0, as autograd's derivative is the one at v = 0 itself.

    Args:
        problem: The problem, left unchanged.
        gtol: trust-constr stops when no entry of the gradient of the Lagrangian exceeds this.
        maxiter: Maximal number of iterations.

    Raises:
        DataError: The instance is too large, L differs between two passes, or trust-constr stops
            before `gtol`.

    Source:
        Nocedal and Wright, *Numerical Optimization*, 2nd ed. 2006, algorithm 18.4; Lalee, Nocedal
        and Plantenga, *SIAM J. Optim.* 8 (1998) 682-706.

    Example:
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(1, 2), nn.Tanh(), nn.Linear(2, 1)).double()
        >>> _ = net[2].requires_grad_(False)
        >>> x = torch.linspace(-2, 2, 12).double()[:, None]
        >>> data = [(x, 0.3 * x.sin())]
        >>> candidate = cg.Candidate(after="1", block=cg.blocks.ResidualMLP(2, 2, torch.tanh))
        >>> report = check_with_scipy(cg.GrowthProblem(net, nn.MSELoss(), data, [candidate]))
        >>> report.primal, report.dual_error < 1e-5
        (0.0, True)
    """
    instance("problem", problem, GrowthProblem, DataError, "a cg.GrowthProblem")
    number("gtol", gtol, DataError, "(0, inf)")
    positive_int("maxiter", maxiter, DataError)
    extended = ExtendedProblem(problem)
    bounds = np.cumsum(extended.sizes)
    identity = np.eye(bounds[-1])
    result = minimize(
        extended.loss_and_gradient,
        np.zeros(bounds[-1]),
        jac=True,
        hess=extended.hessian,
        method="trust-constr",
        constraints=[
            LinearConstraint(identity[start:stop], 0.0, 0.0)
            for start, stop in itertools.pairwise(bounds)
        ],
        options={"gtol": gtol, "xtol": np.finfo(np.float64).eps, "maxiter": maxiter},
    )
    if not (result.optimality <= gtol and result.constr_violation <= gtol):
        raise DataError(
            f"trust-constr stopped after {result.nit} iterations with a gradient of the Lagrangian "
            f"of {result.optimality:.1e}, above gtol={gtol:g} ({result.message}); train the model "
            "further, raise maxiter, or use an instance that has a minimum."
        )
    solver = "SciPy, trust-constr"
    return report_of(extended, solver, result.message, float(result.fun), result.x, result.v)


def _affine_outputs(extended: ExtendedProblem) -> list[tuple[Tensor, Tensor]]:
    """(y₀, J) of each batch with output y(z) = y₀ + J z; J of shape (numel of y₀, variables)."""
    with torch.no_grad():
        offsets = extended.outputs(extended.zero)
    for output in offsets:
        if not isinstance(output, Tensor) or output.dim() not in (1, 2):
            given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise DataError(
                f"the output of model={type(extended.problem.model).__name__} is {given}; CVXPY "
                "takes tensors of one or two dimensions. Use check_with_scipy."
            )
    jacobians = torch.autograd.functional.jacobian(
        lambda z: tuple(y.flatten() for y in extended.outputs(z)), extended.zero
    )
    pieces = list(zip(offsets, jacobians, strict=True))
    if guilty := _not_affine(extended, pieces):
        raise DataError(
            f"the output of model={type(extended.problem.model).__name__} is not affine in "
            f"{guilty}, so the instance is not convex. Freeze nonlinear layers and those that "
            "multiply a pinned layer with requires_grad_(False), pin the outer factor of a "
            "ResidualMLP, or use check_with_scipy."
        )
    return pieces


def _not_affine(extended: ExtendedProblem, pieces: Sequence[tuple[Tensor, Tensor]]) -> str:
    """The variables in which the output is not y₀ + J z, or ""; tried at two random points each.

    With the pins of one candidate at a time, as products across candidates do not matter.
    """
    generator = torch.Generator().manual_seed(0)

    def is_bent(*moved: str) -> bool:
        mask = torch.cat([torch.full((size,), n in moved) for n, size in extended.parts.items()])
        for _ in range(2):
            z = torch.randn(mask.shape, generator=generator, dtype=torch.float64) * mask
            for y, (offset, matrix) in zip(extended.outputs(z), pieces, strict=True):
                line = offset.flatten() + matrix @ z
                if not torch.allclose(y.flatten(), line, rtol=1e-9, atol=1e-9):
                    return True
        return False

    for variables in extended.families:
        if is_bent(*variables):
            alone = [(name,) for name in variables if is_bent(name)]
            pairs = (pair for pair in itertools.combinations(variables, 2) if is_bent(*pair))
            groups = ([extended.names[key] for key in group] for group in alone or pairs)
            return ", ".join(map(" times ".join, groups))
    return ""


def _cross_entropy(output: cp.Expression, target: Tensor) -> Scalar:
    hot = F.one_hot(target, output.shape[1]).numpy()
    return cp.mean(cp.log_sum_exp(output, axis=1) - cp.sum(cp.multiply(hot, output), axis=1))


def _known_loss(loss_fn: object) -> CvxpyLoss:
    if isinstance(loss_fn, nn.MSELoss) or loss_fn is F.mse_loss:
        return lambda output, target: cp.mean(cp.square(output - target.numpy()))
    if isinstance(loss_fn, nn.CrossEntropyLoss) or loss_fn is F.cross_entropy:
        return _cross_entropy
    if isinstance(loss_fn, nn.BCEWithLogitsLoss) or loss_fn is F.binary_cross_entropy_with_logits:
        return lambda output, target: cp.mean(
            cp.logistic(output) - cp.multiply(target.numpy(), output)
        )
    raise DataError(
        f"loss_fn={loss_fn!r} has no known form for CVXPY (only MSELoss, CrossEntropyLoss and "
        "BCEWithLogitsLoss have); give cvxpy_loss=, a function (output expression, target) -> "
        "convex scalar expression."
    )


def _check_loss(
    extended: ExtendedProblem, loss: CvxpyLoss, pieces: Sequence[tuple[Tensor, Tensor]]
) -> None:
    """Refuse an expression that differs from the loss, as by class weights or smoothing."""
    generator = torch.Generator().manual_seed(0)
    for (offset, _), (_, target, _) in zip(pieces, extended.batches, strict=True):
        output = torch.randn(offset.shape, generator=generator, dtype=torch.float64)
        ours = extended.loss_fn(output, target).item()
        try:
            value = loss(cp.Constant(output.numpy()), target)
            theirs = float(np.asarray(value.value if isinstance(value, cp.Expression) else value))
        except Exception as error:
            raise DataError(
                f"loss_fn={extended.problem.loss_fn!r}: its CVXPY form fails on an output of shape "
                f"{tuple(offset.shape)} ({error}); give a cvxpy_loss= that fits the targets."
            ) from error
        if not math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-12):
            raise DataError(
                f"loss_fn={extended.problem.loss_fn!r} is {ours:.12g} for a random output and its "
                f"form for CVXPY {theirs:.12g}; give the same function as cvxpy_loss=, including "
                "options such as weight=, label_smoothing= or reduction=."
            )
