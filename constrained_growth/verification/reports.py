"""The answer of a solver next to that of `solve`, and how far that is from a KKT point."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from constrained_growth._arguments import instance
from constrained_growth.errors import DataError
from constrained_growth.problem import GrowthProblem
from constrained_growth.solution import Constraint, Solution
from constrained_growth.solve import solve
from constrained_growth.verification.extended import ExtendedProblem


@dataclass(frozen=True)
class KKTResiduals:
    """How far (θ, 0, λ) is from the first-order conditions; all zero at a KKT point.

    The constraints are equalities: λ may have any sign, and there is no complementarity.

    Attributes:
        primal: Largest change of an entry of the tensor at a site by its block, at v = 0.
        dual: ‖∇_v L(θ, 0) + λ‖₂ over all pins.
        stationarity: ‖∇_θ L(θ, 0)‖₂ over the trainable parameters.
    """

    primal: float
    dual: float
    stationarity: float


@dataclass(frozen=True)
class VerificationReport:
    """The answer of a solver, next to that of `solve` at the same θ*.

    Attributes:
        solver: Name of the solver.
        status: Its status.
        objective: Its L(θ*, v*), to compare with `solution.loss`.
        primal: max |v*|, the constraint violation of its answer.
        duals: Its multiplier of each pin, in the shape of the pin.
        problem: The problem at θ*, a float64 copy on the CPU.
        solution: `solve(problem)` at θ*.
        residuals: `kkt_residuals(problem, solution)` at θ*.
    """

    solver: str
    status: str
    objective: float
    primal: float
    duals: Mapping[Constraint, Tensor] = field(repr=False)
    problem: GrowthProblem = field(repr=False)
    solution: Solution = field(repr=False)
    residuals: KKTResiduals

    @property
    def dual_errors(self) -> dict[Constraint, float]:
        """‖dual − λ‖₂ / ‖dual‖₂ of each pin; meaningless where λ is zero up to rounding."""
        return {
            pin: ratio(norm_of(dual - self.solution.dual_value(pin)), norm_of(dual))
            for pin, dual in self.duals.items()
        }

    @property
    def dual_error(self) -> float:
        """The largest of the `dual_errors`."""
        return max(self.dual_errors.values())

    @property
    def objective_error(self) -> float:
        """|L* − L| / |L|, L* the objective of the solver and L that of `solve`."""
        return ratio(abs(self.objective - self.solution.loss), abs(self.solution.loss))

    def __str__(self) -> str:
        names = {pin: f"{pin.candidate}: {pin.parameter}" for pin in self.duals}
        width = max(map(len, names.values()))
        errors, residuals = self.dual_errors, self.residuals
        lines = [
            f"{self.solver}: {self.status}",
            f"L {self.objective:.12g}, by solve {self.solution.loss:.12g}, "
            f"relative difference {self.objective_error:.1e}",
            f"max |v| {self.primal:.1e}, largest change by a block {residuals.primal:.1e}",
            f"|grad_theta L| {residuals.stationarity:.1e}, "
            f"|grad_v L + lambda| {residuals.dual:.1e}",
            f"{'pin':{width}}  {'|dual|':>13}  {'|lambda|':>13}  rel. err",
        ]
        for pin, dual in self.duals.items():
            sizes = f"{norm_of(dual):13.6e}  {norm_of(self.solution.dual_value(pin)):13.6e}"
            lines.append(f"{names[pin]:{width}}  {sizes}  {errors[pin]:8.1e}")
        return "\n".join(lines)


def kkt_residuals(problem: GrowthProblem, solution: Solution) -> KKTResiduals:
    """The KKT residuals of a solution, from autograd on the network with all blocks in it.

    Args:
        problem: The problem, left unchanged.
        solution: The result of `solve(problem)`. Residuals are computed in float64.

    Raises:
        DataError: L differs between two passes.
        CandidateError: A pin is not in `solution`.

    Source:
        Nocedal and Wright, *Numerical Optimization*, 2nd ed. 2006, eq. (12.34).

    Example:
        >>> from torch import nn
        >>> import constrained_growth as cg
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 3)).double()
        >>> data = [(torch.randn(8, 2).double(), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate(after="1", block=cg.blocks.ResidualMLP(4, 4, torch.tanh))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])
        >>> residuals = kkt_residuals(problem, cg.solve(problem))
        >>> residuals.primal, residuals.dual < 1e-14
        (0.0, True)
    """
    instance("problem", problem, GrowthProblem, DataError, "a cg.GrowthProblem")
    instance("solution", solution, Solution, DataError, "what cg.solve(problem) returns")
    multipliers = [solution.dual_value(pin).flatten() for pin in problem.constraints]
    extended = ExtendedProblem(problem)
    changes = [0.0]
    for block in extended.network.blocks:
        block.register_forward_hook(
            lambda _, args, y: changes.append((y - args[0]).abs().max().item())
        )
    _, gradient = extended.loss_and_gradient(extended.zero.numpy())
    grad_theta, grad_v = torch.from_numpy(gradient).tensor_split([extended.sizes[0]])
    return KKTResiduals(
        primal=max(changes),
        dual=norm_of(grad_v + torch.cat(multipliers).to(grad_v)),
        stationarity=norm_of(grad_theta),
    )


def report_of(
    extended: ExtendedProblem,
    solver: str,
    status: str,
    objective: float,
    z: NDArray[np.float64],
    duals: Sequence[NDArray[np.float64]],
) -> VerificationReport:
    """The answer of a solver, z and its duals, next to that of `solve` there."""
    problem = extended.problem_at(z)
    solution = solve(problem, progress=False)
    return VerificationReport(
        solver,
        status,
        objective,
        primal=float(np.abs(z[extended.sizes[0] :]).max()),
        duals={
            pin: torch.tensor(dual, dtype=torch.float64).reshape(pin.shape)
            for pin, dual in zip(problem.constraints, duals, strict=True)
        },
        problem=problem,
        solution=solution,
        residuals=kkt_residuals(problem, solution),
    )


def norm_of(tensor: Tensor) -> float:
    """‖·‖₂ of all entries."""
    return torch.linalg.vector_norm(tensor).item()


def ratio(difference: float, size: float) -> float:
    """Difference / size; 0 if there is no difference."""
    return 0.0 if difference == 0 else difference / size if size else math.inf
