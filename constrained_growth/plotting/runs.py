"""Pictures of a training run that grows, readable in black and white.

Functions with `ax` draw on these Axes, or else on those of a new figure, and return them. Needs
matplotlib.
"""

from __future__ import annotations

import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.colors import LogNorm, Normalize
from matplotlib.figure import Figure
from matplotlib.patches import Rectangle
from matplotlib.ticker import MaxNLocator

from constrained_growth.plotting.solutions import (
    DASHED,
    GROWN,
    INK,
    KEPT,
    QUIET,
    axes,
    note,
    scale,
    tidy,
)


def plot_training(
    losses: Sequence[float],
    insertions: Mapping[int, str],
    ax: Axes | None = None,
    *,
    ylabel: str = "training loss",
) -> Axes:
    """The loss over the epochs, with every insertion marked and labelled.

    Args:
        losses: Losses of epochs 1, 2, ….
        insertions: Epoch at whose end something was inserted → label.
        ax: Where to draw; None for a new figure.
        ylabel: Name and unit of the loss.
    """
    ax = ax or axes(height=4.2)
    ax.plot(range(1, len(losses) + 1), losses, color=INK, linewidth=2)
    for epoch, name in insertions.items():
        ax.axvline(epoch, **DASHED)
        ax.plot(epoch, losses[epoch - 1], "v", color=GROWN, markersize=9, markeredgecolor=INK)
        # rotated, so that neighbours do not collide
        note(ax, f"+ {name}", epoch, (-3, 3), rotation=30, rotation_mode="anchor", fontsize=9)
    scale(ax, losses)
    ax.set_xlim(0.5, len(losses) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    ax.set_ylabel(ylabel)
    tidy(ax, grid="y")
    return ax


def plot_sensitivity_map(
    rounds: Mapping[int, Mapping[str, float]],
    chosen: Mapping[int, Collection[str]],
    ax: Axes | None = None,
) -> Axes:
    """Heat map of the sensitivities: a row for each candidate, a column for each decision.

    Darker is larger, on a logarithmic scale where they span a factor of ten or more. A cross
    marks an insertion; cells are hatched where there was no candidate, or no positive value.

    Args:
        rounds: Epoch of a decision → candidate → sensitivity.
        chosen: Epoch → names of the candidates inserted.
        ax: Where to draw; None for a new figure.
    """
    latest_first = reversed(list(rounds.values()))  # for the order of depth in the final model
    names = list(dict.fromkeys(name for found in latest_first for name in found))
    ax = ax or axes(height=1.6 + 0.35 * len(names))
    table = [[found.get(name, math.nan) for found in rounds.values()] for name in names]
    shown = [[v if math.isfinite(v) and v > 0 else math.nan for v in row] for row in table]
    known = [value for row in shown for value in row if value > 0] or [1.0]
    low, high = min(known), max(known)
    norm = LogNorm(low, high) if high >= 10 * low else Normalize(0, high)
    ax.set_facecolor("white")
    ax.patch.set(hatch="////", edgecolor=QUIET)
    image = ax.imshow(shown, cmap="Greys", norm=norm, aspect="auto", interpolation="nearest")
    for column, epoch in enumerate(rounds):
        for name in chosen.get(epoch, ()):
            row = names.index(name)
            value = shown[row][column]
            dark = math.isfinite(value) and norm(value) > 0.5
            ax.plot(column, row, "X", color="white" if dark else INK, markersize=8)
    ax.set_yticks(range(len(names)), names)
    ticks = range(0, len(rounds), max(1, math.ceil(len(rounds) / 15)))
    ax.set_xticks(list(ticks), [str(list(rounds)[tick]) for tick in ticks])
    ax.set_xlabel("decision after epoch")
    ax.tick_params(labelsize=10, colors=INK, length=0)
    ax.xaxis.label.set(fontsize=11, color=INK)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label("sensitivity ‖λ‖   (× inserted)", color=INK)
    return ax


def plot_predictions(
    predicted: Sequence[float], actual: Sequence[float], ax: Axes | None = None
) -> Axes:
    """Predicted against actual decrease of the loss; on the dashed line they are equal.

    Args:
        predicted: Predicted decrease of each step.
        actual: Actual decrease of each step.
        ax: Where to draw; None for a new figure.
    """
    ax = ax or axes(height=5.5)
    ends = [min(0.0, *predicted, *actual), max(0.0, *predicted, *actual)]
    ax.plot(ends, ends, **DASHED)
    ax.axhline(0, color=QUIET, linewidth=0.8)
    ax.plot(predicted, actual, "o", color=KEPT, markersize=7, markeredgecolor=INK)
    note(ax, "as predicted", ends[1], (-8, 0), y=ends[1], ha="right", fontsize=10)
    ax.set_xlabel("predicted decrease of the loss")
    ax.set_ylabel("actual decrease")
    tidy(ax, grid="both")
    return ax


def plot_architecture(
    before: Mapping[str, tuple[int, ...]],
    after: Mapping[str, tuple[int, ...]],
    ax: Axes | None = None,
) -> Axes:
    """The weight layers of a network before and after it grew, new ones hatched.

    Args:
        before: Name → shape of the parameters before, such as `record.model`.
        after: Name → shape of the parameters afterwards.
        ax: Where to draw; None for a new figure.
    """
    columns = [
        {n.removesuffix(".weight"): shape for n, shape in parameters.items() if len(shape) > 1}
        for parameters in (before, after)
    ]
    rows = max(len(column) for column in columns)
    ax = ax or axes(height=1.2 + 0.5 * rows)
    for x, column in enumerate(columns):
        for place, (name, shape) in enumerate(column.items()):
            new = x == 1 and name.replace(".base", "") not in columns[0]
            hatch, colour, weight = ("////", "white", "bold") if new else (None, "#E3E7EB", None)
            corner, size = (x - 0.4, place - 0.35), (0.8, 0.7)
            ax.add_patch(Rectangle(corner, *size, facecolor=colour, edgecolor=INK, hatch=hatch))
            text = f"{name}   {' × '.join(map(str, shape))}"
            box = {"facecolor": colour, "edgecolor": "none", "pad": 1.5}
            style: dict[str, Any] = {"fontsize": 9, "fontweight": weight, "color": INK}
            ax.text(x, place, text, ha="center", va="center", bbox=box, **style)
    ax.set_xlim(-0.55, 1.55)
    ax.set_ylim(rows - 0.4, -0.6)
    ax.set_xticks([0, 1], ["before", "after   (hatched: new)"], fontsize=11, color=INK)
    ax.xaxis.tick_top()
    ax.set_yticks([])
    ax.tick_params(length=0)
    ax.spines[:].set_visible(False)
    return ax


def plot_run(
    losses: Sequence[float],
    insertions: Mapping[int, str],
    rounds: Mapping[int, Mapping[str, float]],
    chosen: Mapping[int, Collection[str]],
) -> Figure:
    """`plot_training` above `plot_sensitivity_map` (if there was a decision); arguments as there."""
    names = {name for found in rounds.values() for name in found}
    heights = [4.2, 1.0 + 0.3 * len(names)] if rounds else [4.2]
    figure = Figure(figsize=(8, sum(heights)), dpi=160, layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    plot_training(losses, insertions, panels[0])
    if rounds:
        plot_sensitivity_map(rounds, chosen, panels[1])
    return figure
