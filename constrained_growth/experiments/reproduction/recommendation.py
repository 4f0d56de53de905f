"""What the library itself recommends, replica by replica, as a user would ask it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

from constrained_growth.candidates.candidate import Candidate
from constrained_growth.experiments.ensembles.growth import NewLayer, insert_layer
from constrained_growth.experiments.ensembles.networks import Ensemble, Samples
from constrained_growth.insertion.inserting import insert
from constrained_growth.norms import KroneckerFisher
from constrained_growth.problem import GrowthProblem
from constrained_growth.solution import Solution
from constrained_growth.solve import solve

Solver = Callable[[GrowthProblem], Solution]

RECOMMENDED: Solver = partial(solve, norm=KroneckerFisher(), stationarity=False)
"""The largest sensitivity in the norm that decides best of all that cost one pass."""

Group = tuple[NDArray[np.integer], Ensemble]
"""Rows of some replicas, and what they have become."""


def recommended(
    trained: Ensemble,
    data: Samples,
    models: Sequence[nn.Sequential],
    block: Callable[[int], nn.Module],
    layer: NewLayer,
    solver: Solver = RECOMMENDED,
) -> tuple[NDArray[np.integer], list[Group]]:
    """Ask the library about each replica and insert what it says.

    Args:
        trained: The replicas, before the insertion; not changed.
        data: Training data of each.
        models: Plain networks of the replicas' architecture; their parameters are overwritten.
        block: Width → the layer that could be inserted at every site.
        layer: The same for an ensemble.
        solver: How to ask; `RECOMMENDED` follows `constrained-growth bench decisions`.

    Returns:
        The site of each replica, −1 where nothing is inserted, and the replicas grouped by it.
    """
    sites, rows = list[int](), list[Tensor]()
    for r, model in enumerate(models):
        nn.utils.vector_to_parameters(trained.parameters[r], model.parameters())
        at = _sites(model)
        problem = GrowthProblem(
            model,
            nn.CrossEntropyLoss(),
            [(data.x[r].T, data.y[r].argmax(0))],
            [Candidate(name, block(width).to(data.x.dtype)) for name, width in at.items()],
        )
        solution = solver(problem)
        insert(model, solution)
        chosen = solution.decision.chosen
        sites.append(list(at).index(chosen[0]) if chosen else -1)
        rows.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    where = np.array(sites)
    groups = list[Group]()
    for site in sorted(set(sites)):
        mine = np.flatnonzero(where == site)
        some = trained.take(mine.tolist())
        grown = some if site < 0 else insert_layer(some, torch.as_tensor(where[mine]), layer)
        groups.append((mine, replace(grown, parameters=torch.stack([rows[r] for r in mine]))))
    return where, groups


def _sites(model: nn.Sequential) -> dict[str, int]:
    """Names and widths of the places after the hidden layers, in order of depth."""
    width, found = 0, dict[str, int]()
    for name, module in list(model.named_children())[:-1]:
        if isinstance(module, nn.Linear):
            width = module.out_features
        elif isinstance(module, nn.Conv2d):
            width = module.out_channels
        elif not isinstance(module, nn.Flatten | nn.Unflatten):
            found[name] = width
    return found
