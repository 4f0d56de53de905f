"""The demonstration as a reader on a terminal sees it, and its picture."""

from __future__ import annotations

from statistics import mean

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.layout_engine import ConstrainedLayoutEngine
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import constrained_growth as cg
from constrained_growth._style import GROWN, INK, QUIET, legend, scale, tidy
from constrained_growth.experiments.demo import KEPT, Numbers, gain
from constrained_growth.experiments.tables import number
from constrained_growth.plotting import plot_sensitivities


def report(found: Numbers) -> RenderableType:
    """The run with the median gain in full, and what all runs say."""
    run, setting = found["runs"][found["median"]], found["setting"]
    again = run["known_images"]
    return Group(
        Text(
            f"A network of {setting['blocks']} residual blocks reads {run['accuracy']:.1%} of "
            f"digits that it has not seen. Now they are {found['change']}. Would another layer "
            "help, and where? Of its old weights only those of the last layer train on.\n"
        ),
        _places(run),
        Text(f"Decision: {_decision(run)}", style="bold"),
        Text(
            f"{number(run['agreement'], '.0%', '?')} of bootstrap samples of these data put the "
            f"same place first; the step there lowers the loss of images set aside (p = "
            f"{run['pvalue']:.1g}, {run['effect_size']:.2f} standard deviations).\n"
        ),
        Text(verdict(run), style="bold"),
        Text(
            f"\nAsked about digits as it knows them: {_decision(again)} "
            f"(p = {again['pvalue']:.1g}, {again['effect_size']:.2f} standard deviations, of at "
            f"least 0.30). Trained on with them, it ends at {_ends(again)[KEPT]:.3f} nats without "
            f"a layer, and at {_ends(again)[again['best']]:.3f} with one {again['best']}.\n"
        ),
        Text(account(found), style="bold"),
    )


def verdict(run: Numbers) -> str:
    """How one run ended, however that was."""
    ends = _ends(run)
    if run["chosen"] is None:
        return f"Nothing was inserted: {ends[KEPT]:.3f} nats on test images."
    others = {name: end for name, end in ends.items() if name not in (KEPT, run["chosen"])}
    return (
        f"Loss on test images: {ends[KEPT]:.3f} nats without a layer, {ends[run['chosen']]:.3f} "
        f"with one {run['chosen']}, {min(others.values()):.3f} to {max(others.values()):.3f} with "
        "one at the other places."
    )


def account(found: Numbers) -> str:
    """On how many of the runs the decision was right, in each of its parts."""
    runs = found["runs"]
    asked = [run for run in runs if run["chosen"]]
    helped = sum(gain(run) > 0 for run in asked)
    means = [_ends(run)[run["chosen"]] < mean(_others(run)) for run in asked]
    worst = [_ends(run)[run["chosen"]] < max(_others(run)) for run in asked]
    again = [run["known_images"] for run in runs]
    nothing = [run for run in again if run["chosen"] is None]
    lost = [_ends(run)[KEPT] - _ends(run)[run["best"]] for run in nothing]
    return (
        f"Of {len(runs)} networks (seeds {runs[0]['seed']} to {runs[-1]['seed']}; shown is that "
        f"with the median gain) {len(asked)} got a layer, which helped {helped}. It ended lower "
        f"than the mean of the other places in {sum(means)}, than the worst of them in "
        f"{sum(worst)}. For images as they know them {len(nothing)} got none"
        + (f", where one would have gained {mean(lost):.3f} nats." if lost else ".")
    )


def picture(found: Numbers) -> Figure:
    """Losses on test images with the layer at each place, beside the sizes that decided."""
    run = found["runs"][found["median"]]
    layout = ConstrainedLayoutEngine(w_pad=0.15, h_pad=0.1, rect=(0, 0, 1, 0.86))
    figure = Figure(figsize=(11, 5.4), dpi=160, layout=layout)
    left, right = figure.subplots(1, 2, width_ratios=(1.6, 1))
    _curves(left, run, found["setting"]["every"])
    plot_sensitivities(
        {
            place["name"]: cg.Sensitivity(
                place["sensitivity"], place["standard_error"], site=place["site"]
            )
            for place in run["places"]
        },
        right,
        chosen=[run["chosen"]] if run["chosen"] else [],
    )
    for panel, heading in ((left, "What the layer does"), (right, "What decided where")):
        panel.set_title(heading, loc="left", fontsize=12, color=INK, pad=12)
    ends = _ends(run)
    title = (
        f"Loss on test images {ends[run['chosen']]:.3g} nats with the layer, {ends[KEPT]:.3g} "
        "without"
        if run["chosen"]
        else "Nothing was inserted"
    )
    figure.text(0.015, 0.965, title, fontsize=15, fontweight="bold", color=INK, va="top")
    subtitle = (
        f"A network that has learnt 8 × 8 digits meets {found['change']} ones; residual "
        f"convolutions, old weights frozen but for the last layer. Seed {run['seed']}, the median "
        f"of {len(found['runs'])}."
    )
    figure.text(0.015, 0.905, subtitle, fontsize=10.5, color=INK, va="top")
    return figure


def _curves(ax: Axes, run: Numbers, every: int) -> None:
    styles = {
        KEPT: {"color": INK, "linestyle": (0, (4, 3)), "linewidth": 2},
        run["chosen"]: {"color": GROWN, "linewidth": 3, "zorder": 3},
    }
    markers = iter("osv^DP*")
    losses = run["losses"]
    for name, values in losses.items():
        other = {"color": QUIET, "marker": next(markers), "markevery": 3, "linewidth": 1.2}
        label = f"{name}, chosen" if name == run["chosen"] else name
        steps = range(0, every * len(values), every)
        ax.plot(steps, values, label=f"{label}: {values[-1]:.3f}", **styles.get(name, other))
    scale(ax, [loss for values in losses.values() for loss in values])
    ax.set_xlabel("steps on the new images")
    ax.set_ylabel("loss on test images [nats]")
    legend(ax)
    tidy(ax, grid="y")


def _places(run: Numbers) -> Table:
    table = Table("place", title="Where a residual block could go, in order of depth")
    for heading in ("sensitivity ± s.e.", "new parameters", "loss on test images [nats]"):
        table.add_column(heading, justify="right")
    for place in run["places"]:
        error = number(place["standard_error"], ".3f", "?")
        table.add_row(
            place["name"],
            f"{place['sensitivity']:.3f} ± {error}",
            str(place["added"]),
            f"{run['losses'][place['name']][-1]:.3f}",
            style="bold" if place["name"] == run["chosen"] else None,
        )
    table.add_row(KEPT, "", "0", f"{run['losses'][KEPT][-1]:.3f}")
    table.caption = "The last column is the truth: a layer was really trained at every place."
    return table


def _decision(run: Numbers) -> str:
    return f"a layer {run['chosen']}" if run["chosen"] else "insert nothing"


def _ends(run: Numbers) -> dict[str, float]:
    return {name: losses[-1] for name, losses in run["losses"].items()}


def _others(run: Numbers) -> list[float]:
    return [end for name, end in _ends(run).items() if name not in (KEPT, run["chosen"])]
