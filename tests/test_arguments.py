"""Every wrong argument of every public function is refused early, by name, in a GrowthError.

A table: each public callable with right arguments, and for each argument what kind of value it
takes. The wrong values follow from the kind. Each must be refused before the model runs.
"""

import math
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from helpers import nothing_left_behind, refused
from torch import Tensor, nn

import constrained_growth as cg
from constrained_growth import (
    blocks,
    checkpoint,
    curvature,
    norms,
    plotting,
    rules,
    statistics,
    testing,
    training,
    verification,
)


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


@pytest.fixture(scope="module")
def setting() -> Setting:
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


ROWS: dict[str, Row] = {
    "solve": Row(
        cg.solve,
        of_solve,
        {
            "problem": "problem",
            "rule": "rule",
            "norm": "norm",
            "validation": "data",
            "gtol": "number",
            "stationarity": "bool",
            "throw": "bool",
            "progress": "bool",
        },
        optional=("rule", "norm", "validation", "progress"),
        more={"gtol": (-1.0,)},
    ),
    "GrowthProblem": Row(
        cg.GrowthProblem,
        of_problem,
        {
            "model": "model",
            "loss_fn": "function",
            "data": "data",
            "candidates": "candidates",
            "weight": "function",
        },
        optional=("weight",),
        more={"candidates": ([],), "group": (5, "x")},
    ),
    "Candidate": Row(
        cg.Candidate,
        lambda s: {"after": "body.1", "block": s.candidate.block},
        {"after": "name", "block": "module", "name": "name", "wrapped": "bool"},
        more={"after": (None, ""), "block": (None,), "output": (1.5, True, [1], b"x")},
    ),
    "find_candidates": Row(
        cg.find_candidates,
        lambda s: {"model": s.model, "example_input": s.data[0][0]},
        {"model": "model"},
    ),
    "insert": Row(
        cg.insert,
        lambda s: {"model": s.model, "solution": s.solution},
        {
            "model": "model",
            "solution": "solution",
            "optimizer": "optimizer",
            "averaged": "module",
            "data": "data",
        },
        optional=("optimizer", "data", "averaged"),
    ),
    "replay": Row(
        cg.replay,
        lambda s: {"model": s.model, "record": s.record, "strict": False},
        {"model": "model", "record": "record", "blocks": "mapping", "strict": "bool"},
        optional=("blocks",),
        more={"blocks": ({"x": 5},)},
    ),
    "rewrap": Row(
        cg.rewrap,
        lambda s: {"model": s.model},
        {"model": "model", "optimizer": "optimizer"},
        optional=("optimizer",),
    ),
    "rebatch": Row(
        cg.rebatch, lambda s: {"data": s.data, "size": 3}, {"data": "data", "size": "count"}
    ),
    "monitor": Row(
        lambda **k: cg.monitor(**k).__enter__(),
        of_solve,
        {"problem": "problem", "norm": "norm", "every": "count", "scale": "positive"},
        optional=("norm",),
    ),
    "directional_derivative": Row(
        cg.directional_derivative,
        lambda s: {
            "problem": s.problem,
            "candidate": "body.1",
            "step": {"outer.weight": torch.ones(4, 3)},
        },
        {"problem": "problem", "candidate": "name", "step": "mapping"},
        more={
            "candidate": ("body.2",),
            "step": ({"outer.weight": 5}, {"outer.weight": torch.ones(3)}, {"w": 1}),
        },
    ),
    "Decision": Row(
        cg.Decision,
        nothing,
        {"values": "mapping", "evidence": "mapping"},
        more={"chosen": (5, "1", (1,), None), "reason": (5, None)},
    ),
    "GrowthRecord.from_json": Row(
        cg.GrowthRecord.from_json, lambda s: {"text": s.record.to_json()}, {"text": "record"}
    ),
    "Grower": Row(
        cg.Grower,
        of_grower,
        {**GROWING, "optimizer": "optimizer", "wrapper": "module"},
        optional=(*OPTIONAL, "wrapper"),
        more={**MORE, "optimizer": ([],)},
    ),
    "Grower.step": Row(
        cg.Grower.step,
        lambda s: {"self": cg.Grower(**of_grower(s)), "loss": 1.0},
        {},
        more={"loss": ("low", None, torch.zeros(2))},
    ),
    "grow": Row(
        cg.grow,
        of_grow,
        {
            **GROWING,
            "optimizer_factory": "factory",
            "scheduler_factory": "factory",
            "loader": "data",
            "validation": "data",
            "epochs": "whole",  # 0 to read a checkpoint
            "patience": "count",
            "target": "number",
            "metrics": "mapping",
            "checkpoint": "path",
            "checkpoint_every": "count",
            "blocks": "mapping",
            "callbacks": "mapping",
            "progress": "bool",
        },
        optional=(
            *OPTIONAL,
            *("data", "metrics", "checkpoint", "validation", "patience", "target", "progress"),
            *("checkpoint_every", "blocks", "scheduler_factory"),
        ),
        more={
            **MORE,
            "optimizer_factory": (torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=0.1),),
            "loader": ([],),
            "validation": ([],),
            "epochs": (True,),
            "metrics": ({"a": 5}, {"a": nn.L1Loss}),
            "callbacks": ([5], print),
            "blocks": ({"x": 5},),
            "checkpoint": ("missing/folder/x.safetensors", "/"),
        },
    ),
    # rules
    "TopK": Row(cg.TopK, nothing, {"k": "count", "cost": "function"}, optional=("cost",)),
    "Threshold": Row(
        cg.Threshold,
        lambda s: {"absolute": 1.0},
        {
            "absolute": "number",
            "relative": "number",
            "max_insertions": "count",
            "confidence": "fraction",
        },
        optional=("relative", "max_insertions", "confidence"),
        more={"absolute": (-1.0,), "relative": (-1.0,), "confidence": (0.0, 1.0)},
    ),
    "Fixed": Row(lambda candidate: cg.Fixed(candidate), nothing, {}),
    "Random": Row(cg.Random, nothing, {"k": "count"}, more={"seed": (1.5, "x", None)}),
    "Generalizes": Row(
        rules.Generalizes,
        nothing,
        {"level": "fraction", "effect_size": "number"},
        more={"level": (0.0, 1.0), "effect_size": (-0.1,)},
    ),
    "Placed": Row(
        rules.Placed,
        lambda s: {"where": "upper"},
        {"k": "count"},
        more={"where": (5, "lower", None, ["upper"])},
    ),
    "LeastImportant": Row(
        rules.LeastImportant, lambda s: {"data": s.data}, {"data": "data", "k": "count"}
    ),
    "Budget": Row(
        cg.Budget,
        lambda s: {"parameters": 100},
        {
            "parameters": "number",
            "multiply_adds": "number",
            "per_site": "count",
            "gain": "function",
            "constraints": "mapping",
        },
        optional=("multiply_adds", "per_site"),
        more={
            "parameters": (-1,),
            "multiply_adds": (-1,),
            "constraints": (None, [({"a": 1},)], [({"a": "x"}, 1)], [({"a": 1}, NAN)]),
        },
    ),
    "TrustRegion": Row(
        cg.TrustRegion,
        nothing,
        {
            "radius": "positive",
            "eta1": "fraction",
            "eta2": "fraction",
            "shrink": "fraction",
            "grow": "positive",
            "max_radius": "positive",
            "curvature": "function",
            "max_products": "count",
            "tolerance": "positive",
            "max_tries": "count",
            "progress": "bool",
        },
        optional=("progress",),
        more={"grow": (0.5,), "shrink": (0.0, 1.0)},
    ),
    "Trial": Row(
        rules.Trial,
        lambda s: {"steps": 3, "optimizer": s.optimizer},
        {
            "steps": "count",
            "optimizer": "mapping",
            "eta": "positive",
            "data": "data",
            "progress": "bool",
        },
        optional=("data", "progress"),
        more={"eta": (1.0,), "seed": (1.5, "x", None)},
    ),
    "Stable": Row(
        rules.Stable,
        lambda s: {"optimizer": s.optimizer},
        {
            "optimizer": "mapping",
            "factor": "positive",
            "max_products": "count",
            "max_samples": "count",
            "curvature": "function",
            "progress": "bool",
        },
        optional=("max_samples", "progress"),
    ),
    "Plateau": Row(
        rules.Plateau,
        nothing,
        {"patience": "count", "tolerance": "number", "target": "number", "most": "count"},
        optional=("target", "most"),
        more={"tolerance": (-1.0,)},
    ),
    "Exhausted": Row(
        rules.Exhausted,
        nothing,
        {"ratio": "number", "significance": "number"},
        more={"significance": (-1.0,), "ratio": (-1.0,)},
    ),
    "then": Row(
        lambda rule: rules.then(rule, cg.TopK(1)), lambda s: {"rule": cg.TopK(1)}, {"rule": "rule"}
    ),
    "otherwise": Row(
        lambda rule: rules.otherwise(rule, cg.TopK(1)),
        lambda s: {"rule": cg.TopK(1)},
        {"rule": "rule"},
    ),
    "rule_for": Row(
        rules.rule_for,
        lambda s: {"optimizer": s.optimizer},
        {"optimizer": "mapping", "step": "bool"},
    ),
    # norms
    "KroneckerFisher": Row(
        norms.KroneckerFisher,
        nothing,
        {"damping": "number"},
        more={"ord": ("spec", 2, None), "damping": (-1.0,)},
    ),
    "norm_for": Row(
        norms.norm_for, lambda s: {"optimizer": s.optimizer}, {"optimizer": "optimizer"}
    ),
    "lipschitz": Row(
        norms.lipschitz,
        lambda s: {"norm": norms.Frobenius(), "multiplier": {"w": torch.ones(2, 2)}},
        {"norm": "norm", "multiplier": "mapping"},
    ),
    # blocks
    "IdentityLinear": Row(
        blocks.IdentityLinear,
        lambda s: {"width": 4, "activation": nn.ReLU()},
        {"width": "count", "activation": "activation", "shift": "number"},
        optional=("shift",),
        more={"shift": (INF,)},
    ),
    "ResidualLinear": Row(
        blocks.ResidualLinear,
        lambda s: {"width": 4, "activation": torch.tanh},
        {"width": "count", "activation": "activation"},
    ),
    "ResidualMLP": Row(
        blocks.ResidualMLP,
        lambda s: {"width": 4, "hidden": 3, "activation": torch.tanh},
        {"width": "count", "hidden": "count", "activation": "activation", "inner_init": "number"},
        more={"pinned": ("both", 1, None), "inner_init": (torch.ones(2),)},
    ),
    "IdentityConv2d": Row(
        blocks.IdentityConv2d,
        lambda s: {"channels": 4, "activation": nn.ReLU()},
        {
            "channels": "count",
            "activation": "activation",
            "kernel_size": "count",
            "shift": "number",
        },
        optional=("shift",),
        more={"kernel_size": (2,)},
    ),
    "ResidualConv2d": Row(
        blocks.ResidualConv2d,
        lambda s: {"channels": 4, "activation": nn.ReLU()},
        {
            "channels": "count",
            "activation": "activation",
            "hidden": "count",
            "kernel_size": "count",
            "norm_layer": "function",
        },
        optional=("hidden", "norm_layer"),
        more={"pinned": ("both", 1), "norm_layer": (nn.ReLU,)},
    ),
    "ResidualBottleneck2d": Row(
        blocks.ResidualBottleneck2d,
        lambda s: {"channels": 4, "activation": nn.ReLU()},
        {
            "channels": "count",
            "activation": "activation",
            "hidden": "count",
            "kernel_size": "count",
            "norm_layer": "function",
        },
        optional=("hidden", "norm_layer"),
        more={"pinned": ("both", 1)},
    ),
    "TransformerBlock": Row(
        blocks.TransformerBlock,
        lambda s: {"width": 4, "heads": 2},
        {
            "width": "count",
            "heads": "count",
            "hidden": "count",
            "activation": "activation",
            "causal": "bool",
        },
        optional=("hidden",),
        more={"heads": (3,)},
    ),
    "GatedMLP": Row(
        blocks.GatedMLP,
        lambda s: {"width": 4, "hidden": 3},
        {"width": "count", "hidden": "count", "activation": "activation", "eps": "positive"},
    ),
    "TanhLU": Row(blocks.TanhLU, nothing, {"eps": "positive"}),
    "CopiedBlock": Row(
        blocks.CopiedBlock,
        lambda s: {
            "module": nn.TransformerEncoderLayer(4, 2, 8, batch_first=True, norm_first=True)
        },
        {"module": "model", "pinned": "name", "kwargs": "mapping"},
        optional=("pinned", "kwargs"),
        more={"pinned": (["nothing.weight"], [5]), "args": (5,), "share": ("yes", None)},
    ),
    "register": Row(
        blocks.register,
        lambda s: {"kind": blocks.ResidualMLP},
        {},
        more={"kind": (None, 5, "ResidualMLP", nn.ReLU, nn.ReLU())},
    ),
    # the rest
    "interval": Row(
        statistics.interval,
        lambda s: {"sensitivity": s.solution.sensitivities["body.1"]},
        {"sensitivity": "mapping", "confidence": "fraction"},
        more={"confidence": (0.0, 1.0), "sensitivity": (1.0,)},
    ),
    "VirtualLoss": Row(
        curvature.VirtualLoss,
        lambda s: {"problem": s.problem, "planned": s.solution.candidates["body.1"]},
        {"problem": "problem", "planned": "mapping", "joint": "bool", "data": "data"},
        optional=("data",),
    ),
    "check_with_cvxpy": Row(
        verification.check_with_cvxpy,
        of_solve,
        {"problem": "problem", "cvxpy_loss": "function", "options": "mapping"},
        optional=("cvxpy_loss", "options"),
        more={"solver": ("NOSUCH", 5, None)},
    ),
    "check_with_scipy": Row(
        verification.check_with_scipy,
        of_solve,
        {"problem": "problem", "gtol": "positive", "maxiter": "count"},
    ),
    "kkt_residuals": Row(
        verification.kkt_residuals,
        lambda s: {"problem": s.problem, "solution": s.solution},
        {"problem": "problem", "solution": "solution"},
    ),
    "check_rule": Row(
        testing.check_rule,
        lambda s: {"rule": cg.TopK(1)},
        {"rule": "rule", "problem": "problem"},
        optional=("problem",),
    ),
    "check_block": Row(
        testing.check_block,
        lambda s: {"block": s.candidate.block, "x": torch.randn(5, 4)},
        {"block": "model", "x": "mapping"},
    ),
    "NewLayers": Row(training.NewLayers, nothing, {"scale": "positive", "warmup": "whole"}),
    "LineSearch": Row(training.LineSearch, nothing, {"steps": "count"}),
    "evaluate": Row(
        training.evaluate,
        lambda s: {"model": s.model, "metrics": {"a": lambda o, t: 1.0}, "data": s.data},
        {"model": "model", "metrics": "mapping", "data": "data"},
        more={"metrics": ({"a": 5},)},
    ),
    "checkpoint.save": Row(
        checkpoint.save,
        lambda s: {"path": "x.safetensors", "model": s.model},
        {
            "path": "path",
            "model": "model",
            "optimizer": "optimizer",
            "record": "record",
            "step": "whole",
        },
        optional=("optimizer", "record"),
    ),
    "checkpoint.load": Row(checkpoint.load, lambda s: {"path": "x"}, {"path": "path"}),
    "checkpoint.previous": Row(checkpoint.previous, lambda s: {"path": "x"}, {"path": "path"}),
    "plot_sensitivities": Row(
        plotting.plot_sensitivities,
        lambda s: {"sensitivities": s.solution},
        {"sensitivities": "mapping"},
        more={"sensitivities": ({},), "chosen": (5,)},
    ),
    "plot_training": Row(
        plotting.plot_training,
        lambda s: {"losses": [1.0, 0.5], "insertions": {1: "x"}},
        {"insertions": "mapping"},
        more={"losses": (5, "x", None, [], ["a"])},
    ),
}


def shown(value: Any) -> str:
    """The value as text that is the same in every process."""
    text = repr(value)
    return type(value).__name__ if " at 0x" in text else text


def wrong() -> Iterator[Any]:
    for name, row in ROWS.items():
        arguments = {**dict.fromkeys(row.more, ()), **{a: KINDS[k] for a, k in row.kinds.items()}}
        arguments |= {a: (None, *arguments[a]) for a in row.kinds if a not in row.optional}
        for argument, values in arguments.items():
            for value in (*values, *row.more.get(argument, ())):
                yield pytest.param(
                    name, argument, value, id=f"{name}-{argument}={shown(value):.30}"
                )


@pytest.mark.filterwarnings("default")
@pytest.mark.parametrize(("name", "argument", "value"), list(wrong()))
def test_wrong_arguments_are_refused(
    name: str, argument: str, value: Any, setting: Setting, tmp_path: Any, monkeypatch: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    row = ROWS[name]
    right = dict(row.right(setting))
    setting.model.runs = 0
    with nothing_left_behind(setting.model), refused(cg.GrowthError, argument):
        row.call(**{**right, argument: value})
    assert setting.model.runs == 0, "the model ran first"
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("kind", [np.int32, np.float32])
def test_numbers_of_numpy_are_taken_where_those_of_python_are(kind: Any, setting: Setting) -> None:
    value = 0.5 if kind is np.float32 else 2
    numbers = {"count", "whole", "number", "positive", "fraction"}
    for row in ROWS.values():
        for argument in (name for name, of in row.kinds.items() if of in numbers):
            if row.call not in (cg.grow, checkpoint.save, verification.check_with_scipy):
                right = dict(row.right(setting))
                try:
                    row.call(**{**right, argument: value})
                except cg.GrowthError:
                    continue
                row.call(**{**right, argument: kind(value)})
