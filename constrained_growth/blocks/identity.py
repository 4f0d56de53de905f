"""Layers that do nothing after their own activation."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constrained_growth._activations import (
    Activation,
    as_activation,
    computes_same,
    vector_jacobian,
)
from constrained_growth.blocks.checks import activation_kind, checked_shift, positive
from constrained_growth.blocks.factors import AffineFactors


class IdentityLinear(nn.Module):
    """Identity layer x ↦ σ(W x + b) − s with W = I, b = s, to stand right after a σ.

    It does nothing on what arrives there if σ(x + s) = x + s for every x in the range of σ. That
    is checked by calling σ: s = 0 for ReLU and other idempotent functions, s = ε for
    `TanhLU(ε)`; tanh, GELU and the like have no such s and are refused.

    Multipliers, with δ = ∂L/∂x and sums over the samples:

        λ_W = −Σ (δ ⊙ σ′(x + s)) xᵀ,   λ_b = −Σ δ ⊙ σ′(x + s).

    Args:
        width: Size of the last dimension of the tensor at the site.
        activation: σ, a module or an elementwise function.
        shift: s. None (default) looks for the smallest one, and takes it up to 0.1: a shifted
            layer is linear until its parameters have moved by about s, and a linear layer offers
            nothing that the next layer could not do. A larger s has to be asked for.
        device: Where the parameters are made.
        dtype: In which precision. A shift is exact in the one it was made in, and in lower ones.

    Parameters:
        weight (width, width), bias (width,): both pinned.

    Raises:
        BlockError: `activation` is not the identity on its own range, shifted or not.

    Source:
        Herberg et al., arXiv 2311.15995, section on feedforward networks.

    Example:
        >>> block = IdentityLinear(2, nn.ReLU())
        >>> block(torch.tensor([[0.5, 2.0]]))
        tensor([[0.5000, 2.0000]], grad_fn=<ReluBackward0>)
    """

    pinned = ("weight", "bias")

    def __init__(
        self,
        width: int,
        activation: Activation | type[nn.Module],
        *,
        shift: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = as_activation(activation)
        self.shift = checked_shift(self.activation, shift)
        width = positive("width", width)
        self.weight = nn.Parameter(torch.eye(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.full((width,), self.shift, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """σ(W x + b) − s, shape (..., width) to the same."""
        y = self.activation(F.linear(x, self.weight, self.bias))
        return y - self.shift if self.shift else y

    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors]:
        """ψ = δ ⊙ σ′(x + s), φ = x."""
        psi = vector_jacobian(self.activation, x + self.shift if self.shift else x, delta)
        return (AffineFactors("weight", "bias", psi, x),)

    def exact_after(self, site: nn.Module) -> bool:
        """Whether this is the identity on all that a module can give: σ itself, by its values."""
        return computes_same(self.activation, site)

    def joint_kind(self) -> Hashable:
        """Same σ, same s."""
        return activation_kind(self.activation), self.shift

    def joint_factors(
        self, blocks: Sequence[IdentityLinear], x: Tensor, delta: Tensor
    ) -> tuple[AffineFactors]:
        """The same formula; no parameter enters it."""
        return self.factors(x, delta)

    def config(self) -> dict[str, Any]:
        """The arguments that build the same architecture again."""
        width = self.weight.shape[0]
        return {"width": width, "activation": self.activation, "shift": self.shift}

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return f"width={self.weight.shape[0]}, shift={self.shift:g}"
