"""`bench multipliers`: what multipliers cost, in ordinary gradient passes of the same network."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

import constrained_growth as cg
from constrained_growth._progress import progress_bar
from constrained_growth.blocks import pinned_parameters
from constrained_growth.experiments.speed.gromo import gromo_decision
from constrained_growth.experiments.speed.networks import (
    convolutional,
    feedforward,
    residual,
    transformer,
    vision,
    with_all_built_in,
)
from constrained_growth.experiments.speed.subject import Subject, solving
from constrained_growth.experiments.tables import spread, titled
from constrained_growth.experiments.timing import Effort, compare

Multipliers = Mapping[str, Mapping[str, Tensor]]
Rows = Sequence[Mapping[str, Any]]

COLUMNS = {
    "ratio": "decision",
    "frobenius": "Frobenius",
    "with_stationarity": "… and ‖∇_θ L‖",
    "rebatched": "batches of 2,048",
    "all_built_in": "all built in",
}
"""What is timed: `solve` without and with ∇_θ L, in Frobenius' norm too, `solve` on larger batches,
and the network that contains all candidates."""

REBATCHED = 2048
"""Samples in a larger batch."""

TITLES = {
    "feedforward": "Feedforward ReLU networks, an identity layer after every ReLU",
    "residual": "Residual networks, one more block with two weights (W₂ pinned) after every block",
    "others": "A residual ConvNet, a GPT and a ViT, a residual candidate after every block",
}

NETWORKS = {"convolutional": "ConvNet", "transformer": "GPT", "vision": "ViT"}


@dataclass(frozen=True)
class Case:
    """A network of `make(depth, width, samples)`, and the size of the batches."""

    make: Callable[[int, int, int], Subject]
    depth: int
    width: int
    batch: int
    samples: int

    def subject(self, seed: int, dtype: torch.dtype) -> Subject:
        """The network and its batches; the random state is left as it was."""
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            made = self.make(self.depth, self.width, self.samples)
        made = made.to(torch.device("cpu"), dtype)
        (whole,) = made.data
        pieces = zip(*(part.split(self.batch) for part in whole), strict=True)
        return replace(made, data=list(pieces))


@dataclass(frozen=True)
class Plan:
    """What to measure: name of a table → its cases, and how many pairs."""

    tables: Mapping[str, tuple[Case, ...]]
    effort: Effort


def grid(make: Callable[[int, int, int], Subject]) -> tuple[Case, ...]:
    """Depth × width × batch, on 4,096 samples; at width 1,024, where passes are slow, on fewer.

    What is done once per pass weighs more with fewer batches: the multiplier pass is not flattered.
    """
    sizes = itertools.product((4, 16, 32), (4, 64, 256, 1024), (64, 512))
    shorter = {64: 1024, 512: 2048}
    return tuple(Case(make, d, w, b, shorter[b] if w == 1024 else 4096) for d, w, b in sizes)


FULL = Plan(
    tables={
        "feedforward": grid(feedforward),
        "residual": grid(residual),
        "others": (
            Case(convolutional, depth=4, width=32, batch=64, samples=256),
            Case(convolutional, depth=4, width=64, batch=64, samples=256),
            Case(transformer, depth=4, width=128, batch=16, samples=64),
            Case(transformer, depth=4, width=256, batch=16, samples=64),
            Case(vision, depth=4, width=128, batch=64, samples=256),
            Case(vision, depth=4, width=256, batch=64, samples=256),
        ),
    },
    effort=Effort(fewest=5, most=25, seconds=3.0),
)

_SMALL = ((4, 4, 64), (16, 64, 512), (4, 256, 64))

QUICK = Plan(
    tables={
        "feedforward": tuple(Case(feedforward, *sizes, 4096) for sizes in _SMALL),
        "residual": tuple(Case(residual, *sizes, 4096) for sizes in _SMALL),
        "others": (
            Case(convolutional, depth=2, width=16, batch=16, samples=64),
            Case(transformer, depth=2, width=64, batch=4, samples=16),
            Case(vision, depth=2, width=64, batch=4, samples=16),
        ),
    },
    effort=Effort(fewest=3, most=3, seconds=0.0),
)


def run(
    plan: Plan, seed: int = 0, *, cache: Path | None = None, dtype: torch.dtype = torch.float32
) -> dict[str, Any]:
    """Measure everything in a plan; the random state of the caller is left alone.

    Returns:
        The numbers that `--json` writes (`cache` is not used: times are measured anew). A row of a
        table has the median time of an ordinary gradient pass in milliseconds, for each of
        `COLUMNS` the median time in such passes with its quartiles, and the number of pairs.
    """
    cases = [(name, case) for name, some in plan.tables.items() for case in some]
    tables: dict[str, list[dict[str, Any]]] = {name: [] for name in plan.tables}
    for name, case in (bar := progress_bar(cases, desc="multipliers", unit="cell")):
        bar.set_description(f"{name} {case.depth} × {case.width}, batch {case.batch}")
        tables[name].append(_measured(case, plan.effort, seed, dtype))
    summary = {"tables": {name: _summary(rows) for name, rows in tables.items()}}
    return {"tables": tables, "summary": summary}


def _measured(case: Case, effort: Effort, seed: int, dtype: torch.dtype) -> dict[str, Any]:
    """A row of a table; the error of λ is that against the network with all built in."""
    subject = case.subject(seed, dtype)
    problem, extended = subject.problem(), with_all_built_in(subject)
    runs: dict[str, Callable[[], Any]] = {
        "plain": subject.plain_pass,
        "ratio": solving(problem),
        "frobenius": solving(problem, cg.norms.Frobenius()),
        "with_stationarity": solving(problem, stationarity=True),
        "rebatched": lambda: solving(subject.problem(cg.rebatch(subject.data, REBATCHED)))(),
        "all_built_in": lambda: built_in_multipliers(extended),
    }
    if case.make is feedforward:
        decide = gromo_decision(case.depth, case.width, subject.data, subject.loss_fn)
        runs |= {"gromo": decide} if decide is not None else {}
    subject.plain_pass()  # to warm up, like the next two
    error = disagreement(solving(problem)().multipliers, built_in_multipliers(extended))
    compared = compare(runs, effort)
    row = {key: value for key, value in vars(case).items() if key != "make"}
    row |= {"network": case.make.__name__, "plain_ms": 1e3 * compared.seconds}
    return row | compared.row() | {"lambda_error": error}


def _summary(rows: Rows) -> dict[str, dict[str, float]]:
    """Geometric mean and worst cell of every column."""
    return {
        column: {
            "geometric_mean": statistics.geometric_mean(row[column] for row in rows),
            "worst": max(row[column] for row in rows),
        }
        for column in COLUMNS
    }


def built_in_multipliers(extended: Subject) -> Multipliers:
    """From the network that contains all candidates, without standard errors."""
    extended.model.zero_grad()
    samples = sum(len(target) for _, target in extended.data)
    for input, target in extended.data:
        (extended.loss(input, target) * (len(target) / samples)).backward()
    found = dict[str, dict[str, Tensor]]()
    for candidate in extended.candidates:
        pins = pinned_parameters(extended.model.get_submodule(f"{candidate.after}.1"))
        found[candidate.name] = {k: -p.grad for k, p in pins.items() if p.grad is not None}
    return found


def disagreement(found: Multipliers, other: Multipliers) -> float:
    """‖λ − λ′‖/‖λ′‖ of the candidate where it is largest; 0 where both are 0."""
    errors = []
    for name, tensors in found.items():
        apart = _norm({key: value - other[name][key] for key, value in tensors.items()})
        errors.append(apart / (_norm(other[name]) or 1.0))
    return max(errors)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum(dtype=torch.float64)) for t in tensors.values()))


def tables(found: Mapping[str, Any]) -> RenderableType:
    """How to read it, and the tables."""
    return Group(
        Text(
            "Processor time in ordinary gradient passes (zero_grad, forward, loss, backward of the "
            "same model on the same batches): median [quartiles] over the pairs. A decision is "
            "solve(problem, stationarity=False), with standard errors; re-batching and checking "
            "the problem anew are timed where batches are larger. “All built in” is a network that "
            "contains all candidates, with gradients of the pinned parameters alone (and no "
            "standard errors); “λ differs” is ‖λ − λ′‖/‖λ′‖ against it, of the worst candidate. "
            "GroMo, if it is installed, decides about new neurons in each hidden layer.\n"
        ),
        *(
            _table(name, rows, found["summary"]["tables"][name])
            for name, rows in found["tables"].items()
        ),
    )


def _table(name: str, rows: Rows, summary: Mapping[str, Mapping[str, float]]) -> Table:
    samples = sorted({row["samples"] for row in rows})
    sizes = "depth", "width", "batch"
    gromo = ["gromo"] if any("gromo" in row for row in rows) else []
    table = titled(
        f"{TITLES.get(name, name)}; {' to '.join(f'{n:,}' for n in samples)} samples",
        "network" if name == "others" else "",
        *(*sizes, "plain/ms", *COLUMNS.values(), *(["GroMo"] if gromo else [])),
        *("pairs", "λ differs"),
    )
    for row in rows:
        table.add_row(
            NETWORKS.get(row["network"], ""),
            *(str(row[size]) for size in sizes),
            f"{row['plain_ms']:.1f}",
            *(spread(row, column) for column in [*COLUMNS, *gromo]),
            str(row["pairs"]),
            f"{row['lambda_error']:.0e}",
        )
    table.add_section()
    for of in ("geometric_mean", "worst"):
        # padded to where a cell has its median
        values = (f"{summary[column][of]:.2f}".ljust(len("0.00 [0.00 0.00]")) for column in COLUMNS)
        table.add_row(of.replace("_", " "), *[""] * 4, *values)
    return table
