"""Convolutions that start as the identity on images (samples, channels, height, width)."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.jit import is_scripting  # type: ignore[attr-defined]

from constrained_growth._activations import (
    Activation,
    as_activation,
    at_kink,
    checked_shift,
    computes_same,
    vector_jacobian,
)
from constrained_growth._arguments import function, positive_int
from constrained_growth.blocks.convolved import Convolved
from constrained_growth.blocks.protocol import (
    AffineFactors,
    check_options,
    exact_everywhere,
    register,
    shown,
    zero_pins,
)
from constrained_growth.errors import BlockError

NormLayer = Callable[[int], nn.Module]


@register
class ResidualConv2d(nn.Module):
    """Residual convolutions, x ↦ x + N₂(K₂ ∗ σ(N₁(K₁ ∗ x))), the end of the branch pinned at zero.

    N are normalisations, BatchNorm by default. Which parameters are pinned:

        pinned="gamma":   scale γ = 0 and shift β = 0 of N₂. Both, because the branch is zero only
                          where both are; λ_γ = −Σ δ ⊙ x̂ and λ_β = −Σ δ, x̂ what N₂ normalised.
        pinned="weight":  K₂ = 0 and its bias = 0, and N₂ is left out: after it, a normalisation
                          would blow K₂ up to unit size as soon as it moves (λ is larger by 1/√ε).

    Either way it is the identity in train and eval mode and for every σ, and no activation follows
    the sum. With BatchNorm measure in train mode: in eval mode the running statistics of a new
    block are 0 and 1, so λ_γ is that of features that are not normalised. In train mode it mixes
    the samples of a batch, so the standard error comes from the spread over batches.

    Without normalisation λ has a closed form, ψ = δ and φ = the patches that K₂ sees.

    Args:
        channels: Channels of the tensor at the site, its second dimension.
        activation: σ, a module or an elementwise function; ReLU by default, as in the source.
        hidden: Channels in between; `channels` by default.
        kernel_size: k, odd, of both convolutions.
        norm_layer: Makes a normalisation with parameters `weight` and `bias` from a number of
            channels: `nn.BatchNorm2d` (default), or `functools.partial(nn.GroupNorm, 8)` (not a
            lambda, which cannot be pickled). None for none; the convolutions then have a bias.
        pinned: "gamma" or "weight"; by default the first if there is a normalisation.
        device, dtype: Of the parameters.

    Weights:
        convs.0.weight (hidden, channels, k, k), convs.1.weight (channels, hidden, k, k), their
        biases where no normalisation follows, norms.0 and norms.1: weight and bias.

    Raises:
        BlockError: An argument is invalid, or the normalisation has no weight and bias.

    Source:
        He et al., arXiv 1512.03385 (the block); Goyal et al., arXiv 1706.02677, 5.1 (γ = 0).

    Example:
        >>> block = ResidualConv2d(2, nn.ReLU())
        >>> x = torch.randn(3, 2, 5, 5)
        >>> torch.equal(block(x), x), block.pinned
        (True, ('norms.1.weight', 'norms.1.bias'))
    """

    exact_after = exact_everywhere
    extra_repr = shown
    __jit_unused_properties__ = ("factors",)
    _reduction = 1  # of the channels in between, by default

    def __init__(
        self,
        channels: int,
        activation: Activation | type[nn.Module] = nn.ReLU,
        hidden: int | None = None,
        kernel_size: int = 3,
        *,
        norm_layer: NormLayer | None = nn.BatchNorm2d,
        pinned: Literal["gamma", "weight"] | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(device, dtype)
        self.channels = positive_int("channels", channels, BlockError)
        hidden = max(1, channels // self._reduction) if hidden is None else hidden
        self.hidden = positive_int("hidden", hidden, BlockError)
        self.kernel_size = _odd(kernel_size)
        if pinned not in ("gamma", "weight", None):
            raise BlockError(f'pinned={pinned!r} is neither "gamma" nor "weight".')
        function(
            "norm_layer", norm_layer, BlockError, "nn.BatchNorm2d", optional=True, or_class=True
        )
        if pinned == "gamma" and norm_layer is None:
            raise BlockError('pinned="gamma" needs a norm_layer; use one, or pinned="weight".')
        self._pins_gamma = norm_layer is not None and pinned != "weight"
        last_norm = norm_layer(channels) if norm_layer and self._pins_gamma else None
        affine = [getattr(last_norm, name, None) for name in ("weight", "bias")]
        if self._pins_gamma and [getattr(p, "shape", None) for p in affine] != [(channels,)] * 2:
            raise BlockError(
                f"norm_layer={norm_layer!r} makes {last_norm!r}, with no `weight` and `bias` "
                f'of shape ({channels},) to pin; use nn.BatchNorm2d, or pinned="weight".'
            )
        self._norm_layer = norm_layer
        self.activation = as_activation(activation)
        self.convs = nn.ModuleList()
        self.norms = nn.ModuleList()
        sizes = self._kernel_sizes(kernel_size)
        last = len(sizes) - 1
        widths = (channels, *[hidden] * last, channels)
        for size, width, out in zip(sizes, widths, widths[1:], strict=False):
            is_bare = len(self.convs) == last and not self._pins_gamma
            norm = None if norm_layer is None or is_bare else norm_layer(out)
            conv = nn.Conv2d(width, out, size, padding=size // 2, bias=norm is None, dtype=dtype)
            self.convs.append(conv.to(device))
            self.norms.append(nn.Identity() if norm is None else norm.to(device, dtype))
        end = f"norms.{last}" if self._pins_gamma else f"convs.{last}"
        self.pinned = (f"{end}.weight", f"{end}.bias")
        zero_pins(self)

    @staticmethod
    def _kernel_sizes(kernel_size: int) -> tuple[int, ...]:
        return kernel_size, kernel_size

    def forward(self, x: Tensor) -> Tensor:
        """Return x + the branch, of the shape (samples, channels, height, width) of x."""
        return x + self.norms[-1](self.convs[-1](self._features(x)))

    def _features(self, x: Tensor) -> Tensor:
        """The input of the last convolution."""
        if not is_scripting():
            _check_images(self, x, self.channels)
        # torch.jit has no slices of module lists, and no strict=True
        for i, (conv, norm) in enumerate(zip(self.convs, self.norms)):  # noqa: B905
            if i < len(self.convs) - 1:
                x = self.activation(norm(conv(x)))
        return x

    @property
    def factors(self) -> Callable[[Tensor, Tensor], Iterable[AffineFactors]] | None:
        """`factors(x, delta)`: ψ = δ, φ = patches of the features; None with normalisation."""
        return self._factors if self._norm_layer is None else None

    def _factors(self, x: Tensor, delta: Tensor) -> Convolved:
        weight, bias = self.pinned
        size = self._kernel_sizes(self.kernel_size)[-1]
        return Convolved(weight, bias, delta, self._features(x), size)

    def config(self) -> dict[str, Any]:
        """The arguments that build the same architecture again."""
        return {
            "channels": self.channels,
            "activation": self.activation,
            "hidden": self.hidden,
            "kernel_size": self.kernel_size,
            "norm_layer": self._norm_layer,
            "pinned": "gamma" if self._pins_gamma else "weight",
        }


@register
class ResidualBottleneck2d(ResidualConv2d):
    """Residual bottleneck: 1 × 1 convolution to fewer channels, k × k, and 1 × 1 back.

    x ↦ x + N₃(K₃ ∗ σ(N₂(K₂ ∗ σ(N₁(K₁ ∗ x))))) with γ and β of N₃ pinned at zero, or K₃ and its
    bias. The closed form without normalisation needs no extra memory, as K₃ sees single pixels.

    Args and errors are those of `ResidualConv2d`, except that `hidden` is a quarter of `channels`
    by default and `kernel_size` is that of the convolution in the middle.

    Source:
        He et al., arXiv 1512.03385, figure 5.

    Example:
        >>> block = ResidualBottleneck2d(8, nn.ReLU())
        >>> [tuple(conv.weight.shape[:2]) for conv in block.convs], block.pinned
        ([(2, 8), (2, 2), (8, 2)], ('norms.2.weight', 'norms.2.bias'))
    """

    _reduction = 4

    @staticmethod
    def _kernel_sizes(kernel_size: int) -> tuple[int, ...]:
        return 1, kernel_size, 1


@register
class IdentityConv2d(nn.Module):
    """Identity convolution x ↦ σ(K ∗ x + b) − s, K the Dirac kernel and b = s, right after a σ.

    The Dirac kernel is 1 from each channel to itself at the centre and 0 elsewhere. The conditions
    on σ and s are those of `IdentityLinear`. The output is computed as σ(x + (K − Dirac) ∗ x + b) −
    s, so that no convolution algorithm (nor TF32) rounds x. With a normalisation there is no such
    layer, as it would be the identity on one batch and on no other: use `ResidualConv2d`.

    Multipliers, with δ = ∂L/∂x, patches φ of x and sums over samples and pixels:

        λ_K = −Σ (δ ⊙ σ′(x + s)) φᵀ,   λ_b = −Σ δ ⊙ σ′(x + s).

    Args:
        channels: Channels of the tensor at the site, its second dimension.
        activation: σ, a module or an elementwise function.
        kernel_size: k, odd.
        shift: s. None (default) takes the smallest one, up to 0.1, as in `IdentityLinear`.
        device, dtype: Of the parameters. A shift is exact in its first dtype, and in lower ones.

    Weights:
        weight (channels, channels, k, k), bias (channels,): both pinned.

    Raises:
        BlockError: `activation` is not the identity on its own range, shifted or not.

    Source:
        Chen, Goodfellow and Shlens, arXiv 1511.05641 (Net2DeeperNet), section 2.5.

    Example:
        >>> block = IdentityConv2d(2, nn.ReLU())
        >>> x = torch.randn(3, 2, 5, 5).relu()
        >>> torch.equal(block(x), x), tuple(block.weight.shape)
        (True, (2, 2, 3, 3))
    """

    pinned = ("weight", "bias")
    extra_repr = shown

    def __init__(
        self,
        channels: int,
        activation: Activation | type[nn.Module],
        kernel_size: int = 3,
        *,
        shift: float | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        check_options(device, dtype)
        channels, size = positive_int("channels", channels, BlockError), _odd(kernel_size)
        self.activation = as_activation(activation)
        self.shift = checked_shift(
            self.activation, shift, "ResidualConv2d(channels, activation, norm_layer=None)"
        )
        dirac = torch.zeros(channels, channels, size, size, device=device, dtype=dtype)
        dirac[:, :, size // 2, size // 2].fill_diagonal_(1)
        self.dirac: Tensor
        self.register_buffer("dirac", dirac, persistent=False)
        self.weight = nn.Parameter(dirac.clone())
        self.bias = nn.Parameter(torch.full((channels,), self.shift, device=device, dtype=dtype))

    def forward(self, x: Tensor) -> Tensor:
        """σ(K ∗ x + b) − s, of the shape (samples, channels, height, width) of x."""
        if not is_scripting():
            _check_images(self, x, self.bias.shape[0])
        padding = self.weight.shape[-1] // 2
        moved = F.conv2d(x, self.weight - self.dirac, self.bias, padding=padding)
        y = self.activation(x + moved)
        return y - self.shift if self.shift else y

    def factors(self, x: Tensor, delta: Tensor) -> Convolved:
        """ψ = δ ⊙ σ′(x + s), φ = the patches of x."""
        _check_images(self, x, len(self.bias))
        psi = vector_jacobian(self.activation, x + self.shift if self.shift else x, delta)
        return Convolved("weight", "bias", psi, x, self.weight.shape[-1], same_units=True)

    def kinks(self, x: Tensor) -> Tensor:
        """Where the layer stands at a kink of σ at its pins, of the shape of x."""
        return at_kink(self.activation, x + self.shift)

    def exact_after(self, site: nn.Module) -> bool:
        """Whether `site` computes σ, judged by its values."""
        return computes_same(self.activation, site)

    def config(self) -> dict[str, Any]:
        """The arguments that build the same architecture again."""
        return {
            "channels": len(self.bias),
            "activation": self.activation,
            "kernel_size": self.weight.shape[-1],
            "shift": self.shift,
        }


def _check_images(block: nn.Module, x: Tensor, channels: int) -> None:
    if isinstance(x, Tensor) and (x.dim() != 4 or x.shape[1] != channels):  # else torch.fx traces
        raise BlockError(
            f"block={type(block).__name__} takes images of shape (samples, {channels}, height, "
            f"width), and the tensor at its site has the shape {tuple(x.shape)}."
        )


def _odd(kernel_size: int) -> int:
    size = positive_int("kernel_size", kernel_size, BlockError)
    if size % 2 == 0:
        raise BlockError(f"kernel_size={size} is even; use an odd one: {size + 1}.")
    return size
