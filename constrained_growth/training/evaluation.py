"""Means over a data set, of whatever is measured."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._data import batch_size, batches
from constrained_growth._distributed import everywhere, in_step
from constrained_growth._sharding import is_sharded, reshard
from constrained_growth._sites.model import call, device_of
from constrained_growth.errors import DataError


@torch.no_grad()
def evaluate(
    model: nn.Module,
    metrics: Mapping[str, Callable[[Any, Any], Tensor | float]],
    data: Iterable[Any],
) -> dict[str, float]:
    """Means over all samples, of all processes, in eval mode; modes are put back.

    Args:
        model: What to measure.
        metrics: Name → `metric(output, target)`, a mean over the samples of a batch.
        data: `(input, target)` batches.

    Returns:
        Name → mean.

    Raises:
        DataError: There is no batch.
    """
    modes = [(module, module.training) for module in model.modules()]
    sharded = is_sharded(model)

    def read() -> tuple[dict[str, float], int]:
        sums, samples = dict.fromkeys(metrics, 0.0), 0
        pairs = batches(data, device_of(model))
        counted = in_step(pairs, None) if sharded else ((pair, True) for pair in pairs)
        for (input, target), counts in counted:
            size, output = batch_size((input,), (target,)) * counts, call(model, input)
            samples += size
            for name, metric in metrics.items() if counts else ():
                sums[name] += size * float(metric(output, target))
        return sums, samples

    try:
        model.eval()
        found = everywhere(read, None, collective=sharded)
    finally:
        reshard(model)
        for module, training in modes:
            module.training = training
    samples = sum(number for _, number in found)
    if not samples:
        raise DataError("validation is empty; give at least one (input, target) batch.")
    return {name: sum(sums[name] for sums, _ in found) / samples for name in metrics}
