"""Layers that start as the identity, with some of their parameters pinned.

A block is an `nn.Module` that maps a tensor to one of the same shape and has an attribute

    pinned: tuple[str, ...]

with the names of the parameters that are pinned at their current values, where the block is the
identity. The virtual parameters v are the deviations from these values, and

    λ = −∇_v L(θ, 0),   L the mean loss over the samples.

Nothing else is required: λ then comes from differentiating the block alone. A block may also have

    factors(x, delta)     its multipliers in closed form, an iterable of `AffineFactors` for all
                          pinned parameters; see `HasFactors`
    kinks(x)              where its activation has a kink at the pins, a mask of the shape of x
    exact_after(module)   True if the block is the identity on everything that `module` can
                          return; otherwise this is checked on the data
    takes_context         true if the block is called as block(x, *args[1:], **kwargs), with all
                          arguments of the module at its site (masks, position embeddings)
    standalone()          the module to insert instead of the block where its site is an element
                          of an `nn.ModuleList` or `nn.Sequential`; it holds the pinned parameters
    config()              the arguments that build the same architecture again; a record holds
                          them, and builds the block where its class is registered: `register`

`constrained_growth.testing.check_block` checks a block of your own.
"""

from constrained_growth._activations import TanhLU
from constrained_growth.blocks.convolution import (
    IdentityConv2d,
    ResidualBottleneck2d,
    ResidualConv2d,
)
from constrained_growth.blocks.copied import CopiedBlock
from constrained_growth.blocks.linear import IdentityLinear, ResidualLinear, ResidualMLP
from constrained_growth.blocks.protocol import (
    AffineFactors,
    HasFactors,
    has_factors,
    pinned_parameters,
    register,
)
from constrained_growth.blocks.transformer import GatedMLP, TransformerBlock

__all__ = [
    "AffineFactors",
    "CopiedBlock",
    "GatedMLP",
    "HasFactors",
    "IdentityConv2d",
    "IdentityLinear",
    "ResidualBottleneck2d",
    "ResidualConv2d",
    "ResidualLinear",
    "ResidualMLP",
    "TanhLU",
    "TransformerBlock",
    "has_factors",
    "pinned_parameters",
    "register",
]
