"""How large a multiplier is.

A norm is any function of a multiplier (pinned parameter → tensor) that gives a number. The
best first-order decrease of the loss inside a ball ‖v‖ ≤ Δ is Δ times the *dual* norm of λ, so
the right norm is the dual of the one in which the optimizer moves the new layer.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from constrained_growth.solution import Norm

__all__ = ["Frobenius", "Norm", "PerParameter"]


@dataclass(frozen=True)
class Frobenius:
    """‖λ‖_F = √(Σ λ_ij²) over all pinned parameters: the dual of the Frobenius (Euclidean) ball.

    The norm of plain SGD: one step of size η gains η‖λ‖²_F to first order.

    Example:
        >>> import torch
        >>> Frobenius()({"weight": torch.tensor([[3.0]]), "bias": torch.tensor([4.0])}).item()
        5.0
    """

    def __call__(self, multiplier: Mapping[str, Tensor]) -> Tensor:
        """The norm of one candidate's multiplier."""
        squares = [tensor.square().sum() for tensor in multiplier.values()]
        return torch.stack(squares).sum().sqrt()


@dataclass(frozen=True)
class PerParameter:
    """‖λ‖_F / √(number of pinned parameters): a size-fair Frobenius norm.

    Raw Frobenius norms favour wide layers; this is the root-mean-square entry of λ.
    """

    def __call__(self, multiplier: Mapping[str, Tensor]) -> Tensor:
        """The norm of one candidate's multiplier."""
        count = sum(tensor.numel() for tensor in multiplier.values())
        return Frobenius()(multiplier) / count**0.5
