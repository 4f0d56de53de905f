"""The sites that backward is asked for, so that it passes all the others on its way."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from torch import Tensor

from constrained_growth.errors import CandidateError


def anchors_of(loss: Tensor, names: Sequence[str], passed: Sequence[Sequence[Tensor]]) -> set[int]:
    """Sites such that the way of backward to them leads through all the others.

    Args:
        loss: Its graph is kept.
        names: Of the modules whose outputs are the sites, in any order.
        passed: What the model went on with at each site, at each use of its module.

    Returns:
        Places in `names`.

    Raises:
        CandidateError: The loss does not depend on some site, or backward goes through what
            was checkpointed with use_reentrant=True.
    """
    _refuse_reentrant(loss)
    reached: set[int] = set()

    def note(index: int) -> Callable[[Tensor], None]:
        return lambda _: reached.add(index)

    handles = [x.register_hook(note(i)) for i, xs in enumerate(passed) for x in xs]
    anchors: set[int] = set()
    for index, (name, xs) in enumerate(zip(names, passed, strict=True)):
        if index in reached:
            continue
        grads: Sequence[Tensor | None] = (None,)
        if loss.requires_grad:
            grads = torch.autograd.grad(loss, xs, allow_unused=True, retain_graph=True)
        if all(grad is None for grad in grads):
            raise CandidateError(
                f'after="{name}": the loss does not depend on the output of this module, '
                "so no layer there could change it; choose another submodule."
            )
        anchors.add(index)
    for handle in handles:
        handle.remove()
    return anchors


def _refuse_reentrant(loss: Tensor) -> None:
    """Refuse a graph with a part that was checkpointed in the way that takes no `autograd.grad`."""
    nodes, known = [loss.grad_fn], set()
    while nodes:
        node = nodes.pop()
        if node is None or node in known:
            continue
        known.add(node)
        if node.name() == "CheckpointFunctionBackward":
            raise CandidateError(
                "model: a part of it is checkpointed with use_reentrant=True, through which "
                "PyTorch gives no gradients with respect to tensors on the way; use "
                "torch.utils.checkpoint.checkpoint(..., use_reentrant=False)."
            )
        nodes += [following for following, _ in node.next_functions]
