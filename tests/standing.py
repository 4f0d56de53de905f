"""λ from models in which the block really stands: by a hook written by hand, and by `insert`."""

import copy
from collections.abc import Callable, Iterable
from typing import Any

import torch
from helpers import CROSS_ENTROPY, Loss, assert_multipliers, call, choose, first_dimension, solved
from torch import Tensor, nn

import constrained_growth as cg

Place = Callable[[Any, nn.Module, tuple[Any, ...], dict[str, Any]], Any]
"""`(output, block, args, kwargs) -> output`: a block put behind a module by hand."""


def behind(output: Tensor, block: nn.Module, args: Any, kwargs: Any) -> Tensor:
    return block(output)


def hooked_multipliers(
    model: nn.Module,
    data: Iterable[Any],
    one: cg.Candidate,
    place: Place = behind,
    loss_fn: Loss = CROSS_ENTROPY,
    weight: Callable[[Any, Any], Any] | None = None,
) -> dict[str, Tensor]:
    """−∇_v of a copy of the model with the block behind its site, by a hook and autograd."""
    grown, block = copy.deepcopy(model), copy.deepcopy(one.block)
    grown.get_submodule(one.after).register_forward_hook(
        lambda module, args, kwargs, output: place(output, block, args, kwargs), with_kwargs=True
    )
    return gradient(grown, block, data, loss_fn, weight)


def inserted_multipliers(
    model: nn.Module,
    data: Iterable[Any],
    one: cg.Candidate,
    loss_fn: Loss = CROSS_ENTROPY,
    weight: Callable[[Any, Any], Any] | None = None,
) -> dict[str, Tensor]:
    """−∇_v of a copy of the model into which `insert` has put the block, by autograd."""
    grown = copy.deepcopy(model)
    problem = cg.GrowthProblem(grown, loss_fn, data, [one], weight=weight)
    old = set(grown.modules())
    cg.insert(grown, cg.solve(problem, choose(one.name)))
    (new,) = (m for m in grown.modules() if m not in old and type(m) is type(one.block))
    return gradient(grown, new, data, loss_fn, weight)


def gradient(
    grown: nn.Module,
    block: nn.Module,
    data: Iterable[Any],
    loss_fn: Loss,
    weight: Callable[[Any, Any], Any] | None,
) -> dict[str, Tensor]:
    names = list(block.pinned)  # type: ignore[arg-type]
    pins = [block.get_parameter(name).requires_grad_() for name in names]
    weights, losses = [], []
    for input, target in data:
        weights.append(first_dimension(input) if weight is None else float(weight(input, target)))
        if weights[-1]:
            losses.append(weights[-1] * loss_fn(call(grown, input), target))
    grads = torch.autograd.grad(torch.stack(losses).sum() / sum(weights), pins)
    return {name: -grad for name, grad in zip(names, grads, strict=True)}


def assert_served(
    model: nn.Module,
    data: Iterable[Any],
    one: cg.Candidate,
    place: Place = behind,
    loss_fn: Loss = CROSS_ENTROPY,
) -> cg.Solution:
    """λ, not zero, is that of the block put there by hand and of the block inserted."""
    solution = solved(model, data, one, loss_fn=loss_fn)
    expected = hooked_multipliers(model, data, one, place, loss_fn)
    assert max(float(value.abs().max()) for value in expected.values()) > 1e-4
    assert_multipliers(solution, one.name, expected)
    assert_multipliers(solution, one.name, inserted_multipliers(model, data, one, loss_fn))
    return solution
