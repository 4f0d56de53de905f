"""The results of the experiments as a reader on a terminal sees them."""

from __future__ import annotations

import math

from matplotlib.figure import Figure
from rich.console import Group, RenderableType
from rich.table import Table
from rich.text import Text

from constrained_growth.experiments.demo import DemoResult, Question, Row, Score
from constrained_growth.plotting.solutions import plot_growth
from constrained_growth.solution import Sensitivity


def question(asked: Question) -> RenderableType:
    """Where training stands, the table of candidates and the decision."""
    solution = asked.solution
    state = "Plateau" if asked.plateau_reached else "No plateau yet, but the limit of epochs"
    decision = solution.decision
    choice = f"insert {', '.join(decision.chosen)}" if decision.chosen else "insert nothing"
    return Group(
        Text(f"{state} after {asked.epochs} epochs, training loss {solution.loss:.5f} nats."),
        Text(f"‖∇_θ L‖ = {solution.stationarity:.3g}. {solution.status.value}\n"),
        _candidates(asked.candidates, decision.chosen),
        Text(f"Decision: {choice} ({decision.reason}).\n", style="bold"),
    )


def ending(result: DemoResult) -> RenderableType:
    """What the insertion did at once, the table of both networks and what it says."""
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
    """What the numbers of this run say, whichever way they turned out."""
    if not result.chosen:
        return "Nothing was inserted, so both networks are the same. " + _CAUTION
    kept, grown = result.kept_at_end, result.grown_at_end
    peak = max(result.losses_grown)
    jump = (
        f" On its way the loss jumped to {peak:.3g}: the step size was long for the grown network."
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
    """The losses around the insertion beside the sensitivities it was decided on."""
    kept, grown = result.kept_at_end, result.grown_at_end
    momentum = f" with momentum {m:g}" if (m := result.setting.momentum) else ""
    return plot_growth(
        result.losses_before,
        {"kept": result.losses_kept, "grown": result.losses_grown},
        {row.name: _sensitivity(row) for row in result.candidates},
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


_CAUTION = "This is one run with one seed; others can end otherwise (try --seed)."


def _candidates(rows: tuple[Row, ...], chosen: tuple[str, ...]) -> Table:
    table = Table("candidate", "after module", title="Candidates, in order of depth")
    table.add_column("sensitivity ‖λ‖ ± s.e.", justify="right")
    table.add_column("pinned", justify="right")
    table.add_column("added", justify="right")
    for row in rows:
        table.add_row(
            row.name,
            row.site,
            f"{row.sensitivity:.4f} ± {_error(row)}",
            str(row.pinned),
            str(row.added),
            style="bold" if row.name in chosen else None,
        )
    baseline = rows[0].baseline
    known = (
        "" if baseline is None else f"Mean gradient norm of the layers in place: {baseline:.4f}."
    )
    table.caption = (
        f"{known}\n± takes the data for a sample; for the loss on these data λ is exact."
    )
    return table


def _sensitivity(row: Row) -> Sensitivity:
    return Sensitivity(
        row.sensitivity,
        math.nan if row.standard_error is None else row.standard_error,
        baseline=row.baseline,
        site=row.site,
    )


def _error(row: Row) -> str:
    return "?" if row.standard_error is None else f"{row.standard_error:.4f}"


def _scores(result: DemoResult) -> Table:
    table = Table("", "network", title=f"{result.data}, seed {result.seed}")
    for heading in ("train loss [nats]", "test accuracy", "parameters"):
        table.add_column(heading, justify="right")
    _add(table, "at insertion", result.kept_at_insertion, result.grown_at_insertion)
    table.add_section()
    further = len(result.losses_kept) - 1
    _add(table, f"{further} epochs later", result.kept_at_end, result.grown_at_end)
    return table


def _add(table: Table, moment: str, kept: Score, grown: Score) -> None:
    for when, name, score in ((moment, "kept", kept), ("", "grown", grown)):
        numbers = f"{score.train_loss:.5f}", f"{score.test_accuracy:.1%}", str(score.parameters)
        table.add_row(when, name, *numbers)
