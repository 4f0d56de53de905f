"""A rule that suits an optimizer."""

from __future__ import annotations

import torch

from constrained_growth.errors import RuleError
from constrained_growth.rules.composition import then
from constrained_growth.rules.protocol import Rule
from constrained_growth.rules.ranking import TopK
from constrained_growth.rules.stability import Stable
from constrained_growth.rules.trust_region import TrustRegion


def rule_for(optimizer: torch.optim.Optimizer) -> Rule:
    """The best candidate, asked what matters most for an optimizer, for twenty gradient passes.

    * SGD has a largest stable step, which a layer may exceed: the candidate is inserted if it does
      not, and else nothing is: `then(TopK(1), Stable(optimizer))`.
    * Others, such as Adam, scale their steps themselves, and gain from a layer that does not start
      at zero: `then(TopK(1), TrustRegion(max_products=10))`, or nothing where no step holds.

    Made for `solve(problem, rule_for(optimizer), norm=KroneckerFisher())`, which says which
    candidate is best; with λ it costs at most 20 gradient passes. `constrained-growth bench
    decisions` judges it, and its parts, beside all other rules.

    Args:
        optimizer: The one that trains the model and will train the new layer.

    Returns:
        A rule for `solve` and `grow`.

    Raises:
        RuleError: It is no optimizer of PyTorch.

    Example:
        >>> model = torch.nn.Linear(2, 2)
        >>> rule_for(torch.optim.Adam(model.parameters()))
        ModelChain(rules=(TopK(k=1, cost=None), TrustRegion(radius=1)))
    """
    if not isinstance(optimizer, torch.optim.Optimizer):
        raise RuleError(
            f"optimizer={optimizer!r} is not a torch.optim.Optimizer; give the one that trains the "
            "model, such as torch.optim.SGD(model.parameters(), lr=0.1)."
        )
    if isinstance(optimizer, torch.optim.SGD):
        return then(TopK(1), Stable(optimizer))
    return then(TopK(1), TrustRegion(max_products=10))
