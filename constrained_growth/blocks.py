"""Layers that start as the identity, and which of their parameters are pinned.

A block is an `nn.Module` that maps a tensor to one of the same shape, together with an attribute
`pinned`: the names of the parameters that are pinned at the values they have now, where the
block is the identity. The virtual parameters v are the deviations from these values, and

    λ = −∇_v L(θ, 0),   L the mean loss over the samples.

A block may also offer `factors(x, delta)`: the closed form of its multipliers as products of
cotangents and features. Without it λ comes from differentiating the block alone.
"""

from __future__ import annotations

import math
from collections.abc import Hashable, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constrained_growth.activations import (
    MAX_AUTOMATIC_SHIFT,
    Activation,
    TanhLU,
    as_activation,
    computes_same,
    identity_error,
    identity_shift,
    slope_at_zero,
    value_at_zero,
    vector_jacobian,
)
from constrained_growth.errors import BlockError

__all__ = [
    "AffineFactors",
    "HasFactors",
    "HasJointFactors",
    "IdentityLinear",
    "ResidualLinear",
    "ResidualMLP",
    "TanhLU",
    "pinned_parameters",
]


@dataclass(frozen=True)
class AffineFactors:
    """A pinned affine map W φ + b seen from both sides: λ_W = −Σ ψ φᵀ and λ_b = −Σ ψ.

    Attributes:
        weight: Name of the pinned weight W, of shape (out, in).
        bias: Name of the pinned bias b, of shape (out,), or None.
        cotangent: ψ = ∂L/∂(Wφ + b), shape (samples, ..., out).
        features: φ, shape (samples, ..., in).
    """

    weight: str
    bias: str | None
    cotangent: Tensor
    features: Tensor


class HasFactors(Protocol):
    """A block that knows its multipliers in closed form."""

    def factors(self, x: Tensor, delta: Tensor) -> Sequence[AffineFactors]:
        """The factors of all its pinned parameters, at the pins.

        Args:
            x: The tensor at the site, shape (samples, ..., width).
            delta: ∂L/∂(tensor at the site), same shape.
        """
        ...


class HasJointFactors(HasFactors, Protocol):
    """A block of which several can be worked off in one stroke, which saves time on small ones."""

    def joint_kind(self) -> Hashable:
        """Equal for blocks, at sites of one shape, that `joint_factors` takes together."""
        ...

    def joint_factors(
        self, blocks: Sequence[Any], x: Tensor, delta: Tensor
    ) -> Sequence[AffineFactors]:
        """The factors of several blocks of the kind of this one.

        Args:
            blocks: The blocks, this one among them.
            x: The tensors at their sites, shape (blocks, samples, ..., width).
            delta: ∂L/∂x, same shape.

        Returns:
            As `factors`, with a first dimension that counts the blocks.
        """
        ...


def has_factors(block: nn.Module) -> bool:
    """Whether a block knows its multipliers in closed form."""
    return callable(getattr(block, "factors", None))


def has_joint_factors(block: nn.Module) -> bool:
    """Whether blocks like this one can be worked off together."""
    return callable(getattr(block, "joint_factors", None))


def pinned_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """The pinned parameters of a block, by name.

    Raises:
        BlockError: `block` declares no pins, or names a parameter it does not have.
    """
    names = getattr(block, "pinned", None)
    if not isinstance(block, nn.Module) or not isinstance(names, Sequence) or not names:
        raise BlockError(
            f"block={block!r} does not say which of its parameters are pinned; a block is an "
            "nn.Module with an attribute pinned = ('name of a parameter', ...) that is the "
            "identity at the values they have."
        )
    try:
        if isinstance(names, str):
            raise TypeError(names)
        return {name: block.get_parameter(name) for name in names}
    except (AttributeError, TypeError) as error:
        known = tuple(name for name, _ in block.named_parameters())
        raise BlockError(
            f"pinned={names!r} of {type(block).__name__} is not a tuple of names of its "
            f"parameters; it has {known}."
        ) from error


def moves(block: nn.Module, x: Tensor) -> Tensor:
    """How much a block changes x at its pins, as `change` says it.

    Raises:
        BlockError: The block does not keep the shape of x.
    """
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    y = torch.func.functional_call(block, buffers, (x.clone(),))
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise BlockError(
            f"block={type(block).__name__} turns the shape {tuple(x.shape)} at its site into "
            f"{got}; the width must match."
        )
    return change(x, y)


def change(x: Tensor, y: Tensor) -> Tensor:
    """Largest difference of an entry, over what rounding may do: at most 1 where y is x."""
    if x.numel() == 0:
        return x.new_zeros(())
    allowed = 1e3 * torch.finfo(x.dtype).eps * x.abs().max().clamp(min=1.0)
    return (y - x).abs().max() / allowed


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
        dtype: In which precision.

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
        self.shift = _checked_shift(self.activation, shift)
        width = _positive("width", width)
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
        return _kind(self.activation), self.shift

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
        self._slope = _checked_slope(self.activation, "ResidualLinear")
        width = _positive("width", width)
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
        width, hidden = _positive("width", width), _positive("hidden", hidden)
        self.activation = as_activation(activation)
        self.pins_outer = pinned == "outer"
        self.pinned = ("outer.weight",) if self.pins_outer else ("inner.weight", "inner.bias")
        self.inner = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.outer = nn.Linear(hidden, width, bias=False, device=device, dtype=dtype)
        self._slope = None if self.pins_outer else _checked_slope(self.activation, "ResidualMLP")
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
        return _kind(self.activation), self.inner.out_features, self.pinned

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


def _positive(name: str, value: int) -> int:
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BlockError(f"{name}={value!r} is not a positive whole number.")
    return value


def _kind(activation: Activation) -> Hashable:
    """Equal for activations that compute the same."""
    if not isinstance(activation, nn.Module):
        return activation
    if any(True for _ in activation.parameters()) or any(True for _ in activation.buffers()):
        return id(activation)
    return type(activation), activation.extra_repr()


def _scaled(tensor: Tensor, factor: float) -> Tensor:
    return tensor if factor == 1.0 else tensor * factor


def _checked_shift(activation: Activation, shift: float | None) -> float:
    """The shift to use, or an error that names a block to use instead."""
    found = identity_shift(activation) if shift is None else float(shift)
    if found is None or (shift is not None and identity_error(activation, found) > 1e-12):
        defect = identity_error(activation, found or 0.0)
        stated = "no shift s" if found is None else f"shift={found:g} does not"
        reason = (
            f"({stated} gives σ(x + s) = x + s on the range of σ; at s = {found or 0.0:g} it is "
            f"off by {defect:.2g})"
        )
    elif shift is None and found > MAX_AUTOMATIC_SHIFT:
        reason = (
            f"(only the shift {found:.4g} would do, where the layer is linear for all that "
            f"arrives; pass shift={found!r} if that is meant)"
        )
    else:
        return found
    raise BlockError(
        f"activation={activation!r} cannot make an identity layer {reason}. Use "
        "ResidualMLP(width, hidden, activation), which is the identity for every activation."
    )


def _checked_slope(activation: Activation, block: str) -> float:
    """σ′(0), refusing σ(0) ≠ 0 and σ′(0) = 0."""
    value, slope = value_at_zero(activation), slope_at_zero(activation)
    advice = 'Use ResidualMLP(width, hidden, activation, pinned="outer"), which takes every σ.'
    if value != 0:
        raise BlockError(
            f"activation={activation!r} has σ(0) = {value:g}: {block} with its weights at zero "
            f"would not be the identity. {advice}"
        )
    if slope == 0:
        raise BlockError(
            f"activation={activation!r} has σ′(0) = 0 by autograd's convention: every "
            f"multiplier of {block} would be exactly 0. {advice}"
        )
    return slope
