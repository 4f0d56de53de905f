"""Sites that not every batch passes: where one does not, the layer there adds zero to λ."""

from __future__ import annotations

import random
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    Gain,
    assert_multipliers,
    autograd_multipliers,
    classified,
    refused,
    solved,
)
from torch import Tensor, nn

import constrained_growth as cg


class Mixture(nn.Module):
    """Each sample goes to one of the experts; `always` runs them without samples too."""

    def __init__(self, always: bool = False) -> None:
        super().__init__()
        self.stem, self.gate, self.head = nn.Linear(2, 4), nn.Linear(2, 3), nn.Linear(4, 3)
        self.experts = nn.ModuleList(nn.Sequential(nn.Linear(4, 4), nn.Tanh()) for _ in range(3))
        nn.init.zeros_(self.gate.bias)
        self.always = always

    def forward(self, x: Tensor) -> Tensor:
        h, share = self.stem(x).relu(), self.gate(x).softmax(-1)
        for i, expert in enumerate(self.experts):
            rows = (share.argmax(-1) == i).nonzero().squeeze(1)
            if self.always or len(rows):
                h = h.index_add(0, rows, expert(h[rows]) * share[rows, i : i + 1])
        return self.head(h)


def candidates(number: int = 3) -> list[cg.Candidate]:
    makes = [lambda: cg.blocks.ResidualMLP(4, 3, torch.tanh), lambda: Gain(4)]
    return [
        cg.Candidate(f"experts.{i}", make(), name=f"{i} {kind}")
        for i in range(number)
        for kind, make in enumerate(makes)
    ]


@pytest.mark.parametrize("always", [False, True])
@pytest.mark.parametrize("derivatives", [False, True])
def test_idle_experts_add_zero(always: bool, derivatives: bool) -> None:
    def loss_fn(output: Tensor, target: Tensor) -> Tensor:
        loss = CROSS_ENTROPY(output, target)
        if derivatives and output.requires_grad:
            (slope,) = torch.autograd.grad(loss, model.stem.weight, create_graph=True)
            loss = loss + slope.square().sum()
        return loss

    model, data = Mixture(always), classified(20, batch=2)
    experts = [set(model.gate(x).argmax(-1).tolist()) for x, _ in data]
    assert len(experts[0]) < 3
    assert {0, 1, 2} == set().union(*experts)
    cells = candidates()
    solution = solved(model, data, *cells, loss_fn=loss_fn)
    assert solution.method is (cg.Method.IN_GRAPH if derivatives else cg.Method.CLOSED_FORM)
    for one in cells if not derivatives else ():
        assert_multipliers(solution, one.name, autograd_multipliers(model, data, one), atol=1e-12)
    idle = next(i for i in range(3) if i not in experts[0])
    chosen = solved(model, data, *cells, rule=lambda _: cg.Decision((f"{idle} 0",)))
    cg.insert(model, chosen)  # although the first batch does not pass it
    weight = model.get_parameter(f"experts.{idle}.inserted.outer.weight")
    losses = [len(x) * CROSS_ENTROPY(model(x), y) for x, y in data]
    (gradient,) = torch.autograd.grad(torch.stack(losses).sum() / 20, weight)
    found: Any = chosen.multipliers[f"{idle} 0"]["outer.weight"]
    torch.testing.assert_close(found, -gradient, rtol=1e-9, atol=1e-12)


def test_an_expert_that_is_never_asked_is_refused() -> None:
    model = Mixture()
    with torch.no_grad():
        model.gate.bias[1] = -100.0
    with refused(cg.CandidateError, "experts.1", "never reached", "batch in front"):
        solved(model, classified(20, batch=2), *candidates())


DRAWS: dict[str, Callable[[], float]] = {
    "torch": lambda: float(torch.rand(())),
    "python": random.random,
}


class Sometimes(nn.Module):
    """Leaves a layer out by chance."""

    def __init__(self, draw: Callable[[], float]) -> None:
        super().__init__()
        self.stem, self.part, self.head = nn.Linear(2, 4), nn.Linear(4, 4), nn.Linear(4, 3)
        self.draw = draw

    def forward(self, x: Tensor) -> Tensor:
        h = torch.tanh(self.stem(x))
        return self.head(self.part(h) if self.draw() < 0.5 else h)


@pytest.mark.parametrize("draw", DRAWS)
@pytest.mark.parametrize("seed", range(4))
def test_a_layer_that_is_left_out_by_chance(draw: str, seed: int) -> None:
    model, data = Sometimes(DRAWS[draw]), classified(60, batch=2)
    block = cg.blocks.ResidualMLP(4, 3, torch.tanh)
    torch.manual_seed(seed)
    random.seed(seed)
    expected = DRAWS[draw]()
    torch.manual_seed(seed)
    random.seed(seed)
    problem = cg.GrowthProblem(model, CROSS_ENTROPY, data, [cg.Candidate("part", block)])
    assert DRAWS[draw]() == expected  # as if nothing had been drawn
    assert cg.solve(problem).sensitivities["part"].value > 0
