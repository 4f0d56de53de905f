"""Which parameters of a residual block make it the identity where they are zero."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from constrained_growth._sites.untouched import differentiable
from constrained_growth.blocks.branches import ends_of
from constrained_growth.blocks.pins import change
from constrained_growth.errors import BlockError


@dataclass(frozen=True)
class Zeros:
    """What makes a block the identity.

    Attributes:
        names: The parameters that have to be zero, by their names in the module.
        exact: Whether the block is then the identity for every x, not only for x ≥ 0, say.
    """

    names: tuple[str, ...]
    exact: bool


@dataclass(frozen=True)
class _Call:
    """One call of a block: the block, x, the further arguments."""

    block: Callable[..., Tensor]
    x: Tensor
    args: tuple[Any, ...]
    kwargs: Mapping[str, Any]

    def output(self) -> Tensor:
        return self.block(self.x.clone(), *self.args, **self.kwargs)

    def is_identity(self) -> bool:
        return float(change(self.x.detach(), self.output().detach())) <= 1


def zeros_of(
    block: Callable[..., Tensor],
    module: nn.Module,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any] | None,
) -> Zeros:
    """The parameters at the ends of the branches of a residual block, tried out.

    Args:
        block: Calls `module` and returns its first tensor.
        module: All its parameters can be differentiated; its values and modes are put back.
        args: One call, `block(*args, **kwargs)`, first x. None tries tensors of the usual shapes.
        kwargs: Its keyword arguments.

    Raises:
        BlockError: As `CopiedBlock` says.
    """
    before = {name: parameter.detach().clone() for name, parameter in module.named_parameters()}
    modes = [(submodule, submodule.training) for submodule in module.modules()]
    module.eval()
    try:
        with differentiable(), torch.random.fork_rng(devices=[]):
            return _found(block, module, args, kwargs or {}, before)
    finally:
        for submodule, training in modes:
            submodule.training = training
        with torch.no_grad():
            for name, value in before.items():
                module.get_parameter(name).copy_(value)


def _found(
    block: Callable[..., Tensor],
    module: nn.Module,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any],
    before: Mapping[str, Tensor],
) -> Zeros:
    call = _worked(block, module, args, kwargs)
    ends = ends_of(call.x, call.output())
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    branches = [tuple(names[id(p)] for p in branch) for branch in ends.branches]
    kind = f"module={type(module).__name__}"
    if not branches:
        on_trunk = tuple(names[id(p)] for p in ends.on_trunk)
        reason = (
            f"its parameters {on_trunk} act on all that leaves it, as in a post-norm block, which "
            "normalises the sum"
            if on_trunk
            else "it has no branch with parameters"
        )
        raise BlockError(
            f"{kind} cannot be the identity by zeros at the ends of its branches: {reason}. "
            f"{_ALTERNATIVE}"
        )
    found = tuple(dict.fromkeys(name for branch in branches for name in branch))
    _fill(module, found, 0.0)
    starts = (call.x.detach(), call.x.detach().abs())  # the latter for blocks that end in a ReLU
    calls = [_Call(block, start, call.args, call.kwargs) for start in starts]
    call = next((call for call in calls if call.is_identity()), None)
    if call is None:
        raise BlockError(f"{kind} is not the identity where {found} are zero. {_ALTERNATIVE}")
    y = call.output()
    for branch in branches:
        if not _is_alive(y, [module.get_parameter(name) for name in branch]):
            raise BlockError(
                f"{kind}: the multipliers of {branch} vanish identically, as what they are "
                "multiplied with is zero too; give that other factor a non-zero value."
            )
    needed = tuple(name for name in found if _is_needed(module, name, before[name], call))
    return Zeros(needed, ends.exact)


def _worked(
    block: Callable[..., Tensor],
    module: nn.Module,
    args: Sequence[Any] | None,
    kwargs: Mapping[str, Any],
) -> _Call:
    """A call that keeps the shape of its x: the one given, or the first that works."""
    problem = "it has no parameters"
    for first, *rest in [args] if args is not None else [(x,) for x in _usual(module)]:
        if not isinstance(first, Tensor) or not first.is_floating_point():
            raise BlockError(f"args: the first is {first!r:.80}, not the tensor x of a call.")
        rest, kwargs = tree_map_only(Tensor, Tensor.detach, (tuple(rest), dict(kwargs)))
        call = _Call(block, first.detach().clone().requires_grad_(), rest, kwargs)
        try:
            y = call.output()
        except Exception as error:
            if args is not None:
                raise
            problem = f"{type(error).__name__}: {error}"
            continue
        if y.shape == first.shape and y.requires_grad:
            return call
        problem = f"it turns the shape {tuple(first.shape)} into {tuple(y.shape)}"
    raise BlockError(
        f"module={type(module).__name__} does not keep the shape of what it is called with, or "
        f"needs more than one tensor ({problem}). A block that changes the shape cannot be "
        "repeated; for another one give the call, args=(x, …) and kwargs={…}, or the names of "
        "its output projections, pinned=(…)."
    )


def _usual(module: nn.Module) -> Iterator[Tensor]:
    """Sequences, images and plain vectors of the widths that the parameters have."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    for width in dict.fromkeys(size for p in parameters for size in p.shape):
        for shape in ((2, 4, width), (2, width, 8, 8), (2, width), (2, width, 8)):
            yield _drawn(torch.Size(shape), parameters[0])


def _is_alive(y: Tensor, parameters: Sequence[Tensor]) -> bool:
    """Whether y moves with some of the parameters."""
    cotangent = _drawn(y.shape, y)
    grads = torch.autograd.grad(y, parameters, cotangent, retain_graph=True, allow_unused=True)
    return any(grad is not None and bool(grad.any()) for grad in grads)


def _is_needed(module: nn.Module, name: str, before: Tensor, call: _Call) -> bool:
    """Whether the block is the identity only with this parameter at zero; else it is put back."""
    parameter = module.get_parameter(name)
    with torch.no_grad():
        parameter.copy_(_drawn(parameter.shape, parameter))
        needed = not call.is_identity()
        parameter.copy_(torch.zeros_like(before) if needed else before)
    return needed


def _fill(module: nn.Module, names: Sequence[str], value: float) -> None:
    with torch.no_grad():
        for name in names:
            module.get_parameter(name).fill_(value)


def _drawn(shape: torch.Size, like: Tensor) -> Tensor:
    """The same normal numbers each time, whatever the random state."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


_ALTERNATIVE = (
    "Use ResidualMLP(width, hidden, activation), which is the identity anywhere, or name the "
    "parameters to pin: pinned=(…)."
)
