"""The rule that we recommend for an optimizer."""

from __future__ import annotations

import torch
from torch import nn

from constrained_growth._arguments import flag
from constrained_growth.errors import RuleError
from constrained_growth.norms import Frobenius, norm_for
from constrained_growth.rules.composition import otherwise, then
from constrained_growth.rules.rule import OptimizerFactory, Rule
from constrained_growth.rules.selection import TopK
from constrained_growth.rules.stability import Stable
from constrained_growth.rules.trust_region import TrustRegion


def rule_for(optimizer: torch.optim.Optimizer | OptimizerFactory, *, step: bool = False) -> Rule:
    """The best candidate, unless it would make the optimizer's steps diverge.

    * SGD has a largest stable step size, which a new layer can lower. The candidate is inserted
      only if the steps stay stable: `then(TopK(1), Stable(optimizer))`, at 10 gradient passes over
      100 of the samples (or over one batch, if that has more).
    * Adam and its relatives, and Muon, scale their steps themselves: `TopK(1)`, at no cost
      (unless `step`).

    `solve`, `grow`, `Grower` and the callbacks without a rule take `TopK(1)`.

    Args:
        optimizer: The optimizer that trains the model now and will train the new layer; or a
            function that makes it from parameters, as `grow` takes it.
        step: Spend up to 18 passes on where the layer starts: at the step of
            `TrustRegion(max_products=10)`, or at its pins if none is accepted. Not with SGD.

    Raises:
        RuleError: `optimizer` is not an optimizer, or not one for which a rule is known.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> rule_for(torch.optim.Adam(model.parameters()))
        TopK(k=1, cost=None)
    """
    flag("step", step, RuleError)
    made = optimizer
    if callable(optimizer) and not isinstance(optimizer, torch.optim.Optimizer):
        made = optimizer([nn.Parameter(torch.zeros(1, 1))])
    if isinstance(made, torch.optim.SGD):
        return then(TopK(1), Stable(optimizer))
    try:
        scales_its_steps = isinstance(made, torch.optim.Optimizer) and norm_for(made) != Frobenius()
    except RuleError:  # a user's own optimizer, or one that wraps another
        scales_its_steps = False
    if not scales_its_steps:
        raise RuleError(
            f"no rule is known for optimizer={optimizer!r}, only for those of torch.optim, such as "
            "torch.optim.SGD or torch.optim.Adam; use cg.TopK(1)."
        )
    if step:
        return then(TopK(1), otherwise(TrustRegion(max_products=10), TopK(1)))
    return TopK(1)
