"""Conformance checks for your own rule."""

from __future__ import annotations

import copy
import functools
import json
import math
import pickle
import types
from collections.abc import Iterator
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from constrained_growth._random_state import seed as set_seed
from constrained_growth._sites.untouched import untouched
from constrained_growth._solve import solve
from constrained_growth.blocks import IdentityLinear, ResidualMLP
from constrained_growth.blocks.protocol import check_deviations
from constrained_growth.candidates import Candidate
from constrained_growth.errors import RuleError
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import Rule, needs_model
from constrained_growth.rules.rule import checked_decision, refuse_no_rule
from constrained_growth.solution import Decision, Solution
from constrained_growth.testing.block import listed, tried


def check_rule(rule: Rule, problem: GrowthProblem | None = None) -> None:
    """Check everything that the library relies on in a rule.

    The rule decides about the candidates it is shown, with a sentence for the reader, and with
    values, if any, that fit the pins. It copes with several candidates, one
    and none, with ties, with sensitivities of 0, and with unknown standard errors and baseline. It
    decides the same twice from the same state, and writes neither to what it is given nor to the
    model. It can be copied, pickled (unless it is a function) and restored from its `state_dict`,
    which it has if it remembers earlier decisions. A rule may refuse a case by a `RuleError`, but
    not all.

    Args:
        rule: The rule; copies of it are tried.
        problem: What to try it on. None (default) for a small network with three candidates at
            two sites; a rule that knows its candidates by name needs its own problem.

    Raises:
        RuleError: Lists everything that is wrong with the rule.

    Example:
        >>> import constrained_growth as cg
        >>> check_rule(cg.TopK(2))
        >>> check_rule(lambda sensitivities: cg.Decision(tuple(sensitivities)[:1], "the first"))
    """
    refuse_no_rule("rule", rule)
    problem = _small_problem() if problem is None else problem
    try:
        copy.deepcopy(rule)
    except Exception as error:
        raise RuleError(f"rule={rule!r} cannot be copied ({error}).") from error
    whole = solve(problem, lambda sensitivities: Decision())
    problems: list[str] = []
    for what, solution in _solutions(whole):
        case = _Case(rule, problem, what, solution)
        for check in (_looks_and_decides, *(_CHECKS_ON_THE_WHOLE if solution is whole else ())):
            problems += tried(check, case, f", shown {what}", (RuleError,))
    if problems:
        raise RuleError(f"rule={rule!r} does not do what is relied on:{listed(problems)}")


@dataclass
class _Case:
    """A rule to try on a solution; `what` describes what is special about that."""

    rule: Rule
    problem: GrowthProblem
    what: str
    solution: Solution

    @functools.cached_property
    def first(self) -> Decision | None:
        """What a copy of the rule decides first."""
        return self.ask(copy.deepcopy(self.rule))

    def ask(self, rule: Rule) -> Decision | None:
        """The decision of a copy of the rule from a fixed random state; None if it refuses."""
        # which raises where a rule writes to it
        shown = types.MappingProxyType(dict(self.solution.sensitivities))
        with untouched(self.problem.model, self.problem.loss_fn, self.problem.data):
            set_seed(0)
            try:
                known = (self.problem, self.solution)
                decision = rule.decide(*known) if needs_model(rule) else rule(shown)
            except RuleError:
                return None
        return checked_decision(rule, decision, shown)

    def agrees(self, rule: Rule) -> bool:
        """Whether a copy of the rule decides as it did first."""
        return _facts(self.ask(rule)) == _facts(self.first)


def _facts(decision: Decision | None) -> object:
    """A decision as something to compare."""
    if decision is None:
        return None
    values = {
        (name, key): value.tolist()
        for name, tensors in decision.values.items()
        for key, value in tensors.items()
    }
    return decision.chosen, decision.reason, values, repr(decision.evidence)


def _looks_and_decides(case: _Case) -> Iterator[str]:
    """It decides about what it is shown, the same each time, and writes to nothing."""
    before = _snapshot(case)
    decision = case.first
    after = _snapshot(case)
    changed = [what for what in before if not _equal(before[what], after[what])]
    if changed:
        yield f"it changes {' and '.join(changed)}; a rule looks and decides ({case.what})."
    for name, values in (decision.values if decision else {}).items():
        block = case.solution.candidates[name].block
        check_deviations(block, values, f'values["{name}"]', RuleError)
    if not case.agrees(copy.deepcopy(case.rule)):
        yield f"two copies of it decide differently about the same ({case.what}); seed it."


def _can_be_pickled(case: _Case) -> Iterator[str]:
    """It can be pickled, unless it is a function."""
    if isinstance(case.rule, types.FunctionType):
        return
    if not case.agrees(pickle.loads(pickle.dumps(case.rule))):
        yield "after pickling it decides differently."


def _can_be_restored(case: _Case) -> Iterator[str]:
    """It goes on from its state dict, which it has if it remembers anything."""
    used: Any = copy.deepcopy(case.rule)
    case.ask(used)
    if not hasattr(case.rule, "state_dict"):
        if not all(case.agrees(used) for _ in range(3)):
            yield (
                "asked again it decides differently, and it has no state_dict: resumed from a "
                "checkpoint a run would decide otherwise; write state_dict and load_state_dict."
            )
        return
    restored: Any = copy.deepcopy(case.rule)
    restored.load_state_dict(json.loads(json.dumps(used.state_dict())))
    if _facts(case.ask(restored)) != _facts(case.ask(used)):
        yield "restored from its state_dict it decides differently; put all it remembers in there."


def _decides_at_all(case: _Case) -> Iterator[str]:
    """It decides about what it is made for."""
    if case.first is None:
        try:
            solve(case.problem, copy.deepcopy(case.rule))
        except RuleError as error:
            yield f"it refuses to decide about {case.what} ({error}); give check_rule a problem."


_CHECKS_ON_THE_WHOLE = (_can_be_pickled, _can_be_restored, _decides_at_all)


def _small_problem() -> GrowthProblem:
    """A network with three candidates at two sites, always the same."""
    with torch.random.fork_rng(devices=[]):
        set_seed(0)
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


def _solutions(whole: Solution) -> Iterator[tuple[str, Solution]]:
    """Solutions to try a rule on, in words and as they are; the whole one first."""
    names = list(whole.sensitivities)
    unknown = {"standard_error": math.nan, "variance": math.nan, "baseline": None}

    def about(names: list[str], **changes: Any) -> Solution:
        kept = {name: replace(whole.sensitivities[name], **changes) for name in names}
        return replace(whole, sensitivities=kept)

    yield "all candidates", whole
    yield "one candidate", about(names[:1])
    yield "no candidates", about([])
    yield "sensitivities of 0", about(names, value=0.0, variance=0.0)
    yield "a tie", about(names, value=1.0)
    yield "unknown standard errors and no baseline", about(names, **unknown)


def _snapshot(case: _Case) -> dict[str, Any]:
    """Everything a rule is shown and could write to."""
    model, solution = case.problem.model, case.solution
    blocks = [candidate.block for candidate in solution.candidates.values()]
    multipliers = [value for tensors in solution.multipliers.values() for value in tensors.values()]
    return {
        # what is computed when it is first read belongs to them
        "the sensitivities": repr([(s.standard_error, s) for s in solution.sensitivities.values()]),
        "the multipliers": [value.clone() for value in multipliers],
        "the parameters of the model": [p.detach().clone() for p in model.parameters()],
        "the modules of the model": [(name, id(m)) for name, m in model.named_modules()],
        "which parameters are trained": [p.requires_grad for p in model.parameters()],
        "the blocks": [p.detach().clone() for block in blocks for p in block.parameters()],
    }


def _equal(one: Any, other: Any) -> bool:
    if isinstance(one, list) and one and isinstance(one[0], Tensor):
        return len(one) == len(other) and all(map(torch.equal, one, other))
    return one == other
