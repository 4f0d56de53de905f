"""Conformance checks for a user's own rule."""

from __future__ import annotations

import copy
import json
import math
import pickle
import types
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._sites.untouched import untouched
from constrained_growth.blocks import IdentityLinear, ResidualMLP, pinned_parameters
from constrained_growth.candidates.candidate import Candidate
from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import Rule, needs_model
from constrained_growth.rules.rule import checked_decision
from constrained_growth.solution import Decision, Solution
from constrained_growth.solve import solve
from constrained_growth.testing.case import said


def check_rule(rule: Rule, problem: GrowthProblem | None = None) -> None:
    """Try all that the library relies on in a rule.

    That it gives a decision about the candidates it is shown, with a sentence for the reader,
    evidence that JSON takes, and values, if any, that fit the pins; about several candidates, one
    and none, about ties and about candidates of sensitivity 0, where standard errors and baseline
    are not known; that it decides the same twice; that it writes neither to what it is given nor
    to the model; and that it can be copied, pickled (unless it is a function) and, if it has a
    `state_dict`, restored from that. A rule may refuse a case by a `RuleError`, but not all.

    Args:
        rule: The rule; what is tried are copies of it.
        problem: What to try it on. None (default) for a small network with three candidates at
            two sites; a rule that knows its candidates by name needs one of its own.

    Raises:
        RuleError: Says all that is wrong with the rule.

    Example:
        >>> import constrained_growth as cg
        >>> check_rule(cg.TopK(2))
        >>> check_rule(lambda sensitivities: cg.Decision(tuple(sensitivities)[:1], "the first"))
    """
    if isinstance(rule, type) or not (callable(rule) or needs_model(rule)):
        raise RuleError(
            f"rule={rule!r} can neither be called nor has a method decide(problem, solution); a "
            "rule is a function from sensitivities to a cg.Decision, or has that method."
        )
    problem = _small_problem() if problem is None else problem
    try:
        copy.deepcopy(rule)
    except Exception as error:
        raise RuleError(f"rule={rule!r} cannot be copied ({said(error)}).") from error
    whole = solve(problem, lambda sensitivities: Decision())
    cases = [Case(rule, problem, what, shown) for what, shown in _shown(whole)]
    problems = [p for case in cases for check in _CHECKS for p in _tried(check, case)]
    problems += [p for check in _ON_ALL for p in _tried(check, cases[0])]
    if problems:
        found = "".join(f"\n  * {problem}" for problem in dict.fromkeys(problems))
        raise RuleError(f"rule={rule!r} does not do what is relied on:{found}")


@dataclass(frozen=True)
class Case:
    """A rule to try on a solution.

    Attributes:
        rule: The rule.
        problem: Of the solution.
        what: What the rule is shown, in words.
        solution: That.
    """

    rule: Rule
    problem: GrowthProblem
    what: str
    solution: Solution

    def asked(self, rule: Rule | None = None) -> Decision | None:
        """What the rule (or this one) decides, from the same random state; None if it refuses."""
        rule = copy.deepcopy(self.rule) if rule is None else rule
        sensitivities = types.MappingProxyType(dict(self.solution.sensitivities))
        with untouched(self.problem.model, self.problem.data):
            torch.manual_seed(0)
            try:
                if needs_model(rule):
                    decision = rule.decide(self.problem, self.solution)
                else:
                    decision = rule(sensitivities)
            except RuleError:
                return None
        return checked_decision(rule, decision, sensitivities)


def decides_about_candidates(case: Case) -> Iterator[str]:
    """It decides about the candidates that it is shown."""
    decision = case.asked()
    if decision is None:
        return
    if not isinstance(decision.reason, str):
        yield f"reason={decision.reason!r} is not a sentence ({case.what})."
    try:
        json.dumps(decision.evidence, allow_nan=False)
    except (TypeError, ValueError) as error:
        yield f"JSON does not take its evidence ({error}); give plain finite numbers and texts."
    for name, values in decision.values.items():
        pins = pinned_parameters(case.solution.candidates[name].block)
        for key, value in values.items():
            fits = key in pins and isinstance(value, Tensor) and value.shape == pins[key].shape
            if not fits or not bool(value.isfinite().all()):
                yield (
                    f'values["{name}"]["{key}"] is no finite tensor in the shape of a pinned '
                    f"parameter ({ {k: tuple(p.shape) for k, p in pins.items()} })."
                )


def decides_the_same_twice(case: Case) -> Iterator[str]:
    """It decides the same about the same."""
    if _facts(case.asked()) != _facts(case.asked()):
        yield (
            f"two copies of it decide differently about the same ({case.what}); draw from a "
            "generator of its own with a seed."
        )


def leaves_things_alone(case: Case) -> Iterator[str]:
    """It writes neither to what it is given nor to the model."""
    before = _snapshot(case)
    case.asked()
    after = _snapshot(case)
    changed = [what for what in before if not _equal(before[what], after[what])]
    if changed:
        yield f"it changes {' and '.join(changed)}; a rule looks and decides ({case.what})."


def can_be_pickled(case: Case) -> Iterator[str]:
    """It can be pickled, unless it is a function."""
    if isinstance(case.rule, types.FunctionType):
        return
    again = pickle.loads(pickle.dumps(case.rule))
    if _facts(case.asked(again)) != _facts(case.asked()):
        yield "after pickling it decides differently."


def can_be_restored(case: Case) -> Iterator[str]:
    """It goes on from its state dict, if it has one."""
    if not hasattr(case.rule, "state_dict"):
        return
    used: Any = copy.deepcopy(case.rule)
    case.asked(used)
    restored: Any = copy.deepcopy(case.rule)
    restored.load_state_dict(json.loads(json.dumps(used.state_dict())))
    if _facts(case.asked(restored)) != _facts(case.asked(used)):
        yield "restored from its state_dict it decides differently; put all it remembers in there."


def decides_at_all(case: Case) -> Iterator[str]:
    """It decides about what it is made for."""
    if case.asked() is None:
        rule = copy.deepcopy(case.rule)
        try:
            solve(case.problem, rule)
        except RuleError as error:
            yield f"it refuses to decide about {case.what} ({error}); give check_rule a problem."


_CHECKS = (decides_about_candidates, decides_the_same_twice, leaves_things_alone)
_ON_ALL = (can_be_pickled, can_be_restored, decides_at_all)


def _tried(check: Callable[[Case], Iterator[str]], case: Case) -> Iterator[str]:
    try:
        yield from check(case)
    except RuleError as error:
        yield str(error)
    except Exception as error:
        what = (check.__doc__ or "").rstrip(".")
        yield f"it fails where this is tried: {what}, shown {case.what} ({said(error)})."


def _small_problem() -> GrowthProblem:
    """A network with three candidates at two sites, the same each time."""
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(0)
        model = nn.Sequential(
            nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 4), nn.ReLU(), nn.Linear(4, 3)
        )
        data = [(torch.randn(8, 2), torch.randint(3, (8,))) for _ in range(3)]
        candidates = [
            Candidate("1", IdentityLinear(4, nn.ReLU())),
            Candidate("1", ResidualMLP(4, 2, nn.Tanh()), name="branch"),
            Candidate("3", IdentityLinear(4, nn.ReLU())),
        ]
    return GrowthProblem(model, nn.CrossEntropyLoss(), data, candidates)


def _shown(whole: Solution) -> Iterator[tuple[str, Solution]]:
    """Solutions to try a rule on, in words and as they are; the whole one first."""
    sensitivities = whole.sensitivities
    names = list(sensitivities)
    yield "all candidates", whole
    yield "one candidate", _with(whole, {names[0]: {}})
    yield "no candidates", _with(whole, {})
    yield "sensitivities of 0", _with(whole, {n: {"value": 0.0, "variance": 0.0} for n in names})
    yield "a tie", _with(whole, {name: {"value": 1.0} for name in names})
    unknown = {"standard_error": math.nan, "variance": math.nan, "baseline": None}
    yield "unknown standard errors and no baseline", _with(whole, dict.fromkeys(names, unknown))


def _with(whole: Solution, changes: Mapping[str, Mapping[str, Any]]) -> Solution:
    """The same solution about some candidates, with other numbers."""
    sensitivities = whole.sensitivities
    changed = {name: replace(sensitivities[name], **changes[name]) for name in changes}
    return replace(whole, sensitivities=changed)


def _facts(decision: Decision | None) -> object:
    """A decision as something to compare."""
    if decision is None:
        return None
    values = {
        (name, key): value.tolist() if isinstance(value, Tensor) else value
        for name, tensors in decision.values.items()
        for key, value in tensors.items()
    }
    return decision.chosen, decision.reason, values, repr(decision.evidence)


def _snapshot(case: Case) -> dict[str, Any]:
    """All that a rule is shown and could write to, as values."""
    model = case.problem.model
    hooks = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")
    return {
        "the sensitivities": repr(dict(case.solution.sensitivities)),
        "the multipliers": [
            value.clone()
            for tensors in case.solution.multipliers.values()
            for value in tensors.values()
        ],
        "the parameters of the model": [p.detach().clone() for p in model.parameters()],
        "the modules of the model": [(name, id(m)) for name, m in model.named_modules()],
        "the hooks of the model": [len(getattr(m, h)) for m in model.modules() for h in hooks],
        "which parameters are trained": [p.requires_grad for p in model.parameters()],
        "the blocks": [
            p.detach().clone()
            for planned in case.solution.candidates.values()
            for p in planned.block.parameters()
        ],
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and one and isinstance(one[0], Tensor):
        same = len(one) == len(other)
        return same and all(torch.equal(a, b) for a, b in zip(one, other, strict=True))
    return one == other
