"""Norms that also ask what pinned parameters see: second moments of features, cotangents."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from numbers import Real
from typing import TYPE_CHECKING, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from constrained_growth.errors import RuleError
from constrained_growth.solution import Norm

if TYPE_CHECKING:
    from typing_extensions import TypeIs


from constrained_growth.norms.matrices import as_matrix, is_finite, singular_values


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """What a pinned affine map Wφ + b sees: the second moments of features and cotangents.

    Both are means over samples, so those of a data set are the means of those of its batches,
    weighted by their numbers of samples. With T positions per sample (a sequence, an image) A
    is the mean over them and G the sum, as if the positions were independent.

    Attributes:
        features: A = E[φ̃ φ̃ᵀ], with φ̃ = (φ, 1) if there is a bias and φ̃ = φ if not; shape
            (in + 1, in + 1) or (in, in).
        cotangents: G = E[ψ ψᵀ], shape (out, out), with ψ = ∂ℓ_n/∂(Wφ + b) of the loss ℓ_n of one
            sample, *not* divided by the number of samples.
        bias: Name of the pinned bias b, or None.

    Source:
        Martens and Grosse, arXiv 1503.05671; with positions: Grosse and Martens, *A
        Kronecker-factored approximate Fisher matrix for convolution layers*, 2016.
    """

    features: Tensor
    cotangents: Tensor
    bias: str | None = None

    @classmethod
    def of(cls, features: Tensor, cotangents: Tensor, bias: str | None = None) -> SecondMoments:
        """The second moments of given samples.

        Args:
            features: φ, shape (samples, ..., in), without the 1 that stands for the bias.
            cotangents: ψ of the loss of each sample, shape (samples, ..., out).
            bias: Name of the pinned bias, or None.

        Example:
            >>> SecondMoments.of(torch.tensor([[1.0], [3.0]]), torch.ones(2, 1), "bias").features
            tensor([[5., 2.],
                    [2., 1.]])
        """
        phi, psi = features.flatten(0, -2), cotangents.flatten(0, -2)
        if bias is not None:
            phi = torch.cat([phi, phi.new_ones(len(phi), 1)], dim=1)
        return cls(phi.T @ phi / len(phi), psi.T @ psi / len(cotangents), bias)


class MomentNorm(Protocol):
    """A norm that also wants the second moments of every pinned affine map.

    Attributes:
        needs_moments: True. A norm without this attribute is called with the multiplier alone.
    """

    needs_moments: ClassVar[bool]

    def __call__(
        self, multiplier: Mapping[str, Tensor], moments: Mapping[str, SecondMoments]
    ) -> Tensor | float:
        """The norm of one candidate's multiplier, `moments` by name of the pinned weight."""
        ...


def needs_moments(norm: Norm | MomentNorm) -> TypeIs[MomentNorm]:
    """Whether a norm is called as `norm(multiplier, moments)`.

    Example:
        >>> from constrained_growth.norms import Frobenius
        >>> needs_moments(KroneckerFisher()), needs_moments(Frobenius())
        (True, False)
    """
    return bool(getattr(norm, "needs_moments", False))


@dataclass(frozen=True)
class KroneckerFisher:
    """The norm of G^(-1/2) λ̃ A^(-1/2): of λ in the geometry of natural gradients.

    Of a pinned affine map Wφ + b, λ̃ = [λ_W, λ_b], and A = E[φ̃ φ̃ᵀ] and G = E[ψ ψᵀ] are its
    `SecondMoments`. A ⊗ G is the K-FAC approximation of the Fisher matrix, so that a step v̂ =
    G^(1/2) v A^(1/2) of a given size changes the distribution of the output by a given amount,
    whatever the units of features and outputs are. G is taken at the targets of the data (the
    empirical Fisher). `ord` says in which norm v̂ is measured, and so of which it is the dual:

    * "fro": √(Σ σ_i²) = √tr(G⁻¹ λ̃ A⁻¹ λ̃ᵀ), the dual of the ball ⟨v, (A ⊗ G) v⟩ ≤ 1, the norm of
      natural-gradient descent and of K-FAC.
    * "nuc": Σ σ_i, the dual of the ball in which no singular value of v̂ exceeds 1. It counts in
      how many directions the layer could help, where "fro" is content with one that is strong.
      In the mean it decides a little better (`constrained-growth bench decisions`, the README's
      "Which rule when?").

    σ_i are the singular values of G^(-1/2) λ̃ A^(-1/2). Those of all pinned affine maps of a
    candidate are taken together, as of one block-diagonal matrix.

    With `damping=0` the norm does not change under any invertible affine change of the features
    (with a bias; linear without) and of the outputs. Singular moments, as dead units or the
    cotangents of a softmax make them, are inverted on their range; λ lies in it when all come
    from the same samples, and what rounding puts outside is dropped. With one position per
    sample σ_i is then ρ_i, the canonical correlations of φ̃ and ψ (about 0, not the mean): free
    of the scale of the loss, and "fro" at most √r, "nuc" at most r, with r = min(rank A, rank G).
    Beware of few samples: of features and cotangents that have nothing to do with each other
    Σ ρ_i² is about (rank A)(rank G)/N, not 0, and N ≤ min(in, out) samples give N whatever they
    are.

    With damping, A + d (tr A / dim A) I and G + d (tr G / dim G) I take the places of A and G:
    the factored Tikhonov regularisation of K-FAC (section 6.3) with the weight d² times the mean
    eigenvalue of A ⊗ G. Of the invariance, changes of scale and (without a bias) rotations stay.

    Attributes:
        damping: d, relative to the mean eigenvalue of each factor; 0.1 by default; from 0.03
            to 0.3 it decides alike, within the noise (`constrained-growth bench decisions`).
            0 for exact invariance.
        ord: "fro" or "nuc", as for `torch.linalg.matrix_norm`, by keyword; "fro" by default, as
            there, and since that is the norm of K-FAC.

    Raises:
        RuleError: `damping` is no finite number >= 0, or `ord` neither of the two; or, when
            called, a pinned parameter has no second moments or ones of another shape.

    Source:
        Amari, *Natural gradient works efficiently in learning*, 1998; Martens and Grosse,
        *Optimizing neural networks with Kronecker-factored approximate curvature*, 2015,
        arXiv 1503.05671. Canonical correlations: Hotelling, *Relations between two sets of
        variates*, 1936.

    Example:
        >>> features = torch.tensor([[1.0], [1.0]])
        >>> cotangents = torch.tensor([[2.0], [4.0]])
        >>> moments = SecondMoments.of(features, cotangents)  # A = 1, G = 10
        >>> KroneckerFisher(damping=0.0)({"weight": torch.tensor([[-3.0]])}, {"weight": moments})
        tensor(0.9487, dtype=torch.float64)
    """

    damping: float = 0.1
    ord: Literal["fro", "nuc"] = field(default="fro", kw_only=True)
    needs_moments: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not isinstance(self.damping, Real) or not 0 <= self.damping < math.inf:
            raise RuleError(
                f"damping={self.damping!r} of KroneckerFisher is not a finite number >= 0; it is "
                'relative to the mean eigenvalue, 0.1 by default. An order is given as ord="nuc".'
            )
        if not isinstance(self.ord, str) or self.ord not in ("fro", "nuc"):
            raise RuleError(
                f'ord={self.ord!r} of KroneckerFisher is not known; give "fro" or "nuc".'
            )

    def __call__(
        self, multiplier: Mapping[str, Tensor], moments: Mapping[str, SecondMoments]
    ) -> Tensor:
        """The norm of one candidate's multiplier, in float64.

        Args:
            multiplier: Pinned parameter → λ.
            moments: Pinned weight → the second moments of its affine map.
        """
        biases = (seen.bias for seen in moments.values() if seen.bias is not None)
        served = {*moments, *biases}
        if served != set(multiplier):
            raise RuleError(
                f"norm={self!r} needs the second moments of each pinned weight and the name of "
                f"its bias; they are there for {sorted(served)}, and {sorted(multiplier)} are "
                "pinned. A block that offers factors(x, delta) for all its pins has them; for "
                "other blocks use another norm."
            )
        whitened = [self._whitened(multiplier, name, seen) for name, seen in moments.items()]
        if self.ord == "fro":
            return torch.stack([matrix.square().sum() for matrix in whitened]).sum().sqrt()
        return singular_values(dict(zip(moments, whitened, strict=True))).sum()

    def _whitened(self, multiplier: Mapping[str, Tensor], name: str, seen: SecondMoments) -> Tensor:
        """λ̃ of one affine map, in coordinates in which A and G are the identity."""
        joint = as_matrix(multiplier[name])
        if seen.bias is not None:
            joint = torch.cat([joint, as_matrix(multiplier[seen.bias])], dim=1)
        rows, columns = joint.shape
        shapes = tuple(seen.cotangents.shape), tuple(seen.features.shape)
        if shapes != ((rows, rows), (columns, columns)):
            raise RuleError(
                f'moments["{name}"] are of shape {shapes[1]} (features) and {shapes[0]} '
                f"(cotangents), and must be of shape {(columns, columns)} and {(rows, rows)}."
            )
        if not all(is_finite(tensor) for tensor in (joint, seen.features, seen.cotangents)):
            return joint.new_full((1, 1), math.nan, dtype=torch.float64)
        left = _inverse_root(seen.cotangents, self.damping)
        right = _inverse_root(seen.features, self.damping)
        return left.T @ joint.double() @ right


def _inverse_root(moment: Tensor, damping: float) -> Tensor:
    """R with R Rᵀ = M⁻¹, M the damped moment; undamped, the pseudo-inverse on its range."""
    values, vectors = torch.linalg.eigh(moment.double())
    damped = values.clamp(min=0) + damping * values.mean()
    rounding = len(values) * torch.finfo(moment.dtype).eps * damped.max()
    kept = damped > (0.0 if damping else rounding)
    return vectors[:, kept] / damped[kept].sqrt()
