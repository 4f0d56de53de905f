"""The first steps after an insertion with a line search."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from constrained_growth._data import batch_size, batches
from constrained_growth._distributed import add_up, everywhere, in_step, num_processes
from constrained_growth._sharding import is_sharded, reshard, whole
from constrained_growth._sites.model import call, device_of
from constrained_growth.errors import TrainingError
from constrained_growth.training.steps.protocol import Grown, Inserted


class LineSearch:
    """The first steps after an insertion with a line search, so that the loss does not jump.

    A policy for `Grower(after_insertion=…)`. The optimizer makes `steps` steps on the data that
    decided, all of them at once. Where a step s from θ does not lower the loss L on them enough,
    it is shortened to t s with t = β, β², …, until it does (Armijo):

        L(θ + t s) ≤ L(θ) + c t ⟨∇L(θ), s⟩,    only L(θ + t s) ≤ L(θ) where ⟨∇L, s⟩ > 0,

    and taken back if that does not happen within `halvings` times. The memory of the optimizer is
    that of whole steps. Each step costs a gradient pass over the data, and a forward pass for
    each length that is tried; the random state goes on.

    Args:
        steps: How many.
        shrink: β.
        sufficient: c.
        halvings: How often a step is shortened at most.

    Raises:
        TrainingError: An argument is out of range.

    Source:
        Nocedal and Wright, *Numerical Optimization*, 2nd ed. 2006, algorithm 3.1.

    Example:
        >>> from constrained_growth.training import LineSearch
        >>> LineSearch(steps=3)
        LineSearch(steps=3)
    """

    def __init__(
        self, steps: int = 5, *, shrink: float = 0.5, sufficient: float = 1e-4, halvings: int = 20
    ) -> None:
        for name, value in (("steps", steps), ("halvings", halvings)):
            if not isinstance(value, int) or isinstance(value, bool) or value < 1:
                raise TrainingError(f"{name}={value!r} of LineSearch is not a positive number.")
        if not 0 < shrink < 1 or not 0 <= sufficient < 1:
            raise TrainingError(
                f"shrink={shrink!r} of LineSearch must lie between 0 and 1, and "
                f"sufficient={sufficient!r} not below 0 but below 1."
            )
        self.steps, self.halvings = steps, halvings
        self.shrink, self.sufficient = shrink, sufficient

    def __repr__(self) -> str:
        return f"LineSearch(steps={self.steps})"

    def __call__(self, grower: Grown, one: Inserted) -> list[float]:
        """Make the steps.

        Returns:
            The share of each step that was taken.
        """
        return [self._step(grower) for _ in range(self.steps)]

    def _step(self, grower: Grown) -> float:
        optimizer = grower.optimizer
        trained = _trained(optimizer)
        optimizer.zero_grad()
        begin = _mean_loss(grower, backward=True)
        gradients = [None if p.grad is None else p.grad.clone() for p in trained]
        before = [p.detach().clone() for p in trained]
        optimizer.step()
        optimizer.zero_grad()
        with torch.no_grad():
            moved = [p - b for p, b in zip(trained, before, strict=True)]
            slope = min(_inner_product(gradients, moved), 0.0)
            share = 1.0
            for _ in range(self.halvings):
                if _mean_loss(grower) <= begin + self.sufficient * share * slope:
                    return share
                share *= self.shrink
                for p, b, s in zip(trained, before, moved, strict=True):
                    p.copy_(b + share * s)
            for p, b in zip(trained, before, strict=True):
                p.copy_(b)
        return 0.0


def _inner_product(gradients: Sequence[Tensor | None], steps: Sequence[Tensor]) -> float:
    """⟨∇L, s⟩, the same number on all processes: the first one's."""
    products = [(g * s).sum() for g, s in zip(gradients, steps, strict=True) if g is not None]
    total = float(sum(whole(product) for product in products))
    return everywhere(lambda: total, None)[0]


def _mean_loss(grower: Grown, *, backward: bool = False) -> float:
    """Of the data that decide, on all processes, and its gradient if asked for."""
    model = grower.model
    sharded = is_sharded(model)
    parts: list[tuple[int, Any, Any]] = []

    def count() -> int:
        pairs = batches(grower.data, device_of(model))
        parts.extend((batch_size(x, y), x, y) for x, y in pairs)
        return sum(size for size, _, _ in parts)

    total = sum(everywhere(count, None))

    def read() -> float:
        value = 0.0
        counted = in_step(parts, None) if sharded else ((part, True) for part in parts)
        for (size, x, y), counts in counted:
            loss = grower.loss_fn(call(model, x), y) * (size * counts / total)
            if backward:  # a sharded model takes the mean over the processes where we want the sum
                (loss * (num_processes(None) if sharded else 1)).backward()
            value += float(loss.detach())
        return value

    value = sum(everywhere(read, None, collective=sharded))
    reshard(model)
    if backward and not sharded:
        _add_up_gradients(_trained(grower.optimizer))
    return value


def _add_up_gradients(parameters: Sequence[Tensor]) -> None:
    """Over all processes; a parameter has a gradient where it has one on any of them."""
    have = everywhere(lambda: [p.grad is not None for p in parameters], None)
    reached = [p for p, on in zip(parameters, zip(*have, strict=True), strict=True) if any(on)]
    for p in reached:
        if p.grad is None:
            p.grad = torch.zeros_like(p)
    add_up([p.grad for p in reached if p.grad is not None], None)


def _trained(optimizer: torch.optim.Optimizer) -> list[Tensor]:
    return [p for group in optimizer.param_groups for p in group["params"]]
