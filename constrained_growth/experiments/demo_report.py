"""The demonstration as a reader on a terminal sees it, and its picture."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

import constrained_growth as cg
from constrained_growth.experiments.demo import DemoResult, Question, Row
from constrained_growth.plotting import plot_growth

_CAUTION = "This is one run with one seed; others can end differently (try --seed)."


def question(asked: Question) -> RenderableType:
    """Where training stands, the table of candidates and the decision."""
    solution, decision = asked.solution, asked.solution.decision
    state = "Plateau" if asked.plateau_reached else "No plateau yet, but the limit of epochs"
    choice = f"insert {', '.join(decision.chosen)}" if decision.chosen else "insert nothing"
    return Group(
        Text(f"{state} after {asked.epochs} epochs, training loss {solution.loss:.5f} nats."),
        Text(f"‖∇_θ L‖ = {solution.stationarity:.3g}. {solution.status.value}\n"),
        _candidates(asked.candidates, decision.chosen),
        Text(f"Decision: {choice} ({decision.reason}).\n", style="bold"),
    )


def ending(result: DemoResult) -> RenderableType:
    """By how much the insertion moved the loss, the table of both networks, and the verdict."""
    before, after = result.kept_at_insertion.train_loss, result.grown_at_insertion.train_loss
    return Group(
        Text(
            f"Training loss before the insertion {before:.9f}, after it {after:.9f}, "
            f"moved by {abs(after - before):.1e}.\n"
        ),
        _scores(result),
        Text(verdict(result), style="bold"),
    )


def verdict(result: DemoResult) -> str:
    """What the numbers of this run say, however they turned out."""
    if not result.chosen:
        return "Nothing was inserted, so both networks are the same. " + _CAUTION
    kept, grown = result.kept_at_end, result.grown_at_end
    peak = max(result.losses_grown)
    jump = (
        f" On the way the loss jumped to {peak:.3g}: the steps were long for the grown network."
        if peak > 2 * result.losses_grown[0]
        else ""
    )
    return (
        f"Training loss {grown.train_loss:.3g} nats with the inserted layer and its "
        f"{grown.parameters - kept.parameters} parameters, {kept.train_loss:.3g} without: "
        f"{_comparison(grown.train_loss, kept.train_loss)}.{jump} Test accuracy "
        f"{grown.test_accuracy:.1%} against {kept.test_accuracy:.1%}. {_CAUTION}"
    )


def _comparison(grown: float, kept: float) -> str:
    if not math.isfinite(grown) or not math.isfinite(kept):
        return "training diverged"
    if abs(grown - kept) <= 0.01 * kept:
        return "next to no difference"
    if grown < 2 * kept:
        return f"{abs(grown / kept - 1):.0%} {'lower' if grown < kept else 'higher'}"
    return f"{grown / kept:.3g} times as high" if kept > 0 else "higher"


def picture(result: DemoResult) -> Figure:
    """The losses around the insertion beside the sensitivities that decided it."""
    kept, grown = result.kept_at_end, result.grown_at_end
    momentum = f" with momentum {m:g}" if (m := result.setting.momentum) else ""
    return plot_growth(
        result.losses_before,
        {"kept": result.losses_kept, "grown": result.losses_grown},
        {
            row.name: cg.Sensitivity(
                row.sensitivity,
                math.nan if row.standard_error is None else row.standard_error,
                baseline=row.baseline,
                site=row.site,
            )
            for row in result.candidates
        },
        chosen=result.chosen,
        title=(
            f"Training loss {grown.train_loss:.3g} nats with the inserted layer, "
            f"{kept.train_loss:.3g} without"
            if result.chosen
            else "Nothing was inserted: no candidate promised more than the layers in place"
        ),
        subtitle=(
            f"{result.data}, ReLU network {'–'.join(map(str, result.layers))}, full-batch gradient "
            f"descent{momentum}; one run, seed {result.seed}. Test accuracy "
            f"{grown.test_accuracy:.1%} grown, {kept.test_accuracy:.1%} kept."
        ),
    )


def _candidates(rows: tuple[Row, ...], chosen: tuple[str, ...]) -> Table:
    table = Table("candidate", "after module", title="Candidates, in order of depth")
    for heading in ("sensitivity ‖λ‖ ± s.e.", "pinned", "added"):
        table.add_column(heading, justify="right")
    for row in rows:
        error = "?" if row.standard_error is None else f"{row.standard_error:.4f}"
        table.add_row(
            row.name,
            row.site,
            f"{row.sensitivity:.4f} ± {error}",
            str(row.pinned),
            str(row.added),
            style="bold" if row.name in chosen else None,
        )
    table.caption = (
        "± is the standard error, the data being a sample; for the loss on these data λ is exact."
    )
    if (baseline := rows[0].baseline) is not None:
        table.caption = (
            f"Mean gradient norm of the layers in place: {baseline:.4f}.\n{table.caption}"
        )
    return table


def _scores(result: DemoResult) -> Table:
    table = Table("", "network", title=f"{result.data}, seed {result.seed}")
    for heading in ("train loss [nats]", "test accuracy", "parameters"):
        table.add_column(heading, justify="right")
    later = f"{len(result.losses_kept) - 1} epochs later"
    for moment, name, score in (
        ("at insertion", "kept", result.kept_at_insertion),
        ("", "grown", result.grown_at_insertion),
        (later, "kept", result.kept_at_end),
        ("", "grown", result.grown_at_end),
    ):
        if moment == later:
            table.add_section()
        numbers = f"{score.train_loss:.5f}", f"{score.test_accuracy:.1%}", str(score.parameters)
        table.add_row(moment, name, *numbers)
    return table
