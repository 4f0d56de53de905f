"""Candidates: layers that could be inserted, and where."""

from constrained_growth.candidates.candidate import Candidate, Proposals
from constrained_growth.candidates.discovery import find_candidates

__all__ = [
    "Candidate",
    "Proposals",
    "find_candidates",
]
