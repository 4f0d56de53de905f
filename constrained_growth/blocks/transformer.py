"""Pre-norm layers for sequences (samples, positions, width) that start as the identity."""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from constrained_growth._activations import Activation, as_activation
from constrained_growth._arguments import flag, number, positive_int
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
class TransformerBlock(nn.Module):
    """Pre-norm transformer block with both output projections pinned at zero.

        h = x + P · attention(LN₁(x)) + p,   y = h + W₂ σ(W₁ LN₂(h) + b₁) + b₂,

    with P = 0, p = 0, W₂ = 0, b₂ = 0: the identity for every x and every σ.
    Multipliers, with sums over samples and positions and all features taken at h = x:

        λ_P = −Σ δ attention(LN₁(x))ᵀ,  λ_{W₂} = −Σ δ σ(W₁ LN₂(x) + b₁)ᵀ,  λ_p = λ_{b₂} = −Σ δ.

    The first dimension counts samples; all positions between it and the last dimension attend to
    each other, padded ones too. The block sees only the tensor at its site, without masks and
    position embeddings; for a model that relies on them use `CopiedBlock`.

    Args:
        width: Size of the last dimension of the tensor at the site.
        heads: Number of heads, a divisor of `width`.
        hidden: Inner width of the feedforward part; 4 · `width` by default.
        activation: σ, a module or an elementwise function.
        causal: Whether a position attends only to itself and to earlier ones.
        device, dtype: Of the parameters.

    Weights:
        norm1.weight, norm1.bias, norm2.weight, norm2.bias (width,); qkv.weight (3 width, width),
        qkv.bias; proj.weight (width, width), proj.bias (width,): pinned; fc1.weight (hidden,
        width), fc1.bias; fc2.weight (width, hidden), fc2.bias (width,): pinned.

    Raises:
        BlockError: `heads` does not divide `width`, or another argument is invalid.

    Source:
        Xiong et al., arXiv 2002.04745 (pre-norm); Wu et al., arXiv 2401.02415 (block expansion
        with the output projections at zero).

    Example:
        >>> block = TransformerBlock(8, heads=2, causal=True)
        >>> x = torch.randn(3, 5, 8)
        >>> torch.equal(block(x), x), block.pinned
        (True, ('proj.weight', 'proj.bias', 'fc2.weight', 'fc2.bias'))
    """

    pinned = ("proj.weight", "proj.bias", "fc2.weight", "fc2.bias")
    exact_after = exact_everywhere
    extra_repr = shown

    def __init__(
        self,
        width: int,
        heads: int,
        hidden: int | None = None,
        activation: Activation | type[nn.Module] = nn.GELU,
        *,
        causal: bool = False,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(device, dtype)
        self.heads = positive_int("heads", heads, BlockError)
        width = positive_int("width", width, BlockError)
        hidden = positive_int("hidden", 4 * width if hidden is None else hidden, BlockError)
        if width % self.heads:
            raise BlockError(f"heads={heads} does not divide width={width}; use a divisor.")
        flag("causal", causal, BlockError)
        self.causal, activation = causal, as_activation(activation)
        self.norm1 = nn.LayerNorm(width, device=device, dtype=dtype)
        self.qkv = nn.Linear(width, 3 * width, device=device, dtype=dtype)
        self.proj = nn.Linear(width, width, device=device, dtype=dtype)
        self.norm2 = nn.LayerNorm(width, device=device, dtype=dtype)
        self.fc1 = nn.Linear(width, hidden, device=device, dtype=dtype)
        self.activation = activation
        self.fc2 = nn.Linear(hidden, width, device=device, dtype=dtype)
        zero_pins(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return y, of the shape (samples, ..., width) of x."""
        x = x + self.proj(self._attended(x))
        return x + self.fc2(self._activated(x))

    def _attended(self, x: Tensor) -> Tensor:
        """The input of `proj`: the concatenated outputs of the heads."""
        if not is_scripting() and isinstance(x, Tensor) and x.dim() < 3:
            raise BlockError(
                f"block=TransformerBlock takes sequences of shape (samples, positions, width), "
                f"and the tensor at its site has the shape {tuple(x.shape)}; use ResidualMLP."
            )
        mixed = self.qkv(self.norm1(x)).flatten(1, -2)
        q, k, v = mixed.unflatten(-1, (3, self.heads, -1)).permute(2, 0, 3, 1, 4).unbind()
        y = F.scaled_dot_product_attention(q, k, v, is_causal=self.causal)
        return y.transpose(1, 2).reshape(x.shape)

    def _activated(self, x: Tensor) -> Tensor:
        """The input of `fc2`."""
        return self.activation(self.fc1(self.norm2(x)))

    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors, ...]:
        """ψ = δ for both, φ = the input of each projection, with both branches zero."""
        return (
            AffineFactors("proj.weight", "proj.bias", delta, self._attended(x)),
            AffineFactors("fc2.weight", "fc2.bias", delta, self._activated(x)),
        )

    def config(self) -> dict[str, Any]:
        """The arguments that build the same architecture again."""
        return {
            "width": self.fc1.in_features,
            "heads": self.heads,
            "hidden": self.fc1.out_features,
            "activation": self.activation,
            "causal": self.causal,
        }


@register
class GatedMLP(nn.Module):
    """Gated feedforward layer, x ↦ x + D(σ(G n) ⊙ U n) with n = RMSNorm(x), D pinned at zero.

    The feedforward half of a Llama layer. The identity for every x and every σ;

        λ_D = −Σ δ (σ(G n) ⊙ U n)ᵀ.

    Args:
        width: Size of the last dimension of the tensor at the site.
        hidden: Inner width.
        activation: σ, a module or an elementwise function.
        eps: Added to the mean square in the normalisation.
        device, dtype: Of the parameters.

    Weights:
        norm.weight (width,), gate_proj.weight and up_proj.weight (hidden, width),
        down_proj.weight (width, hidden): pinned.

    Raises:
        BlockError: An argument is invalid.

    Source:
        Shazeer, arXiv 2002.05202 (SwiGLU); Touvron et al., arXiv 2302.13971.

    Example:
        >>> x = torch.randn(3, 5, 8)
        >>> torch.equal(GatedMLP(8, 16)(x), x)
        True
    """

    pinned = ("down_proj.weight",)
    exact_after = exact_everywhere

    def __init__(
        self,
        width: int,
        hidden: int,
        activation: Activation | type[nn.Module] = nn.SiLU,
        *,
        eps: float = 1e-6,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(device, dtype)
        width = positive_int("width", width, BlockError)
        hidden = positive_int("hidden", hidden, BlockError)
        eps, activation = number("eps", eps, BlockError, "(0, inf)"), as_activation(activation)
        self.norm = nn.RMSNorm(width, eps, device=device, dtype=dtype)
        self.gate_proj = nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)
        self.up_proj = nn.Linear(width, hidden, bias=False, device=device, dtype=dtype)
        self.activation = activation
        self.down_proj = nn.Linear(hidden, width, bias=False, device=device, dtype=dtype)
        zero_pins(self)

    def forward(self, x: Tensor) -> Tensor:
        """Return x + the branch, of the shape (..., width) of x."""
        return x + self.down_proj(self._gated(x))

    def _gated(self, x: Tensor) -> Tensor:
        """The input of `down_proj`."""
        n = self.norm(x)
        return self.activation(self.gate_proj(n)) * self.up_proj(n)

    def factors(self, x: Tensor, delta: Tensor) -> tuple[AffineFactors]:
        """ψ = δ, φ = σ(G n) ⊙ U n."""
        return (AffineFactors("down_proj.weight", None, delta, self._gated(x)),)

    def config(self) -> dict[str, Any]:
        """The arguments that build the same architecture again."""
        return {
            "width": self.gate_proj.in_features,
            "hidden": self.gate_proj.out_features,
            "activation": self.activation,
            "eps": self.norm.eps,
        }
