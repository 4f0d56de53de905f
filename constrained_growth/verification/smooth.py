"""Small smooth instances, convex or not, solved by SciPy's trust-constr."""

from __future__ import annotations

import itertools

import numpy as np
from scipy.optimize import LinearConstraint, minimize

from constrained_growth.errors import DataError
from constrained_growth.problem import GrowthProblem
from constrained_growth.verification.extended import ExtendedProblem
from constrained_growth.verification.reports import VerificationReport, report_of


def check_with_scipy(
    problem: GrowthProblem, *, gtol: float = 1e-8, maxiter: int = 1000
) -> VerificationReport:
    """Solve a small instance with SciPy's trust-constr and compare its multipliers with λ there.

    The network may be nonconvex: trust-constr moves from the current θ to a stationary point
    nearby, with gradients and Hessians in (θ, v) from autograd and one `LinearConstraint` v_c = 0
    for each pin. It computes its multipliers from the gradients of its last iterate, so their
    agreement with λ does not depend on `gtol`; that they are KKT multipliers does.

    At a kink (inactive units of a ReLU identity layer) autograd's derivative is the one at v = 0
    itself, so there the comparison is meaningful only if `report.primal` is 0.

    Args:
        problem: The problem, left unchanged.
        gtol: trust-constr stops when no entry of the gradient of the Lagrangian exceeds this.
        maxiter: Maximal number of iterations.

    Returns:
        The report; see `report.dual_error` first, `print(report)` shows everything.

    Raises:
        DataError: The instance is too large for dense Hessians, L is not the same in two passes,
            or trust-constr stops before `gtol`.

    Source:
        Nocedal and Wright, *Numerical Optimization*, 2nd ed. 2006, algorithm 18.4; Lalee, Nocedal
        and Plantenga, *SIAM J. Optim.* 8 (1998) 682-706.

    Example:
        >>> import torch
        >>> from torch import nn
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
            "further first, raise maxiter, or use an instance that has a minimum."
        )
    return report_of(
        extended,
        solver="SciPy, trust-constr",
        status=result.message,
        objective=float(result.fun),
        z=result.x,
        duals=result.v,
    )
