"""All experiments in one table: the reference, the same protocol here, and what is recommended."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text
from scipy import stats

LEVEL = 0.05


def account(contents: Sequence[Mapping[str, Any]]) -> RenderableType:
    """The cells of several experiments for which there are reference figures.

    Args:
        contents: What `reproduction_report.to_json` wrote, one for each experiment.

    Returns:
        A table, and how many cells differ: with that many tests some would by chance, so the
        p-values are also adjusted to the rate of false discoveries (Benjamini and Hochberg).
    """
    table = Table(
        "", "reference: n", "mean", "median", "ours: n", "mean", "median", "p mean", "p median"
    )
    table.title = "Final training loss in nats"
    values = list[float]()
    for content in contents:
        for name, theirs in content["reference"].items():
            ours, p = content["arms"][name]["final_loss"], content["agreement"][name]
            values += [x for x in (p["mean"], p["median"]) if x is not None]
            table.add_row(
                f"{content['experiment']} {name}",
                str(theirs["runs"]),
                _number(theirs["mean"]),
                _number(theirs["median"]),
                str(len(ours)),
                _number(float(np.mean(ours))),
                _number(float(np.median(ours))),
                _number(p["mean"]),
                _number(p["median"]),
            )
        best = content["arms"]["recommended"]["final_loss"]
        own = (str(len(best)), _number(float(np.mean(best))), _number(float(np.median(best))))
        table.add_row(f"{content['experiment']} recommended", "", "", "", *own, "", "")
        table.add_section()
    return Group(table, Text(_differences("means and medians", values)), Text(_counts(contents)))


def _counts(contents: Sequence[Mapping[str, Any]]) -> str:
    found = [count["p"] for content in contents for count in content["counts"]]
    return _differences("counts", found)


def _differences(what: str, values: Sequence[float]) -> str:
    if not values:
        return f"No {what} to compare."
    below = sum(p < LEVEL for p in values)
    least = float(np.min(stats.false_discovery_control(values)))
    return (
        f"Of {len(values)} comparisons of {what} {below} have p < {LEVEL} (by chance "
        f"{LEVEL * len(values):.1f}); the smallest adjusted p is {least:.2g}."
    )


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.3f}"
