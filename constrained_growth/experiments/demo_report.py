"""The demonstration as a reader on a terminal sees it, and its picture."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import constrained_growth as cg
from constrained_growth.experiments.demo import Numbers
from constrained_growth.experiments.tables import number
from constrained_growth.plotting import plot_growth

_CAUTION = "This is one run with one seed; others can end differently (try --seed)."


def question(found: Numbers, solution: cg.Solution) -> RenderableType:
    """Where training stands, the table of candidates and the decision."""
    state = "Plateau" if found["plateau_reached"] else "No plateau yet, but the limit of epochs"
    epochs, chosen = len(found["losses_before"]) - 1, found["chosen"]
    choice = f"insert {', '.join(chosen)}" if chosen else "insert nothing"
    sure = number(found["agreement"], ".0%", "?")
    return Group(
        Text(f"{state} after {epochs} epochs, training loss {solution.loss:.5f} nats."),
        Text(f"‖∇_θ L‖ = {solution.stationarity:.3g}. {solution.status.value}\n"),
        _candidates(found),
        Text(f"Decision: {choice} ({found['reason']}).", style="bold"),
        Text(f"{sure} of bootstrap samples of these data lead to the same decision.\n"),
    )


def ending(found: Numbers) -> RenderableType:
    """By how much the insertion moved the loss, the table of both networks, and the verdict."""
    before, after = (found[f"{name}_at_insertion"]["train_loss"] for name in ("kept", "grown"))
    return Group(
        Text(
            f"Training loss before the insertion {before:.9f}, after it {after:.9f}, "
            f"moved by {abs(after - before):.1e}.\n"
        ),
        _scores(found),
        Text(verdict(found), style="bold"),
    )


def verdict(found: Numbers) -> str:
    """What the numbers of this run say, however they turned out."""
    if not found["chosen"]:
        return "Nothing was inserted, so both networks are the same. " + _CAUTION
    kept, grown = found["kept_at_end"], found["grown_at_end"]
    peak = max(found["losses_grown"])
    jump = (
        f" On the way the loss jumped to {peak:.3g}: the steps were long for the grown network."
        if peak > 2 * found["losses_grown"][0]
        else ""
    )
    return (
        f"Training loss {grown['train_loss']:.3g} nats with the inserted layer and its "
        f"{grown['parameters'] - kept['parameters']} parameters, {kept['train_loss']:.3g} without: "
        f"{_comparison(grown['train_loss'], kept['train_loss'])}.{jump} Test accuracy "
        f"{grown['test_accuracy']:.1%} against {kept['test_accuracy']:.1%}. {_CAUTION}"
    )


def _comparison(grown: float, kept: float) -> str:
    if not math.isfinite(grown) or not math.isfinite(kept):
        return "training diverged"
    if abs(grown - kept) <= 0.01 * kept:
        return "next to no difference"
    if grown < 2 * kept:
        return f"{abs(grown / kept - 1):.0%} {'lower' if grown < kept else 'higher'}"
    return f"{grown / kept:.3g} times as high" if kept > 0 else "higher"


def picture(found: Numbers) -> Figure:
    """The losses around the insertion beside the sensitivities that decided it."""
    kept, grown = found["kept_at_end"], found["grown_at_end"]
    momentum = f" with momentum {m:g}" if (m := found["setting"]["momentum"]) else ""
    return plot_growth(
        found["losses_before"],
        {"kept": found["losses_kept"], "grown": found["losses_grown"]},
        {
            row["name"]: cg.Sensitivity(
                row["sensitivity"],
                row["standard_error"],
                site=row["site"],
            )
            for row in found["candidates"]
        },
        chosen=found["chosen"],
        title=(
            f"Training loss {grown['train_loss']:.3g} nats with the inserted layer, "
            f"{kept['train_loss']:.3g} without"
            if found["chosen"]
            else "Nothing was inserted"
        ),
        subtitle=(
            f"{found['data']}, ReLU network {'–'.join(map(str, found['layers']))}, full-batch "
            f"gradient descent{momentum}; one run, seed {found['seed']}. Test accuracy "
            f"{grown['test_accuracy']:.1%} grown, {kept['test_accuracy']:.1%} kept."
        ),
    )


def _candidates(found: Numbers) -> Table:
    table = Table("candidate", "after module", title="Candidates, in order of depth")
    for heading in ("sensitivity ± s.e.", "pinned", "added"):
        table.add_column(heading, justify="right")
    for row in found["candidates"]:
        table.add_row(
            row["name"],
            row["site"],
            f"{row['sensitivity']:.4f} ± {number(row['standard_error'], '.4f', '?')}",
            *(str(row[column]) for column in ("pinned", "added")),
            style="bold" if row["name"] in found["chosen"] else None,
        )
    table.caption = (
        "± is the standard error, the data being a sample; for the loss on these data λ is exact."
    )
    return table


def _scores(found: Numbers) -> Table:
    table = Table("", "network", title=f"{found['data']}, seed {found['seed']}")
    for heading in ("train loss [nats]", "test accuracy", "parameters"):
        table.add_column(heading, justify="right")
    later = f"{len(found['losses_kept']) - 1} epochs later"
    for moment, when in (("at_insertion", "at insertion"), ("at_end", later)):
        for name in ("kept", "grown"):
            score = found[f"{name}_{moment}"]
            numbers = f"{score['train_loss']:.5f}", f"{score['test_accuracy']:.1%}"
            table.add_row(when if name == "kept" else "", name, *numbers, str(score["parameters"]))
        table.add_section()
    return table
