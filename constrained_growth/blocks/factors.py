"""The closed form of a block's multipliers, as products of cotangents and features."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

from torch import Tensor, nn

from constrained_growth._sites.context import takes_context


@dataclass(frozen=True)
class AffineFactors:
    """A pinned affine map W φ + b seen from both sides: λ_W = −Σ ψ φᵀ and λ_b = −Σ ψ.

    Attributes:
        weight: Name of the pinned weight W, of shape (out, in), or (out, ...) with as many entries.
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

    def factors(self, x: Tensor, delta: Tensor) -> Iterable[AffineFactors]:
        """The factors of all its pinned parameters, at the pins.

        To save memory, those of one affine map may come one after another, each for some of the
        samples.

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
    """Whether a block knows its multipliers in closed form, into which no context enters."""
    return callable(getattr(block, "factors", None)) and not takes_context(block)


def has_joint_factors(block: nn.Module) -> bool:
    """Whether blocks like this one can be worked off together."""
    return callable(getattr(block, "joint_factors", None)) and not takes_context(block)
