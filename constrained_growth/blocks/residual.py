"""Fully connected layers around which x is passed unchanged."""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constrained_growth._activations import Activation, as_activation, value_at_zero
from constrained_growth.blocks.checks import activation_kind, checked_slope, positive
from constrained_growth.blocks.factors import AffineFactors
from constrained_growth.errors import BlockError


class ResidualLinear(nn.Module):
    """Residual layer with one weight, x ↦ x + σ(W x + b) with W = 0, b = 0.

    Needs σ(0) = 0, to be the identity, and σ′(0) ≠ 0, or its multipliers vanish identically
    (ReLU: autograd takes ReLU′(0) = 0).

    Multipliers: λ_W = −σ′(0) Σ δ xᵀ, λ_b = −σ′(0) Σ δ.

    Args:
        width: Size of the last dimension of the tensor at the site.
        activation: σ, a module or an elementwise function.
        device: Where the parameters are made.
        dtype: In which precision.

    Parameters:
        weight (width, width), bias (width,): both pinned.

    Raises:
        BlockError: σ(0) ≠ 0, or σ′(0) = 0.

    Example:
        >>> ResidualLinear(2, torch.tanh)(torch.tensor([[-1.0, 2.0]])).tolist()
        [[-1.0, 2.0]]
    """

    pinned = ("weight", "bias")

    def __init__(
        self,
        width: int,
        activation: Activation | type[nn.Module],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        self.activation = as_activation(activation)
        self._slope = checked_slope(self.activation, "ResidualLinear")
        width = positive("width", width)
        self.weight = nn.Parameter(torch.zeros(width, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """X + σ(W x + b), shape (..., width) to the same."""
        return x + self.activation(F.linear(x, self.weight, self.bias))

    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors]:
        """ψ = σ′(0) δ, φ = x."""
        return (AffineFactors("weight", "bias", _scaled(delta, self._slope), x),)

    def exact_after(self, site: nn.Module) -> bool:
        """Always: the branch is zero, whatever arrives."""
        return True

    def joint_kind(self) -> Hashable:
        """Same σ′(0)."""
        return self._slope

    def joint_factors(
        self, blocks: Sequence[ResidualLinear], x: Tensor, delta: Tensor
    ) -> tuple[AffineFactors]:
        """The same formula; no parameter enters it."""
        return self.factors(x, delta)

    def config(self) -> dict[str, Any]:
        """The arguments that build the same architecture again."""
        return {"width": self.weight.shape[0], "activation": self.activation}

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return f"width={self.weight.shape[0]}"


class ResidualMLP(nn.Module):
    """Residual layer with two weights, x ↦ x + W₂ σ(W₁ x + b), one of the factors pinned at zero.

    Multipliers:

        pinned="outer" (W₂ = 0):         λ_{W₂} = −Σ δ σ(W₁x + b)ᵀ;
        pinned="inner" (W₁ = 0, b = 0):  λ_{W₁} = −σ′(0) Σ (W₂ᵀδ) xᵀ, λ_b = −σ′(0) Σ W₂ᵀδ,
                                         which needs σ(0) = 0 and σ′(0) ≠ 0.

    The free factor must not be zero too: with both at zero every multiplier is exactly 0. Right
    after a ReLU, `inner_init` should not be a multiple of the identity either: λ is then a
    multiple of W_nextᵀ ∂L/∂W_next, and vanishes as soon as the next layer is stationary.

    Args:
        width: Size of the last dimension of the tensor at the site.
        hidden: Width of the inner layer.
        activation: σ, a module or an elementwise function.
        pinned: Which factor is pinned: "outer" (default; the identity for every σ) or "inner".
        inner_init: The free factor: "random" (PyTorch's initialisation of `nn.Linear`), a number
            c for c times the identity with b = 0 (the source takes 0.8), or a tensor in the
            shape of the free weight (b = 0). A tensor's dtype is kept unless `dtype` is given.
        device: Where the parameters are made.
        dtype: In which precision.

    Parameters:
        inner.weight (hidden, width), inner.bias (hidden,), outer.weight (width, hidden).

    Raises:
        BlockError: The multipliers would vanish identically, or the shape of `inner_init` does
            not fit.

    Source:
        Herberg et al., arXiv 2311.15995, residual networks with two weights.

    Example:
        >>> block = ResidualMLP(2, 3, torch.tanh)
        >>> block(torch.tensor([[-1.0, 2.0]])).tolist(), block.pinned
        ([[-1.0, 2.0]], ('outer.weight',))
    """

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Activation | type[nn.Module],
        pinned: Literal["outer", "inner"] = "outer",
        *,
        inner_init: Literal["random"] | float | Tensor = "random",
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if pinned not in ("outer", "inner"):
            raise BlockError(f'pinned={pinned!r} is neither "outer" nor "inner".')
        if dtype is None and isinstance(inner_init, Tensor) and inner_init.is_floating_point():
            dtype = inner_init.dtype
        width, hidden = positive("width", width), positive("hidden", hidden)
        self.activation = as_activation(activation)
        self.pins_outer = pinned == "outer"
        self.pinned = ("outer.weight",) if self.pins_outer else ("inner.weight", "inner.bias")
        self.inner = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.outer = nn.Linear(hidden, width, bias=False, device=device, dtype=dtype)
        self._slope = None if self.pins_outer else checked_slope(self.activation, "ResidualMLP")
        with torch.no_grad():
            _fill(self.inner if self.pins_outer else self.outer, inner_init)
            for name in self.pinned:
                self.get_parameter(name).zero_()
        self._refuse_two_zero_factors()

    def forward(self, x: Tensor) -> Tensor:
        """X + W₂ σ(W₁ x + b), shape (..., width) to the same."""
        return x + self.outer(self.activation(self.inner(x)))

    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors]:
        """Outer pinned: ψ = δ, φ = σ(W₁x + b). Inner pinned: ψ = σ′(0) W₂ᵀδ, φ = x."""
        if self._slope is None:
            hidden = self.activation(self.inner(x))
            return (AffineFactors("outer.weight", None, delta, hidden),)
        psi = _scaled(delta @ self.outer.weight, self._slope)
        return (AffineFactors("inner.weight", "inner.bias", psi, x),)

    def exact_after(self, site: nn.Module) -> bool:
        """Always: the branch is zero, whatever arrives."""
        return True

    def joint_kind(self) -> Hashable:
        """Same σ, same hidden width, same factor pinned."""
        return activation_kind(self.activation), self.inner.out_features, self.pinned

    def joint_factors(
        self, blocks: Sequence[ResidualMLP], x: Tensor, delta: Tensor
    ) -> tuple[AffineFactors]:
        """As `factors`, with a batched product for the free factors."""
        if self._slope is None:
            weight = torch.stack([block.inner.weight for block in blocks])
            bias = torch.stack([block.inner.bias for block in blocks]).unsqueeze(1)
            inner = torch.baddbmm(bias, x.flatten(1, -2), weight.mT)
            hidden = self.activation(inner.view(*x.shape[:-1], -1))
            return (AffineFactors("outer.weight", None, delta, hidden),)
        weight = torch.stack([block.outer.weight for block in blocks])
        psi = _scaled(delta.flatten(1, -2) @ weight, self._slope).view(*delta.shape[:-1], -1)
        return (AffineFactors("inner.weight", "inner.bias", psi, x),)

    def config(self) -> dict[str, Any]:
        """The arguments that build the same architecture again, without drawing anything."""
        return {
            "width": self.inner.in_features,
            "hidden": self.inner.out_features,
            "activation": self.activation,
            "pinned": "outer" if self.pins_outer else "inner",
            "inner_init": 1.0,
        }

    def extra_repr(self) -> str:
        """What `repr` shows between the brackets."""
        return f"pinned={self.pinned}"

    def _refuse_two_zero_factors(self) -> None:
        if self.pins_outer:
            inner_is_zero = not bool(self.inner.weight.any()) and not bool(self.inner.bias.any())
            dead = inner_is_zero and value_at_zero(self.activation) == 0
        else:
            dead = not bool(self.outer.weight.any())
        if dead:
            raise BlockError(
                "inner_init makes the free factor zero while the other one is pinned at zero: "
                'every multiplier would be exactly 0. Use inner_init="random".'
            )


def _fill(linear: nn.Linear, init: Literal["random"] | float | Tensor) -> None:
    """Set the free factor; `nn.Linear` has drawn the random one already."""
    if isinstance(init, str) and init == "random":
        return
    if isinstance(init, Tensor):
        if init.shape != linear.weight.shape:
            raise BlockError(
                f"inner_init has shape {tuple(init.shape)}, the free factor has "
                f"{tuple(linear.weight.shape)}."
            )
        linear.weight.copy_(init)
    elif isinstance(init, int | float) and math.isfinite(init):
        linear.weight.copy_(float(init) * torch.eye(*linear.weight.shape, dtype=torch.float64))
    else:
        raise BlockError(
            f'inner_init={init!r} is none of "random", a finite number (times the identity), a '
            "tensor."
        )
    if linear.bias is not None:
        linear.bias.zero_()


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor
