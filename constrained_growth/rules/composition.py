"""Rules made of rules."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, overload

from constrained_growth._later import with_fields
from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules.rule import (
    DecisionRule,
    Rule,
    check_question,
    check_sensitivities,
    decide,
    decide_about,
    needs_model,
    refuse_no_rule,
)
from constrained_growth.solution import Decision, Sensitivity, Solution


@overload
def then(*rules: DecisionRule) -> DecisionRule: ...
@overload
def then(*rules: Rule) -> Rule: ...
def then(*rules: Rule) -> Rule:
    """Rules in sequence: each decides about the candidates that the previous one chose.

    The last rule decides where a layer starts: `then(TopK(3), TrustRegion())` spends second-order
    information on three candidates only. Once nothing is chosen, the remaining rules are not
    asked. With several processes, the rules must decide the same on all of them, as those of this
    library do.

    Returns:
        A function of the sensitivities if all rules are; otherwise a rule with a method `decide`.

    Raises:
        RuleError: There are no rules, or an argument is not a rule.

    Example:
        >>> from constrained_growth.rules import Threshold, TopK
        >>> given = {"a": Sensitivity(0.2), "b": Sensitivity(0.5), "c": Sensitivity(0.4)}
        >>> then(Threshold(absolute=0.3), TopK(1))(given).chosen
        ('b',)
    """
    return _composed(rules, "then")


@overload
def otherwise(*rules: DecisionRule) -> DecisionRule: ...
@overload
def otherwise(*rules: Rule) -> Rule: ...
def otherwise(*rules: Rule) -> Rule:
    """The decision of the first rule that chooses anything.

    All rules decide about the same candidates. `then(TopK(1), otherwise(TrustRegion(), TopK(1)))`
    starts the best candidate at the step of a trust region, or at its pins if no step is accepted.
    Arguments, what is returned and raised, and several processes: as with `then`.

    Example:
        >>> from constrained_growth.rules import Threshold, TopK
        >>> given = {"a": Sensitivity(0.2), "b": Sensitivity(0.5)}
        >>> otherwise(Threshold(absolute=0.9), TopK(1))(given).chosen
        ('b',)
    """
    return _composed(rules, "otherwise")


@dataclass(frozen=True, repr=False)
class _Rules:
    rules: tuple[Rule, ...]
    word: str

    def __repr__(self) -> str:
        return f"{self.word}({', '.join(map(repr, self.rules))})"

    def state_dict(self) -> dict[str, Any]:
        """The states of the rules that have one, by index, to be saved in a checkpoint."""
        rules: dict[str, Any] = {str(i): rule for i, rule in enumerate(self.rules)}
        return {i: r.state_dict() for i, r in rules.items() if hasattr(r, "state_dict")}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Continue from a saved state; a RuleError if it is that of other rules."""
        if not isinstance(state_dict, Mapping) or state_dict.keys() != self.state_dict().keys():
            wanted = f"{self!r}, which has the keys {sorted(self.state_dict())}"
            raise RuleError(f"state_dict={state_dict!r} is not that of {wanted}.")
        for i, state in state_dict.items():
            rule: Any = self.rules[int(i)]
            rule.load_state_dict(state)

    def _decision(
        self,
        sensitivities: Mapping[str, Sensitivity],
        ask: Callable[[Any, Mapping[str, Sensitivity]], Decision],
    ) -> Decision:
        """The last decision, with the reasons, the evidence and the summed cost of all."""
        first = self.word == "otherwise"
        decisions: list[Decision] = []
        for rule in self.rules:
            decisions.append(ask(rule, sensitivities))
            chosen = decisions[-1].chosen
            if bool(chosen) is first:  # `otherwise` has a choice, or `then` has nothing left
                break
            if not first:
                sensitivities = {n: s for n, s in sensitivities.items() if n in chosen}
        last, found = decisions[-1], [dict(decision.evidence) for decision in decisions]
        evidence = dict(last.evidence)
        if any(found[:-1]):
            own = [{"before": evidence["before"]}] if "before" in evidence else []
            evidence["before"] = [*found[:-1], *own]
        if passes := [one["passes"] for one in found if "passes" in one]:
            evidence["passes"] = sum(passes)
        reason = f"; {self.word} ".join(decision.reason for decision in decisions)
        return Decision(last.chosen, reason, last.values, evidence)


class _PlainRules(_Rules):
    """Rules that all need only the sensitivities."""

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        check_sensitivities(sensitivities)
        return self._decision(sensitivities, decide)


class _ModelRules(_Rules):
    """Rules of which at least one needs the model."""

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """The joint decision."""
        check_question(problem, solution)

        def ask(rule: Rule, some: Mapping[str, Sensitivity]) -> Decision:
            return decide_about(rule, problem, with_fields(solution, sensitivities=some))

        return self._decision(solution.sensitivities, ask)


def keeps_state(rule: object) -> bool:
    """Whether asking a rule may change what it says the next time."""
    if isinstance(rule, _Rules):
        return any(map(keeps_state, rule.rules))
    return hasattr(rule, "state_dict")


def _composed(rules: tuple[Rule, ...], word: str) -> Any:
    for rule in rules:
        refuse_no_rule(f"{word}: rule", rule)
    if not rules:
        raise RuleError(
            f"{word} needs at least one rule, such as {word}(cg.TopK(3), cg.Stable(…))."
        )
    return (_ModelRules if any(map(needs_model, rules)) else _PlainRules)(rules, word)
