"""Small batches run through the model as one, where it treats every sample by itself."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils._pytree import tree_flatten, tree_unflatten

from constrained_growth._data import batch_size
from constrained_growth._sites.model import call

Batch = tuple[Any, Any]


def in_groups(pairs: Iterable[Batch], room: int) -> Iterator[list[Batch]]:
    """Batches that follow each other and fit together, as many as there is room for.

    They fit together when their inputs are tensors, in the same structure, of the same kinds and
    shapes but for the first dimension, which counts the samples in all of them.

    Args:
        pairs: `(input, target)` batches.
        room: How many numbers the inputs of a group may hold; one batch may always stand alone.

    Example:
        >>> x, y = torch.zeros(2, 3), torch.zeros(2, 4)
        >>> [len(group) for group in in_groups([(x, 0), (x, 0), (x, 0), (y, 0)], 12)]
        [2, 1, 1]
    """
    group: list[Batch] = []
    before: object = None
    held = 0
    for input, target in pairs:
        layout = _layout(input, target)
        size = room if layout is None else numbers_in(input)
        if group and (layout is None or layout != before or held + size > room):
            yield group
            group, held = [], 0
        group.append((input, target))
        held += size
        if held >= room:
            yield group
            group, held = [], 0
        before = layout
    if group:
        yield group


def numbers_in(input: object) -> int:
    """How many numbers an input of tensors holds.

    Example:
        >>> numbers_in({"x": torch.zeros(2, 3), "mask": torch.zeros(2)})
        8
    """
    return sum(leaf.numel() for leaf in tree_flatten(input)[0])


def in_one_memory(batch: Batch, other: Batch) -> bool:
    """Whether a tensor of one batch lies where one of another does.

    Such data is filled anew for each batch, and no two of them can be had at the same time.
    """
    places = ({leaf.data_ptr() for leaf in _strided(pair)} for pair in (batch, other))
    return not set.isdisjoint(*places)


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


def parts_of(output: Any, sizes: list[int]) -> tuple[Sequence[Any], set[int]]:
    """The output for each batch of a group, and the indices of those that backward has reached.

    The second is filled as backward comes by, which it may do more than once where a loss has
    derivatives in it. The parts may be changed in place.
    """
    if len(sizes) == 1:
        return [output], {0}
    reached: set[int] = set()

    def note(index: int, gradient: Tensor | None) -> None:
        if gradient is not None:
            reached.add(index)

    parts = torch.unsafe_split_with_sizes(output, sizes)
    for index, part in enumerate(parts):
        part.register_hook(functools.partial(note, index))
    return parts, reached


def emptying(some: list[Any], others: Iterable[Any]) -> Iterator[Any]:
    """Those of the list, which forgets them, and then the others."""
    while some:
        yield some.pop(0)
    yield from others


def may_merge(model: nn.Module, first: Batch, others: Sequence[Batch], output: object) -> bool:
    """Whether batches may be run together, for all that is known of the first few.

    Args:
        model: It keeps nothing of what it has seen.
        first: A batch.
        others: That come after it, read already.
        output: What the model gave for the first batch.
    """
    if not others or any(in_one_memory(first, other) for other in others):
        return False
    return treats_samples_alone(model, *first, output)


def treats_samples_alone(model: nn.Module, input: object, target: object, output: object) -> bool:
    """Whether two samples of a batch, and then two others, give what they gave in the whole.

    They do not where samples are mixed (batch normalisation in train mode), numbers are drawn
    (dropout), or the first dimension is something that the model goes along, as time in a
    recurrent network; or where the model fails for another number of samples. One pair at least
    is without the largest of all, by which a model may divide, and so few samples show best what
    depends on means and counts. They stand apart by no half of the batch, nor next to each other,
    as what a model compares may do. Equal means to the square root of the precision, or 1e-3;
    products of another size are rounded otherwise. What mixes samples in some later batch only
    cannot be seen, nor what does so in backward only (a function that divides its gradient by
    the norm of it, samples that are mixed behind a factor that is still 0).

    Args:
        model: Run twice without gradients, the random state left as it was.
        input: Of a batch.
        target: Of this batch.
        output: What the model gave for it.
    """
    size = batch_size(input, target)
    if _layout(input, target) is None or size < 4:
        return False
    if not isinstance(output, Tensor) or output.dim() == 0 or len(output) != size:
        return False
    if not output.is_floating_point():
        return False
    leaves, structure = tree_flatten(input)
    try:
        with torch.no_grad(), torch.random.fork_rng(_cuda_devices(leaves)):
            for some in (slice(0, None, size // 2 + 1), slice(1, None, size // 2 + 1)):
                part = tree_unflatten([leaf[some].clone() for leaf in leaves], structure)
                if not _are_close(call(model, part), output.detach()[some]):
                    return False
    except Exception:  # a model may well refuse what is no batch of its user's
        return False
    return True


def _are_close(found: object, expected: Tensor) -> bool:
    if not isinstance(found, Tensor) or found.shape != expected.shape:
        return False
    tolerance = min(torch.finfo(expected.dtype).eps ** 0.5, 1e-3)
    largest = float(expected.abs().max())
    return torch.allclose(found, expected, rtol=tolerance, atol=tolerance * largest)


def _layout(input: object, target: object) -> object:
    """What inputs have to have in common, or None for those that stay alone."""
    leaves, structure = tree_flatten(input)
    size = batch_size(input, target)
    if not leaves:
        return None
    if not all(isinstance(x, Tensor) and x.dim() > 0 and len(x) == size for x in leaves):
        return None
    return structure, [(x.shape[1:], x.dtype, x.device, x.layout) for x in leaves]


def _strided(pair: Batch) -> list[Tensor]:
    leaves = tree_flatten(pair)[0]
    return [x for x in leaves if isinstance(x, Tensor) and x.layout == torch.strided]


def _cuda_devices(leaves: list[Tensor]) -> list[torch.device]:
    return list({leaf.device for leaf in leaves if leaf.device.type == "cuda"})
