"""The norm that we recommend."""

from __future__ import annotations

from constrained_growth.norms.moments import KroneckerFisher, MomentNorm


def recommended() -> MomentNorm:
    """The norm of a decision of which nothing else is said: `KroneckerFisher(ord="nuc")`.

    Of all sizes that `constrained-growth bench decisions` compares it has the lowest regret on
    average over its families, with old weights frozen and not.

    Example:
        >>> recommended()
        KroneckerFisher(damping=0.1, ord='nuc')
    """
    return KroneckerFisher(ord="nuc")
