"""Mean metrics of a model over a data set."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._data import batch_size, batches
from constrained_growth._distributed import everywhere, in_step
from constrained_growth._sharding import is_sharded
from constrained_growth._sites.model import call, device_of
from constrained_growth._sites.untouched import untouched
from constrained_growth.errors import DataError


@torch.no_grad()
def evaluate(
    model: nn.Module,
    metrics: Mapping[str, Callable[[Any, Any], Tensor | float]],
    data: Iterable[Any],
) -> dict[str, float]:
    """Means over all samples of all processes, in eval mode.

    Modes and random state are restored.

    Args:
        model: The model to measure.
        metrics: Name → `metric(output, target)`, a mean over the samples of a batch.
        data: `(input, target)` batches.

    Returns:
        Name → mean.

    Raises:
        DataError: There is no batch.
    """

    def read() -> tuple[dict[str, float], int]:
        sums, samples = dict.fromkeys(metrics, 0.0), 0
        for input, target, size in sized_batches(model, data):
            output = call(model, input)
            samples += size
            for name, metric in metrics.items() if size else ():
                sums[name] += size * float(metric(output, target))
        return sums, samples

    with untouched(model, data):
        model.eval()
        found = everywhere(read, None, collective=is_sharded(model))
    samples = sum(number for _, number in found)
    if not samples:
        raise DataError("validation is empty; give at least one (input, target) batch.")
    return {name: sum(sums[name] for sums, _ in found) / samples for name in metrics}


def sized_batches(model: nn.Module, data: Iterable[Any]) -> Iterator[tuple[Any, Any, int]]:
    """`(input, target, number of samples)` on the model's device.

    A sharded model has to run equally often on every process: one that has no batches left gets
    its last one again, with 0 samples.
    """
    pairs = batches(data, device_of(model))
    counted = in_step(pairs, None) if is_sharded(model) else ((pair, True) for pair in pairs)
    for (input, target), counts in counted:
        yield input, target, batch_size(input, target) * counts
