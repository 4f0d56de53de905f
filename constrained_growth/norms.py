"""How large a multiplier is.

A norm is any function of a multiplier (pinned parameter → tensor) that gives a number. The
best first-order decrease of the loss inside a ball ‖v‖ ≤ Δ is

    max { ⟨λ, v⟩ : ‖v‖ ≤ Δ } = Δ ‖λ‖_*,

so the right norm is the *dual* of the one in which the optimizer moves the new layer (Boyd and
Vandenberghe, *Convex Optimization*, 2004, A.1.6). `norm_for` picks it.

The ball is always one ball over all pinned parameters of a candidate together. Where a norm is
one of matrices, a vector is a matrix with one column, a tensor of more dimensions (the kernel of
a convolution) is flattened to (out, everything else), and several tensors are the blocks of one
block-diagonal matrix.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

import torch
from torch import Tensor

from constrained_growth.errors import RuleError
from constrained_growth.solution import Norm

if TYPE_CHECKING:
    from typing_extensions import TypeIs

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
]


@dataclass(frozen=True)
class Frobenius:
    """‖λ‖_F = √(Σ λ_ij²) over all pinned parameters: the dual of the Frobenius (Euclidean) ball.

    The norm of plain SGD: one step of size η gains η‖λ‖²_F to first order.

    Example:
        >>> Frobenius()({"weight": torch.tensor([[3.0]]), "bias": torch.tensor([4.0])}).item()
        5.0
    """

    def __call__(self, multiplier: Mapping[str, Tensor]) -> Tensor:
        """The norm of one candidate's multiplier."""
        squares = [tensor.square().sum() for tensor in multiplier.values()]
        return torch.stack(squares).sum().sqrt()

    def lipschitz(self, multiplier: Mapping[str, Tensor]) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class PerParameter:
    """‖λ‖_F / √P, P the number of pinned parameters: the root-mean-square entry of λ.

    A size-fair Frobenius norm, since the raw one favours wide layers. It is the dual of the ball
    √P ‖v‖_F ≤ 1, in which a larger layer may move less.

    Example:
        >>> multiplier = {"weight": torch.tensor([[1.0, 7.0], [5.0, 5.0]])}
        >>> PerParameter()(multiplier).item()
        5.0
    """

    def __call__(self, multiplier: Mapping[str, Tensor]) -> Tensor:
        """The norm of one candidate's multiplier."""
        return Frobenius()(multiplier) * self.lipschitz(multiplier)

    def lipschitz(self, multiplier: Mapping[str, Tensor]) -> float:
        """1/√P."""
        return _count(multiplier) ** -0.5


@dataclass(frozen=True)
class Entrywise1:
    """Σ |λ_ij| over all pinned parameters: the dual of the ball max |v_ij| ≤ 1.

    The norm of sign descent, one step of which gains η Σ |λ_ij| to first order, and of Adam,
    whose first step is η sign(λ).

    Source:
        Kingma and Ba, *Adam*, 2015; Bernstein et al., *signSGD*, 2018; Bernstein and Newhouse,
        *Old Optimizer, New Norm: An Anthology*, 2024.

    Example:
        >>> Entrywise1()({"weight": torch.tensor([[3.0]]), "bias": torch.tensor([-4.0])}).item()
        7.0
    """

    def __call__(self, multiplier: Mapping[str, Tensor]) -> Tensor:
        """The norm of one candidate's multiplier."""
        return torch.stack([tensor.abs().sum() for tensor in multiplier.values()]).sum()

    def lipschitz(self, multiplier: Mapping[str, Tensor]) -> float:
        """√P, by the Cauchy-Schwarz inequality."""
        return _count(multiplier) ** 0.5


@dataclass(frozen=True)
class Spectral:
    """The largest singular value of diag(λ_W, λ_b, …): the dual of the nuclear-norm ball.

    That is the largest of the tensors' own spectral norms, and the ball allows
    Σ_p ‖v_p‖_nuclear ≤ 1 over the pinned tensors p. Its best step has rank one, as one of
    Frank-Wolfe over that ball does.

    Source:
        Boyd and Vandenberghe, *Convex Optimization*, 2004, A.1.6; Jaggi, *Revisiting
        Frank-Wolfe*, 2013.

    Example:
        >>> weight = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
        >>> Spectral()({"weight": weight, "bias": torch.tensor([0.0, 2.0])}).item()
        4.0
    """

    def __call__(self, multiplier: Mapping[str, Tensor]) -> Tensor:
        """The norm of one candidate's multiplier."""
        return _singular_values(multiplier).max()

    def lipschitz(self, multiplier: Mapping[str, Tensor]) -> float:
        """1: the largest singular value against the root of the sum of all their squares."""
        return 1.0


@dataclass(frozen=True)
class Nuclear:
    """The sum of the singular values of diag(λ_W, λ_b, …): the dual of the spectral ball.

    That is the sum of the tensors' own nuclear norms, and the ball allows every pinned tensor a
    spectral norm of 1: the norm of Muon, which moves every matrix on its own by an
    orthogonal factor. A vector is a matrix with one column, which gains η‖λ_b‖₂; Muon itself
    leaves vectors to another optimizer, usually AdamW, for which `Entrywise1` would be right.

    Source:
        Boyd and Vandenberghe, *Convex Optimization*, 2004, A.1.6; Jordan et al., *Muon*, 2024;
        Bernstein and Newhouse, *Old Optimizer, New Norm: An Anthology*, 2024.

    Example:
        >>> weight = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
        >>> Nuclear()({"weight": weight, "bias": torch.tensor([0.0, 2.0])}).item()
        9.0
    """

    def __call__(self, multiplier: Mapping[str, Tensor]) -> Tensor:
        """The norm of one candidate's multiplier."""
        return _singular_values(multiplier).sum()

    def lipschitz(self, multiplier: Mapping[str, Tensor]) -> float:
        """√r by the Cauchy-Schwarz inequality, r = Σ_p min(rows, columns) singular values."""
        return sum(min(_as_matrix(tensor).shape) for tensor in multiplier.values()) ** 0.5


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


def lipschitz(norm: Norm | MomentNorm, multiplier: Mapping[str, Tensor]) -> float:
    """By how much an error of λ moves its norm: an error of size ε in ‖·‖_F by at most L ε.

    Args:
        norm: Of this module, or a user's own. One that has a method `lipschitz(multiplier)` is
            asked for L, the least number with ‖·‖ ≤ L ‖·‖_F. For another function L is the
            Frobenius norm of its gradient at λ, by autograd, which holds to first order.
        multiplier: Pinned parameter → λ.

    Returns:
        L, or NaN where it is not known: for a function that autograd cannot follow, and for
        `KroneckerFisher`, which changes with the sample itself.

    Example:
        >>> lipschitz(Entrywise1(), {"weight": torch.zeros(2, 8)})
        4.0
    """
    constant: Any = getattr(norm, "lipschitz", None)
    if constant is not None:
        return float(constant(multiplier))
    return math.nan if needs_moments(norm) else _slope(norm, multiplier)


def _slope(function: Norm, multiplier: Mapping[str, Tensor]) -> float:
    """‖∇ function(λ)‖_F, or NaN for a function that does not return a tensor with a graph."""
    leaves = {name: value.detach().clone().requires_grad_() for name, value in multiplier.items()}
    with torch.enable_grad(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # a function may well turn its result into a float
        value = function(leaves)
    if not isinstance(value, Tensor) or not value.requires_grad:
        return math.nan
    slopes = torch.autograd.grad(value, list(leaves.values()), allow_unused=True)
    return math.sqrt(sum(float(s.square().sum()) for s in slopes if s is not None))


def needs_moments(norm: Norm | MomentNorm) -> TypeIs[MomentNorm]:
    """Whether a norm is called as `norm(multiplier, moments)`.

    Example:
        >>> needs_moments(KroneckerFisher()), needs_moments(Frobenius())
        (True, False)
    """
    return bool(getattr(norm, "needs_moments", False))


@dataclass(frozen=True)
class KroneckerFisher:
    """√(Σ tr(G⁻¹ λ̃ A⁻¹ λ̃ᵀ)): the dual of the ball Σ ⟨v, (A ⊗ G) v⟩ ≤ 1.

    The sums run over the pinned affine maps Wφ + b of a candidate, with λ̃ = [λ_W, λ_b],
    A = E[φ̃ φ̃ᵀ] and G = E[ψ ψᵀ] (see `SecondMoments`). A ⊗ G is the K-FAC approximation of the
    Fisher matrix, so this is the norm of natural-gradient descent and of K-FAC: a step inside
    the ball changes the distribution of the output by a given amount, whatever the units of
    features and outputs are. G is taken at the targets of the data (the empirical Fisher).

    With `damping=0` the norm does not change under any invertible affine change of the features
    (with a bias; linear without) and of the outputs. Singular moments, as dead units or the
    cotangents of a softmax make them, are inverted on their range; λ lies in it when all come
    from the same samples, and what rounding puts outside is dropped. With one position per
    sample the norm is then √(Σ ρ_i²), with ρ_i the canonical correlations of φ̃ and ψ (about 0,
    not the mean): at most √min(rank A, rank G), and free of the scale of the loss. Beware of few
    samples: features and cotangents that have nothing to do with each other give a square of
    about (rank A)(rank G)/N, not 0, and N ≤ min(in, out) samples give N whatever they are.

    With damping, A + d (tr A / dim A) I and G + d (tr G / dim G) I take the places of A and G:
    the factored Tikhonov regularisation of K-FAC (section 6.3) with the weight d² times the mean
    eigenvalue of A ⊗ G. Of the invariance, changes of scale and (without a bias) rotations stay.

    Attributes:
        damping: d, relative to the mean eigenvalue of each factor; 0.03 by default, of 0.01 … 1
            the one that decides best (`constrained-growth bench decisions`). 0 for exact
            invariance.

    Raises:
        RuleError: `damping` is negative or not finite; or, when called, a pinned parameter has
            no second moments or ones of another shape.

    Source:
        Amari, *Natural gradient works efficiently in learning*, 1998; Martens and Grosse,
        *Optimizing neural networks with Kronecker-factored approximate curvature*, 2015,
        arXiv 1503.05671.

    Example:
        >>> features = torch.tensor([[1.0], [1.0]])
        >>> cotangents = torch.tensor([[2.0], [4.0]])
        >>> moments = SecondMoments.of(features, cotangents)  # A = 1, G = 10
        >>> KroneckerFisher(damping=0.0)({"weight": torch.tensor([[-3.0]])}, {"weight": moments})
        tensor(0.9487, dtype=torch.float64)
    """

    damping: float = 0.03
    needs_moments: ClassVar[bool] = True

    def __post_init__(self) -> None:
        if not 0 <= self.damping < math.inf:
            raise RuleError(
                f"damping={self.damping!r} is not a finite number >= 0; it is relative to the "
                "mean eigenvalue, 1e-3 by default."
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
        squares = [self._square(multiplier, name, seen) for name, seen in moments.items()]
        return torch.stack(squares).sum().sqrt()

    def _square(self, multiplier: Mapping[str, Tensor], name: str, seen: SecondMoments) -> Tensor:
        """tr(G⁻¹ λ̃ A⁻¹ λ̃ᵀ) of one affine map."""
        joint = _as_matrix(multiplier[name])
        if seen.bias is not None:
            joint = torch.cat([joint, _as_matrix(multiplier[seen.bias])], dim=1)
        rows, columns = joint.shape
        shapes = tuple(seen.cotangents.shape), tuple(seen.features.shape)
        if shapes != ((rows, rows), (columns, columns)):
            raise RuleError(
                f'moments["{name}"] are of shape {shapes[1]} (features) and {shapes[0]} '
                f"(cotangents), and must be of shape {(columns, columns)} and {(rows, rows)}."
            )
        if not all(_is_finite(tensor) for tensor in (joint, seen.features, seen.cotangents)):
            return joint.new_full((), math.nan, dtype=torch.float64)
        left = _inverse_root(seen.cotangents, self.damping)
        right = _inverse_root(seen.features, self.damping)
        return (left.T @ joint.double() @ right).square().sum()


_EUCLIDEAN = (torch.optim.SGD, torch.optim.ASGD)
_PER_COORDINATE = (
    torch.optim.Adam,
    torch.optim.AdamW,
    torch.optim.Adamax,
    torch.optim.NAdam,
    torch.optim.RAdam,
    torch.optim.SparseAdam,
    torch.optim.Adafactor,
    torch.optim.RMSprop,
    torch.optim.Adagrad,
    torch.optim.Adadelta,
    torch.optim.Rprop,
)
_ORTHOGONAL: tuple[type, ...] = (torch.optim.Muon,) if hasattr(torch.optim, "Muon") else ()


def norm_for(optimizer: torch.optim.Optimizer) -> Norm:
    """The dual of the norm in which an optimizer of `torch.optim` moves new parameters.

    * SGD, with or without momentum, and ASGD go along the gradient: `Frobenius`.
    * Adam, AdamW, Adamax, NAdam, RAdam, SparseAdam, RMSprop, Adagrad, Adadelta and Rprop scale
      every coordinate by its own past gradients. A parameter without a past moves by the same
      amount in every coordinate, in the direction of sign(λ) (RAdam after its first five steps):
      `Entrywise1`. Adafactor replaces these scales of a matrix by a rank-one estimate of them,
      and is counted here too.
    * Muon (where torch has it) moves every matrix by its orthogonal factor: `Nuclear`. Its
      factor for the shape of a matrix (`adjust_lr_fn`) is left out, as are all learning rates.

    Args:
        optimizer: The one that will train the new layer; subclasses count as their base.

    Returns:
        The norm, for `solve(problem, norm=...)`.

    Raises:
        RuleError: It is none of these.

    Source:
        Bernstein and Newhouse, *Old Optimizer, New Norm: An Anthology*, 2024.

    Example:
        >>> norm_for(torch.optim.Adam(torch.nn.Linear(2, 2).parameters()))
        Entrywise1()
    """
    if isinstance(optimizer, _EUCLIDEAN):
        return Frobenius()
    if isinstance(optimizer, _PER_COORDINATE):
        return Entrywise1()
    if isinstance(optimizer, _ORTHOGONAL):
        return Nuclear()
    given = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
    raise RuleError(
        f"optimizer={given} is not an instance of an optimizer of torch.optim whose norm is known; "
        "pass norm= yourself: the dual of the norm it moves in, such as Frobenius() for gradient "
        "descent, Entrywise1() for sign descent, Nuclear() for orthogonalised updates, or "
        "KroneckerFisher() for natural gradients."
    )


def _count(multiplier: Mapping[str, Tensor]) -> int:
    return sum(tensor.numel() for tensor in multiplier.values())


def _as_matrix(tensor: Tensor) -> Tensor:
    """(out, everything else), a vector as one column; in a precision LAPACK knows."""
    matrix = tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    return matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()


def _singular_values(multiplier: Mapping[str, Tensor]) -> Tensor:
    """Those of the block-diagonal matrix of all tensors; NaN where an entry is not finite."""
    matrices = [_as_matrix(tensor) for tensor in multiplier.values()]
    if not all(_is_finite(matrix) for matrix in matrices):
        return matrices[0].new_full((1,), math.nan)
    return torch.cat([torch.linalg.svdvals(matrix) for matrix in matrices])


def _inverse_root(moment: Tensor, damping: float) -> Tensor:
    """R with R Rᵀ = M⁻¹, M the damped moment; undamped, the pseudo-inverse on its range."""
    values, vectors = torch.linalg.eigh(moment.double())
    damped = values.clamp(min=0) + damping * values.mean()
    rounding = len(values) * torch.finfo(moment.dtype).eps * damped.max()
    kept = damped > (0.0 if damping else rounding)
    return vectors[:, kept] / damped[kept].sqrt()


def _is_finite(tensor: Tensor) -> bool:
    return bool(tensor.isfinite().all())
