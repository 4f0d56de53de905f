"""How many multiply-adds a layer would add, counted and not guessed."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.func import functional_call
from torch.utils.flop_counter import FlopCounterMode

from constrained_growth._data import batch_size, batches
from constrained_growth._distributed import everywhere
from constrained_growth._sites.context import takes_context
from constrained_growth._sites.model import call, device_of
from constrained_growth._sites.untouched import untouched
from constrained_growth.curvature import stand
from constrained_growth.errors import DataError
from constrained_growth.problem import GrowthProblem
from constrained_growth.solution import Planned


def multiply_adds(problem: GrowthProblem, candidates: Mapping[str, Planned]) -> dict[str, float]:
    """Multiply-adds per sample that each candidate would add to a forward pass.

    Each block is run once on what arrives at its site with the first batch, and PyTorch's own
    counter watches: it counts matrix products, convolutions and attention, and takes elementwise
    operations for free. At a module that runs several times the uses are added up.

    Args:
        problem: The problem, left as it is.
        candidates: From `solution.candidates`.

    Returns:
        Candidate → multiply-adds per sample.

    Raises:
        DataError: No process has data.
    """

    def count() -> dict[str, float] | None:
        with untouched(problem.model, problem.data), torch.no_grad():
            first = next(batches(problem.data, device_of(problem.model)), None)
            if first is None:
                return None
            totals: dict[str, float] = defaultdict(float)
            with ExitStack() as stack:
                for name, planned in candidates.items():
                    site = problem.model.get_submodule(planned.after)
                    watch = partial(_counted, totals, name, planned.block)
                    takes = takes_context(planned.block)
                    handle = stand(site, watch, takes_context=takes, output=planned.output)
                    stack.callback(handle.remove)
                call(problem.model, first[0])
        return {name: totals[name] / batch_size(*first) for name in candidates}

    found = [counts for counts in everywhere(count, problem.group) if counts is not None]
    if not found:
        raise DataError("data yields no batches; give at least one (input, target) pair.")
    return found[0]


def _counted(
    totals: dict[str, float], name: str, block: nn.Module, x: Tensor, *args: Any, **kwargs: Any
) -> Tensor:
    """Count what a block does to x, and give x back."""
    buffers = {key: buffer.clone() for key, buffer in block.named_buffers()}
    with FlopCounterMode(display=False) as counter:
        functional_call(block, buffers, (x, *args), kwargs)
    totals[name] += counter.get_total_flops() / 2  # an operation is a multiplication or an addition
    return x
