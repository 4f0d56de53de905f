"""solve(problem, rule): measure the multipliers, weigh them, decide."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._arguments import data_again, flag, function, instance, number
from constrained_growth._data import counted, undisturbed
from constrained_growth._distributed import everywhere, in_step, several
from constrained_growth._later import with_fields
from constrained_growth._multipliers.held_out import held_out
from constrained_growth._multipliers.measure import Measurement, Pass
from constrained_growth._other_batches import is_new, learn, look_at
from constrained_growth._progress import progress_bar
from constrained_growth._sensitivities import (
    agreement_of,
    groups_of,
    sensitivities_of,
    wanted_by,
)
from constrained_growth._sharding import is_sharded, whole
from constrained_growth._sites.model import device_of, parameter_shapes
from constrained_growth._sites.untouched import differentiable, untouched
from constrained_growth.errors import CandidateError, DataError, RuleError
from constrained_growth.norms import (
    Frobenius,
    MomentNorm,
    needs_moments,
    recommended,
)
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import Generalizes, Rule, TopK, needs_model, then
from constrained_growth.rules.rule import decide_about, refuse_no_rule
from constrained_growth.solution import Decision, Norm, Planned, Solution, Status
from constrained_growth.statistics import squared_norm


def solve(
    problem: GrowthProblem,
    rule: Rule | None = None,
    *,
    norm: Norm | MomentNorm | None = None,
    validation: Iterable[Any] | None = None,
    stationarity: bool = True,
    multipliers: bool = True,
    gtol: float = 1e-5,
    throw: bool = True,
    progress: bool | None = None,
) -> Solution:
    """The multipliers of all pins, how large they are, and the decision of a rule about them.

    One forward and one backward pass over the data, in the mode (train or eval) in which the model
    is; nothing about the model, its gradients, buffers, modes or the random state is changed.

        λ_c = −∇_{v_c} L(θ, 0),   sensitivity = ‖λ_c‖ in `norm`

    The pass is faster on large batches. Where each sample's output and loss depend on that sample
    alone, `cg.rebatch(data, 2048)` makes them for a problem to be measured on.

    Args:
        problem: What to solve.
        rule: `rule(sensitivities) -> Decision`; None (default) for `TopK(1)`, or with `validation`
            what is said there. A rule with a method `decide(problem, solution) -> Decision`, such
            as `TrustRegion`, is asked that way instead, with a solution that has an empty decision.
        norm: How large a multiplier is: one of `cg.norms`, or a function of the pinned
            parameters' λ. None (default) for what `cg.norms.recommended()` says, or
            the norm of a rule that is meant for one (an attribute `norm`, as of
            `Threshold(relative=...)`). The source's choice is `cg.norms.Frobenius()`.
        validation: Batches that the model has not been trained on, to say of the step that `data`
            propose what it does to their loss: `sensitivity.held_out`. One more pass, over them.
            With `rule=None` the best candidate is chosen only if that is clearly good, by
            `then(TopK(1), Generalizes())`; otherwise nothing is. That rule is there without
            other data too, by the groups of `data` (`sensitivity.cross_fitted`).
        stationarity: Also compute ‖∇_θ L‖, without which it is not known whether λ are KKT
            multipliers. False saves one product per layer of the network.
        multipliers: Keep λ (True, default). With False the solution has the sensitivities alone,
            without `variance`, for models whose pins are as large as themselves. In the recommended
            norm, which reads 256 rows and columns of a wide λ, nothing else is then computed.
        gtol: θ counts as first-order stationary when ‖∇_θ L‖₂ max(1, ‖θ‖₂) ≤ gtol |L|, with all
            norms over the trainable parameters: the loss in other units does not change that.
        throw: Raise when there is no answer (True, default), or return a solution with the
            status that says why and an empty decision.
        progress: Progress bar: True, False, or None (default) for one on a terminal when the
            pass takes longer than a second.

    Returns:
        The solution, pure data.

    Raises:
        DataError: Loss or multipliers are NaN or infinite (with `throw`), or `data` or `validation`
            cannot be used.
        BlockError: A block is the identity on the first batch and not on a later one.
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
        >>> solution = cg.solve(problem)
        >>> solution.status.name, solution.decision.chosen
        ('LEAST_SQUARES_ESTIMATES', ('1',))
        >>> tuple(solution.multipliers["1"]["weight"].shape)
        (4, 4)
    """
    instance("problem", problem, GrowthProblem, DataError, "a cg.GrowthProblem")
    if rule is None:
        rule = TopK(1) if validation is None else then(TopK(1), Generalizes())
    norm = norm_of(rule) if norm is None else norm
    _check(problem, rule, norm, gtol)
    flags = {"stationarity": stationarity, "multipliers": multipliers, "throw": throw}
    for name, value in flags.items():
        flag(name, value, DataError)
    if not multipliers and (needs_model(rule) or validation is not None):
        raise RuleError(
            f"multipliers=False: rule={rule!r:.80} or validation asks for λ itself; leave it out."
        )
    if validation is not None:
        data_again("validation", validation)
    flag("progress", progress, DataError, optional=True)
    with untouched(problem.model, problem.loss_fn, problem.data), differentiable():
        wanted = norm, multipliers
        found = _measured(problem, problem.data, stationarity, *wanted, progress=progress)
    baseline = _baseline(found.gradients, norm)
    sensitivities = sensitivities_of(problem, found.estimates, norm, baseline, keep=multipliers)
    if validation is not None:
        with untouched(problem.model, problem.loss_fn, validation), differentiable():
            other = _measured(
                problem, validation, False, Frobenius(), True, "validation", progress=progress
            )
        slopes = held_out(found.estimates, other.estimates, problem.group)
        if not math.isfinite(other.loss) and throw:
            raise DataError(f"validation has a loss of {other.loss}: NaN or Inf in these data.")
        sensitivities = {n: with_fields(s, held_out=slopes[n]) for n, s in sensitivities.items()}
    gradients = found.gradients
    residual = None if gradients is None else math.sqrt(squared_norm(gradients.values()))
    sizes = [s.value for s in sensitivities.values()]
    moving = None
    if residual is not None:
        moving = residual * max(1.0, _size_of_theta(problem.model))
    status = _status([found.loss, residual or 0.0, *sizes], moving, gtol * abs(found.loss))
    if status is Status.NOT_FINITE and throw:
        raise DataError(
            f"the loss is {found.loss} and the sensitivities are "
            f"{ {name: s.value for name, s in sensitivities.items()} }: NaN or Inf in the data, "
            "the parameters or the loss; solve(..., throw=False) returns a solution that says so."
        )
    solution = solution_of(
        problem,
        status=status,
        loss=found.loss,
        stationarity=residual,
        multipliers={
            c.name: found.estimates[c.name].multiplier for c in problem.candidates if multipliers
        },
        sensitivities=sensitivities,
        decision=Decision((), status.value if status is Status.NOT_FINITE else ""),
        num_samples=found.num_samples,
        num_batches=found.num_batches,
    )
    if status is Status.NOT_FINITE:
        return solution
    decision = _agreed(rule, problem, solution)
    return with_fields(solution, decision=decision, agreement=agreement_of(rule, sensitivities))


def _measured(
    problem: GrowthProblem,
    data: Iterable[Any],
    gradients: bool,
    norm: Norm | MomentNorm,
    multipliers: bool,
    name: str = "data",
    *,
    progress: bool | None,
) -> Measurement:
    """λ of all candidates and, if asked for, ∇_θ L, over the data of all processes."""
    model, group, sharded = problem.model, problem.group, is_sharded(problem.model)
    groups = groups_of(problem, data, norm)
    wanted = wanted_by(norm, groups, whole=multipliers)
    arguments = model, problem.loss_fn, problem.sites, problem.method
    running = Pass(*arguments, gradients=gradients, wanted=wanted, groups=groups)

    def read() -> tuple[bool, set[str]]:
        description = {"data": "multipliers", "validation": "held out"}[name]
        bar = progress_bar(undisturbed(data), desc=description, unit="batch", progress=progress)
        counting = counted(bar, device_of(model), problem.weight)
        alike = in_step(counting, group) if sharded else ((batch, True) for batch in counting)
        holds, around = True, set[str]()
        with running.watching():
            for batch, new in alike:
                loss = running.add(*batch, counts=new)
                # what is not finite is for the status of the solution
                if is_new(problem, running.nodes) and bool(torch.isfinite(loss)):
                    one, others = look_at(problem, batch[:2], running.nodes)
                    holds, around = holds and one, around | others
        return holds, around

    if learn(problem, everywhere(read, group, collective=sharded)):
        return _measured(problem, data, gradients, norm, multipliers, name, progress=progress)
    running.reduce(group)
    return running.measurement(name)


def _agreed(rule: Rule, problem: GrowthProblem, solution: Solution) -> Decision:
    """What the rule decides on the first process; all ask it, and an error on one is for all."""

    def ask() -> Decision:
        decision = decide_about(rule, problem, solution)
        values = {
            name: {key: value.detach().cpu() for key, value in parameters.items()}
            for name, parameters in decision.values.items()
        }
        return replace(decision, values=values, evidence=dict(decision.evidence))

    if not several(problem.group):
        return decide_about(rule, problem, solution)
    return everywhere(ask, problem.group)[0]


def check_unchanged(problem: GrowthProblem) -> None:
    """Refuse a problem whose model has grown at a site since it was made."""
    modules = dict(problem.model.named_modules(remove_duplicate=False))
    for site in problem.sites:
        if modules.get(site.after) is not site.module:
            raise CandidateError(
                f'problem: the module "{site.after}" of its model is not the one it was made with '
                "(a layer was inserted there, say); make a new cg.GrowthProblem."
            )


def _check(problem: GrowthProblem, rule: object, norm: Any, gtol: float) -> None:
    check_unchanged(problem)
    refuse_no_rule("rule", rule)
    if needs_model(rule) and is_sharded(problem.model):
        raise RuleError(
            f"rule={rule!r} differentiates the model again, which a sharded one does not allow; "
            "take a rule of the sensitivities alone, such as cg.TopK(1)."
        )
    function("norm", norm, RuleError, "cg.norms.Frobenius()")
    number("gtol", gtol, RuleError, "[0, inf]")


def norm_of(rule: object) -> Norm | MomentNorm:
    """The norm where none was given: that of the rule, or the recommended one."""
    own: Norm | None = getattr(rule, "norm", None)
    return recommended() if own is None else own


def solution_of(problem: GrowthProblem, **found: Any) -> Solution:
    """What was found about a problem, with what `insert` needs to know of it."""
    wrapped = {candidate.name for candidate in problem.candidates if candidate.wrapped}
    wrapped = wrapped.union(*(site.around for site in problem.sites))
    planned = {
        name: Planned(site.after, block, site.overwritten, site.output, name in wrapped)
        for site in problem.sites
        for name, block in site.blocks.items()
    }
    return Solution(
        candidates=planned,
        parameters=parameter_shapes(problem.model),
        method=problem.method,
        example=problem.example,
        training=problem.model.training,
        **found,
    )


def _baseline(gradients: Mapping[str, Tensor] | None, norm: Norm | MomentNorm) -> float | None:
    """Mean over the layers (modules with parameters of their own) of their gradient's norm."""
    if not gradients or needs_moments(norm):
        return None
    layers: dict[str, dict[str, Tensor]] = {}
    for name, gradient in gradients.items():
        owner, _, key = name.rpartition(".")
        gradient = torch.view_as_real(gradient) if gradient.is_complex() else gradient
        layers.setdefault(owner, {})[key] = gradient
    try:
        sizes = [norm({key: whole(g) for key, g in layer.items()}) for layer in layers.values()]
    except KeyError:  # a norm of the user's own that asks for certain parameters
        return None
    try:
        return float(sum(sizes, 0.0) / len(layers))
    except (TypeError, ValueError, RuntimeError):  # no numbers: of λ they are refused
        return None


def _size_of_theta(model: nn.Module) -> float:
    """‖θ‖₂ over the trainable parameters, without a copy of them."""
    each = (p.detach() for p in model.parameters() if p.requires_grad)
    # in bfloat16 a norm would have two digits
    dtypes = ((p, torch.promote_types(p.dtype, torch.float32)) for p in each)
    return math.hypot(*(float(whole(torch.linalg.vector_norm(p, dtype=d))) for p, d in dtypes))


def _status(values: Iterable[float], moving: float | None, tolerance: float) -> Status:
    if not all(map(math.isfinite, values)):
        return Status.NOT_FINITE
    if moving is None:
        return Status.STATIONARITY_UNKNOWN
    return Status.KKT_MULTIPLIERS if moving <= tolerance else Status.LEAST_SQUARES_ESTIMATES
