"""Pictures of solutions, insertions and training runs, readable in black and white.

Functions with `ax` draw on these Axes, or else on those of a new figure, and return them
(`ax.figure` can be saved). Nothing here touches pyplot or its global state. Needs the extra
`plot`.
"""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

from constrained_growth._arguments import instance
from constrained_growth._extras import extra_packages
from constrained_growth.errors import GrowthError
from constrained_growth.solution import Sensitivity, Solution

with extra_packages():
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.patches import Rectangle
    from matplotlib.ticker import LogLocator, MaxNLocator, NullFormatter, StrMethodFormatter

__all__ = [
    "plot_architecture",
    "plot_growth",
    "plot_losses",
    "plot_predictions",
    "plot_run",
    "plot_sensitivities",
    "plot_sensitivity_map",
    "plot_training",
]

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
    instance("sensitivities", sensitivities, Mapping, GrowthError, "a solution")
    chosen, found = chosen or (), list(sensitivities.values())
    if not found or not all(isinstance(s, Sensitivity) for s in found):
        raise GrowthError(f"sensitivities={sensitivities!r:.80} are none; give a solution.")
    instance("chosen", chosen, Collection, GrowthError, "names of candidates")
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
    instance("after", after, Mapping, GrowthError, "name → losses")
    for name, losses in {"before": before, **after}.items():
        _check_curve(name, losses)
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
    _check_curve("losses", losses)
    instance("insertions", insertions, Mapping, GrowthError, "epoch → label")
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
    instance("rounds", rounds, Mapping, GrowthError, "epoch → candidate → sensitivity")
    instance("chosen", chosen, Mapping, GrowthError, "epoch → names")
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
    _check_curve("predicted", predicted)
    _check_curve("actual", actual)
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
    instance("before", before, Mapping, GrowthError, "name → shape")
    instance("after", after, Mapping, GrowthError, "name → shape")
    columns = [
        {n.removesuffix(".weight"): shape for n, shape in parameters.items() if len(shape) > 1}
        for parameters in (before, after)
    ]
    rows = max(len(column) for column in columns)
    ax = ax or axes(height=1.2 + 0.5 * rows)
    for x, column in enumerate(columns):
        for place, (name, shape) in enumerate(column.items()):
            new = x == 1 and _without_base(name) not in map(_without_base, columns[0])
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


def _without_base(name: str) -> str:
    """The name of a module, also after layers were inserted at it or around it."""
    return re.sub(r"\.base_*(?=\.|$)", "", name)


def plot_run(
    losses: Sequence[float],
    insertions: Mapping[int, str],
    rounds: Mapping[int, Mapping[str, float]],
    chosen: Mapping[int, Collection[str]],
) -> Figure:
    """`plot_training` above `plot_sensitivity_map`, which is left out without decisions."""
    names = {name for found in rounds.values() for name in found}
    heights = [4.2, 1.0 + 0.3 * len(names)] if rounds else [4.2]
    figure = Figure(figsize=(8, sum(heights)), dpi=160, layout="constrained")
    panels = figure.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    plot_training(losses, insertions, panels[0])
    if rounds:
        plot_sensitivity_map(rounds, chosen, panels[1])
    return figure


def _check_curve(name: str, values: object) -> None:
    """Raise a GrowthError unless values can be drawn as a curve."""
    numbers = isinstance(values, Sequence) and all(isinstance(v, Real) for v in values)
    if not numbers or not values:
        raise GrowthError(f"{name}={values!r:.80} is no curve; give a list of numbers.")


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
