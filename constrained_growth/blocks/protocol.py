"""The pins of a block, its closed form, and whether it is the identity."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor, nn
from torch.func import functional_call

from constrained_growth._sites.context import NO_CONTEXT, Context, arguments, takes_context
from constrained_growth.errors import BlockError, GrowthError


@dataclass(frozen=True)
class AffineFactors:
    """A pinned affine map W φ + b seen from both sides: λ_W = −Σ ψ φᵀ and λ_b = −Σ ψ.

    Attributes:
        weight: Name of the pinned weight W, of shape (out, in), or (out, ...) with as many entries.
        bias: Name of the pinned bias b, of shape (out,), or None.
        cotangent: ψ = ∂L/∂(Wφ + b), shape (samples, ..., out).
        features: φ, shape (samples, ..., in).
        elementwise: Whether the map is γ ⊙ φ + b, as of a normalisation: the weight γ has `out`
            entries, in = out, λ_γ = −Σ ψ ⊙ φ and λ_b = −Σ ψ.
        transposed: Whether the weight has the shape (in, out) instead.
        same_units: Whether the units of φ are those of x, and the units of ψ those of δ, one by
            one, so that a change of the unit of one of them changes both.
    """

    weight: str
    bias: str | None
    cotangent: Tensor
    features: Tensor
    elementwise: bool = False
    transposed: bool = False
    same_units: bool = False


class HasFactors(Protocol):
    """A block that knows its multipliers in closed form."""

    def factors(self, x: Tensor, delta: Tensor) -> Iterable[AffineFactors]:
        """The factors of all pinned parameters, at the pins.

        An affine map may appear several times, each time with some of the samples, to save memory.
        x is the tensor at the site, of shape (samples, ..., width), and delta is ∂L/∂x.
        """
        ...


def has_factors(block: nn.Module) -> bool:
    """Whether a block has a closed form that does not depend on its context."""
    return callable(getattr(block, "factors", None)) and not takes_context(block)


def exact_everywhere(block: nn.Module, site: nn.Module) -> bool:
    """Return True: at its pins the block is the identity on every input."""
    return True


def check_options(device: Any, dtype: Any) -> None:
    """Refuse a device that is not there, or a dtype that has no gradients."""
    try:
        made = torch.empty((), device=device, dtype=dtype)
    except Exception as error:  # of several types, CUDA's own among them
        raise BlockError(f"device={device!r}, dtype={dtype!r}: PyTorch says: {error}") from error
    if not (made.is_floating_point() or made.is_complex()):
        raise BlockError(f"dtype={dtype!r} has no gradients; give a floating-point one.")


def shown(self: Any) -> str:
    """The arguments shown by `repr`."""
    items = self.config().items()
    return ", ".join(f"{name}={v}" for name, v in items if isinstance(v, int | float | str))


Kind = TypeVar("Kind", bound=type[nn.Module])

REGISTERED: dict[str, type[nn.Module]] = {}
"""Name of a class → the class, which a record may build."""


def register(kind: Kind) -> Kind:
    """Let records build blocks of a class of yours, in this process: a decorator.

    The class has a method `config()`, a dict of the arguments that build the same block again:
    plain values, activations of PyTorch, and lists, tuples and dicts of them. Where a record is
    read, its class is known by its name, and is first tried on the meta device.

    Args:
        kind: A class of blocks.

    Returns:
        The same class.

    Raises:
        BlockError: It is no class of modules with a method `config`, or its name is taken.

    Example:
        >>> @register
        ... class Wide(nn.Linear):
        ...     def config(self) -> dict[str, Any]:
        ...         return {"in_features": self.in_features, "out_features": self.out_features}
    """
    is_block = isinstance(kind, type) and issubclass(kind, nn.Module)
    if not is_block or not callable(getattr(kind, "config", None)):
        raise BlockError(f"kind={kind!r} is no class of nn.Modules with a method config().")
    other = REGISTERED.setdefault(kind.__qualname__, kind)
    if other.__module__ != kind.__module__:
        raise BlockError(f"kind={kind!r}: its name is taken by {other!r}; give it another.")
    REGISTERED[kind.__qualname__] = kind  # defined again, as in a notebook
    return kind


def zero_pins(block: nn.Module) -> None:
    """Set the pinned parameters to zero."""
    with torch.no_grad():
        for parameter in pinned_parameters(block).values():
            parameter.zero_()


def move_pins(block: nn.Module) -> None:
    """Move the pinned parameters a little, each time by the same random numbers."""
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for pin in pinned_parameters(block).values():
            pin.add_(torch.randn(pin.shape, generator=generator).to(pin), alpha=0.1)


def pinned_parameters(block: nn.Module) -> dict[str, nn.Parameter]:
    """The pinned parameters of a block, by name.

    Raises:
        BlockError: `block` declares no pins, or names a parameter it does not have.
    """
    names = getattr(block, "pinned", None)
    if not isinstance(block, nn.Module) or not isinstance(names, Sequence) or not names:
        given = type(block).__name__ if isinstance(block, nn.Module) else f"{block!r:.80}"
        raise BlockError(
            f"block={given} does not say which of its parameters are pinned; a block is an "
            "nn.Module with an attribute pinned = ('name of a parameter', ...)."
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


def check_deviations(
    block: nn.Module, values: Mapping[str, Any], where: str, error: type[GrowthError]
) -> None:
    """Refuse what is no finite deviation of pinned parameters of a block, each in its shape."""
    shapes = {name: tuple(p.shape) for name, p in pinned_parameters(block).items()}
    for name, value in values.items():
        got = tuple(value.shape) if isinstance(value, Tensor) else repr(value)[:40]
        if name not in shapes or got != shapes[name]:
            raise error(f'{where}["{name}"]={got} does not fit the pins, of shapes {shapes}.')
        if not bool(torch.isfinite(value).all()):
            raise error(f'{where}["{name}"] holds NaN or Inf.')


def called_with(
    block: nn.Module, values: Mapping[str, Tensor], args: Sequence[Any], kwargs: Mapping[str, Any]
) -> Any:
    """`block(*args, **kwargs)` with other values of some parameters; no buffer is written to."""
    buffers = {name: buffer.clone() for name, buffer in block.named_buffers()}
    return functional_call(block, {**buffers, **values}, tuple(args), dict(kwargs))


def moves(block: nn.Module, x: Tensor, context: Context = NO_CONTEXT) -> Tensor:
    """How much a block changes x at its pins, by `change`; a BlockError if it changes the shape."""
    y = called_with(block, {}, *arguments(block, x.clone(), context))
    if not isinstance(y, Tensor) or y.shape != x.shape:
        got = tuple(y.shape) if isinstance(y, Tensor) else type(y).__name__
        raise BlockError(
            f"block={type(block).__name__} turns the shape {tuple(x.shape)} at its site into "
            f"{got}; the width must match."
        )
    return change(x, y)


def change(x: Tensor, y: Tensor) -> Tensor:
    """Largest difference of an entry over what rounding can explain: at most 1 where y is x.

    Infinite where y is NaN and x is finite; NaN where x is.
    """
    if x.numel() == 0:
        return x.new_zeros(())
    # relative to the largest entry: rounding in a sum x + branch is of the size of its terms
    largest = x.abs().max()
    eps = torch.finfo(x.dtype).eps
    allowed = min(1e3 * eps, eps**0.5) * largest.clamp(min=1.0)  # 1e3 eps of bfloat16 are 8
    moved = (y - x).abs().max() / allowed
    return torch.where(largest.isfinite(), moved.nan_to_num(torch.inf), moved)
