"""Where a layer could stand, and which one."""

from constrained_growth.candidates.candidate import Candidate
from constrained_growth.candidates.discovery import find_candidates
from constrained_growth.candidates.proposals import Proposals

__all__ = [
    "Candidate",
    "Proposals",
    "find_candidates",
]
