"""Batches after the first, of which λ may be that of another network.

A loss can take derivatives, read hidden states or run a kept module on some batches only. Then it
makes another graph of them, and most often one with another number of nodes, which costs nothing
to know. A batch with a number that is new is looked at as the first one was.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace
from typing import Any

from constrained_growth._first_batch import look_at_another
from constrained_growth._sharding import is_sharded
from constrained_growth.bookkeeping import open_books
from constrained_growth.problem import GrowthProblem, listed_elements, places_of
from constrained_growth.solution import Method

_MOST = 4
"""Looked at are batches with so many numbers of nodes: a loop over steps may make one for each."""

Outcome = tuple[bool, set[str]]
"""Whether λ in closed form is right, and which candidates have to stand around their sites."""


def is_new(problem: GrowthProblem, nodes: int) -> bool:
    """Whether a batch of so many nodes is to be looked at."""
    return nodes not in problem.graphs and len(problem.graphs) < _MOST


def look_at(problem: GrowthProblem, batch: tuple[Any, Any], nodes: int) -> Outcome:
    """What it tells.

    Raises:
        CandidateError: A layer put in has another λ there, by no way that is known.
    """
    problem.graphs.add(nodes)
    if is_sharded(problem.model):
        return True, set()
    books = open_books(problem.model)
    places = places_of(problem.model, problem.candidates)
    around = {name for site in problem.sites for name in site.around}
    listed = listed_elements(books, places, known=True).items()
    inside = {name: counted for name, counted in listed if name not in around}
    return look_at_another(problem.model, problem.loss_fn, batch, problem.sites, books, inside)


def learn(problem: GrowthProblem, outcomes: Iterable[Outcome]) -> bool:
    """Take in what all processes saw; whether λ has to be measured again, another way."""
    outcomes = list(outcomes)
    around = {name for _, names in outcomes for name in names}
    problem.sites = tuple(
        replace(site, around=site.around | (around & site.blocks.keys())) for site in problem.sites
    )
    if problem.method is Method.IN_GRAPH or all(holds for holds, _ in outcomes):
        return False
    problem.method = Method.IN_GRAPH
    return True
