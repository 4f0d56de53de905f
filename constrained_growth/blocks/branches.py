"""Where the branches of a residual block end, read off the graph that autograd keeps of its output.

A residual block is a trunk that carries x to the output, and branches that are added to it. It is
the identity once the last operation with parameters in every branch gives zero.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

from torch import Tensor


@dataclass(frozen=True)
class Ends:
    """How the branches of a block end.

    Attributes:
        branches: For each branch the parameters that make it vanish where they are zero.
        on_trunk: Parameters that act on the trunk itself, as a normalisation after the sum does:
            with them the block cannot be the identity. Then `branches` is empty.
        exact: Whether the trunk is sums and rearrangements only, and so the identity for every x.
    """

    branches: tuple[tuple[Tensor, ...], ...]
    on_trunk: tuple[Tensor, ...]
    exact: bool


def ends_of(x: Tensor, y: Tensor) -> Ends:
    """How the branches end that make y of x.

    Args:
        x: A leaf that requires gradients.
        y: Computed from x, shape of x, with all parameters requiring gradients.
    """
    graph = _Graph(x, y)
    trunk = graph.trunk(y.grad_fn)
    if not trunk:
        return Ends((), tuple(_unique(graph.last_parameters(y.grad_fn))), False)
    branches = []
    for node in reversed(trunk):
        on_the_way = [child for child in graph.inputs(node) if child not in trunk]
        found = [graph.last_parameters(child) for child in on_the_way]
        branches += [tuple(_unique(parameters)) for parameters in [*found, graph.direct(node)]]
    exact = all(_kind(node) in _KEEPING for node in trunk)
    return Ends(tuple(branch for branch in branches if branch), (), exact)


class _Graph:
    """What leads from x to y: the nodes that depend on x, and those that can carry it on."""

    def __init__(self, x: Tensor, y: Tensor) -> None:
        self._reached: set[Any] = set()
        self._carrying: set[Any] = set()
        for node in _inputs_first(y.grad_fn):
            is_x = getattr(node, "variable", None) is x
            if is_x or any(child in self._reached for child in _children(node)):
                self._reached.add(node)
                if is_x or self._carries(node):
                    self._carrying.add(node)

    def trunk(self, root: Any) -> list[Any]:
        """The nodes on the ways from the output to x that meet no parameters."""
        found: dict[Any, None] = {}
        waiting = [root] if root in self._carrying else []
        while waiting:
            node = waiting.pop()
            found[node] = None
            waiting += [child for child in self.inputs(node) if child in self._carrying]
        return list(found)

    def inputs(self, node: Any) -> list[Any]:
        """The inputs of an operation that depend on x."""
        return [child for child in _children(node) if child in self._reached]

    def direct(self, node: Any) -> list[Tensor]:
        """The parameters that an operation takes as they are, at most rearranged."""
        bare = (_bare(child) for child in _children(node) if child not in self._reached)
        return [variable for variable in bare if variable is not None]

    def last_parameters(self, node: Any) -> list[Tensor]:
        """The parameters of the last operations that have some, on all ways back from a node."""
        found: list[Tensor] = []
        seen, waiting = set(), [node]
        while waiting:
            node = waiting.pop()
            if node in seen:
                continue
            seen.add(node)
            here = self.direct(node)
            found += here
            if not here or _kind(node) in _ADDING:  # W φ + b as a sum: W is further back
                waiting += self.inputs(node)
        return found

    def _carries(self, node: Any) -> bool:
        inputs = self.inputs(node)
        if _kind(node) in _ADDING:
            return any(child in self._carrying for child in inputs)
        return len(inputs) == 1 and inputs[0] in self._carrying and not self.direct(node)


_ADDING = frozenset({"Add"})
_REARRANGING = frozenset(
    {"T", "Transpose", "Permute", "View", "UnsafeView", "ReshapeAlias", "Expand", "Squeeze"}
    | {"Unsqueeze", "Alias", "Clone", "ToCopy", "AsStrided"}
)
_KEEPING = _ADDING | _REARRANGING | {"torch::autograd::AccumulateGrad"}


def _kind(node: Any) -> str:
    """The operation of a node: "Add" for AddBackward0."""
    return node.name().partition("Backward")[0]


def _children(node: Any) -> list[Any]:
    return [child for child, _ in node.next_functions if child is not None]


def _bare(node: Any) -> Tensor | None:
    """The tensor that a node hands on as it is or rearranged, or None."""
    while _kind(node) in _REARRANGING and len(_children(node)) == 1:
        (node,) = _children(node)
    return getattr(node, "variable", None)


def _inputs_first(root: Any) -> Iterator[Any]:
    """All nodes of a graph, each after its inputs."""
    done: set[Any] = set()
    waiting = [(root, False)]
    while waiting:
        node, inputs_done = waiting.pop()
        if node in done:
            continue
        if inputs_done:
            done.add(node)
            yield node
        else:
            waiting.append((node, True))
            waiting += [(child, False) for child in _children(node)]


def _unique(tensors: list[Tensor]) -> list[Tensor]:
    return list({id(tensor): tensor for tensor in tensors}.values())
