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
    """Σ ρ_i, the canonical correlations of the features φ and cotangents ψ of a pinned map.

    For a pinned affine map Wφ + b, what the loss asks for is a motion of its output along −ψ, and
    what a motion of W can supply is linear in φ. The canonical correlations say in how many
    directions, and how well, one predicts the other: with Σ_φφ, Σ_ψψ, Σ_ψφ the covariances,

        ρ_i = the singular values of Σ_ψψ^(-1/2) Σ_ψφ Σ_φφ^(-1/2),   −Σ_ψφ = λ_W − λ_b E[φ]ᵀ.

    So it is a norm of λ_W with what is constant taken out, since a bias of the old layers can do
    that already: `KroneckerFisher(ord="nuc")` about the means. It has no units: it is the same
    whatever the units of the loss, of each feature and of each output, and a change of the units
    of a ReLU layer changes no decision. Each ρ_i is at most 1 without positions (then they count
    as if independent), and Σ ρ_i at most the smaller of the two widths.

    It measures correlation and is no price: of a network that has nothing to learn it is that of
    the noise, so that it says where and not whether. Of N samples without any relation Σ ρ_i² is
    about (dim φ)(dim ψ)/N.

    For widths above 512 the correlations are those of 512 features and outputs, the same random
    ones at each site of that width. All pinned maps of a candidate add up.

    Attributes:
        damping: d. Σ + d diag Σ replaces Σ_φφ and Σ_ψψ, which few samples make nearly singular:
            a ridge for variables of unit variance. 0.1 by default.

    Raises:
        RuleError: `damping` is not positive; or, when called, moments are missing.

    Source:
        Hotelling, *Relations between two sets of variates*, Biometrika 28, 1936; with ridge: Vinod,
        *Canonical ridge and econometrics of joint production*, 1976.

    Example:
        >>> features = torch.tensor([[1.0], [2.0], [3.0]])
        >>> cotangents = torch.tensor([[5.0], [3.0], [4.0]])
        >>> moments = SecondMoments.of(features, cotangents)
        >>> weight = -cotangents.T @ features / 3
        >>> norm = CanonicalCorrelations(damping=1e-9)
        >>> round(norm({"weight": weight}, {"weight": moments}).item(), 3)  # |correlation|
        0.5
    """

    damping: float = 0.1
    needs_moments: ClassVar[bool] = True

    def __post_init__(self) -> None:
        number("damping", self.damping, RuleError, "(0, inf)")

    def __call__(
        self, multiplier: Mapping[str, Tensor], moments: Mapping[str, SecondMoments]
    ) -> Tensor:
        """The sum for the multiplier of one candidate, in float64."""
        check_moments(self, multiplier, moments)
        found = [self._correlations(multiplier[name], name, m) for name, m in moments.items()]
        return torch.cat(found).sum()

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
        positions = math.sqrt(moments.positions)
        left, scaled = _standardised(cotangents, moments.cotangents, matrix)
        rows = whitened(scaled, left, self.damping)
        right, scaled = _standardised(features, moments.features, rows.mT)
        return singular_values_of(whitened(scaled, right, self.damping).double()) / positions


def _standardised(moment: Tensor, plain: Tensor, matrix: Tensor) -> tuple[Tensor, Tensor]:
    """A covariance as correlations, and the rows of a matrix in units of the same deviations."""
    variances = moment.diagonal(dim1=-2, dim2=-1)
    # what does not vary but for rounding, as a dead unit, has no correlations
    least = 1e2 * torch.finfo(moment.dtype).eps * plain.diagonal(dim1=-2, dim2=-1)
    alive = variances > least
    units = torch.where(alive, variances, 1.0).sqrt()
    both = alive[..., :, None] & alive[..., None, :]
    one = torch.eye(moment.shape[-1], dtype=moment.dtype, device=moment.device)
    correlations = torch.where(both, moment / (units[..., :, None] * units[..., None, :]), one)
    kept = torch.where(alive[..., None], matrix.to(moment) / units[..., :, None], 0.0)
    return correlations, kept


def recommended() -> MomentNorm:
    """The norm of a decision of which nothing else is said: `CanonicalCorrelations()`.

    Of all sizes that `constrained-growth bench decisions` compares and that do not depend on units,
    it has the lowest mean regret over all families, with old weights frozen and trained on.

    Example:
        >>> recommended()
        CanonicalCorrelations(damping=0.1)
    """
    return CanonicalCorrelations()
