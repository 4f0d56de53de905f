"""What `check_rule` lets pass, and what it finds."""

import functools
import itertools
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
from helpers import candidate, classified, feedforward, nothing_left_behind, refused, solved
from torch import nn

import constrained_growth as cg
from constrained_growth.rules import Fixed
from constrained_growth.testing import check_rule

Sensitivities = Mapping[str, cg.Sensitivity]
SGD = functools.partial(torch.optim.SGD, lr=0.1)


@pytest.mark.parametrize(
    "rule",
    [
        cg.TopK(1),
        cg.TopK(2),
        cg.Threshold(absolute=0.01),
        cg.Threshold(relative=0.5),
        cg.Threshold(confidence=0.9),
        cg.Random(seed=3),
        Fixed(0),
        Fixed(-1),
        cg.Budget(parameters=40),
        cg.Budget(multiply_adds=40, per_site=None),
        cg.TrustRegion(max_products=3),
        cg.rules.Trial(4, SGD),
        cg.rules.Stable(SGD, max_products=2),
        cg.rules.then(cg.TopK(1), cg.rules.Stable(SGD)),
        cg.rules.then(cg.TopK(1), cg.TrustRegion(max_products=3)),
        cg.rules.then(cg.Threshold(absolute=0.0), cg.TopK(1)),
    ],
    ids=lambda rule: type(rule).__name__,
)
def test_the_rules_of_the_library_pass(rule: Any) -> None:
    check_rule(rule)


def test_a_problem_of_ones_own() -> None:
    model, data = feedforward(2, 4, 3), classified(30, batch=10)
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, [candidate(name="mine")])
    with nothing_left_behind(model):
        check_rule(Fixed("mine"), problem)
    with refused(cg.RuleError, "refuses", "all candidates", "give check_rule a problem"):
        check_rule(Fixed("mine"))


def nothing_at_all(sensitivities: Sensitivities) -> Any:
    return None


def strangers(sensitivities: Sensitivities) -> cg.Decision:
    return cg.Decision(("nobody",))


def largest_of_none(sensitivities: Sensitivities) -> cg.Decision:
    return cg.Decision((max(sensitivities, key=lambda n: sensitivities[n].value),))


def most_per_error(sensitivities: Sensitivities) -> cg.Decision:
    ratio = {n: 1 / s.value for n, s in sensitivities.items()}
    return cg.Decision(tuple(ratio)[:1])


def writer(sensitivities: Sensitivities) -> cg.Decision:
    sensitivities.clear()  # type: ignore[attr-defined]
    return cg.Decision()


def not_json(sensitivities: Sensitivities) -> cg.Decision:
    return cg.Decision((), "", {}, {"value": {torch.ones(3)}})


def misfit(sensitivities: Sensitivities) -> cg.Decision:
    names = tuple(sensitivities)[:1]
    return cg.Decision(names, "", {name: {"weight": torch.ones(2)} for name in names})


_tosses = itertools.count()


def moody(sensitivities: Sensitivities) -> cg.Decision:
    return cg.Decision(tuple(sensitivities)[: next(_tosses) % 2])


@pytest.mark.parametrize(
    ("rule", "words"),
    [
        (nothing_at_all, ["returned None", "not a cg.Decision"]),
        (strangers, ["nobody", "the candidates are"]),
        (largest_of_none, ["no candidates", "ValueError"]),
        (most_per_error, ["sensitivities of 0", "ZeroDivisionError"]),
        (writer, ["AttributeError"]),
        (not_json, ["JSON", "evidence"]),
        (misfit, ['values["1"]["weight"]', "(4, 4)"]),
        (moody, ["decide differently"]),
    ],
)
def test_what_is_wrong_is_said(rule: Callable[..., Any], words: list[str]) -> None:
    with refused(cg.RuleError, "does not do what is relied on", *words):
        check_rule(rule)


class Trainer:
    """Takes a step, though it should only look."""

    def decide(self, problem: cg.GrowthProblem, solution: cg.Solution, /) -> cg.Decision:
        with torch.no_grad():
            next(problem.model.parameters()).add_(1e-3)
        return cg.Decision()


class Spoiler:
    """Scales the multipliers where they are."""

    def decide(self, problem: cg.GrowthProblem, solution: cg.Solution, /) -> cg.Decision:
        for multiplier in solution.multipliers.values():
            for value in multiplier.values():
                value.mul_(2)
        return cg.Decision()


class Hooked:
    """Leaves a hook behind."""

    def decide(self, problem: cg.GrowthProblem, solution: cg.Solution, /) -> cg.Decision:
        problem.model.register_forward_hook(lambda *_: None)
        return cg.Decision()


class Forgetful:
    """Alternates, and does not put it into its state dict."""

    def __init__(self) -> None:
        self.turn = 0

    def __call__(self, sensitivities: Sensitivities, /) -> cg.Decision:
        self.turn += 1
        return cg.Decision(tuple(sensitivities)[: self.turn % 2])

    def state_dict(self) -> dict[str, Any]:
        return {}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        pass


class InTurn:
    """Counts its decisions, and has no state dict."""

    def __init__(self) -> None:
        self.turn = 0

    def __call__(self, sensitivities: Sensitivities, /) -> cg.Decision:
        self.turn += 1
        return cg.Decision(tuple(sensitivities)[: self.turn % 3 // 2])


class Unpicklable:
    """Holds a function that cannot be pickled."""

    def __init__(self) -> None:
        self.key = lambda s: s.value

    def __call__(self, sensitivities: Sensitivities, /) -> cg.Decision:
        return cg.Decision()


@pytest.mark.parametrize(
    ("rule", "word"),
    [
        (Trainer(), "changes the parameters of the model"),
        (Spoiler(), "changes the multipliers"),
        (Forgetful(), "restored from its state_dict"),
        (InTurn(), "it has no state_dict"),
        (Unpicklable(), "It can be pickled"),
        (3, "can neither be called"),
        (cg.TopK, "rule=TopK is a class: give an instance"),
    ],
    ids=lambda value: type(value).__name__,
)
def test_objects_that_are_wrong(rule: Any, word: str) -> None:
    with refused(cg.RuleError, word):
        check_rule(rule)


def test_hooks_that_a_rule_leaves_behind_are_taken_off() -> None:
    model = feedforward(2, 4, 3)
    check_rule(Hooked())
    solved(model, classified(8), candidate(), rule=Hooked())
    assert not model._forward_hooks


def test_a_rule_that_remembers_is_not_used_up() -> None:
    rule = cg.TrustRegion(radius=0.01, max_products=1)
    check_rule(rule)
    assert rule.current_radius == 0.01
