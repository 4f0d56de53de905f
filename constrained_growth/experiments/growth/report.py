"""What growing saved: tables for a terminal, numbers for a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from statistics import mean, median
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from constrained_growth.experiments.decisions.statistics import LEVEL, Estimate
from constrained_growth.experiments.growth.benchmark import GrowthBenchmark, Outcome, Verdict
from constrained_growth.experiments.growth.runs import BIG
from constrained_growth.experiments.growth.tasks import GrowthTask
from constrained_growth.experiments.tables import titled

WIDTH = 150
"""Characters in a line of the widest table."""


def tables(found: GrowthBenchmark) -> RenderableType:
    """The machine, how to read it, and a table for each task."""
    return Group(
        Text(
            f"{found.machine}; seeds {found.seed} to {found.seed + found.plan.seeds - 1}, "
            f"{found.plan.workers} processes.\n"
        ),
        Text(
            "Multiply-adds (in units of 10⁹, counted, decisions included) and seconds until the "
            "training loss is the one that the big network trained from the start ends with: "
            "medians over seeds, and how much less than the big network needs, with the "
            f"{LEVEL:.0%} bootstrap interval. Final loss: when as many multiply-adds are spent as "
            "in the whole run of the big network; the mean over seeds, and its difference to that "
            "of the big network and of the first arm, with intervals. Where the target is not "
            "reached the cost counts as infinite.\n"
        ),
        *(_task(task, found) for task in found.plan.tasks),
    )


def to_json(found: GrowthBenchmark, command: str) -> str:
    """All that the tables show, seed by seed; null for what is not finite.

    Args:
        found: The result.
        command: What was typed.
    """
    content = {
        "tasks": {
            task: {arm: _entry(outcome) for arm, outcome in arms.items()}
            for task, arms in found.outcomes.items()
        },
        "against_big": {
            task: {arm: asdict(verdict) for arm, verdict in arms.items()}
            for task, arms in found.verdicts.items()
        },
        "settings": {task.name: _settings(task) for task in found.plan.tasks},
        "command": command,
        "machine": asdict(found.machine),
        "seed": found.seed,
        "seeds": found.plan.seeds,
    }
    return json.dumps(_finite(content), ensure_ascii=False, allow_nan=False)


def _task(task: GrowthTask, found: GrowthBenchmark) -> Table:
    title = f"{task.name}: {task.about}. {task.small} → {task.big} blocks, {task.steps} steps"
    headings = (
        "multiply-adds",
        "saved",
        "seconds",
        "saved",
        "reached",
        "final loss",
        f"− {BIG}",
        f"− {next(iter(found.outcomes[task.name]))}",
        "held out",
    )
    table = titled(title, "arm", *headings, width=WIDTH)
    for arm, outcome in found.outcomes[task.name].items():
        table.add_row(arm, *_cells(outcome, found.verdicts[task.name][arm]))
    return table


def _cells(outcome: Outcome, verdict: Verdict) -> list[str]:
    return [
        _number(_median(outcome.multiply_adds) / 1e9, ".3g"),
        _percent(verdict.saved),
        _number(_median(outcome.seconds), ".3g"),
        _percent(verdict.saved_seconds),
        f"{verdict.reached}/{len(outcome.multiply_adds)}",
        f"{mean(outcome.final_loss):.3g}",
        _difference(verdict.difference),
        _difference(verdict.behind),
        f"{mean(outcome.held_out):.3g}",
    ]


def _median(values: Sequence[float | None]) -> float:
    return median(math.inf if value is None else value for value in values)


def _number(value: float, form: str) -> str:
    return f"{value:{form}}" if math.isfinite(value) else "–"


def _percent(estimate: Estimate) -> str:
    shown = (_number(100 * v, ".0f") for v in (estimate.value, estimate.low, estimate.high))
    value, low, high = shown
    return f"{value} % [{low} {high}]"


def _difference(estimate: Estimate) -> str:
    return f"{estimate.value:.2g} [{estimate.low:.2g} {estimate.high:.2g}]"


def _entry(outcome: Outcome) -> dict[str, Any]:
    return {
        "multiply_adds": outcome.multiply_adds,
        "seconds": outcome.seconds,
        "final_loss": outcome.final_loss,
        "held_out_loss": outcome.held_out,
    }


def _settings(task: GrowthTask) -> dict[str, Any]:
    return {k: v for k, v in vars(task).items() if isinstance(v, int | float | str)}


def _finite(content: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
