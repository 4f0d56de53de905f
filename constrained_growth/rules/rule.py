"""What a rule is, how it is asked, and which answers are decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Protocol

import torch
from torch import nn
from typing_extensions import TypeIs

from constrained_growth._arguments import instance
from constrained_growth._sites.untouched import untouched
from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.solution import Decision, Sensitivity, Solution

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
"""`(parameters) -> optimizer`, such as `functools.partial(torch.optim.SGD, lr=0.1)`."""


class DecisionRule(Protocol):
    """A rule that needs only the sensitivities; a plain function fits."""

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """The decision, from candidate → sensitivity in the order of the problem."""
        ...


class ModelRule(Protocol):
    """A rule that also evaluates the model, such as `TrustRegion`."""

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """The decision about the candidates in `solution.sensitivities`.

        The problem may have more candidates, and the decision of the solution is empty.
        """
        ...


Rule = DecisionRule | ModelRule
"""What `solve` takes: if it has a method `decide`, that is called, otherwise the rule itself."""


def needs_model(rule: object) -> TypeIs[ModelRule]:
    """Whether a rule has a method `decide(problem, solution)`."""
    return callable(getattr(rule, "decide", None))


def decide_about(rule: Rule, problem: GrowthProblem, solution: Solution) -> Decision:
    """The checked decision of a rule of either kind; model and data stay as they are."""
    if not needs_model(rule):
        return decide(rule, solution.sensitivities)
    with torch.inference_mode(False), untouched(problem.model, problem.loss_fn, problem.data):
        return checked_decision(rule, rule.decide(problem, solution), solution.sensitivities)


def decide(rule: DecisionRule, sensitivities: Mapping[str, Sensitivity]) -> Decision:
    """The checked decision of a rule that needs only the sensitivities."""
    return checked_decision(rule, rule(MappingProxyType(dict(sensitivities))), sensitivities)


def checked_decision(
    rule: object, decision: object, sensitivities: Mapping[str, Sensitivity]
) -> Decision:
    """The decision; raises a RuleError if it is not one about these candidates."""
    if not isinstance(decision, Decision):
        raise RuleError(
            f"rule={rule!r} returned {decision!r}, not a cg.Decision; return "
            "cg.Decision(chosen=('name of a candidate', ...)), with () to insert nothing."
        )
    chosen = set(decision.chosen)
    if not chosen <= sensitivities.keys() or len(chosen) != len(decision.chosen):
        raise RuleError(
            f"rule={rule!r} chose {decision.chosen}; the candidates are {tuple(sensitivities)}, "
            "and each may be chosen at most once."
        )
    if not decision.values.keys() <= chosen:
        raise RuleError(
            f"rule={rule!r} gives values for {tuple(decision.values)} and chose {decision.chosen}."
        )
    return decision


def check_sensitivities(sensitivities: object) -> None:
    """Raise a RuleError unless a rule is called with candidate → sensitivity."""
    fix = "solution.sensitivities"
    given = instance("sensitivities", sensitivities, Mapping, RuleError, fix)
    for name, one in given.items():
        instance(f'sensitivities["{name}"]', one, Sensitivity, RuleError, fix)


def check_question(problem: object, solution: object) -> None:
    """Raise a RuleError unless a rule is asked about a problem and a solution of it."""
    instance("problem", problem, GrowthProblem, RuleError, "a cg.GrowthProblem")
    instance("solution", solution, Solution, RuleError, "what cg.solve(problem) returns")


def check_optimizer(optimizer: object, owner: str) -> None:
    """Raise a RuleError unless an argument of a rule is an optimizer or can make one."""
    if not (callable(optimizer) or isinstance(optimizer, torch.optim.Optimizer)):
        raise RuleError(
            f"optimizer={optimizer!r} of {owner} is neither an optimizer nor a function that makes "
            "one, such as functools.partial(torch.optim.SGD, lr=0.1)."
        )


def refuse_no_rule(name: str, rule: object) -> None:
    """Raise a RuleError unless an argument is a rule."""
    if isinstance(rule, type):
        fault = f"{rule.__name__} is a class: give an instance, such as"
    elif not (callable(rule) or needs_model(rule)):
        fault = f"{rule!r:.80} can neither be called nor has decide(problem, solution); give"
    else:
        return
    raise RuleError(
        f"{name}={fault} cg.TopK(1), or a function of the sensitivities that returns a cg.Decision."
    )
