"""x and δ = ∂L/∂x at one site, batch by batch."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._data import batch_weight, batches
from constrained_growth._sites.context import Context, context_of, detached
from constrained_growth._sites.model import call, checked_loss, device_of
from constrained_growth._sites.outputs import tensor_in, with_tensor
from constrained_growth._sites.untouched import differentiable, untouched
from constrained_growth.problem import GrowthProblem


@dataclass(frozen=True)
class Seen:
    """One use of a site in one batch.

    Attributes:
        x: The tensor there.
        delta: ∂(mean loss of the batch)/∂x, same shape.
        context: What else the module was called with.
        weight: How much the batch counts: how many samples it has, unless the problem says.
        batch: Which batch it is.
    """

    x: Tensor
    delta: Tensor
    context: Context
    weight: float
    batch: int


def gather(problem: GrowthProblem, after: str, output: int | str | None) -> Iterator[Seen]:
    """Run the model over the data and watch one site.

    Args:
        problem: The problem, left as it is.
        after: Qualified name of the module.
        output: Which tensor of its output is the site.
    """
    module = problem.model.get_submodule(after)
    uses: list[tuple[Tensor, Context]] = []

    def hook(site: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], out: Any) -> Any:
        x = tensor_in(out, output)
        x = x if x.requires_grad else x.detach().requires_grad_()
        uses.append((x, detached(context_of(site, args, kwargs))))
        return with_tensor(out, output, x.clone())  # as the model may change it in place

    with untouched(problem.model, problem.data), differentiable():
        handle = module.register_forward_hook(hook, with_kwargs=True)
        try:
            pairs = batches(problem.data, device_of(problem.model))
            for index, (input, target) in enumerate(pairs):
                uses.clear()
                weight = batch_weight(problem.weight, input, target)
                if weight == 0:  # there is no mean loss
                    continue
                loss = checked_loss(problem.loss_fn(call(problem.model, input), target))
                deltas = torch.autograd.grad(loss, [x for x, _ in uses], materialize_grads=True)
                for (x, context), delta in zip(uses, deltas, strict=True):
                    yield Seen(x.detach(), delta, context, weight, index)
        finally:
            handle.remove()
