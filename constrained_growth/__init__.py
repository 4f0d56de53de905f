"""Would another layer help this network, where, and what would it buy?

Every layer that could be inserted is there in thought, its virtual parameters pinned to zero by
constraints; the Lagrange multipliers of these constraints are the answer, and cost one backward
pass.
"""

from constrained_growth import blocks, checkpoint, curvature, norms, rules, statistics
from constrained_growth._data import rebatch
from constrained_growth.candidates import Candidate, Proposals, find_candidates
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
from constrained_growth.insertion import GrowthRecord, InsertedLayer, insert, replay, rewrap
from constrained_growth.monitor import Monitor, monitor
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import (
    Budget,
    DecisionRule,
    Exhausted,
    Fixed,
    Plateau,
    Random,
    Stable,
    Threshold,
    TopK,
    Trial,
    TrustRegion,
    When,
    otherwise,
    then,
)
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
    "DecisionRule",
    "Exhausted",
    "Fixed",
    "Grower",
    "GrowthError",
    "GrowthProblem",
    "GrowthRecord",
    "History",
    "InsertedLayer",
    "Method",
    "Monitor",
    "OptimizerError",
    "Plateau",
    "Proposals",
    "Random",
    "RecordError",
    "RuleError",
    "Sensitivity",
    "Solution",
    "Stable",
    "Status",
    "Threshold",
    "TopK",
    "TrainingError",
    "Trial",
    "TrustRegion",
    "When",
    "blocks",
    "checkpoint",
    "curvature",
    "directional_derivative",
    "find_candidates",
    "grow",
    "insert",
    "monitor",
    "norms",
    "otherwise",
    "rebatch",
    "replay",
    "rewrap",
    "rules",
    "solve",
    "statistics",
    "then",
]
