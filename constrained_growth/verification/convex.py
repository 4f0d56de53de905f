"""Convex instances, solved by CVXPY."""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import cvxpy as cp
import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor, nn

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
_OPTIONS: dict[str, dict[str, Any]] = {
    cp.CLARABEL: {
        "tol_gap_abs": 1e-12,
        "tol_gap_rel": 1e-12,
        "tol_feas": 1e-12,
        "iterative_refinement_reltol": 1e-15,
        "iterative_refinement_abstol": 1e-15,
        "iterative_refinement_max_iter": 50,
        "static_regularization_constant": 1e-10,
        "max_step_fraction": 0.8,
    },
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
    that multiplies a pinned layer, must be frozen (`requires_grad_(False)`); outer factors of
    `ResidualMLP` enter linearly. Several candidates may lie on one path: products of their v are
    of second order at v = 0, do not affect any multiplier, and are left out.

    Args:
        problem: The problem, left unchanged. The trainable parameters may have any values.
        cvxpy_loss: `cvxpy_loss(output, target)`, the `loss_fn` of the problem for a CVXPY
            expression of the shape of the output. None (default) knows the mean forms of
            `MSELoss`, `CrossEntropyLoss` and `BCEWithLogitsLoss`, as modules and as functions.
        solver: One of `cvxpy.installed_solvers()`.
        options: Its options; None (default) asks Clarabel for tolerances of 1e-12 and shorter
            steps, and uses the defaults of other solvers.

    Returns:
        The report; see `report.dual_error` first, `print(report)` shows everything.

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
    extended = ExtendedProblem(problem)
    pieces = _affine_outputs(extended)
    loss = cvxpy_loss or _known_loss(problem.loss_fn)
    _check_loss(extended, loss, pieces)
    _, *pins = variables = [cp.Variable(size) for size in extended.sizes]
    z = cp.hstack(variables)
    terms = []
    for (offset, matrix), (_, target, weight) in zip(pieces, extended.batches, strict=True):
        flat = offset.flatten().numpy() + matrix.numpy() @ z
        output = cp.reshape(flat, tuple(offset.shape), order="C")
        terms.append((weight / extended.total_weight) * loss(output, target))
    constraints: list[cp.Constraint] = [pin == 0 for pin in pins]
    objective = cp.sum(cp.hstack(terms))
    convex = cp.Problem(cp.Minimize(objective), constraints)
    try:
        convex.solve(solver=solver, **(_OPTIONS.get(solver, {}) if options is None else options))
    except cp.SolverError as error:
        raise DataError(
            f"solver={solver!r} fails: {error} Try another one of {cp.installed_solvers()}, or "
            "other options=."
        ) from error
    if convex.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
        raise DataError(
            f"solver={solver!r} returns {convex.status!r}: it finds no minimum; use more data, or "
            "a loss that is bounded below and attains its minimum."
        )
    return report_of(
        extended,
        solver=f"CVXPY, {solver}",
        status=str(convex.status),
        objective=_value(objective),
        z=np.asarray(z.value),
        duals=[np.asarray(constraint.dual_value) for constraint in constraints],
    )


def _affine_outputs(extended: ExtendedProblem) -> list[tuple[Tensor, Tensor]]:
    """(y₀, J) of each batch with output y(z) = y₀ + J z; J of shape (numel of y₀, variables).

    Raises:
        DataError: The output is not such a tensor, or not affine in z.
    """
    with torch.no_grad():
        offsets = extended.outputs(extended.zero)
    for output in offsets:
        if not isinstance(output, Tensor) or output.dim() not in (1, 2):
            given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise DataError(
                f"the output of model={type(extended.problem.model).__name__} is {given}; CVXPY "
                "takes tensors of one or two dimensions. Use check_with_scipy, or a model whose "
                "output has the shape (samples,) or (samples, classes)."
            )
    jacobians = torch.autograd.functional.jacobian(
        lambda z: tuple(y.flatten() for y in extended.outputs(z)), extended.zero
    )
    pieces = list(zip(offsets, jacobians, strict=True))
    guilty = _not_affine(extended, pieces)
    if guilty:
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
    names = extended.names

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
            guilty = alone or pairs
            return ", ".join(" times ".join(names[key] for key in group) for group in guilty)
    return ""


def _squares(output: cp.Expression, target: Tensor) -> Scalar:
    return cp.mean(cp.square(output - target.numpy()))


def _cross_entropy(output: cp.Expression, target: Tensor) -> Scalar:
    hot = F.one_hot(target, output.shape[1]).numpy()
    return cp.mean(cp.log_sum_exp(output, axis=1) - cp.sum(cp.multiply(hot, output), axis=1))


def _logistic(output: cp.Expression, target: Tensor) -> Scalar:
    return cp.mean(cp.logistic(output) - cp.multiply(target.numpy(), output))


_KNOWN_LOSSES: tuple[tuple[type[nn.Module], Callable[..., Tensor], CvxpyLoss], ...] = (
    (nn.MSELoss, F.mse_loss, _squares),
    (nn.CrossEntropyLoss, F.cross_entropy, _cross_entropy),
    (nn.BCEWithLogitsLoss, F.binary_cross_entropy_with_logits, _logistic),
)


def _known_loss(loss_fn: object) -> CvxpyLoss:
    for module, function, loss in _KNOWN_LOSSES:
        if isinstance(loss_fn, module) or loss_fn is function:
            return loss
    known = ", ".join(module.__name__ for module, _, _ in _KNOWN_LOSSES)
    raise DataError(
        f"loss_fn={loss_fn!r} has no known form for CVXPY (only {known} have); give cvxpy_loss=, "
        "a function (output expression, target) -> convex scalar expression."
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
            theirs = _value(loss(cp.Constant(output.numpy()), target))
        except Exception as error:
            raise DataError(
                f"loss_fn={extended.problem.loss_fn!r}: its form for CVXPY fails on an output of "
                f"shape {tuple(offset.shape)} ({error}); give a cvxpy_loss= that fits the targets."
            ) from error
        if not math.isclose(ours, theirs, rel_tol=1e-9, abs_tol=1e-12):
            raise DataError(
                f"loss_fn={extended.problem.loss_fn!r} is {ours:.12g} for a random output and its "
                f"form for CVXPY {theirs:.12g}; give the same function as cvxpy_loss=, including "
                "options such as weight=, label_smoothing= or reduction=."
            )


def _value(scalar: Scalar) -> float:
    return float(np.asarray(scalar.value if isinstance(scalar, cp.Expression) else scalar))
