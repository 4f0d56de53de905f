"""After an error everything is as it was, to the last bit; and values to start from."""

import copy
import math
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    Gain,
    assert_same,
    candidate,
    choose,
    classified,
    feedforward,
    nothing_left_behind,
    refused,
    solved,
)
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.bookkeeping import register


def everything(optimizer: torch.optim.Optimizer) -> Any:
    """What an optimizer holds: which parameters, in which order, with which settings and state."""
    groups = [
        {**group, "params": [id(p) for p in group["params"]]} for group in optimizer.param_groups
    ]
    lists = [id(group) for group in optimizer.param_groups]
    lists += [id(group["params"]) for group in optimizer.param_groups]
    states = {str(id(p)): copy.deepcopy(dict(state)) for p, state in optimizer.state.items()}
    return {"groups": groups, "lists": lists, "states": states}


def trained(model: nn.Module, data: Any) -> torch.optim.Optimizer:
    optimizer = torch.optim.Adam(model.named_parameters(), lr=0.01)
    for x, y in data:
        CROSS_ENTROPY(model(x), y).backward()
        optimizer.step()
    return optimizer


# --- undone to the last bit -------------------------------------------------------------------


class Breaks(Gain):
    """Fails in the model, after `at` calls."""

    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        if self.calls < 0:
            raise RuntimeError("broken on purpose")
        return super().forward(x)


class Moves(Gain):
    calls = 0

    def forward(self, x: Tensor) -> Tensor:
        return super().forward(x) + (0.1 if self.calls < 0 else 0.0)


@pytest.mark.parametrize("kind", [Breaks, Moves])
def test_a_broken_block_leaves_everything_as_it_was(kind: type[Any]) -> None:
    model, data = feedforward(2, 4, 4, 3), classified(30, batch=12)
    optimizer = trained(model, data)
    average = torch.optim.swa_utils.AveragedModel(model)
    block = kind(4)
    solution = solved(model, data, candidate(), cg.Candidate("3", block), rule=choose("1", "3"))
    planned = solution.candidates["3"]
    planned.block.calls = -1  # type: ignore[assignment]
    before = everything(optimizer)
    word = "broken on purpose" if kind is Breaks else "moves by"
    with (
        nothing_left_behind(model),
        nothing_left_behind(average),
        refused(cg.BlockError, word, "('1', '3')", "Nothing was changed"),
    ):
        cg.insert(model, solution, optimizer=optimizer, averaged=average)
    assert_same(everything(optimizer), before)


class OneMore(dict[Any, Any]):
    """States of which only one more can be begun."""

    begun = 0

    def __setitem__(self, key: Any, value: Any) -> None:
        self.begun += 1
        if self.begun > 1:
            raise RuntimeError("broken on purpose")
        super().__setitem__(key, value)


def test_a_broken_optimizer_leaves_everything_as_it_was() -> None:
    """One that fails after it took the first of the new parameters."""
    model, data = feedforward(2, 4, 3), classified(30)
    optimizer = torch.optim.Adagrad(model.parameters())
    optimizer.state = OneMore(optimizer.state)  # type: ignore[assignment]
    solution = solved(model, data, candidate())
    other = torch.optim.SGD(list(model.parameters())[:1], momentum=0.9)
    before = everything(optimizer), everything(other)
    with nothing_left_behind(model), pytest.raises(RuntimeError, match="broken on purpose"):
        cg.insert(model, solution, optimizer=[other, optimizer])
    assert optimizer.state.begun == 2  # type: ignore[attr-defined]
    assert_same((everything(optimizer), everything(other)), before)


class Counted(nn.Sequential):
    """Keeps a count of its modules, which fails once."""

    count, failures = 4, 0


@register(Counted)
class CountedBooks:
    def __init__(self, model: Counted) -> None:
        self.model = model

    def counts(self, after: str) -> bool:
        return True

    def refusal(self, after: str, layer: nn.Module) -> str | None:
        return None

    def update(self, around: Sequence[nn.Module]) -> None:
        self.model.count = sum(1 for _ in self.model.modules())
        if self.model.failures:
            self.model.failures -= 1
            raise RuntimeError("broken on purpose")


def test_bookkeeping_is_found_and_undone_by_every_road() -> None:
    model, data = Counted(*feedforward(2, 4, 3)), classified(30)
    fresh = copy.deepcopy(model)
    model.failures = 1
    solution = solved(model, data, candidate())
    with nothing_left_behind(model), pytest.raises(RuntimeError, match="broken on purpose"):
        cg.insert(model, solution)
    assert model.count == 4
    model.failures = 0
    record = cg.insert(model, solution)
    assert model.count == sum(1 for _ in model.modules()) == 7
    outer = nn.Sequential(copy.deepcopy(fresh))
    cg.insert(outer, solved(outer, data, cg.Candidate("0.1", candidate().block)))
    assert outer[0].count == cg.replay(fresh, record).count == 7


class Keeps(nn.Sequential):
    """Runs its elements, or some of them once by what it has kept of them."""

    kept: Any = ()

    def forward(self, input: Tensor) -> Tensor:
        own = list(self)
        for index, module in enumerate(own):
            input = self.kept[index](input) if index in self.kept else module(input)
            if index == 1 and -1 in self.kept:
                self.kept[-1](input)
        return input


@pytest.mark.parametrize("places", [range(5), [1], [-1]], ids=["all", "site", "site once more"])
def test_a_layer_that_the_model_passes_by_is_refused(places: Any) -> None:
    model, data = Keeps(*feedforward(2, 4, 4, 3)), classified(9)
    optimizer = trained(model, data)
    before = everything(optimizer)
    solution = solved(model, data, candidate())
    model.kept = {place: model[max(place, 1) if place == -1 else place] for place in places}
    words = ["['1']", "reference of its own", "nn.ModuleList"]
    with nothing_left_behind(model), refused(cg.BlockError, *words):
        cg.insert(model, solution, optimizer=optimizer)
    assert_same(everything(optimizer), before)
    assert type(model[1]) is nn.ReLU
    model.kept = ()
    assert cg.insert(model, solution, optimizer=optimizer).difference["train"] < 1e-12


def test_a_model_that_is_no_function_of_its_input_is_refused() -> None:
    class Counts(nn.Sequential):
        number = 0

        def forward(self, input: Tensor) -> Tensor:
            Counts.number += 1
            return super().forward(input) + Counts.number

    model, data = Counts(*feedforward(2, 4, 3)), classified(9)
    solution = solved(model, data, candidate())
    with nothing_left_behind(model), refused(cg.BlockError, "not a function", "data=()"):
        cg.insert(model, solution)
    cg.insert(model, solution, data=())


# --- values to start from ---------------------------------------------------------------------


def test_a_decision_may_say_where_the_layer_starts() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(30)
    solution = solved(model, data, candidate("1"), candidate("3"), rule=choose("1", "3"))
    step = {"weight": 0.1 * torch.randn(4, 4)}
    decision = cg.Decision(("1", "3"), values={"1": step}, evidence={"gain": 0.5})
    fresh = copy.deepcopy(model)
    average = torch.optim.swa_utils.AveragedModel(model)
    record = cg.insert(model, replace(solution, decision=decision), averaged=average)
    assert torch.equal(model.get_parameter("1.inserted.weight"), torch.eye(4) + step["weight"])
    assert torch.equal(model.get_parameter("1.inserted.bias"), torch.zeros(4))
    assert torch.equal(model.get_parameter("3.inserted.weight"), torch.eye(4))
    assert max(record.difference.values()) < 1e-14  # at the pins
    assert record.evidence == ({"gain": 0.5},)
    at_pins = average.module.get_parameter("1.inserted.weight")
    assert torch.equal(at_pins, torch.eye(4))
    assert torch.equal(solution.candidates["1"].block.get_parameter("weight"), torch.eye(4))
    assert torch.equal(cg.replay(fresh, record).get_parameter("1.inserted.weight"), torch.eye(4))


@pytest.mark.parametrize(
    ("values", "words"),
    [
        ({"7": {}}, '"7"'),
        ({"1": {"gain": torch.zeros(4)}}, '"gain"'),
        ({"1": {"weight": torch.zeros(4, 5)}}, "(4, 5)"),
        ({"1": {"weight": 3.0}}, "3.0"),
        ({"1": {"weight": torch.full((4, 4), math.nan)}}, "NaN"),
    ],
)
def test_values_that_do_not_fit(values: Any, words: str) -> None:
    model, data = feedforward(2, 4, 3), classified(30)
    solution = solved(model, data, candidate())
    decision = cg.Decision(("1",), values=values)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    before = everything(optimizer)
    with nothing_left_behind(model), refused(cg.RuleError, "decision.values", words):
        cg.insert(model, replace(solution, decision=decision), optimizer=optimizer)
    assert_same(everything(optimizer), before)
