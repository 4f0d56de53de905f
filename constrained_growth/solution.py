"""What comes out of a solve: frozen data, nothing that acts."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import Any

from torch import Tensor, nn

from constrained_growth.errors import CandidateError

Norm = Callable[[Mapping[str, Tensor]], Tensor | float]
"""Any function of a multiplier (pinned parameter → tensor) that says how large it is."""


class Status(Enum):
    """How the multipliers of a [`Solution`][] are to be read; each value is a sentence."""

    KKT_MULTIPLIERS = (
        "θ is stationary to the tolerance asked for: λ are the KKT multipliers of the pins, "
        "and −λ is the slope of the value function."
    )
    LEAST_SQUARES_ESTIMATES = (
        "θ is not stationary: λ are the least-squares multiplier estimates −∇_v L(θ, 0), "
        "first-order prices at this θ and not yet shadow prices."
    )
    STATIONARITY_UNKNOWN = (
        "‖∇_θ L‖ was not asked for: λ are the least-squares multiplier estimates −∇_v L(θ, 0), "
        "and whether they are KKT multipliers is not known."
    )
    NOT_FINITE = "The loss or a multiplier is NaN or infinite: there is no answer."


class Method(Enum):
    """The way in which λ was computed, and why; each value is a sentence."""

    CLOSED_FORM = (
        "λ comes from the tensor x at each site and δ = ∂L/∂x, the blocks standing nowhere; on the "
        "first batch it agrees with autograd through the blocks at their pins."
    )
    IN_GRAPH = (
        "λ comes from autograd through the blocks, which stood at their pins while model and loss "
        "ran: on the first batch x and δ = ∂L/∂x alone do not give it, as where the loss contains "
        "derivatives of the model's output."
    )


@dataclass(frozen=True)
class Constraint:
    """One pin v = 0: of a named parameter in the block of a named candidate.

    Its `shape` is that of the parameter and of its multiplier.
    """

    candidate: str
    parameter: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class Sensitivity:
    """How large the multiplier of one candidate is.

    Attributes:
        value: ‖λ_c‖ over all pinned parameters of the candidate, in `norm`.
        standard_error: Root-mean-square error of λ_c as an estimate from a sample, on the scale
            of `value`: L √(tr Cov(λ_c)), where L is the least number with ‖·‖ ≤ L ‖·‖_F, such
            as 1 for the Frobenius norm and √P for the entrywise one. It bounds the standard
            error of `value`, since |‖λ̂‖ − ‖λ‖| ≤ ‖λ̂ − λ‖ ≤ L ‖λ̂ − λ‖_F. For a function of the
            user's own L is the size of its gradient at λ, which holds to first order. NaN when
            it cannot be known (one batch and no per-sample form; the Kronecker-Fisher norm; a
            function that autograd cannot follow).
        num_parameters: How many parameters are pinned.
        num_new_parameters: How many parameters the model would gain (pinned and free ones).
        norm: The norm `value` is measured in.
        baseline: Mean over the layers the network already has of the norm of their own
            gradients, in `norm`; None when the stationarity was not asked for, or the norm
            cannot be taken of those layers (it needs second moments, or a certain parameter).
        site: Qualified name of the module after which the layer would stand.
        variance: tr Cov(λ_c), the mean squared error of λ_c in the Frobenius norm, whatever
            `norm` is; NaN when it cannot be known.
        debiased_square: ‖λ_c‖²_F − tr Cov(λ_c). A sample's ‖λ‖²_F is too large by tr Cov on
            average; this is not. It may be negative. NaN when the variance is.
    """

    value: float
    standard_error: float = math.nan
    num_parameters: int = 0
    num_new_parameters: int = 0
    norm: object = None
    baseline: float | None = None
    site: str = ""
    variance: float = math.nan
    debiased_square: float = math.nan


@dataclass(frozen=True)
class Decision:
    """Which candidates to insert, and where they start.

    Two decisions are equal when they choose the same for the same reason.

    Attributes:
        chosen: Names of the candidates; `()` when inserting nothing is the answer.
        reason: One sentence for the reader.
        values: Candidate → pinned parameter → v, the deviation from the pin at which the inserted
            block starts, in the shape of the parameter. A candidate that is not in it starts at
            the pin, where it does nothing.
        evidence: What the decision rests on, for the record: numbers, texts, lists and dicts of
            them, as JSON takes them.
    """

    chosen: tuple[str, ...] = ()
    reason: str = ""
    values: Mapping[str, Mapping[str, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )
    evidence: Mapping[str, Any] = field(default_factory=dict, compare=False)


@dataclass(frozen=True)
class Planned:
    """A candidate ready to be inserted: its site, and its block on the site's device and dtype.

    `after`, `output` and `wrapped` are as in `Candidate`; `overwritten` says whether the model
    changes the tensor at the site in place afterwards.
    """

    after: str
    block: nn.Module
    overwritten: bool = False
    output: int | str | None = None
    wrapped: bool = False


@dataclass(frozen=True)
class Solution:
    """The answer of [`solve`][constrained_growth.solve.solve].

    Attributes:
        status: How `multipliers` are to be read.
        loss: L(θ, 0), the mean over all samples.
        stationarity: ‖∇_θ L(θ, 0)‖₂ over the trainable parameters, or None if not asked for.
        multipliers: λ = −∇_v L(θ, 0): candidate → pinned parameter → tensor in the shape of
            the parameter. +λ is the direction of steepest descent of the new parameters.
        sensitivities: Candidate → how large its multiplier is.
        decision: What the rule made of the sensitivities.
        candidates: Candidate → site and block, for `insert`.
        parameters: Name → shape of the model's parameters, for `insert` to know it again.
        num_samples: How many samples were read.
        num_batches: How many batches were read.
        method: The way in which λ was computed, and why.
        example: The input of the problem's first batch, on which `insert` sees that the function
            does not move; None where there was none.
    """

    status: Status
    loss: float
    stationarity: float | None
    multipliers: Mapping[str, Mapping[str, Tensor]]
    sensitivities: Mapping[str, Sensitivity]
    decision: Decision
    candidates: Mapping[str, Planned] = field(repr=False)
    parameters: Mapping[str, tuple[int, ...]] = field(repr=False)
    num_samples: int
    num_batches: int
    method: Method
    example: Any = field(default=None, repr=False, compare=False)

    def dual_value(self, constraint: Constraint) -> Tensor:
        """λ of one of `problem.constraints`, in CVXPY's word.

        The same tensor as `multipliers[constraint.candidate][constraint.parameter]`.

        Raises:
            CandidateError: The constraint is not one of this solution.
        """
        try:
            return self.multipliers[constraint.candidate][constraint.parameter]
        except KeyError:
            raise CandidateError(
                f"constraint={constraint} is not one of this solution; take it from "
                "problem.constraints of the problem that was solved."
            ) from None
