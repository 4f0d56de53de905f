"""Norms that also use second moments of features and cotangents; Lipschitz constants of norms."""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, ClassVar, Literal, Protocol

import torch
from torch import Tensor

from constrained_growth._arguments import function, instance, number, tensors
from constrained_growth.errors import RuleError
from constrained_growth.norms.matrices import as_matrix
from constrained_growth.solution import Norm

if TYPE_CHECKING:
    from typing_extensions import TypeIs


@dataclass(frozen=True, eq=False)
class SecondMoments:
    """Second moments of the features and cotangents of a pinned affine map Wφ + b.

    Both are means over samples. With several positions per sample (a sequence, an image) A is the
    mean over them and G the sum, as if the positions were independent.

    Attributes:
        features: A = E[φ φᵀ], shape (in, in).
        cotangents: G = E[ψ ψᵀ], shape (out, out), with ψ = ∂ℓ_n/∂(Wφ + b) of the loss ℓ_n of one
            sample, *not* divided by the number of samples.
        bias: Name of the pinned bias b, or None.
        transposed: Whether the weight has the shape (in, out).
        same_units: Whether features and outputs are in the units of the site, one by one (in an
            identity convolution, every output and the features of its channel).
        mean: E[φ], shape (in,); None where it is not known.
        rows, columns: Which outputs and features these are of, where there are too many; None for
            all.

    An elementwise map γ ⊙ φ + b, as of a normalisation, is `out` maps of one number each: A and G
    have the shape (out, 1, 1). A pin in no affine map has the moments of its gradients g, those of
    Shampoo: A = E[gᵀg] and G = E[g gᵀ]/tr A of a matrix, and G = E[g²] of each entry of a vector.

    Source:
        Martens and Grosse, arXiv 1503.05671; with positions: Grosse and Martens, *A
        Kronecker-factored approximate Fisher matrix for convolution layers*, 2016; Gupta, Koren and
        Singer, *Shampoo*, 2018.
    """

    features: Tensor
    cotangents: Tensor
    bias: str | None = None
    transposed: bool = False
    same_units: bool = False
    mean: Tensor | None = None
    rows: Tensor | None = None
    columns: Tensor | None = None

    def __post_init__(self) -> None:
        instance("features", self.features, Tensor, RuleError, "A, of shape (in, in)")
        instance("cotangents", self.cotangents, Tensor, RuleError, "G, of shape (out, out)")

    @classmethod
    def of(cls, features: Tensor, cotangents: Tensor, bias: str | None = None) -> SecondMoments:
        """The moments of given φ and ψ, of shape (samples, ..., width)."""
        instance("features", features, Tensor, RuleError, "φ, of shape (samples, …, in)")
        instance("cotangents", cotangents, Tensor, RuleError, "ψ, of shape (samples, …, out)")
        phi, psi = features.flatten(0, -2), cotangents.flatten(0, -2)
        return cls(
            phi.T @ phi / len(phi),
            psi.T @ psi / len(cotangents),
            bias,
            mean=phi.mean(0),
        )


class MomentNorm(Protocol):
    """A norm that also needs the second moments of every pinned affine map."""

    needs_moments: ClassVar[bool]
    """True. A norm without this attribute is called with the multiplier alone."""

    def __call__(
        self, multiplier: Mapping[str, Tensor], moments: Mapping[str, SecondMoments]
    ) -> Tensor | float:
        """The norm of the multiplier of one candidate, `moments` by name of the pinned weight."""
        ...


def needs_moments(norm: Norm | MomentNorm) -> TypeIs[MomentNorm]:
    """Whether a norm is called as `norm(multiplier, moments)`."""
    return bool(getattr(norm, "needs_moments", False))


def lipschitz(norm: Norm | MomentNorm, multiplier: Mapping[str, Tensor]) -> float:
    """L such that an error of λ of size ε in ‖·‖_F changes its norm by at most L ε.

    It is what the norm's method `lipschitz(multiplier)` returns. For a norm without one it is the
    Frobenius norm of the gradient at λ, by autograd, which holds to first order; NaN where autograd
    cannot differentiate, and for `KroneckerFisher`, which changes with the sample itself.

    Example:
        >>> from constrained_growth.norms import Entrywise1
        >>> lipschitz(Entrywise1(), {"weight": torch.zeros(2, 8)})
        4.0
    """
    function("norm", norm, RuleError, "cg.norms.Frobenius()")
    tensors("multiplier", multiplier, RuleError, "pinned parameter → λ")
    constant: Any = getattr(norm, "lipschitz", None)
    if constant is not None:
        return float(constant(multiplier))
    if needs_moments(norm):
        return math.nan
    # a clone, as λ may have been made in inference mode
    leaves = {name: value.detach().clone().requires_grad_() for name, value in multiplier.items()}
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a function may turn its result into a float
        value = norm(leaves)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return math.nan
    slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return math.sqrt(sum(float(s.square().sum()) for s in slopes if s is not None))


@dataclass(frozen=True)
class KroneckerFisher:
    """The norm of G^(-1/2) λ̃ A^(-1/2): of λ in the geometry of natural gradients.

    For a pinned affine map Wφ + b, λ̃ = [λ_W, λ_b], and A = E[φ̃ φ̃ᵀ] and G = E[ψ ψᵀ] are its
    `SecondMoments`. A ⊗ G is the K-FAC approximation of the Fisher matrix, taken at the targets of
    the data (the empirical Fisher): a step v̂ = G^(1/2) v A^(1/2) of a given size changes the
    distribution of the output by a given amount, whatever the units of features and outputs. With
    σ_i the singular values of G^(-1/2) λ̃ A^(-1/2), of all pinned affine maps of a candidate
    together, `ord` is one of

    * "fro": √(Σ σ_i²) = √tr(G⁻¹ λ̃ A⁻¹ λ̃ᵀ), the dual of the ball ⟨v, (A ⊗ G) v⟩ ≤ 1, the norm of
      natural-gradient descent and of K-FAC.
    * "nuc": Σ σ_i, the dual of the ball in which no singular value of v̂ exceeds 1. It counts in
      how many directions the layer could help, and decides a little better on average
      (`constrained-growth bench decisions`).

    With `damping=0` the norm is invariant under all invertible affine changes of the features
    (linear ones without a bias) and of the outputs. Singular moments, as caused by dead units, are
    inverted on their range. With one position per sample σ_i is then ρ_i, the canonical
    correlations of φ̃ and ψ (about 0, not the mean), with "nuc" at most r = min(rank A, rank G) and
    "fro" at most √r. Beware of few samples: for unrelated features and cotangents Σ ρ_i² is about
    (rank A)(rank G)/N, not 0, and N ≤ min(in, out) samples always give N.

    With damping, A + d (tr A / dim A) I and G + d (tr G / dim G) I replace A and G (K-FAC, section
    6.3), and with a bias Ã + d diag(tr A / dim A, …, 1) replaces Ã = E[φ̃ φ̃ᵀ], so that each feature
    is damped in its own units. Invariance under changes of scale and rotations remains. For
    identity layers, whose outputs are in the units of their features, A and G are first brought to
    units in which E φ_j² = E ψ_j²: rescaling the units of a ReLU layer, one by one, changes
    nothing.

    For widths above 256 it is of 256 features and outputs, the same random ones at each site of
    that width.

    It measures correlation and is no price: in a network that has nothing to learn it is that of
    the noise, so that it says where and not whether.

    Attributes:
        damping: d. 0.1 by default; where all weights are trained on, 0.03 to 0.3 decide alike,
            within the noise, and 0.3 better where the old ones are frozen
            (`constrained-growth bench decisions`). 0 for exact invariance.
        ord: "fro" (default) or "nuc", as for `torch.linalg.matrix_norm`; keyword only.

    Raises:
        RuleError: `damping` is not a finite number >= 0, or `ord` is neither of the two; or, when
            called, a pinned parameter has no second moments or moments of another shape.

    Source:
        Amari, *Natural gradient works efficiently in learning*, 1998; Martens and Grosse, arXiv
        1503.05671. Canonical correlations: Hotelling, *Relations between two sets of variates*,
        1936.

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
        number("damping", self.damping, RuleError, "[0, inf)")
        if not isinstance(self.ord, str) or self.ord not in ("fro", "nuc"):
            raise RuleError(f'ord={self.ord!r} of KroneckerFisher: give "fro" or "nuc".')

    def __call__(
        self, multiplier: Mapping[str, Tensor], moments: Mapping[str, SecondMoments]
    ) -> Tensor:
        """The norm of the multiplier of one candidate, in float64."""
        check_moments(self, multiplier, moments)
        found = [self._singular_values(multiplier, name, m) for name, m in moments.items()]
        values = torch.cat(found)
        return values.sum() if self.ord == "nuc" else torch.linalg.vector_norm(values)

    def _singular_values(
        self, multiplier: Mapping[str, Tensor], name: str, moments: SecondMoments
    ) -> Tensor:
        """Of λ̃ of one affine map, in coordinates in which A and G are the identity."""
        matrix, mean, bias = chosen_of(multiplier[name], name, moments), moments.mean, None
        features, cotangents = moments.features, moments.cotangents
        if moments.bias is not None:
            bias = multiplier[moments.bias].reshape(-1).to(matrix)
            bias = bias if moments.rows is None else bias[moments.rows]
        if not are_finite(matrix, features, cotangents, *([] if bias is None else [bias])):
            return matrix.new_full((1,), math.nan, dtype=torch.float64)
        # undamped, the norm does not depend on units; with a damping relative to the mean of the
        # diagonal, one large unit would damp the others away
        if moments.same_units and self.damping and are_aligned(moments):
            inputs, outputs = _units(moments)
            matrix = matrix * inputs / outputs[:, None]
            cotangents = cotangents / (outputs[:, None] * outputs)
            features = features * (inputs[:, None] * inputs)
            mean = None if mean is None else mean * inputs
            bias = None if bias is None else bias / outputs
        if bias is not None:
            if mean is None:
                raise RuleError(f'moments["{name}"].mean is needed, as there is a pinned bias.')
            matrix, features = _with_bias(matrix, features, bias, mean)
        left = whitened(matrix, cotangents, self.damping)
        constant = bias is not None
        both = whitened(left.mT, features, self.damping, constant=constant)
        if self.ord == "fro":
            return torch.linalg.vector_norm(both.double(), dim=(-2, -1)).reshape(-1)
        return singular_values_of(both)


def _with_bias(
    matrix: Tensor, features: Tensor, bias: Tensor, mean: Tensor
) -> tuple[Tensor, Tensor]:
    """λ and A with a further feature, 1."""
    column = mean.view(*features.shape[:-1], 1)
    below = torch.cat([column.mT, torch.ones_like(column[..., :1, :])], -1)
    features = torch.cat([torch.cat([features, column], -1), below], -2)
    return torch.cat([matrix, bias.view(*matrix.shape[:-1], 1)], -1), features


def _units(moments: SecondMoments) -> tuple[Tensor, Tensor]:
    """Units of features and outputs, in which both are of one size."""
    outputs, inputs = moments.cotangents.diagonal(), moments.features.diagonal()
    channels = inputs.view(len(outputs), -1).mean(1)
    alive = (channels > 0) & (outputs > 0)
    # φ in units 1/s, ψ in units s: s² E φ² = E ψ²/s²
    scale = torch.where(alive, outputs / torch.where(alive, channels, 1.0), 1.0) ** 0.25
    return scale.repeat_interleave(len(inputs) // len(scale)), scale


def are_aligned(moments: SecondMoments) -> bool:
    """Whether the features chosen are still those of the outputs chosen."""
    if moments.rows is None or moments.columns is None:
        return moments.rows is moments.columns
    return torch.equal(moments.rows, moments.columns)


def check_moments(
    norm: object, multiplier: Mapping[str, Tensor], moments: Mapping[str, SecondMoments]
) -> None:
    """Raise a RuleError unless there are moments for all pins."""
    tensors("multiplier", multiplier, RuleError, "pinned parameter → λ")
    instance("moments", moments, Mapping, RuleError, "pinned weight → SecondMoments")
    for name, one in moments.items():
        instance(f'moments["{name}"]', one, SecondMoments, RuleError, "cg.norms.SecondMoments")
    biases = {m.bias for m in moments.values()}
    if unknown := [name for name in multiplier if name not in biases | moments.keys()]:
        raise RuleError(
            f"norm={norm!r} needs the second moments of all pinned parameters; those of {unknown} "
            f"are missing, and those of {sorted(moments)} are given."
        )


def are_finite(*tensors: Tensor) -> bool:
    """Whether no entry is NaN or infinite."""
    # the sum is quicker, and overflows in rare cases
    return all(bool(t.sum().isfinite()) or bool(t.isfinite().all()) for t in tensors)


def chosen_of(weight: Tensor, name: str, moments: SecondMoments) -> Tensor:
    """λ_W as a matrix (out, in), or (out, 1, 1) elementwise; those of which there are moments."""
    if moments.features.dim() == 3:
        matrix = weight.reshape(-1, 1, 1)
    else:
        matrix = as_matrix(weight)
        matrix = matrix.mT if moments.transposed else matrix
    if moments.rows is not None:
        matrix = matrix[moments.rows]
    if moments.columns is not None:
        matrix = matrix[:, moments.columns]
    rows, columns = matrix.shape[-2:]
    shapes = tuple(moments.cotangents.shape[-2:]), tuple(moments.features.shape[-2:])
    if shapes != ((rows, rows), (columns, columns)):
        raise RuleError(
            f'moments["{name}"] are of shape {shapes[1]} (features) and {shapes[0]} (cotangents), '
            f"and must be of shape {(columns, columns)} and {(rows, rows)}."
        )
    return matrix


_SMALL = 128


def singular_values_of(matrices: Tensor) -> Tensor:
    """The singular values of matrices, in one row and in float64."""
    flat = matrices.double()
    if matrices.dtype == torch.float64 and min(matrices.shape[-2:]) <= _SMALL:
        return torch.linalg.svdvals(flat).flatten()
    # in a third to half of the time, to half of the digits: those that single precision has
    flat = flat if flat.shape[-2] <= flat.shape[-1] else flat.mT
    return torch.linalg.eigvalsh(flat @ flat.mT).clamp(min=0).sqrt().flatten()


def whitened(matrix: Tensor, moment: Tensor, damping: float, *, constant: bool = False) -> Tensor:
    """Rᵀ times the matrix, with R Rᵀ = M⁻¹, M the damped moment; undamped, its pseudo-inverse.

    The singular values of the result are the same for every such R. With `constant` the last entry
    is of a 1, which is damped in its own units: beside it, the others would depend on theirs.
    """
    size = moment.shape[-1]
    rounding = size * torch.finfo(moment.dtype).eps  # of eigenvalues, relative to the largest
    diagonal = moment.diagonal(dim1=-2, dim2=-1)
    sizes = diagonal[..., : size - constant].mean(-1, keepdim=True).expand_as(diagonal)
    if constant:
        sizes = torch.cat([sizes[..., :-1], torch.ones_like(sizes[..., :1])], -1)
    if damping > 10 * rounding:  # else rounding can make M indefinite
        root, failed = torch.linalg.cholesky_ex(moment + torch.diag_embed(damping * sizes))
        if not failed.any():  # 3 to 14 times faster than eigenvectors
            return torch.linalg.solve_triangular(root, matrix.to(root), upper=False)
    units = torch.ones_like(sizes, dtype=torch.float64)
    if damping:  # then damping the eigenvalues by d is to add d times each unit to the diagonal
        units = torch.where(sizes > 0, sizes.double(), 1.0).sqrt()
    values, vectors = torch.linalg.eigh(moment.double() / (units[..., None] * units[..., None, :]))
    damped = values.clamp(min=0) + damping
    kept = damped > (0.0 if damping else rounding) * damped.amax(-1, keepdim=True)
    scale = torch.where(kept, damped, torch.inf).rsqrt()
    return (vectors * scale[..., None, :]).mT @ (matrix.double() / units[..., None])


def recommended() -> KroneckerFisher:
    """The norm of a decision of which nothing else is said: `KroneckerFisher(0.3, ord="nuc")`.

    By one criterion: of the sizes that do not depend on the units of a site, the one with the
    lowest mean regret over the families of networks of `constrained-growth bench decisions`, with
    old weights frozen and trained on, that is worse than chance in none of them
    (theory/results/decisions.md has the tables).

    Example:
        >>> recommended()
        KroneckerFisher(damping=0.3, ord='nuc')
    """
    return KroneckerFisher(0.3, ord="nuc")
