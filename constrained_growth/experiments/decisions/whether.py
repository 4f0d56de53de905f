"""`bench decisions --family whether`: tests of whether a layer helps, against what inserting does.

A student starts as its teacher, or without one of the teacher's blocks, or as another network, and
learns noisy data of the teacher up to the moment of the decision. Then a residual block is
inserted at every site, and nowhere, and all of these are trained on in several orders of the data.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.console import Group, RenderableType
from rich.text import Text
from scipy import stats
from torch import Tensor, nn
from torch.func import functional_call, grad, vmap

import constrained_growth as cg
from constrained_growth.experiments.decisions.tasks import deep_teacher, residual
from constrained_growth.experiments.ensembles.growth import NewLayer, insert_layer
from constrained_growth.experiments.ensembles.networks import (
    Ensemble,
    ensemble,
    forward,
    samples,
    sites_of,
    squared_error,
)
from constrained_growth.experiments.ensembles.training import SGD, Adam, Optimizer, Shuffle, train
from constrained_growth.experiments.jobs import cached, digest, in_parallel
from constrained_growth.experiments.tables import number, tabled
from constrained_growth.rules import Generalizes

__all__ = ["FULL", "QUICK", "run", "tables"]

_WIDTH, _DEPTH, _NOISE, _TEST = 6, 4, 0.3, 2_000

LEVELS = (0.001, 0.01, 0.05, 0.1, 0.2)
"""Of the tests."""

TESTS = ("validation", "cross-fitted", "score")
"""The slope on validation data; that of groups of the training data along λ of the others; Rao's
score test on all training data."""

_RULE = Generalizes()

_CLEAR = 0.02
"""A clear gain is this share of the loss, besides being beyond the noise."""

Data = tuple[Tensor, Tensor]


@dataclass(frozen=True)
class Plan:
    """How many networks of which kinds, and orders of the data after each insertion, are run."""

    tasks: Sequence[Kind]
    networks: int
    runs: int
    workers: int = 2


@dataclass(frozen=True)
class Kind:
    """Students of one kind; frozen ones learn in the new layer only, of a new task if shifted."""

    name: str
    optimizer: Optimizer
    samples: int
    student: str  # "teacher", "lacking" or "fresh"
    frozen: bool = False
    shifted: bool = False
    epochs: int = 60  # before the decision, and as many after it
    begun: int | None = None  # epochs before the decision, where they are others


def _kinds() -> list[Kind]:
    found = []
    for name, optimizer in (("adam", Adam(0.003)), ("sgd", SGD(0.02, 0.9))):
        for size, epochs in ((150, 240), (2_000, 60)):
            for label, student, frozen, shifted in (
                ("teacher", "teacher", False, False),
                ("lacking", "lacking", False, False),
                ("frozen", "teacher", True, False),
                ("frozen-shifted", "teacher", True, True),
            ):
                named = f"{label}-{size}-{name}"
                found.append(Kind(named, optimizer, size, student, frozen, shifted, epochs))
        found.append(Kind(f"underfitted-{name}", optimizer, 2_000, "fresh", begun=5))
    return found


FULL = Plan(_kinds(), networks=20, runs=4)

QUICK = Plan(
    [
        replace(kind, epochs=4)
        for kind in _kinds()
        if kind.name in ("teacher-150-adam", "frozen-150-sgd")
    ],
    networks=3,
    runs=2,
)


def run(plan: Plan, seed: int = 0, *, cache: Path | None = None) -> dict[str, Any]:
    """Train all networks, ask the tests, and compare them with what inserting does.

    Returns:
        The numbers that `--json` writes: for each kind of network how many there are with a clear
        gain somewhere and with none anywhere, and for each test and level how often it lets
        something be inserted into these; under "details" the outcomes and p-values.
    """
    seeds = range(seed * plan.networks, (seed + 1) * plan.networks)
    jobs = [(kind, seeds, plan.runs, cache) for kind in plan.tasks]
    found = in_parallel(_of_kind, jobs, plan.workers, desc="whether", unit="kind")
    details = {kind.name: one for kind, one in zip(plan.tasks, found, strict=True)}
    groups = {"all": list(details)} | {kind: [kind] for kind in details}
    return {
        "kinds": {
            group: _rates([details[kind] for kind in some]) for group, some in groups.items()
        },
        "details": details,
        "about": {
            kind.name: {**asdict(kind), "optimizer": repr(kind.optimizer)} for kind in plan.tasks
        },
        "networks": plan.networks,
        "runs": plan.runs,
    }


def _of_kind(kind: Kind, seeds: Sequence[int], runs: int, cache: Path | None) -> dict[str, Any]:
    """The outcomes, or what the folder has of them."""
    model, data = _seeded(kind, seeds[0])
    tensors = [*model.parameters(), *(tensor for part in data for tensor in part)]
    key = digest(f"whether-{kind.name}", repr((kind, list(seeds), runs)), *tensors)
    return cached(cache, key, lambda: _outcomes(kind, seeds, runs))


def _rates(details: Sequence[Mapping[str, Any]]) -> dict[str, Any]:
    """How many networks gain clearly, and not at all, and the share inserted into of both."""
    clear, none = (np.concatenate(some) for some in zip(*map(_truth, details), strict=True))
    row: dict[str, Any] = {
        "networks": len(clear),
        "clear": int(clear.sum()),
        "none": int(none.sum()),
    }
    for test in TESTS:
        pvalues, sizes = np.concatenate([np.array(one["tests"][test], float) for one in details]).T
        row[test] = {str(level): _shares(pvalues <= level, clear, none) for level in LEVELS}
        row[test]["rule"] = _shares(
            (pvalues < _RULE.level) & (sizes >= _RULE.effect_size), clear, none
        )
    return row


def _shares(inserted: Any, clear: Any, none: Any) -> dict[str, float]:
    """How often something is inserted into networks with a clear gain, and with none."""
    return {
        name: float(inserted[some].mean()) if some.any() else math.nan
        for name, some in (("clear", clear), ("none", none))
    }


def _truth(details: Mapping[str, Any]) -> tuple[Any, Any]:
    """Whether some site gains clearly, and whether none gains, of each network."""
    gains, errors, losses = (np.array(details[name]) for name in ("gain", "error", "nothing"))
    beyond = gains / errors
    clear = ((beyond > 3) & (gains > _CLEAR * losses[:, None])).any(1)
    return clear, (beyond < 2).all(1)


def _outcomes(kind: Kind, seeds: Sequence[int], runs: int) -> dict[str, Any]:
    """Gains by inserting at each site, their standard errors, and the p-values of the tests."""
    made = [_seeded(kind, seed) for seed in seeds]
    models, parts = (
        [model for model, _ in made],
        list(zip(*(data for _, data in made), strict=True)),
    )
    first, learnt, judging, test = (
        samples([x for x, _ in part], [y for _, y in part]) for part in parts
    )
    begun = kind.epochs if kind.begun is None else kind.begun
    batch = 50 if kind.samples < 1_000 else 200
    order = Shuffle(list(seeds))
    trained, _ = train(
        ensemble(models), first, begun, kind.optimizer, loss=squared_error, batch=batch, order=order
    )
    if kind.frozen:
        trained = replace(trained, memory={})
    trained.write_to(models)
    for model in models:
        model.requires_grad_(not kind.frozen)
    blocks = [_blocks(model, seed) for model, seed in zip(models, seeds, strict=True)]
    rows = [i for i in range(len(seeds)) for _ in range(runs)]
    orders = Shuffle([1_000_000 + 1_000 * seed + k for seed in seeds for k in range(runs)])
    data = learnt.take(rows)
    final = []
    for site in range(-1, len(blocks[0])):
        grown, mask = _grown(trained.take(rows), [blocks[i] for i in rows], site, kind.frozen)
        after, _ = train(
            grown,
            data,
            kind.epochs,
            kind.optimizer,
            loss=squared_error,
            batch=batch,
            order=orders,
            moving=mask,
        )
        output, _ = forward(after.model, after.parameters, test.x[rows])
        each = (output - test.y[rows]).square().mean(1)  # (networks × runs, samples)
        final.append(each.unflatten(0, (len(seeds), runs)).double().detach())
    losses = torch.stack(final)
    gain = losses[:1] - losses[1:]  # (sites, networks, runs, samples)
    spread = gain.mean(3).var(2) / runs + gain.mean(2).var(2) / gain.shape[3]
    asked, judges = ([*zip(part.x.mT, part.y.mT, strict=True)] for part in (learnt, judging))
    found = [_tested(*each) for each in zip(models, blocks, asked, judges, strict=True)]
    return {
        "gain": gain.mean((2, 3)).T.tolist(),
        "error": spread.sqrt().T.tolist(),
        "nothing": losses[0].mean((1, 2)).tolist(),
        "tests": {test: [one[test] for one in found] for test in TESTS},
        "chosen": [one["chosen"] for one in found],
    }


def _seeded(kind: Kind, seed: int) -> tuple[nn.Sequential, list[Data]]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return _made(kind)


def _made(kind: Kind) -> tuple[nn.Sequential, list[Data]]:
    """The untrained student; data of before and after the decision, to judge, and to test."""
    teacher = deep_teacher(_WIDTH, _DEPTH)
    first, tanh, *blocks, last = teacher
    turned = torch.linalg.qr(torch.randn(6, 6))[0] if kind.shifted else torch.eye(6)
    with torch.no_grad():
        scale = teacher(torch.randn(10_000, 6)).std(0)
        weight, bias = last.parameters()
        weight.div_(scale[:, None])
        bias.div_(scale)

        def data(count: int, turned: Tensor) -> Data:
            x = torch.randn(count, 6)
            y = teacher(x @ turned)
            return x, y + _NOISE * torch.randn_like(y)

        before = data(2_000 if kind.frozen else kind.samples, torch.eye(6))
        after = data(kind.samples, turned) if kind.frozen else before
        parts = [before, after, data(max(150, kind.samples // 4), turned), data(_TEST, turned)]
    missing = int(torch.randint(_DEPTH, ()))
    if kind.student == "lacking":
        del blocks[missing]
    if kind.student == "fresh":
        return residual(6, _WIDTH, _DEPTH, 3), parts
    return nn.Sequential(first, tanh, *blocks, last), parts


def _blocks(model: nn.Sequential, seed: int) -> list[nn.Module]:
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(1_000_003 + seed)
        return [cg.blocks.ResidualMLP(width, width, nn.Tanh()) for _, width in sites_of(model)]


def _grown(
    trained: Ensemble, blocks: Sequence[Sequence[nn.Module]], site: int, frozen: bool
) -> tuple[Ensemble, Tensor | None]:
    """With the layer at the site, −1 for none; and 1 for the parameters that learn, 0 elsewhere."""
    if site < 0:
        return trained, torch.zeros_like(trained.parameters) if frozen else None
    layer = NewLayer.of(*(each[site] for each in blocks))
    grown = insert_layer(trained, site, layer)
    if not frozen:
        return grown, None
    blank = replace(trained, parameters=torch.zeros_like(trained.parameters), memory={})
    mask = insert_layer(blank, site, replace(layer, start=torch.ones_like(layer.start)))
    return grown, mask.parameters


def _tested(
    model: nn.Sequential, blocks: Sequence[nn.Module], data: Data, judging: Data
) -> dict[str, Any]:
    """The site that is chosen; p-value and effect size of each test there."""
    names = [name for name, _ in sites_of(model)]
    candidates = [cg.Candidate(*pair) for pair in zip(names, blocks, strict=True)]
    problem = cg.GrowthProblem(model, nn.MSELoss(), [data], candidates)
    solution = cg.solve(problem, cg.TopK(1), validation=[judging], stationarity=False)
    (chosen,) = solution.decision.chosen
    sensitivity, site = solution.sensitivities[chosen], names.index(chosen)
    found: dict[str, Any] = {"chosen": site}
    both = {"validation": sensitivity.held_out, "cross-fitted": sensitivity.cross_fitted}
    for name, other in both.items():
        assert other is not None
        found[name] = other.pvalue, other.effect_size
    found["score"] = score_test(model, site, blocks[site], data), math.inf
    return found


def score_test(model: nn.Sequential, site: int, block: nn.Module, data: Data) -> float:
    """p-value of Rao's score test (the Lagrange multiplier test) of v = 0, for the squared error.

    The statistic n·R² of the regression of ones on the scores of all samples is Nλᵀ(I_vv −
    I_vθ I_θθ⁻¹ I_θv)⁻¹λ at a stationary θ, I the mean outer product of the scores. Elsewhere θ's
    own part is projected out. It is compared with χ² of as many degrees of freedom as v's scores
    add to the rank.

    Source: Rao 1948; Davidson and MacKinnon, *Econometric Theory and Methods*, 2004, section 10.5.
    """
    layers, place = list(model), site + 1  # the first stage is two modules
    network = nn.Sequential(*layers[: place + 1], block, *layers[place + 1 :])
    pinned = {f"{place + 1}.outer.weight"}
    values = {n: p.detach().double() for n, p in network.named_parameters()}
    moving = {n: values[n] for n, p in network.named_parameters() if n in pinned or p.requires_grad}
    moving = {n: v for n, v in moving.items() if not n.startswith(f"{place + 1}.") or n in pinned}

    def loss(some: dict[str, Tensor], x: Tensor, y: Tensor) -> Tensor:
        output = functional_call(network, values | some, (x[None],))
        return nn.functional.mse_loss(output, y[None])

    scores = vmap(grad(loss), (None, 0, 0))(moving, *(part.double() for part in data))
    new = torch.cat([scores[n].flatten(1) for n in moving if n in pinned], 1)
    old = [scores[n].flatten(1) for n in moving if n not in pinned]
    basis = _orthonormal(torch.cat(old, 1)) if old else new.new_zeros(len(new), 0)
    more = _orthonormal(new - basis @ (basis.T @ new))
    ones = torch.ones(len(new), dtype=new.dtype)
    return float(stats.chi2.sf(float((more.T @ ones).square().sum()), more.shape[1]))


def _orthonormal(columns: Tensor) -> Tensor:
    left, size, _ = torch.linalg.svd(columns, full_matrices=False)
    return left[:, size > 1e-9 * size.amax().clamp(min=1e-300)]


def tables(found: Mapping[str, Any]) -> RenderableType:
    """How to read it, and the rates of each kind."""
    columns = [(test, level) for test in TESTS for level in ("0.05", "rule")]
    columns[-1] = "score", "0.01"  # which has no effect size
    rows = [
        (
            kind,
            {name: str(row[name]) for name in ("networks", "clear", "none")}
            | {
                f"{test}, {level}": "/".join(
                    number(row[test][level][who], ".2f") for who in ("clear", "none")
                )
                for test, level in columns
            },
        )
        for kind, row in found["kinds"].items()
    ]
    return Group(
        Text(
            f"{found['networks']} networks of each kind, {found['runs']} runs after every "
            "insertion.\n"
        ),
        Text(
            "A layer helps clearly where the held-out loss falls by more than three standard "
            f"errors (over runs and held-out samples) and {_CLEAR:.0%}; nowhere, where it falls by "
            "less than two at every site. Tested is the site that the recommended norm chooses, at "
            f"a level, or by the rule {_RULE}: on validation data, by cross-fitting the training "
            "data, and by Rao's score test.\n"
        ),
        tabled("Inserted into networks with a clear gain / without any", "students", rows),
    )
