"""How large a multiplier is.

A norm is any function of a multiplier (pinned parameter → tensor) that returns a number. The one
that decides where nothing else is said is `recommended()`: λ in the geometry of natural gradients,
which does not depend on the units of a site. `Frobenius` is the source's choice.

What a first step of the new layer gains is a theory of its own: the largest first-order decrease
of the loss in a ball ‖v‖ ≤ Δ is

    max { ⟨λ, v⟩ : ‖v‖ ≤ Δ } = Δ ‖λ‖_*,

the *dual* of the norm in which the optimizer moves the new layer (Boyd and Vandenberghe, *Convex
Optimization*, 2004, A.1.6). `norm_for` picks it.

It is always one ball over all pinned parameters of a candidate together. For matrix norms a vector
is a matrix with one column, a tensor of more dimensions (the kernel of a convolution) is flattened
to (out, everything else), and several tensors are the blocks of one block-diagonal matrix.
"""

from constrained_growth.norms.matrices import (
    Entrywise1,
    Frobenius,
    Nuclear,
    PerParameter,
    Spectral,
    norm_for,
)
from constrained_growth.norms.moments import (
    KroneckerFisher,
    MomentNorm,
    SecondMoments,
    lipschitz,
    needs_moments,
    recommended,
)
from constrained_growth.solution import Norm

__all__ = [
    "Entrywise1",
    "Frobenius",
    "KroneckerFisher",
    "MomentNorm",
    "Norm",
    "Nuclear",
    "PerParameter",
    "SecondMoments",
    "Spectral",
    "lipschitz",
    "needs_moments",
    "norm_for",
    "recommended",
]
