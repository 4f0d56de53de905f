"""Would another layer help this network, where, and what would it buy?

Imagine every insertable layer already present, its virtual parameters pinned to zero by
constraints. The Lagrange multipliers of these constraints are the answer, and cost one backward
pass.
"""

from constrained_growth import blocks, checkpoint, curvature, norms, rules, statistics
from constrained_growth._data import rebatch
from constrained_growth.candidates import Candidate, find_candidates
from constrained_growth.directional import directional_derivative
from constrained_growth.errors import (
    BlockError,
    CandidateError,
    CheckpointError,
    DataError,
    GrowthError,
    OptimizerError,
    RecordError,
    RuleError,
    TrainingError,
)
from constrained_growth.insertion import GrowthRecord, insert, replay, rewrap
from constrained_growth.monitor import monitor
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import Budget, Fixed, Random, Threshold, TopK, TrustRegion
from constrained_growth.solution import Constraint, Decision, Method, Sensitivity, Solution, Status
from constrained_growth.solve import solve
from constrained_growth.training import Grower, History, grow

__version__ = "0.1.0"

__all__ = [
    "BlockError",
    "Budget",
    "Candidate",
    "CandidateError",
    "CheckpointError",
    "Constraint",
    "DataError",
    "Decision",
    "Fixed",
    "Grower",
    "GrowthError",
    "GrowthProblem",
    "GrowthRecord",
    "History",
    "Method",
    "OptimizerError",
    "Random",
    "RecordError",
    "RuleError",
    "Sensitivity",
    "Solution",
    "Status",
    "Threshold",
    "TopK",
    "TrainingError",
    "TrustRegion",
    "blocks",
    "checkpoint",
    "curvature",
    "directional_derivative",
    "find_candidates",
    "grow",
    "insert",
    "monitor",
    "norms",
    "rebatch",
    "replay",
    "rewrap",
    "rules",
    "solve",
    "statistics",
]


def __dir__() -> list[str]:
    """The public names alone, not the modules that hold them."""
    return [*__all__, "__version__"]
