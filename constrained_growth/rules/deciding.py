"""Asking a rule, of either kind, and what may be wrong with its answer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from types import MappingProxyType

import torch

from constrained_growth._sites.untouched import untouched
from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules.protocol import DecisionRule, Rule, needs_model
from constrained_growth.solution import Decision, Sensitivity, Solution


def decide_about(rule: Rule, problem: GrowthProblem, solution: Solution) -> Decision:
    """What a rule of either kind decides about a solution, if it is a decision about it.

    Raises:
        RuleError: It is not.
    """
    if not needs_model(rule):
        return decide(rule, solution.sensitivities)
    with torch.inference_mode(False), untouched(problem.model, problem.data):
        return checked_decision(rule, rule.decide(problem, solution), solution.sensitivities)


def decide(rule: DecisionRule, sensitivities: Mapping[str, Sensitivity]) -> Decision:
    """What a rule that needs the sensitivities alone decides, if it is a decision about them.

    Raises:
        RuleError: It is not.
    """
    return checked_decision(rule, rule(MappingProxyType(dict(sensitivities))), sensitivities)


def checked_decision(
    rule: object, decision: object, sensitivities: Mapping[str, Sensitivity]
) -> Decision:
    """The decision, if it is one about these candidates.

    Raises:
        RuleError: It is not.
    """
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
            "each to be chosen at most once."
        )
    strangers = [name for name in decision.values if name not in decision.chosen]
    if strangers:
        raise RuleError(
            f"rule={rule!r} gives values for {strangers}, which it did not choose; it chose "
            f"{decision.chosen}."
        )
    return decision
