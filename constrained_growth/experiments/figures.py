"""Pictures of the studies: losses, largest against smallest, when and where to insert, growth."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from constrained_growth.experiments.growth.runs import BIG
from constrained_growth.experiments.reproduction.runs import TRACE, Reproduction, final_loss
from constrained_growth.experiments.statistics import Array, smoothed
from constrained_growth.plotting import GROWN, INK, KEPT, QUIET, tidy

GREEN, PINK, SKY = "#009E73", "#CC79A7", "#56B4E9"

_ARMS = {
    "N1": ("small network kept (N1)", KEPT, "-"),
    "N2fix": ("deeper one from the start (N2fix)", GREEN, "--"),
    "N1lr": ("small network, learning rate as grown (N1lr)", SKY, ":"),
    "LImin": ("smallest sensitivity (LImin)", PINK, "-."),
    "LImax": ("largest sensitivity (LImax)", GROWN, "-"),
}


def reproduction(found: Reproduction) -> Figure:
    """All pictures of one of the source's experiments on one sheet."""
    several = found.sensitivities.shape[1] > 1
    panels: list[Callable[[Axes, Reproduction], None]] = [losses]
    panels += [largest_against_smallest] if several else []
    panels += [when] if found.inserted_at else []
    panels += [sensitivities]
    width = 4.6 * len(panels) + 1.4
    figure = Figure(figsize=(width, 4.8), dpi=110, layout="constrained")
    figure.get_layout_engine().set(w_pad=0.12, rect=(0, 0, 1, 0.9))  # type: ignore[union-attr]
    places = figure.subplots(
        1, len(panels), squeeze=False, width_ratios=[1.25, *[1.0] * (len(panels) - 1)]
    )[0]
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
    for name, (label, colour, line) in _ARMS.items():
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


def _named(ax: Axes, title: str, xlabel: str, ylabel: str) -> None:
    ax.set_title(title, loc="left", fontsize=10, color=INK)
    ax.set(xlabel=xlabel, ylabel=ylabel)
    tidy(ax, "both")


_GROWTH_ARMS = {
    "sensitivity": (GROWN, "-", 2.0),
    "random": (PINK, "-.", 1.4),
    "fixed": (GREEN, ":", 1.6),
    BIG: (KEPT, "--", 2.0),
    "small": (QUIET, "-", 1.2),
}


def growth(found: Mapping[str, Any]) -> Figure:
    """Training loss of every arm against multiply-adds, a panel for each task."""
    curves = found["curves"]
    figure = Figure(figsize=(4.8 * len(curves), 4.2), dpi=110, layout="constrained")
    panels = figure.subplots(1, len(curves), squeeze=False)[0]
    for ax, task in zip(panels, curves, strict=True):
        for name, runs in curves[task].items():
            colour, line, width = _GROWTH_ARMS[name]
            spent, (low, median, high) = _quartiles(runs)
            ax.plot(spent, median, color=colour, linestyle=line, linewidth=width, label=name)
            if name in (next(iter(curves[task])), BIG):
                ax.fill_between(spent, low, high, color=colour, alpha=0.13, linewidth=0)
        ax.set_yscale("log")
        ax.set_xlabel("multiply-adds spent, in 10⁹")
        about = found["settings"][task]
        title = f"{task}, {about['small']} → {about['big']} blocks, {found['seeds']} seeds"
        ax.set_title(title, loc="left", fontsize=11, color=INK)
        tidy(ax, "y")
    panels[0].set_ylabel("training loss in nats")
    panels[0].legend(frameon=False, fontsize=9)
    return figure


def _quartiles(runs: Sequence[Mapping[str, Sequence[float]]]) -> tuple[Array, Array]:
    """What was spent, and the quartiles over seeds of the loss then, shape (3, points)."""
    spent = np.linspace(0, min(run["multiply_adds"][-1] for run in runs), 200)[1:]
    values = [np.interp(spent, run["multiply_adds"], smoothed(run["loss"])) for run in runs]
    return spent / 1e9, np.quantile(values, [0.25, 0.5, 0.75], axis=0)
