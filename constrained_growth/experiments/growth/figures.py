"""A picture of what growing saved: the loss against what was spent."""

from __future__ import annotations

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from numpy.typing import NDArray

from constrained_growth.experiments.growth.benchmark import GrowthBenchmark, Outcome
from constrained_growth.experiments.growth.runs import BIG, Trace
from constrained_growth.experiments.growth.statistics import smoothed
from constrained_growth.experiments.growth.tasks import GrowthTask
from constrained_growth.plotting.solutions import GROWN, INK, KEPT, QUIET, tidy

_STYLES = {
    "sensitivity": (GROWN, "-", 2.0),
    "random": ("#CC79A7", "-.", 1.4),
    "fixed": ("#009E73", ":", 1.6),
    BIG: (KEPT, "--", 2.0),
    "small": (QUIET, "-", 1.2),
}


def picture(found: GrowthBenchmark) -> Figure:
    """A panel for each task.

    Args:
        found: What the benchmark gave.

    Returns:
        The figure, ready for `savefig`.
    """
    figure = Figure(figsize=(4.8 * len(found.plan.tasks), 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(found.plan.tasks), squeeze=False)[0]
    for ax, task in zip(panels, found.plan.tasks, strict=True):
        losses(ax, task, found)
    panels[0].set_ylabel("training loss in nats")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def losses(ax: Axes, task: GrowthTask, found: GrowthBenchmark) -> None:
    """Training loss of every arm against multiply-adds: medians, and quartiles of the first two.

    Args:
        ax: To draw on.
        task: Which.
        found: What the benchmark gave.
    """
    outcomes = found.outcomes[task.name]
    for name, outcome in outcomes.items():
        colour, line, width = _STYLES[name]
        spent, (low, median, high) = _quartiles(outcome)
        ax.plot(spent, median, color=colour, linestyle=line, linewidth=width, label=name)
        if name in (next(iter(outcomes)), BIG):
            ax.fill_between(spent, low, high, color=colour, alpha=0.13, linewidth=0)
    ax.set_yscale("log")
    ax.set_xlabel("multiply-adds spent, in 10⁹")
    title = f"{task.name}, {task.small} → {task.big} blocks, {found.plan.seeds} seeds"
    ax.set_title(title, loc="left", fontsize=11, color=INK)
    tidy(ax, "y")


def _quartiles(outcome: Outcome) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """What was spent, and the quartiles over seeds of the loss then, shape (3, points)."""
    spent = np.linspace(0, min(trace.multiply_adds[-1] for trace in outcome.traces), 200)[1:]
    values = [_at(trace, spent) for trace in outcome.traces]
    return spent / 1e9, np.quantile(values, [0.25, 0.5, 0.75], axis=0)


def _at(trace: Trace, spent: NDArray[np.float64]) -> NDArray[np.float64]:
    return np.asarray(np.interp(spent, trace.multiply_adds, smoothed(trace.loss)))
