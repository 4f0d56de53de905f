"""Pictures of solutions and training runs, readable in grey.

Functions with `ax` draw on these Axes, or else on those of a new figure, and return them
(`ax.figure` can be saved). Nothing here touches pyplot or its global state. Needs the extra
`plot`.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Collection, Mapping, Sequence
from numbers import Real
from typing import Any

from constrained_growth._arguments import instance
from constrained_growth._extras import extra_packages
from constrained_growth._style import (
    GROWN,
    INK,
    MARK,
    QUIET,
    axes,
    figure,
    legend,
    legend_below,
    note,
    plain,
    scale,
    tidy,
)
from constrained_growth.errors import GrowthError
from constrained_growth.solution import Sensitivity, Solution, listed

with extra_packages():
    from matplotlib.axes import Axes
    from matplotlib.colors import LogNorm, Normalize
    from matplotlib.figure import Figure
    from matplotlib.lines import Line2D
    from matplotlib.patches import Patch
    from matplotlib.ticker import MaxNLocator

__all__ = [
    "plot_run",
    "plot_sensitivities",
    "plot_sensitivity_map",
    "plot_solution",
    "plot_training",
]

_CHOSEN: dict[str, Any] = {"facecolor": GROWN, "edgecolor": "white", "hatch": "////"}
_OTHER: dict[str, Any] = {"facecolor": QUIET, "edgecolor": "white"}
_WHISKERS: dict[str, Any] = {"fmt": "none", "ecolor": INK, "elinewidth": 1, "capsize": 3}
_KINDS = (("chosen", _CHOSEN), ("not chosen", _OTHER))


def plot_sensitivities(
    sensitivities: Solution | Mapping[str, Sensitivity],
    ax: Axes | None = None,
    *,
    chosen: Collection[str] | None = None,
) -> Axes:
    """A bar with its standard error for each candidate, in the problem's order from the top.

    The bars of the chosen ones are hatched. A dashed line marks the mean gradient norm of the
    existing layers, where it is known.

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
    ax = _axes(ax, height=0.9 + 0.45 * len(found))
    steps = [1.0 if a.site == b.site else 1.5 for a, b in itertools.pairwise(found)]
    places = list(itertools.accumulate(steps, initial=0.0))  # more room between sites
    values = [s.value for s in found]
    errors = [s.standard_error if math.isfinite(s.standard_error) else 0.0 for s in found]
    styles = [_CHOSEN if name in chosen else _OTHER for name in sensitivities]
    for place, value, style in zip(places, values, styles, strict=True):
        ax.barh(place, value, height=0.8, **style)
    bars = ax.errorbar(values, places, xerr=errors, label="± standard error", **_WHISKERS)
    ax.set_yticks(places, list(sensitivities), fontsize=11)
    for label, name in zip(ax.get_yticklabels(), sensitivities, strict=True):
        if name in chosen:
            label.set(color=GROWN, fontweight="bold")
    ax.invert_yaxis()
    ax.set_xlim(left=0)
    ax.xaxis.set_major_locator(MaxNLocator(5))
    ax.tick_params(axis="y", length=0)
    norm = type(found[0].norm).__name__ if found[0].norm is not None else ""
    ax.set_xlabel(f"sensitivity ‖λ‖{f' in the norm {norm}' if norm else ''}")
    ax.set_ylabel("depth →", rotation=270, labelpad=14)
    tidy(ax, grid="x")
    handles: list[Any] = [Patch(**style, label=label) for label, style in _KINDS if style in styles]
    handles += [bars] if any(errors) else []
    baseline = next((s.baseline for s in found if s.baseline is not None), None)
    if baseline is not None:
        handles.append(
            ax.axvline(baseline, **MARK, label="mean gradient norm of the layers in place")
        )
    legend_below(ax, handles)
    return ax


def plot_solution(solution: Solution) -> Figure:
    """`plot_sensitivities` of a solution, with its decision as title."""
    instance("solution", solution, Solution, GrowthError, "what cg.solve(problem) returns")
    made = figure(height=1.6 + 0.45 * len(solution.sensitivities))
    chosen = listed(solution.decision.chosen, most=60) or "nothing"
    made.suptitle(f"insert {chosen}", fontsize=12, color=INK, x=0.02, ha="left")
    plot_sensitivities(solution, made.subplots())
    return made


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
        insertions: Epoch at whose end something was inserted → label; 0 is before the first.
        ax: Where to draw; None for a new figure.
        ylabel: Name and unit of the loss.
    """
    numbers = isinstance(losses, Sequence) and all(isinstance(loss, Real) for loss in losses)
    if not numbers or not losses:
        raise GrowthError(f"losses={losses!r:.80} is no curve; give a list of numbers.")
    instance("insertions", insertions, Mapping, GrowthError, "epoch → label")
    if not insertions.keys() <= set(range(len(losses) + 1)):
        raise GrowthError(f"insertions={insertions!r:.80}: give epochs from 0 to {len(losses)}.")
    ax = _axes(ax, height=4.2)
    ax.plot(range(1, len(losses) + 1), losses, color=INK, linewidth=2, label=ylabel)
    marks = {"linestyle": "none", "color": GROWN, "markersize": 9, "markeredgecolor": INK}
    for index, (epoch, name) in enumerate(insertions.items()):
        label = None if index else "insertion"
        ax.axvline(epoch, **MARK)
        ax.plot(epoch, losses[max(epoch - 1, 0)], marker="v", **marks, label=label)
        # rotated, so that neighbours do not collide
        note(ax, f"+ {name}", epoch, (-3, 3), rotation=30, rotation_mode="anchor", fontsize=9)
    scale(ax, losses)
    ax.set_xlim(-0.5 if 0 in insertions else 0.5, len(losses) + 0.5)
    ax.xaxis.set_major_locator(MaxNLocator(integer=True))
    ax.set_xlabel("epoch")
    ax.set_ylabel(ylabel)
    tidy(ax, grid="y")
    legend(ax)
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
    _check_rounds(rounds)
    instance("chosen", chosen, Mapping, GrowthError, "epoch → names")
    latest_first = reversed(list(rounds.values()))  # for the order of depth in the final model
    names = list(dict.fromkeys(name for found in latest_first for name in found))
    if unknown := {name for epoch in rounds for name in chosen.get(epoch, ())}.difference(names):
        raise GrowthError(f"chosen: {sorted(unknown)} are not in rounds, which have {names}.")
    ax = _axes(ax, height=1.6 + 0.35 * len(names))
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
    handles: list[Any] = [Line2D([], [], marker="X", linestyle="none", color=INK, label="inserted")]
    if any(math.isnan(value) for row in shown for value in row):
        empty = "no candidate, or no positive sensitivity"
        handles.append(Patch(facecolor="white", edgecolor=QUIET, hatch="////", label=empty))
    legend_below(ax, handles)
    ax.set_yticks(range(len(names)), names)
    ticks = range(0, len(rounds), max(1, math.ceil(len(rounds) / 15)))
    ax.set_xticks(list(ticks), [str(list(rounds)[tick]) for tick in ticks])
    ax.set_xlabel("decision after epoch")
    ax.tick_params(labelsize=10, colors=INK, length=0)
    ax.xaxis.label.set(fontsize=11, color=INK)
    bar = ax.figure.colorbar(image, ax=ax, pad=0.02)
    bar.set_label("sensitivity ‖λ‖", color=INK)
    if isinstance(norm, LogNorm):
        plain(bar.ax.yaxis)
    return ax


def _check_rounds(rounds: object) -> None:
    given = instance("rounds", rounds, Mapping, GrowthError, "epoch → candidate → sensitivity")
    for epoch, found in given.items():
        is_table = isinstance(found, Mapping)
        if not is_table or not all(isinstance(value, Real) for value in found.values()):
            raise GrowthError(f"rounds: {found!r:.80} of {epoch}; give candidate → sensitivity.")


def _axes(ax: Axes | None, height: float) -> Axes:
    """Where to draw: what was given, or a new figure."""
    given = instance("ax", ax, Axes, GrowthError, "axes of Matplotlib", optional=True)
    return given or axes(height=height)


def plot_run(
    losses: Sequence[float],
    insertions: Mapping[int, str],
    rounds: Mapping[int, Mapping[str, float]],
    chosen: Mapping[int, Collection[str]],
) -> Figure:
    """`plot_training` above `plot_sensitivity_map`, which is left out without decisions."""
    _check_rounds(rounds)
    names = {name for found in rounds.values() for name in found}
    heights = [4.2, 1.0 + 0.3 * len(names)] if rounds else [4.2]
    made = figure(8, sum(heights))
    panels = made.subplots(len(heights), 1, height_ratios=heights, squeeze=False)[:, 0]
    plot_training(losses, insertions, panels[0])
    if rounds:
        plot_sensitivity_map(rounds, chosen, panels[1])
    return made
