"""Layers that start as the identity, and which of their parameters are pinned.

A block is an `nn.Module` that maps a tensor to one of the same shape, together with an attribute
`pinned`: the names of the parameters that are pinned at the values they have now, where the
block is the identity. The virtual parameters v are the deviations from these values, and

    λ = −∇_v L(θ, 0),   L the mean loss over the samples.

A block may also offer `factors(x, delta)`: the closed form of its multipliers as products of
cotangents and features. Without it λ comes from differentiating the block alone.
"""

from constrained_growth._activations import TanhLU
from constrained_growth.blocks.convolution import (
    IdentityConv2d,
    ResidualBottleneck2d,
    ResidualConv2d,
)
from constrained_growth.blocks.copied import CopiedBlock
from constrained_growth.blocks.factors import (
    AffineFactors,
    HasFactors,
    HasJointFactors,
    has_factors,
    has_joint_factors,
)
from constrained_growth.blocks.identity import IdentityLinear
from constrained_growth.blocks.pins import change, moves, pinned_parameters
from constrained_growth.blocks.residual import ResidualLinear, ResidualMLP
from constrained_growth.blocks.transformer import GatedMLP, TransformerBlock

__all__ = [
    "AffineFactors",
    "CopiedBlock",
    "GatedMLP",
    "HasFactors",
    "HasJointFactors",
    "IdentityConv2d",
    "IdentityLinear",
    "ResidualBottleneck2d",
    "ResidualConv2d",
    "ResidualLinear",
    "ResidualMLP",
    "TanhLU",
    "TransformerBlock",
    "change",
    "has_factors",
    "has_joint_factors",
    "moves",
    "pinned_parameters",
]
