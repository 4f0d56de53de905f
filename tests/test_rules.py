"""From sensitivities to a decision."""

from collections.abc import Mapping
from typing import Any

import pytest
import torch
from helpers import (
    Gain,
    candidate,
    classified,
    feedforward,
    mean_loss,
    nothing_left_behind,
    refused,
    solved,
)
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import constrained_growth as cg


def sensitivities(**values: float) -> dict[str, cg.Sensitivity]:
    return {name: cg.Sensitivity(value) for name, value in values.items()}


def counted(**values: tuple[float, int]) -> dict[str, cg.Sensitivity]:
    return {name: cg.Sensitivity(v, num_parameters=n) for name, (v, n) in values.items()}


# --- TopK -----------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("k", "values", "chosen"),
    [
        (1, {"a": 0.1, "b": 0.3, "c": 0.2}, ("b",)),
        (2, {"a": 0.1, "b": 0.3, "c": 0.2}, ("b", "c")),
        (9, {"a": 0.1, "b": 0.3, "c": 0.2}, ("b", "c", "a")),
        (1, {"a": 0.2, "b": 0.2}, ("a",)),
        (1, {"b": 0.2, "a": 0.2}, ("b",)),
        (2, {"a": 0.1, "b": 0.2, "c": 0.2, "d": 0.2}, ("b", "c")),
        (2, {"a": 0.0, "b": 0.2}, ("b",)),
        (1, {"a": 0.0, "b": 0.0}, ()),
        (1, {}, ()),
    ],
)
def test_top_k(k: int, values: dict[str, float], chosen: tuple[str, ...]) -> None:
    assert cg.TopK(k)(sensitivities(**values)).chosen == chosen


@given(st.lists(st.floats(0, 10), max_size=8), st.integers(1, 9))
def test_top_k_takes_none_smaller_than_what_it_leaves(values: list[float], k: int) -> None:
    named = {str(index): cg.Sensitivity(value) for index, value in enumerate(values)}
    chosen = cg.TopK(k)(named).chosen
    taken = [named[name].value for name in chosen]
    left = [s.value for name, s in named.items() if name not in chosen]
    assert len(chosen) == min(k, sum(value > 0 for value in values))
    assert taken == sorted(taken, reverse=True)
    assert not taken or min(taken) >= max(left, default=0)


def test_top_k_per_unit_of_cost() -> None:
    wide = counted(wide=(1.0, 100), narrow=(0.5, 10))
    assert cg.TopK(1)(wide).chosen == ("wide",)
    decision = cg.TopK(1, cost=lambda s: s.num_parameters)(wide)
    assert decision.chosen == ("narrow",)
    assert "per cost" in decision.reason


@pytest.mark.parametrize("k", [0, -1, 1.0, True, None, "1"])
def test_top_k_of_no_number(k: Any) -> None:
    with refused(cg.RuleError, f"k={k!r}", "TopK"):
        cg.TopK(k)


@pytest.mark.parametrize("cost", [0, -1, float("nan")])
def test_cost_that_is_not_positive(cost: float) -> None:
    with refused(cg.RuleError, "cost", f"{cost}", '"a"'):
        cg.TopK(1, cost=lambda s: cost)(sensitivities(a=1.0))


# --- Threshold ------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "chosen"),
    [
        ({"absolute": 0.15}, ("b", "c")),
        ({"absolute": 0.2}, ("b",)),
        ({"absolute": 0.3}, ()),
        ({"absolute": 0.0}, ("b", "c", "a")),
        ({"relative": 1.5}, ("b", "c")),
        ({"relative": 2.5}, ("b",)),
        ({"relative": 3.0}, ()),
        ({"relative": 1.5, "absolute": 0.25}, ("b",)),
        ({"relative": 2.5, "absolute": 0.05}, ("b",)),
        ({"absolute": 0.0, "max_insertions": 2}, ("b", "c")),
    ],
)
def test_threshold(options: dict[str, Any], chosen: tuple[str, ...]) -> None:
    given = {
        name: cg.Sensitivity(value, baseline=0.1)
        for name, value in {"a": 0.1, "b": 0.3, "c": 0.2, "d": 0.0}.items()
    }
    assert cg.Threshold(**options)(given).chosen == chosen


def test_relative_threshold_is_relative_to_the_layers_of_the_model() -> None:
    """Each layer's gradient over all its parameters; their mean, without the candidates."""
    model, data = feedforward(2, 4, 5, 3), classified(30, batch=12)
    layers = [model.get_submodule(str(index)) for index in (0, 2, 4)]
    norms = []
    for layer in layers:
        grads = torch.autograd.grad(mean_loss(model, data), list(layer.parameters()))
        norms.append(torch.cat([grad.flatten() for grad in grads]).norm().item())
    baseline = sum(norms) / 3
    candidates = [candidate("1", 4), candidate("3", 5), cg.Candidate("0", Gain(4))]
    values = {n: s.value for n, s in solved(model, data, *candidates).sensitivities.items()}
    for value in values.values():
        for tilt, inside in ((1 + 1e-9, False), (1 - 1e-9, True)):
            rule = cg.Threshold(relative=tilt * value / baseline)
            chosen = solved(model, data, *candidates, rule=rule).decision.chosen
            bar = tilt * value
            assert set(chosen) == {name for name, other in values.items() if other > bar}
            assert (value > bar) is inside


def test_relative_threshold_without_stationarity() -> None:
    model, data = feedforward(2, 4, 3), classified(20)
    with (
        nothing_left_behind(model),
        refused(cg.RuleError, "relative=1.0", "stationarity=True"),
    ):
        solved(model, data, candidate(), rule=cg.Threshold(relative=1.0), stationarity=False)


@pytest.mark.parametrize(
    ("options", "words"),
    [
        ({}, ["absolute=", "relative="]),
        ({"absolute": -0.1}, ["absolute=-0.1", "negative"]),
        ({"relative": -1.0}, ["relative=-1.0", "negative"]),
        ({"absolute": float("nan")}, ["absolute=nan"]),
        ({"absolute": 1.0, "max_insertions": 0}, ["max_insertions=0"]),
    ],
)
def test_thresholds_that_make_no_sense(options: dict[str, Any], words: list[str]) -> None:
    with refused(cg.RuleError, *words):
        cg.Threshold(**options)


# --- a user's own -----------------------------------------------------------------------------


class Least:
    """A rule with a state of its own."""

    def __init__(self) -> None:
        self.seen: list[str] = []

    def __call__(self, sensitivities: Mapping[str, cg.Sensitivity], /) -> cg.Decision:
        self.seen = list(sensitivities)
        return cg.Decision((min(sensitivities, key=lambda name: sensitivities[name].value),), "!")


def test_a_users_own_class_and_function() -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20)
    candidates = [candidate("3"), candidate("1")]
    rule = Least()
    solution = solved(model, data, *candidates, rule=rule)
    assert rule.seen == ["3", "1"]
    values = {name: s.value for name, s in solution.sensitivities.items()}
    assert solution.decision == cg.Decision((min(values, key=lambda name: values[name]),), "!")

    def precise(given: Mapping[str, cg.Sensitivity]) -> cg.Decision:
        return cg.Decision(tuple(n for n, s in given.items() if s.value > 2 * s.standard_error))

    expected = [n for n, s in solution.sensitivities.items() if s.value > 2 * s.standard_error]
    assert list(solved(model, data, *candidates, rule=precise).decision.chosen) == expected


def test_inserting_nothing_is_an_answer() -> None:
    solution = solved(
        feedforward(2, 4, 3), classified(20), candidate(), rule=lambda _: cg.Decision()
    )
    assert solution.decision.chosen == ()


@pytest.mark.parametrize(
    ("answer", "words"),
    [
        (None, ["returned None", "cg.Decision(chosen=("]),
        (("1",), ["returned ('1',)", "not a cg.Decision"]),
        ("1", ["returned '1'", "not a cg.Decision"]),
        (cg.Decision("1"), ["chose '1'", "not a tuple of names"]),  # type: ignore[arg-type]
        (cg.Decision(None), ["chose None", "not a tuple of names"]),  # type: ignore[arg-type]
        (cg.Decision(("2",)), ["'2'", "the candidates are ('1', '3')"]),
        (cg.Decision(("1", "1")), ["at most once"]),
    ],
)
def test_answers_that_are_no_decision(answer: Any, words: list[str]) -> None:
    model, data = feedforward(2, 4, 4, 3), classified(20)
    candidates = [candidate("1"), candidate("3")]
    with nothing_left_behind(model), refused(cg.RuleError, *words):
        solved(model, data, *candidates, rule=lambda _: answer)


def test_dead_candidates_are_never_the_largest() -> None:
    """All units off: no gradient arrives, so every sensitivity is 0 and nothing is inserted."""
    model, data = feedforward(2, 4, 3), classified(20)
    nn.init.constant_(model.get_parameter("0.bias"), -100.0)
    solution = solved(model, data, candidate(), rule=cg.TopK(1))
    assert solution.sensitivities["1"].value == 0.0
    assert solution.decision == cg.Decision((), "no sensitivity above 0")
