"""The answer of a solver next to that of `solve`, and how far that is from a KKT point."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from constrained_growth._arguments import instance
from constrained_growth._solve import solve
from constrained_growth._tables import Table, as_html, as_text
from constrained_growth.errors import DataError
from constrained_growth.problem import GrowthProblem
from constrained_growth.solution import Constraint, Solution, as_json
from constrained_growth.verification.extended import ExtendedProblem, Vector, with_gradient

TOLERANCE = 2e-3
"""Of errors of multipliers, relative to their size: SciPy and CVXPY get to 1e-5 and better."""


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
class Slope:
    """What the local value function p(ε) does along a direction of one pin, from solving anew.

    Attributes:
        direction: A unit vector of the entries of the pin.
        slope: dp along it at ε = 0; −⟨λ, direction⟩, if λ is right.
    """

    direction: Tensor
    slope: float


@dataclass(frozen=True)
class Check:
    """One comparison: an error, and how large it may be."""

    name: str
    error: float
    tolerance: float

    @property
    def passed(self) -> bool:
        """Whether the error is within the tolerance; NaN is not."""
        return self.error <= self.tolerance


@dataclass(frozen=True)
class Answer:
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

    @property
    def scale(self) -> float:
        """‖dual‖₂ over all pins, and not less than 1e-4 L: what an error is compared with."""
        # where all λ vanish, as in a network that lacks nothing, errors are compared with the loss
        sizes = [norm_of(dual) for dual in self.duals.values()]
        return max(math.hypot(*sizes), 1e-4 * abs(self.objective))

    def _checks(self) -> list[Check]:
        # a pin whose λ is zero up to rounding has no error relative to itself: 1 % of all is enough
        gaps = [norm_of(d - self.solution.dual_value(pin)) for pin, d in self.duals.items()]
        own = [
            gap / max(norm_of(dual), 1e-2 * self.scale)
            for gap, dual in zip(gaps, self.duals.values(), strict=True)
        ]
        return [
            Check(f"multipliers of {self.solver}", max(own), TOLERANCE),
            Check(f"loss of {self.solver}", self.objective_error, 1e-6),
            Check(f"pins of {self.solver}", self.primal, 1e-6),
        ]


@dataclass(frozen=True)
class VerificationReport(Answer):
    """The answers of all solvers next to those of `solve`: the first one, and the others.

    Attributes:
        others: The answers of further solvers.
        gradient_error: ‖∇L by autograd − ∇L by difference quotients‖₂ in (θ, v); None where it was
            not asked for.
        slopes: Of the local value function, along a direction of each pin.
        kinks: How many entries of the pins are at a kink of L, where slopes are to one side.
        proximal: μ where L + μ‖θ − c‖²/2 was solved in place of L, which has no strict minimum
            nearby; 0 otherwise.
    """

    others: tuple[Answer, ...] = field(default=(), repr=False)
    gradient_error: float | None = None
    slopes: Mapping[Constraint, Slope] = field(default_factory=dict, repr=False)
    kinks: int = 0
    proximal: float = 0.0

    @property
    def dual_error(self) -> float:
        """The largest of the `dual_errors` of all solvers."""
        return max(max(one.dual_errors.values()) for one in (self, *self.others))

    @property
    def checks(self) -> tuple[Check, ...]:
        """All comparisons, each with its tolerance; errors of λ are relative to its size."""
        found = [check for one in (self, *self.others) for check in one._checks()]
        if self.gradient_error is not None:
            error = self.gradient_error / self.scale
            found.append(Check("∇L by autograd and by differences, over ‖λ‖", error, TOLERANCE))
        for pin, along in self.slopes.items():
            own = self.solution.dual_value(pin).flatten()
            gap = abs(along.slope + torch.dot(own, along.direction).item())
            size = max(norm_of(own), 1e-2 * self.scale)
            name = f"slope of the value function, {pin.candidate}: {pin.parameter}"
            found.append(Check(name, gap / size, TOLERANCE))
        return tuple(found)

    @property
    def passed(self) -> bool:
        """Whether every comparison is within its tolerance."""
        return all(check.passed for check in self.checks)

    def to_json(self) -> str:
        """Solvers, comparisons and verdict as JSON."""
        content = {
            "passed": self.passed,
            "solvers": {one.solver: one.status for one in (self, *self.others)},
            "loss": self.solution.loss,
            "entries_at_kinks": self.kinks,
            "proximal": self.proximal,
            "checks": [{**vars(check), "passed": check.passed} for check in self.checks],
        }
        return json.dumps(as_json(content), ensure_ascii=False)

    def __str__(self) -> str:
        return as_text(self._parts())

    def _repr_html_(self) -> str:
        return as_html(self._parts())

    def _parts(self) -> list[str | Table]:
        lines = ["passed" if self.passed else "NOT PASSED"]
        lines += [f"{one.solver}: {one.status}" for one in (self, *self.others)]
        if self.kinks:
            lines.append(f"{self.kinks} entries of the pins are at a kink: slopes are to one side")
        if self.proximal:
            lines.append(
                f"no strict minimum over theta: L + mu |theta - c|^2 / 2, mu = {self.proximal:.1e}"
            )
        checks = [
            (c.name, f"{c.error:.1e}", "≤" if c.passed else ">", f"{c.tolerance:.0e}")
            for c in self.checks
        ]
        pins = [
            (
                f"{pin.candidate}: {pin.parameter}",
                *(f"{norm_of(t):.6e}" for t in (self.duals[pin], self.solution.dual_value(pin))),
                f"{error:.1e}",
            )
            for pin, error in self.dual_errors.items()
        ]
        failed = [index for index, check in enumerate(self.checks) if not check.passed]
        return [
            *lines,
            Table(checks, ("check", "error", "", "at most"), numbers=(1, 3), bold=failed),
            "",
            Table(pins, ("pin", "|dual|", "|lambda|", "rel. error"), numbers=(1, 2, 3)),
        ]


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
    _, gradient = with_gradient(extended.loss, extended.zero.numpy())
    grad_theta, grad_v = torch.from_numpy(gradient).tensor_split([extended.sizes[0]])
    return KKTResiduals(
        primal=max(changes),
        dual=norm_of(grad_v + torch.cat(multipliers).to(grad_v)),
        stationarity=norm_of(grad_theta),
    )


def answer_of(
    extended: ExtendedProblem,
    solver: str,
    status: str,
    objective: float,
    z: Vector,
    duals: Vector,
) -> Answer:
    """The answer of a solver, z and its duals, next to that of `solve` there."""
    problem = extended.problem_at(z)
    solution = solve(problem, progress=False)
    each = np.split(np.asarray(duals), np.cumsum(extended.sizes[1:])[:-1])
    return Answer(
        solver,
        status,
        objective,
        primal=float(np.abs(z[extended.sizes[0] :]).max()),
        duals={
            pin: torch.tensor(dual, dtype=torch.float64).reshape(pin.shape)
            for pin, dual in zip(problem.constraints, each, strict=True)
        },
        problem=problem,
        solution=solution,
        residuals=kkt_residuals(problem, solution),
    )


def report_of(answers: Sequence[Answer], **more: Any) -> VerificationReport:
    """All answers in one report."""
    return VerificationReport(**vars(answers[0]), others=tuple(answers[1:]), **more)


def norm_of(tensor: Tensor) -> float:
    """‖·‖₂ of all entries."""
    return torch.linalg.vector_norm(tensor).item()


def ratio(difference: float, size: float) -> float:
    """Difference / size; 0 if there is no difference."""
    return 0.0 if difference == 0 else difference / size if size else math.inf
