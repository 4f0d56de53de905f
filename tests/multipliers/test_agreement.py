"""Who runs a module without having got it from the model passes by the layer that stands there."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    assert_multipliers,
    classified,
    nothing_left_behind,
    refused,
    solved,
)
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

import constrained_growth as cg


def residual() -> cg.Candidate:
    return cg.Candidate("b", cg.blocks.ResidualMLP(4, 3, torch.tanh))


class Net(nn.Module):
    """What `hold` makes of its second layer is kept where the model does not look for modules."""

    def __init__(self, hold: Callable[[nn.Module], Any] = lambda b: None) -> None:
        super().__init__()
        self.a, self.b, self.c = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.held = hold(self.b)

    def forward(self, x: Tensor) -> Tensor:
        h = self.a(x).tanh()
        return self.c(self.b(h) + self.other(h.sin()))

    def other(self, h: Tensor) -> Tensor:
        return h if self.held is None else self.held(h)


class InList(Net):
    def other(self, h: Tensor) -> Tensor:
        for layer in self.held:
            h = layer(h)
        return h


class OnlyInList(InList):
    def forward(self, x: Tensor) -> Tensor:
        return self.c(self.other(self.a(x).tanh()))


KEPT: dict[str, Callable[[], Net]] = {
    "a bound method": lambda: Net(lambda b: b.__call__),
    "a plain list": lambda: InList(lambda b: [b, torch.tanh]),
    "a plain list alone": lambda: OnlyInList(lambda b: [b, torch.tanh]),
    "a function": lambda: Net(lambda b: lambda x: b(x).sin()),
    "the loss": Net,
}


@pytest.mark.parametrize("kind", KEPT)
def test_a_module_that_someone_holds_is_refused(kind: str) -> None:
    model = KEPT[kind]()
    part = model.b

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        more = part(output[:, :1].expand(-1, 4)).sin().mean() if kind == "the loss" else 0.0
        return cross_entropy(output, target) + more

    data, one = classified(8), residual()
    with nothing_left_behind(model), refused(cg.CandidateError, '"b"', "not got it from", "loss"):
        solved(model, data, one, loss_fn=loss_fn)
    assert model.b is part
    solved(model, data, cg.Candidate("a", one.block), loss_fn=loss_fn)


def test_a_part_that_the_loss_gets_from_the_model_has_the_layer() -> None:
    """And one that is held but runs without gradients is the same at the pins."""
    torch.manual_seed(0)
    model, data = Net(), classified(8)

    def loss_of(model: Net, held: nn.Module) -> Callable[..., Tensor]:
        def loss_fn(output: Tensor, target: Tensor) -> Tensor:
            with torch.no_grad():
                scale = held(torch.ones(4)).mean()
            again = model.b(output[:, :1].expand(-1, 4))
            return cross_entropy(output, target) + scale * again.sin().mean()

        return loss_fn

    solution = solved(model, data, residual(), loss_fn=loss_of(model, model.b))
    grown, held = copy.deepcopy(model), model.b
    chosen = cg.Solution(**{**vars(solution), "decision": cg.Decision(("b",))})
    pins = dict(cg.insert(grown, chosen).new_parameters(grown))
    names = {key: pins[f"b.inserted.{key}"] for key in solution.multipliers["b"]}
    loss = loss_of(grown, held)(grown(data[0][0]), data[0][1])
    grads = torch.autograd.grad(loss, list(names.values()))
    expected = {key: -grad for key, grad in zip(names, grads, strict=True)}
    assert_multipliers(solution, "b", expected, 1e-12)


def test_a_module_whose_forward_is_called_directly_too() -> None:
    class Twice(nn.Sequential):
        def forward(self, input: Tensor) -> Tensor:
            x = self[0](input)
            return self[3](self[1](x) + self[1].forward(self[2](x)))

    model, data = Twice(nn.Linear(2, 4), nn.Tanh(), nn.Linear(4, 4), nn.Linear(4, 3)), classified(8)
    one = cg.Candidate("1", residual().block)
    with nothing_left_behind(model), refused(cg.CandidateError, 'after="1"', "module(x)"):
        cg.GrowthProblem(model, CROSS_ENTROPY, data, [one])


class Branch(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.inner, self.outer = nn.Linear(4, 4), nn.Linear(4, 4)

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.inner(x).tanh())


def penalty(model: nn.Module, kind: str) -> Tensor:
    """What losses make of all there is in a model."""
    if kind == "linear maps":
        maps = [module.weight for module in model.modules() if isinstance(module, nn.Linear)]
        return torch.stack([(weight @ weight.mT).trace() for weight in maps]).mean()
    centre = 1.0 if kind == "distances to 1" else 0.0
    return sum((((p - centre) ** 2).sum() for p in model.parameters()), torch.zeros(()))


@pytest.mark.parametrize("form", ["own", "copy"])
@pytest.mark.parametrize("kind", ["squares", "linear maps", "distances to 1"])
def test_a_loss_of_all_parameters(kind: str, form: str) -> None:
    """It is that of the grown model too: λ is its derivative, or refused."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(2, 4), Branch(), Branch(), nn.Linear(4, 3))
    data = classified(8)
    block = residual().block if form == "own" else cg.blocks.CopiedBlock(model[1])
    one = cg.Candidate("1", block)

    def loss_of(net: nn.Module) -> Tensor:
        return cross_entropy(net(data[0][0]), data[0][1]) + 0.1 * penalty(net, kind)

    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        return cross_entropy(output, target) + 0.1 * penalty(model, kind)

    if kind == "distances to 1":  # has a derivative by a parameter that is pinned at 0
        with nothing_left_behind(model), refused(cg.CandidateError, '"1"', "model.parameters()"):
            solved(model, data, one, loss_fn=loss_fn)
        return
    solution = solved(model, data, one, loss_fn=loss_fn)
    grown = copy.deepcopy(model)
    record = cg.insert(grown, solution)
    new = dict(record.new_parameters(grown))
    found = solution.multipliers["1"]
    pins = {
        key: next(p for n, p in new.items() if n.endswith(key.removeprefix("module.")))
        for key in found
    }
    grads = torch.autograd.grad(loss_of(grown), list(pins.values()))
    expected = {key: -grad for key, grad in zip(pins, grads, strict=True)}
    assert_multipliers(solution, "1", expected, 1e-12)
