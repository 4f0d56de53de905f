"""Rules made of rules."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from typing import Any, overload

from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules.deciding import checked_decision
from constrained_growth.rules.protocol import DecisionRule, Rule, needs_model
from constrained_growth.solution import Decision, Sensitivity, Solution


@overload
def then(*rules: DecisionRule) -> DecisionRule: ...
@overload
def then(*rules: Rule) -> Rule: ...
def then(*rules: Rule) -> Rule:
    """One rule after the other, each deciding about what the one before it has chosen.

    The last one has the last word, also about where a layer starts. So
    `then(Threshold(relative=1.0), TopK(1))` takes the best of those above the bar, and
    `then(TopK(3), TrustRegion())` spends second-order information on three candidates only. A
    rule that finds nothing left is not asked. On several processes the rules must decide alike on
    all of them, as those of this library do.

    Args:
        *rules: At least one.

    Returns:
        A function of the sensitivities where all of them are; otherwise a rule that is asked with
        the problem.

    Raises:
        RuleError: There is none, or something is no rule.

    Example:
        >>> from constrained_growth.rules import Threshold, TopK
        >>> given = {"a": Sensitivity(0.2), "b": Sensitivity(0.5), "c": Sensitivity(0.4)}
        >>> then(Threshold(absolute=0.3), TopK(1))(given).chosen
        ('b',)
    """
    plain = _plain(rules, "then")
    return ModelChain(rules) if plain is None else Chain(plain)


@overload
def otherwise(*rules: DecisionRule) -> DecisionRule: ...
@overload
def otherwise(*rules: Rule) -> Rule: ...
def otherwise(*rules: Rule) -> Rule:
    """The first rule that chooses anything.

    All decide about the same candidates; one that inserts nothing passes the question on. So
    `then(TopK(1), otherwise(TrustRegion(), TopK(1)))` lets the best candidate start at the step
    of a trust region, and at its pins where no step is accepted. On several processes the rules
    must decide alike on all of them, as those of this library do, so that all ask the same ones.

    Args:
        *rules: At least one.

    Returns:
        A function of the sensitivities where all of them are; otherwise a rule that is asked with
        the problem.

    Raises:
        RuleError: There is none, or something is no rule.

    Example:
        >>> from constrained_growth.rules import Threshold, TopK
        >>> given = {"a": Sensitivity(0.2), "b": Sensitivity(0.5)}
        >>> otherwise(Threshold(absolute=0.9), TopK(1))(given).chosen
        ('b',)
    """
    plain = _plain(rules, "otherwise")
    return ModelFallback(rules) if plain is None else Fallback(plain)


def _plain(rules: tuple[Rule, ...], of: str) -> tuple[DecisionRule, ...] | None:
    """The rules, if none of them has to ask the model."""
    for rule in rules:
        if isinstance(rule, type) or not (callable(rule) or needs_model(rule)):
            raise RuleError(f"rule={rule!r} of {of} is no rule; give cg.TopK(1), say.")
    if not rules:
        raise RuleError(
            f"{of} needs at least one rule, such as {of}(cg.TopK(3), cg.TrustRegion())."
        )
    plain = tuple(rule for rule in rules if not needs_model(rule))
    return plain if len(plain) == len(rules) else None


@dataclass(frozen=True)
class _Composed:
    """Rules, and what they remember."""

    rules: tuple[Rule, ...]

    def state_dict(self) -> dict[str, Any]:
        """What those of the rules remember that remember something, to be saved in a checkpoint."""
        rules: dict[str, Any] = {str(i): rule for i, rule in enumerate(self.rules)}
        return {i: r.state_dict() for i, r in rules.items() if hasattr(r, "state_dict")}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what was saved.

        Raises:
            RuleError: It is not from as many rules with a state at the same places.
        """
        if not isinstance(state_dict, Mapping) or state_dict.keys() != self.state_dict().keys():
            raise RuleError(
                f"state_dict={state_dict!r} is not that of {self!r}, whose rules with a state are "
                f"those numbered {sorted(self.state_dict())}."
            )
        for i, state in state_dict.items():
            rule: Any = self.rules[int(i)]
            rule.load_state_dict(state)


@dataclass(frozen=True)
class Chain(_Composed):
    """Rules that need the sensitivities alone, one after the other; see `then`."""

    rules: tuple[DecisionRule, ...]

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """What the last one chooses of what the others have left."""
        left, decisions = dict(sensitivities), []
        for rule in self.rules:
            decisions.append(checked_decision(rule, rule(left), left))
            left = {name: left[name] for name in left if name in decisions[-1].chosen}
            if not left:
                break
        return _together(decisions, "then")


@dataclass(frozen=True)
class ModelChain(_Composed):
    """Rules of both kinds, one after the other; see `then`."""

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """What the last one chooses of what the others have left."""
        decisions = []
        for rule in self.rules:
            decisions.append(_asked(rule, problem, solution))
            solution = _only(solution, decisions[-1].chosen)
            if not decisions[-1].chosen:
                break
        return _together(decisions, "then")


@dataclass(frozen=True)
class Fallback(_Composed):
    """Rules that need the sensitivities alone, until one chooses anything; see `otherwise`."""

    rules: tuple[DecisionRule, ...]

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """What the first one chooses that chooses anything."""
        return _first(checked_decision(r, r(sensitivities), sensitivities) for r in self.rules)


@dataclass(frozen=True)
class ModelFallback(_Composed):
    """Rules of both kinds, until one chooses anything; see `otherwise`."""

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """What the first one chooses that chooses anything."""
        return _first(_asked(rule, problem, solution) for rule in self.rules)


def _first(decided: Iterable[Decision]) -> Decision:
    decisions = []
    for decision in decided:
        decisions.append(decision)
        if decision.chosen:
            break
    return _together(decisions, "otherwise")


def _asked(rule: Rule, problem: GrowthProblem, solution: Solution) -> Decision:
    asked = needs_model(rule)
    decision = rule.decide(problem, solution) if asked else rule(solution.sensitivities)
    return checked_decision(rule, decision, solution.sensitivities)


def _only(solution: Solution, names: tuple[str, ...]) -> Solution:
    """The same solution as if there were no other candidates, in the order of the problem."""
    sensitivities = {n: s for n, s in solution.sensitivities.items() if n in names}
    return replace(solution, sensitivities=sensitivities)


def _together(decisions: list[Decision], word: str) -> Decision:
    """The last one, with the reasons of all, and the evidence of all where there is any."""
    last = decisions[-1]
    found = [dict(decision.evidence) for decision in decisions]
    evidence = dict(last.evidence)
    if any(found[:-1]):
        own = [{"before": evidence["before"]}] if "before" in evidence else []
        evidence["before"] = [*found[:-1], *own]
    passes = [one["passes"] for one in found if "passes" in one]
    if passes:
        evidence["passes"] = sum(passes)
    reason = f"; {word} ".join(decision.reason for decision in decisions)
    return Decision(last.chosen, reason, last.values, evidence)
