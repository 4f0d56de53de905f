"""From sensitivities to a decision.

A rule is anything callable as `rule(sensitivities) -> Decision`, where `sensitivities` maps the
names of the candidates to `Sensitivity`; or, if it has to evaluate the model, anything with a
method `decide(problem, solution) -> Decision`. Nothing else is required.
"""

from constrained_growth.rules.budget import Budget, half_square
from constrained_growth.rules.composition import otherwise, then
from constrained_growth.rules.controls import Fixed, LeastImportant, Placed, Random
from constrained_growth.rules.plateau import Exhausted, Plateau, When
from constrained_growth.rules.recommendation import rule_for
from constrained_growth.rules.rule import DecisionRule, ModelRule, Rule, needs_model
from constrained_growth.rules.selection import Generalizes, Threshold, TopK
from constrained_growth.rules.stability import Stable
from constrained_growth.rules.trial import Trial
from constrained_growth.rules.trust_region import TrustRegion

__all__ = [
    "Budget",
    "DecisionRule",
    "Exhausted",
    "Fixed",
    "Generalizes",
    "LeastImportant",
    "ModelRule",
    "Placed",
    "Plateau",
    "Random",
    "Rule",
    "Stable",
    "Threshold",
    "TopK",
    "Trial",
    "TrustRegion",
    "When",
    "half_square",
    "needs_model",
    "otherwise",
    "rule_for",
    "then",
]
