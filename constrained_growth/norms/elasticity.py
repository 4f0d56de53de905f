"""How much the loss hangs on a site, and how much of what it asks for a layer can supply."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import ClassVar

import numpy as np
import torch
from scipy.sparse.linalg import LinearOperator, cg
from torch import Tensor

from constrained_growth._arguments import number
from constrained_growth.errors import RuleError
from constrained_growth.norms.moments import (
    Moments,
    SecondMoments,
    augmented,
    pins_without_map,
    whitened,
)


@dataclass(frozen=True)
class Elasticity:
    """The share of what the loss asks for that a layer can supply, times an elasticity.

        R² · rms(δ) · rms(x) = c² · rms(x) / rms(δ),   c² = λᵀ (E JᵀJ)⁻¹ λ,   R² = c² / E‖δ‖²

    x is the tensor at the site and δ = ∂ℓ_n/∂x, so that the loss asks the layer for a motion along
    −δ; J is the derivative of the layer's output by its pins. R² is the multiple correlation: the
    share of δ that a motion J v can supply. rms(δ) rms(x) bounds by how much the loss changes, to
    first order, if the tensor there changes by its own size. The product, in units of the loss,
    is the same in whatever units features, pins and site are measured, and candidates of different
    kinds can be compared by it.

    E JᵀJ is taken pin by pin. For a pinned affine map Wφ + b it is A ⊗ E BᵀB, where A = E[φ̃φ̃ᵀ] and
    B brings a motion of Wφ + b to the layer's output, and BᵀB is replaced by its mean diagonal
    (which is exact where the layer adds Wφ + b to x): c² = tr(λ̃ A⁻¹ λ̃ᵀ)/(gain · positions), at the
    cost of one Cholesky factor. For pins that are in no affine map it is never formed: SciPy's
    conjugate gradients solve with its products, on the samples of one batch.

    Attributes:
        damping: d. A + d diag A replaces A, as few samples make A nearly singular; relative to
            the diagonal, so that the units of features do not matter. 0.1 by default.

    Raises:
        RuleError: `damping` is not a positive number; or, when called, moments are missing.

    Source:
        R²: Hotelling, *Relations between two sets of variates*, 1936, and as a Gauss–Newton
        decrement: Nocedal and Wright, *Numerical Optimization*, 2006, section 10.3.

    Example:
        >>> x, delta = torch.tensor([[1.0], [1.0]]), torch.tensor([[2.0], [4.0]])
        >>> maps = {"weight": SecondMoments.of(x, delta)}
        >>> moments = Moments(maps, x=torch.tensor(1.0), delta=torch.tensor(10.0))
        >>> round(Elasticity(damping=1e-9)({"weight": torch.tensor([[-3.0]])}, moments).item(), 4)
        2.846
    """

    damping: float = 0.1
    needs_moments: ClassVar[bool] = True
    needs_cotangents: ClassVar[bool] = False

    def __post_init__(self) -> None:
        number("damping", self.damping, RuleError, "(0, inf)")

    def __call__(
        self, multiplier: Mapping[str, Tensor], moments: Mapping[str, SecondMoments]
    ) -> Tensor:
        """The size of the multiplier of one candidate, in float64."""
        if not isinstance(moments, Moments):
            raise RuleError("moments of Elasticity must be cg.norms.Moments, with x and delta.")
        missing = pins_without_map(multiplier, moments)
        if missing and moments.product is None:
            raise RuleError(f"moments of Elasticity say nothing of the pins {missing}.")
        x, delta = moments.x.double(), moments.delta.double()
        if not all(t.isfinite().all() for t in (*multiplier.values(), x, delta)):
            return torch.full_like(x, math.nan)
        if missing:
            square = self._matrix_free(multiplier, moments)
        else:
            square = torch.stack([self._square(multiplier, *one) for one in moments.items()]).sum()
        # without δ there is no λ
        return square.to(x) * (x / torch.where(delta > 0, delta, 1.0)).sqrt()

    def _square(
        self, multiplier: Mapping[str, Tensor], name: str, moments: SecondMoments
    ) -> Tensor:
        """c² of one affine map, its features in units of their own size."""
        matrix, features = augmented(multiplier, name, moments), moments.features
        sizes = features.diagonal(dim1=-2, dim2=-1).sqrt()
        units = torch.where(sizes > 0, sizes, 1.0)  # of a dead feature λ is zero
        correlations = features / (units[..., :, None] * units[..., None, :])
        scaled = matrix.to(units).mT / units[..., :, None]
        square = whitened(scaled, correlations, self.damping).square().sum()
        scale = moments.gain * moments.positions
        return square.double() / (scale if scale > 0 else 1.0)

    def _matrix_free(self, multiplier: Mapping[str, Tensor], moments: Moments) -> Tensor:
        """c² by products with E JᵀJ alone."""
        assert moments.product is not None
        flat = torch.cat([t.reshape(-1) for t in multiplier.values()])
        sizes = [t.numel() for t in multiplier.values()]

        def product(vector: np.ndarray) -> np.ndarray:
            parts = torch.from_numpy(vector.reshape(-1)).to(flat).split(sizes)
            given = zip(multiplier.items(), parts, strict=True)
            image = moments.product({name: p.view_as(t) for (name, t), p in given})  # type: ignore
            found = torch.cat([image[name].reshape(-1) for name in multiplier])
            return found.double().cpu().numpy()

        size = len(flat)
        signs = np.random.default_rng(0).choice([-1.0, 1.0], (8, size))
        # Hutchinson's estimate of the mean diagonal
        shift = self.damping * float(np.mean([e @ product(e) for e in signs])) / size
        if not shift > 0:
            return flat.sum() * 0.0
        damped = LinearOperator((size, size), lambda v: product(v) + shift * v.reshape(-1))
        given = flat.detach().double().cpu().numpy()
        solved, _ = cg(damped, given, rtol=1e-4, maxiter=50)
        direction = torch.from_numpy(solved).to(flat)
        # its derivative by λ is 2 M⁻¹ λ, as that of the quadratic form itself
        return 2 * (flat @ direction) - flat.detach() @ direction
