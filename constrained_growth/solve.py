"""solve(problem, rule): measure the multipliers, weigh them, decide."""

from __future__ import annotations

import math
from collections.abc import Mapping

from torch import Tensor

from constrained_growth.errors import DataError, RuleError
from constrained_growth.multipliers import Measurement, measure
from constrained_growth.norms import Frobenius, MomentNorm, lipschitz, needs_moments
from constrained_growth.observation import differentiable, untouched
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import DecisionRule, TopK
from constrained_growth.solution import (
    Decision,
    Norm,
    Planned,
    Sensitivity,
    Solution,
    Status,
)
from constrained_growth.statistics import debiased_square, squared_norm
from constrained_growth.tallies import Estimate

_TOP_ONE = TopK(1)
_FROBENIUS = Frobenius()


def solve(
    problem: GrowthProblem,
    rule: DecisionRule = _TOP_ONE,
    *,
    norm: Norm | MomentNorm = _FROBENIUS,
    stationarity: bool = True,
    gtol: float = 1e-5,
    throw: bool = True,
    progress: bool | None = None,
) -> Solution:
    """The multipliers of all pins, how large they are, and what the rule makes of them.

    One forward and one backward pass over the data; nothing about the model, its gradients,
    buffers, modes or the random state is changed.

        λ_c = −∇_{v_c} L(θ, 0),   sensitivity = ‖λ_c‖ in `norm`

    Args:
        problem: What to solve.
        rule: `rule(sensitivities) -> Decision`; `TopK(1)` by default, as in the source.
        norm: How large a multiplier is: one of `cg.norms`, or a function of the pinned
            parameters' λ. `Frobenius()` by default, the dual of the ball in which SGD moves;
            `cg.norms.norm_for(optimizer)` picks the one of yours.
        stationarity: Also compute ‖∇_θ L‖, without which it is not known whether λ are KKT
            multipliers. False saves one product per layer of the network.
        gtol: θ counts as stationary when ‖∇_θ L‖₂ ≤ gtol (SciPy's name and, for BFGS, its
            default value).
        throw: Raise when there is no answer (True, default), or return a solution with the
            status that says why and an empty decision.
        progress: Progress bar: True, False, or None (default) for one on a terminal when the
            pass takes longer than a second.

    Returns:
        The solution, pure data.

    Raises:
        DataError: Loss or multipliers are NaN or infinite (with `throw`), or the data cannot be
            used.
        CandidateError: A site is not reached exactly once in some batch.
        RuleError: The rule does not return a decision about these candidates.

    Source:
        Herberg et al., arXiv 2311.15995; multiplier estimates: Nocedal and Wright, *Numerical
        Optimization*, 2nd ed. 2006, section 18.3.

    Example:
        >>> import torch
        >>> from torch import nn
        >>> import constrained_growth as cg
        >>> _ = torch.manual_seed(0)
        >>> net = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        >>> data = [(torch.randn(8, 2), torch.randint(3, (8,)))]
        >>> candidate = cg.Candidate(after="1", block=cg.blocks.IdentityLinear(4, nn.ReLU()))
        >>> problem = cg.GrowthProblem(net, nn.CrossEntropyLoss(), data, [candidate])
        >>> solution = cg.solve(problem, rule=cg.TopK(1))
        >>> solution.status.name, solution.decision.chosen
        ('LEAST_SQUARES_ESTIMATES', ('1',))
        >>> tuple(solution.multipliers["1"]["weight"].shape)
        (4, 4)
    """
    _check(problem, rule, norm, gtol)
    with untouched(problem.model, problem.data), differentiable():
        found = measure(
            problem.model,
            problem.loss_fn,
            problem.data,
            problem.sites,
            gradients=stationarity,
            moments=needs_moments(norm),
            progress=progress,
            group=problem.group,
        )
    sensitivities = _sensitivities(problem, found, norm)
    residual = (
        None if found.gradients is None else math.sqrt(squared_norm(found.gradients.values()))
    )
    status = _status(found, sensitivities, residual, gtol)
    if status is Status.NOT_FINITE and throw:
        raise DataError(
            f"the loss is {found.loss} and the sensitivities are "
            f"{ {name: s.value for name, s in sensitivities.items()} }: NaN or Inf in the data, "
            "the parameters or the loss; solve(..., throw=False) returns a solution that says so."
        )
    decision = (
        Decision((), status.value) if status is Status.NOT_FINITE else _decide(rule, sensitivities)
    )
    return Solution(
        status=status,
        loss=found.loss,
        stationarity=residual,
        multipliers={c.name: found.estimates[c.name].multiplier for c in problem.candidates},
        sensitivities=sensitivities,
        decision=decision,
        candidates={
            name: Planned(site.after, block, site.overwritten)
            for site in problem.sites
            for name, block in site.blocks.items()
        },
        num_samples=found.num_samples,
        num_batches=found.num_batches,
    )


def _check(problem: object, rule: object, norm: object, gtol: float) -> None:
    if not isinstance(problem, GrowthProblem):
        raise DataError(f"problem={problem!r} is not a cg.GrowthProblem.")
    if not callable(rule):
        raise RuleError(
            f"rule={rule!r} cannot be called; give cg.TopK(1), or a function that takes the "
            "sensitivities and returns a cg.Decision."
        )
    if not callable(norm):
        raise RuleError(f"norm={norm!r} cannot be called; give one of cg.norms, or a function.")
    if not gtol >= 0:
        raise RuleError(f"gtol={gtol!r} must not be negative.")


def _sensitivities(
    problem: GrowthProblem, found: Measurement, norm: Norm | MomentNorm
) -> dict[str, Sensitivity]:
    baseline = _baseline(found.gradients, norm)
    planned = {name: (site, b) for site in problem.sites for name, b in site.blocks.items()}
    result = {}
    for candidate in problem.candidates:
        estimate = found.estimates[candidate.name]
        site, block = planned[candidate.name]
        result[candidate.name] = Sensitivity(
            value=_size(estimate, norm),
            standard_error=lipschitz(norm, estimate.multiplier) * math.sqrt(estimate.variance),
            num_parameters=sum(value.numel() for value in estimate.multiplier.values()),
            num_new_parameters=sum(p.numel() for p in block.parameters()),
            norm=norm,
            baseline=baseline,
            site=site.after,
            variance=estimate.variance,
            debiased_square=debiased_square(estimate.multiplier.values(), estimate.variance),
        )
    return result


def _size(estimate: Estimate, norm: Norm | MomentNorm) -> float:
    if needs_moments(norm):
        return float(norm(estimate.multiplier, estimate.moments))
    return float(norm(estimate.multiplier))


def _baseline(gradients: Mapping[str, Tensor] | None, norm: Norm | MomentNorm) -> float | None:
    """Mean over the layers (modules with parameters of their own) of their gradient's norm."""
    if not gradients or needs_moments(norm):
        return None
    layers: dict[str, dict[str, Tensor]] = {}
    for name, gradient in gradients.items():
        owner, _, key = name.rpartition(".")
        layers.setdefault(owner, {})[key] = gradient
    try:
        return sum(float(norm(layer)) for layer in layers.values()) / len(layers)
    except KeyError:  # a norm of the user's own that asks for certain parameters
        return None


def _status(
    found: Measurement,
    sensitivities: Mapping[str, Sensitivity],
    residual: float | None,
    gtol: float,
) -> Status:
    values = [found.loss, residual or 0.0, *(s.value for s in sensitivities.values())]
    if not all(math.isfinite(value) for value in values):
        return Status.NOT_FINITE
    if residual is None:
        return Status.STATIONARITY_UNKNOWN
    return Status.KKT_MULTIPLIERS if residual <= gtol else Status.LEAST_SQUARES_ESTIMATES


def _decide(rule: DecisionRule, sensitivities: Mapping[str, Sensitivity]) -> Decision:
    decision = rule(sensitivities)
    if not isinstance(decision, Decision):
        raise RuleError(
            f"rule={rule!r} returned {decision!r}, not a cg.Decision; return "
            "cg.Decision(chosen=('name of a candidate', ...)), with () to insert nothing."
        )
    if isinstance(decision.chosen, str):
        raise RuleError(
            f"rule={rule!r} chose the string {decision.chosen!r}, not a tuple of names."
        )
    unknown = [name for name in decision.chosen if name not in sensitivities]
    if unknown or len(set(decision.chosen)) != len(decision.chosen):
        raise RuleError(
            f"rule={rule!r} chose {decision.chosen}; the candidates are {tuple(sensitivities)}, "
            "each to be chosen at most once."
        )
    return decision
