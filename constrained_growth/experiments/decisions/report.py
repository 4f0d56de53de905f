"""`bench decisions`: its numbers come from `study.run`, and the tables from these numbers."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from constrained_growth.experiments.decisions.study import CLEAR, FULL, QUICK, run
from constrained_growth.experiments.statistics import LEVEL
from constrained_growth.experiments.tables import interval, titled
from constrained_growth.experiments.timing import described

Content = Mapping[str, Any]

__all__ = ["FULL", "QUICK", "run", "tables"]


def tables(found: Content) -> RenderableType:
    """The machine, how to read it, a table for each task, and the means over the suite."""
    passes = found["equal_cost"]["passes"]
    return Group(
        Text(
            f"{described(found['machine'])}; seed {found['seed']}. {found['networks']} networks of "
            f"each task, {found['runs']} runs after every insertion.\n"
        ),
        Text(
            "Regret is relative to random: 0 is the best site in expectation, 1 no better "
            f"than chance; in brackets the {LEVEL:.0%} bootstrap interval over networks. “At the "
            "pins” is the regret of the site alone, where a rule starts its layer off its pins. "
            "Loss is the final training loss. “− nothing” is that minus the loss of inserting "
            "nothing. Cost is in gradient passes over the data, for one decision. Regret “at equal "
            f"cost”: every rule has {passes} passes, and spends those that its decision does not "
            "take on further epochs; it is compared with the same best and mean site, so that it "
            "is below 0 where these epochs buy more than the best site, and blank where a decision "
            "takes more passes.\n"
        ),
        *(_task(task, found) for task in found["tasks"]),
        _means(found),
    )


def _task(task: str, found: Content) -> Table:
    about, equal = found["details"][task], found["equal_cost"]["tasks"][task]
    clear, planted = about["signal"], any(site is not None for site in about["planted"])
    matters = "" if clear >= CLEAR else "; the place hardly matters"
    headings = ["regret", "at the pins", "equal cost", "planted", "loss", "− nothing"]
    headings += ["inserted", "cost"]
    columns = [heading for heading in headings if planted or heading != "planted"]
    table = titled(
        f"{task}: {about['about']}. Best site {np.mean(about['best']):.4g}, mean site "
        f"{np.mean(about['inserted']):.4g} ({clear:.1f} standard errors apart{matters}), "
        f"not inserting {np.mean(about['nothing']):.4g}. Half {about['half']}.",
        "rule",
        *columns,
    )
    for arm, row in found["tasks"][task].items():
        more = about["rules"][arm]
        at_pins, nothing = more["regret_at_pins"]["regret"], more["against_nothing"]
        cells = {
            "regret": _regret(row),
            "at the pins": "" if at_pins == row["regret"] else f"{at_pins:.2f}",
            "equal cost": f"{equal[arm]['regret']:.2f}" if arm in equal else "",
            "planted": "" if row["planted_rate"] is None else f"{row['planted_rate']:.0%}",
            "loss": f"{row['loss']:.4g}",
            "− nothing": interval(nothing["value"], nothing["low"], nothing["high"], ".2g"),
            "inserted": f"{more['inserted']:.0%}",
            "cost": f"{row['cost_passes']:.3g}",
        }
        table.add_row(arm, *(cells[heading] for heading in columns))
    return table


def _means(found: Content) -> Table:
    equal = found["equal_cost"]["mean"]
    columns = [f"{group} ({len(found['groups'][group])})" for group in found["means"]]
    table = titled("Mean regret over tasks", "rule", *columns, "equal cost (all)", "cost")
    for arm in found["means"]["all"]:
        cost = np.mean([arms[arm]["cost_passes"] for arms in found["tasks"].values()])
        shown = [_regret(arms[arm]) for arms in found["means"].values()]
        shown.append(_regret(equal[arm]) if arm in equal else "")
        table.add_row(arm, *shown, f"{cost:.3g}")
    return table


def _regret(row: Content) -> str:
    return interval(row["regret"], *row["interval"])
