"""The public names; `import constrained_growth` imports them when the first one is used."""

import constrained_growth.blocks as blocks
import constrained_growth.checkpoint as checkpoint
import constrained_growth.curvature as curvature
import constrained_growth.norms as norms
import constrained_growth.rules as rules
import constrained_growth.statistics as statistics
from constrained_growth._data import rebatch
from constrained_growth._solve import solve
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
from constrained_growth.monitoring import monitor
from constrained_growth.problem import GrowthProblem
from constrained_growth.rules import Budget, Fixed, Random, Threshold, TopK, TrustRegion
from constrained_growth.solution import Constraint, Decision, Method, Sensitivity, Solution, Status
from constrained_growth.training import Grower, History, grow

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
