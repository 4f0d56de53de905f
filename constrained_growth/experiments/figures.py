"""Pictures of the studies: losses, largest against smallest, when and where to insert, growth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine

from constrained_growth._style import GROWN, INK, KEPT, QUIET, scale, tidy
from constrained_growth.experiments.growth.runs import BIG
from constrained_growth.experiments.statistics import Array, smoothed

Content = Mapping[str, Any]

GREEN, PINK, SKY = "#009E73", "#CC79A7", "#56B4E9"
QUARTILES = (0.25, 0.5, 0.75)
FEW = 5

_ARMS = {
    "N1": ("small network kept (N1)", KEPT, (0, (6, 1.5)), "s"),
    "N2fix": ("deeper one from the start (N2fix)", GREEN, "--", "^"),
    "N1lr": ("small one, learning rate as grown (N1lr)", SKY, ":", "v"),
    "LImin": ("smallest sensitivity (LImin)", PINK, "-.", "D"),
    "LImax": ("largest sensitivity (LImax)", GROWN, "-", "o"),
}


def reproduction(found: Content) -> Figure:
    """All pictures of one of the source's experiments on one sheet, from what `--out` writes."""
    several = _several(found)
    panels: list[Callable[[Axes, Content], None]] = [losses]
    panels += [largest_against_smallest] if several else []
    panels += [when] if found["inserted_at"] else []
    panels += [sensitivities]
    rows = (len(panels) + 1) // 2
    layout = ConstrainedLayoutEngine(h_pad=0.1, w_pad=0.12)
    figure = Figure(figsize=(10, 3.9 * rows + 0.6), dpi=100, layout=layout)
    protocol = found["protocol"]
    figure.suptitle(
        f"{protocol['name']}: {protocol['family']} {list(protocol['widths'])}, "
        f"{found['seeds']} seeds from {found['first_seed']} on",
        fontsize=13,
        fontweight="bold",
        color=INK,
    )
    grid = figure.add_gridspec(rows, 2)
    for index, draw in enumerate(panels):
        row, column = divmod(index, 2)
        alone = index == len(panels) - 1 and column == 0
        draw(figure.add_subplot(grid[row, :] if alone else grid[row, column]), found)
    return figure


def _several(found: Content) -> bool:
    """Whether there is more than one site."""
    return len(found["sensitivities"][0]) > 1


def _epochs(found: Content) -> int:
    return found["protocol"]["before"] + found["protocol"]["after"]


def losses(ax: Axes, found: Content) -> None:
    """Training loss with and without insertion: medians, and bands from quartile to quartile."""
    every = found["arms"]["N1"]["curve"]["every"]
    for number, (name, (label, colour, line, mark)) in enumerate(_ARMS.items()):
        same = {"LImin": not _several(found), "N1lr": found["protocol"]["factor"] == 1}
        if same.get(name):
            continue
        curve = found["arms"][name]["curve"]
        median, epochs = curve["median"], every * np.arange(len(curve["median"]))
        if len(median) > FEW:
            band = {"color": colour, "alpha": 0.13, "linewidth": 0}
            ax.fill_between(epochs, curve["low"], curve["high"], **band)
        else:  # of which no line shows the way from one to the next
            line = "none"
            ax.vlines(epochs, curve["low"], curve["high"], color=colour)
        apart = max(1, len(median) // 8)  # marks tell the lines apart in grey
        marks = {"marker": mark, "markersize": 5, "markevery": (number % apart, apart)}
        ax.plot(epochs, median, color=colour, linestyle=line, linewidth=1.8, label=label, **marks)
    ax.axvline(found["protocol"]["before"], color=INK, linestyle=(0, (4, 3)), linewidth=1)
    ax.set_xlim(0, _epochs(found))
    ax.set_ylim(0, 1.1 * found["arms"]["N1"]["curve"]["median"][0])
    ax.legend(fontsize=9, frameon=False)
    shown = "each epoch" if every == 1 else f"every {every} epochs"
    _named(ax, f"median and quartiles, {shown}", "epochs", "training loss [nats]")


def largest_against_smallest(ax: Axes, found: Content) -> None:
    """Final losses of each seed, the layer with the largest against that with the smallest λ."""
    large, small = (np.array(found["arms"][name]["final_loss"]) for name in ("LImax", "LImin"))
    top = 1.05 * float(max(large.max(), small.max()))
    ax.plot([0, top], [0, top], color=QUIET, linewidth=1, label="equal")
    ax.scatter(small, large, s=14, color=GROWN, alpha=0.6, linewidths=0, label="one seed")
    ax.set(xlim=(0, top), ylim=(0, top))
    ax.legend(fontsize=9, frameon=False)
    below = int((large < small).sum())
    _named(
        ax,
        f"largest lower in {below} of {len(large)}",
        "final loss, smallest sensitivity [nats]",
        "final loss, largest sensitivity [nats]",
    )


def when(ax: Axes, found: Content) -> None:
    """Final loss against the epoch of the insertion."""
    epochs = [int(epoch) for epoch in found["inserted_at"]]
    values = np.array([arm["final_loss"] for arm in found["inserted_at"].values()])
    low, median, high = np.quantile(values, QUARTILES, axis=1)
    errors = np.stack([median - low, high - median])
    ax.errorbar(epochs, median, errors, color=GROWN, marker="o", capsize=3, label="inserted")
    kept = np.quantile(found["arms"]["N1"]["final_loss"], QUARTILES)
    ax.axhspan(kept[0], kept[2], color=KEPT, alpha=0.13, linewidth=0)
    ax.axhline(kept[1], color=KEPT, linestyle="--", label="kept")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=9, frameon=False)
    _named(
        ax, "when to insert: median and quartiles", "epoch of the insertion", "final loss [nats]"
    )


def sensitivities(ax: Axes, found: Content) -> None:
    """Heat map of the median ‖λ_W‖ over site and time, as the small network trains.

    Each column holds from the epoch it was measured at to the next, and the last one to the end.
    """
    trace, end = found["trace"], _epochs(found)
    before_end = [epoch for epoch in trace["epochs"] if epoch < end]
    median = np.array(trace["median"])[: len(before_end)].T
    sites = np.arange(len(median) + 1) + 0.5
    values = np.log10(np.maximum(median, 1e-12))
    mesh = ax.pcolormesh([*before_end, end], sites, values, cmap="viridis")
    moment = found["protocol"]["before"]
    ax.axvline(moment, color="black", linewidth=3)
    ax.axvline(moment, color="white", linestyle=(0, (4, 3)), label="the insertion")
    ax.legend(fontsize=9, loc="lower right", facecolor=INK, labelcolor="white", framealpha=0.9)
    ax.set_xlim(0, end)
    ax.invert_yaxis()
    ax.set_yticks(range(1, len(median) + 1))
    ax.figure.colorbar(mesh, ax=ax, label="log₁₀ of the median ‖λ_W‖")
    _named(ax, "the small network, kept", "epochs", "after hidden layer")
    ax.grid(False)


def _named(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    ax.set_title(title, loc="left", fontsize=10, color=INK)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    tidy(ax, "both")


_GROWTH_ARMS = {
    "sensitivity": (GROWN, "-", 2.0, "o"),
    "… at plateaus": (GROWN, ":", 2.0, "P"),
    "random": (PINK, "-.", 1.4, "D"),
    "first": (GREEN, "-", 1.2, "^"),
    "middle": (GREEN, "--", 1.2, ">"),
    "last": (GREEN, ":", 1.6, "v"),
    BIG: (KEPT, "--", 2.0, "s"),
    "small": (QUIET, "-", 1.2, "X"),
}


def growth(found: Mapping[str, Any]) -> Figure:
    """Held-out loss of every arm against multiply-adds, a panel for each task."""
    curves = found["curves"]
    figure = Figure(figsize=(4.8 * len(curves), 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, task in zip(panels, curves, strict=True):
        drawn = list[float]()
        for number, (name, runs) in enumerate(curves[task].items()):
            colour, line, width, mark = _GROWTH_ARMS[name]
            spent, (low, median, high) = _quartiles(runs)
            style = {"color": colour, "linestyle": line, "linewidth": width}
            marks = {"marker": mark, "markersize": 5, "markevery": (4 * number, 40)}
            ax.plot(spent, median, label=name, **style, **marks)
            drawn += [*low, *high]
            if name in (next(iter(curves[task])), BIG):
                ax.fill_between(spent, low, high, color=colour, alpha=0.13, linewidth=0)
        scale(ax, drawn)
        ax.legend(fontsize=9, frameon=False)
        ax.set_xlabel("multiply-adds spent [10⁹]")
        about = found["settings"][task]
        title = f"{task}, {about['small']} → {about['big']} blocks, {found['seeds']} seeds"
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        tidy(ax, "y")
    panels[0].set_ylabel("held-out loss [nats]")
    return figure


def _quartiles(runs: Sequence[Mapping[str, Sequence[float]]]) -> tuple[Array, Array]:
    """What was spent, and the quartiles over seeds of the loss then, shape (3, points)."""
    spent = np.linspace(0, min(run["multiply_adds"][-1] for run in runs), 200)[1:]
    values = [np.interp(spent, run["multiply_adds"], smoothed(run["loss"])) for run in runs]
    return spent / 1e9, np.quantile(values, [0.25, 0.5, 0.75], axis=0)
