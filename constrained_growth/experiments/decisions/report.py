"""How rules decided: tables for a terminal, numbers for a file."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict
from typing import Any

from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from constrained_growth.experiments.decisions.outcomes import MORE
from constrained_growth.experiments.decisions.statistics import LEVEL, Estimate, signal
from constrained_growth.experiments.decisions.study import (
    CLEAR,
    DecisionBenchmark,
    Judged,
    Verdict,
    groups,
)
from constrained_growth.experiments.tables import titled

WIDTH = 148
"""Characters in a line of the widest table."""


def tables(found: DecisionBenchmark) -> RenderableType:
    """The machine, how to read it, a table for each task, and the means over the suite."""
    plan = found.plan
    return Group(
        Text(
            f"{found.machine}; seed {found.seed}. {plan.networks} networks of each task, "
            f"{plan.runs} runs after every insertion.\n"
        ),
        Text(
            "Regret is relative to random: 0 is always the best site in expectation, 1 no better "
            f"than chance; in brackets the {LEVEL:.0%} bootstrap interval over networks. “At the "
            "pins” is the same for the choice of the site alone, where a rule starts its layer "
            "elsewhere. Loss is the final training loss. “− nothing” is that less the loss of "
            "inserting nothing. Cost is in gradient passes over the data, for one decision. Regret "
            f"“at equal cost”: every rule has {MORE} passes, and what its decision does not take "
            "of them is spent on epochs more of training; held against the same best and mean "
            "site, so that it is below 0 where these epochs buy more than the best site, and "
            "blank where a decision takes more.\n"
        ),
        *(_task(task, found.verdicts[task.task]) for task in found.tasks),
        _means(found),
    )


def to_json(found: DecisionBenchmark, command: str) -> str:
    """All that the tables show, and the losses and choices that they are made from.

    A number that is not finite is null.

    Args:
        found: The result.
        command: What was typed.
    """
    plan = found.plan
    content = {
        "tasks": {
            task: {arm: _row(verdict) for arm, verdict in arms.items()}
            for task, arms in found.verdicts.items()
        },
        "means": {
            group: {arm: _value(estimate) for arm, estimate in arms.items()}
            for group, arms in found.means.items()
        },
        "groups": {
            name: [task.task for task in tasks] for name, tasks in groups(found.tasks).items()
        },
        "equal_cost": {
            "passes": MORE,
            "tasks": {
                task: {arm: _value(v.equal_cost) for arm, v in arms.items() if v.equal_cost}
                for task, arms in found.verdicts.items()
            },
            "mean": {arm: _value(estimate) for arm, estimate in found.equal_cost.items()},
        },
        "details": {task.task: _details(task, found.verdicts[task.task]) for task in found.tasks},
        "command": command,
        "machine": asdict(found.machine),
        "seed": found.seed,
        "networks": plan.networks,
        "runs": plan.runs,
    }
    return json.dumps(_finite(content), ensure_ascii=False, allow_nan=False)


def _task(task: Judged, verdicts: Mapping[str, Verdict]) -> Table:
    clear, planted = signal(task.against), any(site is not None for site in task.planted)
    matters = "" if clear >= CLEAR else "; the place hardly matters"
    best, mean = task.against.best.mean(), task.against.mean.mean()
    headings = ["regret", "at the pins", "equal cost", "planted", "loss", "− nothing"]
    headings += ["inserted", "cost"]
    columns = [heading for heading in headings if planted or heading != "planted"]
    table = titled(
        f"{task.task}: {task.about}. Best site {best:.4g}, mean site {mean:.4g} "
        f"({clear:.1f} standard errors apart{matters}), "
        f"not inserting {task.outcomes.nothing[..., 0].mean():.4g}. Half {task.half}.",
        "rule",
        *columns,
        width=WIDTH,
    )
    for arm, v in verdicts.items():
        cells = {
            "regret": _shown(v.regret),
            "at the pins": "" if v.at_pin == v.regret else f"{v.at_pin.value:.2f}",
            "equal cost": f"{v.equal_cost.value:.2f}" if v.equal_cost else "",
            "planted": "" if v.planted_rate is None else f"{v.planted_rate:.0%}",
            "loss": f"{v.loss:.4g}",
            "− nothing": _shown(v.against_nothing, ".2g"),
            "inserted": f"{v.inserted:.0%}",
            "cost": f"{v.cost_passes:.3g}",
        }
        table.add_row(arm, *(cells[heading] for heading in columns))
    return table


def _means(found: DecisionBenchmark) -> Table:
    among = {name: len(tasks) for name, tasks in groups(found.tasks).items()}
    columns = [f"{group} ({among[group]})" for group in found.means]
    columns.append("equal cost (all)")
    table = titled("Mean regret over tasks", "rule", *columns, "cost", width=WIDTH)
    for arm in found.means["all"]:
        costs = [verdicts[arm].cost_passes for verdicts in found.verdicts.values()]
        shown = [_shown(estimates[arm]) for estimates in found.means.values()]
        shown.append(_shown(found.equal_cost[arm]) if arm in found.equal_cost else "")
        table.add_row(arm, *shown, f"{sum(costs) / len(costs):.3g}")
    return table


def _shown(estimate: Estimate, form: str = ".2f") -> str:
    return f"{estimate.value:{form}} [{estimate.low:{form}} {estimate.high:{form}}]"


def _row(v: Verdict) -> dict[str, Any]:
    return {
        "regret": v.regret.value,
        "interval": [v.regret.low, v.regret.high],
        "planted_rate": v.planted_rate,
        "loss": v.loss,
        "loss_not_inserting": v.loss_not_inserting,
        "cost_passes": v.cost_passes,
    }


def _value(estimate: Estimate) -> dict[str, Any]:
    return {"regret": estimate.value, "interval": [estimate.low, estimate.high]}


def _details(task: Judged, verdicts: Mapping[str, Verdict]) -> dict[str, Any]:
    found = task.outcomes
    return {
        "about": task.about,
        "half": task.half,
        "signal": signal(task.against),
        "planted": task.planted,
        "best": task.against.best.tolist(),
        "inserted": found.inserted[..., 0].tolist(),
        "nothing": found.nothing[..., 0].tolist(),
        "rehearsal": found.rehearsal.tolist(),
        "rules": {
            arm: {
                "regret_at_pins": _value(verdicts[arm].at_pin),
                "against_nothing": asdict(verdicts[arm].against_nothing),
                "inserted": verdicts[arm].inserted,
                "sites": decided.sites.tolist(),
                "losses": decided.loss.tolist(),
                "losses_at_equal_cost": decided.trained_on.tolist(),
                "passes": decided.passes.tolist(),
            }
            for arm, decided in task.arms.items()
        },
    }


def _finite(content: Any) -> Any:
    """The same with null for what JSON has no number for."""
    if isinstance(content, Mapping):
        return {key: _finite(value) for key, value in content.items()}
    if isinstance(content, Sequence) and not isinstance(content, str):
        return [_finite(value) for value in content]
    return None if isinstance(content, float) and not math.isfinite(content) else content
