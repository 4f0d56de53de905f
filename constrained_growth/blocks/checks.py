"""What an argument of a block has to be, and the error that says what to use instead."""

from __future__ import annotations

from collections.abc import Hashable

from torch import nn

from constrained_growth._activations import (
    MAX_AUTOMATIC_SHIFT,
    Activation,
    identity_error,
    identity_shift,
    slope_at_zero,
    value_at_zero,
)
from constrained_growth.errors import BlockError


def positive(name: str, value: int) -> int:
    """The value, which has to be a whole number above 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise BlockError(f"{name}={value!r} is not a positive whole number.")
    return value


def activation_kind(activation: Activation) -> Hashable:
    """Equal for activations that compute the same."""
    if not isinstance(activation, nn.Module):
        return activation
    if any(True for _ in activation.parameters()) or any(True for _ in activation.buffers()):
        return id(activation)
    return type(activation), activation.extra_repr()


def checked_shift(
    activation: Activation,
    shift: float | None,
    alternative: str = "ResidualMLP(width, hidden, activation)",
) -> float:
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
        f"{alternative}, which is the identity for every activation."
    )


def checked_slope(activation: Activation, block: str) -> float:
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
