"""Pictures: the sensitivities along the depth of a network, and what an insertion did to the loss.

Every function draws on the Axes it is given, or makes a figure of its own (`ax.figure` is then
the one to save). Nothing here touches pyplot or its global state. Needs matplotlib.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

from constrained_growth.solution import Sensitivity, Solution

INK = "#333333"
QUIET = "#9AA5B1"
KEPT = "#0072B2"  # blue and vermilion of Okabe and Ito, told apart by every kind of eye
GROWN = "#D55E00"

_COLOURS = (KEPT, GROWN, "#009E73", "#CC79A7", "#E69F00")


def plot_sensitivities(
    sensitivities: Solution | Mapping[str, Sensitivity],
    ax: Axes | None = None,
    *,
    chosen: Collection[str] | None = None,
) -> Axes:
    """A bar for each candidate, in the order of the problem from the top, with its standard error.

    A dashed line marks the mean gradient norm of the layers the network has, where it is known.

    Args:
        sensitivities: A solution, or its `sensitivities`.
        ax: Where to draw; None for a new figure.
        chosen: Names of the candidates to highlight; those of the solution's decision by default.

    Returns:
        The Axes.
    """
    if isinstance(sensitivities, Solution):
        chosen = sensitivities.decision.chosen if chosen is None else chosen
        sensitivities = sensitivities.sensitivities
    chosen, found = chosen or (), list(sensitivities.values())
    ax = ax or axes(height=0.9 + 0.45 * len(found))
    places = _places([s.site for s in found])
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
        ax.axvline(baseline, color=INK, linestyle=(0, (4, 3)), linewidth=1)
        ax.annotate(
            "mean gradient norm of the layers in place",
            (baseline, 1),
            xycoords=ax.get_xaxis_transform(),
            xytext=(-2, 3),
            textcoords="offset points",
            fontsize=9,
            color=INK,
        )
    return ax


def plot_losses(
    before: Sequence[float],
    after: Mapping[str, Sequence[float]],
    ax: Axes | None = None,
    *,
    event: str = "layer inserted",
    ylabel: str = "training loss [nats]",
) -> Axes:
    """The loss up to an insertion, and from there on in several continuations, named at their ends.

    The vertical axis is logarithmic where the losses span a factor of five or more.

    Args:
        before: Loss after 0, 1, … epochs; the last one is that at the insertion.
        after: Name → loss 0, 1, … epochs after the insertion.
        ax: Where to draw; None for a new figure.
        event: What to write at the insertion.
        ylabel: Name and unit of the loss.

    Returns:
        The Axes.
    """
    ax = ax or axes(height=4.2)
    start = len(before) - 1
    ax.plot(range(len(before)), before, color=INK, linewidth=2)
    for losses, colour in zip(after.values(), _COLOURS, strict=False):
        ax.plot(range(start, start + len(losses)), losses, color=colour, linewidth=2)
    ax.axvline(start, color=INK, linestyle=(0, (4, 3)), linewidth=1)
    ax.annotate(
        event,
        (start, 1),
        xycoords=ax.get_xaxis_transform(),
        xytext=(-6, -4),
        textcoords="offset points",
        ha="right",
        va="top",
        fontsize=11,
        color=INK,
        bbox={"facecolor": "white", "edgecolor": "none", "pad": 1.5},
    )
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
    """Both pictures side by side: the losses around an insertion, and what it was decided on.

    Args:
        before: As for `plot_losses`.
        after: As for `plot_losses`.
        sensitivities: As for `plot_sensitivities`.
        chosen: As for `plot_sensitivities`.
        title: What is seen, in one line.
        subtitle: How it came about, in one line.

    Returns:
        The figure, ready for `savefig`.
    """
    figure = Figure(figsize=(11, 5.4), dpi=160, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.15, h_pad=0.1, rect=(0, 0, 1, 0.86))  # type: ignore[union-attr]
    losses, bars = figure.subplots(1, 2, width_ratios=(1.75, 1))
    if chosen is None:
        chosen = sensitivities.decision.chosen if isinstance(sensitivities, Solution) else ()
    event = f"{', '.join(chosen)} inserted" if chosen else "nothing inserted"
    plot_losses(before, after, losses, event=event)
    plot_sensitivities(sensitivities, bars, chosen=chosen)
    losses.set_title("What the insertion did", loc="left", fontsize=12, color=INK, pad=18)
    bars.set_title("What decided it", loc="left", fontsize=12, color=INK, pad=18)
    figure.text(0.015, 0.965, title, fontsize=15, fontweight="bold", color=INK, va="top")
    figure.text(0.015, 0.895, subtitle, fontsize=10.5, color=INK, va="top")
    return figure


def axes(height: float) -> Axes:
    """Axes in a figure of their own, of this height in inches."""
    return Figure(figsize=(7, height), dpi=160, layout="constrained").subplots()


def _places(sites: Sequence[str]) -> list[float]:
    """Heights of the bars: a little more room where the next site begins."""
    places = [0.0]
    for here, there in itertools.pairwise(sites):
        places.append(places[-1] + (1.0 if here == there else 1.5))
    return places


def scale(ax: Axes, losses: Sequence[float]) -> None:
    """Logarithmic where that shows more; plain numbers at the ticks."""
    finite = [loss for loss in losses if math.isfinite(loss)]
    if finite and min(finite) > 0 and max(finite) >= 5 * min(finite):
        ax.set_yscale("log")
        ax.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        ax.yaxis.set_major_formatter(StrMethodFormatter("{x:g}"))
        ax.yaxis.set_minor_formatter(NullFormatter())
    else:
        ax.set_ylim(bottom=0)


def _name_ends(ax: Axes, after: Mapping[str, Sequence[float]]) -> None:
    """The names right of the ends of their curves, pushed apart where the ends are close."""
    ends = {name: losses[-1] for name, losses in after.items() if math.isfinite(losses[-1])}
    to_axes = ax.transData + ax.transAxes.inverted()
    lowest = -math.inf
    for (name, end), colour in sorted(
        zip(ends.items(), _COLOURS, strict=False), key=lambda item: item[0][1]
    ):
        height = max(to_axes.transform((0, end))[1], lowest)
        lowest = height + 0.11
        ax.text(
            1.01,
            height,
            f"{name}\n{end:.3g}",
            transform=ax.transAxes,
            color=colour,
            fontsize=11,
            fontweight="bold",
            va="center",
        )


def tidy(ax: Axes, grid: str) -> None:
    """The look that all pictures share, with grid lines across one axis or "both"."""
    ax.spines[["top", "right"]].set_visible(False)
    ax.spines[["left", "bottom"]].set_color(QUIET)
    ax.grid(axis=grid, color=QUIET, alpha=0.3, linewidth=0.8)  # type: ignore[arg-type]
    ax.set_axisbelow(True)
    ax.tick_params(labelsize=10, colors=INK)
    ax.xaxis.label.set(fontsize=11, color=INK)
    ax.yaxis.label.set(fontsize=11, color=INK)
