"""What a rule is, how it is asked, and which answers are decisions."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from typing_extensions import TypeIs

from constrained_growth._sites.untouched import untouched
from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.solution import Decision, Sensitivity, Solution

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
"""`(parameters) -> optimizer`, such as `functools.partial(torch.optim.SGD, lr=0.1)`."""


class DecisionRule(Protocol):
    """A rule that needs only the sensitivities; a plain function fits."""

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """Decide which candidates to insert; `Decision(chosen=())` inserts nothing.

        Args:
            sensitivities: Candidate → sensitivity, in the order of the problem.
        """
        ...


@runtime_checkable
class ModelRule(Protocol):
    """A rule that also evaluates the model, such as `TrustRegion`."""

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """Decide which candidates to insert, and leave model and data as they are.

        Args:
            problem: The problem that was solved.
            solution: Its solution, with an empty decision. The candidates are those in
                `solution.sensitivities`; the problem may have more.
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
    with torch.inference_mode(False), untouched(problem.model, problem.data):
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
    named = isinstance(decision.chosen, Iterable) and not isinstance(decision.chosen, str)
    if not named or not all(isinstance(name, str) for name in decision.chosen):
        raise RuleError(f"rule={rule!r} chose {decision.chosen!r}, not a tuple of names.")
    unknown = [name for name in decision.chosen if name not in sensitivities]
    if unknown or len(set(decision.chosen)) != len(decision.chosen):
        raise RuleError(
            f"rule={rule!r} chose {decision.chosen}; the candidates are {tuple(sensitivities)}, "
            "and each may be chosen at most once."
        )
    strangers = [name for name in decision.values if name not in decision.chosen]
    if strangers:
        raise RuleError(
            f"rule={rule!r} gives values for {strangers}, which it did not choose; it chose "
            f"{decision.chosen}."
        )
    return decision


def check_count(name: str, value: object, owner: str) -> None:
    """Raise a RuleError unless an argument of a rule is a positive whole number."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 1:
        raise RuleError(f"{name}={value!r} of {owner} is not a positive whole number.")


def check_optimizer(optimizer: object, owner: str) -> None:
    """Raise a RuleError unless an argument of a rule is an optimizer or can make one."""
    if not (callable(optimizer) or isinstance(optimizer, torch.optim.Optimizer)):
        raise RuleError(
            f"optimizer={optimizer!r} of {owner} is neither an optimizer nor a function that makes "
            "one; pass functools.partial(torch.optim.SGD, lr=0.1), say."
        )


def check_curvature(curvature: object, owner: str) -> None:
    """Raise a RuleError unless an argument of a rule can be called as a `Curvature`."""
    if not callable(curvature):
        raise RuleError(
            f"curvature={curvature!r} of {owner} cannot be called; pass cg.curvature.hessian or "
            "cg.curvature.gauss_newton."
        )
