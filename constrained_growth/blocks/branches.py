"""Which parameters make a residual block the identity where they are zero.

A residual block is a trunk that carries x to the output, and branches that are added to it. It is
the identity once the last operation with parameters of every branch gives zero. These operations
are read from autograd's graph of one call:

1. The trunk: the operations on the paths from the output back to x that meet no parameters.
2. A branch begins wherever an operation of the trunk has another input that depends on x, and ends
   with the first parameters met on the way back from there.
3. With these parameters at zero the block must be the identity, and no branch may have a
   multiplier that vanishes identically. Parameters not needed for the identity are left out.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_map_only

from constrained_growth._sites.collector import inputs_first, inputs_of
from constrained_growth._sites.untouched import differentiable, full_precision
from constrained_growth.blocks.protocol import change
from constrained_growth.errors import BlockError

_ALTERNATIVE = (
    "Use ResidualMLP(width, hidden, activation), which is the identity anywhere, or name the "
    "parameters to pin: pinned=(…)."
)


def branch_ends(
    block: nn.Module, module: nn.Module, args: Sequence[Any] | None, kwargs: Mapping[str, Any]
) -> tuple[tuple[str, ...], bool]:
    """The names of the parameters that end the branches, and whether exact for every x.

    The latter is False where the block is the identity only for x ≥ 0, say. `block` calls `module`
    and returns its first tensor; parameters and modes of both are changed. For `args` and
    `kwargs` see `CopiedBlock`.
    """
    module.eval()  # Dropout would make no call the identity
    first = next(iter(module.parameters()), torch.empty(0))
    if torch.is_autocast_enabled(first.device.type):  # the graph would be one of casts, and rough
        args, kwargs = tree_map_only(Tensor, lambda t: _in_dtype_of(first, t), (args, dict(kwargs)))
    with differentiable(), full_precision(first.device), torch.random.fork_rng(devices=[]):
        run, x = _example(block, module, args, kwargs)
        try:
            return _branch_ends(module, run, x)
        except RuntimeError as error:
            raise BlockError(
                f"module={type(module).__name__} cannot be differentiated: {error}"
            ) from error


def _branch_ends(
    module: nn.Module, run: Callable[[Tensor], Tensor], x: Tensor
) -> tuple[tuple[str, ...], bool]:
    kind = f"module={type(module).__name__}"
    names = {id(parameter): name for name, parameter in module.named_parameters()}
    graph = _Graph(x, run(x))
    branches = [[names[id(p)] for p in branch] for branch in graph.branches()]
    on_trunk = tuple(names[id(p)] for p in graph.on_trunk())
    exact = graph.is_exact()
    del graph  # and with it the activations of the call
    if not branches:
        reason = "it has no branch with parameters"
        if on_trunk:
            reason = f"its parameters {on_trunk} act on its whole output, as in a post-norm block"
        raise BlockError(
            f"{kind} cannot be the identity by zeros at the ends of its branches: {reason}. "
            f"{_ALTERNATIVE}"
        )
    found = {name: module.get_parameter(name) for branch in branches for name in branch}
    before = {name: parameter.detach().clone() for name, parameter in found.items()}
    with torch.no_grad():
        for parameter in found.values():
            parameter.zero_()
    starts = (x.detach(), x.detach().abs())  # the latter for blocks that end in a ReLU
    for start in starts:
        y = run(start)
        if _is_same(start, y):
            break
    else:
        raise BlockError(
            f"{kind} is not the identity where {tuple(found)} are zero. {_ALTERNATIVE}"
        )
    for branch in branches:
        pins = [found[name] for name in branch]
        grads = torch.autograd.grad(
            y, pins, _normal(y.shape, y), retain_graph=True, allow_unused=True
        )
        if not any(grad is not None and bool(grad.any()) for grad in grads):
            raise BlockError(
                f"{kind}: the multipliers of {tuple(branch)} vanish identically, as the factor "
                "that multiplies them is zero too; give that other factor a non-zero value."
            )
    needed = []
    for name, parameter in found.items():
        with torch.no_grad():
            parameter.copy_(_noise(parameter))
            is_needed = not _is_same(start, run(start))
            parameter.copy_(torch.zeros_like(parameter) if is_needed else before[name])
        if is_needed:
            needed.append(name)
    return tuple(needed), exact


def _in_dtype_of(parameter: Tensor, t: Tensor) -> Tensor:
    return t.to(parameter.dtype) if t.is_floating_point() else t


def _is_same(x: Tensor, y: Tensor) -> bool:
    return float(change(x, y.detach())) <= 1


def _example(
    block: nn.Module, module: nn.Module, args: Sequence[Any] | None, kwargs: Mapping[str, Any]
) -> tuple[Callable[[Tensor], Tensor], Tensor]:
    """A call that keeps the shape of its x, the given one or the first that works; and x."""
    problem = "it has no parameters"
    options = tree_map_only(Tensor, Tensor.detach, dict(kwargs))
    for given in ((x,) for x in _usual_inputs(module)) if args is None else [args]:
        first, *rest = tree_map_only(Tensor, Tensor.detach, tuple(given))
        if not isinstance(first, Tensor) or not first.is_floating_point():
            raise BlockError(f"args: the first is {first!r:.80}, not the tensor x of a call.")

        def run(x: Tensor, rest: Sequence[Any] = rest) -> Tensor:
            return block(x.clone(), *rest, **options)  # which may write to its input

        x = first.clone().requires_grad_()
        try:
            y = run(x)
        except Exception as error:
            problem = f"{type(error).__name__}: {error}"
            continue
        if y.shape == x.shape and y.requires_grad:
            return run, x
        problem = f"it turns the shape {tuple(x.shape)} into {tuple(y.shape)}"
    raise BlockError(
        f"module={type(module).__name__} does not keep the shape of its input, so it cannot be "
        f"repeated, or cannot be called with x alone in first place ({problem}); then give an "
        "example call, args=(x, …) and kwargs={…}, or the names of its output projections, "
        "pinned=(…)."
    )


def _usual_inputs(module: nn.Module) -> Iterator[Tensor]:
    """Sequences, images and vectors of the widths found among the parameters."""
    parameters = [p for p in module.parameters() if p.is_floating_point()]
    for width in dict.fromkeys(size for p in parameters for size in p.shape):
        for shape in ((2, 4, width), (2, width, 8, 8), (2, width), (2, width, 8)):
            yield _normal(torch.Size(shape), parameters[0])


def _normal(shape: torch.Size, like: Tensor) -> Tensor:
    """The same normal numbers each time."""
    generator = torch.Generator().manual_seed(0)
    return torch.randn(shape, generator=generator, dtype=torch.float64).to(like)


def _noise(like: Tensor) -> Tensor:
    """Random numbers of rank one, as many normal ones would take longer than all the rest."""
    if like.dim() < 2:
        return _normal(like.shape, like)
    rows, columns = _normal(like.shape[:1], like), _normal(torch.Size([like[0].numel()]), like)
    return (rows.flip(0)[:, None] * columns).view_as(like)


_SUMS = frozenset({"Add"})
_REARRANGEMENTS = frozenset(
    {"T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand", "Squeeze"}
    | {"Unsqueeze", "Alias", "Clone", "ToCopy", "AsStrided"}
)
_EXACT = _SUMS | _REARRANGEMENTS | {"torch::autograd::AccumulateGrad"}


class _Graph:
    """Autograd's graph from the leaf x to y."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._root = y.grad_fn
        self._dependent: set[Any] = set()  # nodes that depend on x
        self._carriers: set[Any] = set()  # those that can carry it on, without parameters
        for node in inputs_first(self._root):
            is_x = getattr(node, "variable", None) is x
            if is_x or any(child in self._dependent for child in inputs_of(node)):
                self._dependent.add(node)
                if is_x or self._carries(node):
                    self._carriers.add(node)
        self._trunk: dict[Any, None] = {}  # a set in order
        waiting = [self._root] if self._root in self._carriers else []
        while waiting:
            node = waiting.pop()
            self._trunk[node] = None
            waiting += [child for child in self._inputs(node) if child in self._carriers]

    def branches(self) -> list[list[Tensor]]:
        """For each branch the parameters of its last operations; empty without a trunk."""
        branches = []
        for node in reversed(self._trunk):
            starts = [child for child in self._inputs(node) if child not in self._trunk]
            branches += [*map(self._last_parameters, starts), self._parameters(node)]
        return [_unique(branch) for branch in branches if branch]

    def on_trunk(self) -> list[Tensor]:
        """Without a trunk, the parameters in its way, such as those of a norm of the sum."""
        return [] if self._trunk else _unique(self._last_parameters(self._root))

    def is_exact(self) -> bool:
        """Whether the trunk has sums and rearrangements only, so is the identity for every x."""
        return all(_operation(node) in _EXACT for node in self._trunk)

    def _inputs(self, node: Any) -> list[Any]:
        """The inputs of an operation that depend on x."""
        return [child for child in inputs_of(node) if child in self._dependent]

    def _parameters(self, node: Any) -> list[Tensor]:
        """The parameters that an operation takes directly, or rearranged."""
        found = (_leaf(child) for child in inputs_of(node) if child not in self._dependent)
        return [variable for variable in found if variable is not None]

    def _last_parameters(self, node: Any) -> list[Tensor]:
        """The first parameters on every path back from a node."""
        found: list[Tensor] = []
        seen, waiting = set(), [node]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            here = self._parameters(node)
            found += here
            if not here or _operation(node) in _SUMS:  # of W φ + b as a sum, W is further back
                waiting += self._inputs(node)
        return found

    def _carries(self, node: Any) -> bool:
        inputs = self._inputs(node)
        if _operation(node) in _SUMS:
            return any(child in self._carriers for child in inputs)
        return len(inputs) == 1 and inputs[0] in self._carriers and not self._parameters(node)


def _operation(node: Any) -> str:
    """The operation of a node: "Add" for AddBackward0."""
    return node.name().partition("Backward")[0]


def _leaf(node: Any) -> Tensor | None:
    """The leaf that a node returns, at most rearranged or a part of it, or None."""
    parts = {"Select", "Slice", "Index"}  # of an expert, in the parameter of all
    while _operation(node) in _REARRANGEMENTS | parts and len(inputs_of(node)) == 1:
        (node,) = inputs_of(node)
    return getattr(node, "variable", None)


def _unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
