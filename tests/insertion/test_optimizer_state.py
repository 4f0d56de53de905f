"""New parameters in a running optimizer; the state of the old ones is kept."""

import copy
from collections.abc import Callable
from typing import Any

import pytest
import torch
from helpers import (
    CROSS_ENTROPY,
    assert_same,
    candidate,
    choose,
    classified,
    feedforward,
    nothing_left_behind,
    refused,
    solved,
)
from torch import nn
from torch.optim import Optimizer

import constrained_growth as cg
from constrained_growth.blocks import IdentityLinear, ResidualMLP

OPTIMIZERS: dict[str, Callable[[Any], Optimizer]] = {
    "SGD": lambda p: torch.optim.SGD(p, lr=0.1),
    "SGD with momentum": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, nesterov=True),
    "Adam": lambda p: torch.optim.Adam(p, lr=0.01),
    "Adam, one by one": lambda p: torch.optim.Adam(p, lr=0.01, foreach=False, amsgrad=True),
    "AdamW": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.1),
    "RMSprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, centered=True),
    "Adagrad": lambda p: torch.optim.Adagrad(p, lr=0.1, initial_accumulator_value=0.5),
    "Adadelta": torch.optim.Adadelta,
    "Adamax": torch.optim.Adamax,
    "NAdam": torch.optim.NAdam,
    "RAdam": torch.optim.RAdam,
    "Rprop": torch.optim.Rprop,
}


def steps(model: nn.Module, optimizer: Optimizer, data: Any, count: int = 3) -> None:
    for _ in range(count):
        for x, y in data:
            optimizer.zero_grad()
            CROSS_ENTROPY(model(x), y).backward()
            optimizer.step()


def grown(model: nn.Module, optimizer: Optimizer, data: Any, *blocks: Any) -> cg.GrowthRecord:
    """Insert blocks after "1"."""
    candidates = [cg.Candidate("1", block, name=str(i)) for i, block in enumerate(blocks)]
    names = [one.name for one in candidates]
    solution = solved(model, data, *candidates, rule=choose(*names))
    return cg.insert(model, solution, optimizer=optimizer)


def group_of(optimizer: Optimizer, parameter: torch.Tensor) -> dict[str, Any]:
    (found,) = [g for g in optimizer.param_groups if any(p is parameter for p in g["params"])]
    return found


@pytest.mark.parametrize("name", OPTIMIZERS)
def test_first_step_of_new_parameters_is_that_of_a_fresh_optimizer(name: str) -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, data)
    grown(model, optimizer, data, IdentityLinear(4, nn.ReLU()))
    block = model.get_submodule("1.inserted")
    twin = copy.deepcopy(model)
    fresh = OPTIMIZERS[name](twin.get_submodule("1.inserted").parameters())
    steps(model, optimizer, data, count=1)
    steps(twin, fresh, data, count=1)
    for one, other in zip(
        block.parameters(), twin.get_submodule("1.inserted").parameters(), strict=True
    ):
        torch.testing.assert_close(one, other, rtol=1e-14, atol=1e-16)


@pytest.mark.parametrize("name", ["SGD with momentum", "Adam", "RMSprop", "Adagrad"])
def test_state_loads_into_an_optimizer_of_a_replayed_model(name: str) -> None:
    torch.manual_seed(3)
    model, data = feedforward(2, 4, 3), classified(20, batch=8)
    fresh = feedforward(2, 4, 3)
    optimizer = OPTIMIZERS[name](model.parameters())
    steps(model, optimizer, data)
    record = grown(model, optimizer, data, ResidualMLP(4, 3, nn.GELU()))
    steps(model, optimizer, data, count=1)
    again = cg.replay(fresh, record)
    again.load_state_dict(model.state_dict())
    reopened = OPTIMIZERS[name](again.parameters())
    reopened.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, data)
    steps(again, reopened, data)
    assert_same(again.state_dict(), model.state_dict())


def test_state_is_per_parameter_also_when_nothing_was_trained_yet() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    optimizer = torch.optim.Adam(model.parameters())
    grown(model, optimizer, data, IdentityLinear(4, nn.ReLU()))
    assert not optimizer.state
    steps(model, optimizer, data, count=1)
    assert len(optimizer.state) == 6


def test_adagrad_has_its_state_at_once() -> None:
    """It is made when Adagrad is built; not every torch makes it up at the first step."""
    model, data = feedforward(2, 4, 3), classified(20)
    optimizer = OPTIMIZERS["Adagrad"](model.parameters())
    steps(model, optimizer, data)
    grown(model, optimizer, data, IdentityLinear(4, nn.ReLU()))
    state = dict(optimizer.state[model.get_parameter("1.inserted.weight")])
    assert_same(state, {"step": torch.tensor(0.0), "sum": torch.full((4, 4), 0.5)})


def test_matrices_and_vectors_stay_apart() -> None:
    """As in "no weight decay for biases"."""

    def groups(model: nn.Module) -> list[dict[str, Any]]:
        return [
            {"params": [p for p in model.parameters() if p.dim() > 1], "weight_decay": 0.1},
            {"params": [p for p in model.parameters() if p.dim() < 2], "weight_decay": 0.0},
        ]

    model, data, fresh = feedforward(2, 4, 3), classified(20), feedforward(2, 4, 3)
    optimizer = torch.optim.AdamW(groups(model))
    steps(model, optimizer, data)
    record = grown(model, optimizer, data, ResidualMLP(4, 3, nn.GELU()))
    for parameter in model.parameters():
        assert group_of(optimizer, parameter)["weight_decay"] == (0.1 if parameter.dim() > 1 else 0)
    again = cg.replay(fresh, record)
    again.load_state_dict(model.state_dict())
    reopened = torch.optim.AdamW(groups(again))
    reopened.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    steps(model, optimizer, data)
    steps(again, reopened, data)
    assert_same(again.state_dict(), model.state_dict())


@pytest.mark.parametrize(
    "block", [lambda: IdentityLinear(4, nn.ReLU()), lambda: ResidualMLP(4, 3, nn.GELU())]
)
@pytest.mark.parametrize("site", [1, 3])
def test_a_layer_gets_the_settings_of_the_one_it_follows(block: Any, site: int) -> None:
    """All of its parameters, when every layer has a learning rate of its own."""
    model, data = feedforward(2, 4, 4, 3), classified(20)
    optimizer = torch.optim.SGD(
        [
            {"params": list(model.get_submodule(str(i)).parameters()), "lr": 0.1 * (i + 1)}
            for i in (0, 2, 4)
        ]
    )
    solution = solved(model, data, cg.Candidate(str(site), block()))
    cg.insert(model, solution, optimizer=optimizer)
    for parameter in model.get_submodule(f"{site}.inserted").parameters():
        assert group_of(optimizer, parameter)["lr"] == pytest.approx(0.1 * site)
    assert len(optimizer.param_groups) == 3


def test_a_layer_after_frozen_ones_joins_the_group_of_the_next() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20)
    optimizer = torch.optim.SGD(model.get_submodule("4").parameters(), lr=0.1)
    grown(model, optimizer, data, IdentityLinear(4, nn.ReLU()))
    (group,) = optimizer.param_groups
    expected = [*model.get_submodule("1.inserted").parameters(), *model[4].parameters()]  # type: ignore[index]
    assert [id(p) for p in group["params"]] == [id(p) for p in expected]


def test_names_of_the_groups_follow() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    optimizer = torch.optim.AdamW(model.named_parameters())
    steps(model, optimizer, data)
    grown(model, optimizer, data, IdentityLinear(4, nn.ReLU()))
    (group,) = optimizer.param_groups
    assert group["param_names"] == [name for name, _ in model.named_parameters()]
    steps(model, optimizer, data)


def test_learning_rate_schedule_goes_on() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    optimizer = torch.optim.SGD(model.parameters(), lr=1.0)
    schedule = torch.optim.lr_scheduler.StepLR(optimizer, 1, gamma=0.5)
    grown(model, optimizer, data, IdentityLinear(4, nn.ReLU()))
    steps(model, optimizer, data, count=1)
    schedule.step()
    assert [group["lr"] for group in optimizer.param_groups] == [0.5]


def test_group_with_foreign_parameters_takes_new_ones_at_its_end() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    foreign = nn.Parameter(torch.zeros(2))
    optimizer = torch.optim.SGD([foreign, *model.parameters()], lr=0.1)
    grown(model, optimizer, data, IdentityLinear(4, nn.ReLU()))
    listed = optimizer.param_groups[0]["params"]
    new = list(model.get_submodule("1.inserted").parameters())
    assert [id(p) for p in listed[-2:]] == [id(p) for p in new]
    assert len(listed) == 7


def muon(parameters: Any) -> Optimizer:
    return torch.optim.Muon(p for p in parameters if p.dim() == 2)  # type: ignore[attr-defined]


@pytest.mark.parametrize(
    ("make", "words"),
    [
        (lambda p: torch.optim.LBFGS(p), ["LBFGS", "optimizer=None"]),
        (lambda p: torch.optim.SGD([nn.Parameter(torch.ones(1))]), ["none of the model's"]),
        (lambda p: "adam", ["optimizer='adam'", "torch.optim.Optimizer"]),
        pytest.param(
            muon,
            ["Muon takes only matrices", "['bias']", "optimizer=None"],
            marks=pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="an older torch"),
        ),
    ],
)
def test_optimizers_that_cannot_take_the_layer(make: Any, words: list[str]) -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    optimizer = make(list(model.parameters()))
    solution = solved(model, data, candidate())
    before = copy.deepcopy(getattr(optimizer, "param_groups", None))
    with nothing_left_behind(model), refused(cg.OptimizerError, *words):
        cg.insert(model, solution, optimizer=optimizer)
    if before is not None:
        groups = [len(group["params"]) for group in optimizer.param_groups]
        assert groups == [len(group["params"]) for group in before]


@pytest.mark.skipif(not hasattr(torch.optim, "Muon"), reason="an older torch")
def test_muon_takes_a_block_of_matrices() -> None:
    class Square(nn.Module):
        pinned = ("weight",)

        def __init__(self) -> None:
            super().__init__()
            self.weight = nn.Parameter(torch.zeros(4, 4))

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return x + x @ self.weight

    model, data = feedforward(2, 4, 3), classified(20)
    optimizer = muon(model.parameters())
    steps(model, optimizer, data)
    grown(model, optimizer, data, Square())
    steps(model, optimizer, data)
    assert model.get_parameter("1.inserted.weight").any()
