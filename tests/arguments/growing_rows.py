"""Wrong arguments: problems, decisions, insertion, training."""

from typing import Any

import torch
from table import (
    GROWING,
    MORE,
    OPTIONAL,
    Row,
    Setting,
    nothing,
    of_grow,
    of_grower,
    of_problem,
    of_solve,
)
from torch import nn

import constrained_growth as cg
from constrained_growth import monitoring, training


def one_step(s: Setting) -> dict[str, Any]:
    grower = cg.Grower(**of_grower(s))
    grower.step(1.0)
    return {"self": grower}


def a_monitor(s: Setting) -> dict[str, Any]:
    with cg.monitor(s.problem) as watched:
        return {"self": watched}


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
            "multipliers": "bool",
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
        {"model": "model", "max_parameters": "count"},
        optional=("max_parameters",),
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
    # what the objects can be asked
    "Solution.dual_value": Row(
        cg.Solution.dual_value,
        lambda s: {"self": s.solution, "constraint": s.problem.constraints[0]},
        {"constraint": "record"},
    ),
    "GrowthRecord.new_parameters": Row(
        cg.GrowthRecord.new_parameters,
        lambda s: {"self": s.record, "model": s.model},
        {"model": "model"},
    ),
    "Grower.observe": Row(cg.Grower.observe, one_step, {"metrics": "mapping"}, ("metrics",)),
    "Grower.maybe_grow": Row(cg.Grower.maybe_grow, one_step, {"metrics": "mapping"}, ("metrics",)),
    "Grower.load_state_dict": Row(
        lambda self, state: self.load_state_dict(state),
        lambda s: {"self": cg.Grower(**of_grower(s)), "state": {}},
        {"state": "mapping"},
        more={"state": ({},)},
    ),
    "History.add": Row(
        cg.History.add,
        lambda s: {
            **{"self": cg.History(), "loss": 1.0, "step": 1, "layers": 1, "seconds": 1.0},
            "metrics": {},
        },
        {"metrics": "mapping"},
        more={"loss": ("x", None), "step": ("x", None), "seconds": ("x", None)},
    ),
    "History.load_state_dict": Row(
        cg.History.load_state_dict,
        lambda s: {"self": cg.History(), "state": cg.History().state_dict()},
        {"state": "mapping"},
        more={"state": ({}, {"losses": []})},
    ),
    "Monitor.solution": Row(
        monitoring.Monitor.solution, a_monitor, {"rule": "rule"}, optional=("rule",)
    ),
    "NewLayers.attach": Row(
        training.NewLayers.attach,
        lambda s: {"self": training.NewLayers(), "model": s.model, "optimizer": s.optimizer},
        {"model": "model", "optimizer": "optimizer"},
        more={"names": (["x"],)},
    ),
    "NewLayers.load_state_dict": Row(
        training.NewLayers.load_state_dict,
        lambda s: {"self": training.NewLayers(), "state": {}},
        {"state": "mapping"},
    ),
    "count_layers": Row(training.count_layers, lambda s: {"model": s.model}, {"model": "model"}),
    "NewLayers": Row(training.NewLayers, nothing, {"scale": "positive", "warmup": "whole"}),
    "LineSearch": Row(training.LineSearch, nothing, {"steps": "count"}),
    "evaluate": Row(
        training.evaluate,
        lambda s: {"model": s.model, "metrics": {"a": lambda o, t: 1.0}, "data": s.data},
        {"model": "model", "metrics": "mapping", "data": "data"},
        more={"metrics": ({"a": 5},)},
    ),
}
