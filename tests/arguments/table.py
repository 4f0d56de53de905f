"""What the rows of the table of wrong arguments are made of."""

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth import rules, training


class Counted(nn.Module):
    """A small network that counts how often it runs."""

    def __init__(self) -> None:
        super().__init__()
        self.body = nn.Sequential(nn.Linear(2, 4), nn.ReLU(), nn.Linear(4, 3))
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return self.body(x)


@dataclass(frozen=True)
class Setting:
    """What the calls of a test share."""

    model: Counted
    data: list[Any]
    candidate: cg.Candidate
    optimizer: torch.optim.Optimizer
    problem: cg.GrowthProblem
    solution: cg.Solution
    record: cg.GrowthRecord


def make_setting() -> Setting:
    torch.manual_seed(0)
    model = Counted().double()
    data = [(torch.randn(6, 2).double(), torch.randint(3, (6,))) for _ in range(2)]
    candidate = cg.Candidate("body.1", cg.blocks.ResidualMLP(4, 3, torch.tanh))
    problem = cg.GrowthProblem(model, nn.CrossEntropyLoss(), data, [candidate])
    solution = cg.solve(problem, cg.TopK(1))
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    return Setting(model, data, candidate, optimizer, problem, solution, cg.GrowthRecord())


# What an argument takes, by values that it does not take.

NAN, INF = math.nan, math.inf
KINDS: dict[str, tuple[Any, ...]] = {
    "count": (0, -1, 1.5, "2", True, NAN, [3]),
    "whole": (-1, 1.5, "2", NAN, [3]),
    "positive": (0.0, -1.0, NAN, "x", 1j, [1.0], torch.ones(2)),
    "number": (NAN, "x", 1j, [1.0]),
    "fraction": (-0.1, 1.5, NAN, "x", 1j),
    "function": (5, "f", [max], nn.ReLU),
    "factory": (5, "f", [max]),
    "module": (5, "net", nn.Linear),
    "model": (5, "net", nn.Linear),
    "data": (5, 0.5, "data", iter([])),
    "optimizer": (5, "adam", torch.optim.SGD),
    "bool": (2, "yes", 0.5),
    "rule": (5, "topk", cg.TopK),
    "norm": (5, "fro", cg.norms.Frobenius),
    "candidates": (5, "body.1", [5], ["body.1"], []),
    "problem": (5, "problem", cg.GrowthProblem),
    "solution": (5, "solution", {}),
    "record": (5, "{}", {}),
    "name": (5, 1.5, ["body.1"]),
    "mapping": (5, "x", [1]),
    "path": (5, 1.5, []),
    "activation": (5, "relu", nn.Linear),
}


@dataclass(frozen=True)
class Row:
    """A public callable, right arguments of it, and the kind of each that is tried."""

    call: Callable[..., Any]
    right: Callable[[Setting], Mapping[str, Any]]
    kinds: Mapping[str, str]
    optional: tuple[str, ...] = ()  # for which None is right; of the others it is tried
    more: Mapping[str, tuple[Any, ...]] = field(default_factory=dict)  # further wrong values


def of_solve(s: Setting) -> dict[str, Any]:
    return {"problem": s.problem}


def of_problem(s: Setting) -> dict[str, Any]:
    return {
        "model": s.model,
        "loss_fn": nn.CrossEntropyLoss(),
        "data": s.data,
        "candidates": [s.candidate],
    }


def of_grower(s: Setting) -> dict[str, Any]:
    return {
        "model": s.model,
        "optimizer": s.optimizer,
        "loss_fn": nn.CrossEntropyLoss(),
        "data": s.data,
    }


def of_grow(s: Setting) -> dict[str, Any]:
    return {
        "model": s.model,
        "optimizer_factory": lambda p: torch.optim.SGD(p, lr=0.1),
        "loss_fn": nn.CrossEntropyLoss(),
        "loader": s.data,
        "epochs": 1,
    }


GROWING = {
    "model": "model",
    "loss_fn": "function",
    "rule": "rule",
    "norm": "norm",
    "when": "function",
    "confirm": "function",
    "candidates": "candidates",
    "max_insertions": "whole",
    "after_insertion": "function",
    "solver": "function",
    "data": "data",
    "writer": "mapping",
    "averaged": "module",
}
OPTIONAL = (
    *("rule", "norm", "when", "confirm", "candidates", "max_insertions", "after_insertion"),
    *("solver", "writer", "averaged"),
)
CANDIDATE = cg.Candidate("body.1", cg.blocks.ResidualMLP(4, 3, torch.tanh))
MORE: dict[str, tuple[Any, ...]] = {
    "when": (rules.Plateau,),
    "candidates": ([CANDIDATE] * 2, cg.Candidate),
    "max_insertions": (True,),
    "after_insertion": (0.1, training.NewLayers),
    "averaged": ([None], nn.Linear(2, 2)),
    "loss_fn": (nn.CrossEntropyLoss,),
}


def nothing(_: Setting) -> dict[str, Any]:
    return {}
