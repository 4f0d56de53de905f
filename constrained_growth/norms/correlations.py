"""The sum of the canonical correlations of features and cotangents: the recommended size."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor

from constrained_growth._arguments import number
from constrained_growth.errors import RuleError
from constrained_growth.norms.moments import (
    MomentNorm,
    SecondMoments,
    are_finite,
    check_moments,
    chosen_of,
    singular_values_of,
    whitened,
)


@dataclass(frozen=True)
class CanonicalCorrelations:
    """Σ ρ_i · (Σ_j rms(δ_j) rms(x_j))^e, ρ_i the canonical correlations of features and cotangents.

    For a pinned affine map Wφ + b, what the loss asks for is a motion of its output along −ψ, and
    what a motion of W can supply is linear in φ. The canonical correlations say in how many
    directions, and how well, one predicts the other: with Σ_φφ, Σ_ψψ, Σ_ψφ the covariances,

        ρ_i = the singular values of Σ_ψψ^(-1/2) Σ_ψφ Σ_φφ^(-1/2),   −Σ_ψφ = λ_W − λ_b E[φ]ᵀ.

    So Σ ρ_i is a norm of λ_W with what is constant taken out, since a bias of the old layers can do
    that already: `KroneckerFisher(ord="nuc")` about the means. Each ρ_i is at most 1 without
    positions (which count as if independent), and Σ ρ_i at most the smaller of the two widths.

    The second factor says how much hangs on the site: x is the tensor there, with units j, and
    δ = ∂ℓ_n/∂x, so that it bounds by how much the loss changes, to first order, if each unit
    changes by its own size (an elasticity).

    When the units of a ReLU layer are rescaled, x by s and δ by 1/s, nothing changes: exactly with
    one s for all units; and for identity layers, whose features and outputs are brought to units in
    which both are of one size, with one s for each.

    It measures correlation and is no price: in a network that has nothing to learn it is that of
    the noise, so that it says where and not whether. Of N samples without any relation Σ ρ_i² is
    about (dim φ)(dim ψ)/N.

    For widths above 256 the correlations are those of 256 features and outputs, the same random
    ones at each site of that width. All pinned maps of a candidate add up.

    Attributes:
        damping: d. Σ + d (tr Σ/dim) I replaces Σ_φφ and Σ_ψψ, which few samples make nearly
            singular. 0.1 by default.
        elasticity: e. 1/3 by default; powers from 1/4 to 1/3 decide alike, on networks with frozen
            weights better than 0, on others as well.

    Raises:
        RuleError: `damping` is not positive or `elasticity` negative; or, when called, moments are
            missing.

    Source:
        Hotelling, *Relations between two sets of variates*, Biometrika 28, 1936; with ridge: Vinod,
        *Canonical ridge and econometrics of joint production*, Journal of Econometrics 4, 1976.

    Example:
        >>> features = torch.tensor([[1.0], [2.0], [3.0]])
        >>> cotangents = torch.tensor([[5.0], [3.0], [4.0]])
        >>> moments = SecondMoments.of(features, cotangents)
        >>> weight = -cotangents.T @ features / 3
        >>> norm = CanonicalCorrelations(damping=1e-9, elasticity=0.0)
        >>> round(norm({"weight": weight}, {"weight": moments}).item(), 3)  # |correlation|
        0.5
    """

    damping: float = 0.1
    elasticity: float = 1 / 3
    needs_moments: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("damping", self.damping, RuleError, "(0, inf)")
        number("elasticity", self.elasticity, RuleError, "[0, inf)")

    def __call__(
        self, multiplier: Mapping[str, Tensor], moments: Mapping[str, SecondMoments]
    ) -> Tensor:
        """The sum for the multiplier of one candidate, in float64."""
        check_moments(self, multiplier, moments)
        found = [self._correlations(multiplier[name], name, m) for name, m in moments.items()]
        return torch.cat(found).sum() * self._elasticity(moments)

    def _elasticity(self, moments: Mapping[str, SecondMoments]) -> Tensor | float:
        """The second factor, which is the same for all maps of a candidate."""
        known = next((m.elasticity for m in moments.values()), None)
        if self.elasticity == 0:
            return 1.0
        if known is None:
            raise RuleError(f"norm={self!r} needs moments with an elasticity.")
        return known.double() ** self.elasticity

    def _correlations(self, weight: Tensor, name: str, moments: SecondMoments) -> Tensor:
        """Those of one affine map."""
        matrix = chosen_of(weight, name, moments)
        features, cotangents = moments.features, moments.cotangents
        if moments.mean is not None and moments.shift is not None:
            mean = moments.mean.view(*features.shape[:-1], 1)
            shift = moments.shift.view(*cotangents.shape[:-1], 1).to(matrix)
            matrix = matrix - shift @ mean.mT
            features = features - mean @ mean.mT
            cotangents = cotangents - shift @ shift.mT / moments.positions
        if not are_finite(matrix, features, cotangents):
            return matrix.new_full((1,), math.nan, dtype=torch.float64)
        if moments.same_units and _aligned(moments):
            outputs, inputs = moments.cotangents.diagonal(), moments.features.diagonal()
            inputs = inputs.view(len(outputs), -1).mean(1)  # of a channel
            alive = (inputs > 0) & (outputs > 0)
            scale = torch.where(alive, outputs / torch.where(alive, inputs, 1.0), 1.0) ** 0.25
            every = scale.repeat_interleave(len(features) // len(scale))
            matrix = matrix * every / scale[:, None]
            cotangents = cotangents / (scale[:, None] * scale)
            features = features * (every[:, None] * every)
        rows = whitened(matrix, cotangents, self.damping)
        both = whitened(rows.mT, features, self.damping).double()
        return singular_values_of(both) / math.sqrt(moments.positions)


def _aligned(moments: SecondMoments) -> bool:
    """Whether the features chosen are still those of the outputs chosen."""
    if moments.rows is None or moments.columns is None:
        return moments.rows is moments.columns
    return torch.equal(moments.rows, moments.columns)


def recommended() -> MomentNorm:
    """The norm of a decision of which nothing else is said: `CanonicalCorrelations()`.

    By one criterion: of the sizes that do not depend on the units of a site, the one with the
    lowest mean regret over the families of networks of `constrained-growth bench decisions`, with
    old weights frozen and trained on.

    Example:
        >>> recommended()
        CanonicalCorrelations(damping=0.1, elasticity=0.3333333333333333)
    """
    return CanonicalCorrelations()
