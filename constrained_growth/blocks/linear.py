"""Fully connected layers that start as the identity."""

from __future__ import annotations

import math
from numbers import Real
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constrained_growth._activations import (
    Activation,
    as_activation,
    at_kink,
    checked_shift,
    checked_slope,
    computes_same,
    value_at_zero,
    vector_jacobian,
)
from constrained_growth._arguments import positive_int
from constrained_growth.blocks.protocol import (
    AffineFactors,
    check_options,
    exact_everywhere,
    register,
    shown,
    zero_pins,
)
from constrained_growth.errors import BlockError


@register
class IdentityLinear(nn.Module):
    """Identity layer x ↦ σ(W x + b) − s with W = I, b = s, placed right after a σ.

    It is the identity there if σ(x + s) = x + s for every x in the range of σ: s = 0 for ReLU and
    other idempotent functions, s = ε for `TanhLU(ε)`; tanh and the like have no s and are refused.

    Multipliers, with δ = ∂L/∂x and sums over the samples:

        λ_W = −Σ (δ ⊙ σ′(x + s)) xᵀ,   λ_b = −Σ δ ⊙ σ′(x + s).

    Args:
        width: Size of the last dimension of the tensor at the site.
        activation: σ, a module or an elementwise function.
        shift: s. None (default) takes the smallest one if it is at most 0.1; a larger one must be
            given, as the layer is linear, and so redundant, until it has moved by about s.
        device, dtype: Of the parameters. A shift is exact in its first dtype, and in lower ones.

    Weights:
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
    extra_repr = shown

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
        check_options(device, dtype)
        self.activation = as_activation(activation)
        self.shift = checked_shift(self.activation, shift)
        width = positive_int("width", width, BlockError)
        self.weight = nn.Parameter(torch.eye(width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.full((width,), self.shift, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """σ(W x + b) − s, of the shape (..., width) of x."""
        y = self.activation(F.linear(x, self.weight, self.bias))
        return y - self.shift if self.shift else y

    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors]:
        """ψ = δ ⊙ σ′(x + s), φ = x."""
        psi = vector_jacobian(self.activation, x + self.shift if self.shift else x, delta)
        return (AffineFactors("weight", "bias", psi, x, same_units=True),)

    def kinks(self, x: Tensor) -> Tensor:
        """Where the layer stands at a kink of σ at its pins, of the shape of x."""
        return at_kink(self.activation, x + self.shift)

    def exact_after(self, site: nn.Module) -> bool:
        """Whether `site` computes σ, judged by its values."""
        return computes_same(self.activation, site)

    def config(self) -> dict[str, Any]:
        """The arguments that build the same architecture again."""
        return {"width": len(self.bias), "activation": self.activation, "shift": self.shift}


@register
class ResidualLinear(nn.Module):
    """Residual layer with one weight, x ↦ x + σ(W x + b) with W = 0, b = 0.

    It needs σ(0) = 0, to be the identity, and σ′(0) ≠ 0 (by autograd 0 for ReLU), as its
    multipliers are λ_W = −σ′(0) Σ δ xᵀ and λ_b = −σ′(0) Σ δ.

    Args:
        width: Size of the last dimension of the tensor at the site.
        activation: σ, a module or an elementwise function.
        device, dtype: Of the parameters.

    Weights:
        weight (width, width), bias (width,): both pinned.

    Raises:
        BlockError: σ(0) ≠ 0, or σ′(0) = 0.

    Example:
        >>> ResidualLinear(2, torch.tanh)(torch.tensor([[-1.0, 2.0]])).tolist()
        [[-1.0, 2.0]]
    """

    pinned = ("weight", "bias")
    exact_after = exact_everywhere
    extra_repr = shown

    def __init__(
        self,
        width: int,
        activation: Activation | type[nn.Module],
        *,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(device, dtype)
        self.activation = as_activation(activation)
        self._slope = checked_slope(self.activation, "ResidualLinear")
        width = positive_int("width", width, BlockError)
        self.weight = nn.Parameter(torch.zeros(width, width, device=device, dtype=dtype))
        self.bias = nn.Parameter(torch.zeros(width, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Return x + σ(W x + b), of the shape (..., width) of x."""
        return x + self.activation(F.linear(x, self.weight, self.bias))

    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors]:
        """ψ = σ′(0) δ, φ = x."""
        return (AffineFactors("weight", "bias", self._slope * delta, x, same_units=True),)

    def config(self) -> dict[str, Any]:
        """The arguments that build the same architecture again."""
        return {"width": self.weight.shape[0], "activation": self.activation}


@register
class ResidualMLP(nn.Module):
    """Residual layer with two weights, x ↦ x + W₂ σ(W₁ x + b), one of the factors pinned at zero.

    Multipliers:

        pinned="outer" (W₂ = 0):         λ_{W₂} = −Σ δ σ(W₁x + b)ᵀ;
        pinned="inner" (W₁ = 0, b = 0):  λ_{W₁} = −σ′(0) Σ (W₂ᵀδ) xᵀ, λ_b = −σ′(0) Σ W₂ᵀδ,
                                         which needs σ(0) = 0 and σ′(0) ≠ 0.

    With both factors at zero every multiplier would be 0. Right after a ReLU, `inner_init` should
    not be a multiple of the identity either: λ is then a multiple of W_nextᵀ ∂L/∂W_next, and
    vanishes as soon as the next layer is stationary.

    Args:
        width: Size of the last dimension of the tensor at the site.
        hidden: Width of the inner layer.
        activation: σ, a module or an elementwise function.
        pinned: Which factor is pinned: "outer" (default; the identity for every σ) or "inner".
        inner_init: The free factor: "random" (as `nn.Linear` is), a number c for c times the
            identity with b = 0 (0.8 in the source), or a tensor in the shape of the free weight
            (b = 0), whose dtype is kept unless `dtype` is given.
        device, dtype: Of the parameters.

    Weights:
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

    exact_after = exact_everywhere

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
        check_options(device, dtype)
        if pinned not in ("outer", "inner"):
            raise BlockError(f'pinned={pinned!r} is neither "outer" nor "inner".')
        if dtype is None and isinstance(inner_init, Tensor) and inner_init.is_floating_point():
            dtype = inner_init.dtype
        width = positive_int("width", width, BlockError)
        hidden = positive_int("hidden", hidden, BlockError)
        self.activation = as_activation(activation)
        self.pins_outer = pinned == "outer"
        self.pinned = ("outer.weight",) if self.pins_outer else ("inner.weight", "inner.bias")
        self._slope = 1.0 if self.pins_outer else checked_slope(self.activation, "ResidualMLP")
        shape = (hidden, width) if self.pins_outer else (width, hidden)
        init = _free_weight(inner_init, shape, dtype)
        is_zero = init is not None and not init.is_meta and not bool(init.any())
        if is_zero and not (self.pins_outer and value_at_zero(self.activation)):
            raise BlockError(
                "inner_init makes the free factor zero while the other one is pinned at zero: "
                'every multiplier would be exactly 0. Use inner_init="random".'
            )
        self.inner = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.outer = nn.Linear(hidden, width, bias=False, device=device, dtype=dtype)
        if init is not None:
            with torch.no_grad():
                (self.inner if self.pins_outer else self.outer).weight.copy_(init)
                self.inner.bias.zero_()
        zero_pins(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + W₂ σ(W₁ x + b), of the shape (..., width) of x."""
        return x + self.outer(self.activation(self.inner(x)))

    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors]:
        """Outer pinned: ψ = δ, φ = σ(W₁x + b). Inner pinned: ψ = σ′(0) W₂ᵀδ, φ = x."""
        if self.pins_outer:
            hidden = self.activation(self.inner(x))
            return (AffineFactors("outer.weight", None, delta, hidden),)
        psi = self._slope * (delta @ self.outer.weight)
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
        """The arguments shown by `repr`."""
        return f"pinned={self.pinned}"


def _free_weight(
    init: Literal["random"] | float | Tensor, shape: tuple[int, int], dtype: torch.dtype | None
) -> Tensor | None:
    """The free factor; None for the one that `nn.Linear` draws."""
    if isinstance(init, str) and init == "random":
        return None
    dtype = dtype or torch.get_default_dtype()
    if isinstance(init, Tensor):
        if init.shape != shape:
            raise BlockError(f"inner_init has shape {tuple(init.shape)}, the free factor {shape}.")
        return init.to(dtype)
    if isinstance(init, Real) and math.isfinite(init):
        return (float(init) * torch.eye(*shape, dtype=torch.float64)).to(dtype)
    raise BlockError(f'inner_init={init!r} is neither "random", a finite number nor a tensor.')
