"""`bench monitoring`: what watching the multipliers adds to an ordinary training step."""

from __future__ import annotations

import itertools
import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.console import Group, RenderableType
from rich.text import Text

import constrained_growth as cg
from constrained_growth._progress import progress_bar
from constrained_growth.experiments.speed.networks import CLASSES, INPUTS, feedforward
from constrained_growth.experiments.speed.subject import Subject
from constrained_growth.experiments.tables import interval, tabled
from constrained_growth.experiments.timing import Effort, compare

DEPTH, EVERY = 8, 10

MODES = {"every step": 1, f"1 step in {EVERY}": EVERY}
"""Way to watch → every how many steps."""


@dataclass(frozen=True)
class Plan:
    """Widths and batch sizes; rough time of the steps timed together, and how many at most."""

    widths: Sequence[int]
    batches: Sequence[int]
    effort: Effort
    seconds: float
    most: int


FULL = Plan((64, 256, 1024), (64, 512), Effort(fewest=7, most=60, seconds=20.0), 0.05, 100)
QUICK = Plan((64, 256), (64,), Effort(fewest=3, most=3, seconds=0.0), 0.02, 20)


def run(plan: Plan, seed: int = 0, *, cache: Path | None = None) -> dict[str, Any]:
    """Time training steps with and without watching, in turn.

    Returns:
        The numbers that `--json` writes (`cache` is not used: times are measured anew). A cell has
        the median time of a step in milliseconds, for each way of watching the time that it adds,
        in steps, and the operations in matrix products of a "step" (forward, backward and the
        gradient of θ: 6 for each weight and sample) and of the multipliers, "exact".
    """
    sizes = list(itertools.product(plan.widths, plan.batches))
    bar = progress_bar(sizes, desc="monitoring", unit="cell")
    return {"cells": [_cell(width, batch, plan, seed) for width, batch in bar]}


def _cell(width: int, batch: int, plan: Plan, seed: int) -> dict[str, Any]:
    torch.manual_seed(seed)
    subject = feedforward(DEPTH, width, batch)
    step = _step(subject)
    one = compare({"plain": step, "again": step}, Effort(5, 5, 0.0)).seconds
    count = max(1, min(plan.most, round(plan.seconds / one)) // EVERY) * EVERY

    def steps() -> None:
        for _ in range(count):
            step()

    problem = subject.problem()
    runs = {"plain": steps}
    for name, every in MODES.items():
        runs[name] = _watched(problem, steps, every)
        runs[name]()
    found = compare(runs, plan.effort)
    weights = INPUTS * width + (DEPTH - 1) * width**2 + width * CLASSES
    unneeded = 2 * INPUTS * width  # no gradient with respect to the input
    return {
        "width": width,
        "batch": batch,
        "step_ms": 1e3 * found.seconds / count,
        "overheads": {
            name: {key: value - 1 for key, value in vars(ratio).items()}
            for name, ratio in found.ratios.items()
        },
        "rounds": found.rounds,
        "operations": {
            "step": batch * (6 * weights - unneeded),
            "exact": batch * DEPTH * 2 * width**2,
        },
    }


def _step(subject: Subject) -> Callable[[], None]:
    """One step of SGD, so short that the parameters hardly move."""
    optimizer = torch.optim.SGD(subject.model.parameters(), lr=1e-6)

    def step() -> None:
        subject.plain_pass()
        optimizer.step()

    return step


def _watched(
    problem: cg.GrowthProblem, steps: Callable[[], None], every: int
) -> Callable[[], None]:
    """The steps within a window of a monitor that was made before."""
    with cg.monitor(problem, every=every) as watcher:
        pass

    def run() -> None:
        with watcher.watching():
            steps()

    return run


def tables(found: Mapping[str, Any]) -> RenderableType:
    """How to read it, the table, and its range."""
    rows = [
        (
            str(cell["width"]),
            {
                "batch": str(cell["batch"]),
                "step/ms": f"{cell['step_ms']:.2f}",
                **{
                    name: interval(*cell["overheads"][name].values(), form="+.0%") for name in MODES
                },
                "products": f"{cell['operations']['exact'] / cell['operations']['step']:.1%}",
                "rounds": str(cell["rounds"]),
            },
        )
        for cell in found["cells"]
    ]
    title = f"Feedforward ReLU network, {DEPTH} hidden layers, a candidate after each"
    ranges = []
    for name in MODES:
        medians = [cell["overheads"][name]["median"] for cell in found["cells"]]
        middle = statistics.median(medians)
        ranges.append(f"{name}: {min(medians):.0%} to {max(medians):.0%}, median {middle:.0%}.")
    return Group(
        Text(
            "Time added to a training step (zero_grad, forward, loss, backward, SGD), in steps: "
            "median [quartiles] over the rounds. Products: operations in matrix products that "
            "watching every step adds to those of a step.\n"
        ),
        tabled(title, "width", rows),
        Text("\n".join(ranges)),
    )
