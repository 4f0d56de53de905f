"""When to insert a layer: now, later, never."""

import json
import math
from dataclasses import replace
from typing import Any

import pytest
import torch
from helpers import candidate, classified, feedforward, refused, solved
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

import constrained_growth as cg
from constrained_growth.rules import Exhausted, Plateau, When

LATER, NOW, NEVER = When.LATER, When.NOW, When.NEVER


def said(plateau: Plateau, *losses: float) -> list[When]:
    return [plateau.update(loss) for loss in losses]


def test_now_after_some_losses_without_progress() -> None:
    plateau = Plateau(patience=3, tolerance=0.1)
    assert said(plateau, 1.0, 0.95, 0.92, 0.91) == [LATER, LATER, LATER, NOW]
    assert said(plateau, 0.91, 0.8, 0.79, 0.78, 0.5) == [LATER] * 5
    assert said(plateau, 0.5, 0.6, 0.7) == [LATER, LATER, NOW]


def test_progress_is_relative_to_the_best_loss() -> None:
    assert said(Plateau(1, 0.1), 1.0, 0.9 - 1e-12) == [LATER, LATER]
    assert said(Plateau(1, 0.1), 1.0, 0.9 + 1e-12) == [LATER, NOW]
    assert said(Plateau(1, 0.1), -1.0, -1.05) == [LATER, NOW]  # a loss may be negative
    assert said(Plateau(1, 0.1), -1.0, -1.2) == [LATER, LATER]
    assert said(Plateau(1, 0.0), 1.0, 1.0) == [LATER, NOW]


@given(st.lists(st.floats(0.1, 10), max_size=60), st.integers(1, 5))
def test_between_two_nows_lie_losses_without_progress(losses: list[float], patience: int) -> None:
    """Against a loop that looks back over all losses each time."""
    plateau = Plateau(patience, 0.05)
    begin = 0
    for index, loss in enumerate(losses):
        best, stale = math.inf, 0
        for other in losses[begin : index + 1]:
            stale = 0 if other < best * 0.95 or math.isinf(best) else stale + 1
            best = other if stale == 0 else best
        found = plateau.update(loss)
        assert found is (NOW if stale == patience else LATER)
        begin = index + 1 if found is NOW else begin


def test_never_again() -> None:
    plateau = Plateau(patience=1, target=0.1)
    assert said(plateau, 1.0, 0.1, 5.0, 5.0) == [LATER, NEVER, NEVER, NEVER]
    assert said(Plateau(patience=1), 1.0, math.nan, 1.0) == [LATER, NEVER, NEVER]
    plateau = Plateau(patience=1, most=2)
    assert said(plateau, 1, 1, 1, 1, 1, 1) == [LATER, NOW, LATER, NOW, LATER, NEVER]


def test_a_tensor_is_a_loss() -> None:
    assert said(Plateau(1), torch.tensor(1.0), torch.tensor(1.0)) == [LATER, NOW]  # type: ignore[arg-type]


@given(st.lists(st.floats(0.1, 10), max_size=20), st.lists(st.floats(0.1, 10), max_size=20))
def test_state_survives_a_checkpoint(before: list[float], after: list[float]) -> None:
    one, other = Plateau(2, 0.01, most=2), Plateau(2, 0.01, most=2)
    said(one, *before)
    other.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert other.state_dict() == one.state_dict()
    assert said(one, *after) == said(other, *after)


def test_state_of_something_else() -> None:
    for bad in ({}, {"best": 1.0}, None):
        with refused(cg.RuleError, "Plateau"):
            Plateau().load_state_dict(bad)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("options", "word"),
    [
        ({"patience": 0}, "patience=0 is not a positive whole"),
        ({"patience": 1.5}, "patience=1.5"),
        ({"tolerance": -0.1}, "tolerance=-0.1"),
        ({"tolerance": 1.0}, "tolerance=1.0"),
        ({"most": 0}, "most=0"),
    ],
)
def test_plateau_arguments_out_of_range(options: dict[str, Any], word: str) -> None:
    with refused(cg.RuleError, word):
        Plateau(**options)


# --- stationarity and sensitivity -----------------------------------------------------------------


def test_now_when_new_parameters_have_more_to_gain_than_old_ones() -> None:
    solution = solved(
        feedforward(2, 4, 4, 3), classified(60, batch=20), candidate("1"), candidate("3")
    )
    assert solution.stationarity is not None
    largest = max(
        torch.cat([v.flatten() for v in multiplier.values()]).norm().item()
        for multiplier in solution.multipliers.values()
    )
    ratio = largest / solution.stationarity
    assert Exhausted(ratio * (1 - 1e-9), 0.0)(solution) is NOW
    assert Exhausted(ratio * (1 + 1e-9), 0.0)(solution) is LATER
    assert Exhausted(ratio / 2, 1e6)(solution) is LATER


def test_never_when_neither_has_anything_to_gain() -> None:
    """All units off at a stationary point: every multiplier is zero, and stays so."""
    model, data = feedforward(2, 4, 3), classified(60, batch=20)
    solution = solved(model, data, candidate())
    noisy = replace(solution, status=cg.Status.KKT_MULTIPLIERS)
    assert Exhausted(significance=1e6)(noisy) is NEVER
    nn.init.constant_(model.get_parameter("0.bias"), -100.0)
    dead = solved(model, data, candidate())
    assert Exhausted()(dead) is LATER
    assert Exhausted()(replace(dead, status=cg.Status.KKT_MULTIPLIERS)) is NEVER


def test_what_exhausted_needs() -> None:
    solution = solved(feedforward(2, 4, 3), classified(60), candidate(), stationarity=False)
    with refused(cg.RuleError, "stationarity=True"):
        Exhausted()(solution)
    with refused(cg.RuleError, "multipliers"):
        Exhausted()(replace(solution, stationarity=1.0, multipliers={}))
    for name in ("ratio", "significance"):
        with refused(cg.RuleError, f"{name}=-1"):
            Exhausted(**{name: -1})
