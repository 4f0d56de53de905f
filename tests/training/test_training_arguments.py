"""Every wrong argument is refused before the first step of training, and nothing has changed."""

import functools
from typing import Any

import numpy as np
import pytest
import torch
from helpers import candidate, classified, feedforward, nothing_left_behind, refused
from torch import nn

import constrained_growth as cg
from constrained_growth.rules import Plateau
from constrained_growth.training import LineSearch, NewLayers, evaluate

SGD = functools.partial(torch.optim.SGD, lr=0.1)
LOSS = nn.CrossEntropyLoss()

WRONG_IN_BOTH: list[dict[str, Any]] = [
    {"rule": cg.TopK},
    {"rule": "top"},
    {"rule": None},
    {"when": 5},
    {"when": Plateau},
    {"confirm": "yes"},
    {"candidates": 3},
    {"candidates": "1"},
    {"candidates": ["1"]},
    {"candidates": []},
    {"candidates": [candidate("nowhere")]},
    {"candidates": [candidate("1"), candidate("1")]},
    {"max_insertions": 1.5},
    {"max_insertions": -1},
    {"max_insertions": True},
    {"max_insertions": "2"},
    {"after_insertion": NewLayers},
    {"after_insertion": 0.1},
    {"solver": "solve"},
    {"solver": None},
    {"writer": 3},
    {"averaged": 3},
    {"averaged": [None]},
    {"averaged": feedforward(2, 5, 3)},
    {"data": 5},
    {"data": "data"},
    {"data": iter(classified(8))},
    {"loss_fn": nn.CrossEntropyLoss},
    {"loss_fn": None},
    {"model": None},
]
WRONG_IN_GROW: list[dict[str, Any]] = [
    {"epochs": 2.5},
    {"epochs": True},
    {"epochs": None},
    {"patience": 0},
    {"patience": "1"},
    {"target": "low"},
    {"metrics": {"a": 5}},
    {"metrics": [LOSS]},
    {"metrics": {"a": nn.L1Loss}},
    {"callbacks": [5]},
    {"callbacks": print},
    {"callbacks": None},
    {"checkpoint": "/nonexistent/x"},
    {"checkpoint": "/"},
    {"checkpoint": 5},
    {"checkpoint_every": 0},
    {"checkpoint_every": 1.0},
    {"blocks": [1]},
    {"blocks": {"1": 1}},
    {"validation": 5},
    {"validation": []},
    {"validation": iter(classified(8))},
    {"loader": []},
    {"loader": iter(classified(8))},
    {"scheduler_factory": 1},
    {"optimizer_factory": SGD([nn.Parameter(torch.zeros(1))])},
    {"progress": "yes"},
]


def name_of(wrong: dict[str, Any]) -> str:
    return "{}={!r:.30}".format(*next(iter(wrong.items())))


@pytest.mark.parametrize("wrong", WRONG_IN_BOTH + WRONG_IN_GROW, ids=name_of)
def test_grow_refuses_before_the_first_step(wrong: dict[str, Any]) -> None:
    model = feedforward(2, 4, 4, 3)
    given: dict[str, Any] = {"model": model, "optimizer_factory": SGD, "loss_fn": LOSS}
    given |= {"loader": classified(8), "epochs": 2, "progress": False}
    with nothing_left_behind(model), refused(cg.GrowthError, next(iter(wrong)).rstrip("s")):
        cg.grow(**{**given, **wrong})


@pytest.mark.parametrize("wrong", WRONG_IN_BOTH, ids=name_of)
def test_grower_refuses_at_once(wrong: dict[str, Any]) -> None:
    model = feedforward(2, 4, 4, 3)
    given: dict[str, Any] = {"model": model, "optimizer": SGD(model.parameters())}
    given |= {"loss_fn": LOSS, "data": classified(8)}
    with nothing_left_behind(model), refused(cg.GrowthError, next(iter(wrong)).rstrip("s")):
        cg.Grower(**{**given, **wrong})


@pytest.mark.parametrize(
    "made",
    [
        lambda parameters: torch.optim.LBFGS(parameters),
        lambda parameters: SGD([nn.Parameter(torch.zeros(1))]),
        lambda parameters: [SGD(parameters), "adam"],
        lambda parameters: [],
        lambda parameters: None,
        lambda parameters: "adam",
    ],
    ids=["LBFGS", "of another model", "one is none", "no optimizers", "None", "a name"],
)
def test_optimizers_that_cannot_grow(made: Any) -> None:
    model, data = feedforward(2, 4, 4, 3), classified(8)
    with nothing_left_behind(model), refused(cg.GrowthError, "optimizer"):
        cg.grow(model, made, LOSS, data, epochs=2)
    with nothing_left_behind(model), refused(cg.GrowthError, "optimizer"):
        cg.Grower(model, made(list(model.parameters())), LOSS, data)


def test_what_is_no_loss_and_no_policy() -> None:
    model = feedforward(2, 4, 3)
    grower = cg.Grower(model, SGD(model.parameters()), LOSS, classified(8))
    for loss in ("low", None, torch.zeros(2)):
        with refused(cg.TrainingError, "loss="):
            grower.step(loss)  # type: ignore[arg-type]
    for metrics in ({"a": 5}, 3):
        with refused(cg.TrainingError, "metrics="):
            evaluate(model, metrics, classified(8))  # type: ignore[arg-type]
    for make in (lambda: NewLayers("1"), lambda: NewLayers(1.0, 2.5), lambda: LineSearch(0)):  # type: ignore[arg-type]
        with refused(cg.TrainingError):
            make()


def test_callbacks_may_come_from_a_generator() -> None:
    seen: list[int] = []
    callbacks = (lambda grower: seen.append(grower.num_steps) for _ in range(1))
    cg.grow(feedforward(2, 4, 3), SGD, LOSS, classified(8), epochs=3, callbacks=callbacks)
    assert seen == [1, 2, 3]


def test_numbers_of_numpy() -> None:
    numbers: Any = {"epochs": 2, "max_insertions": 1, "patience": 1, "target": 0.01}
    numpys = {
        name: np.float32(x) if name == "target" else np.int64(x) for name, x in numbers.items()
    }
    found = []
    for given in (numbers, numpys):
        torch.manual_seed(0)
        net = feedforward(2, 4, 3)
        warmup = NewLayers(warmup=type(given["epochs"])(3))
        history = cg.grow(net, SGD, LOSS, classified(8), after_insertion=warmup, **given)
        found.append(history.losses)
    assert found[0] == found[1]
