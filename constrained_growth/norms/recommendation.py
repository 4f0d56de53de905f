"""The norm that we recommend."""

from __future__ import annotations

from torch import nn

from constrained_growth.norms.elasticity import Elasticity
from constrained_growth.norms.moments import MomentNorm
from constrained_growth.solution import Norm


def recommended(model: nn.Module) -> Norm | MomentNorm:
    """The norm of a decision nothing else is said about."""
    return Elasticity()
