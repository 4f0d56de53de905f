"""What the steps after an insertion are worth: tables for a terminal, numbers for a file."""

from __future__ import annotations

import json
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from constrained_growth.experiments.decisions.statistics import LEVEL, Estimate
from constrained_growth.experiments.growth.step_policies import POLICIES
from constrained_growth.experiments.growth.steps import WATCHED, StepBenchmark
from constrained_growth.experiments.tables import titled

WIDTH = 132
"""Characters in a line of the widest table."""


def tables(found: StepBenchmark) -> RenderableType:
    """The machine, how to read it, a table for each task, and what the policies are."""
    return Group(
        Text(f"{found.machine}; seed {found.seed}. {found.plan.networks} networks of each task.\n"),
        Text(
            "All policies go on from the same networks with the same new layer, on the same "
            "batches. Final loss: training loss over the last tenth of the epochs, and its "
            "difference to that of another policy, in percent of it. Jump: by how much the loss "
            f"on all training data is at most above that at the insertion, in the first {WATCHED} "
            f"steps, in percent of it. In brackets {LEVEL:.0%} bootstrap intervals of the paired "
            "differences; * where they leave out zero.\n"
        ),
        *(_task(task, found) for task in found.verdicts),
        *(Text(f"{p.name}: {p.about}; compared with “{p.against}”.") for p in POLICIES),
    )


def to_json(found: StepBenchmark, command: str) -> str:
    """All that the tables show, and what every network came to.

    Args:
        found: The result.
        command: What was typed.
    """
    content: dict[str, Any] = {
        "tasks": {
            task: {
                name: {
                    **asdict(verdict),
                    "finals": found.followed[task][name].final.tolist(),
                    "jumps": found.followed[task][name].jump.tolist(),
                }
                for name, verdict in verdicts.items()
            }
            for task, verdicts in found.verdicts.items()
        },
        "command": command,
        "machine": asdict(found.machine),
        "seed": found.seed,
        "networks": found.plan.networks,
    }
    return json.dumps(content, ensure_ascii=False)


def _task(task: str, found: StepBenchmark) -> Table:
    about = {one.name: one.about for one in found.plan.tasks}
    title = f"{task}: {about[task]}"
    table = titled(title, "policy", "final loss", "difference", "jump", "difference", width=WIDTH)
    for name, verdict in found.verdicts[task].items():
        table.add_row(
            name,
            f"{verdict.final:.4g}",
            _percent(verdict.final_difference),
            f"{100 * verdict.jump:.1f} %",
            _percent(verdict.jump_difference),
        )
    return table


def _percent(estimate: Estimate) -> str:
    clear = estimate.low > 0 or estimate.high < 0
    value, low, high = (100 * v for v in (estimate.value, estimate.low, estimate.high))
    return f"{value:+.1f} [{low:+.1f} {high:+.1f}]{'*' if clear else ' '}"
