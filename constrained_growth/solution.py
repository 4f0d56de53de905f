"""What comes out of a solve: frozen data, nothing that acts."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass, field
from enum import Enum
from typing import TYPE_CHECKING, Any

from torch import Tensor, nn

from constrained_growth._arguments import instance
from constrained_growth._later import Later, ReadLater
from constrained_growth._tables import Table, as_html, as_text
from constrained_growth.errors import CandidateError, RuleError

if TYPE_CHECKING:
    from matplotlib.figure import Figure

__all__ = [
    "Constraint",
    "Decision",
    "HeldOut",
    "Method",
    "Norm",
    "Planned",
    "Sensitivity",
    "Solution",
    "Status",
]

_ROWS = 40
"""How many candidates a printed solution shows, besides those chosen."""

Norm = Callable[[Mapping[str, Tensor]], Tensor | float]
"""Any function of a multiplier (pinned parameter → tensor) that says how large it is."""


class Status(Enum):
    """How the multipliers of a `Solution` are to be read; each value is a sentence."""

    KKT_MULTIPLIERS = (
        "θ is first-order stationary to the tolerance asked for: λ are KKT multipliers of the "
        "pins. Where θ is also a strict local minimiser, with positive definite ∇²_θθ L, and no "
        "pin is at a kink, −λ is the slope of the local value function."
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


def listed(texts: Iterable[str], most: int = 1200) -> str:
    """Texts with commas between, up to so many characters, and how many more there are."""
    every = list(texts)
    ends = itertools.accumulate(len(text) + 2 for text in every)
    shown = [text for text, end in zip(every, ends, strict=True) if end <= most]
    more = [f"and {len(every) - len(shown)} more"] if len(shown) < len(every) else []
    return ", ".join([*shown, *more])


@dataclass(frozen=True)
class Constraint:
    """One pin v = 0: of a named parameter in the block of a named candidate.

    Its `shape` is that of the parameter and of its multiplier.
    """

    candidate: str
    parameter: str
    shape: tuple[int, ...]


@dataclass(frozen=True)
class HeldOut:
    """What samples that did not propose a step say of it.

    Attributes:
        slope: Of their mean loss along λ/‖λ‖_F, λ that of the training data; negative where a
            layer there helps on data that it has not seen. In units of the loss by those of the
            parameters.
        standard_error: Of `slope`, from groups of the samples.
        pvalue: Of the hypothesis that the slope is not negative, by Student's t.
        effect_size: −slope over the standard deviation of the slopes of single samples (Cohen's
            d), which does not grow with the number of samples as significance does.
    """

    slope: float
    standard_error: float
    pvalue: float
    effect_size: float


@dataclass(frozen=True, repr=False)
class Sensitivity(ReadLater):
    """How large the multiplier of one candidate is.

    Attributes:
        value: ‖λ_c‖ over all pinned parameters of the candidate, in `norm`.
        standard_error: Of `value`, as an estimate from a sample: the standard deviation of the
            `replicates`. NaN when it cannot be known (one batch in which samples cannot be told
            apart, or several processes and a λ of millions of numbers). Both are computed when
            they are first read.
        num_parameters: How many parameters are pinned.
        num_new_parameters: How many parameters the model would gain (pinned and free ones).
        norm: The norm `value` is measured in.
        baseline: Mean over the layers the network already has of the norm of their own
            gradients, in `norm`; None when the stationarity was not asked for, or the norm
            cannot be taken of those layers (it needs second moments, or a certain parameter).
        site: Qualified name of the module after which the layer would stand.
        variance: tr Cov(λ_c), the mean squared error of λ_c in the Frobenius norm, whatever
            `norm` is; NaN when it cannot be known, as of wide pins without `multipliers`.
        debiased_square: ‖λ_c‖²_F − tr Cov(λ_c). A sample's ‖λ‖²_F is too large by tr Cov on
            average; this is not. It may be negative. NaN when the variance is.
        error_bound: L √(tr Cov(λ_c)), where L is the least number with ‖·‖ ≤ L ‖·‖_F, such as 1
            for the Frobenius norm and √P for the entrywise one. It bounds the standard error of
            `value` from above, since |‖λ̂‖ − ‖λ‖| ≤ L ‖λ̂ − λ‖_F. NaN where L is not known.
        replicates: What `value` is on 200 bootstrap samples, or 50 where λ has more than 4,096
            entries or several processes share the data. The b-th of all candidates are of the
            same sample, so that their differences say how sure a comparison is. Empty where there
            are none.
        held_out: The same step on other data; None unless `solve` was given `validation`.
        cross_fitted: The same without other data: each group of the samples, whose loss is
            followed along λ/‖λ‖_F of all the other groups; in a norm that reads 256 rows and
            columns of a wide λ (`KroneckerFisher`), along these. Computed when it is first read.
        kink: Share of the units, over the samples of the first batch, that stand exactly at a kink
            of the block's activation at its pins, such as the inactive units that an
            `IdentityLinear` with ReLU finds at its site. If it is not 0, λ is a one-sided slope
            along each entry of the weight alone, and along other directions none: ask
            `directional_derivative`. 0 for blocks that are smooth at their pins, and for those of
            users without a method `kinks(x)`, a mask of the units.
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
    error_bound: float = field(default=math.nan, compare=False)
    replicates: tuple[float, ...] = field(default=(), compare=False)
    held_out: HeldOut | None = None
    cross_fitted: HeldOut | None = field(default=None, compare=False)
    kink: float = 0.0

    def __post_init__(self) -> None:
        given = object.__getattribute__(self, "standard_error")
        if isinstance(given, float) and math.isnan(given):
            later: Any = Later(_deviation)
            object.__setattr__(self, "standard_error", later)

    def __repr__(self) -> str:
        after = f" after {self.site!r}" if self.site else ""
        pinned = f"{self.num_parameters:,} of {self.num_new_parameters:,} parameters pinned"
        error = f" ± {self._error_read()}" if self._error_read() else ""
        kink = f", {self.kink:.0%} of the units at a kink" if self.kink else ""
        return f"Sensitivity({self.value:.4g}{error}{after}, {pinned}{kink})"

    def _error_read(self) -> str:
        """The standard error as text; nothing if it is not known, or was not computed yet."""
        error = vars(self)["standard_error"]
        return "" if isinstance(error, Later) or math.isnan(error) else f"{error:.2g}"


def _deviation(sensitivity: Sensitivity) -> float:
    values = sensitivity.replicates
    return statistics.stdev(values) if len(values) > 1 else math.nan


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
            them. It is kept as JSON gives it back: arrays and tensors as lists of numbers, NaN and
            infinities as None.

    Raises:
        RuleError: The evidence holds something that JSON cannot.
    """

    chosen: tuple[str, ...] = ()
    reason: str = ""
    values: Mapping[str, Mapping[str, Tensor]] = field(
        default_factory=dict, repr=False, compare=False
    )
    evidence: Mapping[str, Any] = field(default_factory=dict, compare=False)

    def __post_init__(self) -> None:
        names = self.chosen
        if not isinstance(names, tuple | list) or not all(isinstance(n, str) for n in names):
            raise RuleError(
                f"chosen={names!r:.80} of Decision are no names of candidates; give a tuple of "
                'strings, such as ("3",), or ().'
            )
        object.__setattr__(self, "chosen", tuple(names))
        instance("reason", self.reason, str, RuleError, "a sentence")
        instance("values", self.values, Mapping, RuleError, "candidate → pinned parameter → v")
        instance("evidence", self.evidence, Mapping, RuleError, "a dict that JSON takes")
        try:
            object.__setattr__(self, "evidence", as_json(self.evidence))
        except (TypeError, ValueError, RuntimeError) as error:
            raise RuleError(
                f"evidence={self.evidence!r:.80} of the decision cannot be kept as JSON: {error}. "
                "Give numbers, texts, None, and lists and dicts of them."
            ) from error


def as_json(value: Any, place: str = "it") -> Any:
    """A value as JSON gives it back; the TypeError names the place of what JSON cannot hold."""
    if hasattr(value, "tolist"):  # of NumPy, PyTorch and pandas
        value = value.tolist()
    if isinstance(value, Mapping):
        return {
            k if isinstance(k, str) else str(as_json(k)): as_json(v, f"{place}[{k!r}]")
            for k, v in value.items()
        }
    if isinstance(value, list | tuple):
        return [as_json(v, f"{place}[{i}]") for i, v in enumerate(value)]
    if isinstance(value, float):
        return value if math.isfinite(value) else None
    if value is None or isinstance(value, bool | int | str):
        return value
    raise TypeError(f"{place} is a {type(value).__name__}")


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


@dataclass(frozen=True, repr=False)
class Solution(ReadLater):
    """The answer of `cg.solve`.

    Attributes:
        status: How `multipliers` are to be read.
        loss: L(θ, 0), the mean over all samples.
        stationarity: ‖∇_θ L(θ, 0)‖₂ over the trainable parameters, or None if not asked for.
        multipliers: λ = −∇_v L(θ, 0): candidate → pinned parameter → tensor in the shape of
            the parameter. +λ is the direction of steepest descent of the new parameters. Empty if
            `solve` was not to keep them.
        sensitivities: Candidate → how large its multiplier is.
        decision: What the rule made of the sensitivities.
        candidates: Candidate → site and block, for `insert`.
        parameters: Name → shape of the model's parameters, for `insert` to know it again.
        agreement: How often the rule would decide the same on other samples of this size as
            `data`, as a share of the bootstrap samples of `Sensitivity.replicates` on which it
            does. NaN for a rule that also asks the model or has a state, and where no standard
            errors are known. What `validation` found is not drawn anew. Computed when first read.
        num_samples: How many samples were read.
        num_batches: How many batches were read.
        method: The way in which λ was computed, and why.
        example: The input of the problem's first batch, on which `insert` sees that the function
            does not move; None where there was none.
        training: Whether the model was measured in train mode; None if that is not known.
    """

    status: Status
    loss: float
    stationarity: float | None
    multipliers: Mapping[str, Mapping[str, Tensor]]
    sensitivities: Mapping[str, Sensitivity]
    decision: Decision
    candidates: Mapping[str, Planned]
    parameters: Mapping[str, tuple[int, ...]]
    num_samples: int
    num_batches: int
    method: Method
    agreement: float = math.nan
    example: Any = field(default=None, compare=False)
    training: bool | None = None

    def __repr__(self) -> str:
        chosen = listed(map(repr, self.decision.chosen)) or "nothing"
        why = f" ({self.decision.reason:.200})" if self.decision.reason else ""
        return (
            f"Solution(insert {chosen} of {len(self.candidates)} candidates{why}; "
            f"loss {self.loss:.4g}, {self.status.name})"
        )

    def __str__(self) -> str:
        return as_text(self._parts())

    def _repr_html_(self) -> str:
        return as_html(self._parts())

    def _parts(self) -> list[str | Table]:
        """Decision, status and a table of the candidates, with the standard errors read so far."""
        chosen, found = self.decision.chosen, list(self.sensitivities.items())
        kept = {n for n, _ in sorted(found, key=lambda item: -item[1].value)[:_ROWS]} | set(chosen)
        shown = [(name, s) for name, s in found if name in kept]
        rows = list[tuple[str, ...]]()
        for name, s in shown:
            mark, counts = "→" * (name in chosen), (s.num_parameters, s.num_new_parameters)
            size = f"{s.value:.4g}", s._error_read()
            rows.append((mark, name, s.site, *size, *(f"{count:,}" for count in counts)))
        heads = ("", "candidate", "after", "sensitivity", "± s.e.", "pinned", "parameters")
        bold = [index for index, (name, _) in enumerate(shown) if name in chosen]
        why = f" ({self.decision.reason})" if self.decision.reason else ""
        stationarity = f", ‖∇_θ L‖ {self.stationarity:.3g}" if self.stationarity is not None else ""
        mode = {True: ", train mode", False: ", eval mode", None: ""}[self.training]
        read = f"{self.num_samples:,} samples{mode}"
        more = len(found) - len(shown)
        kinks = {s.site: s.kink for s in self.sensitivities.values() if s.kink > 0}
        return [
            f"insert {listed(chosen) or 'nothing'}{why}",
            f"loss {self.loss:.6g}{stationarity}, {read}: {self.status.name}",
            Table(rows, heads, numbers=(3, 4, 5, 6), bold=bold),
            *([f"and {more} candidates of smaller sensitivity"] if more else []),
            *(
                f"{share:.2g} of the units after {site} are at a kink, where a step has a slope of "
                "its own (cg.directional_derivative)"
                for site, share in kinks.items()
            ),
        ]

    def plot(self) -> Figure:
        """`plotting.plot_solution`: the sensitivities by place, with their standard errors.

        The chosen ones are highlighted. Needs the extra `plot`.
        """
        from constrained_growth.plotting import plot_solution

        return plot_solution(self)

    def dual_value(self, constraint: Constraint) -> Tensor:
        """λ of one of `problem.constraints`, in CVXPY's word.

        The same tensor as `multipliers[constraint.candidate][constraint.parameter]`.

        Raises:
            CandidateError: The constraint is not one of this solution.
        """
        try:
            return self.multipliers[constraint.candidate][constraint.parameter]
        except (AttributeError, KeyError):
            kept = "take it from problem.constraints of the problem that was solved"
            if not self.multipliers:
                kept = "there is no λ, as solve(multipliers=False) does not keep it"
            raise CandidateError(
                f"constraint={constraint!r} is not one of this solution; {kept}."
            ) from None
