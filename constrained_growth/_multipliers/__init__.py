"""λ of all candidates: sums over samples of products of what is at a site and its cotangent."""

from constrained_growth._multipliers.one_pass import Measurement, MultiplierPass, measure

__all__ = [
    "Measurement",
    "MultiplierPass",
    "measure",
]
