"""Pictures of an experiment: the losses, largest against smallest, when to insert, and where."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from constrained_growth.experiments.reproduction.referee import final_loss
from constrained_growth.experiments.reproduction.reproduce import TRACE
from constrained_growth.experiments.reproduction.runs import Reproduction
from constrained_growth.plotting.solutions import GROWN, INK, KEPT, QUIET

_STYLES = {
    "N1": ("small network kept (N1)", KEPT, "-"),
    "N2fix": ("deeper one from the start (N2fix)", "#009E73", "--"),
    "N1lr": ("small network, learning rate as grown (N1lr)", "#56B4E9", ":"),
    "LImin": ("smallest sensitivity (LImin)", "#CC79A7", "-."),
    "LImax": ("largest sensitivity (LImax)", GROWN, "-"),
}


def picture(found: Reproduction) -> Figure:
    """All pictures of an experiment on one sheet.

    Args:
        found: What it gave.

    Returns:
        The figure, ready for `savefig`.
    """
    several = found.sensitivities.shape[1] > 1
    panels: list[Callable[[Axes, Reproduction], None]] = [losses]
    panels += [largest_against_smallest] if several else []
    panels += [when] if found.inserted_at else []
    panels += [sensitivities]
    width = 4.6 * len(panels) + 1.4
    figure = Figure(figsize=(width, 4.8), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, rect=(0, 0, 1, 0.9))  # type: ignore[union-attr]
    places = figure.subplots(1, len(panels), squeeze=False, width_ratios=_ratios(len(panels)))[0]
    for ax, draw in zip(places, panels, strict=True):
        draw(ax, found)
    experiment = found.experiment
    figure.text(
        0.01,
        0.965,
        f"{experiment.name}: {experiment.family} {list(experiment.widths)}, "
        f"{len(found.seeds)} seeds from {found.seeds[0]} on",
        fontsize=13,
        fontweight="bold",
        color=INK,
        va="top",
    )
    return figure


def losses(ax: Axes, found: Reproduction) -> None:
    """Training loss with and without insertion: medians, and bands from quartile to quartile."""
    several = found.sensitivities.shape[1] > 1
    for name, (label, colour, line) in _STYLES.items():
        same = {"LImin": not several, "N1lr": found.experiment.factor == 1}
        if same.get(name):
            continue
        low, median, high = np.quantile(found.arms[name].loss, [0.25, 0.5, 0.75], axis=1)
        epochs = np.arange(len(median))
        ax.fill_between(epochs, low, high, color=colour, alpha=0.13, linewidth=0)
        ax.plot(epochs, median, color=colour, linestyle=line, linewidth=1.8, label=label)
    ax.axvline(found.experiment.before, color=INK, linestyle=(0, (4, 3)), linewidth=1)
    ax.set_xlim(0, found.experiment.epochs)
    ax.set_ylim(0, 1.1 * float(np.median(found.arms["N1"].loss[0])))
    ax.legend(fontsize=8, frameon=False)
    _named(ax, "median and quartiles", "epochs", "training loss [nats]")


def largest_against_smallest(ax: Axes, found: Reproduction) -> None:
    """Final losses of each seed, the layer with the largest against that with the smallest λ."""
    large, small = (final_loss(found.arms[name]) for name in ("LImax", "LImin"))
    top = 1.05 * float(max(large.max(), small.max()))
    ax.plot([0, top], [0, top], color=QUIET, linewidth=1)
    ax.scatter(small, large, s=14, color=GROWN, alpha=0.6, linewidths=0)
    ax.set(xlim=(0, top), ylim=(0, top))
    below = int((large < small).sum())
    _named(
        ax,
        f"largest lower in {below} of {len(large)}",
        "final loss, smallest sensitivity [nats]",
        "final loss, largest sensitivity [nats]",
    )


def when(ax: Axes, found: Reproduction) -> None:
    """Final loss against the epoch of the insertion."""
    epochs = list(found.inserted_at)
    values = np.stack([final_loss(runs) for runs in found.inserted_at.values()])
    low, median, high = np.quantile(values, [0.25, 0.5, 0.75], axis=1)
    errors = np.stack([median - low, high - median])
    ax.errorbar(epochs, median, errors, color=GROWN, marker="o", capsize=3, label="inserted")
    kept = np.quantile(final_loss(found.arms["N1"]), [0.25, 0.5, 0.75])
    ax.axhspan(kept[0], kept[2], color=KEPT, alpha=0.13, linewidth=0)
    ax.axhline(kept[1], color=KEPT, label="kept")
    ax.set_ylim(bottom=0)
    ax.legend(fontsize=8, frameon=False)
    _named(
        ax, "when to insert: median and quartiles", "epoch of the insertion", "final loss [nats]"
    )


def sensitivities(ax: Axes, found: Reproduction) -> None:
    """Heat map of the median ‖λ_W‖ over site and time, as the small network trains."""
    median = np.median(found.trace, axis=1).T
    edge = np.append(found.trace_epochs, found.trace_epochs[-1] + TRACE)
    sites = np.arange(len(median) + 1) + 0.5
    mesh = ax.pcolormesh(edge, sites, np.log10(np.maximum(median, 1e-12)), cmap="viridis")
    ax.axvline(found.experiment.before, color="white", linestyle=(0, (4, 3)), linewidth=1)
    ax.invert_yaxis()
    ax.set_yticks(range(1, len(median) + 1))
    ax.figure.colorbar(mesh, ax=ax, label="log₁₀ of the median ‖λ_W‖")
    _named(ax, "the small network, kept", "epochs", "after hidden layer")
    ax.grid(False)


def _ratios(count: int) -> list[float]:
    return [1.25, *[1.0] * (count - 1)]


def _named(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    ax.set_title(title, loc="left", fontsize=10, color=INK)
    ax.set_xlabel(xlabel, color=INK)
    ax.set_ylabel(ylabel, color=INK)
    ax.spines[["top", "right"]].set_visible(False)
    ax.tick_params(labelsize=9, colors=INK)
    ax.grid(color=QUIET, alpha=0.25, linewidth=0.7)
    ax.set_axisbelow(True)
