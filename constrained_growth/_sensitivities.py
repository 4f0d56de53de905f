"""How large the multipliers of a problem are, and how sure that is."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from operator import itemgetter
from typing import Any

from constrained_growth._data import batch_size
from constrained_growth._distributed import everywhere, several
from constrained_growth._later import Later
from constrained_growth._multipliers.accumulator import Estimate, Wanted
from constrained_growth._multipliers.groups import FEWEST, FEWEST_OF_PARTS, ROOM, Groups
from constrained_growth._multipliers.held_out import cross_fitted
from constrained_growth._multipliers.replicates import replicates_of, value_of
from constrained_growth._multipliers.wide import narrowed_shape
from constrained_growth.blocks import pinned_parameters
from constrained_growth.norms import KroneckerFisher, MomentNorm, lipschitz, needs_moments
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import Rule, needs_model
from constrained_growth.rules.composition import keeps_state
from constrained_growth.solution import Norm, Sensitivity
from constrained_growth.statistics import agreement, squared_norm


def sensitivities_of(
    problem: GrowthProblem,
    estimates: Mapping[str, Estimate],
    norm: Norm | MomentNorm,
    baseline: float | None = None,
    *,
    keep: bool = True,
) -> dict[str, Sensitivity]:
    """Candidate → how large its multiplier is, in the order of the problem.

    Without `keep` nothing holds on to all of λ.
    """
    sites = {name: site for site in problem.sites for name in site.blocks}
    shared = several(problem.group)

    def values() -> dict[str, tuple[int, float]]:
        return {
            name: (int((estimate.weights > 0).sum()), value_of(norm, estimate))
            for name, estimate in estimates.items()
        }

    def replicates() -> dict[str, tuple[float, ...]]:
        # few, as every decision of several processes waits for them
        return {name: replicates_of(norm, one, few=True) for name, one in estimates.items()}

    # by the process with the most groups, of which some moments are made
    sizes = everywhere(values, problem.group)
    # made when they are first read, or, of several processes, at once where λ is small enough
    every: list[dict[str, tuple[float, ...]]] = []
    if shared and sum(_room(estimate) for estimate in estimates.values()) <= ROOM:
        every = everywhere(replicates, problem.group)

    left_out: Any = cross_fitted(estimates, problem.group) if shared else {}

    def sensitivity(name: str) -> Sensitivity:
        estimate, site = estimates[name], sites[name]
        multiplier, variance = estimate.multiplier, estimate.variance
        known: Any = next((p[name] for p in every if p[name]), ())
        others: Any = left_out.get(name)
        if not shared and (keep or reads_a_part(norm)):
            known = Later(lambda _: replicates_of(norm, estimate))
            others = Later(lambda _: cross_fitted({name: estimate}, None)[name])
        elif not shared:
            known = replicates_of(norm, estimate, few=True)
            others = cross_fitted({name: estimate}, None)[name]
        return Sensitivity(
            value=max((size[name] for size in sizes), key=itemgetter(0))[1],
            num_parameters=sum(map(math.prod, estimate.shapes.values())),
            num_new_parameters=sum(p.numel() for p in site.blocks[name].parameters()),
            norm=norm,
            baseline=baseline,
            site=site.after,
            variance=variance,
            debiased_square=squared_norm(multiplier.values()) - variance,
            error_bound=lipschitz(norm, multiplier) * math.sqrt(variance),
            replicates=known,
            cross_fitted=others,
            kink=site.kinks.get(name, 0.0),
        )

    return {candidate.name: sensitivity(candidate.name) for candidate in problem.candidates}


def agreement_of(rule: Rule, sensitivities: Mapping[str, Sensitivity]) -> Any:
    """How often a rule would decide the same, once someone wants to know."""
    if needs_model(rule) or keeps_state(rule):
        return math.nan
    return Later(lambda _: agreement(sensitivities, rule))


def _room(estimate: Estimate) -> int:
    """Bytes that the sums of the groups take."""
    return sum(total.nbytes for total in estimate.sums.values())


def groups_of(
    problem: GrowthProblem, data: Iterable[Any] | None, norm: Norm | MomentNorm
) -> Groups:
    """Groups of samples for the candidates of a problem."""
    blocks = [block for site in problem.sites for block in site.blocks.values()]
    narrow = reads_a_part(norm)
    shape_of = narrowed_shape if narrow else tuple[int, ...]
    pins = [
        sum(p.itemsize * math.prod(shape_of(p.shape)) for p in pinned_parameters(block).values())
        for block in blocks
    ]
    size = 1 if problem.example is None else batch_size(problem.example, None)
    return Groups(data, size, pins, FEWEST_OF_PARTS if narrow else FEWEST)


def wanted_by(norm: Norm | MomentNorm, groups: Groups, *, whole: bool = True) -> Wanted:
    """What is to be summed up for a norm, and for the `whole` λ."""
    batches, narrow = groups.known_batches, reads_a_part(norm)
    return Wanted(needs_moments(norm), groups.count, batches, narrow=narrow, whole=whole)


def reads_a_part(norm: object) -> bool:
    """Whether a norm reads no more of a wide λ than the rows and columns that moments are of."""
    return type(norm) is KroneckerFisher  # one made from it may read more
