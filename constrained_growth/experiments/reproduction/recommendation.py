"""What the library itself recommends, replica by replica, as a user would ask it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth.experiments.ensembles.networks import Ensemble, Samples, sites_of
from constrained_growth.experiments.ensembles.training import Optimizer
from constrained_growth.training import NewLayers

Solver = Callable[[cg.GrowthProblem], cg.Solution]

RECOMMENDED: Solver = partial(cg.solve, stationarity=False)
"""The recommended decision. The published figures were made with `TopK(1)` in the norm that was
recommended then, `KroneckerFisher(damping=0.03)`."""

AGE = "age"
"""Memory of how many steps a parameter has made since its insertion; ∞ for older ones."""


def recommended(
    trained: Ensemble,
    data: Samples,
    models: Sequence[nn.Sequential],
    block: Callable[[int], nn.Module],
    solver: Solver = RECOMMENDED,
) -> tuple[NDArray[np.integer], list[Tensor]]:
    """Ask the library about each replica, and insert what it says.

    `models` are plain networks of the replicas' architecture, to be overwritten; `block` maps a
    width to the layer to insert. Returns the site of each replica, −1 for nowhere, and its
    parameters then.
    """
    sites, rows = list[int](), list[Tensor]()
    trained.write_to(models)
    for r, model in enumerate(models):
        at = dict(sites_of(model))
        problem = cg.GrowthProblem(
            model,
            nn.CrossEntropyLoss(),
            [(data.x[r].T, data.y[r].argmax(0))],
            [cg.Candidate(name, block(width).to(data.x.dtype)) for name, width in at.items()],
        )
        solution = solver(problem)
        cg.insert(model, solution)
        chosen = solution.decision.chosen
        sites.append(list(at).index(chosen[0]) if chosen else -1)
        rows.append(nn.utils.parameters_to_vector(model.parameters()).detach())
    return np.array(sites), rows


def with_ages(trained: Ensemble) -> Ensemble:
    """As `StepsAfter` needs it: all parameters are old."""
    ages = torch.full_like(trained.parameters, torch.inf)
    return replace(trained, memory={**trained.memory, AGE: ages})


@dataclass(frozen=True)
class StepsAfter:
    """An optimizer with the library's policy for the steps after an insertion, without decay."""

    base: Optimizer
    policy: NewLayers = field(default_factory=NewLayers)

    def step(
        self, parameters: Tensor, gradient: Tensor, memory: dict[str, Tensor], running: Tensor
    ) -> None:
        """One step."""
        before = parameters.clone()
        self.base.step(parameters, gradient, memory, running)
        warm = (memory[AGE].add_(1) / (self.policy.warmup + 1)).clamp(max=1)
        share = torch.where(memory[AGE].isinf(), 1.0, self.policy.scale * warm)
        parameters.copy_(before.lerp(parameters, share))
