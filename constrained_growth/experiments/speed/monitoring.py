"""What it costs to watch the multipliers during training, on top of an ordinary training step."""

from __future__ import annotations

import json
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass

import torch
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from torch import Tensor

import constrained_growth as cg
from constrained_growth.experiments.speed.networks import CLASSES, INPUTS, Network, feedforward
from constrained_growth.experiments.timing import Effort, Machine, Spread, compare, one_thread

DEPTH = 8
SKETCH = 16
EVERY = 10

WIDTH = 140
"""Characters in a line of the table."""

Options = Mapping[str, int | None]

MODES: Mapping[str, Options] = {
    "exact": {"sketch": None, "every": 1},
    "sketch": {"sketch": SKETCH, "every": 1},
    f"exact, 1 in {EVERY}": {"sketch": None, "every": EVERY},
    f"sketch, 1 in {EVERY}": {"sketch": SKETCH, "every": EVERY},
}
"""Ways to watch."""

LIMITS = {name: 0.4 if name == "exact" else 0.1 for name in MODES}
"""How much of a step each may cost on top."""


@dataclass(frozen=True)
class Plan:
    """What to measure.

    Attributes:
        widths: Of the network.
        batches: Samples in a batch.
        effort: How long to go on with one cell.
        seconds: Rough time of the steps that are timed in one stroke.
        most: Steps at most in one stroke.
    """

    widths: Sequence[int]
    batches: Sequence[int]
    effort: Effort
    seconds: float
    most: int


FULL = Plan((64, 256, 1024), (64, 512), Effort(fewest=7, most=60, seconds=20.0), 0.05, 100)
QUICK = Plan((64, 256), (64,), Effort(fewest=3, most=3, seconds=0.0), 0.02, 20)


@dataclass(frozen=True)
class Operations:
    """Multiplications and additions in matrix products, for one step or its watching.

    Attributes:
        step: Forward, backward and the gradient of θ: 6 for each weight and sample.
        exact: λ at every site: 2 width² for each sample.
        sketch: 2k (2 width + 1) for each sample and site.
    """

    step: int
    exact: int
    sketch: int

    @classmethod
    def of(cls, width: int, batch: int) -> Operations:
        """In one step of the network of `DEPTH` hidden layers."""
        weights = INPUTS * width + (DEPTH - 1) * width**2 + width * CLASSES
        unneeded = 2 * INPUTS * width  # no gradient of the input
        return cls(
            step=batch * (6 * weights - unneeded),
            exact=batch * DEPTH * 2 * width**2,
            sketch=batch * DEPTH * 2 * SKETCH * (2 * width + 1),
        )


@dataclass(frozen=True)
class Cell:
    """What was measured at one width and batch size.

    Attributes:
        width, batch: Of the network and the data.
        step_ms: Median time of a step without watching, in milliseconds.
        overheads: Way of watching → its time on top, in steps.
        rounds: How many rounds there were.
        operations: In matrix products.
    """

    width: int
    batch: int
    step_ms: float
    overheads: Mapping[str, Spread]
    rounds: int
    operations: Operations


@dataclass(frozen=True)
class MonitoringCost:
    """All that `bench monitoring` measured.

    Attributes:
        machine: Where.
        seed: Of the networks and the data.
        cells: One for each width and batch size.
    """

    machine: Machine
    seed: int
    cells: tuple[Cell, ...]

    def met(self) -> dict[str, bool]:
        """Way of watching → whether no cell is above its limit."""
        return {
            name: all(cell.overheads[name].median <= limit for cell in self.cells)
            for name, limit in LIMITS.items()
        }

    def to_json(self) -> str:
        """All numbers."""
        return json.dumps({**asdict(self), "limits": LIMITS, "met": self.met()}, indent=2)


def run_monitoring(plan: Plan, seed: int) -> MonitoringCost:
    """Time training steps with and without watching, in turn, on one thread."""
    with one_thread():
        cells = tuple(_cell(w, b, plan, seed) for w in plan.widths for b in plan.batches)
        return MonitoringCost(Machine.here(), seed, cells)


def _cell(width: int, batch: int, plan: Plan, seed: int) -> Cell:
    torch.manual_seed(seed)
    network = feedforward(DEPTH, width)
    data = network.draw(batch)
    step = _step(network, data)
    one = compare({"plain": step, "again": step}, Effort(5, 5, 0.0)).seconds
    count = max(1, min(plan.most, round(plan.seconds / one)) // EVERY) * EVERY

    def steps() -> None:
        for _ in range(count):
            step()

    problem = cg.GrowthProblem(network.model, network.loss_fn, [data], network.candidates)
    runs = {"plain": steps}
    for name, options in MODES.items():
        runs[name] = _watched(problem, steps, options)
        runs[name]()
    found = compare(runs, plan.effort)
    overheads = {
        name: Spread(ratio.median - 1, ratio.low - 1, ratio.high - 1)
        for name, ratio in found.ratios.items()
    }
    milliseconds = 1e3 * found.seconds / count
    return Cell(width, batch, milliseconds, overheads, found.rounds, Operations.of(width, batch))


def _step(network: Network, data: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """One training step with SGD, so short that the parameters hardly move."""
    input, target = data
    optimizer = torch.optim.SGD(network.model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        network.loss_fn(network.model(input), target).backward()
        optimizer.step()

    return step


def _watched(
    problem: cg.GrowthProblem, steps: Callable[[], None], options: Options
) -> Callable[[], None]:
    """The steps within one and the same window, which was made before."""
    with cg.monitor(problem, **options) as watcher:  # type: ignore[arg-type]
        pass

    def run() -> None:
        with watcher.watching():
            steps()

    return run


def report(found: MonitoringCost) -> RenderableType:
    """The machine, the table, and what was reached."""
    table = Table(title=f"Feedforward ReLU network, {DEPTH} hidden layers, a candidate after each")
    for heading in ("width", "batch", "step/ms", *MODES, "products: exact", "sketch", "rounds"):
        table.add_column(heading, justify="right")
    for cell in found.cells:
        counts = cell.operations
        table.add_row(
            *(str(cell.width), str(cell.batch), f"{cell.step_ms:.2f}"),
            *(_percent(cell.overheads[name]) for name in MODES),
            *(f"{part / counts.step:.1%}" for part in (counts.exact, counts.sketch)),
            str(cell.rounds),
        )
    return Group(
        Text(f"{found.machine}; seed {found.seed}.\n"),
        Text(
            "Time on top of a training step (zero_grad, forward, loss, backward, SGD), in steps: "
            f"median [quartiles] over the rounds. The sketch has k = {SKETCH}. Products: "
            "operations in matrix products on top of those of a step.\n"
        ),
        table,
        *(Text(_verdict(found, name)) for name in MODES),
    )


def _verdict(found: MonitoringCost, name: str) -> str:
    medians = [cell.overheads[name].median for cell in found.cells]
    word = "met" if found.met()[name] else "missed"
    middle = statistics.median(medians)
    return (
        f"{name}: {min(medians):.0%} to {max(medians):.0%}, median {middle:.0%}; limit "
        f"{LIMITS[name]:.0%} {word}."
    )


def _percent(spread: Spread) -> str:
    return f"{spread.median:+.0%} [{spread.low:+.0%}, {spread.high:+.0%}]"
