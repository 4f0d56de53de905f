"""Convex small instances solved by CVXPY."""

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

from constrained_growth._arguments import function, instance, several
from constrained_growth.errors import DataError
from constrained_growth.problem import GrowthProblem
from constrained_growth.verification.extended import ExtendedProblem, Vector
from constrained_growth.verification.reports import (
    Answer,
    VerificationReport,
    answer_of,
    report_of,
)

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

_OPTIONS: dict[str, dict[str, Any]] = {
    cp.CLARABEL: _CLARABEL,
    cp.OSQP: {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iter": 100_000},
    cp.SCS: {"eps_abs": 1e-9, "eps_rel": 1e-9, "max_iters": 100_000},
}

_MOST_VARIABLES = 2000


def check_with_cvxpy(
    problem: GrowthProblem,
    *,
    cvxpy_loss: CvxpyLoss | None = None,
    solver: str | Sequence[str] = cp.CLARABEL,
    options: Mapping[str, Any] | None = None,
) -> VerificationReport:
    """Solve a convex instance with CVXPY and compare its dual values with λ at its optimum.

    An instance is convex if the network's output is affine in the trainable parameters θ at v = 0,
    which is checked, and the loss is convex in the output. So nonlinear layers in front of
    trainable ones are fine, and those behind them must be linear. First the minimum θ* of L(·, 0)
    is found. There the output is y(θ, v) = y(θ, 0) + J_v v + o(v), and the convex problem

        min over θ, v of loss(y(θ, 0) + J_v v)   subject to   v_c = 0

    has the same optimality conditions at (θ*, 0) as the original one, hence the same multipliers:
    products of θ and v, as of a pinned layer in front of a trained head, have no derivative there.
    J_v comes from difference quotients of outputs (at a kink to the left), not from a backward
    pass. What the loss adds that reads the parameters alone (weight decay in a loss that holds
    the model) is found too; it must be quadratic.

    Args:
        problem: The problem, left unchanged. The trainable parameters may have any values.
        cvxpy_loss: `cvxpy_loss(output, target)`, the `loss_fn` of the problem for a CVXPY
            expression of the shape of the output, without what reads parameters. None (default)
            knows the mean forms of `MSELoss`, `CrossEntropyLoss` and `BCEWithLogitsLoss`, as
            modules and as functions.
        solver: One of `cvxpy.installed_solvers()`, or a list of them, for one report.
        options: Options of a single solver; None (default) asks Clarabel, OSQP and SCS for all the
            accuracy they have.

    Raises:
        DataError: The output is not affine in θ, or not a tensor of one or two dimensions; the
            loss has no known CVXPY form, or another value there; or there is no optimum.

    Source:
        Boyd and Vandenberghe, *Convex Optimization*, 2004, sections 5.5.3 and 5.6.

    Example:
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 3), nn.Tanh(), nn.Linear(3, 1)).double()
        >>> _ = net[0].requires_grad_(False)  # a trained linear head
        >>> data = [(torch.randn(8, 2).double(), torch.randn(8, 1).double())]
        >>> candidate = cg.Candidate(after="1", block=cg.blocks.ResidualMLP(3, 2, torch.tanh))
        >>> report = check_with_cvxpy(cg.GrowthProblem(net, nn.MSELoss(), data, [candidate]))
        >>> report.passed, report.dual_error < 1e-6
        (True, True)
    """
    instance("problem", problem, GrowthProblem, DataError, "a cg.GrowthProblem")
    function(
        "cvxpy_loss", cvxpy_loss, DataError, "lambda y, t: cp.sum_squares(y - t)", optional=True
    )
    instance("options", options, Mapping, DataError, "a dict", optional=True)
    known = cp.installed_solvers()
    solvers: tuple[Any, ...] = several("solver", solver, str, DataError, f"one of {known}")
    for name in solvers or [None]:
        if name not in known:
            raise DataError(f"solver={name!r} is not installed; give one of {known}.")
    if options is not None and len(solvers) > 1:
        raise DataError(f"options={dict(options)!r} are for one solver, and solver={solvers}.")
    extended = ExtendedProblem(problem)
    extended.refuse_large(_MOST_VARIABLES)
    convex = _Convex(extended, cvxpy_loss)
    return report_of([convex.answer(name, options) for name in solvers])


class _Convex:
    """The convex problem in (θ, v), made of values of the extended network alone."""

    def __init__(self, extended: ExtendedProblem, loss: CvxpyLoss | None) -> None:
        self.extended, self.count = extended, extended.sizes[0]
        with torch.no_grad():
            self.offsets = _outputs(extended)
            self.slopes = self._jacobians(extended.zero, range(self.count), 1.0)
            self._refuse_bent()
        self.loss = loss or _known_loss(extended.problem.loss_fn)
        self.penalty = _penalty(extended, self.offsets)
        self.constant = _checked_constant(extended, self.loss, self.offsets, self.penalty)

    def answer(self, solver: str, options: Mapping[str, Any] | None) -> Answer:
        """The minimum over θ; and there the duals of the problem in (θ, v)."""
        own = _OPTIONS.get(solver, {}) if options is None else options
        # Clarabel's default accuracy, 1e-8, does for where the outputs are first taken apart
        rough = {} if options is None and solver == cp.CLARABEL else own
        theta = self._solved(solver, rough, self.offsets, self.slopes)[1]
        # again from there: J_v is that of a point, and the first one was rough
        theta = self._solved(solver, own, *self._taken_apart(theta), theta)[1][: self.count]
        status, z, duals, objective = self._solved(solver, own, *self._taken_apart(theta), theta)
        z[: self.count] = theta  # the minimum may be flat, and the duals are of this θ
        name = f"CVXPY, {solver}"
        return answer_of(self.extended, name, status, objective, z, duals)

    def _taken_apart(self, theta: Vector) -> tuple[list[Tensor], list[Tensor]]:
        """The outputs at (θ, 0), and their derivatives in θ and v."""
        at = torch.cat([torch.from_numpy(theta), self.extended.zero[self.count :]])
        of_pins = self._jacobians(at, range(self.count, len(at)))
        slopes = [torch.cat(pair, 1) for pair in zip(self.slopes, of_pins, strict=True)]
        return self.extended.outputs(at), slopes

    def _jacobians(self, at: Tensor, entries: range, step: float = 1e-3) -> Sequence[Tensor]:
        """∂y/∂z of each output, (numel of y, entries), from differences to the fourth order.

        At a kink to the left, to the second.
        """
        if not entries:
            return [offset.new_zeros(offset.numel(), 0) for offset in self.offsets]
        moves = torch.eye(len(at), dtype=at.dtype)[entries.start : entries.stop] * step
        points = at + torch.stack([k * moves for k in (-2, -1, 0, 1, 2)])
        every = self.extended.outputs_at(points.flatten(0, 1))
        back, left, y, right, forth = every.view(5, len(entries), -1)
        # at a kink the second difference grows with h, elsewhere with h²: twice as far tells
        near, far = (right - 2 * y + left).norm(dim=1), (forth - 2 * y + back).norm(dim=1)
        kinked = (1e-12 * y.norm(dim=1) < far) & (far < 3 * near)  # 4 times where it is smooth
        to_left = (3 * y - 4 * left + back) / 2
        smooth = (8 * (right - left) - (forth - back)) / 12
        found = torch.where(kinked[:, None], to_left, smooth).mT / step
        return found.split([offset.numel() for offset in self.offsets])

    def _solved(
        self,
        solver: str,
        options: Mapping[str, Any],
        offsets: Sequence[Tensor],
        slopes: Sequence[Tensor],
        theta: Vector | None = None,
    ) -> tuple[str, Vector, Vector, float]:
        """Status, z, duals and L: over θ; or over θ near one, and v with its pins."""
        extended, free = self.extended, slopes[0].shape[1]
        z, start = cp.Variable(free), np.zeros(free)
        # the variable is a step from here, so that the solver's tolerance is one of the step
        start[: self.count] = 0.0 if theta is None else theta
        terms = []
        for offset, slope, (_, target, weight) in zip(
            offsets, slopes, extended.batches, strict=True
        ):
            flat = offset.flatten().numpy() + slope.numpy() @ z
            output = cp.reshape(flat, tuple(offset.shape), order="C")
            terms.append((weight / extended.total_weight) * self.loss(output, target))
        if self.penalty is not None:
            linear, square = self.penalty[0][:free], self.penalty[1][:free, :free]
            moved = z + start
            # wrapped, as CVXPY would refuse eigenvalues that rounding has put below zero
            terms.append(linear @ moved + 0.5 * cp.quad_form(moved, cp.psd_wrap(square)))
        constraints: list[cp.Constraint] = [] if theta is None else [z[self.count :] == 0]
        convex = cp.Problem(cp.Minimize(cp.sum(cp.hstack(terms))), constraints)
        try:
            convex.solve(solver=solver, **options)
        except cp.SolverError as error:
            raise DataError(
                f"solver={solver!r} fails: {error} Try other options=, or {cp.installed_solvers()}."
            ) from error
        if convex.status not in (cp.OPTIMAL, cp.OPTIMAL_INACCURATE):
            raise DataError(
                f"solver={solver!r} returns {convex.status!r}: it finds no minimum; use more data, "
                "or a loss that is bounded below and attains its minimum."
            )
        duals = np.asarray(constraints[0].dual_value) if constraints else np.zeros(0)
        value = float(np.asarray(convex.value)) + self.constant
        return convex.status, start + np.asarray(z.value), duals, value

    def _refuse_bent(self) -> None:
        """Refuse an output that is not affine in θ at v = 0; tried at two random points each."""
        generator = torch.Generator().manual_seed(0)
        extended = self.extended
        trained = [name for name in extended.parts if name.startswith("model.")]

        def is_bent(*moved: str) -> bool:
            parts = extended.parts.items()
            mask = torch.cat([torch.full((size,), name in moved) for name, size in parts])
            points = torch.randn(2, len(mask), generator=generator, dtype=torch.float64) * mask
            return not all(
                torch.allclose(y.flatten(), y0.flatten() + slope @ z[: self.count], 1e-9, 1e-9)
                for z in points
                for y, y0, slope in zip(extended.outputs(z), self.offsets, self.slopes, strict=True)
            )

        if is_bent(*trained):
            alone = [(name,) for name in trained if is_bent(name)]
            pairs = (pair for pair in itertools.combinations(trained, 2) if is_bent(*pair))
            groups = ([extended.names[key] for key in group] for group in alone or pairs)
            raise DataError(
                f"the output of model={type(extended.problem.model).__name__} is not affine in "
                f"{', '.join(map(' times '.join, groups))}, so the instance is not convex. Freeze "
                "nonlinear layers' parameters and all but one of those that multiply each other "
                "with requires_grad_(False), or use check_with_scipy."
            )


def _outputs(extended: ExtendedProblem) -> list[Tensor]:
    outputs = extended.outputs(extended.zero)
    for output in outputs:
        if not isinstance(output, Tensor) or output.dim() not in (1, 2):
            given = tuple(output.shape) if isinstance(output, Tensor) else type(output).__name__
            raise DataError(
                f"the output of model={type(extended.problem.model).__name__} is {given}; CVXPY "
                "takes tensors of one or two dimensions. Use check_with_scipy."
            )
    return outputs


def _penalty(extended: ExtendedProblem, outputs: Sequence[Tensor]) -> tuple[Vector, Vector] | None:
    """What the loss adds that reads parameters, as gradient and Hessian of a quadratic function."""
    generator = torch.Generator().manual_seed(0)

    def penalty(z: Tensor, outputs: Sequence[Tensor] = outputs) -> Tensor:
        return extended.loss(z, outputs) - extended.loss(extended.zero, outputs).detach()

    point = extended.zero.clone().requires_grad_()
    value = penalty(point)
    if not value.requires_grad:
        return None
    (linear,) = torch.autograd.grad(value, point, allow_unused=True, materialize_grads=True)
    # with the outputs held fixed: what the loss makes of them has an expression of its own
    square = torch.autograd.functional.hessian(penalty, extended.zero)
    assert isinstance(square, Tensor)
    for _ in range(2):
        z, others = (
            [torch.randn(t.shape, generator=generator, dtype=torch.float64) for t in some]
            for some in ([extended.zero], outputs)
        )
        expected = linear @ z[0] + z[0] @ square @ z[0] / 2
        if not torch.allclose(penalty(z[0], others), expected, rtol=1e-9, atol=1e-9):
            raise DataError(
                f"loss_fn={extended.problem.loss_fn!r} reads parameters other than by a quadratic "
                "penalty added to a function of the output; use check_with_scipy."
            )
    lowest, highest = np.linalg.eigvalsh(square.numpy())[[0, -1]]
    if lowest < -1e-9 * max(1.0, highest):
        raise DataError(
            f"loss_fn={extended.problem.loss_fn!r} adds a penalty on parameters that is not convex "
            f"(curvature {lowest:.2g}); use check_with_scipy."
        )
    return linear.numpy(), square.numpy()


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
        f"loss_fn={loss_fn!r} has no known form for CVXPY, as MSELoss, CrossEntropyLoss and "
        "BCEWithLogitsLoss have; give cvxpy_loss=(output expression, target) -> scalar expression."
    )


def _checked_constant(
    extended: ExtendedProblem,
    loss: CvxpyLoss,
    outputs: Sequence[Tensor],
    penalty: tuple[Vector, Vector] | None,
) -> float:
    """The penalty at θ₀; refuses an expression that is not the rest of the loss."""
    generator = torch.Generator().manual_seed(0)
    constant = 0.0 if penalty is None else None  # it may have any value at θ₀
    for offset, (input, target, _) in zip(outputs, extended.batches, strict=True):
        for _ in range(2):
            output = torch.randn(offset.shape, generator=generator, dtype=torch.float64)
            ours = extended.network(input, target, output)[1].item()
            try:
                value = loss(cp.Constant(output.numpy()), target)
                known = value.value if isinstance(value, cp.Expression) else value
                theirs = float(np.asarray(known))
            except Exception as error:
                raise DataError(
                    f"loss_fn={extended.problem.loss_fn!r}: its CVXPY form fails on an output of "
                    f"shape {tuple(offset.shape)} ({error}); give one that fits the targets."
                ) from error
            constant = ours - theirs if constant is None else constant
            if not math.isclose(ours, theirs + constant, rel_tol=1e-9, abs_tol=1e-12):
                raise DataError(
                    f"loss_fn={extended.problem.loss_fn!r} is {ours:.12g} for a random output and "
                    f"its form for CVXPY {theirs + constant:.12g}; give cvxpy_loss= with options "
                    "such as weight=, label_smoothing= or reduction=."
                )
    return constant or 0.0
