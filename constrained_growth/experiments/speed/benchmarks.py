"""What the multiplier pass costs, in ordinary gradient passes of the same network."""

from __future__ import annotations

import itertools
import json
import math
import statistics
from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from typing import Any

import torch
from torch import Tensor
from tqdm import tqdm

import constrained_growth as cg
from constrained_growth._multipliers.one_pass import measure
from constrained_growth.blocks import pinned_parameters
from constrained_growth.experiments.speed.networks import (
    Network,
    convolutional,
    feedforward,
    pointwise,
    residual,
    transformer,
    with_all_built_in,
)
from constrained_growth.experiments.timing import (
    Comparison,
    Effort,
    Machine,
    Spread,
    compare,
    one_thread,
)

Multipliers = Mapping[str, Mapping[str, Tensor]]

COLUMNS = ("ratio", "with_stationarity", "all_built_in")
"""The multiplier pass, the same with ∇_θ L, and the network with all candidates built in."""

AGREEMENT = 1e-6
"""λ and the gradients of the network with all candidates built in, relative to their norm."""


@dataclass(frozen=True)
class Case:
    """A network and batches to measure on.

    Attributes:
        make: `make(depth, width)` gives the network.
        depth: How many blocks, and candidates.
        width: Size of the last dimension, or number of channels.
        batch: Samples in a batch.
        samples: In all.
    """

    make: Callable[[int, int], Network]
    depth: int
    width: int
    batch: int
    samples: int


@dataclass(frozen=True)
class Cell:
    """What was measured in one case.

    Attributes:
        network: Its name.
        depth: Of the case, and so on.
        plain_ms: Median time of an ordinary gradient pass, in milliseconds.
        ratios: What else was timed → its time in ordinary gradient passes, over the pairs.
        pairs: How many rounds there were.
        lambda_error: ‖λ − λ′‖/‖λ′‖ of the worst candidate, λ′ from the network with all
            candidates built in.
    """

    network: str
    depth: int
    width: int
    batch: int
    samples: int
    plain_ms: float
    ratios: Mapping[str, Spread]
    pairs: int
    lambda_error: float | None = None

    def row(self) -> dict[str, Any]:
        """The cell without nesting: `name`, `name_low` and `name_high` for each ratio."""
        flat = asdict(self)
        for name, spread in flat.pop("ratios").items():
            flat |= {name: spread["median"]}
            flat |= {f"{name}_{end}": spread[end] for end in ("low", "high")}
        return flat


@dataclass(frozen=True)
class Target:
    """Something to reach, and what was reached."""

    what: str
    value: float
    limit: float

    @property
    def met(self) -> bool:
        """Whether it was reached."""
        return self.value <= self.limit


@dataclass(frozen=True)
class MultiplierBenchmark:
    """All that `bench multipliers` measured; `to_json` writes all of it.

    Attributes:
        machine: Where.
        seed: Of the networks and the data.
        tables: "feedforward", "residual" and "others" → cells with the ratios `COLUMNS`.
        whole: `solve` as a whole, in one case.
    """

    machine: Machine
    seed: int
    tables: Mapping[str, tuple[Cell, ...]]
    whole: Cell

    def medians(self, table: str, column: str) -> list[float]:
        """One column of a table."""
        return [cell.ratios[column].median for cell in self.tables[table]]

    def targets(self) -> tuple[Target, ...]:
        """What there is to reach."""
        found = []
        for name in self.tables:
            ratios = self.medians(name, "ratio")
            if name != "others":
                mean = statistics.geometric_mean(ratios)
                found.append(Target(f"{name}: geometric mean", mean, 1.0))
            found.append(Target(f"{name}: worst cell", max(ratios), 1.25))
            if name != "others":
                worst = max(self.medians(name, "with_stationarity"))
                found.append(Target(f"{name}: worst cell with stationarity", worst, 1.45))
        errors = [cell.lambda_error or 0.0 for cells in self.tables.values() for cell in cells]
        return *found, Target("λ: worst relative difference", max(errors), AGREEMENT)

    def summary(self) -> dict[str, Any]:
        """Geometric means, worst cells, and the targets."""
        columns = {
            table: {column: self.medians(table, column) for column in COLUMNS}
            for table in self.tables
        }
        return {
            "tables": {
                table: {
                    column: {"geometric_mean": statistics.geometric_mean(v), "worst": max(v)}
                    for column, v in found.items()
                }
                for table, found in columns.items()
            },
            "targets": [asdict(target) | {"met": target.met} for target in self.targets()],
        }

    def to_json(self) -> str:
        """The result as JSON text."""
        content = {
            "machine": asdict(self.machine),
            "seed": self.seed,
            "tables": {name: [cell.row() for cell in cells] for name, cells in self.tables.items()},
            "solve": self.whole.row(),
            "summary": self.summary(),
        }
        return json.dumps(content, indent=2, allow_nan=False, ensure_ascii=False)


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        tables: Name of a table → its cases.
        whole: The case in which `solve` is timed as a whole.
        effort: How many pairs.
    """

    tables: Mapping[str, tuple[Case, ...]]
    whole: Case
    effort: Effort


def grid(make: Callable[[int, int], Network]) -> tuple[Case, ...]:
    """Depth × width × batch, on 4,096 samples.

    On 16 batches of 64 or 4 of 512 where the width is 1,024: a pass takes seconds there. What is
    done once a pass weighs more with fewer batches, so this is not to the pass's advantage.
    """
    sizes = itertools.product((4, 16, 32), (4, 64, 256, 1024), (64, 512))
    shorter = {64: 1024, 512: 2048}
    return tuple(Case(make, d, w, b, shorter[b] if w == 1024 else 4096) for d, w, b in sizes)


FULL = Plan(
    tables={
        "feedforward": grid(feedforward),
        "residual": grid(residual),
        "others": (
            Case(convolutional, depth=4, width=32, batch=16, samples=256),
            Case(convolutional, depth=4, width=32, batch=64, samples=256),
            Case(pointwise, depth=4, width=32, batch=16, samples=256),
            Case(pointwise, depth=4, width=32, batch=64, samples=256),
            Case(transformer, depth=4, width=128, batch=4, samples=64),
            Case(transformer, depth=4, width=128, batch=16, samples=64),
        ),
    },
    whole=Case(feedforward, depth=16, width=256, batch=64, samples=4096),
    effort=Effort(fewest=5, most=25, seconds=3.0),
)

_SMALL = ((4, 4, 64), (16, 64, 512), (4, 256, 64))

QUICK = Plan(
    tables={
        "feedforward": tuple(Case(feedforward, *sizes, 4096) for sizes in _SMALL),
        "residual": tuple(Case(residual, *sizes, 4096) for sizes in _SMALL),
        "others": (
            Case(convolutional, depth=2, width=16, batch=16, samples=64),
            Case(pointwise, depth=2, width=16, batch=16, samples=64),
            Case(transformer, depth=2, width=64, batch=4, samples=16),
        ),
    },
    whole=Case(feedforward, depth=4, width=256, batch=64, samples=4096),
    effort=Effort(fewest=3, most=3, seconds=0.0),
)


def run_multipliers(
    plan: Plan = FULL, seed: int = 0, *, dtype: torch.dtype = torch.float32
) -> MultiplierBenchmark:
    """Measure everything in a plan, on one thread.

    Args:
        plan: What.
        seed: Of the networks and the data. The random state of the caller is left alone.
        dtype: Precision of the networks.
    """
    cases = [(name, case) for name, some in plan.tables.items() for case in some]
    tables: dict[str, list[Cell]] = {name: [] for name in plan.tables}
    with one_thread():
        for name, case in (bar := tqdm(cases, unit="cell", leave=False, disable=None)):
            bar.set_description(f"{name} {case.depth} × {case.width}, batch {case.batch}")
            tables[name].append(measure_cell(case, plan.effort, seed, dtype))
        return MultiplierBenchmark(
            machine=Machine.here(),
            seed=seed,
            tables={name: tuple(cells) for name, cells in tables.items()},
            whole=measure_whole(plan.whole, plan.effort, seed, dtype),
        )


def measure_cell(case: Case, effort: Effort, seed: int, dtype: torch.dtype) -> Cell:
    """The multiplier pass and its opponent in one case."""
    subject = Subject(case, seed, dtype)
    runs: dict[str, Callable[[], Any]] = {
        "plain": subject.plain_pass,
        "ratio": subject.multiplier_pass,
        "with_stationarity": partial(subject.multiplier_pass, gradients=True),
        "all_built_in": subject.pass_with_all_built_in,
    }
    subject.plain_pass()  # to warm up, as do the next two
    error = disagreement(subject.multiplier_pass(), subject.pass_with_all_built_in())
    return _cell(case, compare(runs, effort), error)


def measure_whole(case: Case, effort: Effort, seed: int, dtype: torch.dtype) -> Cell:
    """`solve` as a whole in one case."""
    subject = Subject(case, seed, dtype)
    runs: dict[str, Callable[[], Any]] = {
        "plain": subject.plain_pass,
        "ratio": subject.multiplier_pass,
        "solve_without_stationarity": partial(subject.solve, stationarity=False),
        "solve": subject.solve,
        "problem_and_solve": lambda: subject.solve(subject.new_problem()),
    }
    for run in runs.values():
        run()
    return _cell(case, compare(runs, effort))


class Subject:
    """The network, the data and the problem of a case, and the passes to time."""

    def __init__(self, case: Case, seed: int, dtype: torch.dtype) -> None:
        with torch.random.fork_rng(devices=[]):
            torch.manual_seed(seed)
            self._network = case.make(case.depth, case.width)
            inputs, targets = self._network.draw(case.samples)
        self.model = self._network.model.to(dtype)
        inputs = inputs.to(dtype) if inputs.is_floating_point() else inputs
        self._samples = case.samples
        self._data = list(zip(inputs.split(case.batch), targets.split(case.batch), strict=True))
        self.problem = self.new_problem()
        self._extended = with_all_built_in(self.model, self._network.candidates).to(dtype)

    def new_problem(self) -> cg.GrowthProblem:
        """The problem, checked anew."""
        network = self._network
        return cg.GrowthProblem(self.model, network.loss_fn, self._data, network.candidates)

    def plain_pass(self) -> None:
        """An ordinary gradient pass."""
        loss_fn = self._network.loss_fn
        for input, target in self._data:
            self.model.zero_grad()
            loss_fn(self.model(input), target).backward()

    def multiplier_pass(self, *, gradients: bool = False) -> Multipliers:
        """Λ of all candidates, with their standard errors."""
        found = measure(
            self.model,
            self._network.loss_fn,
            self._data,
            self.problem.sites,
            gradients=gradients,
            progress=False,
        )
        return {name: estimate.multiplier for name, estimate in found.estimates.items()}

    def solve(
        self, problem: cg.GrowthProblem | None = None, *, stationarity: bool = True
    ) -> cg.Solution:
        """`cg.solve`, as a user calls it."""
        return cg.solve(problem or self.problem, stationarity=stationarity, progress=False)

    def pass_with_all_built_in(self) -> Multipliers:
        """Λ of all candidates from the network that holds them all, without standard errors."""
        model, loss_fn = self._extended, self._network.loss_fn
        model.zero_grad()
        for input, target in self._data:
            (loss_fn(model(input), target) * (len(target) / self._samples)).backward()
        return {
            candidate.name: {
                name: -parameter.grad
                for name, parameter in self._pins_built_in(candidate).items()
                if parameter.grad is not None
            }
            for candidate in self._network.candidates
        }

    def _pins_built_in(self, candidate: cg.Candidate) -> dict[str, torch.nn.Parameter]:
        return pinned_parameters(self._extended.get_submodule(f"{candidate.after}.1"))


def disagreement(found: Multipliers, other: Multipliers) -> float:
    """‖λ − λ′‖/‖λ′‖ of the candidate where it is largest; 0 where both are 0."""
    errors = []
    for name, tensors in found.items():
        apart = _norm({key: value - other[name][key] for key, value in tensors.items()})
        errors.append(apart / (_norm(other[name]) or 1.0))
    return max(errors)


def _norm(tensors: Mapping[str, Tensor]) -> float:
    return math.sqrt(sum(float(t.square().sum(dtype=torch.float64)) for t in tensors.values()))


def _cell(case: Case, compared: Comparison, error: float | None = None) -> Cell:
    return Cell(
        network=case.make.__name__,
        depth=case.depth,
        width=case.width,
        batch=case.batch,
        samples=case.samples,
        plain_ms=1e3 * compared.seconds,
        ratios=compared.ratios,
        pairs=compared.rounds,
        lambda_error=error,
    )
