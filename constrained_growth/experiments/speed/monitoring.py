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
from torch import Tensor

import constrained_growth as cg
from constrained_growth._progress import progress_bar
from constrained_growth.experiments.speed.networks import CLASSES, INPUTS, Network, feedforward
from constrained_growth.experiments.tables import interval, titled
from constrained_growth.experiments.timing import Effort, compare, described, machine, one_thread

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
    """Time training steps with and without watching, in turn, on one thread.

    Returns:
        The numbers that `--json` writes (`cache` is not used: times are measured anew). A cell has
        the median time of a step in milliseconds, for each way of watching the time that it adds,
        in steps, and the operations in matrix products of a "step" (forward, backward and the
        gradient of θ: 6 for each weight and sample) and of the multipliers, "exact".
    """
    sizes = list(itertools.product(plan.widths, plan.batches))
    with one_thread():
        bar = progress_bar(sizes, desc="monitoring", unit="cell")
        cells = [_cell(width, batch, plan, seed) for width, batch in bar]
        here = machine()
    return {"machine": here, "seed": seed, "cells": cells}


def _cell(width: int, batch: int, plan: Plan, seed: int) -> dict[str, Any]:
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


def _step(network: Network, data: tuple[Tensor, Tensor]) -> Callable[[], None]:
    """One step of SGD, so short that the parameters hardly move."""
    input, target = data
    optimizer = torch.optim.SGD(network.model.parameters(), lr=1e-6)

    def step() -> None:
        optimizer.zero_grad()
        network.loss_fn(network.model(input), target).backward()
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
    """The machine, how to read it, the table, and its range."""
    table = titled(
        f"Feedforward ReLU network, {DEPTH} hidden layers, a candidate after each",
        "width",
        *("batch", "step/ms", *MODES, "products", "rounds"),
    )
    for cell in found["cells"]:
        table.add_row(
            *(str(cell["width"]), str(cell["batch"]), f"{cell['step_ms']:.2f}"),
            *(interval(*cell["overheads"][name].values(), form="+.0%") for name in MODES),
            f"{cell['operations']['exact'] / cell['operations']['step']:.1%}",
            str(cell["rounds"]),
        )
    ranges = []
    for name in MODES:
        medians = [cell["overheads"][name]["median"] for cell in found["cells"]]
        middle = statistics.median(medians)
        ranges.append(f"{name}: {min(medians):.0%} to {max(medians):.0%}, median {middle:.0%}.")
    return Group(
        Text(f"{described(found['machine'])}; seed {found['seed']}.\n"),
        Text(
            "Time added to a training step (zero_grad, forward, loss, backward, SGD), in steps: "
            "median [quartiles] over the rounds. Products: operations in matrix products that "
            "watching every step adds to those of a step.\n"
        ),
        table,
        Text("\n".join(ranges)),
    )
