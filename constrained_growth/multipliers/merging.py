"""Small batches run through the model as one, where it treats every sample by itself."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from constrained_growth.models.observation import batch_size, call

Batch = tuple[Any, Any]


def in_groups(pairs: Iterable[Batch], at_most: int) -> Iterator[list[Batch]]:
    """Batches that follow each other and fit together, so many of them at most.

    They fit together when their inputs are tensors, in the same structure, of the same kinds and
    shapes but for the first dimension, which counts the samples in all of them.

    Args:
        pairs: `(input, target)` batches.
        at_most: How many in a group.

    Example:
        >>> x, y = torch.zeros(2, 3), torch.zeros(2, 4)
        >>> [len(group) for group in in_groups([(x, 0), (x, 0), (x, 0), (y, 0)], 2)]
        [2, 1, 1]
    """
    group: list[Batch] = []
    before: object = None
    for input, target in pairs:
        layout = _layout(input, target)
        if group and (layout is None or layout != before):
            yield group
            group = []
        group.append((input, target))
        if len(group) == at_most:
            yield group
            group = []
        before = layout
    if group:
        yield group


def joined(inputs: list[Any]) -> Any:
    """The inputs of a group as one.

    Example:
        >>> joined([{"x": torch.ones(1)}, {"x": torch.zeros(2)}])
        {'x': tensor([1., 0., 0.])}
    """
    if len(inputs) == 1:
        return inputs[0]
    flat = [tree_flatten(input)[0] for input in inputs]
    structure = tree_flatten(inputs[0])[1]
    return tree_unflatten([torch.cat(parts) for parts in zip(*flat, strict=True)], structure)


def treats_samples_alone(model: nn.Module, input: object, target: object, output: object) -> bool:
    """Whether some samples from the middle of a batch give what they gave among the others.

    They do not where samples are mixed (batch normalisation in train mode), numbers are drawn
    (dropout), or the first dimension is something that the model goes along, as time in a
    recurrent network: the middle has something before it and something after it; or where the
    model fails for another number of samples. Equal means to
    the square root of the precision, or 1e-3; products of another size are rounded otherwise.

    Args:
        model: Run once without gradients, the random state left as it was.
        input: Of a batch.
        target: Of this batch.
        output: What the model gave for it.
    """
    size = batch_size(input, target)
    if _layout(input, target) is None or size < 4:
        return False
    if not isinstance(output, Tensor) or output.dim() == 0 or len(output) != size:
        return False
    some = slice(size // 4, size // 2)
    leaves, structure = tree_flatten(input)
    try:
        with torch.no_grad(), torch.random.fork_rng(_cuda_devices(leaves)):
            again = call(model, tree_unflatten([leaf[some] for leaf in leaves], structure))
    except Exception:  # a model may well refuse what is no batch of its user's
        return False
    before = output.detach()[some]
    if not isinstance(again, Tensor) or again.shape != before.shape:
        return False
    is_float = before.is_floating_point()
    tolerance = min(torch.finfo(before.dtype).eps ** 0.5, 1e-3) if is_float else 0.0
    return torch.allclose(again, before, rtol=tolerance, atol=tolerance * float(before.abs().max()))


def _layout(input: object, target: object) -> object:
    """What inputs have to have in common, or None for those that stay alone."""
    leaves, structure = tree_flatten(input)
    size = batch_size(input, target)
    if not all(isinstance(x, Tensor) and x.dim() > 0 and len(x) == size for x in leaves):
        return None
    return structure, [(x.shape[1:], x.dtype, x.device, x.layout) for x in leaves]


def _cuda_devices(leaves: list[Tensor]) -> list[torch.device]:
    return list({leaf.device for leaf in leaves if leaf.device.type == "cuda"})
