"""A rule that suits an optimizer."""

from __future__ import annotations

import torch
from torch import nn

from constrained_growth.errors import RuleError
from constrained_growth.norms import Frobenius, norm_for
from constrained_growth.rules.composition import otherwise, then
from constrained_growth.rules.protocol import OptimizerFactory, Rule
from constrained_growth.rules.ranking import TopK
from constrained_growth.rules.stability import Stable
from constrained_growth.rules.trust_region import TrustRegion


def rule_for(optimizer: torch.optim.Optimizer | OptimizerFactory, *, step: bool = False) -> Rule:
    """The best candidate, unless the optimizer's steps would diverge with it.

    * SGD has a largest stable step, which a layer may exceed: the candidate is inserted if it does
      not, and else nothing is: `then(TopK(1), Stable(optimizer))`, for 10 gradient passes over 100
      of the samples (or one batch, if that has more).
    * Adam and its like, and Muon, scale their steps themselves: `TopK(1)`, for none (but `step`).

    Made for `solve(problem, rule_for(optimizer), norm=KroneckerFisher(ord="nuc"))`, which says
    which candidate is best. Passes that are left buy more, in the mean, as epochs of training than
    as trials or second-order steps: `constrained-growth bench decisions` holds the rules against
    each other, at the cost of each and at equal cost.

    Args:
        optimizer: The one that trains the model now and will train the new layer; or the function
            that makes one of parameters, as `grow` takes it.
        step: With Adam and its like, and Muon, spend up to 18 passes on where the layer starts: at
            the step of `TrustRegion(max_products=10)`, whose radius is remembered from one
            decision to the next, or at its pins where no step is accepted. False by default. With
            SGD it changes nothing: what is stable at the pins need not be so at the step.

    Returns:
        A rule for `solve` and, with `solver=functools.partial(cg.solve,
        norm=KroneckerFisher(ord="nuc"))`, for `grow`.

    Raises:
        RuleError: `optimizer` is neither, or one of which nothing is known.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> rule_for(torch.optim.Adam(model.parameters()))
        TopK(k=1, cost=None)
    """
    made = optimizer
    if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
        made = optimizer([nn.Parameter(torch.zeros(1, 1))])
    if isinstance(made, torch.optim.SGD):
        return then(TopK(1), Stable(optimizer))
    if not _scales_its_steps(made):
        raise RuleError(
            f"optimizer={optimizer!r} is no optimizer of which it is known what to ask; give the "
            "torch.optim.SGD or torch.optim.Adam that trains the model, say, or take cg.TopK(1)."
        )
    if step:
        return then(TopK(1), otherwise(TrustRegion(max_products=10), TopK(1)))
    return TopK(1)


def _scales_its_steps(made: object) -> bool:
    try:
        return isinstance(made, torch.optim.Optimizer) and norm_for(made) != Frobenius()
    except RuleError:  # an optimizer of somebody's own, or one that wraps another
        return False
