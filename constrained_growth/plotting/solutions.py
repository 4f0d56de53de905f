"""The sensitivities along the depth of a network, and the effect of an insertion on the loss.

Functions with `ax` draw on these Axes, or else on those of a new figure, and return them
(`ax.figure` can be saved). Nothing here touches pyplot or its global state. Needs matplotlib.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from typing import Any

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from constrained_growth.solution import Sensitivity, Solution

INK = "#333333"
QUIET = "#9AA5B1"
KEPT = "#0072B2"  # blue and vermilion of Okabe and Ito, which colour-blind readers tell apart
GROWN = "#D55E00"
DASHED = {"color": INK, "linestyle": (0, (4, 3)), "linewidth": 1}

_COLOURS = (KEPT, GROWN, "#009E73", "#CC79A7", "#E69F00")


def plot_sensitivities(
    sensitivities: Solution | Mapping[str, Sensitivity],
    ax: Axes | None = None,
    *,
    chosen: Collection[str] | None = None,
) -> Axes:
    """A bar with its standard error for each candidate, in the problem's order from the top.

    A dashed line marks the mean gradient norm of the existing layers, where it is known.

    Args:
        sensitivities: A solution, or its `sensitivities`.
        ax: Where to draw; None for a new figure.
        chosen: Names of the candidates to highlight; by default what the solution decided.
    """
    if isinstance(sensitivities, Solution):
        chosen = sensitivities.decision.chosen if chosen is None else chosen
        sensitivities = sensitivities.sensitivities
    chosen, found = chosen or (), list(sensitivities.values())
    ax = ax or axes(height=0.9 + 0.45 * len(found))
    steps = [1.0 if a.site == b.site else 1.5 for a, b in itertools.pairwise(found)]
    places = list(itertools.accumulate(steps, initial=0.0))  # more room between sites
    values = [s.value for s in found]
    errors = [s.standard_error if math.isfinite(s.standard_error) else 0.0 for s in found]
    colours = [GROWN if name in chosen else QUIET for name in sensitivities]
    ax.barh(places, values, height=0.8, color=colours)
    ax.errorbar(values, places, xerr=errors, fmt="none", ecolor="#6B7580", elinewidth=1, capsize=3)
    ax.set_yticks(places, list(sensitivities), fontsize=11)
    for label, name in zip(ax.get_yticklabels(), sensitivities, strict=True):
        if name in chosen:
            label.set(color=GROWN, fontweight="bold")
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.tick_params(axis="y", length=0)
    ax.set_xlabel("sensitivity ‖λ‖ ± standard error")
    ax.set_ylabel("depth →", rotation=270, labelpad=14)
    tidy(ax, grid="x")
    baseline = next((s.baseline for s in found if s.baseline is not None), None)
    if baseline is not None:
        ax.axvline(baseline, **DASHED)
        note(ax, "mean gradient norm of the layers in place", baseline, (-2, 3), fontsize=9)
    return ax


def plot_losses(
    before: Sequence[float],
    after: Mapping[str, Sequence[float]],
    ax: Axes | None = None,
    *,
    event: str = "layer inserted",
    ylabel: str = "training loss [nats]",
) -> Axes:
    """The loss up to an insertion and in several continuations, labelled at their ends.

    The vertical axis is logarithmic where the losses span a factor of five or more.

    Args:
        before: Loss after 0, 1, … epochs, up to the insertion.
        after: Name → loss 0, 1, … epochs after the insertion.
        ax: Where to draw; None for a new figure.
        event: Label of the insertion.
        ylabel: Name and unit of the loss.
    """
    ax = ax or axes(height=4.2)
    start = len(before) - 1
    ax.plot(range(len(before)), before, color=INK, linewidth=2)
    for losses, colour in zip(after.values(), _COLOURS, strict=False):
        ax.plot(range(start, start + len(losses)), losses, color=colour, linewidth=2)
    ax.axvline(start, **DASHED)
    box = {"facecolor": "white", "edgecolor": "none", "pad": 1.5}
    note(ax, event, start, (-6, -4), ha="right", va="top", fontsize=11, bbox=box)
    scale(ax, [*before, *(loss for losses in after.values() for loss in losses)])
    ax.set_xlim(0, max(start + len(losses) - 1 for losses in (*after.values(), [0])))
    _name_ends(ax, after)
    ax.set_xlabel("epochs")
    ax.set_ylabel(ylabel)
    tidy(ax, grid="y")
    return ax


def plot_growth(
    before: Sequence[float],
    after: Mapping[str, Sequence[float]],
    sensitivities: Solution | Mapping[str, Sensitivity],
    *,
    chosen: Collection[str] | None = None,
    title: str = "",
    subtitle: str = "",
) -> Figure:
    """`plot_losses` around an insertion beside the `plot_sensitivities` that decided it.

    The arguments are theirs, with a line each for the title and the subtitle.
    """
    figure = Figure(figsize=(11, 5.4), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1, rect=(0, 0, 1, 0.86))  # type: ignore[union-attr]
    losses, bars = figure.subplots(1, 2, width_ratios=(1.75, 1))
    if chosen is None:
        chosen = sensitivities.decision.chosen if isinstance(sensitivities, Solution) else ()
    event = f"{', '.join(chosen)} inserted" if chosen else "nothing inserted"
    plot_losses(before, after, losses, event=event)
    plot_sensitivities(sensitivities, bars, chosen=chosen)
    for panel, heading in ((losses, "What the insertion did"), (bars, "What decided it")):
        panel.set_title(heading, loc="left", fontsize=12, color=INK, pad=18)
    figure.text(0.015, 0.965, title, fontsize=15, fontweight="bold", color=INK, va="top")
    figure.text(0.015, 0.895, subtitle, fontsize=10.5, color=INK, va="top")
    return figure


def axes(height: float) -> Axes:
    """The Axes of a new figure, `height` inches high."""
    return Figure(figsize=(7, height), dpi=160, layout="constrained").subplots()


def note(
    ax: Axes,
    text: str,
    x: float,
    offset: tuple[float, float],
    y: float | None = None,
    **style: Any,
) -> None:
    """Text at an offset in points from (x, y), or from x at the top of the Axes."""
    where = ax.get_xaxis_transform() if y is None else "data"
    style |= {"xytext": offset, "textcoords": "offset points", "color": INK}
    ax.annotate(text, (x, 1 if y is None else y), xycoords=where, **style)


def scale(ax: Axes, losses: Sequence[float]) -> None:
    """Make the loss axis logarithmic where that shows more, with plain numbers at the ticks."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite and min(finite) > 0 and max(finite) >= 5 * min(finite):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(bottom=0)


def _name_ends(ax: Axes, after: Mapping[str, Sequence[float]]) -> None:
    """Label the curves at their ends, and push labels apart where the ends are close."""
    curves = zip(after.items(), _COLOURS, strict=False)
    ends = [(losses[-1], name, colour) for (name, losses), colour in curves]
    to_axes = ax.transData + ax.transAxes.inverted()
    style: dict[str, Any] = {"fontsize": 11, "fontweight": "bold", "va": "center"}
    lowest = -math.inf
    for end, name, colour in sorted(end for end in ends if math.isfinite(end[0])):
        height = max(to_axes.transform((0, end))[1], lowest)
        lowest = height + 0.11
        ax.text(1.01, height, f"{name}\n{end:.3g}", transform=ax.transAxes, color=colour, **style)


def tidy(ax: Axes, grid: str) -> None:
    """Apply the common style, with grid lines across the axis "x", "y" or "both"."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)
    ax.grid(axis=grid, color=QUIET, alpha=0.3, linewidth=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=10, colors=INK)
    ax.xaxis.label.set(fontsize=11, color=INK)
    ax.yaxis.label.set(fontsize=11, color=INK)
