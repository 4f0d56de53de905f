"""The cases of the paper's reference implementation (see golden/README.md)."""

import copy
import json
from dataclasses import dataclass, field
from functools import cached_property
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from helpers import CROSS_ENTROPY, autograd_multipliers, choose, mean_loss, refused, solved
from torch import Tensor, nn

import constrained_growth as cg

FOLDER = Path(__file__).parent.parent / "golden"
RELU = [f"fwd_relu_{case}" for case in ("1_spiral_full", "2_spiral_mb64")]
TANHLU = [f"fwd_tanhlu_{case}" for case in ("1_spiral_full", "2_spiral_mb64")]
RESIDUAL = [
    f"{kind}_tanh_{case}"
    for kind in ("res1", "res2v1", "res2v2")
    for case in ("1_spiral_full", "2_spiral_mb64")
]
DEAD = "res1_relu_4_dead"
EXACT = RELU + RESIDUAL  # where the reference preserves the function


class Block(nn.Module):
    """A block of the reference's networks: x + σ(Wx + b) or x + W₂σ(W₁x + b)."""

    def __init__(self, width: int, activation: nn.Module, two_weights: bool) -> None:
        super().__init__()
        self.inner = nn.Linear(width, width)
        self.activation = activation
        self.outer = nn.Linear(width, width, bias=False) if two_weights else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        return x + self.outer(self.activation(self.inner(x)))


@dataclass
class Case:
    name: str
    arrays: Any = field(init=False)

    def __post_init__(self) -> None:
        with np.load(FOLDER / f"{self.name}.npz") as file:
            self.arrays = dict(file)
        self.meta = json.loads(str(self.arrays["meta"]))

    def tensors(self, prefix: str) -> list[Tensor]:
        keys = sorted(k for k in self.arrays if k.startswith(prefix) and k[-2:].isdigit())
        return [torch.from_numpy(self.arrays[key]) for key in keys]

    @property
    def activation(self) -> nn.Module:
        return {"relu": nn.ReLU, "tanh": nn.Tanh, "tanhlu": cg.blocks.TanhLU}[self.meta["act"]]()

    @cached_property
    def model(self) -> nn.Sequential:
        """The network right before the insertion."""
        widths, kind = self.meta["widths"], self.meta["type"]
        layers: list[nn.Module] = [nn.Linear(2, widths[0]), self.activation]
        for before, after in pairwise(widths):
            if kind == "fwd":
                layers += [nn.Linear(before, after), self.activation]
            else:
                layers.append(Block(after, self.activation, kind == "res2"))
        model = nn.Sequential(*layers, nn.Linear(widths[-1], 2))
        load(model, self.tensors("before_"))
        return model

    @cached_property
    def batches(self) -> list[tuple[Tensor, Tensor]]:
        x, y = torch.from_numpy(self.arrays["X"]), torch.from_numpy(self.arrays["y"])
        size = self.meta["batch"]
        return list(zip(x.split(size), y.split(size), strict=True))

    @cached_property
    def candidates(self) -> list[cg.Candidate]:
        """One for each position, in the reference's order."""
        count = len(self.arrays["sens"])
        step = 2 if self.meta["type"] == "fwd" else 1
        return [
            cg.Candidate(str(1 + step * position), self.block(self.meta["widths"][position]))
            for position in range(count)
        ]

    def block(self, width: int) -> nn.Module:
        if self.meta["type"] == "fwd":
            return cg.blocks.IdentityLinear(width, self.activation)
        if self.meta["type"] == "res1":
            return cg.blocks.ResidualLinear(width, self.activation)
        pinned = "inner" if self.meta["v2"] else "outer"
        return cg.blocks.ResidualMLP(width, width, self.activation, pinned, inner_init=0.8)

    @property
    def selection_weight(self) -> str:
        """Which pinned parameter the reference selects by."""
        if self.meta["type"] == "res2":
            return "inner.weight" if self.meta["v2"] else "outer.weight"
        return "weight"

    def selection_norm(self, multiplier: Any) -> Tensor:
        return multiplier[self.selection_weight].norm()

    def reference_gradients(self, candidate: int) -> dict[str, Tensor]:
        """Pinned parameter → the reference's gradient."""
        block = self.candidates[candidate].block
        names = [name for name, _ in block.named_parameters()]
        first = candidate * len(names)
        grads = self.tensors("grad_")[first : first + len(names)]
        return {n: g for n, g in zip(names, grads, strict=True) if n in block.pinned}  # type: ignore[operator]

    @property
    def chosen(self) -> str:
        return self.candidates[self.meta["chosen_position"]].name

    def grown(self) -> tuple[nn.Sequential, torch.optim.Optimizer]:
        """The model with the reference's choice inserted, and its optimizer."""
        model = copy.deepcopy(self.model)
        solution = solved(model, self.batches, *self.candidates, rule=choose(self.chosen))
        optimizer = torch.optim.SGD(model.parameters(), lr=self.meta["lr"] * self.meta["factor"])
        cg.insert(model, solution, optimizer=optimizer)
        return model, optimizer


def load(model: nn.Module, values: list[Tensor]) -> None:
    with torch.no_grad():
        for parameter, value in zip(model.parameters(), values, strict=True):
            parameter.copy_(value)


@pytest.fixture
def case(request: pytest.FixtureRequest) -> Case:
    return Case(request.param)


@pytest.mark.parametrize("case", EXACT, indirect=True)
def test_batchwise_multipliers_average_to_the_reference(case: Case) -> None:
    """The reference gives every batch the same weight, also a smaller last one."""
    solutions = [solved(case.model, [batch], *case.candidates) for batch in case.batches]
    for index, candidate in enumerate(case.candidates):
        for key, gradient in case.reference_gradients(index).items():
            found = torch.stack([s.multipliers[candidate.name][key] for s in solutions]).mean(0)
            torch.testing.assert_close(found, -gradient, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", EXACT + TANHLU, indirect=True)
def test_multipliers_are_those_of_the_full_data(case: Case) -> None:
    solution = solved(case.model, case.batches, *case.candidates)
    x, y = (torch.cat(parts) for parts in zip(*case.batches, strict=True))
    assert abs(solution.loss - case.meta["loss_before_full"]) < 1e-10
    for candidate in case.candidates:
        for key, expected in autograd_multipliers(case.model, [(x, y)], candidate).items():
            found = solution.multipliers[candidate.name][key]
            torch.testing.assert_close(found, expected, rtol=0, atol=1e-10)


@pytest.mark.parametrize("case", [n for n in EXACT if n.endswith("full")], indirect=True)
def test_squared_norms_and_choice(case: Case) -> None:
    problem = cg.GrowthProblem(case.model, CROSS_ENTROPY, case.batches, case.candidates)
    solution = cg.solve(problem, cg.TopK(1), norm=case.selection_norm, stationarity=False)
    squares = [s.value**2 for s in solution.sensitivities.values()]
    np.testing.assert_allclose(squares, case.arrays["sens"], rtol=0, atol=1e-10)
    assert case.meta["mode"] == "abs max"
    assert solution.decision.chosen == (case.candidates[case.meta["argmax"]].name,)
    assert solution.decision.chosen == (case.chosen,)


@pytest.mark.parametrize("case", [n for n in EXACT if n.endswith("mb64")], indirect=True)
def test_choice_on_minibatches(case: Case) -> None:
    def smallest(sensitivities: Any) -> cg.Decision:
        return cg.Decision((min(sensitivities, key=lambda n: sensitivities[n].value),))

    rule = {"abs max": cg.TopK(1), "abs min": smallest}[case.meta["mode"]]
    problem = cg.GrowthProblem(case.model, CROSS_ENTROPY, case.batches, case.candidates)
    solution = cg.solve(problem, rule, norm=case.selection_norm, stationarity=False)
    assert solution.decision.chosen == (case.chosen,)


@pytest.mark.parametrize("case", EXACT, indirect=True)
def test_insertion_gives_the_reference_network(case: Case) -> None:
    model, _ = case.grown()
    for found, expected in zip(model.parameters(), case.tensors("after_"), strict=True):
        assert torch.equal(found, expected)
    x, y = torch.from_numpy(case.arrays["X"]), torch.from_numpy(case.arrays["y"])
    loss = mean_loss(model, [(x, y)]).item()
    assert abs(loss - case.meta["loss_before_full"]) < 1e-10
    assert abs(loss - case.meta["loss_after_full"]) < 1e-10


@pytest.mark.parametrize("case", EXACT, indirect=True)
def test_training_goes_on_as_in_the_reference(case: Case) -> None:
    model, optimizer = case.grown()
    losses = []
    for _ in range(case.meta["epochs"][1]):
        for x, y in case.batches:
            optimizer.zero_grad()
            loss = CROSS_ENTROPY(model(x), y)
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
    np.testing.assert_allclose(losses, case.arrays["loss_post"], rtol=0, atol=1e-8)
    for found, expected in zip(model.parameters(), case.tensors("final_"), strict=True):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-8)


@pytest.mark.parametrize("case", TANHLU, indirect=True)
def test_shifted_identity_is_exact_where_the_reference_is_not(case: Case) -> None:
    before, after = case.meta["loss_before_full"], case.meta["loss_after_full"]
    model, _ = case.grown()
    x, y = torch.from_numpy(case.arrays["X"]), torch.from_numpy(case.arrays["y"])
    assert abs(mean_loss(model, [(x, y)]).item() - before) < 1e-14
    assert abs(after - before) > 1e-4


def test_one_weight_relu_is_refused_where_the_reference_sees_only_zeros() -> None:
    case = Case(DEAD)
    assert case.arrays["sens"].tolist() == [0.0, 0.0]
    with refused(cg.BlockError, "activation=ReLU()", "σ′(0) = 0", "exactly 0", "ResidualMLP"):
        _ = case.candidates
