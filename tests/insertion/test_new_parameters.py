"""A record says which parameters of a grown model are new, in any process."""

from typing import Any

import pytest
import torch
from helpers import candidate, classified, feedforward, nothing_left_behind, refused, solved
from stacks import Stack, both, copied, mlp, plan, steps
from torch import nn

import constrained_growth as cg

PLANS: dict[str, Any] = {
    "around the stem, and one more in the list": both,
    "around an element of the list": lambda model, data: plan(model, data, mlp("blocks.0")),
    "around a module within an element": lambda m, data: plan(m, data, mlp("blocks.1.norm")),
    "two at one place": lambda model, data: plan(model, data, mlp("stem"), mlp("stem", "again")),
    "two more in the list": lambda model, data: plan(
        model, data, copied(model, "blocks.0", "a"), copied(model, "blocks.1", "b")
    ),
}


def insert(model: nn.Module, data: Any, how: str) -> cg.GrowthRecord:
    return cg.insert(model, PLANS[how](model, data))


@pytest.mark.parametrize("first", PLANS)
@pytest.mark.parametrize("second", PLANS)
def test_new_parameters_of_two_rounds(first: str, second: str) -> None:
    model, data = Stack(), classified(12)
    old = {id(p) for p in model.parameters()}
    one = insert(model, data, first)
    found = {name: id(p) for name, p in one.new_parameters(model)}
    assert found == {n: id(p) for n, p in model.named_parameters() if id(p) not in old}
    between = {id(p) for p in model.parameters()}
    two = insert(model, data, second)
    found = {name: id(p) for name, p in two.new_parameters(model)}
    assert found == {n: id(p) for n, p in model.named_parameters() if id(p) not in between}
    record = one + two
    new = {n for n, p in model.named_parameters() if id(p) not in old}
    assert {name for name, _ in record.new_parameters(model)} == new
    again = cg.replay(Stack(), record)
    record = cg.GrowthRecord.from_json(record.to_json())
    assert {name for name, _ in record.new_parameters(again)} == new


def test_freezing_the_rest() -> None:
    model, data = Stack(), classified(12)
    record = insert(model, data, "around the stem, and one more in the list")
    new = dict(record.new_parameters(model))
    for name, parameter in model.named_parameters():
        parameter.requires_grad_(name in new)
    before = {name: p.detach().clone() for name, p in model.named_parameters()}
    steps(model, data, torch.optim.SGD(model.parameters(), lr=0.1))
    moved = {n for n, p in model.named_parameters() if not torch.equal(p, before[n])}
    assert moved <= new.keys()
    assert len(moved) > 2


def test_model_of_another_time() -> None:
    model, data = Stack(), classified(12)
    one = insert(model, data, "around the stem, and one more in the list")
    with refused(cg.RecordError, "model=Stack", "sum of the records"):
        one.new_parameters(Stack())
    insert(model, data, "around an element of the list")
    with nothing_left_behind(model), refused(cg.RecordError, "sum of the records"):
        one.new_parameters(model)


def test_a_later_layer_that_renames_nothing() -> None:
    """After modules without parameters, the old names stay as they were."""
    model, data = feedforward(2, 4, 4, 3), classified(9)
    one = cg.insert(model, solved(model, data, candidate("1")))
    two = cg.insert(model, solved(model, data, candidate("3")))
    with refused(cg.RecordError, "has 4 parameters", "inserted 2", "sum of the records"):
        one.new_parameters(model)
    assert {name for name, _ in two.new_parameters(model)} == {
        "3.inserted.weight",
        "3.inserted.bias",
    }
    both = (one + two).new_parameters(model)
    assert {name.split(".")[0] for name, _ in both} == {"1", "3"}
    assert len(both) == 4


def test_record_says_shortly_what_was_inserted() -> None:
    model, data = Stack(), classified(12)
    record = insert(model, data, "around the stem, and one more in the list")
    layers = "ResidualMLP after 'stem' as 'mlp stem', CopiedBlock after 'blocks.0'"
    assert repr(record) == f"GrowthRecord({layers})"
    for _ in range(3):
        record += insert(model, data, "two more in the list")
    assert len(repr(record)) < 700
    assert repr(record).count("CopiedBlock after 'blocks.0' as 'a'") == 3
    many = repr(cg.GrowthRecord(100 * record.insertions))
    assert len(many) < 2000
    assert many.endswith(" more)")


@pytest.mark.parametrize("count", [0, 1, 12, 60])
def test_solution_says_shortly_what_was_decided(count: int) -> None:
    names = [f"wider {index}" for index in range(max(count, 1))]
    model = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
    candidates = [mlp("1", name) for name in names]
    solution = cg.solve(
        cg.GrowthProblem(model, nn.CrossEntropyLoss(), classified(8), candidates),
        rule=lambda found: cg.Decision(tuple(found)[:count], "as I like it"),
    )
    assert len(repr(solution)) < 2000
    assert "(as I like it)" in repr(solution)
    assert f"insert {'nothing' if count == 0 else repr(names[0])}" in repr(solution)
    assert all(repr(name) in repr(solution) for name in names[: min(count, 50)])
    assert repr(solution.sensitivities["wider 0"]).endswith(" parameters pinned)")
    assert all(len(repr(one)) < 120 for one in solution.sensitivities.values())
