"""Norms of the multiplier alone, and which of them fits an optimizer."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor, optim

from constrained_growth._arguments import tensors
from constrained_growth.errors import RuleError
from constrained_growth.solution import Norm


@dataclass(frozen=True)
class Frobenius:
    """‖λ‖_F = √(Σ λ_ij²) over all pinned parameters: the dual of the Frobenius (Euclidean) ball.

    The norm of plain SGD: one step of size η gains η‖λ‖²_F to first order.

    Example:
        >>> Frobenius()({"weight": torch.tensor([[3.0]]), "bias": torch.tensor([4.0])}).item()
        5.0
    """

    def __call__(self, multiplier: Mapping[str, Tensor]) -> Tensor:
        """The norm of the multiplier of one candidate."""
        # the squares of float32 overflow at 2e19 and vanish at 1e-23
        given = parts(multiplier)
        sizes = [torch.linalg.vector_norm(tensor, dtype=torch.float64) for tensor in given]
        return torch.linalg.vector_norm(torch.stack(sizes)).to(given[0])

    def lipschitz(self, multiplier: Mapping[str, Tensor]) -> float:
        """1."""
        return 1.0


@dataclass(frozen=True)
class PerParameter:
    """‖λ‖_F / √P, P the number of pinned parameters: the root-mean-square entry of λ.

    The dual of the ball √P ‖v‖_F ≤ 1: unlike the Frobenius norm it does not favour wide layers.

    Example:
        >>> multiplier = {"weight": torch.tensor([[1.0, 7.0], [5.0, 5.0]])}
        >>> PerParameter()(multiplier).item()
        5.0
    """

    def __call__(self, multiplier: Mapping[str, Tensor]) -> Tensor:
        """The norm of the multiplier of one candidate."""
        return Frobenius()(multiplier) * self.lipschitz(multiplier)

    def lipschitz(self, multiplier: Mapping[str, Tensor]) -> float:
        """1/√P."""
        return count(multiplier) ** -0.5


@dataclass(frozen=True)
class Entrywise1:
    """Σ |λ_ij| over all pinned parameters: the dual of the ball max |v_ij| ≤ 1.

    The norm of sign descent (Bernstein et al., *signSGD*, 2018), and of Adam, whose first step is
    η sign(λ).

    Example:
        >>> Entrywise1()({"weight": torch.tensor([[3.0]]), "bias": torch.tensor([-4.0])}).item()
        7.0
    """

    def __call__(self, multiplier: Mapping[str, Tensor]) -> Tensor:
        """The norm of the multiplier of one candidate."""
        return torch.stack([tensor.abs().sum() for tensor in parts(multiplier)]).sum()

    def lipschitz(self, multiplier: Mapping[str, Tensor]) -> float:
        """√P, by the Cauchy-Schwarz inequality."""
        return count(multiplier) ** 0.5


@dataclass(frozen=True)
class Spectral:
    """The largest singular value of diag(λ_W, λ_b, …): the dual of the nuclear-norm ball.

    The ball is Σ_p ‖v_p‖_nuclear ≤ 1 over the pinned tensors p; its best step has rank one
    (Jaggi, *Revisiting Frank-Wolfe*, 2013).

    Example:
        >>> weight = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
        >>> Spectral()({"weight": weight, "bias": torch.tensor([0.0, 2.0])}).item()
        4.0
    """

    def __call__(self, multiplier: Mapping[str, Tensor]) -> Tensor:
        """The norm of the multiplier of one candidate."""
        return singular_values(multiplier).max()

    def lipschitz(self, multiplier: Mapping[str, Tensor]) -> float:
        """1: no singular value exceeds the root of the sum of their squares."""
        return 1.0


@dataclass(frozen=True)
class Nuclear:
    """The sum of the singular values of diag(λ_W, λ_b, …): the dual of the spectral ball.

    The ball allows each pinned tensor a spectral norm of 1: the norm of Muon (Jordan et al.,
    2024), which moves each matrix by its orthogonal factor. A vector is a matrix with one column;
    Muon itself leaves vectors to another optimizer, usually AdamW (`Entrywise1`).

    Example:
        >>> weight = torch.tensor([[0.0, 3.0], [4.0, 0.0]])
        >>> Nuclear()({"weight": weight, "bias": torch.tensor([0.0, 2.0])}).item()
        9.0
    """

    def __call__(self, multiplier: Mapping[str, Tensor]) -> Tensor:
        """The norm of the multiplier of one candidate."""
        return singular_values(multiplier).sum()

    def lipschitz(self, multiplier: Mapping[str, Tensor]) -> float:
        """√r by the Cauchy-Schwarz inequality, r = Σ_p min(rows, columns) singular values."""
        return sum(min(as_matrix(tensor).shape) for tensor in parts(multiplier)) ** 0.5


_EUCLIDEAN = (optim.SGD, optim.ASGD)
_ADAMS = (optim.Adam, optim.AdamW, optim.Adamax, optim.NAdam, optim.RAdam, optim.SparseAdam)
_SCALING = (optim.Adafactor, optim.RMSprop, optim.Adagrad, optim.Adadelta, optim.Rprop)
_ORTHOGONAL: tuple[type, ...] = (optim.Muon,) if hasattr(optim, "Muon") else ()


def norm_for(optimizer: optim.Optimizer) -> Norm:
    """The dual of the norm in which an optimizer of `torch.optim` moves new parameters.

    * SGD, with or without momentum, and ASGD move along the gradient: `Frobenius`.
    * Adam and its relatives, RMSprop, Adagrad, Adadelta and Rprop scale each coordinate by its own
      past gradients, so a new parameter first moves along sign(λ): `Entrywise1`. (RAdam does so
      after five steps, and Adafactor up to its rank-one estimate of the scales.)
    * Muon (where torch has it) moves each matrix by its orthogonal factor: `Nuclear`. Learning
      rates are left out, as is Muon's factor for the shape of a matrix.

    A subclass counts as its base.

    Raises:
        RuleError: `optimizer` is none of these.

    Source:
        Bernstein and Newhouse, *Old Optimizer, New Norm: An Anthology*, 2024.

    Example:
        >>> norm_for(torch.optim.Adam(torch.nn.Linear(2, 2).parameters()))
        Entrywise1()
    """
    if isinstance(optimizer, _EUCLIDEAN):
        return Frobenius()
    if isinstance(optimizer, _ADAMS + _SCALING):
        return Entrywise1()
    if isinstance(optimizer, _ORTHOGONAL):
        return Nuclear()
    given = optimizer.__name__ if isinstance(optimizer, type) else type(optimizer).__name__
    raise RuleError(
        f"optimizer={given} is not an instance of an optimizer of torch.optim whose norm is known; "
        "pass norm= yourself: Frobenius() for gradient descent, Entrywise1() for sign descent, "
        "Nuclear() for orthogonalised updates, KroneckerFisher() for natural gradients."
    )


def parts(multiplier: Mapping[str, Tensor]) -> list[Tensor]:
    """The tensors of a multiplier; a RuleError for anything else."""
    return tensors("multiplier", multiplier, RuleError, "pinned parameter → λ")


def count(multiplier: Mapping[str, Tensor]) -> int:
    """Number of entries."""
    return sum(tensor.numel() for tensor in parts(multiplier))


def as_matrix(tensor: Tensor) -> Tensor:
    """Shape (out, everything else), a vector as one column; in a dtype that LAPACK supports."""
    matrix = tensor.flatten(1) if tensor.dim() > 1 else tensor.reshape(-1, 1)
    return matrix if matrix.dtype in (torch.float32, torch.float64) else matrix.float()


def singular_values(multiplier: Mapping[str, Tensor]) -> Tensor:
    """The singular values of the block-diagonal matrix of all tensors; NaN if one is not finite."""
    matrices = [as_matrix(tensor) for tensor in parts(multiplier)]
    # LAPACK fails on NaN and Inf, or does not return
    if not all(matrix.isfinite().all() for matrix in matrices):
        return matrices[0].new_full((1,), math.nan)
    return torch.cat([torch.linalg.svdvals(matrix) for matrix in matrices])
