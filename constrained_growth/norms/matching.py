"""The norm that fits an optimizer."""

from __future__ import annotations

import torch

from constrained_growth.errors import RuleError
from constrained_growth.norms.matrices import Entrywise1, Frobenius, Nuclear
from constrained_growth.solution import Norm

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
