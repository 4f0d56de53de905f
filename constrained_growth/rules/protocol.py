"""What a decision rule looks like."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import Protocol, runtime_checkable

import torch
from torch import nn
from typing_extensions import TypeIs

from constrained_growth.problem import GrowthProblem
from constrained_growth.solution import Decision, Sensitivity, Solution

OptimizerFactory = Callable[[Iterable[nn.Parameter]], torch.optim.Optimizer]
"""`(parameters) -> optimizer`, such as `functools.partial(torch.optim.SGD, lr=0.1)`."""


class DecisionRule(Protocol):
    """A rule that needs the sensitivities alone; a plain function fits."""

    def __call__(self, sensitivities: Mapping[str, Sensitivity], /) -> Decision:
        """Decide which candidates to insert.

        Args:
            sensitivities: Candidate → sensitivity, in the order of the problem.

        Returns:
            The decision; `Decision(chosen=())` inserts nothing.
        """
        ...


@runtime_checkable
class ModelRule(Protocol):
    """A rule that asks the model more than the sensitivities say, such as `TrustRegion`."""

    def decide(self, problem: GrowthProblem, solution: Solution, /) -> Decision:
        """Decide which candidates to insert, and leave model and data as they are.

        Args:
            problem: The problem that was solved.
            solution: Its solution, with an empty decision. The candidates to decide about are
                those of `solution.sensitivities`; the problem may have more.

        Returns:
            The decision; `Decision(chosen=())` inserts nothing.
        """
        ...


Rule = DecisionRule | ModelRule
"""What `solve` takes: a rule with a method `decide` is asked that way, any other is called."""


def needs_model(rule: object) -> TypeIs[ModelRule]:
    """Whether a rule is asked with the problem in hand, by its method `decide`."""
    return callable(getattr(rule, "decide", None))
