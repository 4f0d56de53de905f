"""Wrong arguments: rules, norms, statistics, curvature."""

from collections.abc import Callable
from typing import Any

import torch
from table import NAN, Row, Setting, nothing

import constrained_growth as cg
from constrained_growth import curvature, norms, rules, statistics

PLAIN_NORMS = (
    *(norms.Frobenius(), norms.PerParameter(), norms.Entrywise1()),
    *(norms.Spectral(), norms.Nuclear()),
)
PLAIN_RULES = (
    *(cg.TopK(1), cg.Threshold(1.0), cg.Fixed("body.1"), cg.Random(1)),
    *(rules.Generalizes(), rules.Placed("upper")),
)
MODEL_RULES: dict[str, Callable[[Setting], rules.ModelRule]] = {
    "Budget": lambda s: cg.Budget(100),
    "TrustRegion": lambda s: cg.TrustRegion(),
    "Trial": lambda s: rules.Trial(1, s.optimizer),
    "Stable": lambda s: rules.Stable(s.optimizer),
    "LeastImportant": lambda s: rules.LeastImportant(s.data),
}


def of_product(s: Setting) -> dict[str, Any]:
    loss = curvature.VirtualLoss(s.problem, s.solution.candidates["body.1"])
    return {"loss": loss, "vector": loss.zero()}


ROWS: dict[str, Row] = {
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
    "Fixed": Row(
        lambda candidates: cg.Fixed(candidates),
        nothing,
        {},
        more={"candidates": (1.5, None, [])},
    ),
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
    # rules and norms, called
    **{
        f"{type(rule).__name__}.__call__": Row(
            lambda sensitivities, rule=rule: rule(sensitivities),
            lambda s: {"sensitivities": s.solution.sensitivities},
            {"sensitivities": "mapping"},
            more={"sensitivities": ({"body.1": 1.0},)},
        )
        for rule in PLAIN_RULES
    },
    "Exhausted.__call__": Row(
        rules.Exhausted.__call__,
        lambda s: {"self": rules.Exhausted(), "solution": s.solution},
        {"solution": "solution"},
    ),
    **{
        f"{name}.decide": Row(
            lambda self, problem, solution: self.decide(problem, solution),
            lambda s, made=made: {"self": made(s), "problem": s.problem, "solution": s.solution},
            {"problem": "problem", "solution": "solution"},
        )
        for name, made in MODEL_RULES.items()
    },
    **{
        f"{type(norm).__name__}.{name}": Row(
            lambda multiplier, norm=norm, name=name: getattr(norm, name)(multiplier),
            lambda s: {"multiplier": s.solution.multipliers["body.1"]},
            {"multiplier": "mapping"},
            more={"multiplier": ({}, {"w": 5})},
        )
        for norm in PLAIN_NORMS
        for name in ("__call__", "lipschitz")
        if (type(norm), name) not in {(norms.Frobenius, "lipschitz"), (norms.Spectral, "lipschitz")}
    },
    "KroneckerFisher.__call__": Row(
        norms.KroneckerFisher.__call__,
        lambda s: {
            "self": norms.KroneckerFisher(),
            "multiplier": {"w": torch.ones(1, 1)},
            "moments": {"w": norms.SecondMoments(torch.ones(1, 1), torch.ones(1, 1))},
        },
        {"multiplier": "mapping", "moments": "mapping"},
        more={"multiplier": ({}, {"w": 5}), "moments": ({}, {"w": 5})},
    ),
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
    "agreement": Row(
        statistics.agreement,
        lambda s: {"sensitivities": s.solution.sensitivities, "rule": cg.TopK(1)},
        {"sensitivities": "mapping", "rule": "function"},
    ),
    "hessian": Row(curvature.hessian, of_product, {"loss": "mapping", "vector": "name"}),
    "gauss_newton": Row(
        curvature.gauss_newton,
        of_product,
        {"loss": "mapping", "vector": "name"},
        more={"vector": (torch.ones(2),)},
    ),
    "smallest_eigenvalue": Row(
        curvature.smallest_eigenvalue,
        lambda s: {"problem": s.problem},
        {"problem": "problem", "max_products": "count"},
    ),
    "VirtualLoss.unflatten": Row(
        curvature.VirtualLoss.unflatten,
        lambda s: {"self": of_product(s)["loss"], "v": of_product(s)["vector"]},
        {"v": "name"},
        more={"v": (torch.ones(2),)},
    ),
    "SecondMoments": Row(
        norms.SecondMoments,
        lambda s: {"features": torch.ones(1, 1), "cotangents": torch.ones(1, 1)},
        {"features": "name", "cotangents": "name"},
    ),
    "SecondMoments.of": Row(
        norms.SecondMoments.of,
        lambda s: {"features": torch.ones(1, 1), "cotangents": torch.ones(1, 1)},
        {"features": "name", "cotangents": "name"},
    ),
    "half_square": Row(
        rules.half_square,
        lambda s: {"sensitivity": s.solution.sensitivities["body.1"]},
        {"sensitivity": "mapping"},
        more={"sensitivity": (1.0,)},
    ),
    "Plateau.update": Row(
        rules.Plateau.update,
        lambda s: {"self": rules.Plateau(), "loss": 1.0},
        {},
        more={"loss": ("x", None, torch.ones(2))},
    ),
    "Plateau.load_state_dict": Row(
        rules.Plateau.load_state_dict,
        lambda s: {"self": rules.Plateau(), "state_dict": rules.Plateau().state_dict()},
        {"state_dict": "mapping"},
        more={"state_dict": ({},)},
    ),
    "TrustRegion.load_state_dict": Row(
        cg.TrustRegion.load_state_dict,
        lambda s: {"self": cg.TrustRegion(), "state_dict": {"radius": 1.0}},
        {"state_dict": "mapping"},
        more={"state_dict": ({}, {"radius": "x"}, {"radius": -1.0})},
    ),
}
