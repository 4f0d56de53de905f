"""λ of all candidates: one forward and one backward pass over the data, two sums per pin."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from constrained_growth._data import Weight, batch_weight, batches
from constrained_growth._distributed import everywhere, in_step
from constrained_growth._multipliers.accumulator import (
    Estimate,
    accumulation_dtype,
)
from constrained_growth._multipliers.in_graph import rounds
from constrained_growth._sharding import Leaves, is_sharded
from constrained_growth._sites.collector import Collector, Use
from constrained_growth._sites.model import device_of
from constrained_growth._sites.site import Site
from constrained_growth.blocks import has_factors
from constrained_growth.solution import Method

if TYPE_CHECKING:
    from torch.distributed import ProcessGroup


@dataclass(frozen=True)
class Measurement:
    """What one pass over the data gives.

    Attributes:
        loss: Mean loss over the samples.
        estimates: Candidate → λ = −∇_v L, its variance and moments.
        gradients: Name → ∇L of the trainable parameters, or None if not asked for.
        num_samples: How many samples were read.
        num_batches: How many batches were read.
    """

    loss: float
    estimates: dict[str, Estimate]
    gradients: dict[str, Tensor] | None
    num_samples: int
    num_batches: int


def measure(
    model: nn.Module,
    loss_fn: Callable[[Any, Any], Tensor],
    data: Iterable[Any],
    sites: Sequence[Site],
    method: Method,
    *,
    gradients: bool,
    moments: bool = False,
    group: ProcessGroup | None = None,
    weight: Weight = None,
) -> Measurement:
    """λ of all candidates, their variances and, if asked for, ∇_θ L, as means over the samples.

    Args:
        model: Run in the mode (train or eval) it is in, with gradients on (`differentiable`).
        loss_fn: `loss_fn(output, target)`, a scalar mean over the samples of the batch.
        data: `(input, target)` pairs.
        sites: From `GrowthProblem`.
        method: The way to λ.
        gradients: Also ∇_θ L, which costs one product more per layer.
        moments: Also the second moments that some norms need.
        group: The processes that have a shard of the data each. They all call this, and get the
            means over all the data; sums and counts are added up, never norms.
        weight: How much a batch counts, as in `GrowthProblem`; those of weight 0 are passed over.

    Raises:
        DataError: No batches, or a batch or loss that cannot be used.
        BlockError: A block is not the identity on a later batch.
        GrowthError: Another process failed.
    """
    running = Pass(model, loss_fn, sites, method, gradients=gradients, moments=moments)
    sharded = is_sharded(model)

    def read() -> None:
        pairs = ((*p, batch_weight(weight, *p)) for p in batches(data, device_of(model)))
        counting = (batch for batch in pairs if batch[2] > 0)  # a mean over nothing is NaN
        with running.watching():
            if sharded:
                for batch, new in in_step(counting, group):
                    running.add(*batch, counts=new)
            else:
                for batch in counting:
                    running.add(*batch)

    everywhere(read, group, collective=sharded)
    running.reduce(group)
    return running.measurement()


class Pass:
    """The sums of a pass over the data, batch by batch; arguments as in `measure`.

    Attributes:
        accumulators: Candidate → its sums.
        reached: The candidates that had a gradient in the graph, be it zero.
    """

    def __init__(
        self,
        model: nn.Module,
        loss_fn: Callable[[Any, Any], Tensor],
        sites: Sequence[Site],
        method: Method,
        *,
        gradients: bool,
        moments: bool = False,
    ) -> None:
        self._model, self._loss_fn, self._sites = model, loss_fn, sites
        self._collector = Collector(sites)
        self._rounds = rounds(sites) if method is Method.IN_GRAPH else []
        self.accumulators = accumulators(sites, moments=moments)
        named = model.named_parameters() if gradients else ()
        self.reached: set[str] = set()
        self._parameters = {name: p for name, p in named if p.requires_grad}
        self._totals = {
            name: torch.zeros_like(p, dtype=accumulation_dtype(p.dtype), requires_grad=False)
            for name, p in self._parameters.items()
        }
        self._leaves = Leaves(model, self._parameters)
        self._with_gradients = gradients
        self._devices = {site.device for site in sites}
        device = device_of(model) or torch.device("cpu")
        self._loss = torch.zeros((), dtype=torch.float64, device=device)
        self._samples, self._batches, self._weight = 0, 0, 0.0
        self._joinable = [all(map(has_factors, site.blocks.values())) for site in sites]
        self._waiting: list[list[Use]] = [[] for _ in sites]
        self._waiting_bytes, self._waiting_for = 0, (0, 0.0)
        self._room = max(2**20, sum(a.nbytes for a in self.accumulators.values()) // 2)
