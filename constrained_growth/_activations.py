"""Properties of an activation, found by calling it: σ(0), σ′, the shift of an identity layer."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from constrained_growth._arguments import number
from constrained_growth._sites.snapshot import without_hooks
from constrained_growth.errors import BlockError

Activation = Callable[[Tensor], Tensor]

# A shifted identity layer is linear until its parameters have moved by about the shift, and the
# multipliers of a linear layer are redundant with those of the next layer. A tenth of the unit
# scale of an activation keeps it near its bend.
_MAX_AUTOMATIC_SHIFT = 0.1
_TOLERANCE = 1e-12
_FAR = 1e4
_STEP = 1e-7  # to the left and to the right of a kink


class TanhLU(nn.Module):
    """σ(x) = x for x ≥ ε, and ε(tanh((x − ε)/ε) + 1) below: smooth, with range (0, ∞).

    σ(x + ε) = x + ε for every x in its range, so a *shifted* identity layer after it is exact.

    Args:
        eps: ε, where the straight part begins. 0.01 in the source.

    Source:
        Herberg et al., arXiv 2311.15995, the activation TanhLU_shifted of its experiments.

    Example:
        >>> TanhLU()(torch.tensor([-1.0, 0.01, 2.0]))
        tensor([0.0000, 0.0100, 2.0000])
    """

    def __init__(self, eps: float = 0.01) -> None:
        super().__init__()
        self.eps = number("eps", eps, BlockError, "(0, inf)")

    def forward(self, x: Tensor) -> Tensor:
        """σ(x), elementwise."""
        below = self.eps * (torch.tanh((x.clamp(max=self.eps) - self.eps) / self.eps) + 1)
        return torch.where(x >= self.eps, x, below)

    def extra_repr(self) -> str:
        """The arguments shown by `repr`."""
        return f"eps={self.eps}"


def as_activation(activation: Any) -> Activation:
    """A module (copied), module class or elementwise function as a callable on tensors."""
    is_class = isinstance(activation, type) and issubclass(activation, nn.Module)
    if isinstance(activation, nn.Module):
        activation = without_hooks(activation)
    if not callable(activation):
        raise BlockError(
            f"activation={activation!r} cannot be called; give nn.ReLU() or torch.tanh, say."
        )
    probe = torch.linspace(-2, 2, 8, dtype=torch.float64, device="cpu").view(2, 4)
    other = probe.clone()
    other[0, 0] = 3.0  # which only the first number of the result may show
    try:
        function: Any = activation() if is_class else activation
        value, changed = in_double(function)(probe), in_double(function)(other)
        fits = isinstance(value, Tensor) and value.shape == probe.shape
        fits = fits and torch.equal(value.flatten()[1:], changed.flatten()[1:])
    except Exception as error:
        raise BlockError(
            f"activation={activation!r} fails on a float64 tensor of shape (2, 4): {error}"
        ) from error
    if not fits:
        raise BlockError(
            f"activation={activation!r} is not elementwise; give nn.ReLU() or torch.tanh, say."
        )
    return cast(Activation, function)


def computes_same(activation: Activation, other: object) -> bool:
    """Whether another module or function is this activation, by its values on a grid."""
    if isinstance(other, nn.Module) and any(True for _ in other.parameters()):
        return False  # as the parameters may change
    with torch.no_grad(), warnings.catch_warnings(action="ignore"):
        try:
            values = in_double(as_activation(other))(_grid())
        except Exception:  # Dropout2d takes no vectors, and passes for elementwise by chance
            return False
        return torch.equal(in_double(activation)(_grid()), values)


def in_double(activation: Any) -> Activation:
    """The activation on float64, its own parameters too, and never in place.

    What it is tried on is on the CPU, whatever device is the default: a block may be built on
    the meta device.
    """
    is_module = isinstance(activation, nn.Module)
    function = copy.deepcopy(activation).double() if is_module else activation
    return lambda x: function(x.clone())


def derivative(activation: Activation, x: Tensor) -> Tensor:
    """σ′(x) elementwise, by autograd and so with its convention at kinks."""
    return vector_jacobian(activation, x, torch.ones_like(x))


def _is_relu(activation: Activation) -> bool:
    return isinstance(activation, nn.ReLU) or activation in (torch.relu, F.relu)


def at_kink(activation: Activation, x: Tensor) -> Tensor:
    """Where σ′ jumps at x, elementwise: by its values a little to the left and to the right."""
    if _is_relu(activation):
        return (x > -_STEP) & (x <= _STEP)
    point = x.detach().double().cpu()
    step = _STEP * point.abs().clamp(min=1.0)
    left, right = (derivative(in_double(activation), point + s) for s in (-step, step))
    return ((right - left).abs() > 0.01).to(x.device)  # a smooth σ bends by 1e-7 times σ″


def value_at_zero(activation: Activation) -> float:
    """σ(0)."""
    with torch.no_grad():
        return in_double(activation)(_zero()).item()


def vector_jacobian(activation: Activation, x: Tensor, cotangent: Tensor) -> Tensor:
    """The elementwise product of a cotangent and σ′(x), by autograd; all of one shape."""
    if _is_relu(activation):
        # autograd's own kernel for ReLU: one pass over the data instead of three
        return torch.ops.aten.threshold_backward.default(cotangent, x, 0)
    with torch.enable_grad():
        leaf = x.detach().requires_grad_()
        (result,) = torch.autograd.grad(activation(leaf.view_as(leaf).clone()), leaf, cotangent)
    return result


def checked_slope(activation: Activation, block: str) -> float:
    """σ′(0); raises a BlockError if it is 0, or σ(0) is not."""
    value = value_at_zero(activation)
    slope = derivative(in_double(activation), _zero()).item()
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


def checked_shift(
    activation: Activation,
    shift: float | None,
    alternative: str = "ResidualMLP(width, hidden, activation)",
) -> float:
    """The given shift of an identity layer, or the smallest; a BlockError if it will not do."""
    given = None if shift is None else number("shift", shift, BlockError, "(-inf, inf)")
    found = identity_shift(activation) if given is None else given
    error = identity_error(activation, found or 0.0)
    if found is None or not error <= _TOLERANCE:  # nor may it be NaN
        stated = "no shift s" if found is None else f"shift={found:g} does not"
        reason = (
            f"({stated} gives σ(x + s) = x + s on the range of σ; at s = {found or 0.0:g} it is "
            f"off by {error:.2g})"
        )
    elif shift is None and found > _MAX_AUTOMATIC_SHIFT:
        reason = (
            f"(only the shift {found:.4g} would do, and with it the layer is linear on its whole "
            f"input; pass shift={found!r} if you want that)"
        )
    else:
        return found
    raise BlockError(
        f"activation={activation!r} cannot make an identity layer {reason}. Use "
        f"{alternative}, which is the identity for every activation."
    )


def identity_error(activation: Activation, shift: float) -> float:
    """Largest |σ(x + s) − (x + s)| over the range of σ, relative to max(1, |x|), on a grid."""
    sigma, grid = in_double(activation), _grid()
    with torch.no_grad():
        x = sigma(torch.cat([grid, _FAR * grid]))
        return ((sigma(x + shift) - (x + shift)).abs() / x.abs().clamp(min=1)).max().item()


def identity_shift(activation: Activation) -> float | None:
    """The smallest s ≥ 0 with σ(x + s) = x + s for every x in the range of σ, if there is one.

    Found by calling σ on a grid in float64, never by its name: 0 for idempotent functions such
    as ReLU or Hardtanh, ε for `TanhLU(ε)`, 1 for ELU, None for tanh or LeakyReLU.
    """
    if identity_error(activation, 0.0) <= _TOLERANCE:
        return 0.0
    sigma, grid = in_double(activation), _grid()
    straight = _is_straight(sigma, grid)
    if not bool(straight[-1]) or bool(straight.all()):
        return None
    last_bent = int(torch.nonzero(~straight).max())
    low, high = grid[last_bent : last_bent + 2]
    for _ in range(100):  # bisection for where σ becomes straight
        middle = (low + high) / 2
        low, high = (low, middle) if _is_straight(sigma, middle.view(1)) else (middle, high)
    with torch.no_grad():
        shift = _rounded_up(high.item()) - sigma(grid).min().item()
    return shift if shift > 0 and identity_error(activation, shift) <= _TOLERANCE else None


def _zero() -> Tensor:
    return torch.zeros(1, dtype=torch.float64, device="cpu")


def _grid() -> Tensor:
    """Points in [−64, 64], dense near 0 where activations bend."""
    near = torch.logspace(-8, 0, 2001, dtype=torch.float64, device="cpu")
    far = torch.linspace(1, 64, 4001, dtype=torch.float64, device="cpu")
    positive = torch.cat([near, far])
    return torch.cat([-positive.flip(0), positive.new_zeros(1), positive])


def _is_straight(sigma: Activation, x: Tensor) -> Tensor:
    """Where σ(x) = x and σ′(x) = 1, to the last bits."""
    slope = derivative(sigma, x)
    with torch.no_grad():
        value = sigma(x)
    eps = torch.finfo(x.dtype).eps
    return ((value - x).abs() <= 2 * eps * x.abs()) & ((slope - 1).abs() <= 2 * eps)


def _rounded_up(value: float) -> float:
    """The shortest decimal just above `value`, as bisection stops up to √eps too early."""
    for rounded in (0.0, *(float(f"{value:.{digits}g}") for digits in range(1, 12))):
        if 0 <= rounded - value <= 1e-7 * max(1.0, abs(value)):
            return rounded
    return value
